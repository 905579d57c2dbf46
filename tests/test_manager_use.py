"""Using a token at once: verify, consume, consume_id, max_uses."""

from __future__ import annotations

import asyncio
import pickle
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest

from vtoken import (
    BackendUnavailable,
    ContentTypes,
    InvalidInput,
    InvalidToken,
    OutcomeUnknown,
    Settings,
    Subject,
    TokenPolicy,
    TooManyAttempts,
)

from .core_tools import (
    CODE,
    MINUTE,
    MS,
    OTHER,
    START,
    USER,
    WRONG,
    World,
    reason,
    redeem,
    refused,
    wrong_codes,
)


class User:
    id = 42


class TestVerifyAndConsume:
    async def test_verify_consumes_nothing(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a", {"n": 1})
        before = await world.stored()
        for _ in range(3):
            token = await manager.verify(USER, "a", issued.key)
            assert (token, token.key, token.get_extra_data()) == (issued, None, {"n": 1})
            assert token.is_valid(world.clock())
        assert await world.stored() == before

    async def test_consume_once(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a")
        world.clock.advance(MINUTE)
        token = await manager.consume(USER, "a", issued.key)
        assert token == issued
        assert (token.is_active, token.uses, token.used_at, token.key) == (False, 1, START + MINUTE, None)
        assert not token.is_valid(world.clock())
        assert await reason(manager.consume(USER, "a", issued.key)) == "used"
        assert await reason(manager.verify(USER, "a", issued.key)) == "used"

    async def test_the_store_is_asked_once(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a")
        for call in (manager.verify, manager.consume):
            world.backend.calls.clear()
            assert await call(USER, "a", issued.key) == issued
            assert world.backend.calls == ["present"]

    async def test_of_concurrent_consumers_one_wins(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a")
        calls = [manager.consume(USER, "a", issued.key) for _ in range(20)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert Counter(map(type, results)) == {type(await manager.get(issued.id)): 1, InvalidToken: 19}

    @pytest.mark.parametrize("method", ["verify", "consume", "redeem"])
    async def test_every_reason_and_one_message(self, world: World, method: str) -> None:
        manager = await world.manager()

        async def refusal(key: str, slug: str | None = "a", obj: object = USER) -> str:
            async def call() -> None:
                if method == "redeem":
                    async with manager.redeem(obj, slug, key):
                        pass
                else:
                    await getattr(manager, method)(obj, slug, key)

            error = await refused(InvalidToken, call())
            assert str(error) == str(InvalidToken())
            assert (error.__cause__, error.__context__) == (None, None)
            return error.reason

        issued = await manager.deactivate_and_create(USER, "a", expiration_in_minutes=1)
        for obj in (OTHER, Subject("app.row", 42), Subject("app.row"), Subject("auth.user", "042")):
            assert await refusal(issued.key, obj=obj) == "unknown"
        for slug in ("A", "b", None, "a "):
            assert await refusal(issued.key, slug) == "unknown"
        for key in ("", WRONG, issued.key.swapcase(), issued.key[:-1], issued.key + "0"):
            assert await refusal(key) == "unknown"
        async with manager.redeem(USER, "a", issued.key):
            assert await refusal(issued.key) == "leased"
        assert await refusal(issued.key) == "used"
        expired = await manager.deactivate_and_create(USER, "a", expiration_in_minutes=1)
        world.clock.advance(MINUTE + MS)
        assert await refusal(expired.key) == "expired"
        await manager.deactivate(USER)
        assert await refusal(expired.key) == "inactive"

    async def test_the_boundary(self, world: World) -> None:
        manager = await world.manager()
        first = await manager.deactivate_and_create(USER, "a", expiration_in_minutes=1)
        second = await manager.deactivate_and_create(USER, "b", expiration_in_minutes=1)
        third = await manager.deactivate_and_create(USER, "c", expiration_in_minutes=1)
        world.clock.advance(MINUTE + timedelta(microseconds=999))
        assert (await manager.verify(USER, "a", first.key)).is_valid(world.clock())
        assert await manager.consume(USER, "a", first.key) == first
        assert await redeem(manager, "b", second.key) == second.id
        world.clock.advance(timedelta(microseconds=1))
        for call in (manager.verify, manager.consume):
            assert await reason(call(USER, "c", third.key)) == "expired"
        assert await reason(redeem(manager, "c", third.key)) == "expired"

    async def test_a_class_or_a_content_type_means_any_object(self, world: World) -> None:
        types = ContentTypes()
        types.register(User, "auth.user")
        manager = await world.manager(content_types=types)
        for anyone in (User, Subject("auth.user"), User(), Subject("auth.user", "42")):
            issued = await manager.deactivate_and_create(User(), "a")
            assert (await manager.verify(anyone, "a", issued.key)).object_id == "42"
            assert await manager.exists_valid(anyone, key=issued.key)
            assert await manager.consume(anyone, "a", issued.key) == issued

    @pytest.mark.parametrize("method", ["verify", "consume", "exists_valid", "redeem"])
    async def test_codes_need_their_object(self, world: World, method: str) -> None:
        manager = await world.manager(CODE)

        async def call() -> None:
            await getattr(manager, method)(Subject("auth.user"), "login", "123456")

        assert "object" in str(await refused(InvalidInput, call()))
        assert "present" not in world.backend.calls

    async def test_a_token_without_slug_is_one_of_its_own(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER)
        assert await reason(manager.consume(USER, "None", issued.key)) == "unknown"
        assert await manager.consume(USER, None, issued.key) == issued

    async def test_a_clock_that_jumps_back_revives_nothing(self, world: World) -> None:
        manager = await world.manager()
        used = await manager.deactivate_and_create(USER, "a")
        ended = await manager.deactivate_and_create(USER, "b")
        await manager.consume(USER, "a", used.key)
        await manager.deactivate(USER, "b")
        world.clock.advance(-timedelta(days=365))
        assert await reason(manager.consume(USER, "a", used.key)) == "used"
        assert await reason(manager.consume(USER, "b", ended.key)) == "inactive"


class TestConsumeId:
    async def test_the_same_again_and_no_other(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a", "data", expiration_in_minutes=1)
        first = await manager.consume(USER, "a", issued.key, consume_id="request-1")
        assert not first.is_replay
        for advance in (timedelta(0), timedelta(minutes=15), -timedelta(days=500)):
            world.clock.advance(advance)
            again = await manager.consume(USER, "a", issued.key, consume_id="request-1")
            assert (again, again.used_at, again.uses, again.extra_data) == (first, START, 1, '"data"')
            assert again.is_replay
        assert Counter(world.event_names) == {"issued": 1, "consumed": 1, "replayed": 3}
        for other in ("request-2", "Request-1", None):
            assert await reason(manager.consume(USER, "a", issued.key, consume_id=other)) == "used"

    async def test_key_object_and_slug_must_match_as_well(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a")
        await manager.consume(USER, "a", issued.key, consume_id="id")
        for obj, slug, key in (
            (OTHER, "a", issued.key),
            (Subject("app.row", 42), "a", issued.key),
            (USER, "b", issued.key),
            (USER, None, issued.key),
            (USER, "a", WRONG),
            (USER, "a", ""),
        ):
            assert await reason(manager.consume(obj, slug, key, consume_id="id")) == "unknown"

    async def test_only_success_is_remembered(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a")
        async with manager.redeem(USER, "a", issued.key):
            assert await reason(manager.consume(USER, "a", issued.key, consume_id="id")) == "leased"
        assert await reason(manager.consume(USER, "a", issued.key, consume_id="id")) == "used"
        other = await manager.deactivate_and_create(USER, "a")
        await refused(InvalidToken, manager.consume(USER, "a", WRONG, consume_id="id"))
        assert await manager.consume(USER, "a", other.key, consume_id="id") == other

    async def test_until_purge_removes_the_token(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a")
        await manager.consume(USER, "a", issued.key, consume_id="id")
        await manager.purge()
        assert await reason(manager.consume(USER, "a", issued.key, consume_id="id")) == "unknown"

    @pytest.mark.parametrize(
        "bad", ["", "a" * 129, "é" * 65, "a\0", "\ud800", 5, True, b"id", ["id"], {"$ne": 1}]
    )
    async def test_out_of_range(self, world: World, bad: Any) -> None:
        manager = await world.manager(CODE)
        world.backend.calls.clear()
        await refused(InvalidInput, manager.consume(USER, "login", "123456", consume_id=bad))
        assert world.backend.calls == []

    async def test_the_longest(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a")
        for _ in range(2):
            assert await manager.consume(USER, "a", issued.key, consume_id="é" * 64) == issued

    async def test_of_concurrent_calls_with_one_id_all_get_the_answer(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "a")
        calls = [manager.consume(USER, "a", issued.key, consume_id="id") for _ in range(10)]
        assert await asyncio.gather(*calls) == [issued] * 10
        assert (await world.stored())[0].uses == 1

    @pytest.mark.parametrize("happened", [True, False])
    async def test_it_resolves_an_unknown_outcome(self, world: World, happened: bool) -> None:
        manager = await world.manager(TokenPolicy("a", max_attempts=3))
        issued = await manager.deactivate_and_create(USER, "a")

        async def broken() -> None:
            raise OutcomeUnknown("the connection broke")

        when = world.backend.after if happened else world.backend.before
        when["present"] = broken
        await refused(OutcomeUnknown, manager.consume(USER, "a", issued.key, consume_id="id"))
        del when["present"]
        assert await manager.consume(USER, "a", issued.key, consume_id="id") == issued
        assert (await world.stored())[0].uses == 1

    async def test_an_old_key_buys_no_guesses_at_a_new_code(self, world: World) -> None:
        manager = await world.manager(TokenPolicy.code("login", max_attempts=3))
        old = await manager.deactivate_and_create(USER, "login")
        await manager.consume(USER, "login", old.key, consume_id="id")
        new = await manager.deactivate_and_create(USER, "login")
        guesses = [code for code in wrong_codes(new.key, 4) if code != old.key]
        for guess in guesses[:2]:
            await refused(InvalidToken, manager.verify(USER, "login", guess))
            assert await manager.consume(USER, "login", old.key, consume_id="id") == old
        await refused(InvalidToken, manager.verify(USER, "login", guesses[2]))
        await refused(TooManyAttempts, manager.consume(USER, "login", new.key))

    async def test_it_settles_an_unknown_outcome_of_the_last_attempt(self, world: World) -> None:
        manager = await world.manager(CODE)
        issued = await manager.issue(USER, "login")
        for code in wrong_codes(issued.key, 4):
            await refused(InvalidToken, manager.verify(USER, "login", code))

        async def lost() -> None:
            raise OutcomeUnknown("the connection broke")

        world.backend.after["present"] = lost
        await refused(OutcomeUnknown, manager.consume(USER, "login", issued.key, consume_id="id"))
        world.backend.after.clear()
        assert (await manager.consume(USER, "login", issued.key, consume_id="id")).is_replay

    async def test_for_fifteen_minutes_from_its_use(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.issue(USER, "a")
        await manager.consume(USER, "a", issued.key, consume_id="id")
        world.clock.advance(timedelta(minutes=15) + MS)
        error = await refused(InvalidToken, manager.consume(USER, "a", issued.key, consume_id="id"))
        assert (error.reason, error.token) == ("used", issued)
        assert world.event_names[-1] == "reused"

    async def test_also_after_a_reissue_and_a_revocation(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("a", max_uses=2))
        issued = await manager.issue(USER, "a")
        await manager.consume(USER, "a", issued.key, consume_id="id")
        await manager.issue(USER, "a")
        assert (await manager.consume(USER, "a", issued.key, consume_id="id")).is_replay
        await manager.deactivate(USER)
        assert (await manager.consume(USER, "a", issued.key, consume_id="id")).is_replay
        await manager.erase(USER)
        assert await reason(manager.consume(USER, "a", issued.key, consume_id="id")) == "unknown"

    async def test_it_belongs_to_the_key_that_was_presented(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("a", overlap="5m", max_uses=3))
        old = await manager.issue(USER, "a")
        new = await manager.issue(USER, "a")
        await manager.consume(USER, "a", old.key, consume_id="id")
        assert (await manager.consume(USER, "a", old.key, consume_id="id")).is_replay
        assert not (await manager.consume(USER, "a", new.key, consume_id="id")).is_replay
        assert (await world.stored())[0].uses == 2


class TestTheTokenOfAnError:
    """Where a link key was right but the token is over, the application may offer to send another one."""

    @pytest.mark.parametrize("end", ["used", "expired", "inactive"])
    async def test_of_a_right_link_key(self, world: World, end: str) -> None:
        manager = await world.manager()
        issued = await manager.issue(USER, "a", expires_in="1m")
        if end == "used":
            await manager.consume(USER, "a", issued.key)
        if end == "inactive":
            await manager.deactivate(USER)
        if end == "expired":
            world.clock.advance(MINUTE + MS)
        for call in (manager.verify, manager.consume):
            for obj in (USER, Subject("auth.user")):
                error = await refused(InvalidToken, call(obj, "a", issued.key))
                assert (error.reason, error.token) == (end, issued)
                assert error.token is not None
                assert error.token.key is None
                assert issued.id not in repr(error) + str(error)
                assert pickle.loads(pickle.dumps(error)).token is None  # noqa: S301  # our own

    async def test_never_of_anything_else(self, world: World) -> None:
        manager = await world.manager(
            CODE, TokenPolicy("bound", context="required"), TokenPolicy.pair("pair")
        )
        link, code = await manager.issue(USER, "a"), await manager.issue(USER, "login")
        bound, pair = await manager.issue(USER, "bound", context="x"), await manager.issue(USER, "pair")
        await manager.deactivate(USER)
        assert pair.code is not None
        for obj, slug, key, given in (
            (USER, "login", code.key, None),
            (OTHER, "a", link.key, None),
            (USER, "b", link.key, None),
            (USER, "a", WRONG, None),
            (USER, "bound", bound.key, "y"),
            (USER, "pair", pair.code, None),
        ):
            error = await refused(InvalidToken, manager.verify(obj, slug, key, context=given))
            assert error.token is None
        assert (await refused(InvalidToken, manager.verify(USER, "pair", pair.key))).token == pair


async def test_what_fails_after_the_use_does_not_deny_it(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    # BackendUnavailable means that nothing happened; here the token is used already.
    plain = await world.manager(settings=Settings(key_storage="plain"))
    manager = await world.manager(TokenPolicy("a", max_attempts=3))
    issued = await plain.deactivate_and_create(USER, "a")
    world.backend.failing["update"] = BackendUnavailable("the store is away")
    assert await manager.consume(USER, "a", issued.key) == issued
    assert "plain key could not be cleared" in caplog.text
    assert await reason(manager.consume(USER, "a", issued.key)) == "used"


class TestMaxUses:
    invitation = TokenPolicy("invite", max_uses=3)

    async def test_as_many_as_the_policy_says(self, world: World) -> None:
        manager = await world.manager(self.invitation)
        issued = await manager.deactivate_and_create(USER, "invite")
        assert (issued.max_uses, issued.uses) == (3, 0)
        for uses in (1, 2, 3):
            token = await manager.consume(USER, "invite", issued.key)
            assert (token.uses, token.is_active) == (uses, uses < 3)
        assert await reason(manager.consume(USER, "invite", issued.key)) == "used"

    async def test_of_concurrent_consumers_three_win(self, world: World) -> None:
        manager = await world.manager(self.invitation)
        issued = await manager.deactivate_and_create(USER, "invite")
        calls = [manager.consume(USER, "invite", issued.key) for _ in range(12)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert len([r for r in results if isinstance(r, InvalidToken)]) == 9
        assert (await world.stored())[0].uses == 3

    async def test_consume_ids_count_one_use_each(self, world: World) -> None:
        manager = await world.manager(self.invitation)
        issued = await manager.deactivate_and_create(USER, "invite")
        for name in ("a", "b", "a", "c", "b", "a"):
            assert await manager.consume(USER, "invite", issued.key, consume_id=name) == issued
        assert (await world.stored())[0].uses == 3
        assert await reason(manager.consume(USER, "invite", issued.key, consume_id="d")) == "used"

    async def test_a_remembered_use_is_answered_while_another_holds_the_lease(self, world: World) -> None:
        manager = await world.manager(self.invitation)
        issued = await manager.deactivate_and_create(USER, "invite")
        await manager.consume(USER, "invite", issued.key, consume_id="a")
        async with manager.redeem(USER, "invite", issued.key):
            assert await manager.consume(USER, "invite", issued.key, consume_id="a") == issued
            assert await manager.consume(USER, "invite", issued.key, consume_id="b") == issued
            assert await reason(manager.consume(USER, "invite", issued.key, consume_id="c")) == "leased"
        assert (await world.stored())[0].uses == 3

    async def test_deactivated_after_some_uses_it_is_inactive_and_not_used(self, world: World) -> None:
        manager = await world.manager(self.invitation)
        issued = await manager.deactivate_and_create(USER, "invite")
        await manager.consume(USER, "invite", issued.key)
        await manager.deactivate(USER)
        assert await reason(manager.consume(USER, "invite", issued.key)) == "inactive"

    async def test_redeem_counts_one(self, world: World) -> None:
        manager = await world.manager(self.invitation)
        issued = await manager.deactivate_and_create(USER, "invite")
        for _ in range(3):
            await redeem(manager, "invite", issued.key)
        assert await reason(redeem(manager, "invite", issued.key)) == "used"
