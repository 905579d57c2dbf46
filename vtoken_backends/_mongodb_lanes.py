"""Gathering in the MongoDB backend: operations of one kind share their commands.

A lane sends one batch after the other. There are a few for each kind, because most of a batch's time is the
server's: while it works on one, the next is made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from operator import attrgetter
from typing import Final, Generic, TypeVar, cast

from vtoken.errors import BackendClosed, BackendUnavailable, OutcomeUnknown
from vtoken_backends._mongodb_link import outlast
from vtoken_backends.gathering import Gatherer

_Op = TypeVar("_Op")
_Answer = TypeVar("_Answer")

_LANES: Final = 2
_MAX_BATCH: Final = 128
"""Measured with 256 tasks: smaller batches send more commands, larger ones wait longer for the last."""


class _Call(Generic[_Op]):
    """An operation, and the trip that carries it once it is on its way."""

    __slots__ = ("op", "trip")

    def __init__(self, op: _Op) -> None:
        self.op = op
        self.trip: asyncio.Future[None] | None = None


class Lanes(Generic[_Op, _Answer]):
    """Carries operations of one kind, alone or many together.

    Args:
        alone: carries one operation.
        many: carries two or more, and returns an answer, or an exception, for each. A refusal that it
            raises for all of them has changed nothing.
        reads: they leave nothing behind when they are cut short, so that one alone needs no task of its own.
    """

    def __init__(
        self,
        alone: Callable[[_Op], Awaitable[_Answer]],
        many: Callable[[Sequence[_Op]], Awaitable[Sequence[_Answer | BaseException]]],
        *,
        reads: bool = False,
    ) -> None:
        self._lanes = [_Lane(alone, many) for _ in range(_LANES)]
        self._alone = alone
        self._reads = reads

    async def submit(self, op: _Op) -> _Answer:
        """Have an operation carried, and return its answer.

        Cancelled while it waits, it is left out. Cancelled on its way, the cancellation is raised once
        the trip has ended.
        """
        lane = min(self._lanes, key=_load)
        task = cast("asyncio.Task[object]", asyncio.current_task())
        # Not with a cancellation that is to come at the first await: PyMongo could swallow it unnoticed.
        goes_directly = self._reads and not lane.load and not task.cancelling()
        lane.load += 1
        call = _Call(op)
        try:
            if goes_directly:
                return await self._directly(op, task)
            return cast("_Answer", await lane.gatherer.submit(call))
        except asyncio.CancelledError:
            if call.trip is not None:
                await outlast(call.trip)
            raise
        finally:
            lane.load -= 1

    async def _directly(self, op: _Op, task: asyncio.Task[object]) -> _Answer:
        answer = await self._alone(op)
        if task.cancelling():  # PyMongo swallows some
            raise asyncio.CancelledError
        return answer


_load: Final = attrgetter("load")


class _Lane(Generic[_Op, _Answer]):
    def __init__(
        self,
        alone: Callable[[_Op], Awaitable[_Answer]],
        many: Callable[[Sequence[_Op]], Awaitable[Sequence[_Answer | BaseException]]],
    ) -> None:
        self.load = 0
        self.gatherer = Gatherer(self._carry, _MAX_BATCH)
        self._alone = alone
        self._many = many

    async def _carry(self, calls: Sequence[_Call[_Op]]) -> Sequence[_Answer | BaseException]:
        trip: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for call in calls:
            call.trip = trip
        try:
            if len(calls) == 1:
                return [await self._alone(calls[0].op)]
            return await self._together([call.op for call in calls])
        finally:
            trip.set_result(None)

    async def _together(self, ops: Sequence[_Op]) -> Sequence[_Answer | BaseException]:
        try:
            return await self._many(ops)
        except (BackendClosed, BackendUnavailable, OutcomeUnknown):
            raise
        except Exception:  # noqa: S110  # each gets its own answer, or error, below
            pass
        # Refused as a whole, perhaps for the sake of one: nobody may fail for a neighbour's reason.
        return await each(self._alone(op) for op in ops)


async def each(steps: Iterable[Awaitable[_Answer]]) -> list[_Answer | BaseException]:
    """Await all, side by side; an exception is the answer of its own step."""
    return await asyncio.gather(*steps, return_exceptions=True)
