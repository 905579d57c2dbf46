"""``python -m tests.benchmarks`` runs them, ``python -m tests.benchmarks plot FILE...`` shows the results."""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import Any

from . import machine, memory, plot, report, scale, slow_disk, sqlite, valkey
from .cells import Cell, Entry
from .figures import Figure
from .rounds import Effort, Result, run
from .targets import verdicts

_STORES = ("sqlite", "memory", "postgresql", "mongodb", "valkey")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description="How fast vtoken is, beside others.",
        epilog="plot FILE...: show what was measured",
    )
    parser.add_argument("--full", action="store_true", help="all cells, longer rounds (a quick pass without)")
    parser.add_argument("--only", choices=_STORES, help="one store")
    parser.add_argument("--match", default="", help="only cells whose title has this text, e.g. 'issue, 256'")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, help="of one round of one contender")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure"
    )
    parser.add_argument("--slow-disk", action="store_true", help=argparse.SUPPRESS)  # for our own child
    return parser.parse_args()


class _Session:
    """One run of the benchmarks."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.effort = Effort(options.rounds, options.seconds or (0.5 if options.full else 0.1))
        self.results: list[Result] = []
        self.figures: list[Figure] = []
        self.absent: list[str] = []

    def wants(self, store: str) -> bool:
        return self.options.only in (None, store)

    def measure(self, cells: Iterable[tuple[Cell, list[Entry]]]) -> None:
        for cell, entries in cells:
            if self.options.match not in str(cell):
                continue
            result = run(cell, entries, self.effort)
            self.results.append(result)
            _say("\n".join(report.cell_lines(result)))

    def add(self, figures: Iterable[Figure]) -> None:
        for figure in figures:
            self.figures.append(figure)
            _say(report.figure_line(figure))

    def slow_disk(self, folder: Path) -> None:
        """In a child, whose disk is slow; it prints its cells itself."""
        why_not = slow_disk.why_not()
        if why_not:
            self.skip(why_not)
            return
        out = folder / "slow-disk.json"
        command = [sys.executable, "-m", __package__ or "tests.benchmarks", "--slow-disk", "--json", str(out)]
        command += ["--rounds", str(self.options.rounds), "--seconds", str(self.effort.seconds)]
        command += ["--folder", str(folder), "--match", self.options.match, *["--full"] * self.options.full]
        subprocess.run(command, check=True, env=slow_disk.environment(folder))
        self.results += [Result.from_json(data) for data in json.loads(out.read_text())["cells"]]

    def skip(self, why: str) -> None:
        self.absent.append(why)
        _say(f"absent: {why}")

    def as_json(self, folder: Path) -> dict[str, Any]:
        return {
            "machine": machine.describe(folder),
            "mode": "full" if self.options.full else "quick",
            "rounds": self.effort.rounds,
            "seconds": self.effort.seconds,
            "absent": self.absent,
            "figures": [figure.as_json() for figure in self.figures],
            "cells": [result.as_json() for result in self.results],
        }


def _say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    """Run what the command line asks for."""
    if sys.argv[1:2] == ["plot"]:
        _plot(sys.argv[2:])
        return
    options = _arguments()
    session = _Session(options)
    begun = monotonic()
    with tempfile.TemporaryDirectory(prefix="vtoken-benchmarks-", dir=options.folder) as name:
        folder = Path(name)
        if options.slow_disk:
            slow_disk.check(folder)
            session.measure(sqlite.Stores(folder).slow_cells(options.full))
        else:
            _say(f"load average {machine.load_average()} at the beginning")
            _run_all(session, folder)
            _say("\nTargets, at the median of the rounds:")
            _say("\n".join(report.verdict_lines(verdicts(session.results))))
            _say(f"{monotonic() - begun:.0f} s; load average {machine.load_average()} at the end")
        if options.json:
            options.json.write_text(json.dumps(session.as_json(folder), indent=1))


def _plot(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks plot")
    parser.add_argument(
        "files", type=Path, nargs="+", help="the JSON of a run, or of runs of one store each, on one machine"
    )
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="the folder of the documentation")
    options = parser.parse_args(arguments)
    if find_spec("matplotlib") is None:
        sys.exit('no matplotlib: pip install "vtoken[bench]"')
    for written in plot.render(options.files, options.docs):
        _say(str(written))


def _run_all(session: _Session, folder: Path) -> None:
    if session.wants("sqlite"):
        stores = sqlite.Stores(folder)
        for why in stores.absent:
            session.skip(why)
        if not session.options.full:
            session.skip("SQLAlchemy async and PyMongo, one call each: with --full only")
        session.measure(stores.cells(session.options.full))
        session.slow_disk(folder)
        _run_sqlite_scale(session, folder)
    if session.wants("memory"):
        _run_memory(session)
    if session.wants("postgresql"):
        _run_postgresql(session)
    if session.wants("mongodb"):
        _run_mongodb(session)
    if session.wants("valkey"):
        _run_valkey(session, folder)


def _run_sqlite_scale(session: _Session, folder: Path) -> None:
    stored = 1_000_000 if session.options.full else 100_000
    rounds = session.effort.rounds
    if session.options.match in "bytes written":
        session.add(asyncio.run(scale.sqlite_written(folder)))
    if session.options.match in "growth":
        session.add(asyncio.run(scale.sqlite_growth(folder, stored, rounds)))
    if session.options.match in "purge":
        session.add(asyncio.run(scale.sqlite_purge(folder, stored, stored // 10, rounds)))


def _run_memory(session: _Session) -> None:
    for why in memory.absent():
        session.skip(why)
    session.measure(memory.cells())
    tokens = 1_000_000 if session.options.full else 200_000
    if not session.options.match:
        session.add(memory.figures(tokens, session.effort.rounds))


def _run_postgresql(session: _Session) -> None:
    try:
        from . import postgresql, postgresql_scale
    except ImportError as error:
        session.skip(f"PostgreSQL: {error.name} is not installed")
        return
    try:
        with postgresql.server() as url:
            session.measure(postgresql.Stores(url).cells(session.options.full))
            if session.options.match in "growth":
                stored = 1_000_000 if session.options.full else 100_000
                rounds = session.effort.rounds
                session.add(asyncio.run(postgresql_scale.measure_growth(url, stored, rounds)))
    except FileNotFoundError as error:
        session.skip(str(error))


def _run_mongodb(session: _Session) -> None:
    try:
        from . import mongodb, mongodb_scale
    except ImportError as error:
        session.skip(f"MongoDB: {error.name} is not installed")
        return
    try:
        with mongodb.server() as url:
            session.measure(mongodb.Stores(url).cells(session.options.full))
            if session.options.full and session.options.match in "growth":
                session.add(asyncio.run(mongodb_scale.measure_growth(url, 1_000_000, session.effort.rounds)))
    except FileNotFoundError as error:
        session.skip(str(error))


def _run_valkey(session: _Session, folder: Path) -> None:
    for why in valkey.absent():
        session.skip(why)
        return
    try:
        with valkey.server() as url:
            session.measure(valkey.cells(url, sqlite.Stores(folder).ours, session.options.full))
    except FileNotFoundError as error:
        session.skip(str(error))


if __name__ == "__main__":
    main()
