"""What purge, erase and count find on MongoDB, whatever was cut short before them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from pymongo import AsyncMongoClient
from pymongo.monitoring import CommandListener

from vtoken.backend import (
    Budget,
    InsertResult,
    Match,
    Purged,
    SlugCount,
    Spend,
    State,
    StoredToken,
)
from vtoken.errors import BackendUnavailable
from vtoken_backends.mongodb import MongoDBBackend
from vtoken_backends.mongodb.lines import Documents
from vtoken_backends.mongodb.writes import Writes

from .mongodb_tools import (
    ADD,
    END,
    IF_NONE_VALID,
    LATER,
    NOW,
    REPLACE,
    active,
    digest_of,
    documents,
    hold,
    insert,
    of,
    opened,
    token,
    use,
)

INSERTED, KEY_TAKEN, HAS_VALID = InsertResult.INSERTED, InsertResult.KEY_TAKEN, InsertResult.HAS_VALID
Count = Callable[..., Awaitable[None]]


class Found(CommandListener):
    """How many documents a client was given by the command ``find``."""

    def __init__(self) -> None:
        self.count = 0

    def started(self, event: object) -> None: ...

    def succeeded(self, event: Any) -> None:
        if event.command_name == "find":
            self.count += len(event.reply["cursor"]["firstBatch"])

    def failed(self, event: object) -> None: ...


@asynccontextmanager
async def watched(url: str) -> AsyncGenerator[tuple[MongoDBBackend, Found]]:
    found = Found()
    async with AsyncMongoClient[Any](url, event_listeners=[found]) as client:
        backend = MongoDBBackend(client)
        await backend.open()
        yield backend, found
        await backend.close()


async def issue_all(backend: MongoDBBackend, records: list[StoredToken]) -> None:
    """Issue them one after the other."""
    for record in records:
        assert (await insert(backend, record)).result is INSERTED


async def purged(backend: MongoDBBackend, limit: int, before: int = LATER) -> int:
    return (await backend.purge(before, before, limit, 0)).tokens


# Lines that stay after tombstones have left them.


@pytest.mark.parametrize("limits", [[10_000], [1, 2, 7, 300, 10_000]])
async def test_lines_whose_tombstones_have_moved_are_in_no_purges_way(
    mongodb_url: str, limits: list[int]
) -> None:
    lines = range(1000, 206_000, 1000)  # more than purge reads at once
    async with watched(mongodb_url) as (backend, found):
        of_lines = (
            [token(first + n, object_id=str(first), created_at=NOW + n) for n in range(10)] for first in lines
        )
        await asyncio.gather(*(issue_all(backend, records) for records in of_lines))
        last = [await purged(backend, limit) for limit in limits]
        assert last[:-1] == limits[:-1]
        assert sum(last) == 9 * len(lines)
        short: dict[str, Any] = {"expires_at": NOW + 30_000, "ends_at": NOW + 30_000}
        await asyncio.gather(*(insert(backend, of(number, **short)) for number in range(10)))
        last = [await purged(backend, limit) for limit in [1, 2, 1000]]
        assert last == [1, 2, 7]
        found.count = 0
        assert await purged(backend, 1000) == 0
        assert found.count == 0
        left = await backend.find(Match(), 1000)
        assert {int(t.id, 16) for t in left} == {first + 9 for first in lines}


async def test_the_longest_ended_goes_before_what_a_line_has_left(mongodb_url: str) -> None:
    """A line knows the end of what has left it, which is no reason to purge its later ones first."""
    async with opened(mongodb_url) as backend:
        await issue_all(backend, [token(100 + n, created_at=NOW + n) for n in range(10)])
        assert await purged(backend, 100) == 9
        await insert(backend, token(110, created_at=NOW + 50_000))  # the one before it ends by it
        await insert(backend, of(1, expires_at=NOW + 30_000, ends_at=NOW + 30_000))
        assert await purged(backend, 1) == 1
        assert [int(t.id, 16) for t in await backend.find(Match(), 10)] == [110, 109]
        assert [await purged(backend, 1), await purged(backend, 1)] == [1, 0]
        assert [int(t.id, 16) for t in await backend.find(Match(), 10)] == [110]


# Lines without tokens.


async def erased(
    backend: MongoDBBackend, other: MongoDBBackend, monkeypatch: pytest.MonkeyPatch
) -> InsertResult:
    """An addition, the object of which is erased before it is counted again."""
    count: Count = Writes._count_beside  # pyright: ignore[reportPrivateUsage]  # there the other one comes
    calls = 0

    async def counted(writes: Writes, added: Any, *rest: Any) -> None:
        nonlocal calls
        calls += bool(added)
        if calls == 2:
            assert await other.erase("auth.user", "42", b"o" * 16) == 1
        await count(writes, added, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Writes, "_count_beside", counted)
        inserted = await insert(backend, token(1), ADD)
    assert calls == 2
    return inserted.result


async def crashed(
    backend: MongoDBBackend, other: MongoDBBackend, monkeypatch: pytest.MonkeyPatch
) -> InsertResult:
    """An addition whose process ends before its document is inserted."""

    async def write(writes: Writes, documents: Documents, **options: Any) -> Any:
        raise BackendUnavailable("the process has ended")

    with monkeypatch.context() as patch:
        patch.setattr(Writes, "write", write)
        with pytest.raises(BackendUnavailable):
            await insert(backend, token(1), ADD)
    return INSERTED


async def refused(
    backend: MongoDBBackend, other: MongoDBBackend, monkeypatch: pytest.MonkeyPatch
) -> InsertResult:
    """An addition whose key somebody takes before its document is inserted."""
    write = Writes.write

    async def overtaken(writes: Writes, documents: Documents, **options: Any) -> Any:
        if documents.added:
            await other.insert(of(2, key={"digest": digest_of(1)}), REPLACE)
        return await write(writes, documents, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Writes, "write", overtaken)
        inserted = await insert(backend, token(1), ADD)
    assert inserted.result is KEY_TAKEN
    return inserted.result


@pytest.mark.parametrize("interrupted", [erased, crashed, refused])
async def test_an_addition_that_was_cut_short_leaves_nothing(
    mongodb_url: str, monkeypatch: pytest.MonkeyPatch, interrupted: Any
) -> None:
    async with opened(mongodb_url) as backend, opened(mongodb_url) as other:
        await interrupted(backend, other, monkeypatch)
        await purged(backend, 10, END + 1)
        with documents(mongodb_url) as stored:
            assert stored.count_documents({}) == 0


async def test_a_line_that_a_purge_has_not_come_to_is_found_by_the_next(mongodb_url: str) -> None:
    """A crash may come between the last of what stands beside a line and the line itself."""
    async with opened(mongodb_url) as backend:
        await insert(backend, token(1, expires_at=NOW + 5, ends_at=NOW + 5))
        await insert(backend, token(2), ADD)
        assert await purged(backend, 10) == 1  # its own token goes, and the line stays
        with documents(mongodb_url) as stored:
            assert stored.count_documents({}) == 2
            stored.delete_one({"line": {"$exists": False}})
            assert await purged(backend, 10, END + 1) == 0
            assert stored.count_documents({}) == 0


async def test_a_line_without_tokens_stays_until_what_stands_beside_it_is_gone(mongodb_url: str) -> None:
    async with watched(mongodb_url) as (backend, found):
        await insert(backend, token(1, expires_at=NOW + 5, ends_at=NOW + 5), ADD)
        await insert(backend, token(2, max_uses=None), ADD)
        await insert(backend, token(3, expires_at=NOW + 9, ends_at=NOW + 9), ADD)
        assert await purged(backend, 10) == 2
        found.count = 0
        assert await purged(backend, 10) == 0
        assert found.count == 0
        await insert(backend, token(4))
        assert await active(backend) == [4]  # the line knew what stands beside it
        assert await purged(backend, 10, END + 1) == 2
        with documents(mongodb_url) as stored:
            assert stored.count_documents({}) == 0


async def test_a_line_stays_beside_what_is_held_beyond_its_end(mongodb_url: str) -> None:
    async with opened(mongodb_url) as backend:
        await insert(backend, token(1, expires_at=LATER + 10, ends_at=LATER + 10), ADD)
        await hold(backend, 1, "mine")  # until a second later
        assert await backend.purge(LATER + 500, LATER + 500, 10, 0) == Purged(tokens=0, budgets=0)
        with documents(mongodb_url) as stored:
            assert stored.count_documents({}) == 2
            assert await purged(backend, 10, LATER + 2000) == 1
            assert stored.count_documents({}) == 0


async def test_a_replacement_that_was_cut_short_is_finished_by_a_purge(mongodb_url: str) -> None:
    """Else the line would be deleted with what has been begun in it, as soon as nothing stands beside it."""
    async with opened(mongodb_url) as backend:
        await insert(backend, token(1, expires_at=LATER - 5, ends_at=LATER - 5), ADD)
        await insert(backend, token(2))
        with documents(mongodb_url) as stored:
            line = stored.find_one({"line": {"$exists": True}})
            assert line is not None
            back = {"pending": line["token"], "keep_until": 0, "names": [line["line"], digest_of(2)]}
            stored.update_one({"_id": line["_id"]}, {"$set": back, "$unset": {"token": ""}})
        assert await purged(backend, 10) == 1
        assert await active(backend) == [2]


async def test_a_purge_between_the_writes_of_an_addition(
    mongodb_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is seen to stand beside a line ends by the next replacement, although a purge found the line
    without anything beside it just before."""
    write = Writes.write

    async with opened(mongodb_url) as backend, opened(mongodb_url) as other:
        await insert(backend, token(1, expires_at=NOW + 5, ends_at=NOW + 5), ADD)

        async def between(writes: Writes, documents: Documents, **options: Any) -> Any:
            if not documents.added:
                return await write(writes, documents, **options)
            assert await purged(other, 10) == 1
            written = await write(writes, documents, **options)
            assert await active(other) == [2]
            await insert(other, token(3))
            assert await active(other) == [3]
            return written

        with monkeypatch.context() as patch:
            patch.setattr(Writes, "write", between)
            assert (await insert(backend, token(2), ADD)).result is INSERTED
        assert await active(other) == [3]
        assert await purged(backend, 10, END + 1) == 2
        with documents(mongodb_url) as stored:
            assert stored.count_documents({}) == 0


# Counts.


@pytest.mark.parametrize("written", [1, 2, 3])
async def test_a_tombstone_on_its_way_is_counted_once(mongodb_url: str, written: int) -> None:
    async with opened(mongodb_url) as backend:
        for number in range(30):  # nine of them move, and nine more
            await insert(backend, token(number, max_uses=1))
            if number < 29:
                await use(backend, number)
        await insert(backend, of(100))
        with documents(mongodb_url) as stored:
            line = stored.find_one({"line": {"$exists": True}, "object_id": "42"})
            moved = stored.find_one({"line": {"$exists": False}})
            assert line is not None
            assert moved is not None
            step = {"spill": moved["former"], "moved": moved["names"], "spill_id": moved["_id"]}
            if written < 3:
                stored.update_one({"_id": line["_id"]}, {"$set": step})
            if written < 2:
                stored.delete_one({"_id": moved["_id"]})
        assert await backend.count(LATER) == [SlugCount("reset", total=31, active=2, expired=0, used=29)]


# Budgets.


async def test_a_budget_whose_window_was_undone_ends_when_it_did_before(mongodb_url: str) -> None:
    spend = Spend(Budget(b"o" * 16, b"n" * 16), 3, 1000, 100_000)
    async with opened(mongodb_url) as backend:
        await backend.spend((spend,), NOW)
        await insert(backend, token(1, object_id="7"))
        taken = token(2, key={"digest": digest_of(1)}, created_at=NOW + 50_000)
        assert (await backend.insert(taken, REPLACE, spends=(spend,))).result is KEY_TAKEN
        [state] = await backend.budgets((spend.budget,))
        assert state is not None
        assert state.until == NOW + 1000
        assert await backend.purge(0, NOW, 10, NOW + 999) == Purged(tokens=0, budgets=0)
        assert await backend.purge(0, NOW, 10, NOW + 1000) == Purged(tokens=0, budgets=1)
        assert await backend.budgets((spend.budget,)) == [None]


# Many beside a line.


async def test_the_newest_of_many_beside_a_line_is_the_valid_one(mongodb_url: str) -> None:
    async with opened(mongodb_url) as backend:
        await asyncio.gather(*(insert(backend, token(number), ADD) for number in range(1, 1102)))
        answer = await backend.insert(token(5000), IF_NONE_VALID, wanted_until=NOW + 5000)
        assert answer.result is HAS_VALID
        assert answer.token is not None
        assert int(answer.token.id, 16) == 1101
        assert (await insert(backend, token(5001))).result is INSERTED
        assert await active(backend) == [5001]
        others = [t.state for t in await backend.find(Match(), 2000) if t.id != token(5001).id]
        assert others == [State.REPLACED] * 1101


async def test_a_valid_one_beside_many_that_have_expired_is_found(mongodb_url: str) -> None:
    short: dict[str, Any] = {"expires_at": NOW + 2000, "ends_at": NOW + 2000}
    async with opened(mongodb_url) as backend:
        await asyncio.gather(*(insert(backend, token(n, **short), ADD) for n in range(1, 1102)))
        await insert(backend, token(2000), ADD)
        answer = await backend.insert(token(5000), IF_NONE_VALID, wanted_until=NOW + 5000)
        assert answer.result is HAS_VALID
        assert answer.token is not None
        assert int(answer.token.id, 16) == 2000
