"""Tokens in the process's memory: for tests, small tools, and one process that may forget.

It keeps every guarantee within its process and for its life. Nothing is awaited while its lock is held,
so it is safe from any number of tasks, threads and event loops, under asyncio and trio.
"""

from __future__ import annotations

import contextlib
import threading
from bisect import insort
from collections import defaultdict
from collections.abc import Iterable
from typing import Final, Self
from urllib.parse import SplitResult, urlsplit

from vtoken.backend import (
    Budget,
    Change,
    ForgetKey,
    InsertMode,
    InsertResult,
    Lease,
    Match,
    Release,
    SetExtraData,
    SlugCount,
    Spent,
    StoredToken,
    Use,
)
from vtoken.errors import BackendClosed, ConfigurationError
from vtoken_backends.matching import is_valid, matches

_BUCKET: Final = 1 << 14
"""Milliseconds of ``ends_at`` that share a bucket of the purge index: 16 seconds."""
_ENDS_AT: Final = StoredToken._fields.index("ends_at")  # is_active follows
_USES: Final = StoredToken._fields.index("uses")  # used_at, use_ids, lease_id, lease_until follow


class _Store:
    """The records and their indexes, guarded by ``lock``."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.by_id: dict[str, StoredToken] = {}
        self.by_digest: dict[bytes, StoredToken] = {}
        self.active: dict[str, str | tuple[str, ...]] = {}  # object id -> id, or ids, of its active tokens
        self.ending = _Ending(self.by_id)
        self.overlaps: dict[str, str] = {}  # id -> its overlap, while it stands in one
        self.budgets: dict[Budget, tuple[int, int, int]] = {}  # spent, strikes, until

    def put(self, token: StoredToken) -> None:
        old = self.by_id.get(token.id)
        self.by_id[token.id] = token
        self.by_digest[token.digest] = token
        if old is None:
            self.ending.add(token)
        elif old.ends_at != token.ends_at:
            self.ending.discard(old)
            self.ending.add(token)
        if token.is_active is not (old is not None and old.is_active):
            self._index_active(token, token.is_active)

    def remove(self, token: StoredToken) -> None:
        """Forget a token that was taken out of ``ending``."""
        del self.by_id[token.id]
        del self.by_digest[token.digest]
        if self.overlaps:
            self.overlaps.pop(token.id, None)
        if token.is_active:
            self._index_active(token, False)

    def active_of(self, object_id: str) -> list[StoredToken]:
        """The active tokens of all objects with this id, whatever their content type."""
        ids = self.active.get(object_id)
        if ids is None:
            return []
        return [self.by_id[ids]] if isinstance(ids, str) else [self.by_id[i] for i in ids]

    def _index_active(self, token: StoredToken, is_active: bool) -> None:
        # Most objects have one active token; for these, the id itself takes the place of a tuple.
        ids = self.active.get(token.object_id)
        if ids is None or ids == token.id:
            if is_active:
                self.active[token.object_id] = token.id
            else:
                self.active.pop(token.object_id, None)
            return
        others = (ids,) if isinstance(ids, str) else tuple(i for i in ids if i != token.id)
        ids = (*others, token.id) if is_active else others
        self.active[token.object_id] = ids[0] if len(ids) == 1 else ids


class _Ending:
    """The tokens by their end, in buckets of some seconds: nothing is sorted before its time has come."""

    def __init__(self, by_id: dict[str, StoredToken]) -> None:
        self._by_id = by_id
        self._sets: defaultdict[int, set[str]] = defaultdict(set)
        self._sorted: dict[int, list[str]] = {}  # buckets that a purge has opened, the first to end last
        self._order: list[int] = []  # all buckets, sorted

    def add(self, token: StoredToken) -> None:
        bucket = token.ends_at // _BUCKET
        if bucket not in self._sets and bucket not in self._sorted:
            insort(self._order, bucket)
        self._sets[bucket].add(token.id)

    def discard(self, token: StoredToken) -> None:
        bucket = token.ends_at // _BUCKET
        ids = self._sets.get(bucket)
        if ids is not None:  # from an opened bucket it is left out when its turn comes
            ids.discard(token.id)
            if not ids:
                del self._sets[bucket]
                if bucket not in self._sorted:
                    self._order.remove(bucket)

    def take(self, before: int, now: int, limit: int) -> list[StoredToken]:
        """Up to ``limit`` tokens that ended before ``before`` and are not leased, the longest ended first."""
        due: dict[str, StoredToken] = {}  # by id: a token whose end has moved may stand in its bucket twice
        leased: list[StoredToken] = []
        while self._order and self._order[0] * _BUCKET < before and len(due) < limit:
            ids = self._open(self._order[0])
            while ids and len(due) < limit:
                token = self._by_id.get(ids[-1])
                if token is not None and token.ends_at // _BUCKET == self._order[0]:
                    if token.ends_at >= before:
                        break
                    if token.lease_until > now:
                        leased.append(token)
                    else:
                        due[token.id] = token
                ids.pop()
            if ids:
                break
            del self._sorted[self._order.pop(0)]
        for token in leased:
            self.add(token)
        return list(due.values())

    def _open(self, bucket: int) -> list[str]:
        ids = self._sorted.setdefault(bucket, [])
        new = self._sets.pop(bucket, None)
        if new:
            ids += new
            ids.sort(key=self._end_of, reverse=True)
        return ids

    def _end_of(self, token_id: str) -> int:
        token = self._by_id.get(token_id)
        return 0 if token is None else token.ends_at


_named_stores: defaultdict[str, _Store] = defaultdict(_Store)
_naming = threading.Lock()


class MemoryBackend:
    """A :class:`~vtoken.backend.TokenBackend` in memory.

    Args:
        name: backends of one name share one store, which lives as long as the process; without a
            name the store is this backend's own.
    """

    def __init__(self, name: str = "") -> None:
        with _naming:  # of two threads that name a new store, both must get the same one
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

    async def insert(self, token: StoredToken, mode: InsertMode, keep_until: int = 0) -> InsertResult:
        store = self._opened()
        with store.lock:
            if token.digest in store.by_digest or token.id in store.by_id:
                return InsertResult.KEY_TAKEN
            old = [] if mode is InsertMode.ADD else _siblings(store, token)
            if mode is InsertMode.IF_NONE_VALID and any(is_valid(t, token.created_at) for t in old):
                return InsertResult.HAS_VALID
            overlapping = mode is InsertMode.REPLACE and keep_until > token.created_at
            for other in old:
                if overlapping:
                    store.overlaps[other.id] = store.overlaps.get(other.id, token.id)
                    store.put(
                        other._replace(
                            expires_at=min(other.expires_at, keep_until),
                            ends_at=min(other.ends_at, keep_until),
                        )
                    )
                else:
                    store.put(_ended(other, token.created_at))
            store.put(token)
            if overlapping and old:
                # One overlap for all of them: a third token joins the overlap of the first two.
                overlap = store.overlaps[old[0].id]
                for member in (*old, token):
                    store.overlaps[member.id] = overlap
            return InsertResult.INSERTED

    async def find(self, match: Match, limit: int, after: tuple[int, str] | None = None) -> list[StoredToken]:
        store = self._opened()
        with store.lock:
            found = _matching(store, match)
        if len(found) > 1:
            found.sort(key=_age, reverse=True)
        if after is not None:
            found = [token for token in found if _age(token) < after]
        return found[:limit]

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        store = self._opened()
        with store.lock:
            for token in _matching(store, match):
                changed = _changed(token, change)
                if changed is None:
                    continue
                store.put(changed)
                if isinstance(change, Use) and token.is_active and token.id in store.overlaps:
                    _end_overlap(store, token, change.at)
                return changed
        return None

    async def deactivate(self, match: Match, at: int) -> int:
        store = self._opened()
        with store.lock:
            found = _matching(store, match._replace(active=True))
            for token in found:
                store.put(_ended(token, at))
        return len(found)

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> int:
        store = self._opened()
        with store.lock:
            ended = store.ending.take(before, now, limit)
            for token in ended:
                store.remove(token)
            old = [b for b, (_, _, until) in store.budgets.items() if until <= budgets_before]
            for budget in old[:limit]:
                del store.budgets[budget]
        return len(ended)

    async def count(self, now: int) -> list[SlugCount]:
        store = self._opened()
        counts: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
        with store.lock:
            tokens = list(store.by_id.values())
        for token in tokens:
            numbers = counts[token.slug]
            numbers[0] += 1
            numbers[1] += token.is_active and token.expires_at >= now
            numbers[2] += token.is_active and token.expires_at < now
            numbers[3] += not token.is_active and token.uses > 0
        return [SlugCount(slug, *numbers) for slug, numbers in counts.items()]

    async def spend(self, budget: Budget, now: int, limit: int, window: int, max_window: int) -> Spent:
        store = self._opened()
        with store.lock:
            spent, strikes, until = store.budgets.get(budget, (0, 0, 0))
            if until + max_window <= now:
                spent, strikes, until = 0, 0, 0
            elif until <= now and spent:
                spent, strikes = 0, min(strikes + 1, 20) if spent >= limit else 0
            if spent >= limit:
                return Spent(False, until)
            if not spent:
                until = now + min(window << strikes, max_window)
            store.budgets[budget] = spent + 1, strikes, until
            return Spent(True, until)

    async def refund(self, budget: Budget, until: int) -> None:
        store = self._opened()
        with store.lock:
            spent, strikes, running_until = store.budgets.get(budget, (0, 0, 0))
            if spent and running_until == until:
                store.budgets[budget] = spent - 1, strikes, until

    async def reset(self, budget: Budget) -> None:
        store = self._opened()
        with store.lock:
            store.budgets.pop(budget, None)

    def _opened(self) -> _Store:
        if not self._opens:
            raise BackendClosed("the memory backend is not open: use `async with manager:`")
        return self._store


def _age(token: StoredToken) -> tuple[int, str]:
    return token.created_at, token.id


def _ended(token: StoredToken, at: int) -> StoredToken:
    # Four times as fast as _replace(), on the way of every use (tests/benchmarks, memory).
    return StoredToken._make((*token[:_ENDS_AT], min(token.ends_at, at - 1), False, *token[_ENDS_AT + 2 :]))


def _candidates(store: _Store, match: Match) -> Iterable[StoredToken]:
    """The smallest set of tokens that an index knows to hold every match."""
    if match.digests is not None:
        return [store.by_digest[d] for d in dict.fromkeys(match.digests) if d in store.by_digest]
    if match.id is not None:
        return [store.by_id[match.id]] if match.id in store.by_id else []
    if match.object_id is not None and (match.active or match.valid_at is not None):
        return store.active_of(match.object_id)
    return store.by_id.values()


def _matching(store: _Store, match: Match) -> list[StoredToken]:
    if match.digests is not None and len(match.digests) == 1:
        token = store.by_digest.get(match.digests[0])
        return [token] if token is not None and matches(token, match) else []
    return [token for token in _candidates(store, match) if matches(token, match)]


def _siblings(store: _Store, token: StoredToken) -> list[StoredToken]:
    """The other active tokens of the same content type, object id and slug."""
    return [
        other
        for other in store.active_of(token.object_id)
        if other.slug == token.slug and other.content_type == token.content_type and other.id != token.id
    ]


def _changed(token: StoredToken, change: Change) -> StoredToken | None:
    """The token after the change, or None where a use was counted already."""
    match change:
        case Use(at, use_id):
            if use_id and use_id in token.use_ids:
                return None
            use_ids = (*token.use_ids, use_id) if use_id else token.use_ids
            uses, after = token.uses + 1, (at, use_ids, "", 0)
            if uses < token.max_uses:
                return StoredToken._make((*token[:_USES], uses, *after))
            ends_at = min(token.ends_at, at - 1)
            return StoredToken._make(
                (*token[:_ENDS_AT], ends_at, False, *token[_ENDS_AT + 2 : _USES], uses, *after)
            )
        case Lease(lease_id, until):
            return token._replace(lease_id=lease_id, lease_until=until)
        case Release():
            return token._replace(lease_id="", lease_until=0)
        case SetExtraData(extra_data):
            return token._replace(extra_data=extra_data)
        case ForgetKey():
            return token._replace(plain_key="")


def _end_overlap(store: _Store, used: StoredToken, at: int) -> None:
    overlap = store.overlaps[used.id]
    for token in _siblings(store, used):
        if store.overlaps.get(token.id) == overlap:
            store.put(_ended(token, at))
