"""Tokens for many objects: issue_many, with and without the name of a batch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from vtoken import (
    BackendUnavailable,
    ConfigurationError,
    CooldownActive,
    InvalidInput,
    IssuedToken,
    Limit,
    Settings,
    Subject,
    TokenManager,
    TokenPolicy,
    VerificationToken,
)

from .core_tools import MINUTE, USER, World, listed, reason, refused

DERIVED = TokenPolicy("invite", key_storage="derived")
COUNT = 600
"""More than two groups of tokens that are in flight together."""


def people(count: int = COUNT) -> list[Subject]:
    return [Subject("auth.user", f"person {number}") for number in range(count)]


async def all_of(manager: TokenManager, subjects: Any, slug: str = "invite", **keywords: Any) -> list[Any]:
    return await listed(manager.issue_many(subjects, slug, **keywords))


class TestWithoutABatch:
    async def test_in_the_order_of_the_objects(self, world: World) -> None:
        manager = await world.manager()
        heard: list[int] = []
        tokens = await all_of(manager, people(), extra_data={"n": 1}, expires_in="7d", progress=heard.append)
        assert [token.object_id for token in tokens] == [str(one.object_id) for one in people()]
        assert {type(token) for token in tokens} == {IssuedToken}
        assert len({token.key for token in tokens}) == COUNT
        assert await manager.verify(people()[500], "invite", tokens[500].key) == tokens[500]
        assert heard[-1] == COUNT
        assert heard == sorted(heard)

    async def test_of_an_async_iterable(self, world: World) -> None:
        async def source() -> AsyncIterator[Subject]:
            for one in people(10):
                await asyncio.sleep(0)
                yield one

        manager = await world.manager()
        assert len(await all_of(manager, source())) == 10
        assert await all_of(manager, []) == []

    async def test_it_reads_no_further_than_a_group(self, world: World) -> None:
        read = 0

        def endless() -> Iterator[Subject]:
            nonlocal read
            while True:
                read += 1
                yield Subject("auth.user", read)

        manager = await world.manager()
        taken: list[VerificationToken] = []
        async with aclosing(manager.issue_many(endless(), "a")) as tokens:
            async for token in tokens:
                taken.append(token)
                if len(taken) == 300:
                    break
        assert read < 600
        # What was issued ahead of where the caller stopped was taken back: nobody has its key.
        assert {stored.id for stored in await world.stored() if stored.is_active} == {t.id for t in taken}

    async def test_it_raises_at_the_first_that_is_over_a_limit_and_a_later_call_goes_on(
        self, world: World
    ) -> None:
        manager = await world.manager(TokenPolicy("invite", cooldown="1m"))
        await manager.issue(people()[5], "invite")
        got: list[VerificationToken] = []

        async def run(subjects: list[Subject]) -> None:
            async for token in manager.issue_many(subjects, "invite"):
                got.append(token)  # noqa: PERF401  # what came before the error counts

        await refused(CooldownActive, run(people(20)))
        assert [token.object_id for token in got] == [f"person {n}" for n in range(5)]
        world.backend.before.clear()
        await run(people(20)[6:])  # the tokens of those after it cost nothing
        assert len(got) == 19
        world.clock.advance(MINUTE)
        await run(people(20)[5:6])
        active = {stored.object_id for stored in await world.stored() if stored.is_active}
        assert active == {f"person {n}" for n in range(20)}

    async def test_an_object_that_comes_twice(self, world: World) -> None:
        manager = await world.manager()
        one, two = people(2)
        tokens = await all_of(manager, [one, two, one, one, two])
        valid = [
            await manager.exists_valid(Subject("auth.user", t.object_id), "invite", t.key) for t in tokens
        ]
        assert valid == [False, False, False, True, True]

    @pytest.mark.parametrize("bad", [None, 5, object, Subject("auth.user"), Subject("auth.user", "")])
    async def test_an_object_that_is_none(self, world: World, bad: Any) -> None:
        manager = await world.manager()
        got: list[str] = []

        async def run() -> None:
            async for token in manager.issue_many([USER, bad, people()[0]], "a"):
                got.append(token.object_id)  # noqa: PERF401  # what came before the error counts

        with pytest.raises((InvalidInput, ConfigurationError)):
            await run()
        assert got == ["42"]

    async def test_a_store_that_goes_away(self, world: World) -> None:
        manager = await world.manager()
        inserted = 0

        async def third_fails() -> None:
            nonlocal inserted
            inserted += 1
            if inserted == 3:
                raise BackendUnavailable("the store is away")

        world.backend.before["insert"] = third_fails
        got: list[VerificationToken] = []

        async def run() -> None:
            async for token in manager.issue_many(people(10), "a"):
                got.append(token)  # noqa: PERF401  # what came before the error counts

        await refused(BackendUnavailable, run())
        assert len(got) == 2
        assert {stored.id for stored in await world.stored() if stored.is_active} == {t.id for t in got}

    async def test_cancelled(self, world: World) -> None:
        manager = await world.manager()
        reached = asyncio.Event()

        async def hang() -> None:
            reached.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(all_of(manager, people(5)))
        inserted = 0

        async def hang_at_the_fourth() -> None:
            nonlocal inserted
            inserted += 1
            if inserted == 4:
                await hang()

        world.backend.before["insert"] = hang_at_the_fourth
        await reached.wait()
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert len(await world.stored()) == 4
        assert not [stored for stored in await world.stored() if stored.is_active]  # nobody has their keys


class TestABatch:
    async def test_the_same_call_again_creates_and_charges_nothing_twice(self, world: World) -> None:
        policy = TokenPolicy(
            "invite", key_storage="derived", cooldown="1h", issue_limits=[Limit(COUNT, "1d", by="slug")]
        )
        manager = await world.manager(policy)
        first = await all_of(manager, people(), batch="spring-26")
        again = await all_of(manager, people(), batch="spring-26")
        assert first == again
        assert [token.key for token in first] == [token.key for token in again]
        assert len(await world.stored()) == COUNT
        assert world.event_names.count("issued") == COUNT
        assert {event.batch for event in world.events} == {"spring-26"}

    async def test_beside_the_first(self, world: World) -> None:
        managers = [await world.manager(DERIVED) for _ in range(3)]
        world.backend.before["insert"] = lambda: asyncio.sleep(0)
        runs = await asyncio.gather(*[all_of(manager, people(50), batch="b") for manager in managers])
        assert len({tuple(token.key for token in run) for run in runs}) == 1
        assert len(await world.stored()) == 50

    async def test_after_a_crash_and_over_a_limit_it_goes_on(self, world: World) -> None:
        policy = TokenPolicy("invite", key_storage="derived", issue_limits=[Limit(20, "1h", by="slug")])
        manager = await world.manager(policy)
        got: dict[str, str | None] = {}

        async def run() -> None:
            async for token in manager.issue_many(people(50), "invite", batch="b"):
                assert got.setdefault(token.object_id, token.key) == token.key

        for hour in range(3):
            if hour < 2:
                await refused(CooldownActive, run())
                assert len(got) == 20 * (hour + 1)
            else:
                await run()
            world.clock.advance(60 * MINUTE)
        assert len(got) == len(await world.stored()) == 50
        assert None not in got.values()

    async def test_those_that_are_over_come_without_a_key(self, world: World) -> None:
        manager = await world.manager(DERIVED)
        first = await all_of(manager, people(4), batch="b")
        await manager.consume(people()[0], "invite", first[0].key)
        await manager.deactivate(people()[1])
        await manager.issue(people()[2], "invite")
        again = await all_of(manager, people(4), batch="b")
        assert again == first
        assert [token.key for token in again] == [None, None, None, first[3].key]
        assert await reason(manager.consume(people()[0], "invite", first[0].key)) == "used"

    async def test_another_batch_object_or_purpose_has_other_keys(self, world: World) -> None:
        manager = await world.manager(DERIVED, TokenPolicy("other", key_storage="derived"))
        keys = [
            token.key
            for batch, slug in (("a", "invite"), ("b", "invite"), ("a", "other"))
            for token in await all_of(manager, people(3), slug, batch=batch)
        ]
        assert len(set(keys)) == 9

    async def test_pairs_and_codes(self, world: World) -> None:
        pair, code = (
            TokenPolicy.pair("pair", key_storage="derived"),
            TokenPolicy.code("code", key_storage="derived"),
        )
        manager = await world.manager(pair, code)
        for slug in ("pair", "code"):
            first, again = [await all_of(manager, people(3), slug, batch="b") for _ in range(2)]
            assert [(token.key, token.code) for token in first] == [
                (token.key, token.code) for token in again
            ]

    async def test_a_secret_that_is_gone_invites_nobody_twice(self, any_world: World) -> None:
        old, middle, new = (f"a-secret-of-the-batch-{n}-0123456789-abc" for n in range(3))

        async def run(count: int, secret: str, *previous: str) -> list[str | None]:
            settings = Settings(secret=secret, previous_secrets=previous)
            manager = await any_world.manager(DERIVED, settings=settings)
            return [token.key for token in await all_of(manager, people(count), batch="b")]

        first = await run(3, old)
        second = await run(4, middle, old)
        assert second[:3] == first
        assert await run(5, new, middle, old) == await run(5, new, old, middle)
        before = await any_world.stored()
        assert len(before) == 5
        for secrets in ((old,), (middle, old), (new,), (new, middle), (new, old)):
            error = await refused(ConfigurationError, run(5, *secrets))
            assert "a secret that is not configured" in str(error)
            assert not any(secret in str(error) for secret in (old, middle, new))
        assert await any_world.stored() == before

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            (TokenPolicy("invite", key_storage="derived"), TokenPolicy.link("invite", prefix="acme_")),
            (TokenPolicy.code("invite", digits=6), TokenPolicy.code("invite", digits=8)),
        ],
    )
    async def test_keys_of_another_form_invite_nobody_twice(
        self, any_world: World, before: TokenPolicy, after: TokenPolicy
    ) -> None:
        before, after = (replace(policy, key_storage="derived") for policy in (before, after))
        first = await all_of(await any_world.manager(before), people(3), batch="b")
        manager = await any_world.manager(after)
        assert "policy" in str(await refused(ConfigurationError, all_of(manager, people(3), batch="b")))
        assert sorted(one.id for one in await any_world.stored()) == sorted(token.id for token in first)
        assert len(await all_of(manager, people(3), batch="another")) == 3

    async def test_a_link_that_became_a_pair_is_recognised(self, any_world: World) -> None:
        first = await all_of(await any_world.manager(DERIVED), people(3), batch="b")
        pair = await any_world.manager(TokenPolicy.pair("invite", key_storage="derived"))
        assert [token.key for token in await all_of(pair, people(3), batch="b")] == [one.key for one in first]

    @pytest.mark.parametrize("batch", ["", "a" * 129, "a\0", 5, b"b", "\ud800"])
    async def test_out_of_range(self, world: World, batch: Any) -> None:
        await refused(InvalidInput, all_of(await world.manager(DERIVED), people(1), batch=batch))

    async def test_it_needs_derived_keys_and_replaces(self, world: World) -> None:
        manager = await world.manager(DERIVED)
        await refused(ConfigurationError, all_of(manager, people(1), "digest", batch="b"))
        await refused(InvalidInput, all_of(manager, people(1), batch="b", replace=False))
        assert await world.stored() == []
