"""Large stores of MongoDB: what an operation costs beside a thousand tokens and beside a million."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from pymongo import MongoClient

from . import mongodb
from .cells import opened
from .figures import Figure
from .ours import VToken
from .scale import SMALL, copies, growth


async def measure_growth(server_url: str, stored: int, rounds: int) -> list[Figure]:
    """As :func:`tests.benchmarks.scale.growth`, on MongoDB."""
    async with _database(server_url, stored) as large:
        return await growth("mongodb", lambda: _database(server_url, SMALL), large, stored, rounds)


@contextlib.asynccontextmanager
async def _database(server_url: str, count: int) -> AsyncGenerator[VToken]:
    async with mongodb.fresh_url(server_url) as url, opened(mongodb.vtoken(url)) as contender:
        await contender.issue("the first")
        with MongoClient[dict[str, Any]](url) as client:
            collection = client.get_default_database()["vtoken"]
            first = collection.find_one() or {}
            for start in range(0, count, 10_000):
                some = copies(start, min(10_000, count - start))
                collection.insert_many(
                    first | {"_id": c.id, "object_id": c.object_id, "digest": c.digest} for c in some
                )
        yield contender
