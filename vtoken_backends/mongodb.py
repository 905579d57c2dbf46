"""Tokens in MongoDB, by PyMongo's async client or Motor, on a replica set or a standalone server.

One document is one token. What is atomic is one document or one unique index, never a transaction (a
standalone has none). A token of ``REPLACE`` or ``IF_NONE_VALID`` is active in the slot ``""`` of its subject
and slug, which a unique index gives to one token at a time. A new token that has to push older ones out is
first stored *pending*: that secures its digest, and no reader sees it. Then one command ends the older ones
and activates it. A crash in between leaves the older ones, or none, never two.

Reads go to the primary with read concern "local". A primary has every write that a majority acknowledged from
the moment it is elected; "majority" can lag behind that after a fail-over and show a used token as valid.
"""

from __future__ import annotations

import difflib
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from inspect import isawaitable
from typing import Any, Final, NamedTuple, Self, cast

from pymongo import IndexModel, ReturnDocument

import vtoken_backends._mongodb_documents as documents
from vtoken.backend import (
    Budget,
    Change,
    InsertMode,
    InsertResult,
    Match,
    SlugCount,
    Spent,
    StoredToken,
    Use,
)
from vtoken.errors import (
    BackendError,
    BackendUnavailable,
    ConfigurationError,
    CorruptStore,
    OutcomeUnknown,
)
from vtoken.redact import without_locals
from vtoken_backends._mongodb_changes import Changes, Take
from vtoken_backends._mongodb_documents import Document
from vtoken_backends._mongodb_inserts import ATTEMPTS, Inserts, Put, back_off
from vtoken_backends._mongodb_lanes import Lanes
from vtoken_backends._mongodb_link import LONG, Duplicate, Link, settle, split_url
from vtoken_backends.matching import matches

_SCHEMA: Final = 1
_OPTIONS: Final = ("database", "collection", "driver", "durable")


class _Look(NamedTuple):
    """A search for tokens by their digests."""

    match: Match
    limit: int

    def newest(self, tokens: list[StoredToken]) -> list[StoredToken]:
        if len(tokens) > 1:
            tokens.sort(key=_age, reverse=True)
        return tokens[: self.limit]


class MongoDBBackend:
    """A :class:`~vtoken.backend.TokenBackend` in a MongoDB database, for any number of processes and hosts.

    Needs asyncio. Operations are refused in another event loop or process than that of :meth:`open`.

    Args:
        client: a ``pymongo.AsyncMongoClient`` or a Motor ``AsyncIOMotorClient``. It stays the caller's, with
            its own time limits (PyMongo's default for ``socketTimeoutMS`` is none).
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
        self._link = Link(client, url, database, collection, driver, durable)
        self._changes = Changes(self._link)
        inserts = Inserts(self._link)
        self._inserts = Lanes(inserts.insert, inserts.insert_many)
        self._finds = Lanes(self._look, self._look_many, reads=True)
        self._uses = Lanes(self._changes.use, self._changes.use_many)

    @classmethod
    @without_locals(ConfigurationError)
    def from_url(cls, url: str, **options: object) -> Self:
        """``mongodb://[user:password@]host[:port][,...][/database][?collection=name]``, or ``mongodb+srv://``.

        All other parameters of the query are the driver's own. As drivers do it, a user is looked up in the
        database of the path, unless ``authSource`` names another.

        Args:
            url: as above.
            **options: as of the class, but for ``client`` and ``url``.

        Raises:
            ConfigurationError: as of the protocol.
        """
        if not isinstance(url, str):
            raise ConfigurationError(f"the URL must be text, not {type(url).__name__}")
        for option in options:
            if option not in _OPTIONS:
                near = difflib.get_close_matches(option, _OPTIONS, 1)
                hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(_OPTIONS)}"
                raise ConfigurationError(f"the MongoDB backend has no option {option!r}: {hint}")
        url, named = split_url(url)
        return cls(url=url, **cast("Document", named | options))

    def __repr__(self) -> str:
        return f"<MongoDBBackend {getattr(self, '_link', '(not made)')!s}>"

    async def open(self) -> None:
        """As of the protocol. Cancelled, it ends at once."""
        await self._link.open(self._prepare)

    async def close(self) -> None:
        """As of the protocol. A client that was handed in stays open."""
        await settle(self._link.close())

    async def _prepare(self) -> None:
        """Refuse what is not ours before the first write; then make and check the indexes."""
        await self._check_options()
        found = await self._link.run(lambda: self._link.tokens.find_one({}, {"_id": 1}), writes=False)
        marker = await self._link.run(lambda: self._link.meta.find_one({"_id": "schema"}), writes=False)
        if marker is None and found is not None:  # the marker is written before the first token
            raise CorruptStore(f"the collection {self._link.collection!r} was not made by vtoken")
        version = _SCHEMA if marker is None else marker.get("version")
        if not isinstance(version, int) or isinstance(version, bool):
            raise CorruptStore("the schema marker is damaged")
        if version > _SCHEMA:
            raise BackendError(f"the store has schema {version}, newer than {_SCHEMA}: upgrade vtoken")
        # Even where it changes nothing: a server that cannot write durably refuses it here and now.
        stamp = {"$setOnInsert": {"version": _SCHEMA}}
        await self._upsert(lambda: self._link.meta.update_one({"_id": "schema"}, stamp, upsert=True))
        await self._ensure(self._link.tokens, documents.TOKEN_INDEXES)
        await self._ensure(self._link.budgets, documents.BUDGET_INDEXES)

    async def _check_options(self) -> None:
        names = [self._link.collection, f"{self._link.collection}.budgets", f"{self._link.collection}.meta"]
        command = {"listCollections": 1, "filter": {"name": {"$in": names}}}
        answer = await self._link.run(lambda: self._link.db.command(command), writes=False)
        for found in answer["cursor"]["firstBatch"]:
            bad = {"collation", "capped", "viewOn", "timeseries"} & found.get("options", {}).keys()
            if bad:
                raise CorruptStore(f"the collection {found['name']!r} has {', '.join(sorted(bad))}")

    async def _ensure(self, collection: Any, indexes: Sequence[Document]) -> None:
        models = [
            IndexModel(index["key"], **{k: v for k, v in index.items() if k != "key"}) for index in indexes
        ]
        failure: BackendError | None = None
        try:  # waits for those that another process is making
            await self._link.run(lambda: collection.create_indexes(models), seconds=LONG)
        except BackendError as error:
            failure = error  # of no matter if they are there: perhaps this user may not make any
        found = await self._link.run(collection.index_information, writes=False)
        there = [
            {k: dict(v) if k == "key" else v for k, v in index.items() if k not in {"v", "ns", "background"}}
            for index in found.values()
        ]
        for index in indexes:
            if index in there:
                continue
            if isinstance(failure, BackendUnavailable | OutcomeUnknown):
                raise failure
            raise CorruptStore(f"the index on {', '.join(index['key'])} is missing and cannot be made")

    async def insert(self, token: StoredToken, mode: InsertMode, keep_until: int = 0) -> InsertResult:
        """As of the protocol."""
        return await self._inserts.submit(Put(token, mode, keep_until))

    async def find(self, match: Match, limit: int, after: tuple[int, str] | None = None) -> list[StoredToken]:
        """As of the protocol."""
        if match.digests is None or match.id is not None or after is not None:
            return await settle(self._link.run(lambda: self._page(match, limit, after), writes=False))
        return await self._finds.submit(_Look(match, limit))

    async def _page(self, match: Match, limit: int, after: tuple[int, str] | None) -> list[StoredToken]:
        if match.id is not None and after is None:
            found = await self._link.find_all(documents.condition(match), 1)
            return [documents.stored(document) for document in found]
        query = documents.page(match, after)
        cursor = self._link.tokens.find(query).hint(documents.page_index(match))
        cursor = cursor.sort(documents.NEWEST_FIRST).limit(limit)
        return [documents.stored(found) for found in await cursor.to_list(limit)]

    async def _look(self, look: _Look) -> list[StoredToken]:
        async def find() -> list[StoredToken]:
            found = await self._link.find_all(documents.condition(look.match), len(look.match.digests or ()))
            return look.newest([documents.stored(document) for document in found])

        return await self._link.run(find, writes=False)

    async def _look_many(self, looks: Sequence[_Look]) -> Sequence[list[StoredToken]]:
        async def find() -> list[list[StoredToken]]:
            digests = {digest for look in looks for digest in look.match.digests or ()}
            found = await self._link.find_all(documents.look_up(digests), len(digests))
            tokens = {token.digest: token for token in map(documents.stored, found)}
            return [_chosen(tokens, look) for look in looks]

        return await self._link.run(find, writes=False)

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        """As of the protocol."""
        if isinstance(change, Use):
            take = Take(match, change)
            return await (self._uses.submit(take) if take.may_share() else settle(self._changes.use(take)))
        changed = await settle(self._changes.change(lambda: documents.condition(match), change))
        return changed.token if changed else None

    async def deactivate(self, match: Match, at: int) -> int:
        """As of the protocol."""
        return await settle(self._changes.end(lambda: documents.condition(match), at))

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> int:
        """As of the protocol."""
        return await settle(self._purge(before, now, limit, budgets_before))

    async def _purge(self, before: int, now: int, limit: int, budgets_before: int) -> int:
        deleted = 0
        while True:
            wanted = limit - deleted
            found, gone = await self._purge_tokens(before, now, wanted)
            deleted += gone
            if found < wanted or gone == wanted:
                break  # else another purge took some of those, and there may be more
        over = {"until": {"$lte": budgets_before}}
        budgets = await self._link.run(
            lambda: self._link.budgets.find(over, {"_id": 1}).limit(limit).to_list(limit), writes=False
        )
        if budgets:
            these = {"_id": {"$in": [budget["_id"] for budget in budgets]}, **over}
            await self._link.run(lambda: self._link.budgets.delete_many(these))
        return deleted

    async def _purge_tokens(self, before: int, now: int, limit: int) -> tuple[int, int]:
        """Find ended tokens and delete them; how many of each."""
        ended = {"ends_at": {"$lt": before}, "lease_until": {"$lte": now}}
        names = ("content_type", "object_id", "slug", "uses", "has_older", "sealed_for")
        found = await self._link.run(
            lambda: self._link.tokens.find(ended, names).sort([("ends_at", 1)]).limit(limit).to_list(limit),
            writes=False,
        )
        for old in found:
            if old.get("has_older") and (old["uses"] or old.get("sealed_for")):
                # A crash after a use may have left the others of the overlap active.
                await self._changes.end(partial(documents.overlap_of_purged, old), now)
        if not found:
            return 0, 0
        these = {"_id": {"$in": [old["_id"] for old in found]}, **ended}
        result = await self._link.run(lambda: self._link.tokens.delete_many(these))
        return len(found), int(result.deleted_count)

    async def count(self, now: int) -> list[SlugCount]:
        """As of the protocol."""

        async def count() -> list[SlugCount]:
            cursor = self._link.tokens.aggregate(documents.counting(now), allowDiskUse=True)
            if isawaitable(cursor):  # PyMongo's is, Motor's is not
                cursor = await cursor
            return [documents.slug_count(found) for found in await cursor.to_list(None)]

        return await settle(self._link.run(count, writes=False, seconds=LONG))

    async def spend(self, budget: Budget, now: int, limit: int, window: int, max_window: int) -> Spent:
        """As of the protocol."""
        found = await settle(
            self._upsert(
                lambda: self._link.budgets.find_one_and_update(
                    documents.budget_id(budget),
                    documents.spending(now, limit, window, max_window),
                    upsert=True,
                    return_document=ReturnDocument.AFTER,
                )
            )
        )
        return Spent(found["allowed"], int(found["until"]))

    async def refund(self, budget: Budget, until: int) -> None:
        """As of the protocol."""
        query = documents.budget_id(budget) | {"until": until, "spent": {"$gt": 0}}
        await settle(self._link.run(lambda: self._link.budgets.update_one(query, {"$inc": {"spent": -1}})))

    async def reset(self, budget: Budget) -> None:
        """As of the protocol."""
        await settle(self._link.run(lambda: self._link.budgets.delete_one(documents.budget_id(budget))))

    async def _upsert(self, write: Callable[[], Awaitable[Any]]) -> Any:
        """Write once more where two upserts at once both began to insert."""
        for attempt in range(ATTEMPTS):
            try:
                return await self._link.run(write)
            except Duplicate:
                pass
            await back_off(attempt)
        raise BackendUnavailable("MongoDB: others were quicker again and again")


def _chosen(tokens: dict[bytes, StoredToken], look: _Look) -> list[StoredToken]:
    match = look.match
    found = [tokens[digest] for digest in dict.fromkeys(match.digests or ()) if digest in tokens]
    return look.newest([token for token in found if matches(token, match)])


def _age(token: StoredToken) -> tuple[int, str]:
    return token.created_at, token.id
