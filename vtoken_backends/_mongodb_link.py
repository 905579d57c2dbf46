"""The MongoDB backend's link to the server: which client, its life, and what becomes of its errors."""

from __future__ import annotations

import asyncio
import os
import re
import warnings
from collections.abc import Awaitable, Callable, Coroutine
from inspect import iscoroutinefunction
from typing import Any, Final, TypeVar, cast
from urllib.parse import unquote, unquote_plus

import anyio
import pymongo
from anyio.lowlevel import checkpoint_if_cancelled
from bson.codec_options import CodecOptions
from bson.errors import BSONError, InvalidBSON
from pymongo import AsyncMongoClient, errors
from pymongo.read_concern import ReadConcern
from pymongo.read_preferences import ReadPreference
from pymongo.uri_parser import parse_uri
from pymongo.write_concern import WriteConcern

from vtoken.errors import (
    BackendClosed,
    BackendError,
    BackendUnavailable,
    ConfigurationError,
    CorruptStore,
    OutcomeUnknown,
)
from vtoken.redact import without_locals

_T = TypeVar("_T")
Document = dict[str, Any]

LONG: Final = 300
"""Seconds that an operation over the whole collection may take."""

_LIMITS: Final = {"serverSelectionTimeoutMS": 5_000, "connectTimeoutMS": 5_000, "socketTimeoutMS": 8_000}
"""What bounds an operation of a client of ours, unless the URL says otherwise."""
# Sooner than the time limit for an answer: else drivers drop the connection, and wait a second time.
_WRITE_CONCERN: Final = WriteConcern("majority", wtimeout=6_000, j=True)
_RELAXED: Final = WriteConcern(1)
"""Acknowledged, not durable."""
_IN_FLIGHT: Final = 32
"""Operations at once; with more, PyMongo gets slower and unfair."""
_DENIED: Final = frozenset({13, 18, 8000})
_INTERRUPTED: Final = frozenset(
    {6, 7, 50, 64, 89, 91, 100, 189, 262, 9001, 10107, 11600, 11601, 11602, 13435, 13436}
)
"""Codes of MongoDB's specification of retryable writes, and those of time limits and the write concern."""


class Duplicate(BackendError):
    """A unique index refused a write; never leaves the backend."""

    def __init__(self, in_slot: bool) -> None:
        super().__init__("MongoDB: duplicate key")
        self.in_slot = in_slot


class Link:
    """A client, handed in or of our own making, and the collections. Arguments: as of the backend."""

    _opens = 0
    _database: str | None = None
    collection = "(not made)"  # these here and not below, as `repr` and `del` may meet one that was refused

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
        self._database = None if database is None else _name("database", database, '/\\. "$*<>:|?\0')
        self.collection = _name("collection", collection, "$\0")
        self._client_class = None if url is None else _client_class(driver)
        if url is not None:
            _check_url(url)
        self._url = url
        self._client: Any = client
        self._write_concern = _WRITE_CONCERN if durable else _RELAXED
        self._opening = anyio.Lock()
        self._connecting: asyncio.Task[Any] | None = None

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

    async def open(self, prepare: Callable[[], Awaitable[None]]) -> None:
        """Connect and prepare the store, if this is the first of the open ones. Cancelled, it ends soon."""
        opening = asyncio.ensure_future(self._open(prepare))
        try:
            await asyncio.wait({opening})
        except asyncio.CancelledError:
            await outlast(asyncio.ensure_future(self._abandon(opening)))
            raise
        opening.result()

    async def _open(self, prepare: Callable[[], Awaitable[None]]) -> None:
        async with self._opening:
            if self._opens and not self._is_abandoned():
                self._check_place()
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
                await outlast(asyncio.ensure_future(self._disconnect()))
                raise
            finally:
                self._connecting = None

    async def _abandon(self, opening: asyncio.Future[None]) -> None:
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
        """Undo one :meth:`open`."""
        async with self._opening:
            if not self._opens:
                return
            if self._is_abandoned():
                self._opens = 0  # the client's sockets are another process's, or went with their loop
                return
            self._check_place()
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
            await asyncio.to_thread(client.close)

    def _is_abandoned(self) -> bool:
        return self._pid != os.getpid() or self._loop.is_closed()

    def _check_place(self) -> None:
        if not self._opens:
            raise BackendClosed("the MongoDB backend is not open: use `async with manager:`")
        if self._pid != os.getpid():
            raise BackendClosed("the MongoDB backend was opened in another process: open one after the fork")
        if self._loop is not asyncio.get_running_loop():
            raise BackendClosed("the MongoDB backend was opened in another event loop: open one in each loop")

    def _choose_collections(self) -> None:
        if self._database is None:
            self._database = cast("str", self._client.get_default_database("vtoken").name)
        # Nothing is left to the client's own settings: they could change what is stored and read.
        options: dict[str, Any] = {
            "codec_options": CodecOptions(),
            "read_preference": ReadPreference.PRIMARY,
            "write_concern": self._write_concern,
            "read_concern": ReadConcern("local"),
        }
        self.db = self._client.get_database(self._database, **options)
        self.tokens = self.db.get_collection(self.collection, **options)
        self.relaxed = self.tokens.with_options(write_concern=_RELAXED)
        self.budgets = self.db.get_collection(f"{self.collection}.budgets", **options)
        self.meta = self.db.get_collection(f"{self.collection}.meta", **options)

    async def run(
        self, operation: Callable[[], Awaitable[_T]], *, writes: bool = True, seconds: float | None = None
    ) -> _T:
        """Run one operation of the driver, and translate what it raises.

        Documents are made within ``operation``, so that no frame of a traceback holds a digest.
        """
        self._check_place()
        async with self._limit:
            self._check_place()
            try:
                if seconds is None:
                    return await operation()
                with pymongo.timeout(seconds):
                    return await operation()
            except (errors.PyMongoError, BSONError, CorruptStore) as error:
                failure = _translated(error, writes)
        raise failure  # outside of the block: the driver's error quotes keys, and must not become the context

    async def write_each(self, write: Callable[[], Awaitable[object]]) -> dict[int, BackendError]:
        """Run a bulk write, and return the refusals of its steps by their places.

        What was not refused, and in an ordered one comes before, is durable then.
        """
        refused: dict[int, BackendError] = {}

        async def attempt() -> None:
            try:
                await write()
            except errors.BulkWriteError as error:
                refused.update(_refusals(error))
                if not refused:
                    raise

        await self.run(attempt)
        return refused

    async def find_all(self, query: Document, limit: int, fields: Document | None = None) -> list[Document]:
        """All documents of a query of tokens, in one answer of the server. To be called within :meth:`run`.

        Args:
            query: its condition.
            limit: at most so many.
            fields: which ones; ``None``: all.
        """
        # By the bare command, which takes the drivers a tenth less time than a cursor does.
        command: Document = {"find": self.collection, "filter": query, "limit": limit, "batchSize": limit + 1}
        command |= {"projection": fields} if fields else {}
        command |= {"readConcern": {"level": "local"}}
        try:
            answer = await self.db.command(command)
        except errors.ServerSelectionTimeoutError:
            raise
        except errors.AutoReconnect:  # once more, as drivers do it for a cursor
            answer = await self.db.command(command)
        cursor: Document = answer["cursor"]
        if cursor["id"]:
            raise BackendError("MongoDB: the tokens do not fit into one answer")
        found: list[Document] = cursor["firstBatch"]
        return found


def _worst(details: Document) -> Document:
    """Of a bulk write's problems one that leaves its outcome unknown, if there is such a one."""
    problems: list[Document] = [*details.get("writeConcernErrors", ()), *details.get("writeErrors", ())]
    interrupted = (problem for problem in problems if problem.get("code") in _INTERRUPTED)
    return next(interrupted, problems[0] if problems else {})


def _refusals(error: errors.BulkWriteError) -> dict[int, BackendError]:
    """What became of each refused step; nothing where the outcome of others is unknown."""
    details = cast("Document", error.details)
    problems: list[Document] = details.get("writeErrors", [])
    if details.get("writeConcernErrors") or _worst(details).get("code") in _INTERRUPTED:
        return {}
    return {
        problem["index"]: _translated(errors.WriteError("", problem["code"], problem), True)
        for problem in problems
    }


def _translated(error: Exception, writes: bool) -> BackendError:
    if isinstance(error, CorruptStore):
        return CorruptStore(*error.args)
    if isinstance(error, InvalidBSON):
        return CorruptStore("MongoDB: a document is damaged")
    if isinstance(error, errors.InvalidOperation):
        return BackendClosed("the MongoDB client was closed")
    if not isinstance(error, errors.PyMongoError):
        return BackendError(f"MongoDB: {type(error).__name__}")
    details = getattr(error, "details", None)
    details = details if isinstance(details, dict) else {}
    if isinstance(error, errors.BulkWriteError):
        details = _worst(details)
    code = details.get("code", getattr(error, "code", None))
    if code == 11000:
        return Duplicate("slot" in details.get("keyPattern", {}))
    said = type(error).__name__ + (f", code {code} {details.get('codeName', '')}".rstrip() if code else "")
    if isinstance(error, errors.ServerSelectionTimeoutError):
        return BackendUnavailable(f"MongoDB: no server answers ({said})")
    if isinstance(error, errors.ConfigurationError):
        return BackendUnavailable(
            f"MongoDB: the driver refuses the URL, or finds no host of that name ({said})"
        )
    if code in _DENIED:
        return BackendUnavailable(f"MongoDB: access denied ({said})")
    lost = isinstance(error, errors.ConnectionFailure | errors.WriteConcernError | errors.ExecutionTimeout)
    # After a lost connection PyMongo 4.20 tries again with a transaction number, which a standalone server
    # refuses: that attempt was not carried out, the one before may have been.
    lost = lost or (code == 20 and "retryable writes" in str(error))
    if not lost and code not in _INTERRUPTED and "writeConcernError" not in details:
        return BackendError(f"MongoDB refused ({said})")
    not_sent = isinstance(error, errors.WaitQueueTimeoutError) or error.has_error_label("NoWritesPerformed")
    if not writes or not_sent:
        return BackendUnavailable(f"MongoDB: interrupted ({said})")
    return OutcomeUnknown(f"MongoDB: the write may or may not have happened ({said})")


async def after_a_write(step: Awaitable[_T]) -> _T:
    """Await a later step: where that one did not happen, what it is a part of may have happened by half."""
    try:
        return await step
    except BackendUnavailable as error:
        failure = OutcomeUnknown(*error.args)
    raise failure


async def settle(step: Coroutine[Any, Any, _T]) -> _T:
    """Await a step that cancellation does not cut short: it is raised once the step has ended.

    Cancelled in the middle, PyMongo drops its connection, swallows the cancellation of some reads, and the
    server may or may not go on. The client's time limits bound the wait.
    """
    try:
        await checkpoint_if_cancelled()
        task = asyncio.ensure_future(step)
    except BaseException:
        step.close()
        raise
    cancelled = await outlast(task)
    if cancelled is None:
        await checkpoint_if_cancelled()
        return task.result()
    if not task.cancelled():
        task.exception()  # else asyncio would log that nobody looked
    try:
        raise cancelled
    finally:
        del cancelled  # no cycle


async def outlast(future: asyncio.Future[Any]) -> asyncio.CancelledError | None:
    """Wait until a future is done, whatever cancellation comes, and return the cancellation."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            with anyio.CancelScope(shield=True):
                await asyncio.wait({future})
        except asyncio.CancelledError as error:  # by task.cancel(), which no scope shields from
            cancelled = error
    return cancelled


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


def _check_url(url: str) -> None:
    """Refuse what the driver's own parser would refuse, as far as it needs no network and no files."""
    scheme, _, rest = url.partition("://")
    start, _, query = rest.partition("?")
    parameters = [parameter for parameter in query.split("&") if not _LATER.match(parameter)]
    problem = "are user name and password percent-encoded, and is the port a number up to 65535?"
    for parameter in parameters:
        if parameter and _parsed(f"mongodb://host/?{parameter}") is None and "@" not in query:
            problem = f"it has no such parameter as {parameter.partition('=')[0]!r}, or not with that value"
    found = _parsed(f"mongodb://{start}{'' if '/' in start else '/'}?{'&'.join(parameters)}")
    ports = [port for _, port in found["nodelist"]] if found else []
    if found is None or (scheme == "mongodb+srv" and ports != [None]):
        raise ConfigurationError(f"the driver does not understand the MongoDB URL; {problem}")


_LATER: Final = re.compile("srv|[^=]*File=", re.IGNORECASE)
"""Parameters that are checked when the backend is opened: of names to be looked up, and of files."""


def _parsed(url: str) -> Document | None:
    try:
        return parse_uri(url, default_port=cast("int", None))
    except (errors.PyMongoError, ValueError, TypeError):
        return None  # the driver's message may quote the URL


def _name(what: str, name: object, forbidden: str) -> str:
    if isinstance(name, str) and name and not set(name) & set(forbidden) and len(name.encode()) <= 60:
        return name
    raise ConfigurationError(f"the MongoDB {what} has no possible name")


def split_url(url: str) -> tuple[str, dict[str, object]]:
    """The URL without what only we understand, and the options that it names."""
    start, mark, query = url.partition("?")
    parameters = [parameter.partition("=") for parameter in query.split("&")]
    named: dict[str, object] = {
        key: unquote_plus(value) for key, _, value in parameters if key == "collection"
    }
    database = unquote(start.partition("://")[2].partition("/")[2])
    if database:
        named["database"] = database
    rest = "&".join("".join(parameter) for parameter in parameters if parameter[0] != "collection")
    return start + (mark + rest if rest else ""), named
