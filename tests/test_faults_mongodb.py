"""The short tier of the faults of MongoDB (``python -m tests.faults``), with both drivers at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from . import servers
from .faults import mongodb_replies, mongodb_rounds
from .mongodb_tools import DRIVER_LEAK

pytestmark = DRIVER_LEAK


@pytest.fixture(scope="module")
def replica_set() -> Iterator[servers.ReplicaSet]:
    """Three servers of this module's own."""
    _need_mongod()
    with servers.ReplicaSet() as three:
        yield three.start()


@pytest.fixture(scope="module")
def standalone() -> Iterator[servers.Mongod]:
    """A server of this module's own."""
    _need_mongod()
    with servers.start_mongod(args=mongodb_rounds.SLOW_JOURNAL) as server:
        yield server


def _need_mongod() -> None:
    try:
        servers.mongod_binary()
    except FileNotFoundError as error:
        if servers.required() and servers.declared_url() is None:
            raise
        pytest.skip(str(error))


async def test_what_was_acknowledged_outlives_a_killed_server(standalone: servers.Mongod) -> None:
    (await mongodb_rounds.kill_servers(standalone, 2)).report()


async def test_without_waiting_for_the_journal_a_killed_server_loses_writes(
    standalone: servers.Mongod,
) -> None:
    (await mongodb_rounds.kill_servers(standalone, 1, durable=False)).report_planted("durable=False")


async def test_what_was_acknowledged_outlives_a_killed_primary(replica_set: servers.ReplicaSet) -> None:
    (await mongodb_rounds.kill_primaries(replica_set, 1)).report()


async def test_what_is_not_replicated_is_not_acknowledged(replica_set: servers.ReplicaSet) -> None:
    (await mongodb_rounds.lose_writes(replica_set, 1)).report()


async def test_without_waiting_for_a_majority_a_fail_over_undoes_writes(
    replica_set: servers.ReplicaSet,
) -> None:
    (await mongodb_rounds.lose_writes(replica_set, 1, durable=False)).report_planted("durable=False")


async def test_a_lost_reply_is_made_good_or_told(standalone: servers.Mongod) -> None:
    (await mongodb_replies.lose_replies(standalone, 1)).report()


@pytest.mark.parametrize("failure", mongodb_replies.FAILURES)
async def test_a_failed_command_is_made_good_or_told(standalone: servers.Mongod, failure: str) -> None:
    (await mongodb_replies.fail_commands(standalone, failure, 1)).report()
