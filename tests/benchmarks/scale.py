"""Large stores: what an operation costs beside a thousand tokens and a million, and a purge under load.

The stores are filled by the store's own driver with copies of one token that vtoken wrote; the keys of the
copies are known.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import random
import shutil
import sqlite3
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Final, NamedTuple

from vtoken import Subject, TokenManager
from vtoken.keys import Keyring

from . import sqlite
from .cells import opened
from .contender import CONTENT_TYPE, SLUG, Op, now_ms
from .figures import Figure, ratio
from .machine import bytes_written, load_average
from .ours import VToken

SMALL: Final = 1000
_FIRST: Final = "the first"
_OPERATIONS: Final = 512
_TASKS: Final = 256
_keyring: Final = Keyring(None)


class Copy(NamedTuple):
    """What is different in a copy of a token."""

    id: str
    object_id: str
    digest: bytes


def copies(start: int, count: int) -> Iterator[Copy]:
    """The tokens of objects ``start`` and following; the key of object ``n`` is :func:`key_of` it."""
    for number in range(start, start + count):
        yield Copy(f"{number + 1:016x}", object_of(number), _keyring.link(key_of(number)).value)


def object_of(number: int) -> str:
    """The id of an object of the large store."""
    return f"user-{number}"


def key_of(number: int) -> str:
    """The key of its token."""
    return f"benchmark-key-{number:018}"


class SQLiteFile:
    """A file of vtoken's that is filled past it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    async def make(self, count: int) -> None:
        """A new file with so many valid tokens."""
        async with TokenManager.from_url(f"sqlite:///{self.path}") as manager:
            await manager.issue(Subject(CONTENT_TYPE, _FIRST), SLUG)
        self.add(0, count)

    def add(self, start: int, count: int, ends_at: int | None = None) -> None:
        """Add valid tokens, or ones that expired."""
        with contextlib.closing(sqlite3.connect(self.path)) as database:
            database.row_factory = sqlite3.Row
            sql = "SELECT * FROM vtoken_tokens WHERE object_id = ?"
            first = dict(database.execute(sql, (_FIRST,)).fetchone())
            sql = "SELECT * FROM vtoken_keys WHERE token = ?"
            first_key = dict(database.execute(sql, (first["id"],)).fetchone())
            first |= {} if ends_at is None else {"expires_at": ends_at, "ends_at": ends_at}
            # Plain inserts, which set off no trigger.
            for table, row in ("vtoken_tokens", first), ("vtoken_keys", first_key):
                marks = ", ".join(f":{name}" for name in row)
                sql = f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})"  # noqa: S608  # the tables' own
                rows = (row | _values(copy) for copy in copies(start, count))
                database.executemany(sql, rows)
            database.commit()
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    @contextlib.asynccontextmanager
    async def copy(self) -> AsyncGenerator[VToken]:
        """vtoken on a copy of the file."""
        folder = self.path.with_suffix(".copy")
        folder.mkdir()
        shutil.copyfile(self.path, folder / "tokens.db")
        try:
            async with opened(sqlite.vtoken(folder)) as contender:
                yield contender
        finally:
            shutil.rmtree(folder)


def _values(copy: Copy) -> dict[str, object]:
    """What is different in the rows of a copy, of the token and of its key."""
    number = int(copy.id, 16)
    return {
        "id": number,
        "object_id": copy.object_id,
        "digests": copy.digest,
        "digest": copy.digest,
        "token": number,
    }


Fresh = Callable[[], AbstractAsyncContextManager[VToken]]


async def growth(
    store: str, small: Fresh, large: VToken, stored: int, rounds: int, *, again: int = 0
) -> list[Figure]:
    """What an operation costs on a large store in relation to a small one, both in turn.

    Args:
        store: its name.
        small: a store of :data:`SMALL` tokens, fresh for each round.
        large: one that stays, with ``stored`` of them.
        stored: how many.
        rounds: how many.
        again: how often it was measured on the large store before, whose tokens are used by that.
    """
    costs: dict[str, tuple[list[float], list[float]]] = {
        kind: ([], []) for kind in ("issue", "consume", "check")
    }
    unused = list(range(stored))
    random.Random(stored).shuffle(unused)  # noqa: S311  # the same order in each run
    del unused[len(unused) - again * (rounds + 1) * _OPERATIONS :]
    for number in range(rounds + 1):  # the first one is the warm-up
        async with small() as fresh:
            of_small = random.Random(number).sample(range(SMALL), _OPERATIONS)  # noqa: S311  # likewise
            of_large = [unused.pop() for _ in range(_OPERATIONS)]
            both = [(large, of_large, 0), (fresh, of_small, 1)]
            for contender, numbers, which in both if number % 2 else reversed(both):
                for kind, microseconds in (await _costs(contender, numbers, number)).items():
                    if number:
                        costs[kind][which].append(microseconds)
    return [
        ratio(
            f"{store}: {kind} at {_TASKS} tasks, cost at {stored:,} stored tokens in relation to {SMALL:,}"
            f" ({median(at_large):.1f} and {median(at_small):.1f} us)",
            {"large": at_large, "small": at_small},
            1.3,
            at_least=False,
            load=load_average(),
        )
        for kind, (at_large, at_small) in costs.items()
    ]


async def _costs(contender: VToken, numbers: Sequence[int], number: int) -> dict[str, float]:
    """Microseconds for each operation: checks, then uses of the same tokens, then issues to new objects."""
    runs = {
        "check": [Op("check", object_of(n), key_of(n)) for n in numbers],
        "consume": [Op("consume", object_of(n), key_of(n)) for n in numbers],
        "issue": [Op("issue", f"new-{number}-{n}") for n in numbers],
    }
    found: dict[str, float] = {}
    for kind, ops in runs.items():
        gc.collect()
        run = await contender.run(ops, _TASKS)
        if not all(run.answers):
            raise RuntimeError(f"an operation failed: {kind}")
        found[kind] = run.seconds / len(ops) * 1e6
    return found


async def sqlite_written(folder: Path, stored: int = 4_000, operations: int = 1_500) -> list[Figure]:
    """Bytes that a lone operation writes on average, its share of the checkpoints included: there have to be
    enough of them for several checkpoints."""
    file = SQLiteFile(folder / "written.db")
    await file.make(stored)
    found: list[Figure] = []
    for what, bound, first, kind in (
        ("first issue", 16_000, stored, "issue"),
        ("re-issue", 24_000, 0, "issue"),
        ("consume", 8_000, 0, "consume"),
    ):
        dice = random.Random(stored)  # noqa: S311  # the same order in each run
        numbers = dice.sample(range(first, first + stored), operations)
        async with file.copy() as contender:
            before = bytes_written()
            for number in numbers:
                if kind == "issue":
                    await contender.issue(object_of(number))
                elif not await contender.consume(object_of(number), key_of(number)):
                    raise RuntimeError("a valid token was refused")
            after = bytes_written()
        if before is not None and after is not None:
            title = f"sqlite: bytes written by a lone {what}, {stored:,} stored"
            values = {"vtoken": [(after - before) / operations]}
            found.append(Figure(title, "bytes", values, bound, load=load_average()))
    return found


async def sqlite_growth(folder: Path, stored: int, rounds: int) -> list[Figure]:
    """As :func:`growth`, on SQLite."""
    small, large = SQLiteFile(folder / "small.db"), SQLiteFile(folder / "large.db")
    await small.make(SMALL)
    await large.make(stored)
    async with large.copy() as contender:
        return await growth("sqlite", small.copy, contender, stored, rounds)


class Beside(NamedTuple):
    """What a consumer got done while something else went on."""

    longest_wait: float
    """Milliseconds."""
    rate: float
    """Uses a second."""


async def sqlite_purge(folder: Path, stored: int, expired: int, rounds: int) -> list[Figure]:
    """How long a consumer waits at most while the expired tokens are purged, how much it gets done, and both
    without a purge."""
    file = SQLiteFile(folder / "purged.db")
    await file.make(stored - expired)
    purging: list[Beside] = []
    alone: list[Beside] = []
    taken: list[float] = []
    numbers = itertools.count()
    async with TokenManager.from_url(f"sqlite:///{file.path}") as manager:
        for number in range(rounds):
            file.add(stored + number * expired, expired, now_ms() - 60_000)
            gc.collect()
            async with _consuming(manager, numbers, purging):
                begun = perf_counter()
                purged = await manager.purge()
                taken.append(perf_counter() - begun)
            if purged < expired:
                raise RuntimeError(f"{purged} tokens were purged")
            async with _consuming(manager, numbers, alone):
                await asyncio.sleep(min(taken[-1], 5))
    title = f"sqlite: purge of {expired:,} expired of {stored:,}"
    waits = {
        "vtoken, purging": [one.longest_wait for one in purging],
        "vtoken, alone": [one.longest_wait for one in alone],
    }
    rates = {"purging": [one.rate for one in purging], "alone": [one.rate for one in alone]}
    load = load_average()
    return [
        Figure(f"{title}, longest wait of a consumer beside it", "ms", waits, 30, load=load),
        ratio(
            f"{title}, rate of a consumer beside it to that of one alone",
            rates,
            0.3,
            at_least=True,
            load=load,
        ),
        Figure(title, "s", {"vtoken": taken}, load=load),
    ]


@contextlib.asynccontextmanager
async def _consuming(
    manager: TokenManager, numbers: Iterator[int], found: list[Beside]
) -> AsyncGenerator[None]:
    """One use after the other, while a block runs."""
    stop = asyncio.Event()

    async def consume() -> Beside:
        waits: list[float] = []
        while not stop.is_set():
            number = next(numbers)
            begun = perf_counter()
            await manager.consume(Subject(CONTENT_TYPE, object_of(number)), SLUG, key_of(number))
            waits.append(perf_counter() - begun)
        return Beside(max(waits) * 1e3, len(waits) / sum(waits))

    consumer = asyncio.create_task(consume())
    yield
    stop.set()
    found.append(await consumer)
