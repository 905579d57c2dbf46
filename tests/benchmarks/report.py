"""What is printed while the benchmarks run."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

from .figures import Figure, shown
from .rounds import Result
from .targets import Verdict


def cell_lines(result: Result) -> list[str]:
    """A cell: for each contender the median rate and its spread, the latency, and how vtoken compares."""
    lines = [f"{result.cell}  (load average {result.load})"]
    for name, samples in result.samples.items():
        rates = result.rates(name)
        line = f"  {name:36} {median(rates):9,.0f}/s ({min(rates):,.0f} to {max(rates):,.0f})"
        line += f"  p50 {median(s.p50 for s in samples) * 1e3:8.3f} ms"
        line += f"  p99 {median(s.p99 for s in samples) * 1e3:8.2f} ms"
        line += f"  processor {median(s.processor for s in samples) * 1e6:6.1f} us"
        written = [s.written for s in samples if s.written is not None]
        if written:
            line += f"  {median(written) / 1e3:5.1f} kB"
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
        target, least, most = verdict.target, verdict.least, verdict.most
        lines.append(
            f"  {'reached    ' if verdict.reached else 'NOT reached'} {verdict.ratio:6.2f}{target.unit}"
            f" ({least:.2f} to {most:.2f}), {target.bound_text:14} {target.title}"
        )
    return lines


def figure_line(figure: Figure) -> str:
    """A figure: the median and spread of each contender, and the bound."""
    parts = [
        f"{name} {shown(median(values))} {figure.unit} ({shown(min(values))} to {shown(max(values))})"
        for name, values in figure.values.items()
    ]
    line = f"{figure.title}: {', '.join(parts)}"
    if figure.bound is None:
        return line
    bound = f"{'at least' if figure.at_least else 'at most'} {figure.bound:g} {figure.unit}"
    return f"{line}; {bound}: {'reached' if figure.reached else 'NOT reached'}"
