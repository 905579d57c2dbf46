"""Stores with a planted bug each, for the histories that must find it."""

from __future__ import annotations

import asyncio
from typing import Any

from vtoken.backend import Hold, Inserted, InsertMode, Match, Outcome, Presented, Spend, StoredToken, Use
from vtoken_backends.sqlite import SQLiteBackend


class UsesTwice(SQLiteBackend):
    """Looks whether a token can be used, and says that it was, with others in between."""

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        if not isinstance(change, Use):
            return await super().present(key, change, now, spends)
        seen = await super().present(key, None, now, spends)
        await asyncio.sleep(0.002)  # the race is what is planted
        answer = await super().present(key, change, now, spends)
        was_right = seen.outcome is Outcome.RIGHT and answer.outcome is Outcome.REFUSED
        return seen if was_right else answer


class KeepsTwo(SQLiteBackend):
    """Ends the old token, then adds the new one, with others in between."""

    async def insert(self, token: StoredToken, mode: InsertMode, **named: Any) -> Inserted:
        if mode is not InsertMode.REPLACE:
            return await super().insert(token, mode, **named)
        old = Match(content_type=token.content_type, object_id=token.object_id, slug=token.slug)
        await self.deactivate(old, token.created_at)
        return await super().insert(token, InsertMode.ADD)


class CountsFarTooMany(SQLiteBackend):
    """Compares more wrong keys than the cap allows."""

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        wide = tuple(spend._replace(limit=5 * spend.limit) for spend in spends)
        return await super().present(key, change, now, wide)
