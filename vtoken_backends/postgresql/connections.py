"""The connections to the server: their life, and what becomes of the driver's errors."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

import anyio
import psycopg
from psycopg.conninfo import conninfo_to_dict

from vtoken.errors import (
    BackendClosed,
    BackendError,
    BackendUnavailable,
    ConfigurationError,
    CorruptStore,
    OutcomeUnknown,
)
from vtoken_backends.postgresql.statements import CONFLICT, Statement
from vtoken_backends.postgresql.store import Blocked, Connection, Rows
from vtoken_backends.postgresql.urls import POOL_SIZE
from vtoken_backends.postgresql.wire import Driver, Wire

if TYPE_CHECKING:
    from psycopg_pool import AsyncConnectionPool

_T = TypeVar("_T")

TIME_LIMIT: Final = 30.0
"""Seconds after which an operation is given up."""
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
# Tells one database of one running server from all others, whatever way leads to it.
_IDENTITY: Final = Statement(
    "SELECT d.oid::text, extract(epoch FROM pg_postmaster_start_time())::text"
    " FROM pg_database AS d WHERE d.datname = current_database()"
)

GAVE_WAY: Final = frozenset({CONFLICT, "40001", "40P01"})
"""The rows have changed since they were read; a serialization failure; a deadlock."""
_NOT_PREPARED: Final = frozenset({"26000", "42P05"})
"""A prepared statement is not there, or another's is: a pooler stands in between after all."""
BLOCKED: Final = "55P03"
"""A row stayed locked."""


class GaveWay(Exception):
    """Another transaction was quicker. Nothing was changed; the operation is to be tried again."""


class _Lost(BackendUnavailable):
    """The connection was lost before anything was written: the operation may be tried once more."""


class OwnConnection:
    """A connection of ours. What it runs in one round trip outside of a transaction is one of its own."""

    begin: ClassVar = Statement("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE")
    commit: ClassVar = Statement("COMMIT")
    rollback: ClassVar = Statement("ROLLBACK")

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self.may_have_written = False
        """Whether a write was sent whose outcome is unknown once the connection is lost."""

    async def fetch(self, statement: Statement) -> Rows:
        return await self._wire.run([statement])

    async def fetch_all(self, statements: Sequence[Statement]) -> Rows:
        return await self._wire.run(statements)

    async def try_to(self, statements: Sequence[Statement]) -> bool:
        self.may_have_written = True
        try:
            await self._wire.run(statements)
        except psycopg.Error as error:
            if error.sqlstate not in GAVE_WAY:
                raise
        else:
            return True
        self.may_have_written = False
        return False


class Connections:
    """Connections for one operation each.

    They are handed back without an await, so that no cancellation can lose one, and made when they are
    needed, so that there is no task in the background and a caller hears of a failure.

    Args:
        url: as libpq takes it.
        size: how many connections at most, 1 or more.

    Raises:
        ConfigurationError: an argument is not understood.
    """

    def __init__(self, url: str, size: int) -> None:
        self._options: dict[str, Any] = {**_DEFAULTS, **_parsed(url), "client_encoding": "UTF8"}
        if type(size) is not int or size < 1:
            raise ConfigurationError(POOL_SIZE)
        self._size = size
        self._opens = 0
        self._idle: list[Wire] = []
        self._opening = anyio.Lock()
        self._may_prepare = True
        self._identity: Rows = []

    def __repr__(self) -> str:
        return self._place

    @property
    def _place(self) -> str:
        host = self._options.get("host") or self._options.get("hostaddr") or "the default host"
        port = self._options.get("port")
        return f"{host}{f':{port}' if port else ''}"

    async def open(self, prepare: Callable[[Connection], Awaitable[None]]) -> None:
        """Connect and prepare the store, if this is the first of the open ones."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise BackendError("the PostgreSQL backend needs asyncio") from None
        async with self._opening:
            if self._opens and self._is_abandoned():
                self._opens = 0
                self._drop_idle()
            if self._opens:
                self.check_place()
            else:
                self._pid, self._loop = os.getpid(), loop
                self._slots = asyncio.Semaphore(self._size)
                self._may_block = asyncio.Semaphore(max(self._size // 2, 1))
                await self._carry_out(prepare, writes=True)
            self._opens += 1

    def close(self) -> None:
        """Undo one :meth:`open`. What is under way ends, and closes its connection."""
        if not self._opens:
            return
        self._opens -= 1
        if not self._opens:
            self._drop_idle()

    async def run(
        self,
        operation: Callable[[Connection], Awaitable[_T]],
        *,
        writes: bool = True,
        may_block: bool = False,
    ) -> _T:
        """Run one operation on a connection in autocommit mode, again where it gave way to another.

        Args:
            operation: what to run. It may raise :class:`GaveWay` itself.
            writes: whether its outcome is unknown once the connection is lost.
            may_block: it may wait for a lock for long. Only half of the connections do.

        Raises:
            Blocked: a row stayed locked.
        """
        self.check_place()
        if not may_block:
            return await self._carry_out(operation, writes)
        try:
            async with asyncio.timeout(TIME_LIMIT):
                await self._may_block.acquire()
        except TimeoutError:
            raise Blocked from None
        try:
            return await self._carry_out(operation, writes)
        finally:
            self._may_block.release()

    async def leads_to_us(self, other: Connection) -> bool:
        """Whether another connection is one to the same database of the same server."""
        theirs = await other.fetch(_IDENTITY)
        if theirs != self._identity:  # or the server was started again
            self._identity = await self.run(lambda connection: connection.fetch(_IDENTITY), writes=False)
        return theirs == self._identity

    async def _carry_out(self, operation: Callable[[Connection], Awaitable[_T]], writes: bool) -> _T:
        connection: OwnConnection | None = None
        failure: Exception | None = None
        attempts = 0
        try:
            async with asyncio.timeout(TIME_LIMIT):
                while True:
                    attempts += 1
                    try:
                        async with self._connection() as connection:
                            connection.may_have_written = writes
                            return await operation(connection)
                    except asyncio.CancelledError as cancelled:
                        raise cancelled.with_traceback(None)  # noqa: B904  # the driver's frames show digests
                    except Exception as error:
                        failure = self._translated(error, connection)
                    if isinstance(failure, GaveWay) or (isinstance(failure, _Lost) and attempts == 1):
                        continue
                    if isinstance(failure, _Lost):
                        failure = BackendUnavailable(*failure.args)
                    raise failure  # outside of the block: the driver's error quotes keys
        except TimeoutError:
            pass
        lost = connection is not None and connection.may_have_written
        raise (OutcomeUnknown if lost else BackendUnavailable)(
            f"PostgreSQL at {self._place} did not answer within {TIME_LIMIT:.0f} seconds"
        )

    @asynccontextmanager
    async def _connection(self) -> AsyncGenerator[OwnConnection]:
        async with self._slots:
            wire = self._living_idle_one() or await self._connect()
            try:
                yield OwnConnection(wire)
            finally:
                if self._opens and wire.is_idle:
                    self._idle.append(wire)
                else:
                    wire.close()

    def _living_idle_one(self) -> Wire | None:
        while self._idle:
            wire = self._idle.pop()
            if wire.is_alive:
                return wire
            wire.close()
        return None

    async def _connect(self) -> Wire:
        try:
            driver = await psycopg.AsyncConnection.connect(
                autocommit=True, prepare_threshold=None, **self._options
            )
        except psycopg.Error as error:
            problem = _why_not_connected(str(error))
        except (UnicodeError, ValueError):
            problem = "the host name is not valid"
        else:
            try:
                return Wire(driver, prepares=await self._adopt(driver))
            except BaseException:
                driver.pgconn.finish()
                raise
        # The system may refuse a connection at once, without anything to wait for. Callers who try again and
        # again would then leave the event loop no turn.
        await asyncio.sleep(0)
        # The driver's message may quote a part of a password that was not percent-encoded.
        raise BackendUnavailable(f"PostgreSQL at {self._place}: {problem}")

    async def _adopt(self, driver: Driver) -> bool:
        """Whether statements may be prepared: where the session is ours alone.

        A pooler, which hands sessions around, answers a client with a process id of its own. A plan that is
        kept must not read a whole table because that was small when the plan was made: so plans go by indexes
        alone.
        """
        if not self._may_prepare:
            return False
        cursor = await driver.execute(b"SELECT pg_backend_pid()")
        if await cursor.fetchone() != (driver.pgconn.backend_pid,):
            self._may_prepare = False
            return False
        await driver.execute(
            b"SELECT set_config('plan_cache_mode', 'force_generic_plan', false),"
            b" set_config('enable_seqscan', 'off', false), set_config('enable_hashjoin', 'off', false),"
            b" set_config('enable_mergejoin', 'off', false), set_config('jit', 'off', false)"
        )
        return True

    def _drop_idle(self) -> None:
        idle, self._idle = self._idle, []
        if self._pid == os.getpid():  # else the connections are another process's to end
            for wire in idle:
                wire.close()

    def _is_abandoned(self) -> bool:
        return self._pid != os.getpid() or self._loop.is_closed()

    def check_place(self) -> None:
        """Raise :class:`~vtoken.BackendClosed` where the connections cannot be used."""
        if not self._opens:
            raise BackendClosed("the PostgreSQL backend is not open: use `async with manager:`")
        if self._pid != os.getpid():
            raise BackendClosed(
                "the PostgreSQL backend was opened in another process: open one after the fork"
            )
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        if self._loop is not loop:
            raise BackendClosed(
                "the PostgreSQL backend was opened in another event loop: open one in each loop"
            )

    def _translated(self, error: Exception, connection: OwnConnection | None) -> Exception:
        if isinstance(error, GaveWay | Blocked):
            return error
        if isinstance(error, BackendError):
            return type(error)(*error.args)  # whose traceback shows no rows
        if not isinstance(error, psycopg.Error):
            return BackendError(f"PostgreSQL: {type(error).__name__} in the backend")
        state = error.sqlstate or ""
        if state in GAVE_WAY:
            return GaveWay()
        if state in _NOT_PREPARED:
            self._may_prepare = False
            self._drop_idle()
            return GaveWay()
        if state == BLOCKED:
            return Blocked()
        if state == "25006":
            self._drop_idle()  # after a fail-over, all of them may lead to the old primary
            return BackendUnavailable(f"PostgreSQL at {self._place} is not the primary any more: read-only")
        said = f"{type(error).__name__} {state}".rstrip()
        lost = isinstance(error, psycopg.OperationalError) and (not state or state.startswith(("08", "57P")))
        if not lost:
            return refused(state, said)
        self._drop_idle()
        if connection is None or not connection.may_have_written:
            return _Lost(f"PostgreSQL at {self._place}: the connection was lost ({said})")
        return OutcomeUnknown(
            f"PostgreSQL at {self._place}: the connection was lost, the write may have happened ({said})"
        )


class LentConnections(Connections):
    """Connections of the application's own pool, which stays the application's: it opens and closes it.

    Args:
        pool: of psycopg's connections; whether these begin transactions by themselves does not matter.
    """

    def __init__(self, pool: AsyncConnectionPool[Any]) -> None:
        super().__init__("", pool.max_size)
        self._pool = pool

    @property
    def _place(self) -> str:
        return f"pool {self._pool.name}"

    @asynccontextmanager
    async def _connection(self) -> AsyncGenerator[OwnConnection]:
        async with self._slots, self._pool.connection() as driver:
            if driver.info.encoding != "utf-8":
                raise BackendError(
                    f"{self._place}: its connections have another client encoding than UTF8: say"
                    " client_encoding=UTF8 in its connection string"
                )
            wire = Wire(driver, prepares=False)
            try:
                yield OwnConnection(wire)
            finally:
                if wire.is_idle:
                    wire.leave()
                else:
                    wire.close()  # the pool makes another one


def refused(state: str, said: str) -> BackendError:
    """What a refusal of the server means.

    Args:
        state: its SQLSTATE.
        said: what may be shown of it.
    """
    if state in ("XX001", "XX002"):
        return CorruptStore(f"PostgreSQL: the database is damaged ({said})")
    if state in ("42P01", "3F000"):
        return CorruptStore("PostgreSQL: a table of vtoken's is gone")
    if state == "42501":
        return BackendUnavailable("PostgreSQL: the role lacks a privilege on vtoken's tables or their schema")
    if state in _RESOURCES or state.startswith("53"):
        return BackendUnavailable(f"PostgreSQL: {_RESOURCES.get(state, 'a resource is exhausted')} ({said})")
    return BackendError(f"PostgreSQL refused ({said})")


_RESOURCES: Final = {
    "53100": "the server's disk is full",
    "53200": "the server is out of memory",
    "53300": "the server has too many connections",
    "57014": "the statement was cancelled by a time limit or an administrator",
}
_CONNECT_PROBLEMS: Final = (
    ("authentication failed", "it refuses the user or the password"),
    ("no password supplied", "it asks for a password, and the URL has none"),
    ("no pg_hba.conf entry", "its pg_hba.conf lets nobody in from this host"),
    ("does not exist", "it has no such database or role"),
    ("permission denied for database", "the role may not connect to the database"),
    ("too many", "it has too many connections"),
    ("remaining connection slots", "it has too many connections"),
    ("starting up", "it is starting up"),
    ("shutting down", "it is shutting down"),
    ("read-only", "it is read-only: none of the hosts is the primary"),
    ("translate host name", "the host name is unknown"),
    ("resolve", "the host name is unknown"),
    ("Name or service not known", "the host name is unknown"),
    ("refused", "nobody listens there"),
    ("No such file or directory", "there is no socket of a server"),
    ("timeout expired", "it does not answer"),
    ("timed out", "it does not answer"),
    ("SSL", "TLS was refused: see sslmode and sslrootcert"),
    ("certificate", "its certificate is refused"),
)


def _why_not_connected(message: str) -> str:
    """One of our own sentences for what the driver said, which may quote what must not be shown."""
    return next(
        (ours for theirs, ours in _CONNECT_PROBLEMS if theirs in message), "the connection could not be made"
    )


def _parsed(url: str) -> dict[str, Any]:
    try:
        parsed = conninfo_to_dict(url)
    except psycopg.Error:
        parsed = {"port": "?"}  # the message may quote the password
    ports = str(parsed.get("port", "")).split(",")  # libpq looks at them when it connects
    if all(not port or (port.isascii() and port.isdigit() and int(port) < 65536) for port in ports):
        return parsed
    raise ConfigurationError(
        "libpq does not understand the PostgreSQL URL; are user name and password percent-encoded?"
    )
