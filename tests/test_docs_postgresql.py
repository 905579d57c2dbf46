"""What the documentation shows of PostgreSQL, runs, on a real server."""

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
from tests.test_docs import ROOT, blocks, run_python

MARK = "python postgresql"
PAGES = [
    page for page in sorted(ROOT.glob("docs/**/*.md")) if any(block.info == MARK for block in blocks(page))
]


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


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_examples_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fresh_database() as url:
        monkeypatch.setenv("DATABASE_URL", url)
        monkeypatch.setenv("VTOKEN_SECRET", secrets.token_urlsafe(32))
        run_python(page, MARK)


def test_there_are_some() -> None:
    assert PAGES
