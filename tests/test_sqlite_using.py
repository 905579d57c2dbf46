"""SQLite: the store through the application's own transaction, on every kind of handle."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sqlite3
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import aiosqlite
import pytest
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from tests.reference_tools import Player, check_store
from vtoken import Subject, TokenManager
from vtoken.backend import Budget, Hold, InsertResult, Match, Outcome, Spend, Use, UseHeld
from vtoken.errors import BackendUnavailable, InvalidInput
from vtoken_backends.memory import MemoryBackend
from vtoken_backends.sqlite import SQLiteBackend

from .sqlite_tools import NOW, insert, opened, plain, present, python, token, use


class Own(NamedTuple):
    """A transaction of the application's, and how it runs a statement of its own there."""

    handle: object
    execute: Callable[[str], Awaitable[object]]


class RolledBack(Exception):
    pass


Begin = Callable[[Path], AbstractAsyncContextManager[Own]]


@asynccontextmanager
async def on_sqlite3(path: Path) -> AsyncGenerator[Own]:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection, connection:

        async def execute(sql: str) -> object:
            return connection.execute(sql)

        connection.execute("BEGIN IMMEDIATE")
        yield Own(connection, execute)


@asynccontextmanager
async def on_aiosqlite(path: Path) -> AsyncGenerator[Own]:
    async with aiosqlite.connect(path) as connection:
        connection.row_factory = aiosqlite.Row
        await connection.execute("BEGIN IMMEDIATE")
        try:
            yield Own(connection, connection.execute)
        except BaseException:
            await connection.rollback()
            raise
        await connection.commit()


@asynccontextmanager
async def on_session(path: Path) -> AsyncGenerator[Own]:
    engine = create_async_engine(f"sqlite+aiosqlite:///{path}")
    try:
        async with AsyncSession(engine) as session, session.begin():

            async def execute(sql: str) -> object:
                return await (await session.connection()).exec_driver_sql(sql)

            yield Own(session, execute)
    finally:
        await engine.dispose()


@asynccontextmanager
async def on_connection(path: Path) -> AsyncGenerator[Own]:
    engine = create_async_engine(f"sqlite+aiosqlite:///{path}")
    try:
        async with engine.begin() as connection:
            yield Own(connection, connection.exec_driver_sql)
    finally:
        await engine.dispose()


BEGINS: Final[dict[str, Begin]] = {
    "sqlite3": on_sqlite3,
    "aiosqlite": on_aiosqlite,
    "session": on_session,
    "connection": on_connection,
}


@pytest.fixture(params=[*BEGINS.values()], ids=[*BEGINS])
def begin(request: pytest.FixtureRequest) -> Begin:
    """Each kind of handle."""
    chosen: Begin = request.param
    return chosen


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of the application's, with a table of its own."""
    path = tmp_path / "app.db"
    with plain(path) as database:
        database.execute("CREATE TABLE users (name TEXT)")
    return path


def users(path: Path) -> int:
    with plain(path) as database:
        [(count,)] = database.execute("SELECT count(*) FROM users").fetchall()
        return int(count)


async def test_what_is_committed_is_committed_together(path: Path, begin: Begin) -> None:
    async with opened(SQLiteBackend(path, shared=True)) as backend:
        await insert(backend, token(1))
        async with begin(path) as own:
            within = backend.within(own.handle)
            await own.execute("INSERT INTO users VALUES ('Ada')")
            assert await insert(within, token(2, "2")) is InsertResult.INSERTED
            assert await use(within, present(1)) is not None
            assert await within.find(present(2, "2"), 1) == [token(2, "2")]
            assert await backend.find(present(2, "2"), 1) == []
            assert (await backend.find(present(1), 1))[0].uses == 0
        assert users(path) == 1
        assert await backend.find(present(2, "2"), 1) == [token(2, "2")]
        assert (await backend.find(present(1), 1))[0].uses == 1


async def test_what_is_rolled_back_is_rolled_back_together(path: Path, begin: Begin) -> None:
    async with opened(SQLiteBackend(path, shared=True)) as backend:
        await insert(backend, token(1))
        await backend.present(present(1), Hold(hold_id="h", until=NOW + 100), NOW)
        with pytest.raises(RolledBack):  # noqa: PT012  # the whole transaction
            async with begin(path) as own:
                within = backend.within(own.handle)
                await own.execute("INSERT INTO users VALUES ('Ada')")
                assert await within.update(Match(id=token(1).id), UseHeld(hold_id="h", at=NOW)) is not None
                raise RolledBack
        assert users(path) == 0
        held = await backend.find(present(1), 1)
        assert (held[0].uses, len(held[0].holds)) == (0, 1)


async def test_the_same_operations_get_the_same_answers(path: Path, begin: Begin) -> None:
    player = Player(1)
    async with opened(SQLiteBackend(path, shared=True)) as backend, opened(MemoryBackend()) as memory:
        async with begin(path) as own:
            within = backend.within(own.handle)
            for step in range(120):
                name, call = player.operation()
                expected = await call(memory)
                assert await call(within) == expected, (step, name)
        await check_store(backend, memory)


async def test_a_handle_of_another_file_is_refused(path: Path, tmp_path: Path, begin: Begin) -> None:
    other = tmp_path / "other.db"
    async with opened(SQLiteBackend(other)), opened(SQLiteBackend(path, shared=True)) as backend:
        async with begin(other) as own:
            with pytest.raises(InvalidInput, match="another file"):
                await insert(backend.within(own.handle), token(1))
        assert await backend.find(Match(), 1) == []


async def test_a_handle_without_a_transaction_is_refused(path: Path) -> None:
    async with opened(SQLiteBackend(path, shared=True)) as backend:
        with plain(path) as connection, pytest.raises(InvalidInput, match="no transaction"):
            backend.within(connection)
        async with aiosqlite.connect(path) as other:
            with pytest.raises(InvalidInput, match="no transaction"):
                backend.within(other)
        with pytest.raises(InvalidInput, match="no transaction"):
            backend.within(other)  # closed
        engine = create_async_engine(f"sqlite+aiosqlite:///{path}", isolation_level="AUTOCOMMIT")
        async with AsyncSession(engine) as session:
            with pytest.raises(InvalidInput, match="no transaction"):
                backend.within(session)
            async with session.begin():
                with pytest.raises(InvalidInput, match="no transaction"):
                    await insert(backend.within(session), token(1))
        await engine.dispose()


@pytest.mark.parametrize("handle", [None, "app.db", object()])
async def test_a_handle_of_another_kind_is_refused(path: Path, handle: object) -> None:
    async with opened(SQLiteBackend(path, shared=True)) as backend:
        with pytest.raises(InvalidInput, match="sqlite3 or aiosqlite"):
            backend.within(handle)


async def test_an_error_undoes_its_own_operation_alone(path: Path, begin: Begin) -> None:
    async with opened(SQLiteBackend(path, shared=True)) as backend:
        async with begin(path) as own:
            within = backend.within(own.handle)
            await insert(within, token(1))
            await own.execute("PRAGMA max_page_count = 1")
            big = token(2, "2")._replace(extra_data='"' + "x" * 90_000 + '"')
            with pytest.raises(BackendUnavailable, match="full") as caught:
                await insert(within, big)
            assert caught.value.__context__ is None
            await own.execute("INSERT INTO users VALUES ('Ada')")
        assert await backend.find(Match(), 9) == [token(1)]
        assert users(path) == 1


@pytest.mark.parametrize("statement", range(1, 12))
async def test_a_cancelled_operation_has_happened_wholly_or_not_at_all(path: Path, statement: int) -> None:
    """An application may catch a timeout inside its transaction, and commit."""
    spends = tuple(
        Spend(budget=Budget(object=b"o" * 16, name=bytes([n]) * 16), limit=5, window=9, max_window=9)
        for n in range(3)
    )
    async with opened(SQLiteBackend(path, shared=True)) as backend, on_aiosqlite(path) as own:
        connection = cast("aiosqlite.Connection", own.handle)
        target, fetch, asked = backend.within(connection), connection.execute_fetchall, 0
        assert await target.budgets(()) == []

        def cancelling(sql: str, values: Iterable[Any] | None = None) -> Any:
            nonlocal asked
            asked += 1
            if asked == statement:
                caller = asyncio.current_task()
                assert caller is not None
                caller.cancel()
            return fetch(sql, values)

        connection.execute_fetchall = cancelling  # type: ignore[method-assign]  # cancels the n-th statement
        task = asyncio.create_task(target.spend(spends, NOW))
        await asyncio.wait([task])
        connection.execute_fetchall = fetch  # type: ignore[method-assign]  # as it was
        assert task.cancelled() or asked < statement
        await connection.commit()
        states = await backend.budgets(tuple(spend.budget for spend in spends))
        assert len({state is None for state in states}) == 1
        await connection.execute("BEGIN IMMEDIATE")


async def test_inside_a_write_transaction_others_wait_and_are_told(path: Path) -> None:
    backend = SQLiteBackend(path, shared=True, busy_timeout=1)
    async with opened(backend), on_aiosqlite(path) as own:
        await own.execute("INSERT INTO users VALUES ('Ada')")
        with pytest.raises(BackendUnavailable, match="using="):
            await insert(backend, token(1))


@pytest.mark.parametrize("others", ["has written", "writes"])
async def test_a_transaction_that_began_with_a_read_is_told_how_to_begin(path: Path, others: str) -> None:
    """SQLite refuses it at once: its snapshot is old, or would be after a wait."""
    async with opened(SQLiteBackend(path, shared=True)) as backend, aiosqlite.connect(path) as connection:
        await connection.execute("BEGIN")
        await connection.execute_fetchall("SELECT * FROM users")
        with plain(path) as other:
            other.execute("BEGIN IMMEDIATE")
            other.execute("INSERT INTO users VALUES ('Ada')")
            if others == "has written":
                other.execute("COMMIT")
            with pytest.raises(BackendUnavailable, match="begin it with BEGIN IMMEDIATE") as refused:
                await insert(backend.within(connection), token(1))
        assert "using=" not in str(refused.value)
        await connection.rollback()


KILLED = """
import asyncio, os, signal, sys
sys.path[:0] = {path!r}
import aiosqlite
from vtoken import Subject, TokenManager
from vtoken_backends.sqlite import SQLiteBackend

async def main(path, key, point):
    async with TokenManager(SQLiteBackend(path, shared=True)) as manager, aiosqlite.connect(path) as app:
        async with manager.redeem(Subject("auth.user", "1"), "reset", key) as token:
            await app.execute("BEGIN IMMEDIATE")
            await app.execute("INSERT INTO users VALUES ('Ada')")
            if point == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            await manager.mark_used(token, using=app)
            if point == "between":
                os.kill(os.getpid(), signal.SIGKILL)
            await app.commit()
            os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
@pytest.mark.parametrize("point", ["before", "between", "after"])
async def test_killed_at_any_point_the_user_is_changed_if_and_only_if_the_token_is_used(
    path: Path, point: str
) -> None:
    async with TokenManager(SQLiteBackend(path, shared=True)) as manager:
        issued = await manager.issue(Subject("auth.user", "1"), "reset")
    process = python(KILLED, path, issued.key, point)
    output = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, output
    async with opened(SQLiteBackend(path, shared=True)) as backend:
        [stored] = await backend.find(Match(id=issued.id), 1)
    assert (users(path), stored.uses) == ((1, 1) if point == "after" else (0, 0))


async def test_a_token_issued_with_its_user(path: Path, begin: Begin) -> None:
    async with TokenManager(SQLiteBackend(path, shared=True)) as manager:
        async with begin(path) as own:
            await own.execute("INSERT INTO users VALUES ('Ada')")
            issued = await manager.issue(Subject("auth.user", "1"), "confirm", using=own.handle)
            again = await manager.issue(Subject("auth.user", "1"), "confirm", using=own.handle)
        assert not await manager.exists_valid(Subject("auth.user", "1"), "confirm", issued.key)
        assert await manager.exists_valid(Subject("auth.user", "1"), "confirm", again.key)


async def test_presented_within_a_transaction(path: Path, begin: Begin) -> None:
    async with opened(SQLiteBackend(path, shared=True)) as backend:
        await insert(backend, token(1))
        async with begin(path) as own:
            within = backend.within(own.handle)
            assert (await within.present(present(1), None, NOW)).outcome is Outcome.RIGHT
            assert (await within.present(present(1), Use(at=NOW, use_id="a"), NOW)).outcome is Outcome.RIGHT
            again = await within.present(present(1), Use(at=NOW, use_id="a"), NOW)
            assert (again.outcome, again.used_at) == (Outcome.REPLAYED, NOW)
            await within.ping()
