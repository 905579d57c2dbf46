"""The tables: what opening makes, what migrations make, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata, produce_migrations
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.operations.ops import ModifyTableOps

from tests import postgresql_servers as servers
from tests.cli_tools import Terminal
from tests.postgresql_random import Calls
from vtoken.backend import InsertMode, Match, Outcome, Presented, StoredToken, Use
from vtoken.diagnostics import diagnostics_of
from vtoken.errors import BackendError, BackendUnavailable, ConfigurationError, CorruptStore
from vtoken.migrate.tables import metadata
from vtoken.testing.harness import NOW, a_token
from vtoken_backends.postgresql import PostgreSQLBackend, schema, tables
from vtoken_backends.postgresql.tables import TABLES, ddl

_SHAPE = """
SELECT 'column', c.relname::text, a.attname::text, format_type(a.atttypid, a.atttypmod),
    a.attnotnull::text, coalesce(l.collname::text, '')
FROM pg_class AS c
JOIN pg_namespace AS n ON n.oid = c.relnamespace
JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0
LEFT JOIN pg_collation AS l ON l.oid = a.attcollation
WHERE n.nspname = %(schema)s AND c.relkind = 'r'
UNION ALL
SELECT 'index', tablename::text, indexname::text, replace(indexdef, %(schema)s, ''), '', ''
FROM pg_indexes WHERE schemaname = %(schema)s
ORDER BY 1, 2, 3
"""


class Store(NamedTuple):
    server: str
    schema: str

    @property
    def url(self) -> str:
        return servers.with_schema(self.server, self.schema)

    def execute(self, text: str) -> None:
        with psycopg.connect(self.server, autocommit=True) as connection:
            connection.execute(text.replace("@", f'"{self.schema}"').encode())

    def shape(self) -> list[Any]:
        with psycopg.connect(self.server) as connection:
            return connection.execute(_SHAPE, {"schema": self.schema}).fetchall()


@pytest.fixture
def store() -> Iterator[Store]:
    made = Store(servers.shared_url(), servers.new_schema())
    yield made
    servers.drop_schema(made.server, made.schema)


async def opened(store: Store) -> PostgreSQLBackend:
    backend = PostgreSQLBackend.from_url(store.url)
    await backend.open()
    return backend


async def test_the_ddl_makes_what_opening_makes(store: Store) -> None:
    await (await opened(store)).close()
    made = store.shape()
    assert {row[1] for row in made} == {table.name for table in TABLES}
    store.execute("DROP SCHEMA @ CASCADE; CREATE SCHEMA @")
    for statement in diagnostics_of(store.url).ddl():
        store.execute(statement)
    assert store.shape() == made
    await (await opened(store)).close()


async def test_init_prints_what_opening_makes(store: Store, vtoken: Terminal) -> None:
    await (await opened(store)).close()
    made = store.shape()
    store.execute("DROP SCHEMA @ CASCADE; CREATE SCHEMA @")
    assert await asyncio.to_thread(vtoken, "init", "--sql", "--url", store.url) == 0
    store.execute(vtoken.out)
    assert store.shape() == made
    await (await opened(store)).close()


async def test_the_metadata_makes_what_opening_makes(store: Store) -> None:
    await (await opened(store)).close()
    made = store.shape()
    store.execute("DROP SCHEMA @ CASCADE; CREATE SCHEMA @")
    engine = sa.create_engine(store.server.replace("postgresql://", "postgresql+psycopg://"))
    metadata(store.url).create_all(engine)
    engine.dispose()
    assert store.shape() == made
    backend = await opened(store)
    await backend.insert(a_token(), InsertMode.REPLACE)
    await backend.close()


@contextmanager
def alembic(store: Store) -> Generator[MigrationContext]:
    def is_of_the_store(name: str | None, kind: str, _: object) -> bool:
        return kind != "schema" or name == store.schema

    engine = sa.create_engine(store.server.replace("postgresql://", "postgresql+psycopg://"))
    try:
        with engine.begin() as connection:
            opts = {"include_schemas": True, "include_name": is_of_the_store}
            yield MigrationContext.configure(connection, opts=opts)
    finally:
        engine.dispose()


async def test_alembic_finds_nothing_to_migrate(store: Store) -> None:
    await (await opened(store)).close()
    with alembic(store) as context:
        assert compare_metadata(context, metadata(store.url)) == []


async def test_alembics_migration_makes_what_opening_makes(store: Store) -> None:
    await (await opened(store)).close()
    made = store.shape()
    store.execute("DROP SCHEMA @ CASCADE; CREATE SCHEMA @")
    with alembic(store) as context:
        upgrade = produce_migrations(context, metadata(store.url)).upgrade_ops
        assert upgrade is not None
        for step in upgrade.ops:
            for operation in step.ops if isinstance(step, ModifyTableOps) else [step]:
                Operations(context).invoke(operation)
    assert store.shape() == made
    await (await opened(store)).close()


def test_a_store_without_tables_has_no_metadata() -> None:
    with pytest.raises(ConfigurationError, match="does not describe its tables"):
        metadata("memory://")


def test_every_field_of_a_token_has_a_column() -> None:
    assert {column.name for column in TABLES[0].columns} == {*StoredToken._fields, "was_added"}


async def test_many_that_open_a_new_store_at_once_make_it_once(store: Store) -> None:
    backends = [PostgreSQLBackend.from_url(store.url) for _ in range(8)]
    await asyncio.gather(*(backend.open() for backend in backends))
    for backend in backends:
        await backend.insert(a_token(), InsertMode.ADD)
    assert len(await backends[0].find(Match(), 99)) == 8
    for backend in backends:
        await backend.close()


async def test_an_older_schema_is_brought_up_to_date_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many open it at once, and what is stored is still there."""
    backend = await opened(store)
    token = a_token()
    await backend.insert(token, InsertMode.REPLACE)
    await backend.close()
    monkeypatch.setattr(tables, "SCHEMA", 2)
    monkeypatch.setattr(schema, "SCHEMA", 2)
    monkeypatch.setitem(schema.MIGRATIONS, 1, ("ALTER TABLE @.vtoken_notes ADD COLUMN more text",))
    backends = [PostgreSQLBackend.from_url(store.url) for _ in range(5)]
    await asyncio.gather(*(backend.open() for backend in backends))
    for backend in backends:
        assert await backend.find(Match(), 9) == [token]
        await backend.close()
    assert "more" in {row[2] for row in store.shape()}
    await (await opened(store)).close()


async def test_a_migration_that_fails_changes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    await (await opened(store)).close()
    before = store.shape()
    monkeypatch.setattr(schema, "SCHEMA", 2)
    texts = ("ALTER TABLE @.vtoken_notes ADD COLUMN more text", "ALTER TABLE @.nothing ADD COLUMN more text")
    monkeypatch.setitem(schema.MIGRATIONS, 1, texts)
    with pytest.raises(BackendError):
        await opened(store)
    assert store.shape() == before
    monkeypatch.undo()
    await (await opened(store)).close()


async def test_a_newer_schema_is_refused_untouched(store: Store) -> None:
    await (await opened(store)).close()
    store.execute("UPDATE @.vtoken_schema SET version = 1000")
    with pytest.raises(BackendError, match="schema 1000") as refused:
        await opened(store)
    assert type(refused.value) is BackendError


async def test_foreign_tables_are_refused_untouched(store: Store) -> None:
    store.execute("CREATE SCHEMA @; CREATE TABLE @.vtoken_tokens (mine text)")
    before = store.shape()
    with pytest.raises(CorruptStore, match="vtoken did not make"):
        await opened(store)
    assert store.shape() == before


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("DROP TABLE @.vtoken_keys", "vtoken_keys"),
        ("DROP INDEX @.vtoken_tokens_active", "vtoken_tokens_active"),
        ("ALTER TABLE @.vtoken_budgets DROP COLUMN strikes", "vtoken_budgets.strikes"),
    ],
)
async def test_what_is_gone_is_named(store: Store, statement: str, named: str) -> None:
    backend = await opened(store)
    store.execute(statement)
    with pytest.raises(CorruptStore, match=named):
        await backend.ping()
    await backend.close()
    with pytest.raises(CorruptStore, match=named):
        await opened(store)


async def test_a_table_that_is_dropped_while_open_is_no_empty_one(store: Store) -> None:
    backend = await opened(store)
    await backend.insert(token := a_token(), InsertMode.REPLACE)
    store.execute("DROP SCHEMA @ CASCADE")
    with pytest.raises(CorruptStore):
        await backend.find(Match(digests=(token.keys[0].digest,)), 1)
    with pytest.raises(CorruptStore):
        await backend.insert(a_token(), InsertMode.REPLACE)
    await backend.close()


async def test_an_invalid_row_is_damage_and_meets_nobody_else(store: Store) -> None:
    backend = await opened(store)
    bad, good = a_token(object_id="1"), a_token(object_id="2")
    for token in (bad, good):
        await backend.insert(token, InsertMode.REPLACE)
    store.execute("UPDATE @.vtoken_tokens SET state = 9 WHERE object_id = '1'")
    lookups = [backend.find(Match(digests=(token.keys[0].digest,)), 1) for token in (good, bad) * 20]
    answers = await asyncio.gather(*lookups, return_exceptions=True)
    assert answers[::2] == [[good]] * 20
    assert {type(answer) for answer in answers[1::2]} == {CorruptStore}
    await backend.close()


async def test_a_use_of_an_invalid_row_is_damage_and_meets_nobody_else(store: Store) -> None:
    backend = await opened(store)
    tokens = [a_token(object_id=str(number)) for number in range(20)]
    for token in tokens:
        await backend.insert(token, InsertMode.REPLACE)
    store.execute("UPDATE @.vtoken_tokens SET keys = keys #- '{0,scheme}' WHERE object_id::integer % 2 = 0")
    uses = [backend.present(Match(digests=(token.keys[0].digest,)), Use(at=NOW), NOW) for token in tokens]
    answers = await asyncio.gather(*uses, return_exceptions=True)
    outcomes = [answer.outcome if isinstance(answer, Presented) else type(answer) for answer in answers]
    assert outcomes == [CorruptStore, Outcome.RIGHT] * 10
    await backend.close()


async def test_a_role_needs_to_read_and_write_the_tables_and_no_more(store: Store) -> None:
    await (await opened(store)).close()
    role = store.schema
    store.execute(f"CREATE ROLE {role} LOGIN; GRANT USAGE ON SCHEMA @ TO {role}")
    try:
        store.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA @ TO {role}")
        backend = PostgreSQLBackend.from_url(store.url.replace("//vtoken@", f"//{role}@"))
        await backend.open()
        calls = Calls(seed=1)
        for _ in range(200):
            await calls.call().on(backend)
        await backend.note("name", "text")
        await backend.ping()
        store.execute(f"REVOKE INSERT ON @.vtoken_tokens FROM {role}")
        with pytest.raises(BackendUnavailable, match="privilege"):
            await backend.insert(a_token(), InsertMode.REPLACE)
        await backend.close()
    finally:
        store.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_a_role_that_may_make_no_tables_is_told_so(store: Store) -> None:
    role = store.schema
    store.execute(f"CREATE ROLE {role} LOGIN")
    backend = PostgreSQLBackend.from_url(store.url.replace("//vtoken@", f"//{role}@"))
    with pytest.raises(BackendUnavailable, match="privilege"):
        await backend.open()
    store.execute(f"DROP ROLE {role}")


async def test_a_database_of_another_encoding_is_refused(store: Store) -> None:
    store.execute(
        f"CREATE DATABASE {store.schema} TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'"
    )
    backend = PostgreSQLBackend(f"{store.server.rpartition('/')[0]}/{store.schema}")
    with pytest.raises(BackendError, match="LATIN1"):
        await backend.open()
    store.execute(f"DROP DATABASE {store.schema}")


async def test_strings_are_compared_by_their_code_points(store: Store) -> None:
    """The columns have a collation of their own, whatever the database's is."""
    backend = await opened(store)
    names = ["a", "A", "á", "a\u0301", "ａ", "b", "ß", "ss", "\U0001f600", "\uffff", "z"]
    for name in names:
        await backend.insert(a_token(object_id=name, slug=name), InsertMode.REPLACE)
    for name in names:
        [found] = await backend.find(Match(object_id=name, slug=name), 9)
        assert (found.object_id, found.is_active) == (name, True)
    assert {count.slug for count in await backend.count(0)} == set(names)
    collations = {row[5] for row in store.shape() if row[0] == "column" and row[3] == "text"}
    assert collations == {"C", "default"}  # extra_data is never compared
    await backend.close()


def test_the_schema_is_quoted() -> None:
    assert ddl('a"b')[0].startswith('CREATE TABLE "a""b".vtoken_tokens')
