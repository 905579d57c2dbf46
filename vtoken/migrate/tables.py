"""The tables of a store as SQLAlchemy's metadata, for applications whose migrations are Alembic's.

Example, in Alembic's ``env.py``::

    from vtoken.migrate.tables import metadata

    target_metadata = [Base.metadata, metadata(os.environ["VTOKEN_URL"])]

A store whose tables were made by migrations is complete: opening it checks them, and makes none.
"""

from __future__ import annotations

import re
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from vtoken.diagnostics import Column, Index, Table, diagnostics_of
from vtoken.errors import ConfigurationError

_TYPES: Final[dict[str, Any]] = {
    "bigint": sa.BigInteger,
    "boolean": sa.Boolean,
    "bytea": sa.LargeBinary,
    "integer": sa.Integer,
    "jsonb": JSONB,
    "smallint": sa.SmallInteger,
    "text": sa.Text,
}
_COLLATED: Final = re.compile(r'text COLLATE "(.+)"')


def metadata(url: str) -> sa.MetaData:
    """Describe the tables of a store. Needs no connection.

    Args:
        url: the backend's URL; of PostgreSQL, its ``schema`` is heeded.

    Raises:
        ConfigurationError: the backend of this URL has no tables, or does not describe them.
    """
    store = diagnostics_of(url)
    found = sa.MetaData(schema=store.schema)
    for table in store.tables:
        _add(found, table)
    return found


def _add(found: sa.MetaData, table: Table) -> None:
    columns = [_column(column) for column in table.columns]
    key = sa.PrimaryKeyConstraint(*table.primary_key, name=f"{table.name}_pkey")
    made = sa.Table(table.name, found, *columns, key)
    for index in table.indexes:
        _add_index(made, index)


def _column(column: Column) -> sa.Column[Any]:
    collated = _COLLATED.fullmatch(column.type)
    if collated is None and column.type not in _TYPES:
        raise ConfigurationError(f"the column {column.name} has a type that is not known: {column.type}")
    kind = sa.Text(collation=collated[1]) if collated else _TYPES[column.type]()
    return sa.Column(column.name, kind, nullable=column.is_nullable, autoincrement=False)


def _add_index(table: sa.Table, index: Index) -> None:
    expressions = [
        table.columns[text] if text in table.columns else sa.text(text) for text in index.expressions
    ]
    where = sa.text(index.where) if index.where else None
    sa.Index(index.name, *expressions, unique=index.is_unique, postgresql_where=where, _table=table)
