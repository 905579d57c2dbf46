"""What the tests of the SQLite backend share."""

# looking at a small file is no wait to speak of
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sqlite3
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Generator
from pathlib import Path
from typing import TypeVar

from vtoken.backend import (
    InsertMode,
    InsertResult,
    Match,
    Outcome,
    State,
    StoredKey,
    StoredToken,
    TokenBackend,
    Use,
)
from vtoken_backends.sqlite import SQLiteBackend
from vtoken_backends.sqlite.steps import Rows

B = TypeVar("B", bound=TokenBackend)
NOW = 1_700_000_000_000


def digest(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def key(number: int, token_id: str, expires_at: int, kind: str = "link") -> StoredKey:
    return StoredKey(
        digest=digest(number),
        scheme="sha256",
        secret_id="",
        nonce="",
        plain_key="",
        kind=kind,
        expires_at=expires_at,
        origin=token_id,
    )


def token(number: int, object_id: str = "1", created_at: int = NOW) -> StoredToken:
    token_id = f"{number:016x}"
    return StoredToken(
        id=token_id,
        content_type="auth.user",
        object_id=object_id,
        slug="reset",
        context=b"",
        is_beside=False,
        created_at=created_at,
        expires_at=created_at + 1000,
        ends_at=created_at + 1000,
        state=State.ACTIVE,
        extra_data=None,
        max_uses=1,
        uses=0,
        used_at=0,
        keys=(key(number, token_id, created_at + 1000),),
        holds=(),
    )


async def insert(
    backend: TokenBackend, new: StoredToken, mode: InsertMode = InsertMode.ADD, keep_until: int = 0
) -> InsertResult:
    """How an insert ends."""
    return (await backend.insert(new, mode, keep_until=keep_until)).result


async def use(backend: TokenBackend, key: Match, at: int = NOW, use_id: str = "") -> StoredToken | None:
    """The token that a key was used for, as it is then, or None where it was refused."""
    presented = await backend.present(key, Use(at=at, use_id=use_id), at)
    return presented.token if presented.outcome is Outcome.RIGHT else None


def present(number: int, object_id: str | None = "1") -> Match:
    """What a request that presents the key of a token asks for."""
    return Match(digests=(digest(number),), content_type="auth.user", object_id=object_id, slug="reset")


def subject(object_id: str = "1") -> Match:
    return Match(content_type="auth.user", object_id=object_id, slug="reset", active=True)


@contextlib.asynccontextmanager
async def opened(backend: B) -> AsyncGenerator[B]:
    await backend.open()
    try:
        yield backend
    finally:
        await backend.close()


@contextlib.contextmanager
def plain(path: Path) -> Generator[sqlite3.Connection]:
    """A second program on the same file, which does not wait for anybody."""
    with contextlib.closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as database:
        yield database


async def make_store(path: Path, tokens: int = 0) -> None:
    async with opened(SQLiteBackend(path, synchronous="normal")) as backend:
        for number in range(tokens):
            await insert(backend, token(number, str(number)))


def beside(path: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in path.parent.iterdir()}


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-W",
            "always",
            "-c",
            script.replace("{path!r}", repr(sys.path)),
            *map(str, arguments),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


async def no_more_than(most: int, count: Callable[[], int]) -> None:
    """Threads that were told to end are waited for, by a deadline that only a failure meets."""
    async with asyncio.timeout(60):
        while count() > most:  # noqa: ASYNC110  # threads set no event when they end
            await asyncio.sleep(0.01)


async def ask(backend: SQLiteBackend, sql: str) -> Rows:
    """Have the connection that writes answer: its settings can be seen from nowhere else."""
    connections = backend._opened()
    return await connections.write(lambda database: Rows(database.execute(sql).fetchall())).result
