"""Making and checking the tables."""

from __future__ import annotations

from typing import Final

from vtoken.errors import BackendError, CorruptStore
from vtoken_backends.postgresql.statements import Statement
from vtoken_backends.postgresql.store import Connection
from vtoken_backends.postgresql.tables import RELATIONS, SCHEMA, TABLES, VERSION, ddl, number, quoted

MIGRATIONS: Final[dict[int, tuple[str, ...]]] = {}
"""For each older number of the schema the statements that lead to the next; ``@`` is the quoted schema."""

UNNUMBERED: Final = 0
"""Tables of the present shape that the application's own migrations made, which fill none."""

# Two processes that open a store for the first time make its tables one after the other.
_LOCK: Final = "SELECT pg_advisory_xact_lock(hashtextextended('vtoken/' || $1::text, 0))"
_FOUND: Final = """
SELECT c.relname::text, a.attname::text
FROM pg_class AS c
JOIN pg_namespace AS n ON n.oid = c.relnamespace
JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE n.nspname = $1::text AND c.relname = ANY ($2::text[])
"""


async def prepare(connection: Connection, schema: str) -> None:
    """Make the tables where there are none, bring them to the present shape, or check that they have it.

    Raises:
        CorruptStore: tables of these names are there that are not ours, or some are gone.
        BackendError: the database has another encoding, or the store a newer schema.
    """
    [(encoding,)] = await connection.fetch(Statement("SELECT current_setting('server_encoding')"))
    if encoding != "UTF8":
        raise BackendError(f"the PostgreSQL database has the encoding {encoding}: vtoken needs UTF8")
    if await _version(connection, schema) == SCHEMA:
        await check(connection, schema)
        return
    await connection.fetch_all([connection.begin, Statement(_LOCK, [schema])])
    version = await _version(connection, schema)
    if version is None:
        await _create(connection, schema)
    elif version == UNNUMBERED:
        await check(connection, schema)
        await connection.fetch(Statement(number(schema)))
    elif version < SCHEMA:  # otherwise another one that opened it was quicker
        for older in range(version, SCHEMA):
            for text in MIGRATIONS[older]:
                await connection.fetch(Statement(text.replace("@", quoted(schema))))
        await connection.fetch(Statement(number(schema)))
    await connection.fetch(connection.commit)
    await check(connection, schema)


async def check(connection: Connection, schema: str) -> None:
    """See whether all tables, their columns and indexes are there."""
    found = await _columns(connection, schema, list(RELATIONS))
    gone = [name for name in RELATIONS if name not in found]
    gone += [
        f"{table.name}.{column.name}"
        for table in TABLES
        for column in table.columns
        if column.name not in found.get(table.name, {column.name})
    ]
    if gone:
        raise CorruptStore(f"the PostgreSQL schema {schema!r} has no {', '.join(gone)}")


async def _columns(connection: Connection, schema: str, relations: list[str]) -> dict[str, set[str]]:
    """The columns of those of some tables and indexes that are there."""
    found: dict[str, set[str]] = {}
    for name, column in await connection.fetch(Statement(_FOUND, [schema, relations])):
        found.setdefault(name, set()).add(column)
    return found


async def _version(connection: Connection, schema: str) -> int | None:
    """The number of the store's schema, or None where there is no store."""
    found = await _columns(connection, schema, [table.name for table in TABLES])
    if not found:
        return None
    if "version" not in found.get(VERSION.name, ()):
        raise CorruptStore(
            f"the PostgreSQL schema {schema!r} has tables of vtoken's names that vtoken did not make:"
            f" {', '.join(sorted(found))}"
        )
    text = f"SELECT max(version) FROM {quoted(schema)}.{VERSION.name}"  # noqa: S608  # our own names
    version: int | None
    [(version,)] = await connection.fetch(Statement(text))
    if version is None:
        return UNNUMBERED
    if version > SCHEMA:
        raise BackendError(
            f"the store has schema {version}, and this vtoken knows {SCHEMA} at most: update vtoken"
        )
    return version


async def _create(connection: Connection, schema: str) -> None:
    there = await connection.fetch(Statement("SELECT FROM pg_namespace WHERE nspname = $1::text", [schema]))
    if not there:
        await connection.fetch(Statement(f"CREATE SCHEMA {quoted(schema)}"))
    for text in ddl(schema):
        await connection.fetch(Statement(text))
