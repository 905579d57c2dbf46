"""What every way to the store has in common: the methods of the protocol, as steps and shared statements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeVar, cast

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
    Use,
)
from vtoken_backends.sqlite import operations
from vtoken_backends.sqlite.batch import Operation, SharedOperation, SingleOperation
from vtoken_backends.sqlite.errors import as_backend_error
from vtoken_backends.sqlite.inserts import Insert, inserted
from vtoken_backends.sqlite.presents import Present, presented
from vtoken_backends.sqlite.records import Unreadable
from vtoken_backends.sqlite.shared import Answer, answer_of
from vtoken_backends.sqlite.steps import Steps

_T = TypeVar("_T")
_PURGED_AT_ONCE: Final = 20
"""Tokens or budgets in one statement, for which all others wait. With five times as many a purge takes half
as long, and a consumer beside it gets half as much done (tests/benchmarks, purge)."""


class Store(ABC):
    """The methods of :class:`~vtoken.backend.TokenBackend` that are about tokens, budgets and notes."""

    _path: str

    @abstractmethod
    async def _submit(self, operation: Operation) -> Any:
        """Have an operation carried out that writes, and return its answer (of a shared one: its text)."""

    @abstractmethod
    async def _read(self, steps: Callable[[], Steps[_T]]) -> _T:
        """Have steps carried out that only read, and return their answer."""

    @abstractmethod
    async def _candidates(self, match: Match) -> list[StoredToken]:
        """The tokens with the id or one of the digests of a match."""

    async def _share(self, request: Insert | Present) -> Answer:
        """Have the work of a request done in company, and return its answer."""
        kind = request.kind
        try:
            return answer_of(await self._submit(SharedOperation(kind, request.row(kind))))
        except Unreadable:
            pass
        raise as_backend_error(Unreadable(), self._path)

    async def _write(self, steps: Callable[[], Steps[_T]]) -> _T:
        return cast("_T", await self._submit(SingleOperation(steps)))

    async def note(self, name: str, text: str, *, replace: bool = False) -> str:
        if not text:
            return await self._read(lambda: operations.read_note(name))
        return await self._write(lambda: operations.write_note(name, text, replace))

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
        request = Insert(
            token=token,
            mode=mode,
            keep_until=keep_until,
            wanted_until=wanted_until,
            also_taken=also_taken,
            spends=spends,
        )
        del also_taken  # no digest in a frame that a traceback may show
        return inserted(request, await self._share(request))

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        if change is None and not spends:
            return operations.checked(await self._candidates(key), key, now)
        request = Present(key=key, change=change, now=now, spends=spends)
        return presented(request, await self._share(request))

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        return await self._write(lambda: operations.update(match, change))

    async def find(self, match: Match, limit: int, after: str | None = None) -> list[StoredToken]:
        if match.digests is None and match.id is None:
            return await self._read(lambda: operations.find(match, limit, after))
        return operations.page(await self._candidates(match), match, limit, after)

    async def deactivate(self, match: Match, at: int, sparing: tuple[str, ...] = ()) -> int:
        return await self._write(lambda: operations.deactivate(match, at, sparing))

    async def erase(self, content_type: str, object_id: str, budgets_of: bytes) -> int:
        return await self._write(lambda: operations.erase(content_type, object_id, budgets_of))

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> Purged:
        def tokens(most: int) -> Steps[int]:
            return operations.purge_tokens(before, now, most)

        def budgets(most: int) -> Steps[int]:
            return operations.purge_budgets(budgets_before, most)

        return Purged(
            tokens=await self._purge_in_parts(tokens, limit),
            budgets=await self._purge_in_parts(budgets, limit),
        )

    async def count(self, now: int) -> list[SlugCount]:
        return await self._read(lambda: operations.count(now))

    async def spend(self, spends: tuple[Spend, ...], now: int) -> Spending:
        return await self._write(lambda: operations.spend(spends, now))

    async def refund(self, charges: tuple[Charge, ...]) -> None:
        await self._write(lambda: operations.refund(charges))

    async def budgets(self, names: tuple[Budget, ...]) -> list[BudgetState | None]:
        return await self._read(lambda: operations.budgets(names))

    async def reset(self, budgets_of: bytes, names: tuple[bytes, ...] | None) -> int:
        return await self._write(lambda: operations.reset(budgets_of, names))

    async def _purge_in_parts(self, purge: Callable[[int], Steps[int]], limit: int) -> int:
        total = 0
        while total < limit:
            most = min(limit - total, _PURGED_AT_ONCE)
            purged = await self._write(partial(purge, most))
            total += purged
            if purged < most:
                break
        return total
