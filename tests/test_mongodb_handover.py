"""A token that stands beside its line hands its keys over to the one that replaces it, in several writes.
What others see and do before each of them, and after a crash."""

from __future__ import annotations

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
from vtoken_backends.mongodb.lines import Documents
from vtoken_backends.mongodb.writes import Writes, Written

from .mongodb_tools import (
    ADD,
    IF_NONE_VALID,
    LATER,
    REPLACE,
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
WRITES: Final = (1, 2, 3)
"""Of a replacement: the token becomes pending, the others end, it becomes the line's own."""
Doing = Callable[[MongoDBBackend], Awaitable[object]]


class Died(BackendError):
    """The process has died before a write."""


@asynccontextmanager
async def two_clients(url: str) -> AsyncGenerator[tuple[MongoDBBackend, MongoDBBackend]]:
    """Of a line with the token 1, beside which the token 2 stands, as a copied store may have it."""
    async with opened(url) as backend, opened(url) as other:
        await insert(backend, token(1))
        assert (await backend.insert(token(2), ADD)).result is InsertResult.INSERTED
        yield backend, other


def before_write(monkeypatch: pytest.MonkeyPatch, number: int, do: Callable[[], Awaitable[object]]) -> None:
    """Have something done before a write, the first being 1."""
    write, writes = Writes.write, 0

    async def write_later(self: Writes, read: Documents, **options: Any) -> Written:
        nonlocal writes
        writes += any(stored.edits for stored in read.all.values())
        if writes == number:
            monkeypatch.setattr(Writes, "write", write)
            await do()
        return await write(self, read, **options)

    monkeypatch.setattr(Writes, "write", write_later)


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
