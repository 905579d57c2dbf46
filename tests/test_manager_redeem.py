"""Using a token around a side effect: redeem and its hold."""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta
from typing import Any

import pytest

from vtoken import (
    AlreadyUsed,
    BackendClosed,
    BackendUnavailable,
    InvalidInput,
    InvalidToken,
    IssuedToken,
    LeaseLost,
    OutcomeUnknown,
    TokenBusy,
    TokenManager,
    TokenPolicy,
    TooManyAttempts,
)

from .core_tools import (
    CODE,
    MS,
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
            del hooks["present"]
            reached.set()
            await asyncio.Event().wait()

        hooks["present"] = hang_once
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
            await first.__aexit__(type(error), error, None)
            assert await reason(manager.consume(USER, "a", issued.key)) == "leased"
        assert (await world.stored())[0].uses == 1

    @pytest.mark.parametrize("fails", [False, True])
    @pytest.mark.parametrize("how", ["deactivated", "deactivated by id", "erased"])
    async def test_ended_from_outside_it_is_lost_and_never_revived(
        self, world: World, how: str, fails: bool
    ) -> None:
        manager, outside = await world.manager(), await world.manager()
        issued = await manager.issue(USER, "a")

        async def interrupted() -> None:
            async with manager.redeem(USER, "a", issued.key):
                if how == "deactivated":
                    assert await outside.deactivate(USER) == 1
                elif how == "erased":
                    await outside.erase(USER)
                else:
                    assert await outside.deactivate(issued) == 1
                if fails:
                    raise ZeroDivisionError

        await refused(ZeroDivisionError if fails else LeaseLost, interrupted())
        expected = "unknown" if how == "erased" else "inactive"
        assert await reason(manager.consume(USER, "a", issued.key)) == expected
        assert all(not stored.holds for stored in await world.stored())

    async def test_what_is_deactivated_inside_stays_ended_if_the_block_fails(self, world: World) -> None:
        manager = await world.manager()
        issued, other = await manager.issue(USER, "a"), await manager.issue(USER, "b")

        async def interrupted() -> None:
            async with manager.redeem(USER, "a", issued.key):
                assert await manager.deactivate(USER) == 2
                raise ZeroDivisionError

        await refused(ZeroDivisionError, interrupted())
        for slug, token in (("a", issued), ("b", other)):
            assert await reason(manager.consume(USER, slug, token.key)) == "inactive"

    @pytest.mark.parametrize("where", ["in the block", "in a task that it started", "in a called function"])
    async def test_deactivated_inside_it_ends_as_used(self, world: World, where: str) -> None:
        manager = await world.manager()
        issued = await manager.issue(USER, "a")

        async def end() -> None:
            assert await manager.deactivate(USER) == 1

        async with manager.redeem(USER, "a", issued.key) as token:
            if where == "in a task that it started":
                await asyncio.create_task(end())
            else:
                await end()
            assert await reason(manager.verify(USER, "a", issued.key)) == "inactive"
        found = await manager.get(token.id)
        assert found is not None
        assert (found.is_active, found.uses) == (False, 1)
        assert world.event_names == ["issued", "deactivated", "failed", "consumed"]

    @pytest.mark.parametrize("fails", [False, True])
    async def test_another_task_is_outside(self, world: World, fails: bool) -> None:
        manager = await world.manager()
        issued = await manager.issue(USER, "a")
        entered, ended = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            async with manager.redeem(USER, "a", issued.key):
                entered.set()
                await ended.wait()

        task = asyncio.create_task(work())
        await entered.wait()
        await manager.deactivate(USER)
        ended.set()
        await refused(LeaseLost, task)

    async def test_a_task_that_outlives_the_block_is_outside_of_the_next_one(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("a", max_uses=2))
        issued = await manager.issue(USER, "a")
        go_on = asyncio.Event()

        async def later() -> int:
            await go_on.wait()
            return await manager.deactivate(USER)

        async with manager.redeem(USER, "a", issued.key):
            task = asyncio.create_task(later())
        block = manager.redeem(USER, "a", issued.key)
        await block.__aenter__()
        go_on.set()
        assert await task == 1
        await refused(LeaseLost, block.__aexit__(None, None, None))

    @pytest.mark.parametrize("fails", [False, True])
    @pytest.mark.parametrize("inside", [False, True])
    async def test_replaced_meanwhile_the_block_still_ends_as_used(
        self, world: World, inside: bool, fails: bool
    ) -> None:
        manager, outside = await world.manager(), await world.manager()
        issued = await manager.issue(USER, "a")
        new: list[IssuedToken] = []

        async def interrupted() -> None:
            async with manager.redeem(USER, "a", issued.key):
                new.append(await (manager if inside else outside).issue(USER, "a"))
                assert await reason(manager.verify(USER, "a", issued.key)) == "inactive"
                if fails:
                    raise ZeroDivisionError

        if fails:
            await refused(ZeroDivisionError, interrupted())
        else:
            await interrupted()
        found = await manager.get(issued.id)
        assert found is not None
        assert (found.is_active, found.uses) == (False, 0 if fails else 1)
        assert await reason(manager.consume(USER, "a", issued.key)) == ("inactive" if fails else "used")
        assert await manager.consume(USER, "a", new[0].key) == new[0]

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

    async def test_a_lease_is_a_day_at_most(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.issue(USER, "a")
        for lease in (timedelta(days=1) + MS, "25h", timedelta.max):
            with pytest.raises(InvalidInput):
                manager.redeem(USER, "a", issued.key, lease=lease)
        assert await redeem(manager, "a", issued.key, lease="1d") == issued.id

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
        assert (used.uses, used.is_active, used.holds) == ((1, False, ()) if happened else (0, True, ()))

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

    async def test_one_redemption_is_for_one_block(self, world: World) -> None:
        manager = await world.manager()
        block = manager.redeem(USER, "a", (await manager.issue(USER, "a")).key)
        async with block:
            pass
        with pytest.raises(RuntimeError):
            await block.__aenter__()

    @pytest.mark.parametrize("cancels", [1, 2, 3])
    @pytest.mark.parametrize("step", ["present", "update"])
    @pytest.mark.parametrize("when", ["before", "after"])
    async def test_cancelled_at_every_await_and_again_while_it_gives_back(
        self, world: World, step: str, when: str, cancels: int
    ) -> None:
        manager = await world.manager()
        issued = await manager.issue(USER, "a")
        waits = {"before": world.backend.before, "after": world.backend.after}[when]
        reached = asyncio.Event()

        async def pause() -> None:
            reached.set()
            for _ in range(3):
                await asyncio.sleep(0)

        waits[step] = pause
        task = asyncio.create_task(redeem(manager, "a", issued.key))
        await reached.wait()
        for _ in range(cancels):
            task.cancel()
            await asyncio.sleep(0)
        await asyncio.wait([task])
        assert task.cancelled()
        waits.clear()
        [stored] = await world.stored()
        assert stored.holds == ()
        if stored.uses == 0:
            assert await manager.consume(USER, "a", issued.key) == issued

    async def test_an_entry_whose_answer_is_lost_leaves_no_hold(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.issue(USER, "a")

        async def lost() -> None:
            raise OutcomeUnknown("the connection broke")

        world.backend.after["present"] = lost
        await refused(OutcomeUnknown, redeem(manager, "a", issued.key))
        world.backend.after.clear()
        assert await manager.consume(USER, "a", issued.key) == issued


class TestBusy:
    async def test_who_needs_a_use_that_is_held_is_told_how_long(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.issue(USER, "a")
        async with manager.redeem(USER, "a", issued.key, lease="40s"):
            world.clock.advance(timedelta(seconds=10))
            for call in (manager.verify, manager.consume):
                error = await refused(TokenBusy, call(USER, "a", issued.key))
                assert (error.reason, error.retry_after, error.token) == ("leased", 30, None)
            await refused(TokenBusy, redeem(manager, "a", issued.key))
            assert not await manager.exists_valid(USER, "a", issued.key)
            assert (await manager.status(USER, "a")).has_valid is False

    async def test_who_waits_gets_the_use_that_is_given_back(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.issue(USER, "a")
        block = manager.redeem(USER, "a", issued.key)
        await block.__aenter__()
        waiting = asyncio.create_task(redeem(manager, "a", issued.key, wait="60s"))
        while world.backend.calls.count("present") < 2:  # noqa: ASYNC110  # the watched store counts calls
            await asyncio.sleep(0)
        error = ZeroDivisionError()
        await block.__aexit__(type(error), error, None)
        assert await waiting == issued.id
        assert world.event_names == ["issued", "consumed"]  # not one "busy" for each time that it asked

    async def test_who_waits_in_vain(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.issue(USER, "a")
        async with manager.redeem(USER, "a", issued.key):
            await refused(TokenBusy, redeem(manager, "a", issued.key, wait="30ms"))
        assert world.event_names == ["issued", "busy", "consumed"]

    async def test_a_second_click_shows_success(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.issue(USER, "a")
        block = manager.redeem(USER, "a", issued.key, consume_id="form")
        await block.__aenter__()
        second = asyncio.create_task(redeem(manager, "a", issued.key, consume_id="form", wait="60s"))
        while world.backend.calls.count("present") < 2:  # noqa: ASYNC110  # the watched store counts calls
            await asyncio.sleep(0)
        await block.__aexit__(None, None, None)
        assert (await refused(AlreadyUsed, second)).token == issued
        assert (await world.stored())[0].uses == 1

    async def test_a_store_that_is_away_is_not_asked_to_give_back_what_was_not_taken(
        self, world: World
    ) -> None:
        """Within a write transaction of the application's own on SQLite, each question waits for its end."""
        manager = await world.manager()
        issued = await manager.issue(USER, "a")
        world.backend.failing["present"] = BackendUnavailable("locked")
        await refused(BackendUnavailable, redeem(manager, "a", issued.key))
        assert "update" not in world.backend.calls

    @pytest.mark.parametrize("how", ["deactivate", "issue"])
    async def test_a_second_click_after_the_block_has_ended_the_token(self, world: World, how: str) -> None:
        manager = await world.manager()
        issued = await manager.issue(USER, "a")
        async with manager.redeem(USER, "a", issued.key, consume_id="form"):
            await getattr(manager, how)(USER, "a")
            await refused(TokenBusy, redeem(manager, "a", issued.key, consume_id="form"))
            assert await reason(redeem(manager, "a", issued.key, consume_id="another")) == "inactive"
            assert await reason(redeem(manager, "a", issued.key)) == "inactive"
            waiting = asyncio.create_task(redeem(manager, "a", issued.key, consume_id="form", wait="60s"))
            await asyncio.sleep(0)
        await refused(AlreadyUsed, waiting)

    @pytest.mark.parametrize("max_uses", [5, None])
    async def test_two_clicks_at_once_make_one_use(self, world: World, max_uses: int | None) -> None:
        manager = await world.manager(TokenPolicy("invite", max_uses=max_uses))
        issued = await manager.issue(USER, "invite")
        async with (
            manager.redeem(USER, "invite", issued.key, lease="40s", consume_id="form"),
            manager.redeem(USER, "invite", issued.key, lease="10s", consume_id="another form"),
        ):
            for click in (
                redeem(manager, "invite", issued.key, consume_id="form"),
                manager.consume(USER, "invite", issued.key, consume_id="form"),
            ):
                assert (await refused(TokenBusy, click)).retry_after == 40
            waiting = asyncio.create_task(
                redeem(manager, "invite", issued.key, consume_id="form", wait="60s")
            )
            assert await manager.exists_valid(USER, "invite", issued.key)
        await refused(AlreadyUsed, waiting)
        assert (await manager.consume(USER, "invite", issued.key, consume_id="form")).is_replay
        [stored] = await world.stored()
        assert (stored.uses, stored.holds) == (2, ())

    @pytest.mark.parametrize("wait", [-MS, 5, None, True, "5"])
    async def test_a_wait_out_of_range(self, world: World, wait: Any) -> None:
        with pytest.raises(InvalidInput):
            (await world.manager()).redeem(USER, "a", "key", wait=wait)

    async def test_thirty_people_and_one_invitation(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("invite", max_uses=50, key_storage="derived"))
        issued = await manager.issue(USER, "invite")
        entered, together = 0, asyncio.Event()

        async def join() -> None:
            nonlocal entered
            async with manager.redeem(USER, "invite", issued.key):
                entered += 1
                if entered == 30:
                    together.set()
                await together.wait()

        await asyncio.gather(*[join() for _ in range(30)])
        [stored] = await world.stored()
        assert (stored.uses, stored.holds, stored.is_active) == (30, (), True)

    async def test_uses_and_holds_together_never_exceed_the_bound(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("invite", max_uses=3))
        issued = await manager.issue(USER, "invite")
        await manager.consume(USER, "invite", issued.key)
        blocks = [manager.redeem(USER, "invite", issued.key) for _ in range(2)]
        for block in blocks:
            await block.__aenter__()
        await refused(TokenBusy, manager.consume(USER, "invite", issued.key))
        assert await manager.get_active_or_create(USER, "invite") == issued  # it counts as there
        for block in blocks:
            await block.__aexit__(None, None, None)
        assert await reason(manager.consume(USER, "invite", issued.key)) == "used"

    async def test_without_a_bound_nobody_is_ever_busy(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("invite", max_uses=None))
        issued = await manager.issue(USER, "invite")
        blocks = [manager.redeem(USER, "invite", issued.key) for _ in range(20)]
        for block in blocks:
            await block.__aenter__()
        for block in blocks:
            await block.__aexit__(None, None, None)
        token = await manager.consume(USER, "invite", issued.key)
        assert (token.max_uses, token.uses, token.is_active) == (None, 21, True)

    async def test_a_hold_of_a_clock_that_was_wrong_counts_for_nothing(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.issue(USER, "a", expires_in=None)
        world.clock.advance(timedelta(days=3650))
        await manager.redeem(USER, "a", issued.key).__aenter__()
        world.clock.advance(-timedelta(days=3650))
        assert await manager.consume(USER, "a", issued.key) == issued


class TestConsumeId:
    async def test_a_block_cannot_be_skipped(self, world: World) -> None:
        manager = await world.manager(CODE)
        for slug in ("reset", "login"):
            issued = await manager.issue(USER, slug)
            await redeem(manager, slug, issued.key, consume_id="form")
            error = await refused(AlreadyUsed, redeem(manager, slug, issued.key, consume_id="form"))
            assert (error.reason, error.token) == ("used", issued)  # of codes, too: the id proves whose it is
            assert (await manager.consume(USER, slug, issued.key, consume_id="form")).is_replay
            error_without = await refused(InvalidToken, redeem(manager, slug, issued.key))
            assert type(error_without) is InvalidToken
            assert error_without.token == (issued if slug == "reset" else None)
        assert world.event_names.count("replayed") == 4

    async def test_a_block_that_failed_is_not_remembered(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.issue(USER, "a")
        with pytest.raises(ZeroDivisionError):
            async with manager.redeem(USER, "a", issued.key, consume_id="form"):
                raise ZeroDivisionError
        assert await redeem(manager, "a", issued.key, consume_id="form") == issued.id

    async def test_what_ended_the_token_after_that_use_does_not_matter(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.issue(USER, "a")
        async with manager.redeem(USER, "a", issued.key, consume_id="form"):
            await manager.deactivate(USER)
        assert (await manager.consume(USER, "a", issued.key, consume_id="form")).is_replay
        await refused(AlreadyUsed, redeem(manager, "a", issued.key, consume_id="form"))


class TestTwoClocks:
    @pytest.mark.parametrize("max_uses", [1, 2])
    async def test_a_use_by_a_clock_that_is_ahead_is_not_counted_again(
        self, world: World, max_uses: int
    ) -> None:
        manager = await world.manager(TokenPolicy("a", max_uses=max_uses))
        issued = await manager.issue(USER, "a")
        block = manager.redeem(USER, "a", issued.key, lease=LEASE)
        await block.__aenter__()
        world.clock.advance(LEASE)  # of another host, by which the hold has run out
        for _ in range(max_uses):
            await manager.consume(USER, "a", issued.key)
        world.clock.advance(-LEASE)
        await refused(LeaseLost, block.__aexit__(None, None, None))
        found = await manager.get(issued.id)
        assert found is not None
        assert (found.uses, found.is_active) == (max_uses, False)


class TestMarkUsed:
    async def test_without_a_transaction_the_block_counts_the_use(self, world: World) -> None:
        """An application that runs on several stores passes on what it has: a session, or None."""
        manager = await world.manager()
        issued = await manager.issue(USER, "a", using=None)
        await refused(InvalidInput, manager.mark_used(issued, using=None))
        with pytest.raises(RuntimeError):  # noqa: PT012  # raised within the block
            async with manager.redeem(USER, "a", issued.key) as token:
                await manager.mark_used(token, using=None)
                raise RuntimeError
        async with manager.redeem(USER, "a", issued.key) as token:
            for _ in range(2):
                await manager.mark_used(token, using=None)
        assert await reason(manager.verify(USER, "a", issued.key)) == "used"

    async def test_only_inside_its_block(self, world: World) -> None:
        manager, other = await world.manager(), await world.manager()
        issued = await manager.issue(USER, "a")
        await refused(InvalidInput, manager.mark_used(issued, using=object()))
        async with manager.redeem(USER, "a", issued.key) as token:
            found = await manager.get(token.id)
            assert found is not None
            await refused(InvalidInput, manager.mark_used(found, using=object()))
            await refused(InvalidInput, other.mark_used(token, using=object()))
            await refused(
                InvalidInput, manager.mark_used(token, using=object())
            )  # memory has no transactions
        await refused(InvalidInput, manager.mark_used(token, using=object()))
        assert await reason(manager.verify(USER, "a", issued.key)) == "used"
