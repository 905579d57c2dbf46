"""What is printed while the benchmarks run."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

from .figures import Figure
from .rounds import Result
from .targets import Verdict


def cell_lines(result: Result) -> list[str]:
    """A cell: for each contender the median rate and its spread, the latency, and how vtoken compares."""
    lines = [f"{result.cell}  (load average {result.load})"]
    for name, samples in result.samples.items():
        rates = result.rates(name)
        line = f"  {name:36} {median(rates):9,.0f}/s ({min(rates):,.0f} to {max(rates):,.0f})"
        line += f"  p99 {median(s.p99 for s in samples) * 1e3:8.2f} ms"
        ticks = [s.tick_p99 for s in samples if s.tick_p99 is not None]
        if ticks:
            line += f"  ticker late by {median(ticks) * 1e3:.1f} ms at p99"
        syncs = [s.syncs for s in samples if s.syncs is not None]
        if syncs:
            line += f"  {median(syncs):.3f} fsyncs each"
        if name != "vtoken" and "vtoken" in result.samples:
            ratios = result.ratios("vtoken", name)
            line += f"  vtoken {median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(line)
    return lines


def verdict_lines(verdicts: Iterable[Verdict]) -> list[str]:
    """The table of targets."""
    lines: list[str] = []
    for verdict in verdicts:
        target, ratio, least, most = verdict.target, verdict.ratio, verdict.least, verdict.most
        what = f"{target.cell}, {'p99 ' * (target.what == 'p99')}against {target.baseline}"
        bound = f"{'at most' if target.what == 'p99' else 'at least'} {target.bound:g}x"
        lines.append(
            f"  {'reached    ' if verdict.reached else 'NOT reached'} {ratio:6.2f}x"
            f" ({least:.2f} to {most:.2f}), {bound:14} {what}"
        )
    return lines


def figure_line(figure: Figure) -> str:
    """A figure: the median and spread of each contender, and the bound."""
    parts = [
        f"{name} {median(values):,.4g} {figure.unit} ({min(values):,.4g} to {max(values):,.4g})"
        for name, values in figure.values.items()
    ]
    line = f"{figure.title}: {', '.join(parts)}"
    if figure.bound is None:
        return line
    bound = f"{'at least' if figure.at_least else 'at most'} {figure.bound:g} {figure.unit}"
    return f"{line}; {bound}: {'reached' if figure.reached else 'NOT reached'}"
