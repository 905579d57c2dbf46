"""Public ids of tokens: UUIDs of version 7 (RFC 9562, section 5.7), in the order of creation."""

from __future__ import annotations

import os
import threading


class IdSequence:
    """Ids that sort by their time and, within it, by their creation (RFC 9562, section 6.2, method 1:
    the 12 bits after the time count)."""

    __slots__ = ("_last", "_lock")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def next(self, now: int) -> str:
        """A new id as 32 hexadecimal digits.

        Args:
            now: milliseconds since the epoch.
        """
        with self._lock:
            self._last = last = max(self._last + 1, now << 12)
        head = (last >> 12 & 0xFFFF_FFFF_FFFF) << 16 | 0x7000 | last & 0xFFF
        return f"{head:016x}8{os.urandom(8).hex()[1:]}"  # 60 random bits after the version and the variant
