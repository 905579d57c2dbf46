"""Presented and stored keys: their range, rotation of the secret, storage, derived keys."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from vtoken import (
    ANY,
    AlreadyUsed,
    ConfigurationError,
    CooldownActive,
    InvalidInput,
    InvalidToken,
    IssuedToken,
    KeyGenerationError,
    Limit,
    Settings,
    Subject,
    TokenManager,
    TokenPolicy,
)
from vtoken.keys import has_checksum

from .core_tools import (
    CODE,
    OLD_SECRET,
    OTHER,
    SECRET,
    SECRETS,
    USER,
    World,
    reason,
    redeem,
    refused,
)


@pytest.mark.parametrize("method", ["deactivate", "exists_valid", "verify", "consume", "redeem"])
class TestKeysAndSlugs:
    async def call(self, manager: TokenManager, method: str, slug: Any, key: Any) -> object:
        if method == "redeem":
            return await redeem(manager, slug, key)
        return await getattr(manager, method)(USER, slug, key)

    @pytest.mark.parametrize(
        "key",
        [
            None,
            1,
            True,
            b"a",
            ["a"],
            {"$ne": ""},
            pytest.param(object(), id="object"),
        ],
        ids=ascii,
    )
    async def test_a_key_out_of_range_is_refused_before_the_store_is_asked(
        self, world: World, method: str, key: Any
    ) -> None:
        manager = await world.manager()
        world.backend.calls.clear()
        await refused(InvalidInput, self.call(manager, method, "a", key))
        assert world.backend.calls == []

    @pytest.mark.parametrize("key", ["", " \u200b\n", "a\0", "\ud800", "a" * 513, "é" * 257], ids=ascii)
    async def test_a_key_that_a_visitor_garbled_is_no_valid_token(
        self, world: World, method: str, key: str
    ) -> None:
        manager = await world.manager()
        await manager.issue(USER, "a")
        world.backend.calls.clear()
        if method in ("deactivate", "exists_valid"):
            assert not await self.call(manager, method, "a", key)
        else:
            error = await refused(InvalidToken, self.call(manager, method, "a", key))
            assert (error.reason, error.attempts_left) == ("unknown", None)
        assert world.backend.calls == []

    @pytest.mark.parametrize("ends", [" {}", "{}\n", "\ufeff{}\r\n", "\u200b{}\u00a0"], ids=ascii)
    async def test_what_cannot_be_seen_at_the_ends_does_not_matter(
        self, world: World, method: str, ends: str
    ) -> None:
        manager = await world.manager()
        issued = await manager.issue(USER, "a")
        assert await self.call(manager, method, "a", ends.format(issued.key))

    async def test_within_a_link_everything_matters(self, world: World, method: str) -> None:
        manager = await world.manager()
        key = (await manager.issue(USER, "a")).key
        for wrong in (
            f"{key[:9]} {key[9:]}",
            f"{key[:9]}\u200b{key[9:]}",
            key.swapcase(),
            key[:-1],
            key + "0",
        ):
            if method in ("deactivate", "exists_valid"):
                assert not await self.call(manager, method, "a", wrong)
            else:
                assert await reason(self.call(manager, method, "a", wrong)) == "unknown"

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
        assert issued.key not in str([tuple(key) for key in (await world.stored())[0].keys])
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
        [digest] = [key.digest for key in (await world.stored())[0].keys]
        if method == "redeem":
            await redeem(manager, "reset", issued.key)
        else:
            assert await getattr(manager, method)(USER, "reset", issued.key)
        [stored] = (await world.stored())[0].keys
        assert (stored.plain_key, stored.digest) == ("", digest)
        found = await older.get(issued.id)
        assert found is not None
        assert found.key is None

    async def test_an_error_never_carries_the_key(self, world: World) -> None:
        manager = await world.manager(settings=self.plain)
        issued = await manager.issue(USER, "reset")
        await manager.consume(USER, "reset", issued.key, consume_id="mine")
        errors = [await refused(InvalidToken, manager.verify(USER, "reset", issued.key))]
        errors.append(await refused(AlreadyUsed, redeem(manager, "reset", issued.key, consume_id="mine")))
        world.clock.advance(timedelta(minutes=16))
        errors.append(
            await refused(InvalidToken, manager.consume(USER, "reset", issued.key, consume_id="mine"))
        )
        assert [(error.token, error.token and error.token.key) for error in errors] == [(issued, None)] * 3

    async def test_where_the_limits_are_spent_a_plain_key_stays_behind_too(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("reset", cooldown="1m"), settings=self.plain)
        issued = await manager.issue(USER, "reset")
        assert (await manager.get_active_or_create(USER, "reset")).key is None
        world.clock.advance(timedelta(minutes=1))
        assert (await manager.get_active_or_create(USER, "reset")).key == issued.key
        assert (await manager.get_active_or_create(USER, "reset")).key is None

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
        assert stored.keys[0].nonce
        assert issued.key not in str([tuple(key) for key in stored.keys])
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

    async def test_codes_too(self, world: World) -> None:
        manager = await world.manager(TokenPolicy.code("login", key_storage="derived"))
        issued = await manager.issue(USER, "login")
        assert (len(issued.key), issued.key.isdigit()) == (6, True)
        assert (await manager.get_active_or_create(USER, "login")).key == issued.key
        assert await manager.consume(USER, "login", issued.key) == issued

    async def test_an_answer_that_carries_a_key_again_counts(self, world: World) -> None:
        manager = await world.manager(replace(self.policy, cooldown="1m"))
        issued = await manager.get_active_or_create(USER, "reset")
        answers = [await manager.get_active_or_create(USER, "reset") for _ in range(200)]
        assert [answer.key for answer in answers] == [None] * 200
        world.clock.advance(timedelta(minutes=1))
        assert (await manager.get_active_or_create(USER, "reset")).key == issued.key
        await refused(CooldownActive, manager.issue(USER, "reset"))
        assert world.event_names == ["issued", "revealed", "limited"]


class TestReveal:
    policy = TokenPolicy("reset", key_storage="derived", cooldown="1m")

    async def test_the_first_time_is_free_and_the_next_counts(self, world: World) -> None:
        manager = await world.manager(self.policy)
        issued = await manager.issue(USER, "reset")
        loaded = await manager.get(issued.id)
        assert loaded is not None
        revealed = await manager.reveal(loaded)
        assert isinstance(revealed, IssuedToken)
        assert (revealed, revealed.key) == (issued, issued.key)
        await refused(CooldownActive, manager.reveal(loaded))
        world.clock.advance(timedelta(minutes=1))
        assert await manager.reveal(loaded) == issued
        await refused(CooldownActive, manager.reveal(loaded))
        await refused(CooldownActive, manager.issue(USER, "reset"))
        assert world.event_names.count("revealed") == 2

    async def test_of_concurrent_calls_one_is_free(self, world: World) -> None:
        manager = await world.manager(self.policy)
        issued = await manager.issue(USER, "reset")
        results = await asyncio.gather(*[manager.reveal(issued) for _ in range(10)], return_exceptions=True)
        assert Counter(map(type, results)) == {IssuedToken: 1, CooldownActive: 9}

    @pytest.mark.parametrize("end", ["used", "deactivated", "replaced", "expired", "purged"])
    async def test_none_once_it_is_over(self, world: World, end: str) -> None:
        manager = await world.manager(replace(self.policy, cooldown=None))
        issued = await manager.issue(USER, "reset", expires_in="1h")
        if end == "used":
            await manager.consume(USER, "reset", issued.key)
        if end in ("deactivated", "purged"):
            await manager.deactivate(USER)
        if end == "purged":
            await manager.purge()
        if end == "replaced":
            await manager.issue(USER, "reset")
        if end == "expired":
            world.clock.advance(timedelta(hours=1, milliseconds=1))
        assert await manager.reveal(issued) is None

    async def test_a_policy_that_is_not_derived(self, world: World) -> None:
        manager = await world.manager(TokenPolicy("plain", key_storage="plain"))
        for slug in ("plain", "digest"):
            await refused(ConfigurationError, manager.reveal(await manager.issue(USER, slug)))
        not_a_token: Any = "0123456789abcdef"
        await refused(InvalidInput, manager.reveal(not_a_token))

    async def test_limits_by_a_dimension_of_the_request_are_left_out(self, world: World) -> None:
        policy = replace(self.policy, cooldown=None, issue_limits=[Limit(1, "1h", by="ip")])
        manager = await world.manager(policy)
        issued = await manager.issue(USER, "reset", by={"ip": "192.0.2.7"})
        for _ in range(3):
            assert await manager.reveal(issued) == issued

    async def test_of_a_pair_whose_code_is_over_the_link_alone(self, world: World) -> None:
        manager = await world.manager(TokenPolicy.pair("login", key_storage="derived", cooldown="1m"))
        issued = await manager.issue(USER, "login")
        revealed = await manager.reveal(issued)
        assert revealed is not None
        assert (revealed.key, revealed.code) == (issued.key, issued.code)
        world.clock.advance(timedelta(minutes=11))
        revealed = await manager.reveal(issued)
        assert revealed is not None
        assert (revealed.key, revealed.code) == (issued.key, None)
