"""Issuing: what a new token is like, what becomes of the old one, and what a failure leaves behind."""

from __future__ import annotations

import asyncio
import math
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from vtoken import (
    ANY,
    DEFAULT,
    BackendUnavailable,
    ConfigurationError,
    ContentTypes,
    CooldownActive,
    InvalidInput,
    InvalidToken,
    IssuedToken,
    KeyGenerationError,
    Settings,
    Subject,
    TokenManager,
    TokenPolicy,
    VerificationToken,
)
from vtoken.testing import Clock

from .core_tools import CODE, MS, OTHER, SECRETS, START, USER, WRONG, World, reason, redeem, refused

MINUTE = timedelta(minutes=1)
COOLING = TokenPolicy("mail", cooldown=MINUTE)


class TestNewTokens:
    async def test_as_the_contract_says(self, world: World) -> None:
        world.clock.set(datetime(2100, 1, 1, 12, 30, 15, 123_999, tzinfo=UTC))
        manager = await world.manager()
        token = await manager.deactivate_and_create(USER, "reset", {"a": [1]}, True, 5)
        floored = datetime(2100, 1, 1, 12, 30, 15, 123_000, tzinfo=UTC)
        assert type(token) is IssuedToken
        assert isinstance(token, VerificationToken)
        assert (token.created_at, token.expires_at) == (floored, floored + 5 * MINUTE)
        assert token.created_at.utcoffset() == timedelta(0)
        assert (token.content_type, token.object_id, token.slug) == ("auth.user", "42", "reset")
        assert (token.is_active, token.extra_data) == (True, '{"a":[1]}')
        assert len(token.key) == 32
        assert token.key.isalnum()
        assert token.is_valid(world.clock())
        assert len(token.id) == 32
        assert token.key not in token.id

    async def test_by_default_no_slug_no_data_and_a_day(self, world: World) -> None:
        token = await (await world.manager()).deactivate_and_create(USER)
        assert (token.slug, token.extra_data) == (None, None)
        assert token.expires_at == START + timedelta(days=1)

    async def test_ids_sort_by_creation_and_keys_differ(self, world: World) -> None:
        manager = await world.manager()
        tokens = [await manager.deactivate_and_create(USER) for _ in range(50)]
        assert [t.id for t in tokens] == sorted(t.id for t in tokens)
        assert len({t.key for t in tokens}) == len({t.id for t in tokens}) == 50
        assert UUID(tokens[0].id).version == 7

    async def test_a_clock_jumping_back(self, world: World) -> None:
        manager = await world.manager()
        ids = [(await manager.deactivate_and_create(USER)).id]
        world.clock.set(datetime(1970, 1, 1, 0, 0, 0, 999_999, tzinfo=UTC))
        token = await manager.deactivate_and_create(OTHER)
        assert token.created_at == datetime(1970, 1, 1, 0, 0, 0, 999_000, tzinfo=UTC)
        assert sorted([*ids, token.id]) == [*ids, token.id]
        assert await manager.consume(OTHER, None, token.key) == token

    async def test_a_clock_before_1970_is_refused(self, world: World) -> None:
        manager = await world.manager()
        world.clock.set(datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC))
        await refused(ConfigurationError, manager.deactivate_and_create(USER))
        assert await world.stored() == []

    @pytest.mark.parametrize("data", [{}, [], "", 0, False, "null", {"ü": "\0"}, -(2**63), 1e308])
    async def test_extra_data_comes_back(self, world: World, data: object) -> None:
        manager = await world.manager()
        token = await manager.deactivate_and_create(USER, None, data)
        found = await manager.get(token.id)
        assert found is not None
        assert (found.get_extra_data(), type(found.get_extra_data())) == (data, type(data))

    async def test_an_id_is_text_whatever_its_type(self, world: World) -> None:
        types = ContentTypes()
        types.register(Row, "app.row")
        manager = await world.manager(content_types=types)
        keys = [
            (await manager.deactivate_and_create(subject, "a")).key
            for subject in (Subject("app.row", 1), Subject("app.row", "1"), Row())
        ]
        assert [await manager.exists_valid(Row(), "a", key) for key in keys] == [False, False, True]


class Row:
    pk = 1


class TestExpiration:
    @pytest.mark.parametrize(
        ("minutes", "lifetime"),
        [
            (1, MINUTE),
            (0.5, MINUTE / 2),
            (0.29, timedelta(milliseconds=17_400)),
            (1e-9, timedelta(0)),
            (60 * 24 * 365 * 1000, timedelta(days=365 * 1000)),
        ],
    )
    async def test_minutes(self, world: World, minutes: float, lifetime: timedelta) -> None:
        manager = await world.manager()
        token = await manager.deactivate_and_create(USER, expiration_in_minutes=minutes)
        assert token.expires_at == START + lifetime
        world.clock.advance(lifetime)
        assert await manager.exists_valid(USER)
        world.clock.advance(MS)
        assert not await manager.exists_valid(USER)

    async def test_none_never_expires(self, world: World) -> None:
        manager = await world.manager()
        token = await manager.deactivate_and_create(USER, expiration_in_minutes=None)
        assert token.expires_at is None
        world.clock.set(datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC))
        assert await manager.exists_valid(USER, None, token.key)
        found = await manager.get(token.id)
        assert found is not None
        assert found.expires_at is None

    async def test_left_out_it_is_the_policys_or_the_settings(self, world: World) -> None:
        settings = Settings(default_expiration=7)
        manager = await world.manager(
            TokenPolicy("own", expiration=3), TokenPolicy("never", expiration=None), settings=settings
        )
        for slug, minutes in (("own", 3), ("other", 7), (None, 7)):
            for arguments in ({}, {"expiration_in_minutes": DEFAULT}):
                token = await manager.deactivate_and_create(USER, slug, **arguments)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # only the one keyword
                assert token.expires_at == START + minutes * MINUTE
        assert (await manager.deactivate_and_create(USER, "never")).expires_at is None
        own = await manager.deactivate_and_create(USER, "never", expiration_in_minutes=1)
        assert own.expires_at == START + MINUTE

    @pytest.mark.parametrize(
        "minutes",
        [
            *(
                0,
                -1,
                -0.0,
                math.nan,
                math.inf,
                -math.inf,
                1e308,
                2**62,
                10**400,
                10**13,
                60 * 24 * 366 * 7900,
            ),
            *(True, "5", b"5", [5], ANY, timedelta(minutes=5)),
        ],
    )
    @pytest.mark.parametrize("method", ["deactivate_and_create", "get_active_or_create"])
    async def test_anything_else_is_a_value_error_and_touches_nothing(
        self, world: World, method: str, minutes: Any
    ) -> None:
        manager = await world.manager(COOLING)
        for slug in ("mail", "free"):
            with pytest.raises(ValueError, match="expiration") as info:
                await getattr(manager, method)(USER, slug, expiration_in_minutes=minutes)
            assert type(info.value) is InvalidInput
        assert set(world.backend.calls) <= {"open", "find"}


class TestHostileArguments:
    @pytest.mark.parametrize(
        "arguments",
        [
            {"obj": None},
            {"obj": Subject("auth.user")},
            {"obj": Subject("auth.user", None)},  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # on purpose
            {"obj": Subject("auth.user", "")},
            {"obj": Subject("", 1)},
            {"slug": ""},
            {"slug": ANY},
            {"slug": ["mail"]},
            {"slug": {"$ne": None}},
            {"slug": "é" * 128},
            {"extra_data": {1: 2}},
            {"extra_data": math.nan},
            {"extra_data": "a" * 16_383},
            {"key_generator_kwargs": 5},
            {"key_generator_kwargs": "length"},
            {"key_generator_kwargs": [("length", 5)]},
            {"key_generator_kwargs": {"length": 0}},
            {"key_generator_kwargs": {"length": "8"}},
            {"key_generator_kwargs": {"length": 513}},
            {"key_generator_kwargs": {"allowed_chars": ""}},
            {"key_generator_kwargs": {"lenght": 8}},
            {"key_generator_kwargs": {1: 8}},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("method", ["deactivate_and_create", "get_active_or_create"])
    async def test_refused_before_the_store_is_asked(
        self, world: World, method: str, arguments: dict[str, Any]
    ) -> None:
        manager = await world.manager()
        world.backend.calls.clear()
        await refused(InvalidInput, getattr(manager, method)(**{"obj": USER, **arguments}))
        assert set(world.backend.calls) <= {"find"}
        assert await world.stored() == []

    async def test_a_class_is_no_object(self, world: World) -> None:
        types = ContentTypes()
        types.register(Row, "app.row")
        manager = await world.manager(content_types=types)
        for call in (manager.deactivate_and_create(Row), manager.get_active_or_create(Row)):
            assert "not its class" in str(await refused(InvalidInput, call))


class TestOldTokens:
    async def test_the_old_ones_of_object_and_slug_are_deactivated(self, world: World) -> None:
        manager = await world.manager()
        subjects = [(USER, "a"), (USER, "b"), (USER, None), (OTHER, "a"), (Subject("app.row", 42), "a")]
        others = [await manager.deactivate_and_create(obj, slug) for obj, slug in subjects]
        new = await manager.deactivate_and_create(USER, "a")
        assert await reason(manager.verify(USER, "a", others[0].key)) == "inactive"
        assert await manager.verify(USER, "a", new.key) == new
        for (obj, slug), token in list(zip(subjects, others, strict=True))[1:]:
            assert await manager.verify(obj, slug, token.key) == token

    async def test_they_stay_where_that_is_asked(self, world: World) -> None:
        manager = await world.manager()
        old = await manager.deactivate_and_create(USER, "a")
        new = await manager.deactivate_and_create(USER, "a", deactivate_old_tokens=False)
        for token in (old, new):
            assert await manager.consume(USER, "a", token.key) == token

    async def test_of_concurrent_calls_one_stays(self, world: World) -> None:
        manager = await world.manager()
        await asyncio.gather(*[manager.deactivate_and_create(USER, "a") for _ in range(20)])
        assert len([t async for t in manager.filter_active_tokens(USER)]) == 1


class TestGenerators:
    async def test_arguments_for_the_default_generator(self, world: World) -> None:
        manager = await world.manager()
        token = await manager.deactivate_and_create(
            USER, key_generator_kwargs={"length": 8, "allowed_chars": "ABC"}
        )
        assert (len(token.key), set(token.key) <= set("ABC")) == (8, True)
        token = await manager.deactivate_and_create(USER, key_generator_kwargs={"length": 9})
        assert len(token.key) == 9
        assert len((await manager.deactivate_and_create(USER, key_generator_kwargs={})).key) == 32

    async def test_what_is_left_out_is_the_policys_or_the_settings(self, world: World) -> None:
        manager = await world.manager(
            TokenPolicy("own", key_length=90),
            settings=Settings(default_key_length=40, default_key_chars="abc"),
        )
        for slug, length in (("own", 90), ("other", 40)):
            kwargs = {"allowed_chars": "xyz"}
            key = (await manager.deactivate_and_create(USER, slug, key_generator_kwargs=kwargs)).key
            assert (len(key), set(key) <= set("xyz")) == (length, True)
            key = (await manager.deactivate_and_create(USER, slug, key_generator_kwargs={"length": 60})).key
            assert (len(key), set(key) <= set("abc")) == (60, True)

    @pytest.mark.parametrize("generator", [f"{__name__}.spelt", f"{__name__}:spelt"])
    async def test_a_generator_of_its_own_with_its_arguments(self, world: World, generator: str) -> None:
        manager = await world.manager()
        kwargs = {"generator": generator, "text": "abc", "times": 2}
        assert (await manager.deactivate_and_create(USER, key_generator_kwargs=kwargs)).key == "abcabc"
        assert kwargs == {"generator": generator, "text": "abc", "times": 2}

    @pytest.mark.parametrize("generator", ["no.such.generator", "vtoken:ANY", 5])
    async def test_one_that_cannot_be_called(self, world: World, generator: Any) -> None:
        manager = await world.manager()
        await refused(
            ConfigurationError,
            manager.deactivate_and_create(USER, key_generator_kwargs={"generator": generator}),
        )

    @pytest.mark.parametrize("iterations", [1, 2, 100])
    @pytest.mark.parametrize("method", ["deactivate_and_create", "get_active_or_create"])
    async def test_only_taken_keys(self, world: World, method: str, iterations: int) -> None:
        draws: list[int] = []

        def taken() -> str:
            draws.append(1)
            return "taken"

        manager = await world.manager(COOLING, settings=Settings(max_key_iterations=iterations))
        await manager.deactivate_and_create(OTHER, key_generator_kwargs={"generator": lambda: "taken"})
        old = await manager.deactivate_and_create(USER, "mail", expiration_in_minutes=1)
        world.clock.advance(2 * MINUTE)
        before = await world.stored()
        with pytest.raises(KeyGenerationError):
            await getattr(manager, method)(USER, "mail", key_generator_kwargs={"generator": taken})
        assert len(draws) == iterations
        assert await world.stored() == before
        assert await manager.deactivate_and_create(USER, "mail") != old  # and no cooldown was spent

    async def test_one_free_key_at_the_last_draw(self, world: World) -> None:
        keys = iter(["taken"] * 99 + ["free"])
        manager = await world.manager()
        await manager.deactivate_and_create(OTHER, key_generator_kwargs={"generator": lambda: "taken"})
        token = await manager.deactivate_and_create(
            USER, key_generator_kwargs={"generator": lambda: next(keys)}
        )
        assert token.key == "free"

    async def test_keys_are_unique_over_the_store_and_codes_within_their_scope(self, world: World) -> None:
        manager = await world.manager(
            CODE, TokenPolicy.code("pin"), settings=Settings(secret="s" * 32, max_key_iterations=1)
        )
        link, code = {"generator": lambda: "link"}, {"generator": lambda: "123456"}
        await manager.deactivate_and_create(USER, key_generator_kwargs=link)
        for obj, slug in ((USER, None), (OTHER, None), (USER, "b"), (Subject("app.row", 42), None)):
            await refused(
                KeyGenerationError, manager.deactivate_and_create(obj, slug, key_generator_kwargs=link)
            )
        tokens = [
            await manager.deactivate_and_create(obj, slug, key_generator_kwargs=code)
            for obj, slug in (
                (USER, "login"),
                (OTHER, "login"),
                (USER, "pin"),
                (Subject("app.row", 42), "login"),
            )
        ]
        await refused(
            KeyGenerationError, manager.deactivate_and_create(USER, "login", key_generator_kwargs=code)
        )
        assert {token.key for token in tokens} == {"123456"}
        assert len({stored.digest for stored in await world.stored()}) == 5

    async def test_a_used_key_is_taken_until_it_is_purged(self, world: World) -> None:
        manager = await world.manager(settings=Settings(max_key_iterations=1))
        kwargs = {"generator": lambda: "again"}
        await manager.deactivate_and_create(USER, key_generator_kwargs=kwargs)
        await manager.consume(USER, None, "again")
        await refused(KeyGenerationError, manager.deactivate_and_create(USER, key_generator_kwargs=kwargs))
        await manager.purge()
        assert (await manager.deactivate_and_create(USER, key_generator_kwargs=kwargs)).key == "again"

    @pytest.mark.parametrize("draw", [1, 2])
    async def test_its_own_exception_passes_as_it_is_and_the_old_token_stays(
        self, world: World, draw: int
    ) -> None:
        error = ZeroDivisionError("the generator's own")
        draws: list[int] = []

        def broken() -> str:
            draws.append(1)
            if len(draws) == draw:
                raise error
            return "taken"

        manager = await world.manager(COOLING)
        await manager.deactivate_and_create(OTHER, key_generator_kwargs={"generator": lambda: "taken"})
        old = await manager.deactivate_and_create(USER, "mail")
        world.clock.advance(MINUTE)
        raised = await refused(
            ZeroDivisionError,
            manager.deactivate_and_create(USER, "mail", key_generator_kwargs={"generator": broken}),
        )
        assert raised is error
        assert (raised.__cause__, raised.__context__) == (None, None)
        assert await manager.verify(USER, "mail", old.key) == old
        await manager.deactivate_and_create(USER, "mail")  # no cooldown was spent

    @pytest.mark.parametrize("key", ["", None, 5, b"key", "a\0", "\ud800", "a" * 513, ["a"]])
    async def test_what_is_no_key_is_refused(self, world: World, key: Any) -> None:
        manager = await world.manager()
        old = await manager.deactivate_and_create(USER)
        await refused(
            InvalidInput, manager.deactivate_and_create(USER, key_generator_kwargs={"generator": lambda: key})
        )
        assert await manager.verify(USER, None, old.key) == old


def spelt(text: str, times: int) -> str:
    return text * times


@pytest.mark.parametrize("name", ["insert", "spend"])
async def test_a_failing_store_leaves_the_old_token(world: World, name: str) -> None:
    manager = await world.manager(COOLING)
    old = await manager.deactivate_and_create(USER, "mail")
    world.clock.advance(MINUTE)
    world.backend.failing[name] = BackendUnavailable("the store is away")
    await refused(BackendUnavailable, manager.deactivate_and_create(USER, "mail"))
    await refused(BackendUnavailable, manager.deactivate_and_create(USER, "mail"))  # not CooldownActive
    world.backend.failing.clear()
    assert await manager.verify(USER, "mail", old.key) == old


async def test_what_failed_first_is_what_is_raised(world: World, caplog: pytest.LogCaptureFixture) -> None:
    manager = await world.manager(COOLING)
    first = world.backend.failing["insert"] = BackendUnavailable("the first")
    world.backend.failing["refund"] = BackendUnavailable("the second")
    assert await refused(BackendUnavailable, manager.deactivate_and_create(USER, "mail")) is first
    assert "cooldown could not be given back" in caplog.text


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

    @pytest.mark.parametrize("end", ["used", "deactivated", "expired", "leased"])
    async def test_a_new_one_where_none_is_valid(self, world: World, end: str) -> None:
        manager = await world.manager()
        old = await manager.deactivate_and_create(USER, "a", expiration_in_minutes=1)
        if end == "used":
            await manager.consume(USER, "a", old.key)
        if end == "deactivated":
            await manager.deactivate(USER)
        if end == "expired":
            world.clock.advance(MINUTE + MS)
        if end == "leased":
            await manager.redeem(USER, "a", old.key).__aenter__()
        new = await manager.get_active_or_create(USER, "a")
        assert isinstance(new, IssuedToken)
        assert new != old
        assert [t async for t in manager.filter_active_tokens(USER)] == [new]

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

    async def test_the_previous_one_stays_good_for_that_long(self, world: World) -> None:
        manager = await world.manager(self.overlapping)
        old = await manager.deactivate_and_create(USER, "mail")
        new = await manager.deactivate_and_create(USER, "mail")
        world.clock.advance(5 * MINUTE)
        for token in (old, new):
            assert await manager.verify(USER, "mail", token.key) == token
        world.clock.advance(MS)
        assert await reason(manager.consume(USER, "mail", old.key)) == "expired"
        assert await manager.consume(USER, "mail", new.key) == new

    async def test_never_longer_than_it_was(self, world: World) -> None:
        manager = await world.manager(self.overlapping)
        old = await manager.deactivate_and_create(USER, "mail", expiration_in_minutes=1)
        await manager.deactivate_and_create(USER, "mail")
        world.clock.advance(MINUTE + MS)
        assert await reason(manager.verify(USER, "mail", old.key)) == "expired"

    @pytest.mark.parametrize("used", [0, 1, 2])
    @pytest.mark.parametrize("how", ["consume", "redeem"])
    async def test_until_the_first_success_of_any(self, world: World, used: int, how: str) -> None:
        manager = await world.manager(self.overlapping)
        keys = [(await manager.deactivate_and_create(USER, "mail")).key for _ in range(3)]
        if how == "consume":
            await manager.consume(USER, "mail", keys[used])
        else:
            await redeem(manager, "mail", keys[used])
        reasons = [await reason(manager.verify(USER, "mail", key)) for key in keys]
        assert reasons == ["used" if n == used else "inactive" for n in range(3)]

    async def test_by_default_there_is_none(self, world: World) -> None:
        manager = await world.manager()
        old = await manager.deactivate_and_create(USER, "mail")
        await manager.deactivate_and_create(USER, "mail")
        assert await reason(manager.verify(USER, "mail", old.key)) == "inactive"

    async def test_one_attempt_budget_for_both(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("mail", overlap=5 * MINUTE, max_attempts=2))
        keys = [(await manager.deactivate_and_create(USER, "mail")).key for _ in range(2)]
        for _ in range(2):
            await refused(InvalidToken, manager.verify(USER, "mail", WRONG))
        for key in keys:
            assert (await refused(InvalidToken, manager.verify(USER, "mail", key))).reason == "unknown"


async def test_two_clocks_may_disagree(world: World) -> None:
    ahead = Clock(START + 10 * MINUTE)
    first = await world.manager()
    async with TokenManager(world.backend, SECRETS, clock=ahead) as second:
        newer = await second.deactivate_and_create(USER, "a")
        older = await first.deactivate_and_create(USER, "a")
        assert await reason(second.verify(USER, "a", newer.key)) == "inactive"
        assert await second.verify(USER, "a", older.key) == older
