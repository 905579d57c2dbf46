"""A process that issues, uses and deactivates tokens, and notes each step: what it is about to do, and what
was acknowledged, in a file of its own that it syncs before it goes on."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os

from tests.sqlite_tools import ask
from vtoken import TokenManager
from vtoken.errors import BackendUnavailable
from vtoken_backends.sqlite import SQLiteBackend
from vtoken_backends.sqlite.file import Synchronous

from .actors import Actor, Notebook, Side, line
from .notes import fixed_clock

_ACTORS = 6
_STEPS = 12
_CHECKPOINT = 60
"""Pages of the log before it is copied into the database: few, so that a short run has many of these."""


class _File(Notebook):
    def __init__(self, path: str, early: bool) -> None:
        super().__init__(early=early)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, note: dict[str, object]) -> None:
        os.write(self._file, line(note))

    def acknowledge(self, note: dict[str, object]) -> None:
        self.write(note)
        os.fsync(self._file)


async def _steps(actor: Actor) -> None:
    for _ in range(_STEPS):
        await actor.act()


async def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("store")
    parser.add_argument("notes")
    parser.add_argument("--phases", type=int, help="how often the store is opened; endless by default")
    parser.add_argument("--synchronous", choices=("full", "normal"), default="full")
    parser.add_argument("--early", action="store_true", help="the planted bug")
    arguments = parser.parse_args()
    synchronous: Synchronous = arguments.synchronous
    backend = SQLiteBackend(arguments.store, synchronous=synchronous)
    manager = TokenManager(backend, clock=fixed_clock)
    side = Side(manager, _File(arguments.notes, arguments.early))
    actors = [Actor([side], f"user{number}", number) for number in range(_ACTORS)]
    for phase in itertools.count():
        if phase == arguments.phases:
            return
        with contextlib.suppress(BackendUnavailable):  # at opening or closing; there is the next phase
            async with manager:
                await ask(backend, f"PRAGMA wal_autocheckpoint = {_CHECKPOINT}")
                await asyncio.gather(*map(_steps, actors))


if __name__ == "__main__":
    asyncio.run(_main())
