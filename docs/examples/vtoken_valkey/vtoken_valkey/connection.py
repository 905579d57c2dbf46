"""The connection to the server: its life, and what becomes of the driver's errors."""

from __future__ import annotations

import asyncio
import contextvars
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar, cast

from valkey.asyncio import Valkey
from valkey.exceptions import (
    AuthenticationError,
    ConnectionError,  # noqa: A004  # the driver's name
    NoScriptError,
    ResponseError,
    TimeoutError,  # noqa: A004  # the driver's name
    ValkeyError,
)
from vtoken import (
    BackendClosed,
    BackendError,
    BackendUnavailable,
    ConfigurationError,
    CorruptStore,
    OutcomeUnknown,
)

_T = TypeVar("_T")

_SCHEMA: Final = 1
_SECONDS: Final = {"socket_connect_timeout": 5, "socket_timeout": 8}
_REFUSED: Final = (
    "OOM",
    "MISCONF",
    "READONLY",
    "NOPERM",
    "LOADING",
    "CLUSTERDOWN",
    "MASTERDOWN",
    "NOREPLICAS",
)
"""What a server begins its answer with where it did not do what was asked."""


class Connection:
    """A pool of connections to one server, in the event loop that opened it.

    Args:
        url: of the server.
        durable: whether the server has to write each command to its disk before it answers.
        scripts: those that are sent by their digest.
    """

    _client: Any = None
    _opens = 0
    _pid: int
    _loop: asyncio.AbstractEventLoop

    def __init__(self, url: str, durable: bool, scripts: Sequence[str]) -> None:
        if not isinstance(url, str) or not url.startswith(("valkey://", "valkeys://")):
            raise ConfigurationError("a Valkey backend needs a URL such as valkey://localhost:6379/0")
        made = _client(url)
        if made is None:
            raise ConfigurationError("the URL of the Valkey server is not understood")
        self._url = url
        self._durable = durable
        self._scripts = tuple(scripts)
        self._digests: dict[str, str] = {}
        self._lock = asyncio.Lock()

    def __repr__(self) -> str:
        return "<Connection>"

    async def open(self) -> None:
        """Connect, and check what the server is."""
        async with self._lock:
            if self._opens and self._pid == os.getpid() and not self._loop.is_closed():
                self.check_place()
                self._opens += 1
                return
            self._pid, self._loop = os.getpid(), asyncio.get_running_loop()
            self._client, self._opens = _client(self._url), 1
            try:
                await self._prepare()
            except BaseException:
                await self._disconnect()
                self._opens = 0
                raise

    async def _prepare(self) -> None:
        info = await self.read(lambda client: client.info("persistence"))
        if self._durable and not info.get("aof_enabled"):
            raise BackendUnavailable(
                "the Valkey server keeps no append-only file, so that a crash would lose tokens: start it"
                " with --appendonly yes --appendfsync always, or say durable=False"
            )
        await self.script_loaded()
        await self.read(lambda client: client.set("vtoken:schema", str(_SCHEMA), nx=True))
        await self.check()

    async def check(self) -> None:
        """Whether the server answers, and its store is one that this release can work on."""
        raw = await self.read(lambda client: client.get("vtoken:schema"))
        if raw is None or not raw.isdigit():
            raise CorruptStore("Valkey: the number of the schema, vtoken:schema, is gone or damaged")
        if int(raw) > _SCHEMA:
            raise BackendError(
                f"the store has schema {int(raw)}, newer than {_SCHEMA}: upgrade vtoken-valkey"
            )

    async def close(self) -> None:
        """Undo one :meth:`open`."""
        async with self._lock:
            if not self._opens:
                return
            if self._pid != os.getpid() or self._loop.is_closed():
                self._opens = 0  # the sockets are another process's, or went with their event loop
                return
            self.check_place()
            self._opens -= 1
            if not self._opens:
                await self._disconnect()

    async def _disconnect(self) -> None:
        client, self._client = self._client, None
        await _to_the_end(client.aclose())

    def check_place(self) -> None:
        """Raise :class:`BackendClosed` unless it is open here."""
        if not self._opens:
            raise BackendClosed("the Valkey backend is not open: use `async with manager:`")
        if self._pid != os.getpid():
            raise BackendClosed("the Valkey backend was opened in another process: open one after the fork")
        if self._loop is not asyncio.get_running_loop():
            raise BackendClosed("the Valkey backend was opened in another event loop: open one in each loop")

    async def read(self, command: Callable[[Any], Awaitable[_T]]) -> _T:
        """Run a command that changes nothing, or nothing that a second time would change."""
        return await self._run(command, writes=False)

    async def script(
        self, script: str, keys: list[str], arguments: list[Any], *, writes: bool = False
    ) -> Any:
        """Run a script."""
        digest = self._digests.get(script, "")
        values = [*keys, *arguments]
        try:
            return await self._run(lambda client: client.evalsha(digest, len(keys), *values), writes=writes)
        except _NotLoaded:
            pass
        await self.script_loaded()  # the server was restarted
        digest = self._digests[script]
        return await self._run(lambda client: client.evalsha(digest, len(keys), *values), writes=writes)

    async def script_loaded(self) -> None:
        """Let the server know the scripts."""
        for script in self._scripts:
            self._digests[script] = await self.read(lambda client: client.script_load(script))  # noqa: B023  # awaited at once

    async def _run(self, command: Callable[[Any], Awaitable[_T]], *, writes: bool) -> _T:
        # Each operation begins with a read. One that meets a connection whose server has gone is tried again
        # on a new one; a write is not, because it may have happened.
        failure = BackendError("Valkey: nothing was tried")
        for _ in range(1 if writes else 2):
            self.check_place()
            try:
                return await _to_the_end(command(self._client))
            except (ValkeyError, OSError, UnicodeError) as error:
                failure = _translated(error, writes)
                if not isinstance(error, ConnectionError):
                    break
        raise failure  # after the except block: the driver's error quotes values


class _NotLoaded(BackendError):
    """The server does not know the script."""


def _translated(error: Exception, writes: bool) -> BackendError:
    message = str(error)
    if isinstance(error, NoScriptError):
        return _NotLoaded("Valkey: no such script")
    if isinstance(error, AuthenticationError):
        return BackendUnavailable("Valkey: the user or the password is refused")
    if isinstance(error, ResponseError):
        if message.startswith("WRONGTYPE"):
            return CorruptStore("Valkey: a key of vtoken holds something else")
        if any(word in message for word in _REFUSED):
            return BackendUnavailable(f"Valkey: the server refuses: {message.split(' ', 1)[0]}")
        return BackendError("Valkey: the server did not understand a command")
    if isinstance(error, ConnectionError | TimeoutError | OSError):
        if writes and "Connect call failed" not in message and "connecting to" not in message:
            return OutcomeUnknown("Valkey: the connection broke; the write may have happened")
        return BackendUnavailable("Valkey: no answer from the server")
    return BackendError(f"Valkey: {type(error).__name__}")


async def _to_the_end(awaitable: Awaitable[_T]) -> _T:
    """Await something that a cancellation must not cut short: it ends first, and then the cancellation is
    raised.

    The driver would leave a connection with half an answer. A context of its own keeps a caller's context
    variables out.
    """

    async def run() -> _T:
        return await awaitable

    task = asyncio.get_running_loop().create_task(run(), context=contextvars.Context())
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        task.exception()  # is seen to, whatever it is
        raise cancelled
    return task.result()


def _client(url: str) -> Any:
    """A client that is not connected yet; None for a URL that the driver does not understand."""
    try:
        return cast("Any", Valkey).from_url(url, **_SECONDS)
    except ValueError:
        return None
