"""The backend: each method of the protocol as operations on a board, or as statements of its own.

What arrives at the same time shares a batch, which is one statement to read and one round trip to write (see
:mod:`vtoken_backends.postgresql.board`). Nothing is locked in between. Where a row has changed meanwhile, the
batch is played again in a transaction that locks its rows before it reads them, so that it cannot lose a
second time for the same reason. Where a row stays locked by somebody else, an application's own long
transaction perhaps, the operations of the batch go on one by one, and only those that need the row wait.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import count
from typing import Any, Final, Self, TypeVar, cast

from vtoken.backend import (
    Budget,
    BudgetState,
    Change,
    Charge,
    Hold,
    Inserted,
    InsertMode,
    Match,
    Presented,
    Purged,
    SlugCount,
    Spend,
    Spending,
    StoredToken,
    TokenBackend,
    Use,
    ended,
    key_ended,
    key_of,
    matches,
)
from vtoken.errors import BackendUnavailable, ConfigurationError, CorruptStore, InvalidInput
from vtoken.inputs import nearest
from vtoken_backends.batching import Batcher
from vtoken_backends.postgresql import schema as _schema
from vtoken_backends.postgresql.board import (
    Board,
    Find,
    Insert,
    Missing,
    Needs,
    Operation,
    Present,
    Refund,
    SpendAll,
    Update,
)
from vtoken_backends.postgresql.connections import (
    BEGIN,
    COMMIT,
    ROLLBACK,
    Blocked,
    Connection,
    Connections,
    Rows,
)
from vtoken_backends.postgresql.rows import number_of, to_budget, to_receipt, to_token
from vtoken_backends.postgresql.statements import Statement, Statements
from vtoken_backends.postgresql.urls import DEFAULT_SCHEMA, split

_T = TypeVar("_T")

_BATCH_PATIENCE: Final = 100
"""Milliseconds that a batch waits for a lock before its operations go on one by one."""
_PATIENCE: Final = 20_000
"""Milliseconds that an operation of its own waits for a lock."""
_PAGE: Final = 1000
"""How many tokens are ended or removed in one statement."""
_ATTEMPTS: Final = 3
"""How often a batch is played with locks before its operations go on one by one."""
_IN_FLIGHT: Final = 2
_OPTIONS: Final = ("pool_size", "schema")


class _Alone:
    """The answer to an operation that is to be carried out apart from its batch."""


_ALONE: Final = _Alone()


class PostgreSQLBackend:
    """A :class:`~vtoken.backend.TokenBackend` in a PostgreSQL database, for any number of hosts.

    Needs asyncio and PostgreSQL 13 or later. It keeps no state in a session, so a connection pooler such as
    PgBouncer may stand in between. Operations are refused in another event loop or process than that of
    :meth:`open`.

    Args:
        url: as libpq takes it; what it leaves out, the ``PG*`` variables say.
        schema: where the tables are; it is made if it is missing.
        pool_size: how many connections at most, 1 or more.

    Raises:
        ConfigurationError: an argument is not understood.
    """

    def __init__(self, url: str, *, schema: str = DEFAULT_SCHEMA, pool_size: int = 10) -> None:
        if not isinstance(schema, str) or not 1 <= len(schema.encode()) <= 63 or "\0" in schema:
            raise ConfigurationError("schema must be the name of a PostgreSQL schema: 1 to 63 bytes")
        self._schema: Final = schema
        self._statements: Final = Statements(schema)
        self._connections: Final = Connections(url, pool_size)
        self._writes: Final[Batcher[Operation, Any]] = Batcher(
            self._write, in_flight=_IN_FLIGHT, by_caller=True, outlast=True
        )
        self._reads: Final[Batcher[Operation, Any]] = Batcher(
            self._read, in_flight=_IN_FLIGHT, by_caller=True
        )

    @classmethod
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
        return f"<PostgreSQLBackend {self._connections!r} {self._schema}>"

    async def open(self) -> None:
        await self._connections.open(partial(_schema.prepare, schema=self._schema))

    async def close(self) -> None:
        self._connections.close()

    async def ping(self) -> None:
        await self._connections.run(partial(_schema.check, schema=self._schema), writes=False)

    async def note(self, name: str, text: str, *, replace: bool = False) -> str:
        if text:
            rows = await self._fetch(self._statements.note(name, _PATIENCE, text, replace))
        else:
            rows = await self._fetch(self._statements.read_note(name), writes=False)
        return cast("str", rows[0][0]) if rows else ""

    def within(self, handle: object) -> TokenBackend:
        self._connections.check_place()
        raise InvalidInput("using: the PostgreSQL backend has no transactions of the application's own yet")

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
        operation = Insert(token, mode, keep_until, wanted_until, also_taken, spends)
        return cast("Inserted", await self._submit(operation))

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        operation = Present(key, change, now, spends)
        if change is None and not spends:
            return cast("Presented", await self._look(operation))
        return cast("Presented", await self._submit(operation))

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        return cast("StoredToken | None", await self._submit(Update(match, change)))

    async def find(self, match: Match, limit: int, after: str | None = None) -> list[StoredToken]:
        if match.digests is not None:
            return cast("list[StoredToken]", await self._look(Find(match, limit, after)))
        rows = await self._fetch(self._statements.find(match, limit, after), writes=False)
        return [to_token(row) for _, row in rows]

    async def deactivate(self, match: Match, at: int, sparing: tuple[str, ...] = ()) -> int:
        return await self._run(partial(self._deactivate, match, at, sparing))

    async def erase(self, content_type: str, object_id: str, budgets_of: bytes) -> int:
        step = partial(self._statements.erase, content_type=content_type, object_id=object_id)
        erased = await self._remove(step, limit=None)
        await self.reset(budgets_of, None)
        return erased

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> Purged:
        tokens = await self._remove(partial(self._statements.purge, now=now, before=before), limit)
        budgets = await self._remove(partial(self._statements.purge_budgets, before=budgets_before), limit)
        return Purged(tokens=tokens, budgets=budgets)

    async def count(self, now: int) -> list[SlugCount]:
        rows = await self._fetch(self._statements.count(now), writes=False)
        return [
            SlugCount(slug=slug, total=total, active=active, expired=expired, used=used)
            for slug, total, active, expired, used in rows
        ]

    async def spend(self, spends: tuple[Spend, ...], now: int) -> Spending:
        return cast("Spending", await self._submit(SpendAll(spends, now)))

    async def refund(self, charges: tuple[Charge, ...]) -> None:
        await self._submit(Refund(charges))

    async def budgets(self, names: tuple[Budget, ...]) -> list[BudgetState | None]:
        if not names:
            self._connections.check_place()
            return []
        needs = Needs()
        needs.budgets.update(names)
        rows = await self._fetch(self._statements.read(needs), writes=False)
        found = dict(to_budget(row) for _, _, row in rows)
        return [found.get(name) for name in names]

    async def reset(self, budgets_of: bytes, names: tuple[bytes, ...] | None) -> int:
        [(count,)] = await self._fetch(self._statements.reset(budgets_of, _PATIENCE, names))
        return cast("int", count)

    # Batches --------------------------------------------------------------------------------------

    async def _submit(self, operation: Operation) -> object:
        """Carry out an operation that may write, together with others."""
        self._connections.check_place()
        answer = await self._writes.submit(operation)
        if answer is _ALONE:
            [answer] = await self._run(partial(self._play, [operation], _PATIENCE))
        return answer

    async def _look(self, operation: Operation) -> object:
        """Carry out an operation that only reads, together with others."""
        self._connections.check_place()
        answer = await self._reads.submit(operation)
        if answer is _ALONE:
            [answer] = (await self._run(partial(self._look_at, [operation]), writes=False))[1]
        return answer

    async def _write(self, operations: Sequence[Operation]) -> Sequence[Any]:
        try:
            return await self._connections.run(partial(self._play, operations, _BATCH_PATIENCE))
        except Blocked:
            return [_ALONE] * len(operations)
        except CorruptStore:
            if len(operations) == 1:
                raise
            return [_ALONE] * len(operations)  # so that the damage meets only those that it concerns

    async def _read(self, operations: Sequence[Operation]) -> Sequence[Any]:
        try:
            return (await self._run(partial(self._look_at, operations), writes=False))[1]
        except CorruptStore:
            if len(operations) == 1:
                raise
            return [_ALONE] * len(operations)

    async def _look_at(
        self, operations: Sequence[Operation], connection: Connection
    ) -> tuple[Board, list[object]]:
        needs = Needs()
        for operation in operations:
            operation.ask(needs)
        return await self._played(operations, needs, connection)

    async def _play(
        self, operations: Sequence[Operation], patience: int, connection: Connection
    ) -> list[object]:
        """Carry out operations without locks at first, and with locks once another was quicker."""
        needs = Needs()
        for operation in operations:
            operation.ask(needs)
        board, answers = await self._played(operations, needs, connection)
        writes = self._statements.write(board, patience)
        if not writes or await connection.try_to(writes):
            return answers
        for attempt in count(1):
            first = [BEGIN, *self._statements.lock(board, patience)]
            board, answers = await self._played(operations, needs, connection, first)
            writes = self._statements.write(board, patience)
            if await connection.try_to([*writes, COMMIT]):
                break
            await connection.fetch(ROLLBACK)
            # A row appeared that could not be locked before, or this was a deadlock.
            if attempt == _ATTEMPTS and patience == _BATCH_PATIENCE:
                raise Blocked
            await asyncio.sleep(random.uniform(0, 0.01 * attempt))  # noqa: S311
        return answers

    async def _played(
        self,
        operations: Sequence[Operation],
        needs: Needs,
        connection: Connection,
        first: Sequence[Statement] = (),
    ) -> tuple[Board, list[object]]:
        """Load what the operations need, and play them."""
        while True:
            rows: Rows = []
            if needs:
                rows = await connection.fetch_all([*first, self._statements.read(needs)])
            board = _board(needs, rows)
            try:
                return board, [operation.play(board) for operation in operations]
            except Missing as missing:
                needs.purposes.add(missing.purpose)
                first = ()

    # Operations of their own ----------------------------------------------------------------------

    async def _deactivate(
        self, match: Match, at: int, sparing: tuple[str, ...], connection: Connection
    ) -> int:
        """End the tokens page by page in one transaction, and begin again until a pass finds nothing.

        Only then has it seen the tokens that took the place of those for whose locks it had to wait.
        """
        count = 0
        statements = [BEGIN, self._statements.tune(_PATIENCE)]
        while True:
            has_changed = False
            after = -1
            while True:
                rows = await connection.fetch_all(
                    [*statements, self._statements.lock_page(match, after, _PAGE)]
                )
                board = _board_of(rows)
                for token in list(board.tokens.values()):
                    count += _end(board, token, match, at, sparing)
                statements = self._statements.write(board, _PATIENCE)
                has_changed = has_changed or bool(statements)
                if len(rows) < _PAGE:
                    break
                after = max(cast("int", number_of(token_id)) for token_id in board.tokens)
            if not has_changed:
                await connection.fetch(COMMIT)
                return count

    async def _remove(self, step: Callable[[int, int], Statement], limit: int | None) -> int:
        removed = 0
        while limit is None or removed < limit:
            size = _PAGE if limit is None else min(limit - removed, _PAGE)
            [(found, gone)] = await self._fetch(step(size, _PATIENCE))
            removed += gone
            if not found:
                break
        return removed

    async def _fetch(self, statement: Statement, *, writes: bool = True) -> Rows:
        async def fetch(connection: Connection) -> Rows:
            return await connection.fetch(statement)

        return await self._run(fetch, writes=writes)

    async def _run(self, operation: Callable[[Connection], Awaitable[_T]], *, writes: bool = True) -> _T:
        try:
            return await self._connections.run(operation, writes=writes)
        except Blocked:
            pass
        raise BackendUnavailable(
            f"PostgreSQL: a row stayed locked by another transaction for {_PATIENCE // 1000} seconds"
        )


def _board(needs: Needs, rows: Rows) -> Board:
    board = Board(needs.purposes)
    for kind, version, row in rows:
        if kind == "token":
            board.load(to_token(row), version)
        elif kind == "budget":
            board.load_budget(*to_budget(row), version)
        else:
            board.load_receipt(to_receipt(row))
    return board


def _board_of(rows: Rows) -> Board:
    board = Board()
    for version, row in rows:
        board.load(to_token(row), version)
    return board


def _end(board: Board, token: StoredToken, match: Match, at: int, sparing: tuple[str, ...]) -> int:
    """End one token, or one key of it; how many that counts as."""
    if not matches(token, match):
        return 0
    key = key_of(token, match) if match.digests is not None else None
    if key is None or key.origin == token.id:
        after = ended(token, at, sparing)
        count = int(token.is_active)
    else:
        after = key_ended(token, key, at)
        count = int(token.is_active and key.expires_at >= at)
    if after != token:
        board.save(after)
    return count
