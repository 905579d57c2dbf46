"""Limits by object, by slug and by dimensions of the request, for issuing and for attempts."""

from __future__ import annotations

import asyncio
import pickle
from collections import Counter
from datetime import timedelta
from typing import Any, Final

import pytest

from vtoken import (
    CooldownActive,
    InvalidInput,
    InvalidToken,
    IssuedToken,
    Limit,
    Settings,
    Subject,
    TokenManager,
    TokenPolicy,
    TooManyAttempts,
)

from .core_tools import (
    CODE,
    MINUTE,
    MS,
    OLD_SECRET,
    OTHER,
    SECRET,
    USER,
    WRONG_CODE,
    World,
    refused,
    wrong_codes,
)

IP = {"ip": "192.0.2.7"}


def person(number: int) -> Subject:
    return Subject("auth.user", f"person {number}")


async def wrong(manager: TokenManager, obj: object = USER, slug: str = "login", **keywords: Any) -> str:
    """Present a wrong code: the kind of error, and how many attempts are left."""
    error = await refused(InvalidToken, manager.verify(obj, slug, WRONG_CODE, **keywords))
    return f"{type(error).__name__} {error.attempts_left}"


class TestIssueLimits:
    async def test_by_object(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("mail", issue_limits=[Limit(3, "1h")]))
        for _ in range(3):
            await manager.issue(USER, "mail")
        world.clock.advance(timedelta(minutes=20))
        error = await refused(CooldownActive, manager.issue(USER, "mail"))
        assert error.retry_after == 2400
        assert error.limit == Limit(3, "1h")
        await manager.issue(OTHER, "mail")
        await manager.issue(USER, "else")
        world.clock.advance(timedelta(minutes=40))
        await manager.issue(USER, "mail")

    async def test_by_slug_everybody_together(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("mail", issue_limits=[Limit(3, "1h", by="slug")]))
        for number in range(3):
            await manager.issue(person(number), "mail")
        await refused(CooldownActive, manager.issue(USER, "mail"))
        await manager.issue(USER, "else")

    async def test_by_a_dimension_of_the_request(self, world: World) -> None:
        policy = TokenPolicy("mail", issue_limits=[Limit(2, "1h", by="ip"), Limit(3, "1h", by="tenant")])
        manager = await world.manager(policy)
        for number in range(2):
            await manager.issue(person(number), "mail", by={**IP, "tenant": "acme"})
        error = await refused(CooldownActive, manager.issue(USER, "mail", by={**IP, "tenant": "acme"}))
        assert error.limit is not None
        assert error.limit.by == "ip"
        await manager.issue(USER, "mail", by={"ip": "192.0.2.8", "tenant": "acme"})
        error = await refused(CooldownActive, manager.issue(USER, "mail", by={"ip": "x", "tenant": "acme"}))
        assert error.limit is not None
        assert error.limit.by == "tenant"
        await manager.issue(USER, "mail", by={"ip": "x", "tenant": "other", "ignored": "y"})

    @pytest.mark.parametrize(
        "by", [None, {}, {"tenant": "x"}, {"ip": ""}, {"ip": 5}, {"ip": None}, "ip", ["ip"]]
    )
    async def test_one_that_is_missing_is_refused(self, world: World, by: Any) -> None:
        policy = TokenPolicy.code(
            "login", issue_limits=[Limit(2, "1h", by="ip")], attempt_limits=[Limit(2, "1h", by="ip")]
        )
        manager = await world.manager(policy)
        for call in (
            manager.issue(USER, "login", by=by),
            manager.pretend(USER, "login", by=by),
            manager.get_active_or_create(USER, "login", by=by),
            manager.verify(USER, "login", WRONG_CODE, by=by),
            manager.consume(USER, "login", WRONG_CODE, by=by),
            manager.exists_valid(USER, "login", WRONG_CODE, by=by),
        ):
            await refused(InvalidInput, call)
        with pytest.raises(InvalidInput):
            manager.redeem(USER, "login", WRONG_CODE, by=by)
        assert await world.stored() == []
        if by is None or by == {}:
            assert (await manager.status(USER, "login", by=by)).attempts_left == 5

    @pytest.mark.parametrize(
        ("one", "same", "another"),
        [
            ("2001:db8:1:2::1", "2001:db8:1:2:ffff::2", "2001:db8:1:3::1"),
            ("2001:DB8:1:2::1", "2001:0db8:0001:0002::1", "2001:db8:2:2::1"),
            ("192.0.2.7", "::ffff:192.0.2.7", "192.0.2.8"),
            ("fe80::1%eth0", "fe80::2%eth1", "fe81::1"),
            (" 192.0.2.7", "192.0.2.7 ", "192.0.2.70"),
            ("not an address", "not an address", "not an address "),
        ],
    )
    async def test_an_address_counts_as_the_network_that_its_owner_has(
        self, world: World, one: str, same: str, another: str
    ) -> None:
        manager = await world.manager(TokenPolicy("mail", issue_limits=[Limit(1, "1h", by="ip")]))
        await manager.issue(USER, "mail", by={"ip": one})
        await refused(CooldownActive, manager.issue(OTHER, "mail", by={"ip": same}))
        await manager.issue(OTHER, "mail", by={"ip": another})

    async def test_only_under_the_name_ip(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("mail", issue_limits=[Limit(1, "1h", by="block")]))
        for address in ("2001:db8::1", "2001:db8::2", "::ffff:192.0.2.7", "192.0.2.7"):
            await manager.issue(USER, "mail", by={"block": address})

    async def test_across_slugs(self, world: World) -> None:
        limits = [Limit(3, "1d", across="sms")]
        policies = [TokenPolicy(slug, issue_limits=limits) for slug in ("login", "confirm")]
        manager = await world.manager(*policies, TokenPolicy("alone", issue_limits=[Limit(3, "1d")]))
        for slug in ("login", "confirm", "login"):
            await manager.issue(USER, slug)
        for slug in ("login", "confirm"):
            error = await refused(CooldownActive, manager.issue(USER, slug))
            assert error.limit is not None
            assert error.limit.name == "3 per 1d by object across sms"
        await manager.issue(USER, "alone")
        await manager.issue(OTHER, "login")

    async def test_all_or_none_is_spent(self, world: World) -> None:
        policy = TokenPolicy("mail", cooldown="1m", issue_limits=[Limit(2, "1h", by="ip"), Limit(9, "1h")])
        manager = await world.manager(policy)
        await manager.issue(USER, "mail", by=IP)
        for _ in range(20):
            error = await refused(CooldownActive, manager.issue(USER, "mail", by=IP))
            assert error.limit is not None
            assert error.limit.name == "1 per 1m by object"
        await manager.issue(OTHER, "mail", by=IP)  # the refusals took nothing from the address
        world.clock.advance(MINUTE)
        error = await refused(CooldownActive, manager.issue(USER, "mail", by=IP))
        assert (error.retry_after, error.limit) == (3540, Limit(2, "1h", by="ip"))

    async def test_the_one_that_stays_full_the_longest_is_named(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("mail", cooldown="1m", issue_limits=[Limit(1, "1d")]))
        await manager.issue(USER, "mail")
        error = await refused(CooldownActive, manager.issue(USER, "mail"))
        assert (error.retry_after, error.limit) == (86_400, Limit(1, "1d"))
        assert pickle.loads(pickle.dumps(error)).limit == Limit(1, "1d")  # noqa: S301  # our own
        assert [(event.name, event.limit) for event in world.events[-1:]] == [
            ("limited", "1 per 1d by object")
        ]

    async def test_of_concurrent_requests_exactly_the_limit_goes_out(self, world: World) -> None:
        policy = TokenPolicy("mail", issue_limits=[Limit(7, "1h", by="slug"), Limit(20, "1h", by="ip")])
        manager = await world.manager(policy)
        calls = [manager.issue(person(number), "mail", by=IP) for number in range(30)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert Counter(map(type, results)) == {IssuedToken: 7, CooldownActive: 23}

    async def test_a_clock_that_was_ahead_locks_nobody_out_for_long(self, world: World) -> None:
        manager = await world.manager(TokenPolicy.code("login", cooldown="1m"))
        world.clock.advance(timedelta(days=3650))
        await manager.issue(USER, "login")
        for _ in range(5):
            await wrong(manager)
        world.clock.advance(-timedelta(days=3650))
        token = await manager.issue(USER, "login")
        assert await manager.verify(USER, "login", token.key) == token

    async def test_what_a_failing_send_gives_back(self, world: World) -> None:
        policy = TokenPolicy("mail", cooldown="1m", issue_limits=[Limit(2, "1h")])
        manager = await world.manager(policy)
        old = await manager.issue(USER, "mail")
        world.clock.advance(MINUTE)

        async def send() -> None:
            async with manager.issuing(USER, "mail") as token:
                sent.append(token)
                raise ZeroDivisionError

        sent: list[IssuedToken] = []
        await refused(ZeroDivisionError, send())
        for token in (old, sent[0]):
            assert (await refused(InvalidToken, manager.verify(USER, "mail", token.key))).reason == "inactive"
        error = await refused(CooldownActive, manager.issue(USER, "mail"))
        assert error.limit == Limit(2, "1h")  # the cooldown was given back, the other limit was not

    @pytest.mark.parametrize("cancels", [1, 2])
    async def test_a_cancelled_send_buys_nothing(self, world: World, cancels: int) -> None:
        manager = await world.manager(TokenPolicy("mail", cooldown="1m"))
        sending: list[IssuedToken] = []

        async def send() -> None:
            async with manager.issuing(USER, "mail") as token:
                sending.append(token)
                await asyncio.Event().wait()

        world.backend.before["deactivate"] = lambda: asyncio.sleep(0)
        task = asyncio.create_task(send())
        while not sending:  # noqa: ASYNC110  # it is the block itself that says so
            await asyncio.sleep(0)
        for _ in range(cancels):
            task.cancel()
            await asyncio.sleep(0)
        await asyncio.wait([task])
        assert task.cancelled()
        assert not await manager.exists_valid(USER, "mail", sending[0].key)
        await refused(CooldownActive, manager.issue(USER, "mail"))

    async def test_a_send_that_works(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("mail", cooldown="1m"))
        async with manager.issuing(USER, "mail", extra_data=1, expires_in="5m") as token:
            assert token.key
        assert await manager.verify(USER, "mail", token.key) == token
        await refused(CooldownActive, manager.issue(USER, "mail"))

    async def test_the_blocks_error_matters_more_than_what_fails_after_it(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        manager = await world.manager()

        async def send() -> None:
            async with manager.issuing(USER, "mail"):
                await world.backend.close()
                raise ZeroDivisionError

        await refused(ZeroDivisionError, send())
        assert "could not be ended" in caplog.text
        await world.backend.open()


class TestAttemptLimits:
    async def test_by_address_beside_the_objects_own(self, world: World) -> None:
        policy = TokenPolicy.code("login", attempt_limits=[Limit(7, "1h", by="ip")])
        manager = await world.manager(policy)
        for left in (4, 3, 2, 1, 0):
            assert await wrong(manager, by=IP) == f"InvalidToken {left}"
        assert await wrong(manager, by=IP) == "TooManyAttempts 0"
        for left in (1, 0):
            assert await wrong(manager, OTHER, by=IP) == f"InvalidToken {left}"
        error = await refused(TooManyAttempts, manager.verify(OTHER, "login", WRONG_CODE, by=IP))
        assert (error.retry_after, error.limit) == (3600, Limit(7, "1h", by="ip"))
        assert await wrong(manager, OTHER, by={"ip": "192.0.2.8"}) == "InvalidToken 2"

    async def test_only_an_objects_own_windows_grow(self, world: World) -> None:
        policy = TokenPolicy.code(
            "login", max_attempts=100, attempt_limits=[Limit(1, "1h", by="ip"), Limit(2, "2h")]
        )
        manager = await world.manager(policy)
        for window in range(2):
            for number in range(2):
                await wrong(manager, by={"ip": f"192.0.2.{number}"})
            error = await refused(TooManyAttempts, manager.verify(USER, "login", WRONG_CODE, by={"ip": "x"}))
            assert error.retry_after == 7200 * 2**window
            world.clock.advance(timedelta(seconds=error.retry_after))
        await wrong(manager, OTHER, by={"ip": "192.0.2.0"})
        error = await refused(
            TooManyAttempts, manager.verify(OTHER, "login", WRONG_CODE, by={"ip": "192.0.2.0"})
        )
        assert error.retry_after == 3600

    async def test_a_success_clears_the_objects_and_no_others(self, world: World) -> None:
        policy = TokenPolicy.code("login", attempt_limits=[Limit(6, "1h", by="ip"), Limit(5, "1d")])
        manager = await world.manager(policy)
        token = await manager.issue(USER, "login")
        for _ in range(4):
            await wrong(manager, by=IP)
        await manager.consume(USER, "login", token.key, by=IP)
        status = await manager.status(USER, "login", by=IP)
        assert status.attempts_left == 2
        assert (await manager.status(USER, "login")).attempts_left == 5

    async def test_a_class_leaves_the_others_in_force(self, world: World) -> None:
        policy = TokenPolicy("reset", max_attempts=1, attempt_limits=[Limit(2, "1h", by="ip")])
        manager = await world.manager(policy)
        anybody = Subject("auth.user")
        for _ in range(2):
            assert await wrong(manager, anybody, "reset", by=IP) in ("InvalidToken 1", "InvalidToken 0")
        assert await wrong(manager, anybody, "reset", by=IP) == "TooManyAttempts 0"

    async def test_everybody_together(self, world: World) -> None:
        policy = TokenPolicy.code("login", attempt_limits=[Limit(3, "1h", by="slug")])
        manager = await world.manager(policy)
        for number in range(3):
            await wrong(manager, person(number))
        assert await wrong(manager) == "TooManyAttempts 0"

    async def test_without_max_attempts_they_cap_alone(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("reset", attempt_limits=[Limit(1, "1h")]))
        token = await manager.issue(USER, "reset")
        await wrong(manager, slug="reset")
        await refused(TooManyAttempts, manager.consume(USER, "reset", token.key))
        assert not await manager.exists_valid(USER, key=token.key)  # with any slug, a capped key is nobody's

    async def test_of_concurrent_ones_exactly_the_limit_is_compared(self, world: World) -> None:
        policy = TokenPolicy.code("login", max_attempts=100, attempt_limits=[Limit(7, "1h", by="ip")])
        manager = await world.manager(policy)
        results = await asyncio.gather(*[wrong(manager, person(n % 5), by=IP) for n in range(40)])
        assert results.count("TooManyAttempts 0") == 33

    async def test_the_right_code_twice_at_once_on_the_last_attempt(self, world: World) -> None:
        manager = await world.manager(CODE)
        for name in (None, "form"):
            token = await manager.issue(USER, "login")
            for code in wrong_codes(token.key, 4):
                await refused(InvalidToken, manager.verify(USER, "login", code))
            calls = [manager.consume(USER, "login", token.key, consume_id=name) for _ in range(2)]
            results = await asyncio.gather(*calls, return_exceptions=True)
            if name is None:
                assert sorted(type(r).__name__ for r in results) == ["InvalidToken", "VerificationToken"]
            else:
                assert results == [token, token]
            assert (await manager.status(USER, "login")).attempts_left == 5


class TestNames:
    async def test_nothing_personal_and_nothing_long_is_stored(self, world: World) -> None:
        policy = TokenPolicy.code(
            "login", attempt_limits=[Limit(9, "1h", by="ip"), Limit(9, "1h", by="mail")]
        )
        manager = await world.manager(policy)
        for text in ("a", "a" * 512, "ada@b.example"):
            await wrong(manager, Subject("auth.user", text), by={"ip": text, "mail": text})
        budgets = [spend.budget for spend in world.backend.spends]
        assert {len(part) for budget in budgets for part in budget} == {16}
        assert len({budget.object for budget in budgets}) == 1 + 3
        assert len(set(budgets)) == 3 * 3
        assert "ada" not in repr(world.backend.spends)

    async def test_rotating_secrets_renames_none(self, world: World) -> None:
        before = await world.manager(CODE, settings=Settings(secret=OLD_SECRET))
        after = await world.manager(CODE, settings=Settings(secret=SECRET, previous_secrets=[OLD_SECRET]))
        for _ in range(3):
            await wrong(before)
        assert await wrong(after) == "InvalidToken 1"

    async def test_managers_on_one_store_share_and_stores_differ(self, world: World) -> None:
        one, two = await world.manager(CODE), await world.manager(CODE)
        await wrong(one)
        assert await wrong(two) == "InvalidToken 3"
        seed = await world.backend.note("seed", "")
        assert len(bytes.fromhex(seed)) == 32
        other = World()
        await other.manager(CODE)
        assert await other.backend.note("seed", "") != seed
        await other.aclose()

    async def test_names_that_meet_across_their_borders_are_two(self, world: World) -> None:
        manager = await world.manager(CODE)
        await wrong(manager, Subject("auth.user", "1"))
        assert await wrong(manager, Subject("auth.use", "r1")) == "InvalidToken 4"

    @pytest.mark.parametrize("per", ["60s", "1m", timedelta(minutes=1)])
    def test_a_limits_name(self, per: Any) -> None:
        assert Limit(5, per, by="ip", across="sms").name == "5 per 1m by ip across sms"


async def test_an_issue_says_that_the_attempts_are_spent(world: World) -> None:
    manager = await world.manager(CODE)
    await manager.issue(USER, "login")
    assert world.events[-1].attempts_reset_at is None
    for _ in range(5):
        await wrong(manager)
    await manager.issue(USER, "login")
    assert world.events[-1].attempts_reset_at == world.clock() + 15 * MINUTE
    world.clock.advance(15 * MINUTE - MS)
    await manager.issue(USER, "login")
    assert world.events[-1].attempts_reset_at is not None
    world.clock.advance(MS)
    await manager.issue(USER, "login")
    assert world.events[-1].attempts_reset_at is None


class TestWhenAttemptsAreThereAgain:
    """``attempts_reset_at`` is about the limit that decides ``attempts_left``."""

    POLICY = TokenPolicy.code("login", attempt_limits=[Limit(100, "1h", by="ip")])
    BY: Final = {"ip": "192.0.2.7"}

    async def test_error_status_and_event_say_the_same(self, world: World) -> None:
        manager = await world.manager(self.POLICY)
        await manager.issue(USER, "login", by=self.BY)
        for _ in range(5):
            await refused(InvalidToken, manager.consume(USER, "login", WRONG_CODE, by=self.BY))
        error = await refused(TooManyAttempts, manager.consume(USER, "login", WRONG_CODE, by=self.BY))
        status = await manager.status(USER, "login", by=self.BY)
        await manager.issue(USER, "login", by=self.BY)
        until = world.clock() + 15 * MINUTE
        assert (error.retry_after, status.attempts_left) == (15 * 60, 0)
        assert (status.attempts_reset_at, world.events[-1].attempts_reset_at) == (until, until)
        world.clock.advance(15 * MINUTE)
        later = await manager.status(USER, "login", by=self.BY)
        assert (later.attempts_left, later.attempts_reset_at) == (5, None)

    async def test_what_others_spent_is_not_told(self, world: World) -> None:
        manager = await world.manager(self.POLICY)
        for _ in range(5):
            await refused(InvalidToken, manager.consume(USER, "login", WRONG_CODE, by=self.BY))
        other = await manager.status(Subject("auth.user", "other"), "login", by=self.BY)
        assert (other.attempts_left, other.attempts_reset_at) == (5, None)

    async def test_a_limit_that_others_have_filled_is_told(self, world: World) -> None:
        policy = TokenPolicy.code("login", attempt_limits=[Limit(5, "1h", by="slug")])
        manager = await world.manager(policy)
        for _ in range(5):
            await refused(InvalidToken, manager.consume(USER, "login", WRONG_CODE))
        other = Subject("auth.user", "other")
        status = await manager.status(other, "login")
        error = await refused(TooManyAttempts, manager.consume(other, "login", WRONG_CODE))
        await manager.issue(other, "login")
        until = world.clock() + 60 * MINUTE
        assert (error.retry_after, status.attempts_left) == (3600, 0)
        assert (status.attempts_reset_at, world.events[-1].attempts_reset_at) == (until, until)

    async def test_of_two_that_leave_as_few_the_later_one_decides(self, world: World) -> None:
        policy = TokenPolicy.code("login", attempt_limits=[Limit(5, "1h"), Limit(7, "1d")])
        manager = await world.manager(policy)
        await refused(InvalidToken, manager.consume(USER, "login", WRONG_CODE))
        status = await manager.status(USER, "login")
        assert (status.attempts_left, status.attempts_reset_at) == (4, world.clock() + 60 * MINUTE)


async def test_the_seconds_until_the_next_token(world: World) -> None:
    manager = await world.manager(TokenPolicy.link("mail", cooldown="60s", issue_limits=[Limit(2, "1h")]))
    assert (await manager.status(USER, "mail")).can_issue_in == 0
    await manager.issue(USER, "mail")
    world.clock.advance(timedelta(seconds=18.5))
    status = await manager.status(USER, "mail")
    error = await refused(CooldownActive, manager.issue(USER, "mail"))
    assert status.can_issue_in == error.retry_after == 41.5
    assert status.can_issue_at == world.clock() + timedelta(seconds=41.5)
    world.clock.advance(timedelta(seconds=41.5))
    assert (await manager.status(USER, "mail")).can_issue_in == 0
