"""Figures beside the cells: a quantity, of one or several contenders, by rounds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Figure:
    """A quantity that was measured.

    Args:
        title: what.
        unit: of the values.
        values: by contender and round.
        bound: what the first contender's median is to reach, or None.
        at_least: whether it is to be at least the bound, rather than at most.
        load: the machine's load average.
    """

    title: str
    unit: str
    values: dict[str, list[float]]
    bound: float | None = None
    at_least: bool = False
    load: float = 0.0

    @property
    def reached(self) -> bool | None:
        """Whether the bound is kept; None without one."""
        if self.bound is None:
            return None
        middle = median(next(iter(self.values.values())))
        return middle >= self.bound if self.at_least else middle <= self.bound

    def as_json(self) -> dict[str, Any]:
        """For ``Figure(**data)``."""
        return asdict(self)


def shown(value: float) -> str:
    """A value as people read it: four digits, or all of those before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def ratio(
    title: str, values: dict[str, list[float]], bound: float, *, at_least: bool, load: float = 0.0
) -> Figure:
    """The first of two contenders in relation to the second, round by round."""
    (name, above), (baseline, below) = values.items()
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return Figure(title, "x", {f"{name} / {baseline}": ratios}, bound, at_least, load)
