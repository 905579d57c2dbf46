"""What the command line asks a MongoDB server past the backend: its clock, and what it really holds.

The driver is imported only when a URL names it, so the command line works without.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final, cast
from urllib.parse import urlsplit, urlunsplit

from vtoken.loading import import_object

SCHEMES: Final = ("mongodb", "mongodb+srv")
_PATIENCE: Final = 5_000
"""Milliseconds to wait for a server."""


def clock_skew(url: str) -> timedelta:
    """By how much the server's clock is ahead of ours, give or take half of the way there and back."""
    with _client(url) as client:
        client.admin.command("ping")  # connected, so that what is measured is one question and its answer
        began = time.monotonic()
        answer: datetime = client.admin.command("hello")["localTime"]
        on_the_way = timedelta(seconds=(time.monotonic() - began) / 2)
    return answer.replace(tzinfo=UTC) + on_the_way - datetime.now(UTC)


def documents(url: str) -> bytes:
    """Every document of the URL's database, in BSON."""
    with _client(url) as client:
        database = client.get_default_database()
        names = database.list_collection_names()
        return b"".join(part for name in names for part in database[name].find_raw_batches())


def drop_database(url: str) -> None:
    """Drop the URL's database."""
    with _client(url) as client:
        client.drop_database(client.get_default_database().name)


def with_database(url: str, name: str) -> str:
    """The URL with another database; its user is still looked up where it was."""
    parts = urlsplit(url)
    query = parts.query
    if "@" in parts.netloc and "authsource=" not in query.lower():
        query += f"{'&' if query else ''}authSource={parts.path.strip('/') or 'admin'}"
    return urlunsplit(parts._replace(path=f"/{name}", query=query))


@contextmanager
def _client(url: str) -> Generator[Any]:
    client_class = cast("Any", import_object("pymongo:MongoClient"))
    parts = urlsplit(url)
    # The collection is the backend's own parameter, which the driver would warn of.
    query = "&".join(part for part in parts.query.split("&") if not part.startswith("collection="))
    plain = urlunsplit(parts._replace(query=query, path=parts.path or "/"))
    with client_class(plain, serverSelectionTimeoutMS=_PATIENCE) as client:
        yield client
