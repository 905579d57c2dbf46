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
from vtoken.testing.cases.budgets import SpendingCases
from vtoken.testing.cases.cancelled import CancelledCases
from vtoken.testing.cases.durable import DurableCases
from vtoken.testing.cases.find import FindCases
from vtoken.testing.cases.insert import InsertCases
from vtoken.testing.cases.life import CancellationCases, LifeCases
from vtoken.testing.cases.overlap import OverlapCases
from vtoken.testing.cases.present import PresentCases, PresentLimitCases, ReplayCases
from vtoken.testing.cases.sweep import SweepCases
from vtoken_backends.mongodb import MongoDBBackend

from .servers import databases


class _MongoDB:
    """Each case on a database of its own."""

    driver: ClassVar[str]
    server: ClassVar[str]
    rounds: ClassVar[int] = (
        4  # as many as it takes to find every planted bug (tests/test_conformance_bites.py)
    )

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


class TestPyMongoOnReplicaSet(_MongoDB, DurableBackendConformance):
    driver, server = "pymongo", "mongodb_replica_set"


class TestMotorOnStandalone(
    _MongoDB,
    DurableCases,
    CancelledCases,
    CancellationCases,
    LifeCases,
    InsertCases,
    OverlapCases,
    PresentCases,
    ReplayCases,
    PresentLimitCases,
    SpendingCases,
    FindCases,
    SweepCases,
):
    """What another driver or another kind of server might change. All code above the driver has its cases in
    the other class; the rest of the suite would only cost time here."""

    driver, server = "motor", "mongodb_standalone"


@pytest.mark.long
class TestPyMongoOnReplicaSetAtLength(TestPyMongoOnReplicaSet):
    rounds = DurableBackendConformance.rounds


@pytest.mark.long
class TestMotorOnStandaloneAtLength(TestMotorOnStandalone):
    rounds = DurableBackendConformance.rounds
