"""The link to the server: its connections, its life, and what becomes of the driver's errors."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from selectors import EVENT_READ, DefaultSelector
from typing import Any, Final, TypeVar

import anyio
import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus
from vtoken.errors import (
    BackendClosed,
    BackendError,
    BackendUnavailable,
    ConfigurationError,
    CorruptStore,
    OutcomeUnknown,
)

_T = TypeVar("_T")
Connection = psycopg.AsyncConnection[tuple[Any, ...]]

_DEFAULTS: Final[dict[str, Any]] = {
    "fallback_application_name": "vtoken",
    "target_session_attrs": "read-write",  # of several hosts the primary
    # A server that is gone without a word is given up after about ten seconds.
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
# The statements count on READ COMMITTED, and what is acknowledged on being on disk, whatever the role or the
# database has for a default. "remote_apply" is more than "on" and stays.
_CONFIGURE: Final = """
SELECT set_config('default_transaction_isolation', 'read committed', false),
    set_config('synchronous_commit', CASE current_setting('synchronous_commit')
        WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, false)
"""
_AGAIN: Final = {"40001", "40P01"}  # serialization failure, deadlock: rolled back for another's sake
_INTERRUPTED: Final = {"25006", "55P03", "57014"}  # read-only server, time limits of locks and statements


class Link:
    """Connections for one operation each.

    They are handed back without an await, so that no cancellation can lose one (psycopg_pool 3.3 loses
    connections so), and made when they are needed, so that there is no task and who waits hears of a failure.

    Args:
        url: as libpq takes it.
        size: how many connections at most, 1 or more.

    Raises:
        ConfigurationError: an argument is not understood.
    """

    def __init__(self, url: str, size: int) -> None:
        self._options: dict[str, Any] = {**_DEFAULTS, **_parsed(url), "client_encoding": "UTF8"}
        if type(size) is not int or size < 1:
            raise ConfigurationError("pool_size is a number of connections, 1 or more")
        self._size = size
        self._opens = 0
        self._idle: list[Connection] = []
        self._opening = anyio.Lock()

    def __repr__(self) -> str:
        return str(self._options.get("dbname", "(default)"))

    async def open(self, prepare: Callable[[Connection], Awaitable[None]]) -> None:
        """Connect and prepare the store, if this is the first of the open ones."""
        async with self._opening:
            if self._opens and self._is_abandoned():
                self._opens = 0
                self._drop_idle()
            if self._opens:
                self._check_place()
            else:
                self._pid, self._loop = os.getpid(), asyncio.get_running_loop()
                self._slots = asyncio.Semaphore(self._size)
                await self._carry_out(prepare, writes=True)
            self._opens += 1

    def close(self) -> None:
        """Undo one :meth:`open`. What is under way ends, and closes its connection."""
        if not self._opens:
            return
        self._opens -= 1
        if not self._opens:
            self._drop_idle()

    async def run(self, operation: Callable[[Connection], Awaitable[_T]], *, writes: bool = True) -> _T:
        """Run one operation on a connection in autocommit mode, again where it gave way to another's."""
        self._check_place()
        return await self._carry_out(operation, writes)

    async def _carry_out(self, operation: Callable[[Connection], Awaitable[_T]], writes: bool) -> _T:
        while True:
            try:
                async with self._connection() as connection:
                    return await operation(connection)
            except psycopg.Error as error:
                failure = None if error.sqlstate in _AGAIN else _translated(error, writes)
            if failure is not None:
                raise failure  # outside of the block: the driver's error quotes keys

    @asynccontextmanager
    async def _connection(self) -> AsyncGenerator[Connection]:
        async with self._slots:
            connection = self._living_idle_one() or await self._connect()
            try:
                yield connection
            finally:
                if self._opens and connection.pgconn.transaction_status == TransactionStatus.IDLE:
                    self._idle.append(connection)
                else:
                    connection.pgconn.finish()  # as connection.close() does, without an await

    def _living_idle_one(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            with DefaultSelector() as selector:
                selector.register(connection.pgconn.socket, EVENT_READ)
                if not selector.select(0):
                    return connection
            connection.pgconn.finish()  # unasked, a server says little but that it hangs up
        return None

    async def _connect(self) -> Connection:
        try:
            connection = await psycopg.AsyncConnection.connect(autocommit=True, **self._options)
        except psycopg.Error as error:
            problem = type(error).__name__
        else:
            try:
                await connection.execute(_CONFIGURE)
            except BaseException:
                connection.pgconn.finish()
                raise
            return connection
        # The driver's message may hold a part of a password that was not percent-encoded.
        raise BackendUnavailable(
            f"PostgreSQL cannot be reached, or refuses the user or the database ({problem})"
        )

    def _drop_idle(self) -> None:
        idle, self._idle = self._idle, []
        if self._pid == os.getpid():  # else the connections are another process's to end
            for connection in idle:
                connection.pgconn.finish()

    def _is_abandoned(self) -> bool:
        return self._pid != os.getpid() or self._loop.is_closed()

    def _check_place(self) -> None:
        if not self._opens:
            raise BackendClosed("the PostgreSQL backend is not open: use `async with manager:`")
        if self._pid != os.getpid():
            raise BackendClosed(
                "the PostgreSQL backend was opened in another process: open one after the fork"
            )
        if self._loop is not asyncio.get_running_loop():
            raise BackendClosed(
                "the PostgreSQL backend was opened in another event loop: open one in each loop"
            )


def _parsed(url: str) -> dict[str, Any]:
    try:
        return conninfo_to_dict(url)
    except psycopg.Error:
        pass  # the message may quote the password
    raise ConfigurationError(
        "libpq does not understand the PostgreSQL URL; are user name and password percent-encoded?"
    )


def _translated(error: psycopg.Error, writes: bool) -> BackendError:
    state = error.sqlstate or ""
    said = f"{type(error).__name__} {state}".rstrip()
    if state in ("XX001", "XX002"):
        return CorruptStore(f"PostgreSQL: the database is damaged ({said})")
    if state in _INTERRUPTED or state.startswith("53"):  # insufficient resources
        return BackendUnavailable(f"PostgreSQL: {said}")
    lost = isinstance(error, psycopg.OperationalError) and (not state or state.startswith(("08", "57P")))
    if not lost:
        return BackendError(f"PostgreSQL refused ({said})")
    if not writes:
        return BackendUnavailable(f"PostgreSQL: the connection was lost ({said})")
    return OutcomeUnknown(f"PostgreSQL: the connection was lost, the write may have happened ({said})")
