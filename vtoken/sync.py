"""The manager for synchronous code: the same methods, which block; an event loop runs in a thread of its own.

::

    with SyncTokenManager.from_url("sqlite:///tokens.db") as manager:
        issued = manager.deactivate_and_create(user, "password-reset")
        with manager.redeem(user, "password-reset", issued.key):
            set_password()

Any number of threads may share one. Hooks and loaders run in the event loop's thread. Of several processes
each opens its own, after the fork.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    ExitStack,
    contextmanager,
    suppress,
)
from typing import Any, Concatenate, Final, Generic, ParamSpec, Self, TypeVar, cast

import anyio
from anyio.from_thread import BlockingPortal, start_blocking_portal

from vtoken.errors import BackendClosed, ConfigurationError
from vtoken.manager import TokenManager
from vtoken.redact import without_locals

P = ParamSpec("P")
T = TypeVar("T")

_END: Final = object()


class _Call(Generic[T]):
    """A method and its arguments, in a wrapping that no traceback opens: one of them may be a key."""

    def __init__(self, method: Callable[..., T], *args: Any, **kwargs: Any) -> None:
        self._call = functools.partial(method, *args, **kwargs)

    def __call__(self) -> T:
        return self._call()


def _blocking(
    method: Callable[Concatenate[TokenManager, P], Awaitable[T]],
) -> Callable[Concatenate[SyncTokenManager, P], T]:
    @functools.wraps(method)
    def call(self: SyncTokenManager, /, *args: P.args, **kwargs: P.kwargs) -> T:
        step = _Call(method, self.manager, *args, **kwargs)
        del args, kwargs
        return self._run(step)  # pyright: ignore[reportPrivateUsage]  # its own method

    return call


def _blocking_iterator(
    method: Callable[Concatenate[TokenManager, P], AsyncIterator[T]],
) -> Callable[Concatenate[SyncTokenManager, P], Iterator[T]]:
    @functools.wraps(method)
    def iterate(self: SyncTokenManager, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        step = _Call(method, self.manager, *args, **kwargs)
        del args, kwargs
        return self._iterate(step)  # pyright: ignore[reportPrivateUsage]  # its own method

    return iterate


def _blocking_context(
    method: Callable[Concatenate[TokenManager, P], AbstractAsyncContextManager[T]],
) -> Callable[Concatenate[SyncTokenManager, P], AbstractContextManager[T]]:
    @functools.wraps(method)
    def enter(self: SyncTokenManager, /, *args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[T]:
        step = _Call(method, self.manager, *args, **kwargs)
        del args, kwargs
        return self._hold(step)  # pyright: ignore[reportPrivateUsage]  # its own method

    return enter


class SyncTokenManager:
    """A :class:`TokenManager` for synchronous code: ``with SyncTokenManager(manager):``.

    Every method does what the manager's method of its name does, and raises what that raises; and
    :class:`BackendClosed` in a child that was forked while this was open.

    Args:
        manager: one that is not open; it is opened in this one's event loop.
    """

    def __init__(self, manager: TokenManager) -> None:
        self.manager = manager
        self._lock = threading.Lock()
        self._running: _Running | None = None
        self._blocks: dict[_Block[Any], Future[None]] = {}

    @classmethod
    @without_locals(ConfigurationError)
    def from_url(cls, url: str, **keywords: Any) -> Self:
        """As :meth:`TokenManager.from_url`."""
        return cls(TokenManager.from_url(url, **keywords))

    @classmethod
    def from_env(cls, **keywords: Any) -> Self:
        """As :meth:`TokenManager.from_env`."""
        return cls(TokenManager.from_env(**keywords))

    def open(self) -> None:
        """Start the event loop's thread and open the manager, unless that is done already."""
        if self._running is not None:
            self._running.check_caller()
        with self._lock:
            if self._running is not None:
                return
            with ExitStack() as stack:
                portal = stack.enter_context(start_blocking_portal())
                portal.call(self.manager.open)
                stack.callback(portal.call, self.manager.aclose)
                running = _Running(portal, stack.pop_all())
            running.close_with(self)
            self._running = running

    def close(self) -> None:
        """Close the manager and end the thread. May be called again, and before :meth:`open`.

        Calls that other threads wait for come to their end first. ``redeem`` blocks that have not come to
        theirs give their tokens back, and raise :class:`BackendClosed` when they do.
        """
        running = self._running
        if running is None or running.is_a_parents():
            return  # it is the parent's to close
        running.check_caller()
        with self._lock:
            if self._running is not running:
                return
            self._running = None
            blocks, self._blocks = self._blocks, {}
            for block in blocks:
                running.portal.call(block.left.set)
        wait(blocks.values())
        running.close()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<SyncTokenManager on {self.manager.backend!r}>"

    deactivate_and_create = _blocking(TokenManager.deactivate_and_create)
    get_active_or_create = _blocking(TokenManager.get_active_or_create)
    generate_key = _blocking(TokenManager.generate_key)
    exists_valid = _blocking(TokenManager.exists_valid)
    verify = _blocking(TokenManager.verify)
    filter_active_tokens = _blocking_iterator(TokenManager.filter_active_tokens)
    get = _blocking(TokenManager.get)
    content_object = _blocking(TokenManager.content_object)
    consume = _blocking(TokenManager.consume)
    redeem = _blocking_context(TokenManager.redeem)
    deactivate = _blocking(TokenManager.deactivate)
    save = _blocking(TokenManager.save)
    purge = _blocking(TokenManager.purge)
    sweeper = _blocking_context(TokenManager.sweeper)
    stats = _blocking(TokenManager.stats)

    def _start(self, step: Callable[[], Awaitable[T]]) -> Future[T]:
        running = self._running
        if running is not None:
            running.check_caller()
            task = _Task(step)
            try:
                with suppress(RuntimeError):  # it was closed in between
                    return running.portal.start_task_soon(task.run)
            except BaseException:  # this thread was interrupted, and the step may be running
                running.portal.start_task_soon(task.cancel)
                raise
        raise BackendClosed("the manager is not open: use `with SyncTokenManager(...)`, or call open() first")

    def _run(self, step: Callable[[], Awaitable[T]]) -> T:
        future = self._start(step)
        try:
            return future.result()
        finally:
            future.cancel()  # if it is not done, this thread was interrupted, and nobody waits for it

    def _iterate(self, step: Callable[[], AsyncIterator[T]]) -> Iterator[T]:
        items = step()

        async def following() -> Any:
            return await anext(items, _END)

        while (item := self._run(following)) is not _END:
            yield item

    @contextmanager
    def _hold(self, step: Callable[[], AbstractAsyncContextManager[T]]) -> Generator[T, None, None]:
        block = _Block(step)
        running = self._running
        if running is not None:
            running.check_caller()  # before the lock, for which the event loop must never wait
        with self._lock:
            held = self._start(block.hold)
            self._blocks[block] = held
        try:
            futures: list[Future[Any]] = [block.entered, held]
            wait(futures, return_when=FIRST_COMPLETED)
            value = block.entered.result() if block.entered.done() else cast("T", held.result())
        except BaseException:
            held.cancel()
            self._blocks.pop(block, None)
            raise
        try:
            yield value
        except BaseException:
            self._leave(block, failed=True)
            raise
        if not self._leave(block, failed=False):
            raise BackendClosed("the manager was closed, or the process forked, before the block was done")

    def _leave(self, block: _Block[Any], *, failed: bool) -> bool:
        """End a block, unless :meth:`close` has done so."""
        running = self._running
        if running is None or running.is_a_parents():
            return False
        with self._lock:  # for close() not to stop the event loop in between
            held = self._blocks.pop(block, None)
            if held is None:
                return False
            block.failed = failed
            running.portal.call(block.left.set)
        held.result()
        return True


class _Task(Generic[T]):
    """A step that can be cancelled although its future never reached us."""

    def __init__(self, step: Callable[[], Awaitable[T]]) -> None:
        self._step = step
        self._cancelled = False
        self._scope: anyio.CancelScope | None = None

    async def run(self) -> T:
        if not self._cancelled:
            with anyio.CancelScope() as self._scope:
                return await self._step()
        raise CancelledError  # nobody is there to hear it

    async def cancel(self) -> None:
        self._cancelled = True
        if self._scope is not None:
            self._scope.cancel()


class _BlockFailed(Exception):
    """Tells an async context manager that its block, which runs in another thread, has raised."""


class _Block(Generic[T]):
    """An async context manager that stands open in the event loop while a thread runs its block."""

    def __init__(self, step: Callable[[], AbstractAsyncContextManager[T]]) -> None:
        self._step = step
        self.entered: Future[T] = Future()
        self.left = anyio.Event()
        self.failed = True

    async def hold(self) -> None:
        # The block's own exception stays in its thread: here, a KeyboardInterrupt would end the event loop.
        with suppress(_BlockFailed):
            async with self._step() as value:
                self.entered.set_result(value)
                await self.left.wait()
                if self.failed:
                    raise _BlockFailed


class _Running:
    """An event loop in its thread, with the manager open in it."""

    def __init__(self, portal: BlockingPortal, stack: ExitStack) -> None:
        self.portal = portal
        self._stack = stack
        self._process = os.getpid()
        self._thread = portal.call(threading.get_ident)
        self._finalizer: weakref.finalize[[], Any] | None = None

    def is_a_parents(self) -> bool:
        return os.getpid() != self._process

    def check_caller(self) -> None:
        """Raise where the caller would wait for ever."""
        if self.is_a_parents():
            raise BackendClosed(
                "this SyncTokenManager was opened before a fork, and its thread is in the parent: open one"
                " in each process"
            )
        if threading.get_ident() == self._thread:
            raise RuntimeError(
                "called in the manager's own event loop, by a hook or loader: it would wait for itself;"
                " await a method of the TokenManager"
            )

    def close_with(self, owner: SyncTokenManager) -> None:
        """See to it that neither the owner's end nor the interpreter's waits for a thread that is gone."""
        self._finalizer = weakref.finalize(owner, self._forgotten)

    def close(self) -> None:
        if self._finalizer is not None:
            self._finalizer.detach()
        self._stack.close()

    def _forgotten(self) -> None:
        if self.is_a_parents():
            with suppress(StopIteration):  # it awaits nothing, and there is no event loop to run it in
                self.portal.stop().send(None)
            return
        warnings.warn("a SyncTokenManager was not closed", ResourceWarning, stacklevel=2)
        self._stack.close()
