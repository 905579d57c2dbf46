"""Actors on a MongoDB store, with both drivers at once, and what they saw of a fault."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, Final

from vtoken import InvalidToken, Subject, TokenManager, VerificationToken
from vtoken.errors import BackendUnavailable, OutcomeUnknown
from vtoken_backends.mongodb import MongoDBBackend

from .actors import Actor, Notebook, Side, line
from .notes import SLUG, TYPE, fixed_clock, read_notes, violations

DRIVERS: Final = ("pymongo", "motor")
ACTORS: Final = 6
"""With each driver."""
RECOVERED: Final = 12
"""So many acknowledged steps with each driver show that the store works again."""
PATIENCE: Final = 90
"""Seconds after which something hangs."""


class Tally(Notebook):
    """The notes of one driver's actors, in memory with those of the other's, and how it went."""

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
    """Actors with each driver on one store. As an async context manager it has the managers open.

    Args:
        url: of the store.
        make: the backend's class, or one with a planted bug.
        **options: of the backend.
    """

    def __init__(self, url: str, make: type[MongoDBBackend] = MongoDBBackend, **options: Any) -> None:
        self._lines: list[bytes] = []
        self._numbers = itertools.count(1)
        self._url = url
        self._make, self._options = make, options
        self._stack = AsyncExitStack()
        self.sides: dict[str, Side] = {}
        self.others: dict[str, TokenManager] = {}
        """As of another process, which is idle."""
        self.strikes = 0
        self.under_way = 0
        """Steps that were under way when a fault struck."""

    async def __aenter__(self) -> Load:
        for driver in DRIVERS:
            manager, other = self._manager(driver), self._manager(driver)
            self.sides[driver] = Side(manager, Tally(self._lines, self._numbers))
            self.others[driver] = other
            await self._stack.enter_async_context(manager)
            await self._stack.enter_async_context(other)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def _manager(self, driver: str) -> TokenManager:
        backend = self._make.from_url(self._url, driver=driver, **self._options)
        return TokenManager(backend, clock=fixed_clock)

    @property
    def tallies(self) -> dict[str, Tally]:
        return {d: side.notebook for d, side in self.sides.items() if isinstance(side.notebook, Tally)}

    async def strike(self, steps: int, fault: Callable[[], Awaitable[None]]) -> None:
        """Have a fault strike amid steps, and then go on with other subjects until each driver works again.

        Args:
            steps: so many are acknowledged with each driver before.
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
            for seed, (driver, side) in enumerate(self.sides.items()):
                rivals = [side, *(other for other in self.sides.values() if other is not side)]
                for n in range(ACTORS):
                    actor = Actor(
                        rivals,
                        f"{subjects} {driver} {n}",
                        100 * self.strikes + 10 * seed + n,
                        f"{subjects} shared",
                    )
                    tasks.create_task(play(actor))
            yield over
            over.set()

    async def acknowledged(self, steps: int) -> None:
        """Wait until so many more steps were acknowledged with each driver."""
        await asyncio.gather(*(tally.acknowledged(steps) for tally in self.tallies.values()))

    async def violations(self) -> list[str]:
        """Hold the store to what was noted since the last time."""
        lines = [*self._lines]
        self._lines.clear()
        assert not any(tally.under_way for tally in self.tallies.values())
        return await violations(MongoDBBackend.from_url(self._url), read_notes(lines))

    def __str__(self) -> str:
        return "\n".join(f"  {driver}: {tally}" for driver, tally in self.tallies.items())


class Impatient:
    """Uses tokens, and before there is an answer uses them once more, by the same names and from another
    process.

    Args:
        load: whose notes it writes to.
        driver: of both.
    """

    def __init__(self, load: Load, driver: str) -> None:
        self._manager, self._notebook = load.sides[driver]
        self._other = load.others[driver]
        self._subjects = [f"{load.strikes} impatient {driver} {n}" for n in range(8)]
        self._tokens: list[VerificationToken] = []
        self._uses: list[asyncio.Task[VerificationToken | int | None]] = []
        self._again: list[asyncio.Task[bool]] = []
        self._numbers: dict[str, int] = {}

    async def issue(self) -> None:
        """Issue its tokens."""
        tokens = await asyncio.gather(*map(self._issued, self._subjects))
        self._tokens = [token for token in tokens if isinstance(token, VerificationToken)]

    async def _issued(self, subject: str) -> VerificationToken | int | None:
        def act(number: int) -> Awaitable[VerificationToken]:
            obj, data = Subject(TYPE, subject), {"n": number}
            return self._manager.deactivate_and_create(obj, SLUG, extra_data=data)

        return await self._notebook.step("issue", subject, act)

    def use(self) -> None:
        """Begin to use them, all at once."""
        self._uses = [
            asyncio.ensure_future(
                self._notebook.step("use", token.object_id, partial(self._use, token), token.id)
            )
            for token in self._tokens
        ]

    async def _use(self, token: VerificationToken, number: int) -> VerificationToken:
        self._numbers[token.id] = number
        return await _consume(self._manager, token, number)

    async def use_again(self) -> int:
        """Use them once more, all at once, and return how many got an answer soon."""
        self._again = [asyncio.ensure_future(self._used_again(token)) for token in self._tokens]
        done, _ = await asyncio.wait(self._again, timeout=0.5)
        return sum(again.result() for again in done)

    async def _used_again(self, token: VerificationToken) -> bool:
        number = self._numbers[token.id]
        try:
            await _consume(self._other, token, number)
        except (OutcomeUnknown, BackendUnavailable, InvalidToken):
            return False
        self._notebook.write({"done": number, "again": True})
        return True

    async def end(self) -> None:
        """Wait until all have an answer."""
        await asyncio.gather(*self._uses, *self._again)


async def _consume(manager: TokenManager, token: VerificationToken, number: int) -> VerificationToken:
    assert token.key is not None
    subject = Subject(TYPE, token.object_id)
    return await manager.consume(subject, SLUG, token.key, consume_id=str(number))


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
