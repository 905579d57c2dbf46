"""What the methods of a store do, wherever they are run: by the backend itself, or in a transaction of the
application's own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar, cast

from vtoken.backend import (
    Budget,
    BudgetState,
    Change,
    Charge,
    Hold,
    Inserted,
    InsertMode,
    InsertResult,
    Match,
    Outcome,
    Presented,
    Purged,
    SlugCount,
    Spend,
    Spending,
    StoredToken,
    Use,
    UseHeld,
    least_left,
    left_of,
)
from vtoken_backends.mongodb.budgets import Budgets
from vtoken_backends.mongodb.client import after_a_write
from vtoken_backends.mongodb.collections import Collections
from vtoken_backends.mongodb.lines import Insert, Present, Update, is_to_be_charged
from vtoken_backends.mongodb.purging import Removals
from vtoken_backends.mongodb.reading import Find, Reads
from vtoken_backends.mongodb.writes import Writes

_T = TypeVar("_T")


class Store(ABC):
    """The methods of :class:`~vtoken.backend.TokenBackend` that are about tokens and budgets.

    Args:
        collections: where they are stored.
        check: raises where the unique index is missing.
    """

    def __init__(self, collections: Collections, check: Callable[[], Awaitable[None]]) -> None:
        self._writes = Writes(collections, check)
        self._reads = Reads(collections, self._writes)
        self._budgets = Budgets(collections)
        self._removals = Removals(collections, self._writes)

    @abstractmethod
    async def _apart(self, step: Coroutine[Any, Any, _T], *, writes: bool = True) -> _T:
        """Run a step from beginning to end, whatever becomes of its caller."""

    @abstractmethod
    async def _insert_one(self, op: Insert) -> Inserted:
        """Insert a token. To be called within a step."""

    @abstractmethod
    async def _present_one(self, op: Present) -> Presented:
        """Compare a key, and use or hold its token. To be called within a step."""

    @abstractmethod
    async def _find_named(self, find: Find) -> list[StoredToken]:
        """Look up by digest."""

    async def _insert_alone(self, op: Insert) -> Inserted:
        return await self._apart(self._insert_one(op))

    async def _present_alone(self, op: Present) -> Presented:
        return await self._apart(self._present_one(op), writes=op.change is not None)

    # Tokens ---------------------------------------------------------------------------------------

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
        op = Insert.of(token, mode, keep_until, wanted_until, also_taken)
        if not spends:
            return await self._insert_alone(op)
        return await self._apart(self._insert_charged(op, spends))

    async def _insert_charged(self, op: Insert, spends: Sequence[Spend]) -> Inserted:
        """Charge, insert, and refund where nothing was inserted."""
        if op.mode is not InsertMode.REPLACE:  # which mostly inserts
            in_the_way = await self._writes.in_the_way(op)
            if in_the_way is not None:
                return in_the_way
        spending = await self._budgets.spend(spends, op.token.created_at)
        if spending.full is not None:
            limited = Inserted(InsertResult.LIMITED, None, spending)
            return await self._writes.in_the_way(op) or limited
        inserted = await self._insert_one(op)
        if inserted.result is InsertResult.INSERTED:
            return inserted._replace(spending=spending)
        await self._budgets.undo(spending.charges, reserved=0)
        return inserted

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        op = Present(key, change, now)
        if not spends and not (isinstance(change, Use) and change.resets):
            return await self._present_alone(op)
        return await self._apart(self._present_charged(op, spends))

    async def _present_charged(self, op: Present, spends: Sequence[Spend]) -> Presented:
        """Reserve, compare, and then charge or refund."""
        taken = await self._budgets.reserve(spends, op.now)
        spending = taken.spending
        if spending.full is not None:
            replayed = await self._writes.replayed(op) if op.use_id else None
            if replayed is None:
                return Presented(Outcome.LIMITED, spending=spending)
            return replayed._replace(spending=await self._budgets.left(spends, op.now))
        presented = await self._present_one(op)
        if presented.outcome is Outcome.REFUSED and is_to_be_charged(op, presented):
            await self._budgets.settle(spending.charges)
            return presented._replace(spending=spending)
        resets: tuple[Budget, ...] = ()
        if presented.outcome is Outcome.RIGHT and isinstance(op.change, Use):
            resets = op.change.resets
        after = self._settled(spending.charges, resets)
        await (after_a_write(after) if op.change is not None else after)
        lefts = [
            left_of(None if spend.budget in resets else _refunded(state), spend, op.now)
            for spend, state in zip(spends, taken.states, strict=True)
        ]
        return presented._replace(spending=Spending(left=least_left(lefts)))

    async def _settled(self, charges: Sequence[Charge], resets: Sequence[Budget]) -> None:
        """Refund what is not forgotten anyway."""
        await self._reset(resets)
        left = [charge for charge in charges if charge.budget not in resets]
        await self._budgets.undo(left, reserved=1)

    async def _reset(self, budgets: Sequence[Budget]) -> None:
        names: dict[bytes, list[bytes]] = {}
        for budget in budgets:
            names.setdefault(budget.object, []).append(budget.name)
        for budgets_of, of_object in names.items():
            await self._budgets.reset(budgets_of, of_object)

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        return await self._apart(self._update(Update(match, change)))

    async def _update(self, op: Update) -> StoredToken | None:
        [answer] = await self._writes.flush([op])
        if isinstance(answer, BaseException):
            raise answer
        if answer is not None and isinstance(op.change, UseHeld) and op.change.resets:
            await after_a_write(self._reset(op.change.resets))
        return cast("StoredToken | None", answer)

    async def find(self, match: Match, limit: int, after: str | None = None) -> list[StoredToken]:
        if match.id is not None:
            if after is not None and match.id >= after:
                return []
            return await self._apart(self._reads.by_id(match), writes=False)
        if match.digests is not None:
            found = await self._find_named(Find(match, limit if after is None else len(match.digests)))
            return found if after is None else [token for token in found if token.id < after][:limit]
        return await self._apart(self._reads.page(match, limit, after), writes=False)

    async def deactivate(self, match: Match, at: int, sparing: tuple[str, ...] = ()) -> int:
        return await self._apart(self._deactivate(match, at, sparing))

    async def _deactivate(self, match: Match, at: int, sparing: tuple[str, ...]) -> int:
        return await self._writes.deactivate(match, at, sparing)

    async def erase(self, content_type: str, object_id: str, budgets_of: bytes) -> int:
        return await self._apart(self._erase(content_type, object_id, budgets_of))

    async def _erase(self, content_type: str, object_id: str, budgets_of: bytes) -> int:
        count = await self._removals.erase(content_type, object_id)
        await after_a_write(self._budgets.reset(budgets_of, None))
        return count

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> Purged:
        return await self._apart(self._purge(before, now, limit, budgets_before))

    async def _purge(self, before: int, now: int, limit: int, budgets_before: int) -> Purged:
        tokens = await self._removals.purge(before, now, limit)
        return Purged(tokens=tokens, budgets=await self._budgets.purge(budgets_before, limit))

    async def count(self, now: int) -> list[SlugCount]:
        return await self._apart(self._reads.count(now), writes=False)

    # Budgets --------------------------------------------------------------------------------------

    async def spend(self, spends: tuple[Spend, ...], now: int) -> Spending:
        return await self._apart(self._budgets.spend(spends, now))

    async def refund(self, charges: tuple[Charge, ...]) -> None:
        await self._apart(self._budgets.refund(charges))

    async def budgets(self, names: tuple[Budget, ...]) -> list[BudgetState | None]:
        return await self._apart(self._budgets.states(names), writes=False)

    async def reset(self, budgets_of: bytes, names: tuple[bytes, ...] | None) -> int:
        return await self._apart(self._budgets.reset(budgets_of, names))


def _refunded(state: BudgetState | None) -> BudgetState | None:
    """A budget after its latest charge was given back."""
    return None if state is None else state._replace(spent=max(state.spent - 1, 0))
