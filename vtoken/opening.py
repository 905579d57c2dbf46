"""Whether a manager is open: counted for each event loop, with the calls and blocks that are under way."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

import anyio

from vtoken import process
from vtoken.backend import TokenBackend
from vtoken.errors import BackendClosed, BackendError

if TYPE_CHECKING:
    from types import TracebackType

PATIENCE: Final = 5
"""Seconds that :meth:`Opening.aclose` waits for what is under way."""


class Block(Protocol):
    """A ``redeem`` block that is under way."""

    @property
    def is_being_cancelled(self) -> bool: ...

    @property
    def task(self) -> asyncio.Task[Any] | None: ...

    @property
    def token(self) -> object: ...


class _Loop:
    """What goes on in one event loop. Entered by every call that asks the store."""

    __slots__ = ("_opening", "_progress", "blocks", "calls", "loop", "opens")

    def __init__(self, opening: Opening, loop: object) -> None:
        self._opening = opening
        self.loop = loop
        self.opens = 0
        self.calls = 0
        self.blocks: set[Block] = set()
        self._progress: anyio.Event | None = None

    def __enter__(self) -> TokenBackend:
        opening = self._opening
        store = opening.store
        if store is None or opening.pid != process.pid:  # as require_open(), on the way of every request
            raise BackendClosed(_CLOSED)
        self.calls += 1
        return store

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self.calls -= 1
        if self._progress is not None:
            self._progress.set()
            self._progress = None

    @property
    def is_gone(self) -> bool:
        return isinstance(self.loop, asyncio.AbstractEventLoop) and self.loop.is_closed()

    def left(self, block: Block) -> None:
        self.blocks.discard(block)
        if self._progress is not None:
            self._progress.set()
            self._progress = None

    async def quiet(self, own: asyncio.Task[Any] | None) -> None:
        """Wait until no call runs and no block is about to give its hold back, but for those of a task."""
        while self.calls or any(b.is_being_cancelled and b.task is not own for b in self.blocks):
            progress = self._progress = self._progress or anyio.Event()
            await progress.wait()


_CLOSED: Final = "the manager is not open: use `async with manager:`, or await manager.open() first"


class Opening:
    """Opens and closes the backend of a manager.

    Each event loop counts its own opens: its first one asks the backend to open, its last one to close. What
    a loop that is gone has opened is closed by the next to open.

    Args:
        backend: the manager's.
        prepare: is awaited with the opened backend before anybody may use it.
    """

    def __init__(self, backend: TokenBackend, prepare: Callable[[TokenBackend], Awaitable[None]]) -> None:
        self._backend = backend
        self._prepare = prepare
        self._lock = threading.Lock()
        self._loops: dict[object, _Loop] = {}
        self.store: TokenBackend | None = None
        """The backend, while the manager is open in any event loop."""
        self.pid = 0

    def calls(self) -> _Loop:
        """``with opening.calls() as store:`` around what asks the store: :meth:`aclose` waits for it.

        Raises:
            BackendClosed: on entry, where the manager is not open.
        """
        try:
            return self._loops[asyncio.get_running_loop()]
        except (RuntimeError, KeyError):  # trio, or an event loop in which nobody has opened the manager
            return self._of(_running_loop())

    def require_open(self) -> TokenBackend:
        """The store.

        Raises:
            BackendClosed: the manager is not open.
        """
        if self.store is None or self.pid != process.pid:
            raise BackendClosed(_CLOSED)
        return self.store

    def enter(self, block: Block) -> None:
        """A ``redeem`` block begins."""
        self.calls().blocks.add(block)

    def leave(self, block: Block) -> None:
        """It ended."""
        for loop in list(self._loops.values()):
            if block in loop.blocks:  # another event loop's waiters must not be woken from this thread
                loop.left(block)

    def block_of(self, token: object) -> Block | None:
        """The ``redeem`` block, in any event loop, that was given this very token."""
        blocks = (block for loop in list(self._loops.values()) for block in list(loop.blocks))
        return next((block for block in blocks if block.token is token), None)

    async def open(self) -> None:
        """Open the backend unless it is open in this event loop."""
        async with self._one_at_a_time():
            if self.pid != process.pid:  # a forked child has nothing of its parent's
                self._loops.clear()
                self.store, self.pid = None, process.pid
            await self._forget_loops_that_are_gone()
            loop = self._of(_running_loop())
            if not loop.opens:
                await self._open_backend()
            loop.opens += 1
            self.store = self._backend

    async def aclose(self) -> None:
        """Undo one :meth:`open` of this event loop, whatever cancellation comes meanwhile. Does nothing where
        there is none."""
        loop = self._loops.get(_running_loop())
        if loop is not None and loop.opens and self.pid == process.pid:
            await to_the_end(partial(self._close, loop, current_task()))

    async def _close(self, loop: _Loop, own: asyncio.Task[Any] | None) -> None:
        if loop.opens == 1:
            with anyio.move_on_after(PATIENCE):
                await loop.quiet(own)
        async with self._one_at_a_time():
            if not loop.opens:
                return  # another task was quicker
            loop.opens -= 1
            if loop.opens:
                return
            if not any(other.opens for other in self._loops.values()):
                self.store = None
            await self._backend.close()

    async def _open_backend(self) -> None:
        await self._backend.open()
        try:
            await self._prepare(self._backend)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._backend.close()
            raise

    async def _forget_loops_that_are_gone(self) -> None:
        for loop in [loop for loop in self._loops.values() if loop.is_gone]:
            del self._loops[loop.loop]
            if loop.opens:
                with suppress(BackendError):  # the backend may have noticed by itself
                    await self._backend.close()

    def _of(self, loop: object) -> _Loop:
        return self._loops.setdefault(loop, _Loop(self, loop))

    @asynccontextmanager
    async def _one_at_a_time(self) -> AsyncGenerator[None]:
        # The lock's holder may run in another event loop, whose events would not wake this one.
        while not self._lock.acquire(blocking=False):  # noqa: ASYNC110  # see above
            await anyio.sleep(0.005)
        try:
            yield
        finally:
            self._lock.release()


async def to_the_end(step: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Await a step that must not be left half done. A cancellation that comes meanwhile is raised afterwards.

    A shielded scope of anyio's holds off its own kind of cancellation only. ``task.cancel()``, which a server
    may call twice, is caught here, while the step goes on in a task of its own.
    """
    if not isinstance(_running_loop(), asyncio.AbstractEventLoop):
        with anyio.CancelScope(shield=True):
            return await step()
    task = Context().run(asyncio.get_running_loop().create_task, step())
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            with anyio.CancelScope(shield=True):
                await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled
    return None


def current_task() -> asyncio.Task[Any] | None:
    """The running task of asyncio; None under trio."""
    return asyncio.current_task() if isinstance(_running_loop(), asyncio.AbstractEventLoop) else None


def _running_loop() -> object:
    """The event loop of the caller, asyncio's or trio's; None outside of any."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        pass
    trio = sys.modules.get("trio")
    if trio is None:
        return None
    try:
        return trio.lowlevel.current_trio_token()
    except RuntimeError:
        return None
