"""Backends with one planted bug each, of the kinds that real stores have."""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import suppress
from typing import Any, Self

from vtoken.backend import (
    NEVER,
    STALE_HOLD,
    Budget,
    Change,
    Charge,
    Hold,
    Inserted,
    InsertMode,
    InsertResult,
    Match,
    Outcome,
    Presented,
    Purged,
    Release,
    SetExtraData,
    SlugCount,
    Spend,
    Spending,
    State,
    StoredHold,
    StoredToken,
    TokenBackend,
    Use,
    UseHeld,
    ended,
    key_of,
    matches,
    refusal,
    replaced,
    runs,
    satisfies,
    with_hold,
    with_use,
)
from vtoken.errors import InvalidInput
from vtoken_backends.memory import MemoryBackend
from vtoken_backends.sqlite import SQLiteBackend

ADD, REPLACE, IF_NONE_VALID, ONCE = InsertMode


def line_of(token: StoredToken) -> Match:
    return Match(
        content_type=token.content_type, object_id=token.object_id, slug=token.slug, context=token.context
    )


class Broken(MemoryBackend):
    """What the bugs below need of a memory backend."""

    async def insert(self, token: StoredToken, mode: InsertMode, **named: Any) -> Inserted:
        return await super().insert(token, mode, **named)

    def token(self, token_id: str) -> StoredToken:
        return self._store.tokens[token_id]

    def save(self, token: StoredToken) -> None:
        self._store.save(token)

    async def line(self, token: StoredToken) -> list[StoredToken]:
        return await MemoryBackend.find(self, line_of(token)._replace(active=True), 10**9)


# Races --------------------------------------------------------------------------------------------


class RacyUse(Broken):
    """Compares a key, then uses the token, with an await in between: the lost update."""

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        seen = await super().present(key, None, now)
        await asyncio.sleep(0)
        answer = await super().present(key, change, now, spends)
        was_right = seen.outcome is Outcome.RIGHT and answer.outcome is Outcome.REFUSED
        if isinstance(change, Use) and seen.token is not None and was_right:
            self.save(with_use(seen.token, change))
            return Presented(Outcome.RIGHT, self.token(seen.token.id))
        return answer


class RacyHold(Broken):
    """Looks whether a use is free, then takes a hold on it, with an await in between."""

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        seen = await super().present(key, None, now)
        await asyncio.sleep(0)
        answer = await super().present(key, change, now, spends)
        if isinstance(change, Hold) and seen.token is not None and seen.outcome is Outcome.RIGHT:
            own = key_of(seen.token, key)
            if answer.outcome is Outcome.REFUSED and own is not None:
                self.save(with_hold(self.token(seen.token.id), own, change, now))
                return Presented(Outcome.RIGHT, self.token(seen.token.id))
        return answer


class ComparesUsesAlone(Broken):
    """Uses what it saw, if only ``uses`` has not changed since: a deactivation in between is lost."""

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        seen = await super().present(key, None, now)
        await asyncio.sleep(0)
        if isinstance(change, Use) and seen.token is not None and seen.outcome is Outcome.RIGHT:
            stored = self._store.tokens.get(seen.token.id)
            if stored is not None and not stored.is_active and stored.uses == seen.token.uses:
                self.save(with_use(stored, change))
                return Presented(Outcome.RIGHT, self.token(stored.id))
        return await super().present(key, change, now, spends)


class RacyReplace(Broken):
    """Replaces, then inserts, with an await in between."""

    async def insert(self, token: StoredToken, mode: InsertMode, **named: Any) -> Inserted:
        if mode is REPLACE and not named.get("keep_until"):
            for old in await self.line(token):
                self.save(replaced(old, token.created_at))
            await asyncio.sleep(0)
            mode = ADD
        return await super().insert(token, mode, **named)


class RacyOverlap(Broken):
    """Looks at the predecessor, and takes its keys over when others had their turn."""

    async def insert(self, token: StoredToken, mode: InsertMode, **named: Any) -> Inserted:
        if mode is REPLACE and named.get("keep_until", 0) > token.created_at:
            old = await self.line(token)
            await asyncio.sleep(0)
            for other in old:
                self.save(other)
        return await super().insert(token, mode, **named)


class RacyIfNoneValid(Broken):
    """Looks for a valid token, then inserts, with an await in between."""

    async def insert(self, token: StoredToken, mode: InsertMode, **named: Any) -> Inserted:
        if mode is IF_NONE_VALID:
            wanted = named.pop("wanted_until")
            found = [other for other in await self.line(token) if satisfies(other, wanted)]
            if found:
                return Inserted(InsertResult.HAS_VALID, found[0])
            await asyncio.sleep(0)
            mode = REPLACE
        return await super().insert(token, mode, **named)


class RacyOnce(Broken):
    """Looks for the key, then replaces and inserts, with an await in between."""

    async def insert(self, token: StoredToken, mode: InsertMode, **named: Any) -> Inserted:
        if mode is ONCE:
            digests = tuple(key.digest for key in token.keys) + named.get("also_taken", ())
            found = await MemoryBackend.find(self, Match(digests=digests), 1)
            if found:
                return Inserted(InsertResult.KEY_TAKEN, found[0])
            await asyncio.sleep(0)
            mode = REPLACE
        return await super().insert(token, mode, **named)


class ReplaceOverwritesUses(Broken):
    """Writes the older tokens back as they were when it looked, replaced: a use in between is lost."""

    async def insert(self, token: StoredToken, mode: InsertMode, **named: Any) -> Inserted:
        old = [] if mode is ADD else await self.line(token)
        await asyncio.sleep(0)
        inserted = await super().insert(token, mode, **named)
        if inserted.result is InsertResult.INSERTED:
            for other in old:
                if other.id in self._store.tokens:
                    keys = self.token(other.id).keys
                    self.save(replaced(other, token.created_at)._replace(keys=keys))
        return inserted


class RewritesTheRow(Broken):
    """Writes the whole record back where only the extra data changes."""

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        if not isinstance(change, SetExtraData):
            return await super().update(match, change)
        found = await super().find(match, 1)
        await asyncio.sleep(0)
        if found and found[0].id in self._store.tokens:
            self.save(found[0]._replace(extra_data=change.extra_data))
            return self.token(found[0].id)
        return None


class RewritesTheRowOnRelease(Broken):
    """Writes the whole record back where only a hold is dropped."""

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        if not isinstance(change, Release):
            return await super().update(match, change)
        found = await super().find(match, 1)
        await asyncio.sleep(0)
        after = await super().update(match, change)
        if after is not None and found:
            after = found[0]._replace(holds=after.holds)
            self.save(after)
        return after


class RacySpend(Broken):
    """Reads the budgets, and counts only after others had their turn: the lost update."""

    async def spend(self, spends: tuple[Spend, ...], now: int) -> Spending:
        before = [(spend.budget, self._store.budget(spend.budget)) for spend in spends]
        await asyncio.sleep(0)
        for budget, state in before:
            if state is not None:
                self._store.keep(budget, state)
            else:
                self._store.forget(budget.object, (budget.name,))
        return await super().spend(spends, now)


class RacySpendInThreads(Broken):
    """Guards its budgets by a lock that each event loop has of its own."""

    async def spend(self, spends: tuple[Spend, ...], now: int) -> Spending:
        states = [(spend.budget, self._store.budget(spend.budget)) for spend in spends]
        _let_other_threads_run()
        for budget, state in states:
            if state is not None:
                self._store.keep(budget, state)
        return await super().spend(spends, now)


class RefundsAbsolutely(Broken):
    """Reads what is spent, and writes one less when others had their turn."""

    async def refund(self, charges: tuple[Charge, ...]) -> None:
        for charge in charges:
            state = self._store.budget(charge.budget)
            await asyncio.sleep(0)
            if state is not None and state.spent and state.until == charge.until:
                self._store.keep(charge.budget, state._replace(spent=state.spent - 1))


class SpendsFromSome(Broken):
    """Charges one limit after the other, and stops at the one that is full."""

    async def spend(self, spends: tuple[Spend, ...], now: int) -> Spending:
        done: list[Spending] = []
        for place, spend in enumerate(spends):
            one = await super().spend((spend,), now)
            if one.full is not None:
                return one._replace(full=place)
            done.append(one)
        charges = tuple(charge for one in done for charge in one.charges)
        return Spending(charges, min((one.left or 0 for one in done), default=None))


class RacyDeactivate(Broken):
    """Counts what it found and not what it changed."""

    async def deactivate(self, match: Match, at: int, sparing: tuple[str, ...] = ()) -> int:
        found = await super().find(match._replace(active=True), 10**9)
        await asyncio.sleep(0)
        await super().deactivate(match, at, sparing)
        return len(found)


class DeactivateOverwritesUses(Broken):
    """Writes what it saw, ended: a use in between is lost."""

    async def deactivate(self, match: Match, at: int, sparing: tuple[str, ...] = ()) -> int:
        found = await super().find(match, 10**9)
        await asyncio.sleep(0)
        count = await super().deactivate(match, at, sparing)
        for token in found:
            if match.digests is None and token.id in self._store.tokens:
                self.save(ended(token, at, sparing))
        return count


class RacyPurge(Broken):
    """Counts what it found and not what it deleted."""

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> Purged:
        due = [token for token in await super().find(Match(), 10**9) if token.ends_at < before]
        await asyncio.sleep(0)
        purged = await super().purge(before, now, limit, budgets_before)
        return purged._replace(tokens=len(due[:limit]))


class ForgetsWhatBeganAnew(Broken):
    """Looks which budgets are over, and forgets them when others had their turn."""

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> Purged:
        due = [
            Budget(of, name)
            for of, names in self._store.budgets_of.items()
            for name, state in names.items()
            if state.until <= budgets_before
        ][:limit]
        await asyncio.sleep(0)
        forgotten = sum(self._store.forget(budget.object, (budget.name,)) for budget in due)
        purged = await super().purge(before, now, limit, -1)
        return purged._replace(budgets=forgotten)


class ComparesBeforeItCharges(Broken):
    """Answers at once, and counts the wrong key when others had their turn."""

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        full = self._store.full(spends, now)
        if full is not None:
            return Presented(Outcome.LIMITED, spending=full)
        answer = await super().present(key, change, now)
        await asyncio.sleep(0)
        if answer.outcome is Outcome.REFUSED and spends:
            answer = answer._replace(spending=await self.spend(spends, now))
        return answer


class RefusesBesideARightKey(Broken):
    """Charges every key first, and gives a right one back: another right key beside it is refused."""

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        spending = await self.spend(spends, now)
        if spending.full is not None:
            return Presented(Outcome.LIMITED, spending=spending)
        await asyncio.sleep(0)
        answer = await super().present(key, change, now)
        if answer.outcome is not Outcome.REFUSED or (answer.token and answer.token.state is State.USED):
            await self.refund(spending.charges)
            return answer._replace(spending=Spending(left=spending.left))
        return answer._replace(spending=spending)


class ChargesOneAfterTheOther(Broken):
    """Charges one limit after the other when others had their turn, and gives back what it was charged before
    it came upon a full one."""

    async def spend(self, spends: tuple[Spend, ...], now: int) -> Spending:
        charges: tuple[Charge, ...] = ()
        for place, spend in enumerate(spends):
            spending = await super().spend((spend,), now)
            await asyncio.sleep(0)
            if spending.full is not None:
                await self.refund(charges)
                return spending._replace(full=place)
            charges += spending.charges
        return Spending(charges=charges, left=0)

    async def insert(self, token: StoredToken, mode: InsertMode, **named: Any) -> Inserted:
        spending = await self.spend(named.pop("spends", ()), token.created_at)
        if spending.full is not None:
            return Inserted(InsertResult.LIMITED, None, spending)
        inserted = await super().insert(token, mode, **named)
        if inserted.result is not InsertResult.INSERTED:
            await self.refund(spending.charges)
        return inserted._replace(spending=spending)

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        full = self._store.full(spends, now)
        answer = await super().present(key, change, now)
        if full is None and answer.outcome is Outcome.REFUSED:
            spending = await self.spend(spends, now)
            full = spending if spending.full is not None else None
        return answer if full is None else Presented(Outcome.LIMITED, spending=full)


class InsertsThenCharges(Broken):
    """Inserts, and charges what it costs when others had their turn."""

    async def insert(self, token: StoredToken, mode: InsertMode, **named: Any) -> Inserted:
        spends = named.pop("spends", ())
        full = self._store.full(spends, token.created_at)
        await asyncio.sleep(0)
        if full is not None:
            return Inserted(InsertResult.LIMITED, None, full)
        inserted = await super().insert(token, mode, **named)
        if inserted.result is InsertResult.INSERTED:
            inserted = inserted._replace(spending=await self.spend(spends, token.created_at))
        return inserted


class KeepsTheChargeOfNothing(Broken):
    """Charges an insert, and keeps the charge where nothing was inserted."""

    async def insert(self, token: StoredToken, mode: InsertMode, **named: Any) -> Inserted:
        spending = await self.spend(named.pop("spends", ()), token.created_at)
        if spending.full is not None:
            return Inserted(InsertResult.LIMITED, None, spending)
        inserted = await super().insert(token, mode, **named)
        return inserted._replace(spending=spending)


# Cut short, opened and closed ---------------------------------------------------------------------


class SwallowsCancellation(Broken):
    """Finishes a cancelled call as if nothing had been said."""

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        return await super().present(key, change, now, spends)


class UsesInTwoSteps(Broken):
    """Counts the use and remembers its id in two steps; a cancellation falls between them."""

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        if not isinstance(change, Use) or not change.use_id:
            return await super().present(key, change, now, spends)
        for token in self._store.matching(key):
            own = key_of(token, key)
            if own is not None and (own.origin, change.use_id) in self._store.uses:
                return await super().present(key, change, now, spends)
        answer = await super().present(key, change._replace(use_id=""), now, spends)
        await asyncio.sleep(0)
        own = key_of(answer.token, key) if answer.token is not None else None
        if answer.outcome is Outcome.RIGHT and answer.token is not None and own is not None:
            self._store.remember(answer.token.id, own.origin, change.use_id, change.at)
        return answer


class HalfOpens(Broken):
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

    async def insert(self, token: StoredToken, mode: InsertMode, **named: Any) -> Inserted:
        assert self._connected
        return await super().insert(token, mode, **named)


class WorksWhenClosed(Broken):
    """Opens itself when it is used."""

    async def find(self, match: Match, limit: int, after: str | None = None) -> list[StoredToken]:
        self._opens = self._opens or 1
        return await super().find(match, limit, after)


class BelongsToItsLoop(Broken):
    """Leaves it to asyncio to refuse another event loop."""

    async def open(self) -> None:
        await super().open()
        self._loop = asyncio.get_running_loop()

    async def find(self, match: Match, limit: int, after: str | None = None) -> list[StoredToken]:
        if asyncio.get_running_loop() is not self._loop:
            await self._loop.create_future()
        return await super().find(match, limit, after)


class ClosesAtOnce(Broken):
    """Does not count how often it was opened."""

    async def close(self) -> None:
        self._opens = 0


class LeavesATask(Broken):
    """Begins a task that nobody ends."""

    async def open(self) -> None:
        await super().open()
        self._task = asyncio.create_task(asyncio.Event().wait())


class KeepsToItself(Broken):
    """Is alone with its writes: every backend has a store of its own."""

    def __init__(self, name: str = "") -> None:
        super().__init__()


class AcceptsAnyOption(Broken):
    """Accepts a misspelt option as one that it need not heed."""

    @classmethod
    def from_url(cls, url: str, **options: object) -> Self:
        return super().from_url(url)


class AcceptsAnyHandle(Broken):
    """Takes anything for a transaction of its own."""

    def within(self, handle: object) -> TokenBackend:
        try:
            return super().within(handle)
        except InvalidInput:
            return self


class LastNoteWins(Broken):
    """Replaces a note that is there."""

    async def note(self, name: str, text: str, *, replace: bool = False) -> str:
        return await super().note(name, text, replace=True)


# What matches -------------------------------------------------------------------------------------


class ForgetsSlug(Broken):
    """Matches whatever the slug."""

    async def find(self, match: Match, limit: int, after: str | None = None) -> list[StoredToken]:
        return await super().find(match._replace(slug=None), limit, after)

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        return await super().present(key._replace(slug=None), change, now, spends)


class ForgetsContextInCompany(Broken):
    """Gathers keys that are presented, and minds the context of those alone that come alone."""

    _company = 0

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        self._company += 1
        try:
            await asyncio.sleep(0)
            minded = key if self._company == 1 else key._replace(context=None)
            return await super().present(minded, change, now, spends)
        finally:
            self._company -= 1


class ForgetsObject(Broken):
    """Deactivates the tokens of every object."""

    async def deactivate(self, match: Match, at: int, sparing: tuple[str, ...] = ()) -> int:
        return await super().deactivate(match._replace(object_id=None), at, sparing)


class ForgetsKind(Broken):
    """Does not mind which of its keys was presented."""

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        return await super().present(key._replace(kind=None), change, now, spends)


class TestsAnyKey(Broken):
    """Tests digest, kind and expiry on any of a token's keys, each on another one."""

    async def find(self, match: Match, limit: int, after: str | None = None) -> list[StoredToken]:
        loose = match._replace(kind=None, valid_at=None)
        found = await super().find(loose, 10**9, after)
        found = [token for token in found if matches(token, match._replace(digests=None, kind=None))]
        if match.kind is not None and match.digests is not None:
            found = [token for token in found if match.kind in {key.kind for key in token.keys}]
        return found[:limit]


class FoldsCase(Broken):
    """Stores and compares object ids as a case-insensitive collation does."""

    async def insert(self, token: StoredToken, mode: InsertMode, **named: Any) -> Inserted:
        return await super().insert(token._replace(object_id=token.object_id.casefold()), mode, **named)

    async def find(self, match: Match, limit: int, after: str | None = None) -> list[StoredToken]:
        return await super().find(_folded(match), limit, after)


class FoldsCaseInUpdate(Broken):
    """Compares object ids without their case where it updates."""

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        wanted = match.object_id
        match = match._replace(object_id=None)
        for token in self._store.matching(match):
            if wanted is None or token.object_id.casefold() == wanted.casefold():
                return await super().update(match._replace(id=token.id), change)
        return None


class FoldsCaseInReplace(Broken):
    """Finds the older tokens without minding the case of their object."""

    async def insert(self, token: StoredToken, mode: InsertMode, **named: Any) -> Inserted:
        inserted = await super().insert(token, mode, **named)
        if mode is REPLACE and inserted.result is InsertResult.INSERTED:
            for other in list(self._store.tokens.values()):
                if other.id != token.id and other.is_active and _folded_line(other) == _folded_line(token):
                    self.save(replaced(other, token.created_at))
        return inserted


class FoldsCaseInDeactivate(Broken):
    """Deactivates without minding the case of the object."""

    async def deactivate(self, match: Match, at: int, sparing: tuple[str, ...] = ()) -> int:
        if match.object_id is None:
            return await super().deactivate(match, at, sparing)
        same = {
            token.object_id
            for token in self._store.tokens.values()
            if token.object_id.casefold() == match.object_id.casefold()
        }
        return sum(
            [
                await super(FoldsCaseInDeactivate, self).deactivate(
                    match._replace(object_id=one), at, sparing
                )
                for one in same
            ]
        )


class TrimsUseIds(Broken):
    """Compares the ids of uses without white space around them."""

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        if isinstance(change, Use):
            change = change._replace(use_id=change.use_id.strip())
        return await super().present(key, change, now, spends)


class TakesNoDigestForAny(Broken):
    """Takes an empty list of digests for "whatever the digest"."""

    async def find(self, match: Match, limit: int, after: str | None = None) -> list[StoredToken]:
        return await super().find(match._replace(digests=match.digests or None), limit, after)


class ExclusiveBoundary(Broken):
    """``expires_at > now`` where it must be ``>=``."""

    async def find(self, match: Match, limit: int, after: str | None = None) -> list[StoredToken]:
        found = await super().find(match, limit, after)
        return [token for token in found if token.expires_at != match.valid_at]

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        found = self._store.matching(key)
        if any(token.expires_at == now for token in found):
            return Presented(Outcome.REFUSED, found[0])
        return await super().present(key, change, now, spends)


class OldestFirst(Broken):
    """Finds the oldest token first."""

    async def find(self, match: Match, limit: int, after: str | None = None) -> list[StoredToken]:
        return (await super().find(match, 10**9, after))[::-1][:limit]


class ReadsIdsAsNumbers(Broken):
    """Looks a token up by the number in its id, so that other texts with this number find it as well."""

    async def find(self, match: Match, limit: int, after: str | None = None) -> list[StoredToken]:
        if match.id is not None:
            with suppress(ValueError):
                match = match._replace(id=f"{int(match.id, 16):016x}")
        return await super().find(match, limit, after)


class RepeatsThePage(Broken):
    """Returns the last token of a page once more on the next."""

    async def find(self, match: Match, limit: int, after: str | None = None) -> list[StoredToken]:
        found = await super().find(match, 10**9)
        return [token for token in found if after is None or token.id <= after][:limit]


# What is stored -----------------------------------------------------------------------------------


class LosesMilliseconds(Broken):
    """Keeps times in whole seconds."""

    async def insert(self, token: StoredToken, mode: InsertMode, **named: Any) -> Inserted:
        created, expires = (moment // 1000 * 1000 for moment in (token.created_at, token.expires_at))
        return await super().insert(token._replace(created_at=created, expires_at=expires), mode, **named)


class LosesEmptyExtraData(Broken):
    """Stores an empty value as none."""

    async def insert(self, token: StoredToken, mode: InsertMode, **named: Any) -> Inserted:
        empty = token.extra_data in ("", "{}", "[]")
        token = token._replace(extra_data=None if empty else token.extra_data)
        return await super().insert(token, mode, **named)


class StoresOneKey(Broken):
    """Keeps the first key of a token."""

    async def insert(self, token: StoredToken, mode: InsertMode, **named: Any) -> Inserted:
        return await super().insert(token._replace(keys=token.keys[:1]), mode, **named)


class ReplacesBeforeTheCollision(Broken):
    """Replaces the old token, and only then finds that the new key is taken."""

    async def insert(self, token: StoredToken, mode: InsertMode, **named: Any) -> Inserted:
        if mode is REPLACE and not named.get("keep_until"):
            for old in await self.line(token):
                self.save(replaced(old, token.created_at))
        return await super().insert(token, mode, **named)


class ReplacesTheNewestOnly(Broken):
    """Replaces one old token where there are several."""

    async def insert(self, token: StoredToken, mode: InsertMode, **named: Any) -> Inserted:
        if mode is REPLACE and not named.get("keep_until"):
            for old in (await self.line(token))[:1]:
                self.save(replaced(old, token.created_at))
            mode = ADD
        return await super().insert(token, mode, **named)


class ReplacesEveryContext(Broken):
    """Replaces the tokens of every context."""

    async def insert(self, token: StoredToken, mode: InsertMode, **named: Any) -> Inserted:
        inserted = await super().insert(token, mode, **named)
        if mode is REPLACE and inserted.result is InsertResult.INSERTED:
            for other in await MemoryBackend.find(
                self, line_of(token)._replace(context=None, active=True), 99
            ):
                if other.id != token.id:
                    self.save(replaced(other, token.created_at))
        return inserted


class KeepsNoOverlap(Broken):
    """Knows no overlap."""

    async def insert(self, token: StoredToken, mode: InsertMode, **named: Any) -> Inserted:
        return await super().insert(token, mode, **{**named, "keep_until": 0})


class KeepsEveryOverlap(Broken):
    """Takes over the keys that its predecessor had taken over."""

    async def insert(self, token: StoredToken, mode: InsertMode, **named: Any) -> Inserted:
        for other in await self.line(token):
            self.save(other._replace(keys=tuple(key._replace(origin=other.id) for key in other.keys)))
        return await super().insert(token, mode, **named)


class OverlapsWhatIsHeld(Broken):
    """Takes over the keys of a token whose use is held."""

    async def insert(self, token: StoredToken, mode: InsertMode, **named: Any) -> Inserted:
        for other in await self.line(token) if named.get("keep_until", 0) > token.created_at else ():
            self.save(other._replace(holds=()))
        return await super().insert(token, mode, **named)


class SupersedesNothing(Broken):
    """Finds every code taken that was ever issued."""

    async def insert(self, token: StoredToken, mode: InsertMode, **named: Any) -> Inserted:
        if self._store.owners_of(tuple(key.digest for key in token.keys)) and mode is not ONCE:
            return Inserted(InsertResult.KEY_TAKEN)
        return await super().insert(token, mode, **named)


class SupersedesAnyones(Broken):
    """Takes a code away from another object's token that is over."""

    async def insert(self, token: StoredToken, mode: InsertMode, **named: Any) -> Inserted:
        for owner in self._store.owners_of(tuple(key.digest for key in token.keys)):
            if not owner.is_active and owner.keys[0].kind == "code":
                self.save(owner._replace(keys=()))
        return await super().insert(token, mode, **named)


# What becomes of it -------------------------------------------------------------------------------


class UsesNothing(Broken):
    """Hands out a use and does not store it."""

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        before = self._store.matching(key)
        answer = await super().present(key, change, now, spends)
        if answer.outcome is Outcome.RIGHT and isinstance(change, Use):
            self.save(before[0])
        return answer


class IgnoresUseId(Broken):
    """Does not remember who used the token."""

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        change = change._replace(use_id="") if isinstance(change, Use) else change
        return await super().present(key, change, now, spends)


class RemembersSixteenUses(Broken):
    """Remembers the last sixteen uses of a token."""

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        answer = await super().present(key, change, now, spends)
        for uses in self._store.uses_of.values():
            while len(uses) > 16:
                self._store.uses.pop(uses.popleft(), None)
        return answer


class RemembersByToken(Broken):
    """Remembers a use for the token and not for the key it was made by."""

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        if isinstance(change, Use) and change.use_id:
            for token in self._store.matching(key):
                for (_, use_id), used in list(self._store.uses.items()):
                    if use_id == change.use_id and used.token == token.id:
                        return Presented(Outcome.REPLAYED, token, used.at)
        return await super().present(key, change, now, spends)


class CountsOneUseOnly(Broken):
    """Ends a token with its first use, whatever ``max_uses`` says."""

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        answer = await super().present(key, change, now, spends)
        if answer.outcome is Outcome.RIGHT and isinstance(change, Use) and answer.token is not None:
            await self.deactivate(Match(id=answer.token.id), change.at)
        return answer


class UseEndsSiblings(Broken):
    """Ends, with the last use, the tokens that were added beside."""

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        answer = await super().present(key, change, now, spends)
        used = answer.token
        if answer.outcome is Outcome.RIGHT and used is not None and used.state is State.USED:
            for other in await self.line(used):
                self.save(ended(other, now))
        return answer


class LeavesOtherContexts(Broken):
    """Lets a use end its own token only."""

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        before = {token.id: token for token in self._store.tokens.values()}
        answer = await super().present(key, change, now, spends)
        for token in before.values():
            if answer.token is not None and token.id != answer.token.id:
                self.save(token)
        return answer


class LeavesResets(Broken):
    """Forgets no budget with a use."""

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        change = change._replace(resets=()) if isinstance(change, Use) else change
        return await super().present(key, change, now, spends)


class ChargesTheHeld(Broken):
    """Counts a right key that came too early or too late as a wrong one."""

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        answer = await super().present(key, change, now, spends)
        if answer.outcome is Outcome.REFUSED and not answer.spending.charges and spends:
            return answer._replace(spending=await self.spend(spends, now))
        return answer


class LimitsARepeatedUse(Broken):
    """Looks at the limits before it looks who asks."""

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        full = self._store.full(spends, now)
        if full is not None:
            return Presented(Outcome.LIMITED, spending=full)
        return await super().present(key, change, now, spends)


class HoldsWithoutFence(Broken):
    """Lets anyone use what is held, whoever holds it."""

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        if isinstance(change, UseHeld):
            for token in self._store.matching(match):
                if token.holds:
                    change = change._replace(hold_id=token.holds[0].hold_id)
        return await super().update(match, change)


class UsesHoldsThatRanOut(Broken):
    """Counts the use of a hold that ended before."""

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        if isinstance(change, UseHeld):
            for token in self._store.matching(match):
                holds = tuple(hold._replace(until=change.at + 1) for hold in token.holds)
                self.save(token._replace(holds=holds))
        return await super().update(match, change)


class UsesHoldsOfUsedTokens(Broken):
    """Counts the use of a hold although others have made all uses."""

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        if isinstance(change, UseHeld):
            for token in self._store.matching(match):
                if token.max_uses is not None and any(runs(hold, change.at) for hold in token.holds):
                    self.save(token._replace(uses=min(token.uses, token.max_uses - 1)))
        return await super().update(match, change)


class HoldsNothing(Broken):
    """Hands out a hold and does not store it."""

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        answer = await super().present(key, change, now, spends)
        if isinstance(change, Hold) and answer.outcome is Outcome.RIGHT and answer.token is not None:
            await super().update(Match(id=answer.token.id), Release(hold_id=change.hold_id))
        return answer


class HoldsOnce(Broken):
    """Lets one hold at a time, however many uses there are."""

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        if isinstance(change, Hold):
            for token in self._store.matching(key):
                if token.holds and refusal(token, None, now) is None:
                    return Presented(Outcome.REFUSED, token)
        return await super().present(key, change, now, spends)


class ForgetsWhatIsHeld(Broken):
    """Stores of a hold that there is one, and not of which use."""

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        answer = await super().present(key, change, now, spends)
        if isinstance(change, Hold) and answer.outcome is Outcome.RIGHT and answer.token is not None:
            holds = tuple(hold._replace(use_id="") for hold in answer.token.holds)
            self.save(answer.token._replace(holds=holds))
        return answer


class HoldsUsesByIdAlone(Broken):
    """Takes the uses of two keys for one, because they have the same id."""

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        use_id = "" if change is None else change.use_id
        for token in self._store.matching(key):
            if use_id and any(runs(hold, now) and hold.use_id == use_id for hold in token.holds):
                return Presented(Outcome.REFUSED, token)
        return await super().present(key, change, now, spends)


class BelievesStaleHolds(Broken):
    """Takes a hold that ends in ten years for one that runs."""

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        for token in self._store.matching(key):
            holds = tuple(_believed(hold, now) for hold in token.holds)
            self.save(token._replace(holds=holds))
        return await super().present(key, change, now, spends)


class RevokesNoHold(Broken):
    """Leaves the holds of what it deactivates."""

    async def deactivate(self, match: Match, at: int, sparing: tuple[str, ...] = ()) -> int:
        holds = {hold.hold_id for token in self._store.matching(match) for hold in token.holds}
        return await super().deactivate(match, at, (*sparing, *holds))


class SparesNoHold(Broken):
    """Revokes the hold of the very block that deactivates."""

    async def deactivate(self, match: Match, at: int, sparing: tuple[str, ...] = ()) -> int:
        return await super().deactivate(match, at, ())


class EndsTheWholeOverlap(Broken):
    """Ends the token where one of its keys, taken over, is ended."""

    async def deactivate(self, match: Match, at: int, sparing: tuple[str, ...] = ()) -> int:
        ids = [token.id for token in self._store.matching(match)]
        return sum(
            [await super(EndsTheWholeOverlap, self).deactivate(Match(id=one), at, sparing) for one in ids]
        )


class EndsAKeyByTheClock(Broken):
    """Ends a key that was taken over as of now, so that it is good again for a clock that is behind."""

    async def deactivate(self, match: Match, at: int, sparing: tuple[str, ...] = ()) -> int:
        before = {token.id: token for token in self._store.matching(match)}
        count = await super().deactivate(match, at, sparing)
        for token in self._store.matching(match) if match.digests is not None else ():
            ends = {key.digest: min(key.expires_at, at - 1) for key in before[token.id].keys}
            keys = tuple(
                key if key.expires_at else key._replace(expires_at=ends[key.digest]) for key in token.keys
            )
            self.save(token._replace(keys=keys))
        return count


class RevivesOnRelease(Broken):
    """Makes the token active again when its hold is given back."""

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        token = await super().update(match, change)
        if token is not None and isinstance(change, Release):
            self.save(token._replace(state=State.ACTIVE))
        return token


class RevivesOnSave(Broken):
    """Makes the token active again when its extra data changes."""

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        token = await super().update(match, change)
        if token is not None and isinstance(change, SetExtraData):
            self.save(token._replace(state=State.ACTIVE))
        return token


# Sweeping and budgets -----------------------------------------------------------------------------


class PurgesHeld(Broken):
    """Deletes an expired token that somebody holds."""

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> Purged:
        return await super().purge(before, NEVER, limit, budgets_before)


class PurgesTheLastMillisecond(Broken):
    """``ends_at <= before`` where it must be ``<``."""

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> Purged:
        return await super().purge(before + 1, now, limit, budgets_before)


class PurgesWithoutBound(Broken):
    """Deletes everything at once."""

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> Purged:
        return await super().purge(before, now, 10**9, budgets_before)


class PurgesBudgets(Broken):
    """Forgets the budgets whose window is still running."""

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> Purged:
        return await super().purge(before, now, limit, NEVER)


class PurgesOneLess(Broken):
    """Deletes one token fewer than it may."""

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> Purged:
        return await super().purge(before, now, max(1, limit - 1), budgets_before)


class PurgesBudgetsBesideTokens(Broken):
    """Forgets budgets only while there are tokens to delete."""

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> Purged:
        tokens = (await super().purge(before, now, limit, -1)).tokens
        budgets = (await super().purge(-1, now, tokens, budgets_before)).budgets if tokens else 0
        return Purged(tokens=tokens, budgets=budgets)


class ErasesTokensOnly(Broken):
    """Leaves the budgets of an object that is erased."""

    async def erase(self, content_type: str, object_id: str, budgets_of: bytes) -> int:
        return await super().erase(content_type, object_id, b"\xff" * 16)


class CountsThePretended(Broken):
    """Counts the records that stand for nobody."""

    async def count(self, now: int) -> list[SlugCount]:
        counts = await super().count(now)
        total = len(self._store.tokens)
        return [row._replace(total=total) for row in counts]


class ResetsOnReissue(Broken):
    """Gives every new token fresh budgets."""

    async def insert(self, token: StoredToken, mode: InsertMode, **named: Any) -> Inserted:
        for of in list(self._store.budgets_of):
            self._store.forget(of, None)
        return await super().insert(token, mode, **named)


class ResetsOnRefund(Broken):
    """Forgets the whole budget where one is given back."""

    async def refund(self, charges: tuple[Charge, ...]) -> None:
        for charge in charges:
            await self.reset(charge.budget.object, (charge.budget.name,))


class RefundsAnyWindow(Broken):
    """Gives back to whatever window is running."""

    async def refund(self, charges: tuple[Charge, ...]) -> None:
        for charge in charges:
            state = self._store.budget(charge.budget)
            if state is not None:
                await super().refund((charge._replace(until=state.until),))


class NeverRefunds(Broken):
    """Keeps what should be given back."""

    async def refund(self, charges: tuple[Charge, ...]) -> None:
        pass


class SharesBudgets(Broken):
    """Has one budget for everybody."""

    async def spend(self, spends: tuple[Spend, ...], now: int) -> Spending:
        shared = tuple(spend._replace(budget=spend.budget._replace(object=bytes(16))) for spend in spends)
        return await super().spend(shared, now)


class AllowsOneMore(Broken):
    """``spent <= limit`` where it must be ``<``."""

    async def spend(self, spends: tuple[Spend, ...], now: int) -> Spending:
        return await super().spend(tuple(s._replace(limit=s.limit + 1) for s in spends), now)


class NeverGrows(Broken):
    """Begins every window as short as the first."""

    async def spend(self, spends: tuple[Spend, ...], now: int) -> Spending:
        return await super().spend(tuple(s._replace(max_window=s.window) for s in spends), now)


class BelievesTheClock(Broken):
    """Goes on with a window that was begun by a clock that was ahead."""

    async def spend(self, spends: tuple[Spend, ...], now: int) -> Spending:
        for spend in spends:
            state = self._store.budget(spend.budget)
            if state is not None and state.until > now + 2 * spend.max_window and state.spent >= spend.limit:
                return Spending(left=0, full=0, until=state.until)
        return await super().spend(spends, now)


# Between processes --------------------------------------------------------------------------------


class RacySpendInProcesses(SQLiteBackend):
    """Looks at a budget before it spends, guarded by a lock of this process."""

    async def spend(self, spends: tuple[Spend, ...], now: int) -> Spending:
        async with _own_lock():
            states = await self.budgets(tuple(spend.budget for spend in spends))
            for place, (spend, state) in enumerate(zip(spends, states, strict=True)):
                if state is not None and state.spent >= spend.limit and state.until > now:
                    return Spending(left=0, full=place, until=state.until)
                if state is not None and state.spent == spend.limit - 1:
                    await _let_another_process_look(self, self._path, spend.budget, state)
            return await super().spend(tuple(s._replace(limit=10**9) for s in spends), now)


class RacyRefundInProcesses(SQLiteBackend):
    """Reads what is spent and writes one less, guarded by a lock of this process."""

    async def spend(self, spends: tuple[Spend, ...], now: int) -> Spending:
        async with _own_lock():
            return await super().spend(spends, now)

    async def refund(self, charges: tuple[Charge, ...]) -> None:
        async with _own_lock():
            for budget, until in charges:
                (state,) = await self.budgets((budget,))
                if state is None or state.until != until:
                    continue
                await _let_another_process_look(self, self._path, budget, state)
                await self.reset(budget.object, (budget.name,))
                window = until - NOW_OF_THE_CASES
                spend = Spend(budget=budget, limit=10**9, window=window, max_window=window)
                for _ in range(state.spent - 1):
                    await super().spend((spend,), NOW_OF_THE_CASES)


async def _let_another_process_look(backend: TokenBackend, path: str, budget: Budget, seen: object) -> None:
    """Wait until another process has looked at the budget or changed it: whether they meet is not left to
    chance."""
    folder, looked = os.path.dirname(path), f"{budget.name.hex()}."
    with open(os.path.join(folder, f"{looked}{os.getpid()}"), "w"):  # noqa: ASYNC230  # an empty file
        pass
    while sum(name.startswith(looked) for name in os.listdir(folder)) < 2:
        if await backend.budgets((budget,)) != [seen]:
            return


def _own_lock() -> asyncio.Lock:
    loop = asyncio.get_running_loop()
    return _locks.setdefault(loop, asyncio.Lock())


_locks: dict[asyncio.AbstractEventLoop, asyncio.Lock] = {}
NOW_OF_THE_CASES = 4_102_444_800_123


def _let_other_threads_run() -> None:
    threading.Event().wait(0.001)


def _folded(match: Match) -> Match:
    return match._replace(object_id=None if match.object_id is None else match.object_id.casefold())


def _folded_line(token: StoredToken) -> tuple[str, ...]:
    return tuple(name.casefold() for name in (token.content_type, token.object_id, token.slug))


def _believed(hold: StoredHold, now: int) -> StoredHold:
    return hold._replace(until=min(hold.until, now + STALE_HOLD))
