"""Crashes and power losses of a process that has an SQLite store."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from vtoken_backends.sqlite import SQLiteBackend

from .notes import read_notes, violations
from .sqlite_disk import Disk, Event, read_record

_ROOT: Final = Path(__file__).parents[2]
_CALLS: Final = "WTSUC"
_PHASES: Final = 3
_PLANTED: Final = 4


class Bench:
    """A directory in which workers run under the shim. Needs Linux and a C compiler, ``cc``."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._shim = directory / "syscalls.so"
        source = Path(__file__).with_name("syscalls.c")
        subprocess.run(
            ["cc", "-O1", "-shared", "-fPIC", "-o", self._shim, source, "-ldl", "-lpthread"],  # noqa: S607  # whichever compiler there is
            check=True,
        )

    def record(self, phases: int, *arguments: str) -> list[Event]:
        """The calls of a worker that ends by itself."""
        with self._place() as place:
            record = place / "record"
            worker = self._run(
                place, {"VTOKEN_FAULT_RECORD": str(record)}, "--phases", str(phases), *arguments
            )
            assert worker.returncode == 0, worker.stderr
            return read_record(record)

    def crash(self, at: int, half: bool, *arguments: str) -> tuple[list[str], int]:
        """Kill a worker at its call number ``at``, and look at what it leaves: the violations, and how
        many steps had been acknowledged."""
        with self._place() as place:
            fault = {"VTOKEN_FAULT_AT": str(at)} | ({"VTOKEN_FAULT_HALF": "1"} if half else {})
            worker = self._run(place, fault, *arguments)
            assert worker.returncode == -signal.SIGKILL, f"the fault did not fire: {worker.stderr}"
            notes = place / "notes"
            steps = read_notes(notes.read_bytes().splitlines(keepends=True) if notes.exists() else [])
            found = asyncio.run(violations(_left(place), steps))
            return found, sum(step.ended is not None for step in steps)

    def fail(self, at: int, error: int) -> list[str]:
        """The violations after the call number ``at`` of a worker failed, and it went on."""
        with self._place() as place:
            record = place / "record"
            fault = {
                "VTOKEN_FAULT_AT": str(at),
                "VTOKEN_FAULT_ERRNO": str(error),
                "VTOKEN_FAULT_RECORD": str(record),
            }
            # Twice as long as the recorded run: how many calls a run makes depends on what shares a trip.
            worker = self._run(place, fault, "--phases", str(2 * _PHASES))
            assert worker.returncode == 0, worker.stderr
            assert any(event.kind == "F" for event in read_record(record)), "the fault did not fire"
            steps = read_notes((place / "notes").read_bytes().splitlines(keepends=True))
            return asyncio.run(violations(_left(place), steps))

    def lose_power(self, events: Sequence[Event], at: int, chance: random.Random) -> tuple[list[str], int]:
        """The violations after a power loss before event number ``at``, and how many calls it undid."""
        disk = Disk()
        disk.apply([event for event in events[:at] if event.kind in _CALLS])
        files, undone = disk.after_power_loss(chance)
        told = b"".join(event.data for event in events[:at] if event.kind == "N")
        with self._place() as place:
            for name, content in files.items():
                (place / "store" / Path(name).name).write_bytes(content)
            steps = read_notes(told.splitlines(keepends=True))
            return asyncio.run(violations(_left(place), steps)), undone

    @contextmanager
    def _place(self) -> Generator[Path]:
        place = Path(tempfile.mkdtemp(dir=self._directory))
        (place / "store").mkdir()
        try:
            yield place
        finally:
            shutil.rmtree(place)

    def _run(self, place: Path, fault: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
        store, notes = place / "store" / "tokens.db", place / "notes"
        environment = {
            "LD_PRELOAD": str(self._shim),
            "VTOKEN_FAULT_STORE": str(store),
            "VTOKEN_FAULT_NOTES": str(notes),
        }
        return subprocess.run(
            [sys.executable, "-m", "tests.faults.sqlite_worker", store, notes, *arguments],
            cwd=_ROOT,
            env=os.environ | environment | fault,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


@contextmanager
def bench() -> Generator[Bench]:
    # In memory where there is a place for it: what a disk would lose is played, and waiting for one is not.
    memory = "/dev/shm"  # noqa: S108  # Linux's own
    where = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="vtoken-faults-", dir=where) as directory:
        yield Bench(Path(directory).resolve())


def _left(place: Path) -> SQLiteBackend:
    """The store that a worker left behind."""
    return SQLiteBackend(place / "store" / "tokens.db", check="always")


def crash(long: bool) -> None:
    """SIGKILL at call number N of the calls that write, sync, make or remove files of the store."""
    points = 60 if long else 10
    with bench() as place:
        calls = sum(event.kind in _CALLS for event in place.record(_PHASES))
        found: list[str] = []
        acknowledged = 0
        for number in range(points):
            # The last one is before the end of the recorded run, and workers that are killed go on for ever.
            at = 1 + number * calls // points
            worse, steps = place.crash(at, half=number % 2 == 1)
            found += [f"at call {at}: {violation}" for violation in worse]
            acknowledged += steps
        bitten = sum(bool(place.crash(calls // 2 + n, False, "--early")[0]) for n in range(_PLANTED))
    print(
        f"crash: {points} points of {calls} calls, {acknowledged} acknowledged steps: {len(found)} violations"
    )
    print(f"planted bug (acknowledged too early): found at {bitten} of {_PLANTED} points")
    assert not found, found
    assert bitten, "the planted bug was not found"


def errors(long: bool) -> None:
    """One call fails (no room, or the disk's error), the worker is told, and goes on."""
    points = 60 if long else 6
    with bench() as place:
        calls = sum(event.kind in _CALLS for event in place.record(_PHASES))
        found = [
            f"{os.strerror(error)} at call {at}: {violation}"
            for error in (errno.EIO, errno.ENOSPC)
            for at in range(1 + error % 2, calls, 2 * calls // points)
            for violation in place.fail(at, error)
        ]
    print(f"errors: {points} of {calls} calls failed: {len(found)} violations")
    assert not found, found


def power_loss(long: bool) -> None:
    """Power loss at random moments of recorded runs; each synced write is there, any other may be gone."""
    runs, replays = (4, 50) if long else (1, 25)
    chance = random.Random(2030)  # noqa: S311  # moments and sectors
    found: list[str] = []
    relaxed: list[str] = []
    calls = resets = undone = 0
    with bench() as place:
        for _ in range(runs):
            events = place.record(_PHASES)
            calls += sum(event.kind in _CALLS for event in events)
            resets += sum(
                event.kind == "W" and event.name.endswith("-wal") and event.offset == 0 for event in events
            )
            worse, lost = replay(place, events, replays, chance)
            found += worse
            undone += lost
            relaxed += replay(place, place.record(_PHASES, "--synchronous", "normal"), replays, chance)[0]
    kinds = Counter(violation.partition(":")[0] for violation in relaxed)
    print(f"power loss: {runs * replays} replays of {calls} calls in which the log began {resets} times,")
    print(f"{undone} unsynced calls undone: {len(found)} violations")
    print(f"planted bug (synchronous=normal): {runs * replays} replays: {dict(kinds)}")
    assert resets > runs * _PHASES, "the log was never copied into the database and begun anew"
    assert not found, found
    assert min(kinds["lost"], kinds["undone"]) > 0, "synchronous=normal lost nothing: the disk does not bite"
    assert not kinds["broken"], "synchronous=normal loses the last writes, but never the store"
    assert not kinds["two active"]


def replay(
    place: Bench, events: Sequence[Event], replays: int, chance: random.Random
) -> tuple[list[str], int]:
    """Replays that undid something; where all was synced already, another moment is chosen."""
    found: list[str] = []
    undone = bitten = 0
    while bitten < replays:
        worse, lost = place.lose_power(events, chance.randrange(1, len(events)), chance)
        found += worse
        undone += lost
        bitten += lost > 0
    return found, undone
