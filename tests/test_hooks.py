"""Events: what the hooks are told, and that they change nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Generator
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import anyio
import pytest

from vtoken import (
    ConfigurationError,
    CooldownActive,
    InvalidToken,
    LazyHook,
    Limit,
    Subject,
    TokenEvent,
    TokenManager,
    TokenPolicy,
    TooManyAttempts,
)
from vtoken_backends.memory import MemoryBackend

from .core_tools import (
    CODE,
    OTHER,
    SECRETS,
    START,
    USER,
    WRONG,
    Watched,
    World,
    reason,
    redeem,
    refused,
    wrong_codes,
)

ONE_A_MINUTE = Limit(1, "1m", by="ip")
heard_by_path: list[TokenEvent] = []


def hook_by_path(event: TokenEvent) -> None:
    heard_by_path.append(event)


class TestEvents:
    async def test_issued_verified_and_consumed(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "reset")
        await manager.verify(USER, "reset", issued.key)
        assert await manager.exists_valid(USER, "reset", issued.key)
        world.clock.advance(timedelta(seconds=1))
        await manager.consume(USER, "reset", issued.key)
        assert world.event_names == ["issued", "verified", "verified", "consumed"]
        for event in world.events:
            assert (event.content_type, event.object_id, event.slug) == ("auth.user", "42", "reset")
            assert (event.token_id, event.reason, event.count) == (issued.id, None, 1)
        assert [event.at - START for event in world.events] == [timedelta(0)] * 3 + [timedelta(seconds=1)]

    async def test_get_active_or_create_issues_once(self, world: World) -> None:
        manager = await world.manager()
        for _ in range(3):
            await manager.get_active_or_create(USER)
        assert [(event.name, event.slug) for event in world.events] == [("issued", None)]

    async def test_redeemed_is_consumed(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "reset")
        with pytest.raises(ZeroDivisionError):
            async with manager.redeem(USER, "reset", issued.key):
                raise ZeroDivisionError
        assert world.event_names == ["issued"]
        await redeem(manager, "reset", issued.key)
        assert world.event_names == ["issued", "consumed"]

    async def test_failed_with_the_reason_and_reused(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.deactivate_and_create(USER, "reset", expiration_in_minutes=1)
        await refused(InvalidToken, manager.verify(USER, "reset", WRONG))
        async with manager.redeem(USER, "reset", issued.key):
            await refused(InvalidToken, manager.verify(USER, "reset", issued.key))
        await refused(InvalidToken, manager.verify(USER, "reset", issued.key))
        other = await manager.deactivate_and_create(USER, "reset", expiration_in_minutes=1)
        world.clock.advance(timedelta(minutes=2))
        await refused(InvalidToken, manager.verify(USER, "reset", other.key))
        await manager.deactivate(USER)
        await refused(InvalidToken, manager.verify(USER, "reset", other.key))
        refusals = [(e.name, e.reason, e.token_id) for e in world.events if e.reason is not None]
        assert refusals == [
            ("failed", "unknown", None),
            ("busy", "leased", issued.id),
            ("reused", "used", issued.id),
            ("failed", "expired", other.id),
            ("failed", "inactive", other.id),
        ]

    @pytest.mark.parametrize("method", ["verify", "consume", "exists_valid"])
    async def test_a_typing_error_failed_too(self, world: World, method: str) -> None:
        manager = await world.manager(TokenPolicy("reset", prefix="vt_"))
        with suppress(InvalidToken):
            await getattr(manager, method)(USER, "reset", "vt_wrong")
        assert [(e.name, e.reason) for e in world.events] == [("failed", "unknown")]

    async def test_capped(self, world: World) -> None:
        manager = await world.manager(CODE)
        for code in wrong_codes("000000", 5):
            await refused(InvalidToken, manager.verify(USER, "login", code))
        await refused(TooManyAttempts, manager.verify(USER, "login", "000000"))
        assert world.event_names == ["failed"] * 5 + ["capped"]
        assert (world.events[-1].object_id, world.events[-1].slug) == ("42", "login")

    async def test_deactivated_with_the_number(self, world: World) -> None:
        manager = await world.manager()
        for _ in range(3):
            await manager.deactivate_and_create(USER, "a", deactivate_old_tokens=False)
        world.events.clear()
        assert await manager.deactivate(USER, "a") == 3
        assert await manager.deactivate(USER, "a") == 0
        event = TokenEvent("deactivated", START, content_type="auth.user", object_id="42", slug="a", count=3)
        assert world.events == [event]

    async def test_erased_with_the_number(self, world: World) -> None:
        manager = await world.manager()
        for slug in ("a", "b"):
            await manager.issue(USER, slug)
        world.events.clear()
        assert await manager.erase(USER) == 2
        assert [(e.name, e.object_id, e.count) for e in world.events] == [("erased", "42", 2)]

    async def test_a_use_that_is_repeated_is_told_apart(self, world: World) -> None:
        manager = await world.manager()
        issued = await manager.issue(USER, "reset")
        for _ in range(2):
            await manager.consume(USER, "reset", issued.key, consume_id="form")
        assert world.event_names == ["issued", "consumed", "replayed"]
        assert world.events[-1].token_id == issued.id

    async def test_pretended_and_revealed(self, world: World) -> None:
        manager = await world.manager(TokenPolicy.link("reset", key_storage="derived"))
        await manager.pretend(USER, "reset")
        issued = await manager.issue(USER, "reset")
        assert await manager.reveal(issued) is not None
        assert world.event_names == ["pretended", "issued", "revealed"]
        assert world.events[0].object_id is None  # a stranger's address is kept nowhere
        assert world.events[2].token_id == issued.id

    async def test_a_limit_that_refused_is_named(self, world: World) -> None:
        day = Limit(1, "1d", across="sms")
        manager = await world.manager(
            TokenPolicy.code("login", issue_limits=[day], attempt_limits=[ONE_A_MINUTE])
        )
        await manager.issue(USER, "login")
        await refused(CooldownActive, manager.issue(USER, "login"))
        assert (world.events[-1].name, world.events[-1].limit) == ("limited", day.name)
        await refused(InvalidToken, manager.verify(USER, "login", "000000", by={"ip": "192.0.2.7"}))
        await refused(TooManyAttempts, manager.verify(USER, "login", "000000", by={"ip": "192.0.2.7"}))
        assert (world.events[-1].name, world.events[-1].limit) == ("capped", ONE_A_MINUTE.name)

    async def test_issued_says_how_its_codes_are_sent_and_whether_they_can_be_used(
        self, world: World
    ) -> None:
        """Fault 16 of issue 11: fifteen codes were sent during a lock-out, and none of them was of use."""
        codes = {Subject("auth.user", 42): "123456"}
        given = TokenPolicy.code("login", channel="email", test_codes=codes, test_codes_why="review")
        manager = await world.manager(given)
        await manager.issue(USER, "login")
        await manager.issue(OTHER, "login")
        for code in wrong_codes("123456", 5):
            await refused(InvalidToken, manager.verify(USER, "login", code))
        await manager.issue(USER, "login")
        said = [
            (event.channel, event.is_test_code, event.attempts_reset_at, event.in_transaction)
            for event in world.events
            if event.name == "issued"
        ]
        assert said == [
            ("email", True, None, False),
            ("email", False, None, False),
            ("email", True, START + timedelta(minutes=15), False),
        ]

    async def test_a_batch_is_named(self, world: World) -> None:
        manager = await world.manager(TokenPolicy.link("invite", key_storage="derived"))
        async for _ in manager.issue_many([USER, OTHER], "invite", batch="spring"):
            pass
        assert [(event.name, event.batch) for event in world.events] == [("issued", "spring")] * 2

    async def test_purged_with_the_number(self, world: World) -> None:
        manager = await world.manager()
        for _ in range(3):
            await manager.deactivate_and_create(USER)
        world.events.clear()
        assert await manager.purge(batch_size=1) == 2
        assert await manager.purge() == 0
        assert world.events == [TokenEvent("purged", START, count=2)]

    async def test_an_unknown_object_is_none(self, world: World) -> None:
        manager = await world.manager()
        await refused(InvalidToken, manager.verify(Subject("auth.user"), "reset", WRONG))
        assert (world.events[0].object_id, world.events[0].content_type) == (None, "auth.user")

    async def test_no_key_and_no_digest_in_any_event(self, world: World) -> None:
        manager = await world.manager(CODE)
        keys = [(await manager.deactivate_and_create(USER, slug)).key for slug in ("login", "reset")]
        digests = [key.digest for stored in await world.stored() for key in stored.keys]
        for slug, key in zip(("login", "reset"), keys, strict=True):
            await manager.verify(USER, slug, key)
            await manager.consume(USER, slug, key, consume_id="use-canary")
            await refused(InvalidToken, manager.consume(USER, slug, key))
        assert {"issued", "verified", "consumed", "reused"} == set(world.event_names)
        for event in world.events:
            text = repr(event) + repr(asdict(event))
            for secret in (*keys, "use-canary", *(repr(d) for d in digests), *(d.hex() for d in digests)):
                assert secret not in text


async def async_hook(event: TokenEvent) -> None:
    await anyio.lowlevel.checkpoint()
    heard_by_path.append(event)


class AwaitableHook:
    """A callable object whose answer is awaitable, but no coroutine."""

    def __call__(self, event: TokenEvent) -> Awaitable[None]:
        class Answer:
            def __await__(self) -> Generator[Any, Any, None]:
                heard_by_path.append(event)
                yield from ()

        return Answer()


async def issue(*hooks: Any) -> str:
    async with TokenManager(MemoryBackend(), hooks=hooks) as manager:
        return (await manager.deactivate_and_create(USER, "reset")).id


class TestHooks:
    @pytest.mark.parametrize(
        "hook",
        [
            hook_by_path,
            async_hook,
            AwaitableHook(),
            f"{__name__}:hook_by_path",
            f"{__name__}.hook_by_path",
            LazyHook(lambda: hook_by_path),
            LazyHook(lambda: async_hook),
        ],
    )
    async def test_sync_async_lazy_or_by_path(self, hook: Any) -> None:
        heard_by_path.clear()
        token_id = await issue(hook)
        assert [event.token_id for event in heard_by_path] == [token_id]

    async def test_several_hear_in_their_order(self) -> None:
        order: list[int] = []

        def hook(n: int) -> Callable[[TokenEvent], None]:
            return lambda _: order.append(n)

        await issue(*map(hook, range(5)))
        assert order == [0, 1, 2, 3, 4]

    async def test_a_lazy_hook_is_made_once_and_only_when_there_is_an_event(self, world: World) -> None:
        made: list[int] = []
        heard: list[TokenEvent] = []

        def factory() -> Callable[[TokenEvent], None]:
            made.append(1)
            return heard.append

        async with TokenManager(world.backend, clock=world.clock, hooks=[LazyHook(factory)]) as manager:
            assert not await manager.exists_valid(USER)
            assert made == []
            for _ in range(3):
                await manager.deactivate_and_create(USER)
        assert (len(made), len(heard)) == (1, 3)

    @pytest.mark.parametrize("hook", ["nope", "no.such.hook", "vtoken:ANY", 5, None])
    async def test_what_is_no_hook_is_told_at_once(self, hook: Any) -> None:
        with pytest.raises(ConfigurationError):
            TokenManager(MemoryBackend(), hooks=[hook])

    async def test_a_failing_hook_is_logged_and_changes_nothing(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        def failing(_: TokenEvent) -> None:
            raise ZeroDivisionError("the hook's own")

        async def failing_later(_: TokenEvent) -> None:
            await anyio.lowlevel.checkpoint()
            raise ZeroDivisionError("the hook's own")

        def failing_factory() -> Any:
            raise ZeroDivisionError("the hook's own")

        heard: list[TokenEvent] = []
        manager = TokenManager(
            world.backend,
            settings=SECRETS,
            policies=[TokenPolicy("login", max_attempts=1)],
            clock=world.clock,
            hooks=[failing, failing_later, LazyHook(failing_factory), LazyHook(lambda: None), heard.append],  # type: ignore[arg-type, return-value]  # pyright: ignore[reportArgumentType]  # hooks that fail, on purpose
        )
        async with manager:
            issued = await manager.deactivate_and_create(USER, "login")
            assert await manager.verify(USER, "login", issued.key) == issued
            assert await reason(manager.verify(USER, "login", WRONG)) == "unknown"
            await refused(TooManyAttempts, manager.consume(USER, "login", issued.key))
            assert await manager.deactivate(USER) == 1
            assert await manager.purge() == 1
        assert [e.name for e in heard] == ["issued", "verified", "failed", "capped", "deactivated", "purged"]
        records = [r for r in caplog.records if r.name == "vtoken"]
        assert len(records) == 4 * len(heard)
        assert all(r.levelno == logging.ERROR and r.exc_info for r in records)

    async def test_a_cancelled_hook_cancels(self, world: World) -> None:
        started = asyncio.Event()

        async def endless(_: TokenEvent) -> None:
            started.set()
            await asyncio.Event().wait()

        async with TokenManager(world.backend, clock=world.clock, hooks=[endless]) as manager:
            task = asyncio.create_task(manager.deactivate_and_create(USER))
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert len(await world.stored()) == 1

    async def test_a_hook_that_waits_for_what_was_cancelled_has_failed(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def waiting(_: TokenEvent) -> None:
            job = asyncio.get_running_loop().create_future()
            job.cancel()
            await job

        async with TokenManager(world.backend, clock=world.clock, hooks=[waiting]) as manager:
            issued = await manager.issue(USER)
            async with manager.redeem(USER, None, issued.key):
                pass
        assert len([record for record in caplog.records if record.exc_info]) == 2

    async def test_without_hooks_no_clock_is_asked_for_an_event(self) -> None:
        asked: list[int] = []

        def clock() -> Any:
            asked.append(1)
            return START

        async with TokenManager(Watched(), clock=clock) as manager:
            await manager.deactivate_and_create(USER)
        assert len(asked) == 1
