"""Tokens in an SQLite file, by aiosqlite.

Concurrent operations are gathered, and a batch of them is one call of aiosqlite. Its worker thread
finishes a batch whether or not a task still waits for it, so a cancelled operation has happened wholly or
not at all and never leaves a transaction open.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import os
import sqlite3
import sys
import threading
import warnings
from collections.abc import AsyncGenerator, Awaitable, Sequence
from typing import Any, Final, NamedTuple, Self, TypeVar, cast
from urllib.parse import parse_qsl, unquote

import aiosqlite
import anyio

from vtoken.backend import (
    Budget,
    Change,
    InsertMode,
    InsertResult,
    Match,
    SlugCount,
    Spent,
    StoredToken,
)
from vtoken.errors import (
    BackendClosed,
    BackendUnavailable,
    ConfigurationError,
    CorruptStore,
    OutcomeUnknown,
    VTokenError,
)
from vtoken_backends import _sqlite_statements as statements
from vtoken_backends._sqlite_batch import Answers, Batch, Operation, Rows
from vtoken_backends._sqlite_file import Check, Opener, Options, Synchronous, as_backend_error
from vtoken_backends.gathering import Gatherer

_T = TypeVar("_T")


_PURGED_AT_ONCE: Final = 100
"""Tokens in one statement: about 5 ms, for which all others wait (tests/benchmarks, purge)."""


class _Link(NamedTuple):
    """One connection, and what tells whether it can still be used from here."""

    connection: aiosqlite.Connection
    opener: Opener
    pid: int

    def is_inherited(self) -> bool:
        """A forked child has the connection but neither its thread nor the right to touch its file."""
        return self.pid != os.getpid()

    async def close(self) -> None:
        _open_links.discard(self)
        closing = asyncio.ensure_future(self._close())
        with anyio.CancelScope(shield=True):
            try:
                await asyncio.shield(closing)
            except asyncio.CancelledError:  # what asyncio itself cancels, no anyio scope shields
                await closing
                raise

    async def _close(self) -> None:
        if self.opener.worker_lives():
            with contextlib.suppress(_WorkerEnded):
                await _while_it_works(self.opener, self.connection.close())
                return await self.worker_end()
        # Nobody answers; but cancelled at every await, aiosqlite still marks the connection as closed.
        self.opener.abandon()
        with anyio.CancelScope() as scope:
            scope.cancel()
            await self.connection.close()
        return None

    async def worker_end(self) -> None:
        """Wait for a thread that was told to end: it would stumble over a loop that is closed by then."""
        while self.opener.worker_lives():  # noqa: ASYNC110  # a thread sets no event when it ends
            await anyio.sleep(0.001)


_open_links: set[_Link] = set()
"""So that a backend is dropped before its connection: aiosqlite has a warning and a clean-up of its own."""
_inherited: list[_Link] = []  # kept for ever: a forked child that closed them could break its parent's locks


class SQLiteBackend:
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

    Raises:
        ConfigurationError: an argument is out of its range, or the path names no file.
    """

    _link: _Link | None = None
    _path = "(not made)"  # these two here and not below, as `repr` and `del` may meet one that was refused

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        synchronous: Synchronous = "full",
        busy_timeout: int = 30_000,
        check: Check = "auto",
    ) -> None:
        self._opens = 0
        self._opening = threading.Lock()
        if not isinstance(path, str | os.PathLike):
            raise ConfigurationError(f"an SQLite backend needs a path, not {type(path).__name__}")
        name = os.fsdecode(path)
        if not name or name.startswith(":memory:"):
            raise ConfigurationError("an SQLite backend needs a file; for tokens in memory use memory://")
        if "\0" in name:
            raise ConfigurationError("the path of an SQLite file has no NUL")
        _check_choice("synchronous", synchronous, ("full", "normal"))
        _check_choice("check", check, ("auto", "always", "never"))
        if type(busy_timeout) is not int or not 0 <= busy_timeout < 2**31:
            raise ConfigurationError("busy_timeout is a number of milliseconds, 0 to 2147483647")
        self._path = os.path.abspath(name)
        self._options = Options(synchronous, busy_timeout, check)
        self._gatherer = Gatherer(self._carry, trips=2, by_caller=True)

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
            options.setdefault(name, int(value) if value.isascii() and value.isdigit() else value)
        for name in options:
            _check_choice("option", name, Options._fields)
        return cls(_percent_decoded(location[1:]), **cast(dict[str, Any], options))

    def __repr__(self) -> str:
        return f"<SQLiteBackend {self._path}>"

    def __del__(self) -> None:
        link = self._link
        if link is None or link.is_inherited():
            return
        _open_links.discard(link)
        if link.opener.worker_lives() and not sys.is_finalizing():
            # In a thread and loop of its own, because here there may be none or another's.
            with contextlib.suppress(RuntimeError):  # the interpreter is about to end
                threading.Thread(target=lambda: asyncio.run(link.close()), daemon=True).start()
        warnings.warn(f"{self!r} was dropped without close()", ResourceWarning, stacklevel=1, source=self)

    async def open(self) -> None:
        async with self._connecting():
            link = self._link
            if link is not None and link.is_inherited():
                _inherited.append(link)
                self._link, self._opens = None, 0
            if self._link is None:
                self._link = await self._connect()
            self._opens += 1

    async def close(self) -> None:
        link = self._link
        if link is None or link.is_inherited():
            return
        self._opens -= 1
        if self._opens == 0:
            self._link = None
            await _translated(link.close())

    async def insert(self, token: StoredToken, mode: InsertMode, keep_until: int = 0) -> InsertResult:
        while not await self._submit(statements.insert(token, mode, keep_until)):
            [(key_taken, has_valid)] = await self._submit(statements.why_not_inserted(token))
            if key_taken:
                return InsertResult.KEY_TAKEN
            if has_valid and mode is InsertMode.IF_NONE_VALID:
                return InsertResult.HAS_VALID
            # What was in the way is gone by now: again.
        return InsertResult.INSERTED

    async def find(self, match: Match, limit: int, after: tuple[int, str] | None = None) -> list[StoredToken]:
        return self._decoded(await self._submit(statements.find(match, limit, after)))

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        tokens = self._decoded(await self._submit(statements.update(match, change)))
        return tokens[0] if tokens else None

    async def deactivate(self, match: Match, at: int) -> int:
        return len(await self._submit(statements.deactivate(match, at)))

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> int:
        total = 0
        while total < limit:
            most = min(limit - total, _PURGED_AT_ONCE)
            purged = len(await self._submit(statements.purge(before, now, most)))
            total += purged
            if purged < most:
                break
        await self._submit(statements.purge_budgets(budgets_before, limit))
        return total

    async def count(self, now: int) -> list[SlugCount]:
        return [SlugCount(*row) for row in await self._submit(statements.count(now))]

    async def spend(self, budget: Budget, now: int, limit: int, window: int, max_window: int) -> Spent:
        while True:
            taken = await self._submit(statements.spend(budget, now, limit, window, max_window))
            if taken:
                return Spent(True, taken[0][0])
            denied = await self._submit(statements.denied(budget, now, limit))
            if denied:
                return Spent(False, denied[0][0])
            # It was given back or reset between the two: again.

    async def refund(self, budget: Budget, until: int) -> None:
        await self._submit(statements.refund(budget, until))

    async def reset(self, budget: Budget) -> None:
        await self._submit(statements.reset(budget))

    def _decoded(self, rows: Rows) -> list[StoredToken]:
        # No row in a name of this frame: a traceback may show it.
        tokens = [token for token in map(statements.decode, rows) if token is not None]
        if len(tokens) < len(rows):
            raise CorruptStore(f"{self._path} holds a token that makes no sense")
        return tokens

    def _submit(self, operation: Operation) -> Awaitable[Rows]:
        return cast(Awaitable[Rows], self._gatherer.submit(operation))

    async def _carry(self, operations: Sequence[Operation]) -> list[Rows | Exception]:
        """Send a batch, and bring the answers back."""
        while True:
            link = await self._living_link()
            calling = link.connection.execute_fetchall("", Batch(operations))
            with contextlib.suppress(_WorkerEnded):  # before it came to this batch: again
                answers = cast(Answers, await _translated(_while_it_works(link.opener, calling)))
                return [as_backend_error(a) if isinstance(a, Exception) else a for a in answers.answers]

    async def _living_link(self) -> _Link:
        link = self._link
        if link is None:
            raise BackendClosed("the SQLite backend is not open")
        if link.is_inherited():
            raise BackendClosed(
                "the SQLite backend was opened in another process, before a fork: open it in this one"
            )
        return link if link.opener.worker_lives() else await self._reconnect(link)

    async def _connect(self) -> _Link:
        if not _runs_asyncio():
            raise ConfigurationError("the SQLite backend needs asyncio, as aiosqlite does")
        opener = Opener(self._path, self._options)
        link = _Link(_daemonic_connection(opener), opener, os.getpid())
        try:
            await _translated(link.connection)
        except VTokenError as error:
            await link.worker_end()
            failure = error
        except BaseException:
            opener.abandon()
            raise
        else:
            _open_links.add(link)
            return link
        # Whatever a failed open has done, it is done again by the next one: nothing about it is unknown.
        raise BackendUnavailable(*failure.args) if isinstance(failure, OutcomeUnknown) else failure

    async def _reconnect(self, dead: _Link) -> _Link:
        """A loop that is closed while a statement runs takes aiosqlite's worker thread with it. The statement
        has been done; all that is lost is the thread."""
        async with self._connecting():
            if self._link is dead:
                fresh = await self._connect()
                if self._link is dead:
                    self._link = fresh
                else:
                    await fresh.close()  # the backend was closed meanwhile
                await dead.close()
        if self._link is None:
            raise BackendClosed("the SQLite backend is not open")
        return self._link

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
    near = difflib.get_close_matches(str(value), choices, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigurationError(f"{what} {value!r} is not known, only {', '.join(choices)}{hint}")


def _percent_decoded(text: str) -> str:
    with contextlib.suppress(UnicodeDecodeError):
        return unquote(text, errors="strict")
    raise ConfigurationError("the percent-encoded bytes in the URL of an SQLite file must be UTF-8")


def _runs_asyncio() -> bool:
    with contextlib.suppress(RuntimeError):
        asyncio.get_running_loop()
        return True
    return False


def _daemonic_connection(opener: Opener) -> aiosqlite.Connection:
    """A connection whose thread never keeps the process alive: a thread is a daemon if its maker is."""
    made: list[aiosqlite.Connection] = []
    maker = threading.Thread(target=lambda: made.append(aiosqlite.Connection(opener, 64)), daemon=True)
    maker.start()
    maker.join()
    return made[0]


class _WorkerEnded(Exception):
    """The worker thread ended, and nobody will answer."""


class _Watch:
    """Cancels a task that waits for a worker thread that has ended.

    The thread ends when it has an answer for an event loop that is closed by then. What other loops have in
    its queue is not carried out any more. What it carried out before has been answered, but the answer
    may still be on its way: only who still waits at the next look waits in vain.
    """

    def __init__(self, opener: Opener, task: asyncio.Task[Any]) -> None:
        self._opener = opener
        self._task = task
        self.cancellations = 0
        self._look_again(False)

    def stop(self) -> None:
        self._timer.cancel()

    def _look(self, had_ended: bool) -> None:
        if had_ended:
            self._task.cancel()  # again and again: aiosqlite's close waits once more when it is cancelled
            self.cancellations += 1
        self._look_again(not self._opener.worker_lives())

    def _look_again(self, has_ended: bool) -> None:
        self._timer = asyncio.get_running_loop().call_later(0.2, self._look, has_ended)


async def _while_it_works(opener: Opener, awaitable: Awaitable[_T]) -> _T:
    """Await what the worker thread answers. Raises: _WorkerEnded: nothing was done."""
    task = cast("asyncio.Task[Any]", asyncio.current_task())
    cancelling = task.cancelling()
    watch = _Watch(opener, task)
    try:
        return await awaitable
    except asyncio.CancelledError:
        for _ in range(watch.cancellations):
            task.uncancel()
        if not watch.cancellations or task.cancelling() > cancelling:
            raise
    finally:
        watch.stop()
    raise _WorkerEnded


async def _translated(awaitable: Awaitable[_T]) -> _T:
    """The one place at which the driver's errors become ours. They are raised after the except block, so
    that the driver's own error is not chained to them."""
    try:
        return await awaitable
    except (sqlite3.Error, OSError, ValueError) as error:
        failure = as_backend_error(error)
    raise failure
