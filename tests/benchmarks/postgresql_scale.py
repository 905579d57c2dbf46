"""Large stores of PostgreSQL: what an operation costs beside a thousand tokens and beside many more."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

import psycopg

from tests import postgresql_servers as servers
from vtoken.backend import StoredToken
from vtoken_backends.postgresql.rows import to_json, to_token, token_row
from vtoken_backends.postgresql.tables import KEYS, TOKENS

from . import postgresql
from .cells import opened
from .figures import Figure
from .ours import VToken
from .scale import SMALL, Copy, copies, growth

_FIRST = f"SELECT row_to_json(t)::text FROM {TOKENS.name} AS t"  # noqa: S608  # our own names
_FILL = f"""
WITH tokens AS (
    INSERT INTO {TOKENS.name} SELECT * FROM json_populate_recordset(NULL::{TOKENS.name}, $1::text::json)
    RETURNING id, keys
)
INSERT INTO {KEYS.name} (digest, token, origin)
SELECT decode(keys -> 0 ->> 'digest', 'hex'), id, id FROM tokens
"""  # noqa: S608  # likewise


async def measure_growth(server_url: str, stored: int, rounds: int) -> list[Figure]:
    """As :func:`tests.benchmarks.scale.growth`, on PostgreSQL."""
    async with _schema(server_url, stored) as large:
        return await growth("postgresql", lambda: _schema(server_url, SMALL), large, stored, rounds)


@contextlib.asynccontextmanager
async def _schema(server_url: str, count: int) -> AsyncGenerator[VToken]:
    with servers.fresh_store(server_url) as url:
        async with opened(postgresql.vtoken(url)) as contender:
            await contender.issue("the first")
            _fill(server_url, url.rpartition("=")[2], count)
            yield contender


def _fill(server_url: str, schema: str, count: int) -> None:
    """Add copies of the one token that is stored, each in a line of its own, and collect statistics, as the
    server does by itself after a while."""
    with psycopg.connect(server_url, autocommit=True, cursor_factory=psycopg.RawCursor) as connection:
        connection.execute(f"SET search_path = {schema}".encode())
        [row] = connection.execute(_FIRST.encode()).fetchall()
        first = to_token(row[0])
        for start in range(0, count, 10_000):
            some = copies(start, min(10_000, count - start))
            rows = [token_row(_like(first, copy), was_added=False) for copy in some]
            connection.execute(_FILL.encode(), [to_json(rows)])
        connection.execute(f"VACUUM ANALYZE {TOKENS.name}, {KEYS.name}".encode())


def _like(first: StoredToken, copy: Copy) -> StoredToken:
    [key] = first.keys
    key = key._replace(digest=copy.digest, origin=copy.id)
    return first._replace(id=copy.id, object_id=copy.object_id, keys=(key,))
