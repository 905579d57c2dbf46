"""The manager and the memory backend under trio: nothing in them is asyncio's own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from datetime import timedelta

import pytest
import trio

from vtoken import (
    CooldownActive,
    InvalidToken,
    Subject,
    TokenManager,
    TokenPolicy,
    TooManyAttempts,
    VerificationToken,
)

from .core_tools import CODE, USER, World, reason, redeem, refused, wrong_codes


def run(test: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World()
        with trio.fail_after(60):
            try:
                await test(world)
            finally:
                await world.aclose()

    trio.run(main)


def test_the_life_of_a_token() -> None:
    async def life(world: World) -> None:
        manager = await world.manager()
        issued = await manager.get_active_or_create(USER, "reset", {"n": 1})
        assert issued.key is not None
        assert await manager.verify(USER, "reset", issued.key) == issued
        assert await manager.exists_valid(USER)
        assert [t async for t in manager.filter_active_tokens(USER)] == [issued]
        assert await manager.consume(USER, "reset", issued.key, consume_id="id") == issued
        assert await manager.consume(USER, "reset", issued.key, consume_id="id") == issued
        assert await reason(manager.consume(USER, "reset", issued.key)) == "used"
        assert (await manager.stats()).used == 1
        assert await manager.purge() == 1

    run(life)


def test_redeem_gives_back_on_an_exception_and_on_a_cancellation() -> None:
    async def life(world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a")
        with pytest.raises(ZeroDivisionError):
            async with manager.redeem(USER, "a", issued.key):
                raise ZeroDivisionError
        with trio.CancelScope() as scope:
            async with manager.redeem(USER, "a", issued.key):
                world.backend.before["update"] = (
                    trio.lowlevel.checkpoint
                )  # as a backend with a connection would
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught
        assert await redeem(manager, "a", issued.key) == issued.id

    run(life)


def test_what_was_not_sent_is_taken_back() -> None:
    async def life(world: World) -> None:
        manager = await world.manager(TokenPolicy("mail", cooldown="1m"))
        with trio.CancelScope() as scope:
            async with manager.issuing(USER, "mail"):
                world.backend.before["deactivate"] = trio.lowlevel.checkpoint
                scope.cancel()
                await trio.sleep_forever()
        assert not await manager.exists_valid(USER)
        async with aclosing(
            manager.issue_many([Subject("auth.user", n) for n in range(9)], "many")
        ) as tokens:
            async for token in tokens:
                if token.object_id == "4":
                    break
        assert len([stored for stored in await world.stored() if stored.is_active]) == 5

    run(life)


def test_a_cancelled_scope_still_closes() -> None:
    async def life(world: World) -> None:
        world.backend.before["close"] = trio.lowlevel.checkpoint  # as a backend with a connection would
        with trio.CancelScope() as scope:
            async with TokenManager(world.backend):
                scope.cancel()
                await trio.sleep_forever()
        assert world.backend.calls == ["open", "note", "close"]

    run(life)


def test_caps_hold_under_parallel_guesses() -> None:
    async def life(world: World) -> None:
        manager = await world.manager(CODE)
        issued = await manager.deactivate_and_create(USER, "login")
        world.backend.before = dict.fromkeys(("find", "present", "update"), trio.lowlevel.checkpoint)
        errors: list[InvalidToken] = []

        async def guess(code: str) -> None:
            errors.append(await refused(InvalidToken, manager.consume(USER, "login", code)))

        async with trio.open_nursery() as nursery:
            for code in wrong_codes(issued.key, 50):
                nursery.start_soon(guess, code)
        assert len([e for e in errors if not isinstance(e, TooManyAttempts)]) == 5
        await refused(TooManyAttempts, manager.consume(USER, "login", issued.key))

    run(life)


def test_concurrent_get_active_or_create_gives_one_even_with_a_cooldown() -> None:
    async def life(world: World) -> None:
        manager = await world.manager(TokenPolicy("mail", cooldown=timedelta(minutes=1)))
        world.backend.before = dict.fromkeys(("find", "insert"), trio.lowlevel.checkpoint)
        tokens: list[VerificationToken] = []

        async def ask() -> None:
            tokens.append(await manager.get_active_or_create(USER, "mail"))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(ask)
        assert len(tokens) == 10
        assert len(set(tokens)) == 1
        await manager.deactivate(USER)
        await refused(CooldownActive, manager.get_active_or_create(USER, "mail"))

    run(life)


def test_async_hooks() -> None:
    async def life(world: World) -> None:
        heard: list[str] = []

        async def hook(event: object) -> None:
            await trio.lowlevel.checkpoint()
            heard.append(type(event).__name__)

        async with TokenManager(world.backend, hooks=[hook]) as manager:
            await manager.deactivate_and_create(USER)
        assert heard == ["TokenEvent"]

    run(life)
