"""Purging: once, in steps, and periodically in the background while a block of the application runs."""

from __future__ import annotations

import asyncio
import logging
import random
import sys
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Context
from datetime import timedelta
from functools import partial
from typing import Any, Self

import anyio

from vtoken import inputs
from vtoken.backend import Purged, TokenBackend
from vtoken.errors import BackendError
from vtoken.inputs import Duration
from vtoken.limits import REMEMBERED

logger = logging.getLogger("vtoken")

_JITTER = 0.1
"""By how much of ``every`` a pause is longer or shorter than it."""


async def purge_in_steps(
    store: TokenBackend, before: int, now: int, limit: int, progress: Callable[[int], object] | None
) -> Purged:
    """Purge until no token and no budget is left to be purged, and return how many of each were deleted.

    Args:
        store: open. For ``before``, ``now`` and ``limit`` see :meth:`TokenBackend.purge`.
        before: likewise.
        now: likewise.
        limit: likewise.
        progress: is told after each step how many tokens were deleted so far.
    """
    total = Purged(tokens=0, budgets=0)
    while True:
        step = await store.purge(before, now, limit, now - REMEMBERED)
        total = Purged(tokens=total.tokens + step.tokens, budgets=total.budgets + step.budgets)
        if progress is not None:
            progress(total.tokens)
        if max(step) < limit:
            return total


class Sweeper:
    """What ``TokenManager.sweeper`` returns: purges while its ``async with`` block runs.

    Args:
        purge: purges once; see ``TokenManager.purge``.
        every: from the end of a purge to the next one, 1 millisecond or more.
        keep: tokens that ended no longer ago than this stay, 0 or more.
        batch_size: how many tokens are deleted in one step, 1 or more.
        sleep: waits for so many seconds.

    Raises:
        InvalidInput: an argument is out of its range.
    """

    def __init__(
        self,
        purge: Callable[[int, Duration], Awaitable[object]],
        every: Duration,
        keep: Duration,
        batch_size: int,
        sleep: Callable[[float], Awaitable[object]],
    ) -> None:
        inputs.duration("keep", keep, least=timedelta(0))
        self._purge = partial(purge, inputs.check_count("batch_size", batch_size), keep)
        self._every = inputs.duration("every", every) / 1000
        self._sleep = sleep
        self._scope: anyio.CancelScope | None = None
        self._task: object = None

    async def __aenter__(self) -> Self:
        if self._scope is not None:
            raise RuntimeError("a sweeper is for one block: ask the manager for another one")
        self._scope, self._has_ended = anyio.CancelScope(), anyio.Event()
        # A task group would have to be left in the task that entered it; this block may be left in another.
        self._task = _start(partial(self._run, self._scope), self._has_ended)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._scope is not None  # noqa: S101  # __aenter__ has set it
        self._scope.cancel()
        with anyio.CancelScope(shield=True):
            await self._has_ended.wait()

    async def _run(self, scope: anyio.CancelScope) -> None:
        with scope:
            await self._sweep()

    async def _sweep(self) -> None:
        # Processes that were started together, by a deployment say, spread over the whole period.
        pause = self._every * random.random()  # noqa: S311  # no secret
        while True:
            await self._sleep(pause)
            try:
                await self._purge()
            except BackendError as error:
                logger.warning("a purge in the background failed; the next one will try again: %r", error)
            except Exception:  # a fault in here or in a backend must not end the application
                logger.exception("a purge in the background failed; the next one will try again")
            pause = self._every * random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311  # no secret


def _start(function: Callable[[], Coroutine[Any, Any, None]], ended: anyio.Event) -> object:
    """Start a task that outlives the caller's, without its context variables. Keep what is returned."""

    async def run() -> None:
        try:
            await function()
        finally:
            ended.set()

    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        trio: Any = sys.modules["trio"]  # the only other event loop that anyio knows
        return trio.lowlevel.spawn_system_task(run, name="vtoken sweeper", context=Context())
    task = loop.create_task(run(), name="vtoken sweeper", context=Context())
    # A task that is cancelled before its first step, as a loop does that shuts down, does not run at all.
    task.add_done_callback(lambda _: ended.set())
    return task
