"""The backend: each method of the protocol as operations on a board, or as statements of its own.

What arrives at the same time shares a batch, which is one statement to read and one round trip to write (see
:mod:`vtoken_backends.postgresql.board`). Nothing is locked in between. Where a row has changed meanwhile, the
batch is played again in a transaction that locks its rows before it reads them, so that it cannot lose a
second time for the same reason. Where a row stays locked by somebody else, an application's own long
transaction perhaps, the operations of the batch go on one by one, and only those that need the row wait.

Most uses and most inserts need no board: one statement carries out a batch of them. Those for which it did
nothing, because something was in their way, are then played.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, cast

from vtoken.backend import Inserted, InsertResult, Outcome, Presented, TokenBackend
from vtoken.errors import BackendUnavailable, ConfigurationError, CorruptStore
from vtoken.inputs import nearest
from vtoken.redact import without_locals
from vtoken_backends.batching import Batcher
from vtoken_backends.postgresql import schema as _schema
from vtoken_backends.postgresql.board import Insert, Line, Operation, Present, line_of
from vtoken_backends.postgresql.connections import Connections, LentConnections
from vtoken_backends.postgresql.rows import to_token
from vtoken_backends.postgresql.statements import Statement, Statements
from vtoken_backends.postgresql.store import BATCH_PATIENCE, PATIENCE, Blocked, Connection, Rows, Store
from vtoken_backends.postgresql.transactions import Transaction
from vtoken_backends.postgresql.urls import DEFAULT_SCHEMA, split

if TYPE_CHECKING:
    from psycopg_pool import AsyncConnectionPool

_T = TypeVar("_T")
_Op = TypeVar("_Op", bound=Operation)

_IN_FLIGHT: Final = 2
"""Batches in flight: one is played while the server writes the other."""
_OPTIONS: Final = ("pool_size", "schema")


class _Later(Enum):
    """The answer to an operation that is yet to be carried out."""

    ALONE = "apart from its batch"
    PLAYED = "on a board"


class PostgreSQLBackend(Store):
    """A :class:`~vtoken.backend.TokenBackend` in a PostgreSQL database, for any number of hosts.

    Needs asyncio and PostgreSQL 13 or later. It keeps no state in a session, so a connection pooler such as
    PgBouncer may stand in between. Operations are refused in another event loop or process than that of
    :meth:`open`.

    Args:
        url: as libpq takes it; what it leaves out, the ``PG*`` variables say. Or a pool of the application's
            own (``psycopg_pool.AsyncConnectionPool``), which has to be open meanwhile and is never closed.
        schema: where the tables are; it is made if it is missing.
        pool_size: how many connections at most, 1 or more; a pool has a size of its own.

    Raises:
        ConfigurationError: an argument is not understood.
    """

    @without_locals(ConfigurationError)
    def __init__(
        self, url: str | AsyncConnectionPool[Any], *, schema: str = DEFAULT_SCHEMA, pool_size: int = 10
    ) -> None:
        if not isinstance(schema, str) or not 1 <= len(schema.encode()) <= 63 or "\0" in schema:
            raise ConfigurationError("schema must be the name of a PostgreSQL schema: 1 to 63 bytes")
        super().__init__(schema, Statements(schema))
        self._connections: Final = (
            Connections(url, pool_size) if isinstance(url, str) else LentConnections(url)
        )
        self._uses = self._batches(self._use)
        self._issues = self._batches(self._issue)
        self._writes = self._batches(self._write)
        self._reads: Final[Batcher[Operation, Any]] = Batcher(
            self._read, in_flight=_IN_FLIGHT, by_caller=True
        )

    @staticmethod
    def _batches(flush: Callable[[Sequence[_Op]], Awaitable[Sequence[Any]]]) -> Batcher[_Op, Any]:
        return Batcher(flush, in_flight=_IN_FLIGHT, by_caller=True, outlast=True)

    @classmethod
    @without_locals(ConfigurationError)
    def from_url(cls, url: str, **options: object) -> Self:
        """``postgresql://[user[:password]@][host][:port][,...][/database][?parameters of libpq]``.

        Args:
            url: as above; ``schema`` and ``pool_size`` may stand among the parameters.
            **options: ``schema``, ``pool_size``.

        Raises:
            ConfigurationError: the URL or an option is not understood.
        """
        if not isinstance(url, str):
            raise ConfigurationError(f"the URL must be text, not {type(url).__name__}")
        place = split(url)
        for name in options:
            if name not in _OPTIONS:
                raise ConfigurationError(
                    f"the PostgreSQL backend has no option {name!r}. {nearest(name, _OPTIONS)}".strip()
                )
        return cls(place.url, **cast("dict[str, Any]", {**place.options, **options}))

    def __repr__(self) -> str:
        if not hasattr(self, "_connections"):  # __init__ raised
            return "<PostgreSQLBackend (not made)>"
        return f"<PostgreSQLBackend {self._connections!r} {self._schema}>"

    async def open(self) -> None:
        await self._connections.open(partial(_schema.prepare, schema=self._schema))

    async def close(self) -> None:
        self._connections.close()

    async def ping(self) -> None:
        await self._run(partial(_schema.check, schema=self._schema), writes=False)

    def within(self, handle: object) -> TokenBackend:
        self._connections.check_place()
        return Transaction(handle, self._schema, self._connections, self)

    # Batches --------------------------------------------------------------------------------------

    async def _submit(self, operation: Operation) -> object:
        """Carry out an operation that may write, together with others: in one statement, if it is one of
        most."""
        self._connections.check_place()
        answer: object = _Later.PLAYED
        if isinstance(operation, Present) and operation.is_plain:
            answer = await self._uses.submit(operation)
        elif isinstance(operation, Insert) and operation.is_plain:
            answer = await self._issues.submit(operation)
        if answer is _Later.PLAYED:
            answer = await self._writes.submit(operation)
        if answer is _Later.ALONE:
            [answer] = await self._run(
                partial(self.play, [operation], PATIENCE), writes=False, may_block=True
            )
        return answer

    async def _look(self, operation: Operation) -> object:
        """Carry out an operation that only reads, together with others."""
        self._connections.check_place()
        answer = await self._reads.submit(operation)
        if answer is _Later.ALONE:
            [answer] = (await self._run(partial(self.look_at, [operation]), writes=False))[1]
        return answer

    async def _use(self, operations: Sequence[Present]) -> Sequence[Any]:
        statement = self._statements.use(operations, BATCH_PATIENCE)
        answers: list[Presented | CorruptStore | _Later] = [_Later.PLAYED] * len(operations)
        try:
            for place, row in await self._connections.run(partial(_fetch, statement), writes=True):
                answers[place] = _right(row)
        except Blocked:
            return [_Later.ALONE] * len(operations)
        return answers

    async def _issue(self, operations: Sequence[Insert]) -> Sequence[Any]:
        first: dict[Line, Insert] = {}
        for operation in operations:
            first.setdefault(line_of(operation.token), operation)
        statement = self._statements.issue(list(first.values()), BATCH_PATIENCE)
        try:
            is_done = await self._connections.run(partial(_try_to, statement), writes=False)
        except Blocked:
            return [_Later.ALONE] * len(operations)
        return [
            Inserted(InsertResult.INSERTED, operation.token)
            if is_done and first[line_of(operation.token)] is operation
            else _Later.PLAYED
            for operation in operations
        ]

    async def _write(self, operations: Sequence[Operation]) -> Sequence[Any]:
        try:
            return await self._connections.run(partial(self.play, operations, BATCH_PATIENCE), writes=False)
        except Blocked:
            return [_Later.ALONE] * len(operations)
        except CorruptStore:
            if len(operations) == 1:
                raise
            return [_Later.ALONE] * len(operations)  # so that the damage meets only those that it concerns

    async def _read(self, operations: Sequence[Operation]) -> Sequence[Any]:
        try:
            return (await self._run(partial(self.look_at, operations), writes=False))[1]
        except CorruptStore:
            if len(operations) == 1:
                raise
            return [_Later.ALONE] * len(operations)

    async def _run(
        self,
        operation: Callable[[Connection], Awaitable[_T]],
        *,
        writes: bool = True,
        may_block: bool = False,
    ) -> _T:
        try:
            return await self._connections.run(operation, writes=writes, may_block=writes or may_block)
        except Blocked:
            pass
        raise BackendUnavailable(
            f"PostgreSQL: a row stayed locked by another transaction for {PATIENCE // 1000} seconds"
        )


async def _fetch(statement: Statement, connection: Connection) -> Rows:
    return await connection.fetch(statement)


async def _try_to(statement: Statement, connection: Connection) -> bool:
    return await connection.try_to([statement])


def _right(row: str) -> Presented | CorruptStore:
    """The answer to a use that was counted. A damaged row is the trouble of the one who used its token."""
    try:
        return Presented(Outcome.RIGHT, to_token(row))
    except CorruptStore as error:
        return error
