"""The store through the application's own transaction, on every kind of handle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, Final, NamedTuple

import asyncpg  # type: ignore[import-untyped]  # it publishes no types
import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from tests import postgresql_servers as servers
from tests.postgresql_random import Calls, everything
from tests.postgresql_servers import waits_for_a_lock
from vtoken.backend import (
    Budget,
    Hold,
    InsertMode,
    InsertResult,
    Match,
    Outcome,
    Spend,
    State,
    Use,
    UseHeld,
)
from vtoken.errors import BackendClosed, BackendError, BackendUnavailable, InvalidInput
from vtoken.testing.harness import MINUTE, NOW, a_token
from vtoken_backends.memory import MemoryBackend
from vtoken_backends.postgresql import PostgreSQLBackend
from vtoken_backends.postgresql.statements import Statement
from vtoken_backends.postgresql.transactions import (
    _Within,  # pyright: ignore[reportPrivateUsage]  # what a cancellation is timed by
)


class Own(NamedTuple):
    """A transaction of the application's, and how it runs a statement of its own there."""

    handle: object
    execute: Callable[[str], Any]


class RolledBack(Exception):
    pass


Begin = Callable[[str], AbstractAsyncContextManager[Own]]


@asynccontextmanager
async def on_psycopg(url: str) -> AsyncGenerator[Own]:
    async with await psycopg.AsyncConnection.connect(url) as connection, connection.transaction():
        yield Own(connection, partial(_execute, connection))


@asynccontextmanager
async def on_asyncpg(url: str) -> AsyncGenerator[Own]:
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction():
            yield Own(connection, connection.execute)
    finally:
        await connection.close()


@asynccontextmanager
async def on_asyncpg_pool(url: str) -> AsyncGenerator[Own]:
    async with (
        asyncpg.create_pool(url, min_size=1, max_size=1) as pool,
        pool.acquire() as connection,
        connection.transaction(),
    ):
        yield Own(connection, connection.execute)


def on_session(driver: str) -> Begin:
    @asynccontextmanager
    async def begin(url: str) -> AsyncGenerator[Own]:
        engine = create_async_engine(url.replace("postgresql://", f"postgresql+{driver}://"))
        try:
            async with AsyncSession(engine) as session, session.begin():
                yield Own(session, partial(_execute_in_session, session))
        finally:
            await engine.dispose()

    return begin


async def _execute(connection: psycopg.AsyncConnection[Any], text: str) -> object:
    return await connection.execute(text.encode())


async def _execute_in_session(session: AsyncSession, text: str) -> object:
    return await (await session.connection()).exec_driver_sql(text)


@asynccontextmanager
async def on_connection(url: str) -> AsyncGenerator[Own]:
    engine = create_async_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    try:
        async with engine.begin() as connection:
            yield Own(connection, connection.exec_driver_sql)
    finally:
        await engine.dispose()


BEGINS: Final = {
    "psycopg": on_psycopg,
    "asyncpg": on_asyncpg,
    "asyncpg pool": on_asyncpg_pool,
    "session on psycopg": on_session("psycopg"),
    "session on asyncpg": on_session("asyncpg"),
    "connection": on_connection,
}


@pytest.fixture
def url() -> str:
    return servers.shared_url()


@pytest.fixture(params=[*BEGINS.values()], ids=[*BEGINS])
def begin(request: pytest.FixtureRequest) -> Begin:
    chosen: Begin = request.param
    return chosen


@pytest.fixture
async def backend(url: str) -> AsyncIterator[PostgreSQLBackend]:
    with servers.fresh_store(url) as store:
        made = PostgreSQLBackend.from_url(store)
        await made.open()
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            await connection.execute("DROP TABLE IF EXISTS passwords; CREATE TABLE passwords (new text)")
        yield made
        await made.close()


async def passwords(url: str) -> list[Any]:
    async with await psycopg.AsyncConnection.connect(url) as connection:
        return await (await connection.execute("SELECT new FROM passwords")).fetchall()


async def held(backend: PostgreSQLBackend) -> str:
    """A stored token that is held; its id."""
    token = a_token()
    await backend.insert(token, InsertMode.REPLACE)
    hold = Hold(hold_id="mine", until=NOW + MINUTE)
    presented = await backend.present(Match(digests=(token.keys[0].digest,)), hold, NOW)
    assert presented.outcome is Outcome.RIGHT
    return token.id


async def test_the_use_is_committed_with_the_applications_row(
    backend: PostgreSQLBackend, begin: Begin, url: str
) -> None:
    token_id = await held(backend)
    async with begin(url) as own:
        await own.execute("INSERT INTO passwords VALUES ('new')")
        used = await backend.within(own.handle).update(
            Match(id=token_id), UseHeld(hold_id="mine", at=NOW, use_id="x")
        )
        assert used is not None
        [outside] = await backend.find(Match(id=token_id), 1)
        assert outside.is_active
    [token] = await backend.find(Match(id=token_id), 1)
    assert (token.state, token.uses, token.holds) == (State.USED, 1, ())
    assert await passwords(url) == [("new",)]


async def test_a_transaction_that_is_rolled_back_leaves_neither(
    backend: PostgreSQLBackend, begin: Begin, url: str
) -> None:
    token_id = await held(backend)
    with pytest.raises(RolledBack):  # noqa: PT012  # raised within the transaction
        async with begin(url) as own:
            await own.execute("INSERT INTO passwords VALUES ('new')")
            await backend.within(own.handle).update(Match(id=token_id), UseHeld(hold_id="mine", at=NOW))
            raise RolledBack
    [token] = await backend.find(Match(id=token_id), 1)
    assert (token.state, token.uses, len(token.holds)) == (State.ACTIVE, 0, 1)
    assert await passwords(url) == []


async def test_a_token_is_issued_with_its_charges_or_not_at_all(
    backend: PostgreSQLBackend, begin: Begin, url: str
) -> None:
    spend = Spend(budget=Budget(object=b"o" * 16, name=b"n" * 16), limit=1, window=MINUTE, max_window=MINUTE)
    with pytest.raises(RolledBack):  # noqa: PT012  # raised within the transaction
        async with begin(url) as own:
            within = backend.within(own.handle)
            inserted = await within.insert(a_token(), InsertMode.REPLACE, spends=(spend,))
            assert inserted.result is InsertResult.INSERTED
            again = await within.insert(a_token(), InsertMode.REPLACE, spends=(spend,))
            assert again.result is InsertResult.LIMITED
            raise RolledBack
    assert await backend.find(Match(), 9) == []
    assert await backend.budgets((spend.budget,)) == [None]


def spend(name: bytes, limit: int, of: bytes = bytes(16)) -> Spend:
    return Spend(budget=Budget(object=of, name=name * 16), limit=limit, window=MINUTE, max_window=MINUTE)


async def test_what_belongs_to_no_object_is_charged_last_and_apart(
    backend: PostgreSQLBackend, begin: Begin, url: str
) -> None:
    shared, own_spend = spend(b"s", 2), spend(b"n", 1, of=b"o" * 16)
    async with begin(url) as own:
        within = backend.within(own.handle)
        inserted = await within.insert(a_token(), InsertMode.REPLACE, spends=(shared, own_spend))
        assert [charge.budget for charge in inserted.spending.charges] == [shared.budget, own_spend.budget]
        spent, unseen = await backend.budgets((shared.budget, own_spend.budget))
        assert (spent and spent.spent, unseen) == (1, None)
        limited = await within.insert(a_token(), InsertMode.REPLACE, spends=(shared, own_spend))
        assert (limited.result, limited.spending.full) == (InsertResult.LIMITED, 1)
        assert (await backend.budgets((shared.budget,)))[0] == spent
        await backend.spend((shared,), NOW)
        other = spend(b"n", 1, of=b"p" * 16)
        limited = await within.insert(a_token(object_id="43"), InsertMode.REPLACE, spends=(other, shared))
        assert (limited.result, limited.spending.full) == (InsertResult.LIMITED, 1)
        await own.execute("INSERT INTO passwords VALUES ('new')")
    assert await backend.find(Match(), 9) == [inserted.token]
    assert await backend.budgets((other.budget,)) == [None]


async def test_nobody_is_refused_beside_others_that_their_own_limit_refuses(
    backend: PostgreSQLBackend, url: str
) -> None:
    shared = spend(b"s", 5)

    async def issue(object_id: str) -> InsertResult:
        own_spend = spend(b"n", 2, of=object_id.encode() * 16)
        async with on_psycopg(url) as own:
            token = a_token(object_id=object_id)
            inserted = await backend.within(own.handle).insert(
                token, InsertMode.REPLACE, spends=(shared, own_spend)
            )
            await own.execute("SELECT pg_sleep(0.01)")
        return inserted.result

    results = await asyncio.gather(*(issue("a") for _ in range(20)), *(issue(name) for name in "xyz"))
    assert results[20:] == [InsertResult.INSERTED] * 3
    assert results[:20].count(InsertResult.INSERTED) == 2
    [state] = await backend.budgets((shared.budget,))
    assert state is not None
    assert state.spent == 5


async def test_every_method_does_there_what_it_does_elsewhere(
    backend: PostgreSQLBackend, begin: Begin, url: str
) -> None:
    for seed in range(3):
        memory, calls = MemoryBackend(), Calls(seed, is_within=True)
        await memory.open()
        with pytest.raises(RolledBack):  # noqa: PT012  # raised within the transaction
            async with begin(url) as own:
                within = backend.within(own.handle)
                for _ in range(60):
                    call = calls.call()
                    assert await call.on(within) == await call.on(memory), call
                assert await everything(within) == await everything(memory)
                assert await within.note("name", "text") == "text"
                await within.ping()
                raise RolledBack
        assert await everything(backend) == ((), (None,) * 6)
        assert await backend.note("name", "") == ""


async def test_a_handle_without_a_transaction_is_refused(backend: PostgreSQLBackend, url: str) -> None:
    engine = create_async_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    plain = await asyncpg.connect(url)
    async with (
        await psycopg.AsyncConnection.connect(url, autocommit=True) as automatic,
        await psycopg.AsyncConnection.connect(url) as idle,
        AsyncSession(engine) as session,
        engine.connect() as connection,
    ):
        for handle in (automatic, idle, session, connection, plain):
            with pytest.raises(InvalidInput, match="no transaction is under way"):
                backend.within(handle)
    async with engine.connect() as connection:
        automatic_too = await connection.execution_options(isolation_level="AUTOCOMMIT")
        await automatic_too.exec_driver_sql("SELECT 1")
        with pytest.raises(InvalidInput, match="no transaction is under way"):
            await backend.within(automatic_too).find(Match(), 1)
    await plain.close()
    await engine.dispose()


@pytest.mark.parametrize("handle", [None, "connection", object(), 1])
async def test_a_handle_of_another_kind_is_refused(backend: PostgreSQLBackend, handle: object) -> None:
    with pytest.raises(InvalidInput, match="must be a psycopg AsyncConnection"):
        backend.within(handle)


async def test_a_session_on_another_driver_is_refused(backend: PostgreSQLBackend) -> None:
    engine = create_async_engine("sqlite+aiosqlite://")
    async with AsyncSession(engine) as session, session.begin():
        with pytest.raises(InvalidInput, match="must be a psycopg AsyncConnection"):
            await backend.within(session).find(Match(), 1)
    await engine.dispose()


async def test_a_handle_of_another_database_is_refused(
    backend: PostgreSQLBackend, begin: Begin, url: str
) -> None:
    name = servers.new_schema()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    async with begin(f"{url.rpartition('/')[0]}/{name}") as own:
        with pytest.raises(InvalidInput, match="another database"):
            await backend.within(own.handle).find(Match(), 1)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


async def test_a_handle_of_another_server_is_refused(backend: PostgreSQLBackend) -> None:
    with servers.PostgreSQL() as other:
        async with on_psycopg(other.url) as own:
            with pytest.raises(InvalidInput, match="another database"):
                await backend.within(own.handle).find(Match(), 1)


async def test_a_transaction_that_is_over_is_refused(
    backend: PostgreSQLBackend, begin: Begin, url: str
) -> None:
    async with begin(url) as own:
        within = backend.within(own.handle)
        await within.ping()
    with pytest.raises(InvalidInput, match="no transaction is under way"):
        backend.within(own.handle)
    with pytest.raises((BackendError, InvalidInput)):
        await within.find(Match(), 1)


async def test_it_needs_the_backend_to_be_open(url: str) -> None:
    async with on_psycopg(url) as own:
        with pytest.raises(BackendClosed):
            PostgreSQLBackend(url).within(own.handle)


async def test_how_durable_a_commit_is_stays_the_handles_affair(backend: PostgreSQLBackend, url: str) -> None:
    async with await psycopg.AsyncConnection.connect(url) as connection, connection.transaction():
        await connection.execute("SET LOCAL synchronous_commit = off; SET LOCAL lock_timeout = '7s'")
        await backend.within(connection).insert(a_token(), InsertMode.REPLACE)
        asked = await connection.execute(
            "SELECT current_setting('synchronous_commit'), current_setting('lock_timeout')"
        )
        assert await asked.fetchone() == ("off", "7s")


@pytest.mark.parametrize("statement", range(2, 7))
async def test_a_cancelled_operation_has_happened_wholly_or_not_at_all(
    backend: PostgreSQLBackend, url: str, begin: Begin, statement: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An application may catch a timeout inside its transaction, and commit."""
    fetch, asked = _Within.fetch, 0

    async def cancelled_afterwards(within: _Within, one: Statement) -> list[Any]:
        nonlocal asked
        asked += 1
        rows = await fetch(within, one)
        if asked == statement:
            inserting.cancel()
            await asyncio.sleep(0)
        return rows

    token = a_token()
    async with begin(url) as own:
        with monkeypatch.context() as patch:
            patch.setattr(_Within, "fetch", cancelled_afterwards)
            target = backend.within(own.handle)
            inserting = asyncio.create_task(target.insert(token, InsertMode.REPLACE))
            await asyncio.wait([inserting])
        assert inserting.cancelled()
        await own.execute("INSERT INTO passwords VALUES ('new')")
    assert len(await passwords(url)) == 1
    found = await backend.find(Match(), 9)
    assert found == await backend.find(Match(digests=(token.keys[0].digest,)), 9)
    assert bool(found) is (statement == 6)


@pytest.mark.parametrize("statement", range(1, 9))
async def test_a_cancelled_insert_with_shared_limits_has_happened_wholly_or_not_at_all(
    backend: PostgreSQLBackend, url: str, statement: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, asked = _Within.fetch, 0
    ended = False

    async def cancelled_afterwards(within: _Within, one: Statement) -> list[Any]:
        nonlocal asked, ended
        asked += 1
        rows = await fetch(within, one)
        ended = one is _Within.commit_all
        if asked == statement:
            inserting.cancel()
            await asyncio.sleep(0)
        return rows

    async with on_psycopg(url) as own:
        with monkeypatch.context() as patch:
            patch.setattr(_Within, "fetch", cancelled_afterwards)
            spends = (spend(b"s", 1), spend(b"n", 1, of=b"o" * 16))
            target = backend.within(own.handle)
            inserting = asyncio.create_task(target.insert(a_token(), InsertMode.REPLACE, spends=spends))
            await asyncio.wait([inserting])
        assert inserting.cancelled()
        await own.execute("INSERT INTO passwords VALUES ('new')")
    assert len(await passwords(url)) == 1
    states = await backend.budgets((spends[1].budget,))
    assert (len(await backend.find(Match(), 9)), states != [None]) == (int(ended), ended)


async def test_others_wait_for_the_commit_and_only_they(backend: PostgreSQLBackend, url: str) -> None:
    token_id = await held(backend)
    async with asyncio.TaskGroup() as group, on_psycopg(url) as own:
        await backend.within(own.handle).update(Match(id=token_id), UseHeld(hold_id="mine", at=NOW))
        waiting = group.create_task(
            backend.insert(a_token(created_at=NOW + 1), InsertMode.IF_NONE_VALID, wanted_until=NOW + 1)
        )
        presenting = group.create_task(backend.update(Match(id=token_id), UseHeld(hold_id="mine", at=NOW)))
        others = [a_token(object_id=f"other {number}") for number in range(50)]
        async with asyncio.timeout(10):
            await asyncio.gather(*(backend.insert(other, InsertMode.REPLACE) for other in others))
        assert not presenting.done()
    assert presenting.result() is None
    assert waiting.result().result is InsertResult.INSERTED or waiting.result().token is not None


@pytest.mark.parametrize("by_key", [False, True])
async def test_deactivating_ends_what_took_the_place_of_what_it_waited_for(url: str, by_key: bool) -> None:
    with servers.fresh_store(f"{url}?application_name=waiting") as store:
        backend = PostgreSQLBackend.from_url(store)
        await backend.open()
        old, new = a_token(), a_token(created_at=NOW + 1)
        await backend.insert(old, InsertMode.REPLACE)
        match = Match(digests=(old.keys[0].digest,)) if by_key else Match(object_id=old.object_id)
        async with on_psycopg(url) as own:
            await backend.within(own.handle).insert(new, InsertMode.REPLACE, keep_until=NOW + MINUTE)
            deactivating = asyncio.create_task(backend.deactivate(match, NOW + 1))
            await waits_for_a_lock(url, "waiting")
        assert await deactivating == 1
        [stored] = await backend.find(Match(id=new.id), 1)
        assert stored.is_active is by_key  # by a key that was taken over, the key alone ends
        presented = await backend.present(Match(digests=(old.keys[0].digest,)), None, NOW + 1)
        assert presented.outcome is Outcome.REFUSED
        await backend.close()


@pytest.mark.parametrize("way", ["reset", "reset by name", "reset in a transaction", "erase"])
async def test_resetting_forgets_what_was_made_while_it_waited(url: str, way: str) -> None:
    old, new = (
        Spend(budget=Budget(object=b"o" * 16, name=name * 16), limit=5, window=MINUTE, max_window=MINUTE)
        for name in (b"1", b"2")
    )

    async def reset(backend: PostgreSQLBackend) -> None:
        if way == "erase":
            await backend.erase("auth.user", "1", old.budget.object)
        elif way == "reset by name":
            names = (old.budget.name, new.budget.name)
            assert await backend.reset(old.budget.object, names) == 2
        elif way == "reset":
            assert await backend.reset(old.budget.object, None) == 2
        else:
            async with on_psycopg(f"{url}?application_name=waiting") as own:
                assert await backend.within(own.handle).reset(old.budget.object, None) == 2

    with servers.fresh_store(f"{url}?application_name=waiting") as store:
        backend = PostgreSQLBackend.from_url(store)
        await backend.open()
        await backend.spend((old,), NOW)
        async with on_psycopg(url) as own:
            await backend.within(own.handle).spend((old, new), NOW)
            resetting = asyncio.create_task(reset(backend))
            await waits_for_a_lock(url, "waiting")
        await resetting
        assert await backend.budgets((old.budget, new.budget)) == [None, None]
        await backend.close()


async def test_a_serialization_failure_is_the_applications_to_repeat(
    backend: PostgreSQLBackend, url: str
) -> None:
    token = a_token()
    await backend.insert(token, InsertMode.REPLACE)
    match = Match(digests=(token.keys[0].digest,))
    async with await psycopg.AsyncConnection.connect(url) as connection:
        await connection.set_isolation_level(psycopg.IsolationLevel.SERIALIZABLE)
        with pytest.raises(BackendUnavailable, match="run it again"):  # noqa: PT012  # raised within the transaction
            async with connection.transaction():
                await backend.within(connection).find(Match(), 1)  # takes the snapshot
                assert (await backend.present(match, Use(at=NOW), NOW)).outcome is Outcome.RIGHT
                await backend.within(connection).present(match, Use(at=NOW), NOW)
    [used] = await backend.find(Match(id=token.id), 1)
    assert used.uses == 1
