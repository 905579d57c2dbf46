"""Gathering: what shares a trip, what each caller gets, what a cancellation leaves."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Sequence

import pytest

from vtoken.errors import BackendError, BackendUnavailable
from vtoken_backends.gathering import MAX_BATCH, MAX_WAITING, Gatherer


class Carrier:
    """Remembers its batches, and holds each until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.may_go = asyncio.Event()
        self.failure: Exception | None = None

    async def __call__(self, operations: Sequence[int]) -> Sequence[object]:
        self.batches.append(list(operations))
        await self.may_go.wait()
        if self.failure is not None:
            raise self.failure
        return [BackendUnavailable("odd") if op % 2 else op * 10 for op in operations]


@pytest.fixture(params=[False, True], ids=["by a task", "by its caller"])
def by_caller(request: pytest.FixtureRequest) -> bool:
    """Who carries a lone operation."""
    return bool(request.param)


async def settle() -> None:
    """Let every task go as far as it can."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_lone_operation_goes_at_once(by_caller: bool) -> None:
    carrier = Carrier()
    task = asyncio.create_task(Gatherer(carrier, by_caller=by_caller).submit(2))
    await settle()
    assert carrier.batches == [[2]]
    carrier.may_go.set()
    assert await task == 20


async def test_after_a_shared_trip_callers_collect_again() -> None:
    carrier = Carrier()
    gatherer = Gatherer(carrier, by_caller=True)

    async def go_on(op: int) -> None:
        for _ in range(3):
            await gatherer.submit(op)

    tasks = [asyncio.create_task(go_on(op)) for op in (2, 4, 6)]
    await settle()
    carrier.may_go.set()
    await asyncio.gather(*tasks)
    # The very first one came alone; from then on nobody runs ahead of the others.
    assert [len(batch) for batch in carrier.batches] == [1, 3, 3, 2]


async def test_while_one_batch_is_away_the_next_collects_in_order(by_caller: bool) -> None:
    carrier = Carrier()
    gatherer = Gatherer(carrier, max_batch=3, by_caller=by_caller)
    tasks = [asyncio.create_task(gatherer.submit(2))]
    await settle()
    tasks += [asyncio.create_task(gatherer.submit(op)) for op in (4, 6, 8, 10)]
    await settle()
    assert carrier.batches == [[2]]
    carrier.may_go.set()
    assert await asyncio.gather(*tasks) == [20, 40, 60, 80, 100]
    assert carrier.batches == [[2], [4, 6, 8], [10]]


async def test_a_second_trip_sets_off_only_when_it_is_full() -> None:
    carrier = Carrier()
    gatherer = Gatherer(carrier, max_batch=3, trips=2)
    tasks = [asyncio.create_task(gatherer.submit(2))]
    await settle()
    tasks += [asyncio.create_task(gatherer.submit(op)) for op in (4, 6)]
    await settle()
    assert carrier.batches == [[2]]
    tasks += [asyncio.create_task(gatherer.submit(op)) for op in (8, 10, 12, 14, 16)]
    await settle()
    assert carrier.batches == [[2], [4, 6, 8]]  # and no third one, full as it is
    carrier.may_go.set()
    assert await asyncio.gather(*tasks) == [20, 40, 60, 80, 100, 120, 140, 160]
    assert carrier.batches == [[2], [4, 6, 8], [10, 12, 14], [16]]


async def test_an_operation_fails_by_itself(by_caller: bool) -> None:
    carrier = Carrier()
    gatherer = Gatherer(carrier, by_caller=by_caller)
    tasks = [asyncio.create_task(gatherer.submit(3))]
    await settle()
    tasks += [asyncio.create_task(gatherer.submit(op)) for op in (2, 5, 4)]
    await settle()
    carrier.may_go.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert carrier.batches == [[3], [2, 5, 4]]
    assert [type(answer) for answer in answers] == [BackendUnavailable, int, BackendUnavailable, int]
    assert answers[1::2] == [20, 40]


async def test_a_failed_trip_fails_for_each_with_an_error_of_its_own(by_caller: bool) -> None:
    carrier = Carrier()
    carrier.may_go.set()
    carrier.failure = BackendUnavailable("no server")
    gatherer = Gatherer(carrier, by_caller=by_caller)
    answers = await asyncio.gather(*(gatherer.submit(op) for op in (2, 4)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [BackendUnavailable] * 2
    assert [str(answer) for answer in answers] == ["no server"] * 2
    assert len({id(answer) for answer in answers}) == 2


async def test_an_unexpected_failure_is_a_backend_error_that_tells_no_value(by_caller: bool) -> None:
    carrier = Carrier()
    carrier.may_go.set()
    carrier.failure = OverflowError("12345 is too much")
    with pytest.raises(BackendError, match="OverflowError") as caught:
        await Gatherer(carrier, by_caller=by_caller).submit(2)
    assert "12345" not in str(caught.value)
    assert caught.value.__cause__ is None


async def test_cancelled_while_waiting_it_is_left_out(by_caller: bool) -> None:
    carrier = Carrier()
    gatherer = Gatherer(carrier, by_caller=by_caller)
    first = asyncio.create_task(gatherer.submit(2))
    await settle()
    second, third = (asyncio.create_task(gatherer.submit(op)) for op in (4, 6))
    await settle()
    second.cancel()
    await settle()
    carrier.may_go.set()
    assert (await first, await third) == (20, 60)
    assert carrier.batches == [[2], [6]]
    assert second.cancelled()


async def test_cancelled_on_its_way_the_batch_stays_whole(by_caller: bool) -> None:
    carrier = Carrier()
    gatherer = Gatherer(carrier, by_caller=by_caller)
    tasks = [asyncio.create_task(gatherer.submit(op)) for op in (2, 4, 6)]
    await settle()
    tasks[0].cancel()  # the one that set it off
    await settle()
    assert tasks[0].cancelled()
    carrier.may_go.set()
    assert await asyncio.gather(*tasks[1:]) == [40, 60]
    assert [op for batch in carrier.batches for op in batch] == [2, 4, 6]
    assert await gatherer.submit(8) == 80


async def test_a_full_queue_makes_callers_wait_and_loses_none(by_caller: bool) -> None:
    carrier = Carrier()
    gatherer = Gatherer(carrier, by_caller=by_caller)
    count = MAX_WAITING * 2 + 500
    tasks = [asyncio.create_task(gatherer.submit(2 * op)) for op in range(count)]
    await settle()
    carrier.may_go.set()
    answers = await asyncio.gather(*tasks)
    assert answers == [20 * op for op in range(count)]
    assert max(map(len, carrier.batches)) == MAX_BATCH


async def test_a_driver_cancelled_before_it_begins_leaves_nobody_waiting() -> None:
    carrier = Carrier()
    carrier.may_go.set()
    gatherer = Gatherer(carrier)
    before = asyncio.all_tasks()
    waiting = asyncio.ensure_future(gatherer.submit(2))
    await asyncio.sleep(0)
    [driver] = asyncio.all_tasks() - before - {waiting}
    driver.cancel()
    assert await waiting == 20
    assert await gatherer.submit(4) == 40


def test_what_is_asked_while_a_loop_ends_is_carried(by_caller: bool) -> None:
    done: list[object] = []
    tasks: list[asyncio.Task[None]] = []

    async def use() -> None:
        carrier = Carrier()
        gatherer = Gatherer(carrier, by_caller=by_caller)

        async def give_back(op: int) -> None:
            try:
                await gatherer.submit(op)
            finally:
                carrier.may_go.set()
                done.append(await gatherer.submit(op + 10))

        tasks.extend(asyncio.create_task(give_back(op)) for op in (2, 4, 6))
        await settle()

    asyncio.run(use())  # cancels all that is left, and waits for it
    assert sorted(str(answer) for answer in done) == ["120", "140", "160"]


def test_a_loop_that_ends_in_mid_trip_leaves_nobody_waiting() -> None:
    gatherers: list[Gatherer[int]] = []
    waiting: list[asyncio.Task[object]] = []

    async def begin() -> None:
        carrier = Carrier()  # never lets go
        gatherers.append(Gatherer(carrier))
        waiting.extend(asyncio.create_task(gatherers[0].submit(op)) for op in (2, 4))
        await settle()

    asyncio.run(begin())  # cancels all that is left
    assert all(task.cancelled() for task in waiting)

    async def go_on() -> object:
        carrier = Carrier()
        carrier.may_go.set()
        gatherers[0]._carry = carrier  # pyright: ignore[reportPrivateUsage]  # a store that answers again
        return await gatherers[0].submit(6)

    assert asyncio.run(go_on()) == 60


def test_no_event_loop_is_kept_alive() -> None:
    gatherers: list[Gatherer[int]] = []

    async def use() -> weakref.ref[asyncio.AbstractEventLoop]:
        carrier = Carrier()
        carrier.may_go.set()
        gatherers.append(Gatherer(carrier))
        assert await gatherers[0].submit(2) == 20
        return weakref.ref(asyncio.get_running_loop())

    loop = asyncio.run(use())
    gc.collect()
    assert loop() is None
