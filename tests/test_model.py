"""The backends against the model of the contract, and planted bugs that the model finds."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import Phase

from vtoken.backend import (
    Change,
    Hold,
    Match,
    Presented,
    Spend,
    StoredToken,
    TokenBackend,
    Use,
)
from vtoken.registry import create_backend
from vtoken.testing.model import BackendModel
from vtoken_backends.memory import MemoryBackend

from . import broken
from .conftest import a_store

_numbers = count()


class TestMemory(BackendModel):
    examples = 60

    def new_store(self, directory: Path) -> str:
        return f"memory://model-{next(_numbers)}"

    def backend(self, store: str) -> TokenBackend:
        return MemoryBackend.from_url(store)


class _OnServer(BackendModel):
    """On a database that is emptied and used again from history to history."""

    kind: ClassVar[str]
    examples = 10

    @pytest.fixture(autouse=True)
    def _server(self, request: pytest.FixtureRequest, tmp_path: Path) -> Generator[None]:
        self._request = request
        with ExitStack() as self._used:
            yield

    def new_store(self, directory: Path) -> str:
        self._used.close()
        return self._used.enter_context(a_store(self.kind, self._request, directory))

    def backend(self, store: str) -> TokenBackend:
        return create_backend(store)


class TestSQLite(_OnServer):
    kind = "sqlite"


class TestMongoDB(_OnServer):
    kind = "mongodb"


class TestPostgreSQL(_OnServer):
    kind = "postgresql"


@pytest.mark.long
class TestMemoryAtLength(TestMemory):
    examples = 300


@pytest.mark.long
class TestSQLiteAtLength(TestSQLite):
    examples = 100


@pytest.mark.long
class TestMongoDBAtLength(TestMongoDB):
    examples = 100


@pytest.mark.long
class TestPostgreSQLAtLength(TestPostgreSQL):
    examples = 100


class ForgetsTheSecondSecret(broken.Broken):
    """Compares only under the current secret."""

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        first = key._replace(digests=key.digests and key.digests[:1])
        return await super().present(first, change, now, spends)


class RenewsTheWindow(broken.Broken):
    """Counts an attempt window from the latest attempt, and not from the first."""

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        answer = await super().present(key, change, now, spends)
        for spend in spends if answer.spending.charges else ():
            state = self._store.budget(spend.budget)
            if state is not None:
                self._store.keep(spend.budget, state._replace(until=max(state.until, now + spend.window)))
        return answer


class KeepsTheExpiryOfUsed(broken.Broken):
    """Purges what was used by its expiry, as if it were still good."""

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        answer = await super().present(key, change, now, spends)
        if isinstance(change, Use) and answer.token is not None and not answer.token.is_active:
            used = self.token(answer.token.id)
            self.save(used._replace(ends_at=used.expires_at))
        return answer


class ReleasesEverybody(broken.Broken):
    """Drops all holds where one is given back."""

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        token = await super().update(match, change)
        if token is not None:
            self.save(token._replace(holds=()))
        return token


PLANTED: list[type[MemoryBackend]] = [
    ForgetsTheSecondSecret,
    RenewsTheWindow,
    KeepsTheExpiryOfUsed,
    broken.IgnoresUseId,
]
RARE: list[type[MemoryBackend]] = [ReleasesEverybody, broken.ExclusiveBoundary]
"""These take more than a hundred histories to be found."""


class _OnBroken(TestMemory):
    __test__ = False
    examples = 1000

    def __init__(self, kind: type[MemoryBackend]) -> None:
        self._kind = kind

    def backend(self, store: str) -> TokenBackend:
        return self._kind.from_url(store)


@pytest.mark.parametrize("kind", [*PLANTED, *(pytest.param(kind, marks=pytest.mark.long) for kind in RARE)])
def test_a_planted_bug_is_found(kind: type[MemoryBackend], tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        _OnBroken(kind).play(tmp_path, phases=[Phase.generate])


def test_a_divergence_is_told_by_a_short_history(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as info:
        _OnBroken(KeepsTheExpiryOfUsed).play(
            tmp_path, stateful_step_count=5, phases=[Phase.generate, Phase.shrink]
        )
    history = [line for line in "\n".join(info.value.__notes__).splitlines() if "state." in line]
    assert 0 < len([line for line in history if "the_store_holds" not in line]) <= 7
    assert any("state.consume(" in line for line in history)
