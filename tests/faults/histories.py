"""Several processes on one store, some of them killed; then the history of each object is judged."""

from __future__ import annotations

import asyncio
import itertools
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from tests import servers
from tests.faults.history_worker import CAP, new_manager
from tests.faults.journal import CAPPED, Tail, histories, purpose, unanswered
from tests.faults.linear import Operation
from tests.faults.tokens import is_sound
from vtoken import Subject

SQLITE: Final = "vtoken_backends.sqlite:SQLiteBackend"
POSTGRESQL: Final = "vtoken_backends.postgresql:PostgreSQLBackend"
MONGODB: Final = "vtoken_backends.mongodb:MongoDBBackend"
ROOT: Final = Path(__file__).parent.parent.parent
"""From where ``tests`` can be imported."""
PATIENCE: Final = 120
"""Seconds without a single answer after which a round fails."""


class Outcome(NamedTuple):
    """What a round did, and what it found."""

    operations: int
    kills: int
    unanswered: int
    """Operations under way in a process when it was killed."""
    violations: list[str]

    def __str__(self) -> str:
        return (
            f"{self.operations} operations, {self.kills} processes killed with {self.unanswered} operations"
            f" under way, {len(self.violations)} violations"
        )


class Round:
    """One store under several processes.

    Args:
        backend: the import path of the backend's class.
        url: of an empty store.
        directory: an empty one, for the journals.
        workers: how many processes there are at a time.
        seed: of all choices; what the processes make of them is up to the scheduler.
    """

    def __init__(self, backend: str, url: str, directory: Path, workers: int = 3, seed: int = 0) -> None:
        self._backend, self._url, self._directory = backend, url, directory
        self._dice = random.Random(seed)  # noqa: S311  # it guards nothing
        self._names = (f"worker{number}" for number in range(10**6))
        self._workers = workers
        self._tail = Tail(directory)
        self._begun: dict[str, set[int]] = {}
        self._answered = 0
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def play(self, operations: int, kills: int) -> Outcome:
        """Have so many operations answered, and so many processes killed in between amid an operation."""
        try:
            for name in itertools.islice(self._names, self._workers):
                self._running[name] = self._start(name)
            killed, fired = 0, 0
            while self._answered < operations or fired < kills:
                due = self._answered * (kills + 1) // operations
                if fired < min(due, kills):
                    killed += 1
                    fired += self._kill()
                    assert killed <= 3 * kills + 10, "processes are killed, but never amid an operation"
                self._follow(self._answered + 1)
            (self._directory / "stop").touch()
            for process in self._running.values():
                assert process.wait(PATIENCE) == 0, "a process failed"
        finally:
            for process in self._running.values():
                process.kill()
                process.wait()
            self._tail.close()
        found = histories(self._directory)
        asyncio.run(self._add_final_states(found))
        violations = (_told(s, history) for s, history in found.items() if not self._holds(s, history))
        return Outcome(
            sum(len(history) - 1 for history in found.values()),
            fired,
            sum(unanswered(history) for history in found.values()),
            list(itertools.islice(violations, 3)),  # a history without explanation takes long to judge
        )

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        module = "tests.faults.history_worker"
        seed = str(self._dice.randrange(2**32))
        command = [sys.executable, "-m", module, self._backend, self._url, str(self._directory), name, seed]
        self._begun[name] = set()
        return subprocess.Popen(command, cwd=ROOT)

    def _follow(self, answers: int) -> None:
        """Read on until so many answers are there."""
        deadline = time.monotonic() + PATIENCE
        while self._answered < answers:
            for name, line in self._tail:
                if "do" in line:
                    self._begun[name].add(line["n"])
                else:
                    self._begun[name].discard(line["n"])
                    self._answered += 1
            assert time.monotonic() < deadline, "nothing happens any more"
            failed = [name for name, process in self._running.items() if process.poll() is not None]
            assert not failed, f"{failed} ended by itself"
            time.sleep(0.005)

    def _kill(self) -> bool:
        """Kill a process, and start another one; True if it had an operation under way."""
        name = self._dice.choice([name for name in self._running if self._begun[name]] or [*self._running])
        process = self._running.pop(name)
        process.kill()
        process.wait()
        for told, line in self._tail:
            (self._begun[told].add if "do" in line else self._begun[told].discard)(line["n"])
            self._answered += "do" not in line
        successor = next(self._names)
        self._running[successor] = self._start(successor)
        return bool(self._begun[name])

    async def _add_final_states(self, found: dict[str, list[Operation]]) -> None:
        """A last operation for each subject, after all others: what the store holds in the end."""
        async with new_manager(self._backend, self._url) as manager:
            for subject, history in found.items():
                obj = Subject("auth.user", subject)
                active = [token.id async for token in manager.filter_active_tokens(obj, purpose(subject))]
                now = time.monotonic()
                # Two of them match no state, so that they are told as a violation.
                history.append(Operation("final", "final", "", "", now, now, (" ".join(active),)))

    def _holds(self, subject: str, history: list[Operation]) -> bool:
        cap = CAP if purpose(subject) == CAPPED else None
        return is_sound(history, cap, in_two_steps=self._backend == MONGODB)


def _told(subject: str, history: list[Operation]) -> str:
    lines = sorted(map(str, history))
    return "\n".join([f"the history of {subject} has no explanation:", *lines])


def report(title: str, outcome: Outcome) -> None:
    """Print a round's figures.

    Raises:
        AssertionError: it found a violation, or its fault never fired.
    """
    print(f"{title}: {outcome}", flush=True)
    assert outcome.unanswered >= outcome.kills > 0, "no process was killed amid an operation"
    assert not outcome.violations, "\n\n".join(outcome.violations[:3])


def on_sqlite(long: bool) -> None:
    """``python -m tests.faults histories-sqlite``"""
    with tempfile.TemporaryDirectory() as directory:
        url = f"sqlite:///{directory}/tokens.db"
        report("SQLite", _round(SQLITE, url, Path(directory), long))


def on_mongodb(long: bool) -> None:
    """``python -m tests.faults histories-mongodb``"""
    with (
        tempfile.TemporaryDirectory() as directory,
        mongodb() as server,
        servers.fresh_database(server) as url,
    ):
        report("MongoDB", _round(MONGODB, url, Path(directory), long))


def _round(backend: str, url: str, directory: Path, long: bool) -> Outcome:
    operations, kills = (100_000, 50) if long else (1_500, 3)
    return Round(backend, url, directory, seed=int(time.time())).play(operations, kills)


@contextmanager
def mongodb() -> Generator[str]:
    """A replica set of one node, or the server that the environment names."""
    declared = servers.declared_url()
    if declared is not None:
        yield declared
        return
    with servers.start_mongod("vtoken") as server:
        yield server.url
