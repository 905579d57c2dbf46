"""Stores that forget something when a call is cancelled, one way each: a storm must find all of them."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Self

from vtoken.backend import Change, Inserted, InsertMode, Match, Release, Spend, StoredToken
from vtoken_backends.memory import MemoryBackend
from vtoken_backends.sqlite import SQLiteBackend


class LosesOnCancel(SQLiteBackend):
    """Ends the old token and adds the new one by two statements: a cancellation falls between."""

    async def insert(
        self,
        token: StoredToken,
        mode: InsertMode,
        *,
        keep_until: int = 0,
        wanted_until: int = 0,
        also_taken: tuple[bytes, ...] = (),
        spends: tuple[Spend, ...] = (),
    ) -> Inserted:
        old = Match(content_type=token.content_type, object_id=token.object_id, slug=token.slug)
        await self.deactivate(old, token.created_at)
        return await super().insert(token, mode, also_taken=also_taken, spends=spends)


class HoldsTheLock(SQLiteBackend):
    """Leaves a transaction behind when an update is cancelled."""

    _file = Path()
    _begun: sqlite3.Connection | None = None

    @classmethod
    def from_url(cls, url: str, **options: object) -> Self:
        made = super().from_url(url, **options)
        made._file = Path(url.removeprefix("sqlite:///").partition("?")[0])
        return made

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        try:
            return await super().update(match, change)
        except asyncio.CancelledError:
            if self._begun is None:
                self._begun = sqlite3.connect(self._file, isolation_level=None)
                self._begun.execute("BEGIN IMMEDIATE")
            raise


class NeverGivesBack(MemoryBackend):
    """Keeps a hold until it ends."""

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        return None if isinstance(change, Release) else await super().update(match, change)


class LeavesATask(MemoryBackend):
    """Goes on with something that nobody waits for."""

    async def open(self) -> None:
        await super().open()
        self._going_on = asyncio.ensure_future(asyncio.Event().wait())
