"""Messages are asked for here and sent in the background, so that the answer takes as long for an address
without an account as for one with it."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.message import EmailMessage
from typing import Literal

import anyio
from vtoken import CooldownActive, TokenManager

from password_reset.accounts import Accounts
from password_reset.mail import Deliver
from password_reset.tokens import CODE, RESET, address

logger = logging.getLogger(__name__)

_WAITING = 1000
_LAST_SECONDS = 5


class Busy(Exception):
    """Too many messages are waiting."""


@dataclass(frozen=True)
class Wanted:
    """A message that was asked for."""

    kind: Literal["link", "code", "changed"]
    email: str
    browser: str = ""


class Outbox:
    """Makes tokens and sends them to accounts that exist, one message after the other."""

    def __init__(
        self, manager: TokenManager, accounts: Accounts, deliver: Deliver, base_url: str, sender: str
    ) -> None:
        self._manager = manager
        self._accounts = accounts
        self._deliver = deliver
        self._base_url = base_url
        self._sender = sender
        self._put, self._get = anyio.create_memory_object_stream[Wanted](_WAITING)

    def ask(self, wanted: Wanted) -> None:
        """Have a message sent, if its address has an account.

        Raises:
            Busy: too many are waiting.
        """
        try:
            self._put.send_nowait(wanted)
        except anyio.WouldBlock:
            raise Busy from None

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Send while a block runs. What waits when it ends is still sent, for a few seconds."""
        with self._put, self._get:
            async with anyio.create_task_group() as group:
                group.start_soon(self._run)
                yield
                self._put.close()
                group.cancel_scope.deadline = anyio.current_time() + _LAST_SECONDS

    async def _run(self) -> None:
        async for wanted in self._get:
            try:
                await self._send(wanted)
            except CooldownActive:
                logger.info("a message was asked for again too soon, and not sent")
            except Exception:  # the next one may be luckier, and this person can ask again
                logger.exception("a message could not be sent")

    async def _send(self, wanted: Wanted) -> None:
        if await self._accounts.password(wanted.email) is None:
            return
        message = EmailMessage()
        message["From"] = self._sender
        message["To"] = wanted.email  # equal to the stored address
        if wanted.kind == "link":
            token = await self._manager.deactivate_and_create(address(wanted.email), RESET)
            message["Subject"] = "Set a new password"
            message.set_content(
                "You, or somebody else, asked for a new password.\n"
                "This link is good for one hour and one use:\n\n"
                f"{self._base_url}/reset?key={token.key}\n\n"
                "If it was not you, do nothing: your password stays as it is.\n"
            )
        elif wanted.kind == "code":
            token = await self._manager.deactivate_and_create(
                address(wanted.email), CODE, context=wanted.browser
            )
            message["Subject"] = "Your code"
            message.set_content(
                f"Your code for a new password is {token.key[:3]} {token.key[3:]}.\n\n"
                "Type it into the page where you asked for it, within ten minutes. Tell it to nobody.\n"
            )
        else:
            message["Subject"] = "Your password was changed"
            message.set_content(
                "Your password was changed a moment ago, and you were signed out everywhere.\n\n"
                f"If it was not you, ask for a new one at once: {self._base_url}/forgot\n"
            )
        await anyio.to_thread.run_sync(self._deliver, message)
