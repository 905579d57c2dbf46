"""What ``vtoken doctor`` and ``vtoken conformance`` ask a MongoDB server, beside the backend."""

from __future__ import annotations

import secrets
import time
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import urlsplit, urlunsplit

from pymongo import MongoClient
from pymongo.errors import PyMongoError

from vtoken.diagnostics import Diagnostics, Finding, clock_finding
from vtoken_backends.mongodb.urls import split_url

_PATIENCE: Final = {"serverSelectionTimeoutMS": 5_000}
"""How long to wait for a server."""
_COLLECTION: Final = "vtoken"
_DATABASE: Final = "vtoken"


class MongoDBDiagnostics(Diagnostics):
    """A few collections of a database a store."""

    def missing(self) -> str | None:
        collection = str(split_url(self.url)[1].get("collection", _COLLECTION))
        try:
            with _client(self.url) as client:
                database = client.get_default_database(_DATABASE)
                names = database.list_collection_names()
        except PyMongoError:
            return None  # the backend will say more precisely what is wrong
        if any(name == collection or name.startswith(f"{collection}.") for name in names):
            return None
        return f"the database {database.name!r} has no collection {collection!r}"

    def after_closing(self) -> list[Finding]:
        return [clock_finding(lambda: clock_skew(self.url))]

    def new_store(self, directory: Path) -> str:
        return with_database(self.url, f"vtoken_conformance_{secrets.token_hex(8)}")

    def raw(self, store: str) -> bytes:
        with _client(store) as client:
            database = client.get_default_database(_DATABASE)
            names = database.list_collection_names()
            batches: Any = (database[name].find_raw_batches() for name in names)
            return b"".join(part for found in batches for part in found)

    def drop(self, store: str) -> None:
        with _client(store) as client:
            client.drop_database(client.get_default_database().name)


def clock_skew(url: str) -> timedelta:
    """By how much the server's clock is ahead of ours, give or take half of the way there and back."""
    with _client(url) as client:
        client.admin.command("ping")  # connected, so that what is measured is one question and its answer
        began = time.monotonic()
        answer: datetime = client.admin.command("hello")["localTime"]
        on_the_way = timedelta(seconds=(time.monotonic() - began) / 2)
    return answer.replace(tzinfo=UTC) + on_the_way - datetime.now(UTC)


def with_database(url: str, name: str) -> str:
    """The URL with another database; its user is still looked up where it was."""
    parts = urlsplit(url)
    query = parts.query
    if "@" in parts.netloc and "authsource=" not in query.lower():
        query += f"{'&' if query else ''}authSource={parts.path.strip('/') or 'admin'}"
    return urlunsplit(parts._replace(path=f"/{name}", query=query))


@contextmanager
def _client(url: str) -> Generator[MongoClient[dict[str, Any]]]:
    parts = urlsplit(split_url(url)[0])
    # The URL's own patience overrides ours, which only bounds how long a server that is gone is waited for.
    patience = {} if "serverselectiontimeoutms" in parts.query.lower() else _PATIENCE
    with MongoClient[dict[str, Any]](
        urlunsplit(parts._replace(path=parts.path or "/")), **cast("Any", patience)
    ) as client:
        yield client
