"""Every guarantee of vtoken as a test."""

from __future__ import annotations

import os
from pathlib import Path

import psycopg
import pytest
from vtoken.backend import TokenBackend
from vtoken.testing import DurableBackendConformance
from vtoken.testing.model import BackendModel

from servers import DECLARED_URL, fresh_store
from vtoken_postgresql import PostgreSQLBackend


class TestPostgreSQL(DurableBackendConformance):
    _url = os.environ.get(DECLARED_URL, "")  # without pytest, by `vtoken conformance`: no fixture

    @pytest.fixture(autouse=True)
    def _server(self, server_url: str) -> None:
        self._url = server_url

    def new_store(self, directory: Path) -> str:
        return fresh_store(self._url)

    def backend(self, store: str) -> TokenBackend:
        return PostgreSQLBackend.from_url(store)

    def raw(self, store: str) -> bytes:
        # In the binary format, where text and bytea show what they hold.
        with psycopg.connect(store) as connection, connection.cursor() as cursor:
            held = b""
            for table in (b"vtoken_tokens", b"vtoken_budgets"):
                with cursor.copy(b"COPY %s TO STDOUT (FORMAT binary)" % table) as copy:
                    held += b"".join(bytes(part) for part in copy)
            return held


class TestPostgreSQLAgainstTheModel(BackendModel):
    examples = 60

    @pytest.fixture(autouse=True)
    def _server(self, server_url: str) -> None:
        self._url = server_url

    def new_store(self, directory: Path) -> str:
        return fresh_store(self._url)

    def backend(self, store: str) -> TokenBackend:
        return PostgreSQLBackend.from_url(store)
