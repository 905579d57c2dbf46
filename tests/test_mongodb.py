"""What is MongoDB's own; what every backend must do is in the conformance suite."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from bson import encode
from pymongo import AsyncMongoClient

from vtoken.backend import (
    Budget,
    Hold,
    InsertResult,
    Match,
    Outcome,
    Purged,
    SetExtraData,
    Spend,
    State,
    StoredToken,
    Use,
    UseHeld,
)
from vtoken_backends.mongodb import MongoDBBackend, budgets

from . import servers
from .mongodb_tools import (
    ADD,
    END,
    IF_NONE_VALID,
    LATER,
    NOW,
    REPLACE,
    Commands,
    active,
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

INSERTED, KEY_TAKEN, HAS_VALID = InsertResult.INSERTED, InsertResult.KEY_TAKEN, InsertResult.HAS_VALID


# Round trips.


async def test_what_is_usual_is_one_command(mongodb_url: str) -> None:
    commands = Commands()
    async with AsyncMongoClient[Any](mongodb_url, event_listeners=[commands]) as client:
        backend = MongoDBBackend(client)
        await backend.open()

        async def sent(call: Any) -> tuple[Any, list[str]]:
            commands.sent.clear()
            return await call, list(commands.sent)

        for number in (1, 2, 3):  # the first of the line, and what replaces it
            inserted, names = await sent(insert(backend, token(number, max_uses=2)))
            assert (inserted.result, names) == (INSERTED, ["findAndModify"])
        inserted, names = await sent(insert(backend, token(4), IF_NONE_VALID, wanted_until=LATER))
        assert (inserted.result, names) == (HAS_VALID, ["findAndModify"])
        assert inserted.token == token(3, max_uses=2)
        for change in (None, Use(LATER, "mine"), Hold("h", LATER + 1)):
            presented, names = await sent(backend.present(key(3), change, LATER))
            assert presented.outcome is Outcome.RIGHT
            assert names == ["find" if change is None else "findAndModify"]
        found, names = await sent(backend.find(key(3), 1))
        assert (len(found), names) == (1, ["find"])
        await backend.close()


# Races, each from two clients.


async def test_of_twenty_replacing_one_stays_active(mongodb_url: str, mongodb_driver: str) -> None:
    async with opened(mongodb_url, mongodb_driver) as one, opened(mongodb_url, mongodb_driver) as two:
        for start in range(0, 60, 20):
            calls = [insert((one, two)[n % 2], token(start + n)) for n in range(20)]
            assert {answer.result for answer in await asyncio.gather(*calls)} == {INSERTED}
            assert len(await active(one)) == 1
        assert len(await one.find(Match(), 100)) == 60


async def test_of_twenty_inserting_if_none_is_valid_one_does(mongodb_url: str, mongodb_driver: str) -> None:
    async with opened(mongodb_url, mongodb_driver) as one, opened(mongodb_url, mongodb_driver) as two:
        for start in range(0, 60, 20):
            await one.deactivate(Match(), NOW)
            calls = [
                insert((one, two)[n % 2], token(start + n), IF_NONE_VALID, wanted_until=NOW)
                for n in range(20)
            ]
            results = [answer.result for answer in await asyncio.gather(*calls)]
            assert sorted(result.name for result in results) == ["HAS_VALID"] * 19 + ["INSERTED"]
            assert await active(one) == [start + results.index(INSERTED)]


async def test_additions_beside_replacements_end_in_one_order(mongodb_url: str, mongodb_driver: str) -> None:
    """When all have returned, one more ends them all, however they met."""
    dice = random.Random(3)  # noqa: S311 - it guards nothing
    async with opened(mongodb_url, mongodb_driver) as one, opened(mongodb_url, mongodb_driver) as two:
        for start in range(0, 200, 10):
            modes = dice.choices([ADD, REPLACE, IF_NONE_VALID], k=9)
            calls = [insert(dice.choice([one, two]), token(start + n), mode) for n, mode in enumerate(modes)]
            await asyncio.gather(*calls)
            assert sum(not t.is_beside for t in await one.find(Match(active=True), 100)) <= 1
            await insert(one, token(start + 9))
            assert await active(two) == [start + 9]
        assert (await one.purge(LATER, LATER, 1000, 0)).tokens > 100
        with documents(mongodb_url) as stored:
            assert stored.count_documents({}) == 1


async def test_of_many_that_open_a_new_store_all_do(mongodb_replica_set: str, mongodb_driver: str) -> None:
    with servers.fresh_database(mongodb_replica_set) as url:
        backends = [MongoDBBackend.from_url(url, driver=mongodb_driver) for _ in range(6)]
        await asyncio.gather(*(backend.open() for backend in backends))
        for number, backend in enumerate(backends):
            assert (await insert(backend, token(number), ADD)).result is INSERTED
        await asyncio.gather(*(backend.close() for backend in backends))


# Tombstones.


async def test_tombstones_stay_few_in_a_line_and_all_are_found(mongodb_url: str, mongodb_driver: str) -> None:
    async with opened(mongodb_url, mongodb_driver) as backend:
        for number in range(50):
            assert (await insert(backend, token(number))).result is INSERTED
            with documents(mongodb_url) as stored:
                line = stored.find_one({"line": {"$exists": True}})
                assert line is not None
                assert len(line.get("former", ())) <= 8
        assert [int(t.id, 16) for t in await backend.find(Match(), 100)] == list(range(49, -1, -1))
        for number in range(49):
            presented = await use(backend, number)
            assert presented.outcome is Outcome.REFUSED
            assert presented.token is not None
            assert (presented.token.id, presented.token.state) == (id_of(number), State.REPLACED)
            assert (
                await insert(backend, token(90, key={"digest": token(number).keys[0].digest}))
            ).result is (KEY_TAKEN)
        assert await backend.purge(LATER, LATER, 20, 0) == Purged(tokens=20, budgets=0)
        assert [int(t.id, 16) for t in await backend.find(Match(), 100)] == list(range(49, 19, -1))
        assert await backend.purge(LATER, LATER, 100, 0) == Purged(tokens=29, budgets=0)


async def test_a_hold_on_a_tombstone_outlives_any_number_of_issues(mongodb_url: str) -> None:
    async with opened(mongodb_url) as backend:
        await insert(backend, token(0))
        assert (await hold(backend, 0, "mine")).outcome is Outcome.RIGHT
        for number in range(1, 40):
            await insert(backend, token(number))
        used = await backend.update(key(0), UseHeld("mine", LATER, "use"))
        assert used is not None
        assert (used.state, used.uses) == (State.USED, 1)
        assert (await use(backend, 0, "use")).outcome is Outcome.REPLAYED


async def test_whoever_comes_next_goes_on_with_a_move_of_tombstones(mongodb_url: str) -> None:
    """A crash may come after each of its three writes."""
    async with opened(mongodb_url) as backend:
        for written in (1, 2):
            numbers = range(100 * written, 100 * written + 12)
            for number in numbers:
                await insert(backend, token(number, object_id=str(written)))
            with documents(mongodb_url) as stored:
                line = stored.find_one({"line": {"$exists": True}, "object_id": str(written)})
                moved = stored.find_one({"line": {"$exists": False}, "object_id": str(written)})
                assert line is not None
                assert moved is not None
                names = list(moved["names"])
                step: dict[str, Any] = {"spill": moved["former"], "moved": names, "spill_id": moved["_id"]}
                if written == 1:
                    stored.delete_one({"_id": moved["_id"]})
                stored.update_one({"_id": line["_id"]}, {"$set": step})
            presented = await use(backend, 100 * written)
            assert presented.token is not None
            assert presented.token.id == id_of(100 * written)
            of_object = Match(content_type="auth.user", object_id=str(written))
            assert [int(t.id, 16) for t in await backend.find(of_object, 100)] == [*numbers][::-1]
            assert await backend.update(Match(id=id_of(100 * written)), SetExtraData("1")) is not None
            [found] = await backend.find(Match(id=id_of(100 * written)), 1)
            assert found.extra_data == "1"
            await insert(backend, token(100 * written + 50, object_id=str(written)))
            assert len(await backend.find(of_object, 100)) == 13
        assert await backend.purge(LATER, LATER, 100, 0) == Purged(tokens=24, budgets=0)


async def test_the_cost_of_a_use_does_not_grow(mongodb_url: str) -> None:
    async with opened(mongodb_url) as backend:
        await insert(backend, token(1, max_uses=None))
        with documents(mongodb_url) as stored:  # as 5,000 uses leave it
            stored.update_one({}, {"$set": {"token.uses": 5_000, "token.receipts": "x" * 54 * 1_024}})
        for number in range(30):
            assert (await use(backend, 1, f"use {number}")).outcome is Outcome.RIGHT
        with documents(mongodb_url) as stored:
            document = stored.find_one({})
            assert document is not None
            assert len(encode(document)) < 60_000
        for number in range(30):
            assert (await use(backend, 1, f"use {number}")).outcome is Outcome.REPLAYED


# The rest.


async def test_values_are_compared_and_stored_to_the_letter(mongodb_url: str, mongodb_driver: str) -> None:
    names = ["$slug", "$$ROOT", "a.b", "$", '{"$ne": ""}', "İ", "i", "I", "\u0001", "1"]
    async with opened(mongodb_url, mongodb_driver) as backend:
        for number, name in enumerate(names):
            await insert(backend, token(number, object_id=name, slug=name, max_uses=3, extra_data=name))
        for number, name in enumerate(names):
            record = token(number, object_id=name, slug=name, max_uses=3, extra_data=name)
            (found,) = await backend.find(Match(content_type="auth.user", object_id=name, slug=name), 5)
            assert found == record
            assert (await use(backend, number, name)).outcome is Outcome.RIGHT
            assert (await use(backend, number, name)).outcome is Outcome.REPLAYED
            held = (await hold(backend, number, name)).token
            assert held is not None
            assert [one.hold_id for one in held.holds] == [name]
            assert await backend.note(name, name) == name


async def test_a_storm_of_cancellations_leaves_one_state(mongodb_url: str, mongodb_driver: str) -> None:
    dice = random.Random(7)  # noqa: S311 - it guards nothing
    async with opened(mongodb_url, mongodb_driver) as backend:

        async def issue_and_use(number: int) -> None:
            options = {"keep_until": dice.choice([0, END])}
            await insert(backend, token(number), dice.choice([ADD, REPLACE, IF_NONE_VALID]), **options)
            await use(backend, number)
            await backend.find(Match(active=True), 5)

        tasks: list[asyncio.Task[None]] = []
        for number in range(150):
            tasks.append(asyncio.ensure_future(issue_and_use(number)))
            for _ in range(dice.randrange(30)):
                await asyncio.sleep(0)
            dice.choice(tasks).cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(result) for result in results} <= {type(None), asyncio.CancelledError}
        assert (await insert(backend, token(1000))).result is INSERTED
        assert await active(backend) == [1000]


async def test_a_migration_is_taken_step_by_step(
    mongodb_new_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a schema that had a field of another name, by two processes at once."""
    from vtoken_backends.mongodb import schema

    steps: list[int] = []

    async def rename(client: Any) -> None:
        steps.append(1)
        await client.run(lambda: client.tokens.update_many({}, {"$rename": {"called": "names"}}))

    async def number_anew(client: Any) -> None:
        steps.append(2)
        old = {"revision": {"$exists": False}}
        await client.run(lambda: client.tokens.update_many(old, {"$set": {"revision": 0, "claims": []}}))

    async with opened(mongodb_new_url) as backend:
        await insert(backend, token(1))
    with documents(mongodb_new_url) as stored:  # as the older version left it
        stored.drop_indexes()
        older = {"$rename": {"names": "called"}, "$unset": {"revision": "", "claims": ""}}
        stored.update_many({}, older)
        stored.database["vtoken.meta"].update_one({"_id": "schema"}, {"$set": {"version": 1}})
        changed = {1: rename, 2: number_anew}
        monkeypatch.setattr(schema, "SCHEMA", 3)
        monkeypatch.setattr(schema, "MIGRATIONS", changed)
        backends = [MongoDBBackend.from_url(mongodb_new_url) for _ in range(2)]
        await asyncio.gather(*(backend.open() for backend in backends))
        assert (await use(backends[0], 1)).outcome is Outcome.RIGHT
        await asyncio.gather(*(backend.close() for backend in backends))
        assert set(steps) == {1, 2}
        marker = stored.database["vtoken.meta"].find_one({"_id": "schema"})
        assert marker == {"_id": "schema", "version": 3}


SPEND = Spend(Budget(b"o" * 16, b"n" * 16), 2, 60_000, 60_000)
WRONG = Match(digests=(b"x" * 32,))


def reserve(stored: Any, *, at: int) -> None:
    """Fill the budget as two calls do that have charged it and look at another one."""
    left = {
        "spent": 2,
        "strikes": 0,
        "until": LATER + 50_000,
        "reserved": 2,
        "reserved_at": at,
        "before": None,
    }
    document = {"_id": b"o" * 16, "budgets": {(b"n" * 16).hex(): left}, "due": LATER + 50_000}
    stored.database["vtoken.budgets"].insert_one(document)


async def test_reservations_of_a_full_budget_are_waited_for(
    mongodb_url: str, mongodb_driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has reserved is in another process: nobody tells."""
    waiting = asyncio.Semaphore(0)
    wait = budgets.Budgets._settlement  # pyright: ignore[reportPrivateUsage]  # what is timed

    async def noticed(*args: Any) -> None:
        waiting.release()
        await wait(*args)

    monkeypatch.setattr(budgets.Budgets, "_settlement", noticed)
    async with opened(mongodb_url, mongodb_driver) as backend:
        await insert(backend, token(1))
        with documents(mongodb_url) as stored:
            reserve(stored, at=LATER)
            for presented, outcome in ((key(1), Outcome.RIGHT), (WRONG, Outcome.REFUSED)):
                call = asyncio.create_task(backend.present(presented, Use(LATER), LATER, (SPEND,)))
                await waiting.acquire()
                settled = {f"budgets.{(b'n' * 16).hex()}.{name}": -1 for name in ("spent", "reserved")}
                stored.database["vtoken.budgets"].update_one({}, {"$inc": settled})
                assert (await call).outcome is outcome
                stored.database["vtoken.budgets"].delete_many({})
                reserve(stored, at=LATER)


async def test_reservations_that_are_not_settled_in_time_refuse_for_a_moment(
    mongodb_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets.Budgets.__init__, "__defaults__", (0.05,))
    async with opened(mongodb_url) as backend:
        await insert(backend, token(1))
        with documents(mongodb_url) as stored:
            reserve(stored, at=LATER - 1)
        presented = await backend.present(key(1), Use(LATER), LATER, (SPEND,))
        assert (presented.outcome, presented.spending.until) == (Outcome.LIMITED, LATER + 1000)
        assert await active(backend) == [1]


async def test_a_reservation_that_nobody_settles_stays_charged(mongodb_url: str) -> None:
    """Two processes have died while they charged."""
    async with opened(mongodb_url) as backend:
        await insert(backend, token(1))
        with documents(mongodb_url) as stored:
            reserve(stored, at=LATER - 60_000)
        presented = await backend.present(key(1), Use(LATER), LATER, (SPEND,))
        assert (presented.outcome, presented.spending.until) == (Outcome.LIMITED, LATER + 50_000)


async def test_purges_at_once_leave_nothing(mongodb_url: str, mongodb_driver: str) -> None:
    async with opened(mongodb_url, mongodb_driver) as one, opened(mongodb_url, mongodb_driver) as two:
        tokens: list[StoredToken] = [of(n, ends_at=NOW) for n in range(60)]
        await asyncio.gather(*(insert(one, record, ADD) for record in tokens))
        calls = [backend.purge(NOW + 1, LATER, 15, 0) for backend in (one, two, one, two)]
        assert sum(purged.tokens for purged in await asyncio.gather(*calls)) == 60
        assert await one.find(Match(), 1) == []
        with documents(mongodb_url) as stored:
            assert stored.count_documents({}) == 0
