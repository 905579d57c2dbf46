"""Batching: concurrent operations share one round trip to the store.

1. An operation that comes alone is flushed at once; there is no timer.
2. While a batch is in flight, operations that come collect. They are the next batch.
3. Nobody is told of success before the flush that holds the operation has returned.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final, Generic, TypeVar
from weakref import WeakKeyDictionary

import anyio

from vtoken.errors import BackendError

Op = TypeVar("Op")
Answer = TypeVar("Answer")

MAX_BATCH: Final = 128
"""Operations in one batch. Batches of twice that many gained nothing, and held the event loop up for twice as
long when their answers came (tests/benchmarks, beside a ticker)."""
_ANSWERED_AT_ONCE: Final = 32
"""Callers that are woken up in one turn of the event loop: about a millisecond of what they then do."""
MAX_WAITING: Final = 8192
"""Operations that wait for their batch in one event loop; further callers wait before they join."""


class _Entry(Generic[Op, Answer]):
    """An operation, the answer that its caller waits for, and the batch it is in once that is in flight."""

    __slots__ = ("answer", "batch", "op")

    def __init__(self, op: Op, answer: asyncio.Future[Answer]) -> None:
        self.op = op
        self.answer = answer
        self.batch: asyncio.Future[None] | None = None


class _Queue(Generic[Op, Answer]):
    """The operations of one event loop that wait for their batch, first come, first served."""

    def __init__(self) -> None:
        self.waiting: deque[_Entry[Op, Answer]] = deque()
        # Counted before the task is started: an eager task runs before anybody holds it.
        self.in_flight = 0
        self.drivers: set[asyncio.Task[None]] = set()
        self.is_flushed_by_caller = False
        self.latest_size = 1
        self.room = asyncio.Event()


class Batcher(Generic[Op, Answer]):
    """Collects operations and flushes them in batches.

    Args:
        flush: is given 1 to ``max_batch`` operations, in the order in which they came, and returns an answer
            for each. An answer that is an exception is raised to the caller it belongs to. What ``flush``
            itself raises is raised to every caller of the batch. It runs in a fresh context, so that no
            context variable of a caller reaches it.
        max_batch: operations in one batch, 1 or more.
        in_flight: how many batches may be in flight at once, 1 or more. A further one starts only when it is
            full, so that few callers are not split into smaller batches. ``flush`` then has to keep
            batches in order itself, where order matters.
        by_caller: after a batch of one operation let the next caller flush its own, which saves a task and
            two rounds of the event loop. It does so in its own task and context, so this is only for a
            ``flush`` that goes on, or leaves nothing behind, when it is cancelled.
        outlast: a caller that is cancelled while its operation is in flight waits until the flush has
            returned, and is cancelled then.
    """

    def __init__(
        self,
        flush: Callable[[Sequence[Op]], Awaitable[Sequence[Answer | BaseException]]],
        *,
        max_batch: int = MAX_BATCH,
        in_flight: int = 1,
        by_caller: bool = False,
        outlast: bool = False,
    ) -> None:
        self._flush = flush
        self._max_batch = max_batch
        self._in_flight = in_flight
        self._by_caller = by_caller
        self._outlast = outlast
        # One queue for each event loop: futures and tasks belong to a loop, the store serves all of them.
        self._queues: WeakKeyDictionary[asyncio.AbstractEventLoop, _Queue[Op, Answer]] = WeakKeyDictionary()

    async def submit(self, op: Op) -> Answer:
        """Have an operation flushed, and return its answer.

        An operation whose caller is cancelled while it waits is left out. One that is in flight is carried
        out all the same, and its neighbours notice nothing.
        """
        loop = asyncio.get_running_loop()
        queue = self._queues.get(loop)
        if queue is None:
            queue = self._queues[loop] = _Queue()
        if (
            self._by_caller
            and queue.latest_size == 1
            and not queue.in_flight
            and not queue.is_flushed_by_caller
        ):
            return await self._flush_own(queue, op)
        while len(queue.waiting) >= MAX_WAITING:
            queue.room.clear()
            await queue.room.wait()
        entry: _Entry[Op, Answer] = _Entry(op, loop.create_future())
        queue.waiting.append(entry)
        if self._may_start(queue):
            self._start(queue)
        try:
            return await entry.answer
        except asyncio.CancelledError:
            if self._outlast and entry.batch is not None:
                await outlast(entry.batch)
            raise

    async def _flush_own(self, queue: _Queue[Op, Answer], op: Op) -> Answer:
        queue.is_flushed_by_caller = True
        try:
            [answer] = await self._answers([op])
        finally:
            queue.is_flushed_by_caller = False
            if queue.waiting:
                self._start(queue)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _may_start(self, queue: _Queue[Op, Answer]) -> bool:
        if not queue.in_flight:
            return not queue.is_flushed_by_caller
        return queue.in_flight < self._in_flight and len(queue.waiting) >= self._max_batch

    def _start(self, queue: _Queue[Op, Answer]) -> None:
        queue.in_flight += 1
        # Entered rather than passed on: not every task factory has a parameter for the context.
        fresh = contextvars.Context()
        driver = fresh.run(asyncio.get_running_loop().create_task, self._drive(queue))
        queue.drivers.add(driver)
        driver.add_done_callback(partial(self._ended, queue))

    def _ended(self, queue: _Queue[Op, Answer], driver: asyncio.Task[None]) -> None:
        # Here and not in the driver, whose own `finally` never runs when it is cancelled before it began.
        # Somebody may still wait while an event loop ends, to release a hold, say: start another driver.
        queue.drivers.discard(driver)
        queue.in_flight -= 1
        if queue.waiting and not queue.in_flight and not queue.is_flushed_by_caller:
            self._start(queue)

    async def _drive(self, queue: _Queue[Op, Answer]) -> None:
        while queue.waiting and (queue.in_flight == 1 or len(queue.waiting) >= self._max_batch):
            entries = self._next_batch(queue)
            if not entries:
                continue
            batch: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            for entry in entries:
                entry.batch = batch
            try:
                answers = await self._answers([entry.op for entry in entries])
            except asyncio.CancelledError:  # with its event loop: nobody may wait on
                for entry in entries:
                    entry.answer.cancel()
                raise
            finally:
                batch.set_result(None)
            _deliver(entries, answers, in_parts=bool(queue.waiting))

    def _next_batch(self, queue: _Queue[Op, Answer]) -> list[_Entry[Op, Answer]]:
        entries: list[_Entry[Op, Answer]] = []
        while queue.waiting and len(entries) < self._max_batch:
            entry = queue.waiting.popleft()
            if not entry.answer.done():  # otherwise its caller was cancelled
                entries.append(entry)
        queue.room.set()
        queue.latest_size = len(entries)
        return entries

    async def _answers(self, ops: Sequence[Op]) -> Sequence[Answer | BaseException]:
        try:
            answers = await self._flush(ops)
            if len(answers) == len(ops):
                return answers
            name = "a wrong number of answers"
        except BackendError as error:
            # One for each: an exception that several tasks raise would collect all of their tracebacks.
            return [type(error)(*error.args) for _ in ops]
        except Exception as error:
            name = type(error).__name__
        return [BackendError(f"{name} in the backend") for _ in ops]


def _deliver(
    entries: Sequence[_Entry[Op, Answer]], answers: Sequence[Answer | BaseException], *, in_parts: bool
) -> None:
    """Wake the callers up: where the next batch is full of others already, so many in a turn of the loop."""
    at_once = _ANSWERED_AT_ONCE if in_parts else len(entries)
    for entry, answer in zip(entries[:at_once], answers[:at_once], strict=True):
        if entry.answer.done():
            continue
        if isinstance(answer, BaseException):
            entry.answer.set_exception(answer)
        else:
            entry.answer.set_result(answer)
    if len(entries) > at_once:
        later = partial(_deliver, entries[at_once:], answers[at_once:], in_parts=True)
        asyncio.get_running_loop().call_soon(later)


async def outlast(future: asyncio.Future[Any]) -> None:
    """Wait until a future is done, whatever cancellation comes meanwhile.

    To be called where a cancellation is being raised already, and is raised on afterwards.
    """
    while not future.done():
        # anyio's shield is for its cancel scopes; `task.cancel()` has to be caught.
        with contextlib.suppress(asyncio.CancelledError), anyio.CancelScope(shield=True):
            await asyncio.wait({future})
