"""Issuing: what a new token is like, what becomes of the old one, and what a failure leaves behind."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from vtoken import (
    ANY,
    DEFAULT,
    BackendUnavailable,
    ConfigurationError,
    ContentTypes,
    InvalidInput,
    IssuedToken,
    Settings,
    Subject,
    TokenManager,
    TokenPolicy,
    VerificationToken,
)
from vtoken.backend import PRETENDED
from vtoken.inputs import Lifetime
from vtoken.testing.clock import Clock

from .core_tools import (
    MINUTE,
    MS,
    OTHER,
    SECRETS,
    START,
    USER,
    World,
    reason,
    refused,
)

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
        assert 0 < int(token.id, 16) < 2**63

    async def test_by_default_no_slug_no_data_and_a_day(self, world: World) -> None:
        token = await (await world.manager()).deactivate_and_create(USER)
        assert (token.slug, token.extra_data) == (None, None)
        assert token.expires_at == START + timedelta(days=1)

    async def test_ids_sort_by_creation_and_keys_differ(self, world: World) -> None:
        manager = await world.manager()
        tokens = [await manager.deactivate_and_create(USER) for _ in range(50)]
        assert [t.id for t in tokens] == sorted(t.id for t in tokens)
        assert len({t.key for t in tokens}) == len({t.id for t in tokens}) == 50

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
            ("90s", timedelta(seconds=90)),
            ("7d", timedelta(days=7)),
            (timedelta(minutes=5), timedelta(minutes=5)),
            (60 * 24 * 365 * 1000, timedelta(days=365 * 1000)),
        ],
    )
    async def test_minutes(self, world: World, minutes: Lifetime, lifetime: timedelta) -> None:
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
            *(1e-9, True, "5", "", "5 m", "0s", b"5", [5], ANY, timedelta(0), -MINUTE),
        ],
    )
    @pytest.mark.parametrize("method", ["deactivate_and_create", "get_active_or_create"])
    async def test_anything_else_is_a_value_error_and_touches_nothing(
        self, world: World, method: str, minutes: Any
    ) -> None:
        manager = await world.manager(COOLING)
        for slug in ("mail", "free"):
            with pytest.raises(ValueError, match=r"lifetime|expiration") as info:
                await getattr(manager, method)(USER, slug, expiration_in_minutes=minutes)
            assert type(info.value) is InvalidInput
        assert set(world.backend.calls) <= {"open", "note", "find"}


class TestHostileArguments:
    @pytest.mark.parametrize(
        "arguments",
        [
            {"obj": None},
            {"obj": Subject("auth.user")},
            {"obj": Subject("auth.user", None)},  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # on purpose
            {"obj": Subject("auth.user", "")},
            {"obj": Subject("", 1)},
            {"obj": Subject(PRETENDED, 1)},
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


async def test_a_failing_store_leaves_the_old_token(world: World) -> None:
    manager = await world.manager(COOLING)
    old = await manager.deactivate_and_create(USER, "mail")
    world.clock.advance(MINUTE)
    world.backend.failing["insert"] = BackendUnavailable("the store is away")
    await refused(BackendUnavailable, manager.deactivate_and_create(USER, "mail"))
    await refused(BackendUnavailable, manager.deactivate_and_create(USER, "mail"))  # not CooldownActive
    world.backend.failing.clear()
    assert await manager.verify(USER, "mail", old.key) == old


@pytest.mark.parametrize("method", ["issue", "get_active_or_create"])
@pytest.mark.parametrize("cancels", [1, 2])
async def test_cancelled_while_the_hooks_are_told_it_leaves_no_token_without_an_owner(
    world: World, cancels: int, method: str
) -> None:
    reached = asyncio.Event()

    async def slow(_: object) -> None:
        reached.set()
        await asyncio.Event().wait()

    async with TokenManager(world.backend, SECRETS, clock=world.clock, hooks=[slow]) as manager:
        world.backend.before["deactivate"] = lambda: asyncio.sleep(0)
        call: Coroutine[Any, Any, object] = getattr(manager, method)(USER, "a")
        task = asyncio.create_task(call)
        await reached.wait()
        for _ in range(cancels):
            task.cancel()
            await asyncio.sleep(0)
        await asyncio.wait([task])
        assert task.cancelled()
        assert not await manager.exists_valid(USER)


@pytest.mark.parametrize(
    ("policy", "method", "keeps"),
    [
        (TokenPolicy("a"), "issue", False),
        (TokenPolicy("a"), "get_active_or_create", False),
        (TokenPolicy("a", key_storage="derived"), "issue", False),
        (TokenPolicy("a", key_storage="derived"), "get_active_or_create", True),  # others may have its key
    ],
)
@pytest.mark.parametrize("is_away", [False, True])
async def test_cancelled_while_it_is_inserted_it_leaves_no_token_without_an_owner(
    world: World, policy: TokenPolicy, method: str, keeps: bool, is_away: bool
) -> None:
    manager = await world.manager(policy)
    reached = asyncio.Event()

    async def answer_is_lost() -> None:
        reached.set()
        await asyncio.Event().wait()

    world.backend.after["insert"] = answer_is_lost
    world.backend.before["deactivate"] = lambda: asyncio.sleep(0)
    if is_away:
        world.backend.failing["deactivate"] = BackendUnavailable("the store is away")
    call: Coroutine[Any, Any, object] = getattr(manager, method)(USER, "a")
    task = asyncio.create_task(call)
    await reached.wait()
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
    await manager.aclose()  # waits for it
    assert task.cancelled()
    async with manager:
        assert await manager.exists_valid(USER) == (keeps or is_away)


async def test_two_clocks_may_disagree(world: World) -> None:
    ahead = Clock(START + 10 * MINUTE)
    first = await world.manager()
    async with TokenManager(world.backend, SECRETS, clock=ahead) as second:
        newer = await second.deactivate_and_create(USER, "a")
        older = await first.deactivate_and_create(USER, "a")
        assert await reason(second.verify(USER, "a", newer.key)) == "inactive"
        assert await second.verify(USER, "a", older.key) == older
