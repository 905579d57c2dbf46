"""Looking at tokens and using none: what exists, what is active, one by its id, its object, how many."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from vtoken import (
    ANY,
    BackendUnavailable,
    ConfigurationError,
    ContentTypes,
    InvalidInput,
    SlugStats,
    Subject,
    TokenPolicy,
    VerificationToken,
)

from .core_tools import (
    MINUTE,
    MS,
    OTHER,
    START,
    USER,
    WRONG,
    World,
    listed,
    refused,
)


class User:
    def __init__(self, pk: int) -> None:
        self.pk = pk


class TestFilterActiveTokens:
    async def test_pages_newest_first_with_a_clock_that_stands_still(self, world: World) -> None:
        manager = await world.manager()
        ids = [
            (await manager.deactivate_and_create(USER, f"s{n}", deactivate_old_tokens=False)).id
            for n in range(250)
        ]
        await manager.deactivate_and_create(OTHER)
        world.backend.calls.clear()
        assert [token.id async for token in manager.filter_active_tokens(USER)] == ids[::-1]
        assert world.backend.calls == ["find"] * 3

    @pytest.mark.parametrize("count", [0, 1, 99, 100, 101])
    async def test_around_one_page(self, world: World, count: int) -> None:
        manager = await world.manager()
        for _ in range(count):
            await manager.deactivate_and_create(USER, deactivate_old_tokens=False)
        assert len(await listed(manager.filter_active_tokens(USER))) == count

    async def test_asks_no_further_than_it_is_read(self, world: World) -> None:
        manager = await world.manager()
        for _ in range(150):
            await manager.deactivate_and_create(USER, deactivate_old_tokens=False)
        world.backend.calls.clear()
        async for _ in manager.filter_active_tokens(USER):
            break
        assert world.backend.calls == ["find"]

    async def test_expired_ones_are_active_and_used_ones_are_not(self, world: World) -> None:
        manager = await world.manager()
        expired = await manager.deactivate_and_create(USER, "a", expiration_in_minutes=1)
        world.clock.advance(2 * MINUTE)
        valid = await manager.deactivate_and_create(USER, "b")
        used = await manager.deactivate_and_create(USER, "c")
        await manager.consume(USER, "c", used.key)
        assert await listed(manager.filter_active_tokens(USER)) == [valid, expired]
        assert await listed(manager.filter_active_tokens(USER, "a")) == [expired]
        assert await listed(manager.filter_active_tokens(USER, None)) == []
        assert await listed(manager.filter_active_tokens(USER, "b", valid.key)) == [valid]
        assert await listed(manager.filter_active_tokens(USER, key=expired.key)) == [expired]
        assert await listed(manager.filter_active_tokens(USER, key="")) == []
        assert await listed(manager.filter_active_tokens(Subject("auth.user"), key=valid.key)) == [valid]

    async def test_bad_arguments_and_none_as_a_key(self, world: World) -> None:
        manager = await world.manager()
        bad: list[dict[str, Any]] = [{"key": None}, {"slug": ""}, {"slug": 5}]
        for arguments in bad:
            await refused(InvalidInput, listed(manager.filter_active_tokens(USER, **arguments)))


class TestExistsValid:
    async def test_rows_of_the_table(self, world: World) -> None:
        manager = await world.manager()
        assert not await manager.exists_valid(USER)
        issued = await manager.deactivate_and_create(USER, "a", expiration_in_minutes=1)
        for arguments, expected in [
            ({}, True),
            ({"slug": "a"}, True),
            ({"slug": "b"}, False),
            ({"slug": None}, False),
            ({"key": issued.key}, True),
            ({"slug": "a", "key": issued.key}, True),
            ({"slug": "a", "key": ANY}, True),
            ({"slug": None, "key": issued.key}, False),
            ({"slug": "b", "key": issued.key}, False),
            ({"key": ""}, False),
            ({"slug": "a", "key": ""}, False),
            ({"slug": "a", "key": WRONG}, False),
        ]:
            assert await manager.exists_valid(USER, **arguments) is expected, arguments  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # strings and markers
            assert not await manager.exists_valid(OTHER, **arguments)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # strings and markers
        world.clock.advance(MINUTE)
        assert await manager.exists_valid(USER, "a", issued.key)
        assert await manager.exists_valid(USER)
        world.clock.advance(MS)
        assert not await manager.exists_valid(USER, "a", issued.key)
        assert not await manager.exists_valid(USER)

    async def test_it_consumes_nothing(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a")
        before = await world.stored()
        for _ in range(3):
            assert await manager.exists_valid(USER, "a", issued.key)
            assert await manager.exists_valid(Subject("auth.user"), "a", issued.key)
        assert await world.stored() == before

    async def test_with_any_slug_no_context_is_heeded_and_none_is_taken(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("a", context="required"))
        issued = await manager.issue(USER, "a", context="cookie")
        assert await manager.exists_valid(USER)
        await refused(InvalidInput, manager.exists_valid(USER, context="another cookie"))
        await refused(InvalidInput, manager.exists_valid(USER, key=issued.key, context="another cookie"))

    async def test_a_used_and_a_leased_token_are_not_valid(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a")
        async with manager.redeem(USER, "a", issued.key):
            assert not await manager.exists_valid(USER)
            assert not await manager.exists_valid(USER, "a", issued.key)
        assert not await manager.exists_valid(USER)


class TestGet:
    async def test_one_token_whatever_its_state(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a", {"n": 1})
        found = await manager.get(issued.id)
        assert found is not None
        assert type(found) is VerificationToken
        assert (found.key, found.slug, found.get_extra_data(), found.is_active) == (None, "a", {"n": 1}, True)
        assert (found.content_type, found.object_id) == ("auth.user", "42")
        await manager.consume(USER, "a", issued.key)
        found = await manager.get(issued.id)
        assert found is not None
        assert (found.is_active, found.uses, found.used_at) == (False, 1, START)
        await manager.purge()
        assert await manager.get(issued.id) is None
        assert await manager.get("f" * 32) is None

    @pytest.mark.parametrize("bad", [None, 1, b"a", {"$ne": ""}, "a\0", "\ud800", "", "a" * 256])
    async def test_hostile_ids(self, world: World, bad: Any) -> None:
        await refused(InvalidInput, (await world.manager()).get(bad))

    async def test_changing_a_loaded_token_changes_nothing_stored(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a")
        before = await world.stored()
        issued.is_active = False
        issued.slug = "b"
        issued.expires_at = None
        issued.extra_data = "1"
        assert await world.stored() == before


class TestContentObject:
    async def test_by_the_registered_loader(self, world: World) -> None:
        asked: list[str] = []

        async def load(object_id: str) -> User | None:
            asked.append(object_id)
            return User(int(object_id)) if object_id == "42" else None

        types = ContentTypes()
        types.register(User, "auth.user", load=load)
        manager = await world.manager(content_types=types)
        found = await manager.content_object(await manager.deactivate_and_create(User(42)))
        assert isinstance(found, User)
        assert await manager.content_object(await manager.deactivate_and_create(User(43))) is None
        assert asked == ["42", "43"]
        unregistered = await manager.deactivate_and_create(Subject("app.row", 1))
        await refused(ConfigurationError, manager.content_object(unregistered))

    async def test_an_unregistered_class_is_told_by_every_method(self, world: World) -> None:
        manager, user = await world.manager(), User(1)
        for call in (
            manager.issue(user),
            manager.pretend(user),
            manager.status(user, None),
            manager.erase(user),
            manager.reset_limits(user),
            listed(manager.history(user)),
            listed(manager.issue_many([user])),
            manager.deactivate(user),
            manager.deactivate_and_create(user),
            manager.get_active_or_create(user),
            manager.exists_valid(user),
            listed(manager.filter_active_tokens(user)),
            manager.verify(user, None, "key"),
            manager.consume(user, None, "key"),
        ):
            assert "register(User" in str(await refused(ConfigurationError, call))
        with pytest.raises(ConfigurationError, match=r"register\(User"):
            manager.redeem(user, None, "key")


class TestPing:
    async def test_the_seconds_that_the_store_took(self, world: World) -> None:
        manager = await world.manager()
        assert 0 <= await manager.ping() < 60
        world.backend.failing["ping"] = BackendUnavailable("no server")
        await refused(BackendUnavailable, manager.ping())


class TestStats:
    async def test_numbers(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("twice", max_uses=2))
        assert asdict(await manager.stats()) == {
            "total": 0,
            "active": 0,
            "expired": 0,
            "used": 0,
            "by_slug": {},
        }
        await manager.deactivate_and_create(USER, "a", expiration_in_minutes=1)
        await manager.deactivate_and_create(OTHER, "a", expiration_in_minutes=2)
        used = await manager.deactivate_and_create(USER)
        await manager.consume(USER, None, used.key)
        await manager.deactivate_and_create(USER, "twice")
        twice = await manager.deactivate_and_create(USER, "twice", expiration_in_minutes=None)
        await manager.consume(USER, "twice", twice.key)
        world.clock.advance(MINUTE + MS)
        stats = await manager.stats()
        assert (stats.total, stats.active, stats.expired, stats.used) == (5, 2, 1, 1)
        assert stats.by_slug == {
            "a": SlugStats(2, 1, 1, 0),
            None: SlugStats(1, 0, 0, 1),
            "twice": SlugStats(2, 1, 0, 0),
        }

    async def test_at_the_boundary(self, world: World) -> None:
        manager = await world.manager()
        await manager.deactivate_and_create(USER, expiration_in_minutes=1)
        world.clock.advance(MINUTE)
        assert (await manager.stats()).active == 1
        world.clock.advance(MS)
        assert (await manager.stats()).expired == 1
