"""The benchmarks run, and what they say of atomicity can be believed. Nothing here looks at a time."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterable
from pathlib import Path

import pytest

from . import postgresql_servers
from .benchmarks import (
    machine,
    memory,
    mongodb,
    mongodb_scale,
    pages,
    postgresql,
    rounds,
    scale,
    slow_disk,
    sqlite,
    targets,
    valkey,
)
from .benchmarks.atomicity import NotAtomicError
from .benchmarks.by_hand import CHECK, CONSUME, DEACTIVATE, HandWritten
from .benchmarks.cells import Cell, Entry, Workload, measure, opened, plan
from .benchmarks.contender import Kind, digest_of
from .benchmarks.figures import Figure

_WORKLOADS = (
    "mix",  # which issues, checks and consumes
    *(pytest.param(each, marks=pytest.mark.long) for each in ("issue", "check", "consume")),
)


def _entries(cells: Iterable[tuple[Cell, list[Entry]]]) -> dict[str, Entry]:
    return {entry.name: entry for _, entries in cells for entry in entries}


def _run_each(entries: dict[str, Entry], workload: Workload) -> None:
    for entry in entries.values():
        sample = measure(entry, Cell("any", workload, 4), 8)
        assert sample.rate > 0
        assert 0 < sample.p50 <= sample.p99
        assert sample.processor > 0


@pytest.mark.parametrize("workload", _WORKLOADS)
def test_each_sqlite_contender_runs_and_is_atomic(tmp_path: Path, workload: Workload) -> None:
    stores = sqlite.Stores(tmp_path)
    entries = _entries(stores.cells(full=True)) | _entries(stores.slow_cells(full=True))
    expected = 9 if stores.on_uvloop else 8  # what is missing takes one line of `absent`
    assert len(entries) + len(stores.absent) == expected, "a contender that is missing is said to be so"
    _run_each(entries, workload)
    assert not list(tmp_path.iterdir()), "each has had a store of its own, which is gone"


@pytest.mark.parametrize("workload", _WORKLOADS)
def test_each_mongodb_contender_runs_and_is_atomic(mongodb_replica_set: str, workload: Workload) -> None:
    entries = _entries(mongodb.Stores(mongodb_replica_set).cells(full=True))
    assert len(entries) == 3
    _run_each(entries, workload)


@pytest.mark.parametrize("workload", _WORKLOADS)
def test_each_postgresql_contender_runs_and_is_atomic(workload: Workload) -> None:
    entries = _entries(postgresql.Stores(postgresql_servers.shared_url()).cells(full=True))
    assert len(entries) == 3
    _run_each(entries, workload)


@pytest.mark.parametrize("workload", _WORKLOADS)
def test_set_and_getdel_runs_and_is_atomic_as_far_as_it_goes(tmp_path: Path, workload: Workload) -> None:
    if valkey.absent():
        return
    with valkey.server() as url:
        _run_each(_entries(valkey.cells(url, sqlite.Stores(tmp_path).ours, full=True)), workload)


@pytest.mark.parametrize("workload", _WORKLOADS)
def test_the_memory_backend_runs_and_is_atomic(workload: Workload) -> None:
    _run_each(_entries(memory.cells()), workload)


class _ForgetsToReplace(HandWritten):
    """Leaves the older tokens valid."""

    async def issue(self, object_id: str) -> str:
        [key] = await self.fill([object_id])
        return key


class _LooksThenWrites(HandWritten):
    """Looks whether the key is valid, and only then uses it up: two rivals may both have looked."""

    async def consume(self, object_id: str, key: str) -> bool:
        if not await self.check(object_id, key):
            return False
        await asyncio.sleep(0)  # where it would lose the event loop anyway
        await self.issue(object_id)  # which deactivates the used one
        return True


class _ForgetsUses(HandWritten):
    """Says that it has used a key, and has not."""

    async def consume(self, object_id: str, key: str) -> bool:
        return await self.check(object_id, key)


class _ForgetsWrites(HandWritten):
    """Answers, and loses a token in eight."""

    async def issue(self, object_id: str) -> str:
        key = await super().issue(object_id)
        with sqlite3.connect(self._path) as database:
            database.execute("DELETE FROM tokens WHERE id % 8 = 7")
        database.close()
        return key


class _TakesAnothers(HandWritten):
    """Lets a valid key pass for every object."""

    async def check(self, object_id: str, key: str) -> bool:
        query = "SELECT 1 FROM tokens WHERE digest = ? AND is_active = 1"
        return bool(await self._reader.execute_fetchall(query, (digest_of(key),)))


@pytest.mark.parametrize(
    ("broken", "workload", "what"),
    [
        (_ForgetsToReplace, "issue", "not exactly one active"),
        (_LooksThenWrites, "check", "uses of one key"),
        (_ForgetsUses, "consume", "a used one is active"),
        (_ForgetsWrites, "issue", "rows are stored"),
        (_TakesAnothers, "check", "another object's"),
    ],
)
def test_a_broken_contender_is_found_out(
    tmp_path: Path, broken: type[HandWritten], workload: Workload, what: str
) -> None:
    cell = Cell("sqlite", workload, 4)
    folder = tmp_path / "sound"
    folder.mkdir()
    measure(Entry("sound", lambda: opened(HandWritten(folder))), cell, 16)
    with pytest.raises(NotAtomicError, match=what):
        measure(Entry("broken", lambda: opened(broken(tmp_path))), cell, 16)


@pytest.mark.parametrize("count", [1, 3, 100, 333])
def test_a_mix_holds_its_shares_and_never_checks_a_used_token(count: int) -> None:
    planned = plan("mix", count)
    ops = planned.ops([f"key of {object_id}" for object_id in planned.filled])
    kinds: dict[Kind, int] = {"check": 60, "issue": 25, "consume": 15}
    for kind, share in kinds.items():
        assert sum(op.kind == kind for op in ops) == -(-count * share // 100)
    assert not {op.object_id for op in ops if op.kind == "check"} & {
        op.object_id for op in ops if op.kind == "consume"
    }
    assert [op.key for op in ops if op.kind != "issue"] == [
        f"key of {op.object_id}" for op in ops if op.kind != "issue"
    ]


def test_rounds_are_interleaved_and_told_as_json(tmp_path: Path) -> None:
    stores = sqlite.Stores(tmp_path)
    cell = Cell("sqlite", "issue", 1)
    result = rounds.run(cell, [stores.ours, stores.by_hand], rounds.Effort(3, 0.001))
    assert rounds.Result.from_json(result.as_json()) == result
    assert [len(samples) for samples in result.samples.values()] == [3, 3]
    [verdict] = targets.verdicts([result])
    ratios = [a / b for a, b in zip(result.rates("vtoken"), result.rates(HandWritten.name), strict=True)]
    assert (verdict.least, verdict.most) == (min(ratios), max(ratios))
    assert verdict.ratio == sorted(ratios)[1]
    assert verdict.reached is (verdict.ratio >= 1.3)


def test_the_pages_are_written_between_their_marks(tmp_path: Path) -> None:
    stores = sqlite.Stores(tmp_path)
    result = rounds.run(Cell("sqlite", "issue", 1), [stores.ours, stores.by_hand], rounds.Effort(1, 0.001))
    figure = Figure("memory: exists_valid", "us", {"vtoken": [3.0, 4.0, 9.0]}, 5, load=0.3)
    run = {"machine": machine.describe(tmp_path), "mode": "quick", "rounds": 1, "seconds": 0.001}
    before = f"# Ours\n\n{pages.BEGIN}\nold\n{pages.END}\n\nOurs too\n"
    images = ["performance-sqlite.svg", "performance-sqlite-tasks.svg"]
    measured = pages.Measured(run | {"absent": ["a contender"]}, [result], [figure], images)
    text = pages.performance(measured, before)
    assert text.startswith("# Ours\n")
    assert text.endswith("\nOurs too\n")
    assert "old" not in text
    assert "Not measured: a contender." in text
    assert "| memory: exists_valid | at most 5 us | 4 us (3 to 9) | 0.3 | reached |" in text
    assert "images/performance-sqlite.svg" in text
    assert str(tmp_path) not in text
    behind = pages.tables(measured, None)
    assert behind.startswith("# Performance: the tables\n")
    assert "| issue, 1 task (load " in behind
    assert "images/performance-sqlite-tasks.svg" in behind
    nothing = pages.Measured(run | {"absent": []}, [], [], [])
    assert pages.performance(nothing, None).startswith("# Performance\n")
    with pytest.raises(ValueError, match="marks"):
        pages.performance(nothing, "no marks")


@pytest.mark.long
def test_operations_beside_many_documents_are_measured(mongodb_replica_set: str) -> None:
    figures = asyncio.run(mongodb_scale.measure_growth(mongodb_replica_set, 2100, 1))
    assert all(value > 0 for figure in figures for values in figure.values.values() for value in values)


def test_a_database_that_was_filled_past_us_is_one_of_ours(mongodb_replica_set: str) -> None:
    async def use() -> None:
        # The same that fills a million.
        async with mongodb_scale._database(mongodb_replica_set, 20) as contender:  # pyright: ignore[reportPrivateUsage]  # the benchmarks are ours
            key = await contender.issue("another")
            assert await contender.check("another", key)
            assert await contender.consume("another", key)
            assert len(await contender.rows()) == 22

    asyncio.run(use())


@pytest.mark.long
def test_operations_beside_many_rows_are_measured(tmp_path: Path) -> None:
    figures = asyncio.run(scale.sqlite_growth(tmp_path, 1100, 1))
    assert all(value > 0 for figure in figures for values in figure.values.values() for value in values)


def test_a_file_that_was_filled_past_us_is_one_of_ours(tmp_path: Path) -> None:
    async def use() -> list[Figure]:
        return [
            *await scale.sqlite_written(tmp_path, stored=8, operations=4),
            *await scale.sqlite_purge(tmp_path, 3020, 20, 1),  # more than are used meanwhile, however slow
        ]

    figures = asyncio.run(use())
    assert all(value > 0 for figure in figures for values in figure.values.values() for value in values)


@pytest.mark.parametrize(
    ("at_least", "bound", "reached"),
    [(True, 4, True), (True, 4.1, False), (False, 4, True), (False, 3.9, False)],
)
def test_a_figure_is_judged_by_its_median(at_least: bool, bound: float, reached: bool) -> None:
    assert Figure("", "", {"first": [1.0, 4.0, 9.0], "second": [0.0]}, bound, at_least).reached is reached


def test_the_slow_disk_is_none_without_its_shim() -> None:
    assert not slow_disk.is_slow()
    assert slow_disk.syncs() is None


def test_the_statements_by_hand_use_their_indexes(tmp_path: Path) -> None:
    """A baseline that scans its table would flatter us."""
    asyncio.run(_open_and_close(HandWritten(tmp_path)))
    database = sqlite3.connect(tmp_path / "tokens.db")
    plans = [
        row[3]
        for sql, parameters in ((CHECK, 5), (CONSUME, 5), (DEACTIVATE, 3))
        for row in database.execute(f"EXPLAIN QUERY PLAN {sql}", [""] * parameters)
    ]
    database.close()
    assert plans
    assert all("USING INDEX" in step for step in plans)


async def _open_and_close(contender: HandWritten) -> None:
    async with opened(contender):
        pass
