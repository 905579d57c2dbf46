"""MongoDB against the memory backend: the same random operations on both, the same answers."""

from __future__ import annotations

import pytest

from vtoken.backend import TokenBackend
from vtoken_backends.memory import MemoryBackend

from . import servers
from .mongodb_tools import opened
from .reference_tools import MongoDBPlayer, as_told, check_store

_STEPS = 250


@pytest.mark.parametrize("seed", range(3))
async def test_the_same_operations_get_the_same_answers_on_mongodb(
    mongodb_standalone: str, seed: int
) -> None:
    player = MongoDBPlayer(seed)
    memory: TokenBackend = MemoryBackend()
    await memory.open()
    with servers.databases(mongodb_standalone).one() as url:
        async with opened(url) as backend:
            for step in range(_STEPS):
                name, call = player.operation()
                expected = as_told(await call(memory))
                assert as_told(await call(backend)) == expected, (step, name)
                if step % 5 == 0:
                    await check_store(backend, memory)
            await check_store(backend, memory)
