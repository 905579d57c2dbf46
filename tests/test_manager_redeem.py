"""Using a token around a side effect: redeem and its lease."""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta
from typing import Any

import pytest

from vtoken import (
    BackendClosed,
    BackendUnavailable,
    InvalidInput,
    InvalidToken,
    LeaseLost,
    OutcomeUnknown,
    TokenManager,
    TokenPolicy,
    TooManyAttempts,
)

from .core_tools import (
    MS,
    START,
    USER,
    WRONG,
    World,
    reason,
    redeem,
    refused,
)

LEASE = timedelta(seconds=60)


class TestRedeem:
    async def test_success(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a")
        async with manager.redeem(USER, "a", issued.key) as token:
            assert (token, token.key, token.is_active) == (issued, None, True)
            assert token.is_valid(world.clock())
            assert token.leased_until == START + LEASE
            stored = await manager.get(issued.id)
            assert stored is not None
            assert not stored.is_valid(world.clock())
        assert await reason(manager.consume(USER, "a", issued.key)) == "used"

    @pytest.mark.parametrize(
        "error", [ZeroDivisionError, InvalidToken, LeaseLost, KeyboardInterrupt, GeneratorExit]
    )
    async def test_an_exception_gives_it_back(self, world: World, error: type[BaseException]) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a")
        before = await world.stored()
        raised = error()
        with pytest.raises(error) as info:
            async with manager.redeem(USER, "a", issued.key):
                raise raised
        assert info.value is raised
        assert await world.stored() == before
        assert await redeem(manager, "a", issued.key) == issued.id

    async def test_a_cancellation_gives_it_back_and_is_not_swallowed(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a")
        started = asyncio.Event()

        async def work() -> None:
            async with manager.redeem(USER, "a", issued.key):
                started.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await started.wait()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert await manager.consume(USER, "a", issued.key) == issued

    @pytest.mark.parametrize("when", ["before", "after"])
    async def test_cancelled_while_it_takes_the_lease(self, world: World, when: str) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a")
        reached = asyncio.Event()
        hooks = world.backend.before if when == "before" else world.backend.after

        async def hang_once() -> None:
            del hooks["update"]
            reached.set()
            await asyncio.Event().wait()

        hooks["update"] = hang_once
        task = asyncio.create_task(redeem(manager, "a", issued.key))
        await reached.wait()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert await manager.consume(USER, "a", issued.key) == issued

    @pytest.mark.parametrize(("after", "lost"), [(LEASE - MS, False), (LEASE, True), (2 * LEASE, True)])
    async def test_a_late_committer_loses(self, world: World, after: timedelta, lost: bool) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a")

        async def late() -> None:
            async with manager.redeem(USER, "a", issued.key):
                world.clock.advance(after)

        if lost:
            error = await refused(LeaseLost, late())
            assert (error.__cause__, error.__context__) == (None, None)
            assert await manager.consume(USER, "a", issued.key) == issued
        else:
            await late()
            assert await reason(manager.consume(USER, "a", issued.key)) == "used"

    async def test_a_lease_that_ended_is_free_for_another_and_fenced(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a")
        first, second = (manager.redeem(USER, "a", issued.key, lease=length) for length in (LEASE, 3 * LEASE))
        await first.__aenter__()
        world.clock.advance(LEASE)
        await second.__aenter__()
        await refused(LeaseLost, first.__aexit__(None, None, None))
        assert await reason(manager.verify(USER, "a", issued.key)) == "leased"
        await second.__aexit__(None, None, None)
        assert (await world.stored())[0].uses == 1

    async def test_giving_back_an_ended_lease_leaves_the_next_one(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a")
        first = manager.redeem(USER, "a", issued.key)
        await first.__aenter__()
        world.clock.advance(LEASE)
        async with manager.redeem(USER, "a", issued.key):
            error = ZeroDivisionError()
            assert not await first.__aexit__(type(error), error, None)
            assert await reason(manager.consume(USER, "a", issued.key)) == "leased"
        assert (await world.stored())[0].uses == 1

    @pytest.mark.parametrize("how", ["deactivated", "replaced", "purged"])
    @pytest.mark.parametrize("fails", [False, True])
    async def test_deactivated_meanwhile_it_is_lost_and_never_revived(
        self, world: World, how: str, fails: bool
    ) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a")

        async def interrupted() -> None:
            async with manager.redeem(USER, "a", issued.key):
                if how == "replaced":
                    await manager.deactivate_and_create(USER, "a")
                else:
                    await manager.deactivate(USER)
                if how == "purged":
                    world.clock.advance(LEASE)
                    await manager.purge()
                if fails:
                    raise ZeroDivisionError

        await refused(ZeroDivisionError if fails else LeaseLost, interrupted())
        expected = "unknown" if how == "purged" else "inactive"
        assert await reason(manager.consume(USER, "a", issued.key)) == expected

    async def test_expired_meanwhile_but_leased_in_time(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a", expiration_in_minutes=0.5)
        async with manager.redeem(USER, "a", issued.key):
            world.clock.advance(timedelta(seconds=45))
        assert await reason(manager.consume(USER, "a", issued.key)) == "used"

    @pytest.mark.parametrize(
        "lease", [timedelta(0), -LEASE, timedelta(microseconds=999), 60, None, True, "60"]
    )
    async def test_a_lease_out_of_range(self, world: World, lease: Any) -> None:
        with pytest.raises(InvalidInput):
            (await world.manager()).redeem(USER, "a", "key", lease=lease)

    async def test_a_lease_past_the_end_of_time(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a")
        before = await world.stored()
        await refused(InvalidInput, redeem(manager, "a", issued.key, lease=timedelta.max))
        assert await world.stored() == before

    async def test_a_lease_of_a_millisecond(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a")
        assert await redeem(manager, "a", issued.key, lease=MS) == issued.id

    async def test_nothing_happens_before_the_block_is_entered(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a")
        world.backend.calls.clear()
        manager.redeem(USER, "a", issued.key)
        assert world.backend.calls == []

    @pytest.mark.parametrize("happened", [True, False])
    async def test_an_unknown_outcome_of_the_mark_is_said_and_settled(
        self, world: World, happened: bool
    ) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a")
        hooks = world.backend.after if happened else world.backend.before

        async def broken() -> None:
            del hooks["update"]
            raise OutcomeUnknown("the connection broke")

        with pytest.raises(OutcomeUnknown):
            async with manager.redeem(USER, "a", issued.key):
                hooks["update"] = broken
        used = (await world.stored())[0]
        assert (used.uses, used.is_active, used.lease_id) == ((1, False, "") if happened else (0, True, ""))

    async def test_a_store_that_goes_away_in_the_block_hides_no_error(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a")

        async def interrupted() -> None:
            async with manager.redeem(USER, "a", issued.key):
                world.backend.failing["update"] = BackendUnavailable("the store is away")
                raise ZeroDivisionError

        await refused(ZeroDivisionError, interrupted())
        assert "ends by itself" in caplog.text
        del world.backend.failing["update"]
        assert await reason(manager.consume(USER, "a", issued.key)) == "leased"
        world.clock.advance(LEASE)
        assert await manager.consume(USER, "a", issued.key) == issued

    async def test_a_manager_closed_in_the_block(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.CRITICAL, "vtoken")
        manager = TokenManager(world.backend, clock=world.clock)
        await manager.open()
        issued = await manager.deactivate_and_create(USER, "a")
        with pytest.raises(BackendClosed):
            async with manager.redeem(USER, "a", issued.key):
                await manager.aclose()
        async with manager:
            world.clock.advance(LEASE)
            assert await manager.consume(USER, "a", issued.key) == issued

    async def test_at_the_end_of_its_lease_a_token_is_valid_again(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a")
        await manager.redeem(USER, "a", issued.key).__aenter__()
        world.clock.advance(LEASE - MS)
        assert await reason(manager.verify(USER, "a", issued.key)) == "leased"
        world.clock.advance(MS)
        assert await manager.verify(USER, "a", issued.key) == issued

    async def test_a_lease_given_back_in_between_is_taken(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a")
        holder = manager.redeem(USER, "a", issued.key)
        await holder.__aenter__()

        async def give_back() -> None:
            del world.backend.before["find"]
            error = ZeroDivisionError()
            await holder.__aexit__(type(error), error, None)

        world.backend.before["find"] = give_back
        assert await manager.consume(USER, "a", issued.key) == issued

    async def test_the_answer_is_leased_when_it_keeps_slipping_away(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a")
        held: list[Any] = []

        async def lease_before() -> None:
            if len(held) < 3:
                held.append(None)
                held[-1] = manager.redeem(USER, "a", issued.key)
                updating = world.backend.before.pop("update")
                await held[-1].__aenter__()
                world.backend.before["update"] = updating

        async def give_back_before() -> None:
            if held and held[-1] is not None:
                error, holder = ZeroDivisionError(), held[-1]
                held[-1] = None
                updating = world.backend.before.pop("update", None)
                await holder.__aexit__(type(error), error, None)
                if updating is not None:
                    world.backend.before["update"] = updating

        world.backend.before["update"] = lease_before
        world.backend.before["find"] = give_back_before
        assert await reason(manager.consume(USER, "a", issued.key)) == "leased"
        world.backend.before.clear()
        assert await manager.consume(USER, "a", issued.key) == issued

    @pytest.mark.parametrize("fails", [False, True])
    async def test_with_a_cap_it_costs_what_consume_costs(self, world: World, fails: bool) -> None:
        manager = await world.manager(TokenPolicy("a", max_attempts=2))
        issued = await manager.deactivate_and_create(USER, "a")
        await refused(InvalidToken, redeem(manager, "a", WRONG))
        for _ in range(4 if fails else 0):
            with pytest.raises(ZeroDivisionError):
                async with manager.redeem(USER, "a", issued.key):
                    raise ZeroDivisionError
        if not fails:
            await redeem(manager, "a", issued.key)
            await refused(InvalidToken, redeem(manager, "a", WRONG))
        await refused(InvalidToken, redeem(manager, "a", WRONG))
        await refused(TooManyAttempts, redeem(manager, "a", issued.key))
