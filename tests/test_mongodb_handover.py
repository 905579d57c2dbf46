"""A token that stands beside its line hands its keys over to the one that replaces it, in several writes.
What others see and do before each of them, and after a crash."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest

from vtoken.backend import (
    Budget,
    InsertMode,
    InsertResult,
    Match,
    Outcome,
    Spend,
    State,
)
from vtoken.errors import BackendError
from vtoken_backends.mongodb import MongoDBBackend
from vtoken_backends.mongodb.collections import Collections
from vtoken_backends.mongodb.lines import Documents
from vtoken_backends.mongodb.purging import Removals
from vtoken_backends.mongodb.writes import Writes, Written

from .mongodb_tools import (
    ADD,
    IF_NONE_VALID,
    LATER,
    REPLACE,
    Died,
    before_write,
    digest_of,
    id_of,
    insert,
    key,
    opened,
    token,
    use,
)

KEEP: Final = LATER + 600_000
SPEND: Final = Spend(Budget(b"o" * 16, b"n" * 16), 3, 60_000, 60_000)
WRITES: Final = (1, 2, 3, 4)
"""Of a replacement: the token becomes pending, the line names the keys, the others end, it becomes the line's
own."""
Doing = Callable[[MongoDBBackend], Awaitable[object]]


@asynccontextmanager
async def two_clients(url: str) -> AsyncGenerator[tuple[MongoDBBackend, MongoDBBackend]]:
    """Of a line with the token 1, beside which the token 2 stands, as a copied store may have it."""
    async with opened(url) as backend, opened(url) as other:
        await insert(backend, token(1))
        assert (await backend.insert(token(2), ADD)).result is InsertResult.INSERTED
        yield backend, other


async def replace(backend: MongoDBBackend) -> list[int]:
    """Issue the token 10, and return the numbers of its keys."""
    inserted = await insert(backend, token(10), REPLACE, keep_until=KEEP)
    assert inserted.result is InsertResult.INSERTED
    assert inserted.token is not None
    return [int.from_bytes(one.digest, "big") for one in inserted.token.keys]


async def _is_found(other: MongoDBBackend) -> None:
    [found] = await other.find(key(2), 1)
    assert found.state is State.ACTIVE


async def _is_right(other: MongoDBBackend) -> None:
    looked = await other.present(key(2), None, LATER, (SPEND,))
    assert looked.outcome is Outcome.RIGHT
    assert await other.budgets((SPEND.budget,)) == [None]


async def _comes_upon_the_line(other: MongoDBBackend) -> None:
    has_valid = await insert(other, token(12), IF_NONE_VALID, wanted_until=LATER)
    assert has_valid.result is InsertResult.HAS_VALID


async def _is_taken(other: MongoDBBackend) -> None:
    """The key cannot be stored a second time, for whatever object."""
    copied = token(50, object_id="7", key={"digest": digest_of(2)})
    assert (await other.insert(copied, InsertMode.ONCE)).result is InsertResult.KEY_TAKEN


@pytest.mark.parametrize("number", WRITES)
@pytest.mark.parametrize("do", [_is_found, _is_right, _comes_upon_the_line, _is_taken])
async def test_a_key_is_good_all_the_while(
    mongodb_url: str, monkeypatch: pytest.MonkeyPatch, do: Doing, number: int
) -> None:
    async with two_clients(mongodb_url) as (backend, other):
        before_write(monkeypatch, number, lambda: do(other))
        assert await replace(backend) == [10, 2]
        used = await use(other, 2)
        assert used.outcome is Outcome.RIGHT
        assert used.token is not None
        assert used.token.id == id_of(10)
        assert (await use(other, 10)).outcome is Outcome.REFUSED


@pytest.mark.parametrize("number", WRITES)
async def test_a_key_is_used_once(mongodb_url: str, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    async with two_clients(mongodb_url) as (backend, other):

        async def use_it() -> None:
            assert (await use(other, 2)).outcome is Outcome.RIGHT

        before_write(monkeypatch, number, use_it)
        await replace(backend)
        assert (await use(backend, 2)).outcome is Outcome.REFUSED
        assert sum(found.uses for found in await backend.find(Match(), 10)) == 1


@pytest.mark.parametrize("number", WRITES)
async def test_a_key_that_was_ended_stays_so(
    mongodb_url: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    async with two_clients(mongodb_url) as (backend, other):

        async def end() -> None:
            assert await other.deactivate(key(2), LATER) == 1

        before_write(monkeypatch, number, end)
        await replace(backend)
        assert (await use(backend, 2)).outcome is Outcome.REFUSED
        assert (await use(backend, 10)).outcome is Outcome.RIGHT


async def _is_used(other: MongoDBBackend) -> None:
    assert (await use(other, 2)).outcome is Outcome.RIGHT


async def _is_ended(other: MongoDBBackend) -> None:
    assert await other.deactivate(key(2), LATER) == 1


@pytest.mark.parametrize("crashes", [False, True])
@pytest.mark.parametrize("number", WRITES)
@pytest.mark.parametrize("end", [_is_used, _is_ended])
async def test_a_key_stays_ended_when_its_token_is_purged(
    mongodb_url: str, monkeypatch: pytest.MonkeyPatch, end: Doing, number: int, crashes: bool
) -> None:
    async with two_clients(mongodb_url) as (backend, other):

        async def end_and_purge() -> None:
            await end(other)
            await other.purge(LATER + 10, LATER + 10, 100, 0)
            if crashes:
                raise Died

        before_write(monkeypatch, number, end_and_purge)
        if crashes:
            with pytest.raises(BackendError):
                await replace(backend)
            await insert(other, token(12), IF_NONE_VALID, wanted_until=LATER)
        else:
            await replace(backend)
        assert (await use(other, 2)).outcome is Outcome.REFUSED


async def test_a_purge_that_began_before_a_replacement_revives_no_key(
    mongodb_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has looked at the line before the token is pending, and deletes the giver afterwards."""
    delete = Removals._delete  # pyright: ignore[reportPrivateUsage]  # the purge stops in its middle
    is_pending, deletes = asyncio.Event(), asyncio.Event()
    write = Writes.write

    async def delete_later(self: Removals, *args: Any) -> tuple[int, bool]:
        deletes.set()
        await is_pending.wait()
        return await delete(self, *args)

    async with two_clients(mongodb_url) as (backend, other):

        async def write_amid_a_purge(self: Writes, read: Documents, **options: Any) -> Written:
            monkeypatch.setattr(Writes, "write", write)
            await _is_used(other)
            purge = asyncio.create_task(other.purge(LATER + 10, LATER + 10, 100, 0))
            await deletes.wait()
            written = await write(self, read, **options)
            is_pending.set()
            assert (await purge).tokens == 1
            return written

        monkeypatch.setattr(Removals, "_delete", delete_later)
        monkeypatch.setattr(Writes, "write", write_amid_a_purge)
        await replace(backend)
        assert (await use(other, 2)).outcome is Outcome.REFUSED


async def test_a_key_is_ended_by_who_has_read_its_giver(
    mongodb_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_clients(mongodb_url) as (backend, other):
        before_write(monkeypatch, 1, lambda: replace(backend))
        assert await other.deactivate(key(2), LATER) == 1
        assert (await use(backend, 2)).outcome is Outcome.REFUSED
        assert (await use(backend, 10)).outcome is Outcome.RIGHT


@pytest.mark.parametrize("number", WRITES)
@pytest.mark.parametrize("do", [_is_found, _is_right, _comes_upon_the_line, _is_taken])
async def test_a_crash_loses_no_key(
    mongodb_url: str, monkeypatch: pytest.MonkeyPatch, do: Doing, number: int
) -> None:
    async def die() -> None:
        raise Died

    async with two_clients(mongodb_url) as (backend, other):
        before_write(monkeypatch, number, die)
        with pytest.raises(BackendError):
            await replace(backend)
        await do(other)
        assert (await use(other, 2)).outcome is Outcome.RIGHT
        assert (await use(other, 2)).outcome is Outcome.REFUSED
        assert sum(found.uses for found in await other.find(Match(), 10)) == 1


async def test_a_key_is_found_that_arrives_and_is_used_between_two_reads(
    mongodb_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def die() -> None:
        raise Died

    find_all, reads = Collections.find_all, 0
    async with two_clients(mongodb_url) as (backend, other):
        before_write(monkeypatch, 4, die)
        with pytest.raises(BackendError):
            await replace(backend)

        async def find_all_later(self: Collections, *args: Any, **more: Any) -> list[dict[str, Any]]:
            nonlocal reads
            reads += 1
            if reads == 2:
                monkeypatch.setattr(Collections, "find_all", find_all)
                await _comes_upon_the_line(other)
                await _is_used(other)
                assert (await insert(other, token(13))).result is InsertResult.INSERTED
            return await find_all(self, *args, **more)

        monkeypatch.setattr(Collections, "find_all", find_all_later)
        [found] = await backend.find(key(2), 1)
        assert (found.id, found.state) == (id_of(10), State.USED)
