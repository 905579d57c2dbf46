"""Tokens that are bound to a context of the caller."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from vtoken import (
    CooldownActive,
    InvalidInput,
    TokenPolicy,
)

from .core_tools import (
    USER,
    World,
    reason,
    redeem,
    refused,
)


class TestContext:
    bound = TokenPolicy("login", context="required", max_attempts=11)

    async def test_bound_to_the_callers_nonce(self, world: World) -> None:
        manager = await world.manager(self.bound)
        issued = await manager.deactivate_and_create(USER, "login", context="cookie")
        for wrong in ("other", "Cookie", "cookie ", "", None):
            assert await reason(manager.verify(USER, "login", issued.key, context=wrong)) == "unknown"
            assert not await manager.exists_valid(USER, "login", issued.key, context=wrong)
        assert await manager.verify(USER, "login", issued.key, context="cookie") == issued
        assert await manager.exists_valid(USER, "login", issued.key, context="cookie") is True

    async def test_concurrent_callers_of_one_context_get_one_token(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("login", context="required"))
        other = await manager.deactivate_and_create(USER, "login", context="browser A")
        world.backend.after["find"] = world.backend.before["insert"] = lambda: asyncio.sleep(0)
        calls = [manager.get_active_or_create(USER, "login", context="browser B") for _ in range(8)]
        [token] = set(await asyncio.gather(*calls))
        assert token != other
        assert [stored.id for stored in await world.stored() if stored.is_active] == [token.id]

    async def test_a_cooldown_leaves_the_token_of_another_context(self, world: World) -> None:
        policy = TokenPolicy("login", context="required", cooldown=timedelta(minutes=1))
        manager = await world.manager(policy)
        other = await manager.deactivate_and_create(USER, "login", context="browser A")
        await refused(CooldownActive, manager.get_active_or_create(USER, "login", context="browser B"))
        assert await manager.verify(USER, "login", other.key, context="browser A") == other

    async def test_get_active_or_create_gives_no_token_of_another_context(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("login", context="required", key_storage="derived"))
        first = await manager.get_active_or_create(USER, "login", context="browser A")
        assert await manager.get_active_or_create(USER, "login", context="browser A") == first
        second = await manager.get_active_or_create(USER, "login", context="browser B")
        assert second != first
        assert second.key is not None
        assert await manager.verify(USER, "login", second.key, context="browser B") == second
        assert not await manager.exists_valid(USER, "login", first.key or "", context="browser A")

    @pytest.mark.parametrize("how", ["consume", "redeem"])
    async def test_used_with_it_only(self, world: World, how: str) -> None:
        manager = await world.manager(self.bound)
        issued = await manager.deactivate_and_create(USER, "login", context="cookie")

        async def use(context: str | None) -> object:
            if how == "redeem":
                return await redeem(manager, "login", issued.key, context=context)
            return await manager.consume(USER, "login", issued.key, context=context)

        assert await reason(use("other")) == "unknown"
        assert await reason(use(None)) == "unknown"
        assert await use("cookie")
        assert await reason(use("cookie")) == "used"

    async def test_deactivating_by_the_key_needs_no_context(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("login", context="required"))
        for slug in ({"slug": "login"}, {}):
            issued = await manager.deactivate_and_create(USER, "login", context="cookie")
            assert [t async for t in manager.filter_active_tokens(USER, key=issued.key, **slug)] == [issued]
            assert await manager.deactivate(USER, key=issued.key, **slug) == 1

    async def test_with_any_slug_a_bound_key_matches_nothing(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("login", context="required"))
        issued = await manager.deactivate_and_create(USER, "login", context="cookie")
        assert not await manager.exists_valid(USER, key=issued.key)
        assert not await manager.exists_valid(USER, key=issued.key, context="cookie")

    @pytest.mark.parametrize("context", [None, "", 5, b"c", "a\0", "\ud800", "a" * 513, ["c"]])
    @pytest.mark.parametrize("method", ["deactivate_and_create", "get_active_or_create"])
    async def test_issuing_needs_one(self, world: World, method: str, context: Any) -> None:
        manager = await world.manager(self.bound)
        await refused(InvalidInput, getattr(manager, method)(USER, "login", context=context))
        assert await world.stored() == []

    @pytest.mark.parametrize("context", [5, b"c", "a\0", "\ud800", "a" * 513, ["c"]])
    async def test_out_of_range_where_it_is_checked(self, world: World, context: Any) -> None:
        manager = await world.manager(self.bound)
        for slug in ("login", "other"):
            await refused(InvalidInput, manager.verify(USER, slug, "key", context=context))
        assert "spend" not in world.backend.calls

    async def test_ignored_by_default(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "login", context="cookie")
        assert (await world.stored())[0].context == b""
        assert await manager.consume(USER, "login", issued.key, context="other") == issued

    async def test_only_its_digest_is_stored(self, world: World) -> None:
        manager = await world.manager(self.bound)
        await manager.deactivate_and_create(USER, "login", context="canary-cookie")
        stored = (await world.stored())[0]
        assert len(stored.context) == 32
        assert "canary" not in str(tuple(stored))
