"""The same store through a transaction of the application's own.

A handle is a client session of PyMongo's async client or of Motor's, on which a transaction is under way. The
commands run on the session's own client, and nothing is committed.

- What a unique index refuses ends the transaction. So everything is read before it is written, and no
  operation is a single command.
- A transaction sees what had been committed when it began. Where somebody else has changed it since, the
  server says that it conflicts, and ends the transaction: the application runs it again, which
  ``with_transaction`` does by itself.
- There are no savepoints. So an operation goes on to its end when its caller is cancelled, and one that fails
  ends the transaction on the server: half of it cannot be committed.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from typing import Any, Final, Self, TypeVar
from weakref import WeakValueDictionary

import pymongo
from bson.errors import BSONError
from pymongo import errors
from pymongo.asynchronous.client_session import AsyncClientSession

from vtoken.backend import (
    Inserted,
    InsertMode,
    InsertResult,
    Match,
    Presented,
    Spend,
    Spending,
    StoredToken,
    TokenBackend,
    least_left,
)
from vtoken.errors import BackendError, BackendUnavailable, ConfigurationError, CorruptStore, InvalidInput
from vtoken_backends.mongodb.budgets import Budgets
from vtoken_backends.mongodb.client import Client
from vtoken_backends.mongodb.collections import Collections, Document
from vtoken_backends.mongodb.documents import condition, id_name, new_id, object_of
from vtoken_backends.mongodb.failures import TransientFailure, translated_within
from vtoken_backends.mongodb.lines import Insert, Present, Update
from vtoken_backends.mongodb.reading import Find
from vtoken_backends.mongodb.schema import Schema
from vtoken_backends.mongodb.store import Store
from vtoken_backends.mongodb.writes import PAGE

_T = TypeVar("_T")
KnownClients = WeakValueDictionary[int, Any]
"""Clients that were found to lead to the store's own deployment, by their identity."""

_TIME_LIMIT: Final = 20.0
"""Seconds that a command may take."""
_UNDOING: Final = 5.0
"""Seconds that ending a transaction on the server may take."""
_NOBODY: Final = bytes(16)
"""The object of budgets that belong to none."""


def _session_of(handle: object) -> Any:
    """The handle as a client session.

    Raises:
        InvalidInput: it is none, or no transaction is under way on it.
    """
    motor: Any = sys.modules.get("motor.motor_asyncio")  # what has not been imported yet is nobody's class
    if not isinstance(handle, AsyncClientSession) and (
        motor is None or not isinstance(handle, motor.AsyncIOMotorClientSession)
    ):
        raise InvalidInput("using must be a client session of PyMongo's async client or of Motor's")
    session: Any = handle
    if session.has_ended or not session.in_transaction:
        raise InvalidInput(
            "using: no transaction is under way on the session: begin one (session.with_transaction), and let"
            " it be committed afterwards"
        )
    return session


class _Failed(Exception):
    """An operation within the transaction has failed. It is no :class:`BackendError`, so that nothing on its
    way tries again or goes on without it."""

    def __init__(self, failure: BackendError | InvalidInput) -> None:
        super().__init__()
        self.failure = failure


class _InSession:
    """A database or collection whose methods run in a session."""

    def __init__(self, target: Any, session: Any) -> None:
        self._target = target
        self._session = session

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._target, name)

        def run(*args: Any, **options: Any) -> Any:
            return method(*args, session=self._session, **options)

        return run


class _OfSession(Collections):
    """The collections as the session's client sees them.

    Args:
        session: the application's.
        store: those of the backend itself.
        is_inside: the commands run in the transaction, and not beside it.
    """

    def __init__(self, session: Any, store: Client, *, is_inside: bool) -> None:
        self._client = session.client
        self.collection = store.collection
        self.read_options = self.write_options = {}  # they are the transaction's
        self.choose(session.client, store.db.name, store.tokens.write_concern, store.schema_concern)
        if is_inside:
            for name in ("admin", "db", "tokens", "budgets", "meta"):
                setattr(self, name, _InSession(getattr(self, name), session))

    async def run(
        self, operation: Callable[[], Awaitable[_T]], *, writes: bool = True, seconds: float | None = None
    ) -> _T:
        # Without the limit of operations at once: those that have their place may wait for this transaction.
        failure: BackendError | InvalidInput
        try:
            with pymongo.timeout(seconds or _TIME_LIMIT):
                return await operation()
        except errors.InvalidOperation:
            failure = InvalidInput("using: the session has ended, or does not read from the primary")
        except (errors.PyMongoError, BSONError, CorruptStore) as error:
            topology = getattr(self._client, "topology_description", None)
            failure = translated_within(error, names=self.names_index, topology=topology)
        raise _Failed(failure)

    async def write_each(self, write: Callable[[], Awaitable[object]]) -> dict[int, BackendError]:
        """A step that is refused ends the transaction, and with it the steps that were not."""
        await self.run(write)
        return {}

    async def end(self) -> None:
        """End the transaction on the server. The session itself does not know of it, and so cannot take what
        the application still does for something outside of the transaction."""
        with suppress(errors.PyMongoError), pymongo.timeout(_UNDOING):
            await self.admin.command("abortTransaction")


class Transaction(Store):
    """A backend whose methods run on a handle and nowhere else.

    Args:
        handle: what the application gave as ``using``.
        client: the backend's.
        outside: the backend itself.
        known: clients that were checked before.

    Raises:
        InvalidInput: the handle is no client session, or no transaction is under way on it.
    """

    def __init__(self, handle: object, client: Client, outside: TokenBackend, known: KnownClients) -> None:
        self._session = _session_of(handle)
        self._client = client
        self._outside = outside
        self._known = known
        self._inside = _OfSession(self._session, client, is_inside=True)
        self._beside = _OfSession(self._session, client, is_inside=False)
        # Indexes cannot be asked for in a transaction.
        super().__init__(self._inside, Schema(self._beside).check_names)
        self._budgets = Budgets(self._inside, wait=0)  # what is reserved elsewhere stays so in here

    @classmethod
    def from_url(cls, url: str, **options: object) -> Self:
        raise ConfigurationError("a transaction's backend is made by within()")

    async def open(self) -> None:
        self._client.check_place()

    async def close(self) -> None:
        pass

    async def ping(self) -> None:
        async def check() -> None:
            await Schema(self._beside).check()
            await self._inside.run(lambda: self._inside.meta.find_one({"_id": "schema"}))

        await self._apart(check(), writes=False)

    async def note(self, name: str, text: str, *, replace: bool = False) -> str:
        return await self._apart(Schema(self._inside).note(name, text, replace), writes=bool(text))

    def within(self, handle: object) -> TokenBackend:
        return Transaction(handle, self._client, self._outside, self._known)

    async def insert(
        self,
        token: StoredToken,
        mode: InsertMode,
        *,
        keep_until: int = 0,
        wanted_until: int = 0,
        also_taken: tuple[bytes, ...] = (),
        spends: tuple[Spend, ...] = (),
    ) -> Inserted:
        """Charge what belongs to no object apart, and the rest within the transaction: it may last, and must
        not lock a budget that everybody shares. A rollback gives back the rest only."""
        shared = tuple([spend for spend in spends if spend.budget.object == _NOBODY])
        own = tuple([spend for spend in spends if spend.budget.object != _NOBODY])
        op = Insert.of(token, mode, keep_until, wanted_until, also_taken)
        if not shared:
            return await (self._apart(self._insert_charged(op, own)) if own else self._insert_alone(op))
        inserted = await self._apart(self._insert_charged_apart(op, own, shared))
        spent = inserted.spending
        if spent.full is not None:
            full = (*own, *shared)[spent.full]
            return inserted._replace(spending=spent._replace(full=spends.index(full)))
        charges = {charge.budget: charge for charge in spent.charges}
        in_order = tuple([charges[spend.budget] for spend in spends if spend.budget in charges])
        return inserted._replace(spending=spent._replace(charges=in_order))

    async def _insert_charged_apart(
        self, op: Insert, own: Sequence[Spend], shared: tuple[Spend, ...]
    ) -> Inserted:
        """Charge the object's own limits first. Whoever is refused by them, or conflicts with another
        transaction that spends from them, has taken nothing from others."""
        now = op.token.created_at
        in_the_way = None if op.mode is InsertMode.REPLACE else await self._writes.in_the_way(op)
        if in_the_way is not None:
            return in_the_way
        charged = await self._budgets.spend(own, now)
        if charged.full is not None:
            return await self._writes.in_the_way(op) or Inserted(InsertResult.LIMITED, spending=charged)
        spent = await self._outside.spend(shared, now)
        if spent.full is not None:
            await self._budgets.undo(charged.charges)
            full = spent._replace(full=len(own) + spent.full)
            return await self._writes.in_the_way(op) or Inserted(InsertResult.LIMITED, spending=full)
        try:
            inserted = await self._insert_one(op)
        except _Failed:
            with suppress(BackendError):  # what it has failed for matters more
                await self._outside.refund(spent.charges)
            raise
        if inserted.result is not InsertResult.INSERTED:
            await self._budgets.undo(charged.charges)
            await self._outside.refund(spent.charges)
            return inserted
        lefts = [left for left in (charged.left, spent.left) if left is not None]
        together = Spending(charges=(*charged.charges, *spent.charges), left=least_left(lefts))
        return inserted._replace(spending=together)

    # Steps ----------------------------------------------------------------------------------------

    async def _insert_one(self, op: Insert) -> Inserted:
        [answer] = await self._writes.flush([op], is_whole=True)
        if isinstance(answer, Inserted):
            return answer
        raise _Failed(_failure_of(answer))

    async def _present_one(self, op: Present) -> Presented:
        [answer] = await self._writes.flush([op], is_whole=True)
        if isinstance(answer, Presented):
            return answer
        raise _Failed(_failure_of(answer))

    async def _find_named(self, find: Find) -> list[StoredToken]:
        async def look() -> list[StoredToken]:
            [found] = await self._reads.by_digest([find])
            if isinstance(found, BaseException):
                raise _Failed(_failure_of(found))
            return found

        return await self._apart(look(), writes=False)

    async def _update(self, op: Update) -> StoredToken | None:
        updated = await super()._update(op)
        if updated is None:
            await self._see_the_latest(op.match)
        return updated

    async def _deactivate(self, match: Match, at: int, sparing: tuple[str, ...]) -> int:
        await self._see_the_latest(match)
        return await super()._deactivate(match, at, sparing)

    async def _erase(self, content_type: str, object_id: str, budgets_of: bytes) -> int:
        await self._see_the_latest(Match(content_type=content_type, object_id=object_id))
        return await super()._erase(content_type, object_id, budgets_of)

    async def _see_the_latest(self, match: Match) -> None:
        """Make sure that the transaction sees what had been committed before this call, and not only before
        it began, where what it does not see would be passed over and not be a conflict."""
        if match.id is not None:
            query: Document = _named([id_name(match.id)])
        elif match.digests is not None:
            query = _named(match.digests)
        elif match.content_type is not None and match.object_id is not None:
            query = {"object": object_of(match.content_type, match.object_id)}
        else:
            return  # about any object: it is no single step elsewhere, either
        latest = await self._revisions(self._beside, {**condition(match), **query})
        seen = await self._revisions(self._inside, {"_id": {"$in": list(latest)}})
        for oid, revision in latest.items():
            if oid not in seen:
                await self._conflict_if_new(oid)
            elif seen[oid] < revision:
                raise _Failed(TransientFailure())

    async def _revisions(self, collections: Collections, query: Document) -> dict[bytes, int]:
        async def find() -> dict[bytes, int]:
            found = await collections.find_all(query, PAGE, {"revision": 1})
            return {one["_id"]: one["revision"] for one in found}

        return await collections.run(find, writes=False)

    async def _conflict_if_new(self, oid: bytes) -> None:
        """Conflict with whoever has inserted a document since the transaction began. One that is not seen
        because this very transaction has deleted it may be inserted, and is deleted again."""

        async def insert_and_delete() -> None:
            await self._inside.tokens.insert_one({"_id": oid, "names": [new_id()]})
            await self._inside.tokens.delete_one({"_id": oid})

        await self._inside.run(insert_and_delete)

    async def _apart(self, step: Coroutine[Any, Any, _T], *, writes: bool = True) -> _T:
        try:
            # As a write in any case: the application cannot use its session before the step has ended.
            return await self._client.apart(self._to_the_end(step, writes=writes))
        finally:
            step.close()  # if it was never begun

    async def _to_the_end(self, step: Coroutine[Any, Any, _T], *, writes: bool) -> _T:
        failure: BackendError | InvalidInput
        try:
            await self._check()
            return await step
        except _Failed as failed:
            failure = failed.failure
        except BackendError as error:
            failure = type(error)(*error.args)  # whose traceback shows no documents
        if writes and not isinstance(failure, InvalidInput):
            await self._inside.end()
        raise failure

    async def _check(self) -> None:
        """Refuse a session of another deployment, or of a server that has no transactions."""
        client = self._session.client
        if self._known.get(id(client)) is client:
            return
        theirs = await self._beside.run(lambda: self._beside.admin.command("hello"), writes=False)
        if "setName" not in theirs and theirs.get("msg") != "isdbgrid":
            raise _Failed(
                InvalidInput(
                    "using: a standalone MongoDB server has no transactions: make it a replica set, of one"
                    " member if need be"
                )
            )
        if not self._client.is_made_of(client):
            ours = await self._client.run(lambda: self._client.admin.command("hello"), writes=False)
            if not (theirs["isWritablePrimary"] and ours["isWritablePrimary"]):
                raise _Failed(BackendUnavailable("MongoDB: the replica set has no primary at the moment"))
            # It tells the processes that serve as primary apart, whatever addresses lead to them.
            same = theirs.get("topologyVersion", {}).get("processId")
            if same is None or same != ours.get("topologyVersion", {}).get("processId"):
                raise _Failed(
                    InvalidInput(
                        "using: the session's client is connected to another deployment than the store's, or"
                        " through another mongos: hand this client in, MongoDBBackend(client)"
                    )
                )
        self._known[id(client)] = client


def _failure_of(answer: object) -> BackendError:
    if isinstance(answer, BackendError):
        return type(answer)(*answer.args)
    return BackendError(f"MongoDB: {type(answer).__name__} in the backend")


def _named(names: Iterable[object]) -> Document:
    """The query of the documents that have one of some names, or are about to."""
    either = {"$in": list(names)}
    return {"$or": [{"names": either}, {"moved": either}]}
