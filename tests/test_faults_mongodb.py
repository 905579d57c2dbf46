"""The short tier of the faults of MongoDB (``python -m tests.faults``), with both drivers at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Final

import pytest

from vtoken import InvalidToken, Subject, TokenManager
from vtoken.errors import OutcomeUnknown
from vtoken_backends.mongodb import MongoDBBackend

from . import servers
from .faults import mongodb_replies, mongodb_rounds
from .faults.mongodb_proxy import proxy
from .faults.notes import SLUG

USER: Final = Subject("auth.user", 1)


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


@asynccontextmanager
async def losing_one_reply(
    server: servers.Mongod, driver: str
) -> AsyncGenerator[tuple[TokenManager, Counter[str], Callable[[], None]]]:
    """A manager, how many replies were lost, and what makes it miss the reply to its next use."""
    uses = iter([True])
    is_open = False

    def loses(name: str) -> bool:
        return is_open and name == "findAndModify" and next(uses, False)

    async with proxy(server.port, loses) as way:
        url = f"mongodb://127.0.0.1:{way.port}/lost?directConnection=true"
        async with TokenManager(MongoDBBackend.from_url(url, driver=driver)) as manager:

            def begin() -> None:
                nonlocal is_open
                is_open = True

            yield manager, way.lost, begin


async def test_what_was_acknowledged_outlives_a_killed_server(standalone: servers.Mongod) -> None:
    (await mongodb_rounds.kill_servers(standalone, 2)).report()


async def test_without_waiting_for_the_journal_a_killed_server_loses_writes(
    standalone: servers.Mongod,
) -> None:
    (await mongodb_rounds.kill_servers(standalone, 5, durable=False)).report_planted("durable=False")


async def test_what_was_acknowledged_outlives_a_killed_primary(replica_set: servers.ReplicaSet) -> None:
    (await mongodb_rounds.kill_primaries(replica_set, 1)).report()


@pytest.mark.long
async def test_what_is_not_replicated_is_not_acknowledged(replica_set: servers.ReplicaSet) -> None:
    (await mongodb_rounds.lose_writes(replica_set, 1)).report()


@pytest.mark.long
async def test_without_waiting_for_a_majority_a_fail_over_undoes_writes(
    replica_set: servers.ReplicaSet,
) -> None:
    (await mongodb_rounds.lose_writes(replica_set, 1, durable=False)).report_planted("durable=False")


async def test_a_lost_reply_is_made_good_or_told(standalone: servers.Mongod) -> None:
    (await mongodb_replies.lose_replies(standalone, 1)).report()


async def test_a_use_whose_reply_was_lost_is_settled_by_its_name(
    standalone: servers.Mongod, mongodb_driver: str
) -> None:
    async with losing_one_reply(standalone, mongodb_driver) as (manager, lost, begin):
        token = await manager.deactivate_and_create(USER, SLUG)
        begin()
        with pytest.raises(OutcomeUnknown):
            await manager.consume(USER, SLUG, token.key, consume_id="mine")
        assert lost == {"findAndModify": 1}
        assert (await manager.consume(USER, SLUG, token.key, consume_id="mine")).id == token.id
        with pytest.raises(InvalidToken):
            await manager.consume(USER, SLUG, token.key, consume_id="another's")


async def test_a_use_whose_reply_was_lost_is_made_good_on_a_replica_set(
    replica_set: servers.ReplicaSet, mongodb_driver: str
) -> None:
    async with losing_one_reply(replica_set.mend().primary(), mongodb_driver) as (manager, lost, begin):
        token = await manager.deactivate_and_create(USER, SLUG)
        begin()
        assert (await manager.consume(USER, SLUG, token.key)).id == token.id
        assert lost == {"findAndModify": 1}
        with pytest.raises(InvalidToken):
            await manager.consume(USER, SLUG, token.key)


@pytest.mark.parametrize("failure", mongodb_replies.FAILURES)
async def test_a_failed_command_is_made_good_or_told(standalone: servers.Mongod, failure: str) -> None:
    (await mongodb_replies.fail_commands(standalone, failure, 1)).report()
