"""For an address that nobody has, and for screens: pretend and status."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from vtoken import (
    ConfigurationError,
    CooldownActive,
    InvalidInput,
    InvalidToken,
    Limit,
    Settings,
    Subject,
    TokenManager,
    TokenPolicy,
)
from vtoken.backend import NEVER

from .core_tools import (
    CODE,
    MINUTE,
    MS,
    OTHER,
    SECRET,
    USER,
    World,
    listed,
    reason,
    refused,
    wrong_codes,
)

NOBODY = Subject("auth.user", "nobody@b.example")


class TestPretend:
    async def test_it_leaves_nothing_that_is_valid_active_or_counted(self, world: World) -> None:
        manager = await world.manager(CODE)
        await manager.pretend(NOBODY, "login")
        assert not await manager.exists_valid(NOBODY)
        assert not await manager.exists_valid(Subject("auth.user"))
        assert await listed(manager.filter_active_tokens(NOBODY)) == []
        assert await listed(manager.history(NOBODY)) == []
        assert (await manager.stats()).total == 0
        [stored] = await world.stored()
        assert await manager.get(stored.id) is None
        assert not stored.is_active
        assert "nobody" not in repr(tuple(stored))
        world.clock.advance(2 * timedelta(days=1))
        await manager.purge(keep=timedelta(days=366))
        assert await world.stored() == []

    async def test_no_real_token_is_touched(self, world: World) -> None:
        manager = await world.manager()
        token = await manager.issue(USER, "a")
        await manager.pretend(USER, "a")
        assert await manager.verify(USER, "a", token.key) == token
        await manager.issue(USER, "a")
        assert len(await world.stored()) == 3

    async def test_no_key_fits_it(self, world: World) -> None:
        policy = TokenPolicy.code("login", key_generator=lambda: "123456", max_attempts=9)
        manager = await world.manager(policy)
        await manager.pretend(NOBODY, "login")
        assert await reason(manager.verify(NOBODY, "login", "123456")) == "unknown"

    @pytest.mark.parametrize(
        "policy",
        [
            TokenPolicy.link("x", cooldown="1m"),
            TokenPolicy.code("x", cooldown="1m", issue_limits=[Limit(3, "1h", by="ip")]),
            TokenPolicy.pair("x", overlap="5m", key_storage="derived"),
            TokenPolicy("x", max_attempts=3, max_uses=None, expiration=None),
        ],
        ids=["link", "code", "pair", "never"],
    )
    async def test_it_asks_the_store_what_issue_asks(self, world: World, policy: TokenPolicy) -> None:
        manager = await world.manager(policy)
        asked: list[object] = []
        for call in (manager.issue, manager.pretend):
            world.backend.calls.clear()
            world.backend.spends.clear()
            await call(
                USER if call == manager.issue else NOBODY, "x", extra_data={"a": "\u00e9"}, by={"ip": "x"}
            )
            spends = [spend._replace(budget=None) for spend in world.backend.spends]  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # all but whose it is
            asked.append((world.backend.calls.copy(), spends))
        assert asked[0] == asked[1]
        real, pretended = sorted(await world.stored(), key=lambda stored: stored.content_type)
        assert real.expires_at == pretended.expires_at
        assert len(real.keys) == len(pretended.keys)
        assert len(real.extra_data or "") == len((pretended.extra_data or "").encode()) - 1
        assert (real.expires_at == NEVER) is (policy.expiration is None)

    async def test_the_same_limits_and_errors(self, world: World) -> None:
        manager = await world.manager(
            CODE, TokenPolicy("mail", cooldown="1m", issue_limits=[Limit(3, "1h", by="ip")])
        )
        by = {"ip": "192.0.2.7"}
        await manager.pretend(NOBODY, "mail", by=by)
        pretended = await refused(CooldownActive, manager.pretend(NOBODY, "mail", by=by))
        await manager.issue(USER, "mail", by=by)
        real = await refused(CooldownActive, manager.issue(USER, "mail", by=by))
        assert (pretended.retry_after, pretended.limit) == (real.retry_after, real.limit)
        await manager.pretend(OTHER, "mail", by=by)
        await refused(CooldownActive, manager.issue(Subject("auth.user", 44), "mail", by=by))  # one budget
        hostile: list[dict[str, Any]] = [
            {"expires_in": 0},
            {"extra_data": object()},
            {"by": "x"},
            {"context": "x"},
        ]
        for bad in hostile:
            await refused(InvalidInput, manager.pretend(NOBODY, "mail", **bad))
        await refused(InvalidInput, manager.pretend(Subject("auth.user"), "mail"))

    async def test_of_each_context_its_own_cooldown(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("mail", cooldown="1m", context="required"))
        await manager.pretend(NOBODY, "mail", context="x")
        await refused(CooldownActive, manager.pretend(NOBODY, "mail", context="x"))
        await manager.pretend(NOBODY, "mail", context="y")

    async def test_the_event_names_nobody(self, world: World) -> None:
        manager = await world.manager()
        await manager.pretend(NOBODY, "a")
        [event] = world.events
        assert (event.name, event.content_type, event.slug) == ("pretended", "auth.user", "a")
        assert "nobody" not in repr(event)

    async def test_generators_are_called_as_by_issue(self, world: World) -> None:
        manager = await world.manager()
        kwargs = {"generator": lambda: 1 // 0}
        await refused(ZeroDivisionError, manager.pretend(NOBODY, "a", key_generator_kwargs=kwargs))


class TestStatus:
    async def shown(self, manager: TokenManager, obj: object = USER, slug: str = "login") -> list[object]:
        status = await manager.status(obj, slug)
        return [
            status.has_valid,
            status.expires_at,
            status.attempts_left,
            status.attempts_reset_at,
            status.can_issue_at,
        ]

    async def test_a_life(self, world: World) -> None:
        manager = await world.manager(TokenPolicy.code("login", cooldown="1m"))
        start = world.clock()
        assert await self.shown(manager) == [False, None, 5, None, start]
        token = await manager.issue(USER, "login")
        expiry = start + 10 * MINUTE
        assert await self.shown(manager) == [True, expiry, 5, None, start + MINUTE]
        world.clock.advance(MINUTE)
        now = world.clock()
        await refused(InvalidToken, manager.verify(USER, "login", *wrong_codes(token.key, 1)))
        assert await self.shown(manager) == [True, expiry, 4, now + 15 * MINUTE, now]
        for code in wrong_codes(token.key, 4):
            await refused(InvalidToken, manager.verify(USER, "login", code))
        assert await self.shown(manager) == [True, expiry, 0, now + 15 * MINUTE, now]
        world.clock.advance(9 * MINUTE)
        assert (await self.shown(manager))[0] is True
        world.clock.advance(MS)
        assert (await self.shown(manager))[:2] == [False, None]
        world.clock.advance(6 * MINUTE)
        assert await self.shown(manager) == [False, None, 5, None, world.clock()]
        assert await self.shown(manager, OTHER) == [False, None, 5, None, world.clock()]

    async def test_it_consumes_charges_and_writes_nothing(self, world: World) -> None:
        manager = await world.manager(TokenPolicy.code("login", cooldown="1m"))
        await manager.issue(USER, "login")
        before = await world.stored()
        world.backend.calls.clear()
        for _ in range(20):
            await manager.status(USER, "login")
        assert await world.stored() == before
        assert set(world.backend.calls) == {"find", "budgets"}
        assert world.event_names == ["issued"]

    async def test_without_limits_and_without_an_expiry(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("a", expiration=None))
        assert await self.shown(manager, slug="a") == [False, None, None, None, world.clock()]
        await manager.issue(USER, "a")
        assert await self.shown(manager, slug="a") == [True, None, None, None, world.clock()]

    @pytest.mark.parametrize(
        "policy", [TokenPolicy.code("login", cooldown="1m"), TokenPolicy.pair("login", cooldown="1m")]
    )
    async def test_of_what_was_pretended_as_of_a_real_one(self, world: World, policy: TokenPolicy) -> None:
        manager = await world.manager(policy)
        code = (await manager.issue(USER, "login")).code or "x"
        await manager.pretend(NOBODY, "login")
        guesses = wrong_codes(code if code.isdigit() else "271828", 5)
        for advance, guess in zip((0, 30, 60, 600, 3600), guesses, strict=True):
            world.clock.advance(timedelta(seconds=advance))
            assert await self.shown(manager, NOBODY) == await self.shown(manager)
            for obj in (USER, NOBODY):
                await refused(InvalidToken, manager.verify(obj, "login", guess))
            assert await self.shown(manager, NOBODY) == await self.shown(manager)

    async def test_of_a_context(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("a", context="required", cooldown="1m"))
        await manager.issue(USER, "a", context="x")
        assert (await manager.status(USER, "a", context="x")).has_valid
        assert (await manager.status(USER, "a", context="x")).can_issue_at == world.clock() + MINUTE
        assert not (await manager.status(USER, "a", context="y")).has_valid
        assert (await manager.status(USER, "a", context="y")).can_issue_at == world.clock()
        assert (await manager.status(USER, "a")).has_valid

    async def test_limits_by_dimensions_that_are_given(self, world: World) -> None:
        policy = TokenPolicy(
            "a", issue_limits=[Limit(1, "1h", by="ip")], attempt_limits=[Limit(2, "1h", by="ip")]
        )
        manager = await world.manager(policy)
        by = {"ip": "192.0.2.7"}
        await manager.issue(USER, "a", by=by)
        assert (await manager.status(USER, "a", by=by)).can_issue_at == world.clock() + 60 * MINUTE
        assert (await manager.status(USER, "a", by=by)).attempts_left == 2
        assert (await manager.status(USER, "a")).can_issue_at == world.clock()
        assert (await manager.status(USER, "a")).attempts_left is None

    async def test_the_newest_of_several(self, world: World) -> None:
        manager = await world.manager()
        await manager.issue(USER, "a", expires_in="2h")
        newest = await manager.issue(USER, "a", expires_in="1h", replace=False)
        assert (await manager.status(USER, "a")).expires_at == newest.expires_at
        async with manager.redeem(USER, "a", newest.key):
            assert (await manager.status(USER, "a")).expires_at == world.clock() + timedelta(hours=2)

    async def test_of_one_object_and_one_purpose(self, world: World) -> None:
        manager = await world.manager()
        await refused(InvalidInput, manager.status(Subject("auth.user"), "a"))
        assert (await manager.status(USER, None)).has_valid is False


class TestUnknownSlugs:
    async def test_refused_where_a_token_is_issued_checked_or_used(self, world: World) -> None:
        manager = await world.manager(CODE, settings=Settings(secret=SECRET, unknown_slugs="refuse"))
        for slug in ("logon", None):
            for call in (
                manager.issue(USER, slug),
                manager.pretend(USER, slug),
                manager.get_active_or_create(USER, slug),
                manager.exists_valid(USER, slug),
                manager.exists_valid(USER, slug, "key"),
                manager.verify(USER, slug, "key"),
                manager.consume(USER, slug, "key"),
                manager.status(USER, slug),
                listed(manager.issue_many([USER], slug)),
            ):
                await refused(ConfigurationError, call)
            with pytest.raises(ConfigurationError):
                manager.redeem(USER, slug, "key")
        assert "did you mean login?" in str(await refused(ConfigurationError, manager.issue(USER, "logon")))

    async def test_what_ends_or_lists_tokens_still_reaches_them(self, world: World) -> None:
        before = await world.manager()
        token = await before.issue(USER, "gone")
        manager = await world.manager(CODE, settings=Settings(secret=SECRET, unknown_slugs="refuse"))
        assert await listed(manager.filter_active_tokens(USER, "gone")) == [token]
        assert await listed(manager.history(USER, "gone")) == [token]
        assert await manager.exists_valid(USER)
        assert await manager.get(token.id) == token
        assert await manager.reset_limits(USER, "gone") == 0
        assert await manager.deactivate(USER, "gone", token.key) == 1
        assert await manager.deactivate(USER, "gone") == 0
        assert await manager.erase(USER) == 1
