"""The manager for synchronous code: the same methods, which block; an event loop runs in a thread of its own.

::

    manager = SyncTokenManager.from_url("sqlite:///tokens.db")
    issued = manager.issue(user, "password-reset")
    with manager.redeem(user, "password-reset", issued.key):
        set_password()

It opens at its first use, and closes when the process ends; or both where you say so (``with manager:``). Any
number of threads may share one. Hooks, and loaders and contexts that are async, run in the event loop's
thread; those that are not async, and the objects of ``issue_many``, in the caller's. A handle that is given
as ``using`` is used in the event loop's thread, so a ``sqlite3`` connection needs
``check_same_thread=False``. Of several processes each opens its own, after the fork.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import inspect
import itertools
import os
import threading
import warnings
import weakref
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    ExitStack,
    contextmanager,
    suppress,
)
from contextvars import ContextVar, Token, copy_context
from queue import SimpleQueue
from typing import Any, Concatenate, Final, Generic, ParamSpec, Self, TypeVar, cast

import anyio
from anyio.from_thread import BlockingPortal, start_blocking_portal

from vtoken.errors import BackendClosed
from vtoken.manager import TokenManager
from vtoken.redact import without_locals
from vtoken.token import VerificationToken

P = ParamSpec("P")
T = TypeVar("T")

_Objects = Iterable[object] | AsyncIterable[object]

_END: Final = object()
_CLOSED: Final = "the manager is not open: use `with manager:`, or call open() first"
_GROUP: Final = 256
"""How many objects ``issue_many`` takes from the caller's iterable at once."""


class _Call(Generic[T]):
    """A method and its arguments. No traceback shows them: one of them may be a key."""

    def __init__(self, method: Callable[..., T], *args: Any, **kwargs: Any) -> None:
        self.caller = _Caller()
        if callable(context := kwargs.get("context")) and not inspect.iscoroutinefunction(context):
            kwargs["context"] = self.caller.asynchronous(context)
        self._call = functools.partial(method, *args, **kwargs)

    def __call__(self) -> T:
        return self._call()

    def replacing(self, old: object, new: object, **kwargs: Any) -> _Call[T]:
        """The same call with another argument in the place of one, and further keyword arguments."""
        args = [new if argument is old else argument for argument in self._call.args]
        call = _Call(self._call.func, *args, **{**self._call.keywords, **kwargs})
        call.caller = self.caller
        return call


class _Caller:
    """The thread that waits for a call. Meanwhile it runs the call's functions that are not async, which may
    need what belongs to this thread, such as a connection of Django's."""

    def __init__(self) -> None:
        self._work: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self.has_functions = False

    def asynchronous(self, function: Callable[[str], Any]) -> Callable[[str], Awaitable[Any]]:
        """A function of the caller's, to be awaited in the event loop."""
        self.has_functions = True

        async def call(argument: str) -> Any:
            answer: Future[Any] = Future()

            def answered() -> None:
                if not answer.set_running_or_notify_cancel():
                    return
                try:
                    answer.set_result(function(argument))
                except Exception as error:
                    answer.set_exception(error)

            self._work.put(answered)
            value = await asyncio.wrap_future(answer)
            return await value if inspect.isawaitable(value) else value

        return call

    def wait_for(self, futures: Sequence[Future[Any]]) -> None:
        """Wait until one of them is done."""
        if not self.has_functions:
            wait(futures, return_when=FIRST_COMPLETED)
            return
        for future in futures:
            future.add_done_callback(lambda _: self._work.put(None))
        while not any(future.done() for future in futures):
            if (do := self._work.get()) is not None:
                do()


def _blocking(
    method: Callable[Concatenate[TokenManager, P], Awaitable[T]],
) -> Callable[Concatenate[SyncTokenManager, P], T]:
    @functools.wraps(method)
    def call(self: SyncTokenManager, /, *args: P.args, **kwargs: P.kwargs) -> T:
        step = _Call(method, self.manager, *args, **kwargs)
        del args, kwargs
        return self._run(step, step.caller)  # pyright: ignore[reportPrivateUsage]  # its own method

    return call


def _blocking_iterator(
    method: Callable[Concatenate[TokenManager, P], AsyncGenerator[T]],
) -> Callable[Concatenate[SyncTokenManager, P], Generator[T, None, None]]:
    @functools.wraps(method)
    def iterate(self: SyncTokenManager, /, *args: P.args, **kwargs: P.kwargs) -> Generator[T, None, None]:
        step = _Call(method, self.manager, *args, **kwargs)
        del args, kwargs
        return self._iterate(step)  # pyright: ignore[reportPrivateUsage]  # its own method

    return iterate


def _blocking_groups(
    method: Callable[Concatenate[TokenManager, _Objects, P], AsyncGenerator[T]],
) -> Callable[Concatenate[SyncTokenManager, _Objects, P], Generator[T, None, None]]:
    @functools.wraps(method)
    def iterate(
        self: SyncTokenManager, subjects: _Objects, /, *args: P.args, **kwargs: P.kwargs
    ) -> Generator[T, None, None]:
        progress: Any = kwargs.pop("progress", None)
        step = _Call(method, self.manager, subjects, *args, **kwargs)
        del args, kwargs
        return self._iterate_groups(subjects, step, progress)  # pyright: ignore[reportPrivateUsage]  # its own

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
    """A :class:`TokenManager` for synchronous code. One of a process, in a module, will do for all threads.

    Every method does what the manager's method of its name does, and raises what that raises; and
    :class:`BackendClosed` in a child that was forked while this was open.

    The first call opens it, and the end of the process closes it, unless :meth:`open` or :meth:`close` was
    called: then it is open as long as they say, as in ``with SyncTokenManager(manager):``.

    Args:
        manager: one that is not open; it is opened in this one's event loop.
    """

    def __init__(self, manager: TokenManager) -> None:
        self.manager = manager
        self.backend = manager.backend
        self.settings = manager.settings
        self.policies = manager.policies
        self.content_types = manager.content_types
        # It may be taken again by whoever has it, and finds then that another thread has closed the manager.
        self._lock = threading.RLock()
        self._opens_itself = True
        self._opens = 0
        self._running: _Running | None = None
        self._blocks: dict[_Block[Any], Future[None]] = {}

    @classmethod
    @without_locals(Exception)
    def from_url(cls, url: str, **keywords: Any) -> Self:
        """As :meth:`TokenManager.from_url`."""
        return cls(TokenManager.from_url(url, **keywords))

    @classmethod
    def from_env(cls, default_url: str | None = None, **keywords: Any) -> Self:
        """As :meth:`TokenManager.from_env`."""
        return cls(TokenManager.from_env(default_url, **keywords))

    def open(self) -> None:
        """Start the event loop's thread and open the manager. Opens are counted, so that blocks may be
        nested or concurrent."""
        if self._running is not None:
            self._running.check_caller()
        with self._lock:
            self._opens_itself = False
            if self._running is None:
                self._running = self._started(is_forgettable=False)
            self._opens += 1

    def _open_itself(self) -> _Running:
        """Open at the first use, of however many threads at once, until the process ends."""
        with self._lock:
            if self._running is None:
                if not self._opens_itself:
                    raise BackendClosed(_CLOSED)
                self._running = self._started(is_forgettable=True)
                self._opens += 1
                atexit.register(_close, weakref.ref(self))
            return self._running

    def _started(self, *, is_forgettable: bool) -> _Running:
        with ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal())
            portal.call(self.manager.open)
            stack.callback(portal.call, self.manager.aclose)
            running = _Running(portal, stack.pop_all())
        running.close_with(self, is_forgettable=is_forgettable)
        return running

    def close(self) -> None:
        """Undo one :meth:`open`; the last one closes the manager and ends the thread. May be called again,
        and before :meth:`open`.

        Calls that other threads wait for come to their end first. ``redeem`` blocks that have not come to
        theirs give their tokens back, and raise :class:`BackendClosed` when they do.
        """
        running = self._running
        if running is not None and running.is_a_parents():
            return  # a parent closes what it opened itself
        if running is not None:
            running.check_caller()
        with self._lock:
            self._opens_itself = False
            if running is None or self._running is not running:
                return
            self._opens -= 1
            if self._opens:
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

    issue = _blocking(TokenManager.issue)
    deactivate_and_create = _blocking(TokenManager.deactivate_and_create)
    issuing = _blocking_context(TokenManager.issuing)
    issue_many = _blocking_groups(TokenManager.issue_many)
    pretend = _blocking(TokenManager.pretend)
    get_active_or_create = _blocking(TokenManager.get_active_or_create)
    reveal = _blocking(TokenManager.reveal)
    generate_key = _blocking(TokenManager.generate_key)
    exists_valid = _blocking(TokenManager.exists_valid)
    verify = _blocking(TokenManager.verify)
    status = _blocking(TokenManager.status)
    filter_active_tokens = _blocking_iterator(TokenManager.filter_active_tokens)
    history = _blocking_iterator(TokenManager.history)
    get = _blocking(TokenManager.get)
    consume = _blocking(TokenManager.consume)
    redeem = _blocking_context(TokenManager.redeem)
    mark_used = _blocking(TokenManager.mark_used)
    deactivate = _blocking(TokenManager.deactivate)
    save = _blocking(TokenManager.save)
    erase = _blocking(TokenManager.erase)
    reset_limits = _blocking(TokenManager.reset_limits)
    purge = _blocking(TokenManager.purge)
    sweeper = _blocking_context(TokenManager.sweeper)
    stats = _blocking(TokenManager.stats)
    ping = _blocking(TokenManager.ping)

    def content_object(self, token: VerificationToken) -> object | None:
        """As :meth:`TokenManager.content_object`; a loader that is not async runs in the caller's thread."""

        async def waited() -> object | None:
            return await cast("Awaitable[object | None]", found)

        self._opened()
        found = self.manager.content_types.registered_loader(token.content_type)(token.object_id)
        return self._run(waited) if inspect.isawaitable(found) else found

    def _opened(self) -> _Running:
        running = self._running or self._open_itself()
        running.check_caller()
        return running

    def _start(self, step: Callable[[], Awaitable[T]]) -> Future[T]:
        running, task = self._opened(), _Task(step)
        try:
            with suppress(RuntimeError):  # it was closed in between
                return running.portal.start_task_soon(task.run)
        except BaseException:  # this thread was interrupted, and the step may be running
            running.portal.start_task_soon(task.cancel)
            raise
        raise BackendClosed(_CLOSED)

    def _run(self, step: Callable[[], Awaitable[T]], caller: _Caller | None = None) -> T:
        future = self._start(step)
        try:
            if caller is not None and caller.has_functions:
                caller.wait_for([future])
            return future.result()
        finally:
            future.cancel()  # if it is not done, this thread was interrupted, and nobody waits for it

    def _iterate(self, step: _Call[AsyncGenerator[T]]) -> Generator[T, None, None]:
        items = step()

        async def following() -> Any:
            return await anext(items, _END)

        while (item := self._run(following, step.caller)) is not _END:
            try:
                yield item
            except BaseException:  # it is left early
                if self._running is not None and self._running.may_be_waited_for():
                    with suppress(BackendClosed):  # closed in between, and all generators with it
                        self._run(items.aclose)
                raise

    def _iterate_groups(
        self,
        subjects: _Objects,
        step: _Call[AsyncGenerator[T]],
        progress: Callable[[int], object] | None,
    ) -> Generator[T, None, None]:
        """Take the objects in the caller's thread: a cursor of a database may belong to it."""
        if isinstance(subjects, AsyncIterable):
            yield from self._iterate(step.replacing(subjects, subjects, progress=progress))
            return
        remaining, done, is_done = iter(subjects), 0, False
        while not is_done:
            group = list(itertools.islice(remaining, _GROUP))
            yield from self._iterate(step.replacing(subjects, group))
            done, is_done = done + len(group), len(group) < _GROUP
            if progress is not None and group:
                progress(done)

    @contextmanager
    def _hold(self, step: _Call[AbstractAsyncContextManager[T]]) -> Generator[T, None, None]:
        block = _Block(step)
        self._opened()  # before the lock, for which the event loop must never wait
        with self._lock:
            held = self._start(block.hold)
            self._blocks[block] = held
        try:
            step.caller.wait_for([block.entered, held])
            value = block.entered.result() if block.entered.done() else cast("T", held.result())
        except BaseException:
            held.cancel()
            self._blocks.pop(block, None)
            raise
        # What holds inside the block (that a hold is its own, say) must hold for the calls of this thread.
        changes: list[tuple[ContextVar[Any], Token[Any]]] = []
        try:
            changes += [(variable, variable.set(now)) for variable, now in block.changes]
            yield value
        except BaseException as error:
            self._leave(block, _BlockFailed() if isinstance(error, Exception) else _BlockInterrupted())
            raise
        finally:
            for variable, before in changes:
                with suppress(ValueError):  # the block is left in another thread than it was entered in
                    variable.reset(before)
        if not self._leave(block, None):
            raise BackendClosed("the manager was closed, or the process forked, before the block was done")

    def _leave(self, block: _Block[Any], failure: BaseException | None) -> bool:
        """End a block, unless :meth:`close` has done so."""
        running = self._running
        if running is None or running.is_a_parents():
            return False
        with self._lock:  # for close() not to stop the event loop in between
            held = self._blocks.pop(block, None)
            if held is None:
                return False
            block.failure = failure
            running.portal.call(block.left.set)
        held.result()
        return True


def _close(found: weakref.ref[SyncTokenManager]) -> None:
    """At the end of the process."""
    manager = found()
    if manager is not None:
        manager.close()


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
        raise CancelledError  # nobody waits for it any more

    async def cancel(self) -> None:
        self._cancelled = True
        if self._scope is not None:
            self._scope.cancel()


class _BlockFailed(Exception):
    """Tells an async context manager that its block, which runs in another thread, has raised."""


class _BlockInterrupted(BaseException):
    """Tells it that the block was interrupted, as a cancellation would."""


class _Block(Generic[T]):
    """An async context manager that stands open in the event loop while a thread runs its block."""

    def __init__(self, step: Callable[[], AbstractAsyncContextManager[T]]) -> None:
        self._step = step
        self.entered: Future[T] = Future()
        self.left = anyio.Event()
        self.failure: BaseException | None = _BlockInterrupted()
        self.changes: list[tuple[ContextVar[Any], Any]] = []
        """The context variables that were set on entry."""

    async def hold(self) -> None:
        # The block's own exception stays in its thread: here, a KeyboardInterrupt would end the event loop.
        with suppress(_BlockFailed, _BlockInterrupted):
            before = copy_context()
            async with self._step() as value:
                self.changes = [
                    (variable, now)
                    for variable, now in copy_context().items()
                    if before.get(variable) is not now
                ]
                self.entered.set_result(value)
                await self.left.wait()
                if self.failure is not None:
                    raise self.failure


class _Running:
    """An event loop in its thread, with the manager open in it."""

    def __init__(self, portal: BlockingPortal, stack: ExitStack) -> None:
        self.portal = portal
        self._stack = stack
        self._process = os.getpid()
        self._thread = portal.call(threading.get_ident)
        self._finalizer: weakref.finalize[[bool], Any] | None = None

    def is_a_parents(self) -> bool:
        return os.getpid() != self._process

    def may_be_waited_for(self) -> bool:
        """Whether its thread is in this process, and is not the one that asks."""
        return not self.is_a_parents() and threading.get_ident() != self._thread

    def check_caller(self) -> None:
        """Raise where the caller would wait for ever."""
        if self.may_be_waited_for():
            return
        if self.is_a_parents():
            raise BackendClosed(
                "this SyncTokenManager was opened before a fork, and its thread is in the parent: open one"
                " in each process"
            )
        raise RuntimeError(
            "called in the manager's own event loop, by a hook or loader: it would wait for itself;"
            " await a method of the TokenManager"
        )

    def close_with(self, owner: SyncTokenManager, *, is_forgettable: bool) -> None:
        """Make sure that neither the owner's end nor the interpreter's waits for a thread that is gone."""
        self._finalizer = weakref.finalize(owner, self._forgotten, is_forgettable)

    def close(self) -> None:
        if self._finalizer is not None:
            self._finalizer.detach()
        self._stack.close()

    def _forgotten(self, is_forgettable: bool) -> None:
        if self.is_a_parents():
            with suppress(StopIteration):  # it awaits nothing, and there is no event loop to run it in
                self.portal.stop().send(None)
            return
        if not is_forgettable:
            warnings.warn("a SyncTokenManager was not closed", ResourceWarning, stacklevel=2)
        self._stack.close()
