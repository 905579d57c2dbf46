"""Opening and closing a store, thousands of times: what is left behind."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

from tests.sqlite_tools import make_store
from vtoken import Subject, TokenManager
from vtoken_backends.sqlite import SQLiteBackend


class _Left(NamedTuple):
    threads: int
    descriptors: int
    tasks: int


def _left() -> _Left:
    return _Left(threading.active_count(), len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks()))


def _no_more(now: _Left, before: _Left) -> bool:
    # What others have left to end by itself, a driver's idle threads, may do so meanwhile.
    return all(count <= most for count, most in zip(now, before, strict=True))


async def _open_and_close(path: Path, number: int) -> None:
    """In different ways: with an operation, without, opened twice, cancelled in opening and in closing."""
    manager = TokenManager(SQLiteBackend(path, synchronous="normal", check="never"))
    match number % 5:
        case 0:
            async with manager:
                await manager.exists_valid(Subject("auth.user", "1"))
        case 1:
            async with manager, manager:
                pass
        case 2:
            opening = asyncio.ensure_future(manager.open())
            for _ in range(number % 7):
                await asyncio.sleep(0)
            opening.cancel()
            await asyncio.wait([opening])
            await manager.aclose()
        case 3:
            await manager.open()
            closing = asyncio.ensure_future(manager.aclose())
            for _ in range(1 + number % 7):
                await asyncio.sleep(0)
            closing.cancel()
            await asyncio.wait([closing])
            await manager.aclose()
        case _:
            async with manager:
                """Nothing in between."""


async def _run(path: Path, count: int) -> None:
    await make_store(path)
    for number in range(20):  # what is made once, and kept
        await _open_and_close(path, number)
    before = _left()
    for number in range(count):
        await _open_and_close(path, number)
    for _ in range(6000):
        if _no_more(_left(), before):
            break
        await asyncio.sleep(0.01)  # an opening that was cancelled ends in its own thread
    print(f"{count} opens and closes: before {before}, after {_left()}")
    assert _no_more(_left(), before)


def opens_and_closes(long: bool) -> None:
    """No thread, descriptor or task is left."""
    with tempfile.TemporaryDirectory(prefix="vtoken-faults-") as directory:
        asyncio.run(_run(Path(directory) / "tokens.db", 10_000 if long else 250))
