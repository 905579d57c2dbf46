"""From results to the pages of the documentation and their pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

from .cells import Sample, Workload
from .figures import Figure
from .pages import Measured, performance, tables
from .rounds import Result

_WORKLOADS: Final[tuple[Workload, ...]] = ("issue", "consume", "check")
_STORES: Final = ("sqlite", "postgresql", "mongodb")
_BASELINES: Final = {
    "sqlite": ("SQLite", "hand-written aiosqlite"),
    "postgresql": ("PostgreSQL", "psycopg, one call each"),
    "mongodb": ("MongoDB", "Motor, one call each"),
}
_NAMES: Final[dict[Workload, str]] = {"issue": "issue", "consume": "use", "check": "check"}
_SHADES: Final = {1: "#9cc3e0", 16: "#4d94c7", 256: "#0f4c7a"}
_OURS: Final = "#1b6ca8"
_OTHERS: Final = "#8a929c"
_TEXT: Final = "#33383f"


class _Measure(NamedTuple):
    title: str
    value: Callable[[Sample], float]
    label: Callable[[float], str]
    of_tasks_only: bool
    """Plain sqlite3 has no tasks that wait."""


def _rate(sample: Sample) -> float:
    return sample.rate


def _p99(sample: Sample) -> float:
    return sample.p99 * 1e3


_MEASURES: Final = (
    _Measure("operations per second", _rate, "{:,.0f}".format, False),
    _Measure("99th percentile, ms", _p99, "{:,.3g}".format, True),
)


def render(sources: Sequence[Path], docs: Path) -> list[Path]:
    """Write the pages and the pictures.

    Args:
        sources: the JSON of a run, or of several on one machine.
        docs: the folder of the documentation.

    Returns:
        What was written.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; it is in the extra ``bench``.
    """
    runs: list[dict[str, Any]] = [json.loads(source.read_text()) for source in sources]
    data = runs[0] | {"absent": [why for run in runs for why in run["absent"]]}
    results = [Result.from_json(cell) for run in runs for cell in run["cells"]]
    figures = [Figure(**figure) for run in runs for figure in run["figures"]]
    images = docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    drawn = [path for path in (_bars(results, store, images) for store in _STORES) if path]
    drawn += [path for path in (_scaling(results, store, images) for store in _STORES) if path]
    drawn += [path for path in (_overview(results, images),) if path]
    measured = Measured(data, results, figures, [path.name for path in drawn])
    written: list[Path] = []
    for name, page in ("performance.md", performance), ("performance-tables.md", tables):
        document = docs / name
        before = document.read_text() if document.exists() else None
        document.write_text(page(measured, before))
        written.append(document)
    return [*written, *drawn]


def _pyplot() -> Any:
    matplotlib: Any = import_module("matplotlib")
    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {
            "svg.fonttype": "none",  # text stays text
            "svg.hashsalt": "vtoken",  # the same results give the same file
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "text.color": _TEXT,
            "axes.labelcolor": _TEXT,
            "xtick.color": _TEXT,
            "ytick.color": _TEXT,
        }
    )
    return import_module("matplotlib.pyplot")


def _save(pyplot: Any, figure: Any, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight", facecolor="white")
    pyplot.close(figure)
    return path


def _overview(results: Sequence[Result], images: Path) -> Path | None:
    """How many times as fast as hand-written code on the same driver: one line a store and operation."""
    rows: list[tuple[str, dict[int, float]]] = []
    for store, (title, baseline) in _BASELINES.items():
        for workload in _WORKLOADS:
            its = {
                r.cell.tasks: median(r.ratios("vtoken", baseline))
                for r in results
                if (r.cell.store, r.cell.workload, r.cell.beside) == (store, workload, "")
                and r.cell.tasks in _SHADES
                and baseline in r.samples
            }
            if not its:
                return None
            rows.append((f"{title}: {_NAMES[workload]}", its))
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8.5, 4.2), layout="constrained")
    axes.axvline(1, color=_TEXT, linewidth=1)
    for row, (_, by_tasks) in enumerate(rows):
        axes.plot([min(by_tasks.values()), max(by_tasks.values())], [row, row], color="#d5dae0", zorder=1)
        for tasks, ratio in by_tasks.items():
            axes.plot(ratio, row, marker="o", markersize=9, color=_SHADES[tasks], linestyle="none")
    for tasks, shade in _SHADES.items():
        label = f"{tasks} requests at once" if tasks > 1 else "1 request at a time"
        axes.plot([], [], marker="o", markersize=9, color=shade, linestyle="none", label=label)
    axes.set_xscale("log")
    ticks = (0.5, 1, 2, 4, 8, 16)
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(rows)), [title for title, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("operations a second in relation to hand-written code on the same driver")
    axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1), ncols=3, frameon=False)
    return _save(pyplot, figure, images / "performance.svg")


def _bars(results: Sequence[Result], store: str, images: Path) -> Path | None:
    """Rates and latencies of every contender at 256 tasks."""
    found = {
        r.cell.workload: r for r in results if (r.cell.store, r.cell.tasks, r.cell.beside) == (store, 256, "")
    }
    if not found.keys() >= set(_WORKLOADS):
        return None
    pyplot = _pyplot()
    rows = len(found["issue"].samples)
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 1.2 + 0.62 * rows), sharey=True, layout="constrained")
    for line, measure in enumerate(_MEASURES):
        for column, workload in enumerate(_WORKLOADS):
            _panel(axes[line][column], found[workload], measure)
            axes[line][column].set_title(f"{workload}: {measure.title}", fontsize=9, loc="left")
    figure.suptitle(f"{store}, 256 concurrent tasks (medians, lowest to highest round; logarithmic)")
    return _save(pyplot, figure, images / f"performance-{store}.svg")


def _panel(axes: Any, result: Result, measure: _Measure) -> None:
    for row, (name, samples) in enumerate(result.samples.items()):
        if measure.of_tasks_only and name.startswith("plain"):
            continue
        values = [measure.value(sample) for sample in samples]
        middle = median(values)
        colour = _OURS if name.startswith("vtoken") else _OTHERS
        axes.plot([min(values), max(values)], [row, row], color=colour, linewidth=2.5, alpha=0.5)
        axes.plot(middle, row, color=colour, marker="o", markersize=8)
        axes.annotate(
            measure.label(middle), (max(values), row), xytext=(7, 0), textcoords="offset points", va="center"
        )
    axes.set_xscale("log")
    left, right = axes.get_xlim()
    axes.set_xlim(left, right * (right / left) ** 0.28)  # room for the labels
    axes.set_yticks(range(len(result.samples)), list(result.samples))
    axes.set_ylim(len(result.samples) - 0.5, -0.5)  # the first one on top
    axes.minorticks_off()
    axes.grid(axis="x", color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)


def _scaling(results: Sequence[Result], store: str, images: Path) -> Path | None:
    """Rates by the number of tasks."""
    lines: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for result in sorted(results, key=lambda r: r.cell.tasks):
        if result.cell.store == store and not result.cell.beside and result.cell.workload in _WORKLOADS:
            for name in result.samples:
                by_name = lines.setdefault(result.cell.workload, {})
                by_name.setdefault(name, []).append((result.cell.tasks, median(result.rates(name))))
    if len(lines.get("issue", {}).get("vtoken", [])) < 3:
        return None
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for panel, workload in zip(axes, _WORKLOADS, strict=True):
        for name, points in lines[workload].items():
            if len(points) < 3:
                continue
            colour = _OURS if name.startswith("vtoken") else _OTHERS
            panel.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, linewidth=2)
            panel.annotate(name, points[-1], xytext=(6, 0), textcoords="offset points", va="center")
        panel.set(xscale="log", yscale="log", xlabel="concurrent tasks", xlim=(0.8, 4000))
        panel.set_xticks([1, 16, 256], ["1", "16", "256"])
        panel.minorticks_off()
        panel.set_title(f"{workload}: operations per second", fontsize=9, loc="left")
    return _save(pyplot, figure, images / f"performance-{store}-tasks.svg")
