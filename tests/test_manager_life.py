"""The manager's life: opened and closed, before a fork and after, and a store that fails it."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from datetime import datetime, timedelta
from typing import Any

import pytest

from vtoken import (
    BackendClosed,
    BackendError,
    BackendUnavailable,
    ConfigurationError,
    CorruptStore,
    IssuedToken,
    TokenManager,
    TokenPolicy,
    utc_now,
)
from vtoken_backends.memory import MemoryBackend

from .core_tools import (
    MS,
    START,
    USER,
    Watched,
    World,
    listed,
    redeem,
    refused,
)


async def entered(block: AbstractAsyncContextManager[object]) -> None:
    async with block:
        pass


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
        "issue": lambda: manager.issue(USER),
        "issuing": lambda: entered(manager.issuing(USER)),
        "issue_many": lambda: listed(manager.issue_many([USER])),
        "pretend": lambda: manager.pretend(USER),
        "reveal": lambda: manager.reveal(token),
        "status": lambda: manager.status(USER, None),
        "history": lambda: listed(manager.history(USER)),
        "erase": lambda: manager.erase(USER),
        "reset_limits": lambda: manager.reset_limits(USER),
        "ping": lambda: manager.ping(),
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
        assert world.backend.calls == ["open", "note", "close"]

    async def test_opens_are_counted(self, world: World) -> None:
        manager = TokenManager(world.backend)
        await manager.aclose()
        await manager.open()
        await manager.open()
        async with manager as same:
            assert same is manager
        await manager.aclose()
        assert (await manager.stats()).total == 0  # opens are counted: one is left
        await manager.aclose()
        await refused(BackendClosed, manager.stats())
        await manager.aclose()
        assert world.backend.calls == ["open", "note", "count", "close"]

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
        assert world.backend.calls == ["open", "note", "close"]

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
        # The first loop may be gone by the time the second opens, which then closes what that one left open.
        calls = [call for call in world.backend.calls if call != "close"]
        assert calls == ["open", "note", "open", "note", "count"]

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
                status = int(backend.calls != ["open", "note", "open", "note"])
            os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert backend.calls == ["open", "note"]

        async def life() -> None:
            async with manager:
                await manager.stats()

        asyncio.run(life())  # which closes what the loop that is gone has left open, too
        assert backend.calls == ["open", "note", "close", "open", "note", "count", "close"]

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
        assert world.backend.calls == ["open", "note", "close"]

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
        async with TokenManager(MemoryBackend(), clock=lambda: datetime(2100, 1, 1)) as manager:
            await refused(ConfigurationError, manager.deactivate_and_create(USER))

    def test_repr_names_the_backend(self) -> None:
        assert repr(TokenManager(MemoryBackend())) == "<TokenManager on <MemoryBackend>>"


class TestClosingBesideCalls:
    async def test_it_waits_for_calls_that_are_running(self, world: World) -> None:
        manager = TokenManager(world.backend, clock=world.clock)
        await manager.open()
        reached, go_on = asyncio.Event(), asyncio.Event()

        async def slow() -> None:
            reached.set()
            await go_on.wait()

        world.backend.before["insert"] = slow
        issuing = asyncio.create_task(manager.issue(USER))
        await reached.wait()
        closing = asyncio.create_task(manager.aclose())
        for _ in range(5):
            await asyncio.sleep(0)
        assert not closing.done()
        go_on.set()
        await closing
        assert (await issuing).key
        assert world.backend.calls[-1] == "close"

    @pytest.mark.parametrize("cancels", [1, 2, 3])
    async def test_blocks_that_are_being_cancelled_give_back(self, world: World, cancels: int) -> None:
        manager = TokenManager(world.backend, clock=world.clock)
        for _ in range(20):
            await manager.open()
            issued = await manager.issue(USER, "a")
            entered = asyncio.Event()

            async def work(key: str = issued.key, entered: asyncio.Event = entered) -> None:
                async with manager.redeem(USER, "a", key):
                    entered.set()
                    await asyncio.Event().wait()

            world.backend.before["update"] = lambda: asyncio.sleep(0)
            task = asyncio.create_task(work())
            await entered.wait()
            for _ in range(cancels):
                task.cancel()
                await asyncio.sleep(0)
            await manager.aclose()
            assert world.backend.calls[-2:] == ["update", "close"]
            await asyncio.wait([task])
            assert task.cancelled()
            async with manager:
                assert await manager.consume(USER, "a", issued.key) == issued

    async def test_a_block_that_goes_on_is_told(self, world: World, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.CRITICAL, "vtoken")
        manager = TokenManager(world.backend, clock=world.clock)
        await manager.open()
        issued = await manager.issue(USER, "a")
        block = manager.redeem(USER, "a", issued.key)
        await block.__aenter__()
        await manager.aclose()
        await refused(BackendClosed, block.__aexit__(None, None, None))

    async def test_a_cancelled_aclose_closes_all_the_same(self, world: World) -> None:
        manager = TokenManager(world.backend, clock=world.clock)
        await manager.open()
        world.backend.before["close"] = lambda: asyncio.sleep(0)
        closing = asyncio.create_task(manager.aclose())
        for _ in range(3):
            await asyncio.sleep(0)
            closing.cancel()
        await asyncio.wait([closing])
        assert closing.cancelled()
        assert world.backend.calls == ["open", "note", "close"]
        await refused(BackendClosed, manager.stats())

    async def test_another_event_loop_goes_on(self, world: World) -> None:
        manager = TokenManager(world.backend, clock=world.clock)
        await manager.open()

        async def elsewhere() -> None:
            async with manager:
                await manager.stats()

        await asyncio.to_thread(asyncio.run, elsewhere())
        assert (await manager.stats()).total == 0
        await manager.aclose()
        assert world.backend.calls.count("open") == world.backend.calls.count("close") == 2
        await refused(BackendClosed, manager.stats())

    async def test_closed_from_within_a_block(self, world: World, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.CRITICAL, "vtoken")
        manager = TokenManager(world.backend, clock=world.clock)
        await manager.open()
        issued = await manager.issue(USER, "a")

        async def work() -> None:
            async with manager.redeem(USER, "a", issued.key):
                started.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    await manager.aclose()  # which must not wait for its own block

        started = asyncio.Event()
        task = asyncio.create_task(work())
        await started.wait()
        task.cancel()
        await asyncio.wait([task], timeout=4)
        assert task.done()


async def test_a_seed_that_somebody_damaged_is_told(world: World) -> None:
    await world.backend.open()
    await world.backend.note("seed", "no seed", replace=True)
    await refused(CorruptStore, TokenManager(world.backend).open())
    assert world.backend.calls[-1] == "close"
    await world.backend.close()


async def test_backend_errors_pass_through_every_method(world: World) -> None:
    manager = await world.manager()
    token = await manager.deactivate_and_create(USER)
    for name in vars(Watched):
        world.backend.failing[name] = BackendUnavailable("the store is away")
    for name, call in every_call(manager, token).items():
        if name not in ("content_object", "verify a typing error", "reveal"):
            assert isinstance(await refused(BackendError, call()), BackendUnavailable), name
    assert isinstance(await refused(BackendError, manager.reveal(token)), BackendUnavailable)
    world.backend.failing.clear()


async def test_a_watched_backend_is_a_backend_from_a_url() -> None:
    async with TokenManager(Watched.from_url("memory://")) as manager:
        assert (await manager.stats()).total == 0
