"""What the tests of the MongoDB backend share."""

from __future__ import annotations

import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

import pytest
from pymongo import MongoClient
from pymongo.collection import Collection
from pymongo.monitoring import CommandListener, CommandStartedEvent

from vtoken.backend import (
    Hold,
    Inserted,
    InsertMode,
    Match,
    Presented,
    State,
    StoredKey,
    StoredToken,
    TokenBackend,
    Use,
)
from vtoken.errors import BackendError
from vtoken_backends.mongodb import MongoDBBackend
from vtoken_backends.mongodb.lines import Documents as Read
from vtoken_backends.mongodb.writes import Writes, Written

from . import servers

NOW: Final = 1_700_000_000_000
LATER: Final = NOW + 60_000
END: Final = NOW + 3_600_000
ADD, REPLACE, IF_NONE_VALID = InsertMode.ADD, InsertMode.REPLACE, InsertMode.IF_NONE_VALID
Documents = Collection[dict[str, Any]]


def id_of(number: int) -> str:
    return f"{number:016x}"


def digest_of(number: int) -> bytes:
    return number.to_bytes(32, "big")


def token(number: int, **fields: Any) -> StoredToken:
    """A record of the id and the digest of that number; ``key`` has fields of its key."""
    key = StoredKey(
        digest=digest_of(number),
        scheme="sha256",
        secret_id="",
        nonce="",
        plain_key="",
        kind="link",
        expires_at=END,
        origin=id_of(number),
    )
    key = key._replace(**fields.pop("key", {}))
    record = StoredToken(
        id=id_of(number),
        content_type="auth.user",
        object_id="42",
        slug="reset",
        context=b"",
        is_beside=False,
        created_at=NOW + number,
        expires_at=END,
        ends_at=END,
        state=State.ACTIVE,
        extra_data=None,
        max_uses=1,
        uses=0,
        used_at=0,
        keys=(key,),
        holds=(),
    )
    return record._replace(**fields)


def of(number: int, **fields: Any) -> StoredToken:
    """A token of that number, and of the object of that number."""
    return token(number, **{"object_id": str(number), **fields})


def key(number: int) -> Match:
    return Match(digests=(digest_of(number),))


async def insert(
    backend: TokenBackend, record: StoredToken, mode: InsertMode = REPLACE, **options: Any
) -> Inserted:
    return await backend.insert(record._replace(is_beside=mode is ADD), mode, **options)


async def use(backend: TokenBackend, number: int, use_id: str = "", at: int = LATER) -> Presented:
    return await backend.present(key(number), Use(at, use_id), at)


async def hold(backend: TokenBackend, number: int, hold_id: str) -> Presented:
    return await backend.present(key(number), Hold(hold_id, LATER + 1000), LATER)


async def active(backend: TokenBackend) -> list[int]:
    """The numbers of the active tokens, newest first."""
    return [int(found.id, 16) for found in await backend.find(Match(active=True), 1000)]


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


class Commands(CommandListener):
    """The commands that a client sent."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.write_concerns: list[tuple[str, Any]] = []
        self.limits: list[tuple[str, Any]] = []

    def started(self, event: CommandStartedEvent) -> None:
        self.sent.append(event.command_name)
        self.limits.append((event.command_name, event.command.get("maxTimeMS")))
        if event.command_name in {"insert", "update", "delete", "findAndModify"}:
            self.write_concerns.append((event.command_name, event.command.get("writeConcern")))

    def succeeded(self, event: object) -> None: ...

    def failed(self, event: object) -> None: ...


@contextmanager
def failing(url: str, times: int, *commands: str, **data: Any) -> Generator[None]:
    """Let the server fail these commands so many times."""
    if servers.declared_url():
        pytest.skip(f"{servers.DECLARED_URL} names a server that may not have fail points")
    with MongoClient[Any](url) as client:
        point = {"configureFailPoint": "failCommand"}
        data = {"failCommands": list(commands), **data}
        client.admin.command({**point, "mode": {"times": times}, "data": data})
        try:
            yield
        finally:
            client.admin.command({**point, "mode": "off"})


def locals_of(error: BaseException) -> str:
    """The locals of the backend's frames, as a reporter would show them."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [frame for frame in frames if "vtoken_backends" in frame.f_code.co_filename]
    assert ours
    return repr([frame.f_locals for frame in ours])


class Died(BackendError):
    """The process has died before a write."""


def before_write(monkeypatch: pytest.MonkeyPatch, number: int, do: Callable[[], Awaitable[object]]) -> None:
    """Have something done before a write, the first being 1."""
    write, writes = Writes.write, 0

    async def write_later(self: Writes, read: Read, **options: Any) -> Written:
        nonlocal writes
        writes += any(stored.edits for stored in read.all.values())
        if writes == number:
            monkeypatch.setattr(Writes, "write", write)
            await do()
        return await write(self, read, **options)

    monkeypatch.setattr(Writes, "write", write_later)
