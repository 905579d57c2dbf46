"""Stores with a planted bug each, for the rounds that must find it."""

from __future__ import annotations

import asyncio

from vtoken.backend import Budget, Change, InsertMode, InsertResult, Match, Spent, StoredToken, Use
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


class CountsLate(SQLiteBackend):
    """Allows a guess first, and counts it afterwards, if the process lives so long."""

    async def spend(self, budget: Budget, now: int, limit: int, window: int, max_window: int) -> Spent:
        allowed = await super().spend(budget, now, limit, window, max_window)
        if allowed.allowed:
            await self.refund(budget, allowed.until)
            await asyncio.sleep(0.002)  # the race is what is planted
            await super().spend(budget, now, limit * 2, window, max_window)
        return allowed
