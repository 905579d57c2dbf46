"""Tokens in PostgreSQL.

A method is one SQL statement wherever one can do it, so that it is atomic by itself. Two need a transaction
with a lock, because they must see what others did a moment ago: an insert that replaces, and the use of a
token that stands in an overlap.
"""

from __future__ import annotations

import difflib
from collections.abc import Awaitable, Callable
from typing import Any, LiteralString, Self, cast

from psycopg.rows import args_row
from vtoken.backend import (
    Budget,
    Change,
    InsertMode,
    InsertResult,
    Match,
    SlugCount,
    Spent,
    StoredToken,
    Use,
)
from vtoken.errors import BackendError, ConfigurationError, CorruptStore

from vtoken_postgresql import statements
from vtoken_postgresql.link import Connection, Link
from vtoken_postgresql.statements import Parameters


class PostgreSQLBackend:
    """A :class:`~vtoken.backend.TokenBackend` in a PostgreSQL database, for any number of hosts.

    Needs asyncio and PostgreSQL 13. Operations are refused in another event loop or process than that
    of :meth:`open`. The tables are made in the first schema of the ``search_path``.

    Args:
        url: as libpq takes it; what it leaves out, the ``PG*`` variables say.
        pool_size: how many connections at most, 1 or more.

    Raises:
        ConfigurationError: an argument is not understood.
    """

    def __init__(self, url: str, *, pool_size: int = 10) -> None:
        self._link = Link(url, pool_size)

    @classmethod
    def from_url(cls, url: str, **options: object) -> Self:
        """``postgresql://[user[:password]@][host][:port][,...][/database][?parameters of libpq]``.

        Args:
            url: as above.
            **options: ``pool_size``.

        Raises:
            ConfigurationError: the URL or an option is not understood.
        """
        for name in options.keys() - {"pool_size"}:
            hint = "did you mean" if difflib.get_close_matches(name, ["pool_size"]) else "it has"
            raise ConfigurationError(f"the PostgreSQL backend has no option {name!r}: {hint} pool_size")
        return cls(url, **cast("dict[str, Any]", options))

    def __repr__(self) -> str:
        return f"<PostgreSQLBackend {self._link!r}>"

    async def open(self) -> None:
        await self._link.open(_prepare)

    async def close(self) -> None:
        self._link.close()

    async def insert(self, token: StoredToken, mode: InsertMode, keep_until: int = 0) -> InsertResult:
        values = statements.of_token(token)
        if mode is InsertMode.ADD:
            added = await self._change(statements.ADD, values)
            return InsertResult.INSERTED if added else InsertResult.KEY_TAKEN
        overlaps = mode is InsertMode.REPLACE and keep_until > token.created_at
        only_if_none_valid = mode is InsertMode.IF_NONE_VALID
        values.update(overlaps=overlaps, keep_until=keep_until, only_if_none_valid=only_if_none_valid)
        statement = statements.OVERLAP if overlaps else statements.REPLACE

        async def replace(connection: Connection) -> tuple[bool, bool]:
            async with connection.transaction():
                await connection.execute(statements.LOCK, values)
                [answer] = await (await connection.execute(statement, values)).fetchall()
                return cast("tuple[bool, bool]", answer)

        inserted, had_valid = await self._link.run(replace)
        if inserted:
            return InsertResult.INSERTED
        return InsertResult.HAS_VALID if had_valid and only_if_none_valid else InsertResult.KEY_TAKEN

    async def find(self, match: Match, limit: int, after: tuple[int, str] | None = None) -> list[StoredToken]:
        created_at, last_id = after or (0, "")
        values = statements.of_match(match, limit=limit, after=created_at, after_id=last_id)
        operation = _tokens(statements.find(match, after=after is not None), values)
        return await self._link.run(operation, writes=False)

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        if isinstance(change, Use):
            return await self._use(match, change)
        new = {f"new_{name}": value for name, value in change._asdict().items()}
        operation = _tokens(statements.update(match, change), statements.of_match(match, **new))
        changed = await self._link.run(operation)
        return changed[0] if changed else None

    async def _use(self, match: Match, use: Use) -> StoredToken | None:
        values = statements.of_match(match, at=use.at, use_id=use.use_id)
        alone = _tokens(statements.use(match, overlapping=False), values)
        with_others = _tokens(statements.use(match, overlapping=True), values)

        async def take(connection: Connection) -> list[StoredToken]:
            if used := await alone(connection):
                return used
            async with connection.transaction():
                locked = await connection.execute(statements.lock_overlap(match), values)
                return await with_others(connection) if locked.rowcount else []

        used = await self._link.run(take)
        return used[0] if used else None

    async def deactivate(self, match: Match, at: int) -> int:
        return await self._change(statements.deactivate(match), statements.of_match(match, at=at))

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> int:
        purged = await self._change(statements.PURGE, Parameters(before=before, now=now, limit=limit))
        await self._change(statements.PURGE_BUDGETS, Parameters(budgets_before=budgets_before, limit=limit))
        return purged

    async def count(self, now: int) -> list[SlugCount]:
        async def count(connection: Connection) -> list[SlugCount]:
            rows = await (await connection.execute(statements.COUNT, {"now": now})).fetchall()
            return [SlugCount(*row) for row in rows]

        return await self._link.run(count, writes=False)

    async def spend(self, budget: Budget, now: int, limit: int, window: int, max_window: int) -> Spent:
        values = Parameters(budget._asdict(), now=now, most=limit, window=window, max_window=max_window)

        async def spend(connection: Connection) -> Spent:
            while True:
                for allowed, until in await (await connection.execute(statements.SPEND, values)).fetchall():
                    return Spent(allowed, until)

        return await self._link.run(spend)

    async def refund(self, budget: Budget, until: int) -> None:
        await self._change(statements.REFUND, Parameters(budget._asdict(), until=until))

    async def reset(self, budget: Budget) -> None:
        await self._change(statements.RESET, Parameters(budget._asdict()))

    async def _change(self, statement: LiteralString, values: Parameters) -> int:
        """Run one statement; how many rows it changed."""

        async def change(connection: Connection) -> int:
            return (await connection.execute(statement, values)).rowcount

        return await self._link.run(change)


def _tokens(
    statement: LiteralString, values: Parameters
) -> Callable[[Connection], Awaitable[list[StoredToken]]]:
    """The operation that runs one statement and returns its tokens."""

    async def fetch(connection: Connection) -> list[StoredToken]:
        async with connection.cursor(row_factory=args_row(statements.to_token)) as cursor:
            return await (await cursor.execute(statement, values)).fetchall()

    return fetch


async def _prepare(connection: Connection) -> None:
    """Make the tables, or check that they are there; what is not ours stays as it is."""
    async with connection.transaction():
        names = {"content_type": "vtoken", "object_id": "schema", "slug": ""}
        await connection.execute(statements.LOCK, names)
        if connection.info.parameter_status("server_encoding") != "UTF8":
            raise BackendError("the PostgreSQL database must have the encoding UTF8")
        found = await connection.execute(statements.MISSING, {"names": statements.RELATIONS})
        missing = {name for (name,) in await found.fetchall()}
        if missing == set(statements.RELATIONS):
            await connection.execute(statements.CREATE)
        elif "vtoken_schema" in missing:
            raise CorruptStore("the database has tables of vtoken's names that it did not make")
        else:
            await _check(connection, missing)


async def _check(connection: Connection, missing: set[str]) -> None:
    [(version,)] = await (await connection.execute("SELECT max(version) FROM vtoken_schema")).fetchall()
    if version != statements.SCHEMA:
        raise BackendError(
            f"the store has schema {version}, this is vtoken_postgresql for {statements.SCHEMA}"
        )
    if missing:
        raise CorruptStore(f"the store has no {', '.join(sorted(missing))}")
