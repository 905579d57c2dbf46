"""What the MongoDB backend sends and reads: documents, conditions, updates. No input or output here.

Caller's strings stand only as values of ``$eq``, ``$ne``, ``$in`` and ``$set``, or under ``$literal``, where
the server takes nothing for an operator or a path.

Besides its own fields, the document of a token has:

- ``slot``: ``""``, or its id; unique among the active tokens of a subject and slug.
- ``pending``: its insert is under way; nobody sees it.
- ``newer``: ids of newer tokens in its overlap. ``has_older``: it is such a newer token.
- ``sealed_for``: id of the older token that may be used instead of it; its own once it was used itself.
- ``saved``: a change other than a use or a lease was made.
- ``claim``: which shared trip used it first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, Final, NamedTuple

from bson import ObjectId
from bson.int64 import Int64

from vtoken.backend import (
    Budget,
    Change,
    ForgetKey,
    Lease,
    Match,
    Release,
    SetExtraData,
    SlugCount,
    StoredToken,
    Use,
)
from vtoken.errors import CorruptStore

Document = dict[str, Any]

SHOWN: Final = {"pending": {"$exists": False}}
NEWEST_FIRST: Final = [("created_at", -1), ("_id", -1)]
SLOT: Final = ("content_type", "object_id", "slug", "slot")
TOKEN_INDEXES: Final[tuple[Document, ...]] = (
    # First, so that of two duplicates in one insert the server reports the digest.
    {"key": {"digest": 1}, "unique": True},
    {
        # Also finds the active tokens of a subject.
        "key": dict.fromkeys(SLOT, 1),
        "unique": True,
        "partialFilterExpression": {"is_active": True},
    },
    {"key": {"ends_at": 1}},
    {"key": dict(NEWEST_FIRST)},
)
BUDGET_INDEXES: Final[tuple[Document, ...]] = ({"key": {"until": 1}},)
PENDING_FOR: Final = 3_600_000
"""Milliseconds after which a pending token, left by a crash, may be purged; an insert takes seconds."""

_MOST_STRIKES: Final = 20
_STRINGS: Final = (
    "id", "content_type", "object_id", "slug", "scheme", "secret_id", "plain_key", "nonce", "lease_id"
)  # fmt: skip
_TYPES: Final[dict[str, tuple[type, ...]]] = {
    **dict.fromkeys(_STRINGS, (str,)),
    "digest": (bytes,),
    "context": (bytes,),
    "is_active": (bool,),
    "extra_data": (str, type(None)),
    "use_ids": (list,),
}
"""What the fields are read as; those not named here are integers."""
_NAMES: Final = tuple("_id" if name == "id" else name for name in StoredToken._fields)
_VALUES: Final = itemgetter(*_NAMES)
_USE_IDS: Final = StoredToken._fields.index("use_ids")


class State(NamedTuple):
    """A token with its place in an overlap, and whether more than its uses has changed."""

    token: StoredToken
    newer: tuple[str, ...]
    has_older: bool
    saved: bool


def document(token: StoredToken, **more: object) -> Document:
    """The document of a token, with further fields or other values."""
    return {("_id" if name == "id" else name): value for name, value in token._asdict().items()} | more


def state(found: Document) -> State:
    """What a document says.

    Raises:
        CorruptStore: a field is missing or of another type than it was stored with.
    """
    newer = tuple(found.get("newer", ()))
    return State(stored(found), newer, bool(found.get("has_older")), bool(found.get("saved")))


def stored(found: Document) -> StoredToken:
    """The token of a document. Raises: as of :func:`state`."""
    try:
        values = [*_VALUES(found)]
    except KeyError:
        values = [found.get(name, ...) for name in _NAMES]
    damaged, long = _looked_over(tuple(map(type, values)))
    if damaged:
        raise CorruptStore(f"the field {damaged!r} of a stored token is damaged")
    for place in long:
        values[place] = int(values[place])
    values[_USE_IDS] = tuple(values[_USE_IDS])
    return StoredToken._make(values)


@lru_cache(256)  # there are few such tuples, and many tokens to be read
def _looked_over(types: tuple[type, ...]) -> tuple[str, list[int]]:
    """The first field that came back with another type than it was stored with, and the places of Int64."""
    for name, type_ in zip(StoredToken._fields, types, strict=True):
        if type_ not in _TYPES.get(name, (int, Int64)):
            return name, []
    return "", [place for place, type_ in enumerate(types) if type_ is Int64]


def condition(match: Match) -> Document:
    """The query of a match."""
    query: Document = dict(SHOWN)
    if match.id is not None:
        query["_id"] = {"$eq": match.id}
    if match.digests is not None:
        query["digest"] = {"$in": [bytes(digest) for digest in match.digests]}
    for name in ("content_type", "object_id", "slug", "context", "lease_id"):
        value = getattr(match, name)
        if value is not None:
            query[name] = {"$eq": value}
    if match.active:
        query["is_active"] = True
    lease_until: Document = {}
    if match.valid_at is not None:
        query |= {"is_active": True, "expires_at": {"$gte": match.valid_at}}
        lease_until["$lte"] = match.valid_at
    if match.leased_at is not None:
        lease_until["$gt"] = match.leased_at
    return query | ({"lease_until": lease_until} if lease_until else {})


def page(match: Match, after: tuple[int, str] | None) -> Document:
    """The query of a match, from after a token of :data:`NEWEST_FIRST`."""
    if after is None:
        return condition(match)
    created_at, id_ = after
    same_time = {"created_at": created_at, "_id": {"$lt": id_}}
    return {"$and": [condition(match), {"$or": [{"created_at": {"$lt": created_at}}, same_time]}]}


def page_index(match: Match) -> list[tuple[str, int]] | None:
    """The index by which a page is found, None for the server's choice.

    Left to itself, it goes by what served the last match of the same form: by the newest tokens of all, to
    find the only one of an object.
    """
    if match.id is not None:
        return [("_id", 1)]
    if match.digests is not None:
        return [("digest", 1)]
    if match.content_type is None or match.object_id is None:
        return None
    is_active = match.active or match.valid_at is not None  # the index holds no others
    return [(name, 1) for name in SLOT] if is_active else None


def pending(token: StoredToken) -> Document:
    """The document of a token that nobody sees yet."""
    until = token.created_at + PENDING_FOR
    return document(token, slot="", pending=True, is_active=False, ends_at=until)


def active(token: StoredToken) -> Document:
    """The query of the active tokens of a token's subject and slug."""
    names = ("content_type", "object_id", "slug")
    return {"is_active": True, **{name: {"$eq": getattr(token, name)} for name in names}}


def active_of(content_type: str, slug: str, object_ids: Sequence[str]) -> Document:
    """The query of the active tokens of several objects."""
    same = {"content_type": {"$eq": content_type}, "slug": {"$eq": slug}}
    return {"is_active": True, **same, "object_id": {"$in": object_ids}}


def active_of_any(subjects: Iterable[tuple[str, str, str]]) -> Document:
    """The query of the active tokens of any subject: content type, slug, object id."""
    groups: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for content_type, slug, object_id in subjects:
        groups[content_type, slug].append(object_id)
    return {"$or": [active_of(*group, object_ids) for group, object_ids in groups.items()]}


def valid(at: int) -> Document:
    """Of active tokens, those that are valid."""
    return {"expires_at": {"$gte": at}, "lease_until": {"$lte": at}}


def invalid(at: int) -> Document:
    """Of active tokens, those that are not valid."""
    return {"$or": [{"expires_at": {"$lt": at}}, {"lease_until": {"$gt": at}}]}


def usable(match: Match, use: Use, **more: object) -> Document:
    """The query of a match that this use was not counted for."""
    query = condition(match)
    if use.use_id:
        query["use_ids"] = {"$ne": use.use_id}
    return {"$and": [query, more]}


def update(change: Change) -> Document | list[Document]:
    """The update of a change."""
    match change:
        case Use(at, use_id):
            return _used(at, use_id)
        case Lease(lease_id, until):
            return {"$set": {"lease_id": lease_id, "lease_until": until}}
        case Release():
            return {"$set": {"lease_id": "", "lease_until": 0}}
        case SetExtraData(extra_data):
            return {"$set": {"extra_data": extra_data, "saved": True}}
        case ForgetKey():
            return {"$set": {"plain_key": "", "saved": True}}


def look_up(digests: Iterable[bytes]) -> Document:
    """The query of tokens by their digests."""
    return {**SHOWN, "digest": {"$in": [bytes(digest) for digest in digests]}}


def unused(ids: Sequence[str], at: int) -> Document:
    """The query of those tokens that are still valid and as they were when they were issued."""
    absent: Document = {name: {"$exists": False} for name in ("pending", "newer", "saved")}
    return {"_id": {"$in": ids}, "is_active": True, "uses": 0, **valid(at), **absent}


def first_use(use: Use, is_last: bool, claim: ObjectId) -> Document:
    """The update of a first use: what :func:`update` would do to a token of no uses yet."""
    use_ids = [use.use_id] if use.use_id else []
    counted: Document = {"uses": 1, "used_at": use.at, "use_ids": use_ids, "claim": claim}
    counted |= {"lease_id": "", "lease_until": 0}
    if not is_last:
        return {"$set": counted}
    return {"$set": counted | {"is_active": False}, "$min": {"ends_at": use.at - 1}}


def used_first(token: StoredToken, use: Use) -> StoredToken:
    """The token after :func:`first_use`."""
    used = token._replace(
        uses=1, used_at=use.at, use_ids=(use.use_id,) if use.use_id else (), lease_id="", lease_until=0
    )
    if token.max_uses > 1:
        return used
    return used._replace(is_active=False, ends_at=min(token.ends_at, use.at - 1))


def _used(at: int, use_id: str) -> list[Document]:
    goes_on = {"$lt": [{"$add": ["$uses", 1]}, "$max_uses"]}
    changed: Document = {
        "uses": {"$add": ["$uses", 1]},
        "used_at": at,
        "lease_id": "",
        "lease_until": 0,
        "is_active": {"$and": ["$is_active", goes_on]},
        "ends_at": {"$cond": [goes_on, "$ends_at", {"$min": ["$ends_at", at - 1]}]},
    }
    if use_id:
        changed["use_ids"] = {"$concatArrays": ["$use_ids", {"$literal": [use_id]}]}
    return [{"$set": changed}]


def ending(at: int) -> Document:
    """The update that deactivates."""
    return {"$set": {"is_active": False}, "$min": {"ends_at": at - 1}}


def overlapping(newer: str, keep_until: int) -> list[Document]:
    """The update of the older tokens that a newer one shall overlap: they leave its slot."""
    joined = {"$setUnion": [{"$ifNull": ["$newer", []]}, {"$literal": [newer]}]}
    earlier = {name: {"$min": [f"${name}", keep_until]} for name in ("expires_at", "ends_at")}
    return [{"$set": {"slot": "$_id", "newer": joined, **earlier}}]


def activation(is_active: bool, ends_at: int) -> Document:
    """The update that ends the pending state."""
    return {"$set": {"is_active": is_active, "ends_at": ends_at}, "$unset": {"pending": ""}}


def sealing(rival: str, at: int) -> list[Document]:
    """The update that makes a token inactive in favour of an older one, if it was neither used nor sealed."""
    unused = {"$eq": ["$uses", 0]}
    ends_at = {"$cond": [{"$and": ["$is_active", unused]}, {"$min": ["$ends_at", at - 1]}, "$ends_at"]}
    winner = {"$cond": [unused, {"$ifNull": ["$sealed_for", {"$literal": rival}]}, "$_id"]}
    inactive = {"$and": ["$is_active", {"$not": [unused]}]}
    return [{"$set": {"is_active": inactive, "ends_at": ends_at, "sealed_for": winner}}]


def overlap_of(used: State) -> Document:
    """The query of the active tokens that stand in one overlap with a used one and are not sealed."""
    token = used.token
    return active(token) | {"_id": {"$ne": token.id}, "newer": {"$in": [token.id, *used.newer]}}


def overlap_of_purged(found: Document) -> Document:
    """The query of the tokens that a used or sealed one, to be purged, has kept from being used."""
    query: Document = {name: {"$eq": found[name]} for name in ("content_type", "object_id", "slug")}
    return query | {"newer": found["_id"], "_id": {"$ne": found.get("sealed_for")}}


def counting(now: int) -> list[Document]:
    """The aggregation of counts by slug."""

    def number(*conditions: object) -> Document:
        return {"$sum": {"$cond": [{"$and": list(conditions)}, 1, 0]}}

    counts = {
        "total": {"$sum": 1},
        "active": number("$is_active", {"$gte": ["$expires_at", now]}),
        "expired": number("$is_active", {"$lt": ["$expires_at", now]}),
        "used": number({"$not": ["$is_active"]}, {"$gt": ["$uses", 0]}),
    }
    return [{"$match": SHOWN}, {"$group": {"_id": "$slug", **counts}}]


def slug_count(found: Document) -> SlugCount:
    """One row of :func:`counting`."""
    return SlugCount(found["_id"], *(int(found[name]) for name in ("total", "active", "expired", "used")))


def budget_id(budget: Budget) -> Document:
    """The ``_id`` of a budget; the server compares it field by field, in this order."""
    return {"_id": {"$eq": budget._asdict()}}


def spending(now: int, limit: int, window: int, max_window: int) -> list[Document]:
    """The update that takes one from a budget, step by step as the protocol says; it sets ``allowed``."""
    forgotten = {"$lte": [{"$add": ["$until", max_window]}, now]}
    over = {"$lte": ["$until", now]}
    more_strikes = {"$min": [{"$add": ["$strikes", 1]}, _MOST_STRIKES]}
    strikes = [
        {"case": forgotten, "then": 0},
        {"case": {"$or": [{"$eq": ["$spent", 0]}, {"$not": [over]}]}, "then": "$strikes"},
        {"case": {"$gte": ["$spent", limit]}, "then": more_strikes},
    ]
    allowed = {"$lt": ["$spent", limit]}
    longer = {"$min": [{"$multiply": [window, {"$pow": [2, "$strikes"]}]}, max_window]}
    return [
        {
            "$set": {
                "spent": {"$ifNull": ["$spent", 0]},
                "strikes": {"$ifNull": ["$strikes", 0]},
                "until": {"$ifNull": ["$until", now - max_window]},
            }
        },
        {
            "$set": {
                "strikes": {"$switch": {"branches": strikes, "default": 0}},
                "spent": {"$cond": [over, 0, "$spent"]},
            }
        },
        {
            "$set": {
                "allowed": allowed,
                "until": {"$cond": [{"$eq": ["$spent", 0]}, {"$add": [now, longer]}, "$until"]},
                "spent": {"$cond": [allowed, {"$add": ["$spent", 1]}, "$spent"]},
            }
        },
    ]
