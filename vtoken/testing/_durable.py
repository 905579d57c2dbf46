"""The cases of a store that outlives the process: reopened, shared by processes, killed."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, ClassVar

from vtoken.backend import Budget, InsertMode
from vtoken.errors import InvalidToken, TooManyAttempts
from vtoken.manager import TokenManager
from vtoken.subject import Subject
from vtoken.testing._bench import (
    MINUTE,
    NOW,
    USER,
    Bench,
    Suite,
    a_token,
    at_once,
    case,
    find_all,
    race,
    refused,
)
from vtoken.testing._insert import UNICODE
from vtoken.testing._limits import CAP, CODE, SLUG
from vtoken.testing._suite import BackendConformance


class Worker:
    """Another process on the same store; see ``_worker``."""

    def __init__(self, suite: Suite, store: str) -> None:
        kind = type(suite)
        assert "<locals>" not in kind.__qualname__, "the suite's class must be importable by other processes"
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-m", "vtoken.testing._worker", f"{kind.__module__}:{kind.__qualname__}", store],
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


@asynccontextmanager
async def processes(bench: Bench, count: int) -> AsyncGenerator[list[Worker]]:
    """So many processes with the store open."""
    workers = [Worker(bench.suite, bench.store) for _ in range(count)]
    try:
        for worker in workers:
            assert await asyncio.to_thread(worker.receive) == "ready"
        yield workers
    finally:
        for worker in workers:
            worker.end()


async def ask_all(workers: list[Worker], do: str, **job: object) -> list[Any]:
    """Give all of them the same job at once; their answers."""
    return await at_once(asyncio.to_thread(worker.ask, do, **job) for worker in workers)


class DurableBackendConformance(BackendConformance):
    """:class:`BackendConformance` and what a store must do that outlives the process.

    Its cases start other processes, which import the subclass by its module and name, make an instance
    of it without a test's fixtures, and call ``backend(store)``.
    """

    processes: ClassVar[int] = 4
    """How many processes race."""
    kills: ClassVar[int] = 2
    """How many processes are killed."""

    @case(4)
    async def test_a_reopened_store_holds_everything(self, bench: Bench) -> None:
        """What was written is there, whole, when the store is closed and opened again."""
        budget = Budget("auth.user", UNICODE, "sms-login", "attempts")
        tokens = [a_token(object_id=UNICODE, extra_data="x" * 16_384, created_at=NOW + n) for n in range(5)]
        for number, token in enumerate(tokens):
            backend = self.backend(bench.store)
            await backend.open()
            await backend.insert(token, InsertMode.ADD)
            assert await find_all(backend) == tokens[number::-1]
            assert (await backend.spend(budget, NOW, 3, MINUTE, MINUTE)).allowed is (number < 3)
            await backend.close()
        assert await bench.stored() == tokens[::-1]

    @case(1)
    async def test_of_consumers_in_processes_one_wins(self, bench: Bench) -> None:
        """Of concurrent consumers in several processes exactly one wins each round."""
        manager = await bench.manager()
        async with processes(bench, self.processes) as workers:
            for number in range(self.rounds):
                slug = f"reset{number}"
                key = (await manager.deactivate_and_create(USER, slug)).key
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

    @case(8)
    async def test_guesses_from_processes_hold_the_cap(self, bench: Bench) -> None:
        """Of 200 wrong guesses from several processes at most the cap is compared; then the right key
        fails."""
        manager = await bench.manager(CODE)
        code = (await manager.deactivate_and_create(USER, SLUG)).key
        async with processes(bench, self.processes) as workers:
            compared = await ask_all(workers, "guess", tasks=200 // self.processes)
        assert sum(compared) == CAP
        await refused(TooManyAttempts, manager.consume(USER, SLUG, code))

    @case(4)
    async def test_acknowledged_writes_survive_a_kill(self, bench: Bench) -> None:
        """What a process acknowledged is there after its SIGKILL, what it used stays used, and no lock is
        left."""
        manager = await bench.manager()
        for number in range(self.kills):
            async with processes(bench, 1) as (worker,):
                worker.send("storm", name=f"kill{number}")
                told = [await asyncio.to_thread(worker.receive) for _ in range(30 + number)]
                told += await asyncio.to_thread(worker.kill)
            steps: dict[str, list[str]] = {}
            for object_id, _, key in told:
                steps.setdefault(object_id, []).append(key)
            await _check_steps(manager, steps)

    @case(5)
    async def test_a_killed_redeemer_frees_the_token(self, bench: Bench) -> None:
        """A process killed in a ``redeem`` leaves the token unused, and free when the lease has ended."""
        manager = await bench.manager()
        issued = await manager.deactivate_and_create(USER, "reset")
        async with processes(bench, 1) as (worker,):
            assert await asyncio.to_thread(worker.ask, "hold", slug="reset", key=issued.key) == "leased"
            assert await asyncio.to_thread(worker.kill) == []
        assert (await refused(InvalidToken, manager.consume(USER, "reset", issued.key))).reason == "leased"
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
        await manager.deactivate_and_create(subject, "reset")
