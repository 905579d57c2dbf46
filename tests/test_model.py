"""The backends against the model of the contract, and planted bugs that the model finds."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest
from hypothesis import Phase

from vtoken.backend import (
    Budget,
    Change,
    InsertMode,
    InsertResult,
    Match,
    Spent,
    StoredToken,
    TokenBackend,
)
from vtoken.testing.model import BackendModel
from vtoken_backends.memory import MemoryBackend
from vtoken_backends.mongodb import MongoDBBackend
from vtoken_backends.sqlite import SQLiteBackend

from . import broken
from .servers import databases

_numbers = count()


class TestMemory(BackendModel):
    def new_store(self, directory: Path) -> str:
        return f"memory://model-{next(_numbers)}"

    def backend(self, store: str) -> TokenBackend:
        return MemoryBackend.from_url(store)


class TestSQLite(BackendModel):
    def new_store(self, directory: Path) -> str:
        return f"sqlite:///{directory}/tokens.db"

    def backend(self, store: str) -> TokenBackend:
        return SQLiteBackend.from_url(store)


class TestMongoDB(BackendModel):
    @pytest.fixture(autouse=True)
    def _server(self, mongodb_replica_set: str) -> Generator[None]:
        self._databases = databases(mongodb_replica_set)
        with ExitStack() as self._used:
            yield

    def new_store(self, directory: Path) -> str:
        self._used.close()  # what the history before has used is empty again, and used again
        return self._used.enter_context(self._databases.one())

    def backend(self, store: str) -> TokenBackend:
        return MongoDBBackend.from_url(store)


class ForgetsTheSecondSecret(MemoryBackend):
    """Looks only under the current secret."""

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        return await super().update(match._replace(digests=match.digests and match.digests[:1]), change)


class RenewsTheWindow(MemoryBackend):
    """Counts an attempt window from the latest guess, and not from the first."""

    async def spend(self, budget: Budget, now: int, limit: int, window: int, max_window: int) -> Spent:
        spent = await super().spend(budget, now, limit, window, max_window)
        if not spent.allowed:
            return spent
        counted, strikes, until = self._store.budgets[budget]
        self._store.budgets[budget] = counted, strikes, max(until, now + window)
        return Spent(True, self._store.budgets[budget][2])


class SparesTheLeased(MemoryBackend):
    """Replaces tokens, but for those that are leased."""

    async def insert(self, token: StoredToken, mode: InsertMode, keep_until: int = 0) -> InsertResult:
        match = Match(content_type=token.content_type, object_id=token.object_id, slug=token.slug)
        old = {t.id: t for t in await self.find(match, 1000)}
        result = await super().insert(token, mode, keep_until)
        for now in await self.find(match, 1000):
            if now.id in old and now.lease_until > token.created_at:
                self._store.put(old[now.id])
        return result


class KeepsTheExpiryOfUsed(MemoryBackend):
    """Purges what was used by its expiry, as if it were still good."""

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        changed = await super().update(match, change)
        if changed is None or changed.is_active:
            return changed
        self._store.put(changed._replace(ends_at=changed.expires_at))
        return self._store.by_id[changed.id]


PLANTED: list[type[MemoryBackend]] = [
    ForgetsTheSecondSecret,
    RenewsTheWindow,
    SparesTheLeased,
    KeepsTheExpiryOfUsed,
    broken.ExclusiveBoundary,
    broken.IgnoresUseId,
    broken.RevivesOnRelease,
]


class _OnBroken(TestMemory):
    __test__ = False
    examples = 1000

    def __init__(self, kind: type[MemoryBackend]) -> None:
        self._kind = kind

    def backend(self, store: str) -> TokenBackend:
        return self._kind.from_url(store)


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_bug_is_found(kind: type[MemoryBackend], tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        _OnBroken(kind).play(tmp_path, phases=[Phase.generate])


def test_a_divergence_is_told_by_a_short_history(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as info:
        _OnBroken(KeepsTheExpiryOfUsed).play(tmp_path, stateful_step_count=8)
    history = [line for line in "\n".join(info.value.__notes__).splitlines() if "state." in line]
    assert 0 < len([line for line in history if "the_store_holds" not in line]) <= 4
    assert any("state.consume(" in line for line in history)
