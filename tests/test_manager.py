"""The manager's table, row by row: opening and closing, looking, deactivating, saving, purging, counting."""

from __future__ import annotations

import asyncio
import os
import threading
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from vtoken import (
    ANY,
    BackendClosed,
    BackendError,
    BackendUnavailable,
    ConfigurationError,
    ContentTypes,
    InvalidInput,
    InvalidToken,
    IssuedToken,
    KeyGenerationError,
    Settings,
    SlugStats,
    Subject,
    TokenManager,
    TokenPolicy,
    TooManyAttempts,
    VerificationToken,
    utc_now,
)
from vtoken_backends.memory import MemoryBackend

from .core_tools import CODE, MS, OTHER, START, USER, WRONG, Watched, World, reason, redeem, refused

MINUTE = timedelta(minutes=1)


async def listed(tokens: AsyncIterator[VerificationToken]) -> list[VerificationToken]:
    return [token async for token in tokens]


class User:
    def __init__(self, pk: int) -> None:
        self.pk = pk


def every_call(manager: TokenManager, token: IssuedToken) -> dict[str, Callable[[], Any]]:
    return {
        "deactivate": lambda: manager.deactivate(USER),
        "deactivate_and_create": lambda: manager.deactivate_and_create(USER),
        "get_active_or_create": lambda: manager.get_active_or_create(USER),
        "exists_valid": lambda: manager.exists_valid(USER),
        "exists_valid a key": lambda: manager.exists_valid(USER, None, token.key),
        "filter_active_tokens": lambda: listed(manager.filter_active_tokens(USER)),
        "get": lambda: manager.get(token.id),
        "generate_key": lambda: manager.generate_key(),
        "content_object": lambda: manager.content_object(token),
        "verify": lambda: manager.verify(USER, None, token.key),
        "verify a typing error": lambda: manager.verify(USER, "prefixed", "vt_x"),
        "consume": lambda: manager.consume(USER, None, token.key),
        "redeem": lambda: redeem(manager, None, token.key),
        "save": lambda: manager.save(token),
        "purge": lambda: manager.purge(),
        "stats": lambda: manager.stats(),
    }


class TestOpeningAndClosing:
    async def test_before_opening_and_after_closing_every_call_says_so(self, world: World) -> None:
        token = await (await world.manager()).deactivate_and_create(USER)
        manager = TokenManager(world.backend, policies=[TokenPolicy("prefixed", prefix="vt_")])
        world.backend.calls.clear()
        for call in every_call(manager, token).values():
            await refused(BackendClosed, call())
        async with manager:
            pass
        for call in every_call(manager, token).values():
            await refused(BackendClosed, call())
        assert world.backend.calls == ["open", "close"]

    async def test_opening_and_closing_are_idempotent(self, world: World) -> None:
        manager = TokenManager(world.backend)
        await manager.aclose()
        await manager.open()
        await manager.open()
        async with manager as same:
            assert same is manager
        await manager.aclose()
        await manager.aclose()
        assert world.backend.calls == ["open", "close"]

    async def test_it_may_be_opened_again(self, world: World) -> None:
        manager = TokenManager(world.backend, clock=world.clock)
        for _ in range(2):
            async with manager:
                await manager.deactivate_and_create(USER)
        async with manager:
            assert (await manager.stats()).total == 2

    async def test_many_may_open_and_close_at_once(self, world: World) -> None:
        manager = TokenManager(world.backend)
        await asyncio.gather(*[manager.open() for _ in range(5)])
        await asyncio.gather(*[manager.aclose() for _ in range(5)])
        assert world.backend.calls == ["open", "close"]

    async def test_event_loops_may_open_and_close_at_once(self, world: World) -> None:
        manager = TokenManager(world.backend)
        opening, another = threading.Event(), threading.Event()

        async def linger() -> None:
            opening.set()
            await asyncio.to_thread(another.wait, 60)

        async def second() -> None:
            await asyncio.to_thread(opening.wait, 60)
            asyncio.get_running_loop().call_soon(another.set)  # once this loop waits for the first one
            await manager.open()
            await manager.stats()

        world.backend.before["open"] = linger
        await asyncio.gather(
            asyncio.to_thread(asyncio.run, manager.open()), asyncio.to_thread(asyncio.run, second())
        )
        await manager.aclose()
        assert world.backend.calls == ["open", "count", "close"]

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
    def test_a_forked_child_opens_for_itself(self) -> None:
        backend = Watched()
        manager = TokenManager(backend)
        asyncio.run(manager.open())
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # Python 3.12 warns of forking beside a thread
            child = os.fork()
        if child == 0:
            status = 1
            with suppress(BaseException):
                asyncio.run(manager.open())
                status = int(backend.calls != ["open", "open"])
            os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        asyncio.run(manager.aclose())
        assert backend.calls == ["open", "close"]

    @pytest.mark.parametrize("first_closed", [0, 1])
    async def test_two_managers_may_share_a_backend(self, world: World, first_closed: int) -> None:
        managers = [TokenManager(world.backend, clock=world.clock) for _ in range(2)]
        for manager in managers:
            await manager.open()
        issued = await managers[0].deactivate_and_create(USER)
        assert await managers[1].get(issued.id) == issued
        await managers[first_closed].aclose()
        await managers[first_closed].aclose()
        open_one = managers[1 - first_closed]
        await refused(BackendClosed, managers[first_closed].get(issued.id))
        assert await open_one.get(issued.id) == issued
        await open_one.aclose()
        await refused(BackendClosed, open_one.get(issued.id))

    async def test_it_closes_only_what_it_opened(self, world: World) -> None:
        await world.backend.open()
        async with TokenManager(world.backend):
            pass
        assert await world.stored() == []  # the caller's own opening still holds
        await world.backend.close()
        await refused(BackendClosed, world.stored())

    async def test_a_failed_opening_leaves_it_closed(self, world: World) -> None:
        world.backend.failing["open"] = BackendUnavailable("no server")
        manager = TokenManager(world.backend)
        await refused(BackendUnavailable, manager.open())
        await refused(BackendClosed, manager.stats())
        await manager.aclose()
        assert "close" not in world.backend.calls
        del world.backend.failing["open"]
        async with manager:
            assert (await manager.stats()).total == 0

    async def test_a_cancelled_block_still_closes(self, world: World) -> None:
        async def work() -> None:
            async with TokenManager(world.backend):
                started.set()
                await asyncio.Event().wait()

        started = asyncio.Event()
        task = asyncio.create_task(work())
        await started.wait()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert world.backend.calls == ["open", "close"]

    async def test_memory_urls(self) -> None:
        clock = {"clock": lambda: START}
        async with (
            TokenManager.from_url("memory://", **clock) as own,
            TokenManager.from_url("memory://", **clock) as another,
            TokenManager.from_url("memory://test-manager", **clock) as shared,
            TokenManager.from_url("memory://test-manager", **clock) as same,
        ):
            for manager in (own, shared):
                await manager.deactivate_and_create(USER)
            assert [(await m.stats()).total for m in (own, another, shared, same)] == [1, 0, 1, 1]
        async with TokenManager.from_url("memory://test-manager", **clock) as later:
            assert (await later.stats()).total == 1
            assert await later.deactivate(USER) == 1

    @pytest.mark.parametrize("backend", [None, "memory://", object()])
    def test_what_is_no_backend_is_told_at_once(self, backend: Any) -> None:
        with pytest.raises(ConfigurationError, match="create_backend"):
            TokenManager(backend)

    async def test_by_default_it_is_the_real_clock(self) -> None:
        before = utc_now() - MS
        async with TokenManager(MemoryBackend()) as manager:
            created_at = (await manager.deactivate_and_create(USER)).created_at
        assert before <= created_at <= utc_now()
        assert utc_now().utcoffset() == timedelta(0)

    async def test_a_naive_clock_is_refused(self) -> None:
        async with TokenManager(MemoryBackend(), clock=lambda: datetime(2100, 1, 1)) as manager:  # noqa: DTZ001, RUF100
            await refused(InvalidInput, manager.deactivate_and_create(USER))

    def test_repr_names_the_backend(self) -> None:
        assert repr(TokenManager(MemoryBackend())) == "<TokenManager on <MemoryBackend>>"


class TestDeactivate:
    @pytest.mark.parametrize(
        ("arguments", "gone"),
        [
            ({}, {"a", "b", None}),
            ({"slug": ANY}, {"a", "b", None}),
            ({"slug": "a"}, {"a"}),
            ({"slug": None}, {None}),
            ({"slug": "A"}, set[object]()),
            ({"slug": "never"}, set[object]()),
        ],
        ids=str,
    )
    async def test_any_slug_one_or_none(
        self, world: World, arguments: dict[str, Any], gone: set[str | None]
    ) -> None:
        manager = await world.manager()
        for slug in ("a", "b", None):
            await manager.deactivate_and_create(USER, slug)
            await manager.deactivate_and_create(OTHER, slug)
        assert await manager.deactivate(USER, **arguments) == len(gone)
        assert await manager.deactivate(USER, **arguments) == 0
        left = {token.slug async for token in manager.filter_active_tokens(USER)}
        assert left == {"a", "b", None} - gone
        assert len(await listed(manager.filter_active_tokens(OTHER))) == 3

    async def test_with_a_key_only_that_one(self, world: World) -> None:
        manager = await world.manager()
        one = await manager.deactivate_and_create(USER, "a")
        two = await manager.deactivate_and_create(USER, "a", deactivate_old_tokens=False)
        assert await manager.deactivate(USER, "b", one.key) == 0
        assert await manager.deactivate(OTHER, "a", one.key) == 0
        assert await manager.deactivate(USER, "a", "") == 0
        assert await manager.deactivate(USER, key="") == 0
        assert await manager.deactivate(USER, key=WRONG) == 0
        assert await manager.deactivate(USER, "a", one.key) == 1
        assert await manager.deactivate(USER, key=two.key) == 1
        assert await reason(manager.verify(USER, "a", one.key)) == "inactive"

    async def test_a_class_means_any_object_of_it(self, world: World) -> None:
        manager = await world.manager()
        for subject in (USER, OTHER, Subject("app.row", 42)):
            await manager.deactivate_and_create(subject)
        assert await manager.deactivate(Subject("auth.user")) == 2

    async def test_expired_and_leased_ones_too(self, world: World) -> None:
        manager = await world.manager()
        await manager.deactivate_and_create(USER, "expired", expiration_in_minutes=1)
        leased = await manager.deactivate_and_create(USER, "leased", expiration_in_minutes=1)
        async with manager.redeem(USER, "leased", leased.key):
            world.clock.advance(2 * MINUTE - timedelta(seconds=61))
            assert await manager.deactivate(USER, "expired") == 1
        assert await manager.deactivate(USER) == 0

    @pytest.mark.parametrize("slug", ["login", "capped"])
    async def test_a_key_is_refused_where_attempts_are_capped(self, world: World, slug: str) -> None:
        manager = await world.manager(CODE, TokenPolicy("capped", max_attempts=3))
        issued = await manager.deactivate_and_create(USER, slug)
        for key in (issued.key, WRONG, ""):
            await refused(InvalidInput, manager.deactivate(USER, slug, key))
            await refused(InvalidInput, listed(manager.filter_active_tokens(USER, slug, key)))
        assert "spend" not in world.backend.calls
        assert await manager.deactivate(USER, slug) == 1

    @pytest.mark.parametrize("slug", ["login", "capped"])
    async def test_with_any_slug_a_capped_key_matches_nothing(self, world: World, slug: str) -> None:
        manager = await world.manager(CODE, TokenPolicy("capped", max_attempts=3))
        issued = await manager.deactivate_and_create(USER, slug)
        assert await manager.deactivate(USER, key=issued.key) == 0
        assert await listed(manager.filter_active_tokens(USER, key=issued.key)) == []
        assert not await manager.exists_valid(USER, key=issued.key)
        assert await manager.exists_valid(USER, slug, issued.key)


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
        bad: list[dict[str, Any]] = [{"key": None}, {"slug": ""}, {"slug": 5}, {"key": "a\0"}]
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

    async def test_a_used_and_a_leased_token_are_not_valid(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a")
        async with manager.redeem(USER, "a", issued.key):
            assert not await manager.exists_valid(USER)
            assert not await manager.exists_valid(USER, "a", issued.key)
        assert not await manager.exists_valid(USER)


@pytest.mark.parametrize("method", ["deactivate", "exists_valid", "verify", "consume", "redeem"])
class TestKeysAndSlugs:
    async def call(self, manager: TokenManager, method: str, slug: Any, key: Any) -> object:
        if method == "redeem":
            return await redeem(manager, slug, key)
        return await getattr(manager, method)(USER, slug, key)

    @pytest.mark.parametrize(
        "key",
        [None, 1, True, b"a", ["a"], {"$ne": ""}, "a\0", "\ud800", "a" * 513, "é" * 257, object()],
        ids=ascii,
    )
    async def test_a_key_out_of_range_is_refused_before_the_store_is_asked(
        self, world: World, method: str, key: Any
    ) -> None:
        manager = await world.manager()
        world.backend.calls.clear()
        await refused(InvalidInput, self.call(manager, method, "a", key))
        assert world.backend.calls == []

    @pytest.mark.parametrize(
        "slug", ["", 1, True, b"a", ["a"], {"$ne": ""}, "a\0", "\ud800", "a" * 256], ids=ascii
    )
    async def test_a_slug_out_of_range_too(self, world: World, method: str, slug: Any) -> None:
        manager = await world.manager()
        world.backend.calls.clear()
        await refused(InvalidInput, self.call(manager, method, slug, "key"))
        assert world.backend.calls == []

    async def test_the_longest_key_and_slug_are_taken(self, world: World, method: str) -> None:
        manager = await world.manager()
        key, slug = "é" * 256, "é" * 127 + "a"
        await manager.deactivate_and_create(USER, slug, key_generator_kwargs={"generator": lambda: key})
        assert await self.call(manager, method, slug, key)


@pytest.mark.parametrize("method", ["verify", "consume", "redeem"])
async def test_any_is_refused_where_a_token_is_used(world: World, method: str) -> None:
    manager = await world.manager()
    call = TestKeysAndSlugs().call
    await refused(InvalidInput, call(manager, method, ANY, "key"))
    await refused(InvalidInput, call(manager, method, "a", ANY))


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


class TestGenerateKey:
    async def test_by_default_as_the_settings_say(self, world: World) -> None:
        manager = await world.manager(settings=Settings(default_key_length=40, default_key_chars="abc"))
        key = await manager.generate_key()
        assert (len(key), set(key) <= set("abc")) == (40, True)
        assert len(await manager.generate_key(length=5)) == 5
        assert len(await manager.generate_key(None, 6, "x")) == 6

    @pytest.mark.parametrize("path", ["secrets.token_hex", "secrets:token_hex"])
    async def test_another_generator_with_its_arguments(self, world: World, path: str) -> None:
        manager = await world.manager()
        assert len(await manager.generate_key(path, 4)) == 8
        assert len(await manager.generate_key(path, nbytes=5)) == 10
        assert await manager.generate_key("operator:concat", "x", "y") == "xy"

    async def test_no_stored_token_has_it(self, world: World) -> None:
        manager = await world.manager(settings=Settings(max_key_iterations=7))
        await manager.deactivate_and_create(USER, key_generator_kwargs={"generator": lambda: "taken"})
        drawn: list[str] = []

        def draw(keys: list[str]) -> str:
            drawn.append(keys[min(len(drawn), len(keys) - 1)])
            return drawn[-1]

        assert await manager.generate_key(draw, ["taken", "taken", "free"]) == "free"
        assert len(drawn) == 3
        drawn.clear()
        await refused(KeyGenerationError, manager.generate_key(draw, ["taken"]))
        assert len(drawn) == 7

    @pytest.mark.parametrize("key", ["", None, 5, b"k", "a\0", "\ud800", "a" * 513])
    async def test_what_is_no_key_is_refused(self, world: World, key: Any) -> None:
        await refused(InvalidInput, (await world.manager()).generate_key(lambda: key))

    async def test_the_generators_own_exception_passes(self, world: World) -> None:
        manager = await world.manager()

        def broken() -> str:
            raise ZeroDivisionError

        await refused(ZeroDivisionError, manager.generate_key(broken))
        await refused(ConfigurationError, manager.generate_key("no.such.generator"))


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


class TestSave:
    async def test_extra_data_and_nothing_else(self, world: World) -> None:
        manager = await world.manager()
        token = await manager.deactivate_and_create(USER, "a", {"n": 1})
        before = (await world.stored())[0]
        token.set_extra_data({"n": 2})
        token.is_active = False
        token.slug, token.object_id, token.expires_at, token.max_uses = "b", "43", None, 99
        await manager.save(token)
        assert (await world.stored())[0] == before._replace(extra_data='{"n":2}')
        token.set_extra_data(None)
        await manager.save(token)
        assert (await world.stored())[0] == before._replace(extra_data=None)

    async def test_a_stale_copy_revives_nothing(self, world: World) -> None:
        manager = await world.manager()
        token = await manager.deactivate_and_create(USER, "a")
        stale = await manager.get(token.id)
        assert stale is not None
        await manager.consume(USER, "a", token.key)
        stale.set_extra_data([1])
        await manager.save(stale)
        assert await reason(manager.consume(USER, "a", token.key)) == "used"
        found = await manager.get(token.id)
        assert found is not None
        assert (found.is_active, found.extra_data) == (False, "[1]")

    async def test_a_token_that_is_gone(self, world: World) -> None:
        manager = await world.manager()
        token = await manager.deactivate_and_create(USER)
        await manager.deactivate(USER)
        await manager.purge()
        assert await reason(manager.save(token)) == "unknown"
        assert await world.stored() == []

    @pytest.mark.parametrize(
        "text", ["", "nope", "NaN", "{1:2}", {"a": 1}, b"1", '"\\ud800"', str(2**63), " " * 16_385]
    )
    async def test_what_is_no_json_text_of_ours_is_refused(self, world: World, text: Any) -> None:
        manager = await world.manager()
        token = await manager.deactivate_and_create(USER, None, "before")
        token.extra_data = text
        await refused(InvalidInput, manager.save(token))
        assert (await world.stored())[0].extra_data == '"before"'


class TestPurge:
    async def test_what_was_inactive_or_strictly_past(self, world: World) -> None:
        manager = await world.manager()
        expiring = await manager.deactivate_and_create(USER, "a", expiration_in_minutes=1)
        await manager.deactivate_and_create(USER, "b")
        staying = await manager.deactivate_and_create(USER, "b", expiration_in_minutes=None)
        used = await manager.deactivate_and_create(USER, "c")
        await manager.consume(USER, "c", used.key)
        assert await manager.purge() == 2
        world.clock.advance(MINUTE)
        assert await manager.purge() == 0
        assert await manager.get(expiring.id) == expiring
        world.clock.advance(MS)
        assert await manager.purge() == 1
        assert await manager.purge() == 0
        world.clock.set(datetime(9999, 12, 31, tzinfo=UTC))
        assert await manager.purge() == 0
        assert await manager.get(staying.id) == staying

    async def test_keep(self, world: World) -> None:
        manager = await world.manager()
        used = await manager.deactivate_and_create(USER, "a")
        await manager.consume(USER, "a", used.key)
        for advanced, deleted in ((timedelta(0), 0), (timedelta(hours=24) - MS, 0), (2 * MS, 1)):
            world.clock.advance(advanced)
            assert await manager.purge(keep=timedelta(hours=24)) == deleted

    @pytest.mark.parametrize("batch_size", [1, 3, 7, 1000])
    async def test_in_batches(self, world: World, batch_size: int) -> None:
        manager = await world.manager()
        for _ in range(8):
            await manager.deactivate_and_create(USER)
        world.backend.calls.clear()
        assert await manager.purge(batch_size) == 7
        assert world.backend.calls.count("purge") == 7 // batch_size + 1

    async def test_it_ends_under_live_traffic(self, world: World) -> None:
        manager = await world.manager()
        for _ in range(4):
            await manager.deactivate_and_create(USER)

        async def traffic() -> None:
            world.clock.advance(MS)
            await manager.deactivate_and_create(USER)

        world.backend.before["purge"] = traffic
        assert await manager.purge(batch_size=1) == 3

    async def test_leased_ones_stay(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a", expiration_in_minutes=1)
        async with manager.redeem(USER, "a", issued.key, lease=10 * MINUTE):
            world.clock.advance(2 * MINUTE)
            assert await manager.purge() == 0
        assert await manager.purge() == 1

    @pytest.mark.parametrize(
        "arguments",
        [
            {"batch_size": 0},
            {"batch_size": True},
            {"batch_size": 1.0},
            {"keep": -MS},
            {"keep": 60},
            {"keep": None},
        ],
        ids=str,
    )
    async def test_out_of_range(self, world: World, arguments: dict[str, Any]) -> None:
        await refused(InvalidInput, (await world.manager()).purge(**arguments))

    async def test_budgets_of_long_ago_are_forgotten_and_running_ones_are_not(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("capped", max_attempts=1))
        await refused(InvalidToken, manager.verify(USER, "capped", WRONG))
        await manager.purge()
        await refused(TooManyAttempts, manager.verify(USER, "capped", WRONG))
        world.clock.advance(timedelta(days=1, minutes=15))
        await manager.purge()
        memory = world.backend.inner
        assert isinstance(memory, MemoryBackend)
        assert memory._store.budgets == {}  # pyright: ignore[reportPrivateUsage]  # no method shows them


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


async def test_backend_errors_pass_through_every_method(world: World) -> None:
    manager = await world.manager()
    token = await manager.deactivate_and_create(USER)
    for name in ("insert", "find", "update", "deactivate", "purge", "count", "spend", "refund", "reset"):
        world.backend.failing[name] = BackendUnavailable("the store is away")
    for name, call in every_call(manager, token).items():
        if name not in ("content_object", "verify a typing error"):
            assert isinstance(await refused(BackendError, call()), BackendUnavailable), name


async def test_a_watched_backend_is_a_backend_from_a_url() -> None:
    async with TokenManager(Watched.from_url("memory://")) as manager:
        assert (await manager.stats()).total == 0
