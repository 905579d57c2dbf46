"""The cells of MongoDB: vtoken, and an application's own calls by Motor and by PyMongo."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Sequence
from inspect import isawaitable
from typing import Any, Final
from uuid import uuid4

from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import AsyncMongoClient, IndexModel, MongoClient
from pymongo.errors import DuplicateKeyError
from pymongo.write_concern import WriteConcern

from tests import servers
from vtoken.backend import State

from .cells import Cell, Entry, opened
from .contender import (
    CONTENT_TYPE,
    DAY_MS,
    SLUG,
    Contender,
    Op,
    Row,
    Run,
    by_tasks,
    digest_of,
    new_key,
    now_ms,
)
from .ours import VToken
from .sqlite import WORKLOADS

_INDEXES: Final = (
    IndexModel({"digest": 1}, unique=True),
    IndexModel(
        {"content_type": 1, "object_id": 1, "slug": 1},
        unique=True,
        partialFilterExpression={"is_active": True},
    ),
    IndexModel({"expires_at": 1}),
)


class OneCallEach:
    """What an application writes: one call for each operation, two to issue.

    A unique index on the active token of an object makes up for the two: where another one was
    faster, both are made again.

    Args:
        name: of the driver.
        client: the driver's class.
        url: with a database of its own.
    """

    def __init__(self, name: str, client: Callable[..., Any], url: str) -> None:
        self.name = name
        self._url = url
        self._client_class = client

    async def open(self) -> None:
        self._client = self._client_class(self._url)
        self._tokens = self._client.get_default_database().get_collection(
            "tokens", write_concern=WriteConcern("majority", j=True)
        )
        await self._tokens.create_indexes(list(_INDEXES))

    async def close(self) -> None:
        closing = self._client.close()
        if isawaitable(closing):  # PyMongo's, not Motor's
            await closing

    async def fill(self, object_ids: Sequence[str]) -> list[str]:
        keys = [new_key() for _ in object_ids]
        if keys:
            documents = [_document(o, k) for o, k in zip(object_ids, keys, strict=True)]
            await self._tokens.insert_many(documents)
        return keys

    async def run(self, ops: Sequence[Op], tasks: int) -> Run:
        return await by_tasks(self, ops, tasks)

    async def rows(self) -> list[Row]:
        with MongoClient[dict[str, Any]](self._url) as client:
            found = list(client.get_default_database()["tokens"].find())
        return [Row(row["object_id"], bytes(row["digest"]), row["is_active"]) for row in found]

    async def issue(self, object_id: str) -> str:
        key = new_key()
        active = {"content_type": CONTENT_TYPE, "object_id": object_id, "slug": SLUG, "is_active": True}
        while True:
            await self._tokens.update_many(active, {"$set": {"is_active": False}})
            try:
                await self._tokens.insert_one(_document(object_id, key))
            except DuplicateKeyError:  # of another issue in between
                continue
            return key

    async def check(self, object_id: str, key: str) -> bool:
        return await self._tokens.find_one(_fits(object_id, key), {"_id": 1}) is not None

    async def consume(self, object_id: str, key: str) -> bool:
        result = await self._tokens.update_one(_fits(object_id, key), {"$set": {"is_active": False}})
        return bool(result.modified_count)


def _document(object_id: str, key: str) -> dict[str, Any]:
    now = now_ms()
    return {
        "content_type": CONTENT_TYPE,
        "object_id": object_id,
        "slug": SLUG,
        "digest": digest_of(key),
        "created_at": now,
        "expires_at": now + DAY_MS,
        "is_active": True,
    }


def _fits(object_id: str, key: str) -> dict[str, Any]:
    return {
        "digest": digest_of(key),
        "content_type": CONTENT_TYPE,
        "object_id": object_id,
        "slug": SLUG,
        "is_active": True,
        "expires_at": {"$gte": now_ms()},
    }


def vtoken(url: str) -> VToken:
    """vtoken on a database of its own."""

    async def look() -> list[Row]:
        with MongoClient[dict[str, Any]](url) as client:
            lines = list(client.get_default_database()["vtoken"].find())
        tokens = {
            token["id"]: (line["object_id"], token)
            for line in lines
            for token in (*([line["token"]] if "token" in line else []), *line.get("former", ()))
        }
        return [
            Row(object_id, bytes(key["digest"]), token["state"] == State.ACTIVE.value)
            for object_id, token in tokens.values()
            for key in token["keys"]
        ]

    return VToken(url, look)


class Stores:
    """Who takes part, each time with a fresh database on one server.

    Args:
        server_url: a replica set.
    """

    def __init__(self, server_url: str) -> None:
        self._server_url = server_url
        self.ours = self._entry("vtoken", vtoken)
        self.motor = self._by_hand("Motor, one call each", AsyncIOMotorClient)
        self.pymongo = self._by_hand("PyMongo async, one call each", AsyncMongoClient)

    def _by_hand(self, name: str, client: Callable[..., Any]) -> Entry:
        return self._entry(name, lambda url: OneCallEach(name, client, url))

    def _entry(self, name: str, make: Callable[[str], Contender]) -> Entry:
        @contextlib.asynccontextmanager
        async def fresh() -> AsyncGenerator[Contender]:
            async with fresh_url(self._server_url) as url, opened(make(url)) as contender:
                yield contender

        return Entry(name, fresh)

    def cells(self, full: bool) -> Iterable[tuple[Cell, list[Entry]]]:
        """What is measured, the most important first."""
        everybody = [self.ours, self.motor, *[self.pymongo] * full]
        for tasks in (256, 1, 16) if full else (256, 1):
            for workload in WORKLOADS:
                yield Cell("mongodb", workload, tasks), everybody
        for tasks in (1, 16, 64, 256) if full else (16, 64):
            yield Cell("mongodb", "mix", tasks), everybody
        for workload in WORKLOADS if full else ():
            yield Cell("mongodb", workload, 256, "busy loop"), [self.ours, self.motor]
            yield Cell("mongodb", workload, 256, "ticker"), [self.ours, self.motor]


@contextlib.asynccontextmanager
async def fresh_url(server_url: str) -> AsyncGenerator[str]:
    """A URL with a database of its own, which is dropped afterwards."""
    url = servers.with_database(server_url, f"vtoken_benchmark_{uuid4().hex}")
    try:
        yield url
    finally:
        with MongoClient[dict[str, Any]](url) as client:
            client.drop_database(client.get_default_database().name)


@contextlib.contextmanager
def server() -> Generator[str]:
    """The URL of a replica set of one node: a declared one, or one of our own.

    Raises:
        FileNotFoundError: there is no mongod here.
    """
    declared = servers.declared_url()
    if declared is not None:
        yield declared
        return
    with servers.start_mongod("benchmarks") as own:
        yield own.url
