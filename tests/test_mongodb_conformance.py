from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import pytest
from bson import encode
from pymongo import MongoClient

from vtoken.backend import TokenBackend
from vtoken.testing import DurableBackendConformance
from vtoken_backends.mongodb import MongoDBBackend

from .servers import databases


class _MongoDB(DurableBackendConformance):
    """Each case on a database of its own; each driver and each kind of server in one of the classes below."""

    driver: ClassVar[str]
    server: ClassVar[str]

    @pytest.fixture(autouse=True)
    def _server(self, request: pytest.FixtureRequest) -> Generator[None]:
        self._databases = databases(request.getfixturevalue(self.server))
        with ExitStack() as self._used:
            yield

    def new_store(self, directory: Path) -> str:
        return self._used.enter_context(self._databases.one())

    def backend(self, store: str) -> TokenBackend:
        return MongoDBBackend.from_url(store, driver=self.driver)

    def raw(self, store: str) -> bytes:
        with MongoClient[dict[str, Any]](store) as client:
            database = client.get_default_database()
            names = database.list_collection_names()
            return b"".join(encode(found) for name in names for found in database[name].find())


class TestPyMongoOnReplicaSet(_MongoDB):
    driver, server = "pymongo", "mongodb_replica_set"


class TestMotorOnStandalone(_MongoDB):
    driver, server = "motor", "mongodb_standalone"
