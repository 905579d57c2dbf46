"""The text of ``docs/performance.md``: tables of what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from statistics import median
from typing import Any, Final

from .figures import Figure
from .rounds import Result
from .targets import verdicts

BEGIN: Final = "<!-- Written by `python -m tests.benchmarks plot FILE`; what stands outside is kept. -->"
END: Final = "<!-- The end of what was written. -->"
_FRAME: Final = f"# Performance\n\n{BEGIN}\n{END}\n"
_STORES: Final = {"sqlite": "SQLite", "mongodb": "MongoDB", "memory": "Memory"}


def page(
    data: dict[str, Any],
    results: Sequence[Result],
    figures: Sequence[Figure],
    images: Sequence[str],
    before: str | None,
) -> str:
    """The whole page: the part between the marks anew, the rest as it was.

    Args:
        data: the run.
        results: its cells.
        figures: its other figures.
        images: names of the pictures in ``images/``.
        before: the page as it is, or None.

    Raises:
        ValueError: the page has no marks.
    """
    head, begin, rest = (before or _FRAME).partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError("docs/performance.md has lost the marks between which it is written")
    written = "\n\n".join(_parts(data, results, figures, images))
    return f"{head}{BEGIN}\n\n{written}\n\n{END}{tail}"


def _parts(
    data: dict[str, Any], results: Sequence[Result], figures: Sequence[Figure], images: Sequence[str]
) -> Iterator[str]:
    yield "## Where and when"
    yield _machine(data, results)
    if data["absent"]:
        yield "Not measured: " + "; ".join(data["absent"]) + "."
    yield "## Targets"
    yield (
        "Ratios of one run, contenders in turn, at the median of the rounds (lowest to highest round);"
        " of 99th percentiles, less is better."
    )
    yield _targets(results, figures)
    for store, title in _STORES.items():
        its = [result for result in results if result.cell.store == store]
        beside = [figure for figure in figures if figure.title.startswith(f"{store}: ")]
        if not its and not beside:
            continue
        yield f"## {title}"
        yield from (
            f"![{title}](images/{name})" for name in images if name.startswith(f"performance-{store}")
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
    rows.append(("run", f"{data['mode']}, {data['rounds']} rounds of about {data['seconds']:g} s"))
    rows.append(("load average while measuring", f"{min(loads):g} to {max(loads):g}"))
    return _table(("", ""), rows)


def _targets(results: Sequence[Result], figures: Sequence[Figure]) -> str:
    rows: list[tuple[str, ...]] = []
    for verdict in verdicts(results):
        target = verdict.target
        what = f"{target.cell}, {'p99 ' * (target.what == 'p99')}against {target.baseline}"
        bound = f"{'at most' if target.what == 'p99' else 'at least'} {target.bound:g}x"
        measured = f"{verdict.ratio:.3g}x ({verdict.least:.3g} to {verdict.most:.3g})"
        rows.append((what, bound, measured, _said(verdict.reached)))
    for figure in figures:
        if figure.bound is None:
            continue
        bound = f"{'at least' if figure.at_least else 'at most'} {figure.bound:g} {figure.unit}"
        values = next(iter(figure.values.values()))
        rows.append((figure.title, bound, _spread(values, figure.unit), _said(figure.reached)))
    return _table(("what", "target", "measured", ""), rows)


def _said(reached: bool | None) -> str:
    return "reached" if reached else "**not reached**"


def _cells(results: Sequence[Result]) -> str:
    rows: list[tuple[str, ...]] = []
    for result in results:
        for name, samples in result.samples.items():
            rates = result.rates(name)
            ours = "vtoken" in result.samples and name != "vtoken"
            ratio = f"{median(result.ratios('vtoken', name)):.3g}x" if ours else ""
            ticks = [s.tick_p99 * 1e3 for s in samples if s.tick_p99 is not None]
            rows.append(
                (
                    str(result.cell).partition(" ")[2] if name == next(iter(result.samples)) else "",
                    name,
                    f"{median(rates):,.0f}",
                    f"{min(rates):,.0f} to {max(rates):,.0f}",
                    f"{median(s.p99 for s in samples) * 1e3:.3g}",
                    f"{median(ticks):.3g}" if ticks else "",
                    ratio,
                )
            )
    head = (
        "cell",
        "contender",
        "per second",
        "rounds",
        "p99, ms",
        "ticker late by, p99, ms",
        "vtoken is faster by",
    )
    return _table(head, rows)


def _figures(figures: Sequence[Figure]) -> str:
    rows = [
        (figure.title if number == 0 else "", name, _spread(values, figure.unit))
        for figure in figures
        for number, (name, values) in enumerate(figure.values.items())
    ]
    return _table(("what", "of", "median (lowest to highest round)"), rows)


def _spread(values: Sequence[float], unit: str) -> str:
    return f"{median(values):,.3g} {unit} ({min(values):,.3g} to {max(values):,.3g})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
