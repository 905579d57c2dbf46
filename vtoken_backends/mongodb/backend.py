"""Tokens in MongoDB, by PyMongo's async client or Motor, on a replica set or a standalone server.

What is atomic is one document or one unique index, never a transaction (a standalone server has none). So
what shares a fate shares a document: see ``documents``. An operation that is usual and alone is one command
(see ``commands``). Every other one is decided in Python, and written by compare-and-set (see ``writes``).

Reads go to the primary with read concern "local". A primary has every write that a majority acknowledged from
the moment it is elected; "majority" can lag behind that after a fail-over and show a used token as valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Self, cast

from vtoken.backend import (
    Budget,
    BudgetState,
    Change,
    Charge,
    Hold,
    Inserted,
    InsertMode,
    InsertResult,
    Match,
    Outcome,
    Presented,
    Purged,
    SlugCount,
    Spend,
    Spending,
    StoredToken,
    TokenBackend,
    Use,
    UseHeld,
    least_left,
    left_of,
)
from vtoken.errors import ConfigurationError, InvalidInput
from vtoken.inputs import nearest
from vtoken.redact import without_locals
from vtoken_backends.batching import Batcher
from vtoken_backends.mongodb import commands
from vtoken_backends.mongodb.budgets import Budgets
from vtoken_backends.mongodb.client import Client, after_a_write
from vtoken_backends.mongodb.lines import Answer, Insert, Present, Update, is_to_be_charged
from vtoken_backends.mongodb.purging import Removals
from vtoken_backends.mongodb.reading import Find, Reads
from vtoken_backends.mongodb.schema import Schema
from vtoken_backends.mongodb.urls import split_url
from vtoken_backends.mongodb.writes import Writes

_OPTIONS: Final = ("database", "collection", "driver", "durable")


class MongoDBBackend:
    """A :class:`~vtoken.backend.TokenBackend` in a MongoDB database, for any number of processes and hosts.

    Needs asyncio. Operations are refused in another event loop or process than that of :meth:`open`.

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
        self._writes = Writes(self._client, self._schema.check_names)
        self._reads = Reads(self._client, self._writes)
        self._budgets = Budgets(self._client)
        self._removals = Removals(self._client, self._writes)
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
        raise InvalidInput("using: the MongoDB backend does not take part in transactions yet")

    # Tokens ---------------------------------------------------------------------------------------

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
        self._client.check_place()
        op = Insert.of(token, mode, keep_until, wanted_until, also_taken)
        if not spends:
            return await self._inserts.submit(op)
        return await self._client.apart(self._insert_charged(op, spends))

    async def _insert_charged(self, op: Insert, spends: Sequence[Spend]) -> Inserted:
        """Charge, insert, and refund where nothing was inserted."""
        if op.mode is not InsertMode.REPLACE:  # which mostly inserts
            in_the_way = await self._writes.in_the_way(op)
            if in_the_way is not None:
                return in_the_way
        spending = await self._budgets.spend(spends, op.token.created_at)
        if spending.full is not None:
            limited = Inserted(InsertResult.LIMITED, None, spending)
            return await self._writes.in_the_way(op) or limited
        inserted = await self._inserts.submit(op)
        if inserted.result is InsertResult.INSERTED:
            return inserted._replace(spending=spending)
        await self._budgets.undo(spending.charges, reserved=0)
        return inserted

    async def _insert_batch(self, ops: Sequence[Insert]) -> list[Inserted | BaseException]:
        if len(ops) == 1:
            inserted = await commands.issue(self._client, ops[0])
            if inserted is not None:
                return [inserted]
        answers = await self._writes.flush(ops, is_whole=len(ops) == 1)
        return cast("list[Inserted | BaseException]", answers)

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        self._client.check_place()
        op = Present(key, change, now)
        if not spends and not (isinstance(change, Use) and change.resets):
            return await self._submit(op)
        return await self._client.apart(self._present_charged(op, spends))

    async def _submit(self, op: Present) -> Presented:
        return await (self._looks if op.change is None else self._uses).submit(op)

    async def _present_charged(self, op: Present, spends: Sequence[Spend]) -> Presented:
        """Reserve, compare, and then charge or refund."""
        taken = await self._budgets.reserve(spends, op.now)
        spending = taken.spending
        if spending.full is not None:
            replayed = await self._writes.replayed(op) if op.use_id else None
            if replayed is None:
                return Presented(Outcome.LIMITED, spending=spending)
            return replayed._replace(spending=await self._budgets.left(spends, op.now))
        presented = await self._submit(op)
        if presented.outcome is Outcome.REFUSED and is_to_be_charged(op, presented):
            await self._budgets.settle(spending.charges)
            return presented._replace(spending=spending)
        resets: tuple[Budget, ...] = ()
        if presented.outcome is Outcome.RIGHT and isinstance(op.change, Use):
            resets = op.change.resets
        after = self._settled(spending.charges, resets)
        await (after_a_write(after) if op.change is not None else after)
        lefts = [
            left_of(None if spend.budget in resets else _refunded(state), spend, op.now)
            for spend, state in zip(spends, taken.states, strict=True)
        ]
        return presented._replace(spending=Spending(left=least_left(lefts)))

    async def _settled(self, charges: Sequence[Charge], resets: Sequence[Budget]) -> None:
        """Refund what is not forgotten anyway."""
        await self._reset(resets)
        left = [charge for charge in charges if charge.budget not in resets]
        await self._budgets.undo(left, reserved=1)

    async def _reset(self, budgets: Sequence[Budget]) -> None:
        names: dict[bytes, list[bytes]] = {}
        for budget in budgets:
            names.setdefault(budget.object, []).append(budget.name)
        for budgets_of, of_object in names.items():
            await self._budgets.reset(budgets_of, of_object)

    async def _use_batch(self, ops: Sequence[Present]) -> list[Presented | BaseException]:
        if len(ops) == 1:
            used = await commands.use(self._client, ops[0])
            if used is not None:
                answers: list[Answer | BaseException] = [used]
                await self._writes.end_what_they_end(ops, answers)
                return cast("list[Presented | BaseException]", answers)
        answers = await self._writes.flush(ops, is_whole=len(ops) == 1)
        return cast("list[Presented | BaseException]", answers)

    async def _look_batch(self, ops: Sequence[Present]) -> list[Presented | BaseException]:
        return cast("list[Presented | BaseException]", await self._writes.flush(ops))

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        return await self._client.apart(self._update(Update(match, change)))

    async def _update(self, op: Update) -> StoredToken | None:
        [answer] = await self._writes.flush([op])
        if isinstance(answer, BaseException):
            raise answer
        if answer is not None and isinstance(op.change, UseHeld) and op.change.resets:
            await after_a_write(self._reset(op.change.resets))
        return cast("StoredToken | None", answer)

    async def find(self, match: Match, limit: int, after: str | None = None) -> list[StoredToken]:
        self._client.check_place()
        if match.id is not None:
            if after is not None and match.id >= after:
                return []
            return await self._client.apart(self._reads.by_id(match), writes=False)
        if match.digests is not None:
            found = await self._finds.submit(Find(match, limit if after is None else len(match.digests)))
            return found if after is None else [token for token in found if token.id < after][:limit]
        return await self._client.apart(self._reads.page(match, limit, after), writes=False)

    async def deactivate(self, match: Match, at: int, sparing: tuple[str, ...] = ()) -> int:
        return await self._client.apart(self._writes.deactivate(match, at, sparing))

    async def erase(self, content_type: str, object_id: str, budgets_of: bytes) -> int:
        return await self._client.apart(self._erase(content_type, object_id, budgets_of))

    async def _erase(self, content_type: str, object_id: str, budgets_of: bytes) -> int:
        count = await self._removals.erase(content_type, object_id)
        await after_a_write(self._budgets.reset(budgets_of, None))
        return count

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> Purged:
        return await self._client.apart(self._purge(before, now, limit, budgets_before))

    async def _purge(self, before: int, now: int, limit: int, budgets_before: int) -> Purged:
        tokens = await self._removals.purge(before, now, limit)
        return Purged(tokens=tokens, budgets=await self._budgets.purge(budgets_before, limit))

    async def count(self, now: int) -> list[SlugCount]:
        return await self._client.apart(self._reads.count(now), writes=False)

    # Budgets --------------------------------------------------------------------------------------

    async def spend(self, spends: tuple[Spend, ...], now: int) -> Spending:
        return await self._client.apart(self._budgets.spend(spends, now))

    async def refund(self, charges: tuple[Charge, ...]) -> None:
        await self._client.apart(self._budgets.refund(charges))

    async def budgets(self, names: tuple[Budget, ...]) -> list[BudgetState | None]:
        return await self._client.apart(self._budgets.states(names), writes=False)

    async def reset(self, budgets_of: bytes, names: tuple[bytes, ...] | None) -> int:
        return await self._client.apart(self._budgets.reset(budgets_of, names))


def _refunded(state: BudgetState | None) -> BudgetState | None:
    """A budget after its latest charge was given back."""
    return None if state is None else state._replace(spent=max(state.spent - 1, 0))
