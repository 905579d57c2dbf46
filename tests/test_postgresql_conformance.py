from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
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
        with ExitStack() as self._used:
            yield

    def new_store(self, directory: Path) -> str:
        return self._used.enter_context(servers.emptied_store(servers.shared_url()))

    def backend(self, store: str) -> TokenBackend:
        return PostgreSQLBackend.from_url(store)

    def raw(self, store: str) -> bytes:
        return PostgreSQLDiagnostics(store).raw(store)


@pytest.mark.long
class TestPostgreSQLAtLength(TestPostgreSQL):
    rounds = DurableBackendConformance.rounds
