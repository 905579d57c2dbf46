"""SQLite by hand: what a competent application writes on aiosqlite, and what plain sqlite3 can do at most.

They share one schema. Both keep digests only, in a write-ahead log with ``synchronous=FULL``.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import aiosqlite

from .contender import CONTENT_TYPE, DAY_MS, SLUG, Op, Row, Run, by_tasks, digest_of, new_key, now_ms

SCHEMA: Final = (
    """
    CREATE TABLE tokens (
        id INTEGER PRIMARY KEY,
        content_type TEXT NOT NULL, object_id TEXT NOT NULL, slug TEXT NOT NULL,
        digest BLOB NOT NULL UNIQUE,
        created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL,
        is_active INTEGER NOT NULL,
        extra_data TEXT
    )
    """,
    "CREATE INDEX tokens_subject ON tokens (content_type, object_id, slug) WHERE is_active = 1",
    "CREATE INDEX tokens_expiry ON tokens (expires_at)",
)
DEACTIVATE: Final = (
    "UPDATE tokens SET is_active = 0 WHERE content_type = ? AND object_id = ? AND slug = ? AND is_active = 1"
)
INSERT: Final = (
    "INSERT INTO tokens (content_type, object_id, slug, digest, created_at, expires_at, is_active)"
    " VALUES (?, ?, ?, ?, ?, ?, 1)"
)
_FITS: Final = (
    " WHERE digest = ? AND content_type = ? AND object_id = ? AND slug = ?"
    " AND is_active = 1 AND expires_at >= ?"
)
CHECK: Final = f"SELECT 1 FROM tokens{_FITS}"  # noqa: S608  # this module's own text
CONSUME: Final = f"UPDATE tokens SET is_active = 0{_FITS}"  # noqa: S608  # this module's own text
_REPLACING: Final = """
    CREATE TRIGGER replaced BEFORE INSERT ON tokens
    BEGIN
        UPDATE tokens SET is_active = 0
        WHERE content_type = NEW.content_type AND object_id = NEW.object_id AND slug = NEW.slug
            AND is_active = 1;
    END
"""
PRAGMAS: Final = ("journal_mode = WAL", "synchronous = FULL", "busy_timeout = 30000")


def connect(path: Path) -> sqlite3.Connection:
    """A connection in autocommit mode, durable, with the schema."""
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    for pragma in PRAGMAS:
        database.execute(f"PRAGMA {pragma}").fetchall()
    return database


def make_schema(path: Path) -> None:
    """Make the tables of the hand-written contenders."""
    with contextlib.closing(connect(path)) as database:
        for statement in SCHEMA:
            database.execute(statement)


def fill_file(path: Path, object_ids: Sequence[str]) -> list[str]:
    """An active token for each object, in one transaction."""
    keys = [new_key() for _ in object_ids]
    with contextlib.closing(connect(path)) as database:
        database.execute("BEGIN IMMEDIATE")
        database.executemany(INSERT, [_new_row(o, k) for o, k in zip(object_ids, keys, strict=True)])
        database.execute("COMMIT")
    return keys


def rows_of(path: Path) -> list[Row]:
    """The tokens of a file of these contenders."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        found = database.execute("SELECT object_id, digest, is_active FROM tokens").fetchall()
    return [Row(object_id, bytes(digest), bool(active)) for object_id, digest, active in found]


def _new_row(object_id: str, key: str) -> tuple[object, ...]:
    now = now_ms()
    return CONTENT_TYPE, object_id, SLUG, digest_of(key), now, now + DAY_MS


def _fit(object_id: str, key: str) -> tuple[object, ...]:
    return digest_of(key), CONTENT_TYPE, object_id, SLUG, now_ms()


class HandWritten:
    """aiosqlite as a competent application uses it: one connection for writes, its transactions one at a
    time under a lock, and one for reads, which a write-ahead log lets go on beside them.
    """

    name = "hand-written aiosqlite"

    def __init__(self, folder: Path) -> None:
        self._path = folder / "tokens.db"
        self._lock = asyncio.Lock()

    async def open(self) -> None:
        make_schema(self._path)
        self._writer = await self._connect()
        self._reader = await self._connect()

    async def close(self) -> None:
        await self._reader.close()
        await self._writer.close()

    async def fill(self, object_ids: Sequence[str]) -> list[str]:
        return fill_file(self._path, object_ids)

    async def run(self, ops: Sequence[Op], tasks: int) -> Run:
        return await by_tasks(self, ops, tasks)

    async def rows(self) -> list[Row]:
        return rows_of(self._path)

    async def issue(self, object_id: str) -> str:
        key = new_key()
        async with self._lock:
            await self._writer.execute("BEGIN IMMEDIATE")
            try:
                await self._writer.execute(DEACTIVATE, (CONTENT_TYPE, object_id, SLUG))
                await self._writer.execute(INSERT, _new_row(object_id, key))
                await self._writer.execute("COMMIT")
            except BaseException:
                await self._writer.execute("ROLLBACK")
                raise
        return key

    async def check(self, object_id: str, key: str) -> bool:
        async with self._reader.execute(CHECK, _fit(object_id, key)) as cursor:
            return await cursor.fetchone() is not None

    async def consume(self, object_id: str, key: str) -> bool:
        async with self._lock:
            await self._writer.execute("BEGIN IMMEDIATE")
            try:
                cursor = await self._writer.execute(CONSUME, _fit(object_id, key))
                await self._writer.execute("COMMIT")
            except BaseException:
                await self._writer.execute("ROLLBACK")
                raise
        return cursor.rowcount == 1

    async def _connect(self) -> aiosqlite.Connection:
        connection = await aiosqlite.connect(self._path, isolation_level=None)
        for pragma in PRAGMAS:
            await connection.execute(f"PRAGMA {pragma}")
        return connection


class OneStatement(HandWritten):
    """The least that a single write can cost: one statement, which is its own transaction, in one hop to a
    thread. A trigger replaces the older tokens.
    """

    name = "one statement in one hop"

    async def open(self) -> None:
        make_schema(self._path)
        self._thread = ThreadPoolExecutor(1)
        self._database = await self._hop(connect, self._path)
        await self._hop(self._database.execute, _REPLACING)

    async def close(self) -> None:
        await self._hop(self._database.close)
        self._thread.shutdown()

    async def issue(self, object_id: str) -> str:
        key = new_key()
        await self._hop(self._database.execute, INSERT, _new_row(object_id, key))
        return key

    async def check(self, object_id: str, key: str) -> bool:
        cursor: sqlite3.Cursor = await self._hop(self._database.execute, CHECK, _fit(object_id, key))
        return cursor.fetchone() is not None

    async def consume(self, object_id: str, key: str) -> bool:
        cursor: sqlite3.Cursor = await self._hop(self._database.execute, CONSUME, _fit(object_id, key))
        return cursor.rowcount == 1

    async def _hop(self, function: Callable[..., Any], *arguments: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


class Plain:
    """The ceiling: sqlite3 alone, in one thread, without an event loop.

    Args:
        folder: where its file is.
        per_transaction: operations in one transaction, 1 or more.
    """

    def __init__(self, folder: Path, per_transaction: int) -> None:
        self.name = f"plain sqlite3, {per_transaction} per transaction"
        self._path = folder / "tokens.db"
        self._size = per_transaction

    async def open(self) -> None:
        make_schema(self._path)
        self._database = connect(self._path)

    async def close(self) -> None:
        self._database.close()

    async def fill(self, object_ids: Sequence[str]) -> list[str]:
        return fill_file(self._path, object_ids)

    async def rows(self) -> list[Row]:
        return rows_of(self._path)

    async def run(self, ops: Sequence[Op], tasks: int) -> Run:
        """One after the other, whatever the number of tasks; each waits for its transaction."""
        answers: list[str | bool] = []
        waits = array("d")
        begun = perf_counter()
        for start in range(0, len(ops), self._size):
            batch = ops[start : start + self._size]
            batch_begun = perf_counter()
            self._database.execute("BEGIN" if self._reads_only(batch) else "BEGIN IMMEDIATE")
            answers += [self._do(op) for op in batch]
            self._database.execute("COMMIT")
            waits.extend([perf_counter() - batch_begun] * len(batch))
        return Run(answers, waits, perf_counter() - begun)

    def _reads_only(self, batch: Sequence[Op]) -> bool:
        return all(op.kind == "check" for op in batch)

    def _do(self, op: Op) -> str | bool:
        if op.kind == "check":
            return self._database.execute(CHECK, _fit(op.object_id, op.key)).fetchone() is not None
        if op.kind == "consume":
            return self._database.execute(CONSUME, _fit(op.object_id, op.key)).rowcount == 1
        key = new_key()
        self._database.execute(DEACTIVATE, (CONTENT_TYPE, op.object_id, SLUG))
        self._database.execute(INSERT, _new_row(op.object_id, key))
        return key
