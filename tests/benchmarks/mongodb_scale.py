"""Large stores of MongoDB: what an operation costs beside a thousand tokens and beside a million."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Final

from pymongo import MongoClient

from vtoken_backends.mongodb.documents import Document, Kept, Stored, line_of, shared_of, stored_of, whole

from . import mongodb
from .cells import opened
from .figures import Figure
from .ours import VToken
from .scale import SMALL, Copy, copies, growth

_CACHES: Final = {"mongodb": 4_000, "mongodb, a cache of a quarter of the store": 256}
"""MiB of the server's cache. A million tokens take a GiB; the servers of the tests have a quarter of that."""


async def measure_growth(server_url: str, stored: int, rounds: int) -> list[Figure]:
    """As :func:`tests.benchmarks.scale.growth`, on MongoDB, with a cache that holds the store and without."""
    figures: list[Figure] = []
    with MongoClient[Document](server_url) as client:

        def set_cache(size: int) -> None:
            client.admin.command("setParameter", 1, wiredTigerEngineRuntimeConfig=f"cache_size={size}M")

        set_cache(max(_CACHES.values()))
        async with _database(server_url, stored) as large:
            for again, (store, size) in enumerate(_CACHES.items()):
                set_cache(size)
                figures += await growth(
                    store, lambda: _database(server_url, SMALL), large, stored, rounds, again=again
                )
    return figures


@contextlib.asynccontextmanager
async def _database(server_url: str, count: int) -> AsyncGenerator[VToken]:
    async with mongodb.fresh_url(server_url) as url, opened(mongodb.vtoken(url)) as contender:
        await contender.issue("the first")
        with MongoClient[Document](url) as client:
            collection = client.get_default_database()["vtoken"]
            first = stored_of(collection.find_one() or {}, is_whole=True).kept
            assert first is not None, "it has the token that was issued"
            for start in range(0, count, 10_000):
                some = copies(start, min(10_000, count - start))
                collection.insert_many(_like(first, copy) for copy in some)
        yield contender


def _like(first: Kept, copy: Copy) -> Document:
    """The document of a copy of a token, in a line of its own."""
    token = first.token
    [key] = token.keys
    key = key._replace(digest=copy.digest, origin=copy.id)
    token = token._replace(id=copy.id, object_id=copy.object_id, keys=(key,))
    line = line_of(token.content_type, token.object_id, token.slug, token.context)
    stored = Stored(shared=shared_of(token), line=line, kept=Kept(token))
    return whole(stored, stored.oid)
