"""The cells of PostgreSQL: vtoken, and an application's own calls by psycopg and by asyncpg."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Sequence
from importlib import import_module
from typing import Any, Final

import psycopg
import psycopg_pool

from tests import postgresql_servers as servers
from vtoken.backend import State
from vtoken_backends.postgresql import tables

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

_asyncpg: Any = import_module("asyncpg")  # it has no types

POOL_SIZE: Final = 10
"""Connections of each hand-written contender: the default of asyncpg's pool."""
SCHEMA: Final = (
    """
    CREATE TABLE tokens (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        content_type text NOT NULL, object_id text NOT NULL, slug text NOT NULL,
        digest bytea NOT NULL UNIQUE,
        created_at bigint NOT NULL, expires_at bigint NOT NULL,
        is_active boolean NOT NULL DEFAULT true,
        extra_data text
    )
    """,
    "CREATE UNIQUE INDEX tokens_subject ON tokens (content_type, object_id, slug) WHERE is_active",
    "CREATE INDEX tokens_expiry ON tokens (expires_at)",
)
_COLUMNS: Final = "INSERT INTO tokens (content_type, object_id, slug, digest, created_at, expires_at)"
INSERT: Final = f"{_COLUMNS} VALUES ($1, $2, $3, $4, $5, $6)"
ISSUE: Final = f"""
    WITH replaced AS (
        UPDATE tokens SET is_active = false
        WHERE content_type = $1 AND object_id = $2 AND slug = $3 AND is_active RETURNING 1
    )
    {_COLUMNS}
    SELECT $1, $2, $3, $4::bytea, $5::bigint, $6::bigint FROM (SELECT count(*) FROM replaced) AS first
"""  # noqa: S608  # this module's own text
_FITS: Final = (
    " WHERE digest = $1 AND content_type = $2 AND object_id = $3 AND slug = $4"
    " AND is_active AND expires_at >= $5"
)
CHECK: Final = f"SELECT 1 FROM tokens{_FITS}"  # noqa: S608  # this module's own text
CONSUME: Final = f"UPDATE tokens SET is_active = false{_FITS} RETURNING 1"  # noqa: S608  # likewise


def _new_row(object_id: str, key: str) -> tuple[object, ...]:
    now = now_ms()
    return CONTENT_TYPE, object_id, SLUG, digest_of(key), now, now + DAY_MS


def _fit(object_id: str, key: str) -> tuple[object, ...]:
    return digest_of(key), CONTENT_TYPE, object_id, SLUG, now_ms()


class OneCallEach:
    """What an application writes: a pool, and one statement for each operation, which commits by itself.

    A unique index on the active token of an object refuses an issue that another one was faster than: it is
    made again.

    Args:
        url: with a schema of its own.
    """

    name = ""
    taken: type[Exception]
    """What the driver raises where another issue was faster."""

    def __init__(self, url: str) -> None:
        self._url, _, self._schema = url.partition("?schema=")

    async def open(self) -> None:
        with psycopg.connect(self._url, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {self._schema}".encode())
            connection.execute(f"SET search_path = {self._schema}".encode())
            for statement in SCHEMA:
                connection.execute(statement.encode())
        await self.connect()

    async def connect(self) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError

    async def ask(self, sql: str, values: tuple[object, ...]) -> bool:
        """Run a statement; whether there was a row."""
        raise NotImplementedError

    async def fill(self, object_ids: Sequence[str]) -> list[str]:
        keys = [new_key() for _ in object_ids]
        with psycopg.connect(self._url, cursor_factory=psycopg.RawCursor) as connection:
            connection.execute(f"SET search_path = {self._schema}".encode())
            rows = [_new_row(o, k) for o, k in zip(object_ids, keys, strict=True)]
            connection.cursor().executemany(INSERT.encode(), rows)
        return keys

    async def run(self, ops: Sequence[Op], tasks: int) -> Run:
        return await by_tasks(self, ops, tasks)

    async def rows(self) -> list[Row]:
        sql = f"SELECT object_id, digest, is_active FROM {self._schema}.tokens"  # noqa: S608  # our own text
        return _rows(self._url, sql)

    async def issue(self, object_id: str) -> str:
        key = new_key()
        while True:
            try:
                await self.ask(ISSUE, _new_row(object_id, key))
            except self.taken:
                continue
            return key

    async def check(self, object_id: str, key: str) -> bool:
        return await self.ask(CHECK, _fit(object_id, key))

    async def consume(self, object_id: str, key: str) -> bool:
        return await self.ask(CONSUME, _fit(object_id, key))


class ByPsycopg(OneCallEach):
    name = "psycopg, one call each"
    taken = psycopg.errors.UniqueViolation

    async def connect(self) -> None:
        options = {
            "autocommit": True,
            "cursor_factory": psycopg.AsyncRawCursor,
            "options": f"-c search_path={self._schema}",
        }
        self._pool = psycopg_pool.AsyncConnectionPool(
            self._url, min_size=POOL_SIZE, max_size=POOL_SIZE, timeout=600, kwargs=options, open=False
        )
        await self._pool.open(wait=True)

    async def close(self) -> None:
        await self._pool.close()

    async def ask(self, sql: str, values: tuple[object, ...]) -> bool:
        async with self._pool.connection() as connection:
            cursor = await connection.execute(sql.encode(), values)
            return cursor.description is not None and await cursor.fetchone() is not None


class ByAsyncpg(OneCallEach):
    name = "asyncpg, one call each"
    taken: type[Exception] = _asyncpg.UniqueViolationError

    async def connect(self) -> None:
        self._pool: Any = await _asyncpg.create_pool(
            self._url,
            min_size=POOL_SIZE,
            max_size=POOL_SIZE,
            server_settings={"search_path": self._schema},
        )

    async def close(self) -> None:
        await self._pool.close()

    async def ask(self, sql: str, values: tuple[object, ...]) -> bool:
        return await self._pool.fetchval(sql, *values) is not None


def _rows(url: str, sql: str) -> list[Row]:
    with psycopg.connect(url) as connection:
        found = connection.execute(sql.encode()).fetchall()
    return [Row(object_id, bytes(digest), active) for object_id, digest, active in found]


def vtoken(url: str) -> VToken:
    """vtoken in a schema of its own."""
    server_url, _, schema = url.partition("?schema=")

    async def look() -> list[Row]:
        active, tokens, keys = State.ACTIVE.value, tables.TOKENS.name, tables.KEYS.name
        sql = f"""
            SELECT object_id, digest, state = {active}
            FROM {schema}.{tokens} AS t JOIN {schema}.{keys} AS k ON k.token = t.id
        """  # noqa: S608  # our own text
        return _rows(server_url, sql)

    return VToken(url, look)


class Stores:
    """Who takes part, each time with a fresh schema on one server.

    Args:
        server_url: of a server that flushes its log at each commit.
    """

    def __init__(self, server_url: str) -> None:
        self._server_url = server_url
        self.ours = self._entry("vtoken", vtoken)
        self.psycopg = self._entry(ByPsycopg.name, ByPsycopg)
        self.asyncpg = self._entry(ByAsyncpg.name, ByAsyncpg)

    def _entry(self, name: str, make: Callable[[str], Contender]) -> Entry:
        @contextlib.asynccontextmanager
        async def fresh() -> AsyncGenerator[Contender]:
            with servers.fresh_store(self._server_url) as url:
                async with opened(make(url)) as contender:
                    yield contender

        return Entry(name, fresh)

    def cells(self, full: bool) -> Iterable[tuple[Cell, list[Entry]]]:
        """What is measured, the most important first."""
        everybody = [self.ours, self.psycopg, self.asyncpg]
        for tasks in (256, 1, 16) if full else (256, 1):
            for workload in WORKLOADS:
                yield Cell("postgresql", workload, tasks), everybody
        for tasks in (16, 64) if full else (64,):
            yield Cell("postgresql", "mix", tasks), everybody
        for workload in WORKLOADS if full else ():
            yield Cell("postgresql", workload, 256, "ticker"), everybody


@contextlib.contextmanager
def server() -> Generator[str]:
    """The URL of a declared server, or of one of our own, on whose disk each commit is flushed.

    Raises:
        FileNotFoundError: there is no PostgreSQL here.
    """
    declared = servers.declared_url()
    if declared is not None:
        yield declared
        return
    with servers.PostgreSQL("fsync=on") as own:
        yield own.url
