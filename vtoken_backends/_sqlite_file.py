"""The file of the SQLite backend: its schema, and how it is made, checked and opened.

All of it is plain synchronous code that runs in one go on aiosqlite's worker thread.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import os
import pathlib
import sqlite3
import threading
import time
from typing import Final, Literal, NamedTuple

from vtoken.errors import (
    BackendClosed,
    BackendError,
    BackendUnavailable,
    ConfigurationError,
    CorruptStore,
    OutcomeUnknown,
)
from vtoken_backends._sqlite_batch import FOR_A_CONNECTION, Connection

logger = logging.getLogger("vtoken_backends.sqlite")
logger.addHandler(logging.NullHandler())  # heard where an application listens to logs, and nowhere else

APPLICATION_ID: Final = 0x76746F6B
"""``vtok``, in the header of every file that this backend made."""
CHECK_LIMIT: Final = 64 * 1024 * 1024
"""Bytes up to which ``check="auto"`` runs SQLite's integrity check at open."""

Synchronous = Literal["full", "normal"]
Check = Literal["auto", "always", "never"]


class Options(NamedTuple):
    synchronous: Synchronous
    busy_timeout: int
    check: Check


# `mode` and `overlap` are ours: they tell the triggers what to do about the tokens that are there.
# mode: 0 add, 1 replace, 2 if none is valid. overlap: 0, or the time up to which an overlap was granted.
_SCHEMA_1: Final = (
    """
    CREATE TABLE tokens (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        content_type TEXT NOT NULL, object_id TEXT NOT NULL, slug TEXT NOT NULL,
        digest BLOB NOT NULL UNIQUE,
        scheme TEXT NOT NULL, secret_id TEXT NOT NULL, plain_key TEXT NOT NULL, nonce TEXT NOT NULL,
        context BLOB NOT NULL,
        created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL, ends_at INTEGER NOT NULL,
        is_active INTEGER NOT NULL,
        extra_data TEXT,
        max_uses INTEGER NOT NULL, uses INTEGER NOT NULL, used_at INTEGER NOT NULL, use_ids TEXT NOT NULL,
        lease_id TEXT NOT NULL, lease_until INTEGER NOT NULL,
        mode INTEGER NOT NULL, overlap INTEGER NOT NULL
    ) STRICT
    """,
    "CREATE INDEX tokens_subject ON tokens (content_type, object_id, slug) WHERE is_active = 1",
    "CREATE INDEX tokens_ends ON tokens (ends_at)",
    # For the order of a listing of the whole store, page by page; new rows go to its end.
    "CREATE INDEX tokens_created ON tokens (created_at)",
    # A trigger and not a WHERE NOT EXISTS: with several rows in one statement SQLite evaluates
    # such a WHERE for all of them before it inserts the first.
    """
    CREATE TRIGGER tokens_if_none_valid BEFORE INSERT ON tokens
    WHEN NEW.mode = 2 AND EXISTS (
        SELECT 1 FROM tokens
        WHERE (content_type, object_id, slug) = (NEW.content_type, NEW.object_id, NEW.slug) AND is_active = 1
            AND expires_at >= NEW.created_at AND lease_until <= NEW.created_at
    )
    BEGIN
        SELECT RAISE(IGNORE);
    END
    """,
    """
    CREATE TRIGGER tokens_replace AFTER INSERT ON tokens WHEN NEW.mode > 0 AND NEW.overlap = 0
    BEGIN
        UPDATE tokens SET is_active = 0, ends_at = min(ends_at, NEW.created_at - 1)
        WHERE (content_type, object_id, slug) = (NEW.content_type, NEW.object_id, NEW.slug) AND is_active = 1
            AND seq <> NEW.seq;
    END
    """,
    """
    CREATE TRIGGER tokens_overlap AFTER INSERT ON tokens WHEN NEW.overlap > 0
    BEGIN
        UPDATE tokens
        SET overlap = NEW.overlap,
            expires_at = min(expires_at, NEW.overlap), ends_at = min(ends_at, NEW.overlap)
        WHERE (content_type, object_id, slug) = (NEW.content_type, NEW.object_id, NEW.slug) AND is_active = 1
            AND seq <> NEW.seq;
    END
    """,
    """
    CREATE TRIGGER tokens_use AFTER UPDATE OF uses ON tokens WHEN NEW.overlap > 0 AND OLD.is_active = 1
    BEGIN
        UPDATE tokens SET is_active = 0, ends_at = min(ends_at, NEW.used_at - 1)
        WHERE (content_type, object_id, slug) = (NEW.content_type, NEW.object_id, NEW.slug) AND is_active = 1
            AND overlap > 0 AND seq <> NEW.seq;
    END
    """,
    """
    CREATE TABLE budgets (
        content_type TEXT NOT NULL, object_id TEXT NOT NULL, slug TEXT NOT NULL, kind TEXT NOT NULL,
        spent INTEGER NOT NULL, strikes INTEGER NOT NULL, until INTEGER NOT NULL,
        PRIMARY KEY (content_type, object_id, slug, kind)
    ) STRICT, WITHOUT ROWID
    """,
    "CREATE INDEX budgets_until ON budgets (until)",
    f"PRAGMA application_id = {APPLICATION_ID}",
)
_MIGRATIONS: tuple[tuple[str, ...], ...] = (_SCHEMA_1,)
"""The statements that make schema 1 of an empty file, schema 2 of schema 1, and so on: what was released is
never changed. Processes of the older release must have ended: they look at the schema at open only."""


class Opener:
    """Opens the file, all in one call on aiosqlite's worker thread, and knows that thread."""

    def __init__(self, path: str, options: Options) -> None:
        self._path = path
        self._options = options
        self._lock = threading.Lock()
        self._abandoned = False
        self._database: sqlite3.Connection | None = None
        self._thread: threading.Thread | None = None

    def __call__(self) -> sqlite3.Connection:
        self._thread = threading.current_thread()
        database = _open_file(self._path, self._options)
        with self._lock:
            if not self._abandoned:
                self._database = database
                return database
        database.close()
        raise sqlite3.ProgrammingError("nobody waits for this connection any more")

    def abandon(self) -> None:
        """Close what was opened, or will be, for a caller who was cancelled meanwhile."""
        with self._lock:
            self._abandoned = True
            if self._database is not None:
                self._database.close()

    def worker_lives(self) -> bool:
        return self._thread is not None and self._thread.is_alive()


_making = threading.Lock()


def _open_file(path: str, options: Options) -> sqlite3.Connection:
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
        raise BackendUnavailable(f"{path} may not be read and written")
    url = pathlib.Path(path).as_uri()
    # Twice: the first look may have met a file that another process was about to make.
    if _looks_foreign(path, url) and _looks_foreign(path, url):
        raise CorruptStore(_FOREIGN.format(path))
    database = sqlite3.connect(
        f"{url}?mode=rw",
        uri=True,
        timeout=options.busy_timeout / 1000,
        isolation_level=None,
        check_same_thread=False,  # abandon() closes it from where it is
        factory=Connection,
    )
    try:
        _prepare(database, path, options)
    except BaseException:
        database.close()
        raise
    return database


@functools.cache  # once in a process
def _warn_of_wal_reset(version: tuple[int, ...]) -> None:
    """Logged and not warned: there is nothing to mend in the code that opens a store. Where a distribution
    backported the fix, the version is still the old one, and nothing in SQLite tells of it."""
    if version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45):
        return
    logger.warning(
        "SQLite %s may have the WAL-reset bug, which in rare cases damages a file that several connections"
        " write: https://www.sqlite.org/wal.html#walresetbug. It was fixed in 3.51.3, 3.50.7 and 3.44.6. If"
        " your distribution backported the fix, silence the logger vtoken_backends.sqlite",
        ".".join(map(str, version)),
    )


_FOREIGN: Final = "{} is a database, but not one of vtoken; it was left as it is"


def _looks_foreign(path: str, url: str) -> bool:
    """A look that leaves no trace, neither in the file nor beside it."""
    in_use = os.path.exists(f"{path}-wal") or os.path.exists(f"{path}-journal")
    database = sqlite3.connect(f"{url}?mode=ro{'' if in_use else '&immutable=1'}", uri=True)
    with contextlib.closing(database), contextlib.suppress(sqlite3.Error):
        return _schema_version(database) is None
    return False  # whatever is wrong, the real connection tells


def _schema_version(database: sqlite3.Connection) -> int | None:
    """0 for an empty database, None for one that is not ours."""
    [(application_id,)] = database.execute("PRAGMA application_id").fetchall()
    [(version,)] = database.execute("PRAGMA user_version").fetchall()
    if application_id == APPLICATION_ID:
        return int(version) if version > 0 else None
    [(objects,)] = database.execute("SELECT count(*) FROM sqlite_schema").fetchall()
    return 0 if application_id == version == objects == 0 else None


def _prepare(database: sqlite3.Connection, path: str, options: Options) -> None:
    # trusted_schema, cell_size_check: https://www.sqlite.org/security.html (untrusted database files).
    # secure_delete overwrites what ForgetKey clears. fullfsync: macOS's plain fsync stops short of the disk.
    for setting in (
        "trusted_schema = OFF",
        "cell_size_check = ON",
        "secure_delete = ON",
        f"fullfsync = {int(options.synchronous == 'full')}",
        f"synchronous = {options.synchronous}",
        # Pages. Twice as many carried no more, and held a consumer up twice as long while a million tokens
        # were purged (tests/benchmarks): whoever commits into a full log empties it.
        "wal_autocheckpoint = 2000",
        # KiB, and only as far as the file fills it. SQLite's own 2 MiB cost a third of all operations at
        # 400,000 tokens; four times as much gained no more, nor did other page sizes or mmap.
        "cache_size = -65536",
        "temp_store = MEMORY",
    ):
        database.execute(f"PRAGMA {setting}").fetchall()
    version = _checked_version(database, path)
    _check_pages(database, path, options.check)
    if version < len(_MIGRATIONS):
        _migrate(database)
        _checked_version(database, path)
    _use_wal(database, path, options.busy_timeout)
    for statement in FOR_A_CONNECTION:
        database.execute(statement)


def _checked_version(database: sqlite3.Connection, path: str) -> int:
    """The schema of a store that this release can work on, or bring up to date."""
    database.execute("BEGIN")  # the version and the objects of one moment
    version = _schema_version(database)
    objects = _objects(database)
    triggers = _triggers(database)
    database.execute("COMMIT")
    if version is None:
        raise CorruptStore(_FOREIGN.format(path))
    if version > len(_MIGRATIONS):
        raise BackendError(
            f"{path} was made by a newer vtoken (schema {version}, known up to {len(_MIGRATIONS)}):"
            " upgrade vtoken"
        )
    ours = _expected_objects(version)
    if not ours <= objects or triggers - {name for name, _ in ours}:
        raise CorruptStore(f"{path}: its tables, indexes or triggers are not those of vtoken")
    return version


def _migrate(database: sqlite3.Connection, newest: int | None = None) -> None:
    """Make the schema, or bring it up to date: in one transaction, so that a store has the old one
    or the new one at every time. A new store gets its schema before it has a write-ahead log."""
    database.execute("BEGIN IMMEDIATE")
    version = _schema_version(database)  # again, as somebody else may have been faster
    if version is not None and version < len(_MIGRATIONS[:newest]):
        for statement in itertools.chain(*_MIGRATIONS[version:newest]):
            database.execute(statement)
        database.execute(f"PRAGMA user_version = {len(_MIGRATIONS[:newest])}")
    database.execute("COMMIT")


def _objects(database: sqlite3.Connection) -> set[tuple[str, str]]:
    return set(database.execute("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL").fetchall())


def _triggers(database: sqlite3.Connection) -> set[str]:
    """Those on our tables; one of somebody else's could undo what a statement says it did."""
    sql = "SELECT name FROM sqlite_schema WHERE type = 'trigger' AND tbl_name IN ('tokens', 'budgets')"
    return {name for (name,) in database.execute(sql).fetchall()}


@functools.cache
def _expected_objects(version: int) -> frozenset[tuple[str, str]]:
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as database:
        _migrate(database, version)
        return frozenset(_objects(database))


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


_UNAVAILABLE: Final = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_AUTH,
}


_NOT_AS_MADE: Final = (
    "SQLite: unsupported file format",
    "SQLite: no such table",
    "SQLite: no such column",
    "SQLite: malformed JSON",
    "SQLite: cannot store",
)


def as_backend_error(error: Exception) -> BackendError:
    code: int | None = getattr(error, "sqlite_errorcode", None)
    message = f"SQLite: {error}"
    if isinstance(error, OSError):
        return BackendUnavailable(f"the SQLite file cannot be made: {error.strerror}")
    if isinstance(error, UnicodeError) or "Could not decode" in message:
        return CorruptStore("SQLite: a text in the store is not UTF-8")  # its own message quotes the text
    if isinstance(error, json.JSONDecodeError):
        return CorruptStore("SQLite: a stored row makes no sense")
    if code is None:  # aiosqlite's ValueError, or sqlite3's own word for a closed connection
        closed = isinstance(error, ValueError) or "closed" in message
        return BackendClosed("the SQLite backend was closed meanwhile") if closed else BackendError(message)
    if code in (sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC):
        return OutcomeUnknown(message)
    if code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or message.startswith(_NOT_AS_MADE):
        return CorruptStore(message)
    if code & 0xFF in _UNAVAILABLE:
        return BackendUnavailable(message)
    return BackendError(message)
