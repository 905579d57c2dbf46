"""The MongoDB driver's client: which one, its life, where it may be used, and how an operation is run."""

from __future__ import annotations

import asyncio
import contextvars
import os
import warnings
from collections.abc import Awaitable, Callable, Coroutine
from inspect import iscoroutinefunction
from typing import Any, Final, TypeVar, cast

import anyio
import pymongo
from anyio.lowlevel import checkpoint_if_cancelled
from bson.errors import BSONError
from pymongo import AsyncMongoClient, errors
from pymongo.write_concern import WriteConcern

from vtoken.errors import (
    BackendClosed,
    BackendUnavailable,
    ConfigurationError,
    CorruptStore,
    OutcomeUnknown,
)
from vtoken.redact import without_locals
from vtoken_backends.batching import outlast
from vtoken_backends.mongodb.collections import Collections
from vtoken_backends.mongodb.command_log import hide
from vtoken_backends.mongodb.failures import Duplicate, translated
from vtoken_backends.mongodb.urls import check_name, check_url

_T = TypeVar("_T")
LONG: Final = 300.0
"""Seconds that an operation over the whole collection may take."""
_PATIENCE: Final = 20.0
"""Seconds that any other operation may take on a client that was handed in, whatever its own time limits."""
_LIMITS: Final = {"serverSelectionTimeoutMS": 5_000, "connectTimeoutMS": 5_000, "socketTimeoutMS": 8_000}
"""What bounds an operation of a client of ours, unless the URL says otherwise."""
# Sooner than the time limit for an answer: else drivers drop the connection, and wait a second time.
_WRITE_CONCERN: Final = WriteConcern("majority", wtimeout=6_000, j=True)
_RELAXED: Final = WriteConcern(1)
"""Acknowledged, not durable."""
_REPLICATED: Final = WriteConcern("majority", wtimeout=6_000)
"""For what no token may be without, its indexes for one, where tokens themselves need not be durable."""
_IN_FLIGHT: Final = 32
"""Operations at once; with more, PyMongo gets slower and unfair."""


class Client(Collections):
    """A client, handed in or of our own making, and the collections. The arguments are the backend's."""

    # Class-level defaults: `__repr__` and `__del__` also run when `__init__` raised.
    _opens = 0
    _database: str | None = None

    def __init__(
        self,
        client: Any,
        url: str | None,
        database: str | None,
        collection: str,
        driver: str,
        durable: bool,
    ) -> None:
        if (client is None) == (url is None):
            raise ConfigurationError("give MongoDBBackend either a client or url=...")
        if client is not None and not _is_async_client(client):
            raise ConfigurationError(
                "client must be a pymongo.AsyncMongoClient or a motor.motor_asyncio.AsyncIOMotorClient,"
                f" not {type(client).__name__}"
            )
        if url is not None and not isinstance(url, str):
            raise ConfigurationError(f"the URL must be text, not {type(url).__name__}")
        if not isinstance(durable, bool):
            raise ConfigurationError("durable must be True or False")
        self._database = None if database is None else check_name("database", database, '/\\. "$*<>:|?\0')
        self.collection = check_name("collection", collection, "$\0")
        self._client_class = None if url is None else _client_class(driver)
        if url is not None:
            check_url(url)
        self._url = url
        self._client: Any = client
        self._write_concern = _WRITE_CONCERN if durable else _RELAXED
        self.read_options = {"readConcern": {"level": "local"}}
        self.write_options = {"writeConcern": self._write_concern.document}
        self._opening = anyio.Lock()
        self._connecting: asyncio.Task[Any] | None = None
        self._apart: set[asyncio.Task[Any]] = set()

    def __repr__(self) -> str:
        return f"{self._database or '(default)'}.{self.collection}"

    def __del__(self) -> None:
        if self._opens and self._url is not None and self._pid == os.getpid():
            warnings.warn(
                f"the MongoDB backend of {self!r} was dropped without close()",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    # Its life -------------------------------------------------------------------------------------

    async def open(self, prepare: Callable[[], Awaitable[None]]) -> None:
        """Connect and prepare the store, if this is the first of the open ones. Cancelled, it ends soon."""
        opening = _start(self._open(prepare))
        try:
            await asyncio.wait({opening})
        except asyncio.CancelledError:
            await outlast(_start(self._abandon(opening)))
            raise
        opening.result()

    async def _open(self, prepare: Callable[[], Awaitable[None]]) -> None:
        async with self._opening:
            if self._opens and not self._is_abandoned():
                self.check_place()
                self._opens += 1
                return
            self._pid = os.getpid()
            self._loop = asyncio.get_running_loop()
            self._limit = anyio.Semaphore(_IN_FLIGHT, fast_acquire=True)
            if self._client_class is not None:
                self._client = _connect(self._client_class, cast("str", self._url))
            self._opens = 1
            self._connecting = asyncio.current_task()
            try:
                self._choose_collections()
                await prepare()
            except BaseException:
                self._opens = 0
                await outlast(_start(self._disconnect()))
                raise
            finally:
                self._connecting = None

    async def _abandon(self, opening: asyncio.Task[None]) -> None:
        """End an opening that nobody waits for any more."""
        while not opening.done():
            # With a server at hand it ends soon; PyMongo would leave the socket that it is just connecting.
            if self._connecting is not opening or not self._has_server():
                opening.cancel()  # again and again, as PyMongo swallows some
            await asyncio.wait({opening}, timeout=0.1)
        if not opening.cancelled() and opening.exception() is None:
            await self.close()

    def _has_server(self) -> bool:
        return self._client is not None and bool(self._client.topology_description.has_writable_server())

    async def close(self) -> None:
        """Undo one :meth:`open`. A cancellation does not cut it short."""
        closing = _start(self._close())
        try:
            await asyncio.wait({closing})
        except asyncio.CancelledError:
            await outlast(closing)
            raise
        closing.result()

    async def _close(self) -> None:
        async with self._opening:
            if not self._opens:
                return
            if self._is_abandoned():
                self._opens = 0  # the client's sockets are another process's, or went with their loop
                return
            self.check_place()
            self._opens -= 1
            if not self._opens:
                await self._disconnect()

    async def _disconnect(self) -> None:
        if self._client_class is None:
            return
        client, self._client = self._client, None
        if iscoroutinefunction(client.close):
            await client.close()
        else:  # Motor's talks with the server, and would have the event loop wait
            try:
                await asyncio.to_thread(client.close)
            except RuntimeError:  # the interpreter ends, and starts no thread any more
                client.close()
        if self._apart:  # look-ups whose callers have left; their connections are closed now
            await asyncio.wait(self._apart)

    def _is_abandoned(self) -> bool:
        return self._pid != os.getpid() or self._loop.is_closed()

    def check_place(self) -> None:
        """Refuse to work before :meth:`open`, after :meth:`close`, in another process or event loop.

        Raises:
            BackendClosed: it says which.
        """
        if not self._opens:
            raise BackendClosed("the MongoDB backend is not open: use `async with manager:`")
        if self._pid != os.getpid():
            raise BackendClosed("the MongoDB backend was opened in another process: open one after the fork")
        if self._loop is not asyncio.get_running_loop():
            raise BackendClosed("the MongoDB backend was opened in another event loop: open one in each loop")

    def is_made_of(self, client: object) -> bool:
        """Whether this is the driver's client that it works with."""
        return client is self._client

    def _choose_collections(self) -> None:
        hide(self.collection)
        if self._database is None:
            self._database = cast("str", self._client.get_default_database("vtoken").name)
        schema_concern = _REPLICATED if self._write_concern is _RELAXED else self._write_concern
        self.choose(self._client, self._database, self._write_concern, schema_concern)

    # Operations -----------------------------------------------------------------------------------

    async def run(
        self, operation: Callable[[], Awaitable[_T]], *, writes: bool = True, seconds: float | None = None
    ) -> _T:
        self.check_place()
        if seconds is None and self._client_class is None:
            seconds = _PATIENCE
        async with self._limit:
            self.check_place()
            try:
                if seconds is None:
                    return await operation()
                with pymongo.timeout(seconds):
                    return await operation()
            except (errors.PyMongoError, BSONError, CorruptStore) as error:
                topology = getattr(self._client, "topology_description", None)
                failure = translated(error, writes=writes, names=self.names_index, topology=topology)
        raise failure  # outside of the block: the driver's error quotes keys, and must not become the context

    async def apart(self, step: Coroutine[Any, Any, _T], *, writes: bool = True) -> _T:
        """Await a step in a task and a fresh context of its own, which a cancellation does not reach.

        Cancelled in the middle, PyMongo drops its connection and swallows the cancellation of some reads,
        and the server may or may not go on. So the caller of a write is cancelled when its step has ended,
        which the client's time limits bound, and the caller of a read at once, while the read ends by itself.
        """
        try:
            self.check_place()
            await checkpoint_if_cancelled()
            task = _start(step)
        except BaseException:
            step.close()
            raise
        self._apart.add(task)
        task.add_done_callback(self._ended)
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            if writes:
                await outlast(cast("asyncio.Future[Any]", task))
            raise
        return task.result()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._apart.discard(task)
        if not task.cancelled():
            task.exception()  # otherwise asyncio would log that nobody asked for it


async def after_a_write(step: Awaitable[_T]) -> _T:
    """Await a later step: where that one did not happen, what it is a part of may have happened by half."""
    try:
        return await step
    except (BackendUnavailable, Duplicate) as error:
        failure = OutcomeUnknown(*error.args)
    raise failure


def _start(step: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
    """Start a task in a fresh context: an application's ``pymongo.timeout()`` or bound session stays out."""
    # Entered rather than passed on: not every task factory has a parameter for the context.
    return contextvars.Context().run(asyncio.get_running_loop().create_task, step)


def _is_async_client(client: Any) -> bool:
    # By class: a Motor client has every attribute that it is asked for.
    names = {f"{cls.__module__}.{cls.__name__}" for cls in type(client).__mro__}
    return isinstance(client, AsyncMongoClient) or "motor.motor_asyncio.AsyncIOMotorClient" in names


def _client_class(driver: str) -> Any:
    if driver == "pymongo":
        return AsyncMongoClient
    if driver != "motor":
        raise ConfigurationError('driver must be "pymongo" or "motor"')
    try:
        from motor.motor_asyncio import AsyncIOMotorClient
    except ImportError:
        pass
    else:
        return AsyncIOMotorClient
    raise ConfigurationError('the driver "motor" is not installed: pip install "vtoken[motor]"')


@without_locals(Exception)
def _connect(client_class: Any, url: str) -> Any:
    limits = {name: limit for name, limit in _LIMITS.items() if f"{name}=".lower() not in url.lower()}
    problem = "are user name and password percent-encoded?"
    try:
        return client_class(url, **limits)
    except (errors.PyMongoError, ValueError, TypeError, UserWarning):
        pass  # the driver's message may quote the URL
    except OSError as error:
        problem = f"a file that it names cannot be read ({error.strerror})"
    raise ConfigurationError(f"the driver does not understand the MongoDB URL; {problem}")
