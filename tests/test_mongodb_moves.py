"""Moves of tombstones out of a full line, held still between any two steps: by a crash, or by somebody else's
doing."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest

from vtoken.backend import (
    Budget,
    Change,
    Inserted,
    InsertMode,
    InsertResult,
    Match,
    Outcome,
    Release,
    SetExtraData,
    Spend,
    State,
    StoredToken,
    Use,
    UseHeld,
)
from vtoken.errors import BackendUnavailable
from vtoken_backends.mongodb import MongoDBBackend, moves, writes
from vtoken_backends.mongodb.collections import Collections
from vtoken_backends.mongodb.documents import Stored

from .mongodb_tools import (
    ADD,
    END,
    LATER,
    NOW,
    REPLACE,
    Documents,
    digest_of,
    documents,
    hold,
    id_of,
    insert,
    key,
    of,
    opened,
    token,
    use,
)

ONCE: Final = InsertMode.ONCE
OF_OBJECT: Final = Match(content_type="auth.user", object_id="42")
SPEND: Final = Spend(Budget(b"o" * 16, b"n" * 16), 2, 60_000, 60_000)


class Move:
    """A move of tombstones by another process, in the middle of this one's reads.

    Args:
        documents: of the store.
        object_id: of the line; its tombstones have been moved already, which is taken back first.
        pauses: how many reads come before the first of the three writes, and how many between them.
    """

    def __init__(self, documents: Documents, object_id: str, pauses: tuple[int, ...]) -> None:
        line = documents.find_one({"line": {"$exists": True}, "object_id": object_id})
        moved = documents.find_one({"line": {"$exists": False}, "object_id": object_id})
        assert line is not None
        assert moved is not None
        same = {"_id": line["_id"]}
        documents.delete_one({"_id": moved["_id"]})
        back = {"former": [*moved["former"], *line.get("former", ())]}
        documents.update_one(same, {"$set": back, "$push": {"names": {"$each": moved["names"]}}})
        fields = {"spill": moved["former"], "moved": moved["names"], "spill_id": moved["_id"]}
        rest = {"former": line.get("former", []), "names": line["names"]}
        grow = {"$inc": {"revision": 1}}
        writes: list[Callable[[], object]] = [
            lambda: documents.update_one(same, {"$set": fields | rest, **grow}),
            lambda: documents.insert_one(moved),
            lambda: documents.update_one(same, {"$unset": dict.fromkeys(fields, ""), **grow}),
        ]
        self._due = list(zip(itertools.accumulate(pauses), writes, strict=True))
        self._reads = 0

    def go_on(self) -> None:
        """Make the writes that come before the next read."""
        while self._due and self._due[0][0] <= self._reads:
            self._due.pop(0)[1]()
        self._reads += 1


@pytest.mark.parametrize("name", ["find", "find by id", "look", "use", "charged use", "update"])
async def test_a_tombstone_is_found_while_it_moves(
    mongodb_url: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    find_all = Collections.find_all
    moves: list[Move] = []

    async def find_all_later(self: Collections, *args: Any, **more: Any) -> list[dict[str, Any]]:
        for move in moves:
            move.go_on()
        return await find_all(self, *args, **more)

    async def state_of(backend: MongoDBBackend, number: int) -> object:
        """Why a token is refused; of a found one, its state."""
        spends = (SPEND._replace(budget=Budget(b"o" * 16, number.to_bytes(16, "big"))),)
        match name:
            case "find" | "find by id":
                match = key(number) if name == "find" else Match(id=id_of(number))
                return [found.state for found in await backend.find(match, 1)]
            case "update":
                updated = await backend.update(Match(id=id_of(number)), SetExtraData("1"))
                return None if updated is None else [updated.state]
            case "look":
                presented = await backend.present(key(number), None, LATER)
            case _:
                presented = await backend.present(
                    key(number), Use(LATER), LATER, spends if name == "charged use" else ()
                )
        return None if presented.token is None else [presented.token.state]

    monkeypatch.setattr(Collections, "find_all", find_all_later)
    async with opened(mongodb_url) as backend:
        with documents(mongodb_url) as stored:
            for number, pauses in enumerate(itertools.product(range(5), range(3), range(3))):
                first = 100 * number
                for other in range(first, first + 10):
                    await insert(backend, token(other, object_id=str(number)))
                moves.append(Move(stored, str(number), pauses))
                assert await state_of(backend, first) == [State.REPLACED], pauses
                moves.clear()


# A move that stands still.


@asynccontextmanager
async def stopped(url: str, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> AsyncGenerator[MongoDBBackend]:
    """A store in which a process has died after the first write of a move: of the tokens 0 to 8, of which 0
    was used. Token 9 is active."""

    async def die(client: Collections, line: Stored) -> None:
        raise BackendUnavailable("died")

    async with opened(url) as backend:
        await insert(backend, token(0, **fields))
        assert (await use(backend, 0)).outcome is Outcome.RIGHT
        with monkeypatch.context() as dying:
            dying.setattr(writes, "finish_move", die)
            for number in range(1, 10):
                await insert(backend, token(number, **fields))
        with documents(url) as stored:
            assert stored.count_documents({"moved": {"$exists": True}}) == 1
        yield backend


async def numbers(backend: MongoDBBackend, match: Match = OF_OBJECT, page: int = 100) -> list[int]:
    """The numbers of all tokens, newest first, by pages."""
    found: list[int] = []
    after: str | None = None
    while tokens := await backend.find(match, page, after):
        found += [int(one.id, 16) for one in tokens]
        after = tokens[-1].id
    return found


def again(number: int, **fields: Any) -> StoredToken:
    """Another token, with the key of the one of that number."""
    [old] = token(number, **fields).keys
    return token(500, **{**fields, "key": {"digest": old.digest}})


STORED_ALREADY: Final = {
    "the key, once more": (again(0), ONCE),
    "the key, once more in another context": (again(0, context=b"c" * 32), ONCE),
    "the key, beside": (again(0), ADD),
    "the key, in place of the others": (again(0), REPLACE),
    "the id, beside": (token(3, key={"digest": digest_of(500)}), ADD),
    "the id, in place of the others": (token(3, key={"digest": digest_of(500)}), REPLACE),
}


@pytest.mark.parametrize("neighbours", [0, 3], ids=["alone", "in a batch"])
@pytest.mark.parametrize("name", STORED_ALREADY)
async def test_what_moves_is_taken(
    mongodb_url: str, monkeypatch: pytest.MonkeyPatch, name: str, neighbours: int
) -> None:
    record, mode = STORED_ALREADY[name]
    async with stopped(mongodb_url, monkeypatch) as backend:
        others = [insert(backend, of(number)) for number in range(50, 50 + neighbours)]
        *_, inserted = await asyncio.gather(*others, backend.insert(record, mode))
        assert inserted.result is InsertResult.KEY_TAKEN
        refused = await use(backend, 0)
        assert refused.outcome is Outcome.REFUSED
        assert refused.token is not None
        assert refused.token.state is State.USED
        assert await numbers(backend) == list(range(9, -1, -1))


@pytest.mark.parametrize("page", [1, 3, 100])
@pytest.mark.parametrize("is_held", [False, True])
async def test_lists_have_what_moves(
    mongodb_url: str, monkeypatch: pytest.MonkeyPatch, page: int, is_held: bool
) -> None:
    """Also where an older token stays in the line, because it is held."""
    async with stopped(mongodb_url, monkeypatch) as backend:
        with documents(mongodb_url) as stored:
            if is_held:
                stays: dict[str, Any] = {"$push": {"former": {"$each": []}, "names": {"$each": []}}}
                line = stored.find_one({"line": {"$exists": True}})
                assert line is not None
                [oldest] = [one for one in line["spill"] if one["id"] == id_of(0)]
                names = [name for name in line["moved"] if name in (digest_of(0), -1)]
                stays["$push"]["former"]["$each"] = [oldest]
                stays["$push"]["names"]["$each"] = names
                stays["$pull"] = {"spill": {"id": id_of(0)}, "moved": {"$in": names}}
                stored.update_one({"_id": line["_id"]}, stays)
        await insert(backend, token(20, object_id="43"))
        assert await numbers(backend, Match(), page) == [20, *range(9, -1, -1)]
        assert await numbers(backend, OF_OBJECT, page) == list(range(9, -1, -1))


async def test_a_list_has_each_once_while_they_move(
    mongodb_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_all = Collections.find_all
    ongoing: list[Move] = []

    async def find_all_later(self: Collections, *args: Any, **more: Any) -> list[dict[str, Any]]:
        for move in ongoing:
            move.go_on()
        return await find_all(self, *args, **more)

    monkeypatch.setattr(Collections, "find_all", find_all_later)
    async with opened(mongodb_url) as backend:
        with documents(mongodb_url) as stored:
            for first, pauses in enumerate(itertools.product(range(4), range(3), range(3)), 1):
                every = range(100 * first, 100 * first + 10)
                for number in every:
                    await insert(backend, token(number, object_id=str(first)))
                ongoing.append(Move(stored, str(first), pauses))
                found = await numbers(backend, Match(), 4)
                ongoing.clear()
                assert found == list(reversed(every)), pauses
                stored.delete_many({})


async def test_a_code_that_is_drawn_again_leaves_its_tombstone_in_order(
    mongodb_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stopped(mongodb_url, monkeypatch, key={"kind": "code"}) as backend:
        drawn = token(500, key={"digest": digest_of(3), "kind": "code"})
        assert (await insert(backend, drawn)).result is InsertResult.INSERTED
        assert [one.id for one in await backend.find(key(3), 9)] == [id_of(500)]
        assert await backend.update(Match(id=id_of(4)), SetExtraData("1")) is not None
        assert await numbers(backend) == [500, *range(9, -1, -1)]
        assert (await backend.purge(NOW + 6, LATER, 100, 0)).tokens == 5
        assert (await backend.purge(END + 1, END + 1, 100, 0)).tokens == 6
        with documents(mongodb_url) as stored:
            assert stored.count_documents({}) == 0


# Others come in between.


async def _take_a_key(other: MongoDBBackend) -> None:
    """A code may be drawn again, in another context, too: it is the newer token's then."""
    drawn = token(500, context=b"c" * 32, key={"digest": digest_of(3), "kind": "code"})
    assert (await insert(other, drawn)).result is InsertResult.INSERTED


async def _erase(other: MongoDBBackend) -> None:
    assert await other.erase("auth.user", "42", b"o" * 16) == 10


async def _purge(other: MongoDBBackend) -> None:
    assert (await other.purge(LATER, LATER, 1_000, 0)).tokens == 9


async def _purge_one(other: MongoDBBackend) -> None:
    assert (await other.purge(LATER, LATER, 1, 0)).tokens == 1


async def _finish(other: MongoDBBackend) -> None:
    assert (await insert(other, token(10))).result is InsertResult.INSERTED


async def _finish_and_purge(other: MongoDBBackend) -> None:
    await _finish(other)
    assert (await other.purge(LATER, LATER, 1_000, 0)).tokens == 10


BETWEEN: Final[dict[str, tuple[Callable[[MongoDBBackend], Awaitable[None]], list[int]]]] = {
    "a key is taken": (_take_a_key, [500, *range(9, -1, -1)]),
    "erased": (_erase, []),
    "purged": (_purge, [9]),
    "one is purged": (_purge_one, list(range(9, 0, -1))),
    "finished": (_finish, list(range(10, -1, -1))),
    "finished and purged": (_finish_and_purge, [10]),
}


@pytest.mark.parametrize("step", range(1, 7))
@pytest.mark.parametrize("name", BETWEEN)
async def test_a_move_neither_loses_nor_revives_anything(
    mongodb_url: str, monkeypatch: pytest.MonkeyPatch, name: str, step: int
) -> None:
    """Whatever another client does before any of its steps (there are five; the sixth is none)."""
    do, left = BETWEEN[name]
    async with opened(mongodb_url) as backend, opened(mongodb_url) as other:
        for number in range(9):
            await insert(backend, token(number, key={"kind": "code"}))
        steps = 0

        async def finish_later(collections: Collections, line: Stored) -> None:
            run = collections.run

            async def run_later(operation: Any, **options: Any) -> Any:
                nonlocal steps
                steps += 1
                if steps == step:
                    await do(other)
                return await run(operation, **options)

            monkeypatch.setattr(writes, "finish_move", moves.finish_move)
            with monkeypatch.context() as patched:
                patched.setattr(collections, "run", run_later)
                await moves.finish_move(collections, line)
            if steps < step:
                await do(other)

        monkeypatch.setattr(writes, "finish_move", finish_later)
        assert (await insert(backend, token(9))).result is InsertResult.INSERTED
        assert steps >= 2
        assert await numbers(backend) == left
        assert await numbers(other, Match(content_type="auth.user", object_id="42")) == left
        with documents(mongodb_url) as stored:
            assert stored.count_documents({"spill_id": {"$exists": True}}) == 0
        await backend.erase("auth.user", "42", b"o" * 16)
        with documents(mongodb_url) as stored:
            assert stored.count_documents({}) == 0


# What is deleted while it is to be changed.


def updating(change: Change) -> Callable[[MongoDBBackend], Awaitable[object]]:
    return lambda backend: backend.update(Match(id=id_of(1)), change)


CALLS: Final[dict[str, Callable[[MongoDBBackend], Awaitable[object]]]] = {
    "extra data": updating(SetExtraData("1")),
    "release": updating(Release("h")),
    "use of a hold": updating(UseHeld("h", LATER, "")),
    "deactivate": lambda backend: backend.deactivate(OF_OBJECT, LATER),
    "deactivate by key": lambda backend: backend.deactivate(key(1), LATER),
    "issue with an overlap": lambda backend: insert(backend, token(2), REPLACE, keep_until=END),
}


@pytest.mark.parametrize("name", CALLS)
async def test_what_was_deleted_meanwhile_is_decided_again(
    mongodb_url: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    async with opened(mongodb_url) as backend, opened(mongodb_url) as other:
        await insert(backend, token(1))
        await hold(backend, 1, "h")
        write = writes.Writes.write

        async def write_later(self: writes.Writes, read: Any, **options: Any) -> writes.Written:
            if any(stored.edits for stored in read.all.values()):
                monkeypatch.setattr(writes.Writes, "write", write)
                assert await other.erase("auth.user", "42", b"o" * 16) == 1
            return await write(self, read, **options)

        monkeypatch.setattr(writes.Writes, "write", write_later)
        answer = await CALLS[name](backend)
        if isinstance(answer, Inserted):
            assert answer.result is InsertResult.INSERTED
            assert await numbers(backend) == [2]
        else:
            assert not answer
            assert await numbers(backend) == []
