"""What ``vtoken doctor`` and ``vtoken conformance`` ask a PostgreSQL server, beside the backend."""

from __future__ import annotations

import secrets
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import psycopg

from vtoken.diagnostics import Diagnostics, Finding, clock_finding
from vtoken_backends.postgresql.tables import TABLES, VERSION, quoted

_PATIENCE: Final = 5
"""Seconds to wait for a server."""
_OURS: Final = ("schema", "pool_size")
"""Parameters of the URL that are the backend's own."""


class PostgreSQLDiagnostics(Diagnostics):
    """A few tables of a schema a store."""

    def missing(self) -> str | None:
        schema = _schema(self.url)
        place = f"{quoted(schema)}.{VERSION.name}"
        try:
            with _connected(self.url) as connection:
                found = connection.execute("SELECT to_regclass(%s), current_database()", [place]).fetchone()
        except psycopg.Error:
            return None  # the backend will say more precisely what is wrong
        if found is None or found[0] is not None:
            return None
        return f"the database {found[1]!r} has no table {VERSION.name} in the schema {schema!r}"

    def after_closing(self) -> list[Finding]:
        return [clock_finding(lambda: clock_skew(self.url))]

    def new_store(self, directory: Path) -> str:
        return _with_schema(self.url, f"vtoken_conformance_{secrets.token_hex(8)}")

    def raw(self, store: str) -> bytes:
        schema = quoted(_schema(store))
        parts: list[str] = []
        with _connected(store) as connection:
            for table in TABLES:
                query: Any = f"SELECT t::text FROM {schema}.{table.name} AS t"  # noqa: S608  # our own names
                parts += [str(text) for (text,) in connection.execute(query)]
        return "\n".join(parts).encode()

    def drop(self, store: str) -> None:
        query: Any = f"DROP SCHEMA IF EXISTS {quoted(_schema(store))} CASCADE"
        with _connected(store) as connection:
            connection.execute(query)


def clock_skew(url: str) -> timedelta:
    """By how much the server's clock is ahead of ours, give or take half of the way there and back."""
    with _connected(url) as connection:
        began = time.monotonic()
        found = connection.execute("SELECT extract(epoch FROM clock_timestamp())::float8").fetchone()
        on_the_way = timedelta(seconds=(time.monotonic() - began) / 2)
    answer = datetime.fromtimestamp(cast("float", (found or (0.0,))[0]), UTC)
    return answer + on_the_way - datetime.now(UTC)


def _schema(url: str) -> str:
    return dict(parse_qsl(urlsplit(url).query)).get("schema", "vtoken")


def _with_schema(url: str, schema: str) -> str:
    parts = urlsplit(url)
    kept = [(name, value) for name, value in parse_qsl(parts.query) if name != "schema"]
    return urlunsplit(parts._replace(query=urlencode([*kept, ("schema", schema)])))


def _connected(url: str) -> psycopg.Connection[tuple[Any, ...]]:
    parts = urlsplit(url)
    kept = [(name, value) for name, value in parse_qsl(parts.query) if name not in _OURS]
    # With an empty authority, urlunsplit() would leave out the slashes that libpq needs.
    rest = urlunsplit(("", "", parts.path, urlencode(kept), ""))
    plain = f"{parts.scheme}://{parts.netloc}{rest}"
    return psycopg.connect(plain, connect_timeout=_PATIENCE, autocommit=True, prepare_threshold=None)
