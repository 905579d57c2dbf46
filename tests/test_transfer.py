"""Copies between stores: whole, interrupted, beside live traffic; and tokens added from elsewhere."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from vtoken.backend import (
    Budget,
    InsertMode,
    InsertResult,
    Lease,
    Match,
    StoredToken,
    TokenBackend,
    Use,
)
from vtoken.errors import BackendUnavailable
from vtoken.transfer import PAGE, Copied, add, copy, pages
from vtoken_backends.memory import MemoryBackend

from .faults import copy_round
from .faults.copy_round import opened
from .servers import fresh_database
from .sqlite_tools import NOW, digest, token

HOUR = 3_600_000


def various(count: int) -> list[StoredToken]:
    """Tokens of every kind, newest first."""
    made = copy_round.of_every_kind(count)
    return sorted(made, key=lambda t: (t.created_at, t.id), reverse=True)


async def fill(backend: TokenBackend, tokens: Iterable[StoredToken]) -> None:
    for stored in tokens:
        assert await backend.insert(stored, InsertMode.ADD) is InsertResult.INSERTED


async def everything(backend: TokenBackend) -> list[StoredToken]:
    return [stored async for page in pages(backend, 7) for stored in page]


def assert_equal(copied: Copied, tokens: int) -> None:
    assert copied.is_complete
    assert (copied.tokens, copied.missing, copied.different) == (tokens, 0, 0)
    assert copied.source_digest == copied.destination_digest


async def test_pages_are_everything_in_order() -> None:
    tokens = various(22)
    async with opened("memory://") as backend:
        assert await everything(backend) == []
        await fill(backend, tokens[::-1])
        assert await everything(backend) == tokens
        assert [len(page) async for page in pages(backend, 11)] == [11, 11]


async def test_copies_are_equal_in_every_field(tmp_path: Path) -> None:
    tokens = various(40)
    file = f"sqlite:///{tmp_path}/tokens.db?synchronous=normal"
    async with opened("memory://") as first, opened(file) as second, opened("memory://") as third:
        await fill(first, tokens)
        told: list[int] = []
        there = await copy(first, second, progress=told.append, page=16)
        back = await copy(second, third, page=16)
        assert await everything(second) == await everything(third) == tokens
    assert_equal(there, 40)
    assert_equal(back, 40)
    assert (there.inserted, there.skipped, there.others) == (40, 0, 0)
    assert there.source_digest == back.destination_digest
    assert told == [16, 32, 40, 56, 72, 80]


async def test_the_digest_tells_every_difference() -> None:
    digests: set[str] = set()
    plain = token(1)
    for other in (
        plain,
        plain._replace(digest=digest(2)),
        plain._replace(extra_data="1"),
        plain._replace(use_ids=("a",), uses=1, max_uses=2),
        plain._replace(lease_until=1),
    ):
        async with opened("memory://") as one, opened("memory://") as two:
            await fill(one, [other])
            copied = await copy(one, two)
            assert_equal(copied, 1)
            digests.add(copied.source_digest)
    assert len(digests) == 5


async def test_an_empty_store_is_copied() -> None:
    async with opened("memory://") as one, opened("memory://") as two:
        assert_equal(await copy(one, two), 0)


async def test_budgets_stay_behind() -> None:
    budget = Budget("auth.user", "1", "reset", "attempts")
    async with opened("memory://") as one, opened("memory://") as two:
        await one.spend(budget, NOW, 1, HOUR, HOUR)
        await copy(one, two)
        assert not (await one.spend(budget, NOW, 1, HOUR, HOUR)).allowed
        assert (await two.spend(budget, NOW, 1, HOUR, HOUR)).allowed


# Again, beside others, beside live traffic --------------------------------------------------------


async def test_what_ended_in_the_source_since_ends_in_the_copy() -> None:
    several = token(4)._replace(max_uses=3)
    async with opened("memory://") as one, opened("memory://") as two:
        await fill(one, [token(1), token(2), token(3), several])
        await copy(one, two)
        await one.update(Match(id=token(1).id), Use(NOW + 5, "an id"))
        await one.deactivate(Match(id=token(2).id), NOW + 6)
        await one.update(Match(id=several.id), Use(NOW + 3))
        await one.update(Match(id=several.id), Use(NOW + 7, "b"))
        again = await copy(one, two)
        assert (again.inserted, again.skipped, again.ended) == (0, 4, 3)
        assert await everything(two) == await everything(one)
    assert_equal(again, 4)


async def test_nothing_comes_back_to_life() -> None:
    async with opened("memory://") as one, opened("memory://") as two:
        await fill(one, [token(1), token(2)._replace(max_uses=5)])
        await copy(one, two)
        await two.deactivate(Match(id=token(1).id), NOW + 5)
        await two.update(Match(id=token(2).id), Use(NOW + 5))
        before = await everything(two)
        again = await copy(one, two)
        assert await everything(two) == before
    assert not again.is_complete
    assert (again.ended, again.missing, again.different) == (0, 0, 2)
    assert again.source_digest != again.destination_digest


async def test_a_difference_that_no_step_can_mend_is_told() -> None:
    async with opened("memory://") as one, opened("memory://") as two:
        await fill(one, [token(1)])
        await copy(one, two)
        await one.update(Match(id=token(1).id), Lease("lease", NOW))
        again = await copy(one, two)
    assert not again.is_complete
    assert (again.different, again.ended) == (1, 0)


async def test_tokens_of_the_destination_stay() -> None:
    theirs, same_key, same_id = (
        token(7),
        token(8)._replace(digest=digest(1)),
        token(2)._replace(digest=digest(9)),
    )
    async with opened("memory://") as one, opened("memory://") as two:
        await fill(one, [token(1), token(2), token(3)])
        await fill(two, [theirs, same_key, same_id])
        copied = await copy(one, two)
        assert set(await everything(two)) == {theirs, same_key, same_id, token(3)}
    assert not copied.is_complete
    assert (copied.inserted, copied.missing, copied.different, copied.others) == (1, 2, 0, 3)


class Fails(MemoryBackend):
    """Takes so many tokens and then loses its connection."""

    left = 10**9

    async def insert(self, token: StoredToken, mode: InsertMode, keep_until: int = 0) -> InsertResult:
        if not self.left:
            raise BackendUnavailable("gone")
        self.left -= 1
        await asyncio.sleep(0)
        return await super().insert(token, mode, keep_until)


async def test_a_store_that_fails_raises_its_own_error_and_the_next_run_goes_on() -> None:
    destination = Fails()
    await destination.open()
    async with opened("memory://") as one:
        await fill(one, various(30))
        destination.left = 13
        with pytest.raises(BackendUnavailable, match="gone"):
            await copy(one, destination, page=10)
        assert len(await everything(destination)) == 13
        destination.left = 10**9
        again = await copy(one, destination, page=10)
    assert_equal(again, 30)
    assert (again.inserted, again.skipped) == (17, 13)


# Between real stores, interrupted -----------------------------------------------------------------


async def interrupted(source: TokenBackend, destination: TokenBackend, after: int) -> None:
    """Copy, and cancel it once so many tokens are done."""
    copying: asyncio.Task[Copied]

    def cancel(done: int) -> None:
        if done >= after:
            copying.cancel()

    copying = asyncio.create_task(copy(source, destination, progress=cancel, page=100))
    with pytest.raises(asyncio.CancelledError):
        await copying


async def test_sqlite_to_mongodb_and_back_cancelled_and_resumed(
    mongodb_replica_set: str, tmp_path: Path
) -> None:
    tokens = various(600)
    one = f"sqlite:///{tmp_path}/one.db?synchronous=normal"
    two = f"sqlite:///{tmp_path}/two.db?synchronous=normal"
    with fresh_database(mongodb_replica_set) as url:
        async with opened(one) as first, opened(url) as second, opened(two) as third:
            assert (await add(first, tokens)).inserted == 600
            await interrupted(first, second, 200)
            there = await copy(first, second)
            await interrupted(second, third, 300)
            back = await copy(second, third)
            assert await everything(third) == tokens
    assert_equal(there, 600)
    assert_equal(back, 600)
    assert 0 < there.inserted <= 400
    assert there.inserted + there.skipped == 600
    assert 0 < back.inserted <= 300
    assert there.source_digest == back.destination_digest


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read in /proc")
def test_the_command_killed_and_interrupted_ends_equal(mongodb_replica_set: str) -> None:
    copy_round.copy_both_ways(mongodb_replica_set, 3_000)


# Added -------------------------------------------------------------------------------------------


async def test_added_tokens_leave_those_that_are_there() -> None:
    tokens = various(PAGE + 100)
    told: list[int] = []
    async with opened("memory://") as backend:
        await fill(backend, tokens[:3])
        added = await add(backend, iter(tokens), progress=told.append)
        assert await everything(backend) == tokens
    assert (added.inserted, added.skipped) == (PAGE + 97, 3)
    assert told == [PAGE, PAGE + 100]
