"""The memory backend: microseconds of processor time, bytes, and what a million tokens change about them.

It runs in a process of its own, so that what others have left in the heap is not measured:
``python -m tests.benchmarks.memory TOKENS ROUNDS`` prints its figures as JSON.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from time import process_time
from typing import Any, Final

from vtoken import Subject, TokenManager
from vtoken.backend import Match

from .cells import Cell, Entry, opened
from .contender import CONTENT_TYPE, SLUG, Contender, Row
from .figures import Figure, ratio
from .machine import load_average
from .ours import VToken

_SMALL: Final = 1000
_OPERATIONS: Final = 1000
_PURGED: Final = 1000
_DAY: Final = 24 * 60.0
_RIVALS: Final = {
    "exists_valid": ("get", 1.3),
    "consume": ("get and delete", 0.8),
    "issue": ("set", 0.6),
}
"""What litestar's MemoryStore does instead, and how many times as fast vtoken is to be."""

_Token = tuple[Subject, str]
_Do = Callable[[Subject, str], Awaitable[object]]


def cells() -> Iterable[tuple[Cell, list[Entry]]]:
    """Not for their rates: what is stored after them is checked as everywhere."""
    for tasks in (1, 256):
        yield Cell("memory", "mix", tasks), [Entry("vtoken", lambda: opened(_contender()))]


def _contender() -> Contender:
    async def look() -> list[Row]:  # there is no other way to look into a process's memory
        found = await contender.manager.backend.find(Match(), sys.maxsize)
        return [Row(token.object_id, key.digest, token.is_active) for token in found for key in token.keys]

    contender = VToken("memory://", look)
    return contender


def figures(tokens: int, rounds: int) -> list[Figure]:
    """What a fresh process measures."""
    command = [sys.executable, "-m", __name__, str(tokens), str(rounds)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return [Figure(**data) for data in json.loads(done.stdout)]


def absent() -> list[str]:
    """Who can't take part here, and why."""
    return (
        [] if find_spec("litestar") else ['litestar MemoryStore: not installed (pip install "vtoken[bench]")']
    )


class _Clock:
    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now


async def _measure(tokens: int, rounds: int) -> list[Figure]:
    clock = _Clock()
    before = _resident()
    large = TokenManager.from_url("memory://", clock=clock)
    async with large:
        known = await _fill_large(large, tokens, rounds)
        gc.collect()
        footprint = Figure(
            f"memory: bytes per token, {tokens:,} stored",
            "bytes",
            {"vtoken": [(_resident() - before) / tokens]},
            600,
        )
        # Purged first: what is consumed later would be purged as well.
        purge = await _purges(large, clock, rounds)
        found = [*await _small_and_large(large, known, rounds, tokens), footprint, purge]
    return [replace(figure, load=load_average()) for figure in found]


def _subject(number: int) -> Subject:
    return Subject(CONTENT_TYPE, f"user-{number}")


async def _fill_large(manager: TokenManager, tokens: int, rounds: int) -> list[_Token]:
    """So many tokens, of which some expire early: a batch for each round of purging. Some keys are kept."""
    early = _PURGED * rounds
    for number in range(early):
        minutes = 1 + number / _PURGED
        await manager.issue(_subject(number), SLUG, expires_in=minutes)
    every = max((tokens - early) // (_OPERATIONS * (rounds + 1)), 1)
    known: list[_Token] = []
    for number in range(early, tokens):
        subject = _subject(number)
        # Their ends are spread over a day, as those of a running application are.
        minutes = _DAY * (1 + number / tokens)
        issued = await manager.issue(subject, SLUG, expires_in=minutes)
        if number % every == 0:
            known.append((subject, issued.key))
    random.Random(tokens).shuffle(known)  # noqa: S311  # the same order in each run
    return known


async def _small_and_large(
    large: TokenManager, known: list[_Token], rounds: int, stored: int
) -> list[Figure]:
    costs: dict[str, dict[str, list[float]]] = {what: {str(_SMALL): [], str(stored): []} for what in _RIVALS}
    rival: dict[str, list[float]] = {what: [] for what in _RIVALS}
    taken = 0
    for number in range(rounds + 1):  # the first one is the warm-up
        async with TokenManager.from_url("memory://") as small:
            subjects = [_subject(n) for n in range(_SMALL)]
            of_small = [(s, (await small.issue(s, SLUG)).key) for s in subjects]
            of_large, taken = known[taken : taken + _OPERATIONS], taken + _OPERATIONS
            pairs = [(small, of_small, _SMALL), (large, of_large, stored)]
            for manager, its, size in pairs if number % 2 else reversed(pairs):
                for what, seconds in (await _operations(manager, its, number)).items():
                    if number:
                        costs[what][str(size)].append(seconds * 1e6)
        for what, seconds in (await _litestar([key for _, key in of_small])).items():
            if number:
                rival[what].append(seconds * 1e6)
    found = _cost_figures(costs, stored)
    for what, values in rival.items():
        if values:
            found += _rival_figures(what, costs[what][str(_SMALL)], values)
    return found


async def _operations(manager: TokenManager, tokens: Sequence[_Token], number: int) -> dict[str, float]:
    fresh = [(Subject(CONTENT_TYPE, f"fresh-{number}-{n}"), "") for n in range(len(tokens))]
    return {
        "exists_valid": await _each(lambda s, key: manager.exists_valid(s, SLUG, key), tokens),
        "consume": await _each(lambda s, key: manager.consume(s, SLUG, key), tokens),
        "issue": await _each(lambda s, _: manager.issue(s, SLUG), fresh),
    }


async def _each(do: _Do, tokens: Sequence[_Token], *, answers: bool = True) -> float:
    """Seconds for one; without ``answers`` nothing is returned that tells whether it went well."""
    gc.collect()
    begun = process_time()
    for subject, key in tokens:
        if not await do(subject, key) and answers:
            raise RuntimeError("a valid token was refused")
    return (process_time() - begun) / len(tokens)


async def _litestar(keys: Sequence[str]) -> dict[str, float]:
    """Seconds for what litestar's MemoryStore does instead; nothing where it is not installed."""
    if absent():
        return {}
    from litestar.stores.memory import MemoryStore

    store: Any = MemoryStore()
    subject = _subject(0)
    tokens = [(subject, key) for key in keys]
    day = timedelta(days=1)

    async def get_and_delete(_: Subject, key: str) -> object:
        found = await store.get(key)
        await store.delete(key)
        return found

    return {
        "issue": await _each(lambda _, key: store.set(key, b"user", expires_in=day), tokens, answers=False),
        "exists_valid": await _each(lambda _, key: store.get(key), tokens),
        "consume": await _each(get_and_delete, tokens),
    }


def _cost_figures(costs: dict[str, dict[str, list[float]]], stored: int) -> list[Figure]:
    found: list[Figure] = []
    for what, by_size in costs.items():
        found.append(Figure(f"memory: {what}", "us", {"vtoken": by_size[str(_SMALL)]}))
    for what, by_size in costs.items():
        title = f"memory: {what}, cost at {stored:,} stored tokens in relation to {_SMALL:,}"
        found.append(
            ratio(title, {"large": by_size[str(stored)], "small": by_size[str(_SMALL)]}, 1.3, at_least=False)
        )
    return found


def _rival_figures(what: str, ours: list[float], rival: list[float]) -> list[Figure]:
    method, bound = _RIVALS[what]
    return [
        Figure(f"memory: litestar MemoryStore, {method}", "us", {"litestar": rival}),
        ratio(
            f"memory: {what} is faster than litestar MemoryStore, {method}, by",
            {"litestar": rival, "vtoken": ours},
            bound,
            at_least=True,
        ),
    ]


async def _purges(manager: TokenManager, clock: _Clock, rounds: int) -> Figure:
    taken: list[float] = []
    begin = clock.now
    for number in range(rounds):
        clock.now = begin + timedelta(minutes=2 + number)
        gc.collect()
        begun = process_time()
        purged = await manager.purge()
        taken.append((process_time() - begun) * 1e3)
        if purged != _PURGED:
            raise RuntimeError(f"{purged} tokens were purged")
    return Figure(f"memory: purge of {_PURGED:,}", "ms", {"vtoken": taken}, 1)


def _resident() -> int:
    """Bytes of memory that the process has, as the system counts them."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    print(json.dumps([f.as_json() for f in asyncio.run(_measure(int(sys.argv[1]), int(sys.argv[2])))]))
