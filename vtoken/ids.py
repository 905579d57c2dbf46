"""Public ids of tokens: 16 hexadecimal digits, in the order of creation."""

from __future__ import annotations

import random
import threading
from typing import Final

_RANDOM_BITS: Final = 21
"""Below 42 bits of milliseconds, which last until the year 2109."""
_DRAWN: Final = (1 << _RANDOM_BITS - 1) - 1
"""The random bits of a fresh id. The highest stays 0: room for the ids that follow in its millisecond."""
_LATEST: Final = (1 << 42) - 1
_HIGHEST: Final = (1 << 63) - 1
_STEP: Final = (1 << 12) - 1
"""Two ids of one millisecond differ by 1 to 2**12, so that other processes' ids fit in between."""


class IdSequence:
    """Ids that sort by their time and, within a millisecond, by their creation.

    An id is a number below 2**63: the time in milliseconds, then random bits. An id of a millisecond that
    is not later than that of the one before is the one before plus a random step (RFC 9562, section 6.2,
    method 2). Two processes draw the same id about once in two million pairs of ids of one millisecond; the
    store then refuses the second one, and the manager draws another.
    """

    __slots__ = ("_last", "_lock")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = -1

    def next(self, now: int) -> str:
        """Return a new id.

        Args:
            now: milliseconds since the epoch. What lies before 1970 or after 2109 counts as that.
        """
        # Ids are public: what matters is that two processes draw different numbers, and Python gives each
        # process that is forked a generator of its own.
        drawn = random.getrandbits(32)
        # The usual time needs neither of these two calls, which cost as much as all the rest of the line.
        moment = now if 0 <= now <= _LATEST else min(max(now, 0), _LATEST)
        fresh = moment << _RANDOM_BITS | drawn & _DRAWN
        with self._lock:
            if fresh <= self._last:
                fresh = self._last + 1 + (drawn & _STEP)
            if fresh > _HIGHEST:  # only after 2109, where unique ids matter more than their order
                fresh = _HIGHEST - (drawn & (1 << _RANDOM_BITS) - 1)
            self._last = fresh
        return f"{fresh:016x}"
