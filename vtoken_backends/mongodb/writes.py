"""Operations on documents, alone and in batches: read, decide in Python, compare and set.

1. The documents that a batch needs are read by one command, without their tombstones.
2. Each operation is decided on them in turn (see ``lines``), as if it were alone.
3. What was changed is written by one bulk write. Every write is a compare-and-set on ``revision``.
4. What others were quicker to change, what the unique index refused, and what takes whole documents to decide
   is decided again on whole documents, until nothing is left.

A bulk write says how many documents it has changed, not which. So every write leaves the number of its flush
in ``claims``, where it is found by the revision that it has made. That tells what is done, even where a reply
was lost: the bulk write is sent once more then, and changes nothing that it had changed before.

``ADD`` counts in the line that something stands beside it, before its document is inserted and once more
afterwards. So a ``REPLACE`` that did not see the document came first: if it read the line before the second
count, its own write comes to nothing and is decided again; otherwise ``ADD`` has not returned yet. In between
the line names the document under ``adding``, and so is not purged before the document could be.

``REPLACE`` needs several writes where tokens stand beside the line: the new token is *pending* in the line,
under the digests of its keys; what stands beside the line ends; the new token becomes the line's own. Whoever
comes upon such a line goes on where the replacement has stopped, before deciding anything about the line.
Keys that one of the others hands over are named in the line under ``moved`` all the while, so that whoever
presents one finds the line.

Tombstones that a line has no room for move into a document of their own (see ``moves``).
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

from bson.int64 import Int64
from pymongo import UpdateOne

from vtoken.backend import (
    Inserted,
    InsertMode,
    InsertResult,
    Match,
    Outcome,
    Presented,
    StoredToken,
    ended,
    ends_other_context,
    key_ended,
    key_of,
    matches,
)
from vtoken.errors import BackendClosed, BackendError, BackendUnavailable, OutcomeUnknown
from vtoken_backends.mongodb.client import after_a_write
from vtoken_backends.mongodb.collections import NAMES, Bulk, Collections, Document
from vtoken_backends.mongodb.documents import (
    LIGHT,
    MOST_CLAIMS,
    MOST_FORMER,
    Kept,
    Stored,
    condition,
    due_of,
    id_name,
    names_of,
    new_id,
    object_of,
    reserved_names,
    stored_of,
    token_document,
    whole,
)
from vtoken_backends.mongodb.failures import Blocked, Duplicate
from vtoken_backends.mongodb.lines import (
    UNREAD,
    Again,
    Answer,
    Documents,
    Finish,
    Insert,
    Operation,
    Present,
    Spill,
    Step,
    Unread,
    Update,
    insert,
    is_last_use,
    may_be_elsewhere,
    needed_names,
    present,
    update,
)
from vtoken_backends.mongodb.moves import finish_move
from vtoken_backends.mongodb.patience import Patience

PAGE: Final = 1_000
"""Documents in one answer of the server, where nobody asked for fewer."""
_ALL: Final = 1 << 30
Changing = Callable[[Kept], "tuple[Kept, bool] | None"]
"""What becomes of a token, and whether it counts; None to leave it as it is."""


class Written(NamedTuple):
    """What became of the documents of a bulk write."""

    lost: set[bytes]
    """Somebody else was quicker, or the unique index refused it."""
    unknown: set[bytes]
    refused: dict[bytes, BackendError]
    is_blocked: bool = False
    """What is lost is in the way of a transaction, or has not had its turn."""

    def is_clean(self) -> bool:
        """Whether all were written."""
        return not (self.lost or self.unknown or self.refused)

    def raise_problem(self) -> None:
        """Raise what became of a document, unless that is to be tried again."""
        if self.unknown:
            raise unknown()
        for error in self.refused.values():
            raise type(error)(*error.args)


class _Decided(NamedTuple):
    """What some operations came to, before anything of it is written."""

    answers: dict[int, Answer | BaseException]
    rests_on: dict[int, list[bytes]]
    """By operation: the documents that have to be written for its answer to be true."""
    again: list[int]
    """Operations that are to be decided again."""
    stopped: dict[int, Again]
    """Those of them that have written something else first."""
    spilling: dict[bytes, Stored]
    finishing: dict[bytes, Stored]


class _Fate(NamedTuple):
    """What a bulk write has done."""

    done: set[bytes]
    unknown: set[bytes]
    refused: dict[int, BackendError]
    """The steps that the server has refused, by their places."""
    is_blocked: bool = False


class Writes:
    """Operations on the documents of a store.

    Args:
        client: of the store.
        check: raises where the unique index is missing.
    """

    def __init__(self, client: Collections, check: Callable[[], Awaitable[None]]) -> None:
        self._client = client
        self._check = check

    async def flush(
        self, ops: Sequence[Operation], *, is_whole: bool = False, is_patient: bool = True
    ) -> list[Answer | BaseException]:
        """Decide and write a batch; an answer that is an exception is that operation's own.

        Args:
            ops: the batch.
            is_whole: read whole documents at once.
            is_patient: wait for transactions of an application's own. Else the answer of an operation that
                has to is :class:`Blocked`.
        """
        answers: dict[int, Answer | BaseException] = {}
        ops = list(ops)
        is_whole = is_whole or any(isinstance(op, Insert) and may_be_elsewhere(op) for op in ops)
        left = list(range(len(ops)))
        pause = Patience()
        failure: BackendError | None = None
        is_later = False
        try:
            while left:
                left = await self._round(ops, left, answers, is_whole, is_patient)
                is_whole = is_later = True
                if left:
                    await pause()
        except BackendError as error:
            failure = error
        if failure is not None and len(left) > 1 and not isinstance(failure, _OF_ALL):
            # Refused as a whole, perhaps for the sake of one. Nobody may fail for a neighbour's reason.
            found = await asyncio.gather(*(self.flush([ops[number]], is_whole=True) for number in left))
            answers |= {number: answer for number, [answer] in zip(left, found, strict=True)}
        elif failure is not None:
            # What came before may have changed something.
            is_half_done = is_later and isinstance(failure, BackendUnavailable)
            kind = OutcomeUnknown if is_half_done else type(failure)
            answers |= {number: kind(*failure.args) for number in left}
        in_order = [answers[number] for number in range(len(ops))]
        await self.end_what_they_end(ops, in_order)
        await self._confirm_replays(in_order)
        return in_order

    async def in_the_way(self, op: Insert) -> Inserted | None:
        """What would keep a token from being inserted now; nothing is written."""
        documents = await self._read([op], is_whole=True)
        answer = insert(op, documents)
        is_in_the_way = isinstance(answer, Inserted) and answer.result is not InsertResult.INSERTED
        return answer if isinstance(answer, Inserted) and is_in_the_way else None

    async def look(self, op: Present) -> Presented:
        """What a key would be answered now; nothing is written."""
        answer = present(op, await self._read([op], is_whole=True))
        while isinstance(answer, Finish):
            await self.finish(answer.stored)
            answer = present(op, await self._read([op], is_whole=True))
        answers: list[Answer | BaseException] = [answer if isinstance(answer, Presented) else _RIGHT]
        await self._confirm_replays(answers)
        if isinstance(answers[0], Presented):
            return answers[0]
        raise answers[0] if isinstance(answers[0], BaseException) else unknown()

    async def _round(
        self,
        ops: list[Operation],
        numbers: Sequence[int],
        answers: dict[int, Answer | BaseException],
        is_whole: bool,
        is_patient: bool,
    ) -> list[int]:
        """Decide some operations once, and return those that are to be decided again."""
        documents = await self._read([ops[number] for number in numbers], is_whole)
        decided = _decided(ops, numbers, documents)
        await self._count_beside(documents.added)
        written = await self.write(documents, is_patient=is_patient)
        if documents.added:
            # What may be on its way still stays announced.
            arrived = [stored for stored in documents.added if stored.oid not in written.unknown]
            await after_a_write(self._count_beside(documents.added, arrived))
        _note_what_was_begun(ops, decided.stopped, written)
        await self._go_on(decided, documents, written)
        answers |= decided.answers
        again = list(decided.again)
        for number, oids in () if written.is_clean() else decided.rests_on.items():
            if not written.lost.isdisjoint(oids):
                again.append(number)
            elif not written.unknown.isdisjoint(oids):
                answers[number] = unknown()
            for error in [written.refused[oid] for oid in oids if oid in written.refused]:
                answers[number] = type(error)(*error.args)
        if written.is_blocked:
            answers |= {number: Blocked() for number in again}
            return []
        return sorted(again)

    async def _go_on(self, decided: _Decided, documents: Documents, written: Written) -> None:
        """Move tombstones out of lines that have no room for them, and finish replacements."""
        spilling = decided.spilling | {
            oid: stored for oid, stored in documents.all.items() if stored.edits and stored.spill
        }
        for oid, stored in spilling.items():
            if oid not in written.lost and oid not in written.unknown and oid not in written.refused:
                with suppress(BackendError):  # whoever comes upon it next goes on with it
                    await self.spill(stored)
        for stored in decided.finishing.values():
            with suppress(BackendError):  # likewise, and the round must not be decided twice for its sake
                await self.finish(stored)

    # Reading --------------------------------------------------------------------------------------

    async def _read(self, ops: Sequence[Operation], is_whole: bool) -> Documents:
        documents = Documents(is_whole)
        names = {name: None for op in ops for name in needed_names(op, is_whole=is_whole)}
        if any(isinstance(op, Insert) for op in ops):
            _, found = await asyncio.gather(self._check(), self.named(list(names), is_whole=is_whole))
        else:
            found = await self.named(list(names), is_whole=is_whole)
        for stored in found:
            documents.add(stored)
        if is_whole:
            await self._read_origins(ops, documents)
            await self._read_beside(ops, documents)
            await self._read_handed_over(documents)
        return documents

    async def named(self, names: Sequence[object], *, is_whole: bool) -> list[Stored]:
        """The documents that have one of some names."""

        async def find() -> list[Stored]:
            fields = None if is_whole else LIGHT
            found = await self._find({"names": {"$in": list(names)}}, fields, hint=dict(NAMES))
            left = _left(names, found) if is_whole else []
            if left:
                found |= await self._moved(left)
            return list(found.values())

        return await self._client.run(find, writes=False)

    async def not_named(self, names: Sequence[object]) -> list[Stored]:
        """The whole documents with names of which a read has just found no document."""

        async def find() -> list[Stored]:
            return list((await self._moved(names)).values())

        return await self._client.run(find, writes=False)

    async def _moved(self, names: Sequence[object]) -> dict[bytes, Stored]:
        """What was in no document's names when they were looked for. To be called within ``run``."""
        return await self._find({"moved": {"$in": list(names)}})

    async def _find(
        self, query: Document, fields: Document | None = None, **more: Any
    ) -> dict[bytes, Stored]:
        found = await self._client.find_all(query, PAGE, fields, **more)
        stored = [stored_of(one, is_whole=fields is None) for one in found]
        return {one.oid: one for one in stored}

    async def _read_origins(self, ops: Sequence[Operation], documents: Documents) -> None:
        """Read the tokens that keys were issued with, which remember the uses of them."""
        origins = {
            id_name(key.origin): None
            for op in ops
            if isinstance(op, Present) and op.use_id
            for holder in documents.holders(op.key.digests or ())
            for key in holder.kept.token.keys
            if documents.holder(id_name(key.origin)) is None
        }
        if origins:
            for stored in await self.named(list(origins), is_whole=True):
                documents.add_new(stored)

    async def _read_beside(self, ops: Sequence[Operation], documents: Documents) -> None:
        """Read what stands beside the lines that are to be replaced, after the lines themselves."""
        lines = {
            op.line: documents.lines[op.line]
            for op in ops
            if isinstance(op, Insert) and op.mode is not InsertMode.ADD and op.line in documents.lines
        }
        crowded = {line: stored for line, stored in lines.items() if stored.beside}
        if not crowded:
            return
        objects = [object_of(s.shared["content_type"], s.shared["object_id"]) for s in crowded.values()]
        active: Document = {"beside_line": {"$in": list(crowded)}, "token.state": 0}
        for stored in await self.whole({"object": {"$in": objects}, **active}, _ALL):
            stored = documents.add_new(stored)
            if stored.beside_line is not None:
                documents.beside.setdefault(stored.beside_line, []).append(stored)

    async def _read_handed_over(self, documents: Documents) -> None:
        """Read who has the keys that are to be handed over."""
        left = [name for name in documents.handed_over if documents.holder(name) is None]
        for stored in await self.named(left, is_whole=True) if left else ():
            documents.add_new(stored)

    async def whole(self, query: Document, limit: int = PAGE, **more: Any) -> list[Stored]:
        """The documents of a query, whole."""

        async def find() -> list[Stored]:
            found = await self._client.find_all(query, limit, **more)
            return [stored_of(one, is_whole=True) for one in found]

        return await self._client.run(find, writes=False)

    # Writing --------------------------------------------------------------------------------------

    async def write(self, documents: Documents, *, is_patient: bool = True) -> Written:
        """Write what was changed."""
        changed = [stored for stored in documents.all.values() if stored.edits]
        if not changed:
            return Written(set(), set(), {})
        claim = new_id()
        steps, places = _steps(changed, claim)
        oids = {stored.oid for stored in changed}
        fate = await self._send(steps, changed, claim, is_patient=is_patient)
        errors: dict[bytes, BackendError] = {}
        for place, error in fate.refused.items():
            # Without whole documents, others may have been refused with it: they are all tried again.
            if documents.is_whole and not isinstance(error, Duplicate):
                errors |= dict.fromkeys(places[place], error)
        lost = oids - fate.done - fate.unknown - errors.keys()
        return Written(lost, fate.unknown, errors, fate.is_blocked)

    async def _send(self, steps: Bulk, changed: Sequence[Stored], claim: bytes, *, is_patient: bool) -> _Fate:
        """Send a bulk write."""
        count = 0

        async def send() -> None:
            nonlocal count
            count = await self._client.bulk_write(steps, is_patient=is_patient)

        with suppress(OutcomeUnknown):
            try:
                refused = await self._client.write_each(send)
            except Blocked:  # some may have been written before the one that was in the way
                done, not_told = await self._claimed(changed, claim)
                return _Fate(done, not_told, {}, is_blocked=True)
            if not refused and count == len(changed):
                return _Fate({stored.oid for stored in changed}, set(), {})
            done, not_told = await self._claimed(changed, claim)
            if not refused and count == len(done):
                not_told = set()  # they were deleted before we came, by an erasure or a purge
            return _Fate(done, not_told, refused)
        # The connection broke, say, or the primary stepped down. What the first try has changed stays so,
        # and a second one changes the rest: drivers do the same for the commands that they can repeat.
        done = set()
        with suppress(BackendError):
            await self._client.write_each(send)
            done, _ = await self._claimed(changed, claim)
        # The first try may be on its way still.
        return _Fate(done, {stored.oid for stored in changed} - done, {})

    async def _claimed(self, changed: Sequence[Stored], claim: bytes) -> tuple[set[bytes], set[bytes]]:
        """Which documents a flush has written, and of which it cannot be told."""

        async def find() -> dict[bytes, Document]:
            query: Document = {"_id": {"$in": [stored.oid for stored in changed]}}
            found = await self._client.find_all(query, len(changed), {"revision": 1, "claims": 1})
            return {one["_id"]: one for one in found}

        found = await after_a_write(self._client.run(find, writes=False))
        done: set[bytes] = set()
        not_told: set[bytes] = set()
        for stored in changed:
            one = found.get(stored.oid)
            if one is None:
                if stored.revision is not None:  # deleted since; one that was never there was refused
                    not_told.add(stored.oid)
                continue
            made = 0 if stored.revision is None else stored.revision + 1
            later = int(one["revision"]) - made
            if later >= len(one["claims"]):
                not_told.add(stored.oid)
            elif later >= 0 and one["claims"][-1 - later] == claim:
                done.add(stored.oid)
        return done, not_told

    async def _count_beside(self, added: Sequence[Stored], arrived: Sequence[Stored] = ()) -> None:
        """Count in lines that something is added beside them, and what of it has arrived."""
        arrived_oids = {stored.oid for stored in arrived}

        async def count() -> None:
            steps = [_counting(stored, has_arrived=stored.oid in arrived_oids) for stored in added]
            await self._client.tokens.bulk_write(steps, ordered=False)

        pause = Patience()
        while added:
            with suppress(Duplicate):  # two upserts at once both began to insert
                await self._client.run(count)
                return
            await pause()

    async def spill(self, stored: Stored) -> None:
        """Go on with moving tombstones into a document of their own."""
        await finish_move(self._client, stored)

    async def finish(self, stored: Stored) -> None:
        """Finish a replacement that another call has begun. It may be doing so itself at this moment."""
        if stored.pending is not None:
            [answer] = await self.flush([Insert.begun(stored.pending, stored.keep_until)], is_whole=True)
            if isinstance(answer, BaseException):
                raise answer

    # Several documents ----------------------------------------------------------------------------

    async def change_all(self, query: Document, changing: Changing) -> int:
        """Change every token in the documents of a query, page by page, and return how many counted."""
        count = 0
        last: bytes | None = None
        while True:
            page = query if last is None else {"$and": [query, {"_id": {"$gt": last}}]}
            found = await self.whole(page, sort={"_id": 1})
            count += await self.change(found, changing)
            if len(found) < PAGE:
                return count
            last = found[-1].oid

    async def change(self, found: Sequence[Stored], changing: Changing, names: Sequence[object] = ()) -> int:
        """Change every token in some documents, and return how many counted.

        Args:
            found: the documents.
            changing: what becomes of a token.
            names: what they were found by. A key may have got into another document meanwhile.
        """
        total = 0
        pause = Patience()
        while found:
            documents = Documents(is_whole=True)
            again: set[bytes] = set()
            counts: dict[bytes, int] = {}
            for stored in found:
                if stored.spill and stored.spill_id is not None:
                    await self.spill(stored)
                    again |= {stored.oid, stored.spill_id}
                    continue
                if stored.pending is not None:
                    await self.finish(stored)
                    again.add(stored.oid)
                    continue
                documents.add(stored)
                counts[stored.oid] = _changed(stored, changing)
            written = await self.write(documents)
            written.raise_problem()
            total += sum(count for oid, count in counts.items() if oid not in written.lost)
            again |= written.lost
            if not again:
                break
            await pause()
            if names:
                found = await self.named(names, is_whole=True)
            else:
                found = await self.whole({"_id": {"$in": list(again)}}, len(again))
        return total

    async def deactivate(self, match: Match, at: int, sparing: tuple[str, ...]) -> int:
        """What :meth:`TokenBackend.deactivate` says."""

        def end(kept: Kept) -> tuple[Kept, bool] | None:
            token = kept.token
            if not matches(token, match):
                return None
            key = key_of(token, match) if match.digests is not None else None
            if key is None or key.origin == token.id:
                after, counts = ended(token, at, sparing), token.is_active
            else:
                after, counts = key_ended(token, key), token.is_active and key.expires_at >= at
            return None if after == token else (kept._replace(token=after), counts)

        if match.id is not None or match.digests is not None:
            names = [id_name(match.id)] if match.id is not None else list(match.digests or ())
            return await self.change(await self.named(names, is_whole=True), end, names)
        return await self.change_all({"$and": [condition(match), _ENDABLE]}, end)

    async def _confirm_replays(self, answers: list[Answer | BaseException]) -> None:
        """Wait until a majority has what was read, before it is said that a use was counted: what was read
        may be something that a fail-over undoes."""
        replayed = [
            number
            for number, answer in enumerate(answers)
            if isinstance(answer, Presented) and answer.outcome is Outcome.REPLAYED
        ]
        if not replayed:
            return
        # A write that changes nothing waits for all that the server has written before.
        nothing: Document = {"_id": "nothing"}
        try:
            await self._client.run(lambda: self._client.meta.update_one(nothing, {"$set": {"text": ""}}))
        except BackendError as error:
            for number in replayed:
                answers[number] = type(error)(*error.args)

    async def end_what_they_end(
        self, ops: Sequence[Operation], answers: list[Answer | BaseException]
    ) -> None:
        """End the tokens of other contexts that last uses end, one object after the other."""
        for number, answer in enumerate(answers):
            used = None if isinstance(answer, BaseException) else is_last_use(ops[number], answer)
            if used is None:
                continue
            try:
                await after_a_write(self.end_other_contexts(used))
            except BackendError as error:
                answers[number] = type(error)(*error.args)

    async def end_other_contexts(self, used: StoredToken) -> None:
        """End what the use that ended a token ends, too."""

        def end(kept: Kept) -> tuple[Kept, bool] | None:
            if not ends_other_context(used, kept.token):
                return None
            return kept._replace(token=ended(kept.token, used.used_at)), True

        same = Match(content_type=used.content_type, object_id=used.object_id, slug=used.slug)
        await self.change_all(condition(same) | {"token.state": 0}, end)


_RIGHT: Final = Presented(Outcome.RIGHT)
"""What can be used once tombstones were moved."""
_OF_ALL: Final = (BackendClosed, BackendUnavailable, OutcomeUnknown)
"""What is true of every operation of a batch, if it is of one."""
_ENDABLE: Final[Document] = {
    "$or": [
        {"token.state": 0},
        {"pending": {"$exists": True}},
        {"token.holds.0": {"$exists": True}},
        {"former.holds.0": {"$exists": True}},
        {"spill.0": {"$exists": True}},
    ]
}
"""Documents in which there is something to deactivate: an active token, or a hold."""


def unknown() -> OutcomeUnknown:
    return OutcomeUnknown("MongoDB: the write may or may not have happened")


def _left(names: Sequence[object], found: dict[bytes, Stored]) -> list[object]:
    """The names that are of none of some whole documents."""
    known: set[object] = set()
    for stored in found.values():
        known.update((stored.line,), reserved_names(stored), names_of([k.token for k in stored.tokens()]))
    return [name for name in names if name not in known]


def _decide(op: Operation, documents: Documents) -> Answer | Unread | Step:
    match op:
        case Insert():
            return insert(op, documents)
        case Present():
            return present(op, documents)
        case Update():
            return update(op, documents)


def _decided(ops: Sequence[Operation], numbers: Sequence[int], documents: Documents) -> _Decided:
    """Decide operations in turn, each on what those before it leave."""
    decided = _Decided(answers={}, rests_on={}, again=[], stopped={}, spilling={}, finishing={})
    waiting: set[object] = set()  # what an operation is about that is decided again, before later ones
    for number in numbers:
        op = ops[number]
        documents.consulted.clear()
        answer = UNREAD if _waits(op, waiting) else _decide(op, documents)
        if isinstance(answer, Unread | Again | Spill | Finish):
            decided.again.append(number)
            waiting.update(needed_names(op, is_whole=True), (s.oid for s in documents.consulted))
            if isinstance(answer, Spill):
                decided.spilling[answer.stored.oid] = answer.stored
            elif isinstance(answer, Finish):
                decided.finishing[answer.stored.oid] = answer.stored
            elif isinstance(answer, Again):
                decided.stopped[number] = answer
            continue
        decided.answers[number] = answer
        changed = [stored for stored in documents.consulted if stored.edits]
        if changed:
            own = [stored for stored in changed if stored.edits != stored.seen]
            for stored in own:
                stored.seen = stored.edits
            decided.rests_on[number] = [stored.oid for stored in own or changed]
    return decided


def _note_what_was_begun(ops: list[Operation], again: dict[int, Again], written: Written) -> None:
    """An insert that is decided again does not do twice what its first write has done."""
    for number, answer in again.items():
        op = ops[number]
        if isinstance(op, Insert) and answer.begun is not None and answer.begun.oid not in written.lost:
            ops[number] = op._replace(is_begun=True)


def _waits(op: Operation, waiting: set[object]) -> bool:
    """Whether an operation is about something that an earlier one is decided again about."""
    return bool(waiting) and not waiting.isdisjoint(needed_names(op, is_whole=True))


def _changed(stored: Stored, changing: Changing) -> int:
    """Change the tokens of a document, and return how many counted."""
    count = 0
    for kept in stored.tokens():
        change = changing(kept)
        if change is not None:
            stored.replace(kept, change[0])
            count += change[1]
    return count


def _counting(stored: Stored, *, has_arrived: bool) -> UpdateOne:
    """The step that counts one document beside its line."""
    line, shared, due = stored.beside_line, stored.shared, Int64(due_of(stored))
    made: Document = {
        "_id": new_id(),
        "names": [line],
        "line": line,
        "object": object_of(shared["content_type"], shared["object_id"]),
        **shared,
        "due": due,
    }
    update = _claiming(new_id())
    update["$inc"]["beside"] = 1
    update["$setOnInsert"] = made
    if has_arrived:
        update["$pull"] = {"adding": {"_id": stored.oid}}
    else:
        update["$push"]["adding"] = {"_id": stored.oid, "ends_at": due}
    return UpdateOne({"names": line}, update, upsert=True, hint=NAMES)


def _claiming(claim: bytes) -> Document:
    """The part of an update that makes a new revision."""
    claims = {"$each": [claim], "$slice": -MOST_CLAIMS}
    return {"$inc": {"revision": 1}, "$push": {"claims": claims}}


def _steps(changed: Sequence[Stored], claim: bytes) -> tuple[Bulk, list[list[bytes]]]:
    """The bulk write of changed documents, and which documents each of its steps is about."""
    steps = Bulk([], [])
    inserted: list[list[bytes]] = []
    updated: list[list[bytes]] = []
    alike: defaultdict[tuple[int | None, object], list[Stored]] = defaultdict(list)
    for stored in changed:
        same: Document = {"_id": stored.oid, "revision": stored.revision}
        if stored.revision is None:
            steps.inserts.append(whole(stored, claim))
            inserted.append([stored.oid])
            continue
        if stored.former is not None:
            steps.updates.append({"q": same, "u": whole(stored, claim)})
        elif stored.has_new_token():
            steps.updates.append(_replacing(stored, same, claim))
        else:
            alike[stored.revision, stored.differences()].append(stored)
            continue
        updated.append([stored.oid])
    for (revision, _), same_change in alike.items():
        oids = [stored.oid for stored in same_change]
        change = _difference(same_change[0]) | _claiming(claim)
        query: Document = {"_id": {"$in": oids}, "revision": revision}
        steps.updates.append({"q": query, "u": change, "multi": True})
        updated.append(oids)
    return steps, inserted + updated


def _replacing(stored: Stored, same: Document, claim: bytes) -> Document:
    """The step that makes another token the current one of a line whose tombstones were not read."""
    before = names_of([stored.before.token]) if stored.before is not None else []
    tokens = [kept.token for kept in stored.tokens()]
    names = [name for name in dict.fromkeys(names_of(tokens)) if name not in before]
    room = MOST_FORMER - len(stored.pushed)
    query: Document = {**same, "names": {"$nin": names}, f"former.{room}": {"$exists": False}}
    update = _claiming(claim)
    update["$push"]["names"] = {"$each": names}
    if stored.pushed:
        update["$push"]["former"] = {"$each": [_tombstone(kept, stored) for kept in stored.pushed]}
    update["$min"] = {"due": Int64(min([token.ends_at for token in tokens]))}
    if stored.kept is not None:
        update["$set"] = {"token": token_document(stored.kept)}
    return {"q": query, "u": update}


def _tombstone(kept: Kept, stored: Stored) -> Document:
    """The document of a token that was replaced; mostly it is as it was read, but for its end."""
    before, found = stored.before, stored.found
    if before is None or found is None or before.token.keys is not kept.token.keys:
        return token_document(kept)
    token = kept.token
    return {**found, "state": token.state.value, "ends_at": token.ends_at}


def _difference(stored: Stored) -> Document:
    """The update that makes the current token of a document what it has become."""
    if stored.kept is None:
        raise BackendError("MongoDB: a document without a token cannot be changed by its difference")
    new = token_document(stored.kept)
    update: Document = {"$set": {}, "$unset": {}}
    for name, _ in stored.differences():
        operator, value = ("$set", new[name]) if name in new else ("$unset", "")
        update[operator][f"token.{name}"] = value
    update = {operator: fields for operator, fields in update.items() if fields}
    if "token.ends_at" in update.get("$set", ()):
        update["$min"] = {"due": Int64(stored.kept.token.ends_at)}
    return update
