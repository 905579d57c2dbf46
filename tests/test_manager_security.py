"""Attempt budgets, rotation, storage of keys, typing errors, contexts."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from vtoken import (
    CooldownActive,
    InvalidInput,
    InvalidToken,
    KeyGenerationError,
    Settings,
    Subject,
    TokenManager,
    TokenPolicy,
    TooManyAttempts,
    VerificationToken,
)
from vtoken.backend import Match, StoredToken
from vtoken.keys import add_checksum, has_checksum

from .core_tools import (
    CODE,
    MS,
    OLD_SECRET,
    OTHER,
    SECRET,
    SECRETS,
    USER,
    WRONG,
    Watched,
    World,
    reason,
    redeem,
    refused,
    wrong_codes,
)

WINDOW = timedelta(minutes=15)
DAY = timedelta(days=1)


async def spend(manager: TokenManager, count: int, obj: object = USER, slug: str = "login") -> None:
    """Guess wrongly so many times, each of which must be compared."""
    for code in wrong_codes("999999", count):
        error = await refused(InvalidToken, manager.verify(obj, slug, code))
        assert type(error) is InvalidToken


class TestAttempts:
    async def test_five_are_compared_and_the_right_one_after_them_is_not(self, world: World) -> None:
        manager = await world.manager(CODE)
        issued = await manager.deactivate_and_create(USER, "login")
        await spend(manager, 5)
        for call in (manager.verify, manager.consume):
            error = await refused(TooManyAttempts, call(USER, "login", issued.key))
            assert error.retry_after == WINDOW.total_seconds()
        await refused(TooManyAttempts, redeem(manager, "login", issued.key))
        await refused(TooManyAttempts, manager.exists_valid(USER, "login", issued.key))
        world.clock.advance(timedelta(minutes=10))
        error = await refused(TooManyAttempts, manager.verify(USER, "login", issued.key))
        assert error.retry_after == 300

    async def test_nothing_is_compared_once_it_is_spent(self, world: World) -> None:
        manager = await world.manager(CODE)
        await spend(manager, 5)
        world.backend.calls.clear()
        await refused(TooManyAttempts, manager.consume(USER, "login", "123456"))
        assert world.backend.calls == ["spend"]

    async def test_the_last_one_may_be_right(self, world: World) -> None:
        manager = await world.manager(CODE)
        issued = await manager.deactivate_and_create(USER, "login")
        await spend(manager, 4)
        assert await manager.consume(USER, "login", issued.key) == issued

    async def test_the_attempt_is_counted_before_it_is_compared(self, world: World) -> None:
        manager = await world.manager(CODE)
        issued = await manager.deactivate_and_create(USER, "login")
        for method in ("verify", "consume"):
            world.backend.calls.clear()
            await refused(InvalidToken, getattr(manager, method)(USER, "login", issued.key + "0"))
            assert world.backend.calls[0] == "spend"

    async def test_of_200_parallel_guesses_at_most_five_are_compared(self, world: World) -> None:
        managers = [await world.manager(CODE) for _ in range(2)]
        issued = await managers[0].deactivate_and_create(USER, "login")
        guesses = [*wrong_codes(issued.key, 199), issued.key]
        calls = [managers[n % 2].consume(USER, "login", guess) for n, guess in enumerate(guesses)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        compared = [r for r in results if not isinstance(r, TooManyAttempts)]
        assert len(compared) == 5
        assert not [r for r in results if isinstance(r, VerificationToken)]

    async def test_a_right_key_costs_nothing(self, world: World) -> None:
        manager = await world.manager(CODE)
        issued = await manager.deactivate_and_create(USER, "login")
        await spend(manager, 4)
        for _ in range(10):
            assert await manager.verify(USER, "login", issued.key) == issued
            assert await manager.exists_valid(USER, "login", issued.key)
        await spend(manager, 1)
        await refused(TooManyAttempts, manager.verify(USER, "login", issued.key))

    async def test_the_window_begins_with_the_first_wrong_one(self, world: World) -> None:
        manager = await world.manager(CODE)
        issued = await manager.deactivate_and_create(USER, "login", expiration_in_minutes=None)
        await manager.verify(USER, "login", issued.key)
        world.clock.advance(timedelta(minutes=10))
        await spend(manager, 5)
        world.clock.advance(WINDOW - MS)
        await refused(TooManyAttempts, manager.verify(USER, "login", issued.key))
        world.clock.advance(MS)
        assert await manager.verify(USER, "login", issued.key) == issued

    @pytest.mark.parametrize("how", ["consume", "redeem"])
    async def test_a_successful_use_resets_it_and_a_check_does_not(self, world: World, how: str) -> None:
        manager = await world.manager(CODE)
        issued = await manager.deactivate_and_create(USER, "login")
        await spend(manager, 4)
        if how == "consume":
            await manager.consume(USER, "login", issued.key)
        else:
            await redeem(manager, "login", issued.key)
        await spend(manager, 5)
        await refused(TooManyAttempts, manager.verify(USER, "login", WRONG))

    async def test_it_survives_reissuing_deactivating_and_purging(self, world: World) -> None:
        manager = await world.manager(CODE)
        await spend(manager, 5)
        for _ in range(3):
            issued = await manager.deactivate_and_create(USER, "login")
            await refused(TooManyAttempts, manager.consume(USER, "login", issued.key))
            await manager.deactivate(USER)
            await manager.purge()
            await manager.get_active_or_create(USER, "login")
            await refused(TooManyAttempts, manager.verify(USER, "login", issued.key))

    async def test_it_counts_whether_or_not_a_token_exists(self, world: World) -> None:
        manager = await world.manager(CODE)
        steps: list[list[str]] = []
        await manager.deactivate_and_create(USER, "login")
        for obj in (USER, OTHER):
            world.backend.calls.clear()
            await spend(manager, 5, obj)
            await refused(TooManyAttempts, manager.verify(obj, "login", "123456"))
            steps.append(list(world.backend.calls))
        assert steps[0] == steps[1]  # the same steps, whether the object exists or not

    async def test_it_is_the_objects_and_the_slugs_own(self, world: World) -> None:
        manager = await world.manager(CODE, TokenPolicy.code("pin"))
        await spend(manager, 5)
        for obj, slug in ((OTHER, "login"), (USER, "pin"), (Subject("app.row", 42), "login")):
            await spend(manager, 5, obj, slug)
        await refused(TooManyAttempts, manager.verify(Subject("auth.user", "42"), "login", WRONG))

    async def test_exists_valid_counts_too(self, world: World) -> None:
        manager = await world.manager(CODE)
        issued = await manager.deactivate_and_create(USER, "login")
        for code in wrong_codes(issued.key, 5):
            assert not await manager.exists_valid(USER, "login", code)
        await refused(TooManyAttempts, manager.exists_valid(USER, "login", issued.key))
        await refused(TooManyAttempts, manager.consume(USER, "login", issued.key))
        assert await manager.exists_valid(USER, "login")  # without a key nothing is guessed

    async def test_methods_share_one_budget(self, world: World) -> None:
        manager = await world.manager(CODE)
        issued = await manager.deactivate_and_create(USER, "login")
        wrong = iter(wrong_codes(issued.key, 5))
        await refused(InvalidToken, manager.verify(USER, "login", next(wrong)))
        await refused(InvalidToken, manager.consume(USER, "login", next(wrong)))
        await refused(InvalidToken, redeem(manager, "login", next(wrong)))
        assert not await manager.exists_valid(USER, "login", next(wrong))
        await refused(InvalidToken, manager.consume(USER, "login", "", consume_id="id"))
        await refused(TooManyAttempts, manager.verify(USER, "login", issued.key))

    async def test_input_out_of_range_is_no_guess(self, world: World) -> None:
        manager = await world.manager(CODE)
        for _ in range(10):
            await refused(InvalidInput, manager.verify(USER, "login", "a" * 513))
            await refused(InvalidInput, manager.consume(USER, "login", "1", consume_id=""))
        await spend(manager, 5)

    async def test_a_used_or_leased_code_is_no_guess(self, world: World) -> None:
        manager = await world.manager(CODE)
        issued = await manager.deactivate_and_create(USER, "login")
        async with manager.redeem(USER, "login", issued.key):
            for _ in range(7):
                assert await reason(manager.verify(USER, "login", issued.key)) == "leased"
        for _ in range(7):
            assert await reason(manager.consume(USER, "login", issued.key)) == "used"
        await spend(manager, 5)

    async def test_the_window_grows_when_it_is_exhausted_again_and_again_up_to_a_day(
        self, world: World
    ) -> None:
        manager = await world.manager(CODE)
        lengths: list[float] = []
        for _ in range(10):
            await spend(manager, 5)
            error = await refused(TooManyAttempts, manager.verify(USER, "login", WRONG))
            lengths.append(error.retry_after)
            world.clock.advance(timedelta(seconds=error.retry_after))
        minutes = [15, 30, 60, 120, 240, 480, 960, 1440, 1440, 1440]
        assert lengths == [m * 60 for m in minutes]

    async def test_purge_does_not_forget_the_growth(self, world: World) -> None:
        manager = await world.manager(CODE)
        await spend(manager, 5)
        await manager.purge()
        await refused(TooManyAttempts, manager.verify(USER, "login", WRONG))
        world.clock.advance(WINDOW)
        await manager.purge()
        await spend(manager, 5)
        assert (await refused(TooManyAttempts, manager.verify(USER, "login", WRONG))).retry_after == 1800

    async def test_a_window_that_was_not_exhausted_ends_the_growth(self, world: World) -> None:
        manager = await world.manager(CODE)
        await spend(manager, 5)
        world.clock.advance(WINDOW)
        await spend(manager, 4)
        world.clock.advance(2 * WINDOW)
        await spend(manager, 5)
        assert (await refused(TooManyAttempts, manager.verify(USER, "login", WRONG))).retry_after == 900

    async def test_a_success_ends_the_growth(self, world: World) -> None:
        manager = await world.manager(CODE)
        await spend(manager, 5)
        world.clock.advance(WINDOW)
        issued = await manager.deactivate_and_create(USER, "login")
        await manager.consume(USER, "login", issued.key)
        await spend(manager, 5)
        assert (await refused(TooManyAttempts, manager.verify(USER, "login", WRONG))).retry_after == 900

    async def test_without_a_policy_there_is_no_cap_and_nothing_is_spent(self, world: World) -> None:
        manager = await world.manager(CODE)
        issued = await manager.deactivate_and_create(USER, "reset")
        world.backend.calls.clear()
        for _ in range(20):
            assert await reason(manager.verify(USER, "reset", WRONG)) == "unknown"
        assert await manager.consume(USER, "reset", issued.key) == issued
        assert not {"spend", "refund", "reset"} & set(world.backend.calls)

    async def test_a_link_policy_may_have_a_cap(self, world: World) -> None:
        manager = await world.manager(
            TokenPolicy.link("reset", max_attempts=1, attempt_window=timedelta(hours=1))
        )
        issued = await manager.deactivate_and_create(USER, "reset")
        await refused(InvalidToken, manager.verify(USER, "reset", WRONG))
        error = await refused(TooManyAttempts, manager.consume(USER, "reset", issued.key))
        assert error.retry_after == 3600

    async def test_a_capped_link_asked_for_by_its_content_type_has_no_object_to_charge(
        self, world: World
    ) -> None:
        manager = await world.manager(TokenPolicy("reset", max_attempts=1))
        issued = await manager.deactivate_and_create(USER, "reset")
        for _ in range(3):
            assert await reason(manager.verify(Subject("auth.user"), "reset", WRONG)) == "unknown"
        assert "spend" not in world.backend.calls
        assert await manager.consume(Subject("auth.user"), "reset", issued.key) == issued

    async def test_a_success_by_content_type_resets_the_objects_budget(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("reset", max_attempts=1))
        issued = await manager.deactivate_and_create(USER, "reset")
        await refused(InvalidToken, manager.verify(USER, "reset", WRONG))
        await refused(TooManyAttempts, manager.verify(USER, "reset", issued.key))
        await manager.consume(Subject("auth.user"), "reset", issued.key)
        assert await reason(manager.verify(USER, "reset", issued.key)) == "used"

    async def test_with_any_slug_nothing_capped_is_guessed(self, world: World) -> None:
        manager = await world.manager(CODE, TokenPolicy("capped", max_attempts=2))
        keys = [(await manager.deactivate_and_create(USER, slug)).key for slug in ("login", "capped", "free")]
        assert [await manager.exists_valid(USER, key=key) for key in keys] == [False, False, True]
        assert "spend" not in world.backend.calls


class TestCodes:
    @pytest.mark.parametrize("spelling", ["{0}{1}", "{0} {1}", "{0}-{1}", " {0}{1}\n", "{0}\u00a0{1}"])
    async def test_as_people_type_them(self, world: World, spelling: str) -> None:
        manager = await world.manager(CODE)
        issued = await manager.deactivate_and_create(USER, "login")
        typed = spelling.format(issued.key[:3], issued.key[3:])
        assert await manager.consume(USER, "login", typed) == issued

    @pytest.mark.parametrize("zero", ["０", "٠", "۰", "०"])
    async def test_ascii_digits_only(self, world: World, zero: str) -> None:
        manager = await world.manager(CODE)
        key = (await manager.deactivate_and_create(USER, "login")).key
        typed = "".join(chr(ord(zero) + int(digit)) for digit in key)
        assert await reason(manager.consume(USER, "login", typed)) == "unknown"

    async def test_letters_of_one_case(self, world: World) -> None:
        manager = await world.manager(TokenPolicy.code("login", key_chars="ABCDEFGHJKLMNPQRSTUVWXYZ23456789"))
        issued = await manager.deactivate_and_create(USER, "login")
        assert await manager.verify(USER, "login", issued.key.lower()) == issued

    async def test_a_code_never_passes_as_a_link_nor_a_link_as_a_code(self, world: World) -> None:
        manager = await world.manager(CODE, TokenPolicy.code("pin"))
        link = await manager.deactivate_and_create(
            USER, "reset", key_generator_kwargs={"generator": lambda: "123456"}
        )
        code = await manager.deactivate_and_create(
            USER, "login", key_generator_kwargs={"generator": lambda: "654321"}
        )
        for slug, key in (("login", link.key), ("pin", link.key), ("reset", code.key), ("pin", code.key)):
            assert await reason(manager.verify(USER, slug, key)) == "unknown"

    async def test_a_thousand_people_may_hold_the_same_code(self, world: World) -> None:
        manager = await world.manager(CODE)
        kwargs = {"generator": lambda: "123456"}
        for n in range(1000):
            await manager.deactivate_and_create(Subject("auth.user", n), "login", key_generator_kwargs=kwargs)
        assert len({row.digest for row in await world.stored()}) == 1000
        assert (await manager.consume(Subject("auth.user", 500), "login", "123456")).object_id == "500"
        assert await reason(manager.verify(Subject("auth.user", 500), "login", "123456")) == "used"
        assert await manager.exists_valid(Subject("auth.user", 501), "login", "123456")

    async def test_a_store_that_answers_too_much_is_not_believed(self, world: World) -> None:
        # As one would whose index ignores case, say: the digests are compared again, in constant time.
        class Lax(Watched):
            async def find(
                self, match: Match, limit: int, after: tuple[int, str] | None = None
            ) -> list[StoredToken]:
                return await super().find(match._replace(digests=None), limit, after)

        manager = await world.manager(CODE, backend=Lax(world.backend.inner))
        issued = await manager.deactivate_and_create(USER, "reset")
        assert await reason(manager.verify(USER, "reset", WRONG)) == "unknown"
        assert await manager.verify(USER, "reset", issued.key) == issued

    async def test_rows_name_their_scheme_and_secret(self, world: World) -> None:
        manager, without = await world.manager(CODE), await world.manager(settings=Settings())
        await without.deactivate_and_create(USER, "bare")
        await manager.deactivate_and_create(USER, "reset")
        await manager.deactivate_and_create(USER, "login")
        rows = {row.slug: row for row in await world.stored()}
        assert {slug: row.scheme for slug, row in rows.items()} == {
            "bare": "sha256",
            "reset": "hmac-sha256",
            "login": "code-hmac-sha256",
        }
        assert rows["bare"].secret_id == ""
        assert rows["reset"].secret_id == rows["login"].secret_id != ""

    async def test_without_a_secret_a_link_is_its_sha256(self, world: World) -> None:
        issued = await (await world.manager(settings=Settings())).deactivate_and_create(USER)
        assert (await world.stored())[0].digest == hashlib.sha256(issued.key.encode()).digest()


class TestRotation:
    old = Settings(secret=OLD_SECRET)
    rotated = Settings(secret=SECRET, previous_secrets=[OLD_SECRET])

    @pytest.mark.parametrize("slug", ["login", "reset"])
    async def test_the_old_secrets_tokens_until_it_is_dropped(self, world: World, slug: str) -> None:
        old, rotated, dropped = [
            await world.manager(CODE, settings=s) for s in (self.old, self.rotated, SECRETS)
        ]
        for method in ("verify", "consume"):
            issued = await old.deactivate_and_create(USER, slug)
            assert await reason(getattr(dropped, method)(USER, slug, issued.key)) == "unknown"
            assert await getattr(rotated, method)(USER, slug, issued.key) == issued
        new = await rotated.deactivate_and_create(USER, slug)
        assert await reason(old.verify(USER, slug, new.key)) == "unknown"
        assert await dropped.consume(USER, slug, new.key) == new

    @pytest.mark.parametrize("older", [Settings(), old])
    async def test_a_key_from_before_the_secret_is_taken(self, world: World, older: Settings) -> None:
        before, after = await world.manager(settings=older), await world.manager(settings=self.rotated)
        again: dict[str, Any] = {"key_generator_kwargs": {"generator": lambda: "the same key, drawn again"}}
        issued = await before.deactivate_and_create(USER, "reset", **again)
        await refused(KeyGenerationError, after.deactivate_and_create(OTHER, "reset", **again))
        assert await after.consume(Subject("auth.user"), "reset", issued.key) == issued
        assert await reason(after.consume(Subject("auth.user"), "reset", issued.key)) == "used"

    async def test_links_from_before_any_secret(self, world: World) -> None:
        before, after = await world.manager(settings=Settings()), await world.manager(settings=self.rotated)
        issued = await before.deactivate_and_create(USER, "reset")
        assert await after.exists_valid(USER, key=issued.key)
        assert await after.deactivate(OTHER, "reset", issued.key) == 0
        assert await after.consume(USER, "reset", issued.key) == issued

    async def test_deactivating_and_listing_by_an_old_key(self, world: World) -> None:
        old, rotated = await world.manager(settings=self.old), await world.manager(settings=self.rotated)
        issued = await old.deactivate_and_create(USER, "reset")
        assert [t async for t in rotated.filter_active_tokens(USER, key=issued.key)] == [issued]
        assert await rotated.deactivate(USER, key=issued.key) == 1


class TestStorage:
    plain = replace(SECRETS, key_storage="plain")

    async def test_a_digest_is_all_there_is(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "reset")
        assert issued.key not in str(tuple((await world.stored())[0]))
        for found in (
            await manager.get(issued.id),
            await manager.verify(USER, "reset", issued.key),
            await manager.get_active_or_create(USER, "reset"),
            *[t async for t in manager.filter_active_tokens(USER)],
            await manager.consume(USER, "reset", issued.key),
        ):
            assert found is not None
            assert found.key is None

    @pytest.mark.parametrize("slug", ["reset", "login"])
    async def test_plain_keys_are_loaded(self, world: World, slug: str) -> None:
        manager = await world.manager(CODE, settings=self.plain)
        issued = await manager.deactivate_and_create(USER, slug)
        for found in (
            await manager.get(issued.id),
            await manager.verify(USER, slug, issued.key),
            await manager.get_active_or_create(USER, slug),
            *[t async for t in manager.filter_active_tokens(USER)],
            await manager.consume(USER, slug, issued.key),
        ):
            assert found is not None
            assert found.key == issued.key
            assert issued.key not in repr(found)

    @pytest.mark.parametrize("method", ["verify", "consume", "redeem", "exists_valid"])
    async def test_an_older_stores_plain_rows_become_digests_on_use(self, world: World, method: str) -> None:
        older, manager = await world.manager(settings=self.plain), await world.manager()
        issued = await older.deactivate_and_create(USER, "reset")
        digest = (await world.stored())[0].digest
        if method == "redeem":
            await redeem(manager, "reset", issued.key)
        else:
            assert await getattr(manager, method)(USER, "reset", issued.key)
        stored = (await world.stored())[0]
        assert (stored.plain_key, stored.digest) == ("", digest)
        found = await older.get(issued.id)
        assert found is not None
        assert found.key is None

    async def test_a_policy_decides_for_its_slug(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("open", key_storage="plain"))
        issued = [await manager.deactivate_and_create(USER, slug) for slug in ("open", "closed")]
        found = [await manager.get(token.id) for token in issued]
        assert [token.key if token else "" for token in found] == [issued[0].key, None]


class TestDerivedKeys:
    policy = TokenPolicy("reset", key_storage="derived")

    async def test_the_same_link_again_without_plaintext_at_rest(self, world: World) -> None:
        manager = await world.manager(self.policy)
        issued = await manager.get_active_or_create(USER, "reset")
        assert issued.key is not None
        again = await manager.get_active_or_create(USER, "reset")
        assert (again, again.key) == (issued, issued.key)
        stored = (await world.stored())[0]
        assert stored.nonce
        assert issued.key not in str(tuple(stored))
        assert await manager.consume(USER, "reset", issued.key) == issued

    async def test_keys_differ(self, world: World) -> None:
        manager = await world.manager(self.policy)
        keys = {(await manager.deactivate_and_create(USER, "reset")).key for _ in range(20)}
        assert len(keys) == 20
        assert {len(key) for key in keys} == {43}

    async def test_only_get_active_or_create_reveals(self, world: World) -> None:
        manager = await world.manager(self.policy)
        issued = await manager.deactivate_and_create(USER, "reset")
        found = await manager.get(issued.id)
        assert found is not None
        assert found.key is None
        assert (await manager.verify(USER, "reset", issued.key)).key is None
        assert [t.key async for t in manager.filter_active_tokens(USER)] == [None]

    async def test_after_rotation_and_after_the_secret_is_gone(self, world: World) -> None:
        old, rotated, dropped = [
            await world.manager(self.policy, settings=s)
            for s in (TestRotation.old, TestRotation.rotated, SECRETS)
        ]
        issued = await old.deactivate_and_create(USER, "reset")
        assert (await rotated.get_active_or_create(USER, "reset")).key == issued.key
        found = await dropped.get_active_or_create(USER, "reset")
        assert (found, found.key) == (issued, None)
        assert await rotated.consume(USER, "reset", issued.key) == issued

    async def test_with_a_prefix_and_none_where_the_prefix_has_changed(self, world: World) -> None:
        prefixed = await world.manager(replace(self.policy, prefix="vt_"))
        issued = await prefixed.deactivate_and_create(USER, "reset")
        assert has_checksum("vt_", issued.key)
        assert (await prefixed.get_active_or_create(USER, "reset")).key == issued.key
        renamed = await world.manager(replace(self.policy, prefix="app_"))
        assert (await renamed.get_active_or_create(USER, "reset")).key is None  # better none than a dead link

    async def test_there_is_no_generator(self, world: World) -> None:
        manager = await world.manager(self.policy)
        await refused(
            InvalidInput, manager.deactivate_and_create(USER, "reset", key_generator_kwargs={"length": 50})
        )


class TestTypingErrors:
    async def test_refused_without_the_store_and_without_an_attempt(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("reset", prefix="vt_", max_attempts=1))
        issued = await manager.deactivate_and_create(USER, "reset")
        assert issued.key.startswith("vt_")
        assert len(issued.key) == 3 + 32 + 6
        world.backend.calls.clear()
        mistyped = issued.key[:10] + ("x" if issued.key[10] != "x" else "y") + issued.key[11:]
        for key in (
            mistyped,
            issued.key[3:],
            issued.key[:-1],
            issued.key + "0",
            issued.key.swapcase(),
            "",
            "vt_",
        ):
            for call in (manager.verify, manager.consume):
                assert await reason(call(USER, "reset", key)) == "unknown"
            assert await reason(redeem(manager, "reset", key)) == "unknown"
            assert not await manager.exists_valid(USER, "reset", key)
        assert world.backend.calls == []
        assert await manager.consume(USER, "reset", issued.key) == issued

    async def test_a_well_formed_wrong_key_is_an_attempt(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("reset", prefix="vt_", max_attempts=1))
        issued = await manager.deactivate_and_create(USER, "reset")
        assert await reason(manager.verify(USER, "reset", add_checksum("vt_", "x" * 32))) == "unknown"
        await refused(TooManyAttempts, manager.verify(USER, "reset", issued.key))

    async def test_deactivating_by_a_mistyped_key(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("reset", prefix="vt_"))
        issued = await manager.deactivate_and_create(USER, "reset")
        assert await manager.deactivate(USER, "reset", issued.key[:-1]) == 0
        assert await manager.deactivate(USER, key=issued.key[:-1]) == 0
        assert [t async for t in manager.filter_active_tokens(USER, key=issued.key)] == [issued]
        assert await manager.deactivate(USER, "reset", issued.key) == 1

    async def test_a_generator_of_its_own_is_framed_too(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("reset", prefix="vt_"))
        kwargs: dict[str, Any] = {"generator": lambda: "k" * 503}
        issued = await manager.deactivate_and_create(USER, "reset", key_generator_kwargs=kwargs)
        assert len(issued.key) == 512
        assert await manager.consume(USER, "reset", issued.key) == issued
        kwargs = {"generator": lambda: "k" * 504}
        await refused(InvalidInput, manager.deactivate_and_create(USER, "reset", key_generator_kwargs=kwargs))


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


async def test_the_lookup_takes_the_same_steps_whether_or_not_the_object_exists() -> None:
    for policies in ([], [CODE]):
        steps: list[list[str]] = []
        for exists in (True, False):
            backend = Watched()
            async with TokenManager(backend, SECRETS, policies=policies) as manager:
                if exists:
                    await manager.deactivate_and_create(USER, "login")
                backend.calls.clear()
                for call in (manager.verify, manager.consume):
                    assert await reason(call(USER, "login", WRONG)) == "unknown"
                steps.append(backend.calls)
        assert steps[0] == steps[1]
