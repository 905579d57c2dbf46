"""What goes on in the event loop beside a load: a watch on its lateness, or other work."""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from collections.abc import AsyncGenerator, Coroutine
from time import perf_counter
from typing import Final, Literal

Beside = Literal["", "ticker", "busy loop", "slow fsync"]

TICK: Final = 0.001
_PAUSE: Final = 0.005
_LONGEST_BURN: Final = 0.02


@contextlib.asynccontextmanager
async def beside(what: Beside) -> AsyncGenerator[array[float]]:
    """Run something beside the block; yields where a ticker writes how late it was, in seconds."""
    late = array("d")
    coroutine: Coroutine[None, None, None] | None = None
    if what == "ticker":
        coroutine = _tick(late)
    if what == "busy loop":
        coroutine = _burn()
    if coroutine is None:
        yield late
        return
    task = asyncio.create_task(coroutine)
    try:
        await asyncio.sleep(2 * _PAUSE)  # it is under way when the block begins
        yield late
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _tick(late: array[float]) -> None:
    while True:
        due = perf_counter() + TICK
        await asyncio.sleep(TICK)
        late.append(perf_counter() - due)


async def _burn() -> None:
    """Take half of the time: burn for as long as the others had the loop since the last time."""
    while True:
        begun = perf_counter()
        await asyncio.sleep(_PAUSE)
        now = perf_counter()
        end = now + min(now - begun, _LONGEST_BURN)
        while perf_counter() < end:
            pass
