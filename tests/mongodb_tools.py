"""What the tests of the MongoDB backend share."""

from __future__ import annotations

import traceback
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

from pymongo import MongoClient
from pymongo.collection import Collection

from vtoken.backend import InsertMode, Match, StoredToken
from vtoken_backends.mongodb import MongoDBBackend

NOW: Final = 1_700_000_000_000
LATER: Final = NOW + 60_000
ADD, REPLACE, IF_NONE_VALID = InsertMode.ADD, InsertMode.REPLACE, InsertMode.IF_NONE_VALID
Documents = Collection[dict[str, Any]]


def token(number: int, **fields: Any) -> StoredToken:
    """A record of the id and the digest of that number."""
    record = StoredToken(
        id=f"{number:032x}",
        content_type="auth.user",
        object_id="42",
        slug="reset",
        digest=number.to_bytes(32, "big"),
        scheme="sha256",
        secret_id="",
        plain_key="",
        nonce="",
        context=b"",
        created_at=NOW + number,
        expires_at=NOW + 3_600_000,
        ends_at=NOW + 3_600_000,
        is_active=True,
        extra_data=None,
        max_uses=1,
        uses=0,
        used_at=0,
        use_ids=(),
        lease_id="",
        lease_until=0,
    )
    return record._replace(**fields)


def valid(number: int) -> Match:
    return Match(digests=(number.to_bytes(32, "big"),), valid_at=LATER)


async def active(backend: MongoDBBackend) -> list[int]:
    """The numbers of the active tokens, newest first."""
    return [int(found.id, 16) for found in await backend.find(Match(active=True), 100)]


@asynccontextmanager
async def opened(url: str, driver: str = "pymongo", **options: Any) -> AsyncGenerator[MongoDBBackend]:
    backend = MongoDBBackend.from_url(url, driver=driver, **options)
    await backend.open()
    try:
        yield backend
    finally:
        await backend.close()


@contextmanager
def documents(url: str) -> Generator[Documents]:
    """The stored documents, past the backend."""
    with MongoClient[dict[str, Any]](url) as client:
        yield client.get_default_database()["vtoken"]


def locals_of(error: BaseException) -> str:
    """The locals of the backend's frames, as a reporter would show them."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [frame for frame in frames if "vtoken_backends" in frame.f_code.co_filename]
    assert ours
    return repr([frame.f_locals for frame in ours])
