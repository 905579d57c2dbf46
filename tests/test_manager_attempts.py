"""Limits for attempts, and what an attempt tells of what is there."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from vtoken import (
    InvalidInput,
    InvalidToken,
    Subject,
    TokenManager,
    TokenPolicy,
    TooManyAttempts,
    VerificationToken,
)

from .core_tools import (
    CODE,
    MS,
    OTHER,
    SECRETS,
    USER,
    WRONG,
    WRONG_CODE,
    Watched,
    World,
    reason,
    redeem,
    refused,
    wrong_codes,
)

WINDOW = timedelta(minutes=15)


async def spend(manager: TokenManager, count: int, obj: object = USER, slug: str = "login") -> None:
    """Guess wrongly so many times, each of which must be compared."""
    for code in wrong_codes("999999", count):
        error = await refused(InvalidToken, manager.verify(obj, slug, code))
        assert type(error) is InvalidToken


class TestAttempts:
    async def test_five_are_compared_and_the_right_one_after_them_is_not(self, world: World) -> None:
        manager = await world.manager(CODE)
        issued = await manager.deactivate_and_create(USER, "login")
        await spend(manager, 5)
        for call in (manager.verify, manager.consume):
            error = await refused(TooManyAttempts, call(USER, "login", issued.key))
            assert error.retry_after == WINDOW.total_seconds()
        await refused(TooManyAttempts, redeem(manager, "login", issued.key))
        await refused(TooManyAttempts, manager.exists_valid(USER, "login", issued.key))
        world.clock.advance(timedelta(minutes=10))
        error = await refused(TooManyAttempts, manager.verify(USER, "login", issued.key))
        assert error.retry_after == 300

    async def test_nothing_is_compared_once_it_is_spent(self, world: World) -> None:
        manager = await world.manager(CODE)
        await spend(manager, 5)
        world.backend.calls.clear()
        await refused(TooManyAttempts, manager.consume(USER, "login", "123456"))
        assert world.backend.calls == ["present"]

    async def test_the_last_one_may_be_right(self, world: World) -> None:
        manager = await world.manager(CODE)
        issued = await manager.deactivate_and_create(USER, "login")
        await spend(manager, 4)
        assert await manager.consume(USER, "login", issued.key) == issued

    async def test_of_200_parallel_guesses_at_most_five_are_compared(self, world: World) -> None:
        managers = [await world.manager(CODE) for _ in range(2)]
        issued = await managers[0].deactivate_and_create(USER, "login")
        guesses = [*wrong_codes(issued.key, 199), issued.key]
        calls = [managers[n % 2].consume(USER, "login", guess) for n, guess in enumerate(guesses)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        compared = [r for r in results if not isinstance(r, TooManyAttempts)]
        assert len(compared) == 5
        assert not [r for r in results if isinstance(r, VerificationToken)]

    async def test_a_right_key_costs_nothing(self, world: World) -> None:
        manager = await world.manager(CODE)
        issued = await manager.deactivate_and_create(USER, "login")
        await spend(manager, 4)
        for _ in range(10):
            assert await manager.verify(USER, "login", issued.key) == issued
            assert await manager.exists_valid(USER, "login", issued.key)
        await spend(manager, 1)
        await refused(TooManyAttempts, manager.verify(USER, "login", issued.key))

    async def test_the_window_begins_with_the_first_wrong_one(self, world: World) -> None:
        manager = await world.manager(CODE)
        issued = await manager.deactivate_and_create(USER, "login")
        await manager.verify(USER, "login", issued.key)
        world.clock.advance(timedelta(minutes=10))
        await spend(manager, 5)
        world.clock.advance(WINDOW - MS)
        issued = await manager.deactivate_and_create(USER, "login")
        await refused(TooManyAttempts, manager.verify(USER, "login", issued.key))
        world.clock.advance(MS)
        assert await manager.verify(USER, "login", issued.key) == issued

    @pytest.mark.parametrize("how", ["consume", "redeem"])
    async def test_a_successful_use_resets_it_and_a_check_does_not(self, world: World, how: str) -> None:
        manager = await world.manager(CODE)
        issued = await manager.deactivate_and_create(USER, "login")
        await spend(manager, 4)
        if how == "consume":
            await manager.consume(USER, "login", issued.key)
        else:
            await redeem(manager, "login", issued.key)
        await spend(manager, 5)
        await refused(TooManyAttempts, manager.verify(USER, "login", WRONG_CODE))

    async def test_it_survives_reissuing_deactivating_and_purging(self, world: World) -> None:
        manager = await world.manager(CODE)
        await spend(manager, 5)
        for _ in range(3):
            issued = await manager.deactivate_and_create(USER, "login")
            await refused(TooManyAttempts, manager.consume(USER, "login", issued.key))
            await manager.deactivate(USER)
            await manager.purge()
            await manager.get_active_or_create(USER, "login")
            await refused(TooManyAttempts, manager.verify(USER, "login", issued.key))

    async def test_it_counts_whether_or_not_a_token_exists(self, world: World) -> None:
        manager = await world.manager(CODE)
        steps: list[list[str]] = []
        await manager.deactivate_and_create(USER, "login")
        for obj in (USER, OTHER):
            world.backend.calls.clear()
            await spend(manager, 5, obj)
            await refused(TooManyAttempts, manager.verify(obj, "login", "123456"))
            steps.append(list(world.backend.calls))
        assert steps[0] == steps[1]  # the same steps, whether the object exists or not

    async def test_it_is_the_objects_and_the_slugs_own(self, world: World) -> None:
        manager = await world.manager(CODE, TokenPolicy.code("pin"))
        await spend(manager, 5)
        for obj, slug in ((OTHER, "login"), (USER, "pin"), (Subject("app.row", 42), "login")):
            await spend(manager, 5, obj, slug)
        await refused(TooManyAttempts, manager.verify(Subject("auth.user", "42"), "login", WRONG_CODE))

    async def test_exists_valid_counts_too(self, world: World) -> None:
        manager = await world.manager(CODE)
        issued = await manager.deactivate_and_create(USER, "login")
        for code in wrong_codes(issued.key, 5):
            assert not await manager.exists_valid(USER, "login", code)
        await refused(TooManyAttempts, manager.exists_valid(USER, "login", issued.key))
        await refused(TooManyAttempts, manager.consume(USER, "login", issued.key))
        assert await manager.exists_valid(USER, "login")  # without a key nothing is guessed

    async def test_methods_share_one_budget(self, world: World) -> None:
        manager = await world.manager(CODE)
        issued = await manager.deactivate_and_create(USER, "login")
        wrong = iter(wrong_codes(issued.key, 5))
        await refused(InvalidToken, manager.verify(USER, "login", next(wrong)))
        await refused(InvalidToken, manager.consume(USER, "login", next(wrong)))
        await refused(InvalidToken, redeem(manager, "login", next(wrong)))
        assert not await manager.exists_valid(USER, "login", next(wrong))
        await refused(InvalidToken, manager.consume(USER, "login", next(wrong), consume_id="id"))
        await refused(TooManyAttempts, manager.verify(USER, "login", issued.key))

    @pytest.mark.parametrize("typed", ["", "12345", "1234567", "abcdef", "a\0", "1" * 513, "\ud800", "  "])
    async def test_what_has_not_the_shape_of_a_code_is_no_attempt(self, world: World, typed: str) -> None:
        manager = await world.manager(CODE)
        world.backend.calls.clear()
        for _ in range(10):
            error = await refused(InvalidToken, manager.verify(USER, "login", typed))
            assert (error.reason, error.attempts_left) == ("unknown", None)
            await refused(InvalidInput, manager.consume(USER, "login", WRONG_CODE, consume_id=""))
        assert world.backend.calls == []
        await spend(manager, 5)

    async def test_the_error_says_how_many_are_left(self, world: World) -> None:
        manager = await world.manager(CODE)
        issued = await manager.issue(USER, "login")
        lefts = [
            (await refused(InvalidToken, manager.verify(USER, "login", code))).attempts_left
            for code in wrong_codes(issued.key, 6)
        ]
        assert lefts == [4, 3, 2, 1, 0, 0]
        await manager.issue(USER, "reset")
        assert (await refused(InvalidToken, manager.verify(USER, "reset", WRONG))).attempts_left is None

    async def test_a_used_or_leased_code_is_no_guess(self, world: World) -> None:
        manager = await world.manager(CODE)
        issued = await manager.deactivate_and_create(USER, "login")
        async with manager.redeem(USER, "login", issued.key):
            for _ in range(7):
                assert await reason(manager.verify(USER, "login", issued.key)) == "leased"
        for _ in range(7):
            assert await reason(manager.consume(USER, "login", issued.key)) == "used"
        await spend(manager, 5)

    async def test_the_window_grows_when_it_is_exhausted_again_and_again_up_to_a_day(
        self, world: World
    ) -> None:
        manager = await world.manager(CODE)
        lengths: list[float] = []
        for _ in range(10):
            await spend(manager, 5)
            error = await refused(TooManyAttempts, manager.verify(USER, "login", WRONG_CODE))
            lengths.append(error.retry_after)
            world.clock.advance(timedelta(seconds=error.retry_after))
        minutes = [15, 30, 60, 120, 240, 480, 960, 1440, 1440, 1440]
        assert lengths == [m * 60 for m in minutes]

    async def test_purge_does_not_forget_the_growth(self, world: World) -> None:
        manager = await world.manager(CODE)
        await spend(manager, 5)
        await manager.purge()
        await refused(TooManyAttempts, manager.verify(USER, "login", WRONG_CODE))
        world.clock.advance(WINDOW)
        await manager.purge()
        await spend(manager, 5)
        assert (await refused(TooManyAttempts, manager.verify(USER, "login", WRONG_CODE))).retry_after == 1800

    async def test_a_window_that_was_not_exhausted_ends_the_growth(self, world: World) -> None:
        manager = await world.manager(CODE)
        await spend(manager, 5)
        world.clock.advance(WINDOW)
        await spend(manager, 4)
        world.clock.advance(2 * WINDOW)
        await spend(manager, 5)
        assert (await refused(TooManyAttempts, manager.verify(USER, "login", WRONG_CODE))).retry_after == 900

    async def test_a_success_ends_the_growth(self, world: World) -> None:
        manager = await world.manager(CODE)
        await spend(manager, 5)
        world.clock.advance(WINDOW)
        issued = await manager.deactivate_and_create(USER, "login")
        await manager.consume(USER, "login", issued.key)
        await spend(manager, 5)
        assert (await refused(TooManyAttempts, manager.verify(USER, "login", WRONG_CODE))).retry_after == 900

    async def test_without_a_policy_there_is_no_cap_and_nothing_is_spent(self, world: World) -> None:
        manager = await world.manager(CODE)
        issued = await manager.deactivate_and_create(USER, "reset")
        world.backend.calls.clear()
        for _ in range(20):
            assert await reason(manager.verify(USER, "reset", WRONG)) == "unknown"
        assert await manager.consume(USER, "reset", issued.key) == issued
        assert not {"spend", "refund", "reset"} & set(world.backend.calls)

    async def test_a_link_policy_may_have_a_cap(self, world: World) -> None:
        manager = await world.manager(
            TokenPolicy.link("reset", max_attempts=1, attempt_window=timedelta(hours=1))
        )
        issued = await manager.deactivate_and_create(USER, "reset")
        await refused(InvalidToken, manager.verify(USER, "reset", WRONG))
        error = await refused(TooManyAttempts, manager.consume(USER, "reset", issued.key))
        assert error.retry_after == 3600

    async def test_a_capped_link_asked_for_by_its_content_type_has_no_object_to_charge(
        self, world: World
    ) -> None:
        manager = await world.manager(TokenPolicy("reset", max_attempts=1))
        issued = await manager.deactivate_and_create(USER, "reset")
        for _ in range(3):
            assert await reason(manager.verify(Subject("auth.user"), "reset", WRONG)) == "unknown"
        assert await manager.consume(Subject("auth.user"), "reset", issued.key) == issued

    async def test_with_any_slug_nothing_capped_is_guessed(self, world: World) -> None:
        manager = await world.manager(CODE, TokenPolicy("capped", max_attempts=2))
        keys = [(await manager.deactivate_and_create(USER, slug)).key for slug in ("login", "capped", "free")]
        assert [await manager.exists_valid(USER, key=key) for key in keys] == [False, False, True]
        assert "spend" not in world.backend.calls


async def test_the_lookup_takes_the_same_steps_whether_or_not_the_object_exists() -> None:
    for policies in ([], [CODE]):
        steps: list[list[str]] = []
        for exists in (True, False):
            backend = Watched()
            async with TokenManager(backend, SECRETS, policies=policies) as manager:
                if exists:
                    await manager.deactivate_and_create(USER, "login")
                backend.calls.clear()
                for call in (manager.verify, manager.consume):
                    assert await reason(call(USER, "login", WRONG_CODE)) == "unknown"
                steps.append(backend.calls)
        assert steps[0] == steps[1]
