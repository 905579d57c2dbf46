"""How the MongoDB backend issues tokens: one by one, and many by a few commands."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NamedTuple

from pymongo import ReplaceOne, UpdateMany

import vtoken_backends._mongodb_documents as documents
from vtoken.backend import InsertMode, InsertResult, StoredToken
from vtoken.errors import BackendError, OutcomeUnknown
from vtoken_backends._mongodb_documents import Document
from vtoken_backends._mongodb_lanes import each
from vtoken_backends._mongodb_link import Duplicate, Link, after_a_write

ATTEMPTS: Final = 1000
"""How often a lost race is run again; each time another one has won."""

_Subject = tuple[str, str, str]
_Answers = dict[int, InsertResult | BaseException]


class Put(NamedTuple):
    """A token to be inserted. Arguments: as of the protocol."""

    token: StoredToken
    mode: InsertMode
    keep_until: int

    def subject(self) -> _Subject:
        return self.token.content_type, self.token.slug, self.token.object_id

    def overlaps(self) -> bool:
        return self.mode is InsertMode.REPLACE and self.keep_until > self.token.created_at

    def pushes_out(self) -> bool:
        """Whether it ends whatever is there."""
        return self.mode is InsertMode.REPLACE and not self.overlaps()

    def direct(self) -> Document:
        """Its document where it pushes nobody out."""
        return documents.document(self.token, slot=self.token.id if self.mode is InsertMode.ADD else "")


class Inserts:
    """Inserts of tokens.

    Args:
        link: to the server.
    """

    def __init__(self, link: Link) -> None:
        self._link = link

    async def insert(self, put: Put) -> InsertResult:
        """Insert one token."""
        only_if_none = put.mode is InsertMode.IF_NONE_VALID
        if put.mode is InsertMode.ADD or not await self._has_active(put.token):
            # Nobody is to be pushed out; should one come in between, the unique index says so.
            refused = await self._refused(lambda: self._link.tokens.insert_one(put.direct()))
            if refused is None:
                return InsertResult.INSERTED
            if not refused.in_slot:
                return InsertResult.KEY_TAKEN
        if only_if_none and await self._has_valid(put.token):
            return InsertResult.HAS_VALID
        # Not durable by itself: the next write is, and brings it back should a fail-over have lost it.
        if await self._refused(lambda: self._link.relaxed.insert_one(documents.pending(put.token))):
            return InsertResult.KEY_TAKEN
        return await self._activate(put)

    async def _has_active(self, token: StoredToken) -> bool:
        return bool(
            await self._link.run(
                lambda: self._link.find_all(documents.active(token), 1, {"_id": 1}), writes=False
            )
        )

    async def _has_valid(self, token: StoredToken) -> bool:
        # An update that changes nothing: its write concern waits until what it found is durable.
        query = documents.active(token) | documents.valid(token.created_at)
        found = await self._link.run(
            lambda: self._link.tokens.update_one(query, {"$max": {"uses": 0}}), writes=False
        )
        return bool(found.matched_count)

    async def _activate(self, put: Put) -> InsertResult:
        """End the older tokens, and give the slot to a pending one."""
        token, only_if_none = put.token, put.mode is InsertMode.IF_NONE_VALID
        old = documents.active(token)
        change: Any = documents.ending(token.created_at)
        if put.overlaps():
            change = documents.overlapping(token.id, put.keep_until)
        if only_if_none:
            old |= documents.invalid(token.created_at)
        mine = {"_id": token.id, "pending": True}

        def steps() -> list[Any]:
            whole = documents.document(token, slot="", has_older=put.overlaps())
            return [UpdateMany(old, change), ReplaceOne(mine, whole, upsert=True)]

        for attempt in range(ATTEMPTS):
            activation = self._refused(lambda: self._link.tokens.bulk_write(steps()))
            refused = await (after_a_write(activation) if attempt else activation)
            if refused is None:
                return InsertResult.INSERTED
            if not refused.in_slot:  # lost by a fail-over, and then somebody else took the key
                return InsertResult.KEY_TAKEN
            if only_if_none and await after_a_write(self._has_valid(token)):
                await self._link.run(lambda: self._link.tokens.delete_one(mine))
                return InsertResult.HAS_VALID
            await back_off(attempt)
        raise OutcomeUnknown("MongoDB: others took the slot again and again")

    async def _refused(self, write: Callable[[], Awaitable[object]]) -> Duplicate | None:
        """Write, and say which unique index refused it."""
        try:
            await self._link.run(write)
        except Duplicate as duplicate:
            return duplicate
        return None

    async def insert_many(self, puts: Sequence[Put]) -> Sequence[InsertResult | BaseException]:
        """Insert many tokens: one look at who has active ones, then one command for all documents.

        Where nobody is to be pushed out, that was all. The others of ``REPLACE`` are pending then, and one
        more command ends the older ones and activates them. Whatever is not as simple goes alone.
        """
        taken = await self._subjects_with_active(puts)
        crowded = Counter(put.subject() for put in puts if put.mode is not InsertMode.ADD)
        direct: list[int] = []
        pending: list[int] = []
        alone: list[int] = []
        for number, put in enumerate(puts):
            subject = put.subject()
            if put.mode is InsertMode.ADD or (subject not in taken and crowded[subject] == 1):
                direct.append(number)
            elif put.pushes_out():
                pending.append(number)
            else:
                alone.append(number)
        answers: _Answers = {}
        refused = await self._insert_documents([puts[n] for n in direct], [puts[n] for n in pending])
        for place, number in enumerate([*direct, *pending]):
            error = refused.get(place)
            if not isinstance(error, Duplicate):
                answers[number] = error or InsertResult.INSERTED
            elif error.in_slot:
                alone.append(number)
            else:
                answers[number] = InsertResult.KEY_TAKEN
        stored = {n: puts[n] for n in pending if answers[n] is InsertResult.INSERTED}
        answers |= await self._activate_many(stored)
        answers |= zip(alone, await each(self.insert(puts[n]) for n in alone), strict=True)
        return [answers[number] for number in range(len(puts))]

    async def _subjects_with_active(self, puts: Sequence[Put]) -> set[_Subject]:
        subjects = {put.subject() for put in puts if put.mode is not InsertMode.ADD}
        query, names = documents.active_of_any(subjects), ("content_type", "slug", "object_id")

        async def find() -> set[_Subject]:
            cursor = self._link.tokens.find(query, {"_id": 0, **dict.fromkeys(names, 1)})
            found = await cursor.batch_size(2 * len(puts)).to_list(None)
            return {(f["content_type"], f["slug"], f["object_id"]) for f in found}

        return await self._link.run(find, writes=False) if subjects else set()

    async def _insert_documents(
        self, direct: Sequence[Put], pending: Sequence[Put]
    ) -> dict[int, BackendError]:
        """Insert them all, and return the refusals by their places."""
        if not direct and not pending:
            return {}

        async def insert() -> None:
            both = [put.direct() for put in direct] + [documents.pending(put.token) for put in pending]
            await self._link.tokens.insert_many(both, ordered=False)

        return await self._link.write_each(insert)

    async def _activate_many(self, stored: dict[int, Put]) -> _Answers:
        """End the older tokens of pending ones, and activate these; of one subject, only the newest."""
        if not stored:
            return {}
        newest = {put.subject(): number for number, put in sorted(stored.items(), key=_age)}
        outdone = {n: newest[put.subject()] for n, put in stored.items() if newest[put.subject()] != n}
        steps = _ends([(stored[n].token, stored[winner].token.created_at) for n, winner in outdone.items()])
        steps += _activations([stored[n].token for n in newest.values()])
        ids = [put.token.id for put in stored.values()]
        try:
            refused = await self._link.write_each(lambda: self._link.tokens.bulk_write(steps))
            left = await self._pending(ids) if refused else set()
        except BackendError:
            return {number: _unknown() for number in stored}
        lone = [n for n, put in stored.items() if put.token.id in left]
        answers: _Answers = dict.fromkeys(stored, InsertResult.INSERTED)
        answers |= zip(lone, await each(self._activate(stored[n]) for n in lone), strict=True)
        for number, winner in outdone.items():
            if answers[winner] is not InsertResult.INSERTED:  # then nobody has ended the older ones for it
                answers[number] = _unknown()
        return answers

    async def _pending(self, ids: Sequence[str]) -> set[str]:
        query = {"_id": {"$in": ids}, "pending": True}
        found = await self._link.run(lambda: self._link.find_all(query, len(ids), {"_id": 1}), writes=False)
        return {document["_id"] for document in found}


def _age(numbered: tuple[int, Put]) -> tuple[int, str]:
    token = numbered[1].token
    return token.created_at, token.id


def _ends(tokens: Sequence[tuple[StoredToken, int]]) -> list[UpdateMany]:
    """Pending tokens become inactive, as by the end of each at its time."""
    groups: defaultdict[int, list[str]] = defaultdict(list)
    for token, at in tokens:
        groups[min(token.ends_at, at - 1)].append(token.id)
    return [
        UpdateMany({"_id": {"$in": ids}, "pending": True}, documents.activation(False, ends_at))
        for ends_at, ids in groups.items()
    ]


def _activations(tokens: Sequence[StoredToken]) -> list[UpdateMany]:
    """For all that are alike, one step that ends the older tokens, and one that activates the pending ones.

    Those of one millisecond mostly are alike: few steps, and between the two of them little time.
    """
    groups: defaultdict[tuple[str, str, int, bool, int], list[StoredToken]] = defaultdict(list)
    for token in tokens:
        kind = token.content_type, token.slug, token.created_at, token.is_active, token.ends_at
        groups[kind].append(token)
    steps: list[UpdateMany] = []
    for (content_type, slug, at, is_active, ends_at), alike in groups.items():
        old = documents.active_of(content_type, slug, [token.object_id for token in alike])
        mine = {"_id": {"$in": [token.id for token in alike]}, "pending": True}
        steps += [
            UpdateMany(old, documents.ending(at)),
            UpdateMany(mine, documents.activation(is_active, ends_at)),
        ]
    return steps


def _unknown() -> OutcomeUnknown:
    return OutcomeUnknown("MongoDB: the write may or may not have happened")


async def back_off(attempt: int) -> None:
    """Wait a little after a lost race: at random, and longer each time."""
    await asyncio.sleep(random.uniform(0, min(0.05, 0.001 * 2 ** min(attempt, 6))))  # noqa: S311  # no secret
