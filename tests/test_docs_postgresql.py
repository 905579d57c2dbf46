"""The pages on transactions of an application's own, on a real PostgreSQL server."""

from __future__ import annotations

import os
import secrets
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from tests import postgresql_servers as servers
from tests.test_docs import ROOT, run_python


@contextmanager
def fresh_database() -> Generator[str]:
    """The URL of an empty database on the server of the tests, which is dropped afterwards."""
    url, name = servers.shared_url(), f"vtoken_docs_{os.getpid()}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'".encode())
        try:
            yield urlsplit(url)._replace(path=f"/{name}").geturl()
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.mark.parametrize("page", ["with-sqlalchemy.md", "both-or-neither.md"])
def test_with_sqlalchemy(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with fresh_database() as url:
        monkeypatch.setenv("VTOKEN_URL", url)
        monkeypatch.setenv("DATABASE_URL", url.replace("postgresql://", "postgresql+psycopg://"))
        monkeypatch.setenv("VTOKEN_SECRET", secrets.token_urlsafe(32))
        run_python(ROOT / "docs" / "how-to" / page)
