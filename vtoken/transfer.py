"""Moving tokens from one store to another, whatever the backends; also adding tokens from elsewhere.

Everything goes through the protocol, in pages, so memory stays flat. The state of a transfer is what the
destination holds: one that was interrupted is simply started again.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from itertools import islice
from typing import Final, NamedTuple

import anyio

from vtoken.backend import InsertMode, InsertResult, Match, StoredToken, TokenBackend, Use

PAGE: Final = 2_500
"""Tokens read, looked up and written at once: 3 MB of ordinary ones. With 500 a copy took a quarter more
processor time, with 5,000 no less. Where ``find`` has no index on its order, each page costs a look through
the whole store."""
_AT_ONCE: Final = 256
"""Concurrent inserts: as many as a backend that gathers them takes in one trip."""

Progress = Callable[[int], object]
"""Is told how many tokens are done, from time to time."""


def _quiet(done: int) -> None:
    """Nobody watches."""


class Copied(NamedTuple):
    """How a copy ended."""

    inserted: int
    """Tokens that this run stored."""
    skipped: int
    """Tokens that were there already, from a run before."""
    ended: int
    """Of these, how many had been used or deactivated in the source since, and so were in the destination."""
    tokens: int
    """Tokens of the source, counted when the copy was compared with it."""
    missing: int
    """Of these, how many the destination does not hold: made since, or their key or id belongs to another."""
    different: int
    """Of these, how many are not the same in all fields."""
    others: int
    """Tokens that only the destination holds."""
    source_digest: str
    """SHA-256, in hexadecimal, of the source's tokens in their order."""
    destination_digest: str
    """The same of their copies."""

    @property
    def is_complete(self) -> bool:
        """Whether the destination holds every token of the source, equal in all fields."""
        return self.source_digest == self.destination_digest and not self.missing and not self.different


class Added(NamedTuple):
    """How :func:`add` ended."""

    inserted: int
    """Tokens that were stored."""
    skipped: int
    """Tokens whose key or id the store had already."""


async def pages(backend: TokenBackend, size: int = PAGE) -> AsyncIterator[list[StoredToken]]:
    """All tokens, newest first, in lists of at most ``size``.

    Tokens that are inserted or deleted meanwhile may be among them or not.
    """
    after: tuple[int, str] | None = None
    while page := await backend.find(Match(), size, after):
        yield page
        if len(page) < size:
            return
        after = page[-1].created_at, page[-1].id


async def copy(
    source: TokenBackend,
    destination: TokenBackend,
    *,
    progress: Progress = _quiet,
    page: int = PAGE,
) -> Copied:
    """Copy every token, then compare both stores.

    A token whose id is there already is not written again; but where it was used or deactivated in the
    source since, it ends in the destination too. So a first run may go on beside live traffic, and a second
    one, with the application stopped, brings what has changed.

    What no token carries stays behind: the budgets of attempts and cooldowns begin anew, and tokens that
    overlapped stand alone, each good for its own time.

    Args:
        source: where the tokens are, open. It is only read.
        destination: where they go, open. It may hold other tokens.
        progress: is told how many tokens were copied or compared: in the end, each of the source's twice.
        page: tokens read at once, 1 or more.

    Raises:
        BackendError: one of the stores failed. Start again: what was copied stays.
    """
    inserted = skipped = ended = done = 0
    async for tokens in pages(source, page):
        there = await _there(destination, tokens)
        inserted += await _insert([token for token in tokens if token.id not in there], destination)
        for token in tokens:
            if token.id in there:
                skipped += 1
                ended += await _end_as(destination, token, there[token.id])
        done += len(tokens)
        progress(done)
    found = await _compare(source, destination, lambda compared: progress(done + compared), page)
    return Copied(inserted, skipped, ended, *found)


async def add(backend: TokenBackend, tokens: Iterable[StoredToken], *, progress: Progress = _quiet) -> Added:
    """Store tokens beside those that are there; one whose key or id is taken is skipped.

    Args:
        backend: the store, open.
        tokens: the records, read as they are needed.
        progress: is told how many were stored or skipped.

    Raises:
        BackendError: the store failed. Start again: what was stored stays.
    """
    inserted = done = 0
    left = iter(tokens)
    while some := list(islice(left, PAGE)):
        inserted += await _insert(some, backend)
        done += len(some)
        progress(done)
    return Added(inserted, done - inserted)


async def _there(backend: TokenBackend, tokens: Sequence[StoredToken]) -> dict[str, StoredToken]:
    """Those of the tokens that a store holds, by their ids. Looked up by digest, in one question."""
    found = await backend.find(Match(digests=tuple(token.digest for token in tokens)), len(tokens))
    return {token.id: token for token in found}


async def _insert(tokens: Sequence[StoredToken], backend: TokenBackend) -> int:
    """Store tokens, many at once, and return how many were not there."""
    left = iter(tokens)
    inserted = 0
    failures: list[Exception] = []

    async def work() -> None:
        nonlocal inserted
        for token in left:
            if failures:
                return
            try:
                result = await backend.insert(token, InsertMode.ADD)
            except Exception as error:  # raised below: a task group would wrap it
                failures.append(error)
                return
            inserted += result is InsertResult.INSERTED

    async with anyio.create_task_group() as group:
        for _ in range(min(_AT_ONCE, len(tokens))):
            group.start_soon(work)
    if failures:
        raise failures[0]
    return inserted


async def _end_as(backend: TokenBackend, token: StoredToken, copied: StoredToken) -> bool:
    """Let a copy end as its original has. Only ever in this direction: nothing comes back to life."""
    if not copied.is_active or (token.is_active and token.uses <= copied.uses):
        return False
    match = Match(id=token.id, active=True)
    new_ids = token.use_ids[len(copied.use_ids) :]
    for number in range(token.uses - copied.uses):
        use_id = new_ids[number] if number < len(new_ids) else ""
        await backend.update(match, Use(token.used_at, use_id))
    if not token.is_active:
        await backend.deactivate(match, token.ends_at + 1)
    return True


async def _compare(
    source: TokenBackend, destination: TokenBackend, progress: Progress, page: int
) -> tuple[int, int, int, int, str, str]:
    """Everything of :class:`Copied` from ``tokens`` on."""
    ours, theirs = hashlib.sha256(), hashlib.sha256()
    tokens = missing = different = 0
    async for some in pages(source, page):
        there = await _there(destination, some)
        for token in some:
            ours.update(_bytes(token))
            copied = there.get(token.id)
            if copied is None:
                missing += 1
                continue
            theirs.update(_bytes(copied))
            different += copied != token
        tokens += len(some)
        progress(tokens)
    total = sum(row.total for row in await destination.count(0))
    others = max(0, total - (tokens - missing))
    return tokens, missing, different, others, ours.hexdigest(), theirs.hexdigest()


def _bytes(token: StoredToken) -> bytes:
    """A record in a writing of its own: texts, numbers and bytes only, so ``repr`` is one on every Python."""
    return f"{tuple(token)!r}\n".encode()
