"""Rounds of a cell: every contender in each of them, in another order each time, and what they add up to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from .cells import Cell, Entry, Sample, measure
from .machine import load_average


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured.

    Args:
        rounds: how many, 7 or more for figures that are published.
        seconds: what one round of one contender should take, about.
    """

    rounds: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Result:
    """What a cell has shown."""

    cell: Cell
    samples: dict[str, list[Sample]]
    """Of each contender, by rounds."""
    operations: dict[str, int]
    """How many of each contender in one round."""
    load: float
    """The machine's load average during it."""

    def rates(self, name: str) -> list[float]:
        """Operations per second of a contender, by rounds."""
        return [sample.rate for sample in self.samples[name]]

    def ratios(self, name: str, baseline: str) -> list[float]:
        """How many times as fast a contender was as a baseline, round by round."""
        return [a / b for a, b in zip(self.rates(name), self.rates(baseline), strict=True)]

    def p99_ratios(self, name: str, baseline: str) -> list[float]:
        """How many times as long the slowest in a hundred took, round by round."""
        pairs = zip(self.samples[name], self.samples[baseline], strict=True)
        return [a.p99 / b.p99 for a, b in pairs]

    def as_json(self) -> dict[str, Any]:
        """For :meth:`from_json`."""
        samples = {name: [sample._asdict() for sample in found] for name, found in self.samples.items()}
        return asdict(self) | {"samples": samples}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        """Of :meth:`as_json`."""
        samples = {name: [Sample(**sample) for sample in found] for name, found in data["samples"].items()}
        return cls(Cell(**data["cell"]), samples, data["operations"], data["load"])


def run(cell: Cell, entries: Sequence[Entry], effort: Effort) -> Result:
    """Measure a cell."""
    operations = {entry.name: _how_many(entry, cell, effort.seconds) for entry in entries}
    samples: dict[str, list[Sample]] = {entry.name: [] for entry in entries}
    loads: list[float] = []
    for number in range(effort.rounds):
        first = number % len(entries)
        for entry in (*entries[first:], *entries[:first]):
            samples[entry.name].append(measure(entry, cell, operations[entry.name]))
        loads.append(load_average())
    return Result(cell, samples, operations, round(median(loads), 2))


def _how_many(entry: Entry, cell: Cell, seconds: float) -> int:
    """As many operations as fill the time, by a trial that counts for nothing else."""
    least = max(cell.tasks, 64)
    count = least
    for _ in range(2):  # a first trial of a fast one is too short to tell
        tried = count
        count = max(least, min(int(measure(entry, cell, tried).rate * seconds), 50_000))
        if count < 4 * tried:
            break
    return count
