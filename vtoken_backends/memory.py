"""Tokens in the process's memory: for tests, small tools, and one process that may forget.

It keeps every guarantee within its process and for its life. Nothing is awaited while its lock is held,
so it is safe from any number of tasks, threads and event loops, under asyncio and trio.
"""

from __future__ import annotations

import contextlib
import heapq
import threading
from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Collection, Iterable
from itertools import islice
from operator import itemgetter
from typing import Final, Generic, NamedTuple, Self, TypeVar
from urllib.parse import SplitResult, urlsplit

from vtoken.backend import (
    PRETENDED,
    REMEMBERED_USES,
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
    State,
    StoredKey,
    StoredToken,
    TokenBackend,
    Use,
    UseHeld,
    budget_step,
    changed,
    ended,
    ends_other_context,
    full_spending,
    is_superseded,
    is_valid,
    key_ended,
    key_of,
    least_left,
    left_of,
    matches,
    matching_key,
    overlapping_keys,
    refusal,
    replaced,
    running_holds,
    satisfies,
    with_hold,
    with_use,
    without_keys,
)
from vtoken.errors import BackendClosed, ConfigurationError, InvalidInput

_BUCKET: Final = 1 << 14
"""Milliseconds that share a bucket of :class:`_Ends`: 16 seconds."""
_NOTHING_SPENT: Final = Spending()
# A member of an enum costs twice as much as a global name, and these are asked for in every operation.
_ACTIVE: Final = State.ACTIVE
_RIGHT: Final = Outcome.RIGHT
_INSERTED: Final = InsertResult.INSERTED
_ADD: Final = InsertMode.ADD
_IF_NONE_VALID: Final = InsertMode.IF_NONE_VALID
# Calling these classes packs named arguments into a dict first, which doubles the cost.
_new_presented: Final = Presented.__new__
_new_inserted: Final = Inserted.__new__
_Key = TypeVar("_Key")


class MemoryBackend:
    """A :class:`~vtoken.backend.TokenBackend` in memory.

    Args:
        name: backends of one name share one store, which lives as long as the process; without a
            name the store is this backend's own.
    """

    def __init__(self, name: str = "") -> None:
        with _naming:  # Two threads that name a new store at once must get the same one.
            self._store = _named_stores[name] if name else _Store()
        self._opens = 0

    @classmethod
    def from_url(cls, url: str, **options: object) -> Self:
        """``memory://`` is a store of its own, ``memory://name`` is shared by name.

        Raises:
            ConfigurationError: there are options, a path or a query: it has none.
        """
        parts: SplitResult | None = None
        with contextlib.suppress(ValueError):  # a bracket that is not closed
            parts = urlsplit(url) if isinstance(url, str) else None
        if parts is None or options or parts.path.strip("/") or parts.query or parts.fragment:
            raise ConfigurationError("memory:// takes a name and nothing else: memory://name")
        return cls(parts.netloc)

    def __repr__(self) -> str:
        return "<MemoryBackend>"

    async def open(self) -> None:
        with self._store.lock:
            self._opens += 1

    async def close(self) -> None:
        with self._store.lock:
            self._opens = max(0, self._opens - 1)

    async def ping(self) -> None:
        self._opened()

    async def note(self, name: str, text: str, *, replace: bool = False) -> str:
        store = self._opened()
        with store.lock:
            if text and (replace or name not in store.notes):
                store.notes[name] = text
            return store.notes.get(name, "")

    def within(self, handle: object) -> TokenBackend:
        self._opened()
        raise InvalidInput("using: the memory backend has no transactions; leave `using` out")

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
        store = self._opened()
        with store.lock:
            line = [] if mode is _ADD else store.active_line(token)
            digests = tuple([key.digest for key in token.keys]) + also_taken
            owners = store.owners_of(digests)
            for owner in owners:
                if mode is InsertMode.ONCE or not is_superseded(owner, digests, token, line):
                    holder = owner if mode is InsertMode.ONCE else None
                    return Inserted(InsertResult.KEY_TAKEN, holder)
            if token.id in store.tokens:
                return Inserted(InsertResult.KEY_TAKEN)
            if mode is _IF_NONE_VALID:
                valid = [other for other in line if satisfies(other, wanted_until)]
                if valid:
                    return Inserted(InsertResult.HAS_VALID, max(valid, key=_id))
            spending = store.spend(spends, token.created_at) if spends else _NOTHING_SPENT
            if spending.full is not None:
                return Inserted(InsertResult.LIMITED, None, spending)
            for owner in owners:
                store.save(without_keys(owner, digests))
            stored = _replace_line(store, line, token, keep_until) if line else token
            store.add(stored)
            return _new_inserted(Inserted, result=_INSERTED, token=stored, spending=spending)

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        store = self._opened()
        with store.lock:
            found: list[tuple[StoredToken, StoredKey]] = []
            for digest in key.digests or ():
                owner = store.owners.get(digest)
                held = None if owner is None else matching_key(owner, key)
                if owner is not None and held is not None:
                    found.append((owner, held))
            use_id = "" if change is None else change.use_id
            if use_id:
                for _, held in found:
                    used = store.uses.get((held.origin, use_id))
                    if used is not None:
                        left = store.left(spends, now)
                        return Presented(Outcome.REPLAYED, store.tokens[used.token], used.at, left)
            full = store.full(spends, now) if spends else None
            if full is not None:
                return Presented(Outcome.LIMITED, spending=full)
            free = True
            for token, held in found:
                why = refusal(token, held, now, use_id)
                if why is None:
                    if change is not None:
                        token = _changed_by(store, token, held, change, now)
                    left = store.left(spends, now) if spends else _NOTHING_SPENT
                    return _new_presented(Presented, outcome=_RIGHT, token=token, spending=left)
                free = free and why not in ("used", "leased")
            spending = store.spend(spends, now) if free else store.left(spends, now)
            return Presented(Outcome.REFUSED, found[0][0] if found else None, spending=spending)

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        store = self._opened()
        with store.lock:
            for token in store.matching(match):
                after = changed(token, change)
                if after is None:
                    continue
                store.save(after)
                if isinstance(change, UseHeld):
                    hold = next(hold for hold in token.holds if hold.hold_id == change.hold_id)
                    _used(store, after, hold.origin, change)
                return after
        return None

    async def find(self, match: Match, limit: int, after: str | None = None) -> list[StoredToken]:
        store = self._opened()
        with store.lock:
            found = store.matching(match)
        if after is not None:
            found = [token for token in found if token.id < after]
        return heapq.nlargest(limit, found, key=_id) if len(found) > 1 else found

    async def deactivate(self, match: Match, at: int, sparing: tuple[str, ...] = ()) -> int:
        store = self._opened()
        count = 0
        with store.lock:
            for token in store.matching(match):
                key = key_of(token, match) if match.digests is not None else None
                if key is None or key.origin == token.id:
                    count += token.is_active
                    store.save(ended(token, at, sparing))
                else:
                    count += token.is_active and key.expires_at >= at
                    store.save(key_ended(token, key))
        return count

    async def erase(self, content_type: str, object_id: str, budgets_of: bytes) -> int:
        store = self._opened()
        with store.lock:
            found = store.matching(Match(content_type=content_type, object_id=object_id))
            for token in found:
                store.ends.discard(token.id, token.ends_at)
            store.forget_tokens(found)
            store.forget(budgets_of, None)
        return len(found)

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> Purged:
        store = self._opened()
        with store.lock:
            purged = 0
            held: list[StoredToken] = []
            while due := store.ends.take(before, limit - purged):
                free: list[StoredToken] = []
                for token_id in due:
                    token = store.tokens[token_id]
                    (held if token.holds and running_holds(token, now) else free).append(token)
                store.forget_tokens(free)
                purged += len(free)
            for token in held:
                store.ends.add(token.id, token.ends_at)
            budgets = store.budget_ends.take(budgets_before + 1, limit)
            for budget in budgets:
                store.forget_budget(budget)
        return Purged(tokens=purged, budgets=len(budgets))

    async def count(self, now: int) -> list[SlugCount]:
        store = self._opened()
        with store.lock:
            tokens = list(store.tokens.values())
        by_slug: defaultdict[str, list[StoredToken]] = defaultdict(list)
        for token in tokens:
            if token.content_type != PRETENDED:
                by_slug[token.slug].append(token)
        return [_counted(slug, of_slug, now) for slug, of_slug in by_slug.items()]

    async def spend(self, spends: tuple[Spend, ...], now: int) -> Spending:
        store = self._opened()
        with store.lock:
            return store.spend(spends, now)

    async def refund(self, charges: tuple[Charge, ...]) -> None:
        store = self._opened()
        with store.lock:
            for charge in charges:
                state = store.budget(charge.budget)
                if state is not None and state.spent and state.until == charge.until:
                    store.keep(charge.budget, state._replace(spent=state.spent - 1))

    async def budgets(self, names: tuple[Budget, ...]) -> list[BudgetState | None]:
        store = self._opened()
        with store.lock:
            return [store.budget(name) for name in names]

    async def reset(self, budgets_of: bytes, names: tuple[bytes, ...] | None) -> int:
        store = self._opened()
        with store.lock:
            return store.forget(budgets_of, names)

    def _opened(self) -> _Store:
        if not self._opens:
            raise BackendClosed("the memory backend is not open: use `async with manager:`")
        return self._store


# What the methods do in several steps, under the lock ---------------------------------------------


def _id(token: StoredToken) -> str:
    return token.id


def _replace_line(
    store: _Store, line: Iterable[StoredToken], token: StoredToken, keep_until: int
) -> StoredToken:
    """Replace the tokens of a line, and return the new one with the keys that it takes over."""
    old = [store.tokens[other.id] for other in line]
    exclusive = [other for other in old if not other.is_beside]
    taken: tuple[StoredKey, ...] = ()
    if exclusive and keep_until > token.created_at:
        newest = max(exclusive, key=_id)
        taken = overlapping_keys(newest, token, keep_until)
    digests = [key.digest for key in taken]
    for other in old:
        other = without_keys(other, digests) if taken else other
        store.save(replaced(other, token.created_at))
    return token._replace(keys=(*token.keys, *taken)) if taken else token


def _changed_by(
    store: _Store, token: StoredToken, key: StoredKey, change: Use | Hold, now: int
) -> StoredToken:
    """Make the change that somebody with a right key asked for, and return the token after it."""
    if isinstance(change, Hold):
        after = with_hold(token, key, change, now)
        store.save(after)
        return after
    after = with_use(token, change)
    store.save(after)
    if change.use_id or change.resets or after.context:
        _used(store, after, key.origin, change)
    return after


def _used(store: _Store, token: StoredToken, origin: str, change: Use | UseHeld) -> None:
    """What a use does beside the record of its token."""
    if change.use_id:
        store.remember(token.id, origin, change.use_id, change.at)
    for budget in change.resets:
        store.forget(budget.object, (budget.name,))
    if token.context and not token.is_beside:
        for other in store.active_of(token.object_id):
            if ends_other_context(token, other):
                store.save(ended(other, change.at))


def _counted(slug: str, tokens: Collection[StoredToken], now: int) -> SlugCount:
    active = sum(is_valid(token, now) for token in tokens)
    return SlugCount(
        slug=slug,
        total=len(tokens),
        active=active,
        expired=sum(token.is_active for token in tokens) - active,
        used=sum(not token.is_active and token.uses > 0 for token in tokens),
    )


# The store ----------------------------------------------------------------------------------------


class _Remembered(NamedTuple):
    """A use that may be asked for again."""

    token: str
    at: int


class _OfObject:
    """The ids of the tokens of an object that has several."""

    __slots__ = ("active", "ended")

    def __init__(self) -> None:
        self.active: dict[str, None] = {}
        self.ended: dict[str, None] = {}


class _Store:
    """The records and their indexes, guarded by ``lock``."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.notes: dict[str, str] = {}
        self.tokens: dict[str, StoredToken] = {}
        self.ends = _Ends[str]()
        self.uses: dict[tuple[str, str], _Remembered] = {}  # by origin and use id
        self.budget_ends = _Ends[Budget]()
        self.owners: dict[bytes, StoredToken] = {}  # by the digests of their keys
        # By object id. Most objects have one token: for these, its id takes the place of an _OfObject.
        self._objects: dict[str, str | _OfObject] = {}
        self.uses_of: dict[str, deque[tuple[str, str]]] = {}  # token id -> keys of `uses`, oldest first
        self.budgets_of: dict[bytes, dict[bytes, BudgetState]] = {}  # object -> name -> state

    # Tokens

    def add(self, token: StoredToken) -> None:
        """Store a new token."""
        self.tokens[token.id] = token
        for key in token.keys:
            self.owners[key.digest] = token
        self.ends.add(token.id, token.ends_at)
        if token.object_id in self._objects:
            self._add_to_object(token)
        else:
            self._objects[token.object_id] = token.id

    def save(self, token: StoredToken) -> None:
        """Store what has become of a token."""
        old = self.tokens[token.id]
        self.tokens[token.id] = token
        if old.keys is not token.keys:
            for key in old.keys:
                del self.owners[key.digest]
        for key in token.keys:
            self.owners[key.digest] = token
        if old.ends_at != token.ends_at:
            self.ends.discard(old.id, old.ends_at)
            self.ends.add(token.id, token.ends_at)
        if (old.state is _ACTIVE) is not (token.state is _ACTIVE):
            of_object = self._objects[token.object_id]
            if not isinstance(of_object, str):
                source, target = of_object.active, of_object.ended
                if token.is_active:
                    source, target = target, source
                source.pop(token.id, None)
                target[token.id] = None

    def forget_tokens(self, tokens: Iterable[StoredToken]) -> None:
        """Forget tokens that were taken out of :attr:`ends`, and their uses."""
        for token in tokens:
            del self.tokens[token.id]
            for key in token.keys:
                del self.owners[key.digest]
            of_object = self._objects.pop(token.object_id)
            if not isinstance(of_object, str):
                of_object.active.pop(token.id, None)
                of_object.ended.pop(token.id, None)
                if of_object.active or of_object.ended:
                    self._objects[token.object_id] = of_object
            if token.uses:
                for use in self.uses_of.pop(token.id, ()):
                    del self.uses[use]

    def owners_of(self, digests: tuple[bytes, ...]) -> list[StoredToken]:
        """The tokens that have keys with these digests, each once, in the order of the digests."""
        found = [token for digest in digests if (token := self.owners.get(digest)) is not None]
        return found if len(found) < 2 else list({token.id: token for token in found}.values())

    def active_of(self, object_id: str) -> list[StoredToken]:
        """The active tokens of all objects with this id, whatever their content type."""
        of_object = self._objects.get(object_id)
        if of_object is None:
            return []
        if isinstance(of_object, str):
            token = self.tokens[of_object]
            return [token] if token.is_active else []
        return [self.tokens[token_id] for token_id in of_object.active]

    def active_line(self, token: StoredToken) -> list[StoredToken]:
        """The active tokens with the same content type, object id, slug and context."""
        if token.object_id not in self._objects:
            return []
        return [
            other
            for other in self.active_of(token.object_id)
            if (other.content_type, other.slug, other.context)
            == (token.content_type, token.slug, token.context)
        ]

    def matching(self, match: Match) -> list[StoredToken]:
        """The tokens that match."""
        return [token for token in self._candidates(match) if matches(token, match)]

    def remember(self, token_id: str, origin: str, use_id: str, at: int) -> None:
        """Remember a use for who asks for it again."""
        if (origin, use_id) in self.uses:
            return
        self.uses[origin, use_id] = _Remembered(token_id, at)
        uses = self.uses_of.setdefault(token_id, deque())
        uses.append((origin, use_id))
        if len(uses) > REMEMBERED_USES:
            del self.uses[uses.popleft()]

    def _candidates(self, match: Match) -> Iterable[StoredToken]:
        """The smallest set of tokens that an index knows to contain every match."""
        if match.digests is not None:
            return self.owners_of(match.digests)
        if match.id is not None:
            token = self.tokens.get(match.id)
            return () if token is None else (token,)
        if match.object_id is None:
            return self.tokens.values()
        if match.active or match.valid_at is not None:
            return self.active_of(match.object_id)
        of_object = self._objects.get(match.object_id, _OfObject())
        if isinstance(of_object, str):
            return (self.tokens[of_object],)
        return [self.tokens[token_id] for token_id in (*of_object.active, *of_object.ended)]

    def _add_to_object(self, token: StoredToken) -> None:
        """Add a token to an object that has one."""
        of_object = self._objects[token.object_id]
        if isinstance(of_object, str):
            first, of_object = self.tokens[of_object], _OfObject()
            (of_object.active if first.is_active else of_object.ended)[first.id] = None
            self._objects[token.object_id] = of_object
        (of_object.active if token.is_active else of_object.ended)[token.id] = None

    # Budgets

    def budget(self, name: Budget) -> BudgetState | None:
        return self.budgets_of.get(name.object, {}).get(name.name)

    def keep(self, name: Budget, state: BudgetState) -> None:
        """Store what has become of a budget."""
        of_object = self.budgets_of.setdefault(name.object, {})
        old = of_object.get(name.name)
        of_object[name.name] = state
        if old is None or old.until != state.until:
            if old is not None:
                self.budget_ends.discard(name, old.until)
            self.budget_ends.add(name, state.until)

    def forget(self, budgets_of: bytes, names: Iterable[bytes] | None) -> int:
        """Forget some or all budgets of an object; how many there were."""
        of_object = self.budgets_of.get(budgets_of, {})
        wanted = of_object if names is None else dict.fromkeys(names)
        chosen = [name for name in wanted if name in of_object]
        for name in chosen:
            budget = Budget(object=budgets_of, name=name)
            self.budget_ends.discard(budget, of_object[name].until)
            self.forget_budget(budget)
        return len(chosen)

    def forget_budget(self, budget: Budget) -> None:
        """Forget a budget that was taken out of :attr:`budget_ends`."""
        of_object = self.budgets_of[budget.object]
        del of_object[budget.name]
        if not of_object:
            del self.budgets_of[budget.object]

    def full(self, spends: tuple[Spend, ...], now: int) -> Spending | None:
        """The refusal if one of the spends is not allowed."""
        return full_spending([self.budget(spend.budget) for spend in spends], spends, now)

    def left(self, spends: tuple[Spend, ...], now: int) -> Spending:
        """What is left where nothing was charged."""
        lefts = [left_of(self.budget(spend.budget), spend, now) for spend in spends]
        return Spending(left=least_left(lefts))

    def spend(self, spends: tuple[Spend, ...], now: int) -> Spending:
        """Charge all of them, or none."""
        if not spends:
            return _NOTHING_SPENT
        full = self.full(spends, now)
        if full is not None:
            return full
        charges: list[Charge] = []
        lefts: list[int] = []
        for spend in spends:
            state = budget_step(self.budget(spend.budget), spend, now)
            assert state is not None  # noqa: S101  # none of them is full
            self.keep(spend.budget, state)
            charges.append(Charge(budget=spend.budget, until=state.until))
            lefts.append(max(spend.limit - state.spent, 0))
        return Spending(charges=tuple(charges), left=least_left(lefts))


class _Ends(Generic[_Key]):
    """What ends when, so that the first to end are found without looking at the others.

    What is added goes into a bucket of some seconds. A bucket is sorted only when a part of it is taken out.
    """

    def __init__(self) -> None:
        self._buckets: dict[int, dict[_Key, int]] = {}
        self._numbers: list[int] = []  # of all buckets, sorted
        self._sorted: int | None = None  # the bucket whose entries are in the order of their ends

    def add(self, key: _Key, end: int) -> None:
        number = end // _BUCKET
        bucket = self._buckets.get(number)
        if bucket is None:
            bucket = self._buckets[number] = {}
            insort(self._numbers, number)
        elif number == self._sorted:
            self._sorted = None
        bucket[key] = end

    def discard(self, key: _Key, end: int) -> None:
        """Leave out what was added with this end."""
        number = end // _BUCKET
        bucket = self._buckets[number]
        del bucket[key]
        if not bucket:
            self._remove(number)

    def take(self, before: int, limit: int) -> list[_Key]:
        """Take out what ends before a time, the first to end, at most so many."""
        taken: list[_Key] = []
        while self._numbers and self._numbers[0] * _BUCKET < before and len(taken) < limit:
            number = self._numbers[0]
            bucket, room = self._buckets[number], limit - len(taken)
            if (number + 1) * _BUCKET <= before and len(bucket) <= room:
                taken += bucket
                self._remove(number)
                continue
            if number != self._sorted:
                bucket = self._buckets[number] = dict(sorted(bucket.items(), key=itemgetter(1)))
                self._sorted = number
            due = [key for key, end in islice(bucket.items(), room) if end < before]
            taken += due
            for key in due:
                del bucket[key]
            if bucket:  # the rest is not due, or there is no room for it
                break
            self._remove(number)
        return taken

    def _remove(self, number: int) -> None:
        del self._buckets[number]
        del self._numbers[bisect_left(self._numbers, number)]


_named_stores: defaultdict[str, _Store] = defaultdict(_Store)
_naming = threading.Lock()
