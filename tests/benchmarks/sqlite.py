"""The cells of SQLite, and who takes part in them."""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from vtoken.backend import State

from .by_hand import HandWritten, OneStatement, Plain
from .cells import Cell, Entry, Workload, opened
from .contender import Contender, Row
from .ours import VToken

WORKLOADS: Final[tuple[Workload, ...]] = ("issue", "consume", "check")


class Stores:
    """Who takes part, each time with a fresh file in one folder.

    Args:
        folder: on the file system that is measured.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.ours = self._entry("vtoken", vtoken)
        self.by_hand = self._entry(HandWritten.name, HandWritten)
        self.plain_1 = self._entry("plain sqlite3, 1 per transaction", lambda own: Plain(own, 1))
        self.plain_256 = self._entry("plain sqlite3, 256 per transaction", lambda own: Plain(own, 256))
        self.one_statement = self._entry(OneStatement.name, OneStatement)
        self.absent: list[str] = []
        self.on_uvloop: tuple[Entry, ...] = ()
        if find_spec("uvloop") is None:
            self.absent.append('uvloop: not installed (pip install "vtoken[bench]")')
        else:
            new_loop = import_module("uvloop").new_event_loop
            self.on_uvloop = (
                self.ours._replace(name="vtoken on uvloop", new_loop=new_loop),
                self.by_hand._replace(name=f"{HandWritten.name} on uvloop", new_loop=new_loop),
            )
        self.sqlalchemy = self._optional("SQLAlchemy async", "by_sqlalchemy", ("sqlalchemy", "greenlet"))
        self.django = self._optional("Django base app", "by_django", ("django", "verification_token"))

    def _entry(self, name: str, make: Callable[[Path], Contender]) -> Entry:
        @contextlib.asynccontextmanager
        async def fresh() -> AsyncGenerator[Contender]:
            with tempfile.TemporaryDirectory(dir=self._folder) as own:
                async with opened(make(Path(own))) as contender:
                    yield contender

        return Entry(name, fresh)

    def _optional(self, name: str, module: str, packages: Sequence[str]) -> tuple[Entry, ...]:
        missing = [package for package in packages if find_spec(package) is None]
        if missing:
            self.absent.append(f'{name}: no {" and no ".join(missing)} (pip install "vtoken[bench]")')
            return ()
        contender: type[Contender] = import_module(f"{__package__}.{module}").Contender
        return (self._entry(name, contender),)

    def cells(self, full: bool) -> Iterable[tuple[Cell, list[Entry]]]:
        """What is measured, the most important first."""
        for workload in WORKLOADS:
            yield (
                Cell("sqlite", workload, 256),
                [
                    self.ours,
                    self.by_hand,
                    self.plain_1,
                    self.plain_256,
                    *self.django,
                    *self.sqlalchemy * full,
                    *self.on_uvloop,
                ],
            )
        for workload in WORKLOADS:
            few = [self.ours, self.by_hand, self.one_statement, *self.sqlalchemy * full]
            yield Cell("sqlite", workload, 1), few
        for workload in WORKLOADS if full else ():
            yield Cell("sqlite", workload, 16), [self.ours, self.by_hand, *self.sqlalchemy]
        for tasks in (1, 16, 64, 256) if full else (16, 64):
            yield Cell("sqlite", "mix", tasks), [self.ours, self.by_hand, *self.sqlalchemy * full]
        for workload in WORKLOADS if full else WORKLOADS[:2]:
            yield Cell("sqlite", workload, 256, "busy loop"), [self.ours, self.by_hand]
        for workload in WORKLOADS:
            yield Cell("sqlite", workload, 256, "ticker"), [self.ours, self.by_hand]

    def slow_cells(self, full: bool) -> Iterable[tuple[Cell, list[Entry]]]:
        """What is measured on a slow disk."""
        for workload in WORKLOADS[:2]:
            for tasks in (1, 256) if full else (256,):
                entries = [self.ours, self.by_hand, self.plain_256, *self.sqlalchemy * full]
                yield Cell("sqlite", workload, tasks, "slow fsync"), entries


def vtoken(folder: Path) -> VToken:
    """vtoken on a file of its own."""
    path = folder / "tokens.db"

    async def look() -> list[Row]:
        # Each of these tokens has the one key that it was issued with.
        sql = "SELECT object_id, digests, state FROM vtoken_tokens"
        with contextlib.closing(sqlite3.connect(path)) as database:
            found = database.execute(sql).fetchall()
        return [Row(object_id, digest, state == State.ACTIVE.value) for object_id, digest, state in found]

    return VToken(f"sqlite:///{path}", look)
