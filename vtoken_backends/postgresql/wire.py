"""Statements on a connection of psycopg's, past its cursors.

psycopg makes the connection, and libpq speaks on it. What psycopg has in between is made for all kinds of
statements and values: a cursor, a cache of prepared statements, and a reader that is registered with the
event loop for each answer and removed again. That takes three quarters of the processor time of a short
statement: 119 microseconds with a cursor, 29 without (November 2026, psycopg 3.3.9).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import Context
from itertools import count
from select import POLLIN, poll
from typing import Any, Final

import psycopg
from psycopg.errors import error_from_result
from psycopg.pq import ConnStatus, ExecStatus, PipelineStatus, TransactionStatus
from psycopg.pq.abc import PGresult

from vtoken_backends.batching import outlast
from vtoken_backends.postgresql.statements import Statement
from vtoken_backends.postgresql.store import Rows

Driver = psycopg.AsyncConnection[Any]

_UNDOING: Final = 5.0
"""Seconds that a cancelled statement may take to end."""
_FROM_TEXT: Final[dict[int, Callable[[bytes], object]]] = {
    16: lambda value: value == b"t",
    20: int,
    21: int,
    23: int,
}
"""By the type's number in ``pg_type``; everything else is text."""


class Wire:
    """Runs one thing after the other.

    Args:
        driver: the connection, which nobody else uses meanwhile.
        prepares: whether statements are prepared in its session.
    """

    def __init__(self, driver: Driver, *, prepares: bool) -> None:
        self._driver = driver
        self._pgconn = driver.pgconn
        self._names: dict[str, bytes] | None = {} if prepares else None
        self._numbers = count(1)
        self._answer: asyncio.Future[None] | None = None
        self._syncs = 0  # that were sent in pipeline mode, and have not come back
        self._loop = asyncio.get_running_loop()
        self._socket = self._pgconn.socket
        self._loop.add_reader(self._socket, self._read)
        self._is_watched = True

    def leave(self) -> None:
        """Leave the connection to others."""
        if not self._is_watched or self._loop.is_closed():
            return
        self._is_watched = False
        for remove in (self._loop.remove_writer, self._loop.remove_reader):
            with suppress(OSError):  # the event loop forgets a socket all the same that libpq has closed
                remove(self._socket)

    def _leave_if_lost(self) -> None:
        """To be called before anything else can run: libpq has closed the socket of a connection that is
        lost, and the next one that somebody opens has its number."""
        if self._pgconn.status != ConnStatus.OK:
            self.leave()

    def close(self) -> None:
        """End the connection, as ``driver.close()`` does, but without an await."""
        self.leave()
        self._pgconn.finish()

    @property
    def is_idle(self) -> bool:
        """Whether it is outside of a transaction and of a statement."""
        pgconn = self._pgconn
        return (
            pgconn.transaction_status == TransactionStatus.IDLE
            and pgconn.pipeline_status == PipelineStatus.OFF
        )

    @property
    def is_alive(self) -> bool:
        """Whether an idle one can be used: a server that speaks without being asked mostly hangs up."""
        if self._pgconn.status != ConnStatus.OK:
            return False
        waiting = poll()
        waiting.register(self._socket, POLLIN)
        return not waiting.poll(0)

    async def run(self, statements: Sequence[Statement]) -> Rows:
        """Run statements in one round trip, several of them as one transaction where none is under way.

        Returns:
            the rows of the last one: numbers, booleans and texts.

        Raises:
            psycopg.Error: the first of them that failed.
        """
        try:
            results = await self._carry(statements)
        except asyncio.CancelledError:
            # Its caller may be cancelled again, and is told only when nothing can happen any more.
            await outlast(Context().run(self._loop.create_task, self._give_up()))
            raise
        except psycopg.Error:
            self._leave_if_lost()
            raise
        for result in results:
            if result.status == ExecStatus.FATAL_ERROR:
                error = error_from_result(result)
                raise error if error.sqlstate else psycopg.OperationalError("the connection was lost")
        return _rows(results[-1])

    async def _carry(self, statements: Sequence[Statement]) -> list[PGresult]:
        texts = [statement.text for statement in statements]
        new = [] if self._names is None else [text for text in texts if text not in self._names]
        if len(statements) == 1 and not new:
            self._send(statements[0])
            return await self._results()
        self._pgconn.enter_pipeline_mode()
        for text in new:
            self._prepare(text)
        if new:
            self._sync()  # so that a transaction that is to begin has not begun yet
        for statement in statements:
            self._send(statement)
        self._sync()
        prepared = await self._results() if new else []
        results = await self._results()
        self._pgconn.exit_pipeline_mode()
        if any(result.status != ExecStatus.COMMAND_OK for result in prepared):
            self._forget(new)
        return [*prepared, *results]

    def _sync(self) -> None:
        self._pgconn.pipeline_sync()
        self._syncs += 1

    def _prepare(self, text: str) -> None:
        if self._names is not None and text not in self._names:
            self._names[text] = name = b"vtoken_%d" % next(self._numbers)
            self._pgconn.send_prepare(name, text.encode())

    def _forget(self, texts: Sequence[str]) -> None:
        """Statements that were refused, for want of a table perhaps, are prepared anew the next time."""
        for text in texts:
            if self._names is not None:
                self._names.pop(text, None)

    def _send(self, statement: Statement) -> None:
        values = [_to_text(value) for value in statement.parameters]
        if self._names is None:
            self._pgconn.send_query_params(statement.text.encode(), values)
        else:
            self._pgconn.send_query_prepared(self._names[statement.text], values)

    async def _results(self) -> list[PGresult]:
        """The results of what was sent: of one statement, or of all that one synchronisation ends."""
        pgconn = self._pgconn
        while pgconn.flush():
            await self._can_write()
        results: list[PGresult] = []
        while True:
            while pgconn.is_busy():
                self._answer = self._loop.create_future()
                await self._answer
            result = pgconn.get_result()
            if result is None:
                if pgconn.status != ConnStatus.OK and not results:
                    raise psycopg.OperationalError("the connection was lost")
                if pgconn.status != ConnStatus.OK or pgconn.pipeline_status == PipelineStatus.OFF:
                    return results
            elif result.status == ExecStatus.PIPELINE_SYNC:
                self._syncs -= 1
                return results
            else:
                results.append(result)

    async def _can_write(self) -> None:
        self._answer = writable = self._loop.create_future()
        self._loop.add_writer(self._socket, _tell, writable)
        try:
            await writable
        finally:
            if self._is_watched:
                self._loop.remove_writer(self._socket)

    def _read(self) -> None:
        """Something has arrived."""
        answer = self._answer
        if answer is None or answer.done():
            if self.is_idle:  # the server hangs up
                self.close()
            elif self._pgconn.status == ConnStatus.OK:
                self._consume(None)
            return
        self._consume(answer)

    def _consume(self, answer: asyncio.Future[None] | None) -> None:
        try:
            self._pgconn.consume_input()
            if answer is not None and not self._pgconn.is_busy():
                answer.set_result(None)
        except psycopg.Error as error:
            if answer is not None:
                answer.set_exception(error)
        self._leave_if_lost()

    async def _give_up(self) -> None:
        """Have the server end what it does for a caller that was cancelled: it may be waiting for a lock, and
        would go on once it has it. Then close the connection, because the server may be asked too late, and
        would end the next statement.

        What comes after a synchronisation is carried out although what came before it was cancelled. So it is
        waited for, and cancelled in its turn.
        """
        try:
            with suppress(Exception):
                async with asyncio.timeout(_UNDOING):
                    await self._driver.cancel_safe(timeout=_UNDOING)
                    await self._results()
                    while self._syncs:
                        await self._driver.cancel_safe(timeout=_UNDOING)
                        await self._results()
        finally:  # cancelled with its event loop, perhaps
            self.close()


def _tell(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _rows(result: PGresult) -> Rows:
    if result.status != ExecStatus.TUPLES_OK:
        return []
    columns = range(result.nfields)
    readers = [_FROM_TEXT.get(result.ftype(column), bytes.decode) for column in columns]
    get = result.get_value
    return [
        tuple(
            [
                None if (value := get(row, column)) is None else read(value)
                for column, read in zip(columns, readers, strict=True)
            ]
        )
        for row in range(result.ntuples)
    ]


def _to_text(value: object) -> bytes | None:
    """A value as PostgreSQL reads it; the texts of a list are names of our own, which need no quotes."""
    match value:
        case str():
            return value.encode()
        case None:
            return None
        case bytes():
            return b"\\x" + value.hex().encode()
        case list():
            return b"{%b}" % b",".join([_to_text(item) or b"" for item in value])
        case _:
            return str(value).encode()
