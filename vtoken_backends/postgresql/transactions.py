"""The same store through a transaction of the application's own.

A handle is a psycopg ``AsyncConnection``, an asyncpg connection, or SQLAlchemy's ``AsyncSession`` or
``AsyncConnection`` on one of the two. The statements run there, within savepoints of ours, and nothing is
committed.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from contextvars import Context
from typing import Any, ClassVar, Final, Protocol, Self, TypeVar, cast

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from vtoken.backend import (
    Inserted,
    InsertMode,
    InsertResult,
    Spend,
    Spending,
    StoredToken,
    TokenBackend,
)
from vtoken.errors import BackendError, BackendUnavailable, ConfigurationError, InvalidInput
from vtoken_backends.batching import outlast
from vtoken_backends.postgresql import schema as _schema
from vtoken_backends.postgresql.board import Insert, Operation
from vtoken_backends.postgresql.connections import GAVE_WAY, TIME_LIMIT, Connections, refused
from vtoken_backends.postgresql.statements import Statement, Statements
from vtoken_backends.postgresql.store import PATIENCE, Connection, Rows, Store

_T = TypeVar("_T")

_NOBODY: Final = bytes(16)
"""The object of budgets that belong to none."""
_KINDS: Final = (
    "using must be a psycopg AsyncConnection, an asyncpg connection, or SQLAlchemy's AsyncSession or"
    " AsyncConnection on one of these; no synchronous one can be used"
)
_UNDOING: Final = 5.0
"""Seconds that a cancelled operation may take to be undone."""
_NO_TRANSACTION: Final = "using: no transaction is under way on it: begin one, and commit it afterwards"


class Driver(Protocol):
    """A connection of a driver's."""

    @property
    def is_in_transaction(self) -> bool: ...

    async def fetch(self, statement: Statement) -> Rows: ...


class _Psycopg:
    def __init__(self, connection: psycopg.AsyncConnection[Any]) -> None:
        self._connection = connection

    @property
    def is_in_transaction(self) -> bool:
        return not self._connection.closed and (
            self._connection.pgconn.transaction_status
            in (TransactionStatus.INTRANS, TransactionStatus.ACTIVE)
        )

    async def fetch(self, statement: Statement) -> Rows:
        cursor = psycopg.AsyncRawCursor(self._connection, row_factory=tuple_row)
        await cursor.execute(statement.text.encode(), statement.parameters, prepare=False)
        return await cursor.fetchall() if cursor.description is not None else []


class _Asyncpg:
    def __init__(self, connection: Any) -> None:
        self._connection = connection

    @property
    def is_in_transaction(self) -> bool:
        try:
            return bool(self._connection.is_in_transaction())
        except Exception:
            return False  # it was given back to its pool

    async def fetch(self, statement: Statement) -> Rows:
        return [tuple(row) for row in await self._connection.fetch(statement.text, *statement.parameters)]


class _Sqlalchemy:
    """A session or connection of SQLAlchemy's, which connects and begins only when it runs a statement."""

    def __init__(self, handle: Any, *, is_session: bool) -> None:
        self._handle = handle
        self._is_session = is_session
        self._driver: Driver | None = None

    @property
    def is_in_transaction(self) -> bool:
        return bool(self._handle.in_transaction())

    async def fetch(self, statement: Statement) -> Rows:
        if self._driver is None:
            self._driver = await self._connected()
        return await self._driver.fetch(statement)

    async def _connected(self) -> Driver:
        handle = self._handle
        connection = await handle.connection() if self._is_session else handle
        raw = await connection.get_raw_connection()
        driver = _driver_of(raw.driver_connection)
        if driver is None:
            raise InvalidInput(_KINDS)
        if not driver.is_in_transaction:
            await connection.exec_driver_sql("SELECT 1")
        if not driver.is_in_transaction:  # its isolation level is AUTOCOMMIT
            raise InvalidInput(_NO_TRANSACTION)
        return driver


def _driver_of(handle: object) -> Driver | None:
    # What has not been imported yet is nobody's class.
    if isinstance(handle, psycopg.AsyncConnection):
        return _Psycopg(handle)
    asyncpg: Any = sys.modules.get("asyncpg")
    if asyncpg is not None and isinstance(handle, asyncpg.Connection | asyncpg.pool.PoolConnectionProxy):
        return _Asyncpg(handle)
    return None


def _handle(handle: object) -> Driver:
    """The handle as a driver's connection.

    Raises:
        InvalidInput: it is of no kind that is known, or no transaction is under way.
    """
    driver = _driver_of(handle)
    if driver is None:
        alchemy: Any = sys.modules.get("sqlalchemy.ext.asyncio")
        if alchemy is None or not isinstance(handle, alchemy.AsyncSession | alchemy.AsyncConnection):
            raise InvalidInput(_KINDS)
        driver = _Sqlalchemy(handle, is_session=isinstance(handle, alchemy.AsyncSession))
    if not driver.is_in_transaction:
        raise InvalidInput(_NO_TRANSACTION)
    return driver


class _Within:
    """A connection inside of a transaction: what would be one elsewhere is a savepoint here."""

    begin: ClassVar = Statement("SAVEPOINT vtoken")
    commit: ClassVar = Statement("RELEASE SAVEPOINT vtoken")
    rollback: ClassVar = Statement("ROLLBACK TO SAVEPOINT vtoken")
    begin_all: ClassVar = Statement("SAVEPOINT vtoken_all")
    """Begins what consists of several of those."""
    commit_all: ClassVar = Statement("RELEASE SAVEPOINT vtoken_all")
    rollback_all: ClassVar = Statement("ROLLBACK TO SAVEPOINT vtoken_all")

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._begun: list[Statement] = []

    async def fetch(self, statement: Statement) -> Rows:
        if statement in (self.begin, self.begin_all):
            self._begun.append(statement)
        rows = await self._driver.fetch(statement)
        if statement is self.commit_all:
            self._begun.clear()
        elif statement is self.commit:
            self._begun = [one for one in self._begun if one is not self.begin]
        return rows

    async def fetch_all(self, statements: Sequence[Statement]) -> Rows:
        rows: Rows = []
        for statement in statements:
            rows = await self.fetch(statement)
        return rows

    async def undo(self) -> None:
        """Take back what an operation that was cancelled has written so far. Where that cannot be done, the
        transaction cannot be committed either."""
        if self._begun:
            undoing = self.rollback_all if self.begin_all in self._begun else self.rollback
            self._begun.clear()
            with suppress(Exception):
                async with asyncio.timeout(_UNDOING):
                    await self._driver.fetch(undoing)

    async def try_to(self, statements: Sequence[Statement]) -> bool:
        await self.fetch(self.begin)
        try:
            await self.fetch_all([*statements, self.commit])
        except Exception as error:
            if getattr(error, "sqlstate", None) not in GAVE_WAY:
                raise
        else:
            return True
        await self._driver.fetch(self.rollback)
        return False


class Transaction(Store):
    """A backend whose methods run on a handle and nowhere else.

    Args:
        handle: what the application gave as ``using``.
        schema: where the tables are.
        connections: those of the backend, which tell whether the handle leads to the same database.
        outside: the backend itself.

    Raises:
        InvalidInput: the handle is of no kind that is known, or no transaction is under way on it.
    """

    def __init__(self, handle: object, schema: str, connections: Connections, outside: TokenBackend) -> None:
        super().__init__(schema, Statements(schema, is_tuned=False))
        self._handle: Final = _Within(_handle(handle))
        self._connections: Final = connections
        self._outside: Final = outside
        self._is_checked = False

    @classmethod
    def from_url(cls, url: str, **options: object) -> Self:
        raise ConfigurationError("a transaction's backend is made by within()")

    async def open(self) -> None:
        self._connections.check_place()

    async def close(self) -> None:
        pass

    async def ping(self) -> None:
        async def check(connection: Connection) -> None:
            await _schema.check(connection, self._schema)

        await self._run(check, writes=False)

    def within(self, handle: object) -> TokenBackend:
        return Transaction(handle, self._schema, self._connections, self._outside)

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
        """Charge what belongs to no object apart, and the rest on the handle: a transaction may last, and
        must not lock a budget that everybody shares. A rollback gives back the rest only.

        What is shared is charged last: whoever is refused by the object's own limits, or waits for another
        transaction that spends from them, has taken nothing from others.
        """
        shared = tuple([spend for spend in spends if spend.budget.object == _NOBODY])
        own = tuple([spend for spend in spends if spend.budget.object != _NOBODY])
        operation = Insert(token, mode, keep_until, wanted_until, also_taken, own)
        if not shared:
            return cast("Inserted", await self._submit(operation))

        async def insert(connection: Connection) -> tuple[Inserted, Spending]:
            await connection.fetch(_Within.begin_all)
            [inserted] = cast("list[Inserted]", await self.play([operation], PATIENCE, connection))
            spent = Spending()
            if inserted.result is InsertResult.INSERTED:
                try:
                    spent = await self._outside.spend(shared, token.created_at)
                except BackendError:
                    await connection.fetch(_Within.rollback_all)
                    raise
            if spent.full is not None:
                await connection.fetch(_Within.rollback_all)
            await connection.fetch(_Within.commit_all)
            return inserted, spent

        inserted, spent = await self._run(insert)
        if spent.full is not None:
            place = spends.index(shared[spent.full])
            return Inserted(InsertResult.LIMITED, spending=spent._replace(full=place))
        if inserted.result is not InsertResult.INSERTED:
            full = inserted.spending.full
            of_all = None if full is None else spends.index(own[full])
            return inserted._replace(spending=inserted.spending._replace(full=of_all))
        charges = {charge.budget: charge for charge in (*spent.charges, *inserted.spending.charges)}
        lefts = [left for left in (spent.left, inserted.spending.left) if left is not None]
        in_order = tuple([charges[spend.budget] for spend in spends])
        return inserted._replace(spending=Spending(charges=in_order, left=min(lefts, default=None)))

    async def _submit(self, operation: Operation) -> object:
        async def play(connection: Connection) -> object:
            [answer] = await self.play([operation], PATIENCE, connection)
            return answer

        return await self._run(play)

    async def _look(self, operation: Operation) -> object:
        async def look(connection: Connection) -> object:
            [answer] = (await self.look_at([operation], connection))[1]
            return answer

        return await self._run(look, writes=False)

    async def _check(self) -> None:
        if not self._is_checked and not await self._connections.leads_to_us(self._handle):
            raise InvalidInput("using: it is connected to another database than the store's")
        self._is_checked = True

    async def _run(self, operation: Callable[[Connection], Awaitable[_T]], *, writes: bool = True) -> _T:
        self._connections.check_place()
        failure: BackendError | InvalidInput
        try:
            async with asyncio.timeout(TIME_LIMIT):
                await self._check()
                return await operation(self._handle)
        except (BackendError, InvalidInput) as error:
            failure = type(error)(*error.args)  # whose traceback shows no rows
        except asyncio.CancelledError as cancelled:
            # The application may go on after a timeout, and must not commit half of an operation.
            await outlast(Context().run(asyncio.get_running_loop().create_task, self._handle.undo()))
            raise cancelled.with_traceback(None)  # noqa: B904  # the driver's frames show digests
        except TimeoutError:
            failure = BackendUnavailable(
                f"PostgreSQL did not answer within {TIME_LIMIT:.0f} seconds: roll the transaction back"
            )
        except Exception as error:  # of one of several drivers
            failure = _refused(error, repr(self._connections))
        raise failure  # outside of the block: the driver's error quotes keys


def _refused(error: Exception, place: str) -> BackendError:
    error = getattr(error, "orig", None) or error  # SQLAlchemy's are around the driver's
    state = getattr(error, "sqlstate", None) or ""
    said = f"{type(error).__name__} {state}".rstrip()
    if state in GAVE_WAY:
        return BackendUnavailable(
            "PostgreSQL: another transaction was quicker: roll this one back and run it again"
        )
    if state.startswith(("08", "57P")) or (not state and _is_about_the_connection(error)):
        return BackendUnavailable(
            f"PostgreSQL at {place}: the connection was lost, and the transaction with it ({said})"
        )
    return refused(state, said)


def _is_about_the_connection(error: Exception) -> bool:
    """Whether an error that has no code of the server's says that there is no server any more."""
    asyncpg: Any = sys.modules.get("asyncpg")
    lost = (psycopg.OperationalError, OSError, *(() if asyncpg is None else (asyncpg.InterfaceError,)))
    return isinstance(error, lost)
