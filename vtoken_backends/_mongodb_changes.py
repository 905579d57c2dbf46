"""How the MongoDB backend changes tokens: one by one, in their overlaps, and many uses by a few commands."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from bson import ObjectId
from pymongo import ReturnDocument, UpdateMany

import vtoken_backends._mongodb_documents as documents
from vtoken.backend import Change, Match, StoredToken, Use
from vtoken.errors import BackendClosed, BackendError, BackendUnavailable, OutcomeUnknown
from vtoken_backends._mongodb_documents import Document, State
from vtoken_backends._mongodb_lanes import each
from vtoken_backends._mongodb_link import Link, after_a_write
from vtoken_backends.matching import matches


class Take(NamedTuple):
    """A use of the token that matches."""

    match: Match
    use: Use

    def may_share(self) -> bool:
        """Whether it may go with others: then it is for a valid token with one of some digests."""
        match = self.match
        by_digest_alone = match.id is None and match.lease_id is None and match.leased_at is None
        return by_digest_alone and match.digests is not None and match.valid_at is not None


class _First(NamedTuple):
    """A token that nothing has happened to yet, and the use that asks for it."""

    number: int
    token: StoredToken
    valid_at: int
    use: Use


class Changes:
    """Changes of tokens.

    Args:
        link: to the server.
    """

    def __init__(self, link: Link) -> None:
        self._link = link

    async def change(self, query: Callable[[], Document], change: Change) -> State | None:
        """Change the token of a query."""

        async def apply() -> State | None:
            found = await self._link.tokens.find_one_and_update(
                query(), documents.update(change), return_document=ReturnDocument.AFTER
            )
            return documents.state(found) if found else None

        return await self._link.run(apply)

    async def end(self, query: Callable[[], Document], at: int) -> int:
        """Deactivate the active tokens of a query, and return how many there were."""

        async def end() -> int:
            active = query() | {"is_active": True}
            return int((await self._link.tokens.update_many(active, documents.ending(at))).modified_count)

        return await self._link.run(end)

    async def use(self, take: Take) -> StoredToken | None:
        """Use one token."""
        match, use = take
        used = await self.change(lambda: documents.usable(match, use, newer={"$exists": False}), use)
        if used is None:
            older = await self._older(match, use)
            if older is not None:
                # It may have sealed newer ones.
                used = await after_a_write(self._use_older(match, use, older))
        if used is None:
            return None
        if used.newer or used.has_older:
            await after_a_write(self.end(lambda: documents.overlap_of(used), use.at))
        return used.token

    async def _older(self, match: Match, use: Use) -> State | None:
        """A token that newer ones overlap."""

        async def look() -> State | None:
            found = await self._link.tokens.find_one(documents.usable(match, use, newer={"$exists": True}))
            return documents.state(found) if found else None

        return await self._link.run(look, writes=False)

    async def _use_older(self, match: Match, use: Use, older: State | None) -> State | None:
        """Use a token that newer ones overlap, once each of them is sealed for it."""
        while older is not None:
            rival = older.token.id
            # The newest one first: it is where all of an overlap meet, so one of them gets past it.
            for newer in reversed(older.newer):
                if not await self._seal(newer, rival, use.at):
                    await self.end(partial(documents.condition, Match(id=rival)), use.at)
                    return None
            same = {"_id": rival, "newer": {"$eq": list(older.newer)}}
            used = await self.change(partial(documents.usable, match, use, **same), use)
            if used is not None:
                return used
            older = await self._older(match, use)
        return None

    async def _seal(self, id_: str, rival: str, at: int) -> bool:
        """Make a token inactive in favour of an older one, by compare-and-set on its ``uses``."""
        sealed = await self._link.run(
            lambda: self._link.tokens.find_one_and_update(
                {"_id": id_, **documents.SHOWN},
                documents.sealing(rival, at),
                {"sealed_for": 1},
                return_document=ReturnDocument.AFTER,
            )
        )
        # One that is missing is not active yet, or purged after its overlap was ended.
        return sealed is None or sealed["sealed_for"] == rival

    async def use_many(self, takes: Sequence[Take]) -> Sequence[StoredToken | BaseException | None]:
        """Use many tokens: one look at them all, then one command for those that are fresh.

        The look tells which use belongs to which token. What it saw is then the condition of the change, so
        a token that somebody else was quicker to change is left as it is. Whatever is not as
        simple as a first use goes alone.
        """
        answers: list[StoredToken | BaseException | None] = [None] * len(takes)
        candidates = await self._link.run(partial(self._candidates, takes), writes=False)
        firsts: dict[str, _First] = {}
        again: list[_First] = []
        alone: list[int] = []
        for number, state in enumerate(candidates):
            if state is None:
                continue
            first = _First(number, state.token, takes[number].match.valid_at or 0, takes[number].use)
            if not _is_fresh(state):
                alone.append(number)
            elif firsts.setdefault(state.token.id, first) is not first:
                again.append(first)
        for first, used in zip(firsts.values(), await self._use_firsts([*firsts.values()]), strict=True):
            answers[first.number] = used
            if used is None:
                alone.append(first.number)  # somebody else was quicker to change it
        for other in again:
            before = answers[firsts[other.token.id].number]
            if not isinstance(before, StoredToken) or before.is_active:
                alone.append(other.number)  # else it came after the only use that there was
        for number, answer in zip(alone, await each(self.use(takes[n]) for n in alone), strict=True):
            answers[number] = answer
        return answers

    async def _candidates(self, takes: Sequence[Take]) -> list[State | None]:
        """For each use the token that it is for, or was for."""
        digests = {digest for take in takes for digest in take.match.digests or ()}
        found = await self._link.find_all(documents.look_up(digests), len(digests))
        states = {state.token.digest: state for state in map(documents.state, found)}
        return [_candidate(states, take) for take in takes]

    async def _use_firsts(self, firsts: Sequence[_First]) -> Sequence[StoredToken | BackendError | None]:
        """Use tokens that are as they were issued; ``None`` for those that are not so any more."""
        if not firsts:
            return []
        claim = ObjectId()
        won: set[str] | None = None
        with suppress(OutcomeUnknown):
            won = await self._claim(firsts, claim)
        if won is not None:
            return [documents.used_first(f.token, f.use) if f.token.id in won else None for f in firsts]
        # The connection broke, say, or the primary stepped down. What the first try has claimed stays so,
        # and a second one claims the rest: drivers do the same for the commands that they can repeat.
        won = set()
        with suppress(BackendError):
            won = await self._claim(firsts, claim)
        return [
            documents.used_first(f.token, f.use) if f.token.id in won
            # The first try may be on its way still.
            else OutcomeUnknown("MongoDB: the write may or may not have happened")
            for f in firsts
        ]  # fmt: skip

    async def _claim(self, firsts: Sequence[_First], claim: ObjectId) -> set[str]:
        """Use those that are still as they were issued, and return their ids."""
        ids = [first.token.id for first in firsts]

        async def use() -> int:
            steps = _first_uses(firsts, claim)
            return int((await self._link.tokens.bulk_write(steps, ordered=False)).modified_count)

        count = 0
        try:
            count = await self._link.run(use)
        except (BackendClosed, BackendUnavailable, OutcomeUnknown):
            raise
        except BackendError:  # one of the steps was refused; those of the others are done
            pass
        if count == len(ids):
            return set(ids)
        claimed = {"_id": {"$in": ids}, "claim": claim}
        try:
            found = await self._link.run(lambda: self._link.find_all(claimed, len(ids), {"_id": 1}))
        except BackendUnavailable:
            found = None
        if found is None:
            raise OutcomeUnknown("MongoDB: a write was done, and then its result could not be read")
        return {document["_id"] for document in found}


def _candidate(states: dict[bytes, State], take: Take) -> State | None:
    match, use = take
    fitting = (states[digest] for digest in match.digests or () if digest in states)
    for state in fitting:
        # A use that was counted before is answered for good by a write that waits: this look may have seen
        # what a fail-over undoes.
        if matches(state.token, match) or (use.use_id and use.use_id in state.token.use_ids):
            return state
    return None


def _is_fresh(state: State) -> bool:
    return not (state.token.uses or state.token.use_ids or state.newer or state.has_older or state.saved)


def _first_uses(firsts: Sequence[_First], claim: ObjectId) -> list[UpdateMany]:
    """One step for all that make the same change."""
    groups: defaultdict[tuple[int, Use, bool], list[str]] = defaultdict(list)
    for first in firsts:
        groups[first.valid_at, first.use, first.token.max_uses <= 1].append(first.token.id)
    return [
        UpdateMany(documents.unused(ids, valid_at), documents.first_use(use, is_last, claim))
        for (valid_at, use, is_last), ids in groups.items()
    ]
