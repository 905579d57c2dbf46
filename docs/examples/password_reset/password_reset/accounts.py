"""Accounts and sessions, in the database of the tokens: a password and the use of a link are one commit."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from typing import Any, Protocol
from urllib.parse import urlsplit

SESSION_SECONDS = 12 * 3600


class AddressTaken(Exception):
    """There is an account of this address."""


class Change(Protocol):
    """What can be changed within a transaction."""

    @property
    def handle(self) -> Any:
        """The transaction itself, for vtoken's ``using=``."""

    async def add(self, email: str, password: str) -> None:
        """Make an account.

        Args:
            email: normalised.
            password: its hash.

        Raises:
            AddressTaken: there is one of this address.
        """

    async def set_password(self, email: str, password: str) -> None:
        """Set the hash of an account's password, and end its sessions."""


class Accounts(Protocol):
    """The accounts, each known by its address."""

    async def close(self) -> None:
        """Close what was opened."""

    async def in_transaction(self, work: Callable[[Change], Awaitable[None]]) -> None:
        """Commit what ``work`` does, or nothing of it if it raises. It may be called more than once."""

    async def is_empty(self) -> bool:
        """Whether there is no account yet."""

    async def password(self, email: str) -> str | None:
        """The hash of an account's password; None where there is no such account."""

    async def start_session(self, email: str, password: str, now: float) -> str:
        """Start a session, unless the password has changed since it was checked.

        Args:
            email: the account's.
            password: the hash that was checked.
            now: seconds since the epoch.

        Returns:
            The session's key, for a cookie.
        """

    async def of_session(self, key: str, now: float) -> str | None:
        """The address of the account whose session this is, or None."""

    async def end_session(self, key: str) -> None:
        """End a session."""


async def open_accounts(tokens_url: str) -> Accounts:
    """Open the accounts beside the tokens, and make the tables where there are none.

    Args:
        tokens_url: vtoken's own URL; on SQLite with ``?shared=true``.

    Raises:
        ValueError: this application knows no accounts for such a store.
    """
    scheme = urlsplit(tokens_url).scheme
    if scheme.startswith("mongodb"):
        from password_reset.accounts_mongodb import MongoAccounts

        return await MongoAccounts.open(tokens_url)
    if scheme in {"sqlite", "postgresql"}:
        from password_reset.accounts_sql import SqlAccounts

        return await SqlAccounts.open(tokens_url)
    raise ValueError(f"accounts are kept in SQLite, PostgreSQL or MongoDB, and not in {scheme}")


def digest(key: str) -> bytes:
    """What is stored of a session's key."""
    return hashlib.sha256(key.encode(errors="replace")).digest()
