"""An hour of mixed load in minutes: two processes on one SQLite file, purge running beside them.

The clock of the tokens runs twelve times as fast as ours. A million tokens are issued, each is valid for ten
of its minutes, and what is used or expired is purged. Memory and latency are measured in twelve parts,
and must not grow once the store has its working size.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple

from vtoken import InvalidToken, IssuedToken, Subject, TokenManager
from vtoken_backends.sqlite import SQLiteBackend

_PARTS: Final = 12
_SPEED: Final = 12
_CONCURRENCY: Final = 64
_START: Final = datetime(1970, 1, 1, tzinfo=UTC)
_SETTLED: Final = 4
"""Parts until the store has its working size."""


class _Part(NamedTuple):
    """What one process did in one part of the hour. Latencies in milliseconds, memory in MiB."""

    issued: int
    used: int
    refused: int
    purged: int
    seconds: float
    median: float
    p99: float
    memory: float
    file: float


class _Load:
    def __init__(self, path: Path, tokens: int, number: int, purges: bool) -> None:
        self._path = path
        self._tokens = tokens
        self._number = number
        self._purges = purges
        self._issued = 0
        self._latencies: list[float] = []
        self._counts = {"used": 0, "refused": 0, "purged": 0}
        self._manager = TokenManager(SQLiteBackend(path, check="never"), clock=self._clock)

    def _clock(self) -> datetime:
        return _START + timedelta(seconds=_SPEED * time.time())  # the same in both processes

    async def run(self) -> None:
        async with self._manager:
            purging = asyncio.create_task(self._purge()) if self._purges else None
            for part in range(1, _PARTS + 1):
                started, before = time.perf_counter(), self._issued
                until = self._tokens * part // _PARTS
                await asyncio.gather(*(self._client(until, n) for n in range(_CONCURRENCY)))
                print(
                    json.dumps(self._part(self._issued - before, time.perf_counter() - started)), flush=True
                )
            if purging is not None:
                purging.cancel()
                await asyncio.wait([purging])

    async def _client(self, until: int, number: int) -> None:
        chance = random.Random(f"{self._number} {number} {until}")  # noqa: S311  # the mix
        while self._issued < until:
            self._issued += 1
            user = Subject("auth.user", f"{self._number}-{chance.randrange(self._tokens)}")
            token = await self._issue(user)
            fate = chance.random()
            if fate < 0.6:  # the others are left to expire
                await self._use(user, token.key)
            if fate < 0.1:
                await self._use(user, token.key)  # a second time
            elif fate > 0.9:
                await self._use(user, "wrong")

    async def _issue(self, user: Subject) -> IssuedToken:
        started = time.perf_counter()
        token = await self._manager.deactivate_and_create(user, "reset", expiration_in_minutes=10)
        self._latencies.append(time.perf_counter() - started)
        return token

    async def _use(self, user: Subject, key: str) -> None:
        started = time.perf_counter()
        try:
            await self._manager.consume(user, "reset", key)
            self._counts["used"] += 1
        except InvalidToken:
            self._counts["refused"] += 1
        self._latencies.append(time.perf_counter() - started)

    async def _purge(self) -> None:
        """Again and again, beside the clients."""
        while True:
            purged = await self._manager.purge()
            self._counts["purged"] += purged  # another part may have begun meanwhile, with counts of its own
            await asyncio.sleep(0.1)

    def _part(self, issued: int, seconds: float) -> _Part:
        latencies = sorted(self._latencies)
        self._latencies.clear()
        counts, self._counts = self._counts, dict.fromkeys(self._counts, 0)
        return _Part(
            issued,
            counts["used"],
            counts["refused"],
            counts["purged"],
            seconds,
            1000 * statistics.median(latencies),
            1000 * latencies[len(latencies) * 99 // 100],
            _memory(),
            sum(file.stat().st_size for file in self._path.parent.iterdir()) / 2**20,
        )


def _memory() -> float:
    """MiB that the process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def load(long: bool) -> None:
    """Two processes, of which one purges."""
    tokens = 500_000 if long else 1_500
    with tempfile.TemporaryDirectory(prefix="vtoken-faults-") as directory:
        path = Path(directory) / "tokens.db"
        workers = [
            subprocess.Popen(
                [sys.executable, "-m", __name__, path, str(tokens), str(number)],
                cwd=Path(__file__).parents[2],
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(2)
        ]
        outputs = [worker.communicate()[0] for worker in workers]
        assert [worker.returncode for worker in workers] == [0, 0]
        parts = [[_Part(*json.loads(line)) for line in output.splitlines()] for output in outputs]
    for number, lines in enumerate(parts):
        print(
            f"process {number}: part issued used refused purged seconds median_ms p99_ms memory_MiB files_MiB"
        )
        for place, part in enumerate(lines, 1):
            numbers = " ".join(f"{value:.1f}" if isinstance(value, float) else str(value) for value in part)
            print(f"{place:3} {numbers}")
        _judge(lines, tokens, long)
    assert sum(part.purged for part in itertools.chain(*parts)) > 0, "nothing was purged"


def _judge(parts: list[_Part], tokens: int, long: bool) -> None:
    assert sum(part.issued for part in parts) == tokens
    assert sum(part.used for part in parts) > tokens / 2
    if not long:  # parts of a second are no measure
        return
    early, late = parts[_SETTLED : _SETTLED + 4], parts[_SETTLED + 4 :]
    memory = statistics.median(p.memory for p in late) / statistics.median(p.memory for p in early)
    latency = statistics.median(p.median for p in late) / statistics.median(p.median for p in early)
    files = statistics.median(p.file for p in late) / statistics.median(p.file for p in early)
    print(f"parts {_SETTLED + 5} to {_PARTS} against {_SETTLED + 1} to {_SETTLED + 4}:", end=" ")
    print(f"memory x {memory:.2f}, median latency x {latency:.2f}, files x {files:.2f}")
    assert memory < 1.1, "memory grows"
    assert latency < 1.5, "latency grows"
    assert files < 1.3, "the files grow"


if __name__ == "__main__":
    store, count, process = sys.argv[1:]
    asyncio.run(_Load(Path(store), int(count), int(process), process == "0").run())
