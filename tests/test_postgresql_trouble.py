"""PostgreSQL in trouble: connections that are cut, servers that hang or die, callers that are cancelled."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import psycopg
import psycopg_pool
import pytest
from psycopg.pq import ConnStatus

from tests import postgresql_servers as servers
from tests.postgresql_servers import waits_for_a_lock
from tests.secrecy_tools import chain, frames
from vtoken.backend import (
    Hold,
    InsertMode,
    InsertResult,
    Match,
    Outcome,
    Release,
    StoredToken,
    Use,
    UseHeld,
)
from vtoken.errors import BackendError, BackendUnavailable, OutcomeUnknown
from vtoken.testing.harness import MINUTE, NOW, a_token
from vtoken_backends.postgresql import PostgreSQLBackend, connections
from vtoken_backends.postgresql.statements import Statement


@pytest.fixture
async def store() -> AsyncIterator[str]:
    with servers.fresh_store(servers.shared_url()) as url:
        yield url


async def opened(url: str, **options: Any) -> PostgreSQLBackend:
    backend = PostgreSQLBackend.from_url(url, **options)
    await backend.open()
    return backend


async def through(proxy: tuple[servers.Proxy, int], store: str) -> PostgreSQLBackend:
    """A backend whose connections go through a proxy."""
    return await opened(urlsplit(store)._replace(netloc=f"vtoken@127.0.0.1:{proxy[1]}").geturl())


def match_of(token: StoredToken) -> Match:
    return Match(digests=(token.keys[0].digest,))


async def use(backend: PostgreSQLBackend, token: StoredToken) -> bool:
    presented = await backend.present(match_of(token), Use(at=NOW), NOW)
    return presented.outcome is Outcome.RIGHT


# Connections --------------------------------------------------------------------------------------


async def test_a_connection_that_was_cut_while_idle_is_noticed(store: str) -> None:
    async with servers.proxy() as proxy:
        backend = await through(proxy, store)
        token = a_token()
        await backend.insert(token, InsertMode.REPLACE)
        for _ in range(3):
            proxy[0].cut()
            assert await backend.find(match_of(token), 1) == [token]
        await backend.close()


async def test_what_was_under_way_when_the_connection_was_cut_is_unknown_or_did_not_happen(
    store: str,
) -> None:
    async with servers.proxy() as proxy:
        backend = await through(proxy, store)
        tokens = [a_token(object_id=str(number)) for number in range(30)]
        for token in tokens:
            await backend.insert(token, InsertMode.REPLACE)
        proxy[0].is_silent = True
        using = [asyncio.create_task(use(backend, token)) for token in tokens]
        looking = asyncio.create_task(backend.find(match_of(tokens[0]), 1))
        await proxy[0].has_kept_back.wait()
        proxy[0].is_silent = False
        proxy[0].cut()
        outcomes = await asyncio.gather(*using, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} <= {bool, OutcomeUnknown, BackendUnavailable}
        [looked] = await asyncio.gather(looking, return_exceptions=True)
        assert isinstance(looked, list | BackendUnavailable)
        for token, outcome in zip(tokens, outcomes, strict=True):
            stored = (await backend.find(Match(id=token.id), 1))[0]
            assert stored.uses <= 1
            assert outcome is not True or stored.uses == 1
        await backend.close()


async def test_a_server_that_hangs_is_an_error_in_a_bounded_time(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with servers.proxy() as proxy:
        backend = await through(proxy, store)
        token = a_token()
        await backend.find(match_of(token), 1)
        monkeypatch.setattr(connections, "TIME_LIMIT", 0.3)
        proxy[0].is_silent = True
        answers = await asyncio.gather(
            backend.find(match_of(token), 1),
            backend.deactivate(match_of(token), NOW),
            return_exceptions=True,
        )
        assert {type(answer) for answer in answers} <= {BackendUnavailable, OutcomeUnknown}
        assert "did not answer" in str(answers[0])
        proxy[0].is_silent = False
        monkeypatch.setattr(connections, "TIME_LIMIT", 30)
        assert (await backend.insert(a_token(), InsertMode.REPLACE)).result is InsertResult.INSERTED
        await backend.close()


async def test_a_row_that_stays_locked_is_an_error_that_says_so(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vtoken_backends.postgresql.backend.PATIENCE", 200)
    backend = await opened(store)
    locked, other = a_token(object_id="1"), a_token(object_id="2")
    for token in (locked, other):
        await backend.insert(token, InsertMode.REPLACE)
    schema = store.rpartition("=")[2]
    with psycopg.connect(servers.shared_url()) as connection:
        lock = "SELECT FROM @.vtoken_tokens WHERE object_id = '1' FOR UPDATE"
        connection.execute(lock.replace("@", schema).encode())
        answers = await asyncio.gather(
            *(use(backend, token) for token in (locked, other)), return_exceptions=True
        )
        assert isinstance(answers[0], BackendUnavailable)
        assert "locked by another transaction" in str(answers[0])
        assert answers[1] is True
    assert await use(backend, locked)
    await backend.close()


async def test_errors_show_no_digest(store: str) -> None:
    """Neither in their messages nor in what a traceback shows of the backend's variables."""
    backend = await opened(store)
    token = a_token()
    await backend.insert(token, InsertMode.REPLACE)
    schema = store.rpartition("=")[2]
    with psycopg.connect(servers.shared_url(), autocommit=True) as connection:
        connection.execute("UPDATE @.vtoken_tokens SET state = 9".replace("@", schema).encode())
        damaged = await asyncio.gather(
            backend.find(match_of(token), 1),
            use(backend, token),
            backend.find(Match(), 9),
            return_exceptions=True,
        )
        connection.execute(f"DROP SCHEMA {schema} CASCADE".encode())
    gone = await asyncio.gather(
        backend.find(match_of(token), 1),
        use(backend, token),
        backend.deactivate(match_of(token), NOW),
        return_exceptions=True,
    )
    await backend.close()
    for error in (*damaged, *gone):
        assert isinstance(error, BackendError)
        for link in chain(error):
            assert isinstance(link, BackendError)
            shown = f"{link!r} {link} {frames(link.__traceback__)}"
            assert token.keys[0].digest.hex() not in shown
            assert repr(token.keys[0].digest) not in shown


async def test_a_statement_is_larger_than_the_network_takes_at_once(store: str) -> None:
    backend = await opened(store)
    text = "x" * 30_000_000
    assert await backend._fetch(Statement("SELECT length($1::text), $1::text", [text])) == [(len(text), text)]
    await backend.close()


async def test_a_server_that_hangs_up_is_left_alone(store: str) -> None:
    """The event loop would find its connection readable for ever."""
    backend = await opened(f"{store}&application_name=left", pool_size=1)
    assert await backend.find(Match(), 1) == []
    [wire] = backend._connections._idle
    ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'left'"
    with psycopg.connect(servers.shared_url(), autocommit=True) as connection:
        assert connection.execute(ended.encode()).fetchall() == [(True,)]
    async with asyncio.timeout(10):
        while wire._pgconn.status == ConnStatus.OK:  # noqa: ASYNC110  # there is no event to wait for
            await asyncio.sleep(0)
    assert not asyncio.get_running_loop().remove_reader(wire._socket)
    assert await backend.find(Match(), 1) == []
    await backend.close()


@pytest.mark.parametrize(
    "size",
    [
        pytest.param(1, id="when it is sent"),
        pytest.param(30_000_000, id="while the rest of it is to be sent"),
    ],
)
async def test_a_connection_that_breaks_below_a_statement_is_left_alone(store: str, size: int) -> None:
    """The number of its socket is soon that of another one."""
    loop = asyncio.get_running_loop()
    complaints: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    backend = await opened(store, pool_size=1)
    assert await backend.find(Match(), 1) == []
    [wire] = backend._connections._idle
    statement = Statement("SELECT length($1::text)", ["x" * size])
    with socket.socket(fileno=os.dup(wire._socket)) as same:
        if size == 1:
            same.shutdown(socket.SHUT_RDWR)
            running = asyncio.create_task(wire.run([statement]))
        else:
            running = asyncio.create_task(wire.run([statement]))
            await asyncio.sleep(0)
            same.shutdown(socket.SHUT_RD)
    async with asyncio.timeout(10):
        with pytest.raises(psycopg.OperationalError):
            await running
    assert not loop.remove_reader(wire._socket)
    assert not loop.remove_writer(wire._socket)
    assert complaints == []
    assert await backend.find(Match(), 1) == []
    await backend.close()


# Cancellation -------------------------------------------------------------------------------------


def sessions(name: str) -> list[Any]:
    """What the server does for the connections with an application name, but for waiting for statements."""
    with psycopg.connect(servers.shared_url()) as connection:
        return connection.execute(
            "SELECT state, query FROM pg_stat_activity WHERE application_name = %s AND state <> 'idle'",
            [name],
        ).fetchall()


async def test_a_cancelled_call_happened_or_did_not_and_leaves_nothing_behind(store: str) -> None:
    dice = random.Random(7)  # noqa: S311  # which call is cancelled is no secret
    backend = await opened(f"{store}&application_name=cancelled", pool_size=3)
    tokens: list[StoredToken] = []
    for number in range(60):
        token = a_token(object_id=str(number), max_uses=2)
        await backend.insert(token, InsertMode.REPLACE)
        tokens.append(token)
        calls = [
            asyncio.create_task(call)
            for call in (
                use(backend, token),
                backend.present(match_of(token), Hold(hold_id="h", until=NOW + MINUTE), NOW),
                backend.update(Match(id=token.id), UseHeld(hold_id="h", at=NOW)),
                backend.update(Match(id=token.id), Release(hold_id="h")),
                backend.insert(a_token(object_id=str(number), created_at=NOW), InsertMode.REPLACE),
                backend.find(Match(object_id=str(number)), 5),
                backend.deactivate(Match(object_id=str(number - 1)), NOW),
            )
        ]
        for _ in range(dice.randrange(40)):
            await asyncio.sleep(0)
        for call in dice.sample(calls, dice.randrange(len(calls) + 1)):
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert {call.cancelled() or call.exception() is None for call in calls} == {True}
    for token in tokens:
        [stored] = await backend.find(Match(id=token.id), 1)
        assert stored.uses <= 2
    # Whatever was cancelled, all connections can be had again, and none is in a transaction.
    await asyncio.gather(*(backend.insert(a_token(), InsertMode.ADD) for _ in range(50)))
    assert sessions("cancelled") == []
    await backend.close()


async def test_a_cancelled_opening_leaves_the_backend_closed_or_open(store: str) -> None:
    for turns in range(60):
        backend = PostgreSQLBackend.from_url(store)
        opening = asyncio.create_task(backend.open())
        for _ in range(turns):
            await asyncio.sleep(0)
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        await backend.open()
        await backend.ping()
        await backend.close()
        if not opening.cancelled():
            await backend.close()


@pytest.mark.parametrize("cancels", [1, 3])
@pytest.mark.parametrize("is_lent", [False, True])
async def test_a_cancelled_call_that_waits_for_a_lock_ends_at_the_server(
    store: str, is_lent: bool, cancels: int
) -> None:
    made = await opened(store)
    token = a_token()
    await made.insert(token, InsertMode.REPLACE)
    schema = store.rpartition("=")[2]
    url = f"{servers.shared_url()}?application_name=waits"
    async with psycopg_pool.AsyncConnectionPool(url, min_size=1) as pool:
        backend = PostgreSQLBackend(pool if is_lent else url, schema=schema)
        await backend.open()
        with psycopg.connect(servers.shared_url()) as connection:
            connection.execute(f"SELECT FROM {schema}.vtoken_tokens FOR UPDATE".encode())
            deactivating = asyncio.create_task(backend.deactivate(Match(id=token.id), NOW))
            await waits_for_a_lock(servers.shared_url(), "waits")
            for _ in range(cancels):
                deactivating.cancel()
                await asyncio.sleep(0)
            await asyncio.wait([deactivating])
            assert deactivating.cancelled()
            assert sessions("waits") == []
        assert await backend.deactivate(Match(id=token.id), NOW) == 1
        await backend.close()
    await made.close()
