"""The storage protocol as a small program: one caller at a time, no index, nothing done for speed.

It says what a backend must answer, and what it must hold afterwards. It is made of lists and dictionaries and
of the pure functions of ``vtoken.backend``, so that it can be read beside the protocol's docstrings.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from vtoken.backend import (
    PRETENDED,
    Budget,
    BudgetState,
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
    SlugCount,
    Spend,
    Spending,
    StoredKey,
    StoredToken,
    Use,
    UseHeld,
    budget_step,
    changed,
    ended,
    ends_other_context,
    full_spending,
    is_valid,
    key_ended,
    key_of,
    least_left,
    left_of,
    matches,
    overlapping_keys,
    refusal,
    replaced,
    running_holds,
    satisfies,
    with_hold,
    with_use,
)


class ReferenceStore:
    """What every backend must do, call by call."""

    def __init__(self) -> None:
        self.tokens: dict[str, StoredToken] = {}
        self.used: dict[tuple[str, str], tuple[str, int]] = {}
        """By ``origin`` and ``use_id``: the token, and when."""
        self.spent: dict[Budget, BudgetState] = {}
        self.notes: dict[str, str] = {}

    def copy(self) -> ReferenceStore:
        """Another one in the same state."""
        other = ReferenceStore()
        other.tokens, other.used = dict(self.tokens), dict(self.used)
        other.spent, other.notes = dict(self.spent), dict(self.notes)
        return other

    def call(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Do what the backend's method of this name would do."""
        return getattr(self, method)(*arguments, **named)

    def note(self, name: str, text: str, *, replace: bool = False) -> str:
        if text and (replace or name not in self.notes):
            self.notes[name] = text
        return self.notes.get(name, "")

    def insert(
        self,
        token: StoredToken,
        mode: InsertMode,
        *,
        keep_until: int = 0,
        wanted_until: int = 0,
        also_taken: tuple[bytes, ...] = (),
        spends: tuple[Spend, ...] = (),
    ) -> Inserted:
        digests = {*(key.digest for key in token.keys), *also_taken}
        line = [] if mode is InsertMode.ADD else list(self._active_line(token))
        holders = [other for other in self.tokens.values() if _has_one_of(other, digests)]
        in_the_way = [
            holder
            for holder in holders
            if mode is InsertMode.ONCE or not _is_superseded(holder, digests, token, line)
        ]
        if in_the_way or token.id in self.tokens:
            shown = in_the_way[0] if in_the_way and mode is InsertMode.ONCE else None
            return Inserted(InsertResult.KEY_TAKEN, shown)
        valid = [other for other in line if satisfies(other, wanted_until)]
        if mode is InsertMode.IF_NONE_VALID and valid:
            return Inserted(InsertResult.HAS_VALID, max(valid, key=_id))
        spending = self.spend(spends, token.created_at)
        if spending.full is not None:
            return Inserted(InsertResult.LIMITED, None, spending)
        for holder in holders:
            left = tuple(key for key in holder.keys if key.digest not in digests)
            self._save(holder._replace(keys=left))
        token = token._replace(keys=token.keys + self._taken_over(token, line, keep_until))
        for other in line:
            self._save(replaced(self.tokens[other.id], token.created_at))
        self._save(token)
        return Inserted(InsertResult.INSERTED, token, spending)

    def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        found = [(token, _the_key(token, key)) for token in self._matching(key)]
        use_id = change.use_id if change is not None else ""
        for _, presented in found:
            use = self.used.get((presented.origin, use_id)) if use_id else None
            if use is not None:
                return Presented(
                    Outcome.REPLAYED, self.tokens[use[0]], used_at=use[1], spending=self._left(spends, now)
                )
        full = full_spending([self.spent.get(spend.budget) for spend in spends], spends, now)
        if full is not None:
            return Presented(Outcome.LIMITED, spending=full)
        refusals = [refusal(token, presented, now, use_id) for token, presented in found]
        if None in refusals:
            token, presented = found[refusals.index(None)]
            if isinstance(change, Use):
                token = self._use(token, presented.origin, change)
            elif change is not None:
                token = with_hold(token, presented, change, now)
                self._save(token)
            return Presented(Outcome.RIGHT, token, spending=self._left(spends, now))
        is_free = "used" in refusals or "leased" in refusals
        spending = self._left(spends, now) if is_free else self.spend(spends, now)
        return Presented(Outcome.REFUSED, found[0][0] if found else None, spending=spending)

    def update(self, match: Match, change: Change) -> StoredToken | None:
        for token in self._matching(match):
            after = changed(token, change)
            if after is None:
                continue
            if isinstance(change, UseHeld):
                hold = next(hold for hold in token.holds if hold.hold_id == change.hold_id)
                return self._use(token, hold.origin, change)
            self._save(after)
            return after
        return None

    def find(self, match: Match, limit: int, after: str | None = None) -> list[StoredToken]:
        found = sorted(self._matching(match), key=_id, reverse=True)
        return [token for token in found if after is None or token.id < after][:limit]

    def deactivate(self, match: Match, at: int, sparing: tuple[str, ...] = ()) -> int:
        count = 0
        for token in self._matching(match):
            key = _the_key(token, match) if match.digests is not None else None
            if key is not None and key.origin != token.id:
                count += token.is_active and key.expires_at >= at
                self._save(key_ended(token, key))
            else:
                count += token.is_active
                self._save(ended(token, at, sparing))
        return count

    def erase(self, content_type: str, object_id: str, budgets_of: bytes) -> int:
        found = self._matching(Match(content_type=content_type, object_id=object_id))
        for token in found:
            self._delete(token)
        self.reset(budgets_of, None)
        return len(found)

    def purge(self, before: int, now: int, limit: int, budgets_before: int) -> Purged:
        due = [t for t in self.tokens.values() if t.ends_at < before and not running_holds(t, now)]
        for token in (due := sorted(due, key=_end)[:limit]):
            self._delete(token)
        over = [name for name, state in self.spent.items() if state.until <= budgets_before][:limit]
        for name in over:
            del self.spent[name]
        return Purged(tokens=len(due), budgets=len(over))

    def count(self, now: int) -> list[SlugCount]:
        counted = [token for token in self.tokens.values() if token.content_type != PRETENDED]
        return [
            _counted(slug, [token for token in counted if token.slug == slug], now)
            for slug in dict.fromkeys(token.slug for token in counted)
        ]

    def spend(self, spends: tuple[Spend, ...], now: int) -> Spending:
        states = [self.spent.get(spend.budget) for spend in spends]
        full = full_spending(states, spends, now)
        if full is not None:
            return full
        charges: list[Charge] = []
        lefts: list[int] = []
        for spend, state in zip(spends, states, strict=True):
            after = budget_step(state, spend, now)
            assert after is not None
            self.spent[spend.budget] = after
            charges.append(Charge(budget=spend.budget, until=after.until))
            lefts.append(max(spend.limit - after.spent, 0))
        return Spending(tuple(charges), left=least_left(lefts))

    def refund(self, charges: tuple[Charge, ...]) -> None:
        for charge in charges:
            state = self.spent.get(charge.budget)
            if state is not None and state.spent and state.until == charge.until:
                self.spent[charge.budget] = state._replace(spent=state.spent - 1)

    def budgets(self, names: tuple[Budget, ...]) -> list[BudgetState | None]:
        return [self.spent.get(name) for name in names]

    def reset(self, budgets_of: bytes, names: tuple[bytes, ...] | None) -> int:
        chosen = [
            budget
            for budget in self.spent
            if budget.object == budgets_of and (names is None or budget.name in names)
        ]
        for budget in chosen:
            del self.spent[budget]
        return len(chosen)

    # Steps

    def _save(self, token: StoredToken) -> None:
        self.tokens[token.id] = token

    def _delete(self, token: StoredToken) -> None:
        del self.tokens[token.id]
        self.used = {name: use for name, use in self.used.items() if use[0] != token.id}

    def _matching(self, match: Match) -> list[StoredToken]:
        return [token for token in self.tokens.values() if matches(token, match)]

    def _active_line(self, token: StoredToken) -> Iterator[StoredToken]:
        for other in self.tokens.values():
            if other.is_active and _line(other) == _line(token):
                yield other

    def _taken_over(
        self, token: StoredToken, line: Collection[StoredToken], keep_until: int
    ) -> tuple[StoredKey, ...]:
        exclusive = [self.tokens[other.id] for other in line if not other.is_beside]
        if not exclusive:
            return ()
        newest = max(exclusive, key=_id)
        taken = overlapping_keys(newest, token, keep_until)
        digests = [key.digest for key in taken]
        self._save(newest._replace(keys=tuple(key for key in newest.keys if key.digest not in digests)))
        return taken

    def _use(self, token: StoredToken, origin: str, change: Use | UseHeld) -> StoredToken:
        after = with_use(token, change)
        self._save(after)
        if change.use_id:
            self.used.setdefault((origin, change.use_id), (token.id, change.at))
        for budget in change.resets:
            self.spent.pop(budget, None)
        for other in list(self.tokens.values()):
            if ends_other_context(after, other):
                self._save(ended(other, change.at))
        return after

    def _left(self, spends: tuple[Spend, ...], now: int) -> Spending:
        return Spending(left=least_left(left_of(self.spent.get(s.budget), s, now) for s in spends))


def _id(token: StoredToken) -> str:
    return token.id


def _end(token: StoredToken) -> int:
    return token.ends_at


def _line(token: StoredToken) -> tuple[str, str, str, bytes]:
    return token.content_type, token.object_id, token.slug, token.context


def _the_key(token: StoredToken, match: Match) -> StoredKey:
    key = key_of(token, match)
    assert key is not None
    return key


def _has_one_of(token: StoredToken, digests: Collection[bytes]) -> bool:
    return any(key.digest in digests for key in token.keys)


def _is_superseded(
    holder: StoredToken, digests: Collection[bytes], token: StoredToken, line: Collection[StoredToken]
) -> bool:
    """Whether an older token loses its key to a new one (see :meth:`TokenBackend.insert`)."""
    same_purpose = _line(holder)[:3] == _line(token)[:3]
    is_over = not is_valid(holder, token.created_at) or holder in line
    return same_purpose and is_over and all(k.kind == "code" for k in holder.keys if k.digest in digests)


def _counted(slug: str, tokens: Collection[StoredToken], now: int) -> SlugCount:
    return SlugCount(
        slug=slug,
        total=len(tokens),
        active=sum(token.is_active and token.expires_at >= now for token in tokens),
        expired=sum(token.is_active and token.expires_at < now for token in tokens),
        used=sum(not token.is_active and token.uses > 0 for token in tokens),
    )
