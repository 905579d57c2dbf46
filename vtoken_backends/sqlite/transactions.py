"""The same store through a transaction of the application's own.

A handle is an ``sqlite3`` or ``aiosqlite`` connection, or SQLAlchemy's ``AsyncSession`` or
``AsyncConnection`` on ``aiosqlite``. The statements run there, each operation within a savepoint of ours, and
nothing is committed.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import sqlite3
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol, Self, TypeVar

from vtoken.backend import Match, StoredToken, TokenBackend
from vtoken.errors import ConfigurationError, InvalidInput, VTokenError
from vtoken_backends.batching import outlast
from vtoken_backends.sqlite import operations
from vtoken_backends.sqlite.batch import Operation
from vtoken_backends.sqlite.connections import Connections
from vtoken_backends.sqlite.errors import as_backend_error
from vtoken_backends.sqlite.schema import TRIGGERS
from vtoken_backends.sqlite.shared import ANSWERS
from vtoken_backends.sqlite.steps import Rows, Steps, carry_out_elsewhere
from vtoken_backends.sqlite.store import Store

_T = TypeVar("_T")

_KINDS: Final = (
    "using must be an sqlite3 or aiosqlite connection, or SQLAlchemy's AsyncSession or AsyncConnection on"
    " aiosqlite; of synchronous code, the sqlite3 connection underneath: Django's connection.connection, or"
    " session.connection().connection.driver_connection of SQLAlchemy"
)
_BUSY: Final = (
    "another connection writes, or has written since this transaction began with a read, which then cannot"
    " wait for its turn: begin it with BEGIN IMMEDIATE"
)
_NO_TRANSACTION: Final = "using: no transaction is under way on it: begin one, and commit it afterwards"


class Driver(Protocol):
    """A connection of a driver's."""

    @property
    def is_in_transaction(self) -> bool: ...

    async def fetch(self, sql: str, values: Any = ()) -> Rows: ...


class _Sqlite3:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    @property
    def is_in_transaction(self) -> bool:
        with contextlib.suppress(sqlite3.ProgrammingError):  # it was closed
            return self._connection.in_transaction
        return False

    async def fetch(self, sql: str, values: Any = ()) -> Rows:
        return Rows(map(tuple, self._connection.execute(sql, values).fetchall()))


class _Aiosqlite:
    def __init__(self, connection: Any) -> None:
        self._connection = connection

    @property
    def is_in_transaction(self) -> bool:
        with contextlib.suppress(ValueError, sqlite3.ProgrammingError):  # it was closed
            return bool(self._connection.in_transaction)
        return False

    async def fetch(self, sql: str, values: Any = ()) -> Rows:
        return Rows(map(tuple, await self._connection.execute_fetchall(sql, values)))


class _Sqlalchemy:
    """A session or connection of SQLAlchemy's, which connects and begins only when it runs a statement."""

    def __init__(self, handle: Any, *, is_session: bool) -> None:
        self._handle = handle
        self._is_session = is_session
        self._driver: Driver | None = None

    @property
    def is_in_transaction(self) -> bool:
        return bool(self._handle.in_transaction())

    async def fetch(self, sql: str, values: Any = ()) -> Rows:
        if self._driver is None:
            self._driver = await self._connected()
        return await self._driver.fetch(sql, values)

    async def _connected(self) -> Driver:
        handle = self._handle
        connection = await handle.connection() if self._is_session else handle
        raw = (await connection.get_raw_connection()).driver_connection
        driver = _driver_of(raw)
        if driver is None:
            raise InvalidInput(_KINDS)
        if not driver.is_in_transaction:
            if raw.isolation_level is None:  # it commits by itself
                raise InvalidInput(_NO_TRANSACTION)
            # The driver begins before the first write only, and what is read before it must hold, too.
            await driver.fetch("BEGIN IMMEDIATE")
        return driver


def _driver_of(handle: object) -> Driver | None:
    if isinstance(handle, sqlite3.Connection):
        return _Sqlite3(handle)
    aiosqlite: Any = sys.modules.get("aiosqlite")  # what has not been imported yet is nobody's class
    if aiosqlite is not None and isinstance(handle, aiosqlite.Connection):
        return _Aiosqlite(handle)
    return None


def _driver(handle: object) -> Driver:
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


class Transaction(Store):
    """A backend whose methods run on a handle and nowhere else.

    Args:
        handle: what the application gave as ``using``.
        connections: those of the backend, which tell whether the handle leads to the same file.
        path: the file.

    Raises:
        InvalidInput: the handle is of no kind that is known, or no transaction is under way on it.
    """

    def __init__(self, handle: object, connections: Connections, path: str) -> None:
        self._driver = _driver(handle)
        self._connections = connections
        self._path = path
        self._is_prepared = False

    @classmethod
    def from_url(cls, url: str, **options: object) -> Self:
        raise ConfigurationError("a transaction's backend is made by within()")

    async def open(self) -> None:
        self._connections.check_now()

    async def close(self) -> None:
        pass

    async def ping(self) -> None:
        self._connections.check_now()
        await self._translated(self._prepare())

    def within(self, handle: object) -> TokenBackend:
        return Transaction(handle, self._connections, self._path)

    async def _submit(self, operation: Operation) -> Any:
        async def write() -> Any:
            await self._prepare()
            await self._driver.fetch("SAVEPOINT vtoken")
            try:
                answer = await carry_out_elsewhere(operation.alone(), self._driver.fetch)
            except Exception:
                await self._undo()
                raise
            except asyncio.CancelledError:
                # The application may go on after a timeout, and must not commit half of an operation.
                undoing = contextvars.Context().run(asyncio.get_running_loop().create_task, self._undo())
                await outlast(undoing)
                undoing.exception()  # a connection that is gone undoes it as well
                raise
            await self._driver.fetch("RELEASE vtoken")
            return answer

        return await self._translated(write())

    async def _undo(self) -> None:
        await self._driver.fetch("ROLLBACK TO vtoken")
        await self._driver.fetch("RELEASE vtoken")

    async def _read(self, steps: Callable[[], Steps[_T]]) -> _T:
        async def read() -> _T:
            await self._prepare()
            return await carry_out_elsewhere(steps(), self._driver.fetch)

        return await self._translated(read())

    async def _candidates(self, match: Match) -> list[StoredToken]:
        return await self._read(lambda: operations.candidates(match))

    async def _prepare(self) -> None:
        """Find out whether the handle leads to our file, and give its connection what it keeps in memory for
        us. A rollback takes that back."""
        if self._is_prepared:
            return
        self._connections.check_now()
        rows = await self._driver.fetch("PRAGMA database_list")
        [file] = [name for _, schema, name in rows if schema == "main"]
        if not file or not _is_same(file, self._path):
            raise InvalidInput("using: it is connected to another file than the store's")
        sql = "SELECT 1 FROM sqlite_temp_master WHERE name = 'vtoken_answers'"
        if not await self._driver.fetch(sql):
            for statement in (*ANSWERS, *TRIGGERS):
                await self._driver.fetch(statement)
        self._is_prepared = True

    async def _translated(self, awaitable: Awaitable[_T]) -> _T:
        failure: VTokenError
        try:
            return await awaitable
        except VTokenError as error:
            failure = error
        except sqlite3.ProgrammingError as error:
            if "thread" not in str(error):
                failure = as_backend_error(error, self._path, busy=_BUSY)
            else:
                failure = InvalidInput("using: make the sqlite3 connection with check_same_thread=False")
        except Exception as error:
            failure = as_backend_error(error, self._path, busy=_BUSY)
        raise failure  # after the except block, so that the driver's own error is not chained to it


def _is_same(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False
