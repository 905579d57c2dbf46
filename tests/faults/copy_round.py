"""``vtoken copy`` of many tokens from SQLite to MongoDB and back, interrupted and started again."""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.migrate_tools import fill, of_every_kind, opened, plain
from tests.servers import fresh_database, start_mongod
from vtoken.backend import Inserted, InsertMode, InsertResult, Spend, StoredToken
from vtoken.migrate import copy, pages
from vtoken.migrate.stores import PAGE
from vtoken_backends.memory import MemoryBackend

_ROOT: Final = Path(__file__).parents[2]
_INTERRUPTED: Final = ((0.25, signal.SIGKILL), (0.5, signal.SIGINT), (1.25, signal.SIGKILL))
"""After which part of the tokens, and how; what is past 1 is in the middle of the comparison."""
_GROWTH: Final = 1.25
"""How much more memory a run may have had at its end than at a quarter of it."""


class _Run(NamedTuple):
    """What one process came to. Memory: its peak in MiB at a quarter, a half and the end of its course."""

    done: int
    status: int
    answer: dict[str, Any]
    seconds: float
    memory: tuple[float, float, float]


def there_and_back(long: bool) -> None:
    """The copies end with equal counts and digests, and memory stays flat."""
    with start_mongod("copy") as server:
        copy_both_ways(server.url, 1_000_000 if long else 3_000)


def copy_both_ways(server_url: str, tokens: int) -> None:
    """Copy an SQLite file to MongoDB and that to another file, each interrupted three times."""
    with tempfile.TemporaryDirectory(prefix="vtoken-copy-") as folder, fresh_database(server_url) as server:
        # What a power loss would cost is not what is tried here.
        one, two = (f"sqlite:///{folder}/{name}.db?synchronous=normal" for name in ("one", "two"))
        asyncio.run(_fill(one, tokens))
        there = _interrupted(one, server, tokens)
        back = _interrupted(server, two, tokens)
        found = [asyncio.run(_listed(url)) for url in (one, server, two)]
    print(f"listed afterwards: {found[0][0]:,} tokens, SHA-256 {found[0][1][:16]}...")
    assert found == [(tokens, found[0][1])] * 3, found
    assert there["source_digest"] == back["destination_digest"]
    bitten = [asyncio.run(_found(planted)) for planted in (LeavesOneOut, AltersOne)]
    print(f"planted bugs (a token left out, one altered): {sum(bitten)} of 2 found")
    assert all(bitten), "a planted bug was not found"


def _interrupted(source: str, destination: str, tokens: int) -> dict[str, Any]:
    """Copy with interruptions, and return the answer of the run that came to the end."""
    kinds = " to ".join(url.partition(":")[0] for url in (source, destination))
    before = 0
    seconds = 0.0
    for part, number in _INTERRUPTED:
        run = _run(source, destination, tokens, round(part * tokens), number)
        assert run.status == (130 if number is signal.SIGINT else -signal.SIGKILL), run
        print(f"{kinds}: {signal.Signals(number).name} at {run.done:,} after {run.seconds:.1f} s")
        seconds += run.seconds
        before = max(before, min(run.done, tokens))
    run = _run(source, destination, tokens)
    answer = run.answer
    assert run.status == 0, run
    assert answer["complete"]
    assert (answer["tokens"], answer["missing"], answer["different"], answer["others"]) == (tokens, 0, 0, 0)
    assert answer["inserted"] + answer["skipped"] == tokens
    assert answer["skipped"] >= before, "what was copied before the interruptions was not there any more"
    seconds += run.seconds
    quarter, half, end = run.memory
    print(f"{kinds}: {tokens:,} tokens in 4 runs, {seconds:.0f} s, {tokens / seconds:,.0f} tokens/s in all;")
    print(f"  the last one: {run.seconds:.0f} s, memory {quarter:.0f}, {half:.0f}, {end:.0f} MiB")
    assert end <= _GROWTH * quarter, "memory grew"
    return answer


def _run(source: str, destination: str, tokens: int, *interruption: int) -> _Run:
    """Run the command to its end, or until so many tokens are done and it gets a signal of that number."""
    numbers = (min(PAGE, tokens // 15), *interruption)
    began = time.monotonic()
    done = 0
    answer: dict[str, Any] = {}
    memory: dict[int, int] = {}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.faults.copy_worker", source, destination, *map(str, numbers)],
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if interruption else None,
        text=True,
    ) as worker:
        assert worker.stdout is not None
        for line in worker.stdout:
            if line.startswith("{"):
                answer = json.loads(line)
                continue
            done, most = map(int, line.split())
            memory[min(4 * done // (2 * tokens), 4)] = most
    quarter, half, last = (memory.get(part, 0) / 1024 for part in (1, 2, 4))
    return _Run(done, worker.returncode, answer, time.monotonic() - began, (quarter, half, last))


async def _fill(url: str, tokens: int) -> None:
    async with opened(url) as backend:
        await fill(backend, of_every_kind(tokens))


async def _listed(url: str) -> tuple[int, str]:
    """How many tokens a store lists, and the digest of all of them: a look of its own, past the command's."""
    count, sha = 0, hashlib.sha256()
    async with opened(url) as backend:
        async for page in pages(backend):
            count += len(page)
            sha.update("".join(f"{plain(stored)!r}\n" for stored in page).encode())
    return count, sha.hexdigest()


# Planted bugs ------------------------------------------------------------------------------------

_VICTIM: Final = 77


class LeavesOneOut(MemoryBackend):
    """Says that it has stored a token, and has not."""

    async def insert(
        self,
        token: StoredToken,
        mode: InsertMode,
        *,
        keep_until: int = 0,
        wanted_until: int = 0,
        also_taken: tuple[bytes, ...] = (),
        spends: tuple[Spend, ...] = (),
    ) -> Inserted:
        if _is_victim(token):
            return Inserted(InsertResult.INSERTED, token)
        return await super().insert(token, mode)


class AltersOne(MemoryBackend):
    """Stores a token that can be used once more."""

    async def insert(
        self,
        token: StoredToken,
        mode: InsertMode,
        *,
        keep_until: int = 0,
        wanted_until: int = 0,
        also_taken: tuple[bytes, ...] = (),
        spends: tuple[Spend, ...] = (),
    ) -> Inserted:
        if _is_victim(token):
            token = token._replace(max_uses=7)
        return await super().insert(token, mode)


def _is_victim(token: StoredToken) -> bool:
    return token.object_id == f"ü{_VICTIM}"


async def _found(planted: type[MemoryBackend]) -> bool:
    source, destination = MemoryBackend(), planted()
    await source.open()
    await destination.open()
    await fill(source, of_every_kind(200))
    copied = await copy(source, destination)
    await source.close()
    await destination.close()
    return not copied.is_complete and copied.missing + copied.different == 1
