"""A thread on which one SQLite connection works, for any number of event loops."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

from vtoken_backends.batching import outlast

_T = TypeVar("_T")


class Worker:
    """Runs functions one after the other, on a thread of its own.

    What was handed to it is finished whether or not a task still waits, and whether or not the event loop of
    that task still runs. The thread never keeps the process alive.
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def run(self, function: Callable[[], _T]) -> Job[_T]:
        """Have a function run."""
        job = Job(function, asyncio.get_running_loop())
        self._jobs.put(job.run)
        return job

    def end(self, last: Callable[[], None]) -> None:
        """Run a last function, which raises nothing, and end. May be called in any thread."""
        self._jobs.put(last)
        self._jobs.put(None)

    def join(self) -> None:
        """Wait for the thread, which has nothing left to do but to end."""
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # what it was about is not kept while the thread waits


class Job(Generic[_T]):
    """A function that runs on a thread. Its repr, which asyncio's debug mode logs, shows nothing."""

    def __init__(self, function: Callable[[], _T], loop: asyncio.AbstractEventLoop) -> None:
        self._function = function
        self._loop = loop
        self._is_over = False
        self._over: asyncio.Future[None] | None = None
        self.result: asyncio.Future[_T] = loop.create_future()
        """To be awaited, by one task: what the function returned, or raised."""

    def run(self) -> None:
        """Run the function, on the thread that calls this."""
        outcome: _Success[_T] | _Failure
        try:
            outcome = _Success(self._function())
        except Exception as error:
            outcome = _Failure(error)
        with contextlib.suppress(RuntimeError):  # the event loop was closed meanwhile
            self._loop.call_soon_threadsafe(self._deliver, outcome)

    async def outlast(self) -> None:
        """Wait until the function has ended, whatever cancellation comes meanwhile.

        A shield around :attr:`result` would do the same, but costs every operation a turn of the event loop.
        """
        if self._is_over:
            return
        if self._over is None:
            self._over = self._loop.create_future()
        await outlast(self._over)

    def _deliver(self, outcome: _Success[_T] | _Failure) -> None:
        self._is_over = True
        if self._over is not None:
            self._over.set_result(None)
        if self.result.done():  # the task that waited was cancelled
            return
        if isinstance(outcome, _Failure):
            self.result.set_exception(outcome.error)
        else:
            self.result.set_result(outcome.answer)


class _Success(Generic[_T]):
    """What a function returned, with a repr that shows nothing."""

    def __init__(self, answer: _T) -> None:
        self.answer = answer


class _Failure:
    """What a function raised, with a repr that shows nothing."""

    def __init__(self, error: Exception) -> None:
        self.error = error
