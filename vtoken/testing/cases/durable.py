"""The cases of a store that outlives the process: reopened, shared by processes, killed."""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, ClassVar

from vtoken.backend import BudgetState, InsertMode, InsertResult, Match, Outcome, State
from vtoken.errors import InvalidToken, TokenBusy, TooManyAttempts
from vtoken.manager import TokenManager
from vtoken.subject import Subject
from vtoken.testing.cases.insert import insert
from vtoken.testing.cases.present import use
from vtoken.testing.cases.strings import UNICODE
from vtoken.testing.harness import (
    CAP,
    CODE,
    MINUTE,
    NOW,
    SLUG,
    USER,
    Bench,
    Suite,
    a_budget,
    a_digest,
    a_spend,
    a_token,
    at_once,
    case,
    find_all,
    one,
    put,
    race,
    refused,
)


class Worker:
    """Another process; see :mod:`vtoken.testing.worker`."""

    def __init__(self, suite: str) -> None:
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-m", "vtoken.testing.worker", suite],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout

    def send(self, do: str, **job: object) -> None:
        self._stdin.write(json.dumps({"do": do, **job}) + "\n")
        self._stdin.flush()

    def receive(self) -> Any:
        """The next answer; its own error output tells why there is none."""
        line = self._stdout.readline()
        assert line.endswith("\n"), "a worker process has died"
        return json.loads(line)

    def ask(self, do: str, **job: object) -> Any:
        self.send(do, **job)
        return self.receive()

    def kill(self) -> list[Any]:
        """End it by SIGKILL, and return the answers that it gave before."""
        self._process.kill()
        lines = self._stdout.readlines()
        self._process.wait()
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._stdin.close()
        self._stdout.close()


_idle: dict[str, list[Worker]] = {}
"""Processes that have closed their store, by their suite: starting one costs more than most cases."""


@atexit.register
def _end_idle() -> None:
    for workers in _idle.values():
        for worker in workers:
            worker.end()


@asynccontextmanager
async def processes(bench: Bench, count: int) -> AsyncGenerator[list[Worker]]:
    """So many processes with the store open."""
    kind = type(bench.suite)
    assert "<locals>" not in kind.__qualname__, "the suite's class must be importable by other processes"
    suite = f"{kind.__module__}:{kind.__qualname__}"
    idle = _idle.setdefault(suite, [])
    workers = [idle.pop() if idle else Worker(suite) for _ in range(count)]
    try:
        for worker in workers:
            worker.send("open", store=bench.store)
        for worker in workers:
            assert await asyncio.to_thread(worker.receive) == "ready"
        yield workers
        for answer in await ask_all(workers, "close"):
            assert answer == "closed"
    except BaseException:
        for worker in workers:
            worker.end()
        raise
    idle += workers


@asynccontextmanager
async def a_victim(bench: Bench) -> AsyncGenerator[Worker]:
    """A process with the store open, to be killed."""
    kind = type(bench.suite)
    worker = Worker(f"{kind.__module__}:{kind.__qualname__}")
    try:
        worker.send("open", store=bench.store)
        assert await asyncio.to_thread(worker.receive) == "ready"
        yield worker
    finally:
        worker.end()


async def ask_all(workers: list[Worker], do: str, **job: object) -> list[Any]:
    """Give all of them the same job at once; their answers."""
    return await at_once(asyncio.to_thread(worker.ask, do, **job) for worker in workers)


class DurableCases(Suite):
    """Cases that start other processes."""

    processes: ClassVar[int] = 4
    """How many processes race."""
    kills: ClassVar[int] = 2
    """How many processes are killed."""

    @case(4)
    async def test_a_reopened_store_holds_everything(self, bench: Bench) -> None:
        """What was written is there, whole, when the store is closed and opened again: tokens, budgets, what
        is remembered of uses, and notes."""
        budget = a_budget("sms", of=42)
        tokens = [a_token(object_id=UNICODE, extra_data="x" * 16_384, max_uses=9) for _ in range(5)]
        used = a_token(object_id="used")
        for number, token in enumerate(tokens):
            backend = self.backend(bench.store)
            await backend.open()
            await backend.insert(token, InsertMode.ADD)
            found = await find_all(backend, Match(object_id=UNICODE))
            assert found == tokens[number::-1]
            spending = await backend.spend((a_spend(budget, 3),), NOW)
            assert (spending.full is None) is (number < 3)
            assert await backend.note("a", f"{number}") == "0"
            if not number:
                await insert(backend, used, InsertMode.REPLACE)
            outcome = (await use(backend, used, "me")).outcome
            assert outcome is (Outcome.REPLAYED if number else Outcome.RIGHT)
            await backend.close()
        assert [token for token in await bench.stored() if token.object_id == UNICODE] == tokens[::-1]

    @case(1)
    async def test_of_consumers_in_processes_one_wins(self, bench: Bench) -> None:
        """Of concurrent consumers in several processes exactly one wins each round."""
        manager = await bench.manager()
        async with processes(bench, self.processes) as workers:
            for number in range(self.rounds):
                slug = f"reset{number}"
                key = (await manager.issue(USER, slug)).key
                won = await ask_all(workers, "consume", slug=slug, key=key, tasks=self.tasks // 2)
                assert sum(won) == 1
                await refused(InvalidToken, manager.verify(USER, slug, key))

    @case(2)
    async def test_of_issues_in_processes_one_stays_valid(self, bench: Bench) -> None:
        """Of concurrent issues in several processes exactly one token stays valid each round."""
        manager = await bench.manager()
        async with processes(bench, self.processes) as workers:
            for number in range(self.rounds):
                slug = f"reset{number}"
                answers = await ask_all(workers, "issue", slug=slug, tasks=self.tasks // 3)
                calls = [manager.verify(USER, slug, key) for keys in answers for key in keys]
                valid, _ = await race(calls, InvalidToken)
                assert len(valid) == 1

    @case(3)
    async def test_of_get_active_or_create_in_processes_one_creates(self, bench: Bench) -> None:
        """Concurrent ``get_active_or_create`` in several processes give one token."""
        async with processes(bench, self.processes) as workers:
            for number in range(self.rounds):
                answers = await ask_all(
                    workers, "get_or_create", slug=f"reset{number}", tasks=self.tasks // 3
                )
                assert len({token_id for ids in answers for token_id in ids}) == 1
        assert len(await bench.stored()) == self.rounds

    @case(1)
    async def test_writes_of_processes_lose_nothing(self, bench: Bench) -> None:
        """In each round, processes race on one token and on budgets: holds, uses and saves, spendings and
        refunds; the limits hold, and no write is lost."""
        backend = await bench.backend()
        async with processes(bench, self.processes) as workers:
            for number in range(self.rounds):
                token = await put(backend, {"digest": a_digest(f"raced {number}")}, max_uses=5)
                answers = await ask_all(workers, "race_for_uses", number=number, tasks=self.tasks // 3)
                stored = await one(backend, token)
                used, held = (sum(answer[n] for answer in answers) for n in (0, 1))
                assert (used + held, stored.uses, len(stored.holds)) == (5, used, held)
                assert stored.is_active is (used < 5)
                assert stored.extra_data == "saved"
                names = a_budget(f"limit {number}"), a_budget(f"kept {number}")
                limited, kept = await backend.budgets(names)
                assert sum(answer[2] for answer in answers) == 4
                assert limited == BudgetState(spent=4, strikes=0, until=NOW + MINUTE)
                spent = self.processes * (self.tasks // 3)
                assert kept == BudgetState(spent=spent, strikes=0, until=NOW + MINUTE)

    @case(2)
    async def test_inserts_of_processes_have_an_order(self, bench: Bench) -> None:
        """In each round, processes race with ``REPLACE`` and overlaps, ``IF_NONE_VALID``, ``ONCE`` and
        ``ADD`` on one line: one exclusive token stays active, no key is lost or doubled, and a purge beside
        them takes nothing that is due later."""
        backend = await bench.backend()
        async with processes(bench, self.processes) as workers:
            for number in range(self.rounds):
                answers = await ask_all(workers, "insert", number=number, tasks=self.tasks // 3)
                inserted = [digest for answer in answers for digest, result in answer if result == "inserted"]
                found = await backend.find(Match(object_id=f"{number}"), 999)
                digests = [key.digest.hex() for token in found for key in token.keys]
                assert sorted(digests) == sorted(inserted)
                assert len(found) == len(inserted)
                active = [token for token in found if token.state is State.ACTIVE]
                assert sum(not token.is_beside for token in active) == 1
                results = [result for answer in answers for _, result in answer]
                assert set(results) <= {result.value for result in InsertResult}

    @case(8)
    async def test_wrong_codes_from_processes_hold_the_cap(self, bench: Bench) -> None:
        """Of many wrong codes from several processes as many are compared as the cap allows; then the right
        one fails."""
        manager = await bench.manager(CODE)
        async with processes(bench, self.processes) as workers:
            for number in range(self.rounds):
                subject = Subject("auth.user", number)
                code = (await manager.issue(subject, SLUG)).key
                tasks = self.tasks if number else 200 // self.processes
                compared = await ask_all(workers, "wrong_codes", object=number, tasks=tasks)
                assert sum(compared) == CAP
                await refused(TooManyAttempts, manager.consume(subject, SLUG, code))

    @case(4)
    async def test_acknowledged_writes_survive_a_kill(self, bench: Bench) -> None:
        """What a process acknowledged is there after its SIGKILL, what it used stays used, and no lock is
        left."""
        manager = await bench.manager()
        for number in range(self.kills):
            async with a_victim(bench) as worker:
                worker.send("storm", name=f"kill{number}")
                told = [await asyncio.to_thread(worker.receive) for _ in range(30 + number)]
                told += await asyncio.to_thread(worker.kill)
            steps: dict[str, list[str]] = {}
            for object_id, _, key in told:
                steps.setdefault(object_id, []).append(key)
            await _check_steps(manager, steps)

    @case(5)
    async def test_a_killed_redeemer_frees_the_token(self, bench: Bench) -> None:
        """A process killed in a ``redeem`` leaves the token unused, and free when its hold has ended."""
        manager = await bench.manager()
        issued = await manager.issue(USER, "reset")
        async with a_victim(bench) as worker:
            assert await asyncio.to_thread(worker.ask, "hold", slug="reset", key=issued.key) == "held"
            assert await asyncio.to_thread(worker.kill) == []
        await refused(TokenBusy, manager.consume(USER, "reset", issued.key))
        bench.clock.advance(timedelta(seconds=60))
        assert await manager.consume(USER, "reset", issued.key) == issued


async def _check_steps(manager: TokenManager, steps: dict[str, list[str]]) -> None:
    """Compare the store with what was acknowledged: the step under way may have happened or not."""
    for object_id, keys in steps.items():
        subject = Subject("auth.user", object_id)
        active = [token async for token in manager.filter_active_tokens(subject)]
        if len(keys) >= 2:  # issued, used
            assert (await refused(InvalidToken, manager.verify(subject, "reset", keys[0]))).reason == "used"
        if len(keys) == 1 and not active:  # issued, and the use was under way
            assert (await refused(InvalidToken, manager.verify(subject, "reset", keys[0]))).reason == "used"
        assert len(active) <= 1
        if len(keys) == 3:  # issued again, the replacement may be under way
            assert len(active) == 1
        if len(keys) == 4:  # replaced
            await refused(InvalidToken, manager.verify(subject, "reset", keys[2]))
            assert active == [await manager.verify(subject, "reset", keys[3])]
        await manager.issue(subject, "reset")
