"""What becomes of stored tokens: deactivated, saved, purged."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from vtoken import (
    ANY,
    InvalidInput,
    InvalidToken,
    Subject,
    TokenPolicy,
    TooManyAttempts,
)
from vtoken_backends.memory import MemoryBackend

from .core_tools import (
    CODE,
    MINUTE,
    MS,
    OTHER,
    USER,
    WRONG,
    World,
    listed,
    reason,
    refused,
)


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
        ids=["left out", "any", "one", "none", "another case", "never seen"],
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
