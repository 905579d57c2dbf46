"""PostgreSQL against the memory backend, alone and at once, and what only PostgreSQL has: its settings."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool

from tests import postgresql_servers as servers
from tests.postgresql_random import Call, Calls, everything
from vtoken.backend import Budget, InsertMode, InsertResult, Match, Outcome, Spend, TokenBackend, Use
from vtoken.errors import BackendClosed, BackendError, BackendUnavailable, ConfigurationError
from vtoken.testing.harness import MINUTE, NOW, a_token
from vtoken_backends.memory import MemoryBackend
from vtoken_backends.postgresql import PostgreSQLBackend
from vtoken_backends.postgresql.statements import Statement
from vtoken_backends.postgresql.store import Connection

PASSWORD = "a password that nobody may see"


@pytest.fixture
async def store() -> AsyncIterator[str]:
    with servers.fresh_store(servers.shared_url()) as url:
        yield url


async def opened(url: str, **options: Any) -> PostgreSQLBackend:
    backend = PostgreSQLBackend.from_url(url, **options)
    await backend.open()
    return backend


# Against memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
async def test_it_answers_as_memory_does(store: str, seed: int) -> None:
    backend, memory, calls = await opened(store), MemoryBackend(), Calls(seed)
    await memory.open()
    for _ in range(150):
        call = calls.call()
        assert await call.on(backend) == await call.on(memory), call
    assert await everything(backend) == await everything(memory)
    await backend.close()


@pytest.mark.parametrize("seed", range(6))
async def test_calls_at_once_end_as_one_of_their_orders(store: str, seed: int) -> None:
    """Two or three calls at once, on one backend or on two: the answers and what is stored are those of some
    order. What may be several steps, ``erase`` and ``purge``, comes alone."""
    backends = [await opened(store), await opened(store)]
    calls, history = Calls(1000 + seed), list[Call]()
    dice = random.Random(seed)  # noqa: S311  # which call meets which is no secret
    for _ in range(15):
        history.append(call := calls.call())
        await call.on(backends[0])
    for _ in range(25):
        group = [a_step(calls) for _ in range(dice.choice((2, 2, 3)))]
        places = [dice.choice(backends) for _ in group]
        answers = await asyncio.gather(*(call.on(place) for call, place in zip(group, places, strict=True)))
        stored = await everything(backends[0])
        for order in itertools.permutations(range(len(group))):
            expected, state = await replayed(history, [group[number] for number in order])
            if state == stored and expected == [answers[number] for number in order]:
                history += [group[number] for number in order]
                break
        else:
            pytest.fail(f"{group} ended as no order of them does: {answers}")
    for backend in backends:
        await backend.close()


def a_step(calls: Calls) -> Call:
    while (call := calls.call()).name in ("erase", "purge") or (
        call.name == "insert" and not call.arguments[0].is_active
    ):
        pass
    return call


async def replayed(history: Sequence[Call], group: Sequence[Call]) -> tuple[list[Any], tuple[Any, ...]]:
    memory = MemoryBackend()
    await memory.open()
    for call in history:
        await call.on(memory)
    return [await call.on(memory) for call in group], await everything(memory)


async def use_up(backend: TokenBackend, digest: bytes) -> int:
    outcomes = await asyncio.gather(
        *(backend.present(Match(digests=(digest,)), Use(at=NOW), NOW) for _ in range(40))
    )
    return sum(presented.outcome is Outcome.RIGHT for presented in outcomes)


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
async def test_it_holds_whatever_the_roles_isolation_is(store: str, isolation: str) -> None:
    options = f"-c%20default_transaction_isolation%3D{isolation.replace(' ', '%5C%20')}"
    first, second = [await opened(f"{store}&options={options}") for _ in range(2)]
    spend = Spend(budget=Budget(object=b"o" * 16, name=b"n" * 16), limit=25, window=MINUTE, max_window=MINUTE)
    for _ in range(3):
        token = a_token(max_uses=7)
        assert (await first.insert(token, InsertMode.REPLACE)).result is InsertResult.INSERTED
        used = await asyncio.gather(*(use_up(backend, token.keys[0].digest) for backend in (first, second)))
        assert sum(used) == 7
    spendings = await asyncio.gather(
        *(backend.spend((spend,), NOW) for backend in (first, second) for _ in range(40))
    )
    assert sum(spending.full is None for spending in spendings) == 25
    await first.close()
    await second.close()


async def test_the_latest_uses_are_remembered_and_older_ones_forgotten(store: str) -> None:
    backend = await opened(store)
    token = a_token(max_uses=None)
    match = Match(digests=(token.keys[0].digest,))
    await backend.insert(token, InsertMode.REPLACE)
    for start in range(0, 3500, 250):
        uses = [Use(at=NOW + number, use_id=f"use {number}") for number in range(start, start + 250)]
        await asyncio.gather(*(backend.present(match, use, NOW) for use in uses))
    receipts = f"{store.rpartition('=')[2]}.vtoken_receipts"
    [(kept,)] = await backend._fetch(Statement("SELECT count(*) FROM @".replace("@", receipts)))
    assert 1000 <= kept <= 2000
    for number in (2500, 3499):
        again = await backend.present(match, Use(at=NOW + 9999, use_id=f"use {number}"), NOW)
        assert (again.outcome, again.used_at) == (Outcome.REPLAYED, NOW + number)
    await backend.close()


# Settings -----------------------------------------------------------------------------------------


async def test_a_write_is_durable_whatever_the_roles_default_is(store: str) -> None:
    """A trigger notes how durable each transaction that changes a token is going to be."""
    backend = await opened(f"{store}&options=-c%20synchronous_commit%3Doff")
    schema = store.rpartition("=")[2]
    with psycopg.connect(servers.shared_url(), autocommit=True) as connection:
        connection.execute(
            """
            CREATE TABLE @.seen (setting text);
            CREATE FUNCTION @.see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                INSERT INTO @.seen VALUES (current_setting('synchronous_commit'));
                RETURN NULL;
            END $$;
            CREATE TRIGGER see AFTER INSERT OR UPDATE OR DELETE ON @.vtoken_tokens
                FOR EACH ROW EXECUTE FUNCTION @.see();
            CREATE TRIGGER see AFTER INSERT OR UPDATE OR DELETE ON @.vtoken_budgets
                FOR EACH ROW EXECUTE FUNCTION @.see();
            """.replace("@", schema).encode()
        )
        spend = Spend(
            budget=Budget(object=b"o" * 16, name=b"n" * 16), limit=9, window=MINUTE, max_window=MINUTE
        )
        token = a_token()
        await backend.insert(token, InsertMode.REPLACE, spends=(spend,))
        await backend.present(Match(digests=(token.keys[0].digest,)), Use(at=NOW), NOW)
        await backend.deactivate(Match(id=token.id), NOW)
        await backend.spend((spend,), NOW)
        await backend.reset(spend.budget.object, None)
        await backend.purge(NOW + MINUTE, NOW, 10, NOW)
        await backend.insert(a_token(), InsertMode.REPLACE)
        await backend.erase(token.content_type, token.object_id, spend.budget.object)
        seen = connection.execute(f"TABLE {schema}.seen".encode()).fetchall()
    assert {setting for (setting,) in seen} == {"on"}
    assert len(seen) == 8
    await backend.close()


async def test_a_pooler_gets_no_prepared_statements_and_no_settings(store: str) -> None:
    """A pooler answers with a process id of its own."""
    async with servers.proxy(as_process=1) as (_, port):
        parts = urlsplit(store)
        backend = await opened(parts._replace(netloc=f"vtoken@127.0.0.1:{port}").geturl())
        await backend.insert(a_token(), InsertMode.REPLACE)
        [prepared] = await backend._fetch(Statement("SELECT count(*) FROM pg_prepared_statements"))
        [seqscan] = await backend._fetch(Statement("SELECT current_setting('enable_seqscan')"))
        assert (prepared, seqscan) == ((0,), ("on",))
        await backend.close()


async def test_prepared_statements_that_vanish_are_given_up(store: str) -> None:
    """As behind a pooler that passes the server's process id on."""
    backend = await opened(store, pool_size=1)
    token = a_token()
    for _ in range(3):
        await backend.find(Match(digests=(token.keys[0].digest,)), 1)
    await backend._fetch(Statement("DEALLOCATE ALL"))
    assert await backend.find(Match(digests=(token.keys[0].digest,)), 1) == []
    inserted = await backend.insert(token, InsertMode.REPLACE)
    assert inserted.result is InsertResult.INSERTED
    await backend.close()


async def test_prepared_statements_that_vanish_for_several_at_once(store: str) -> None:
    backend = await opened(store, pool_size=3)

    async def on_all(text: str) -> list[Any]:
        has_one, all_have_one = itertools.count(1), asyncio.Event()

        async def fetch(connection: Connection) -> Any:
            if next(has_one) == 3:
                all_have_one.set()
            await all_have_one.wait()
            return await connection.fetch(Statement(text))

        return await asyncio.gather(*(backend._connections.run(fetch, writes=False) for _ in range(3)))

    await on_all("SELECT 1")
    await on_all("DEALLOCATE ALL")
    assert await on_all("SELECT 1") == [[(1,)]] * 3
    await backend.close()


# URLs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:secret@host/db?nonsense=1",
        "postgresql://user:se/cr@et@host:port/db",
        "postgresql://host/db?pool_size=0",
        "postgresql://host/db?pool_size=many",
        "postgresql://host/db?schema=",
        f"postgresql://host/db?schema={'s' * 64}",
    ],
)
def test_a_url_that_cannot_work_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        PostgreSQLBackend.from_url(url)
    assert "secret" not in str(refused.value)
    assert refused.value.__cause__ is None


def test_an_option_that_is_misspelt_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"'poolsize'.*pool_size"):
        PostgreSQLBackend.from_url("postgresql://host/db", poolsize=3)


def test_the_repr_shows_where_and_no_password() -> None:
    url = f"postgresql://user:{PASSWORD.replace(' ', '%20')}@host:5433/db?schema=tokens"
    shown = repr(PostgreSQLBackend.from_url(url))
    assert "host:5433" in shown
    assert "tokens" in shown
    assert "password" not in shown


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("/postgres", "/no_such_database"), "it has no such database or role"),
        (("//vtoken@", "//nobody_here@"), "it has no such database or role"),
        (("127.0.0.1", "no-such-host.invalid"), "the host name is unknown"),
    ],
)
async def test_what_is_wrong_with_a_connection_is_said(change: tuple[str, str], problem: str) -> None:
    url = servers.shared_url().replace(*change)
    with pytest.raises(BackendUnavailable, match=problem):
        await opened(url)


async def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(BackendUnavailable, match=r"127\.0\.0\.1:1: nobody listens there") as refused:
        await opened(f"postgresql://user:{PASSWORD.replace(' ', '%20')}@127.0.0.1:1/db")
    assert refused.value.__cause__ is None
    assert refused.value.__context__ is None


# A pool of the application's own ------------------------------------------------------------------


@pytest.mark.parametrize("autocommit", [False, True])
async def test_a_pool_that_is_handed_in_stays_the_applications(store: str, autocommit: bool) -> None:
    url, _, schema = store.partition("?schema=")
    async with AsyncConnectionPool(
        url, min_size=1, max_size=3, open=False, kwargs={"autocommit": autocommit}
    ) as pool:
        backend = PostgreSQLBackend(pool, schema=schema)
        assert "pool" in repr(backend)
        for _ in range(2):
            await backend.open()
            tokens = [a_token(object_id=str(number)) for number in range(30)]
            await asyncio.gather(*(backend.insert(token, InsertMode.REPLACE) for token in tokens))
            used = await asyncio.gather(*(use_up(backend, token.keys[0].digest) for token in tokens))
            assert used == [1] * 30
            assert await backend.deactivate(Match(), NOW) == 0
            await backend.close()
        async with pool.connection() as connection:
            assert connection.autocommit is autocommit
            await connection.execute("SELECT 1")
        with pytest.raises(BackendClosed):
            await backend.find(Match(), 1)


async def test_a_pool_that_is_closed_is_an_error_that_says_so(store: str) -> None:
    url, _, schema = store.partition("?schema=")
    async with AsyncConnectionPool(url, min_size=1, max_size=1, open=False) as pool:
        backend = PostgreSQLBackend(pool, schema=schema)
        await backend.open()
    with pytest.raises(BackendUnavailable, match="PoolClosed"):
        await backend.find(Match(), 1)
    await backend.close()


async def test_a_pool_of_another_encoding_is_refused(store: str) -> None:
    """Its texts would be other people's texts, or none."""
    url, _, schema = store.partition("?schema=")
    async with AsyncConnectionPool(f"{url}?client_encoding=LATIN1", min_size=1, open=False) as pool:
        with pytest.raises(BackendError, match="client_encoding=UTF8"):
            await PostgreSQLBackend(pool, schema=schema).open()


async def test_it_reads_binary_values_however_the_role_has_them_written(store: str) -> None:
    backend = await opened(f"{store}&options=-cbytea_output%3Descape")
    budget = Budget(object=bytes(range(80, 96)), name=bytes(range(120, 136)))
    spend = Spend(budget=budget, limit=1, window=MINUTE, max_window=MINUTE)
    token = a_token(context=bytes(range(256)))
    assert (await backend.insert(token, InsertMode.REPLACE, spends=(spend,))).token == token
    assert await backend.find(Match(id=token.id), 1) == [token]
    assert (await backend.spend((spend,), NOW)).full == 0
    await backend.close()


# Its life -----------------------------------------------------------------------------------------


def test_another_event_loop_is_told_so(store: str) -> None:
    backend = PostgreSQLBackend.from_url(store)
    with asyncio.Runner() as first:
        first.run(backend.open())
        with asyncio.Runner() as second, pytest.raises(BackendClosed, match="another event loop"):
            second.run(backend.find(Match(), 1))
        first.run(backend.close())
    with asyncio.Runner() as third:  # a loop that is gone is no loop of anybody's
        third.run(backend.open())
        third.run(backend.find(Match(), 1))
        third.run(backend.close())


async def test_closing_ends_the_connections(store: str) -> None:
    backend = await opened(f"{store}&application_name=closing")
    await asyncio.gather(*(backend.find(Match(), 1) for _ in range(20)))
    await backend.close()
    with psycopg.connect(servers.shared_url(), autocommit=True) as connection:
        for _ in range(100):
            left = connection.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'closing'"
            )
            if left.fetchone() == (0,):
                break
            connection.execute("SELECT pg_sleep(0.05)")
        else:
            pytest.fail("connections are left")
    await backend.close()
