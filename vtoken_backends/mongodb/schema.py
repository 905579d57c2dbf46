"""What a MongoDB store has besides documents: its marker, notes, indexes, and the steps between schemas."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final

from pymongo import IndexModel, ReturnDocument, errors

from vtoken.errors import BackendError, BackendUnavailable, CorruptStore, OutcomeUnknown
from vtoken_backends.mongodb.client import LONG
from vtoken_backends.mongodb.collections import Collections, Document
from vtoken_backends.mongodb.documents import BUDGET_INDEXES, TOKEN_INDEXES
from vtoken_backends.mongodb.failures import Duplicate, missing_index
from vtoken_backends.mongodb.patience import Patience

Migration = Callable[[Collections], Awaitable[None]]

SCHEMA = 1
MIGRATIONS: dict[int, Migration] = {}
"""The step from each schema to the next. Several processes may run a step at once, and one that was killed
half-way runs it again: each part of a step has to do no harm when it is repeated."""
_NAMES: Final = TOKEN_INDEXES[0]
_NO_COLLECTION: Final = 26
SMALL_PAGES: Final[Document] = {"storageEngine": {"wiredTiger": {"configString": "leaf_page_max=4KB"}}}
"""An option of every index. Digests are random, so that a page is read and written for one of its entries.
Where a store is larger than the server's cache, the usual pages of 16 KiB make a use cost twice as much."""


class Schema:
    """The schema of a store.

    Args:
        client: of the store.
    """

    def __init__(self, client: Collections) -> None:
        self._client = client

    async def prepare(self) -> None:
        """Refuse what is not ours before the first write; then migrate, and make and check the indexes.

        Raises:
            CorruptStore: the store is damaged or not ours, or an index cannot be made.
            BackendError: its schema is newer than ours.
        """
        await self._check_server()
        await self._check_options()
        await self._check_marker()
        await self._ensure(self._client.tokens, TOKEN_INDEXES)
        await self._ensure(self._client.budgets, BUDGET_INDEXES)

    async def check_names(self) -> None:
        """Look whether the unique index is there, without which nothing may be written.

        Raises:
            CorruptStore: it is not.
        """
        if _NAMES not in await self._indexes(self._client.tokens):
            raise missing_index(self._client.names_index)

    async def check(self) -> None:
        """Look whether everything is there that :meth:`prepare` made. Raises: as that."""
        marker = await self._client.run(lambda: self._client.meta.find_one({"_id": "schema"}), writes=False)
        if marker is None:
            raise CorruptStore(f"MongoDB: the collection {self._client.collection}.meta was dropped")
        for collection, wanted in (
            (self._client.tokens, TOKEN_INDEXES),
            (self._client.budgets, BUDGET_INDEXES),
        ):
            there = await self._indexes(collection)
            for index in wanted:
                if index not in there:
                    raise CorruptStore(
                        f"MongoDB: the index on {', '.join(index['key'])} of {collection.name!r} is missing;"
                        " open the store again"
                    )

    async def note(self, name: str, text: str, is_replaced: bool) -> str:
        """What :meth:`TokenBackend.note` says."""
        same: Document = {"_id": f"note {name}"}

        async def read() -> Document | None:
            found = await self._client.meta.find_one(same)
            return None if found is None else dict(found)

        async def write() -> Document | None:
            update = {"$set" if is_replaced else "$setOnInsert": {"text": text}}
            found = await self._client.meta.find_one_and_update(
                same, update, upsert=True, return_document=ReturnDocument.AFTER
            )
            return None if found is None else dict(found)

        found = await (self._upsert(write) if text else self._client.run(read, writes=False))
        return "" if found is None else str(found["text"])

    # Opening --------------------------------------------------------------------------------------

    async def _check_server(self) -> None:
        hello = await self._client.run(lambda: self._client.admin.command("hello"), writes=False)
        if not hello.get("isWritablePrimary", False):
            where = f"; its primary is {hello['primary']}" if hello.get("primary") else ""
            raise BackendUnavailable(
                f"MongoDB: the server {hello.get('me', '')} is not the primary of its replica set{where}:"
                " leave directConnection out of the URL and name the set by replicaSet"
            )
        if hello.get("msg") == "isdbgrid":
            return
        await self._check_shard()

    async def _check_shard(self) -> None:
        """Refuse a shard that is connected directly and has only a part of a sharded collection."""
        name = f"{self._client.db.name}.{self._client.collection}"

        async def ask() -> Any:
            try:
                return await self._client.config["cache.collections"].find_one({"_id": name}, {"_id": 1})
            except errors.OperationFailure:  # no right to ask
                return None

        if await self._client.run(ask, writes=False) is not None:
            raise CorruptStore(
                f"MongoDB: {name!r} is a sharded collection, and this server is a shard with a part of it."
                " Tokens need a collection that is not sharded: connect to mongos, and name another one"
            )

    async def _check_options(self) -> None:
        collection = self._client.collection
        names = [collection, f"{collection}.budgets", f"{collection}.meta"]
        command = {"listCollections": 1, "filter": {"name": {"$in": names}}}
        answer = await self._client.run(lambda: self._client.db.command(command), writes=False)
        for found in answer["cursor"]["firstBatch"]:
            bad = {"collation", "capped", "viewOn", "timeseries"} & found.get("options", {}).keys()
            if bad:
                raise CorruptStore(f"the collection {found['name']!r} has {', '.join(sorted(bad))}")

    async def _check_marker(self) -> None:
        found = await self._client.run(lambda: self._client.tokens.find_one({}, {"_id": 1}), writes=False)
        marker = await self._client.run(lambda: self._client.meta.find_one({"_id": "schema"}), writes=False)
        if marker is None and found is not None:  # the marker is written before the first token
            raise CorruptStore(f"the collection {self._client.collection!r} was not made by vtoken")
        version = SCHEMA if marker is None else marker.get("version")
        if not isinstance(version, int) or isinstance(version, bool):
            raise CorruptStore("the schema marker is damaged")
        if version > SCHEMA:
            raise BackendError(f"the store has schema {version}, newer than {SCHEMA}: upgrade vtoken")
        # Even where it changes nothing: a server that cannot write durably refuses it here and now.
        stamp = {"$setOnInsert": {"version": SCHEMA}}
        await self._upsert(lambda: self._client.meta.update_one({"_id": "schema"}, stamp, upsert=True))
        for number in range(version, SCHEMA):
            await self._migrate(number)

    async def _migrate(self, number: int) -> None:
        if number not in MIGRATIONS:
            raise BackendError(f"there is no step from schema {number} to {number + 1}: use an older vtoken")
        await MIGRATIONS[number](self._client)
        same, next_ = {"_id": "schema", "version": number}, {"$set": {"version": number + 1}}
        await self._client.run(lambda: self._client.meta.update_one(same, next_))

    async def _ensure(self, collection: Any, indexes: Sequence[Document]) -> None:
        """Make the indexes that are missing. One that is there serves, whatever the size of its pages."""
        made = collection.with_options(write_concern=self._client.schema_concern)
        missing = await self._missing(collection, indexes)
        failure: BackendError | None = None
        for options in (SMALL_PAGES, {}):  # not every service takes the option
            if not missing or isinstance(failure, BackendUnavailable | OutcomeUnknown | Duplicate):
                break
            failure = None
            models = [IndexModel(index["key"], **_options(index), **options) for index in missing]
            try:  # waits for those that another process is making
                await self._client.run(partial(made.create_indexes, models), seconds=LONG)
            except BackendError as error:
                failure = error  # of no matter if they are there: perhaps this user may not make any
            missing = await self._missing(collection, indexes)
        if not missing:
            return
        if isinstance(failure, BackendUnavailable | OutcomeUnknown):
            raise failure
        what = f"the index on {', '.join(missing[0]['key'])} is missing and cannot be made"
        if failure is None or isinstance(failure, Duplicate):
            raise CorruptStore(f"{what}: is there a duplicate, or another index of that name?")
        raise CorruptStore(f"{what}: {failure}")

    async def _missing(self, collection: Any, indexes: Sequence[Document]) -> list[Document]:
        there = await self._indexes(collection)
        return [index for index in indexes if index not in there]

    async def _indexes(self, collection: Any) -> list[Document]:
        """The indexes of a collection, without what they have of the server."""

        async def ask() -> list[Document]:
            try:
                answer = await self._client.db.command({"listIndexes": collection.name})
            except errors.OperationFailure as error:
                if error.code == _NO_COLLECTION:
                    return []
                raise
            found: list[Document] = answer["cursor"]["firstBatch"]
            return found

        return [
            {k: dict(v) if k == "key" else v for k, v in index.items() if k in {"key", *_MATTERS}}
            for index in await self._client.run(ask, writes=False)
        ]

    async def _upsert(self, write: Callable[[], Awaitable[Any]]) -> Any:
        """Write once more where two upserts at once both began to insert."""
        pause = Patience()
        while True:
            try:
                return await self._client.run(write)
            except Duplicate:
                pass
            await pause()


def _options(index: Document) -> Document:
    return {name: value for name, value in index.items() if name != "key"}


_MATTERS: Final = ("unique", "sparse", "partialFilterExpression", "collation", "expireAfterSeconds", "hidden")
"""Of an index, what makes it serve or not."""
