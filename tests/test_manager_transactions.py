"""The application's own transaction: mark_used and ``using=``, on PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager

import psycopg
import pytest

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
from .core_tools import OTHER, USER, World, reason, redeem, refused
from .states import new_world

Connection = psycopg.AsyncConnection[tuple[object, ...]]


@pytest.fixture
def store() -> Iterator[str]:
    with postgresql_servers.fresh_store(postgresql_servers.shared_url()) as url:
        yield url


@pytest.fixture
async def pg(store: str) -> AsyncGenerator[World]:
    async with new_world(store) as world:
        yield world


@asynccontextmanager
async def connected() -> AsyncGenerator[Connection]:
    """A connection of the application's own, which begins a transaction with its first statement."""
    async with await psycopg.AsyncConnection.connect(postgresql_servers.shared_url()) as connection:
        yield connection


async def begin(connection: Connection) -> None:
    await connection.execute("SELECT 1")


class TestMarkUsed:
    async def test_both_happen(self, pg: World) -> None:
        manager = await pg.manager()
        token = await manager.issue(USER, "a")
        async with connected() as connection:
            async with manager.redeem(USER, "a", token.key) as held, connection.transaction():
                await manager.mark_used(held, using=connection)
                assert pg.event_names == ["issued"]  # hooks hear of the use after the block
        assert pg.event_names == ["issued", "consumed"]
        assert await reason(manager.consume(USER, "a", token.key)) == "used"

    async def test_or_neither(self, pg: World) -> None:
        manager = await pg.manager()
        token = await manager.issue(USER, "a")

        async def fail() -> None:
            async with manager.redeem(USER, "a", token.key) as held, connection.transaction():
                await manager.mark_used(held, using=connection)
                raise ZeroDivisionError

        async with connected() as connection:
            await refused(ZeroDivisionError, fail())
        assert pg.event_names == ["issued"]
        assert await manager.consume(USER, "a", token.key) == token  # given back

    async def test_rolled_back_without_an_exception(self, pg: World) -> None:
        manager = await pg.manager()
        token = await manager.issue(USER, "a")
        async with connected() as connection, manager.redeem(USER, "a", token.key) as held:
            await begin(connection)
            await manager.mark_used(held, using=connection)
            await connection.rollback()
        assert pg.event_names == ["issued"]
        assert await manager.consume(USER, "a", token.key) == token

    async def test_once_in_a_transaction_and_again_in_the_next(self, pg: World) -> None:
        manager = await pg.manager()
        token = await manager.issue(USER, "a")
        async with connected() as connection, manager.redeem(USER, "a", token.key) as held:
            for _ in range(3):  # as an application does that tries again after a conflict
                await begin(connection)
                await manager.mark_used(held, using=connection)
                await refused(InvalidInput, manager.mark_used(held, using=connection))
                await connection.rollback()
            await begin(connection)
            await manager.mark_used(held, using=connection)
            await connection.commit()
            await begin(connection)
            await refused(InvalidInput, manager.mark_used(held, using=connection))
        assert pg.event_names == ["issued", "consumed"]
        assert (await pg.stored())[0].uses == 1

    async def test_a_later_transaction_on_the_same_handle_does_not_matter(self, pg: World) -> None:
        manager = await pg.manager()
        token = await manager.issue(USER, "a")
        async with connected() as connection, manager.redeem(USER, "a", token.key) as held:
            await begin(connection)
            await manager.mark_used(held, using=connection)
            await connection.commit()
            await begin(connection)  # a session begins another one by itself
        assert pg.event_names == ["issued", "consumed"]

    async def test_one_that_is_still_open_is_an_error_that_says_so(self, pg: World) -> None:
        manager = await pg.manager()
        token = await manager.issue(USER, "a")

        async def leave() -> None:
            async with manager.redeem(USER, "a", token.key) as held:
                await begin(connection)
                await manager.mark_used(held, using=connection)

        async with connected() as connection:
            async with asyncio.timeout(30):  # and nothing waits for it
                assert "still open" in str(await refused(InvalidInput, leave()))
            await connection.commit()
        assert await reason(manager.consume(USER, "a", token.key)) == "used"

    async def test_the_blocks_own_exception_matters_more(
        self, pg: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        manager = await pg.manager()
        token = await manager.issue(USER, "a")

        async def fail() -> None:
            async with manager.redeem(USER, "a", token.key) as held:
                await begin(connection)
                await manager.mark_used(held, using=connection)
                raise ZeroDivisionError

        async with connected() as connection:
            async with asyncio.timeout(30):
                await refused(ZeroDivisionError, fail())
            assert "still open" in caplog.text
            await connection.rollback()

    @pytest.mark.parametrize("cancels", [1, 2])
    async def test_cancelled_after_the_commit(self, pg: World, cancels: int) -> None:
        manager = await pg.manager()
        token = await manager.issue(USER, "a")
        committed = asyncio.Event()

        async def work() -> None:
            async with connected() as connection, manager.redeem(USER, "a", token.key) as held:
                await begin(connection)
                await manager.mark_used(held, using=connection)
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
        assert pg.event_names == ["issued", "consumed"]  # the use stands, and the hooks hear of it
        assert await reason(manager.consume(USER, "a", token.key)) == "used"

    @pytest.mark.parametrize("inside", [False, True])
    async def test_deactivated_before(self, pg: World, inside: bool) -> None:
        manager, outside = await pg.manager(), await pg.manager()
        token = await manager.issue(USER, "a")

        async def work() -> None:
            async with connected() as connection, manager.redeem(USER, "a", token.key) as held:
                await (manager if inside else outside).deactivate(USER)
                async with connection.transaction():
                    await manager.mark_used(held, using=connection)

        if inside:
            await work()
        else:
            await refused(LeaseLost, work())
        assert (await pg.stored())[0].uses == int(inside)

    async def test_handles_that_do_not_fit(self, pg: World) -> None:
        manager = await pg.manager()
        token = await manager.issue(USER, "a")
        async with connected() as connection, manager.redeem(USER, "a", token.key) as held:
            for handle in (object(), connection, None):  # no transaction is under way on the connection
                await refused(InvalidInput, manager.mark_used(held, using=handle))
        # A handle that was refused marks nothing: the block itself has counted the use.
        assert await reason(manager.consume(USER, "a", token.key)) == "used"

    async def test_a_second_click_after_the_commit(self, pg: World) -> None:
        manager = await pg.manager()
        token = await manager.issue(USER, "a")
        async with connected() as connection:
            async with (
                manager.redeem(USER, "a", token.key, consume_id="form") as held,
                connection.transaction(),
            ):
                await manager.mark_used(held, using=connection)
        assert (await manager.consume(USER, "a", token.key, consume_id="form")).is_replay


class TestIssueUsing:
    policy = TokenPolicy("mail", cooldown="1m", issue_limits=[Limit(2, "1h", by="ip")])
    by = {"ip": "192.0.2.7"}  # noqa: RUF012  # it is never changed

    async def test_with_the_commit_and_not_before(self, pg: World) -> None:
        manager = await pg.manager(self.policy)
        async with connected() as connection, connection.transaction():
            token = await manager.issue(USER, "mail", by=self.by, using=connection)
            assert token.key
            assert pg.events[-1].in_transaction
            assert await pg.stored() == []
        assert await manager.consume(USER, "mail", token.key) == token

    async def test_a_rollback_gives_the_objects_limits_back_and_no_others(self, pg: World) -> None:
        manager = await pg.manager(self.policy)
        async with connected() as connection:
            for _ in range(2):
                await begin(connection)
                await manager.issue(USER, "mail", by=self.by, using=connection)
                await connection.rollback()
        assert await pg.stored() == []
        await manager.issue(USER, "mail", by={"ip": "x"})  # the cooldown was rolled back
        error = await refused(CooldownActive, manager.issue(OTHER, "mail", by=self.by))
        assert error.limit == Limit(2, "1h", by="ip")

    async def test_one_slow_transaction_locks_no_budget_that_everybody_shares(self, pg: World) -> None:
        manager = await pg.manager(self.policy)
        async with connected() as connection, connection.transaction():
            await manager.issue(USER, "mail", by=self.by, using=connection)
            async with asyncio.timeout(20):
                await manager.issue(OTHER, "mail", by=self.by)

    async def test_ending_and_saving(self, pg: World) -> None:
        manager = await pg.manager()
        token = await manager.issue(USER, "a")
        async with connected() as connection:
            await begin(connection)
            token.set_extra_data(1)
            await manager.save(token, using=connection)
            assert await manager.deactivate(USER, using=connection) == 1
            assert await manager.erase(USER, using=connection) == 1
            await connection.rollback()
        [stored] = await pg.stored()
        assert (stored.is_active, stored.extra_data) == (True, None)

    async def test_a_refused_insert_leaves_the_transaction_usable(self, pg: World) -> None:
        manager = await pg.manager(self.policy)
        taken = {"generator": lambda: "taken"}
        await manager.issue(OTHER, "free", key_generator_kwargs=taken)
        async with connected() as connection, connection.transaction():
            await manager.issue(USER, "mail", by=self.by, using=connection)
            await refused(CooldownActive, manager.issue(USER, "mail", by=self.by, using=connection))
            keys = iter(["taken", "free"])
            kwargs = {"generator": lambda: next(keys)}
            token = await manager.issue(USER, "free", key_generator_kwargs=kwargs, using=connection)
        assert await manager.consume(USER, "free", token.key) == token


async def test_a_block_within_a_block(pg: World) -> None:
    manager: TokenManager = await pg.manager()
    outer, inner = await manager.issue(USER, "a"), await manager.issue(Subject("auth.user", 7), "a")
    async with manager.redeem(USER, "a", outer.key):
        assert await redeem_of(manager, Subject("auth.user", 7), inner.key) == inner.id
        await manager.deactivate(USER)
    with pytest.raises(InvalidToken):
        await redeem(manager, "a", outer.key)


async def redeem_of(manager: TokenManager, person: Subject, key: str) -> str:
    async with manager.redeem(person, "a", key) as token:
        return token.id
