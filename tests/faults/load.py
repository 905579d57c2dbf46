"""Actors on a store, and what they saw of a fault."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

from vtoken import TokenManager
from vtoken.backend import TokenBackend

from .actors import Actor, Notebook, Side, line
from .notes import fixed_clock, read_notes, violations

ACTORS: Final = 6
"""On each way."""
RECOVERED: Final = 12
"""So many acknowledged steps on each way show that the store works again."""
PATIENCE: Final = 90
"""Seconds after which something hangs."""


class Tally(Notebook):
    """The notes of one way's actors, in memory with those of the others', and how it went."""

    def __init__(self, lines: list[bytes], numbers: Iterator[int]) -> None:
        super().__init__(numbers)
        self._lines = lines
        self._latest: float | None = None
        self._news = asyncio.Event()
        self.counts: Counter[str] = Counter()
        """How many steps have begun (``n``), were ``done``, ``unknown``, ``failed`` and ``refused``."""
        self.longest_gap = 0.0
        """Seconds, between two steps that were acknowledged."""

    def write(self, note: dict[str, object]) -> None:
        self._lines.append(line(note))
        if "again" not in note:  # it is the second answer to one step
            self.counts[next(iter(note))] += 1

    def acknowledge(self, note: dict[str, object]) -> None:
        self.write(note)
        now = time.monotonic()
        self.longest_gap = max(self.longest_gap, now - (self._latest or now))
        self._latest = now
        self._news.set()

    async def acknowledged(self, steps: int) -> None:
        """Wait until so many more steps were acknowledged."""
        wanted = self.counts["done"] + steps
        while self.counts["done"] < wanted:
            self._news.clear()
            await self._news.wait()

    def begin_anew(self) -> None:
        """From now on there is a load again."""
        self._latest = None

    @property
    def under_way(self) -> int:
        counts = self.counts
        return counts["n"] - counts["done"] - counts["unknown"] - counts["failed"] - counts["refused"]

    def __str__(self) -> str:
        counts = self.counts
        return (
            f"{counts['done']} steps acknowledged, {counts['unknown']} unknown, {counts['failed']} denied,"
            f" {counts['refused']} rivals refused, longest gap {self.longest_gap:.1f} s"
        )


class Load:
    """Actors on one store, on each way that leads to it. As an async context manager it has the managers
    open.

    Args:
        ways: by their names, what makes a backend, perhaps one with a planted bug.
        sound: makes a backend without one, which tells afterwards what is stored.
    """

    def __init__(
        self, ways: Mapping[str, Callable[[], TokenBackend]], sound: Callable[[], TokenBackend]
    ) -> None:
        self._lines: list[bytes] = []
        self._numbers = itertools.count(1)
        self._ways, self._sound = ways, sound
        self._stack = AsyncExitStack()
        self.sides: dict[str, Side] = {}
        self.others: dict[str, TokenManager] = {}
        """As of another process, which is idle."""
        self.strikes = 0
        self.under_way = 0
        """Steps that were under way when a fault struck."""

    async def __aenter__(self) -> Load:
        for way, make in self._ways.items():
            manager, other = (TokenManager(make(), clock=fixed_clock) for _ in range(2))
            self.sides[way] = Side(manager, Tally(self._lines, self._numbers))
            self.others[way] = other
            await self._stack.enter_async_context(manager)
            await self._stack.enter_async_context(other)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def tallies(self) -> dict[str, Tally]:
        return {way: side.notebook for way, side in self.sides.items() if isinstance(side.notebook, Tally)}

    async def strike(self, steps: int, fault: Callable[[], Awaitable[None]]) -> None:
        """Have a fault strike amid steps, and then go on with other subjects until each way works again.

        Args:
            steps: so many are acknowledged on each way before.
            fault: has struck when it returns; calls :meth:`struck` when it does.
        """
        self.strikes += 1
        for tally in self.tallies.values():
            tally.begin_anew()
        async with asyncio.timeout(PATIENCE):
            async with self._playing(f"{self.strikes} before") as over:
                await self.acknowledged(steps)
                await fault()
                over.set()  # more steps with the same subjects might hide what the fault did
                async with self._playing(f"{self.strikes} after"):
                    await self.acknowledged(RECOVERED)

    def struck(self) -> None:
        """Count what is under way now."""
        self.under_way += sum(tally.under_way for tally in self.tallies.values())

    @asynccontextmanager
    async def _playing(self, subjects: str) -> AsyncGenerator[asyncio.Event]:
        """Actors, who take their last step once the event is set, at the latest when the block ends."""
        over = asyncio.Event()

        async def play(actor: Actor) -> None:
            while not over.is_set():
                await actor.act()

        async with asyncio.TaskGroup() as tasks:
            for seed, (way, side) in enumerate(self.sides.items()):
                rivals = [side, *(other for other in self.sides.values() if other is not side)]
                for n in range(ACTORS):
                    actor = Actor(
                        rivals,
                        f"{subjects} {way} {n}",
                        100 * self.strikes + 10 * seed + n,
                        f"{subjects} shared",
                    )
                    tasks.create_task(play(actor))
            yield over
            over.set()

    async def acknowledged(self, steps: int) -> None:
        """Wait until so many more steps were acknowledged on each way."""
        await asyncio.gather(*(tally.acknowledged(steps) for tally in self.tallies.values()))

    async def violations(self) -> list[str]:
        """Hold the store to what was noted since the last time."""
        lines = [*self._lines]
        self._lines.clear()
        assert not any(tally.under_way for tally in self.tallies.values())
        return await violations(self._sound(), read_notes(lines))

    def __str__(self) -> str:
        return "\n".join(f"  {way}: {tally}" for way, tally in self.tallies.items())


class Figures:
    """What a round did, and what it found.

    Args:
        title: what its fault is.
        load: who was struck by it.
    """

    def __init__(self, title: str, load: Load) -> None:
        self._title, self._load = title, load
        self.fired = 0
        self.more = ""
        self.violations: list[str] = []

    async def check(self) -> None:
        """Hold the store to the notes of the actors."""
        self.violations += await self._load.violations()

    def __str__(self) -> str:
        load = self._load
        head = f"{self.fired} {self._title}, {load.under_way} steps under way{self.more}"
        return f"{head}: {len(self.violations)} violations\n{load}"

    def report(self) -> None:
        """Print them. Raises: AssertionError: there is a violation, or the fault never fired."""
        print(self, flush=True)
        assert self.fired > 0, "the fault did not fire"
        assert self._load.under_way >= self._load.strikes, "nothing was under way"
        assert not self.violations, self.violations[:5]

    def report_planted(self, bug: str) -> None:
        """Print what a planted bug led to. Raises: AssertionError: it was not found."""
        kinds = sorted({violation.partition(":")[0] for violation in self.violations})
        print(
            f"planted bug ({bug}): {self.fired} {self._title}: {len(self.violations)} violations: {kinds}",
            flush=True,
        )
        assert self.violations, "the planted bug was not found"
