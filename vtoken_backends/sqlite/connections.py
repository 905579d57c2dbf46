"""The connections of an open backend: who reads and writes where.

1. One connection writes, on a thread of its own.
2. One reads on another thread (listings, counts, look-ups that may be slow), so that no reader waits for a
   writer.
3. One looks tokens up *on the spot*: on the event loop's own thread. A look-up touches three or four pages
   and takes about 10 microseconds; a hop to a thread and back costs 15 times that. :class:`Pace` decides
   when.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import time
import weakref
from collections.abc import Callable
from typing import Any, Final, TypeVar

from vtoken_backends.sqlite.file import Options, check_identity, identity, open_file, open_reader
from vtoken_backends.sqlite.steps import Private, Rows
from vtoken_backends.sqlite.worker import Worker

_T = TypeVar("_T")

_TURN: Final = 0.001
"""Seconds that look-ups on the spot may take of one turn of the event loop."""
_SLOW: Final = 0.001
"""A look-up on the spot that takes longer sends those that follow to the reader's thread."""
_QUICK: Final = 0.000_25
"""Look-ups on the reader's thread that take less on average are done on the spot from then on."""
_AGAIN: Final = 0.1
"""Seconds for which a slow look-up keeps those that follow on the reader's thread, at least."""
_CHECKED_FOR: Final = 1.0
"""Seconds for which a look-up relies on the file being in its place. Every write makes sure of it."""


class Pace:
    """Whether the next look-up is done on the spot.

    Look-ups begin on the reader's thread, and go over to the spot once they are quick there. What they take
    is bounded per turn of the event loop, and not only each: many tasks may look up in one turn. A page that
    is in no cache has to come from the disk, and a slow disk would hold the event loop up: after one slow
    look-up those that follow go to the reader's thread until they are quick again.
    """

    def __init__(self) -> None:
        self._is_quick = False
        self._not_before = 0.0
        self._spent = 0.0

    def allows(self) -> bool:
        """Whether a look-up may be done on the spot now."""
        return self._is_quick and self._spent < _TURN

    def took_on_the_spot(self, seconds: float, loop: asyncio.AbstractEventLoop) -> None:
        """Count a look-up that was done on the spot."""
        if not self._spent:
            loop.call_soon(self._begin_turn)
        self._spent += seconds
        if seconds > _SLOW:
            self._is_quick = False
            self._not_before = time.perf_counter() + _AGAIN

    def took_on_the_thread(self, seconds: float, count: int) -> None:
        """Count look-ups that the reader's thread did together."""
        if not self._is_quick and seconds / count < _QUICK and time.perf_counter() >= self._not_before:
            self._is_quick = True

    def _begin_turn(self) -> None:
        self._spent = 0.0


class Connections:
    """The connections to one file, from opening to closing."""

    def __init__(self, path: str, options: Options) -> None:
        self._path = path
        self._options = options
        self._pid = os.getpid()
        self._write_thread = Worker("vtoken-sqlite-write")
        self._read_thread = Worker("vtoken-sqlite-read")
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        self._on_the_spot: sqlite3.Connection | None = None
        self._loop = weakref.ref(asyncio.get_running_loop())
        self._checked_at = 0.0
        self.pace = Pace()

    def is_inherited(self) -> bool:
        """A forked child has the connections but neither their threads nor the right to touch their file."""
        return self._pid != os.getpid()

    async def open(self) -> None:
        """Open the file. What a failed or cancelled one has opened is closed."""
        opening = self._write_thread.run(self._open)
        try:
            await opening
        except BaseException:
            self.end()
            raise
        _open.add(self)

    async def close(self) -> None:
        """Close the file. A call that is cancelled is finished all the same, by the threads."""
        loop = asyncio.get_running_loop()
        closed: asyncio.Future[None] = loop.create_future()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the event loop was closed meanwhile
                loop.call_soon_threadsafe(tell_loop)

        def tell_loop() -> None:
            if not closed.done():  # else the call was cancelled
                closed.set_result(None)

        self.end(tell)
        await closed
        self._read_thread.join()
        self._write_thread.join()

    def end(self, tell: Callable[[], None] = lambda: None) -> None:
        """Have everything closed by the threads, after what they have to do. Nobody waits for it.

        Args:
            tell: called when it is done, in another thread.
        """
        _open.discard(self)

        def close() -> None:
            # The one that writes comes last, because only it can tidy up the log.
            for connection in (self._reader, self._on_the_spot, self._writer):
                if connection is not None:
                    connection.close()
            tell()

        self._read_thread.end(lambda: self._write_thread.end(close))

    def write(self, work: Callable[[sqlite3.Connection], _T]) -> asyncio.Future[_T]:
        """Do something on the connection that writes, if the file is still in its place."""

        def do() -> _T:
            assert self._writer is not None  # noqa: S101  # open() has seen to it
            check_identity(self._path, self._identity)
            return work(self._writer)

        return self._write_thread.run(do)

    def read(self, work: Callable[[sqlite3.Connection], _T]) -> asyncio.Future[_T]:
        """Do something on the connection that reads."""

        def do() -> _T:
            assert self._reader is not None  # noqa: S101  # as above
            return work(self._reader)

        return self._read_thread.run(do)

    def look_up(self, sql: str, values: Private) -> Rows | None:
        """The rows of a quick look-up on the spot; None where the reader's thread has to do it."""
        if not self.pace.allows() or self._on_the_spot is None:
            return None
        loop = asyncio.get_running_loop()
        if loop is not self._loop():  # a connection is used in one thread at a time
            return None
        started = time.perf_counter()
        try:
            rows = Rows(self._on_the_spot.execute(sql, values).fetchall())
        except sqlite3.Error:  # the reader's thread waits, tries again, and says what is wrong
            return None
        self.pace.took_on_the_spot(time.perf_counter() - started, loop)
        return rows

    def check(self) -> None:
        """Make sure, now and then, that the file is still in its place.

        Raises:
            BackendUnavailable: it is not.
        """
        now = time.monotonic()
        if now - self._checked_at > _CHECKED_FOR:
            check_identity(self._path, self._identity)
            self._checked_at = now

    def check_now(self) -> None:
        """The same without relying on the last time."""
        check_identity(self._path, self._identity)

    def _open(self) -> None:
        self._writer = open_file(self._path, self._options)
        self._identity = identity(self._path)
        self._reader = open_reader(self._path, self._options.busy_timeout)
        if self._options.reads == "auto":
            self._on_the_spot = open_reader(self._path, 0)


_open: set[Connections] = set()
"""Kept here, so that a forked child never collects what it has inherited: by closing its parent's files it
would drop the locks that the parent holds."""


def execute_on(connection: sqlite3.Connection) -> Callable[[str, Any], Rows]:
    """How steps are carried out on a connection."""

    def execute(sql: str, values: Any) -> Rows:
        return Rows(connection.execute(sql, values).fetchall())

    return execute
