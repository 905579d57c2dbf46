"""A link and a code in one message: one token, one budget, one fate."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from vtoken import InvalidInput, InvalidToken, Settings, Subject, TokenPolicy, TooManyAttempts

from .core_tools import (
    MS,
    SECRET,
    USER,
    WRONG_CODE,
    World,
    reason,
    redeem,
    refused,
    wrong_codes,
)

PAIR = TokenPolicy.pair("login")
ANYBODY = Subject("auth.user")


class TestPair:
    async def test_a_long_key_and_a_short_code(self, world: World) -> None:
        manager = await world.manager(PAIR)
        token = await manager.issue(USER, "login")
        assert token.code is not None
        assert (len(token.key), len(token.code), token.code.isdigit()) == (32, 6, True)
        assert token.expires_at == world.clock() + timedelta(hours=1)
        assert token.code_expires_at == world.clock() + timedelta(minutes=10)
        assert token.code not in repr(token)
        found = await manager.get(token.id)
        assert found is not None
        assert (found.key, found.code, found.code_expires_at) == (None, None, token.code_expires_at)
        assert [key.kind for key in (await world.stored())[0].keys] == ["link", "code"]

    @pytest.mark.parametrize("how", ["verify", "consume", "redeem", "exists_valid"])
    @pytest.mark.parametrize("which", ["key", "code"])
    async def test_either_is_accepted_and_using_one_ends_both(
        self, world: World, which: str, how: str
    ) -> None:
        manager = await world.manager(PAIR)
        token = await manager.issue(USER, "login")
        presented = token.key if which == "key" else f"{token.code} "
        if how == "redeem":
            assert await redeem(manager, "login", presented) == token.id
        else:
            assert await getattr(manager, how)(USER, "login", presented)
        expected = "used" if how in ("consume", "redeem") else None
        for key in (token.key, token.code or ""):
            if expected is None:
                assert await manager.verify(USER, "login", key) == token
            else:
                assert await reason(manager.consume(USER, "login", key)) == expected

    async def test_the_code_ends_before_the_link(self, world: World) -> None:
        manager = await world.manager(PAIR)
        token = await manager.issue(USER, "login")
        assert token.code is not None
        world.clock.advance(timedelta(minutes=10))
        assert await manager.verify(USER, "login", token.code) == token
        world.clock.advance(MS)
        assert await reason(manager.verify(USER, "login", token.code)) == "expired"
        assert await manager.consume(USER, "login", token.key) == token

    async def test_a_shorter_life_caps_the_code(self, world: World) -> None:
        manager = await world.manager(PAIR)
        token = await manager.issue(USER, "login", expires_in="2m")
        assert token.code_expires_at == token.expires_at == world.clock() + timedelta(minutes=2)

    async def test_only_what_has_the_shape_of_a_code_is_charged(self, world: World) -> None:
        manager = await world.manager(PAIR)
        token = await manager.issue(USER, "login")
        for text in ("x" * 32, token.key[:-1], "12345", "1234567", token.key + "0", "a\0"):
            error = await refused(InvalidToken, manager.verify(USER, "login", text))
            assert error.attempts_left is None
        for left, code in zip((4, 3, 2, 1, 0), wrong_codes(token.code or "", 5), strict=True):
            assert (await refused(InvalidToken, manager.verify(USER, "login", code))).attempts_left == left
        await refused(TooManyAttempts, manager.verify(USER, "login", token.code or ""))
        assert await manager.consume(USER, "login", token.key) == token  # the link stays usable

    async def test_reissuing_buys_no_attempts(self, world: World) -> None:
        manager = await world.manager(PAIR)
        for _ in range(5):
            token = await manager.issue(USER, "login")
            await refused(InvalidToken, manager.verify(USER, "login", *wrong_codes(token.code or "", 1)))
        token = await manager.issue(USER, "login")
        await refused(TooManyAttempts, manager.consume(USER, "login", token.code or ""))

    async def test_with_the_class_alone_everything_is_a_link(self, world: World) -> None:
        manager = await world.manager(PAIR)
        token = await manager.issue(USER, "login")
        for text in (token.code or "", WRONG_CODE, "", "a\0"):
            assert await reason(manager.verify(ANYBODY, "login", text)) == "unknown"
        assert (await manager.status(USER, "login")).attempts_left == 5
        assert await manager.consume(ANYBODY, "login", token.key) == token

    async def test_the_context_binds_both_unless_the_code_is_let_off(self, world: World) -> None:
        given: dict[str, Any] = {"context": "cookie"}
        for policy, code_is_bound in (
            (TokenPolicy.pair("login", context="required"), True),
            (TokenPolicy.pair("login", context="required", code_context="ignored"), False),
        ):
            manager = await world.manager(policy)
            token = await manager.issue(USER, "login", **given)
            code = token.code or ""
            assert await reason(manager.verify(USER, "login", token.key)) == "unknown"
            assert await reason(manager.verify(USER, "login", token.key, context="other")) == "unknown"
            if code_is_bound:
                assert await reason(manager.verify(USER, "login", code)) == "unknown"
            else:
                assert await manager.verify(USER, "login", code) == token
                assert await manager.verify(USER, "login", code, context="other") == token
            assert await manager.verify(USER, "login", code, **given) == token
            assert await manager.consume(USER, "login", token.key, **given) == token

    async def test_its_code_is_refused_where_attempts_are_not_counted(self, world: World) -> None:
        manager = await world.manager(PAIR)
        token = await manager.issue(USER, "login")
        await refused(InvalidInput, manager.deactivate(USER, "login", token.code or ""))
        assert await manager.deactivate(USER, key=token.code or "") == 0
        assert not await manager.exists_valid(USER, key=token.code or "")
        assert await manager.deactivate(USER, "login", token.key) == 1

    async def test_it_has_no_generator_of_its_own(self, world: World) -> None:
        manager = await world.manager(PAIR)
        for kwargs in ({"length": 64}, {"generator": lambda: "x"}):
            await refused(InvalidInput, manager.issue(USER, "login", key_generator_kwargs=kwargs))

    async def test_derived_and_plain_keys(self, world: World) -> None:
        for settings in (
            Settings(secret=SECRET, key_storage="derived"),
            Settings(secret=SECRET, key_storage="plain"),
        ):
            manager = await world.manager(PAIR, settings=settings)
            token = await manager.issue(USER, "login")
            again = await manager.get_active_or_create(USER, "login")
            assert (again, again.key, again.code) == (token, token.key, token.code)
            assert (token.code or "") not in token.key
            assert await manager.consume(USER, "login", token.code or "") == token

    async def test_its_overlap_keeps_both_keys(self, world: World) -> None:
        manager = await world.manager(TokenPolicy.pair("login", overlap="5m"))
        old, new = await manager.issue(USER, "login"), await manager.issue(USER, "login")
        for key in (old.key, old.code, new.key, new.code):
            assert await manager.verify(USER, "login", key or "") == new
        await manager.consume(USER, "login", old.code or "")
        for key in (old.key, old.code, new.key, new.code):
            assert await reason(manager.verify(USER, "login", key or "")) == "used"

    async def test_a_code_that_is_drawn_twice_moves_to_the_newer_token(self, world: World) -> None:
        policy = TokenPolicy.pair("login", test_codes={USER: "123456"}, test_codes_why="app-store review")
        manager = await world.manager(policy)
        for _ in range(3):
            token = await manager.issue(USER, "login")
            assert token.code == "123456"
            assert world.events[-1].is_test_code
            assert await manager.verify(USER, "login", "123456") == token
        await manager.consume(USER, "login", "123456")
        token = await manager.issue(USER, "login")
        assert await manager.consume(USER, "login", "123456") == token
