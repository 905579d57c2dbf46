"""Tokens that are bound to a context of the caller."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest

from vtoken import (
    CooldownActive,
    InvalidInput,
    Subject,
    TokenPolicy,
)

from .core_tools import (
    OTHER,
    USER,
    WRONG,
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
        assert {stored.id for stored in await world.stored() if stored.is_active} == {token.id, other.id}

    async def test_a_stranger_neither_delays_nor_ends_the_owners_token(self, world: World) -> None:
        policy = TokenPolicy("login", context="required", cooldown=timedelta(minutes=1))
        manager = await world.manager(policy)
        other = await manager.deactivate_and_create(USER, "login", context="browser A")
        await refused(CooldownActive, manager.issue(USER, "login", context="browser A"))
        await manager.get_active_or_create(USER, "login", context="browser B")
        assert await manager.verify(USER, "login", other.key, context="browser A") == other

    async def test_get_active_or_create_gives_no_token_of_another_context(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("login", context="required", key_storage="derived"))
        first = await manager.get_active_or_create(USER, "login", context="browser A")
        assert await manager.get_active_or_create(USER, "login", context="browser A") == first
        second = await manager.get_active_or_create(USER, "login", context="browser B")
        assert second != first
        assert second.key is not None
        assert await manager.verify(USER, "login", second.key, context="browser B") == second
        assert await manager.exists_valid(USER, "login", first.key or "", context="browser A")

    async def test_the_last_use_ends_the_older_tokens_of_other_contexts(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("login", context="required", max_uses=2))
        older = await manager.issue(USER, "login", context="browser A")
        used = await manager.issue(USER, "login", context="browser B")
        newer = await manager.issue(USER, "login", context="browser C")
        elsewhere = await manager.issue(USER, "other")
        await manager.consume(USER, "login", used.key, context="browser B")
        assert await manager.verify(USER, "login", older.key, context="browser A") == older
        await redeem(manager, "login", used.key, context="browser B")
        assert await reason(manager.verify(USER, "login", older.key, context="browser A")) == "inactive"
        assert await manager.verify(USER, "login", newer.key, context="browser C") == newer
        assert await manager.verify(USER, "other", elsewhere.key) == elsewhere

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
        slugs: list[dict[str, Any]] = [{"slug": "login"}, {}]
        for slug in slugs:
            issued = await manager.deactivate_and_create(USER, "login", context="cookie")
            assert [t async for t in manager.filter_active_tokens(USER, key=issued.key, **slug)] == [issued]
            assert await manager.deactivate(USER, key=issued.key, **slug) == 1

    async def test_with_any_slug_a_bound_key_matches_nothing(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("login", context="required"))
        issued = await manager.deactivate_and_create(USER, "login", context="cookie")
        assert not await manager.exists_valid(USER, key=issued.key)
        await refused(InvalidInput, manager.exists_valid(USER, key=issued.key, context="cookie"))

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
        assert "present" not in world.backend.calls

    async def test_where_the_policy_asks_for_none_it_is_refused(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.issue(USER, "login")
        given: Any = {"context": "cookie"}
        for call in (
            manager.issue(USER, "login", **given),
            manager.pretend(USER, "login", **given),
            manager.get_active_or_create(USER, "login", **given),
            manager.deactivate_and_create(USER, "login", **given),
            manager.verify(USER, "login", issued.key, **given),
            manager.consume(USER, "login", issued.key, **given),
            manager.exists_valid(USER, "login", **given),
            manager.exists_valid(USER, "login", issued.key, **given),
            manager.status(USER, "login", **given),
        ):
            assert "context" in str(await refused(InvalidInput, call))
        with pytest.raises(InvalidInput, match="context"):
            manager.redeem(USER, "login", issued.key, **given)
        assert await manager.consume(USER, "login", issued.key) == issued

    async def test_only_its_digest_is_stored(self, world: World) -> None:
        manager = await world.manager(self.bound)
        await manager.deactivate_and_create(USER, "login", context="canary-cookie")
        stored = (await world.stored())[0]
        assert len(stored.context) == 32
        assert "canary" not in str(tuple(stored))


class TestNamedTexts:
    bound = TokenPolicy("login", context="required")

    async def test_their_order_does_not_matter_and_all_else_does(self, world: World) -> None:
        manager = await world.manager(self.bound)
        issued = await manager.issue(USER, "login", context={"cookie": "c", "address": "a@b.example"})
        same = {"address": "a@b.example", "cookie": "c"}
        wrong: list[Any] = [
            {"cookie": "c"},
            {"cookie": "c", "address": "other"},
            {"cookie": "a@b.example", "address": "c"},
            {**same, "more": ""},
            "cookie",
        ]
        for context in wrong:
            assert await reason(manager.verify(USER, "login", issued.key, context=context)) == "unknown"
        assert await manager.consume(USER, "login", issued.key, context=same) == issued

    @pytest.mark.parametrize("bad", [{}, {"": "x"}, {1: "x"}, {"x": 1}, {"x": None}, {"x": "a\0"}])
    async def test_out_of_range(self, world: World, bad: Any) -> None:
        manager = await world.manager(self.bound)
        await refused(InvalidInput, manager.issue(USER, "login", context=bad))

    async def test_where_all_are_empty_there_is_no_context(self, world: World) -> None:
        manager = await world.manager(self.bound)
        for nothing in ({"cookie": ""}, {"cookie": "", "address": ""}):
            error = await refused(InvalidInput, manager.issue(USER, "login", context=nothing))
            assert "not be empty" in str(error)
            issued = await manager.issue(USER, "login", context={"cookie": "", "address": "a@b.example"})
            assert await reason(manager.verify(USER, "login", issued.key, context=nothing)) == "unknown"


class TestComputed:
    """A context that is a function of the object: a fingerprint of its password hash, say."""

    bound = TokenPolicy("reset", context="required")

    def fingerprints(self) -> tuple[dict[str, str], Callable[[str], Awaitable[str]]]:
        stored = {"42": "hash of 42", "43": "hash of 43"}

        async def fingerprint(object_id: str) -> str:
            await asyncio.sleep(0)
            return stored[object_id]

        return stored, fingerprint

    async def test_the_link_dies_with_the_password(self, world: World) -> None:
        manager = await world.manager(self.bound)
        stored, fingerprint = self.fingerprints()
        issued = await manager.issue(USER, "reset", context=fingerprint)
        assert await manager.verify(USER, "reset", issued.key, context=fingerprint) == issued
        stored["42"] = "another one"
        assert await reason(manager.verify(USER, "reset", issued.key, context=fingerprint)) == "unknown"
        assert (await manager.status(USER, "reset", context=fingerprint)).has_valid is False

    @pytest.mark.parametrize("how", ["verify", "consume", "redeem"])
    async def test_with_the_class_alone_it_is_given_the_object_that_the_key_names(
        self, world: World, how: str
    ) -> None:
        manager = await world.manager(self.bound)
        _, fingerprint = self.fingerprints()
        asked: list[str] = []

        async def told(object_id: str) -> str:
            asked.append(object_id)
            return await fingerprint(object_id)

        issued = await manager.issue(OTHER, "reset", context=fingerprint)
        anybody = Subject("auth.user")
        assert await reason(manager.verify(anybody, "reset", WRONG, context=told)) == "unknown"
        assert asked == []
        if how == "redeem":
            async with manager.redeem(anybody, "reset", issued.key, context=told) as token:
                assert token == issued
        else:
            assert await getattr(manager, how)(anybody, "reset", issued.key, context=told) == issued
        assert asked == ["43"]

    async def test_another_objects_key_is_not_found_by_it(self, world: World) -> None:
        manager = await world.manager(self.bound)
        _, fingerprint = self.fingerprints()
        issued = await manager.issue(OTHER, "reset", context=fingerprint)
        assert await reason(manager.verify(USER, "reset", issued.key, context=fingerprint)) == "unknown"

    @pytest.mark.parametrize("answer", [5, None, "", {}, "a\0"])
    async def test_what_it_returns_is_checked(self, world: World, answer: Any) -> None:
        async def odd(_: str) -> Any:
            return answer

        manager = await world.manager(self.bound)
        await refused(InvalidInput, manager.issue(USER, "reset", context=odd))
        assert await world.stored() == []

    async def test_its_own_exception_passes_and_nothing_is_charged(self, world: World) -> None:
        async def failing(_: str) -> str:
            raise ZeroDivisionError

        manager = await world.manager(TokenPolicy("reset", context="required", max_attempts=1, cooldown="1m"))
        await refused(ZeroDivisionError, manager.issue(USER, "reset", context=failing))
        await refused(ZeroDivisionError, manager.verify(USER, "reset", WRONG, context=failing))
        issued = await manager.issue(USER, "reset", context="x")
        assert await manager.verify(USER, "reset", issued.key, context="x") == issued

    async def test_one_that_is_not_async_is_said(self, world: World) -> None:
        manager = await world.manager(self.bound)

        def waits(_: str) -> str:
            pytest.fail("it would hold the event loop up")

        error = await refused(InvalidInput, manager.issue(USER, "reset", context=waits))
        assert "must be async" in str(error)

    async def test_an_object_whose_call_is_async_will_do(self, world: World) -> None:
        class Fingerprint:
            async def __call__(self, object_id: str) -> str:
                return f"fingerprint of {object_id}"

        manager = await world.manager(self.bound)
        issued = await manager.issue(USER, "reset", context=Fingerprint())
        assert await manager.verify(USER, "reset", issued.key, context=Fingerprint()) == issued
