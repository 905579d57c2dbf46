"""What is MongoDB's own; what every backend must do is in the conformance suite."""

from __future__ import annotations

import asyncio
import random

import pytest

from vtoken.backend import Budget, InsertResult, Lease, Match, SetExtraData, Use
from vtoken_backends.mongodb import MongoDBBackend

from . import servers
from .mongodb_tools import (
    ADD,
    IF_NONE_VALID,
    LATER,
    NOW,
    REPLACE,
    active,
    documents,
    opened,
    token,
    valid,
)

# Races, each from two clients.


async def test_of_twenty_replacing_one_stays_active(mongodb_url: str, mongodb_driver: str) -> None:
    async with opened(mongodb_url, mongodb_driver) as one, opened(mongodb_url, mongodb_driver) as two:
        for start in range(0, 60, 20):
            calls = [(one, two)[n % 2].insert(token(start + n), REPLACE) for n in range(20)]
            assert set(await asyncio.gather(*calls)) == {InsertResult.INSERTED}
            assert len(await active(one)) == 1
    with documents(mongodb_url) as stored:
        assert stored.count_documents({}) == 60
        assert stored.count_documents({"pending": {"$exists": True}}) == 0


async def test_of_twenty_inserting_if_none_is_valid_one_does(mongodb_url: str, mongodb_driver: str) -> None:
    async with opened(mongodb_url, mongodb_driver) as one, opened(mongodb_url, mongodb_driver) as two:
        expired = token(1000, expires_at=NOW - 1, ends_at=NOW - 1)
        for start in range(0, 60, 20):
            await one.deactivate(Match(), NOW)
            await one.insert(expired._replace(id=f"{start:x}old", digest=b"%032d" % start), ADD)
            calls = [(one, two)[n % 2].insert(token(start + n), IF_NONE_VALID) for n in range(20)]
            results = await asyncio.gather(*calls)
            assert sorted(result.name for result in results) == ["HAS_VALID"] * 19 + ["INSERTED"]
            assert await active(one) == [start + results.index(InsertResult.INSERTED)]
    with documents(mongodb_url) as stored:
        assert stored.count_documents({}) == 6


async def test_of_twenty_users_one_wins(mongodb_url: str, mongodb_driver: str) -> None:
    async with opened(mongodb_url, mongodb_driver) as one, opened(mongodb_url, mongodb_driver) as two:
        for number in range(5):
            await one.insert(token(number), REPLACE)
            calls = [(one, two)[n % 2].update(valid(number), Use(LATER)) for n in range(20)]
            assert sum(found is not None for found in await asyncio.gather(*calls)) == 1


async def test_a_budget_holds_and_begins_once(mongodb_url: str, mongodb_driver: str) -> None:
    async with opened(mongodb_url, mongodb_driver) as one, opened(mongodb_url, mongodb_driver) as two:
        for number in range(3):
            budget = Budget("auth.user", "$spent", f"{number}.$x", "attempts")
            calls = [(one, two)[n % 2].spend(budget, NOW, 5, 1000, 8000) for n in range(20)]
            assert sum(spent.allowed for spent in await asyncio.gather(*calls)) == 5


async def test_of_many_that_open_a_new_store_all_do(mongodb_replica_set: str, mongodb_driver: str) -> None:
    with servers.fresh_database(mongodb_replica_set) as url:
        backends = [MongoDBBackend.from_url(url, driver=mongodb_driver) for _ in range(6)]
        await asyncio.gather(*(backend.open() for backend in backends))
        for number, backend in enumerate(backends):
            assert await backend.insert(token(number), ADD) is InsertResult.INSERTED
        await asyncio.gather(*(backend.close() for backend in backends))


# What is refused leaves the older token active.


async def test_a_taken_key_leaves_the_old_token_active(mongodb_url: str, mongodb_driver: str) -> None:
    async with opened(mongodb_url, mongodb_driver) as backend:
        await backend.insert(token(1), REPLACE)
        await backend.insert(token(2, object_id="other"), REPLACE)
        with documents(mongodb_url) as stored:
            before = list(stored.find())
            for mode in (ADD, REPLACE):
                for taken in (1, 2):
                    again = token(3, digest=token(taken).digest)
                    assert await backend.insert(again, mode, LATER) is InsertResult.KEY_TAKEN
            assert list(stored.find()) == before


async def test_of_twenty_taking_one_key_the_losers_keep_their_old_token(
    mongodb_url: str, mongodb_driver: str
) -> None:
    async with opened(mongodb_url, mongodb_driver) as backend:
        for number in range(20):
            await backend.insert(token(number, object_id=str(number)), REPLACE)
        calls = [
            backend.insert(token(100 + n, object_id=str(n), digest=b"k" * 32), REPLACE) for n in range(20)
        ]
        results = await asyncio.gather(*calls)
        winner = results.index(InsertResult.INSERTED)
        assert results.count(InsertResult.KEY_TAKEN) == 19
        assert sorted(await active(backend)) == [n for n in range(20) if n != winner] + [100 + winner]


async def test_a_pending_token_is_seen_by_nobody_and_purged_in_time(mongodb_url: str) -> None:
    async with opened(mongodb_url) as backend:
        await backend.insert(token(1), REPLACE)
        with documents(mongodb_url) as stored:  # as a crash between the two steps of a replace leaves it
            pending = {"pending": True, "is_active": False, "ends_at": NOW + 3_600_000}
            stored.update_one({}, {"$set": pending})
        assert await backend.find(Match(), 10) == []
        assert await backend.count(NOW) == []
        assert await backend.update(Match(id=token(1).id), Use(NOW)) is None
        assert await backend.insert(token(2, digest=token(1).digest), REPLACE) is InsertResult.KEY_TAKEN
        assert await backend.purge(NOW + 3_600_000, LATER, 10, 0) == 0
        assert await backend.insert(token(3), REPLACE) is InsertResult.INSERTED
        assert await backend.purge(NOW + 3_600_001, LATER, 10, 0) == 1 + 1


# Overlaps.


async def overlap(backend: MongoDBBackend, *numbers: int) -> None:
    """Each of them overlaps those before it."""
    for number in numbers:
        assert await backend.insert(token(number), REPLACE, LATER + 1) is InsertResult.INSERTED


@pytest.mark.parametrize("size", [2, 3])
async def test_of_overlapping_tokens_used_at_once_one_wins(
    mongodb_url: str, mongodb_driver: str, size: int
) -> None:
    dice = random.Random(size)  # noqa: S311 - it guards nothing
    async with opened(mongodb_url, mongodb_driver) as one, opened(mongodb_url, mongodb_driver) as two:
        for start in range(10, 10 + 12 * size, size):
            numbers = list(range(start, start + size))
            await overlap(one, *numbers)
            dice.shuffle(numbers)
            calls = [backend.update(valid(n), Use(LATER)) for n in numbers for backend in (one, two)]
            used = [found for found in await asyncio.gather(*calls) if found is not None]
            assert len(used) == 1
            assert await active(one) == []


async def test_each_of_an_overlap_takes_the_others_with_it(mongodb_url: str) -> None:
    async with opened(mongodb_url) as backend:
        for round_, winner in enumerate((0, 1, 2)):
            numbers = [10 * round_ + 1, 10 * round_ + 2, 10 * round_ + 3]
            await overlap(backend, *numbers)
            assert await active(backend) == numbers[::-1]
            assert await backend.update(valid(numbers[winner]), Use(LATER)) is not None
            assert await active(backend) == []


async def test_a_refused_use_ends_no_overlap(mongodb_url: str) -> None:
    async with opened(mongodb_url) as backend:
        await overlap(backend, 1, 2)
        assert await backend.update(valid(1)._replace(object_id="other"), Use(LATER)) is None
        assert await backend.update(valid(1)._replace(valid_at=LATER + 2), Use(LATER + 2)) is None
        assert await active(backend) == [2, 1]
        assert await backend.update(valid(1), Use(LATER)) is not None


@pytest.mark.parametrize("purged", [False, True])
async def test_a_crash_between_a_use_and_the_end_of_its_overlap_allows_no_second_use(
    mongodb_url: str, purged: bool
) -> None:
    async with opened(mongodb_url) as backend:
        await overlap(backend, 1, 2)
        with documents(mongodb_url) as stored:  # the newer one was used, the older one is still active
            used = {"uses": 1, "is_active": False, "ends_at": NOW}
            stored.update_one({"_id": token(2).id}, {"$set": used})
        if purged:
            assert await backend.purge(NOW + 1, LATER, 10, 0) == 1
        assert await backend.update(valid(1), Use(LATER)) is None
        assert await active(backend) == []


@pytest.mark.parametrize("purged", [False, True])
async def test_a_crash_after_sealing_for_one_of_three_leaves_only_that_one(
    mongodb_url: str, purged: bool
) -> None:
    async with opened(mongodb_url) as backend:
        await backend.insert(token(1), ADD)
        await backend.insert(token(2), ADD)
        await overlap(backend, 3)
        with documents(mongodb_url) as stored:
            sealed = {"sealed_for": token(2).id, "is_active": False, "ends_at": NOW}
            stored.update_one({"_id": token(3).id}, {"$set": sealed})
        if purged:
            assert await backend.purge(NOW + 1, LATER, 10, 0) == 1
        assert await backend.update(valid(1), Use(LATER)) is None
        assert await backend.update(valid(2), Use(LATER)) is not None


async def test_an_unused_newer_token_that_was_purged_frees_the_older_one(mongodb_url: str) -> None:
    async with opened(mongodb_url) as backend:
        await overlap(backend, 1, 2)
        assert await backend.deactivate(Match(id=token(2).id), NOW) == 1
        assert await backend.purge(NOW, LATER, 10, 0) == 1
        assert await backend.update(valid(1), Use(LATER)) is not None


async def test_values_are_compared_and_stored_to_the_letter(mongodb_url: str, mongodb_driver: str) -> None:
    names = ["$slug", "$$ROOT", "a.b", "$", '{"$ne": ""}', "İ", "i", "I", "\u0001", "1"]
    async with opened(mongodb_url, mongodb_driver) as backend:
        for number, name in enumerate(names):
            await backend.insert(token(number, object_id=name, slug=name, max_uses=3), REPLACE)
        for number, name in enumerate(names):
            (found,) = await backend.find(Match(content_type="auth.user", object_id=name, slug=name), 5)
            assert found == token(number, object_id=name, slug=name, max_uses=3)
            used = await backend.update(Match(id=found.id), Use(LATER, use_id=name))
            assert used is not None
            assert used.use_ids == (name,)
            assert await backend.update(Match(id=found.id), Use(LATER, use_id=name)) is None
            changed = used._replace(extra_data=name)
            assert await backend.update(Match(id=found.id), SetExtraData(name)) == changed
            leased = changed._replace(lease_id=name, lease_until=LATER)
            assert await backend.update(Match(id=found.id), Lease(name, LATER)) == leased
            assert (await backend.spend(Budget(name, name, name, name), NOW, 1, 1, 1)).allowed


async def test_a_storm_of_cancellations_leaves_one_state(mongodb_url: str, mongodb_driver: str) -> None:
    dice = random.Random(7)  # noqa: S311 - it guards nothing
    async with opened(mongodb_url, mongodb_driver) as backend:

        async def issue_and_use(number: int) -> None:
            await backend.insert(
                token(number), dice.choice([REPLACE, IF_NONE_VALID]), dice.choice([0, LATER])
            )
            await backend.update(valid(number), Use(LATER))
            await backend.find(Match(active=True), 5)

        tasks: list[asyncio.Task[None]] = []
        for number in range(150):
            tasks.append(asyncio.ensure_future(issue_and_use(number)))
            for _ in range(dice.randrange(30)):
                await asyncio.sleep(0)
            dice.choice(tasks).cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(result) for result in results} <= {type(None), asyncio.CancelledError}
        with documents(mongodb_url) as stored:
            assert stored.count_documents({"pending": True}) == 0
            assert stored.count_documents({"is_active": True, "slot": ""}) <= 1
        assert await backend.insert(token(1000), REPLACE) is InsertResult.INSERTED
        assert await active(backend) == [1000]


async def test_purges_at_once_leave_nothing(mongodb_url: str, mongodb_driver: str) -> None:
    async with opened(mongodb_url, mongodb_driver) as one, opened(mongodb_url, mongodb_driver) as two:
        for number in range(60):
            await one.insert(token(number, ends_at=NOW), ADD)
        calls = [backend.purge(NOW + 1, LATER, 15, 0) for backend in (one, two, one, two)]
        assert await asyncio.gather(*calls) == [15] * 4
        assert await one.find(Match(), 1) == []
