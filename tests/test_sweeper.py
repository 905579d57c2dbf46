"""The sweeper: it purges while a block runs, survives errors, and stops at once, under asyncio and trio."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from vtoken import (
    BackendClosed,
    BackendUnavailable,
    InvalidInput,
    InvalidToken,
    Subject,
    TokenManager,
    TokenPolicy,
)
from vtoken.backend import Purged
from vtoken.sweeper import Sweeper

from .core_tools import MS, USER, Watched, World, refused

EVERY = timedelta(minutes=10)
BACKENDS = ["asyncio", "trio"]
both = pytest.mark.parametrize("runner", BACKENDS)


class Naps:
    """A sleep that ends when the test says so, and remembers how long it was to be."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._asleep, self._awake = anyio.Event(), anyio.Event()

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self._asleep.set()
        await self._awake.wait()

    async def asleep(self) -> None:
        """Wait until somebody sleeps."""
        await self._asleep.wait()

    async def end(self) -> None:
        """Wake the sleeper, and wait until it sleeps again."""
        await self.asleep()
        awake, self._asleep, self._awake = self._awake, anyio.Event(), anyio.Event()
        awake.set()
        await self.asleep()


class Shop:
    """An open manager with sweepers that sleep by :class:`Naps`."""

    def __init__(self) -> None:
        self.world = World()
        self.naps = Naps()

    async def sweeper(self, **keywords: Any) -> Sweeper:
        self.manager = await self.world.manager()
        return self.manager.sweeper(EVERY, sleep=self.naps, **keywords)

    @property
    def purges(self) -> int:
        return self.world.backend.calls.count("purge")


def run(runner: str, test: Callable[[Shop], Awaitable[None]]) -> None:
    """Run a test in an event loop of its own."""

    async def main() -> None:
        shop = Shop()
        with anyio.fail_after(30):  # a sweeper that does not stop fails, and does not hang
            try:
                await test(shop)
            finally:
                await shop.world.aclose()

    anyio.run(main, backend=runner)


@both
def test_it_purges_what_has_ended_longer_ago_than_keep(runner: str) -> None:
    async def test(shop: Shop) -> None:
        sweeper = await shop.sweeper(keep=timedelta(hours=1), batch_size=2)
        for number in range(5):
            await shop.manager.deactivate_and_create(USER, str(number), expiration_in_minutes=1)
        async with sweeper:
            await shop.naps.end()
            assert len(await shop.world.stored()) == 5
            shop.world.clock.advance(timedelta(hours=1, minutes=2))
            await shop.naps.end()
            assert await shop.world.stored() == []
            assert shop.world.event_names == [*["issued"] * 5, "purged"]
        assert shop.purges == 1 + 3

    run(runner, test)


async def test_a_purge_tells_how_far_it_is(world: World) -> None:
    manager = await world.manager()
    for number in range(5):
        await manager.deactivate_and_create(USER, str(number), expiration_in_minutes=1)
    world.clock.advance(timedelta(hours=1))
    told: list[int] = []
    assert await manager.purge(2, progress=told.append) == 5
    assert told == [2, 4, 5]
    assert await manager.purge(progress=told.append) == 0
    assert told == [2, 4, 5, 0]


@both
def test_the_first_purge_comes_after_a_part_of_the_period(runner: str) -> None:
    firsts: list[float] = []

    async def test(shop: Shop) -> None:
        async with await shop.sweeper():
            await shop.naps.asleep()
            assert shop.purges == 0
            for _ in range(20):
                await shop.naps.end()
            assert shop.purges == 20
        first, *others = shop.naps.seconds
        firsts.append(first)
        assert 0 <= first <= 600
        assert all(540 <= pause <= 660 for pause in others)
        assert len(set(others)) == 20

    run(runner, test)
    run(runner, test)
    assert firsts[0] != firsts[1]


@both
@pytest.mark.parametrize(
    ("error", "level"),
    [(BackendUnavailable("no server"), logging.WARNING), (ZeroDivisionError("a defect"), logging.ERROR)],
)
def test_errors_are_logged_and_survived(
    runner: str, error: Exception, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(shop: Shop) -> None:
        async with await shop.sweeper():
            shop.world.backend.failing["purge"] = error
            for _ in range(3):
                await shop.naps.end()
            shop.world.backend.failing.clear()
            assert [record.levelno for record in caplog.records] == [level] * 3
            assert caplog.text.count(type(error).__name__) >= 3
            await shop.naps.end()
        assert shop.purges == 4

    run(runner, test)


@both
def test_it_stops_with_its_block_while_it_sleeps(runner: str) -> None:
    async def test(shop: Shop) -> None:
        async with await shop.sweeper():
            await shop.naps.asleep()
        with pytest.raises(TimeoutError):  # nobody sleeps any more, so nobody wakes and sleeps again
            with anyio.fail_after(0):
                await shop.naps.end()
        assert shop.purges == 0

    run(runner, test)


@both
def test_it_stops_with_its_block_while_it_purges(runner: str) -> None:
    async def test(shop: Shop) -> None:
        purging = anyio.Event()

        async def endless() -> None:
            purging.set()
            await anyio.sleep_forever()

        sweeper = await shop.sweeper()
        shop.world.backend.before["purge"] = endless
        async with sweeper, anyio.create_task_group() as group:
            group.start_soon(shop.naps.end)
            await purging.wait()
            group.cancel_scope.cancel()
        assert shop.purges == 1

    run(runner, test)


@both
@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), KeyboardInterrupt(), SystemExit(3)])
def test_the_blocks_exception_comes_out_as_it_is(runner: str, error: BaseException) -> None:
    async def test(shop: Shop) -> None:
        async def block() -> None:
            async with await shop.sweeper():
                await shop.naps.asleep()
                raise error

        assert await refused(type(error), block()) is error

    run(runner, test)


@both
def test_an_outer_cancellation_ends_it_and_is_not_swallowed(runner: str) -> None:
    async def test(shop: Shop) -> None:
        sweeper = await shop.sweeper()
        reached: list[str] = []
        with anyio.CancelScope() as scope:
            async with sweeper:
                await shop.naps.asleep()
                scope.cancel()
                await anyio.lowlevel.checkpoint()
                reached.append("the block went on")
            reached.append("past the block")
        assert reached == []
        assert scope.cancelled_caught
        await anyio.lowlevel.checkpoint()  # nothing of the cancellation is left

    run(runner, test)


async def test_a_cancelled_task_is_cancelled(world: World) -> None:
    manager, naps = await world.manager(), Naps()

    async def block() -> None:
        async with manager.sweeper(sleep=naps):
            await asyncio.Event().wait()

    task = asyncio.create_task(block())
    await naps.asleep()
    task.cancel("by the test")
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()
    assert task.cancelling() == 1
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_asyncios_timeout_works_around_it(world: World) -> None:
    manager, naps = await world.manager(), Naps()

    async def block() -> None:
        async with asyncio.timeout(None) as timeout, manager.sweeper(sleep=naps):
            await naps.asleep()
            timeout.reschedule(asyncio.get_running_loop().time())
            await asyncio.Event().wait()

    await refused(TimeoutError, block())
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


@both
def test_two_sweepers_and_traffic_at_once(runner: str) -> None:
    async def test(shop: Shop) -> None:
        sweeper = await shop.sweeper()
        async with sweeper, shop.manager.sweeper(EVERY, sleep=shop.naps):
            issued = await shop.manager.deactivate_and_create(USER, "reset")
            await shop.naps.end()
            assert await shop.manager.consume(USER, "reset", issued.key) == issued
        assert await shop.manager.get(issued.id) == issued  # keep is a day unless said otherwise

    run(runner, test)


@both
def test_it_may_be_entered_in_one_task_and_left_in_another(runner: str) -> None:
    async def test(shop: Shop) -> None:
        sweeper, entered = await shop.sweeper(), anyio.Event()

        async def enter() -> None:
            await sweeper.__aenter__()
            entered.set()

        async with anyio.create_task_group() as group:
            group.start_soon(enter)
        await shop.naps.end()
        await sweeper.__aexit__(None, None, None)
        assert entered.is_set()
        assert shop.purges == 1
        with pytest.raises(TimeoutError), anyio.fail_after(0):
            await shop.naps.end()

    run(runner, test)


@both
def test_it_knows_nothing_of_its_callers_context(runner: str) -> None:
    variable = ContextVar("variable", default="none")

    async def test(shop: Shop) -> None:
        seen: list[str] = []

        async def note() -> None:
            seen.append(variable.get())

        sweeper = await shop.sweeper()
        shop.world.backend.before["purge"] = note
        variable.set("the caller's")
        async with sweeper:
            await shop.naps.end()
        assert seen == ["none"]

    run(runner, test)


async def test_eager_tasks(world: World) -> None:
    manager, naps = await world.manager(), Naps()
    eager: Any = getattr(asyncio, "eager_task_factory", None)  # from Python 3.12 on
    asyncio.get_running_loop().set_task_factory(eager)
    async with manager.sweeper(sleep=naps):
        await naps.end()
    assert world.backend.calls.count("purge") == 1
    assert asyncio.all_tasks() == {asyncio.current_task()}


def test_a_loop_that_shuts_down_is_not_held_up() -> None:
    """A task that is cancelled before its first step never runs, and never says that it ended."""

    async def main() -> None:
        world = World()
        async with asyncio.timeout(30), (await world.manager()).sweeper():
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
        await world.aclose()

    asyncio.run(main())


async def test_a_purge_drains_tokens_and_budgets(world: World) -> None:
    """Fault 13 of issue 11: a purge ended with the tokens, and left thousands of budgets."""
    manager = await world.manager(TokenPolicy("login", max_attempts=1))
    for number in range(25):
        wrong = manager.verify(Subject("auth.user", number), "login", "wrong")
        await refused(InvalidToken, wrong)
    await manager.issue(USER, "reset", expires_in="1m")
    world.clock.advance(timedelta(days=1, minutes=15) - MS)
    told: list[int] = []
    assert await manager.purge(10, progress=told.append) == 1
    world.clock.advance(MS)
    assert await manager.purge(10, progress=told.append) == 0
    assert told == [1, 0, 0, 0]
    purged = await world.backend.purge(0, 2**62, 100, 2**62)
    assert purged == Purged(tokens=0, budgets=0)


async def test_a_sweeper_is_for_one_block(world: World) -> None:
    sweeper = (await world.manager()).sweeper(sleep=Naps())
    async with sweeper:
        with pytest.raises(RuntimeError, match="one block"):
            await sweeper.__aenter__()


@pytest.mark.parametrize(
    "keywords",
    [
        {"every": timedelta(0)},
        {"every": 600},
        {"every": "10"},
        {"every": None},
        {"keep": timedelta(-1)},
        {"keep": 0},
        {"batch_size": 0},
        {"batch_size": True},
    ],
)
async def test_arguments_are_checked_at_once(world: World, keywords: dict[str, Any]) -> None:
    manager = await world.manager()
    with pytest.raises(InvalidInput, match=next(iter(keywords))):
        manager.sweeper(**keywords)


async def test_the_manager_must_be_open() -> None:
    with pytest.raises(BackendClosed):
        TokenManager(Watched()).sweeper()


async def test_it_sleeps_by_itself(world: World) -> None:
    purged = anyio.Event()

    async def note() -> None:
        purged.set()

    world.backend.after["purge"] = note
    async with (await world.manager()).sweeper(timedelta(milliseconds=1)):
        with anyio.fail_after(30):
            await purged.wait()
