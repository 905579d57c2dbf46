"""Gathering: concurrent operations share one trip to the store (also called micro-batching).

While one batch is on its way the next one collects. An operation that comes alone goes at once: there
is no timer. Nobody is told of success before the batch that holds the operation has returned.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final, Generic, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

from vtoken.errors import BackendError

Op = TypeVar("Op")
_Waiting: TypeAlias = "tuple[Op, asyncio.Future[object]]"

MAX_BATCH: Final = 128
"""Operations in one trip. Twice as many carried no more, and held the event loop up for twice as long when
their answers came (tests/benchmarks, beside a ticker)."""
MAX_WAITING: Final = 8192
"""Operations that wait for their trip in one event loop; further callers wait before they join."""


class _Queue(Generic[Op]):
    """The operations of one event loop that wait for their trip, first come, first served."""

    def __init__(self) -> None:
        self.waiting: deque[_Waiting[Op]] = deque()
        self.drivers: set[asyncio.Task[None]] = set()  # each has a trip on its way
        self.lone = False  # a caller carries its own operation
        self.latest = 1  # how many the latest trip carried
        self.room = asyncio.Event()


class Gatherer(Generic[Op]):
    """Carries operations to the store in batches.

    Args:
        carry: takes 1 to ``max_batch`` operations, in the order in which they came, and returns
            an answer for each; an answer that is an exception is raised to the caller it belongs to. What
            ``carry`` itself raises is raised to every caller of the batch.
        max_batch: operations in one batch, 1 or more.
        trips: how many batches may be on their way at once, 1 or more. A further one sets off only when it is
            full, so that few callers are not split into smaller batches; ``carry`` keeps them in order.
        by_caller: after a trip of one operation let the next caller carry its own, which saves a task and
            two rounds of the event loop. Only for a ``carry`` that goes on when it is cancelled, as a worker
            thread does.
    """

    def __init__(
        self,
        carry: Callable[[Sequence[Op]], Awaitable[Sequence[object]]],
        max_batch: int = MAX_BATCH,
        *,
        trips: int = 1,
        by_caller: bool = False,
    ) -> None:
        self._carry = carry
        self._max_batch = max_batch
        self._trips = trips
        self._by_caller = by_caller
        # A queue for each event loop: futures and tasks belong to one, the store serves them all.
        self._queues: WeakKeyDictionary[asyncio.AbstractEventLoop, _Queue[Op]] = WeakKeyDictionary()

    async def submit(self, op: Op) -> object:
        """Have an operation carried, and return its answer.

        Cancelled while it waits, the operation is left out; cancelled on its way, it is carried out and
        its neighbours don't notice.
        """
        loop = asyncio.get_running_loop()
        queue = self._queues.get(loop)
        if queue is None:
            queue = self._queues[loop] = _Queue()
        if self._by_caller and queue.latest == 1 and not queue.drivers and not queue.lone:
            return await self._carry_alone(queue, op)
        while len(queue.waiting) >= MAX_WAITING:
            queue.room.clear()
            await queue.room.wait()
        answer: asyncio.Future[object] = loop.create_future()
        queue.waiting.append((op, answer))
        if self._may_set_off(queue):
            self._set_off(queue)
        return await answer

    async def _carry_alone(self, queue: _Queue[Op], op: Op) -> object:
        queue.lone = True
        try:
            [answer] = await self._try([op])
        finally:
            queue.lone = False
            if queue.waiting:
                self._set_off(queue)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _may_set_off(self, queue: _Queue[Op]) -> bool:
        if not queue.drivers:
            return not queue.lone
        return len(queue.drivers) < self._trips and len(queue.waiting) >= self._max_batch

    def _set_off(self, queue: _Queue[Op]) -> None:
        driver = asyncio.get_running_loop().create_task(self._drive(queue))
        queue.drivers.add(driver)
        driver.add_done_callback(partial(self._ended, queue))

    def _ended(self, queue: _Queue[Op], driver: asyncio.Task[None]) -> None:
        # Here and not in the driver, whose own `finally` never runs when it is cancelled before it began. Who
        # still waits while an event loop ends, to give a lease back, say, gets a driver of its own.
        queue.drivers.discard(driver)
        if queue.waiting and not queue.drivers and not queue.lone:
            self._set_off(queue)

    async def _drive(self, queue: _Queue[Op]) -> None:
        batch: list[_Waiting[Op]] = []
        try:
            while queue.waiting and (len(queue.drivers) == 1 or len(queue.waiting) >= self._max_batch):
                batch = self._next_batch(queue)
                if batch:
                    _deliver(batch, await self._try([op for op, _ in batch]))
        finally:
            for _, answer in batch:  # cancelled with its event loop: nobody must wait for these
                answer.cancel()

    def _next_batch(self, queue: _Queue[Op]) -> list[_Waiting[Op]]:
        batch: list[_Waiting[Op]] = []
        while queue.waiting and len(batch) < self._max_batch:
            entry = queue.waiting.popleft()
            if not entry[1].done():  # its caller was cancelled
                batch.append(entry)
        queue.room.set()
        queue.latest = len(batch)
        return batch

    async def _try(self, batch: Sequence[Op]) -> Sequence[object]:
        try:
            return await self._carry(batch)
        except BackendError as error:
            # One for each: an exception that several tasks raise would collect all of their tracebacks.
            return [type(error)(*error.args) for _ in batch]
        except Exception as error:
            failure = error
        return [BackendError(f"{type(failure).__name__} in the backend") for _ in batch]


def _deliver(batch: list[_Waiting[Op]], answers: Sequence[object]) -> None:
    for (_, waiter), answer in zip(batch, answers, strict=True):
        if waiter.done():
            continue
        if isinstance(answer, Exception):
            waiter.set_exception(answer)
        else:
            waiter.set_result(answer)
