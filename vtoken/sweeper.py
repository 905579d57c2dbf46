"""Purging: once, in steps, and periodically in the background while a block of the application runs."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial
from typing import Self

import anyio
from anyio.abc import TaskGroup

from vtoken import inputs
from vtoken.backend import TokenBackend
from vtoken.budgets import MAX_WINDOW_MS
from vtoken.errors import BackendError

logger = logging.getLogger("vtoken")

_JITTER = 0.1
"""By how much of ``every`` a pause is longer or shorter than it."""


async def purge_in_steps(
    store: TokenBackend, before: int, now: int, limit: int, progress: Callable[[int], object] | None
) -> int:
    """Purge until nothing is left to be purged, and return how many tokens were deleted.

    Args:
        store: open. For ``before``, ``now`` and ``limit`` see :meth:`TokenBackend.purge`.
        progress: is told after each step how many were deleted so far.
    """
    total = 0
    while True:
        deleted = await store.purge(before, now, limit, now - MAX_WINDOW_MS)
        total += deleted
        if progress is not None:
            progress(total)
        if deleted < limit:
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
        purge: Callable[[int, timedelta], Awaitable[object]],
        every: timedelta,
        keep: timedelta,
        batch_size: int,
        sleep: Callable[[float], Awaitable[object]],
    ) -> None:
        inputs.check_duration("keep", keep, least=timedelta(0))
        self._purge = partial(purge, inputs.check_count("batch_size", batch_size), keep)
        self._every = inputs.check_duration("every", every) / 1000
        self._sleep = sleep
        self._group: TaskGroup | None = None

    async def __aenter__(self) -> Self:
        if self._group is not None:
            raise RuntimeError("a sweeper is for one block: ask the manager for another one")
        self._group = anyio.create_task_group()
        await self._group.__aenter__()
        self._group.start_soon(self._sweep, name="vtoken sweeper")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._group is not None  # noqa: S101  # __aenter__ has set it
        self._group.cancel_scope.cancel()
        # The block's own exception is not the group's: given to it, it would come out as an ExceptionGroup.
        await self._group.__aexit__(None, None, None)

    async def _sweep(self) -> None:
        # Processes that were started together, by a deployment say, spread over the whole period.
        pause = self._every * random.random()  # noqa: S311  # no secret
        while True:
            await self._sleep(pause)
            try:
                await self._purge()
            except BackendError as error:
                logger.warning("a purge in the background failed; the next one will try again: %r", error)
            except Exception:  # a defect of ours or a backend's, and no reason to end the application
                logger.exception("a purge in the background failed; the next one will try again")
            pause = self._every * random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311  # no secret
