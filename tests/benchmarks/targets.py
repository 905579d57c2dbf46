"""What is to be reached, mostly as ratios in one run, and the lines that say whether it is."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Final, Literal, NamedTuple

from .cells import Cell
from .rounds import Result

_HAND: Final = "hand-written aiosqlite"
_ONE: Final = "one statement in one hop"
_CEILING: Final = "plain sqlite3, 256 per transaction"
_DJANGO: Final = "Django base app"
_MOTOR: Final = "Motor, one call each"
_PSYCOPG: Final = "psycopg, one call each"
_ASYNCPG: Final = "asyncpg, one call each"


class Target(NamedTuple):
    """How many times as fast as a baseline vtoken is to be; for ``"p99"`` how many times as long it may take;
    for ``"ticker"`` how many milliseconds the event loop may be late, whatever the baseline."""

    cell: Cell
    baseline: str
    bound: float
    what: Literal["rate", "p99", "ticker"] = "rate"

    @property
    def title(self) -> str:
        if self.what == "ticker":
            return f"{self.cell}: how late the ticker is, p99"
        return f"{self.cell}, {'p99 ' * (self.what == 'p99')}against {self.baseline}"

    @property
    def unit(self) -> str:
        return " ms" if self.what == "ticker" else "x"

    @property
    def bound_text(self) -> str:
        return f"{'at least' if self.what == 'rate' else 'at most'} {self.bound:g}{self.unit}"


TARGETS: Final = (
    Target(Cell("sqlite", "issue", 256), _HAND, 15),
    Target(Cell("sqlite", "consume", 256), _HAND, 25),
    Target(Cell("sqlite", "check", 256), _HAND, 5),
    Target(Cell("sqlite", "issue", 256), _CEILING, 0.5),
    Target(Cell("sqlite", "consume", 256), _CEILING, 0.4),
    Target(Cell("sqlite", "mix", 64), _HAND, 8),
    Target(Cell("sqlite", "mix", 16), _HAND, 5),
    Target(Cell("sqlite", "issue", 1), _ONE, 0.9),
    Target(Cell("sqlite", "consume", 1), _ONE, 0.9),
    Target(Cell("sqlite", "issue", 1), _HAND, 1.3),
    Target(Cell("sqlite", "consume", 1), _HAND, 1.3),
    Target(Cell("sqlite", "issue", 256, "ticker"), _HAND, 3, "ticker"),
    Target(Cell("sqlite", "consume", 256, "ticker"), _HAND, 3, "ticker"),
    Target(Cell("sqlite", "check", 256, "ticker"), _HAND, 3, "ticker"),
    Target(Cell("sqlite", "issue", 256), _DJANGO, 15),
    Target(Cell("sqlite", "consume", 256), _DJANGO, 25),
    Target(Cell("sqlite", "check", 256), _DJANGO, 20),
    Target(Cell("postgresql", "issue", 256), _PSYCOPG, 4),
    Target(Cell("postgresql", "consume", 256), _PSYCOPG, 4),
    Target(Cell("postgresql", "check", 256), _PSYCOPG, 4),
    Target(Cell("postgresql", "issue", 256), _PSYCOPG, 0.33, "p99"),
    Target(Cell("postgresql", "consume", 256), _PSYCOPG, 0.33, "p99"),
    Target(Cell("postgresql", "check", 256), _PSYCOPG, 0.33, "p99"),
    Target(Cell("postgresql", "issue", 1), _PSYCOPG, 0.9),
    Target(Cell("postgresql", "consume", 1), _PSYCOPG, 0.9),
    Target(Cell("postgresql", "check", 1), _PSYCOPG, 0.9),
    Target(Cell("postgresql", "issue", 256), _ASYNCPG, 4),
    Target(Cell("postgresql", "consume", 256), _ASYNCPG, 4),
    Target(Cell("postgresql", "check", 256), _ASYNCPG, 4),
    Target(Cell("postgresql", "issue", 256), _ASYNCPG, 0.33, "p99"),
    Target(Cell("postgresql", "consume", 256), _ASYNCPG, 0.33, "p99"),
    Target(Cell("postgresql", "check", 256), _ASYNCPG, 0.33, "p99"),
    Target(Cell("postgresql", "issue", 1), _ASYNCPG, 0.9),
    Target(Cell("postgresql", "consume", 1), _ASYNCPG, 0.9),
    Target(Cell("postgresql", "check", 1), _ASYNCPG, 0.9),
    Target(Cell("mongodb", "issue", 1), _MOTOR, 0.95),
    Target(Cell("mongodb", "consume", 1), _MOTOR, 0.95),
    Target(Cell("mongodb", "check", 1), _MOTOR, 0.95),
    Target(Cell("mongodb", "mix", 16), _MOTOR, 1.3),
    Target(Cell("mongodb", "mix", 64), _MOTOR, 2),
    Target(Cell("mongodb", "issue", 256), _MOTOR, 3),
    Target(Cell("mongodb", "consume", 256), _MOTOR, 2),
    Target(Cell("mongodb", "check", 256), _MOTOR, 12),
    Target(Cell("mongodb", "issue", 256), _MOTOR, 0.25, "p99"),
    Target(Cell("mongodb", "consume", 256), _MOTOR, 0.25, "p99"),
    Target(Cell("mongodb", "check", 256), _MOTOR, 0.25, "p99"),
)


class Verdict(NamedTuple):
    """A target and what was measured."""

    target: Target
    ratio: float
    least: float
    most: float
    load: float
    """The machine's load average during it."""

    @property
    def reached(self) -> bool:
        """By the median of the rounds."""
        if self.target.what == "rate":
            return self.ratio >= self.target.bound
        return self.ratio <= self.target.bound


def verdicts(results: Iterable[Result]) -> list[Verdict]:
    """Of each target whose cell was measured."""
    by_cell = {result.cell: result for result in results}
    found: list[Verdict] = []
    for target in TARGETS:
        result = by_cell.get(target.cell)
        if result is None or target.baseline not in result.samples:
            continue
        values = _values(target, result)
        found.append(Verdict(target, median(values), min(values), max(values), result.load))
    return found


def _values(target: Target, result: Result) -> list[float]:
    if target.what == "ticker":
        return [(sample.tick_p99 or 0.0) * 1e3 for sample in result.samples["vtoken"]]
    compare = result.ratios if target.what == "rate" else result.p99_ratios
    return compare("vtoken", target.baseline)
