"""``vtoken copy SRC DST --json`` in a process of its own, which tells what it has done in lines.

The third argument is how many tokens it reads at once. With two more it sends itself a signal once so many
are done: in the middle of the work, where a cancellation waits for the next ``await``.

Where a terminal has a bar, it prints a line with the tokens done, in the end twice as many as there are, and
the most memory that it has had so far, in KiB.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final
from unittest.mock import patch

from vtoken.cli import migrating, run
from vtoken.migrate import copy

STATUS: Final = Path("/proc/self/status")


@contextmanager
def _lines(_what: str, _total: int | None = None) -> Generator[Callable[[int], None]]:
    until, number = map(int, sys.argv[4:] or (sys.maxsize, 0))

    def tell(done: int) -> None:
        print(done, _most_memory(), flush=True)
        if done >= until:
            os.kill(os.getpid(), number)

    yield tell


def _most_memory() -> int:
    """Of this program, not of what had been this process before it was started, as ``getrusage`` has it."""
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever who started us makes of it
    pages = partial(copy, page=int(sys.argv[3]))
    with patch.object(migrating, "progress", _lines), patch.object(migrating, "copy_tokens", pages):
        sys.exit(run(["copy", *sys.argv[1:3], "--json"]))
