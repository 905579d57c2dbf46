"""Budgets: one document for each object, so that its limits are charged by one command, all or none.

A budget that belongs to no object has a document of its own. What is charged for a key that is not compared
yet is a *reservation*, and is counted in ``reserved`` until the key is known to be right or wrong.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, NamedTuple

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
from vtoken_backends.mongodb.collections import Collections, Document
from vtoken_backends.mongodb.failures import Duplicate
from vtoken_backends.mongodb.patience import Patience

_WAIT: Final = 2.0
_POLL: Final = 0.02


class _Found(NamedTuple):
    """A budget as it is stored."""

    state: BudgetState
    reserved: int


class _Taken(NamedTuple):
    """What became of spends."""

    spending: Spending
    states: tuple[BudgetState | None, ...]
    reserved: int
    """Reservations in the budget that is full."""


class Budgets:
    """The budgets of a store.

    Args:
        client: of the store.
        wait: seconds of real time that a call waits for reservations.
    """

    def __init__(self, client: Collections, wait: float = _WAIT) -> None:
        self._client = client
        self._wait = wait
        self._waiting: Counter[Budget] = Counter()

    async def spend(self, spends: Sequence[Spend], now: int) -> Spending:
        """What :meth:`TokenBackend.spend` says."""
        return (await self._take(spends, now, 0)).spending if spends else Spending()

    async def reserve(self, spends: Sequence[Spend], now: int) -> _Taken:
        """Charge all spends until :meth:`settle`, or none. Waits where reservations alone fill a budget."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._wait
        while True:
            taken = await self._take(spends, now, 1)
            full = taken.spending.full
            if full is None or not taken.reserved or loop.time() >= end:
                return taken
            budget = spends[full].budget
            if self._waiting[budget] >= taken.reserved:
                return taken
            self._waiting[budget] += 1
            try:
                await asyncio.sleep(_POLL)
            finally:
                self._waiting[budget] -= 1
                if not self._waiting[budget]:
                    del self._waiting[budget]

    async def settle(self, charges: Sequence[Charge]) -> None:
        """End the reservations of some charges, which stay charged."""
        for charge in charges:
            path = f"budgets.{charge.budget.name.hex()}"
            query: Document = {**_charged(charge), f"{path}.reserved": {"$gt": 0}}
            update: Document = {"$inc": {f"{path}.reserved": -1}}
            await self._client.run(partial(self._client.budgets.update_one, query, update))

    async def undo(self, charges: Sequence[Charge], *, reserved: int) -> None:
        """Leave budgets as if some charges had never been made."""
        for charge in charges:
            update = _undoing(charge.budget, reserved)
            await self._client.run(partial(self._client.budgets.update_one, _charged(charge), update))

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

    # One command each -----------------------------------------------------------------------------

    async def _take(self, spends: Sequence[Spend], now: int, reserved: int) -> _Taken:
        """Charge all spends or none, document by document."""
        documents: dict[bytes, list[Spend]] = {}
        for spend in spends:
            documents.setdefault(_id_of(spend.budget), []).append(spend)
        if len(documents) > 1:  # so that a budget that is full leaves the others untouched
            full = await self._full(spends, now)
            if full is not None:
                return full
        states: dict[Budget, BudgetState] = {}
        charges: list[Charge] = []
        for oid, together in documents.items():
            found = await self._charge(oid, together, now, reserved)
            if found is None:
                await self.undo(charges, reserved=reserved)
                # Where it no longer is full by now, spend again.
                return await self._full(spends, now) or await self._take(spends, now, reserved)
            states |= found
            charges += [Charge(budget=s.budget, until=found[s.budget].until) for s in together]
        lefts = [max(spend.limit - states[spend.budget].spent, 0) for spend in spends]
        in_order = tuple(Charge(budget=s.budget, until=states[s.budget].until) for s in spends)
        return _Taken(
            spending=Spending(charges=in_order, left=least_left(lefts)),
            states=tuple(states[spend.budget] for spend in spends),
            reserved=0,
        )

    async def _full(self, spends: Sequence[Spend], now: int) -> _Taken | None:
        """The answer where a budget is full, or None."""
        found = await self._found([spend.budget for spend in spends])
        states = [None if one is None else one.state for one in found]
        spending = full_spending(states, spends, now)
        if spending is None:
            return None
        one = found[spending.full or 0]
        return _Taken(spending=spending, states=tuple(states), reserved=0 if one is None else one.reserved)

    async def _charge(
        self, oid: bytes, spends: Sequence[Spend], now: int, reserved: int
    ) -> dict[Budget, BudgetState] | None:
        async def find_and_update() -> Document:
            found = await self._client.budgets.find_one_and_update(
                {"_id": oid},
                _charging(spends, now, reserved),
                upsert=True,
                return_document=ReturnDocument.AFTER,
            )
            return dict(found)

        pause = Patience()
        while True:
            with suppress(Duplicate):  # two upserts at once both began to insert
                found = await self._client.run(find_and_update)
                break
            await pause()
        if not found["allowed"]:
            return None
        return {spend.budget: _read(found, spend.budget).state for spend in spends}

    async def _found(self, names: Sequence[Budget]) -> list[_Found | None]:
        async def find() -> dict[bytes, Document]:
            oids = list({_id_of(name): None for name in names})
            cursor = self._client.budgets.find({"_id": {"$in": oids}})
            return {bytes(found["_id"]): found for found in await cursor.to_list(None)}

        documents = await self._client.run(find, writes=False) if names else {}
        found: list[_Found | None] = []
        for name in names:
            document = documents.get(_id_of(name))
            is_there = document is not None and name.name.hex() in document["budgets"]
            found.append(_read(document, name) if document is not None and is_there else None)
        return found


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
    return [{"$set": {path: {"$cond": [is_only, before, {"$mergeObjects": [f"${path}", less]}]}}}]


def _read(document: Document, budget: Budget) -> _Found:
    try:
        found = document["budgets"][budget.name.hex()]
        state = BudgetState(
            spent=int(found["spent"]), strikes=int(found["strikes"]), until=int(found["until"])
        )
        return _Found(state, int(found.get("reserved", 0)))
    except (KeyError, TypeError, ValueError):
        pass
    raise CorruptStore("MongoDB: a stored budget is damaged")


def _charging(spends: Sequence[Spend], now: int, reserved: int) -> list[Document]:
    """The update that takes one from each of several budgets of a document, or none; it sets ``allowed``."""
    paths = [f"$budgets.{spend.budget.name.hex()}" for spend in spends]
    steps = [_step(path, spend, now, reserved) for path, spend in zip(paths, spends, strict=True)]
    taken: Document = {
        f"budgets.{spend.budget.name.hex()}": {
            "$cond": ["$allowed", {"$arrayElemAt": ["$steps", place]}, paths[place]]
        }
        for place, spend in enumerate(spends)
    }
    ends = {"$map": {"input": {"$objectToArray": "$budgets"}, "in": "$$this.v.until"}}
    return [
        {"$set": {"budgets": {"$ifNull": ["$budgets", {}]}}},
        {"$set": {"steps": steps}},
        {"$set": {"allowed": {"$not": [{"$in": [None, "$steps"]}]}}},
        {"$set": taken},
        {"$set": {"due": {"$ifNull": [{"$min": ends}, Int64(now)]}}},
        {"$unset": "steps"},
    ]


def _step(path: str, spend: Spend, now: int, reserved: int) -> Any:
    """A budget after one was taken, or None: :func:`vtoken.backend.budget_step` as an expression."""
    until, spent, strikes = f"{path}.until", f"{path}.spent", f"{path}.strikes"
    held = {"$ifNull": [f"{path}.reserved", 0]}

    def begun(strikes: Any, length: Any, held: Any) -> Document:
        ends = {"$toLong": {"$add": [Int64(now), length]}}
        return {"spent": 1, "strikes": strikes, "until": ends, "reserved": held, "before": before}

    fields = ("spent", "strikes", "until")
    stored = {name: f"{path}.{name}" for name in fields} | {"reserved": 0, "before": None}
    before = {"$cond": [{"$eq": [{"$type": path}, "missing"]}, None, stored]}
    fresh = begun(0, Int64(spend.window), reserved)
    # A clock that was wrong, or a window that is long over: the budget begins anew.
    is_stale = {
        "$or": [
            {"$lte": [{"$add": [until, Int64(spend.max_window)]}, Int64(now)]},
            {"$gt": [until, Int64(now + 2 * spend.max_window)]},
        ]
    }
    is_exhausted = {"$gte": [spent, spend.limit]}
    more = {"$cond": [is_exhausted, {"$min": [{"$add": [strikes, 1]}, MAX_STRIKES]}, 0]}
    grown = {"$cond": [{"$eq": [spent, 0]}, strikes, more]}
    doubled = {"$multiply": [Int64(spend.window), {"$toLong": {"$pow": [2, "$$grown"]}}]}
    longer = {"$min": [doubled, Int64(spend.max_window)]}
    next_window = {"$let": {"vars": {"grown": grown}, "in": begun("$$grown", longer, reserved)}}
    more_spent = {
        "$mergeObjects": [path, {"spent": {"$add": [spent, 1]}, "reserved": {"$add": [held, reserved]}}]
    }
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
