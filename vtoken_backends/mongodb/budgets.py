"""Budgets: one document for each object, so that its limits are charged by one command, all or none.

A budget that belongs to no object has a document of its own. So limits of several documents are charged one
after the other, and a later one may turn out to be full. Until that is known, what was charged is a
*reservation*, and is counted in ``reserved`` as well. Where a budget is full only together with reservations,
nobody is refused yet: the call waits until they are settled.

A right key costs nothing. It is let through (:meth:`Budgets.allow`) by a write to the same documents, which
charges nothing. A plain read could overtake the charges of wrong keys that came before it and wait for the
document.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, NamedTuple
from weakref import WeakValueDictionary

from bson.int64 import Int64
from pymongo import ReturnDocument

from vtoken.backend import (
    MAX_STRIKES,
    Budget,
    BudgetState,
    Charge,
    Spend,
    Spending,
    full_spending,
    least_left,
    left_of,
)
from vtoken.errors import CorruptStore
from vtoken_backends.mongodb.client import after_a_write
from vtoken_backends.mongodb.collections import Collections, Document
from vtoken_backends.mongodb.failures import Duplicate
from vtoken_backends.mongodb.patience import Patience

_WAIT: Final = 4.0
_POLLS: Final = (0.02, 0.25)
"""Seconds between two looks at reservations that another process may settle: at first, and at most."""
_UNSETTLED: Final = 10_000
"""Milliseconds after which the latest reservation of a budget will not be settled any more: its process has
died. It stays charged."""
_TRY_AGAIN: Final = 1_000
"""Milliseconds after which somebody may come again whom reservations have kept waiting for too long."""


class _Found(NamedTuple):
    """A budget as it is stored."""

    state: BudgetState
    reserved: int
    reserved_at: int

    def settled(self, now: int) -> BudgetState:
        """The budget without the reservations that may still be settled."""
        if not self.reserved or abs(now - self.reserved_at) > _UNSETTLED:
            return self.state
        return self.state._replace(spent=max(self.state.spent - self.reserved, 0))


class Taken(NamedTuple):
    """What became of spends."""

    spending: Spending
    states: tuple[BudgetState | None, ...] = ()
    """The budgets afterwards."""
    is_settled: bool = True
    """Where a budget is full: whether it is so without the reservations in it."""


class _Taking(NamedTuple):
    """What is done to budgets that are not full."""

    charges: bool = True
    """One is taken from each, and else nothing."""
    reserves: bool = False
    """All charges stay reservations until they are settled or undone."""


_TAKE: Final = _Taking()
_RESERVE: Final = _Taking(reserves=True)
_ALLOW: Final = _Taking(charges=False)


class Budgets:
    """The budgets of a store.

    Args:
        client: of the store.
        wait: seconds of real time that a call waits for reservations.
    """

    def __init__(self, client: Collections, wait: float = _WAIT) -> None:
        self._client = client
        self._wait = wait
        self._settlements: WeakValueDictionary[bytes, asyncio.Event] = WeakValueDictionary()
        """Set once reservations in a document were settled in this process."""

    async def spend(self, spends: Sequence[Spend], now: int) -> Spending:
        """What :meth:`TokenBackend.spend` says."""
        return (await self._take(spends, now, _TAKE)).spending if spends else Spending()

    async def reserve(self, spends: Sequence[Spend], now: int) -> Spending:
        """The same, until :meth:`settle` or :meth:`undo`."""
        return (await self._take(spends, now, _RESERVE)).spending if spends else Spending()

    async def allow(self, spends: Sequence[Spend], now: int) -> Taken:
        """Look whether all spends are allowed, and charge none."""
        return await self._take(spends, now, _ALLOW)

    async def full(self, spends: Sequence[Spend], now: int) -> Spending | None:
        """The answer where a budget is full, whatever becomes of reservations; else None. Writes nothing."""
        taken = await self._full(spends, now)
        return None if taken is None or not taken.is_settled else taken.spending

    async def settle(self, charges: Sequence[Charge]) -> None:
        """End the reservations of some charges, which stay charged."""
        for charge in charges:
            path = f"budgets.{charge.budget.name.hex()}"
            query: Document = {**_charged(charge), f"{path}.reserved": {"$gt": 0}}
            update: Document = {"$inc": {f"{path}.reserved": -1}}
            await self._client.run(partial(self._client.budgets.update_one, query, update))
            self._tell(charge.budget)

    async def undo(self, charges: Sequence[Charge], *, reserved: bool = False) -> None:
        """Leave budgets as if some charges, or reservations, had never been made."""
        for charge in charges:
            update = _undoing(charge.budget, int(reserved))
            await self._client.run(partial(self._client.budgets.update_one, _charged(charge), update))
            self._tell(charge.budget)

    async def refund(self, charges: Sequence[Charge]) -> None:
        """What :meth:`TokenBackend.refund` says."""
        for charge in charges:
            update: Document = {"$inc": {f"budgets.{charge.budget.name.hex()}.spent": -1}}
            await self._client.run(partial(self._client.budgets.update_one, _charged(charge), update))

    async def states(self, names: Sequence[Budget]) -> list[BudgetState | None]:
        """What :meth:`TokenBackend.budgets` says."""
        return [None if found is None else found.state for found in await self._found(names)]

    async def left(self, spends: Sequence[Spend], now: int) -> Spending:
        """What is left where nothing was charged."""
        states = await self.states([spend.budget for spend in spends])
        lefts = [left_of(state, spend, now) for state, spend in zip(states, spends, strict=True)]
        return Spending(left=least_left(lefts))

    async def reset(self, budgets_of: bytes, names: Sequence[bytes] | None) -> int:
        """What :meth:`TokenBackend.reset` says."""
        if names is not None and not names:  # MongoDB before 5.0 refuses a change of no fields
            return 0
        if not any(budgets_of):
            return await self._reset_apart(budgets_of, names)

        async def forget() -> Document | None:
            same: Document = {"_id": budgets_of}
            if names is None:
                found = await self._client.budgets.find_one_and_delete(same)
            else:
                fields = {f"budgets.{name.hex()}": "" for name in names}
                found = await self._client.budgets.find_one_and_update(same, {"$unset": fields})
            return None if found is None else dict(found)

        found = await self._client.run(forget)
        budgets = {} if found is None else found["budgets"]
        return len(budgets) if names is None else len({name.hex() for name in names} & budgets.keys())

    async def _reset_apart(self, budgets_of: bytes, names: Sequence[bytes] | None) -> int:
        async def forget() -> int:
            if names is None:
                query: Document = {"_id": {"$gte": budgets_of + bytes(16), "$lte": budgets_of + b"\xff" * 16}}
            else:
                query = {"_id": {"$in": [budgets_of + name for name in names]}}
            return int((await self._client.budgets.delete_many(query)).deleted_count)

        return await self._client.run(forget)

    async def purge(self, before: int, limit: int) -> int:
        """Forget at most so many budgets that have ended by a time."""
        count = 0
        while count < limit:

            async def find() -> list[Document]:
                due = {"due": {"$lte": Int64(before)}}
                cursor = self._client.budgets.find(due).sort([("due", 1)]).limit(limit - count)  # noqa: B023  # awaited at once
                return list(await cursor.to_list(limit - count))  # noqa: B023  # awaited at once

            found = await self._client.run(find, writes=False)
            if not found:
                break
            for document in found:
                count += await self._purge_one(document, before, limit - count)
                if count == limit:
                    break
        return count

    async def _purge_one(self, document: Document, before: int, limit: int) -> int:
        budgets: dict[str, Document] = document["budgets"]
        over = sorted((int(b["until"]), name) for name, b in budgets.items() if b["until"] <= before)[:limit]
        gone = {name for _, name in over}
        left = {name: budget for name, budget in budgets.items() if name not in gone}

        async def forget() -> int:
            # As a whole, so that a budget that has begun anew meanwhile is not forgotten.
            same: Document = {"_id": document["_id"], "budgets": budgets}
            if not left:
                return int((await self._client.budgets.delete_one(same)).deleted_count)
            due = min(int(budget["until"]) for budget in left.values())
            update = {"$set": {"budgets": left, "due": Int64(due)}}
            return int((await self._client.budgets.update_one(same, update)).modified_count)

        return len(gone) if await self._client.run(forget) else 0

    # Taking -----------------------------------------------------------------------------------------

    async def _take(self, spends: Sequence[Spend], now: int, taking: _Taking) -> Taken:
        """Do it to all budgets, or to none. Waits where only reservations are in the way."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._wait
        pause, longest = _POLLS
        while True:
            taken = await self._try_to_take(spends, now, taking)
            if taken is None:
                continue
            full = taken.spending.full
            if full is None or taken.is_settled:
                return taken
            if loop.time() >= end:
                until = min(taken.spending.until, now + _TRY_AGAIN)
                return taken._replace(spending=taken.spending._replace(until=until))
            await self._settlement(spends[full].budget, _jittered(pause))
            pause = min(pause * 1.5, longest)

    async def _settlement(self, budget: Budget, seconds: float) -> None:
        """Wait until reservations in a document were settled, so long at most: others may settle them."""
        oid = _id_of(budget)
        event = self._settlements.get(oid)
        if event is None:
            event = self._settlements[oid] = asyncio.Event()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await event.wait()

    def _tell(self, budget: Budget) -> None:
        event = self._settlements.pop(_id_of(budget), None)
        if event is not None:
            event.set()

    async def _try_to_take(self, spends: Sequence[Spend], now: int, taking: _Taking) -> Taken | None:
        """Take from all budgets or none; None where one was full and is not any more."""
        documents: dict[bytes, list[Spend]] = {}
        # An object's own come first: they refuse most often, and then nothing shared was touched. All calls
        # keep one order, so that two of them seldom wait for each other's reservations.
        for spend in sorted(spends, key=lambda spend: (not any(spend.budget.object), spend.budget)):
            documents.setdefault(_id_of(spend.budget), []).append(spend)
        if len(documents) > 1:  # so that a budget that is full leaves the others untouched
            full = await self._full(spends, now)
            if full is not None:
                return full
        states: dict[Budget, BudgetState | None] = {}
        reserved: list[Charge] = []
        for place, (oid, together) in enumerate(documents.items(), 1):
            is_reserved = taking.charges and (taking.reserves or place < len(documents))
            found = await self._charge(oid, _charging(together, now, taking.charges, is_reserved))
            if found is None:
                await self.undo(reserved, reserved=True)
                return await self._full(spends, now)
            for spend in together:
                stored = _read(found, spend.budget)
                states[spend.budget] = stored and stored.state
            if is_reserved:
                reserved += _charges(together, states)
        if not taking.reserves:
            await after_a_write(self.settle(reserved))
        after = tuple(states[spend.budget] for spend in spends)
        if not taking.charges:
            lefts = [left_of(state, spend, now) for state, spend in zip(after, spends, strict=True)]
            return Taken(Spending(left=least_left(lefts)), after)
        lefts = [max(s.limit - (b.spent if b else 0), 0) for s, b in zip(spends, after, strict=True)]
        return Taken(Spending(tuple(_charges(spends, states)), least_left(lefts)), after)

    async def _full(self, spends: Sequence[Spend], now: int) -> Taken | None:
        """The answer where a budget is full, or None."""
        found = await self._found([spend.budget for spend in spends])
        settled = full_spending([one and one.settled(now) for one in found], spends, now)
        if settled is not None:
            return Taken(settled)
        spending = full_spending([one and one.state for one in found], spends, now)
        return None if spending is None else Taken(spending, is_settled=False)

    # One command each -----------------------------------------------------------------------------

    async def _charge(self, oid: bytes, update: list[Document]) -> Document | None:
        """The document after an update, or None where a budget in it was full."""

        async def find_and_update() -> Document:
            found = await self._client.budgets.find_one_and_update(
                {"_id": oid}, update, upsert=True, return_document=ReturnDocument.AFTER
            )
            return dict(found)

        pause = Patience()
        while True:
            with suppress(Duplicate):  # two upserts at once both began to insert
                found = await self._client.run(find_and_update)
                break
            await pause()
        return found if found["allowed"] else None

    async def _found(self, names: Sequence[Budget]) -> list[_Found | None]:
        async def find() -> dict[bytes, Document]:
            oids = list({_id_of(name): None for name in names})
            cursor = self._client.budgets.find({"_id": {"$in": oids}})
            return {bytes(found["_id"]): found for found in await cursor.to_list(None)}

        documents = await self._client.run(find, writes=False) if names else {}
        found: list[_Found | None] = []
        for name in names:
            document = documents.get(_id_of(name))
            found.append(None if document is None else _read(document, name))
        return found


def _jittered(seconds: float) -> float:
    return random.uniform(seconds / 2, seconds)  # noqa: S311  # no secret


def _id_of(budget: Budget) -> bytes:
    """The ``_id`` of a budget's document."""
    return bytes(budget.object) if any(budget.object) else bytes(budget.object + budget.name)


def _charged(charge: Charge) -> Document:
    """The query of a budget from which a charge was taken and can be given back."""
    path = f"budgets.{charge.budget.name.hex()}"
    return {"_id": _id_of(charge.budget), f"{path}.until": charge.until, f"{path}.spent": {"$gt": 0}}


def _undoing(budget: Budget, reserved: int) -> list[Document]:
    """The update that undoes a charge: one that began a window leaves what was there before."""
    path = f"budgets.{budget.name.hex()}"
    less = {
        "spent": {"$subtract": [f"${path}.spent", 1]},
        "reserved": {"$max": [{"$subtract": [f"${path}.reserved", reserved]}, 0]},
    }
    is_only = {"$eq": [f"${path}.spent", 1]}
    # What was there before is None where there was nothing.
    before = {"$ifNull": [f"${path}.before", "$$REMOVE"]}
    return [
        {"$set": {path: {"$cond": [is_only, before, {"$mergeObjects": [f"${path}", less]}]}}},
        {"$set": {"due": {"$min": ["$due", f"${path}.until"]}}},  # what was there before ends earlier
    ]


def _charges(spends: Sequence[Spend], states: Mapping[Budget, BudgetState | None]) -> list[Charge]:
    found = [(spend.budget, states[spend.budget]) for spend in spends]
    return [Charge(budget=budget, until=state.until) for budget, state in found if state is not None]


def _read(document: Document, budget: Budget) -> _Found | None:
    try:
        found = document["budgets"].get(budget.name.hex())
        if found is None:
            return None
        state = BudgetState(
            spent=int(found["spent"]), strikes=int(found["strikes"]), until=int(found["until"])
        )
        return _Found(state, int(found.get("reserved", 0)), int(found.get("reserved_at", 0)))
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    raise CorruptStore("MongoDB: a stored budget is damaged")


def _charging(spends: Sequence[Spend], now: int, charges: bool, reserves: bool) -> list[Document]:
    """The update that takes one from each of several budgets of a document, or none; it sets ``allowed``.

    Without ``charges`` it takes nothing, and writes to the document all the same.
    """
    paths = [f"$budgets.{spend.budget.name.hex()}" for spend in spends]
    steps = [_step(path, spend, now, reserves) for path, spend in zip(paths, spends, strict=True)]
    taken: Document = {
        f"budgets.{spend.budget.name.hex()}": {
            "$cond": ["$allowed", {"$arrayElemAt": ["$steps", place]}, paths[place]]
        }
        for place, spend in enumerate(spends)
    }
    if not charges:
        taken = {"turn": {"$cond": ["$allowed", {"$not": ["$turn"]}, "$turn"]}}
    ends = {"$map": {"input": {"$objectToArray": "$budgets"}, "in": "$$this.v.until"}}
    return [
        {"$set": {"budgets": {"$ifNull": ["$budgets", {}]}}},
        {"$set": {"steps": steps}},
        {"$set": {"allowed": {"$not": [{"$in": [None, "$steps"]}]}}},
        {"$set": taken},
        {"$set": {"due": {"$ifNull": [{"$min": ends}, Int64(now)]}}},
        {"$unset": "steps"},
    ]


def _step(path: str, spend: Spend, now: int, reserves: bool) -> Any:
    """A budget after one was taken, or None: :func:`vtoken.backend.budget_step` as an expression."""
    until, spent, strikes = f"{path}.until", f"{path}.spent", f"{path}.strikes"
    held = {"$ifNull": [f"{path}.reserved", 0]}
    mark: Document = {"reserved_at": Int64(now)} if reserves else {}

    def begun(strikes: Any, length: Any) -> Document:
        ends = {"$toLong": {"$add": [Int64(now), length]}}
        return {
            "spent": 1,
            "strikes": strikes,
            "until": ends,
            "reserved": int(reserves),
            "before": before,
            **mark,
        }

    fields = ("spent", "strikes", "until")
    stored = {name: f"{path}.{name}" for name in fields} | {"reserved": 0, "before": None}
    before = {"$cond": [{"$eq": [{"$type": path}, "missing"]}, None, stored]}
    fresh = begun(0, Int64(spend.window))
    # A clock that was wrong, or a window that is long over: the budget begins anew.
    is_stale = {
        "$or": [
            {"$lte": [{"$add": [until, Int64(spend.max_window)]}, Int64(now)]},
            {"$gt": [until, Int64(now + 2 * spend.max_window)]},
        ]
    }
    is_exhausted = {"$gte": [spent, spend.limit]}
    struck = {"$cond": [is_exhausted, {"$min": [{"$add": [strikes, 1]}, MAX_STRIKES]}, 0]}
    grown = {"$cond": [{"$eq": [spent, 0]}, strikes, struck]}
    doubled = {"$multiply": [Int64(spend.window), {"$toLong": {"$pow": [2, "$$grown"]}}]}
    longer = {"$min": [doubled, Int64(spend.max_window)]}
    next_window = {"$let": {"vars": {"grown": grown}, "in": begun("$$grown", longer)}}
    more = {"spent": {"$add": [spent, 1]}, "reserved": {"$add": [held, int(reserves)]}, **mark}
    more_spent = {"$mergeObjects": [path, more]}
    is_next = {"$or": [{"$eq": [spent, 0]}, {"$lte": [until, Int64(now)]}]}
    return {
        "$switch": {
            "branches": [
                {"case": {"$eq": [{"$type": path}, "missing"]}, "then": fresh},
                {"case": is_stale, "then": fresh},
                {"case": is_next, "then": next_window},
                {"case": {"$lt": [spent, spend.limit]}, "then": more_spent},
            ],
            "default": None,
        }
    }
