"""A backend of somebody else's: what the protocol takes, and what it doesn't."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from typing import Any, Self, assert_type

from vtoken import TokenManager
from vtoken.backend import (
    Budget,
    Change,
    InsertMode,
    InsertResult,
    Match,
    SlugCount,
    Spent,
    StoredToken,
    TokenBackend,
)
from vtoken_backends.memory import MemoryBackend
from vtoken_backends.mongodb import MongoDBBackend
from vtoken_backends.sqlite import SQLiteBackend


class Whole:
    @classmethod
    def from_url(cls, url: str, **options: object) -> Self:
        raise NotImplementedError

    async def open(self) -> None: ...
    async def close(self) -> None: ...

    async def insert(self, token: StoredToken, mode: InsertMode, keep_until: int = 0) -> InsertResult:
        raise NotImplementedError

    async def find(self, match: Match, limit: int, after: tuple[int, str] | None = None) -> list[StoredToken]:
        raise NotImplementedError

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        raise NotImplementedError

    async def deactivate(self, match: Match, at: int) -> int:
        raise NotImplementedError

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> int:
        raise NotImplementedError

    async def count(self, now: int) -> list[SlugCount]:
        raise NotImplementedError

    async def spend(self, budget: Budget, now: int, limit: int, window: int, max_window: int) -> Spent:
        raise NotImplementedError

    async def refund(self, budget: Budget, until: int) -> None: ...
    async def reset(self, budget: Budget) -> None: ...


class Seconds(Whole):
    async def purge(self, before: float, now: float, limit: int) -> int:  # type: ignore[override]  # an argument less
        raise NotImplementedError


class Partial:
    async def open(self) -> None: ...


def taken(client: Any) -> None:
    backends: list[TokenBackend] = [Whole(), MemoryBackend(), MongoDBBackend(client)]
    backends.append(SQLiteBackend.from_url("sqlite:///tokens.db"))
    TokenManager(Whole())
    TokenManager(Partial())  # type: ignore[arg-type]  # most of it is missing
    assert_type(Whole.from_url("whole://"), Whole)
    assert_type(SQLiteBackend.from_url("sqlite:///tokens.db"), SQLiteBackend)
