"""Moves of tombstones that a line has no room for into a document of their own.

One write cannot change two documents, and a name cannot be in two: ``names`` has a unique index. So a move is
several writes, after each of which the tombstones are found:

1. The line names them under ``moved`` instead of ``names``, and from then on they are not changed there.
   It gives the document to come its ``_id``. (This is the write of an ``insert``: see ``lines``.)
2. The document is inserted. It names them under both for good.
3. If the line is still there and still has the tombstones, the document is marked as wanted: its revision
   grows. Otherwise somebody has finished the move, and removed tombstones since: the document is deleted
   again, if nobody has marked it.
4. The line drops them.

Whoever comes upon such a line goes on where the move has stopped; every step may be repeated. A line is not
added to, and not deleted by a purge, before the move is finished. While the names are not in the index,
nothing keeps another line from taking one of them. Who inserts a key that may be in another line therefore
looks for it first (see ``lines.may_be_elsewhere``). A code that was drawn again meanwhile is the newer
token's.
"""

from __future__ import annotations

from typing import Final

from vtoken.backend import without_keys
from vtoken_backends.mongodb.collections import Collections, Document
from vtoken_backends.mongodb.documents import (
    MOST_CLAIMS,
    Kept,
    Stored,
    id_name,
    names_of,
    new_id,
    whole,
)
from vtoken_backends.mongodb.failures import Duplicate
from vtoken_backends.mongodb.patience import Patience

_PAGE: Final = 1_000


async def finish_move(client: Collections, line: Stored) -> None:
    """Go on with the move of a line's tombstones, to its end."""
    oid = line.spill_id
    if oid is None:
        return
    query: Document = {"_id": line.oid, "spill_id": oid}

    async def is_wanted() -> bool:
        return bool(await client.find_all(query, 1, {"_id": 1}))

    async def mark() -> None:
        grow: Document = {"$inc": {"revision": 1}, "$push": {"claims": new_id()}}
        await client.tokens.update_one({"_id": oid, "revision": 0}, grow)

    async def drop() -> None:
        await client.tokens.update_one(query, _dropping(line))

    async def take_back() -> None:
        await client.tokens.delete_one({"_id": oid, "revision": 0})

    is_made = await _make(client, line, oid)
    if await client.run(is_wanted, writes=False):
        await client.run(mark)
        await client.run(drop)
    elif is_made:
        await client.run(take_back)


async def _make(client: Collections, line: Stored, oid: bytes) -> bool:
    """Insert the document, and say whether it was not there."""
    pause = Patience()
    while True:
        taken: set[object] = set()

        async def look(taken: set[object] = taken) -> bool:
            names = names_of([kept.token for kept in line.spill])
            query: Document = {"$or": [{"_id": oid}, {"names": {"$in": names}}]}
            found = await client.find_all(query, _PAGE, {"names": 1})
            taken.update(name for one in found for name in one["names"])
            return any(one["_id"] == oid for one in found)

        if await client.run(look, writes=False):
            return False
        left = _left(line, taken)
        if not left:
            return False
        document = whole(Stored(shared=line.shared, former=left, oid=oid), new_id())

        async def insert(document: Document = document) -> None:
            await client.tokens.insert_one(document)

        try:
            await client.run(insert)
        except Duplicate:  # somebody has inserted it, or taken one of its names, since we looked
            await pause()
        else:
            return True


def _left(line: Stored, taken: set[object]) -> list[Kept]:
    """The tombstones without what is another's by now: a code that was drawn again, a copied token."""
    return [_without(kept, taken) for kept in line.spill if id_name(kept.token.id) not in taken]


def _without(kept: Kept, taken: set[object]) -> Kept:
    lost = [key.digest for key in kept.token.keys if key.digest in taken]
    return kept._replace(token=without_keys(kept.token, lost)) if lost else kept


def _dropping(line: Stored) -> list[Document]:
    """The update of a line whose tombstones have a document of their own. What is due is what is left."""
    names: Document = {"$literal": names_of([kept.token for kept in line.spill])}
    others = {"$setDifference": ["$moved", names]}
    ends = {"$min": ["$token.ends_at", {"$min": "$former.ends_at"}]}
    claims = {"$concatArrays": [{"$ifNull": ["$claims", []]}, [new_id()]]}
    return [
        {
            "$set": {
                "due": {"$ifNull": [ends, "$due"]},
                "revision": {"$add": ["$revision", 1]},
                "claims": {"$slice": [claims, -MOST_CLAIMS]},
                "moved": {"$cond": [{"$eq": [others, []]}, "$$REMOVE", others]},
            }
        },
        {"$unset": ["spill", "spill_id"]},
    ]
