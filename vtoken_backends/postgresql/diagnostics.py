"""What ``vtoken doctor`` and ``vtoken conformance`` know about PostgreSQL databases, beside the backend."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Final, cast

import psycopg

from vtoken.diagnostics import Diagnostics, Finding, NotObservable, Table, clock_finding
from vtoken_backends.postgresql.tables import TABLES, VERSION, ddl, quoted
from vtoken_backends.postgresql.urls import DEFAULT_SCHEMA, split

OLDEST: Final = 13
"""The oldest major version of PostgreSQL that has what the backend needs."""


class PostgreSQLDiagnostics(Diagnostics):
    """One schema of a database a store."""

    integrity = "tables, columns and indexes are there; pg_amcheck examines their contents"

    def missing(self) -> str | None:
        schema = _schema(self.url)
        found = self._asked("SELECT to_regclass(%s) IS NOT NULL", f"{quoted(schema)}.{VERSION.name}")
        return f"the schema {schema!r} has no tables of vtoken's" if found is False else None

    def before_opening(self) -> list[Finding]:
        version = self._asked("SELECT current_setting('server_version_num')::integer")
        if not isinstance(version, int):
            return []  # opening says why it cannot be reached
        shown = f"PostgreSQL {version // 10_000}.{version % 10_000}"
        if version // 10_000 < OLDEST:
            return [Finding("server", "failed", f"{shown}: vtoken needs {OLDEST} or later")]
        return [Finding("server", "ok", shown)]

    def after_closing(self) -> list[Finding]:
        return [clock_finding(self._clock_skew)]

    def _clock_skew(self) -> timedelta:
        """By how much the server's clock is ahead of ours, give or take half of the way there and back."""
        with psycopg.connect(split(self.url).url, connect_timeout=5) as connection:
            before = time.time()
            row = connection.execute("SELECT extract(epoch FROM clock_timestamp())::float8").fetchone()
            return timedelta(seconds=(row or (0.0,))[0] - (before + time.time()) / 2)

    @property
    def schema(self) -> str:
        return _schema(self.url)

    @property
    def tables(self) -> Sequence[Table]:
        return TABLES

    def ddl(self) -> list[str]:
        return ddl(self.schema)

    def new_store(self, directory: Path) -> str:
        place = split(self.url)
        mark = "&" if "?" in place.url else "?"
        return f"{place.url}{mark}schema=vtoken_{secrets.token_hex(8)}"

    def raw(self, store: str) -> bytes:
        schema = quoted(_schema(store))
        parts: list[bytes] = []
        try:
            with psycopg.connect(split(store).url) as connection:
                for table in TABLES:
                    text = f"SELECT t::text, * FROM {schema}.{table.name} AS t"  # noqa: S608  # our own names
                    for row in connection.execute(text.encode()).fetchall():
                        parts += [value if isinstance(value, bytes) else str(value).encode() for value in row]
        except psycopg.Error as error:
            problem = type(error).__name__
        else:
            return b"\0".join(parts)
        raise NotObservable(f"PostgreSQL: {problem}")

    def drop(self, store: str) -> None:
        schema = _schema(store)
        with psycopg.connect(split(store).url, autocommit=True) as connection:
            connection.execute(f"DROP SCHEMA IF EXISTS {quoted(schema)} CASCADE".encode())

    def _asked(self, text: str, *parameters: object) -> object:
        """The one value of a statement, or None where there is no answer."""
        try:
            with psycopg.connect(split(self.url).url, connect_timeout=5) as connection:
                row = connection.execute(text.encode(), parameters).fetchone()
                return row[0] if row else None
        except psycopg.Error:
            return None


def _schema(url: str) -> str:
    return cast("str", split(url).options.get("schema", DEFAULT_SCHEMA))
