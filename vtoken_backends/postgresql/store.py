"""The methods of the protocol on one schema, whatever connection they run on."""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import count
from typing import Any, ClassVar, Final, Protocol, TypeVar, cast

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
    Use,
    ended,
    key_ended,
    key_of,
    matches,
)
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
from vtoken_backends.postgresql.rows import number_of, to_budget, to_receipt, to_token
from vtoken_backends.postgresql.statements import Statement, Statements

_T = TypeVar("_T")
Rows = list[tuple[Any, ...]]

BATCH_PATIENCE: Final = 100
"""Milliseconds that a batch waits for a lock before its operations go on one by one."""
PATIENCE: Final = 20_000
"""Milliseconds that an operation of its own waits for a lock."""
_PAGE: Final = 1000
"""How many tokens are ended or removed in one statement."""
_ATTEMPTS: Final = 3
"""How often a batch is played with locks before its operations go on one by one."""


class Blocked(Exception):
    """A row stayed locked for longer than this operation was to wait. Nothing was changed."""


class Connection(Protocol):
    """A connection that runs one operation."""

    begin: ClassVar[Statement]
    """Begins a transaction of several round trips."""
    commit: ClassVar[Statement]
    """Ends it."""
    rollback: ClassVar[Statement]
    """Undoes it."""

    async def fetch(self, statement: Statement) -> Rows:
        """Run one statement."""
        ...

    async def fetch_all(self, statements: Sequence[Statement]) -> Rows:
        """Run several statements, in one round trip where that can be done. Returns the last one's rows."""
        ...

    async def try_to(self, statements: Sequence[Statement]) -> bool:
        """Run several statements, outside of a transaction as one of their own; False where they gave way to
        another transaction and changed nothing."""
        ...


class Store(ABC):
    """The protocol's methods but for those that open and close.

    Args:
        schema: where the tables are.
        statements: the statements on them.
    """

    def __init__(self, schema: str, statements: Statements) -> None:
        self._schema: Final = schema
        self._statements: Final = statements

    @abstractmethod
    async def _submit(self, operation: Operation) -> object:
        """Carry out an operation that may write."""

    @abstractmethod
    async def _look(self, operation: Operation) -> object:
        """Carry out an operation that only reads."""

    @abstractmethod
    async def _run(self, operation: Callable[[Connection], Awaitable[_T]], *, writes: bool = True) -> _T:
        """Run something on a connection, again where it gave way to another transaction.

        Args:
            operation: what to run.
            writes: whether its outcome is unknown once the connection is lost.
        """

    async def note(self, name: str, text: str, *, replace: bool = False) -> str:
        if text:
            rows = await self._fetch(self._statements.note(name, PATIENCE, text, replace))
        else:
            rows = await self._fetch(self._statements.read_note(name), writes=False)
        return cast("str", rows[0][0]) if rows else ""

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
        statement = self._statements.find(match, limit, after)

        async def find(connection: Connection) -> list[StoredToken]:
            return [to_token(row) for _, row in await connection.fetch(statement)]

        return await self._run(find, writes=False)

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
        needs = Needs()
        needs.budgets.update(names)
        statement = self._statements.read(needs) if needs else Statement("SELECT WHERE false")
        rows = await self._fetch(statement, writes=False)
        found = dict(to_budget(row) for _, _, row in rows)
        return [found.get(name) for name in names]

    async def reset(self, budgets_of: bytes, names: tuple[bytes, ...] | None) -> int:
        return await self._run(partial(self._reset, self._statements.reset(budgets_of, PATIENCE, names)))

    # Carrying out ------------------------------------------------------------------------------

    async def look_at(
        self, operations: Sequence[Operation], connection: Connection
    ) -> tuple[Board, list[object]]:
        needs = Needs()
        for operation in operations:
            operation.ask(needs)
        return await self._played(operations, needs, connection)

    async def play(
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
            first = [connection.begin, *self._statements.lock(board, patience)]
            board, answers = await self._played(operations, needs, connection, first)
            writes = self._statements.write(board, patience)
            if await connection.try_to([*writes, connection.commit]):
                break
            await connection.fetch(connection.rollback)
            # A row appeared that could not be locked before, or this was a deadlock.
            if attempt == _ATTEMPTS and patience == BATCH_PATIENCE:
                raise Blocked
            await asyncio.sleep(random.uniform(0, 0.01 * attempt))  # noqa: S311  # how long is no secret
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

    # Operations of their own --------------------------------------------------------------------

    async def _deactivate(
        self, match: Match, at: int, sparing: tuple[str, ...], connection: Connection
    ) -> int:
        """End the tokens page by page in one transaction, and again until a look finds nothing left to end.

        1. Rows are locked before they are changed. Where that has to wait, the row may not match any more
           afterwards, and the one that took its place was not there yet for this statement.
        2. A look that waits for nobody is of one moment. Where it finds nothing to end, that is the moment at
           which this method has happened.
        """
        end = partial(_end, match=match, at=at, sparing=sparing)
        count = 0
        statements = [connection.begin, self._statements.tune(PATIENCE)]
        after: int | None
        while True:
            after = -1
            while after is not None:
                page = self._statements.page(match, after, _PAGE, is_locking=True)
                board, after = _page(await connection.fetch_all([*statements, page]))
                count += sum([end(board, token) for token in list(board.tokens.values())])
                statements = self._statements.write(board, PATIENCE)
            after = -1
            is_left = False
            while after is not None and not is_left:
                page = self._statements.page(match, after, _PAGE, is_locking=False)
                board, after = _page(await connection.fetch_all([*statements, page]))
                statements = []
                for token in list(board.tokens.values()):
                    end(board, token)
                is_left = board.has_changed
            if not is_left:
                await connection.fetch(connection.commit)
                return count

    async def _reset(self, statement: Statement, connection: Connection) -> int:
        """Forget budgets in one transaction, and again until a look finds none.

        Where the statement has to wait for a budget, the transaction that held it may have made others
        meanwhile, which were not there yet for this statement.
        """
        count = 0
        statements = [connection.begin, statement]
        while True:
            [(gone,)] = await connection.fetch_all(statements)
            if not gone:
                await connection.fetch(connection.commit)
                return count
            count += cast("int", gone)
            statements = [statement]

    async def _remove(self, step: Callable[[int, int], Statement], limit: int | None) -> int:
        removed = 0
        while limit is None or removed < limit:
            size = _PAGE if limit is None else min(limit - removed, _PAGE)
            [(found, gone)] = await self._fetch(step(size, PATIENCE))
            removed += gone
            if not found:
                break
        return removed

    async def _fetch(self, statement: Statement, *, writes: bool = True) -> Rows:
        async def fetch(connection: Connection) -> Rows:
            return await connection.fetch(statement)

        return await self._run(fetch, writes=writes)


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


def _page(rows: Rows) -> tuple[Board, int | None]:
    """A page of tokens, and after which number the next one begins; None where this is the last one."""
    board = Board()
    for version, row in rows:
        board.load(to_token(row), version)
    if len(rows) < _PAGE:
        return board, None
    return board, number_of(max(board.tokens))


def _end(board: Board, token: StoredToken, match: Match, at: int, sparing: tuple[str, ...]) -> int:
    """End one token, or one key of it; how many that counts as."""
    if not matches(token, match):
        return 0
    key = key_of(token, match) if match.digests is not None else None
    if key is None or key.origin == token.id:
        after = ended(token, at, sparing)
        count = int(token.is_active)
    else:
        after = key_ended(token, key)
        count = int(token.is_active and key.expires_at >= at)
    if after != token:
        board.save(after)
    return count
