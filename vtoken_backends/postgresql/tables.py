"""The one declaration of the tables: the DDL of :meth:`PostgreSQLBackend.open`, of ``vtoken init --sql`` and
the SQLAlchemy metadata of ``vtoken.migrate.tables`` are made from it.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from vtoken.backend import Budget, BudgetState, StoredToken

SCHEMA: Final = 1
"""The number of this shape of the tables. A shape that differs gets the next number and a migration."""

TEXT: Final = 'text COLLATE "C"'
"""Text that is compared and sorted by code points, whatever the database's collation."""


class Column(NamedTuple):
    name: str
    type: str
    is_nullable: bool = False


class Index(NamedTuple):
    """An index beside the primary key."""

    name: str
    expressions: tuple[str, ...]
    is_unique: bool = False
    where: str = ""


class Table(NamedTuple):
    name: str
    columns: tuple[Column, ...]
    primary_key: tuple[str, ...]
    indexes: tuple[Index, ...] = ()


_TOKEN_TYPES: Final = {
    "id": Column("id", "bigint"),
    "content_type": Column("content_type", TEXT),
    "object_id": Column("object_id", TEXT),
    "slug": Column("slug", TEXT),
    "context": Column("context", "bytea"),
    "is_beside": Column("is_beside", "boolean"),
    "created_at": Column("created_at", "bigint"),
    "expires_at": Column("expires_at", "bigint"),
    "ends_at": Column("ends_at", "bigint"),
    "state": Column("state", "smallint"),
    "extra_data": Column("extra_data", "text", is_nullable=True),
    "max_uses": Column("max_uses", "integer", is_nullable=True),
    "uses": Column("uses", "integer"),
    "used_at": Column("used_at", "bigint"),
    "keys": Column("keys", "jsonb"),
    "holds": Column("holds", "jsonb"),
}
_BUDGET_TYPES: Final = {
    "object": Column("object", "bytea"),
    "name": Column("name", "bytea"),
    "spent": Column("spent", "bigint"),
    "strikes": Column("strikes", "integer"),
    "until": Column("until", "bigint"),
}

WAS_ADDED: Final = "was_added"
"""A column beside the fields of a token: whether it was inserted by ``InsertMode.ADD``. All other tokens
replace what is active in their line, so that no two of them may be active at once, however they race."""

TOKENS: Final = Table(
    name="vtoken_tokens",
    columns=(*(_TOKEN_TYPES[name] for name in StoredToken._fields), Column(WAS_ADDED, "boolean")),
    primary_key=("id",),
    indexes=(
        # Finds the active tokens of a line, and holds the line to one of them that was not added: its own id
        # tells an added one from all others, and 0 is no id. The expression is spelled as the server returns
        # it, or else Alembic would find a difference for ever. (CASE comes back in several lines.)
        Index(
            "vtoken_tokens_active",
            ("object_id", "content_type", "slug", "context", "(was_added::integer * id)"),
            is_unique=True,
            where="state = 0",
        ),
        Index("vtoken_tokens_object", ("object_id", "content_type", "id")),
        Index("vtoken_tokens_end", ("ends_at", "id")),
    ),
)
KEYS: Final = Table(
    name="vtoken_keys",
    columns=(Column("digest", "bytea"), Column("token", "bigint"), Column("origin", "bigint")),
    primary_key=("digest",),
)
RECEIPTS: Final = Table(
    name="vtoken_receipts",
    columns=(
        Column("token", "bigint"),
        Column("origin", "bigint"),
        Column("use_id", TEXT),
        Column("at", "bigint"),
    ),
    primary_key=("token", "origin", "use_id"),
)
BUDGETS: Final = Table(
    name="vtoken_budgets",
    columns=tuple(_BUDGET_TYPES[name] for name in (*Budget._fields, *BudgetState._fields)),
    primary_key=Budget._fields,
    indexes=(Index("vtoken_budgets_until", ("until",)),),
)
NOTES: Final = Table(
    name="vtoken_notes",
    columns=(Column("name", TEXT), Column("text", TEXT)),
    primary_key=("name",),
)
VERSION: Final = Table(
    name="vtoken_schema",
    columns=(Column("version", "integer"),),
    primary_key=("version",),
)
TABLES: Final = (TOKENS, KEYS, RECEIPTS, BUDGETS, NOTES, VERSION)
RELATIONS: Final = tuple(
    name
    for table in TABLES
    for name in (table.name, f"{table.name}_pkey", *(index.name for index in table.indexes))
)
"""The names of all tables and indexes."""


def quoted(name: str) -> str:
    """A name as an identifier in SQL."""
    return '"' + name.replace('"', '""') + '"'


def ddl(schema: str) -> list[str]:
    """The statements that make the tables in a schema that is there.

    Args:
        schema: its name, not quoted.
    """
    place = quoted(schema)
    statements = [statement for table in TABLES for statement in _create(place, table)]
    return [*statements, number(schema)]


def number(schema: str) -> str:
    """The statement that writes down which shape the tables have."""
    return f"INSERT INTO {quoted(schema)}.{VERSION.name} (version) VALUES ({SCHEMA})"  # noqa: S608  # our own names


def _create(place: str, table: Table) -> list[str]:
    lines = [
        f"    {column.name} {column.type}{'' if column.is_nullable else ' NOT NULL'}"
        for column in table.columns
    ]
    lines.append(f"    CONSTRAINT {table.name}_pkey PRIMARY KEY ({', '.join(table.primary_key)})")
    statements = [f"CREATE TABLE {place}.{table.name} (\n" + ",\n".join(lines) + "\n)"]
    for index in table.indexes:
        unique = "UNIQUE " if index.is_unique else ""
        where = f" WHERE {index.where}" if index.where else ""
        columns = ", ".join(index.expressions)
        statements.append(f"CREATE {unique}INDEX {index.name} ON {place}.{table.name} ({columns}){where}")
    return statements
