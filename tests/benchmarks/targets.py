"""What is to be reached, as ratios in one run, and the lines that say whether it is."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Final, Literal, NamedTuple

from .cells import Cell
from .rounds import Result

_HAND: Final = "hand-written aiosqlite"
_CEILING: Final = "plain sqlite3, 256 per transaction"
_DJANGO: Final = "Django base app"
_MOTOR: Final = "Motor, one call each"


class Target(NamedTuple):
    """How many times as fast, or for ``"p99"`` how many times as long, vtoken is to be."""

    cell: Cell
    baseline: str
    bound: float
    what: Literal["rate", "p99"] = "rate"


TARGETS: Final = (
    Target(Cell("sqlite", "issue", 256), _HAND, 12),
    Target(Cell("sqlite", "consume", 256), _HAND, 30),
    Target(Cell("sqlite", "check", 256), _HAND, 8),
    Target(Cell("sqlite", "issue", 256), _CEILING, 0.8),
    Target(Cell("sqlite", "consume", 256), _CEILING, 0.6),
    Target(Cell("sqlite", "issue", 1), _HAND, 1.5),
    Target(Cell("sqlite", "consume", 1), _HAND, 2),
    Target(Cell("sqlite", "check", 1), _HAND, 2),
    Target(Cell("sqlite", "issue", 256, "busy loop"), _HAND, 15),
    Target(Cell("sqlite", "consume", 256, "busy loop"), _HAND, 40),
    Target(Cell("sqlite", "issue", 256), _DJANGO, 15),
    Target(Cell("sqlite", "consume", 256), _DJANGO, 25),
    Target(Cell("sqlite", "check", 256), _DJANGO, 20),
    Target(Cell("mongodb", "issue", 256), _MOTOR, 3),
    Target(Cell("mongodb", "consume", 256), _MOTOR, 2),
    Target(Cell("mongodb", "check", 256), _MOTOR, 12),
    Target(Cell("mongodb", "issue", 256), _MOTOR, 0.25, "p99"),
    Target(Cell("mongodb", "consume", 256), _MOTOR, 0.25, "p99"),
    Target(Cell("mongodb", "check", 256), _MOTOR, 0.25, "p99"),
    Target(Cell("mongodb", "issue", 1), _MOTOR, 0.9),
    Target(Cell("mongodb", "consume", 1), _MOTOR, 0.9),
    Target(Cell("mongodb", "check", 1), _MOTOR, 0.9),
)


class Verdict(NamedTuple):
    """A target and what was measured."""

    target: Target
    ratio: float
    least: float
    most: float

    @property
    def reached(self) -> bool:
        """By the median of the rounds."""
        if self.target.what == "p99":
            return self.ratio <= self.target.bound
        return self.ratio >= self.target.bound


def verdicts(results: Iterable[Result]) -> list[Verdict]:
    """Of each target whose cell was measured."""
    by_cell = {result.cell: result for result in results}
    found: list[Verdict] = []
    for target in TARGETS:
        result = by_cell.get(target.cell)
        if result is None or target.baseline not in result.samples:
            continue
        compare = result.ratios if target.what == "rate" else result.p99_ratios
        ratios = compare("vtoken", target.baseline)
        found.append(Verdict(target, median(ratios), min(ratios), max(ratios)))
    return found
