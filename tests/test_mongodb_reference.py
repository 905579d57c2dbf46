"""MongoDB against the memory backend: the same random operations on both, the same answers.

What may differ is not asked for: which of the two is told where a key is taken and a valid token is in the
way, and in what order purge takes tokens that ended at the same time.
"""

from __future__ import annotations

import pytest

from vtoken.backend import Inserted, InsertResult, Spend, TokenBackend
from vtoken_backends.memory import MemoryBackend

from . import servers
from .mongodb_tools import opened
from .reference_tools import Call, Player, check_store

_STEPS = 250
_NOT_INSERTED = (InsertResult.KEY_TAKEN, InsertResult.HAS_VALID)


class MongoDBPlayer(Player):
    """Presents and inserts without limits, and purges all that is due."""

    is_free = False

    def spends(self) -> tuple[Spend, ...]:
        return () if self.is_free else super().spends()

    def present(self, change_type: type[object] | None = None) -> Call:
        self.is_free = True
        call = super().present(change_type)
        self.is_free = False
        return call

    def insert(self) -> Call:
        self.is_free = True
        call = super().insert()
        self.is_free = False
        return call

    def purge(self) -> Call:
        now = self.now
        before = now - self.chance.choice([-1, 300, 3000, 3000])
        return lambda backend: backend.purge(before, now, 1000, now - 500)


def as_told(answer: object) -> object:
    if isinstance(answer, Inserted) and answer.result in _NOT_INSERTED:
        return "not inserted"
    return answer


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
