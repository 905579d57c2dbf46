"""MongoDB: operations that share their commands come to what they would have come to one by one."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Generator
from contextlib import closing, contextmanager
from typing import Any

import pytest
from pymongo import AsyncMongoClient, MongoClient
from pymongo.monitoring import CommandListener, CommandStartedEvent

from vtoken.backend import Budget, InsertMode, InsertResult, Lease, Match, SetExtraData, StoredToken, Use
from vtoken.errors import BackendError, BackendUnavailable, OutcomeUnknown
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

INSERTED, KEY_TAKEN, HAS_VALID = InsertResult.INSERTED, InsertResult.KEY_TAKEN, InsertResult.HAS_VALID


def of(number: int, **fields: Any) -> StoredToken:
    """A token of that number, and of the object of that number."""
    return token(number, **{"object_id": str(number), **fields})


async def insert(backend: MongoDBBackend, *tokens: StoredToken, mode: InsertMode = REPLACE) -> list[Any]:
    calls = (backend.insert(record, mode) for record in tokens)
    return await asyncio.gather(*calls, return_exceptions=True)


async def use(backend: MongoDBBackend, *matches: Match) -> list[Any]:
    calls = (backend.update(match, Use(LATER)) for match in matches)
    return await asyncio.gather(*calls, return_exceptions=True)


class Commands(CommandListener):
    """How often a client sent each command."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    def started(self, event: CommandStartedEvent) -> None:
        self.sent.append(event.command_name)

    def succeeded(self, event: object) -> None: ...

    def failed(self, event: object) -> None: ...


async def test_many_operations_share_a_few_commands(mongodb_url: str) -> None:
    commands = Commands()
    async with AsyncMongoClient[Any](mongodb_url, event_listeners=[commands]) as client:
        backend = MongoDBBackend(client)
        await backend.open()
        for again in (0, 100):  # the second time there are older ones to be ended
            commands.sent.clear()
            tokens = [of(n + again, object_id=str(n), created_at=NOW) for n in range(100)]
            assert await insert(backend, *tokens) == [INSERTED] * 100
            assert sorted(await active(backend)) == [n + again for n in range(100)]
            assert len(commands.sent) <= 20
        commands.sent.clear()
        found = await asyncio.gather(*(backend.find(valid(n), 1) for n in range(80, 180)))
        assert found == [[]] * 20 + [[record] for record in tokens[:80]]
        assert set(commands.sent) == {"find"}
        assert len(commands.sent) <= 6
        commands.sent.clear()
        used = await use(backend, *(valid(n) for n in range(80, 180)))
        assert used[:20] == [None] * 20
        ended: dict[str, Any] = {"is_active": False, "ends_at": LATER - 1, "uses": 1, "used_at": LATER}
        assert used[20:] == [record._replace(**ended) for record in tokens[:80]]
        assert len(commands.sent) <= 10
        assert await use(backend, *(valid(n) for n in range(80, 180))) == [None] * 100
        for record in used[20:]:
            assert await backend.find(Match(id=record.id), 1) == [record]
        await backend.close()


async def test_of_uses_of_one_key_as_many_win_as_it_has(mongodb_url: str, mongodb_driver: str) -> None:
    async with opened(mongodb_url, mongodb_driver) as backend:
        await insert(backend, of(1), of(2, max_uses=3), of(3))
        numbers = [1, 2, 3, 4] * 15
        answers = await use(backend, *(valid(n) for n in numbers))
        won = [(n, found.uses) for n, found in zip(numbers, answers, strict=True) if found is not None]
        assert sorted(won) == [(1, 1), (2, 1), (2, 2), (2, 3), (3, 1)]


async def test_each_use_is_held_to_its_own_match(mongodb_url: str, mongodb_driver: str) -> None:
    context = b"c" * 32
    async with opened(mongodb_url, mongodb_driver) as backend:
        records = [of(n, context=context, max_uses=2) for n in range(12)]
        await insert(backend, *records)
        assert await backend.update(Match(id=records[0].id), Lease("one", LATER + 1)) is not None
        assert await backend.update(valid(1), Use(NOW, "seen")) is not None
        saved = await backend.update(Match(id=records[2].id), SetExtraData("[1]"))
        assert saved is not None
        refused = [
            valid(0),
            valid(3)._replace(object_id="4"),
            valid(4)._replace(object_id="3"),
            valid(5)._replace(slug="other"),
            valid(6)._replace(content_type="other"),
            valid(7)._replace(context=b"d" * 32),
            valid(8)._replace(valid_at=records[8].expires_at + 1),
        ]
        two = Match(digests=(b"x" * 32, records[9].digest), valid_at=LATER)
        calls = [backend.update(match, Use(LATER, "u")) for match in (*refused, valid(2), two, valid(10))]
        answers = await asyncio.gather(*calls, backend.update(valid(1), Use(LATER, "seen")))
        assert answers[: len(refused)] == [None] * len(refused)
        assert answers[-1] is None
        first: dict[str, Any] = {"uses": 1, "used_at": LATER, "use_ids": ("u",)}
        assert answers[len(refused) : -1] == [
            saved._replace(**first),
            records[9]._replace(**first),
            records[10]._replace(**first),
        ]
        assert await backend.update(valid(10), Use(LATER, "u")) is None
        assert [
            found.uses for n in (0, 1, 3, 4, 5, 6, 7, 8) for found in await backend.find(valid(n), 1)
        ] == ([1] + [0] * 6)


async def test_of_overlapping_tokens_used_together_one_is(mongodb_url: str, mongodb_driver: str) -> None:
    async with opened(mongodb_url, mongodb_driver) as backend:
        for pair in range(0, 20, 2):
            for number in (pair, pair + 1):
                await backend.insert(of(number, object_id=str(pair)), REPLACE, LATER + 1)
        answers = await use(backend, *(valid(n) for n in range(20)))
        assert [sum(found is not None for found in answers[pair : pair + 2]) for pair in range(0, 20, 2)] == [
            1
        ] * 10
        assert await active(backend) == []


async def test_inserts_for_one_object_leave_one_active(mongodb_url: str, mongodb_driver: str) -> None:
    async with opened(mongodb_url, mongodb_driver) as backend:
        for start in (0, 40):
            assert await insert(backend, *(token(start + n) for n in range(40))) == [INSERTED] * 40
            assert len(await active(backend)) == 1
        with documents(mongodb_url) as stored:
            assert stored.count_documents({"pending": True}) == 0
            assert stored.count_documents({"is_active": False, "ends_at": {"$lt": NOW + 80}}) == 79


async def test_modes_may_meet_in_one_batch(mongodb_url: str, mongodb_driver: str) -> None:
    async with opened(mongodb_url, mongodb_driver) as backend:
        await backend.insert(of(1, expires_at=NOW - 1, ends_at=NOW - 1), REPLACE)
        await backend.insert(of(2), REPLACE)
        calls = [backend.insert(of(100 + n, object_id=str(n % 4)), IF_NONE_VALID) for n in range(40)]
        calls += [backend.insert(of(200 + n, object_id="added"), ADD) for n in range(10)]
        calls += [backend.insert(of(300 + n, object_id=f"new {n}"), REPLACE, LATER) for n in range(10)]
        results = await asyncio.gather(*calls)
        assert [results[n:40:4].count(INSERTED) for n in range(4)] == [1, 1, 0, 1]
        assert [results[n:40:4].count(HAS_VALID) for n in range(4)] == [9, 9, 10, 9]
        assert results[40:] == [INSERTED] * 20
        assert len(await active(backend)) == 4 + 10 + 10


async def test_a_taken_key_in_a_batch_harms_nobody_else(mongodb_url: str, mongodb_driver: str) -> None:
    async with opened(mongodb_url, mongodb_driver) as backend:
        await insert(backend, *(of(n) for n in range(20)))
        taken = [of(100 + n, object_id=str(n), digest=of(n % 2).digest) for n in range(10)]
        fresh = [of(110 + n, object_id=str(10 + n)) for n in range(5)]
        twins = [of(200 + n, object_id=f"twin {n}", digest=b"t" * 32) for n in range(5)]
        results = await insert(backend, *taken, *fresh, *twins)
        assert results[:15] == [KEY_TAKEN] * 10 + [INSERTED] * 5
        assert sorted(result.name for result in results[15:]) == ["INSERTED"] + ["KEY_TAKEN"] * 4
        winner = 200 + results[15:].index(INSERTED)
        assert sorted(await active(backend)) == [*range(10), *range(15, 20), *range(110, 115), winner]


async def test_what_the_server_refuses_of_one_harms_nobody_else(mongodb_url: str) -> None:
    async with opened(mongodb_url) as backend:
        await insert(backend, *(of(n) for n in range(10)))
        with documents(mongodb_url) as stored:
            rule = {"$or": [{"object_id": {"$ne": "5"}}, {"is_active": True, "uses": 0, "slug": "reset"}]}
            stored.database.command("collMod", "vtoken", validator=rule)
        renewed = await insert(backend, *(of(20 + n, object_id=str(n)) for n in range(10)))
        used = await use(backend, *(valid(n if n == 5 else 20 + n) for n in range(10)))
        for answers in (renewed, used):
            assert [n for n, answer in enumerate(answers) if isinstance(answer, BackendError)] == [5]
            assert "code 121" in str(answers[5])
        assert renewed[:5] + renewed[6:] == [INSERTED] * 9
        assert all(isinstance(answer, StoredToken) for answer in used[:5] + used[6:])
        assert await active(backend) == [5]


# Connections that break, and primaries that step down.


@contextmanager
def failing(url: str, times: int, *commands: str, **data: Any) -> Generator[None]:
    """Let the server fail these commands so many times."""
    if servers.declared_url():
        pytest.skip(f"{servers.DECLARED_URL} names a server that may not have fail points")
    with MongoClient[Any](url) as client:
        point = {"configureFailPoint": "failCommand"}
        data = {"failCommands": list(commands), **data}
        client.admin.command({**point, "mode": {"times": times}, "data": data})
        try:
            yield
        finally:
            client.admin.command({**point, "mode": "off"})


LOST = {"closeConnection": True}
STEPPED_DOWN = {"errorCode": 10107, "errorLabels": ["RetryableWriteError"]}
NOT_CONFIRMED = {"writeConcernError": {"code": 91, "errmsg": "the server shuts down"}}


@pytest.mark.parametrize("trouble", [LOST, STEPPED_DOWN, NOT_CONFIRMED])
async def test_uses_get_over_one_failure(mongodb_replica_set: str, mongodb_driver: str, trouble: Any) -> None:
    with servers.databases(mongodb_replica_set).one() as url:
        async with opened(url, mongodb_driver) as backend:
            await insert(backend, *(of(n) for n in range(30)))
            with failing(url, 1, "update", **trouble):
                answers = await use(backend, *(valid(n) for n in range(30)))
            assert [answer.id for answer in answers] == [of(n).id for n in range(30)]
            assert await use(backend, *(valid(n) for n in range(30))) == [None] * 30


@pytest.mark.parametrize("trouble", [LOST, NOT_CONFIRMED])
async def test_of_rivals_one_wins_beside_a_failure(
    mongodb_url: str, mongodb_driver: str, trouble: Any
) -> None:
    async with opened(mongodb_url, mongodb_driver) as one, opened(mongodb_url, mongodb_driver) as two:
        await insert(one, *(of(n) for n in range(30)))
        with failing(mongodb_url, 1, "update", **trouble):
            answers = await asyncio.gather(*(use(b, *(valid(n) for n in range(30))) for b in (one, two)))
        for pair in zip(*answers, strict=True):
            # Who had to try twice cannot always tell whether it was too late.
            others = [answer for answer in pair if not isinstance(answer, StoredToken)]
            assert len(others) == 1
            assert others[0] is None or isinstance(others[0], OutcomeUnknown)
        assert await active(one) == []


@pytest.mark.parametrize("trouble", [LOST, NOT_CONFIRMED])
async def test_uses_that_fail_again_have_an_unknown_outcome(mongodb_url: str, trouble: Any) -> None:
    async with opened(mongodb_url) as backend:
        await insert(backend, *(of(n) for n in range(30)))
        with failing(mongodb_url, 20, "update", **trouble):
            answers = await use(backend, *(valid(n) for n in range(30)), valid(99))
        lone = [n for n, answer in enumerate(answers) if not isinstance(answer, OutcomeUnknown)]
        assert len(lone) <= 3  # one in each lane goes first and alone, by another command
        assert answers[30] is None
        assert len({id(answer) for answer in answers if answer is not None}) == 30
        again = await use(backend, *(valid(n) for n in range(30)))
        assert [found is None for found in again] == [
            trouble is NOT_CONFIRMED or n in lone for n in range(30)
        ]


@pytest.mark.parametrize("trouble", [LOST, NOT_CONFIRMED])
async def test_inserts_that_fail_have_an_unknown_outcome_and_never_two_active(
    mongodb_url: str, trouble: Any
) -> None:
    async with opened(mongodb_url) as backend:
        await insert(backend, *(of(n) for n in range(0, 30, 2)))
        with failing(mongodb_url, 20, "update", **trouble):
            answers = await insert(backend, *(of(100 + n, object_id=str(n)) for n in range(30)))
        assert {type(answer) for answer in answers} <= {InsertResult, OutcomeUnknown}
        assert [answers[n] for n in range(3, 30, 2)] == [INSERTED] * 14
        numbers = sorted(n % 100 for n in await active(backend))
        assert len(numbers) == len(set(numbers))
        assert await insert(backend, *(of(200 + n, object_id=str(n)) for n in range(30))) == [INSERTED] * 30
        assert sorted(await active(backend)) == list(range(200, 230))


@pytest.mark.parametrize("code", [64, 11601])  # not replicated in time; ended by an operator
async def test_what_was_interrupted_may_have_happened(mongodb_url: str, code: int) -> None:
    async with opened(mongodb_url) as backend:
        await backend.insert(token(1), REPLACE)
        with failing(mongodb_url, 1, "findAndModify", errorCode=code), pytest.raises(OutcomeUnknown):
            await backend.update(valid(1), Use(LATER))
        with failing(mongodb_url, 1, "find", errorCode=code), pytest.raises(BackendUnavailable):
            await backend.find(valid(1), 1)


async def test_a_use_that_did_not_end_its_overlap_may_have_happened(
    mongodb_url: str, mongodb_driver: str
) -> None:
    async with opened(mongodb_url, mongodb_driver) as backend:
        for number in (1, 2):
            await backend.insert(token(number), REPLACE, LATER + 1)
        with failing(mongodb_url, 1, "update", errorCode=13), pytest.raises(OutcomeUnknown):
            await backend.update(valid(2), Use(LATER))  # refused is what comes after the use itself
        assert await backend.update(valid(2), Use(LATER)) is None
        assert await backend.update(valid(1), Use(LATER)) is None
        assert await active(backend) == []


async def test_finds_get_over_a_lost_connection(mongodb_url: str) -> None:
    async with opened(mongodb_url) as backend:
        await insert(backend, of(1))
        with failing(mongodb_url, 1, "find", **LOST):
            assert await backend.find(valid(1), 1) == [of(1)]


@pytest.mark.parametrize("driver", ["pymongo", "motor"])
async def test_a_task_that_is_cancelled_while_it_runs_ends_at_its_next_find(
    mongodb_url: str, driver: str
) -> None:
    async def look(backend: MongoDBBackend) -> list[StoredToken]:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()  # as Ctrl-C does where it finds the task at work and not waiting
        return await backend.find(valid(1), 1)

    async with opened(mongodb_url, driver) as backend:
        await insert(backend, of(1))
        for _ in range(20):  # PyMongo swallows some
            assert await backend.find(valid(1), 1) == [of(1)]
            with pytest.raises(asyncio.CancelledError):
                await asyncio.create_task(look(backend))


# Query plans.


class Plans(CommandListener):
    """Asks the server, just before each command of a client, how it is going to find what it is about."""

    def __init__(self, url: str) -> None:
        self._database = MongoClient[Any](url).get_default_database()
        self.seen: Counter[str] = Counter()
        self.wasteful: list[str] = []

    def close(self) -> None:
        self._database.client.close()

    def started(self, event: CommandStartedEvent) -> None:
        command, name = event.command, event.command_name
        for part in [*command.get("updates", ()), *command.get("deletes", ()), command]:
            query = part.get("q", part.get("query", part.get("filter")))
            if query and command[name] in ("vtoken", "vtoken.budgets"):
                find = {"find": command[name], "filter": query}
                find |= {key: part[key] for key in ("sort", "limit") if part.get(key)}
                self._explain(name, find)

    def _explain(self, name: str, find: dict[str, Any]) -> None:
        plan = self._database.command("explain", find, verbosity="executionStats")
        stats = plan["executionStats"]
        self.seen[name] += stats["nReturned"]
        scans = "COLLSCAN" in str(plan["queryPlanner"]["winningPlan"])
        if scans or stats["totalDocsExamined"] != stats["nReturned"]:
            self.wasteful.append(f"{name}: {find} examined {stats['totalDocsExamined']}")

    def succeeded(self, event: object) -> None: ...

    def failed(self, event: object) -> None: ...


async def test_no_command_examines_more_than_it_is_about(mongodb_url: str) -> None:
    with documents(mongodb_url) as stored, closing(Plans(mongodb_url)) as plans:
        async with opened(mongodb_url) as backend:  # enough others for a plan to go wrong
            await insert(backend, *(of(1000 + n, slug=f"other {n % 3}", max_uses=n) for n in range(300)))
            await insert(backend, *(of(2000 + n, object_id=str(n % 10), ends_at=NOW + n) for n in range(100)))
        async with AsyncMongoClient[Any](mongodb_url, event_listeners=[plans]) as client:
            backend = MongoDBBackend(client)
            await backend.open()
            plans.seen.clear()
            for start in (0, 100, 200):
                await insert(backend, *(of(start + n, object_id=str(n)) for n in range(20)))
                await backend.insert(of(start + 50, object_id="alone"), REPLACE)
                await backend.insert(of(start + 51, object_id="with an overlap"), REPLACE, LATER + 1)
            lookups = (backend.find(valid(200 + n), 1) for n in range(20))
            assert [len(found) for found in await asyncio.gather(*lookups)] == [1] * 20
            subject = Match(content_type="auth.user", object_id="3", slug="reset", active=True)
            assert len(await backend.find(subject, 10)) == 1
            newest = await backend.find(Match(), 10)
            assert len(await backend.find(Match(), 10, (newest[-1].created_at, newest[-1].id))) == 10
            assert len(await backend.find(Match(id=of(203).id), 10)) == 1
            assert await backend.update(valid(203), Lease("a lease", LATER)) is not None
            assert await backend.update(Match(id=of(203).id, lease_id="a lease"), Use(LATER)) is not None
            assert await backend.update(Match(id=of(203).id), SetExtraData("1")) is not None
            assert None not in await use(backend, *(valid(200 + n) for n in range(10, 20)))
            assert await backend.update(valid(250), Use(LATER)) is not None
            assert await backend.update(valid(251), Use(LATER)) is not None
            assert await backend.deactivate(subject._replace(object_id="4"), LATER) == 1
            budget = Budget("auth.user", "1", "reset", "attempts")
            for _ in range(2):
                assert (await backend.spend(budget, NOW, 5, 1, 1)).allowed
            await backend.refund(budget, NOW + 1)
            assert await backend.purge(LATER, LATER, 10, LATER) == 10
            await backend.spend(budget, NOW, 5, 1, 1)
            await backend.reset(budget)
            await backend.close()
        assert stored.count_documents({}) > 400
        assert plans.wasteful == []
        assert set(plans.seen) == {"find", "update", "delete", "findAndModify"}
        assert min(plans.seen.values()) > 0


async def test_an_object_is_never_looked_for_among_the_newest_of_all(mongodb_url: str) -> None:
    newest = Match(content_type="auth.user", object_id="newest", slug="reset", active=True)
    with documents(mongodb_url) as stored:
        async with opened(mongodb_url) as backend:
            await insert(backend, *(of(n) for n in range(300)))
            await insert(backend, *(of(400 + n, object_id="newest") for n in range(20)), mode=ADD)
            stored.database.command("profile", 2)
            # For this one it would be quicker; and then the server would look for others in the same way.
            assert len(await backend.find(newest, 1, (LATER, "f"))) == 1
            stored.database.command("profile", 0)
        [found] = stored.database["system.profile"].find({"op": "query", "ns": stored.full_name})
        assert found["planSummary"] == "IXSCAN { content_type: 1, object_id: 1, slug: 1, slot: 1 }"
