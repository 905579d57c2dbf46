"""Copies between stores: whole, again, interrupted, beside live traffic."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from vtoken.backend import (
    PRETENDED,
    Budget,
    Hold,
    Inserted,
    InsertMode,
    Match,
    Outcome,
    Release,
    SetExtraData,
    Spend,
    State,
    StoredToken,
    TokenBackend,
    Use,
    UseHeld,
)
from vtoken.errors import BackendUnavailable, CorruptStore
from vtoken.migrate import Copied, copy, pages
from vtoken.migrate.receipts import copy_receipt_name
from vtoken_backends.memory import MemoryBackend

from . import postgresql_servers
from .faults import copy_round
from .migrate_tools import HOUR, NOW, fill, key, of_every_kind, opened, token
from .servers import fresh_database


def various(count: int) -> list[StoredToken]:
    """Tokens of every kind, newest first."""
    return sorted(of_every_kind(count), key=lambda stored: stored.id, reverse=True)


@pytest.fixture(params=["memory", "sqlite", "mongodb", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty store of each kind."""
    kind: str = request.param
    if kind == "memory":
        yield f"memory://copied-{uuid4().hex}"
    elif kind == "sqlite":
        yield f"sqlite:///{tmp_path}/copied.db?synchronous=normal"
    elif kind == "mongodb":
        with fresh_database(request.getfixturevalue("mongodb_standalone")) as url:
            yield url
    else:
        with postgresql_servers.fresh_store(postgresql_servers.shared_url()) as url:
            yield url


async def everything(backend: TokenBackend) -> list[StoredToken]:
    return [stored async for page in pages(backend, 7) for stored in page]


async def one_of(backend: TokenBackend, stored: StoredToken) -> StoredToken | None:
    """A token as a store holds it now."""
    found = await backend.find(Match(id=stored.id), 1)
    return found[0] if found else None


async def use(backend: TokenBackend, stored: StoredToken, at: int) -> None:
    match = Match(id=stored.id, digests=(stored.keys[0].digest,))
    assert (await backend.present(match, Use(at=at), at)).outcome is Outcome.RIGHT


def assert_equal(copied: Copied, tokens: int) -> None:
    assert copied.is_complete
    assert (copied.tokens, copied.missing, copied.different) == (tokens, 0, 0)
    assert copied.source_digest == copied.destination_digest


# Pages -------------------------------------------------------------------------------------------


async def test_pages_are_everything_in_order() -> None:
    tokens = various(22)
    async with opened("memory://") as backend:
        assert await everything(backend) == []
        await fill(backend, tokens[::-1])
        assert await everything(backend) == tokens
        assert [len(page) async for page in pages(backend, 11)] == [11, 11]
        assert [page[0] async for page in pages(backend, 11, tokens[4].id)] == [tokens[5], tokens[16]]


async def test_pages_are_bounded_by_their_bytes() -> None:
    async with opened("memory://") as backend:
        await fill(backend, (token(n, extra_data=f'"{"x" * 16_000}"') for n in range(2_000)))
        sizes = [len(page) async for page in pages(backend)]
    assert sum(sizes) == 2_000
    assert max(sizes) * 16_000 < 5 << 20


# Copies ------------------------------------------------------------------------------------------


async def test_copies_are_equal_in_every_field(store: str) -> None:
    tokens = various(40)
    async with opened("memory://") as first, opened(store) as second, opened("memory://") as third:
        await fill(first, tokens)
        told: list[int] = []
        there = await copy(first, second, progress=told.append, page=16)
        back = await copy(second, third, page=16)
        assert await everything(second) == await everything(third) == tokens
    assert_equal(there, 40)
    assert_equal(back, 40)
    assert (there.inserted, there.skipped, there.refused, there.others) == (40, 0, 0, 0)
    assert there.source_digest == back.destination_digest
    assert told == [16, 32, 40, 56, 72, 80]


@pytest.mark.parametrize(
    "fields",
    [
        {"keys": (key(2, "x", NOW + HOUR),)},
        {"keys": (key(1, "x", NOW + HOUR - 1),)},
        {"extra_data": "1"},
        {"uses": 1, "max_uses": 2},
        {"max_uses": None},
        {"state": State.USED},
        {"is_beside": True},
    ],
)
async def test_the_digest_tells_every_difference(fields: dict[str, Any]) -> None:
    digests: set[str] = set()
    for stored in (token(1), token(1, **fields)):
        async with opened("memory://") as one, opened("memory://") as two:
            await fill(one, [stored])
            copied = await copy(one, two)
            assert_equal(copied, 1)
            digests.add(copied.source_digest)
    assert len(digests) == 2


async def test_an_empty_store_is_copied() -> None:
    async with opened("memory://") as one, opened("memory://") as two:
        assert_equal(await copy(one, two), 0)


async def test_budgets_and_pretended_tokens_stay_behind() -> None:
    spend = Spend(budget=Budget(object=bytes(16), name=b"n" * 16), limit=1, window=HOUR, max_window=HOUR)
    async with opened("memory://") as one, opened("memory://") as two:
        await one.spend((spend,), NOW)
        await fill(one, [token(1), token(2, content_type=PRETENDED, state=State.ENDED)])
        copied = await copy(one, two)
        assert (await one.spend((spend,), NOW)).full == 0
        assert (await two.spend((spend,), NOW)).full is None
        assert await everything(two) == [token(1)]
    assert_equal(copied, 1)
    assert copied.inserted == 1


async def test_tokens_of_the_destination_stay(store: str) -> None:
    theirs = token(7)
    same_key = token(8, keys=(key(1, token(8).id, NOW + HOUR),))
    same_id = token(2, keys=(key(9, token(2).id, NOW + HOUR),), object_id="another")
    async with opened("memory://") as one, opened(store) as two:
        await fill(one, [token(1), token(2), token(3)])
        await fill(two, [theirs, same_key, same_id])
        copied = await copy(one, two)
        assert set(await everything(two)) == {theirs, same_key, same_id, token(3)}
    assert not copied.is_complete
    assert (copied.inserted, copied.refused, copied.skipped) == (1, 2, 0)


# Again -------------------------------------------------------------------------------------------


async def test_what_ended_in_the_source_since_ends_in_the_copy(store: str) -> None:
    several = token(4, max_uses=3)
    held = token(5)
    async with opened("memory://") as one, opened(store) as two:
        await fill(one, [token(1), token(2), token(3), several, held])
        match = Match(id=held.id, digests=(held.keys[0].digest,))
        await one.present(match, Hold(hold_id="h" * 32, until=NOW + 60_000), NOW)
        await copy(one, two)
        await use(one, token(1), NOW + 5)
        await one.deactivate(Match(id=token(2).id), NOW + 6)
        await use(one, several, NOW + 7)
        await use(one, several, NOW + 7)
        await one.update(Match(id=held.id), UseHeld(hold_id="h" * 32, at=NOW + 8))
        again = await copy(one, two)
        assert (again.inserted, again.skipped, again.ended) == (0, 5, 4)
        assert await everything(two) == await everything(one)
    assert_equal(again, 5)


async def test_what_was_replaced_in_the_source_since_is_replaced_in_the_copy(store: str) -> None:
    plain = [token(n, f"{n}") for n in range(3)]
    async with opened("memory://") as one, opened(store) as two:
        await fill(one, plain)
        await copy(one, two)
        new = [token(10 + n, f"{n}", NOW + 5) for n in range(3)]
        await one.insert(new[0], InsertMode.REPLACE)
        await one.insert(new[1], InsertMode.REPLACE, keep_until=NOW + 60_000)  # takes over the key
        await one.insert(new[2], InsertMode.REPLACE)
        await one.insert(token(20, "2", NOW + 6, is_beside=True), InsertMode.ADD)
        again = await copy(one, two)
        assert_equal(again, 7)
        assert again.inserted == 4
        for number in (0, 1, 2):
            copies = [await one_of(store, plain[number]) for store in (one, two)]
            assert [stored.is_active for stored in copies if stored] == [False, False]
        overlapped = Match(digests=(plain[1].keys[0].digest,))
        assert [await store.find(overlapped, 2) for store in (two,)] == [await one.find(overlapped, 2)]
        active = Match(content_type="auth.user", object_id="2", active=True)
        assert len(await two.find(active, 5)) == 2, "a token that was added beside stays"


async def test_a_predecessors_key_that_ended_in_the_source_since_ends_in_the_copy(store: str) -> None:
    async with opened("memory://") as one, opened(store) as two:
        await fill(one, [token(1)])
        await one.insert(token(2, created_at=NOW + 1), InsertMode.REPLACE, keep_until=NOW + 60_000)
        await copy(one, two)
        (old,) = token(1).keys
        assert await one.deactivate(Match(digests=(old.digest,)), NOW + 2) == 1
        again = await copy(one, two)
        assert_equal(again, 2)
        assert again.ended == 1
        assert await everything(two) == await everything(one)
        refused = await two.present(Match(digests=(old.digest,)), None, NOW + 3)
        assert refused.outcome is Outcome.REFUSED


async def test_nothing_comes_back_to_life(store: str) -> None:
    twice = token(2, max_uses=5)
    async with opened("memory://") as one, opened(store) as two:
        await fill(one, [token(1), twice])
        await copy(one, two)
        await two.deactivate(Match(id=token(1).id), NOW + 5)
        await use(two, twice, NOW + 5)
        before = await everything(two)
        again = await copy(one, two)
        assert await everything(two) == before
    assert not again.is_complete
    assert (again.ended, again.missing, again.different) == (0, 0, 2)
    assert again.source_digest != again.destination_digest


async def test_what_was_used_and_purged_is_not_taken_again(store: str) -> None:
    async with opened("memory://") as one, opened(store) as two:
        await fill(one, [token(1), token(2)])
        await copy(one, two)
        await use(two, token(1), NOW + 5)
        assert (await two.purge(NOW + 9, NOW + 9, 10, 0)).tokens == 1
        await fill(one, [token(3)])
        again = await copy(one, two)
        assert await one_of(two, token(1)) is None
        assert await one_of(two, token(3)) == token(3)
    assert (again.inserted, again.skipped, again.taken_before, again.missing) == (1, 1, 1, 1)


async def test_another_source_has_a_receipt_of_its_own() -> None:
    async with opened("memory://") as one, opened("memory://") as other, opened("memory://") as two:
        await fill(one, [token(9)])
        await fill(other, [token(1)])
        await copy(one, two)
        assert (await copy(other, two)).inserted == 1
        assert await copy_receipt_name(one) != await copy_receipt_name(other)


async def test_a_clock_that_was_ahead_does_not_keep_later_tokens_out() -> None:
    ahead = token(1, created_at=NOW + 10 * 365 * 24 * HOUR)
    async with opened("memory://") as one, opened("memory://") as two:
        await fill(one, [ahead, token(2)])
        clock = datetime.fromtimestamp(NOW / 1000 + 1, UTC)
        await copy(one, two, clock=lambda: clock)
        await fill(one, [token(3, created_at=NOW + 5)])
        assert_equal(await copy(one, two, clock=lambda: clock), 3)


async def test_a_difference_that_no_step_can_mend_is_told() -> None:
    async with opened("memory://") as one, opened("memory://") as two:
        await fill(one, [token(1)])
        await copy(one, two)
        await one.update(Match(id=token(1).id), SetExtraData("1"))
        again = await copy(one, two)
    assert not again.is_complete
    assert (again.different, again.ended) == (1, 0)


async def test_holds_come_and_go_and_are_not_compared() -> None:
    async with opened("memory://") as one, opened("memory://") as two:
        await fill(one, [token(1)])
        match = Match(id=token(1).id, digests=(token(1).keys[0].digest,))
        await one.present(match, Hold(hold_id="h" * 32, until=NOW + 60_000), NOW)
        await copy(one, two)
        await one.update(Match(id=token(1).id), Release(hold_id="h" * 32))
        assert_equal(await copy(one, two), 1)


# Interrupted -------------------------------------------------------------------------------------


class Fails(MemoryBackend):
    """Stores so many tokens and then loses its connection."""

    left = 10**9

    async def insert(self, token: StoredToken, mode: InsertMode, **options: Any) -> Inserted:
        if not self.left:
            raise BackendUnavailable("gone")
        self.left -= 1
        await asyncio.sleep(0)
        return await super().insert(token, mode, **options)


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
    assert again.inserted == 17


async def test_an_interrupted_copy_revives_nothing_and_leaves_nothing_out() -> None:
    tokens = [token(n, f"{n}", NOW + n) for n in range(50)]
    destination = Fails()
    await destination.open()
    async with opened("memory://") as one:
        await fill(one, tokens[:40])
        for room, used, issued in ((25, 39, 40), (5, 35, 41)):
            destination.left = room
            with pytest.raises(BackendUnavailable):
                await copy(one, destination, page=5)
            await use(destination, tokens[used], NOW + 100)
            assert (await destination.purge(NOW + 101, NOW + 101, 10, 0)).tokens == 1
            await fill(one, [tokens[issued]])
        destination.left = 10**9
        last = await copy(one, destination, page=5)
        held = {stored.id for stored in await everything(destination)}
    assert held == {stored.id for stored in tokens[:42]} - {tokens[39].id, tokens[35].id}
    assert (last.taken_before, last.missing, last.refused) == (2, 2, 0)


async def test_a_damaged_receipt_is_said() -> None:
    async with opened("memory://") as one, opened("memory://") as two:
        await two.note(await copy_receipt_name(one), "nonsense")
        with pytest.raises(CorruptStore, match="receipt"):
            await copy(one, two)


# Between real stores -----------------------------------------------------------------------------


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
            await fill(first, tokens)
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


async def test_much_extra_data_can_be_copied_to_mongodb(mongodb_replica_set: str, tmp_path: Path) -> None:
    file = f"sqlite:///{tmp_path}/one.db?synchronous=normal"
    with fresh_database(mongodb_replica_set) as url:
        async with opened(file) as one, opened(url) as two:
            await fill(one, (token(n, f"{n}", extra_data=f'"{"x" * 8_000}"') for n in range(2_500)))
            assert_equal(await copy(one, two), 2_500)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read in /proc")
def test_the_command_killed_and_interrupted_ends_equal(mongodb_replica_set: str) -> None:
    copy_round.copy_both_ways(mongodb_replica_set, 1_500)
