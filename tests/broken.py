"""Backends with one planted bug each, of the kinds that real stores have."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Self

from vtoken.backend import (
    NEVER,
    Budget,
    Change,
    InsertMode,
    InsertResult,
    Lease,
    Match,
    Release,
    SetExtraData,
    Spent,
    StoredToken,
    Use,
)
from vtoken_backends.memory import MemoryBackend

ADD, REPLACE, IF_NONE_VALID = InsertMode.ADD, InsertMode.REPLACE, InsertMode.IF_NONE_VALID


def subject_of(token: StoredToken) -> Match:
    return Match(content_type=token.content_type, object_id=token.object_id, slug=token.slug)


class RacyUpdate(MemoryBackend):
    """Finds, then updates, with an await in between."""

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        found = await self.find(match, 1)
        await asyncio.sleep(0)
        return await super().update(Match(id=found[0].id), change) if found else None


class RacyReplace(MemoryBackend):
    """Deactivates, then inserts, with an await in between."""

    async def insert(self, token: StoredToken, mode: InsertMode, keep_until: int = 0) -> InsertResult:
        if mode is REPLACE and keep_until <= token.created_at:
            await self.deactivate(subject_of(token), token.created_at)
            await asyncio.sleep(0)
            mode = ADD
        return await super().insert(token, mode, keep_until)


class RacyOverlap(MemoryBackend):
    """Shortens the old tokens, then inserts the new one into their overlap, with an await in between."""

    async def insert(self, token: StoredToken, mode: InsertMode, keep_until: int = 0) -> InsertResult:
        if mode is REPLACE and keep_until > token.created_at:
            for old in await self.find(subject_of(token)._replace(active=True), 99):
                end = min(old.ends_at, keep_until)
                self._store.put(old._replace(expires_at=end, ends_at=end))
            await asyncio.sleep(0)
        return await super().insert(token, mode, keep_until)


class RacyIfNoneValid(MemoryBackend):
    """Looks for a valid token, then inserts, with an await in between."""

    async def insert(self, token: StoredToken, mode: InsertMode, keep_until: int = 0) -> InsertResult:
        if mode is IF_NONE_VALID:
            if await self.find(subject_of(token)._replace(valid_at=token.created_at), 1):
                return InsertResult.HAS_VALID
            await asyncio.sleep(0)
            mode = ADD
        return await super().insert(token, mode, keep_until)


class RacySpend(MemoryBackend):
    """Reads the budget, and counts only after others had their turn: the lost update."""

    async def spend(self, budget: Budget, now: int, limit: int, window: int, max_window: int) -> Spent:
        before = self._store.budgets.get(budget, (0, 0, 0))
        await asyncio.sleep(0)
        self._store.budgets[budget] = before
        return await super().spend(budget, now, limit, window, max_window)


class RacyDeactivate(MemoryBackend):
    """Counts what it found and not what it changed."""

    async def deactivate(self, match: Match, at: int) -> int:
        found = await self.find(match._replace(active=True), 10**9)
        await asyncio.sleep(0)
        await super().deactivate(match, at)
        return len(found)


class RacyPurge(MemoryBackend):
    """Counts what it found and not what it deleted."""

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> int:
        due = [token for token in await self.find(Match(), 10**9) if token.ends_at < before]
        await asyncio.sleep(0)
        await super().purge(before, now, limit, budgets_before)
        return len(due[:limit])


class CountsAfterComparing(MemoryBackend):
    """Allows an attempt at once, and counts it when others had their turn."""

    async def spend(self, budget: Budget, now: int, limit: int, window: int, max_window: int) -> Spent:
        spent, _, until = self._store.budgets.get(budget, (0, 0, now + window))
        spend = super().spend(budget, now, limit, window, max_window)
        if spent >= limit and until > now:
            return await spend
        self._late = asyncio.ensure_future(spend)
        return Spent(True, until)


class SwallowsCancellation(MemoryBackend):
    """Finishes a cancelled update as if nothing had been said."""

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        return await super().update(match, change)


class HalfOpens(MemoryBackend):
    """Counts as open before it is connected; a cancellation falls between."""

    _connected = False

    async def open(self) -> None:
        await super().open()
        if self._opens == 1:
            await asyncio.sleep(0)
            self._connected = True

    async def close(self) -> None:
        await super().close()
        self._connected = self._opens > 0

    async def insert(self, token: StoredToken, mode: InsertMode, keep_until: int = 0) -> InsertResult:
        assert self._connected
        return await super().insert(token, mode, keep_until)


class TakesUseInTwoSteps(MemoryBackend):
    """Counts the use and its id in two steps; a cancellation falls between them."""

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        if not isinstance(change, Use):
            return await super().update(match, change)
        used = await super().update(match, Use(change.at))
        await asyncio.sleep(0)
        if used is not None and change.use_id:
            used = used._replace(use_ids=(*used.use_ids, change.use_id))
            self._store.put(used)
        return used


class ForgetsSlug(MemoryBackend):
    """Matches whatever the slug."""

    async def find(self, match: Match, limit: int, after: tuple[int, str] | None = None) -> list[StoredToken]:
        return await super().find(match._replace(slug=None), limit, after)

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        return await super().update(match._replace(slug=None), change)


class ForgetsContextInCompany(MemoryBackend):
    """Gathers updates, and minds the context of those alone that come alone."""

    _company = 0

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        self._company += 1
        try:
            await asyncio.sleep(0)
            return await super().update(match if self._company == 1 else match._replace(context=None), change)
        finally:
            self._company -= 1


class ForgetsObject(MemoryBackend):
    """Deactivates the tokens of every object."""

    async def deactivate(self, match: Match, at: int) -> int:
        return await super().deactivate(match._replace(object_id=None), at)


class FoldsCase(MemoryBackend):
    """Stores and compares object ids as a case-insensitive collation does."""

    async def insert(self, token: StoredToken, mode: InsertMode, keep_until: int = 0) -> InsertResult:
        return await super().insert(token._replace(object_id=token.object_id.casefold()), mode, keep_until)

    async def find(self, match: Match, limit: int, after: tuple[int, str] | None = None) -> list[StoredToken]:
        folded = None if match.object_id is None else match.object_id.casefold()
        return await super().find(match._replace(object_id=folded), limit, after)


class TakesNoDigestForAny(MemoryBackend):
    """Takes an empty list of digests for "whatever the digest"."""

    async def find(self, match: Match, limit: int, after: tuple[int, str] | None = None) -> list[StoredToken]:
        return await super().find(match._replace(digests=match.digests or None), limit, after)


class ExclusiveBoundary(MemoryBackend):
    """``expires_at > now`` where it must be ``>=``."""

    async def find(self, match: Match, limit: int, after: tuple[int, str] | None = None) -> list[StoredToken]:
        found = await super().find(match, limit, after)
        return [token for token in found if token.expires_at != match.valid_at]

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        if match.valid_at is not None and not await self.find(match, 1):
            return None
        return await super().update(match, change)


class OldestFirst(MemoryBackend):
    """Finds the oldest token first."""

    async def find(self, match: Match, limit: int, after: tuple[int, str] | None = None) -> list[StoredToken]:
        return (await super().find(match, 10**9, after))[::-1][:limit]


class RepeatsThePage(MemoryBackend):
    """Returns the last token of a page once more on the next."""

    async def find(self, match: Match, limit: int, after: tuple[int, str] | None = None) -> list[StoredToken]:
        found = await super().find(match, 10**9)
        return [token for token in found if after is None or (token.created_at, token.id) <= after][:limit]


class LosesMilliseconds(MemoryBackend):
    """Keeps times in whole seconds."""

    async def insert(self, token: StoredToken, mode: InsertMode, keep_until: int = 0) -> InsertResult:
        created, expires = (moment // 1000 * 1000 for moment in (token.created_at, token.expires_at))
        return await super().insert(token._replace(created_at=created, expires_at=expires), mode, keep_until)


class LosesEmptyExtraData(MemoryBackend):
    """Stores an empty value as none."""

    async def insert(self, token: StoredToken, mode: InsertMode, keep_until: int = 0) -> InsertResult:
        empty = token.extra_data in ("", "{}", "[]")
        token = token._replace(extra_data=None if empty else token.extra_data)
        return await super().insert(token, mode, keep_until)


class DeactivatesBeforeTheCollision(MemoryBackend):
    """Deactivates the old token, and only then finds that the new key is taken."""

    async def insert(self, token: StoredToken, mode: InsertMode, keep_until: int = 0) -> InsertResult:
        if mode is REPLACE and keep_until <= token.created_at:
            await self.deactivate(subject_of(token), token.created_at)
        return await super().insert(token, mode, keep_until)


class ReplacesTheNewestOnly(MemoryBackend):
    """Deactivates one old token where there are several."""

    async def insert(self, token: StoredToken, mode: InsertMode, keep_until: int = 0) -> InsertResult:
        if mode is REPLACE and keep_until <= token.created_at:
            for old in await self.find(subject_of(token)._replace(active=True), 1):
                await self.deactivate(Match(id=old.id), token.created_at)
            mode = ADD
        return await super().insert(token, mode, keep_until)


class ForgetsOverlap(MemoryBackend):
    """Keeps the old token, and forgets that one use is to end both."""

    async def insert(self, token: StoredToken, mode: InsertMode, keep_until: int = 0) -> InsertResult:
        result = await super().insert(token, mode, keep_until)
        self._store.overlaps.clear()
        return result


class UsesNothing(MemoryBackend):
    """Hands out a use and does not store it."""

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        before = await self.find(match, 1)
        used = await super().update(match, change)
        if used is not None and isinstance(change, Use):
            self._store.put(before[0])
        return used


class IgnoresUseId(MemoryBackend):
    """Does not remember who used the token."""

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        return await super().update(match, Use(change.at) if isinstance(change, Use) else change)


class CountsOneUseOnly(MemoryBackend):
    """Ends a token with its first use, whatever ``max_uses`` says."""

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        used = await super().update(match, change)
        if used is not None and isinstance(change, Use):
            await self.deactivate(Match(id=used.id), change.at)
        return used


class LeasesWithoutFence(MemoryBackend):
    """Lets anyone end a lease, whoever holds it now."""

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        return await super().update(match._replace(lease_id=None, leased_at=None), change)


class LeasesNothing(MemoryBackend):
    """Hands out a lease and does not store it."""

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        token = await super().update(match, change)
        if token is not None and isinstance(change, Lease):
            await super().update(Match(id=token.id), Release())
        return token


class RevivesOnRelease(MemoryBackend):
    """Makes the token active again when its lease is given back."""

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        token = await super().update(match, change)
        if token is not None and isinstance(change, Release):
            self._store.put(token._replace(is_active=True))
        return token


class RevivesOnSave(MemoryBackend):
    """Writes the whole record back when only the extra data changes."""

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        token = await super().update(match, change)
        if token is not None and isinstance(change, SetExtraData):
            self._store.put(token._replace(is_active=True))
        return token


class PurgesLeased(MemoryBackend):
    """Deletes an expired token that somebody holds."""

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> int:
        return await super().purge(before, NEVER, limit, budgets_before)


class PurgesTheLastMillisecond(MemoryBackend):
    """``ends_at <= before`` where it must be ``<``."""

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> int:
        return await super().purge(before + 1, now, limit, budgets_before)


class PurgesWithoutBound(MemoryBackend):
    """Deletes everything at once."""

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> int:
        return await super().purge(before, now, 10**9, budgets_before)


class PurgesBudgets(MemoryBackend):
    """Forgets the budgets whose window is still running."""

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> int:
        return await super().purge(before, now, limit, NEVER)


class PurgesOneLess(MemoryBackend):
    """Deletes one token fewer than it may."""

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> int:
        return await super().purge(before, now, max(1, limit - 1), budgets_before)


class ResetsOnReissue(MemoryBackend):
    """Gives every new token a fresh budget."""

    async def insert(self, token: StoredToken, mode: InsertMode, keep_until: int = 0) -> InsertResult:
        await self.reset(Budget(token.content_type, token.object_id, token.slug, "attempts"))
        return await super().insert(token, mode, keep_until)


class ResetsOnRefund(MemoryBackend):
    """Forgets the whole budget where one is given back."""

    async def refund(self, budget: Budget, until: int) -> None:
        await self.reset(budget)


class NeverRefunds(MemoryBackend):
    """Keeps what should be given back."""

    async def refund(self, budget: Budget, until: int) -> None:
        pass


class SharesBudgets(MemoryBackend):
    """Has one budget for all slugs of an object."""

    async def spend(self, budget: Budget, now: int, limit: int, window: int, max_window: int) -> Spent:
        return await super().spend(budget._replace(slug=""), now, limit, window, max_window)


class AllowsOneMore(MemoryBackend):
    """``spent <= limit`` where it must be ``<``."""

    async def spend(self, budget: Budget, now: int, limit: int, window: int, max_window: int) -> Spent:
        return await super().spend(budget, now, limit + 1, window, max_window)


class NeverGrows(MemoryBackend):
    """Begins every window as short as the first."""

    async def spend(self, budget: Budget, now: int, limit: int, window: int, max_window: int) -> Spent:
        return await super().spend(budget, now, limit, window, window)


class WorksWhenClosed(MemoryBackend):
    """Opens itself when it is used."""

    async def find(self, match: Match, limit: int, after: tuple[int, str] | None = None) -> list[StoredToken]:
        self._opens = self._opens or 1
        return await super().find(match, limit, after)


class BelongsToItsLoop(MemoryBackend):
    """Leaves it to asyncio to refuse another event loop."""

    async def open(self) -> None:
        await super().open()
        self._loop = asyncio.get_running_loop()

    async def find(self, match: Match, limit: int, after: tuple[int, str] | None = None) -> list[StoredToken]:
        if asyncio.get_running_loop() is not self._loop:
            await self._loop.create_future()
        return await super().find(match, limit, after)


class ClosesAtOnce(MemoryBackend):
    """Does not count how often it was opened."""

    async def close(self) -> None:
        self._opens = 0


class LeavesATask(MemoryBackend):
    """Begins a task that nobody ends."""

    async def open(self) -> None:
        await super().open()
        self._task = asyncio.create_task(asyncio.Event().wait())


class KeepsToItself(MemoryBackend):
    """Is alone with its writes: every backend has a store of its own."""

    def __init__(self, name: str = "") -> None:
        super().__init__()


class TakesAnyOption(MemoryBackend):
    """Takes a misspelt option for one that it need not heed."""

    @classmethod
    def from_url(cls, url: str, **options: object) -> Self:
        return super().from_url(url)
