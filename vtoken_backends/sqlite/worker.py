"""A thread on which one SQLite connection works, for any number of event loops."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

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

    def run(self, function: Callable[[], _T]) -> asyncio.Future[_T]:
        """Have a function run; await its result, or what it raised."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[_T] = loop.create_future()
        self._jobs.put(_Job(function, loop, result).run)
        return result

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


class _Job(Generic[_T]):
    """A function to run, and who waits for it. Its repr, which asyncio's debug mode logs, shows nothing."""

    def __init__(
        self, function: Callable[[], _T], loop: asyncio.AbstractEventLoop, result: asyncio.Future[_T]
    ) -> None:
        self._function = function
        self._loop = loop
        self._result = result

    def run(self) -> None:
        outcome: _Success[_T] | _Failure
        try:
            outcome = _Success(self._function())
        except Exception as error:
            outcome = _Failure(error)
        with contextlib.suppress(RuntimeError):  # the event loop was closed meanwhile
            self._loop.call_soon_threadsafe(self._deliver, outcome)

    def _deliver(self, outcome: _Success[_T] | _Failure) -> None:
        if self._result.done():  # the task that waited was cancelled
            return
        if isinstance(outcome, _Failure):
            self._result.set_exception(outcome.error)
        else:
            self._result.set_result(outcome.answer)


class _Success(Generic[_T]):
    """What a function returned, with a repr that shows nothing."""

    def __init__(self, answer: _T) -> None:
        self.answer = answer


class _Failure:
    """What a function raised, with a repr that shows nothing."""

    def __init__(self, error: Exception) -> None:
        self.error = error
