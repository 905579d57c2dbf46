"""Look-ups on the spot: on the event loop's own thread, as long as they are quick.

A look-up touches three or four pages and takes about 10 microseconds. A hop to a thread and back costs 15
times that, and the thread competes for the interpreter lock, which holds the event loop up for longer than
the look-ups would. What speaks against it is a page that is in no cache: a slow disk would hold the loop. So:

1. Look-ups begin on the reader's thread, and go over to the spot once they are quick there.
2. A turn of the event loop in which tokens are looked up gets no further look-up after about a millisecond,
   whatever has taken it: a task whose look-ups never wait would not let others run. Those that do not fit in
   wait for the next turn, so that everything else that is ready gets its own.
3. After one that was slow, those that follow go to the reader's thread, together, until they are quick again.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from vtoken_backends.sqlite.steps import Private, Rows

TURN: Final = 0.001
"""Seconds from the first look-up of a turn of the event loop after which those that follow wait."""
WAITED: Final = TURN / 4
"""Seconds of a turn for look-ups that have waited: what their tasks do then takes two or three times that."""
SLOW: Final = 0.001
"""A look-up that takes longer sends those that follow to the reader's thread."""
QUICK: Final = 0.000_25
"""Look-ups on the reader's thread that take less on average are done on the spot from then on."""
AGAIN: Final = 0.1
"""Seconds for which a slow look-up keeps those that follow on the reader's thread, at least."""


class _Waiting(NamedTuple):
    """A look-up that did not fit into its turn."""

    sql: str
    values: Private
    rows: asyncio.Future[Rows | None]


class OnTheSpot:
    """Looks tokens up in the event loop in which it was made.

    Args:
        connection: one of its own, which only reads and waits for no lock.
        loop: the event loop.
        clock: tells the time, in seconds.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._connection = connection
        self._clock = clock
        self._loop = weakref.ref(loop)
        # Against closing the connection in another thread while it is in use.
        self._in_use = threading.Lock()
        self._is_quick = False
        self._not_before = 0.0
        self._turn_began: float | None = None
        self._waiting: deque[_Waiting] = deque()

    async def look_up(self, sql: str, values: Private) -> Rows | None:
        """The rows of a look-up, or None where the reader's thread has to do it."""
        if not self._is_quick:
            return None
        loop = asyncio.get_running_loop()
        if loop is not self._loop():
            return None
        if not self._waiting and self._has_time(loop):
            return self._look_up(sql, values)
        rows: asyncio.Future[Rows | None] = loop.create_future()
        self._waiting.append(_Waiting(sql=sql, values=values, rows=rows))
        return await rows

    def took_elsewhere(self, seconds: float, count: int) -> None:
        """Count look-ups that the reader's thread did together. May be called in any thread."""
        if seconds / count < QUICK and self._clock() >= self._not_before:
            self._is_quick = True

    def close(self) -> None:
        """Close the connection. May be called in any thread."""
        with self._in_use:
            self._connection.close()

    def _has_time(self, loop: asyncio.AbstractEventLoop) -> bool:
        now = self._clock()
        if self._turn_began is None:
            self._begin_turn(now, loop)
            return True
        return now - self._turn_began < TURN

    def _begin_turn(self, now: float, loop: asyncio.AbstractEventLoop) -> None:
        self._turn_began = now
        loop.call_soon(self._next_turn, loop)

    def _next_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._turn_began = None
        if not self._waiting:
            return
        began = now = self._clock()
        self._begin_turn(began, loop)
        while self._waiting and now - began < WAITED:  # the first one in any case
            waiting = self._waiting.popleft()
            if not waiting.rows.done():  # otherwise its caller was cancelled
                waiting.rows.set_result(self._look_up(waiting.sql, waiting.values))
            now = self._clock()

    def _look_up(self, sql: str, values: Private) -> Rows | None:
        if not self._is_quick or not self._in_use.acquire(blocking=False):
            return None
        started = self._clock()
        try:
            return Rows(self._connection.execute(sql, values).fetchall())
        except (sqlite3.Error, MemoryError):
            return None  # the reader's thread tries again, waits if need be, and says what is wrong
        finally:
            self._in_use.release()
            now = self._clock()
            if now - started > SLOW:
                self._is_quick = False
                self._not_before = now + AGAIN
