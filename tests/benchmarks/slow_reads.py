"""How long look-ups hold the event loop on a slow disk: ``python -m tests.benchmarks.slow_reads [STORED]``.

A store of a million tokens, of which the system has no page in its cache. In a child process each read of a
page that the system would have to fetch takes two milliseconds more, on whichever thread. Tasks check random
tokens, and each turn of the event loop is timed. How many slow pages a turn has waited for does not depend on
what else the machine does.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import selectors
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Final

from vtoken import Subject, TokenManager

from .cells import percentile
from .contender import CONTENT_TYPE, SLUG
from .machine import load_average
from .scale import SQLiteFile, key_of, object_of

_CHECKS: Final = 2_000
_TASKS: Final = 16
_SOURCE: Final = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static __thread long slow;

static ssize_t slowly(int fd, void *into, size_t count, off64_t offset) {
    static const struct timespec added = {0, 2000000};
    static ssize_t (*real)(int, void *, size_t, off64_t);
    struct iovec whole = {into, count};
    ssize_t result = preadv2(fd, &whole, 1, offset, RWF_NOWAIT);
    if (result == (ssize_t)count || (result < 0 && errno != EAGAIN)) return result;
    if (!real) real = (ssize_t (*)(int, void *, size_t, off64_t))dlsym(RTLD_NEXT, "pread64");
    slow++;
    nanosleep(&added, 0);
    return real(fd, into, count, offset);
}

ssize_t pread(int fd, void *into, size_t count, off_t offset) { return slowly(fd, into, count, offset); }
ssize_t pread64(int fd, void *into, size_t count, off64_t offset) { return slowly(fd, into, count, offset); }
long vtoken_benchmark_slow_reads(void) { return slow; }
"""


class Turns(selectors.DefaultSelector):
    """Times the turns of the event loop, and counts the slow pages that each waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._pages = ctypes.CDLL(None).vtoken_benchmark_slow_reads
        self._began = (perf_counter(), 0)
        self.seconds: list[float] = []
        self.pages: list[int] = []

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        began, pages = self._began
        self.seconds.append(perf_counter() - began)
        self.pages.append(self._pages() - pages)
        ready = super().select(timeout)
        self._began = perf_counter(), self._pages()
        return ready


async def _check(path: str, stored: int, turns: Turns) -> None:
    dice = random.Random(stored)  # noqa: S311  # the same ones each time
    numbers = iter(dice.sample(range(stored), _CHECKS))
    waits: list[float] = []
    async with TokenManager.from_url(f"sqlite:///{path}?check=never") as manager:
        await manager.exists_valid(Subject(CONTENT_TYPE, object_of(0)), SLUG, key_of(0))
        turns.seconds.clear()
        turns.pages.clear()

        async def task() -> None:
            for number in numbers:
                begun = perf_counter()
                if not await manager.exists_valid(
                    Subject(CONTENT_TYPE, object_of(number)), SLUG, key_of(number)
                ):
                    raise RuntimeError("a valid token was not found")
                waits.append(perf_counter() - begun)

        await asyncio.gather(*(task() for _ in range(_TASKS)))
    in_time = [percentile(waits, share) * 1e3 for share in (0.5, 0.99)]
    waited = sum(map(bool, turns.pages))
    print(
        f"load average {load_average()}; a check p50 {in_time[0]:.1f} ms, p99 {in_time[1]:.1f} ms;", end=" "
    )
    print(
        f"{len(turns.seconds)} turns of the loop, {waited} waited for slow pages, for {max(turns.pages)} at",
        end=" ",
    )
    print(f"most; a turn took {percentile(turns.seconds, 0.99) * 1e3:.2f} ms at p99")


def _child(path: str, stored: int) -> None:
    turns = Turns()
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(turns)) as runner:
        runner.run(_check(path, stored, turns))


def main(stored: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokens.db")
        asyncio.run(SQLiteFile(path).make(stored))
        measure(path, stored, Path(folder))


def measure(path: Path, stored: int, folder: Path) -> None:
    """With nothing, about half, nearly all and all of the file in the system's cache."""
    source, shim = folder / "slow_reads.c", folder / "slow_reads.so"
    source.write_text(_SOURCE)
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)  # noqa: S607  # whichever compiler there is
    print(f"{_CHECKS} checks by {_TASKS} tasks, {stored:,} stored")
    for cached in (0, 50, 99, 100):
        _keep(path, cached)
        print(f"{cached} % of the file cached: ", end="", flush=True)
        command = [sys.executable, "-m", "tests.benchmarks.slow_reads", str(stored), str(path)]
        subprocess.run(command, env={**os.environ, "LD_PRELOAD": str(shim)}, check=True)


def _keep(path: Path, percent: int) -> None:
    """Have the system forget the file, but for so many of its parts of 16 KiB."""
    dice = random.Random(percent)  # noqa: S311  # the same ones each time
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for start in range(0, os.fstat(file.fileno()).st_size, 16_384):
            if dice.random() * 100 < percent:
                os.pread(file.fileno(), 16_384, start)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        _child(sys.argv[2], int(sys.argv[1]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
