"""The one place at which the driver's errors become ours."""

from __future__ import annotations

import sqlite3
from typing import Final

from vtoken.errors import (
    BackendClosed,
    BackendError,
    BackendUnavailable,
    CorruptStore,
    OutcomeUnknown,
    VTokenError,
)
from vtoken_backends.sqlite.records import Unreadable

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
    "unsupported file format",
    "no such table",
    "no such column",
    "malformed JSON",
    "cannot store",
)
_BUSY: Final = (
    "another connection kept it locked for longer than busy_timeout; within a write transaction of your own,"
    " pass its connection as using="
)
_REMEDIES: Final = {
    sqlite3.SQLITE_FULL: "there is no room left on its disk",
    sqlite3.SQLITE_READONLY: "the process needs the right to write the file and its directory",
    sqlite3.SQLITE_CANTOPEN: "the process needs the right to read and write the file and its directory",
}


def as_backend_error(error: Exception, path: str, *, busy: str = _BUSY) -> VTokenError:
    """The error to raise instead of one that came from SQLite; it does not know the one it stands for.

    Args:
        error: what was raised.
        path: the file, which most of SQLite's messages do not name.
        busy: what to say of a lock.
    """
    code: int | None = getattr(error, "sqlite_errorcode", None)
    text = str(error)
    message = f"{path}: SQLite says: {text}"
    if isinstance(error, VTokenError):
        return error
    if isinstance(error, OSError):
        return BackendUnavailable(f"{path} cannot be made or read: {error.strerror}")
    if isinstance(error, UnicodeError) or "Could not decode" in text:
        return CorruptStore(f"{path} contains a text that is not UTF-8")  # the driver's message quotes it
    if isinstance(error, Unreadable | ValueError):
        return CorruptStore(f"{path} contains an invalid token row")
    if code is None:
        if "closed" in text:
            return BackendClosed("the SQLite backend was closed meanwhile")
        name = type(error).__name__
        return BackendError(message if isinstance(error, sqlite3.Error) else f"{path}: {name} in SQLite")
    if code in (sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC):
        return OutcomeUnknown(message)
    if code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or text.startswith(_NOT_AS_MADE):
        return CorruptStore(message)
    if code & 0xFF in _UNAVAILABLE:
        remedy = busy if code & 0xFF == sqlite3.SQLITE_BUSY else _REMEDIES.get(code & 0xFF)
        return BackendUnavailable(f"{message} ({remedy})" if remedy else message)
    return BackendError(message)
