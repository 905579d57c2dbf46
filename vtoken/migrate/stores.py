"""Reading a whole store, and inserting many tokens at once: in pages, so that memory stays flat."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Final, TypeVar

import anyio

from vtoken.backend import Match, StoredToken, TokenBackend

T = TypeVar("T")

PAGE: Final = 2_500
"""Tokens that are read, looked up and inserted at once, at most. With 500 a copy took a quarter more
processor time, with 5,000 no less."""
_FIRST_PAGE: Final = 250
_PAGE_BYTES: Final = 4 << 20
"""About how large a page may be. How many tokens that are is told by the page before."""
_RECORD_BYTES: Final = 1 << 10
"""What a token without extra data comes to, roughly."""
_AT_ONCE: Final = 256
"""Concurrent calls: as many as a backend that batches them takes at once."""

Progress = Callable[[int], object]
"""Is told how many tokens are done, from time to time."""


def quiet(done: int) -> None:
    """Show no progress."""


async def pages(
    backend: TokenBackend, size: int = PAGE, after: str | None = None
) -> AsyncIterator[list[StoredToken]]:
    """The records of a store, newest first, in lists of at most ``size`` tokens and some megabytes.

    Tokens that are inserted or deleted meanwhile may be among them or not.

    Args:
        backend: the store, open.
        size: how many records are read at once, at most.
        after: the ``id`` after which to begin; None for all.
    """
    limit = min(_FIRST_PAGE, size)
    while page := await backend.find(Match(), limit, after):
        yield page
        if len(page) < limit:
            return
        after = page[-1].id
        average = sum(_size(token) for token in page) // len(page)
        limit = max(1, min(size, 2 * limit, _PAGE_BYTES // average))


def _size(token: StoredToken) -> int:
    return _RECORD_BYTES + len(token.extra_data or "")


async def at_once(items: Sequence[T], work: Callable[[T], Awaitable[object]]) -> None:
    """Do the same with every item, many at a time. The first error ends it and is raised as it is."""
    left = iter(items)
    failures: list[Exception] = []

    async def worker() -> None:
        for item in left:
            if failures:
                return
            try:
                await work(item)
            except Exception as error:  # raised below: a task group would wrap it
                failures.append(error)
                return

    async with anyio.create_task_group() as group:
        for _ in range(min(_AT_ONCE, len(items))):
            group.start_soon(worker)
    if failures:
        raise failures[0]


async def found_by_key(backend: TokenBackend, tokens: Sequence[StoredToken]) -> dict[str, StoredToken]:
    """Those of some tokens that a store holds, by their ids: looked up by all of their keys in one
    question."""
    digests = tuple(key.digest for token in tokens for key in token.keys)
    if not digests:
        return {}
    wanted = {token.id for token in tokens}
    return {
        found.id: found
        for found in await backend.find(Match(digests=digests), len(digests))
        if found.id in wanted
    }


async def found_by_id(backend: TokenBackend, tokens: Sequence[StoredToken]) -> dict[str, StoredToken]:
    """The same, looked up by their ids, one by one: for tokens that may have lost their keys to newer
    ones."""
    found: dict[str, StoredToken] = {}

    async def look_up(token: StoredToken) -> None:
        for stored in await backend.find(Match(id=token.id), 1):
            found[stored.id] = stored

    await at_once(tokens, look_up)
    return found
