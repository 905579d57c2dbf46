"""A cell: one workload, at one number of tasks, on one store, in one situation."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from time import process_time
from typing import Final, Literal, NamedTuple, TypeVar

from . import machine, slow_disk
from .atomicity import verify
from .beside import Beside, beside
from .contender import Contender, Kind, Op, Run

Workload = Literal["issue", "check", "consume", "mix"]

MIX: Final[dict[Kind, int]] = {"check": 60, "issue": 25, "consume": 15}
_MOST_CHECKED: Final = 1000
_WARM_UP: Final = 64


@dataclass(frozen=True, slots=True)
class Cell:
    """What is measured.

    Args:
        store: ``"sqlite"``, ``"postgresql"``, ``"mongodb"``, ``"memory"`` or ``"valkey"``.
        workload: one kind of operation, or a mix of them.
        tasks: how many of the application's tasks ask at once.
        beside: what else goes on.
    """

    store: str
    workload: Workload
    tasks: int
    beside: Beside = ""

    def __str__(self) -> str:
        tasks = f"{self.tasks} task{'s' * (self.tasks > 1)}"
        situation = {
            "": "",
            "ticker": ", beside a 1 ms ticker",
            "busy loop": ", beside a 50 % busy loop",
            "slow fsync": ", 2 ms added to each fsync",
        }
        return f"{self.store} {self.workload}, {tasks}{situation[self.beside]}"


_Opened = TypeVar("_Opened", bound=Contender)


class Entry(NamedTuple):
    """A contender by its name, and how to get one with a fresh store, open."""

    name: str
    fresh: Callable[[], AbstractAsyncContextManager[Contender]]
    new_loop: Callable[[], asyncio.AbstractEventLoop] | None = None
    """Makes the event loop it runs in; None for asyncio's own."""
    keeps_ended: bool = True
    """Whether a used or replaced token is still stored."""


@asynccontextmanager
async def opened(contender: _Opened) -> AsyncGenerator[_Opened]:
    """Open a contender, and close it after the block."""
    await contender.open()
    try:
        yield contender
    finally:
        await contender.close()


class Sample(NamedTuple):
    """What one round has shown of one contender."""

    rate: float
    """Operations per second."""
    p50: float
    """Seconds that every second operation took longer than."""
    p99: float
    """Seconds that one operation in a hundred took longer than."""
    processor: float
    """Seconds of processor time for each operation, of all threads of the application's process."""
    written: float | None
    """Bytes that the process wrote to files for each operation, where the store is in the process and the
    system counts them."""
    tick_p99: float | None
    """Seconds that one tick in a hundred was later than, where there was a ticker."""
    syncs: float | None
    """Calls of fsync for each operation, where they are counted."""


class Plan(NamedTuple):
    """The operations of a cell, and whose tokens must be there before."""

    filled: list[str]
    ops: Callable[[Sequence[str]], list[Op]]
    """From the keys of ``filled``."""


def plan(workload: Workload, count: int, prefix: str = "") -> Plan:
    """So many operations of a workload, the same ones each time.

    An issue finds an older token in every second case. A token that is consumed is never checked.

    Args:
        workload: which.
        count: how many, 1 or more.
        prefix: of the objects' names.
    """
    kinds: list[Kind] = [workload] * count if workload != "mix" else _mixed(count)
    subjects = max(kinds.count("issue") // 2, 1)
    consumed = [f"{prefix}consume-{number}" for number in range(kinds.count("consume"))]
    checked = [f"{prefix}check-{number}" for number in range(min(kinds.count("check"), _MOST_CHECKED))]
    filled = [*consumed, *checked]

    def ops(keys: Sequence[str]) -> list[Op]:
        key_of = dict(zip(filled, keys, strict=True))
        to_consume, issued = iter(consumed), 0
        dice = random.Random(count)  # noqa: S311  # the same order for every contender
        made: list[Op] = []
        for kind in kinds:
            if kind == "issue":
                object_id = f"{prefix}issue-{issued % subjects}"
                issued += 1
                made.append(Op(kind, object_id))
            else:
                object_id = next(to_consume) if kind == "consume" else dice.choice(checked)
                made.append(Op(kind, object_id, key_of[object_id]))
        return made

    return Plan(filled, ops)


def _mixed(count: int) -> list[Kind]:
    kinds: list[Kind] = [kind for kind, share in MIX.items() for _ in range(-(-count * share // 100))]
    random.Random(count).shuffle(kinds)  # noqa: S311  # the same order for every contender
    return kinds


def percentile(values: Sequence[float], share: float) -> float:
    """The value that a share of the values does not exceed."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def measure(entry: Entry, cell: Cell, count: int) -> Sample:
    """One round of one contender: a fresh store, a warm-up, the operations, and the check of what is stored.

    Raises:
        NotAtomicError: the contender is fast and wrong.
    """
    with asyncio.Runner(loop_factory=entry.new_loop) as runner:
        return runner.run(_measure(entry, cell, count))


async def _measure(entry: Entry, cell: Cell, count: int) -> Sample:
    async with entry.fresh() as contender:
        warm, warm_ops, warm_run = await _warm_up(contender, cell)
        planned = plan(cell.workload, count)
        ops = planned.ops(await contender.fill(planned.filled))
        gc.collect()
        syncs, written, processor = slow_disk.syncs(), machine.bytes_written(), process_time()
        async with beside(cell.beside) as late:
            run = await contender.run(ops, cell.tasks)
        processor, written_after = process_time() - processor, machine.bytes_written()
        synced = None if syncs is None else ((slow_disk.syncs() or 0) - syncs) / len(ops)
        both = Run([*warm_run.answers, *run.answers], warm_run.waits + run.waits, run.seconds)
        filled = [*warm.filled, *planned.filled]
        await verify(contender, filled, [*warm_ops, *ops], both, keeps_ended=entry.keeps_ended)
    counted = None if written is None or written_after is None else (written_after - written) / len(ops)
    return Sample(
        rate=len(ops) / run.seconds,
        p50=percentile(run.waits, 0.5),
        p99=percentile(run.waits, 0.99),
        processor=processor / len(ops),
        written=counted if cell.store == "sqlite" else None,
        tick_p99=percentile(late, 0.99) if late else None,
        syncs=synced,
    )


async def _warm_up(contender: Contender, cell: Cell) -> tuple[Plan, list[Op], Run]:
    warm = plan(cell.workload, min(_WARM_UP, 4 * cell.tasks), "warm-up-")
    ops = warm.ops(await contender.fill(warm.filled))
    return warm, ops, await contender.run(ops, cell.tasks)
