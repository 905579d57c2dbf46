"""Where and with what a figure was measured."""

from __future__ import annotations

import os
import platform
import sqlite3
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

_PACKAGES: Final = (
    *("vtoken", "anyio", "uvloop", "aiosqlite", "psycopg", "asyncpg", "pymongo", "motor"),
    *("sqlalchemy", "litestar", "django"),
)


def describe(folder: Path) -> dict[str, object]:
    """The machine, the interpreter, the libraries and the day.

    Args:
        folder: where the stores are; only its file system is told.
    """
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "file_system": _file_system(folder),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "sqlite": sqlite3.sqlite_version,
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def load_average() -> float:
    """Of the last minute: other processes that want the cores are seen here."""
    return round(os.getloadavg()[0], 2)


def bytes_written() -> int | None:
    """How many bytes this process has written to files so far; None where the system doesn't tell."""
    counters = Path("/proc/self/io")
    for line in counters.read_text().splitlines() if counters.exists() else ():
        if line.startswith("wchar:"):
            return int(line.partition(":")[2])
    return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _file_system(folder: Path) -> str:
    mounts = Path("/proc/mounts")
    best, kind = "", "unknown"
    for line in mounts.read_text().splitlines() if mounts.exists() else ():
        _, point, found, *_ = line.split()
        if folder.resolve().is_relative_to(point) and len(point) >= len(best):
            best, kind = point, found
    return kind
