"""The short tier of the faults of PostgreSQL (``python -m tests.faults``), and a standby that is not read."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tests import postgresql_servers as servers
from tests.faults import postgresql_rounds as rounds
from vtoken.backend import InsertMode, Match
from vtoken.errors import OutcomeUnknown
from vtoken.testing.harness import a_token
from vtoken_backends.postgresql import PostgreSQLBackend, connections


@pytest.fixture(scope="module")
def server() -> Iterator[servers.PostgreSQL]:
    """A server of this module's own."""
    _need_server()
    with servers.PostgreSQL(*rounds.SLOW_LOG) as made:
        yield made


@pytest.fixture(scope="module")
def pair() -> Iterator[servers.Pair]:
    """A primary and a standby of this module's own."""
    _need_server()
    with servers.Pair(*rounds.SLOW_LOG) as made:
        yield made


def _need_server() -> None:
    try:
        servers.binaries()
    except FileNotFoundError as error:
        if servers.required() and servers.declared_url() is None:
            raise
        pytest.skip(str(error))


async def test_what_was_acknowledged_outlives_a_killed_server(server: servers.PostgreSQL) -> None:
    (await rounds.kill_servers(server, 2)).report()


async def test_where_the_role_decides_a_killed_server_loses_writes(server: servers.PostgreSQL) -> None:
    (await rounds.kill_servers(server, 5, rounds.TrustsTheRole)).report_planted("the role's default")


async def test_what_was_acknowledged_outlives_a_killed_session(server: servers.PostgreSQL) -> None:
    (await rounds.kill_sessions(server, 1)).report()


async def test_a_standby_is_never_read(pair: servers.Pair) -> None:
    """It lags behind here, and the URL names it first."""
    pair.mend()
    backend = PostgreSQLBackend.from_url(pair.url)
    await backend.open()
    pair.standby.ask("SELECT pg_wal_replay_pause()")
    for _ in range(5):
        token = a_token()
        await backend.insert(token, InsertMode.REPLACE)
        assert await backend.find(Match(id=token.id), 1) == [token]
        await backend.close()
        await backend.open()
    await backend.close()
    pair.standby.ask("SELECT pg_wal_replay_resume()")


async def test_a_write_that_waits_for_the_standby_in_vain_is_unknown(
    pair: servers.Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.mend()
    backend = PostgreSQLBackend.from_url(pair.url)
    await backend.open()
    await backend.insert(a_token(), InsertMode.REPLACE)
    [(sender,)] = pair.primary.ask("SELECT pid FROM pg_stat_replication")
    os.kill(sender, signal.SIGSTOP)
    monkeypatch.setattr(connections, "TIME_LIMIT", 1)
    with pytest.raises(OutcomeUnknown, match="did not answer"):
        await backend.insert(a_token(object_id="waits"), InsertMode.REPLACE)
    os.kill(sender, signal.SIGCONT)
    await backend.close()


async def test_what_was_acknowledged_outlives_a_fail_over(pair: servers.Pair) -> None:
    (await rounds.kill_primaries(pair, 1)).report()


async def test_where_the_role_decides_a_fail_over_undoes_writes(pair: servers.Pair) -> None:
    (await rounds.kill_primaries(pair, 1, rounds.TrustsTheRole)).report_planted("the role's default")
