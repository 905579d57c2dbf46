"""Batching: what shares a batch, what each caller gets, what a cancellation leaves."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import itertools
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import pytest

from vtoken.errors import BackendError, BackendUnavailable
from vtoken_backends.batching import MAX_BATCH, MAX_WAITING, Batcher

from .loops import MODE


class Store:
    """Remembers its batches, and holds each until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.may_go = asyncio.Event()
        self.failure: Exception | None = None

    async def __call__(self, operations: Sequence[int]) -> Sequence[int | BaseException]:
        self.batches.append(list(operations))
        await self.may_go.wait()
        if self.failure is not None:
            raise self.failure
        return [BackendUnavailable("odd") if op % 2 else op * 10 for op in operations]


@pytest.fixture(params=[False, True], ids=["by a task", "by its caller"])
def by_caller(request: pytest.FixtureRequest) -> bool:
    """Who carries a lone operation."""
    return bool(request.param)


async def let_tasks_run() -> None:
    """Let every task go as far as it can."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_an_operation_that_comes_alone_goes_at_once(by_caller: bool) -> None:
    store = Store()
    task = asyncio.create_task(Batcher(store, by_caller=by_caller).submit(2))
    await let_tasks_run()
    assert store.batches == [[2]]
    store.may_go.set()
    assert await task == 20


async def test_after_a_shared_batch_callers_collect_again() -> None:
    store = Store()
    batcher = Batcher(store, by_caller=True)

    async def go_on(op: int) -> None:
        for _ in range(3):
            await batcher.submit(op)

    tasks = [asyncio.create_task(go_on(op)) for op in (2, 4, 6)]
    await let_tasks_run()
    store.may_go.set()
    await asyncio.gather(*tasks)
    # The very first one came alone; from then on nobody runs ahead of the others. An eager driver begins
    # before that first caller comes again.
    expected = [1, 2, 3, 3] if MODE == "eager" else [1, 3, 3, 2]
    assert [len(batch) for batch in store.batches] == expected


async def test_while_one_batch_is_away_the_next_collects_in_order(by_caller: bool) -> None:
    store = Store()
    batcher = Batcher(store, max_batch=3, by_caller=by_caller)
    tasks = [asyncio.create_task(batcher.submit(2))]
    await let_tasks_run()
    tasks += [asyncio.create_task(batcher.submit(op)) for op in (4, 6, 8, 10)]
    await let_tasks_run()
    assert store.batches == [[2]]
    store.may_go.set()
    assert await asyncio.gather(*tasks) == [20, 40, 60, 80, 100]
    assert store.batches == [[2], [4, 6, 8], [10]]


async def test_a_second_batch_starts_only_when_it_is_full() -> None:
    store = Store()
    batcher = Batcher(store, max_batch=3, in_flight=2)
    tasks = [asyncio.create_task(batcher.submit(2))]
    await let_tasks_run()
    tasks += [asyncio.create_task(batcher.submit(op)) for op in (4, 6)]
    await let_tasks_run()
    assert store.batches == [[2]]
    tasks += [asyncio.create_task(batcher.submit(op)) for op in (8, 10, 12, 14, 16)]
    await let_tasks_run()
    assert store.batches == [[2], [4, 6, 8]]  # and no third one, full as it is
    store.may_go.set()
    assert await asyncio.gather(*tasks) == [20, 40, 60, 80, 100, 120, 140, 160]
    assert store.batches == [[2], [4, 6, 8], [10, 12, 14], [16]]


async def test_an_operation_fails_by_itself(by_caller: bool) -> None:
    store = Store()
    batcher = Batcher(store, by_caller=by_caller)
    tasks = [asyncio.create_task(batcher.submit(3))]
    await let_tasks_run()
    tasks += [asyncio.create_task(batcher.submit(op)) for op in (2, 5, 4)]
    await let_tasks_run()
    store.may_go.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert store.batches == [[3], [2, 5, 4]]
    assert [type(answer) for answer in answers] == [BackendUnavailable, int, BackendUnavailable, int]
    assert answers[1::2] == [20, 40]


async def test_a_failed_batch_fails_for_each_with_an_error_of_its_own(by_caller: bool) -> None:
    store = Store()
    store.may_go.set()
    store.failure = BackendUnavailable("no server")
    batcher = Batcher(store, by_caller=by_caller)
    answers = await asyncio.gather(*(batcher.submit(op) for op in (2, 4)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [BackendUnavailable] * 2
    assert [str(answer) for answer in answers] == ["no server"] * 2
    assert len({id(answer) for answer in answers}) == 2


async def test_an_unexpected_failure_is_a_backend_error_that_tells_no_value(by_caller: bool) -> None:
    store = Store()
    store.may_go.set()
    store.failure = OverflowError("12345 is too much")
    with pytest.raises(BackendError, match="OverflowError") as caught:
        await Batcher(store, by_caller=by_caller).submit(2)
    assert "12345" not in str(caught.value)
    assert caught.value.__cause__ is None


async def test_answers_that_are_missing_leave_nobody_waiting() -> None:
    async def flush(operations: Sequence[int]) -> Sequence[int]:
        return list(operations)[1:]

    batcher: Batcher[int, int] = Batcher(flush)
    async with asyncio.timeout(10):
        answers = await asyncio.gather(*map(batcher.submit, range(40)), return_exceptions=True)
    assert {type(answer) for answer in answers} == {BackendError}


async def test_cancelled_while_waiting_it_is_left_out(by_caller: bool) -> None:
    store = Store()
    batcher = Batcher(store, by_caller=by_caller)
    first = asyncio.create_task(batcher.submit(2))
    await let_tasks_run()
    second, third = (asyncio.create_task(batcher.submit(op)) for op in (4, 6))
    await let_tasks_run()
    second.cancel()
    await let_tasks_run()
    store.may_go.set()
    assert (await first, await third) == (20, 60)
    assert store.batches == [[2], [6]]
    assert second.cancelled()


async def test_cancelled_in_flight_the_batch_stays_whole(by_caller: bool) -> None:
    store = Store()
    batcher = Batcher(store, by_caller=by_caller)
    tasks = [asyncio.create_task(batcher.submit(op)) for op in (2, 4, 6)]
    await let_tasks_run()
    tasks[0].cancel()  # the one that set it off
    await let_tasks_run()
    assert tasks[0].cancelled()
    store.may_go.set()
    assert await asyncio.gather(*tasks[1:]) == [40, 60]
    assert [op for batch in store.batches for op in batch] == [2, 4, 6]
    assert await batcher.submit(8) == 80


async def test_a_full_queue_makes_callers_wait_and_loses_none(by_caller: bool) -> None:
    store = Store()
    batcher = Batcher(store, by_caller=by_caller)
    count = MAX_WAITING * 2 + 500
    tasks = [asyncio.create_task(batcher.submit(2 * op)) for op in range(count)]
    await let_tasks_run()
    store.may_go.set()
    answers = await asyncio.gather(*tasks)
    assert answers == [20 * op for op in range(count)]
    assert max(map(len, store.batches)) == MAX_BATCH


@pytest.mark.loops("", "uvloop")  # an eager task has begun when it is made
async def test_a_driver_cancelled_before_it_begins_leaves_nobody_waiting() -> None:
    store = Store()
    store.may_go.set()
    batcher = Batcher(store)
    before = asyncio.all_tasks()
    waiting = asyncio.ensure_future(batcher.submit(2))
    await asyncio.sleep(0)
    [driver] = asyncio.all_tasks() - before - {waiting}
    driver.cancel()
    assert await waiting == 20
    assert await batcher.submit(4) == 40


def test_what_is_asked_while_a_loop_ends_is_carried(by_caller: bool) -> None:
    done: list[object] = []
    tasks: list[asyncio.Task[None]] = []

    async def use() -> None:
        store = Store()
        batcher = Batcher(store, by_caller=by_caller)

        async def give_back(op: int) -> None:
            try:
                await batcher.submit(op)
            finally:
                store.may_go.set()
                done.append(await batcher.submit(op + 10))

        tasks.extend(asyncio.create_task(give_back(op)) for op in (2, 4, 6))
        await let_tasks_run()

    asyncio.run(use())  # cancels all that is left, and waits for it
    assert sorted(str(answer) for answer in done) == ["120", "140", "160"]


def test_a_loop_that_ends_in_mid_batch_leaves_nobody_waiting() -> None:
    batchers: list[Batcher[int, int]] = []
    waiting: list[asyncio.Task[int]] = []

    async def begin() -> None:
        store = Store()  # never lets go
        batchers.append(Batcher(store))
        waiting.extend(asyncio.create_task(batchers[0].submit(op)) for op in (2, 4))
        await let_tasks_run()

    asyncio.run(begin())  # cancels all that is left
    assert all(task.cancelled() for task in waiting)

    async def go_on() -> int:
        store = Store()
        store.may_go.set()
        batchers[0]._flush = store  # pyright: ignore[reportPrivateUsage]  # a store that answers again
        return await batchers[0].submit(6)

    assert asyncio.run(go_on()) == 60


def test_no_event_loop_is_kept_alive() -> None:
    batchers: list[Batcher[int, int]] = []

    async def use() -> weakref.ref[asyncio.AbstractEventLoop]:
        store = Store()
        store.may_go.set()
        batchers.append(Batcher(store))
        assert await batchers[0].submit(2) == 20
        return weakref.ref(asyncio.get_running_loop())

    loop = asyncio.run(use())
    gc.collect()
    assert loop() is None


caller = contextvars.ContextVar("caller", default="nobody")


async def test_no_context_variable_of_a_caller_reaches_a_batch() -> None:
    seen: list[str] = []

    async def flush(operations: Sequence[int]) -> Sequence[int]:
        seen.append(caller.get())
        await let_tasks_run()
        return operations

    batcher = Batcher(flush)

    async def submit(op: int) -> None:
        caller.set(f"caller {op}")
        await batcher.submit(op)

    await asyncio.gather(*(submit(op) for op in range(5)))
    await submit(5)
    # An eager driver begins with the first operation, before the others come.
    assert seen == ["nobody"] * (3 if MODE == "eager" else 2)


async def test_a_caller_that_outlasts_its_batch_is_cancelled_after_it() -> None:
    store = Store()
    batcher = Batcher(store, outlast=True)
    in_flight = asyncio.create_task(batcher.submit(2))
    await let_tasks_run()
    waiting = asyncio.create_task(batcher.submit(4))
    await let_tasks_run()
    for _ in range(3):
        in_flight.cancel()
        waiting.cancel()
        await let_tasks_run()
    assert not in_flight.done()
    assert waiting.cancelled()
    store.may_go.set()
    await let_tasks_run()
    assert in_flight.cancelled()
    assert store.batches == [[2]]


def play(loop: asyncio.AbstractEventLoop) -> list[int]:
    async def submit_many() -> list[int]:
        store = Store()
        store.may_go.set()
        batcher = Batcher(store)
        return await asyncio.gather(*(batcher.submit(2 * op) for op in range(500)))

    with contextlib.closing(loop):
        return loop.run_until_complete(submit_many())


def test_under_eager_tasks_every_operation_is_answered() -> None:
    # Eager tasks come with Python 3.12. Before it, this is the test of a batch whose store never waits.
    loop = asyncio.new_event_loop()
    if sys.version_info >= (3, 12):
        loop.set_task_factory(asyncio.eager_task_factory)
    assert play(loop) == [20 * op for op in range(500)]


@pytest.mark.loops("", "eager")  # uvloop gives every factory a context
def test_a_task_factory_that_knows_no_context_will_do() -> None:
    def factory(loop: asyncio.AbstractEventLoop, coroutine: Any) -> asyncio.Task[Any]:
        return asyncio.Task(coroutine, loop=loop)

    loop = asyncio.new_event_loop()
    loop.set_task_factory(factory)
    assert play(loop) == [20 * op for op in range(500)]


async def test_callers_are_woken_up_in_parts_where_the_next_batch_is_under_way() -> None:
    """What hundreds of them do next would hold the event loop up in one turn."""
    store = Store()
    batcher = Batcher(store)
    first = asyncio.create_task(batcher.submit(0))
    await let_tasks_run()  # its batch is under way, so that those that come now fill two
    tasks = [asyncio.create_task(batcher.submit(2 * n)) for n in range(2 * MAX_BATCH)]
    for _ in range(2):  # the first batch, and the full one after it
        await let_tasks_run()
        store.may_go.set()
        store.may_go.clear()
    assert await first == 0
    done = [0]
    while done[-1] < MAX_BATCH:
        await asyncio.sleep(0)
        done.append(sum(task.done() for task in tasks))
    assert max(later - before for before, later in itertools.pairwise(done)) <= MAX_BATCH // 2
    store.may_go.set()
    assert [await task for task in tasks] == [20 * n for n in range(len(tasks))]
