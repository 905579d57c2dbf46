"""The file of the SQLite backend: URLs, settings, rights, damage. What every backend guarantees is tested by
``vtoken.testing``."""

# pyright: reportPrivateUsage=false
# The statements that are sent, and the connection's own settings, can be seen from within only.

# ruff: noqa: ASYNC240  # looking at a small file is no wait to speak of

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

from vtoken.backend import (
    InsertResult,
    Match,
)
from vtoken.errors import (
    BackendError,
    BackendUnavailable,
    ConfigurationError,
    CorruptStore,
    OutcomeUnknown,
)
from vtoken_backends.sqlite import SQLiteBackend
from vtoken_backends.sqlite.errors import as_backend_error

from .sqlite_tools import (
    ask,
    beside,
    digest,
    insert,
    make_store,
    opened,
    plain,
    token,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a test has its store."""
    return tmp_path / "tokens.db"


# URLs and options


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("sqlite:///relative.db", os.path.abspath("relative.db")),
        ("sqlite:////var/lib/tokens.db", "/var/lib/tokens.db"),
        ("sqlite:///with%20space%3F.db", os.path.abspath("with space?.db")),
        ("sqlite:////tmp/caf%C3%A9%2523.db", "/tmp/café%23.db"),  # noqa: S108  # a name, no file
        ("sqlite:////tmp/x.db?check=never&busy_timeout=10", "/tmp/x.db"),  # noqa: S108  # a name, no file
        ("sqlite:////tmp/x.db?reads=worker&shared=true", "/tmp/x.db"),  # noqa: S108  # a name, no file
        ("own-scheme+1:////x.db", "/x.db"),
    ],
)
def test_a_url_names_a_file(url: str, expected: str) -> None:
    assert repr(SQLiteBackend.from_url(url)) == f"<SQLiteBackend {expected}>"


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("sqlite://", "memory://"),
        ("sqlite:///", "memory://"),
        ("sqlite:///:memory:", "memory://"),
        ("sqlite://:memory:", "memory://"),
        ("sqlite://tokens.db", "three slashes"),
        ("sqlite:///a#b.db", "%23"),
        ("sqlite:///a%FFb.db", "UTF-8"),
        ("sqlite:///a%00b.db", "NUL"),
        ("sqlite:///a.db?sychronous=full", "did you mean synchronous"),
        ("sqlite:///a.db?path=b.db", "option 'path'"),
        ("sqlite:///a.db?synchronous=ful", "did you mean full"),
        ("sqlite:///a.db?synchronous=1", "synchronous 1"),
        ("sqlite:///a.db?busy_timeout=5s", "busy_timeout"),
        ("sqlite:///a.db?busy_timeout=2147483648", "busy_timeout"),
        ("sqlite:///a.db?check=sometimes", "check"),
        ("sqlite:///a.db?reads=workers", "did you mean worker"),
        ("sqlite:///a.db?shared=yes", "shared must be true or false"),
    ],
)
def test_a_bad_url_says_what_to_write_instead(url: str, hint: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        SQLiteBackend.from_url(url)
    assert hint in str(caught.value)


@pytest.mark.parametrize("name", ["", ":memory:"])
def test_a_store_in_memory_is_another_backend(name: str) -> None:
    with pytest.raises(ConfigurationError, match="memory://"):
        SQLiteBackend(name)


def test_options_may_be_keywords() -> None:
    SQLiteBackend.from_url("sqlite:///a.db", busy_timeout=1, synchronous="normal", check="always")
    with pytest.raises(ConfigurationError, match="busy_timeout"):
        SQLiteBackend.from_url("sqlite:///a.db", busy_timeout=True)
    with pytest.raises(ConfigurationError, match="did you mean busy_timeout"):
        SQLiteBackend.from_url("sqlite:///a.db", bussy_timeout=1)


# The file


async def test_the_file_and_its_companions_are_the_owners_alone(path: Path) -> None:
    before = os.umask(0)
    try:
        async with opened(SQLiteBackend(path)) as backend:
            await insert(backend, token(1))
            modes = {entry.name: entry.stat().st_mode & 0o777 for entry in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert modes == {"tokens.db": 0o600, "tokens.db-wal": 0o600, "tokens.db-shm": 0o600}
    assert [entry.name for entry in path.parent.iterdir()] == ["tokens.db"]


async def test_an_empty_file_becomes_a_store(path: Path) -> None:
    path.touch(mode=0o640)
    await make_store(path, tokens=1)
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("level", [("full", 2), ("normal", 1)])
async def test_the_durable_settings_are_really_set(path: Path, level: tuple[str, int]) -> None:
    backend = SQLiteBackend.from_url(f"sqlite:///{path}", synchronous=level[0])
    async with opened(backend):
        assert await ask(backend, "PRAGMA journal_mode") == [("wal",)]
        assert await ask(backend, "PRAGMA synchronous") == [(level[1],)]
        assert await ask(backend, "PRAGMA trusted_schema") == [(0,)]
        assert await ask(backend, "PRAGMA secure_delete") == [(1,)]


@pytest.mark.parametrize("journal", ["delete", "wal", "wal left by a crash"])
async def test_a_foreign_database_is_left_as_it_is(path: Path, tmp_path: Path, journal: str) -> None:
    live = tmp_path / "live" / "app.db"
    live.parent.mkdir()
    with plain(live) as database:
        database.execute(f"PRAGMA journal_mode = {journal.split()[0]}")
        database.execute("CREATE TABLE invoices (number)")
        if "crash" in journal:
            for name in ("", "-wal", "-shm"):
                shutil.copy(f"{live}{name}", f"{path}{name}")
    if "crash" not in journal:
        shutil.copy(live, path)
    shutil.rmtree(live.parent)
    before = beside(path)
    backend = SQLiteBackend(path)
    with pytest.raises(CorruptStore, match="not one of vtoken"):
        await backend.open()
    after = beside(path)
    # SQLite takes its locks in the shared memory file; the database and its log are untouched.
    assert {n: b for n, b in after.items() if n[-4:] != "-shm"} == {
        n: b for n, b in before.items() if n[-4:] != "-shm"
    }
    assert after.keys() == before.keys()


async def test_a_newer_schema_is_refused_untouched(path: Path) -> None:
    await make_store(path, tokens=1)
    with plain(path) as database:
        database.execute("UPDATE vtoken_schema SET version = 2")
    before = beside(path)
    with pytest.raises(BackendError, match=r"newer vtoken .* upgrade") as caught:
        await SQLiteBackend(path).open()
    assert type(caught.value) is BackendError  # it is not damaged
    assert beside(path) == before


@pytest.mark.parametrize(
    "content", [b"# A text file.\n" * 400, b"\0" * 4096, b"SQLite format 3\0" + b"\xff" * 9000]
)
async def test_a_file_that_is_no_database_is_refused_untouched(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(CorruptStore) as caught:
        await SQLiteBackend(path).open()
    assert caught.value.__context__ is None
    assert path.read_bytes() == content


async def test_damaged_pages_are_found_at_open(path: Path) -> None:
    await make_store(path, tokens=300)
    content = bytearray(path.read_bytes())
    content[20 * 2048 : 22 * 2048] = hashlib.shake_128(b"damage").digest(4096)
    path.write_bytes(content)
    with pytest.raises(CorruptStore):
        await SQLiteBackend(path).open()
    async with opened(SQLiteBackend(path, check="never")):
        """The check is what found it."""


@pytest.mark.parametrize(
    "ddl",
    [
        "DROP INDEX vtoken_tokens_line",
        "DROP TABLE vtoken_budgets",
        "ALTER TABLE vtoken_keys ADD COLUMN x TEXT",
    ],
)
async def test_a_store_whose_tables_and_indexes_are_others_is_refused(path: Path, ddl: str) -> None:
    await make_store(path)
    with plain(path) as database:
        database.execute(ddl)
    with pytest.raises(CorruptStore, match="triggers"):
        await SQLiteBackend(path).open()


@pytest.mark.parametrize(
    "change",
    [
        "digests = x'00'",
        "keys = '[]'",
        "keys = '[[1]]'",
        "keys = replace(keys, '\"link\"', '\"?\"')",
        "keys = replace(keys, '\"link\"', '1')",
        "keys = replace(keys, 'null', '\"17000\"')",
        "holds = '[[1]]'",
        'holds = \'[["h","1",1]]\'',
        "holds = 'h'",
        "id = -1",
        "expires_at = -1",
        "expires_at = expires_at + 1",  # still active, but it ends earlier
        "state = 4",
        "is_beside = 2",
        "uses = 1",  # of one, and still active
        "uses = -1",
        "max_uses = 0",
        "keys = 'a'",
        "keys = '{}'",
        "keys = printf('%.*c', 100000, '[')",
    ],
)
async def test_a_row_that_makes_no_sense_is_no_token(path: Path, change: str) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        await insert(backend, token(1))
        await insert(backend, token(2))
        with plain(path) as database:
            database.execute(f"UPDATE vtoken_tokens SET {change} WHERE id = 1")  # noqa: S608  # above
        with pytest.raises(CorruptStore) as caught:
            await backend.find(Match(), 10)
        assert repr(digest(1)) not in repr(caught.value)
        assert await backend.find(Match(id=token(2).id), 10) == [token(2)]


@contextlib.contextmanager
def ordinary_user() -> Generator[Path]:
    """A directory, and the rights of a user to whom the modes of files mean something."""
    directory = Path(tempfile.mkdtemp())
    is_root = os.geteuid() == 0
    if is_root:
        os.chown(directory, 65534, 65534)
        os.seteuid(65534)
    try:
        yield directory
    finally:
        if is_root:
            os.seteuid(0)
        directory.chmod(0o700)
        shutil.rmtree(directory)


async def test_without_the_right_to_write_the_store_is_unavailable() -> None:
    with ordinary_user() as directory:
        path = directory / "tokens.db"
        await make_store(path, tokens=1)
        path.chmod(0o400)
        with pytest.raises(BackendUnavailable, match="may not be read and written"):
            await SQLiteBackend(path).open()
        path.chmod(0o600)
        directory.chmod(0o500)
        for name in ("tokens.db", "other.db"):
            with pytest.raises(BackendUnavailable):
                await SQLiteBackend(directory / name).open()
        directory.chmod(0o700)
        assert list(beside(path)) == ["tokens.db"]
        await make_store(path)


async def test_a_directory_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="No such file") as caught:
        await SQLiteBackend(tmp_path / "no" / "tokens.db").open()
    assert caught.value.__context__ is None
    with pytest.raises(BackendUnavailable):
        await SQLiteBackend(tmp_path).open()
    assert list(tmp_path.iterdir()) == []


async def test_a_full_store_still_reads_and_works_again_when_there_is_room(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        await ask(backend, "PRAGMA max_page_count = 1")  # SQLite takes what there is
        stored = 0

        async def fill() -> None:
            nonlocal stored
            for stored in range(1000):
                await insert(backend, token(stored))

        with pytest.raises(BackendUnavailable, match="full"):
            await fill()
        assert len(await backend.find(Match(), 1000)) == stored
        await ask(backend, "PRAGMA max_page_count = 100000")
        assert await insert(backend, token(stored)) is InsertResult.INSERTED


def test_a_failed_sync_leaves_the_outcome_unknown() -> None:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
    assert type(as_backend_error(error, "a.db")) is OutcomeUnknown
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE
    assert type(as_backend_error(error, "a.db")) is BackendUnavailable
    error.sqlite_errorcode = sqlite3.SQLITE_MISMATCH
    assert type(as_backend_error(error, "a.db")) is BackendError
    assert str(as_backend_error(error, "a.db")) == "a.db: SQLite says: disk I/O error"
