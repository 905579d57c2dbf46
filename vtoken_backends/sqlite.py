"""Tokens in an SQLite file, by aiosqlite.

Every operation is one SQL statement in autocommit, sent by one call of aiosqlite. Its worker thread
finishes a statement whether or not the task still waits for it, so a cancelled operation has happened
wholly or not at all and never leaves a transaction open. What an operation does beside its own row
(replacing older tokens, ending an overlap) is done by triggers, within the same statement and row by
row, so that the statements stay right when they carry many rows.
"""

# ruff: noqa: S608  # the SQL is put together from this module's own texts; values are always parameters

from __future__ import annotations

import asyncio
import contextlib
import difflib
import json
import os
import sqlite3
import sys
import threading
import warnings
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, Final, NamedTuple, Self, TypeVar, cast
from urllib.parse import parse_qsl, unquote

import aiosqlite
import anyio

from vtoken.backend import (
    Budget,
    Change,
    ForgetKey,
    InsertMode,
    InsertResult,
    Lease,
    Match,
    Release,
    SetExtraData,
    SlugCount,
    Spent,
    StoredToken,
    Use,
)
from vtoken.errors import BackendClosed, ConfigurationError, CorruptStore, VTokenError
from vtoken_backends._sqlite_file import Check, Opener, Options, Private, Synchronous, as_backend_error

_T = TypeVar("_T")

_COLUMNS: Final = ", ".join(StoredToken._fields)
_MODES: Final = {InsertMode.ADD: 0, InsertMode.REPLACE: 1, InsertMode.IF_NONE_VALID: 2}
_ROW: Final = f"({', '.join('?' * (len(StoredToken._fields) + 2))})"
_INSERT: Final = (
    f"INSERT INTO tokens ({_COLUMNS}, mode, overlap) VALUES {_ROW} ON CONFLICT DO NOTHING RETURNING 1"
)
_WHY_NOT_INSERTED: Final = """
    SELECT EXISTS (SELECT 1 FROM tokens WHERE digest = ?) OR EXISTS (SELECT 1 FROM tokens WHERE id = ?),
        EXISTS (
            SELECT 1 FROM tokens
            WHERE (content_type, object_id, slug) = (?, ?, ?) AND is_active = 1
                AND expires_at >= ? AND lease_until <= ?
        )
    """
_PURGE: Final = """
    DELETE FROM tokens WHERE seq IN (
        SELECT seq FROM tokens WHERE ends_at < ? AND lease_until <= ? ORDER BY ends_at LIMIT ?
    ) RETURNING 1
    """
_PURGE_BUDGETS: Final = """
    DELETE FROM budgets WHERE (content_type, object_id, slug, kind) IN (
        SELECT content_type, object_id, slug, kind FROM budgets WHERE until <= ? ORDER BY until LIMIT ?
    )
    """
_COUNT: Final = """
    SELECT slug, count(*), sum(is_active = 1 AND expires_at >= asked.now),
        sum(is_active = 1 AND expires_at < asked.now), sum(is_active = 0 AND uses > 0)
    FROM tokens, (SELECT ? AS now) AS asked GROUP BY slug
    """
# The write lock is held from the beginning of the statement, so what it reads is what it changes.
# A product too great for an integer becomes a float and loses against max_window.
_SPEND: Final = """
    INSERT INTO budgets (content_type, object_id, slug, kind, spent, strikes, until)
    WITH asked (content_type, object_id, slug, kind, now, most, window, max_window) AS (
        VALUES (?, ?, ?, ?, ?, ?, ?, ?)
    ),
    state AS (
        SELECT asked.*, spent, until,
            spent > 0 AND until > now AND until + max_window > now AS running,
            CASE
                WHEN until IS NULL OR until + max_window <= now THEN 0
                WHEN spent = 0 OR until > now THEN strikes
                WHEN spent >= most THEN min(strikes + 1, 20)
                ELSE 0
            END AS strikes
        FROM asked LEFT JOIN budgets USING (content_type, object_id, slug, kind)
    )
    SELECT content_type, object_id, slug, kind, iif(running, spent + 1, 1), strikes,
        iif(running, until, now + min(window * (1 << strikes), max_window))
    FROM state WHERE NOT ifnull(running, 0) OR spent < most
    ON CONFLICT DO UPDATE SET spent = excluded.spent, strikes = excluded.strikes, until = excluded.until
    RETURNING until
    """
_BUDGET: Final = "(content_type, object_id, slug, kind) = (?, ?, ?, ?)"
_DENIED: Final = f"SELECT until FROM budgets WHERE {_BUDGET} AND until > ? AND spent >= ?"
_REFUND: Final = f"UPDATE budgets SET spent = spent - 1 WHERE {_BUDGET} AND until = ? AND spent > 0"
_RESET: Final = f"DELETE FROM budgets WHERE {_BUDGET}"


class _Link(NamedTuple):
    """One connection, and what tells whether it can still be used from here."""

    connection: aiosqlite.Connection
    opener: Opener
    pid: int

    def is_inherited(self) -> bool:
        """A forked child has the connection but neither its thread nor the right to touch its file."""
        return self.pid != os.getpid()

    async def close(self) -> None:
        closing = asyncio.ensure_future(self._close())
        with anyio.CancelScope(shield=True):
            try:
                await asyncio.shield(closing)
            except asyncio.CancelledError:  # what asyncio itself cancels, no anyio scope shields
                await closing
                raise

    async def _close(self) -> None:
        if self.opener.worker_lives():
            await self.connection.close()
            return await self.worker_end()
        # Nobody answers; but cancelled at every await, aiosqlite still marks the connection as closed.
        self.opener.abandon()
        with anyio.CancelScope() as scope:
            scope.cancel()
            await self.connection.close()
        return None

    async def worker_end(self) -> None:
        """Wait for a thread that was told to end: it would stumble over a loop that is closed by then."""
        while self.opener.worker_lives():  # noqa: ASYNC110  # a thread sets no event when it ends
            await anyio.sleep(0.001)


_inherited: list[_Link] = []  # kept for ever: a forked child that closed them could break its parent's locks


class SQLiteBackend:
    """A :class:`~vtoken.backend.TokenBackend` in one SQLite file, for any number of processes of one machine.

    Needs asyncio, SQLite 3.37 and a local file system (write-ahead logging shares memory between processes).

    Args:
        path: the file. It is made, readable by its owner only, if there is none; its directory is not.
        synchronous: ``"full"``: what was acknowledged survives a power loss. ``"normal"``: it survives a
            crash of the process, but a power loss may undo the last writes, and used tokens are valid again.
        busy_timeout: milliseconds, 0 to 2147483647, to wait for other writers before
            :class:`~vtoken.BackendUnavailable`.
        check: when to run SQLite's integrity check at open: ``"auto"`` (files up to 64 MiB), ``"always"``
            or ``"never"``.

    Raises:
        ConfigurationError: an argument is out of its range, or the path names no file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        synchronous: Synchronous = "full",
        busy_timeout: int = 30_000,
        check: Check = "auto",
    ) -> None:
        self._link: _Link | None = None  # first, as __del__ looks at it
        self._opens = 0
        self._opening = threading.Lock()
        name = os.fsdecode(path)
        if not name or name.startswith(":memory:"):
            raise ConfigurationError("an SQLite backend needs a file; for tokens in memory use memory://")
        if "\0" in name:
            raise ConfigurationError("the path of an SQLite file has no NUL")
        _check_choice("synchronous", synchronous, ("full", "normal"))
        _check_choice("check", check, ("auto", "always", "never"))
        if type(busy_timeout) is not int or not 0 <= busy_timeout < 2**31:
            raise ConfigurationError("busy_timeout is a number of milliseconds, 0 to 2147483647")
        self._path = os.path.abspath(name)
        self._options = Options(synchronous, busy_timeout, check)

    @classmethod
    def from_url(cls, url: str, **options: object) -> Self:
        """``sqlite:///relative.db``, ``sqlite:////absolute.db``; the options of the class also as a query.

        Raises:
            ConfigurationError: the URL or an option is not understood.
        """
        rest = url.partition("://")[2]
        location, _, query = rest.partition("?")
        if location in ("", "/", ":memory:", "/:memory:"):
            raise ConfigurationError(
                "sqlite:// needs a file, sqlite:///tokens.db; for tokens in memory use memory://"
            )
        if not location.startswith("/"):
            raise ConfigurationError(
                "three slashes before a relative path, four before an absolute one: sqlite:///tokens.db"
            )
        if "#" in rest:
            raise ConfigurationError("write %23 for a # in the URL of an SQLite file")
        for name, value in parse_qsl(query, keep_blank_values=True):
            options.setdefault(name, int(value) if value.isascii() and value.isdigit() else value)
        for name in options:
            _check_choice("option", name, Options._fields)
        return cls(_percent_decoded(location[1:]), **cast(dict[str, Any], options))

    def __repr__(self) -> str:
        return f"<SQLiteBackend {self._path}>"

    def __del__(self) -> None:
        link = self._link
        if link is None or link.is_inherited():
            return
        if link.opener.worker_lives() and not sys.is_finalizing():
            # In a thread and loop of its own, because here there may be none or another's.
            with contextlib.suppress(RuntimeError):  # the interpreter is about to end
                threading.Thread(target=lambda: asyncio.run(link.close()), daemon=True).start()
        warnings.warn(f"{self!r} was dropped without close()", ResourceWarning, stacklevel=1, source=self)

    async def open(self) -> None:
        async with self._connecting():
            link = self._link
            if link is not None and link.is_inherited():
                _inherited.append(link)
                self._link, self._opens = None, 0
            if self._link is None:
                self._link = await self._connect()
            self._opens += 1

    async def close(self) -> None:
        link = self._link
        if link is None or link.is_inherited():
            return
        self._opens -= 1
        if self._opens == 0:
            self._link = None
            await _translated(link.close())

    async def insert(self, token: StoredToken, mode: InsertMode, keep_until: int = 0) -> InsertResult:
        overlap = keep_until if mode is InsertMode.REPLACE and keep_until > token.created_at else 0
        row = Private((*_encode(token), _MODES[mode], overlap))
        subject = (token.content_type, token.object_id, token.slug)
        now = token.created_at
        while not await self._run(_INSERT, row):
            why = Private((token.digest, token.id, *subject, now, now))
            [(key_taken, has_valid)] = await self._run(_WHY_NOT_INSERTED, why)
            if key_taken:
                return InsertResult.KEY_TAKEN
            if has_valid and mode is InsertMode.IF_NONE_VALID:
                return InsertResult.HAS_VALID
            # What was in the way is gone by now: again.
        return InsertResult.INSERTED

    async def find(self, match: Match, limit: int, after: tuple[int, str] | None = None) -> list[StoredToken]:
        where, values = _conditions(match)
        if after is not None:
            where += " AND (created_at, id) < (?, ?)"
        sql = f"SELECT {_COLUMNS} FROM tokens WHERE {where} ORDER BY created_at DESC, id DESC LIMIT ?"
        return await self._tokens(sql, Private((*values, *(after or ()), limit)))

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        where, values = _conditions(match)
        assignments, new_values = _assignments(change)
        if isinstance(change, Use) and change.use_id:
            where += " AND NOT EXISTS (SELECT 1 FROM json_each(use_ids) WHERE value = ?)"
            values = Private((*values, change.use_id))
        sql = (
            f"UPDATE tokens SET {assignments} WHERE seq = ("
            f"SELECT seq FROM tokens WHERE {where} ORDER BY created_at DESC, id DESC LIMIT 1"
            f") RETURNING {_COLUMNS}"
        )
        tokens = await self._tokens(sql, Private((*new_values, *values)))
        return tokens[0] if tokens else None

    async def deactivate(self, match: Match, at: int) -> int:
        where, values = _conditions(match._replace(active=True))
        sql = f"UPDATE tokens SET is_active = 0, ends_at = min(ends_at, ?) WHERE {where} RETURNING 1"
        return len(await self._run(sql, Private((at - 1, *values))))

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> int:
        purged = await self._run(_PURGE, Private((before, now, limit)))
        await self._run(_PURGE_BUDGETS, Private((budgets_before, limit)))
        return len(purged)

    async def count(self, now: int) -> list[SlugCount]:
        return [SlugCount(*row) for row in await self._run(_COUNT, Private((now,)))]

    async def spend(self, budget: Budget, now: int, limit: int, window: int, max_window: int) -> Spent:
        while True:
            taken = await self._run(_SPEND, Private((*budget, now, limit, window, max_window)))
            if taken:
                return Spent(True, taken[0][0])
            denied = await self._run(_DENIED, Private((*budget, now, limit)))
            if denied:
                return Spent(False, denied[0][0])
            # It was given back or reset between the two: again.

    async def refund(self, budget: Budget, until: int) -> None:
        await self._run(_REFUND, Private((*budget, until)))

    async def reset(self, budget: Budget) -> None:
        await self._run(_RESET, Private(budget))

    async def _tokens(self, sql: str, parameters: Private) -> list[StoredToken]:
        tokens = [_decode(row) for row in await self._run(sql, parameters)]
        sound = [token for token in tokens if token is not None]
        if len(sound) < len(tokens):
            raise CorruptStore(f"{self._path} holds a token that makes no sense")
        return sound

    async def _run(self, sql: str, parameters: Private) -> list[Private]:
        """Send one statement, and all of the rows that it returns back."""
        link = self._link
        if link is None:
            raise BackendClosed("the SQLite backend is not open")
        if link.is_inherited():
            raise BackendClosed(
                "the SQLite backend was opened in another process, before a fork: open it in this one"
            )
        if not link.opener.worker_lives():
            link = await self._reconnect(link)
        rows = await _translated(link.connection.execute_fetchall(sql, parameters))
        return cast(list[Private], rows)

    async def _connect(self) -> _Link:
        if not _runs_asyncio():
            raise ConfigurationError("the SQLite backend needs asyncio, as aiosqlite does")
        opener = Opener(self._path, self._options)
        link = _Link(_daemonic_connection(opener), opener, os.getpid())
        try:
            await _translated(link.connection)
        except VTokenError:
            await link.worker_end()
            raise
        except BaseException:
            opener.abandon()
            raise
        return link

    async def _reconnect(self, dead: _Link) -> _Link:
        """A loop that is closed while a statement runs takes aiosqlite's worker thread with it. The statement
        has been done; all that is lost is the thread."""
        async with self._connecting():
            if self._link is dead:
                fresh = await self._connect()
                if self._link is dead:
                    self._link = fresh
                else:
                    await fresh.close()  # the backend was closed meanwhile
                await dead.close()
        if self._link is None:
            raise BackendClosed("the SQLite backend is not open")
        return self._link

    @contextlib.asynccontextmanager
    async def _connecting(self) -> AsyncGenerator[None]:
        while not self._opening.acquire(blocking=False):  # noqa: ASYNC110  # who waits may be in other loops
            await anyio.sleep(0.005)
        try:
            yield
        finally:
            self._opening.release()


def _check_choice(what: str, value: object, choices: tuple[str, ...]) -> None:
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigurationError(f"{what} {value!r} is not known, only {', '.join(choices)}{hint}")


def _percent_decoded(text: str) -> str:
    with contextlib.suppress(UnicodeDecodeError):
        return unquote(text, errors="strict")
    raise ConfigurationError("the percent-encoded bytes in the URL of an SQLite file must be UTF-8")


def _runs_asyncio() -> bool:
    with contextlib.suppress(RuntimeError):
        asyncio.get_running_loop()
        return True
    return False


def _daemonic_connection(opener: Opener) -> aiosqlite.Connection:
    """A connection whose thread never keeps the process alive: a thread is a daemon if its maker is."""
    made: list[aiosqlite.Connection] = []
    maker = threading.Thread(target=lambda: made.append(aiosqlite.Connection(opener, 64)), daemon=True)
    maker.start()
    maker.join()
    return made[0]


async def _translated(awaitable: Awaitable[_T]) -> _T:
    """The one place at which the driver's errors become ours. They are raised after the except block, so
    that the driver's own error is not chained to them."""
    try:
        return await awaitable
    except (sqlite3.Error, OSError, ValueError) as error:
        failure = as_backend_error(error)
    raise failure


def _conditions(match: Match) -> tuple[str, Private]:
    """The WHERE of a match, and its values. is_active = 1 is spelled out, as its partial index wants."""
    terms = ["1"]
    values: list[object] = []
    for column, value in (
        ("id", match.id),
        ("content_type", match.content_type),
        ("object_id", match.object_id),
        ("slug", match.slug),
        ("context", match.context),
        ("lease_id", match.lease_id),
    ):
        if value is not None:
            terms.append(f"{column} = ?")
            values.append(value)
    if match.digests is not None:
        terms.append(f"digest IN ({', '.join('?' * len(match.digests))})")
        values.extend(match.digests)
    if match.active or match.valid_at is not None:
        terms.append("is_active = 1")
    if match.valid_at is not None:
        terms.append("expires_at >= ? AND lease_until <= ?")
        values += (match.valid_at, match.valid_at)
    if match.leased_at is not None:
        terms.append("lease_until > ?")
        values.append(match.leased_at)
    return " AND ".join(terms), Private(values)


def _assignments(change: Change) -> tuple[str, Private]:
    match change:
        case Use(at, use_id):
            return (
                "uses = uses + 1, used_at = ?, lease_id = '', lease_until = 0,"
                " use_ids = iif(? = '', use_ids, json_insert(use_ids, '$[#]', ?)),"
                " is_active = is_active AND uses + 1 < max_uses,"
                " ends_at = iif(uses + 1 < max_uses, ends_at, min(ends_at, ?))"
            ), Private((at, use_id, use_id, at - 1))
        case Lease(lease_id, until):
            return "lease_id = ?, lease_until = ?", Private((lease_id, until))
        case Release():
            return "lease_id = '', lease_until = 0", Private()
        case SetExtraData(extra_data):
            return "extra_data = ?", Private((extra_data,))
        case ForgetKey():
            return "plain_key = ''", Private()


_ACTIVE: Final = StoredToken._fields.index("is_active")
_USE_IDS: Final = StoredToken._fields.index("use_ids")


def _encode(token: StoredToken) -> Private:
    use_ids = json.dumps(token.use_ids, ensure_ascii=False) if token.use_ids else "[]"
    return Private((*token[:_USE_IDS], use_ids, *token[_USE_IDS + 1 :]))


def _decode(row: Private) -> StoredToken | None:
    """The token of a row, or None where no backend of ours can have written it: the file is not trusted."""
    try:
        use_ids = json.loads(row[_USE_IDS])
    except (ValueError, RecursionError):
        return None
    if not isinstance(use_ids, list):
        return None
    values = list(row)
    values[_ACTIVE] = row[_ACTIVE] == 1
    values[_USE_IDS] = tuple(use_ids)
    token = StoredToken._make(values)
    return token if row[_ACTIVE] in (0, 1) and _is_sound(token) else None


def _is_sound(token: StoredToken) -> bool:
    if (
        len(token.digest) != 32
        or min(token.created_at, token.expires_at, token.used_at, token.lease_until) < 0
    ):
        return False
    if token.max_uses < 1 or len(token.use_ids) > token.uses:
        return False
    if not all(isinstance(use_id, str) for use_id in token.use_ids):
        return False
    # A token that was switched on again by hand: its end tells of it.
    return token.ends_at == token.expires_at and token.uses < token.max_uses if token.is_active else True
