"""Copying every token from one store to another, whatever the backends.

A copy makes two passes over the source, in pages:

1. It inserts what the destination does not hold, unless an earlier copy took it already (see
   :mod:`vtoken.migrate.receipts`).
2. It ends in the destination what has ended in the source since, and compares both stores.

A copy that was interrupted is simply started again and goes on where it was. Beside live traffic on the
source, a first copy brings nearly everything, and a second one, with the application stopped, the rest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from operator import attrgetter
from typing import Final, NamedTuple

from vtoken.backend import (
    PRETENDED,
    InsertMode,
    InsertResult,
    Match,
    State,
    StoredKey,
    StoredToken,
    TokenBackend,
    Use,
    UseHeld,
)
from vtoken.inputs import milliseconds
from vtoken.migrate.receipts import CopyReceipt, copy_receipt_name
from vtoken.migrate.stores import PAGE, Progress, at_once, found_by_id, found_by_key, pages, quiet


class Copied(NamedTuple):
    """How a copy ended."""

    inserted: int
    """Tokens that this run stored."""
    skipped: int
    """Tokens that were there already."""
    taken_before: int
    """Tokens that an earlier copy took and that the destination does not hold any more: they ended there and
    were purged. They are not taken again."""
    refused: int
    """Tokens whose id or key belongs to another token of the destination."""
    ended: int
    """Tokens that had been used or had ended in the source since, and so were ended in the destination."""
    tokens: int
    """Tokens of the source, counted when the copy was compared with it."""
    missing: int
    """Of these, how many the destination does not hold: issued since, taken before, or refused."""
    different: int
    """Of these, how many are not the same."""
    others: int
    """Tokens that only the destination holds."""
    source_digest: str
    """SHA-256, in hexadecimal, of the source's tokens in their order."""
    destination_digest: str
    """The same of their copies."""

    @property
    def is_complete(self) -> bool:
        """Whether the destination holds every token of the source, and the same of each."""
        return self.source_digest == self.destination_digest and not self.missing and not self.different


async def copy(
    source: TokenBackend,
    destination: TokenBackend,
    *,
    progress: Progress = quiet,
    page: int = PAGE,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Copied:
    """Copy every token, then compare both stores.

    A token that is in both stores is not written again; but if it was used or has ended in the source since,
    it ends in the destination, too. What an earlier copy took and the destination has purged since is not
    taken again, so that nothing that was used or deactivated is ever valid again. (A token whose issuer's
    clock was ahead of ``clock`` is not covered: it is taken again until its time has come.)

    Some things stay behind: budgets of attempts and issues begin afresh, ``consume_id`` values are
    forgotten, and records of addresses that nobody has (``pretend``) are left out.

    Args:
        source: where the tokens are, open. It is only read, but is given a seed if it has none yet.
        destination: where they go, open. It may hold other tokens.
        progress: is told how many tokens were copied or compared: in the end, each of the source's twice.
        page: how many tokens are read at once, at most.
        clock: returns an aware ``datetime``.

    Raises:
        BackendError: one of the stores failed. Start again: what was copied stays.
    """
    run = _Run(source, destination, await copy_receipt_name(source), page)
    done = await run.insert(progress, milliseconds(clock()))
    await run.compare(lambda count: progress(done + count))
    return Copied(
        inserted=run.inserted,
        skipped=run.skipped,
        taken_before=run.taken_before,
        refused=run.refused,
        ended=run.ended,
        tokens=run.tokens,
        missing=run.missing,
        different=run.different,
        others=await run.others(),
        source_digest=run.ours.hexdigest(),
        destination_digest=run.theirs.hexdigest(),
    )


class _Run:
    """One copy."""

    def __init__(self, source: TokenBackend, destination: TokenBackend, name: str, page: int) -> None:
        self._source = source
        self._destination = destination
        self._name = name
        self._page = page
        self.inserted = self.skipped = self.taken_before = self.refused = 0
        self.ended = self.tokens = self.missing = self.different = 0
        self.ours, self.theirs = hashlib.sha256(), hashlib.sha256()

    # The first pass: what is new ---------------------------------------------------------------

    async def insert(self, progress: Progress, now: int) -> int:
        """Insert what the destination neither holds nor took before; return how many tokens there are."""
        receipt = await self._finish(await CopyReceipt.read(self._destination, self._name))
        # The tokens of that stretch are met again below, those that were inserted among them.
        self.skipped, self.taken_before, self.refused = -self.inserted, 0, 0
        top, done = "", 0
        async for found in pages(self._source, self._page):
            top = top or next((token.id for token in found if token.created_at <= now), "")
            done += await self._insert(found, receipt.floor)
            if top and found[0].id > receipt.floor:
                receipt = receipt._replace(top=top, reached=found[-1].id)
                await receipt.write(self._destination, self._name)
            progress(done)
        if receipt.top:
            await CopyReceipt(floor=max(receipt.floor, top)).write(self._destination, self._name)
        return done

    async def _finish(self, receipt: CopyReceipt) -> CopyReceipt:
        """Insert what an interrupted copy had left over, from where it was."""
        if not receipt.top:
            return receipt
        async for found in pages(self._source, self._page, receipt.reached):
            if found[0].id <= receipt.floor:
                break
            await self._insert(found, receipt.floor)
            receipt = receipt._replace(reached=found[-1].id)
            await receipt.write(self._destination, self._name)
        receipt = CopyReceipt(floor=max(receipt.floor, receipt.top))
        await receipt.write(self._destination, self._name)
        return receipt

    async def _insert(self, found: Sequence[StoredToken], floor: str) -> int:
        """Insert those of a page that are new, and return how many of its tokens are real ones."""
        tokens = _real(found)
        before = [token for token in tokens if token.id <= floor]
        there = await self._held(before)
        self.skipped += len(there)
        self.taken_before += len(before) - len(there)
        # All others are inserted at once: the answers say which ones the destination has already.
        wanted = [token for token in tokens if token.id > floor]
        for beside in (False, True):  # in this order: what replaces older tokens must not end those beside it
            await at_once(
                [token for token in wanted if token.is_beside is beside],
                partial(self._insert_one, is_first=not floor),
            )
        return len(tokens)

    async def _held(self, tokens: Sequence[StoredToken]) -> dict[str, StoredToken]:
        """Those of some tokens that the destination holds, by their ids."""
        there = await found_by_key(self._destination, tokens)
        without_key = [token for token in tokens if token.id not in there]
        return there | await found_by_id(self._destination, without_key)

    async def _insert_one(self, token: StoredToken, *, is_first: bool) -> None:
        """Insert a token beside those that are there.

        If an earlier copy was made, the token may have replaced one that is still active in the destination.
        Then it replaces it there as well, and takes over its keys if it did so in the source.
        """
        mode = InsertMode.ADD
        if not is_first and token.is_active and not token.is_beside and await self._is_newest(token):
            mode = InsertMode.REPLACE
        answer = await self._destination.insert(token, mode)
        taken_over = [key for key in token.keys if key.origin != token.id]
        if answer.result is InsertResult.KEY_TAKEN and taken_over:
            own = token._replace(keys=tuple(key for key in token.keys if key.origin == token.id))
            keep_until = max(key.expires_at for key in taken_over)
            answer = await self._destination.insert(own, mode, keep_until=keep_until)
        if answer.result is InsertResult.INSERTED:
            self.inserted += 1
        elif await self._destination.find(Match(id=token.id, object_id=token.object_id), 1):
            self.skipped += 1
        else:
            self.refused += 1

    async def _is_newest(self, token: StoredToken) -> bool:
        """Whether no newer token of the same line is active in the destination."""
        line = Match(
            content_type=token.content_type,
            object_id=token.object_id,
            slug=token.slug,
            context=token.context,
            active=True,
        )
        newest = await self._destination.find(line, 1)
        return not newest or newest[0].id < token.id

    # The second pass: what has ended since, and the comparison ----------------------------------

    async def compare(self, progress: Progress) -> None:
        """End in the destination what has ended in the source since, and count what differs."""
        async for found in pages(self._source, self._page):
            tokens = _real(found)
            there = await self._held(tokens)
            for token in tokens:
                ours = _bytes(token)
                self.ours.update(ours)
                copied = there.get(token.id)
                if copied is None:
                    self.missing += 1
                    continue
                copied = await self._ended_like(token, copied)
                theirs = ours if copied == token else _bytes(copied)
                self.theirs.update(theirs)
                self.different += theirs != ours
            self.tokens += len(tokens)
            progress(self.tokens)

    async def _ended_like(self, token: StoredToken, copied: StoredToken) -> StoredToken:
        """Let a copy end as its original has. Only ever in this direction: nothing comes back to life."""
        # A predecessor's key that was deactivated alone has the expiry 0.
        over = {key.digest for key in token.keys if key.expires_at == 0}
        ended = [key for key in copied.keys if key.digest in over and key.expires_at > 0]
        if not copied.is_active or (token.is_active and token.uses <= copied.uses and not ended):
            return copied
        for key in ended:
            match = Match(id=copied.id, digests=(key.digest,))
            await self._destination.deactivate(match, copied.created_at)
        for _ in range(token.uses - copied.uses):
            await self._use(copied, token.used_at)
        if not token.is_active:
            await self._destination.deactivate(Match(id=token.id, active=True), token.ends_at + 1)
        self.ended += 1
        return (await self._destination.find(Match(id=token.id), 1) or [copied])[0]

    async def _use(self, copied: StoredToken, at: int) -> None:
        """Count a use of a copy: the one that a copied hold stood for, or else one by its key."""
        for hold in copied.holds:
            if await self._destination.update(Match(id=copied.id), UseHeld(hold_id=hold.hold_id, at=at)):
                return
        if copied.keys:
            key = Match(id=copied.id, digests=(copied.keys[0].digest,))
            await self._destination.present(key, Use(at=at), at)

    async def others(self) -> int:
        """How many tokens only the destination holds."""
        total = sum(row.total for row in await self._destination.count(0))
        return max(0, total - (self.tokens - self.missing))


def _real(tokens: Sequence[StoredToken]) -> list[StoredToken]:
    return [token for token in tokens if token.content_type != PRETENDED]


_COMPARED: Final = sorted({*StoredToken._fields} - {"state", "keys", "holds"})
_compared_of_token: Final = attrgetter(*_COMPARED)
_compared_of_key: Final = attrgetter(*sorted(StoredKey._fields))


def _bytes(token: StoredToken) -> bytes:
    """What is compared of a token: its fields in the order of their names.

    Holds are left out, because they come and go. Of a token that is over, its keys are left out, because a
    newer token may have taken them over, and being replaced counts as being ended, because that is all that
    can be done to a copy afterwards.
    """
    state = State.ENDED if token.state is State.REPLACED else token.state
    keys = [_compared_of_key(key) for key in token.keys] if token.is_active else []
    return f"{_compared_of_token(token)!r} {state.name} {keys!r}\n".encode()
