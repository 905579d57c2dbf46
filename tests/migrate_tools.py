"""Tokens of every kind as they are stored, for the tests that move them."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final

from vtoken.backend import (
    NEVER,
    InsertMode,
    InsertResult,
    State,
    StoredHold,
    StoredKey,
    StoredToken,
    TokenBackend,
)
from vtoken.config import create_backend
from vtoken.migrate.stores import at_once

NOW: Final = 1_700_000_000_000
HOUR: Final = 3_600_000


@asynccontextmanager
async def opened(url: str) -> AsyncGenerator[TokenBackend]:
    """The store of a URL."""
    backend = create_backend(url)
    await backend.open()
    try:
        yield backend
    finally:
        await backend.close()


async def fill(backend: TokenBackend, tokens: Iterable[StoredToken]) -> None:
    """Store tokens as they are."""

    async def store(stored: StoredToken) -> None:
        answer = await backend.insert(stored, InsertMode.ADD)
        assert answer.result is InsertResult.INSERTED, stored

    await at_once(list(tokens), store)


def plain(stored: StoredToken) -> list[tuple[str, object]]:
    """Everything of a token, by name: a key's ``repr`` hides what it is."""
    fields = stored._asdict()
    keys = [sorted(key._asdict().items()) for key in stored.keys]
    holds = [sorted(hold._asdict().items()) for hold in stored.holds]
    return sorted({**fields, "keys": keys, "holds": holds}.items())


def digest(number: int, kind: str = "link") -> bytes:
    return hashlib.sha256(f"{kind} {number}".encode()).digest()


def token(number: int, object_id: str = "1", created_at: int = NOW, **fields: Any) -> StoredToken:
    """A token with a link key, good for an hour."""
    token_id = f"{(created_at << 21) + number:016x}"
    made = StoredToken(
        id=token_id,
        content_type="auth.user",
        object_id=object_id,
        slug="reset",
        context=b"",
        is_beside=False,
        created_at=created_at,
        expires_at=created_at + HOUR,
        ends_at=created_at + HOUR,
        state=State.ACTIVE,
        extra_data=None,
        max_uses=1,
        uses=0,
        used_at=0,
        keys=(key(number, token_id, created_at + HOUR),),
        holds=(),
    )
    return made._replace(**fields)


def key(number: int, origin: str, expires_at: int, kind: str = "link") -> StoredKey:
    return StoredKey(
        digest=digest(number, kind),
        scheme="sha256" if kind == "link" else "code-hmac-sha256",
        secret_id="" if kind == "link" else "s",
        nonce="n" if number % 3 == 0 else "",
        plain_key="",
        kind=kind,
        expires_at=expires_at,
        origin=origin,
    )


def of_every_kind(count: int) -> Iterator[StoredToken]:
    """Tokens of every kind, some made in the same millisecond, oldest first."""
    for number in range(count):
        created_at = NOW + number // 3
        made = token(number, f"ü{number}", created_at, extra_data='{"a": [1]}')
        end = created_at + 2 * HOUR
        link = made.keys[0]
        kinds = (
            made,
            made._replace(expires_at=NEVER, ends_at=NEVER, slug="", max_uses=None, uses=2, used_at=NOW),
            made._replace(state=State.USED, ends_at=NOW - 1, uses=1, used_at=NOW),
            made._replace(state=State.REPLACED, ends_at=NOW - 1, keys=()),
            made._replace(
                keys=(link, key(number, made.id, created_at + 600_000, "code")),
                context=digest(-number - 1),
                is_beside=True,
                extra_data=None,
            ),
            made._replace(
                expires_at=end,
                ends_at=end,
                max_uses=5,
                holds=(StoredHold(hold_id=f"{number:032x}", until=end, use_id="f" * 32, origin=made.id),),
                keys=(link, key(count + number, f"{number:016x}", end)),
            ),
        )
        yield kinds[number % len(kinds)]
