"""The connections of an open backend: who reads and writes where.

1. One connection writes, on a thread of its own.
2. One reads on another thread (listings, counts, look-ups that may be slow), so that no reader waits for a
   writer.
3. One looks tokens up on the event loop's own thread (see ``on_the_spot``).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeVar

from vtoken_backends.sqlite.file import Options, check_identity, identity, open_file, open_reader
from vtoken_backends.sqlite.on_the_spot import OnTheSpot
from vtoken_backends.sqlite.steps import Private, Rows
from vtoken_backends.sqlite.worker import Job, Worker

_T = TypeVar("_T")

_CHECKED_FOR: Final = 1.0
"""Seconds for which a look-up relies on the file being in its place. Every write makes sure of it."""


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
        self._checked_at = 0.0
        self.on_the_spot: OnTheSpot | None = None

    def is_inherited(self) -> bool:
        """A forked child has the connections but neither their threads nor the right to touch their file."""
        return self._pid != os.getpid()

    async def open(self) -> None:
        """Open the file. What a failed or cancelled one has opened is closed."""
        opening = self._write_thread.run(partial(self._open, asyncio.get_running_loop()))
        try:
            await opening.result
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
            for connection in (self._reader, self.on_the_spot, self._writer):
                if connection is not None:
                    connection.close()
            tell()

        self._read_thread.end(lambda: self._write_thread.end(close))

    def write(self, work: Callable[[sqlite3.Connection], _T]) -> Job[_T]:
        """Do something on the connection that writes, if the file is still in its place."""

        def do() -> _T:
            assert self._writer is not None  # noqa: S101  # open() has seen to it
            check_identity(self._path, self._identity)
            return work(self._writer)

        return self._write_thread.run(do)

    def read(self, work: Callable[[sqlite3.Connection], _T]) -> Job[_T]:
        """Do something on the connection that reads."""

        def do() -> _T:
            assert self._reader is not None  # noqa: S101  # as above
            return work(self._reader)

        return self._read_thread.run(do)

    async def look_up(self, sql: str, values: Private) -> Rows | None:
        """The rows of a quick look-up, or None where :meth:`read` has to do it."""
        return None if self.on_the_spot is None else await self.on_the_spot.look_up(sql, values)

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

    def _open(self, loop: asyncio.AbstractEventLoop) -> None:
        self._writer = open_file(self._path, self._options)
        self._identity = identity(self._path)
        self._reader = open_reader(self._path, self._options.busy_timeout)
        if self._options.reads == "auto":
            self.on_the_spot = OnTheSpot(open_reader(self._path, 0), loop)


_open: set[Connections] = set()
"""Kept here, so that a forked child never collects what it has inherited: by closing its parent's files it
would drop the locks that the parent holds."""


def execute_on(connection: sqlite3.Connection) -> Callable[[str, Any], Rows]:
    """How steps are carried out on a connection."""

    def execute(sql: str, values: Any) -> Rows:
        return Rows(connection.execute(sql, values).fetchall())

    return execute
