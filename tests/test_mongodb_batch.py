"""MongoDB: operations that share their commands come to what they would have come to one by one."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import closing
from typing import Any

import pytest
from pymongo import AsyncMongoClient, MongoClient
from pymongo.monitoring import CommandListener, CommandStartedEvent

from vtoken.backend import (
    Budget,
    Hold,
    InsertMode,
    InsertResult,
    Match,
    Outcome,
    Presented,
    SetExtraData,
    Spend,
    State,
    StoredToken,
    Use,
    UseHeld,
)
from vtoken.errors import BackendError, BackendUnavailable, OutcomeUnknown
from vtoken_backends.mongodb import MongoDBBackend
from vtoken_backends.mongodb.writes import Writes

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
    digest_of,
    documents,
    failing,
    insert,
    key,
    of,
    opened,
    token,
    use,
)

INSERTED, KEY_TAKEN, HAS_VALID = InsertResult.INSERTED, InsertResult.KEY_TAKEN, InsertResult.HAS_VALID
RIGHT, REFUSED, REPLAYED = Outcome.RIGHT, Outcome.REFUSED, Outcome.REPLAYED


async def insert_all(
    backend: MongoDBBackend, *tokens: StoredToken, mode: InsertMode = REPLACE, **options: Any
) -> list[Any]:
    """The results, or what was raised."""
    calls = (insert(backend, record, mode, **options) for record in tokens)
    answers = await asyncio.gather(*calls, return_exceptions=True)
    return [answer if isinstance(answer, BaseException) else answer.result for answer in answers]


async def use_all(backend: MongoDBBackend, *matches: Match, use_id: str = "") -> list[Any]:
    calls = (backend.present(match, Use(LATER, use_id), LATER) for match in matches)
    return await asyncio.gather(*calls, return_exceptions=True)


def outcomes(answers: list[Any]) -> list[Any]:
    return [answer.outcome if isinstance(answer, Presented) else type(answer) for answer in answers]


async def test_many_operations_share_a_few_commands(mongodb_url: str) -> None:
    commands = Commands()
    async with AsyncMongoClient[Any](mongodb_url, event_listeners=[commands]) as client:
        backend = MongoDBBackend(client)
        await backend.open()
        for again in (0, 100):  # the second time there are older ones to be replaced
            commands.sent.clear()
            tokens = [of(n + again, object_id=str(n), created_at=NOW) for n in range(100)]
            assert await insert_all(backend, *tokens) == [INSERTED] * 100
            assert sorted(await active(backend)) == [n + again for n in range(100)]
            assert len(commands.sent) <= 10
        commands.sent.clear()
        found = await asyncio.gather(*(backend.find(key(n), 1) for n in range(80, 200)))
        assert [len(tokens) for tokens in found] == [1] * 120
        assert set(commands.sent) == {"find"}
        assert len(commands.sent) <= 6
        commands.sent.clear()
        used = await use_all(backend, *(key(n) for n in range(80, 180)))
        assert outcomes(used) == [REFUSED] * 20 + [RIGHT] * 80
        ended: dict[str, Any] = {"state": State.USED, "ends_at": LATER - 1, "uses": 1, "used_at": LATER}
        assert [answer.token for answer in used[20:]] == [record._replace(**ended) for record in tokens[:80]]
        assert len(commands.sent) <= 8
        assert outcomes(await use_all(backend, *(key(n) for n in range(80, 180)))) == [REFUSED] * 100
        for answer in used[20:]:
            assert await backend.find(Match(id=answer.token.id), 1) == [answer.token]
        await backend.close()


async def test_of_uses_of_one_key_as_many_win_as_it_has(mongodb_url: str, mongodb_driver: str) -> None:
    async with opened(mongodb_url, mongodb_driver) as backend:
        await insert_all(backend, of(1), of(2, max_uses=3), of(3))
        numbers = [1, 2, 3, 4] * 15
        answers = await use_all(backend, *(key(n) for n in numbers))
        pairs = zip(numbers, answers, strict=True)
        won = [(n, answer.token.uses) for n, answer in pairs if answer.outcome is RIGHT]
        assert sorted(won) == [(1, 1), (2, 1), (2, 2), (2, 3), (3, 1)]


async def test_each_use_is_held_to_its_own_match(mongodb_url: str, mongodb_driver: str) -> None:
    context = b"c" * 32
    async with opened(mongodb_url, mongodb_driver) as backend:
        records = [of(n, context=context, max_uses=2) for n in range(12)]
        await insert_all(backend, *records)
        assert (await use(backend, 1, "seen")).outcome is RIGHT
        saved = await backend.update(Match(id=records[2].id), SetExtraData("[1]"))
        assert saved is not None
        refused = [
            key(3)._replace(object_id="4"),
            key(4)._replace(object_id="3"),
            key(5)._replace(slug="other"),
            key(6)._replace(content_type="other"),
            key(7)._replace(context=b"d" * 32),
            key(8)._replace(kind="code"),
        ]
        two = Match(digests=(b"x" * 32, digest_of(9)))
        calls = [backend.present(m, Use(LATER, "u"), LATER) for m in (*refused, key(2), two, key(10))]
        answers = await asyncio.gather(*calls, use(backend, 1, "seen"))
        assert outcomes(answers) == [REFUSED] * len(refused) + [RIGHT] * 3 + [REPLAYED]
        first: dict[str, Any] = {"uses": 1, "used_at": LATER}
        assert [answer.token for answer in answers[len(refused) : -1]] == [
            saved._replace(**first),
            records[9]._replace(**first),
            records[10]._replace(**first),
        ]
        assert (await use(backend, 10, "u")).outcome is REPLAYED
        found = [await backend.find(key(n), 1) for n in (1, 3, 4, 5, 6, 7, 8)]
        assert [tokens[0].uses for tokens in found] == [1] + [0] * 6


async def test_of_the_keys_of_an_overlap_one_is_used(mongodb_url: str, mongodb_driver: str) -> None:
    async with opened(mongodb_url, mongodb_driver) as backend:
        pairs = range(0, 20, 2)
        for number in (0, 1):
            records = [of(pair + number, object_id=str(pair)) for pair in pairs]
            assert await insert_all(backend, *records, keep_until=END) == [INSERTED] * 10
        answers = outcomes(await use_all(backend, *(key(n) for n in range(20))))
        assert [answers[pair : pair + 2].count(RIGHT) for pair in pairs] == [1] * 10
        assert await active(backend) == []


async def test_inserts_for_one_object_leave_one_active(mongodb_url: str, mongodb_driver: str) -> None:
    async with opened(mongodb_url, mongodb_driver) as backend:
        for start in (0, 40):
            records = [token(start + n) for n in range(40)]
            assert await insert_all(backend, *records) == [INSERTED] * 40
            assert len(await active(backend)) == 1
        assert len(await backend.find(Match(), 100)) == 80


async def test_modes_may_meet_in_one_batch(mongodb_url: str, mongodb_driver: str) -> None:
    async with opened(mongodb_url, mongodb_driver) as backend:
        await insert(backend, of(1, expires_at=NOW - 1, ends_at=NOW - 1))
        await insert(backend, of(2))
        calls = [
            insert(backend, of(100 + n, object_id=str(n % 4)), IF_NONE_VALID, wanted_until=NOW + 200)
            for n in range(40)
        ]
        calls += [insert(backend, of(200 + n, object_id="added"), ADD) for n in range(10)]
        calls += [insert(backend, of(300 + n, object_id=f"new {n}"), keep_until=END) for n in range(10)]
        results = [answer.result for answer in await asyncio.gather(*calls)]
        assert [results[n:40:4].count(INSERTED) for n in range(4)] == [1, 1, 0, 1]
        assert [results[n:40:4].count(HAS_VALID) for n in range(4)] == [9, 9, 10, 9]
        assert results[40:] == [INSERTED] * 20
        assert len(await active(backend)) == 4 + 10 + 10


async def test_a_taken_key_in_a_batch_harms_nobody_else(mongodb_url: str, mongodb_driver: str) -> None:
    async with opened(mongodb_url, mongodb_driver) as backend:
        await insert_all(backend, *(of(n) for n in range(20)))
        taken = [of(100 + n, object_id=str(n), key={"digest": digest_of(n % 2)}) for n in range(10)]
        fresh = [of(110 + n, object_id=str(10 + n)) for n in range(5)]
        twins = [of(200 + n, object_id=f"twin {n}", key={"digest": b"t" * 32}) for n in range(5)]
        results = await insert_all(backend, *taken, *fresh, *twins)
        assert results[:15] == [KEY_TAKEN] * 10 + [INSERTED] * 5
        assert sorted(result.name for result in results[15:]) == ["INSERTED"] + ["KEY_TAKEN"] * 4
        winner = 200 + results[15:].index(INSERTED)
        assert sorted(await active(backend)) == [*range(10), *range(15, 20), *range(110, 115), winner]


async def test_what_the_server_refuses_of_one_harms_nobody_else(mongodb_url: str) -> None:
    async with opened(mongodb_url) as backend:
        await insert_all(backend, *(of(n) for n in range(10)))
        with documents(mongodb_url) as stored:
            as_it_was = {"token.id": of(5).id, "token.state": 0}
            rule = {"$or": [{"object_id": {"$ne": "5"}}, as_it_was]}
            stored.database.command("collMod", "vtoken", validator=rule)
        renewed = await insert_all(backend, *(of(20 + n, object_id=str(n)) for n in range(10)))
        used = await use_all(backend, *(key(n if n == 5 else 20 + n) for n in range(10)))
        for answers in (renewed, used):
            assert [n for n, answer in enumerate(answers) if isinstance(answer, BackendError)] == [5]
            assert "code 121" in str(answers[5])
        assert renewed[:5] + renewed[6:] == [INSERTED] * 9
        assert outcomes(used[:5] + used[6:]) == [RIGHT] * 9
        assert await active(backend) == [5]


# Connections that break, and primaries that step down.

LOST = {"closeConnection": True}
STEPPED_DOWN = {"errorCode": 10107, "errorLabels": ["RetryableWriteError"]}
NOT_CONFIRMED = {"writeConcernError": {"code": 91, "errmsg": "the server shuts down"}}


@pytest.mark.parametrize("trouble", [LOST, STEPPED_DOWN, NOT_CONFIRMED])
async def test_uses_get_over_one_failure(mongodb_replica_set: str, mongodb_driver: str, trouble: Any) -> None:
    with servers.databases(mongodb_replica_set).one() as url:
        async with opened(url, mongodb_driver) as backend:
            await insert_all(backend, *(of(n) for n in range(30)))
            with failing(url, 1, "update", **trouble):
                answers = await use_all(backend, *(key(n) for n in range(30)))
            assert outcomes(answers) == [RIGHT] * 30
            assert outcomes(await use_all(backend, *(key(n) for n in range(30)))) == [REFUSED] * 30


@pytest.mark.parametrize("trouble", [LOST, NOT_CONFIRMED])
async def test_issues_get_over_one_failure(mongodb_url: str, mongodb_driver: str, trouble: Any) -> None:
    async with opened(mongodb_url, mongodb_driver) as backend:
        await insert_all(backend, *(of(n) for n in range(0, 30, 2)))
        for command, start in (("update", 100), ("insert", 200)):
            with failing(mongodb_url, 1, command, **trouble):
                records = [of(start + n, object_id=str(n)) for n in range(30)]
                assert await insert_all(backend, *records) == [INSERTED] * 30
            assert sorted(await active(backend)) == list(range(start, start + 30))


@pytest.mark.parametrize("trouble", [LOST, NOT_CONFIRMED])
async def test_of_rivals_one_wins_beside_a_failure(
    mongodb_url: str, mongodb_driver: str, trouble: Any
) -> None:
    async with opened(mongodb_url, mongodb_driver) as one, opened(mongodb_url, mongodb_driver) as two:
        await insert_all(one, *(of(n) for n in range(30)))
        with failing(mongodb_url, 1, "update", **trouble):
            answers = await asyncio.gather(*(use_all(b, *(key(n) for n in range(30))) for b in (one, two)))
        for pair in zip(*map(outcomes, answers), strict=True):
            # Who had to try twice cannot always tell whether it was too late.
            assert pair.count(RIGHT) == 1
            assert set(pair) <= {RIGHT, REFUSED, OutcomeUnknown}
        assert await active(one) == []


@pytest.mark.parametrize("trouble", [LOST, NOT_CONFIRMED])
async def test_uses_that_fail_again_have_an_unknown_outcome(mongodb_url: str, trouble: Any) -> None:
    async with opened(mongodb_url) as backend:
        await insert_all(backend, *(of(n) for n in range(30)))
        with failing(mongodb_url, 20, "update", **trouble):
            # The first is an unknown key: under eager tasks it goes alone, before the batch.
            answers = await use_all(backend, key(99), *(key(n) for n in range(30)))
        assert outcomes(answers) == [REFUSED] + [OutcomeUnknown] * 30
        assert len({id(answer) for answer in answers}) == 31
        again = outcomes(await use_all(backend, *(key(n) for n in range(30))))
        assert set(again) == {REFUSED if trouble is NOT_CONFIRMED else RIGHT}


@pytest.mark.parametrize("code", [64, 11601])  # not replicated in time; ended by an operator
async def test_what_was_interrupted_may_have_happened(mongodb_url: str, code: int) -> None:
    async with opened(mongodb_url) as backend:
        await insert(backend, token(1))
        with failing(mongodb_url, 1, "findAndModify", errorCode=code), pytest.raises(OutcomeUnknown):
            await use(backend, 1)
        with failing(mongodb_url, 1, "find", errorCode=code), pytest.raises(BackendUnavailable):
            await backend.find(key(1), 1)


async def test_a_use_that_did_not_end_other_contexts_may_have_happened(
    mongodb_url: str, mongodb_driver: str
) -> None:
    async with opened(mongodb_url, mongodb_driver) as backend:
        for number in (1, 2):
            await insert(backend, token(number, context=b"c%d" % number))
        with failing(mongodb_url, 1, "update", errorCode=13), pytest.raises(OutcomeUnknown):
            await use(backend, 2, "mine")  # what is refused is what comes after the use itself
        assert (await use(backend, 2)).outcome is REFUSED
        # Who asks again by the name of the use has the rest done.
        assert (await use(backend, 2, "mine")).outcome is REPLAYED
        assert await active(backend) == []


async def test_finds_get_over_a_lost_connection(mongodb_url: str) -> None:
    async with opened(mongodb_url) as backend:
        await insert(backend, of(1))
        with failing(mongodb_url, 1, "find", **LOST):
            assert await backend.find(key(1), 1) == [of(1)]


@pytest.mark.parametrize("driver", ["pymongo", "motor"])
async def test_a_task_that_is_cancelled_while_it_runs_ends_at_its_next_find(
    mongodb_url: str, driver: str
) -> None:
    async def look(backend: MongoDBBackend) -> list[StoredToken]:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()  # as Ctrl-C does where it finds the task at work and not waiting
        return await backend.find(key(1), 1)

    async with opened(mongodb_url, driver) as backend:
        await insert(backend, of(1))
        for _ in range(20):
            assert await backend.find(key(1), 1) == [of(1)]
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
                find |= {name: part[name] for name in ("sort", "limit", "hint") if part.get(name)}
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
            await insert_all(backend, *(of(1000 + n, slug=f"other {n % 3}", max_uses=n) for n in range(300)))
            others = [of(2000 + n, object_id=str(n % 10), ends_at=NOW + n, slug="b") for n in range(100)]
            await insert_all(backend, *others, mode=ADD)
        async with AsyncMongoClient[Any](mongodb_url, event_listeners=[plans]) as client:
            backend = MongoDBBackend(client)
            await backend.open()
            plans.seen.clear()
            for start in (0, 100, 200):
                await insert_all(backend, *(of(start + n, object_id=f"{n}!") for n in range(20)))
                await insert(backend, of(start + 50, object_id="alone"))
                await insert(backend, of(start + 51, object_id="with an overlap"), keep_until=END)
            lookups = (backend.find(key(200 + n), 1) for n in range(20))
            assert [len(found) for found in await asyncio.gather(*lookups)] == [1] * 20
            assert len(await backend.find(Match(), 10)) == 10
            newest = await backend.find(Match(), 10)
            assert len(await backend.find(Match(), 10, newest[-1].id)) == 10
            assert len(await backend.find(Match(id=of(203).id), 10)) == 1
            assert (await backend.present(key(203), Hold("a hold", LATER + 1), LATER)).outcome is RIGHT
            assert await backend.update(Match(id=of(203).id), UseHeld("a hold", LATER)) is not None
            assert await backend.update(Match(id=of(203).id), SetExtraData("1")) is not None
            used = await use_all(backend, *(key(200 + n) for n in range(10, 20)))
            assert outcomes(used) == [RIGHT] * 10
            for number in (250, 251):
                assert (await use(backend, number)).outcome is RIGHT
            subject = Match(content_type="auth.user", object_id="4!", slug="reset", active=True)
            assert await backend.deactivate(subject, LATER) == 1
            spend = Spend(Budget(b"o" * 16, b"n" * 16), 5, 1, 1)
            await backend.spend((spend,), NOW)
            await backend.refund((await backend.spend((spend,), NOW)).charges)
            assert (await backend.purge(LATER, LATER, 10, LATER)).tokens == 10
            await backend.spend((spend,), NOW)
            assert await backend.reset(spend.budget.object, None) == 1
            await backend.close()
        assert stored.count_documents({}) > 400
        assert not plans.wasteful, "\n".join(plans.wasteful)
        assert set(plans.seen) == {"find", "update", "delete", "findAndModify"}


class Interrupted:
    """A replacement of a token that stands beside a line, and what somebody else asks between its writes.

    Args:
        backend: that replaces the token.
        writes: after how many of its writes the other one asks.
        ask: what that does.
    """

    def __init__(self, backend: MongoDBBackend, writes: int, ask: Callable[[], Awaitable[object]]) -> None:
        self._backend = backend
        self._writes = writes
        self._ask = ask
        self._done = 0
        self.answers: list[Any] = []

    async def insert(self, mode: InsertMode, monkeypatch: pytest.MonkeyPatch) -> InsertResult:
        """Insert the token of number 2, and be told of it as it was then."""
        write = Writes.write

        async def interrupted(writes: Writes, documents: Any, **options: Any) -> Any:
            if writes is self._backend._writes:  # pyright: ignore[reportPrivateUsage]  # whose writes are counted
                if self._done == self._writes:
                    self.answers.append(await self._ask())
                self._done += any(stored.edits for stored in documents.all.values())
            return await write(writes, documents, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Writes, "write", interrupted)
            inserted = await insert(self._backend, token(2), mode)
        assert self._done
        if not self.answers:
            self.answers.append(await self._ask())
        assert inserted.token in (token(2), None)
        return inserted.result


@pytest.mark.parametrize("writes", range(4))
@pytest.mark.parametrize("mode", [REPLACE, InsertMode.ONCE])
async def test_if_none_valid_between_the_writes_of_a_replacement(
    mongodb_url: str, mode: InsertMode, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks is told of the old token or of the new one, and never finds that there is none."""
    async with opened(mongodb_url) as backend, opened(mongodb_url) as other:
        await insert(backend, token(1), ADD)
        replacing = Interrupted(
            backend, writes, lambda: insert(other, token(3), IF_NONE_VALID, wanted_until=LATER)
        )
        assert await replacing.insert(mode, monkeypatch) is INSERTED
        assert [answer.result for answer in replacing.answers] == [HAS_VALID]
        assert await active(backend) == [2]
        [_, replaced] = await backend.find(Match(), 9)
        assert (replaced.state, replaced.ends_at) == (State.REPLACED, NOW + 1)


@pytest.mark.parametrize("writes", range(4))
async def test_what_meets_a_replacement_between_its_writes(
    mongodb_url: str, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two calls at once end as one of their orders."""
    everything = Match(content_type="auth.user", object_id="42")
    async with opened(mongodb_url) as backend, opened(mongodb_url) as other:
        await insert(backend, token(1), ADD)
        replacing = Interrupted(backend, writes, lambda: other.deactivate(everything, LATER))
        assert await replacing.insert(REPLACE, monkeypatch) is INSERTED
        states = [found.state for found in await backend.find(Match(), 9)]
        assert states in ([State.ACTIVE, State.ENDED], [State.ENDED, State.REPLACED])
        assert replacing.answers == [1]
        await backend.erase("auth.user", "42", b"o" * 16)

        await insert(backend, token(1), ADD)
        replacing = Interrupted(backend, writes, lambda: insert(other, token(3)))
        assert await replacing.insert(REPLACE, monkeypatch) is INSERTED
        assert await active(backend) in ([2], [3])
        assert len(await backend.find(Match(), 9)) == 3
        await backend.erase("auth.user", "42", b"o" * 16)

        await insert(backend, token(1), ADD)
        replacing = Interrupted(backend, writes, lambda: insert(other, of(2)))  # the same key
        results = [await replacing.insert(REPLACE, monkeypatch), replacing.answers[0].result]
        assert sorted(results, key=str) == [INSERTED, KEY_TAKEN]


async def test_a_replacement_that_was_cut_short_is_finished_by_the_next_call(
    mongodb_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail() -> None:
        raise BackendError("its process was killed, as far as others can tell")

    for writes in (1, 2):
        async with opened(mongodb_url) as backend, opened(mongodb_url) as other:
            await insert(other, token(1), ADD)
            with pytest.raises(BackendError, match="killed"):
                await Interrupted(backend, writes, fail).insert(REPLACE, monkeypatch)
            assert await active(other) == ([1] if writes == 1 else [])  # none, but never two
            assert [found.id for found in await other.find(Match(), 9)] == [token(1).id]
            inserted = await insert(other, token(3))
            assert inserted.result is INSERTED
            assert await active(other) == [3]
            assert len(await other.find(Match(), 9)) == 3
            await other.erase("auth.user", "42", b"o" * 16)
