"""The application's own transaction: mark_used and ``using=``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import aiosqlite
import psycopg
import pytest
from pymongo import AsyncMongoClient
from pymongo.asynchronous.client_session import AsyncClientSession

from vtoken import (
    CooldownActive,
    InvalidInput,
    InvalidToken,
    LeaseLost,
    Limit,
    Subject,
    TokenManager,
    TokenPolicy,
)

from . import postgresql_servers
from .conftest import a_store
from .core_tools import OTHER, USER, World, reason, redeem, refused
from .states import new_world


class Connection(Protocol):
    """A connection of the application's own, in words that drivers share."""

    @property
    def handle(self) -> object: ...

    async def begin(self) -> None: ...
    async def commit(self) -> None: ...
    async def rollback(self) -> None: ...


class OnPostgreSQL:
    def __init__(self, connection: psycopg.AsyncConnection[tuple[object, ...]]) -> None:
        self.handle = connection
        self.commit = connection.commit
        self.rollback = connection.rollback

    async def begin(self) -> None:
        await self.handle.execute("SELECT 1")


class OnSQLite:
    def __init__(self, connection: aiosqlite.Connection) -> None:
        self.handle = connection
        self.commit = connection.commit
        self.rollback = connection.rollback

    async def begin(self) -> None:
        await self.handle.execute("BEGIN IMMEDIATE")


class OnMongoDB:
    def __init__(self, session: AsyncClientSession) -> None:
        self.handle = session
        self.commit = session.commit_transaction
        self.rollback = session.abort_transaction

    async def begin(self) -> None:
        await self.handle.start_transaction()


class Store(NamedTuple):
    """A world on a store, and connections of the application's own to the same database."""

    world: World
    connected: Callable[[], AbstractAsyncContextManager[Connection]]

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[Connection]:
        """A connection with a transaction under way, which is committed or rolled back by the block."""
        async with self.connected() as connection:
            await connection.begin()
            try:
                yield connection
            except BaseException:
                await connection.rollback()
                raise
            await connection.commit()


@asynccontextmanager
async def on_postgresql() -> AsyncGenerator[Connection]:
    async with await psycopg.AsyncConnection.connect(postgresql_servers.shared_url()) as connection:
        yield OnPostgreSQL(connection)


@pytest.fixture
async def pg() -> AsyncGenerator[Store]:
    with postgresql_servers.fresh_store(postgresql_servers.shared_url()) as url:
        async with new_world(url) as world:
            yield Store(world, on_postgresql)


@pytest.fixture(params=["postgresql", "sqlite", "mongodb"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncGenerator[Store]:
    with a_store(request.param, request, tmp_path) as url:
        async with new_world(url) as world:
            if request.param == "postgresql":
                yield Store(world, on_postgresql)
                return

            @asynccontextmanager
            async def on_mongodb() -> AsyncGenerator[Connection]:
                async with AsyncMongoClient[Any](url) as client, client.start_session() as session:
                    yield OnMongoDB(session)

            @asynccontextmanager
            async def on_sqlite() -> AsyncGenerator[Connection]:
                async with aiosqlite.connect(tmp_path / "tokens.db") as connection:
                    yield OnSQLite(connection)

            yield Store(world, on_sqlite if request.param == "sqlite" else on_mongodb)


class TestMarkUsed:
    async def test_both_happen(self, store: Store) -> None:
        manager = await store.world.manager()
        token = await manager.issue(USER, "a")
        async with manager.redeem(USER, "a", token.key) as held, store.transaction() as own:
            await manager.mark_used(held, using=own.handle)
            assert store.world.event_names == ["issued"]  # hooks hear of the use after the block
        assert store.world.event_names == ["issued", "consumed"]
        assert await reason(manager.consume(USER, "a", token.key)) == "used"

    async def test_or_neither(self, store: Store) -> None:
        manager = await store.world.manager()
        token = await manager.issue(USER, "a")

        async def fail() -> None:
            async with manager.redeem(USER, "a", token.key) as held, store.transaction() as own:
                await manager.mark_used(held, using=own.handle)
                raise ZeroDivisionError

        await refused(ZeroDivisionError, fail())
        assert store.world.event_names == ["issued"]
        assert await manager.consume(USER, "a", token.key) == token  # given back

    async def test_rolled_back_without_an_exception(self, store: Store) -> None:
        manager = await store.world.manager()
        token = await manager.issue(USER, "a")
        async with store.connected() as connection, manager.redeem(USER, "a", token.key) as held:
            await connection.begin()
            await manager.mark_used(held, using=connection.handle)
            await connection.rollback()
        assert store.world.event_names == ["issued"]
        assert await manager.consume(USER, "a", token.key) == token

    async def test_once_in_a_transaction_and_again_in_the_next(self, store: Store) -> None:
        manager = await store.world.manager()
        token = await manager.issue(USER, "a")
        async with store.connected() as connection, manager.redeem(USER, "a", token.key) as held:
            for _ in range(3):  # as an application does that tries again after a conflict
                await connection.begin()
                await manager.mark_used(held, using=connection.handle)
                await refused(InvalidInput, manager.mark_used(held, using=connection.handle))
                await connection.rollback()
            await connection.begin()
            await manager.mark_used(held, using=connection.handle)
            await connection.commit()
            await connection.begin()
            await refused(InvalidInput, manager.mark_used(held, using=connection.handle))
        assert store.world.event_names == ["issued", "consumed"]
        assert (await store.world.stored())[0].uses == 1

    async def test_a_later_transaction_on_the_same_handle_does_not_matter(self, store: Store) -> None:
        manager = await store.world.manager()
        token = await manager.issue(USER, "a")
        async with store.connected() as connection, manager.redeem(USER, "a", token.key) as held:
            await connection.begin()
            await manager.mark_used(held, using=connection.handle)
            await connection.commit()
            await connection.begin()  # a session begins another one by itself
        assert store.world.event_names == ["issued", "consumed"]

    async def test_one_that_is_still_open_is_an_error_that_says_so(self, store: Store) -> None:
        manager = await store.world.manager()
        token = await manager.issue(USER, "a")

        async def leave() -> None:
            async with manager.redeem(USER, "a", token.key) as held:
                await connection.begin()
                await manager.mark_used(held, using=connection.handle)

        async with store.connected() as connection:
            async with asyncio.timeout(30):  # and nothing waits for it
                assert "still open" in str(await refused(InvalidInput, leave()))
            await connection.commit()
        assert await reason(manager.consume(USER, "a", token.key)) == "used"

    async def test_the_blocks_own_exception_matters_more(
        self, store: Store, caplog: pytest.LogCaptureFixture
    ) -> None:
        manager = await store.world.manager()
        token = await manager.issue(USER, "a")

        async def fail() -> None:
            async with manager.redeem(USER, "a", token.key) as held:
                await connection.begin()
                await manager.mark_used(held, using=connection.handle)
                raise ZeroDivisionError

        async with store.connected() as connection:
            async with asyncio.timeout(30):
                await refused(ZeroDivisionError, fail())
            assert "still open" in caplog.text
            await connection.rollback()

    @pytest.mark.parametrize("cancels", [1, 2])
    async def test_cancelled_after_the_commit(self, store: Store, cancels: int) -> None:
        manager = await store.world.manager()
        token = await manager.issue(USER, "a")
        committed = asyncio.Event()

        async def work() -> None:
            async with store.connected() as connection, manager.redeem(USER, "a", token.key) as held:
                await connection.begin()
                await manager.mark_used(held, using=connection.handle)
                await connection.commit()
                committed.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await committed.wait()
        for _ in range(cancels):
            task.cancel()
            await asyncio.sleep(0)
        await asyncio.wait([task])
        assert task.cancelled()
        assert store.world.event_names == ["issued", "consumed"]  # the use stands, and the hooks hear of it
        assert await reason(manager.consume(USER, "a", token.key)) == "used"

    @pytest.mark.parametrize("inside", [False, True])
    async def test_deactivated_before(self, store: Store, inside: bool) -> None:
        manager, outside = await store.world.manager(), await store.world.manager()
        token = await manager.issue(USER, "a")

        async def work() -> None:
            async with manager.redeem(USER, "a", token.key) as held:
                await (manager if inside else outside).deactivate(USER)
                async with store.transaction() as own:
                    await manager.mark_used(held, using=own.handle)

        if inside:
            await work()
        else:
            await refused(LeaseLost, work())
        assert (await store.world.stored())[0].uses == int(inside)

    async def test_handles_that_do_not_fit(self, store: Store) -> None:
        manager = await store.world.manager()
        token = await manager.issue(USER, "a")
        async with store.connected() as connection, manager.redeem(USER, "a", token.key) as held:
            for handle in (object(), connection.handle):  # no transaction is under way on the connection
                await refused(InvalidInput, manager.mark_used(held, using=handle))
            await manager.mark_used(held, using=None)
        # Neither a handle that was refused nor None marks anything: the block itself has counted the use.
        assert await reason(manager.consume(USER, "a", token.key)) == "used"

    async def test_a_handle_of_another_store_keeps_no_hold(self, tmp_path: Path) -> None:
        """Though its transaction is still open when the block is left."""
        async with (
            new_world(f"sqlite:///{tmp_path}/tokens.db") as world,
            aiosqlite.connect(tmp_path / "other.db") as other,
        ):
            manager = await world.manager()
            token = await manager.issue(USER, "a")
            await other.execute("BEGIN IMMEDIATE")

            async def work() -> None:
                async with manager.redeem(USER, "a", token.key) as held:
                    await manager.mark_used(held, using=other)

            assert "another file" in str(await refused(InvalidInput, work()))
            await manager.consume(USER, "a", token.key)

    async def test_a_second_click_after_the_commit(self, store: Store) -> None:
        manager = await store.world.manager()
        token = await manager.issue(USER, "a")
        async with (
            manager.redeem(USER, "a", token.key, consume_id="form") as held,
            store.transaction() as own,
        ):
            await manager.mark_used(held, using=own.handle)
        assert (await manager.consume(USER, "a", token.key, consume_id="form")).is_replay


class TestIssueUsing:
    policy = TokenPolicy("mail", cooldown="1m", issue_limits=[Limit(2, "1h", by="ip")])
    by = {"ip": "192.0.2.7"}  # noqa: RUF012  # it is never changed

    async def test_with_the_commit_and_not_before(self, store: Store) -> None:
        manager = await store.world.manager(self.policy)
        async with store.transaction() as connection:
            token = await manager.issue(USER, "mail", by=self.by, using=connection.handle)
            assert token.key
            assert store.world.events[-1].in_transaction
            assert await store.world.stored() == []
        assert await manager.consume(USER, "mail", token.key) == token

    async def test_a_rollback_gives_the_objects_limits_back_and_no_others(self, pg: Store) -> None:
        manager = await pg.world.manager(self.policy)
        async with pg.connected() as connection:
            for _ in range(2):
                await connection.begin()
                await manager.issue(USER, "mail", by=self.by, using=connection.handle)
                await connection.rollback()
        assert await pg.world.stored() == []
        await manager.issue(USER, "mail", by={"ip": "x"})  # the cooldown was rolled back
        error = await refused(CooldownActive, manager.issue(OTHER, "mail", by=self.by))
        assert error.limit == Limit(2, "1h", by="ip")

    async def test_one_slow_transaction_locks_no_budget_that_everybody_shares(self, pg: Store) -> None:
        manager = await pg.world.manager(self.policy)
        async with pg.transaction() as connection:
            await manager.issue(USER, "mail", by=self.by, using=connection.handle)
            async with asyncio.timeout(20):
                await manager.issue(OTHER, "mail", by=self.by)

    async def test_ending_and_saving(self, store: Store) -> None:
        manager = await store.world.manager()
        token = await manager.issue(USER, "a")
        async with store.connected() as connection:
            await connection.begin()
            token.set_extra_data(1)
            await manager.save(token, using=connection.handle)
            assert await manager.deactivate(USER, using=connection.handle) == 1
            assert await manager.erase(USER, using=connection.handle) == 1
            await connection.rollback()
        [stored] = await store.world.stored()
        assert (stored.is_active, stored.extra_data) == (True, None)

    async def test_a_refused_insert_leaves_the_transaction_usable(self, store: Store) -> None:
        manager = await store.world.manager(self.policy)
        taken = {"generator": lambda: "taken"}
        await manager.issue(OTHER, "free", key_generator_kwargs=taken)
        async with store.transaction() as connection:
            await manager.issue(USER, "mail", by=self.by, using=connection.handle)
            await refused(CooldownActive, manager.issue(USER, "mail", by=self.by, using=connection.handle))
            keys = iter(["taken", "free"])
            kwargs = {"generator": lambda: next(keys)}
            token = await manager.issue(USER, "free", key_generator_kwargs=kwargs, using=connection.handle)
        assert await manager.consume(USER, "free", token.key) == token


async def test_a_block_within_a_block(pg: Store) -> None:
    manager: TokenManager = await pg.world.manager()
    outer, inner = await manager.issue(USER, "a"), await manager.issue(Subject("auth.user", 7), "a")
    async with manager.redeem(USER, "a", outer.key):
        assert await redeem_of(manager, Subject("auth.user", 7), inner.key) == inner.id
        await manager.deactivate(USER)
    with pytest.raises(InvalidToken):
        await redeem(manager, "a", outer.key)


async def redeem_of(manager: TokenManager, person: Subject, key: str) -> str:
    async with manager.redeem(person, "a", key) as token:
        return token.id
