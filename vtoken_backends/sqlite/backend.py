"""Tokens in an SQLite file.

Concurrent operations share batches, and a batch is one call on the thread that writes. It is finished whether
or not a task still waits for it, so that a cancelled operation has happened wholly or not at all and
never leaves a transaction open.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import threading
import time
import warnings
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, Self, TypeVar, cast
from urllib.parse import parse_qsl, unquote

import anyio

from vtoken.backend import (
    Match,
    StoredToken,
    TokenBackend,
)
from vtoken.errors import (
    BackendClosed,
    BackendUnavailable,
    ConfigurationError,
    OutcomeUnknown,
)
from vtoken.inputs import nearest
from vtoken_backends.batching import Batcher
from vtoken_backends.sqlite import operations
from vtoken_backends.sqlite.batch import Answers, Batch, Flight, Operation
from vtoken_backends.sqlite.connections import Connections, execute_on
from vtoken_backends.sqlite.errors import as_backend_error
from vtoken_backends.sqlite.file import Check, Options, Reads, Synchronous, check_schema
from vtoken_backends.sqlite.records import Unreadable, from_row
from vtoken_backends.sqlite.steps import Steps, carry_out
from vtoken_backends.sqlite.store import Store
from vtoken_backends.sqlite.transactions import Transaction

_T = TypeVar("_T")


class SQLiteBackend(Store):
    """A :class:`~vtoken.backend.TokenBackend` in one SQLite file, for any number of processes of one machine.

    Needs asyncio, SQLite 3.37 and a local file system (write-ahead logging shares memory between processes).

    Args:
        path: the file. It is made, readable by its owner only, if there is none; its directory is not.
        synchronous: ``"full"``: what was acknowledged survives a power loss. ``"normal"``: it survives a
            crash of the process, but a power loss may undo the last writes, and used tokens are valid again.
        busy_timeout: milliseconds, 0 to 2147483647, to wait for other writers before
            :class:`~vtoken.BackendUnavailable`.
        check: when to run SQLite's integrity check at open: ``"auto"`` (files up to 64 MiB), ``"always"``
            or ``"never"``.
        reads: where tokens are looked up by key. ``"auto"``: on the event loop's own thread as long as
            that is quick; ``"worker"``: always on another thread.
        shared: True lets the tables, whose names begin with ``vtoken_``, live beside those of an application.

    Raises:
        ConfigurationError: an argument is out of its range, or the path names no file.
    """

    # Class-level defaults: `__repr__` and `__del__` also run when `__init__` raised.
    _connections: Connections | None = None
    _path = "(not made)"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        synchronous: Synchronous = "full",
        busy_timeout: int = 30_000,
        check: Check = "auto",
        reads: Reads = "auto",
        shared: bool = False,
    ) -> None:
        self._opens = 0
        self._opening = threading.Lock()
        if not isinstance(path, str | os.PathLike):
            raise ConfigurationError(f"an SQLite backend needs a path, not {type(path).__name__}")
        name = os.fsdecode(path)
        if not name or name.startswith(":memory:"):
            raise ConfigurationError("an SQLite backend needs a file; for tokens in memory use memory://")
        if "\0" in name:
            raise ConfigurationError("the path of an SQLite file must not contain NUL")
        _check_choice("synchronous", synchronous, ("full", "normal"))
        _check_choice("check", check, ("auto", "always", "never"))
        _check_choice("reads", reads, ("auto", "worker"))
        if type(busy_timeout) is not int or not 0 <= busy_timeout < 2**31:
            raise ConfigurationError("busy_timeout must be a number of milliseconds, 0 to 2147483647")
        if not isinstance(shared, bool):
            raise ConfigurationError("shared must be true or false")
        self._path = os.path.abspath(name)
        self._options = Options(
            synchronous=synchronous, busy_timeout=busy_timeout, check=check, reads=reads, shared=shared
        )
        self._writes = Batcher[Operation, Any](self._flush_writes, by_caller=True)
        self._look_ups = Batcher[Match, list[StoredToken]](self._flush_look_ups, by_caller=True)

    @classmethod
    def from_url(cls, url: str, **options: object) -> Self:
        """``sqlite:///relative.db``, ``sqlite:////absolute.db``; the options of the class also as a query.

        Raises:
            ConfigurationError: the URL or an option is not understood.
        """
        rest = url.partition("://")[2] if isinstance(url, str) else ""
        location, _, query = rest.partition("?")
        if location in ("", "/", ":memory:", "/:memory:"):
            raise ConfigurationError(
                "sqlite:// needs a file, sqlite:///tokens.db; for tokens in memory use memory://"
            )
        if not location.startswith("/"):
            raise ConfigurationError(
                "three slashes before a relative path, four before an absolute one: sqlite:///tokens.db"
            )
        if "#" in rest:
            raise ConfigurationError("write %23 for a # in the URL of an SQLite file")
        for name, value in parse_qsl(query, keep_blank_values=True):
            options.setdefault(name, _option(value))
        for name in options:
            _check_choice("option", name, Options._fields)
        return cls(_percent_decoded(location[1:]), **cast(dict[str, Any], options))

    def __repr__(self) -> str:
        return f"<SQLiteBackend {self._path}>"

    def __del__(self) -> None:
        connections = self._connections
        if connections is None or connections.is_inherited():
            return
        connections.end()
        warnings.warn(f"{self!r} was dropped without close()", ResourceWarning, stacklevel=1, source=self)

    async def open(self) -> None:
        async with self._connecting():
            connections = self._connections
            if connections is not None and connections.is_inherited():
                self._connections, self._opens = None, 0
            if self._connections is None:
                self._connections = await self._connect()
            self._opens += 1

    async def close(self) -> None:
        connections = self._connections
        if connections is None or connections.is_inherited():
            return
        self._opens -= 1
        if self._opens == 0:
            self._connections = None
            await connections.close()

    async def ping(self) -> None:
        connections = self._opened()
        connections.check_now()
        await self._translated(connections.read(lambda database: check_schema(database, self._path)).result)

    def within(self, handle: object) -> TokenBackend:
        return Transaction(handle, self._opened(), self._path)

    # How operations get to SQLite and back --------------------------------------------------------

    async def _submit(self, operation: Operation) -> Any:
        try:
            return await self._writes.submit(operation)
        except asyncio.CancelledError:
            # Nothing changes once the caller was told: what has been begun is finished first.
            flight = operation.flight
            if flight is not None and not flight.batch.withdraw(operation):
                await flight.job.outlast()
            raise

    async def _read(self, steps: Callable[[], Steps[_T]]) -> _T:
        connections = self._opened()
        connections.check()

        def read(database: sqlite3.Connection) -> _T:
            return carry_out(steps(), execute_on(database))

        return await self._translated(connections.read(read).result)

    async def _candidates(self, match: Match) -> list[StoredToken]:
        """The tokens with the id or one of the digests of a match."""
        connections = self._opened()
        connections.check()
        rows = await connections.look_up(*operations.look_up(match))
        if rows is None:
            return await self._look_ups.submit(match)
        with contextlib.suppress(Unreadable):
            return operations.in_order([from_row(row) for row in rows], match)
        raise as_backend_error(Unreadable(), self._path)

    async def _flush_writes(self, operations: Sequence[Operation]) -> list[Any]:
        batch = Batch(operations, self._options.busy_timeout)
        flight = Flight(batch=batch, job=self._opened().write(batch.carry_out))
        for operation in operations:
            operation.flight = flight
        answers = await self._translated(flight.job.result)
        return [
            as_backend_error(answer, self._path) if isinstance(answer, Exception) else answer
            for answer in answers.answers
        ]

    async def _flush_look_ups(self, batch: Sequence[Match]) -> list[list[StoredToken] | BaseException]:
        connections = self._opened()

        def read(database: sqlite3.Connection) -> Answers:
            started = time.perf_counter()
            answers = operations.look_up_many(batch, execute_on(database))
            if connections.on_the_spot is not None:
                connections.on_the_spot.took_elsewhere(time.perf_counter() - started, len(batch))
            return Answers(answers)

        answers = await self._translated(connections.read(read).result)
        return [
            as_backend_error(answer, self._path) if isinstance(answer, Exception) else answer
            for answer in answers.answers
        ]

    async def _translated(self, awaitable: Awaitable[_T]) -> _T:
        try:
            return await awaitable
        except Exception as error:
            failure = as_backend_error(error, self._path)
        raise failure  # after the except block, so that the driver's own error is not chained to it

    def _opened(self) -> Connections:
        connections = self._connections
        if connections is None:
            raise BackendClosed("the SQLite backend is not open: use `async with manager:`")
        if connections.is_inherited():
            raise BackendClosed(
                "the SQLite backend was opened in another process, before a fork: open it in this one"
            )
        return connections

    async def _connect(self) -> Connections:
        if not _runs_asyncio():
            raise ConfigurationError("the SQLite backend needs asyncio; under trio use memory://")
        connections = Connections(self._path, self._options)
        try:
            await self._translated(connections.open())
        except OutcomeUnknown as error:
            failure = error
        else:
            return connections
        # Whatever a failed open has done, it is done again by the next one: nothing about it is unknown.
        raise BackendUnavailable(*failure.args)

    @contextlib.asynccontextmanager
    async def _connecting(self) -> AsyncGenerator[None]:
        while not self._opening.acquire(blocking=False):  # noqa: ASYNC110  # who waits may be in other loops
            await anyio.sleep(0.005)
        try:
            yield
        finally:
            self._opening.release()


def _check_choice(what: str, value: object, choices: tuple[str, ...]) -> None:
    if value in choices:
        return
    near = nearest(str(value), choices)
    hint = f"; {near}" if near else ""
    raise ConfigurationError(f"{what} {value!r} is not known, only {', '.join(choices)}{hint}")


def _option(text: str) -> object:
    if text in ("true", "false"):
        return text == "true"
    return int(text) if text.isascii() and text.isdigit() else text


def _percent_decoded(text: str) -> str:
    with contextlib.suppress(UnicodeDecodeError):
        return unquote(text, errors="strict")
    raise ConfigurationError("the percent-encoded bytes in the URL of an SQLite file must be UTF-8")


def _runs_asyncio() -> bool:
    with contextlib.suppress(RuntimeError):
        asyncio.get_running_loop()
        return True
    return False
