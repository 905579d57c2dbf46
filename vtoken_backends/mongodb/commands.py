"""Operations that are one command: a token that is issued, used or held, with nothing unusual about it.

The query of a command says what is usual. What it does not match has changed nothing, and is left to
``writes``, which decides everything.
"""

from __future__ import annotations

from typing import Any, Final

from bson.int64 import Int64
from pymongo import ReturnDocument

from vtoken.backend import (
    STALE_HOLD,
    Hold,
    Inserted,
    InsertMode,
    InsertResult,
    Match,
    Outcome,
    Presented,
    State,
    Use,
)
from vtoken_backends.mongodb.collections import NAMES, PATIENCE, Collections, Document
from vtoken_backends.mongodb.documents import (
    LIGHT,
    MOST_CLAIMS,
    MOST_FORMER,
    MOST_RECEIPTS,
    RECEIPT,
    SHARED,
    Kept,
    names_of,
    new_id,
    object_of,
    receipt_of,
    receipt_time,
    shared_of,
    stored_of,
    token_document,
)
from vtoken_backends.mongodb.failures import Duplicate
from vtoken_backends.mongodb.lines import Insert, Present, may_be_elsewhere

_ACTIVE: Final = State.ACTIVE.value
_USES: Final = {"$ifNull": ["$token.uses", 0]}
_OPTIONS: Final[Document] = {
    "projection": LIGHT,
    "return_document": ReturnDocument.AFTER,
    "hint": NAMES,
}


# Issue --------------------------------------------------------------------------------------------


async def issue(client: Collections, op: Insert) -> Inserted | None:
    """Insert a token into its line, if nobody stands beside the line, its tombstones have room and stay where
    they are, and no key is taken over or may be stored elsewhere. None: nothing was changed."""
    if op.mode is InsertMode.ADD or may_be_elsewhere(op) or op.also_taken:
        return None
    if op.keep_until > op.token.created_at:
        return None

    async def find_and_update() -> Document:
        query, update = _usual_line(op), _issuing(op)
        write = client.tokens.find_one_and_update(query, update, upsert=True, **_OPTIONS, **PATIENCE)
        return dict(await client.patiently(write))

    try:
        found = await client.run(find_and_update)
    except Duplicate:  # the line is not a usual one, a key is taken, or somebody else has just made the line
        return None
    kept = stored_of(found, is_whole=False).kept
    if kept is None:
        return None
    if kept.token.id != op.token.id:
        return Inserted(InsertResult.HAS_VALID, kept.token)
    return Inserted(InsertResult.INSERTED, kept.token)


def _usual_line(op: Insert) -> Document:
    return {
        "names": op.line,
        "beside": {"$exists": False},
        f"former.{MOST_FORMER - 1}": {"$exists": False},
        "spill_id": {"$exists": False},
        "$nor": [{"names": {"$in": names_of([op.token])}}],
    }


def _issuing(op: Insert) -> list[Document]:
    token = op.token
    new: Document = {
        "_id": {"$ifNull": ["$_id", new_id()]},
        "line": op.line,
        "object": object_of(token.content_type, token.object_id),
        **{name: {"$literal": value} for name, value in shared_of(token).items()},
        "token": {"$literal": token_document(Kept(token))},
        "former": {
            "$cond": [
                _exists("$token"),
                {"$concatArrays": [{"$ifNull": ["$former", []]}, [_replaced(token.created_at)]]},
                {"$ifNull": ["$former", []]},
            ]
        },
        "names": {
            "$concatArrays": [
                {"$cond": [_exists("$token"), "$names", [op.line]]},
                {"$literal": names_of([token])},
            ]
        },
        "revision": {"$add": [{"$ifNull": ["$revision", -1]}, 1]},
        "claims": _claims(),
        "due": {
            "$min": [
                Int64(token.ends_at),
                "$due",
                {"$cond": [_exists("$token"), _replaced_end(token.created_at), None]},
            ]
        },
    }
    issued: Document = {"$mergeObjects": ["$$ROOT", new]}
    if op.mode is not InsertMode.IF_NONE_VALID:
        return [{"$replaceWith": issued}]
    return [{"$replaceWith": {"$cond": [_satisfies(op.wanted_until), "$$ROOT", issued]}}]


def _claims() -> Document:
    return {"$slice": [{"$concatArrays": [{"$ifNull": ["$claims", []]}, [new_id()]]}, -MOST_CLAIMS]}


def _exists(path: str) -> Document:
    return {"$ne": [{"$type": path}, "missing"]}


def _replaced_end(at: int) -> Document:
    is_active = {"$eq": ["$token.state", _ACTIVE]}
    return {"$cond": [is_active, {"$min": ["$token.ends_at", Int64(at - 1)]}, "$token.ends_at"]}


def _replaced(at: int) -> Document:
    """The current token after a newer one took its place."""
    is_active = {"$eq": ["$token.state", _ACTIVE]}
    state = {"$cond": [is_active, State.REPLACED.value, "$token.state"]}
    return {"$mergeObjects": ["$token", {"state": state, "ends_at": _replaced_end(at)}]}


def _satisfies(wanted_until: int) -> Document:
    """Whether the current token is in the way of an ``IF_NONE_VALID``."""
    is_over = {"$lt": ["$$this.expires_at", Int64(wanted_until)]}
    own_and_over = {"$and": [{"$eq": ["$$this.origin", "$token.id"]}, is_over]}
    over = {"$filter": {"input": {"$ifNull": ["$token.keys", []]}, "cond": own_and_over}}
    return {
        "$and": [
            {"$eq": ["$token.state", _ACTIVE]},
            {"$gte": ["$token.expires_at", Int64(wanted_until)]},
            {"$eq": [{"$size": over}, 0]},
        ]
    }


# Use and hold -------------------------------------------------------------------------------------


async def use(client: Collections, op: Present) -> Presented | None:
    """Use or hold the current token of a document by one of its keys, if it can be used and the use was not
    counted before. None: nothing was changed."""
    change = op.change
    if change is None:
        return None

    async def find_and_update() -> Document | None:
        query, update = _usable(op), _using(op, change)
        write = client.tokens.find_one_and_update(query, update, **_OPTIONS, **PATIENCE)
        found = await client.patiently(write)
        return None if found is None else dict(found)

    found = await client.run(find_and_update)
    kept = None if found is None else stored_of(found, is_whole=False).kept
    return None if kept is None else Presented(Outcome.RIGHT, kept.token)


def _digests(match: Match) -> list[bytes]:
    return [bytes(digest) for digest in match.digests or ()]


def _usable(op: Present) -> Document:
    match, now = op.key, Int64(op.now)
    key: Document = {"digest": {"$in": _digests(match)}, "expires_at": {"$gte": now}}
    if match.kind is not None:  # what is left out of a document is a link
        key |= {"$or": [{"kind": {"$exists": False}}, {"kind": "link"}]} if match.kind == "link" else {}
        key |= {"kind": {"$eq": match.kind}} if match.kind != "link" else {}
    query: Document = {
        "names": {"$in": _digests(match)},
        "token.keys": {"$elemMatch": key},
        "token.state": _ACTIVE,
        "token.expires_at": {"$gte": now},
    }
    for name in SHARED:
        value = getattr(match, name)
        if value is not None:
            query[name] = {"$eq": value}
    if match.id is not None:
        query["token.id"] = {"$eq": match.id}
    used_or_held = {"$add": [_USES, {"$size": _running(op.now)}]}
    has_free_use = {"$or": [{"$eq": ["$token.max_uses", None]}, {"$lt": [used_or_held, "$token.max_uses"]}]}
    conditions: list[Document] = [has_free_use]
    if op.use_id:  # a key that was taken over may have been used with this id before, and the use may be held
        taken_over = {"$filter": {"input": "$token.keys", "cond": {"$ne": ["$$this.origin", "$token.id"]}}}
        receipts = {"$ifNull": ["$token.receipts", ""]}
        conditions.append({"$eq": [{"$size": taken_over}, 0]})
        conditions.append({"$eq": [{"$indexOfBytes": [receipts, receipt_of(op.use_id)]}, -1]})
        holds: Document = {"$ifNull": ["$token.holds.use_id", []]}
        conditions.append({"$not": {"$in": [{"$literal": op.use_id}, holds]}})
    return query | {"$expr": {"$and": conditions}}


def _running(now: int) -> Document:
    """The holds that count at a time."""
    runs = [{"$gt": ["$$this.until", Int64(now)]}, {"$lte": ["$$this.until", Int64(now + STALE_HOLD)]}]
    return {"$filter": {"input": {"$ifNull": ["$token.holds", []]}, "cond": {"$and": runs}}}


def _using(op: Present, change: Use | Hold) -> list[Document]:
    update: Document = {"revision": {"$add": ["$revision", 1]}, "claims": _claims()}
    if isinstance(change, Hold):
        hold = {
            "hold_id": {"$literal": change.hold_id},
            "until": Int64(change.until),
            "origin": _origin(op),
        }
        if change.use_id:  # what is left out of a document is ""
            hold["use_id"] = {"$literal": change.use_id}
        return [{"$set": update | {"token.holds": {"$concatArrays": [_running(op.now), [hold]]}}}]
    uses = {"$add": [_USES, 1]}
    is_bounded = {"$ne": ["$token.max_uses", None]}
    is_last = {"$and": [is_bounded, {"$gte": [uses, "$token.max_uses"]}]}
    update |= {
        "token.uses": uses,
        "token.used_at": Int64(change.at),
        "token.state": {"$cond": [is_last, State.USED.value, _ACTIVE]},
        "token.ends_at": {
            "$cond": [is_last, {"$min": ["$token.ends_at", Int64(change.at - 1)]}, "$token.ends_at"]
        },
        "due": {"$cond": [is_last, {"$min": ["$due", Int64(change.at - 1)]}, "$due"]},
    }
    if change.use_id:
        update["token.receipts"] = _with_receipt(op, change)
    return [{"$set": update}]


def _origin(op: Present) -> Document:
    """The token that the presented key was issued with."""
    is_presented: list[Document] = [{"$in": ["$$this.digest", {"$literal": _digests(op.key)}]}]
    if op.key.kind is not None:
        kind = {"$ifNull": ["$$this.kind", "link"]}
        is_presented.append({"$eq": [kind, {"$literal": op.key.kind}]})
    keys = {"$filter": {"input": "$token.keys", "cond": {"$and": is_presented}}}
    origins: Any = {"$map": {"input": keys, "in": "$$this.origin"}}
    return {"$arrayElemAt": [origins, 0]}


def _with_receipt(op: Present, change: Use) -> Document:
    receipts = {"$ifNull": ["$token.receipts", ""]}
    is_full = {"$gte": [{"$strLenBytes": receipts}, RECEIPT * MOST_RECEIPTS]}
    rest = {"$substrBytes": [receipts, RECEIPT, RECEIPT * MOST_RECEIPTS]}
    new = [receipt_of(change.use_id), _origin(op), receipt_time(change.at)]
    return {"$concat": [{"$cond": [is_full, rest, receipts]}, *new]}
