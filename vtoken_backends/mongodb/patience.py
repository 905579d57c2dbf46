"""Pauses between the attempts at what others were quicker to change."""

from __future__ import annotations

import asyncio
import random
from typing import Final

from vtoken.errors import BackendUnavailable

_PATIENCE: Final = 15.0
"""Seconds after which a document that others change again and again is given up."""


class Patience:
    """Pauses at random, and longer each time; the first one is none.

    Raises:
        BackendUnavailable: patience has come to its end.
    """

    def __init__(self) -> None:
        self._end = asyncio.get_running_loop().time() + _PATIENCE
        self._attempts = 0

    async def __call__(self) -> None:
        if asyncio.get_running_loop().time() > self._end:
            raise BackendUnavailable("MongoDB: others were quicker to write the document again and again")
        if self._attempts:
            longest = min(0.05, 0.001 * 2 ** min(self._attempts, 6))
            await asyncio.sleep(random.uniform(0, longest))  # noqa: S311  # no secret
        self._attempts += 1
