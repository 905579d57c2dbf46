"""The backends against the model of the contract, and planted bugs that the model finds."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest

from vtoken.backend import TokenBackend
from vtoken.testing.model import BackendModel
from vtoken_backends.memory import MemoryBackend
from vtoken_backends.mongodb import MongoDBBackend
from vtoken_backends.sqlite import SQLiteBackend

from .servers import fresh_database

_numbers = count()


class TestMemory(BackendModel):
    def new_store(self, directory: Path) -> str:
        return f"memory://model-{next(_numbers)}"

    def backend(self, store: str) -> TokenBackend:
        return MemoryBackend.from_url(store)


class TestSQLite(BackendModel):
    def new_store(self, directory: Path) -> str:
        return f"sqlite:///{directory}/tokens.db"

    def backend(self, store: str) -> TokenBackend:
        return SQLiteBackend.from_url(store)


class TestMongoDB(BackendModel):
    examples = 15

    @pytest.fixture(autouse=True)
    def _server(self, mongodb_replica_set: str) -> Generator[None]:
        self._url = mongodb_replica_set
        with ExitStack() as self._databases:
            yield

    def new_store(self, directory: Path) -> str:
        return self._databases.enter_context(fresh_database(self._url))

    def backend(self, store: str) -> TokenBackend:
        return MongoDBBackend.from_url(store)
