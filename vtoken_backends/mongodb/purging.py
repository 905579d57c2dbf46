"""Removal: of tokens that have ended, and of everything about an object."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Final

from bson.int64 import Int64

from vtoken.backend import StoredToken, running_holds
from vtoken_backends.mongodb.collections import Collections, Document
from vtoken_backends.mongodb.documents import Stored, due_of, object_of
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
            if await self._tidied(found, before):
                continue
            over = sorted(_over(found, before, now), key=lambda token: token.ends_at)[: limit - deleted]
            if not over:  # all of them are held
                passed = found[-1].due, found[-1].oid
                continue
            count, is_lost = await self._delete(found, {token.id for token in over}, before)
            deleted += count
            if count:
                pause = Patience()
            if is_lost:
                await pause()
        return deleted

    async def _due(self, before: int, limit: int, passed: tuple[int, bytes] | None) -> list[Stored]:
        """The documents that are to be looked at first."""
        query: Document = {"due": {"$lt": Int64(before)}}
        if passed is not None:
            due, oid = passed
            query = {"$and": [query, {"$or": [{"due": {"$gt": due}}, {"due": due, "_id": {"$gt": oid}}]}]}
        return await self._writes.whole(query, limit, sort={"due": 1, "_id": 1}, hint={"due": 1, "_id": 1})

    async def _tidied(self, found: Sequence[Stored], before: int) -> bool:
        """Deal with what is in the way of going by ``due``; whether there was any such thing.

        What is on its way has to arrive before it is deleted. A document may be due by tokens that
        have left it: each purge would read it, and take its others for those that ended first.
        """
        is_tidied = await self._has_finished_replacements(found)
        stale: list[Stored] = []
        for stored in found:
            if stored.spill:
                await self._writes.spill(stored)
                is_tidied = True
            elif not stored.tokens():
                is_tidied = await self._look_at_empty(stored, before) or is_tidied
            elif stored.due < due_of(stored):
                stale.append(stored)
        await self._rewrite(stale)
        return is_tidied or bool(stale)

    async def _has_finished_replacements(self, found: Sequence[Stored]) -> bool:
        """Finish replacements of what stands beside lines; whether there were any.

        They ask the document of a token whether it has given its keys away, or was used with them before.
        """
        lines = list({stored.beside_line for stored in found if stored.beside_line is not None})
        read = await self._writes.named(lines, is_whole=True) if lines else []
        begun = [stored for stored in read if stored.pending is not None]
        for stored in begun:
            await self._writes.finish(stored)
        return bool(begun)

    async def _look_at_empty(self, stored: Stored, before: int) -> bool:
        """Delete a document without tokens, or let it be due later; whether it was to be changed.

        It is a line beside which something stands, or is about to: its addition may have been cut short. One
        that would have ended by now is not waited for.
        """
        if stored.pending is not None:
            await self._writes.finish(stored)
            return True
        stored.adding = {oid: end for oid, end in stored.adding.items() if end >= before}
        ends = [*stored.adding.values(), *(other.due for other in await self._one_beside(stored))]
        if not ends:
            # By its revision, which each addition beside the line changes before and after it.
            await self._delete_alike(stored.revision, [stored.oid])
        elif max(ends) > stored.due:
            stored.due = max(ends)
            await self._rewrite([stored])
        else:
            return False  # that is held
        return True

    async def _one_beside(self, stored: Stored) -> list[Stored]:
        """One of the documents that stand beside a line, if there are any."""
        if stored.line is None:
            return []
        query: Document = {"object": object_of(stored.shared["content_type"], stored.shared["object_id"])}
        return await self._writes.whole(query | {"beside_line": stored.line}, 1)

    async def _rewrite(self, stale: Sequence[Stored]) -> None:
        """Write when documents are due, unless somebody has changed them meanwhile."""
        documents = Documents(is_whole=True)
        for stored in stale:
            stored.edits += 1
            documents.add(stored)
        (await self._writes.write(documents)).raise_problem()

    async def _delete(self, found: Sequence[Stored], ids: set[str], before: int) -> tuple[int, bool]:
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
        await self._look_at_lines(found, before)
        return deleted, deleted < wanted

    async def _delete_alike(self, revision: int | None, oids: Sequence[bytes]) -> int:
        """Delete whole documents that have not been changed; how many."""

        async def delete() -> int:
            query: Document = {"_id": {"$in": list(oids)}, "revision": revision}
            return int((await self._client.tokens.delete_many(query)).deleted_count)

        return await self._client.run(delete)

    async def _look_at_lines(self, found: Sequence[Stored], before: int) -> None:
        """Look at lines beside which nothing may stand any more, if they have no tokens either."""
        lines = {
            stored.beside_line if stored.line is None else stored.line
            for stored in found
            if stored.beside_line is not None or stored.beside
        }
        for stored in await self._writes.named(list(lines), is_whole=True) if lines else ():
            if not stored.tokens():
                await self._look_at_empty(stored, before)

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
