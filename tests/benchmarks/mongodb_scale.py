"""Large stores of MongoDB: what an operation costs beside a thousand tokens and beside a million."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

from pymongo import MongoClient

from vtoken_backends.mongodb.documents import Document, id_name, line_of, object_of

from . import mongodb
from .cells import opened
from .figures import Figure
from .ours import VToken
from .scale import SMALL, Copy, copies, growth


async def measure_growth(server_url: str, stored: int, rounds: int) -> list[Figure]:
    """As :func:`tests.benchmarks.scale.growth`, on MongoDB."""
    async with _database(server_url, stored) as large:
        return await growth("mongodb", lambda: _database(server_url, SMALL), large, stored, rounds)


@contextlib.asynccontextmanager
async def _database(server_url: str, count: int) -> AsyncGenerator[VToken]:
    async with mongodb.fresh_url(server_url) as url, opened(mongodb.vtoken(url)) as contender:
        await contender.issue("the first")
        with MongoClient[Document](url) as client:
            collection = client.get_default_database()["vtoken"]
            first = collection.find_one() or {}
            first.pop("_id")
            for start in range(0, count, 10_000):
                some = copies(start, min(10_000, count - start))
                collection.insert_many(_like(first, copy) for copy in some)
        yield contender


def _like(first: Document, copy: Copy) -> Document:
    """The document of a copy of the one token in a line."""
    line = line_of(first["content_type"], copy.object_id, first["slug"], first.get("context", b""))
    key = first["token"]["keys"][0] | {"digest": copy.digest, "origin": copy.id}
    return first | {
        "names": [line, copy.digest, id_name(copy.id)],
        "line": line,
        "object": object_of(first["content_type"], copy.object_id),
        "object_id": copy.object_id,
        "token": first["token"] | {"id": copy.id, "keys": [key]},
    }
