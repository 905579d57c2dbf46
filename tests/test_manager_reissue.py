"""Issuing beside a token that is there: the one that is valid, cooldown, overlap."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from vtoken import (
    CooldownActive,
    InvalidInput,
    InvalidToken,
    IssuedToken,
    Subject,
    TokenBusy,
    TokenPolicy,
    VerificationToken,
)

from .core_tools import (
    MINUTE,
    MS,
    OTHER,
    USER,
    WRONG,
    World,
    reason,
    redeem,
    refused,
)

COOLING = TokenPolicy("mail", cooldown=MINUTE)


class TestGetActiveOrCreate:
    async def test_the_newest_valid_one(self, world: World) -> None:
        manager = await world.manager()
        first = await manager.get_active_or_create(USER, "a", {"n": 1})
        assert isinstance(first, IssuedToken)
        again = await manager.get_active_or_create(USER, "a", {"n": 2})
        assert (again, again.key, again.extra_data) == (first, None, '{"n":1}')
        assert not isinstance(again, IssuedToken)
        newer = await manager.deactivate_and_create(USER, "a", deactivate_old_tokens=False)
        assert await manager.get_active_or_create(USER, "a") == newer
        assert await manager.get_active_or_create(USER, "b") not in (first, newer)
        assert await manager.get_active_or_create(OTHER, "a") not in (first, newer)

    @pytest.mark.parametrize("end", ["used", "deactivated", "expired"])
    async def test_a_new_one_where_none_is_valid(self, world: World, end: str) -> None:
        manager = await world.manager()
        old = await manager.deactivate_and_create(USER, "a", expiration_in_minutes=1)
        if end == "used":
            await manager.consume(USER, "a", old.key)
        if end == "deactivated":
            await manager.deactivate(USER)
        if end == "expired":
            world.clock.advance(MINUTE + MS)
        new = await manager.get_active_or_create(USER, "a")
        assert isinstance(new, IssuedToken)
        assert new != old
        assert [t async for t in manager.filter_active_tokens(USER)] == [new]

    async def test_one_that_is_held_counts_as_there(self, world: World) -> None:
        manager = await world.manager()
        old = await manager.issue(USER, "a")
        async with manager.redeem(USER, "a", old.key):
            assert await manager.get_active_or_create(USER, "a") == old
        assert await manager.get_active_or_create(USER, "a") != old

    async def test_one_with_too_little_left_is_replaced(self, world: World) -> None:
        manager = await world.manager()
        old = await manager.issue(USER, "a", expires_in="1h")
        world.clock.advance(timedelta(minutes=45))
        for least in (timedelta(0), "15m", timedelta(minutes=15)):
            assert await manager.get_active_or_create(USER, "a", at_least=least) == old
        new = await manager.get_active_or_create(USER, "a", at_least="901s")
        assert new != old
        assert await reason(manager.verify(USER, "a", old.key)) == "inactive"

    async def test_of_a_pair_the_shorter_lived_key_decides(self, world: World) -> None:
        manager = await world.manager(TokenPolicy.pair("login"))
        old = await manager.issue(USER, "login")
        world.clock.advance(timedelta(minutes=8))
        assert await manager.get_active_or_create(USER, "login", at_least="2m") == old
        assert await manager.get_active_or_create(USER, "login", at_least="3m") != old

    @pytest.mark.parametrize("least", ["61m", "11m", -MS, 5, None, "soon"])
    async def test_more_than_a_new_token_would_have_is_refused(self, world: World, least: Any) -> None:
        manager = await world.manager(TokenPolicy.pair("login"), TokenPolicy.link("a"))
        await refused(InvalidInput, manager.get_active_or_create(USER, "login", at_least=least))
        if least != "11m":
            await refused(InvalidInput, manager.get_active_or_create(USER, "a", at_least=least))
        assert await world.stored() == []

    async def test_at_exactly_its_expiry_it_is_still_the_one(self, world: World) -> None:
        manager = await world.manager()
        old = await manager.get_active_or_create(USER, expiration_in_minutes=1)
        world.clock.advance(MINUTE)
        assert await manager.get_active_or_create(USER) == old

    @pytest.mark.parametrize("slug", ["mail", "free"])
    async def test_concurrent_callers_get_the_same_one_cooldown_or_not(self, world: World, slug: str) -> None:
        managers = [await world.manager(COOLING) for _ in range(2)]

        async def yielding() -> None:
            await asyncio.sleep(0)

        world.backend.before = dict.fromkeys(("find", "insert", "spend"), yielding)
        tokens = await asyncio.gather(*[managers[n % 2].get_active_or_create(USER, slug) for n in range(20)])
        assert len({token.id for token in tokens}) == 1
        assert len([token for token in tokens if token.key is not None]) == 1
        assert len(await world.stored()) == 1
        assert world.event_names == ["issued"]

    async def test_within_the_cooldown_a_valid_one_is_given_and_no_new_one_made(self, world: World) -> None:
        manager = await world.manager(COOLING)
        token = await manager.get_active_or_create(USER, "mail")
        assert await manager.get_active_or_create(USER, "mail") == token
        await manager.deactivate(USER)
        error = await refused(CooldownActive, manager.get_active_or_create(USER, "mail"))
        assert error.retry_after == 60
        assert error.limit is not None
        assert error.limit.name == "1 per 1m by object"
        world.clock.advance(MINUTE)
        assert await manager.get_active_or_create(USER, "mail") != token

    async def test_finding_one_costs_no_cooldown(self, world: World) -> None:
        manager = await world.manager(COOLING)
        first = await manager.get_active_or_create(USER, "mail")
        world.clock.advance(MINUTE)
        assert await manager.get_active_or_create(USER, "mail") == first
        assert isinstance(await manager.deactivate_and_create(USER, "mail"), IssuedToken)

    async def test_losing_the_race_to_insert_costs_no_cooldown(self, world: World) -> None:
        manager = await world.manager(COOLING)
        without_cooldown = await world.manager()

        async def another_comes_first() -> None:
            del world.backend.before["insert"]
            await without_cooldown.get_active_or_create(USER, "mail")

        world.backend.before["insert"] = another_comes_first
        token = await manager.get_active_or_create(USER, "mail")
        assert token.key is None
        assert isinstance(await manager.deactivate_and_create(USER, "mail"), IssuedToken)


class TestCooldown:
    @pytest.mark.parametrize("fate", ["kept", "used", "deactivated", "purged", "redeemed"])
    @pytest.mark.parametrize("asked", ["replace", "add", "get_or_create"])
    async def test_from_the_creation_whatever_became_of_it_and_however_it_is_asked(
        self, world: World, fate: str, asked: str
    ) -> None:
        manager = await world.manager(COOLING)
        token = await manager.deactivate_and_create(USER, "mail")
        if fate == "used":
            await manager.consume(USER, "mail", token.key)
        if fate == "redeemed":
            await redeem(manager, "mail", token.key)
        if fate in ("deactivated", "purged") or asked == "get_or_create":
            await manager.deactivate(USER)
        if fate == "purged":
            await manager.purge()

        async def ask() -> VerificationToken:
            if asked == "get_or_create":
                return await manager.get_active_or_create(USER, "mail")
            return await manager.deactivate_and_create(USER, "mail", deactivate_old_tokens=asked == "replace")

        world.clock.advance(timedelta(seconds=20))
        assert (await refused(CooldownActive, ask())).retry_after == 40
        world.clock.advance(timedelta(seconds=40) - MS)
        assert (await refused(CooldownActive, ask())).retry_after == 0.001
        world.clock.advance(MS)
        assert isinstance(await ask(), IssuedToken)
        assert (await refused(CooldownActive, manager.deactivate_and_create(USER, "mail"))).retry_after == 60

    async def test_it_does_not_grow(self, world: World) -> None:
        manager = await world.manager(COOLING)
        for _ in range(5):
            await manager.deactivate_and_create(USER, "mail")
            await refused(CooldownActive, manager.deactivate_and_create(USER, "mail"))
            world.clock.advance(MINUTE)

    async def test_another_object_or_slug_does_not_wait(self, world: World) -> None:
        manager = await world.manager(COOLING)
        await manager.deactivate_and_create(USER, "mail")
        await manager.deactivate_and_create(OTHER, "mail")
        await manager.deactivate_and_create(Subject("app.row", 42), "mail")
        for _ in range(2):
            await manager.deactivate_and_create(USER, "free")
            await manager.deactivate_and_create(USER)

    async def test_of_concurrent_requests_one_goes_out(self, world: World) -> None:
        manager = await world.manager(COOLING)
        calls = [manager.deactivate_and_create(USER, "mail") for _ in range(20)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(r) for r in results if not isinstance(r, CooldownActive)] == [IssuedToken]
        assert len(await world.stored()) == 1

    async def test_while_it_runs_the_old_token_stays_valid(self, world: World) -> None:
        manager = await world.manager(COOLING)
        token = await manager.deactivate_and_create(USER, "mail")
        await refused(CooldownActive, manager.deactivate_and_create(USER, "mail"))
        assert await manager.consume(USER, "mail", token.key) == token


class TestOverlap:
    overlapping = TokenPolicy("mail", overlap=5 * MINUTE)

    async def test_the_previous_key_stays_good_for_that_long_and_means_the_new_token(
        self, world: World
    ) -> None:
        manager = await world.manager(self.overlapping)
        old = await manager.deactivate_and_create(USER, "mail")
        new = await manager.deactivate_and_create(USER, "mail")
        world.clock.advance(5 * MINUTE)
        for token in (old, new):
            assert await manager.verify(USER, "mail", token.key) == new
        world.clock.advance(MS)
        assert await reason(manager.consume(USER, "mail", old.key)) == "expired"
        assert await manager.consume(USER, "mail", new.key) == new

    async def test_never_longer_than_it_was(self, world: World) -> None:
        manager = await world.manager(self.overlapping)
        old = await manager.deactivate_and_create(USER, "mail", expiration_in_minutes=1)
        await manager.deactivate_and_create(USER, "mail")
        world.clock.advance(MINUTE + MS)
        assert await reason(manager.verify(USER, "mail", old.key)) == "expired"

    @pytest.mark.parametrize("used", [1, 2])
    @pytest.mark.parametrize("how", ["consume", "redeem"])
    async def test_one_predecessor_and_until_the_first_success_of_either(
        self, world: World, used: int, how: str
    ) -> None:
        manager = await world.manager(self.overlapping)
        keys = [(await manager.deactivate_and_create(USER, "mail")).key for _ in range(3)]
        assert await reason(manager.verify(USER, "mail", keys[0])) == "inactive"
        if how == "consume":
            await manager.consume(USER, "mail", keys[used])
        else:
            await redeem(manager, "mail", keys[used])
        reasons = [await reason(manager.verify(USER, "mail", key)) for key in keys]
        assert reasons == ["inactive", "used", "used"]

    async def test_they_are_redeemed_one_at_a_time(self, world: World) -> None:
        manager = await world.manager(self.overlapping)
        keys = [(await manager.issue(USER, "mail")).key for _ in range(2)]
        async with manager.redeem(USER, "mail", keys[0]):
            await refused(TokenBusy, redeem(manager, "mail", keys[1]))
        assert await reason(redeem(manager, "mail", keys[1])) == "used"

    @pytest.mark.parametrize("why", ["other data", "held", "added beside", "never had"])
    async def test_where_the_old_key_must_not_mean_the_new_token_it_ends(
        self, world: World, why: str
    ) -> None:
        policy = TokenPolicy("mail", overlap=None if why == "never had" else "5m")
        manager = await world.manager(policy)
        old = await manager.issue(USER, "mail", extra_data="old@b.example", replace=why != "added beside")
        data = "new@b.example" if why == "other data" else "old@b.example"
        if why == "held":
            async with manager.redeem(USER, "mail", old.key):
                new = await manager.issue(USER, "mail", extra_data=data)
        else:
            new = await manager.issue(USER, "mail", extra_data=data)
        expected = "used" if why == "held" else "inactive"
        assert await reason(manager.verify(USER, "mail", old.key)) == expected
        assert await manager.consume(USER, "mail", new.key) == new

    async def test_one_attempt_budget_for_both(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("mail", overlap=5 * MINUTE, max_attempts=2))
        keys = [(await manager.deactivate_and_create(USER, "mail")).key for _ in range(2)]
        for _ in range(2):
            await refused(InvalidToken, manager.verify(USER, "mail", WRONG))
        for key in keys:
            assert (await refused(InvalidToken, manager.verify(USER, "mail", key))).reason == "unknown"
