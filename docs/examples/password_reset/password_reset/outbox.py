"""Messages are sent in the background, so that no answer waits for a mail server.

There are two queues: a stranger who asks for many messages must not hold back the one that says that a
password was changed.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.message import EmailMessage

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream
from vtoken import IssuedToken, TokenManager

from password_reset.mail import Deliver

logger = logging.getLogger(__name__)

_WAITING = 1000
_LAST_SECONDS = 5


class Busy(Exception):
    """Too many messages are waiting."""


@dataclass(frozen=True)
class _Letter:
    """What a message will say; it is written in the background, too."""

    email: str
    subject: str
    key: str = field(default="", repr=False)
    code: str = field(default="", repr=False)
    token: IssuedToken | None = None
    is_real: bool = True
    """False for an address without an account: the message is written, and not delivered."""


class Outbox:
    """Sends messages to accounts that exist, one after the other."""

    def __init__(self, manager: TokenManager, deliver: Deliver, base_url: str, sender: str) -> None:
        self._manager = manager
        self._deliver = deliver
        self._base_url = base_url
        self._sender = sender
        self._asked, self._to_send = anyio.create_memory_object_stream[_Letter](_WAITING)
        self._changed, self._to_notify = anyio.create_memory_object_stream[_Letter](_WAITING)

    def require_room(self) -> None:
        """Refuse what could not be sent.

        Raises:
            Busy: too many messages are waiting.
        """
        if self._asked.statistics().current_buffer_used >= _WAITING:
            raise Busy

    def send(self, email: str, token: IssuedToken | None) -> None:
        """Have a link and a code sent; without a token, do the same work and send nothing.

        Raises:
            Busy: too many messages are waiting.
        """
        key, code = (token.key, token.code or "") if token else ("reset_" + "-" * 49, "000000")
        letter = _Letter(email, "Set a new password", key, code, token, is_real=token is not None)
        try:
            self._asked.send_nowait(letter)
        except anyio.WouldBlock:
            raise Busy from None

    def notify(self, email: str) -> None:
        """Have the owner told that the password was changed."""
        try:
            self._changed.send_nowait(_Letter(email, "Your password was changed"))
        except anyio.WouldBlock:  # the password is changed all the same
            logger.warning("a message about a changed password could not be queued")

    def _written(self, letter: _Letter) -> EmailMessage:
        message = EmailMessage()
        message["From"] = self._sender
        message["To"] = letter.email  # equal to the stored address
        message["Subject"] = letter.subject
        if letter.key:
            message.set_content(
                "You, or somebody else, asked for a new password.\n\n"
                "Open this link within an hour:\n\n"
                f"{self._base_url}/reset?key={letter.key}\n\n"
                "Or type this code, within ten minutes, into the page where you asked for it:\n\n"
                f"{letter.code[:3]} {letter.code[3:]}\n\n"
                "Tell it to nobody. If it was not you, do nothing: your password stays as it is.\n"
            )
        else:
            message.set_content(
                "Your password was changed a moment ago, and you were signed out everywhere.\n\n"
                f"If it was not you, ask for a new one at once: {self._base_url}/forgot\n"
            )
        return message

    def _dispatch(self, letter: _Letter) -> None:
        """Write a message and deliver it: in a thread, because both keep the event loop from answering."""
        message = self._written(letter)
        if letter.is_real:
            self._deliver(message)

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Send while a block runs. What waits when it ends is still sent, for a few seconds."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._run, self._to_send)
            group.start_soon(self._run, self._to_notify)
            try:
                yield
            finally:
                self._asked.close()
                self._changed.close()
                group.cancel_scope.deadline = anyio.current_time() + _LAST_SECONDS

    async def _run(self, letters: MemoryObjectReceiveStream[_Letter]) -> None:
        with letters:
            async for letter in letters:
                try:
                    await anyio.to_thread.run_sync(self._dispatch, letter)
                except Exception:  # the next one may fare better, and this person can ask again
                    logger.exception("a message could not be sent")
                    if letter.token is not None:
                        await self._manager.deactivate(letter.token)
