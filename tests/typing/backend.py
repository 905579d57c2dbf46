"""A backend of somebody else's: what the protocol takes, and what it doesn't."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from typing import Any, Self, assert_type

from vtoken import TokenManager
from vtoken.backend import (
    Budget,
    BudgetState,
    Change,
    Charge,
    Hold,
    Inserted,
    InsertMode,
    Match,
    Presented,
    Purged,
    SlugCount,
    Spend,
    Spending,
    StoredToken,
    TokenBackend,
    Use,
)
from vtoken_backends.memory import MemoryBackend
from vtoken_backends.mongodb import MongoDBBackend
from vtoken_backends.postgresql import PostgreSQLBackend
from vtoken_backends.sqlite import SQLiteBackend


class Whole:
    @classmethod
    def from_url(cls, url: str, **options: object) -> Self:
        raise NotImplementedError

    async def open(self) -> None: ...
    async def close(self) -> None: ...
    async def ping(self) -> None: ...

    async def note(self, name: str, text: str, *, replace: bool = False) -> str:
        raise NotImplementedError

    def within(self, handle: object) -> TokenBackend:
        raise NotImplementedError

    async def insert(
        self,
        token: StoredToken,
        mode: InsertMode,
        *,
        keep_until: int = 0,
        wanted_until: int = 0,
        also_taken: tuple[bytes, ...] = (),
        spends: tuple[Spend, ...] = (),
    ) -> Inserted:
        raise NotImplementedError

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        raise NotImplementedError

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        raise NotImplementedError

    async def find(self, match: Match, limit: int, after: str | None = None) -> list[StoredToken]:
        raise NotImplementedError

    async def deactivate(self, match: Match, at: int, sparing: tuple[str, ...] = ()) -> int:
        raise NotImplementedError

    async def erase(self, content_type: str, object_id: str, budgets_of: bytes) -> int:
        raise NotImplementedError

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> Purged:
        raise NotImplementedError

    async def count(self, now: int) -> list[SlugCount]:
        raise NotImplementedError

    async def spend(self, spends: tuple[Spend, ...], now: int) -> Spending:
        raise NotImplementedError

    async def refund(self, charges: tuple[Charge, ...]) -> None: ...

    async def budgets(self, names: tuple[Budget, ...]) -> list[BudgetState | None]:
        raise NotImplementedError

    async def reset(self, budgets_of: bytes, names: tuple[bytes, ...] | None) -> int:
        raise NotImplementedError


class Less(Whole):
    async def purge(self, before: int, now: int, limit: int) -> Purged:  # type: ignore[override]  # an argument less
        raise NotImplementedError


class Partial:
    async def open(self) -> None: ...


def taken(client: Any) -> None:
    backends: list[TokenBackend] = [Whole(), MemoryBackend(), MongoDBBackend(client)]
    backends.append(SQLiteBackend.from_url("sqlite:///tokens.db"))
    backends.append(PostgreSQLBackend.from_url("postgresql://localhost/tokens"))
    TokenManager(Whole())
    TokenManager(Partial())  # type: ignore[arg-type]  # most of it is missing
    assert_type(Whole.from_url("whole://"), Whole)
    assert_type(SQLiteBackend.from_url("sqlite:///tokens.db"), SQLiteBackend)
