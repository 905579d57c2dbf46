"""Valkey as an application uses it for tokens: ``SET`` with an expiry, ``GET`` and ``GETDEL``.

It keeps one value for each object, so a new token takes the place of the older one. It keeps no history, has
no limits, and its ``GETDEL`` uses the token up before anybody has compared the key.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncGenerator, Generator, Iterable, Sequence
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from .cells import Cell, Entry, opened
from .contender import CONTENT_TYPE, DAY_MS, SLUG, Op, Row, Run, by_tasks, digest_of, new_key
from .sqlite import WORKLOADS

_SERVERS: Final = Path(__file__).parents[2] / "docs/examples/vtoken_valkey/tests/servers.py"
_POOL_SIZE: Final = 64


class SetAndGetDel:
    """One command for each operation, by a pool of connections.

    Args:
        url: of an empty server that writes each command to its disk before it answers.
    """

    name = "Valkey, SET and GETDEL"

    def __init__(self, url: str) -> None:
        self._url = url

    async def open(self) -> None:
        client: Any = import_module("valkey.asyncio")
        pool = client.BlockingConnectionPool.from_url(self._url, max_connections=_POOL_SIZE, timeout=600)
        self._client = client.Valkey(connection_pool=pool)

    async def close(self) -> None:
        await self._client.flushall()
        await self._client.aclose()
        await self._client.connection_pool.disconnect()

    async def fill(self, object_ids: Sequence[str]) -> list[str]:
        keys = [new_key() for _ in object_ids]
        if keys:
            names = [_name(object_id) for object_id in object_ids]
            await self._client.mset(dict(zip(names, map(digest_of, keys), strict=True)))
        return keys

    async def run(self, ops: Sequence[Op], tasks: int) -> Run:
        return await by_tasks(self, ops, tasks)

    async def rows(self) -> list[Row]:
        names = [name async for name in self._client.scan_iter(count=1000)]
        digests = await self._client.mget(names) if names else []
        return [
            Row(name.decode().rpartition("|")[2], digest, is_active=True)
            for name, digest in zip(names, digests, strict=True)
        ]

    async def issue(self, object_id: str) -> str:
        key = new_key()
        await self._client.set(_name(object_id), digest_of(key), px=DAY_MS)
        return key

    async def check(self, object_id: str, key: str) -> bool:
        return bool(await self._client.get(_name(object_id)) == digest_of(key))

    async def consume(self, object_id: str, key: str) -> bool:
        return bool(await self._client.getdel(_name(object_id)) == digest_of(key))


def _name(object_id: str) -> str:
    return f"{CONTENT_TYPE}|{SLUG}|{object_id}"


def cells(url: str, ours: Entry, full: bool) -> Iterable[tuple[Cell, list[Entry]]]:
    """Beside vtoken on its usual store."""

    @contextlib.asynccontextmanager
    async def fresh() -> AsyncGenerator[SetAndGetDel]:
        async with opened(SetAndGetDel(url)) as contender:
            yield contender

    both = [ours, Entry(SetAndGetDel.name, fresh, keeps_ended=False)]
    for tasks in (256, 1, 16) if full else (256, 1):
        for workload in WORKLOADS:
            yield Cell("valkey", workload, tasks), both


def absent() -> list[str]:
    """Why Valkey cannot take part here."""
    return (
        [] if find_spec("valkey") else ['Valkey: its client is not installed (pip install "vtoken[bench]")']
    )


@contextlib.contextmanager
def server() -> Generator[str]:
    """The URL of a server of our own, as the example of a custom backend starts it.

    Raises:
        FileNotFoundError: there is no Valkey server here.
    """
    with _servers().Server() as own:
        yield own.url


def _servers() -> ModuleType:
    spec = spec_from_file_location("vtoken_valkey_servers", _SERVERS)
    assert spec is not None, "it is a Python file"
    assert spec.loader is not None, "it is a Python file"
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
