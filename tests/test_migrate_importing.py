"""Imports of another application's tokens: again, interrupted, and of a newer dump."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from vtoken.backend import Inserted, InsertMode, Match, StoredToken, TokenBackend, Use
from vtoken.errors import BackendUnavailable, CorruptStore, InvalidInput
from vtoken.migrate import Imported, import_tokens
from vtoken.migrate.receipts import import_receipt_name
from vtoken_backends.memory import MemoryBackend

from .migrate_tools import HOUR, NOW, opened, token

LATER = NOW + HOUR


async def imported(
    backend: TokenBackend,
    tokens: Iterable[StoredToken],
    *,
    dump: str = "ab",
    source: str = "app",
    **options: Any,
) -> Imported:
    """Import a dump an hour later."""
    return await import_tokens(backend, tokens, source=source, dump=dump, now=LATER, **options)


async def used_and_purged(backend: TokenBackend, stored: StoredToken) -> None:
    await backend.present(Match(digests=(stored.keys[0].digest,)), Use(at=NOW), NOW)
    assert (await backend.purge(NOW, NOW, 10, 0)).tokens == 1


async def ids(backend: TokenBackend) -> set[str]:
    return {stored.id for stored in await backend.find(Match(), 10_000)}


def dumped(count: int) -> list[StoredToken]:
    return [token(n, f"{n}", NOW + n) for n in range(count)]


async def test_tokens_are_stored_beside_those_that_are_there() -> None:
    tokens = dumped(1_200)
    told: list[int] = []
    async with opened("memory://") as backend:
        await backend.insert(tokens[0], InsertMode.ADD)
        assert await imported(backend, iter(tokens), progress=told.append) == Imported(1_199, 1, 0)
        assert await ids(backend) == {stored.id for stored in tokens}
    assert told == [500, 1_000, 1_200]


async def test_nothing_that_ended_here_since_comes_back() -> None:
    tokens = dumped(5)
    async with opened("memory://") as backend:
        await imported(backend, tokens)
        await used_and_purged(backend, tokens[2])
        assert await imported(backend, tokens) == Imported(0, 4, 1)
        newer = [*tokens, token(9, "9", NOW + 9)]
        assert await imported(backend, newer, dump="cd") == Imported(1, 4, 1)
        assert await ids(backend) == {stored.id for stored in newer} - {tokens[2].id}


async def test_another_application_has_a_receipt_of_its_own() -> None:
    async with opened("memory://") as backend:
        await imported(backend, [token(5, created_at=NOW + 5)])
        assert (await imported(backend, [token(1)], source="other")).imported == 1


async def test_what_was_created_in_the_future_does_not_keep_later_tokens_out() -> None:
    async with opened("memory://") as backend:
        await imported(backend, [token(1), token(2, created_at=LATER + 1)])
        assert (await imported(backend, [token(3, created_at=NOW + 1)], dump="cd")).imported == 1


class Fails(MemoryBackend):
    """Stores so many tokens and then loses its connection."""

    left = 600

    async def insert(self, token: StoredToken, mode: InsertMode, **options: Any) -> Inserted:
        if not self.left:
            raise BackendUnavailable("gone")
        self.left -= 1
        return await super().insert(token, mode, **options)


async def test_an_interrupted_import_goes_on_where_it_was() -> None:
    tokens = dumped(800)
    backend = Fails()
    await backend.open()
    with pytest.raises(BackendUnavailable, match="gone"):
        await imported(backend, tokens)
    await used_and_purged(backend, tokens[3])
    backend.left = 10**9
    with pytest.raises(InvalidInput, match="another dump of this source was interrupted"):
        await imported(backend, tokens, dump="cd")
    assert await imported(backend, tokens) == Imported(200, 599, 1)
    assert await ids(backend) == {stored.id for stored in tokens} - {tokens[3].id}
    assert await imported(backend, tokens, dump="cd") == Imported(0, 799, 1)


async def test_an_id_that_another_token_has_drawn_is_drawn_again() -> None:
    theirs = token(1)
    ours = token(2)._replace(id=theirs.id)
    async with opened("memory://") as backend:
        await backend.insert(theirs, InsertMode.ADD)
        assert (await imported(backend, [ours])).imported == 1
        [stored] = await backend.find(Match(digests=(ours.keys[0].digest,)), 1)
        assert stored.id != theirs.id
        assert stored.keys[0].origin == stored.id


async def test_a_damaged_receipt_is_said() -> None:
    async with opened("memory://") as backend:
        await backend.note(import_receipt_name("app"), "nonsense")
        with pytest.raises(CorruptStore, match="receipt"):
            await imported(backend, [])
