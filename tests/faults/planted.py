"""Stores with a planted bug each, for the rounds that must find it."""

from __future__ import annotations

import asyncio

from vtoken.backend import (
    Budget,
    Change,
    InsertMode,
    InsertResult,
    Match,
    Release,
    Spent,
    StoredToken,
    Use,
)
from vtoken.errors import BackendUnavailable, OutcomeUnknown
from vtoken_backends._sqlite_batch import Operation, Private
from vtoken_backends.memory import MemoryBackend
from vtoken_backends.mongodb import MongoDBBackend
from vtoken_backends.sqlite import SQLiteBackend


class UsesTwice(SQLiteBackend):
    """Looks whether a token is valid, then uses it, with others in between."""

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        if not isinstance(change, Use) or match.valid_at is None:
            return await super().update(match, change)
        found = await self.find(match, 1)
        await asyncio.sleep(0.002)  # the race is what is planted
        return await super().update(match._replace(valid_at=None), change) if found else None


class KeepsTwo(SQLiteBackend):
    """Ends the old token, then adds the new one, with others in between."""

    async def insert(self, token: StoredToken, mode: InsertMode, keep_until: int = 0) -> InsertResult:
        if mode is not InsertMode.REPLACE:
            return await super().insert(token, mode, keep_until)
        old = Match(content_type=token.content_type, object_id=token.object_id, slug=token.slug)
        await self.deactivate(old, token.created_at)
        return await super().insert(token, InsertMode.ADD)


class CountsFarTooMany(SQLiteBackend):
    """Compares more guesses than the cap allows."""

    async def spend(self, budget: Budget, now: int, limit: int, window: int, max_window: int) -> Spent:
        return await super().spend(budget, now, 5 * limit, window, max_window)


class LosesOnCancel(SQLiteBackend):
    """Ends the old token and adds the new one by two statements: a cancellation falls between."""

    async def insert(self, token: StoredToken, mode: InsertMode, keep_until: int = 0) -> InsertResult:
        old = Match(content_type=token.content_type, object_id=token.object_id, slug=token.slug)
        await self.deactivate(old, token.created_at)
        return await super().insert(token, mode, keep_until)


class HoldsTheLock(SQLiteBackend):
    """Leaves the transaction of a cancelled update open."""

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        try:
            return await super().update(match, change)
        except asyncio.CancelledError:
            begin = Operation(lambda: ("BEGIN IMMEDIATE", Private()), False, ())
            self._begun = asyncio.ensure_future(self._submit(begin))
            raise


class NeverGivesBack(MemoryBackend):
    """Keeps a lease until it ends."""

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        return None if isinstance(change, Release) else await super().update(match, change)


class LeavesATask(MemoryBackend):
    """Goes on with something that nobody waits for."""

    async def open(self) -> None:
        await super().open()
        self._going_on = asyncio.ensure_future(asyncio.Event().wait())


class DeniesTheUnknown(MongoDBBackend):
    """Says that a write whose answer was lost did not happen."""

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        try:
            return await super().update(match, change)
        except OutcomeUnknown:
            pass
        raise BackendUnavailable("planted")


class ClaimsTheUnknown(MongoDBBackend):
    """Says that a write whose answer was lost was done."""

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        try:
            return await super().update(match, change)
        except OutcomeUnknown:
            pass
        return (await self.find(match._replace(valid_at=None), 1))[0]
