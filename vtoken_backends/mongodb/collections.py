"""The collections of a store as one client sees them, and the commands on them that drivers are slow with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple, TypeVar

from bson.codec_options import CodecOptions
from pymongo import errors
from pymongo.read_concern import ReadConcern
from pymongo.read_preferences import ReadPreference
from pymongo.write_concern import WriteConcern

from vtoken.errors import BackendError
from vtoken_backends.mongodb.failures import Blocked, refusals

_T = TypeVar("_T")
Document = dict[str, Any]

NAMES: Final = [("names", 1)]
"""The unique index that every look-up goes by. It is given as a hint, so that the server refuses the command
where somebody has dropped the index."""

PATIENCE: Final[Document] = {"maxTimeMS": 2_000}
"""How long a batch waits for a transaction of an application's own. Then what is not in its way goes on."""


class Bulk(NamedTuple):
    """Documents to be inserted, and steps of the command ``update``."""

    inserts: list[Document]
    updates: list[Document]


class Collections(ABC):
    """The collections. Whoever makes them says how an operation on them is run."""

    # Class-level defaults: `__repr__` and `__del__` also run when `__init__` raised.
    collection = "(not made)"
    read_options: Document
    """Of a command that reads."""
    write_options: Document
    """Of a command that writes."""
    admin: Any
    config: Any
    db: Any
    tokens: Any
    budgets: Any
    meta: Any
    schema_concern: WriteConcern
    """For what no token may be without, its indexes for one."""

    @abstractmethod
    async def run(
        self, operation: Callable[[], Awaitable[_T]], *, writes: bool = True, seconds: float | None = None
    ) -> _T:
        """Run one operation of the driver, and translate what it raises.

        Documents are made within ``operation``, so that no frame of a traceback holds a digest. It has to be
        called in a context without variables of a caller: in a batch, or through :meth:`Client.apart`.
        """

    def choose(
        self, client: Any, database: str, write_concern: WriteConcern, schema_concern: WriteConcern
    ) -> None:
        """Choose the collections of a database."""
        # Nothing is left to the client's own settings: they could change what is stored and read.
        options: dict[str, Any] = {
            "codec_options": CodecOptions(),
            "read_preference": ReadPreference.PRIMARY,
            "write_concern": write_concern,
            "read_concern": ReadConcern("local"),
        }
        self.admin = client.get_database("admin", **options)
        self.config = client.get_database("config", **options)
        self.db = client.get_database(database, **options)
        self.tokens = self.db.get_collection(self.collection, **options)
        self.budgets = self.db.get_collection(f"{self.collection}.budgets", **options)
        options["write_concern"] = schema_concern
        self.meta = self.db.get_collection(f"{self.collection}.meta", **options)
        self.schema_concern = schema_concern

    @property
    def names_index(self) -> str:
        """How messages name the unique index."""
        return f"on names of {self.collection!r}"

    async def write_each(self, write: Callable[[], Awaitable[object]]) -> dict[int, BackendError]:
        """Run an unordered bulk write, and return the refusals of its steps by their places.

        What was not refused is durable then.
        """
        refused: dict[int, BackendError] = {}

        async def attempt() -> None:
            try:
                await write()
            except errors.BulkWriteError as error:
                refused.update(refusals(error, self.names_index))
                if not refused:
                    raise

        await self.run(attempt)
        return refused

    async def patiently(self, write: Awaitable[_T]) -> _T:
        """Await a command that has :data:`PATIENCE`. To be called within :meth:`run`.

        Raises:
            Blocked: the server has given up, and does not go on with it.
        """
        try:
            return await write
        except errors.ExecutionTimeout as error:
            if not error.details or error.details.get("ok"):
                raise  # it was carried out, or nobody knows
        raise Blocked("MongoDB: a document is changed by a transaction")

    async def bulk_write(self, bulk: Bulk, *, is_patient: bool = True) -> int:
        """Insert and update tokens, in any order, and return how many documents were written. To be called
        within :meth:`write_each`.

        Raises:
            Blocked: not ``is_patient``, and a transaction is in the way of some of them.
        """
        # By bare commands, which take the drivers a third less time than their bulk write does.
        count = 0
        problems: Document = {"writeErrors": [], "writeConcernErrors": []}
        for name, steps in (("insert", bulk.inserts), ("update", bulk.updates)):
            if not steps:
                continue
            field = "documents" if name == "insert" else "updates"
            command = {name: self.collection, field: steps, "ordered": False, **self.write_options}
            if is_patient:
                answer: Document = await self.db.command(command)
            else:
                answer = await self.patiently(self.db.command(command | PATIENCE))
            count += answer["n"] if name == "insert" else answer["nModified"]
            before = 0 if name == "insert" else len(bulk.inserts)
            for error in answer.get("writeErrors", ()):
                problems["writeErrors"].append({**error, "index": before + error["index"]})
            if "writeConcernError" in answer:
                problems["writeConcernErrors"].append(answer["writeConcernError"])
        if problems["writeErrors"] or problems["writeConcernErrors"]:
            raise errors.BulkWriteError(problems)
        return count

    async def find_all(
        self, query: Document, limit: int, fields: Document | None = None, **more: Any
    ) -> list[Document]:
        """All documents of a query of tokens. To be called within :meth:`run`.

        Args:
            query: its condition.
            limit: at most so many.
            fields: which ones; ``None``: all.
            **more: of the command ``find``.
        """
        # By the bare command, which takes the drivers a tenth less time than a cursor does.
        command: Document = {"find": self.collection, "filter": query, "limit": limit, "batchSize": limit + 1}
        command |= {"projection": fields} if fields else {}
        command |= {**self.read_options, **more}
        try:
            answer = await self.db.command(command)
        except errors.ServerSelectionTimeoutError:
            raise
        except errors.AutoReconnect:  # once more, as drivers do it for a cursor
            answer = await self.db.command(command)
        cursor: Document = answer["cursor"]
        found: list[Document] = cursor["firstBatch"]
        number = cursor["id"]
        while number:  # more than 16 MiB
            more_of_it = {"getMore": number, "collection": self.collection, "batchSize": limit + 1}
            answer = await self.db.command(more_of_it)
            found += answer["cursor"]["nextBatch"]
            number = answer["cursor"]["id"]
        return found
