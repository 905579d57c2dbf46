"""The application, running in a thread on a free port, with a clock and a mailbox of the test's own."""

from __future__ import annotations

import asyncio
import queue
import re
import socket
import threading
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from vtoken import Settings, TokenManager

from password_reset.app import create_app
from password_reset.config import Config
from password_reset.members import invitation
from password_reset.tokens import POLICIES

T = TypeVar("T")

SECONDS = 30
"""How long a test waits for what has to happen; no test passes or fails by how fast it does."""


def in_a_thread(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in an event loop of its own: in the main thread Playwright's is running."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


class Clock:
    """Time that goes on when a test says so."""

    def __init__(self) -> None:
        self._now = datetime(2030, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self._now

    def advance(self, **by: float) -> None:
        """Let time pass, e.g. ``advance(minutes=1)``."""
        self._now += timedelta(**by)


class Site:
    """The running application; use it as a context manager."""

    def __init__(self, data: Path, tokens_url: str) -> None:
        self.clock = Clock()
        self.mails: queue.Queue[EmailMessage] = queue.Queue()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.config = Config(
            data=data,
            tokens_url=tokens_url,
            settings=Settings(secret="of the tests, and never of a site"),
            base_url=self.url,
        )
        app = create_app(self.config, self.clock, self.mails.put)
        self._server = _Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="on"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})

    def __enter__(self) -> Site:
        self._thread.start()
        assert self._server.is_up.wait(SECONDS)
        assert self._server.started, "the application did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(SECONDS)
        self._socket.close()
        assert not self._thread.is_alive()

    def next_mail(self, to: str) -> str:
        """The text of the next message, which must be to this address."""
        message = self.mails.get(timeout=SECONDS)
        assert message["To"] == to
        return str(message.get_content())

    def next_link(self, to: str) -> str:
        """The link in the next message."""
        return link_in(self.next_mail(to))

    def next_code(self, to: str) -> str:
        """The code in the next message, as it is written there."""
        return code_in(self.next_mail(to))

    def invitation(self) -> str:
        """The link of an invitation, made from outside the application."""
        return in_a_thread(self._invitation())

    async def _invitation(self) -> str:
        async with TokenManager.from_url(
            self.config.tokens_url, settings=self.config.settings, policies=POLICIES, clock=self.clock
        ) as manager:
            return await invitation(manager, self.url)


def link_in(mail: str) -> str:
    """The link in a message."""
    found = re.search(r"http\S+key=\S+", mail)
    assert found
    return found[0]


def code_in(mail: str) -> str:
    """The code in a message."""
    found = re.search(r"\d{3} \d{3}", mail)
    assert found
    return found[0]


class _Server(uvicorn.Server):
    """Says when it is up, or has failed to start."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_up = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        finally:
            self.is_up.set()

    def install_signal_handlers(self) -> None:
        """Signals are the main thread's."""
