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
        """Charge, insert, and take the charge back where nothing was inserted.

        A ``REPLACE`` mostly inserts. Under the other modes many calls at once want to insert one token, and
        what they charge is reserved until it is known which of them does.
        """
        is_sure = op.mode is InsertMode.REPLACE
        if not is_sure:
            in_the_way = await self._writes.in_the_way(op)
            if in_the_way is not None:
                return in_the_way
        take = self._budgets.spend if is_sure else self._budgets.reserve
        spending = await take(spends, op.token.created_at)
        if spending.full is not None:
            limited = Inserted(InsertResult.LIMITED, None, spending)
            return await self._writes.in_the_way(op) or limited
        inserted = await self._insert_one(op)
        if inserted.result is not InsertResult.INSERTED:
            await self._budgets.undo(spending.charges, reserved=not is_sure)
            return inserted
        if not is_sure:
            await after_a_write(self._budgets.settle(spending.charges))
        return inserted._replace(spending=spending)

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        op = Present(key, change, now)
        if not spends and not (isinstance(change, Use) and change.resets):
            return await self._present_alone(op)
        return await self._apart(self._present_charged(op, spends))

    async def _present_charged(self, op: Present, spends: Sequence[Spend]) -> Presented:
        """Look whether the key is right, and then charge a wrong one, or let a right one through and use it.

        Nobody is told what the look has found before the budgets have allowed it, and right and wrong keys
        queue up for that alike (see ``budgets``).
        """
        now = op.now
        full = await self._budgets.full(spends, now) if spends else None
        if full is not None:
            return await self._limited(op, spends, full)
        states: Sequence[BudgetState | None] = ()
        if spends:
            look = await self._looked_at(op)
            if look.outcome is Outcome.REPLAYED:
                return look._replace(spending=await self._budgets.left(spends, now))
            if look.outcome is Outcome.REFUSED and is_to_be_charged(op, look):
                return await self._charged(op, spends, look)
            allowed = await self._budgets.allow(spends, now)
            if allowed.spending.full is not None:
                return await self._limited(op, spends, allowed.spending)
            states = allowed.states
            if op.change is None:
                return look._replace(spending=allowed.spending)
        presented = await self._present_one(op)
        if spends and presented.outcome is Outcome.REFUSED and is_to_be_charged(op, presented):
            return await self._charged(op, spends, presented)  # the token has ended since the look
        stored = dict(zip([spend.budget for spend in spends], states, strict=True))
        resets: tuple[Budget, ...] = ()
        if presented.outcome is Outcome.RIGHT and isinstance(op.change, Use):
            resets = tuple([budget for budget in op.change.resets if stored.get(budget, True)])
            await after_a_write(self._reset(resets))
        lefts = [
            left_of(None if spend.budget in resets else stored[spend.budget], spend, now) for spend in spends
        ]
        return presented._replace(spending=Spending(left=least_left(lefts)))

    async def _charged(self, op: Present, spends: Sequence[Spend], refused: Presented) -> Presented:
        """The answer to a key that was found to be wrong."""
        spending = await self._budgets.spend(spends, op.now)
        if spending.full is not None:
            return Presented(Outcome.LIMITED, spending=spending)
        return refused._replace(spending=spending)

    async def _limited(self, op: Present, spends: Sequence[Spend], full: Spending) -> Presented:
        """The answer where a budget is full."""
        look = await self._writes.look(op) if op.use_id else None
        if look is None or look.outcome is not Outcome.REPLAYED:
            return Presented(Outcome.LIMITED, spending=full)
        return look._replace(spending=await self._budgets.left(spends, op.now))

    async def _looked_at(self, op: Present) -> Presented:
        """What a key would be answered now; nothing is changed. A right key takes as long as a wrong one."""
        return await (
            self._writes.look(op) if op.use_id else self._present_one(Present(op.key, None, op.now))
        )

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
