"""What an operation has read, and what it makes of it: the part of the store that it is about, in memory.

Nothing here waits. The rules of the protocol are the pure functions of :mod:`vtoken.backend`.
"""

from __future__ import annotations

from collections.abc import Iterable

from vtoken.backend import (
    Budget,
    BudgetState,
    Charge,
    Hold,
    Inserted,
    InsertMode,
    InsertResult,
    Match,
    Outcome,
    Presented,
    Spend,
    Spending,
    StoredKey,
    StoredToken,
    Use,
    UseHeld,
    budget_step,
    ended,
    ends_other_context,
    full_spending,
    is_superseded,
    key_ended,
    key_of,
    left_of,
    matching_key,
    overlapping_keys,
    refusal,
    replaced,
    satisfies,
    with_hold,
    with_use,
    without_keys,
)

from vtoken_valkey.records import StoredObject


class Draft:
    """The objects and budgets of one operation.

    Args:
        objects: by the name of their key in the store.
        budgets: likewise those that the operation is about.
    """

    def __init__(self, objects: dict[str, StoredObject], budgets: dict[Budget, BudgetState | None]) -> None:
        self.objects = objects
        self.budgets = budgets

    def tokens(self) -> Iterable[tuple[StoredObject, StoredToken]]:
        """All tokens, each with its object."""
        return [(of, token) for of in self.objects.values() for token in of.tokens.values()]

    # Budgets

    def spend(self, spends: tuple[Spend, ...], now: int) -> Spending:
        """Take one from each, or none."""
        full = full_spending([self.budgets[spend.budget] for spend in spends], spends, now)
        if full is not None:
            return full
        charges: list[Charge] = []
        for spend in spends:
            state = budget_step(self.budgets[spend.budget], spend, now)
            assert state is not None  # noqa: S101  # none of them is full
            self.budgets[spend.budget] = state
            charges.append(Charge(budget=spend.budget, until=state.until))
        return Spending(charges=tuple(charges), left=self._left(spends, now))

    def _left(self, spends: tuple[Spend, ...], now: int) -> int | None:
        return min((left_of(self.budgets[s.budget], s, now) for s in spends), default=None)

    def refund(self, charges: Iterable[Charge]) -> None:
        """Give back what was taken from windows that still run."""
        for charge in charges:
            state = self.budgets[charge.budget]
            if state is not None and state.spent and state.until == charge.until:
                self.budgets[charge.budget] = state._replace(spent=state.spent - 1)

    # Tokens

    def insert(
        self,
        home: StoredObject,
        token: StoredToken,
        mode: InsertMode,
        keep_until: int,
        wanted_until: int,
        taken: tuple[bytes, ...],
        spends: tuple[Spend, ...],
    ) -> Inserted:
        """See :meth:`vtoken.backend.TokenBackend.insert`."""
        line = [] if mode is InsertMode.ADD else [t for t in home.tokens.values() if _in_line(t, token)]
        if any(other.id == token.id for _, other in self.tokens()):
            return Inserted(InsertResult.KEY_TAKEN)
        owners = [
            (of, other)
            for digest in taken
            for of, other in self.tokens()
            if any(key.digest == digest for key in other.keys)
        ]
        for _, other in owners:
            if mode is InsertMode.ONCE:
                return Inserted(InsertResult.KEY_TAKEN, other)
            if not is_superseded(other, taken, token, line):
                return Inserted(InsertResult.KEY_TAKEN)
        valid = [other for other in line if satisfies(other, wanted_until)]
        if mode is InsertMode.IF_NONE_VALID and valid:
            return Inserted(InsertResult.HAS_VALID, max(valid, key=lambda other: other.id))
        spending = self.spend(spends, token.created_at)
        if spending.full is not None:
            return Inserted(InsertResult.LIMITED, None, spending)
        for of, other in owners:
            of.tokens[other.id] = without_keys(other, taken)
        stored = _with_overlap(home, token, line, keep_until)
        for other in line:
            home.tokens[other.id] = replaced(home.tokens[other.id], token.created_at)
        home.tokens[stored.id] = stored
        return Inserted(InsertResult.INSERTED, stored, spending)

    def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...]
    ) -> Presented:
        """See :meth:`vtoken.backend.TokenBackend.present`."""
        found = [
            (of, token, held) for of, token in self.tokens() if (held := matching_key(token, key)) is not None
        ]
        use_id = "" if change is None else change.use_id
        if use_id:
            for of, _, held in found:
                used = of.use(held.origin, use_id)
                if used is not None:
                    left = Spending(left=self._left(spends, now))
                    return Presented(Outcome.REPLAYED, of.tokens[used[0]], used[1], left)
        full = full_spending([self.budgets[spend.budget] for spend in spends], spends, now)
        if full is not None:
            return Presented(Outcome.LIMITED, spending=full)
        reasons = [refusal(token, held, now, use_id) for _, token, held in found]
        if None in reasons:
            of, token, held = found[reasons.index(None)]
            after = self._changed(of, token, held, change, now)
            return Presented(Outcome.RIGHT, after, spending=Spending(left=self._left(spends, now)))
        is_free = any(reason in ("used", "leased") for reason in reasons)
        spending = Spending(left=self._left(spends, now)) if is_free else self.spend(spends, now)
        return Presented(Outcome.REFUSED, found[0][1] if found else None, spending=spending)

    def _changed(
        self, of: StoredObject, token: StoredToken, key: StoredKey, change: Use | Hold | None, now: int
    ) -> StoredToken:
        match change:
            case None:
                return token
            case Hold():
                after = with_hold(token, key, change, now)
            case Use():
                after = with_use(token, change)
                self.used(of, after, key.origin, change)
        of.tokens[after.id] = after
        return after

    def used(self, of: StoredObject, token: StoredToken, origin: str, change: Use | UseHeld) -> None:
        """What a use does beside the record of its token."""
        if change.use_id:
            of.remember(origin, change.use_id, token.id, change.at)
        for budget in change.resets:
            self.budgets[budget] = None
        for other in list(of.tokens.values()):
            if ends_other_context(token, other):
                of.tokens[other.id] = ended(other, change.at)

    def deactivate(self, match: Match, at: int, sparing: tuple[str, ...], matching: Iterable[str]) -> int:
        """See :meth:`vtoken.backend.TokenBackend.deactivate`; ``matching`` names the tokens that match."""
        ids, count = set(matching), 0
        for of, token in self.tokens():
            if token.id not in ids:
                continue
            key = key_of(token, match) if match.digests is not None else None
            if key is None or key.origin == token.id:
                count += token.is_active
                of.tokens[token.id] = ended(token, at, sparing)
            else:
                count += token.is_active and key.expires_at >= at
                of.tokens[token.id] = key_ended(token, key)
        return count


def _in_line(other: StoredToken, token: StoredToken) -> bool:
    return other.is_active and (other.content_type, other.object_id, other.slug, other.context) == (
        token.content_type,
        token.object_id,
        token.slug,
        token.context,
    )


def _with_overlap(
    home: StoredObject, token: StoredToken, line: list[StoredToken], keep_until: int
) -> StoredToken:
    """The new token with the keys that it takes over from the newest one of its line."""
    exclusive = [home.tokens[other.id] for other in line if not other.is_beside]
    if not exclusive:
        return token
    newest = max(exclusive, key=lambda other: other.id)
    over = overlapping_keys(newest, token, keep_until)
    if not over:
        return token
    home.tokens[newest.id] = without_keys(newest, {key.digest for key in over})
    return token._replace(keys=(*token.keys, *over))
