"""A slower disk: time added to each fsync of a child process, for every contender in it alike."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Final

ADDED: Final = 0.002
"""Seconds."""
_MARK: Final = "VTOKEN_BENCHMARK_SLOW_DISK"
_SOURCE: Final = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>

static long calls;

static int slowly(const char *name, int fd) {
    static const struct timespec added = {0, NANOSECONDS};
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    int result = real(fd);
    __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED);
    nanosleep(&added, 0);
    return result;
}

int fsync(int fd) { return slowly("fsync", fd); }
int fdatasync(int fd) { return slowly("fdatasync", fd); }
long vtoken_benchmark_syncs(void) { return __atomic_load_n(&calls, __ATOMIC_RELAXED); }
"""


def why_not() -> str | None:
    """Why there can be no slow disk here, or None."""
    if sys.platform != "linux":
        return "a slow disk needs Linux (LD_PRELOAD)"
    return None if _compiler() else "a slow disk needs a C compiler: there is neither cc nor gcc nor clang"


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process whose disk is slow.

    Args:
        folder: where the shim is built; it must outlive the process.

    Raises:
        subprocess.CalledProcessError: it does not compile.
    """
    source, shim = folder / "slow_disk.c", folder / "slow_disk.so"
    source.write_text(_SOURCE.replace("NANOSECONDS", str(int(ADDED * 1e9))))
    compiler = _compiler() or "cc"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
    return {**os.environ, "LD_PRELOAD": str(shim), _MARK: "1"}


def is_slow() -> bool:
    """Whether this process was started in such an environment."""
    return _MARK in os.environ


def syncs() -> int | None:
    """How often this process has called fsync or fdatasync; None where nobody counts."""
    if not is_slow():
        return None
    return int(ctypes.CDLL(None).vtoken_benchmark_syncs())


def check(folder: Path) -> None:
    """Make sure that the disk is as slow as it is said to be.

    Raises:
        RuntimeError: it is not.
    """
    with open(folder / "probe", "wb") as file:
        file.write(b"x")
        file.flush()
        begun = perf_counter()
        os.fsync(file.fileno())
    if perf_counter() - begun < ADDED or not syncs():
        raise RuntimeError("the shim that slows fsync down was not loaded")


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
