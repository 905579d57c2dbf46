"""What the conformance suite can't know: this server, its connections, its failures."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import anyio
import psycopg
import pytest
from psycopg import sql
from vtoken import (
    BackendClosed,
    BackendError,
    BackendUnavailable,
    ConfigurationError,
    CorruptStore,
    InvalidToken,
    OutcomeUnknown,
    Settings,
    Subject,
    TokenManager,
    create_backend,
)
from vtoken.backend import NEVER, Budget, InsertMode, InsertResult, Match, StoredToken, Use

import servers
from vtoken_postgresql import PostgreSQLBackend, statements
from vtoken_postgresql.link import Connection, Link

T = TypeVar("T")
NOW = 1_700_000_000_000
USER = Subject("auth.user", "42")


def a_token(number: int, **fields: Any) -> StoredToken:
    token = StoredToken(
        id=f"{number:032x}",
        content_type="auth.user",
        object_id="42",
        slug="reset",
        digest=number.to_bytes(32, "big"),
        scheme="sha256",
        secret_id="",
        plain_key="",
        nonce="",
        context=b"",
        created_at=NOW,
        expires_at=NEVER,
        ends_at=NEVER,
        is_active=True,
        extra_data=None,
        max_uses=1,
        uses=0,
        used_at=0,
        use_ids=(),
        lease_id="",
        lease_until=0,
    )
    return token._replace(**fields)


async def with_backend(url: str, work: Callable[[PostgreSQLBackend], Awaitable[T]], **options: Any) -> T:
    backend = PostgreSQLBackend(url, **options)
    await backend.open()
    try:
        return await work(backend)
    finally:
        await backend.close()


def ask(url: str, question: str, *values: object) -> list[tuple[Any, ...]]:
    """Ask the server past the backend."""
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(question.encode(), values)
        return cursor.fetchall() if cursor.description else []


def named(url: str, name: str) -> str:
    """The URL for connections that can be told apart in ``pg_stat_activity``."""
    return f"{url}&application_name={name}"


SESSIONS = "SELECT state FROM pg_stat_activity WHERE application_name = %s"
END_SESSIONS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s"


def test_it_is_found_by_its_entry_point(url: str) -> None:
    assert type(create_backend(url, pool_size=3)) is PostgreSQLBackend


def test_the_command_line_knows_it(url: str) -> None:
    command = shutil.which("vtoken", path=str(Path(sys.executable).parent))
    assert command is not None
    asyncio.run(with_backend(url, lambda backend: backend.insert(a_token(1), InsertMode.ADD)))
    done = subprocess.run([command, "stats", "--url", url], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "reset" in done.stdout


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://someone:canary@host/db?no_such_parameter=1",
        "postgresql://someone:canary%zz@host/db",
        "no-such-scheme://someone:canary@host/db",
    ],
)
def test_what_is_misspelt_is_refused_without_the_password(url: str) -> None:
    with pytest.raises(ConfigurationError) as info:
        PostgreSQLBackend.from_url(url)
    assert "canary" not in f"{info.value!r} {info.value.__cause__!r} {info.value.__context__!r}"
    assert "canary" not in repr(PostgreSQLBackend("postgresql://someone:canary@host/db"))


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "10"])
def test_a_pool_size_is_a_number_of_connections(size: Any) -> None:
    with pytest.raises(ConfigurationError, match="pool_size"):
        PostgreSQLBackend("postgresql://host/db", pool_size=size)


def test_an_unknown_option_names_the_right_one() -> None:
    with pytest.raises(ConfigurationError, match="did you mean pool_size"):
        PostgreSQLBackend.from_url("postgresql://host/db", poolsize=5)


@pytest.mark.parametrize(
    ("prepare", "error", "says"),
    [
        ("CREATE TABLE vtoken_tokens (mine text)", CorruptStore, "did not make"),
        ("UPDATE vtoken_schema SET version = 2", BackendError, "schema 2"),
        ("DELETE FROM vtoken_schema", BackendError, "schema None"),
        ("ALTER TABLE vtoken_tokens DROP CONSTRAINT vtoken_tokens_digest", CorruptStore, "tokens_digest"),
        ("DROP TABLE vtoken_budgets", CorruptStore, "vtoken_budgets"),
    ],
)
def test_a_store_that_is_not_ours_is_refused_untouched(
    url: str, prepare: str, error: type[BackendError], says: str
) -> None:
    async def nothing(backend: PostgreSQLBackend) -> None: ...

    if not prepare.startswith("CREATE"):
        asyncio.run(with_backend(url, nothing))
    ask(url, prepare)
    tables = "SELECT relname, relfilenode FROM pg_class WHERE relnamespace = current_schema::regnamespace"
    before = ask(url, tables)
    with pytest.raises(error, match=says) as info:
        asyncio.run(with_backend(url, nothing))
    assert type(info.value) is error
    assert ask(url, tables) == before


def test_a_server_that_is_not_there_is_unavailable() -> None:
    async def nothing(backend: PostgreSQLBackend) -> None: ...

    with pytest.raises(BackendUnavailable) as info:
        asyncio.run(with_backend("postgresql://someone:canary@127.0.0.1:1/db", nothing))
    assert info.value.__context__ is None
    assert "canary" not in str(info.value)


def test_it_belongs_to_the_event_loop_that_opened_it(url: str) -> None:
    backend = PostgreSQLBackend(url)
    asyncio.run(backend.open())  # a loop that has ended: what was open there is forgotten
    with pytest.raises(BackendClosed):
        asyncio.run(backend.count(NOW))

    async def elsewhere() -> None:
        await backend.open()
        with pytest.raises(BackendClosed):
            await asyncio.to_thread(asyncio.run, backend.count(NOW))
        assert await backend.count(NOW) == []
        await backend.close()

    asyncio.run(elsewhere())


def test_it_is_durable_whatever_the_defaults(url: str) -> None:
    odd = f"{url}%20-csynchronous_commit%3Doff%20-cdefault_transaction_isolation%3Dserializable"

    async def show(connection: Connection) -> list[str]:
        names = "synchronous_commit", "default_transaction_isolation"
        found = [await connection.execute(sql.SQL("SHOW {}").format(sql.Identifier(n))) for n in names]
        return [row[0] for cursor in found for row in await cursor.fetchall()]

    async def shown(url: str) -> list[str]:
        link = Link(url, 1)
        await link.open(show_nothing)
        try:
            return await link.run(show)
        finally:
            link.close()

    assert asyncio.run(shown(odd)) == ["on", "read committed"]
    assert asyncio.run(shown(f"{url}%20-csynchronous_commit%3Dremote_apply"))[0] == "remote_apply"


async def show_nothing(connection: Connection) -> None: ...


@pytest.mark.parametrize("state", ["40001", "40P01"])
def test_what_gave_way_to_another_is_run_again(url: str, state: str) -> None:
    async def run() -> None:
        link = Link(url, 1)
        await link.open(show_nothing)
        refusals = iter([state, state, ""])

        async def give_way(connection: Connection) -> str:
            if next(refusals):
                await connection.execute(
                    sql.SQL("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = {}; END $$").format(state)
                )
            return "done"

        assert await link.run(give_way) == "done"
        link.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ("25006", BackendUnavailable),
        ("53100", BackendUnavailable),
        ("57014", BackendUnavailable),
        ("57P01", OutcomeUnknown),
        ("08006", OutcomeUnknown),
        ("XX001", CorruptStore),
        ("22003", BackendError),
    ],
)
def test_errors_are_translated_and_hide_the_drivers(url: str, state: str, error: type[BackendError]) -> None:
    async def fail(connection: Connection) -> None:
        await connection.execute(
            sql.SQL("DO $$ BEGIN RAISE EXCEPTION 'canary' USING ERRCODE = {}; END $$").format(state)
        )

    async def run(*, writes: bool) -> BackendError:
        link = Link(url, 1)
        await link.open(show_nothing)
        try:
            await link.run(fail, writes=writes)
        except BackendError as raised:
            return raised
        finally:
            link.close()
        raise AssertionError("nothing was raised")

    raised = asyncio.run(run(writes=True))
    assert type(raised) is error
    assert (raised.__cause__, raised.__context__) == (None, None)
    assert "canary" not in str(raised)
    reading = asyncio.run(run(writes=False))
    assert type(reading) is (BackendUnavailable if error is OutcomeUnknown else error)


@pytest.mark.parametrize("by_scope", [False, True], ids=["task.cancel", "cancel scope"])
def test_cancellation_loses_no_connection(url: str, by_scope: bool) -> None:
    """A pool of two serves two callers at once after hundreds of calls were cut short anywhere."""
    mine = named(url, f"cancel{by_scope:d}")

    async def cut_short(backend: PostgreSQLBackend, number: int) -> None:
        call = backend.insert(a_token(number, object_id=str(number % 3)), InsertMode.REPLACE)
        if not by_scope:
            task = asyncio.ensure_future(call)
            await turns(number % 60)
            task.cancel()
            await asyncio.wait([task])
            return
        async with anyio.create_task_group() as group:
            with anyio.CancelScope() as scope:
                group.start_soon(cancel_after, scope, number % 60)
                await call

    async def run(backend: PostgreSQLBackend) -> None:
        for start in range(1, 600, 6):
            await asyncio.gather(*(cut_short(backend, start + n) for n in range(6)))
        # What a cancelled call has left behind would hold these up.
        async with asyncio.timeout(30):
            await asyncio.gather(*(backend.deactivate(Match(), NOW) for _ in range(6)))
        states = [state for (state,) in await asyncio.to_thread(ask, url, SESSIONS, f"cancel{by_scope:d}")]
        assert 1 <= len(states) <= 2, states
        assert set(states) <= {"idle"}

    asyncio.run(with_backend(mine, run, pool_size=2))


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def cancel_after(scope: anyio.CancelScope, count: int) -> None:
    await turns(count)
    scope.cancel()


def test_a_cancelled_call_that_waits_for_a_lock_ends_in_the_server(url: str) -> None:
    mine = named(url, "waiting")
    waits = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND wait_event_type = 'Lock'"

    async def run(backend: PostgreSQLBackend) -> None:
        await backend.insert(a_token(1), InsertMode.ADD)
        with psycopg.connect(url) as holder:
            holder.execute("SELECT FROM vtoken_tokens FOR UPDATE")
            task = asyncio.ensure_future(backend.update(Match(id=a_token(1).id), Use(NOW)))
            while (await asyncio.to_thread(ask, url, waits, "waiting"))[0][0] == 0:
                pass
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(ask, url, waits, "waiting") == [(0,)]
        assert await backend.find(Match(), 9) == [a_token(1)]

    asyncio.run(with_backend(mine, run))


def test_idle_connections_that_were_ended_are_replaced(url: str) -> None:
    async def run(backend: PostgreSQLBackend) -> None:
        await asyncio.gather(*(backend.count(NOW) for _ in range(5)))
        await asyncio.to_thread(ask, url, END_SESSIONS, "ended")
        while await asyncio.to_thread(ask, url, SESSIONS, "ended"):
            pass
        results = await asyncio.gather(*(backend.insert(a_token(n), InsertMode.ADD) for n in range(1, 9)))
        assert set(results) == {InsertResult.INSERTED}

    asyncio.run(with_backend(named(url, "ended"), run))


def test_a_lost_connection_leaves_the_outcome_unknown_and_consume_id_resolves_it(url: str) -> None:
    key, settings = "K" * 32, Settings(default_key_generator=lambda: "K" * 32)

    async def run() -> None:
        async with TokenManager(PostgreSQLBackend(named(url, "lost")), settings=settings) as manager:
            await manager.deactivate_and_create(USER, "reset")
            with psycopg.connect(url) as holder:  # holds the use up until the connection is lost
                holder.execute("SELECT FROM vtoken_tokens FOR UPDATE")
                task = asyncio.ensure_future(manager.consume(USER, "reset", key, consume_id="mine"))
                waits = f"{SESSIONS} AND wait_event_type = 'Lock'"
                while not await asyncio.to_thread(ask, url, waits, "lost"):
                    pass
                await asyncio.to_thread(ask, url, END_SESSIONS, "lost")
                with pytest.raises(OutcomeUnknown) as info:
                    await task
            assert (info.value.__cause__, info.value.__context__) == (None, None)
            token = await manager.consume(USER, "reset", key, consume_id="mine")
            assert token.uses == 1
            with pytest.raises(InvalidToken):
                await manager.consume(USER, "reset", key, consume_id="yours")

    asyncio.run(run())


def test_what_was_acknowledged_survives_a_crash_of_the_server() -> None:
    with servers.own_server() as server:
        url = servers.fresh_store(server.url)

        async def run() -> None:
            async with TokenManager(PostgreSQLBackend(url)) as manager:
                used = await manager.deactivate_and_create(USER, "reset")
                await manager.consume(USER, "reset", used.key)
                replaced = await manager.deactivate_and_create(USER, "login")
                kept = await manager.deactivate_and_create(USER, "login")
                await asyncio.to_thread(server.crash)
                with pytest.raises(BackendUnavailable):
                    await manager.stats()
                await asyncio.to_thread(server.start)
                assert await manager.verify(USER, "login", kept.key) == kept  # the same manager works again
                for slug, token in (("reset", used), ("login", replaced)):
                    with pytest.raises(InvalidToken):
                        await manager.consume(USER, slug, token.key)

        asyncio.run(run())


@pytest.mark.parametrize("overlaps_already", [False, True])
def test_a_use_beside_an_issue_ends_the_new_token_too(url: str, overlaps_already: bool) -> None:
    """The issue has written and not yet committed when the use begins, which waits, and then sees it all."""
    old, older, new = (a_token(n, created_at=NOW + n) for n in (2, 1, 3))
    values = statements.of_token(new)
    values.update(overlaps=True, keep_until=NOW + 1000, only_if_none_valid=False)
    waits = f"{SESSIONS} AND wait_event_type = 'Lock'"

    async def run(backend: PostgreSQLBackend) -> None:
        await backend.insert(older, InsertMode.ADD)
        mode = InsertMode.REPLACE if overlaps_already else InsertMode.ADD
        await backend.insert(old, mode, NOW + 1000)
        with psycopg.connect(url) as issue:
            issue.execute(statements.LOCK, values)
            assert issue.execute(statements.OVERLAP, values).fetchall() == [(True, True)]
            use = asyncio.ensure_future(backend.update(Match(id=old.id, valid_at=NOW), Use(NOW + 9)))
            while not await asyncio.to_thread(ask, url, waits, f"use{overlaps_already:d}"):
                pass
            issue.commit()
        used = await use
        assert used is not None
        assert [(t.id, t.is_active, t.uses) for t in await backend.find(Match(), 9)] == [
            (new.id, False, 0),
            (old.id, False, 1),
            (older.id, False, 0),
        ]

    asyncio.run(with_backend(named(url, f"use{overlaps_already:d}"), run))


def test_windows_may_be_as_long_as_time_is(url: str) -> None:
    budget = Budget("auth.user", "42", "login", "attempts")

    async def run(backend: PostgreSQLBackend) -> None:
        now = NOW
        for _ in range(30):
            now = (await backend.spend(budget, now, 1, NEVER, NEVER)).until
        assert now == NOW + 30 * NEVER

    asyncio.run(with_backend(url, run))
