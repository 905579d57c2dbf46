"""SQLite in trouble: no room, damage, schemas of other releases, an SQLite with a known bug."""

# pyright: reportPrivateUsage=false
# A made-up schema, and statements that fail at a chosen place, can be planted from within only.

# ruff: noqa: ASYNC240  # looking at a small file is no wait to speak of

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import random
import re
import resource
import signal
import sqlite3
import subprocess
import warnings
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from typing import Any

import pytest

from vtoken.backend import InsertResult, Match
from vtoken.errors import BackendError, BackendUnavailable, CorruptStore
from vtoken_backends.sqlite import SQLiteBackend, file, schema
from vtoken_backends.sqlite.diagnostics import SQLiteDiagnostics, release

from .sqlite_tools import NOW, ask, beside, insert, make_store, opened, plain, present, python, token, use


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a test has its store."""
    return tmp_path / "tokens.db"


async def stored(backend: SQLiteBackend) -> set[str]:
    return {found.id for found in await backend.find(Match(), 100_000)}


# No room


@contextlib.contextmanager
def small_disk(place: Path) -> Generator[Callable[[], None]]:
    """A file system with little room; the function that is given makes room."""
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "tmpfs", place],  # noqa: S607  # the system's own
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a file system")
    try:
        ballast = place / "ballast"
        ballast.write_bytes(bytes(1_500_000))
        yield ballast.unlink
    finally:
        subprocess.run(["umount", place], check=True)  # noqa: S607  # as above


@contextlib.contextmanager
def small_files(place: Path) -> Generator[Callable[[], None]]:
    """No file may grow past a size; the function that is given lifts it. Needs no rights."""
    place.mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limited", [small_disk, small_files])
async def test_without_room_it_reads_on_and_with_room_it_works_again(
    tmp_path: Path, limited: Callable[[Path], contextlib.AbstractContextManager[Callable[[], None]]]
) -> None:
    acknowledged: set[str] = set()

    async def fill(backend: SQLiteBackend) -> None:
        for number in range(10_000):
            await insert(backend, token(number, str(number)))
            acknowledged.add(token(number).id)

    with limited(tmp_path / "disk") as make_room:
        async with opened(SQLiteBackend(tmp_path / "disk" / "tokens.db", synchronous="normal")) as backend:
            with pytest.raises(BackendUnavailable):
                await fill(backend)
            assert len(acknowledged) > 10
            with pytest.raises(BackendUnavailable):
                await backend.purge(NOW + 10**6, NOW + 10**6, 1000, 0)
            assert await stored(backend) == acknowledged
            make_room()
            assert await insert(backend, token(10_000)) is InsertResult.INSERTED
            assert await stored(backend) == {*acknowledged, token(10_000).id}
            assert (await backend.purge(NOW + 10**6, NOW + 10**6, 100_000, 0)).tokens == len(acknowledged) + 1
            assert await stored(backend) == set()


async def test_a_store_that_was_closed_without_room_opens_when_there_is_some(tmp_path: Path) -> None:
    with small_files(tmp_path / "disk") as make_room:
        backend = SQLiteBackend(tmp_path / "disk" / "tokens.db", synchronous="normal")
        count = 0
        async with opened(backend):
            with contextlib.suppress(BackendUnavailable):
                for count in range(10_000):
                    await insert(backend, token(count, str(count)))
        make_room()
        async with opened(backend):
            assert len(await stored(backend)) == count


# Damage


async def found_or_told(path: Path, ids: list[str]) -> str:
    """Either the store says that it is damaged, or it has every token."""
    try:
        async with opened(SQLiteBackend(path)) as backend:
            for id in ids:  # noqa: A001  # the contract's name
                assert [found.id for found in await backend.find(Match(id=id), 2)] == [id]
    except BackendError as error:  # a bit of the schema's number makes a newer schema of it
        return "told" if isinstance(error, CorruptStore) or "newer" in str(error) else repr(error)
    return "found"


DAMAGE: dict[str, Callable[[bytes, int], bytes]] = {
    "zeros": lambda page, _: bytes(len(page)),
    "noise": lambda page, number: hashlib.shake_128(b"%d" % number).digest(len(page)),
    "a torn write": lambda page, _: page[:512] + bytes(len(page) - 512),
    "a lost sector": lambda page, _: page[:-512] + bytes(512),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
async def test_whichever_page_is_damaged_no_token_is_missing_unnoticed(
    path: Path, damage: Callable[[bytes, int], bytes]
) -> None:
    await make_store(path, tokens=100)
    sound, ids = path.read_bytes(), [token(number).id for number in range(100)]
    outcomes: list[str] = []
    for start in range(0, len(sound), 2048):
        page = damage(sound[start : start + 2048], start)
        path.write_bytes(sound[:start] + page + sound[start + 2048 :])
        outcomes.append(await found_or_told(path, ids))
    # A sector that was empty may be lost without loss.
    assert outcomes.count("told") > len(outcomes) / 2


async def test_whichever_bit_flips_no_token_is_missing_unnoticed(path: Path) -> None:
    await make_store(path, tokens=100)
    sound, ids = path.read_bytes(), [token(number).id for number in range(100)]
    chance = random.Random(7)  # noqa: S311  # places, no secrets
    outcomes: list[str] = []
    for _ in range(150):
        content = bytearray(sound)
        place = chance.choice(
            [chance.randrange(100), chance.randrange(len(sound))]
        )  # the header, or anywhere
        content[place] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        outcomes.append(await found_or_told(path, ids))
    assert {"told", "found"} == set(outcomes)


async def test_a_store_cut_short_is_damaged(path: Path) -> None:
    await make_store(path, tokens=100)
    sound = path.read_bytes()
    for size in (2, 99, 100, 512, 2048, len(sound) // 2, len(sound) - 2048, len(sound) - 100):
        path.write_bytes(sound[:size])
        with pytest.raises(CorruptStore):
            await SQLiteBackend(path).open()
        assert path.read_bytes() == sound[:size]


@pytest.mark.parametrize("column", ["slug", "keys", "extra_data"])
async def test_a_text_that_is_none_is_damage_and_is_not_quoted(path: Path, column: str) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        await insert(backend, token(1))
        with plain(path) as database:
            sql = f"UPDATE vtoken_tokens SET {column} = CAST(x'73656372657473ff' AS TEXT)"  # noqa: S608  # from above
            database.execute(sql)
        with pytest.raises(CorruptStore) as caught:
            await backend.find(Match(), 1)
        assert "secrets" not in str(caught.value)
        assert caught.value.__context__ is None


async def test_a_table_that_vanished_is_damage(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        with plain(path) as database:
            database.execute("DROP TABLE vtoken_tokens")
        with pytest.raises(CorruptStore):
            await backend.find(Match(), 1)


# Schemas of other releases

SECOND = (
    "ALTER TABLE vtoken_tokens ADD COLUMN note TEXT NOT NULL DEFAULT ''",
    "UPDATE vtoken_tokens SET note = slug",
    "CREATE INDEX vtoken_tokens_note ON vtoken_tokens (note)",
)
"""A made-up schema 2."""


@pytest.fixture
def second_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, SECOND))


def schema_of(path: Path) -> tuple[int, bool, int]:
    """The version, whether it has the new index, and how many tokens."""
    with plain(path) as database:
        [(version,)] = database.execute("SELECT version FROM vtoken_schema").fetchall()
        index = database.execute("SELECT 1 FROM sqlite_schema WHERE name = 'vtoken_tokens_note'").fetchall()
        [(count,)] = database.execute("SELECT count(*) FROM vtoken_tokens").fetchall()
        return version, bool(index), count


async def test_a_store_of_an_older_release_is_brought_up_to_date(
    path: Path, request: pytest.FixtureRequest
) -> None:
    await make_store(path, tokens=3)
    assert schema_of(path) == (1, False, 3)
    request.getfixturevalue("second_release")
    backends = [SQLiteBackend(path) for _ in range(4)]
    await asyncio.gather(*(backend.open() for backend in backends))  # only one of them does it
    assert schema_of(path) == (2, True, 3)
    assert await ask(backends[0], "SELECT DISTINCT note FROM vtoken_tokens") == [("reset",)]
    assert await backends[0].find(Match(id=token(1).id), 1) == [token(1, "1")]
    for backend in backends:
        await backend.close()


@pytest.mark.usefixtures("second_release")
async def test_a_new_store_is_made_with_the_newest_schema(path: Path) -> None:
    await make_store(path, tokens=1)
    assert schema_of(path) == (2, True, 1)


async def test_a_damaged_store_of_an_older_release_is_left_as_it_is(
    path: Path, request: pytest.FixtureRequest
) -> None:
    await make_store(path, tokens=100)
    content = bytearray(path.read_bytes())
    content[20 * 2048 : 21 * 2048] = bytes(2048)
    path.write_bytes(content)
    request.getfixturevalue("second_release")
    with pytest.raises(CorruptStore):
        await SQLiteBackend(path).open()
    assert beside(path) == {path.name: bytes(content)}


def connecting(kind: type[sqlite3.Connection]) -> Callable[[str, str, int], sqlite3.Connection]:
    """Opens a file as the backend does, by another class."""

    def connect(path: str, mode: str, busy_timeout: int) -> sqlite3.Connection:
        url = f"file:{path}?mode={mode}"
        timeout = busy_timeout / 1000
        return sqlite3.connect(
            url, timeout=timeout, uri=True, isolation_level=None, check_same_thread=False, factory=kind
        )

    return connect


OPTIONS = file.Options(synchronous="full", busy_timeout=1000, check="auto", reads="worker", shared=False)


class _Interrupted(sqlite3.Connection):
    """Comes to an end at one of its statements."""

    left = 0

    def execute(self, sql: str, parameters: Any = (), /) -> Any:
        type(self).left -= 1
        if type(self).left == 0:
            self.end()
        return super().execute(sql, parameters)

    def end(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class _Refused(_Interrupted):
    code = sqlite3.SQLITE_FULL

    def end(self) -> None:
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = self.code
        raise error


def _open_in_child(path: Path) -> int:
    """How a child process ends that opens the store."""
    with warnings.catch_warnings():
        # No lock of another thread is needed in the child; Python 3.12 warns where there is a thread.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            file.open_file(str(path), OPTIONS).close()
            os._exit(0)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


async def test_a_migration_killed_at_any_statement_is_resumed(
    path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    await make_store(path, tokens=3)
    older = path.read_bytes()
    request.getfixturevalue("second_release")
    versions: list[int] = []
    for number in range(1, 100):
        for left in path.parent.iterdir():
            left.unlink()
        path.write_bytes(older)
        with monkeypatch.context() as planted:
            planted.setattr(_Interrupted, "left", number)
            planted.setattr(file, "_connect", connecting(_Interrupted))
            status = _open_in_child(path)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        versions.append(schema_of(path)[0])
        assert schema_of(path) in ((1, False, 3), (2, True, 3))
        async with opened(SQLiteBackend(path)) as backend:
            assert len(await stored(backend)) == 3
        assert schema_of(path) == (2, True, 3)
    assert versions == sorted(versions)
    assert versions.count(1) > len(SECOND) + 2  # BEGIN, the statements, the version, COMMIT
    assert versions.count(2) > 0


async def test_a_migration_that_fails_at_any_statement_changes_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    await make_store(path, tokens=3)
    request.getfixturevalue("second_release")
    failures = 0
    with monkeypatch.context() as planted:
        planted.setattr(file, "_connect", connecting(_Refused))
        while schema_of(path)[0] == 1:
            planted.setattr(_Refused, "left", failures + 1)
            with pytest.raises(BackendUnavailable, match="full"):
                await SQLiteBackend(path).open()
            failures += 1
            assert schema_of(path) in ((1, False, 3), (2, True, 3))
    assert failures > len(SECOND) + 2
    async with opened(SQLiteBackend(path)) as backend:
        assert len(await stored(backend)) == 3


async def test_nothing_about_an_open_that_fails_is_unknown(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it has done, the next one does it again."""
    monkeypatch.setattr(file, "_connect", connecting(_Refused))
    monkeypatch.setattr(_Refused, "code", sqlite3.SQLITE_IOERR_FSYNC)
    monkeypatch.setattr(_Refused, "left", 12)
    with pytest.raises(BackendUnavailable) as caught:
        await SQLiteBackend(path).open()
    assert caught.value.__context__ is None
    async with opened(SQLiteBackend(path)) as backend:
        assert await stored(backend) == set()


async def test_an_older_release_refuses_the_newer_schema(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as newer:
        newer.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, SECOND))
        await make_store(path, tokens=1)
    before = beside(path)
    with pytest.raises(BackendError, match=r"newer vtoken \(schema 2, known up to 1\): upgrade vtoken"):
        await SQLiteBackend(path).open()
    assert beside(path) == before


# An SQLite with the WAL-reset bug


@pytest.mark.parametrize(
    ("version", "warned"),
    [
        ((3, 37, 0), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 45, 0), True),
        ((3, 50, 6), True),
        ((3, 50, 7), False),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((3, 53, 0), False),
    ],
)
def test_an_sqlite_with_the_wal_reset_bug_is_named(
    caplog: pytest.LogCaptureFixture, version: tuple[int, int, int], warned: bool
) -> None:
    caplog.set_level(logging.WARNING, "vtoken_backends.sqlite")  # an example of the documentation silences it
    file._warn_of_wal_reset.cache_clear()
    for _ in range(2):
        file._warn_of_wal_reset(version)
    file._warn_of_wal_reset.cache_clear()
    assert len(caplog.records) == warned
    assert release(version).state == ("warning" if warned else "ok"), "the doctor says the same"
    assert all(".".join(map(str, version)) in record.getMessage() for record in caplog.records)


async def test_only_a_second_connection_is_warned_of_the_wal_reset_bug(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING, "vtoken_backends.sqlite")
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 45, 0))
    file._warn_of_wal_reset.cache_clear()
    async with opened(SQLiteBackend(path)):
        assert caplog.records == []
        async with opened(SQLiteBackend(path)):
            assert [(r.name, r.levelno) for r in caplog.records] == [
                ("vtoken_backends.sqlite", logging.WARNING)
            ]
    file._warn_of_wal_reset.cache_clear()


def test_an_application_that_does_not_log_does_not_hear_of_it() -> None:
    script = (
        "import sys; sys.path[:0] = {path!r}\n"
        "from vtoken_backends.sqlite.file import _warn_of_wal_reset\n"
        "_warn_of_wal_reset((3, 45, 0))"
    )
    assert python(script).communicate(timeout=60) == ("", "")


async def test_a_trigger_of_somebody_else_is_refused(path: Path) -> None:
    await make_store(path)
    with plain(path) as database:
        database.execute(
            "CREATE TRIGGER quiet BEFORE INSERT ON vtoken_tokens BEGIN SELECT RAISE(IGNORE); END"
        )
    with pytest.raises(CorruptStore, match="triggers"):
        await SQLiteBackend(path).open()


# A file that is taken away


def removed(path: Path) -> None:
    path.unlink()


def moved(path: Path) -> None:
    path.rename(path.with_name("elsewhere.db"))


def replaced(path: Path) -> None:
    asyncio.run(make_store(path.with_name("other.db"), tokens=1))
    path.with_name("other.db").rename(path)


def log_removed(path: Path) -> None:
    Path(f"{path}-wal").unlink()


@pytest.mark.parametrize("take_away", [removed, moved, replaced, log_removed])
async def test_a_file_that_was_taken_away_is_not_written_to(
    path: Path, take_away: Callable[[Path], None]
) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        await insert(backend, token(1))
        await asyncio.to_thread(take_away, path)
        files = {file for file in beside(path) if not file.endswith("-shm")}
        writes: list[Coroutine[Any, Any, object]] = [
            insert(backend, token(2)),
            use(backend, present(1)),
            backend.deactivate(Match(), NOW),
            backend.ping(),
        ]
        for write in writes:
            with pytest.raises(BackendUnavailable, match=re.escape(str(path))):
                await write
        connections = backend._opened()
        connections._checked_at -= 1.5  # a second later
        for read in (backend.find(present(1), 1), backend.find(Match(), 1), backend.count(NOW)):
            with pytest.raises(BackendUnavailable, match="removed, moved or replaced"):
                await read
        assert {file for file in beside(path) if not file.endswith("-shm")} == files  # no new file was made


async def test_a_file_that_came_back_is_written_to_again(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        moved(path)
        with pytest.raises(BackendUnavailable):
            await insert(backend, token(1))
        path.with_name("elsewhere.db").rename(path)
        assert await insert(backend, token(1)) is InsertResult.INSERTED


async def test_a_store_restored_from_a_dump_is_recognised(path: Path, tmp_path: Path) -> None:
    await make_store(path, tokens=3)
    restored = tmp_path / "restored.db"
    with plain(path) as database, plain(restored) as other:
        other.executescript("\n".join(database.iterdump()))
    async with opened(SQLiteBackend(restored)) as backend:
        assert len(await stored(backend)) == 3
        assert await use(backend, present(1, "1")) is not None


async def test_a_store_made_by_the_statements_that_are_shown_is_complete(path: Path) -> None:
    statements = SQLiteDiagnostics(f"sqlite:///{path}").ddl()
    with plain(path) as database:
        database.executescript(";\n".join(" ".join(statement.split()) for statement in statements))
        before = database.execute("SELECT * FROM sqlite_schema ORDER BY name").fetchall()
    async with opened(SQLiteBackend(path)) as backend:
        await backend.ping()
        await insert(backend, token(1))
    with plain(path) as database:
        assert database.execute("SELECT * FROM sqlite_schema ORDER BY name").fetchall() == before


async def test_a_store_beside_the_tables_of_an_application(path: Path) -> None:
    with plain(path) as database:
        database.execute("CREATE TABLE users (name)")
        database.execute("PRAGMA user_version = 7")
    with pytest.raises(CorruptStore, match="shared=true"):
        await SQLiteBackend(path).open()
    async with opened(SQLiteBackend(path, shared=True)) as backend:
        await insert(backend, token(1))
        await backend.ping()
    with plain(path) as database:
        tables = database.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall()
        assert {name for (name,) in tables if not name.startswith("vtoken_")} == {"users"}
        assert database.execute("PRAGMA user_version").fetchone() == (7,)
        assert database.execute("PRAGMA application_id").fetchone() == (0,)


async def test_a_shared_file_of_another_encoding_is_refused(path: Path) -> None:
    with plain(path) as database:
        database.execute("PRAGMA encoding = 'UTF-16'")
        database.execute("CREATE TABLE users (name)")
    before = path.read_bytes()
    with pytest.raises(CorruptStore, match="UTF-8"):
        await SQLiteBackend(path, shared=True).open()
    assert path.read_bytes() == before
