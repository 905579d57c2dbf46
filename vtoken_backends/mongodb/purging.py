"""Removal: of tokens that have ended, and of everything about an object."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Final

from bson.int64 import Int64

from vtoken.backend import StoredToken, running_holds
from vtoken_backends.mongodb.collections import Collections, Document
from vtoken_backends.mongodb.documents import Stored, object_of
from vtoken_backends.mongodb.lines import Documents
from vtoken_backends.mongodb.patience import Patience
from vtoken_backends.mongodb.writes import Writes

_PAGE: Final = 200


class Removals:
    """What is deleted from a store."""

    def __init__(self, client: Collections, writes: Writes) -> None:
        self._client = client
        self._writes = writes

    async def purge(self, before: int, now: int, limit: int) -> int:
        """Delete at most so many tokens that have ended, the longest ended first."""
        deleted = 0
        passed: tuple[int, bytes] | None = None
        pause = Patience()
        while deleted < limit:
            found = await self._due(before, min(limit - deleted, _PAGE), passed)
            if not found:
                break
            if await self._spilled(found):
                continue
            over = sorted(_over(found, before, now), key=lambda token: token.ends_at)[: limit - deleted]
            if not over:  # all of them are held
                passed = _due(found[-1]), found[-1].oid
                continue
            count, is_lost = await self._delete(found, {token.id for token in over})
            deleted += count
            if is_lost:
                await pause()
        return deleted

    async def _due(self, before: int, limit: int, passed: tuple[int, bytes] | None) -> list[Stored]:
        """The documents whose tokens are the first to have ended."""
        query: Document = {"due": {"$lt": Int64(before)}}
        if passed is not None:
            due, oid = passed
            query = {"$and": [query, {"$or": [{"due": {"$gt": due}}, {"due": due, "_id": {"$gt": oid}}]}]}
        return await self._writes.whole(query, limit, sort={"due": 1, "_id": 1}, hint={"due": 1, "_id": 1})

    async def _spilled(self, found: Sequence[Stored]) -> bool:
        """Finish moving tombstones before they are deleted; whether there were any."""
        spilling = [stored for stored in found if stored.spill]
        for stored in spilling:
            await self._writes.spill(stored)
        return bool(spilling)

    async def _delete(self, found: Sequence[Stored], ids: set[str]) -> tuple[int, bool]:
        """Delete tokens of documents; how many, and whether others were quicker to change a document."""
        alone: defaultdict[int | None, list[bytes]] = defaultdict(list)
        documents = Documents(is_whole=True)
        counts: dict[bytes, int] = {}
        wanted = deleted = 0
        for stored in found:
            tokens = stored.tokens()
            gone = sum(kept.token.id in ids for kept in tokens)
            wanted += gone
            if gone and (gone < len(tokens) or stored.beside):
                documents.add(stored)
                counts[stored.oid] = gone
                _drop(stored, ids)
            elif gone == 1:
                alone[stored.revision].append(stored.oid)
            elif gone:
                deleted += gone * await self._delete_alike(stored.revision, [stored.oid])
        for revision, oids in alone.items():
            deleted += await self._delete_alike(revision, oids)
        written = await self._writes.write(documents)
        written.raise_problem()
        deleted += sum(count for oid, count in counts.items() if oid not in written.lost)
        await self._forget_lines(found)
        return deleted, deleted < wanted

    async def _delete_alike(self, revision: int | None, oids: Sequence[bytes]) -> int:
        """Delete whole documents that have not been changed; how many."""

        async def delete() -> int:
            query: Document = {"_id": {"$in": list(oids)}, "revision": revision}
            return int((await self._client.tokens.delete_many(query)).deleted_count)

        return await self._client.run(delete)

    async def _forget_lines(self, found: Sequence[Stored]) -> None:
        """Delete lines without tokens, once nothing stands beside them any more."""
        lines = {
            stored.beside_line if stored.line is None else stored.line
            for stored in found
            if stored.beside_line is not None or stored.beside
        }
        for line in lines:
            stored = next(iter(await self._writes.named([line], is_whole=True)), None)
            if stored is None or stored.tokens():
                continue
            query: Document = {"object": object_of(stored.shared["content_type"], stored.shared["object_id"])}
            if await self._writes.whole(query | {"beside_line": line}, 1):
                continue
            # By its revision, which each addition beside the line changes before and after it.
            await self._delete_alike(stored.revision, [stored.oid])

    async def erase(self, content_type: str, object_id: str) -> int:
        """Delete all tokens of an object, page by page."""
        count = 0
        while True:
            found = await self._writes.whole({"object": object_of(content_type, object_id)}, _PAGE)
            if not found:
                return count
            count += len({kept.token.id for stored in found for kept in stored.tokens()})
            these: Document = {"_id": {"$in": [stored.oid for stored in found]}}
            await self._client.run(partial(self._client.tokens.delete_many, these))


def _drop(stored: Stored, ids: set[str]) -> None:
    """Take tokens out of a document."""
    stored.edits += 1
    if stored.kept is not None and stored.kept.token.id in ids:
        stored.kept = None
    stored.former = [kept for kept in stored.former or () if kept.token.id not in ids]


def _over(found: Sequence[Stored], before: int, now: int) -> list[StoredToken]:
    return [
        kept.token
        for stored in found
        for kept in stored.tokens()
        if kept.token.ends_at < before and not running_holds(kept.token, now)
    ]


def _due(stored: Stored) -> int:
    return min(kept.token.ends_at for kept in stored.tokens())
