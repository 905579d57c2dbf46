from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import postgresql_servers as servers
from vtoken.backend import TokenBackend
from vtoken.testing import DurableBackendConformance
from vtoken_backends.postgresql import PostgreSQLBackend
from vtoken_backends.postgresql.diagnostics import PostgreSQLDiagnostics


class TestPostgreSQL(DurableBackendConformance):
    rounds = 4  # as many as it takes to find every planted bug (tests/test_conformance_bites.py)

    @pytest.fixture(autouse=True)
    def stores(self) -> Iterator[None]:
        self._stores: list[str] = []
        yield
        for store in self._stores:
            PostgreSQLDiagnostics(store).drop(store)

    def new_store(self, directory: Path) -> str:
        store = servers.with_schema(servers.shared_url(), servers.new_schema())
        self._stores.append(store)
        return store

    def backend(self, store: str) -> TokenBackend:
        return PostgreSQLBackend.from_url(store)

    def raw(self, store: str) -> bytes:
        return PostgreSQLDiagnostics(store).raw(store)


@pytest.mark.long
class TestPostgreSQLAtLength(TestPostgreSQL):
    rounds = DurableBackendConformance.rounds
