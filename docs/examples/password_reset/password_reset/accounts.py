"""Accounts and sessions, in an SQLite file of the application's own.

Each change is one statement, so it is whole or not there, also where a request is cancelled.
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
from pathlib import Path
from typing import Self

import aiosqlite

SESSION_SECONDS = 12 * 3600

_SCHEMA = """
CREATE TABLE IF NOT EXISTS accounts (
    email TEXT PRIMARY KEY,
    password TEXT NOT NULL,
    generation INTEGER NOT NULL DEFAULT 0  -- sessions of an older one are over
) STRICT;
CREATE TABLE IF NOT EXISTS sessions (
    digest BLOB PRIMARY KEY,
    email TEXT NOT NULL,
    generation INTEGER NOT NULL,
    ends_at INTEGER NOT NULL
) STRICT;
"""


class AddressTaken(Exception):
    """There is an account of this address."""


class Accounts:
    """The accounts, each known by its address."""

    def __init__(self, connection: aiosqlite.Connection) -> None:
        self._connection = connection

    @classmethod
    async def open(cls, file: Path) -> Self:
        """Open the file, and make it where there is none."""
        connection = await aiosqlite.connect(file, isolation_level=None)
        await connection.execute("PRAGMA journal_mode = WAL")
        await connection.executescript(_SCHEMA)
        return cls(connection)

    async def close(self) -> None:
        """Close the file."""
        await self._connection.close()

    async def is_empty(self) -> bool:
        """Whether there is no account yet."""
        return not await self._connection.execute_fetchall("SELECT 1 FROM accounts LIMIT 1")

    async def add(self, email: str, password: str) -> None:
        """Make an account.

        Args:
            email: normalised.
            password: its hash.

        Raises:
            AddressTaken: there is one of this address.
        """
        try:
            await self._connection.execute_fetchall(
                "INSERT INTO accounts (email, password) VALUES (?, ?)", (email, password)
            )
        except sqlite3.IntegrityError:
            raise AddressTaken from None

    async def password(self, email: str) -> str | None:
        """The hash of an account's password; None where there is no such account."""
        rows = await self._connection.execute_fetchall(
            "SELECT password FROM accounts WHERE email = ?", (email,)
        )
        return next((str(row[0]) for row in rows), None)

    async def set_password(self, email: str, password: str) -> None:
        """Set the hash of an account's password, and end its sessions."""
        await self._connection.execute_fetchall(
            "UPDATE accounts SET password = ?, generation = generation + 1 WHERE email = ?", (password, email)
        )

    async def start_session(self, email: str, password: str, now: float) -> str:
        """Start a session, unless the password has changed since it was checked.

        Args:
            email: the account's.
            password: the hash that was checked.
            now: seconds since the epoch.

        Returns:
            The session's key, for a cookie.
        """
        key = secrets.token_urlsafe(32)
        await self._connection.execute_fetchall(
            "INSERT INTO sessions SELECT ?, email, generation, ? FROM accounts"
            " WHERE email = ? AND password = ?",
            (_digest(key), int(now) + SESSION_SECONDS, email, password),
        )
        return key

    async def of_session(self, key: str, now: float) -> str | None:
        """The address of the account whose session this is, or None."""
        rows = await self._connection.execute_fetchall(
            "SELECT email FROM sessions JOIN accounts USING (email, generation)"
            " WHERE digest = ? AND ends_at > ?",
            (_digest(key), int(now)),
        )
        return next((str(row[0]) for row in rows), None)

    async def end_session(self, key: str) -> None:
        """End a session."""
        await self._connection.execute_fetchall("DELETE FROM sessions WHERE digest = ?", (_digest(key),))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="replace")).digest()
