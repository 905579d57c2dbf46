"""The text of ``docs/performance.md`` and of the page of tables behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median
from typing import Any, Final, NamedTuple

from .cells import Sample
from .figures import Figure, shown
from .rounds import Result
from .targets import verdicts
from .why_not import WHY_NOT

BEGIN: Final = "<!-- Written by `python -m tests.benchmarks plot FILE...`; what stands outside is kept. -->"
END: Final = "<!-- The end of what was written. -->"
_STORES: Final = {
    "sqlite": "SQLite",
    "postgresql": "PostgreSQL",
    "mongodb": "MongoDB",
    "memory": "Memory",
    "valkey": "Valkey beside vtoken on SQLite",
}


class Measured(NamedTuple):
    """A run, and the pictures of it."""

    data: dict[str, Any]
    """What it says of itself: the machine, the mode."""
    results: Sequence[Result]
    figures: Sequence[Figure]
    images: Sequence[str]
    """Names of files in ``images/``."""


def performance(measured: Measured, before: str | None) -> str:
    """``docs/performance.md``: the part between the marks anew, the rest as it was.

    Args:
        measured: what it shows.
        before: the page as it is, or None.

    Raises:
        ValueError: the page has no marks.
    """
    return _between_marks("Performance", _summary(measured), before)


def tables(measured: Measured, before: str | None) -> str:
    """``docs/performance-tables.md``, likewise."""
    return _between_marks("Performance: the tables", _all_tables(measured), before)


def _between_marks(title: str, parts: Iterable[str], before: str | None) -> str:
    head, begin, rest = (before or f"# {title}\n\n{BEGIN}\n{END}\n").partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page {title!r} has lost the marks between which it is written")
    written = "\n\n".join(parts)
    return f"{head}{BEGIN}\n\n{written}\n\n{END}{tail}"


def _summary(measured: Measured) -> Iterator[str]:
    data, results, figures, images = measured
    yield "## Where and when"
    yield _machine(data, results)
    if data["absent"]:
        yield "Not measured: " + "; ".join(data["absent"]) + "."
    yield "## Targets"
    yield (
        "Ratios of one run, contenders in turn, at the median of the rounds (lowest to highest round);"
        " of 99th percentiles, less is better. The load average of the machine stands beside each: ratios"
        " against hand-written code count on an idle machine only."
    )
    yield _targets(results, figures)
    for store, title in _STORES.items():
        yield from (f"![{title}](images/{name})" for name in images if name == f"performance-{store}.svg")


def _all_tables(measured: Measured) -> Iterator[str]:
    _, results, figures, images = measured
    for store, title in _STORES.items():
        its = [result for result in results if result.cell.store == store]
        beside = [figure for figure in figures if figure.title.startswith(f"{store}: ")]
        if not its and not beside:
            continue
        yield f"## {title}"
        yield from (
            f"![{title}](images/{name})" for name in images if name == f"performance-{store}-tasks.svg"
        )
        if its:
            yield _cells(its)
        if beside:
            yield _figures(beside)


def _machine(data: dict[str, Any], results: Sequence[Result]) -> str:
    machine = dict(data["machine"])
    packages = machine.pop("packages")
    loads = [result.load for result in results] or [0.0]
    rows = [(name.replace("_", " "), str(value)) for name, value in machine.items()]
    rows.append(("packages", ", ".join(f"{name} {value}" for name, value in packages.items() if value)))
    rounds = sorted({len(samples) for result in results for samples in result.samples.values()})
    spread = " to ".join(str(number) for number in dict.fromkeys((rounds[0], rounds[-1]))) if rounds else "0"
    rows.append(("run", f"{data['mode']}, {spread} rounds of about {data['seconds']:g} s"))
    rows.append(("load average while measuring", f"{min(loads):g} to {max(loads):g}"))
    return _table(("", ""), rows)


def _targets(results: Sequence[Result], figures: Sequence[Figure]) -> str:
    rows: list[tuple[str, ...]] = []
    for verdict in verdicts(results):
        target, unit = verdict.target, verdict.target.unit
        measured = f"{verdict.ratio:.3g}{unit} ({verdict.least:.3g} to {verdict.most:.3g})"
        said = _said(verdict.reached, target.title)
        rows.append((target.title, target.bound_text, measured, f"{verdict.load:g}", said))
    for figure in figures:
        if figure.bound is None:
            continue
        bound = f"{'at least' if figure.at_least else 'at most'} {figure.bound:g} {figure.unit}"
        values = next(iter(figure.values.values()))
        measured = _spread(values, figure.unit)
        rows.append((figure.title, bound, measured, f"{figure.load:g}", _said(figure.reached, figure.title)))
    return _table(("what", "target", "measured", "load", ""), rows)


def _said(reached: bool | None, title: str) -> str:
    if reached:
        return "reached"
    fitting = [beginning for beginning in WHY_NOT if title.startswith(beginning)]
    return "**not reached**" + (f": {WHY_NOT[max(fitting, key=len)]}" if fitting else "")


_Column = tuple[str, Callable[[Sample], float | None]]
_COLUMNS: Final[tuple[_Column, ...]] = (
    ("p50, ms", lambda sample: sample.p50 * 1e3),
    ("p99, ms", lambda sample: sample.p99 * 1e3),
    ("processor, us each", lambda sample: sample.processor * 1e6),
    ("written, kB each", lambda sample: None if sample.written is None else sample.written / 1e3),
    ("ticker late by, p99, ms", lambda sample: None if sample.tick_p99 is None else sample.tick_p99 * 1e3),
)


def _cells(results: Sequence[Result]) -> str:
    rows: list[tuple[str, ...]] = []
    for result in results:
        for number, (name, samples) in enumerate(result.samples.items()):
            rates = result.rates(name)
            ours = "vtoken" in result.samples and name != "vtoken"
            ratio = f"{median(result.ratios('vtoken', name)):.3g}x" if ours else ""
            cell = str(result.cell).partition(" ")[2] + f" (load {result.load:g})"
            spread = f"{median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"
            more = [_median_of(samples, value) for _, value in _COLUMNS]
            rows.append((cell if number == 0 else "", name, spread, *more, ratio))
    head = ("cell", "contender", "per second (rounds)", *(title for title, _ in _COLUMNS))
    return _table((*head, "vtoken is faster by"), rows)


def _median_of(samples: Sequence[Sample], value: Callable[[Sample], float | None]) -> str:
    found = [measured for sample in samples if (measured := value(sample)) is not None]
    return f"{median(found):.3g}" if found else ""


def _figures(figures: Sequence[Figure]) -> str:
    rows = [
        (figure.title if number == 0 else "", name, _spread(values, figure.unit))
        for figure in figures
        for number, (name, values) in enumerate(figure.values.items())
    ]
    return _table(("what", "of", "median (lowest to highest round)"), rows)


def _spread(values: Sequence[float], unit: str) -> str:
    return f"{shown(median(values))} {unit} ({shown(min(values))} to {shown(max(values))})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
