"""SQLite against the memory backend: the same random operations on both, the same answers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from vtoken.backend import Hold, Use
from vtoken_backends.memory import MemoryBackend
from vtoken_backends.sqlite import SQLiteBackend

from .reference_tools import Player, check_store
from .sqlite_tools import opened


@pytest.mark.parametrize("seed", range(5))
async def test_the_same_operations_get_the_same_answers(tmp_path: Path, seed: int) -> None:
    player = Player(seed)
    sqlite = SQLiteBackend(tmp_path / "tokens.db", synchronous="normal")
    async with opened(sqlite), opened(MemoryBackend()) as memory:
        for step in range(300):
            name, call = player.operation()
            expected = await call(memory)
            assert await call(sqlite) == expected, (step, name)
            await check_store(sqlite, memory)


@pytest.mark.parametrize("seed", range(5))
async def test_in_one_batch_they_do_too(tmp_path: Path, seed: int) -> None:
    """The first operation goes alone, and the others share one statement, which does them in their order."""
    player = Player(seed)
    sqlite = SQLiteBackend(tmp_path / "tokens.db", synchronous="normal")
    async with opened(sqlite), opened(MemoryBackend()) as memory:
        for step in range(20):
            for kind in (player.insert, lambda: player.present(Use), lambda: player.present(Hold)):
                player.fix_features()
                calls = [kind() for _ in range(player.chance.choice([2, 5, 12]))]
                player.now += 1
                expected = [await call(memory) for call in calls]
                answers = await asyncio.gather(*(call(sqlite) for call in calls))
                assert answers == expected, step
                await check_store(sqlite, memory)
