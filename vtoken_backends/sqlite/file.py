"""The file of the SQLite backend: how it is made, checked and opened.

All of it is plain synchronous code that runs on a worker thread.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import pathlib
import sqlite3
import threading
import time
from typing import Final, Literal, NamedTuple

from vtoken.errors import BackendError, BackendUnavailable, ConfigurationError, CorruptStore
from vtoken_backends.sqlite import schema
from vtoken_backends.sqlite.shared import ANSWERS

logger = logging.getLogger("vtoken_backends.sqlite")
logger.addHandler(logging.NullHandler())  # heard where an application listens to logs, and nowhere else

APPLICATION_ID: Final = 0x76746F6B
"""``vtok``, in the header of every file that this backend made."""
CHECK_LIMIT: Final = 64 * 1024 * 1024
"""Bytes up to which ``check="auto"`` runs SQLite's integrity check at open."""
_PAGE_SIZE: Final = 2048
"""Bytes, of new files. A write then is a third of what it is with SQLite's own 4,096 (tests/benchmarks)."""

Synchronous = Literal["full", "normal"]
Check = Literal["auto", "always", "never"]
Reads = Literal["auto", "worker"]


class Options(NamedTuple):
    synchronous: Synchronous
    busy_timeout: int
    check: Check
    reads: Reads
    shared: bool


class Identity(NamedTuple):
    """Which files a path and its write-ahead log name at a moment."""

    file: tuple[int, int]
    log: tuple[int, int]


_making = threading.Lock()


def open_file(path: str, options: Options) -> sqlite3.Connection:
    """Open the file to write, and make or check what is in it.

    Raises:
        BackendError: in its kinds; nothing was changed in a file that is not ours.
        sqlite3.Error: what SQLite itself says.
        OSError: the file cannot be made.
    """
    if sqlite3.sqlite_version_info < (3, 37):
        raise ConfigurationError(
            f"vtoken needs SQLite 3.37 or later; this Python has {sqlite3.sqlite_version}"
        )
    if os.path.exists(f"{path}-wal"):  # others have it open: one connection alone is in no danger
        _warn_of_wal_reset(sqlite3.sqlite_version_info)
    # Closing a file drops every lock that the process has on it (POSIX advisory locks), so nobody
    # else may get to the new file before it is closed again.
    with _making, contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    if not os.access(path, os.R_OK | os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise BackendUnavailable(f"{path} may not be read and written by this process")
    # Twice: the first look may have met a file that another process was about to make.
    if _is_foreign(path, options.shared) and _is_foreign(path, options.shared):
        raise CorruptStore(_FOREIGN.format(path))
    database = _connect(path, "rw", options.busy_timeout)
    try:
        _prepare(database, path, options)
    except BaseException:
        database.close()
        raise
    return database


def open_reader(path: str, busy_timeout: int) -> sqlite3.Connection:
    """A further connection to the file, which only reads: it waits for no writer."""
    database = _connect(path, "ro", busy_timeout)
    try:
        for setting in (
            "trusted_schema = OFF",
            "cell_size_check = ON",
            "query_only = ON",
            "cache_size = -16384",  # KiB, beside the system's own cache of the file
            "temp_store = MEMORY",
        ):
            database.execute(f"PRAGMA {setting}").fetchall()
        database.execute("SELECT 1 FROM vtoken_schema").fetchall()
    except BaseException:
        database.close()
        raise
    return database


def identity(path: str) -> Identity:
    """Which files are at a path now.

    Raises:
        OSError: there are none.
    """
    file, log = os.stat(path), os.stat(f"{path}-wal")
    return Identity(file=(file.st_dev, file.st_ino), log=(log.st_dev, log.st_ino))


def check_identity(path: str, expected: Identity) -> None:
    """Find out about a file that was removed, moved or replaced while it was open.

    Raises:
        BackendUnavailable: it was. What is written to the open file would be lost.
    """
    with contextlib.suppress(OSError):
        if identity(path) == expected:
            return
    raise BackendUnavailable(
        f"{path} (or its log, {path}-wal) was removed, moved or replaced while it was open: restore it, and"
        " open the backend again"
    )


def check_schema(database: sqlite3.Connection, path: str) -> int:
    """The number of the schema: one that this release can work on, or bring up to date; 0 for none.

    Raises:
        BackendError: it is newer.
        CorruptStore: it is not as we made it.
    """
    database.execute("SAVEPOINT vtoken")  # the version and the objects of one moment
    version = _schema_version(database)
    found = _objects(database)
    triggers = database.execute(
        "SELECT name FROM main.sqlite_schema WHERE type = 'trigger' AND tbl_name GLOB 'vtoken_*'"
    ).fetchall()
    database.execute("RELEASE vtoken")
    if version > len(schema.MIGRATIONS):
        raise BackendError(
            f"{path} was made by a newer vtoken (schema {version}, known up to {len(schema.MIGRATIONS)}):"
            " upgrade vtoken"
        )
    ours = _expected_objects(version) if version >= 0 else frozenset({("vtoken_schema", "")})
    names = {name for name, _ in ours}
    if not ours <= found or any(name not in names for (name,) in triggers):
        raise CorruptStore(f"{path}: its tables, indexes or triggers are not those of vtoken")
    return version


def _connect(path: str, mode: str, busy_timeout: int) -> sqlite3.Connection:
    return sqlite3.connect(
        f"{pathlib.Path(path).as_uri()}?mode={mode}",
        uri=True,
        timeout=busy_timeout / 1000,
        isolation_level=None,
        check_same_thread=False,  # made on a worker thread, and used by one thread at a time
    )


@functools.cache  # once in a process
def _warn_of_wal_reset(version: tuple[int, ...]) -> None:
    """Logged and not warned: there is nothing to mend in the code that opens a store. Where a distribution
    backported the fix, the version is still the old one, and nothing in SQLite tells of it."""
    if not has_wal_reset_bug(version):
        return
    logger.warning(
        "SQLite %s may have the WAL-reset bug (https://www.sqlite.org/wal.html#walresetbug); `vtoken doctor`"
        " says more",
        ".".join(map(str, version)),
    )


def has_wal_reset_bug(version: tuple[int, ...]) -> bool:
    """Whether a release of SQLite may damage a file that several connections write, in rare cases."""
    return not (version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45))


_FOREIGN: Final = (
    "{} is a database, but not one of vtoken; it was left as it is. To let vtoken's tables live beside"
    " others, add ?shared=true to the URL"
)


def _is_foreign(path: str, shared: bool) -> bool:
    """A look that leaves no trace, neither in the file nor beside it."""
    in_use = os.path.exists(f"{path}-wal") or os.path.exists(f"{path}-journal")
    url = f"{pathlib.Path(path).as_uri()}?mode=ro{'' if in_use else '&immutable=1'}"
    with contextlib.closing(sqlite3.connect(url, uri=True)) as database, contextlib.suppress(sqlite3.Error):
        [(objects,)] = database.execute("SELECT count(*) FROM sqlite_schema").fetchall()
        [(application_id,)] = database.execute("PRAGMA application_id").fetchall()
        if shared:
            return False
        if objects == 0:
            return application_id not in (0, APPLICATION_ID)
        return not _has_schema(database)
    return False  # whatever is wrong, the real connection tells


def _has_schema(database: sqlite3.Connection) -> bool:
    sql = "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'vtoken_schema'"
    return bool(database.execute(sql).fetchall())


def _schema_version(database: sqlite3.Connection) -> int:
    """0 where there is none yet, -1 where it cannot be read."""
    if not _has_schema(database):
        return 0
    rows = database.execute("SELECT version FROM vtoken_schema").fetchall()
    return next((version for (version,) in rows if type(version) is int), -1)


def _prepare(database: sqlite3.Connection, path: str, options: Options) -> None:
    # trusted_schema, cell_size_check: https://www.sqlite.org/security.html (untrusted database files).
    # secure_delete overwrites what ForgetKey clears. fullfsync: macOS's plain fsync stops short of the disk.
    for setting in (
        "trusted_schema = OFF",
        "cell_size_check = ON",
        "secure_delete = ON",
        f"fullfsync = {int(options.synchronous == 'full')}",
        f"synchronous = {options.synchronous}",
        # Pages. Whoever commits into a full log empties it, and all others wait: beside a purge 26 ms at most
        # with 4,000, 20 with 2,000 (tests/benchmarks). A use then writes 4.8 kB in place of 4.4.
        "wal_autocheckpoint = 2000",
        # KiB, and only as far as the file fills it. SQLite's own 2 MiB cost a third of all operations at
        # 400,000 tokens; four times as much gained no more, nor did mmap.
        "cache_size = -65536",
        "temp_store = MEMORY",
        f"page_size = {_PAGE_SIZE}",  # of a file that has no page yet
    ):
        database.execute(f"PRAGMA {setting}").fetchall()
    version = check_schema(database, path)
    [(encoding,)] = database.execute("PRAGMA encoding").fetchall()
    if encoding != "UTF-8":
        raise CorruptStore(f"{path} keeps its texts as {encoding}; vtoken needs a file with UTF-8")
    _check_pages(database, path, options.check)
    if version < len(schema.MIGRATIONS):
        _migrate(database)
        check_schema(database, path)
    _use_wal(database, path, options.busy_timeout)
    database.execute("PRAGMA busy_timeout = 0")  # from now on, a batch waits for a lock itself
    for statement in (*ANSWERS, *schema.TRIGGERS):
        database.execute(statement)


def _migrate(database: sqlite3.Connection, newest: int | None = None) -> None:
    """Make the schema, or bring it up to date: in one transaction, so that a store has the old one
    or the new one at every time. A new store gets its schema before it has a write-ahead log."""
    steps = schema.MIGRATIONS[:newest]
    database.execute("BEGIN IMMEDIATE")
    version = _schema_version(database)  # again, because somebody else may have been faster
    if version < len(steps):
        [(objects,)] = database.execute("SELECT count(*) FROM sqlite_schema").fetchall()
        for statement in itertools.chain(*steps[version:]):
            database.execute(statement)
        database.execute("DELETE FROM vtoken_schema")
        database.execute("INSERT INTO vtoken_schema (version) VALUES (?)", (len(steps),))
        if objects == 0:
            database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    database.execute("COMMIT")


@functools.cache
def _expected_objects(version: int) -> frozenset[tuple[str, str]]:
    if version == 0:
        return frozenset()
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as database:
        _migrate(database, version)
        return frozenset(_objects(database))


def _objects(database: sqlite3.Connection) -> set[tuple[str, str]]:
    """Names and texts; in what white space a migration of the application's wrote them does not matter."""
    rows = database.execute("SELECT name, sql FROM main.sqlite_schema WHERE sql IS NOT NULL").fetchall()
    return {(name, " ".join(str(sql).split())) for name, sql in rows}


def _check_pages(database: sqlite3.Connection, path: str, check: Check) -> None:
    [(pages,)] = database.execute("PRAGMA page_count").fetchall()
    [(page_size,)] = database.execute("PRAGMA page_size").fetchall()
    if check == "never" or (check == "auto" and pages * page_size > CHECK_LIMIT):
        return
    [(answer,)] = database.execute("PRAGMA integrity_check(1)").fetchall()
    if answer != "ok":
        raise CorruptStore(f"{path} is damaged: {answer}")


def _use_wal(database: sqlite3.Connection, path: str, busy_timeout: int) -> None:
    """SQLite does not wait for others when it changes the journal mode; we do."""
    deadline = time.monotonic() + busy_timeout / 1000
    while True:
        try:
            [(mode,)] = database.execute("PRAGMA journal_mode = WAL").fetchall()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        else:
            break
        time.sleep(0.005)
    database.execute("PRAGMA schema_version").fetchall()  # makes the log: the next one sees it at open
    if mode != "wal":
        raise BackendUnavailable(f"{path} is on a file system without write-ahead logging")
