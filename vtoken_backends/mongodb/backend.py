"""Tokens in MongoDB, by PyMongo's async client or Motor, on a replica set or a standalone server.

What is atomic is one document or one unique index, never a transaction (a standalone server has none). So
what shares a fate shares a document: see ``documents``. An operation that is usual and alone is one command
(see ``commands``). Every other one is decided in Python, and written by compare-and-set (see ``writes``).

Reads go to the primary with read concern "local". A primary has every write that a majority acknowledged from
the moment it is elected; "majority" can lag behind that after a fail-over and show a used token as valid.
"""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any, Final, Self, TypeVar, cast

from vtoken.backend import (
    Inserted,
    Presented,
    StoredToken,
    TokenBackend,
)
from vtoken.errors import ConfigurationError
from vtoken.inputs import nearest
from vtoken.redact import without_locals
from vtoken_backends.batching import Batcher
from vtoken_backends.mongodb import commands
from vtoken_backends.mongodb.client import Client
from vtoken_backends.mongodb.failures import Blocked
from vtoken_backends.mongodb.lines import Answer, Insert, Operation, Present
from vtoken_backends.mongodb.reading import Find
from vtoken_backends.mongodb.schema import Schema
from vtoken_backends.mongodb.store import Store
from vtoken_backends.mongodb.transactions import KnownClients, Transaction
from vtoken_backends.mongodb.urls import split_url

_T = TypeVar("_T")

_OPTIONS: Final = ("database", "collection", "driver", "durable")


class MongoDBBackend(Store):
    """A :class:`~vtoken.backend.TokenBackend` in a MongoDB database, for any number of processes and hosts.

    Needs asyncio. Operations are refused in another event loop or process than that of :meth:`open`. On a
    replica set ``using=`` takes a client session in a transaction, PyMongo's or Motor's.

    Args:
        client: a ``pymongo.AsyncMongoClient`` or a Motor ``AsyncIOMotorClient``. It stays the caller's, with
            its own time limits; no operation takes longer than 20 seconds on it.
        url: instead of a client; :meth:`open` makes a client of it and :meth:`close` closes that. Unless the
            URL says otherwise, it waits 5 seconds for a server and 8 seconds for an answer.
        database: default: the one that the URL or the client names, else ``vtoken``.
        collection: of the tokens; ``<collection>.budgets`` and ``<collection>.meta`` go with it.
        driver: of the client for ``url``: ``"pymongo"`` or ``"motor"``.
        durable: ``False`` acknowledges a write before it is on disk and with a majority. A crash of the
            server can then lose issued tokens and make used ones valid again.

    Raises:
        ConfigurationError: an argument is of the wrong kind, or the driver is not installed.
    """

    @without_locals(ConfigurationError)
    def __init__(
        self,
        client: Any = None,
        *,
        url: str | None = None,
        database: str | None = None,
        collection: str = "vtoken",
        driver: str = "pymongo",
        durable: bool = True,
    ) -> None:
        self._client = Client(client, url, database, collection, driver, durable)
        self._schema = Schema(self._client)
        super().__init__(self._client, self._schema.check_names)
        self._known_clients = KnownClients()
        self._inserts = Batcher(self._insert_batch, in_flight=2, outlast=True)
        self._uses = Batcher(self._use_batch, in_flight=2, outlast=True)
        self._looks = Batcher(self._look_batch, in_flight=2)
        self._finds = Batcher(self._reads.by_digest, in_flight=2)

    @classmethod
    @without_locals(ConfigurationError)
    def from_url(cls, url: str, **options: object) -> Self:
        """``mongodb://[user:password@]host[:port][,...][/database][?collection=name]``, or ``mongodb+srv://``.

        All other parameters of the query are the driver's own. As drivers do it, a user is looked up in the
        database of the path, unless ``authSource`` names another.

        Args:
            url: as above.
            **options: those of the class, except ``client`` and ``url``.

        Raises:
            ConfigurationError: the URL or an option is not understood.
        """
        if not isinstance(url, str):
            raise ConfigurationError(f"the URL must be text, not {type(url).__name__}")
        for option in options:
            if option not in _OPTIONS:
                hint = nearest(option, _OPTIONS) or f"it has {', '.join(_OPTIONS)}"
                raise ConfigurationError(f"the MongoDB backend has no option {option!r}: {hint}")
        url, named = split_url(url)
        return cls(url=url, **cast("dict[str, Any]", named | options))

    def __repr__(self) -> str:
        return f"<MongoDBBackend {getattr(self, '_client', '(not made)')!s}>"

    # Its life -------------------------------------------------------------------------------------

    async def open(self) -> None:
        await self._client.open(self._schema.prepare)

    async def close(self) -> None:
        """A client that was handed in stays open."""
        await self._client.close()

    async def ping(self) -> None:
        await self._client.apart(self._schema.check(), writes=False)

    async def note(self, name: str, text: str, *, replace: bool = False) -> str:
        return await self._client.apart(self._schema.note(name, text, replace), writes=bool(text))

    def within(self, handle: object) -> TokenBackend:
        self._client.check_place()
        return Transaction(handle, self._client, self, self._known_clients)

    # Operations, alone and in batches -------------------------------------------------------------

    async def _apart(self, step: Coroutine[Any, Any, _T], *, writes: bool = True) -> _T:
        return await self._client.apart(step, writes=writes)

    async def _insert_one(self, op: Insert) -> Inserted:
        self._client.check_place()
        with suppress(Blocked):
            return await self._inserts.submit(op)
        return cast("Inserted", await self._client.apart(self._alone(op)))

    async def _present_one(self, op: Present) -> Presented:
        self._client.check_place()
        with suppress(Blocked):
            return await (self._looks if op.change is None else self._uses).submit(op)
        return cast("Presented", await self._client.apart(self._alone(op)))

    async def _alone(self, op: Operation) -> Answer:
        """Carry out an operation that waits for a transaction of an application's own, and is not to keep a
        batch waiting."""
        [answer] = await self._writes.flush([op], is_whole=True)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def _find_named(self, find: Find) -> list[StoredToken]:
        self._client.check_place()
        return await self._finds.submit(find)

    # A batch outlasts its callers by itself.
    _insert_alone = _insert_one
    _present_alone = _present_one

    async def _insert_batch(self, ops: Sequence[Insert]) -> list[Inserted | BaseException]:
        if len(ops) == 1:
            inserted = await commands.issue(self._client, ops[0])
            if inserted is not None:
                return [inserted]
        answers = await self._writes.flush(ops, is_whole=len(ops) == 1, is_patient=False)
        return cast("list[Inserted | BaseException]", answers)

    async def _use_batch(self, ops: Sequence[Present]) -> list[Presented | BaseException]:
        if len(ops) == 1:
            used = await commands.use(self._client, ops[0])
            if used is not None:
                answers: list[Answer | BaseException] = [used]
                await self._writes.end_what_they_end(ops, answers)
                return cast("list[Presented | BaseException]", answers)
        answers = await self._writes.flush(ops, is_whole=len(ops) == 1, is_patient=False)
        return cast("list[Presented | BaseException]", answers)

    async def _look_batch(self, ops: Sequence[Present]) -> list[Presented | BaseException]:
        return cast("list[Presented | BaseException]", await self._writes.flush(ops))
