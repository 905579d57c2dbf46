"""What becomes of stored tokens and budgets: deactivated, saved, purged, erased, reset."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from vtoken import (
    ANY,
    CooldownActive,
    InvalidInput,
    InvalidToken,
    LeaseLost,
    Limit,
    Subject,
    TokenManager,
    TokenPolicy,
    TooManyAttempts,
)

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
    wrong_codes,
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
        await refused(InvalidInput, manager.deactivate(Subject("auth.user")))
        await refused(InvalidInput, manager.deactivate(Subject("auth.user"), None))
        assert len(await listed(manager.filter_active_tokens(Subject("auth.user")))) == 2
        assert await manager.deactivate(Subject("auth.user"), all_objects=True) == 2
        assert await manager.exists_valid(Subject("app.row", 42))

    async def test_with_a_key_the_class_will_do(self, world: World) -> None:
        manager = await world.manager()
        tokens = [await manager.issue(subject, "a") for subject in (USER, OTHER)]
        assert await manager.deactivate(Subject("auth.user"), "a", tokens[0].key) == 1
        assert await listed(manager.filter_active_tokens(Subject("auth.user"))) == [tokens[1]]

    async def test_one_token_by_its_id(self, world: World) -> None:
        manager = await world.manager()
        first = await manager.issue(USER, "a")
        second = await manager.issue(USER, "a", replace=False)
        assert await manager.deactivate(first) == 1
        assert await manager.deactivate(first) == 0
        assert await listed(manager.filter_active_tokens(USER)) == [second]
        await refused(InvalidInput, manager.deactivate(second, "a"))
        await refused(InvalidInput, manager.deactivate(second, key=second.key))
        assert world.events[-1].token_id == first.id

    async def test_the_predecessors_key_of_an_overlap_ends_alone(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("a", overlap="5m"))
        old = await manager.issue(USER, "a")
        new = await manager.issue(USER, "a")
        assert await manager.verify(USER, "a", old.key) == new
        assert await manager.deactivate(USER, "a", old.key) == 1
        assert await manager.deactivate(USER, "a", old.key) == 0
        for _ in range(2):
            assert await reason(manager.verify(USER, "a", old.key)) == "expired"
            assert await manager.verify(USER, "a", new.key) == new
            world.clock.advance(-MINUTE)

    @pytest.mark.parametrize("key", ["a\0", "\ud800", "a" * 513])
    async def test_an_impossible_key_is_nobodys(self, world: World, key: str) -> None:
        manager = await world.manager()
        await manager.issue(USER, "a")
        slugs: list[dict[str, Any]] = [{"slug": "a"}, {}]
        for slug in slugs:
            assert await manager.deactivate(USER, key=key, **slug) == 0
            assert await listed(manager.filter_active_tokens(USER, key=key, **slug)) == []
        no_key: Any = None
        await refused(InvalidInput, manager.deactivate(USER, "a", no_key))

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
        assert await world.due_budgets() == 0
        assert (await manager.status(USER, "capped")).attempts_left == 1

    async def test_it_goes_on_until_the_budgets_are_drained_too(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("capped", max_attempts=1))
        for n in range(50):
            await refused(InvalidToken, manager.verify(Subject("auth.user", n), "capped", WRONG))
        world.clock.advance(timedelta(days=1, minutes=15))
        world.backend.calls.clear()
        assert await manager.purge(batch_size=7) == 0
        assert world.backend.calls.count("purge") == 50 // 7 + 1
        assert await world.due_budgets() == 0

    async def test_progress_is_told(self, world: World) -> None:
        manager = await world.manager()
        for _ in range(6):
            await manager.issue(USER)
        heard: list[int] = []
        assert await manager.purge(2, progress=heard.append) == 5
        assert heard == [2, 4, 5]


class TestHistory:
    async def test_every_token_whatever_its_state_newest_first(self, world: World) -> None:
        manager = await world.manager()
        used = await manager.issue(USER, "a")
        await manager.consume(USER, "a", used.key)
        replaced = await manager.issue(USER, "a")
        current = await manager.issue(USER, "a")
        ended = await manager.issue(USER)
        await manager.deactivate(ended)
        await manager.issue(OTHER, "a")
        await manager.pretend(USER, "a")
        assert await listed(manager.history(USER)) == [ended, current, replaced, used]
        assert await listed(manager.history(USER, "a")) == [current, replaced, used]
        assert await listed(manager.history(USER, None)) == [ended]
        assert [token.is_active for token in await listed(manager.history(USER, "a"))] == [True, False, False]
        await refused(InvalidInput, listed(manager.history(Subject("auth.user"))))


class TestErase:
    async def test_the_tokens_and_the_budgets_of_an_object(self, world: World) -> None:
        manager = await world.manager(TokenPolicy.code("login", max_attempts=1, cooldown="1m"))
        token = await manager.issue(USER, "login")
        await manager.issue(OTHER, "login")
        await refused(InvalidToken, manager.verify(USER, "login", *wrong_codes(token.key, 1)))
        await refused(TooManyAttempts, manager.verify(USER, "login", token.key))
        assert await manager.erase(USER) == 1
        assert await manager.erase(USER) == 0
        assert await listed(manager.history(USER)) == []
        fresh = await manager.issue(USER, "login")  # the cooldown is gone, too
        assert await manager.consume(USER, "login", fresh.key) == fresh
        assert await manager.exists_valid(OTHER, "login")
        await refused(InvalidInput, manager.erase(Subject("auth.user")))
        assert [event.count for event in world.events if event.name == "erased"] == [1, 0]

    async def test_what_was_pretended_goes_as_well(self, world: World) -> None:
        manager = await world.manager()
        await manager.pretend(USER, "a")
        assert await manager.erase(USER) == 0
        assert await world.stored() == []

    async def test_a_running_block_has_lost_its_token(self, world: World) -> None:
        manager = await world.manager()
        token = await manager.issue(USER, "a")
        with pytest.raises(LeaseLost):
            async with manager.redeem(USER, "a", token.key):
                await manager.erase(USER)
        assert await world.stored() == []


class TestResetLimits:
    policies = (
        TokenPolicy.code("login", max_attempts=1, cooldown="1h"),
        TokenPolicy.code("pin", max_attempts=1, cooldown="1h"),
    )

    async def spent(self, world: World) -> TokenManager:
        manager = await world.manager(*self.policies)
        for obj in (USER, OTHER):
            for slug in ("login", "pin"):
                token = await manager.issue(obj, slug)
                await refused(InvalidToken, manager.verify(obj, slug, *wrong_codes(token.key, 1)))
        return manager

    async def test_one_purpose(self, world: World) -> None:
        manager = await self.spent(world)
        assert await manager.reset_limits(USER, "login") == 2
        assert await manager.reset_limits(USER, "login") == 0
        assert (await manager.status(USER, "login")).attempts_left == 1
        await manager.issue(USER, "login")
        for obj, slug in ((USER, "pin"), (OTHER, "login")):
            assert (await manager.status(obj, slug)).attempts_left == 0
            await refused(CooldownActive, manager.issue(obj, slug))

    async def test_every_purpose(self, world: World) -> None:
        manager = await self.spent(world)
        assert await manager.reset_limits(USER) == 4
        assert (await manager.status(USER, "pin")).attempts_left == 1
        assert (await manager.status(OTHER, "pin")).attempts_left == 0
        await refused(InvalidInput, manager.reset_limits(Subject("auth.user")))

    async def test_cooldowns_of_every_context(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("a", context="required", cooldown="1h"))
        for context in ("x", "y"):
            await manager.issue(USER, "a", context=context)
        assert await manager.reset_limits(USER, "a") == 2
        for context in ("x", "y"):
            await manager.issue(USER, "a", context=context)

    async def test_a_budget_that_is_shared_stays(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("a", issue_limits=[Limit(1, "1h", by="ip")]))
        await manager.issue(USER, "a", by={"ip": "192.0.2.7"})
        assert await manager.reset_limits(USER) == 0
        await refused(CooldownActive, manager.issue(USER, "a", by={"ip": "192.0.2.7"}))


async def test_memory_has_no_transaction_of_the_applications_own(world: World) -> None:
    manager = await world.manager()
    token = await manager.issue(USER, "a")
    using = object()
    for call in (
        manager.issue(USER, "a", using=using),
        manager.deactivate(USER, using=using),
        manager.save(token, using=using),
        manager.erase(USER, using=using),
    ):
        assert "memory" in str(await refused(InvalidInput, call))
    async with manager.redeem(USER, "a", token.key) as held:
        assert "memory" in str(await refused(InvalidInput, manager.mark_used(held, using=using)))
    assert await reason(manager.verify(USER, "a", token.key)) == "used"
