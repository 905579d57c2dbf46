"""Look-ups and lists: what is found by names, by object, and among all.

A list is newest first. The names of ids sort so that their index has the newest token first: a page of all
tokens is the documents that this index names next. Each has at least one token of the page in it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from inspect import isawaitable
from operator import attrgetter
from typing import Final, NamedTuple

from vtoken.backend import PRETENDED, Match, SlugCount, State, StoredToken, matches
from vtoken.errors import BackendError, CorruptStore
from vtoken_backends.mongodb.client import LONG
from vtoken_backends.mongodb.collections import Collections, Document
from vtoken_backends.mongodb.documents import (
    Kept,
    Stored,
    condition,
    id_name,
    slug_count,
    stored_of,
)
from vtoken_backends.mongodb.lines import Documents
from vtoken_backends.mongodb.writes import PAGE, Writes

_ACTIVE: Final = State.ACTIVE.value


class Find(NamedTuple):
    """``TokenBackend.find`` by digests."""

    match: Match
    limit: int

    def __repr__(self) -> str:
        return "<Find>"


class _Place(NamedTuple):
    """Where documents name tokens, and which."""

    field: str
    tokens: Callable[[Stored], list[Kept]]


class _Part(NamedTuple):
    """Documents, each found by its newest token of a page."""

    documents: list[Stored]
    last: str | None
    """How far they are without a gap; None: to the end."""


def _moved(stored: Stored) -> list[Kept]:
    return stored.settled() if stored.is_apart() else stored.spill


_NAMED: Final = _Place("names", Stored.settled)
_MOVED: Final = _Place("moved", _moved)
_token: Final[Callable[[Kept], StoredToken]] = attrgetter("token")
_NEWEST: Final = f"{(1 << 63) - 1:016x}"
"""The id that comes before all others in a list."""


class Reads:
    """The look-ups of a store."""

    def __init__(self, client: Collections, writes: Writes) -> None:
        self._client = client
        self._writes = writes

    async def by_digest(self, finds: Sequence[Find]) -> list[list[StoredToken] | BaseException]:
        """Many look-ups by digest at once."""
        digests = list({digest: None for find in finds for digest in find.match.digests or ()})
        try:
            documents = await self._named(digests)
        except CorruptStore as error:
            failure = error
        else:
            return [
                _newest(
                    (h.kept.token for h in documents.holders(find.match.digests or ())),
                    find.match,
                    find.limit,
                )
                for find in finds
            ]
        if len(finds) == 1:
            return [failure]
        # One document is damaged. Nobody may fail for a neighbour's reason.
        return [answer for find in finds for answer in await self.by_digest([find])]

    async def by_id(self, match: Match) -> list[StoredToken]:
        """The token that has the id of a match."""
        name = id_name(match.id or "")
        holder = (await self._named([name])).holder(name)
        return [holder.kept.token] if holder is not None and matches(holder.kept.token, match) else []

    async def _named(self, names: Sequence[object]) -> Documents:
        """What has these names: mostly current tokens, so that tombstones are read only for those left."""
        documents = Documents(is_whole=False)
        current = await self._writes.named(names, is_whole=False)
        for stored in current:
            documents.add(stored)
        left = [name for name in names if documents.holder(name) is None]
        if left:
            found = self._writes.named(left, is_whole=True) if current else self._writes.not_named(left)
            for stored in await found:
                documents.add(stored)
        line = documents.handing_over(names)
        if line is None:
            return documents
        await self._writes.finish(line)
        return await self._named(names)

    async def page(self, match: Match, limit: int, after: str | None) -> list[StoredToken]:
        """A page of a list."""
        if match.content_type is None or match.object_id is None:
            return await self._page_of_all(match, limit, after)
        if match.active or match.valid_at is not None:
            return await self._active_of_object(match, limit, after)
        found: list[StoredToken] = []
        last: Document = {}
        while True:  # all of an object are looked at; those of a page are kept
            query = {"$and": [condition(match), last]} if last else condition(match)
            stored = await self._writes.whole(query, sort={"_id": 1})
            tokens = (kept.token for one in stored for kept in one.tokens())
            found = _newest([*found, *_after(tokens, after)], match, limit)
            if len(stored) < PAGE:
                return found
            last = {"_id": {"$gt": stored[-1].oid}}

    async def _active_of_object(self, match: Match, limit: int, after: str | None) -> list[StoredToken]:
        """Active tokens are current ones, which the server sorts by itself."""
        query = condition(match) | {"token.state": _ACTIVE}
        if after is not None:
            query["token.id"] = {"$lt": after}
        if match.valid_at is not None:
            query["token.expires_at"] = {"$gte": match.valid_at}

        async def find() -> list[Stored]:
            fields = {"former": 0, "names": 0, "spill": 0, "moved": 0}
            found = await self._client.find_all(query, limit, fields, sort={"token.id": -1})
            return [stored_of(one, is_whole=False) for one in found]

        found = await self._client.run(find, writes=False)
        return _newest((one.kept.token for one in found if one.kept is not None), match, limit)

    async def _page_of_all(self, match: Match, limit: int, after: str | None) -> list[StoredToken]:
        found: list[StoredToken] = []
        while len(found) < limit:
            tokens, after = await self._next(match, limit, after)
            found += _newest(tokens, match, limit)
            if after is None:
                break
        return found[:limit]

    async def _next(
        self, match: Match, limit: int, after: str | None
    ) -> tuple[list[StoredToken], str | None]:
        """The tokens that come next, newest first and without a gap; the id of the last one, None at the end.

        What is read second are tombstones that were on their way when their document was to be read first.
        """
        # Documents of another content type or slug hold no match, and need not be read.
        others = {name: value for name, value in condition(match).items() if name != "object"}
        named = await self._part(_NAMED, after, None, others, limit)
        moved = await self._part(_MOVED, after, named.last, others, limit)
        last = max((part.last for part in (named, moved) if part.last is not None), default=None)
        documents = [*named.documents, *moved.documents]
        tokens = {kept.token.id: kept.token for stored in documents for kept in stored.tokens()}
        found = list(_after(tokens.values(), after))
        return [token for token in found if last is None or token.id >= last], last

    async def _part(
        self, place: _Place, after: str | None, last: str | None, others: Document, limit: int
    ) -> _Part:
        """Documents by the index of their tokens, from after one to the last one."""
        ids: Document = {"$gte": id_name(_NEWEST)} if after is None else {"$gt": id_name(after)}
        if last is not None:
            ids["$lte"] = id_name(last)

        async def find() -> list[Stored]:
            query = {place.field: {"$elemMatch": ids}, **others}
            found = await self._client.find_all(query, limit, hint={place.field: 1})
            return [stored_of(one, is_whole=True) for one in found]

        documents = await self._client.run(find, writes=False)
        found_by = [
            max(token.id for token in _after(map(_token, place.tokens(stored)), after))
            for stored in documents
        ]
        if found_by != sorted(found_by, reverse=True):
            raise BackendError("MongoDB: the server did not list tokens by their index")
        return _Part(documents, found_by[-1] if len(documents) == limit else None)

    async def count(self, now: int) -> list[SlugCount]:
        """What :meth:`TokenBackend.count` says."""

        async def count() -> list[SlugCount]:
            cursor = self._client.tokens.aggregate(_counting(now), allowDiskUse=True)
            if isawaitable(cursor):  # PyMongo's is, Motor's is not
                cursor = await cursor
            return [slug_count(found) for found in await cursor.to_list(None)]

        return await self._client.run(count, writes=False, seconds=LONG)


def _after(tokens: Iterable[StoredToken], after: str | None) -> Iterable[StoredToken]:
    return tokens if after is None else (token for token in tokens if token.id < after)


def _newest(tokens: Iterable[StoredToken], match: Match, limit: int) -> list[StoredToken]:
    """The newest that match, each once."""
    found = {token.id: token for token in tokens if matches(token, match)}
    if len(found) < 2:
        return list(found.values())
    return heapq.nlargest(limit, found.values(), key=lambda token: token.id)


def _counting(now: int) -> list[Document]:
    """The aggregation of counts by slug.

    Tombstones on their way may stand in two documents at once. So those that move, and those that have a
    document of their own, are counted by their ids: each once.
    """

    def number(*conditions: object) -> Document:
        return {"$sum": {"$cond": [{"$and": list(conditions)}, 1, 0]}}

    is_active = {"$eq": ["$tokens.state", _ACTIVE]}
    counts = {
        "total": {"$sum": 1},
        "active": number(is_active, {"$gte": ["$tokens.expires_at", now]}),
        "expired": number(is_active, {"$lt": ["$tokens.expires_at", now]}),
        "used": number({"$not": [is_active]}, {"$gt": [{"$ifNull": ["$tokens.uses", 0]}, 0]}),
    }
    current = {"$cond": [{"$ne": [{"$type": "$token"}, "missing"]}, ["$token"], []]}
    others = [{"$ifNull": [f"${name}", []]} for name in ("former", "spill")]
    fields = {
        "slug": 1,
        "tokens": {"$concatArrays": [current, *others]},
        "moving": {"$ifNull": ["$spill.id", []]},
        "has_moved": {"$eq": [{"$type": {"$ifNull": ["$line", "$beside_line"]}}, "missing"]},
    }
    may_be_twice = {"$or": ["$has_moved", {"$in": ["$tokens.id", "$moving"]}]}
    groups = {"slug": "$slug", "id": {"$cond": [may_be_twice, "$tokens.id", None]}}

    def once(name: str) -> Document:
        return {"$sum": {"$cond": [{"$eq": ["$_id.id", None]}, f"${name}", {"$min": [f"${name}", 1]}]}}

    return [
        {"$match": {"content_type": {"$ne": PRETENDED}}},
        {"$project": fields},
        {"$unwind": "$tokens"},
        {"$group": {"_id": groups, **counts}},
        {"$group": {"_id": "$_id.slug", **{name: once(name) for name in counts}}},
    ]
