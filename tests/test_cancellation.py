"""Cancelled at random moments, alone and many at once: nothing is left behind, and the process ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.cancellation import MEMORY, POSTGRESQL, run
from tests.faults.histories import MONGODB, SQLITE

from . import postgresql_servers
from .servers import fresh_database

PLANTED = "tests.faults.cancelled_planted"


def test_a_storm_on_memory() -> None:
    assert "cancelled after they had begun" in run(MEMORY, "memory://", 200, seed=1)


def test_a_storm_on_sqlite(tmp_path: Path) -> None:
    assert "cancelled after they had begun" in run(SQLITE, f"sqlite:///{tmp_path}/tokens.db", 200, seed=1)


def test_a_storm_on_mongodb(mongodb_replica_set: str) -> None:
    with fresh_database(mongodb_replica_set) as url:
        assert "cancelled after they had begun" in run(MONGODB, url, 150, seed=1)


def test_a_storm_on_postgresql() -> None:
    with postgresql_servers.fresh_store(postgresql_servers.shared_url()) as url:
        assert "cancelled after they had begun" in run(POSTGRESQL, url, 150, seed=1)


@pytest.mark.parametrize(
    ("planted", "url", "word"),
    [
        ("LosesOnCancel", "sqlite:///{}/tokens.db", "0 tokens are active after an issue that inserted"),
        ("HoldsTheLock", "sqlite:///{}/tokens.db?busy_timeout=500", "locked"),
        ("NeverGivesBack", "memory://", "a hold was not given back"),
        ("LeavesATask", "memory://", "a task was left"),
    ],
)
def test_a_planted_bug_is_found(tmp_path: Path, planted: str, url: str, word: str) -> None:
    with pytest.raises(AssertionError, match=word):
        run(f"{PLANTED}:{planted}", url.format(tmp_path), 300, seed=1)
