"""Accounts in SQLite or PostgreSQL, by SQLAlchemy."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from typing import Self

from sqlalchemy import (
    Column,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    and_,
    delete,
    insert,
    literal,
    select,
    update,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from password_reset.accounts import SESSION_SECONDS, AddressTaken, Change, digest

_TABLES = MetaData()
_ACCOUNTS = Table(
    "accounts",
    _TABLES,
    Column("email", Text, primary_key=True),
    Column("password", Text, nullable=False),
    Column("generation", Integer, nullable=False),  # sessions of an older one are over
)
_SESSIONS = Table(
    "sessions",
    _TABLES,
    Column("digest", LargeBinary, primary_key=True),
    Column("email", Text, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("ends_at", Integer, nullable=False),
)
_DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+psycopg"}
_OPTIONS = ["shared", "synchronous", "busy_timeout", "check", "reads", "schema", "pool_size"]
"""Vtoken's own words in the URL, which no driver knows."""


class SqlChange:
    """Within a transaction."""

    def __init__(self, connection: AsyncConnection) -> None:
        self.handle = connection

    async def add(self, email: str, password: str) -> None:
        row = {"email": email, "password": password, "generation": 0}
        try:
            await self.handle.execute(insert(_ACCOUNTS).values(row))
        except IntegrityError:
            raise AddressTaken from None

    async def set_password(self, email: str, password: str) -> None:
        row = {"password": password, "generation": _ACCOUNTS.c.generation + 1}
        await self.handle.execute(update(_ACCOUNTS).where(_ACCOUNTS.c.email == email).values(row))


class SqlAccounts:
    """The accounts; see the protocol."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    @classmethod
    async def open(cls, tokens_url: str) -> Self:
        """Connect to the database of the tokens."""
        url = make_url(tokens_url)
        if url.drivername == "sqlite" and url.query.get("shared") != "true":
            raise ValueError("the accounts are in the same file, so write ?shared=true behind its name")
        url = url.set(drivername=_DRIVERS[url.drivername]).difference_update_query(_OPTIONS)
        engine = create_async_engine(url, pool_pre_ping=True)
        async with engine.begin() as connection:
            await connection.run_sync(_TABLES.create_all)
        return cls(engine)

    async def close(self) -> None:
        await self._engine.dispose()

    async def in_transaction(self, work: Callable[[Change], Awaitable[None]]) -> None:
        async with self._engine.begin() as connection:
            await work(SqlChange(connection))

    async def is_empty(self) -> bool:
        async with self._engine.connect() as connection:
            return (await connection.execute(select(_ACCOUNTS.c.email).limit(1))).first() is None

    async def password(self, email: str) -> str | None:
        query = select(_ACCOUNTS.c.password).where(_ACCOUNTS.c.email == email)
        async with self._engine.connect() as connection:
            return (await connection.scalars(query)).one_or_none()

    async def start_session(self, email: str, password: str, now: float) -> str:
        key = secrets.token_urlsafe(32)
        ends_at = int(now) + SESSION_SECONDS
        row = select(
            literal(digest(key), LargeBinary), _ACCOUNTS.c.email, _ACCOUNTS.c.generation, literal(ends_at)
        ).where(_ACCOUNTS.c.email == email, _ACCOUNTS.c.password == password)
        async with self._engine.begin() as connection:
            await connection.execute(insert(_SESSIONS).from_select(list(_SESSIONS.c.keys()), row))
        return key

    async def of_session(self, key: str, now: float) -> str | None:
        same = and_(_ACCOUNTS.c.email == _SESSIONS.c.email, _ACCOUNTS.c.generation == _SESSIONS.c.generation)
        query = (
            select(_SESSIONS.c.email)
            .join(_ACCOUNTS, same)
            .where(_SESSIONS.c.digest == digest(key), _SESSIONS.c.ends_at > int(now))
        )
        async with self._engine.connect() as connection:
            return (await connection.scalars(query)).one_or_none()

    async def end_session(self, key: str) -> None:
        async with self._engine.begin() as connection:
            await connection.execute(delete(_SESSIONS).where(_SESSIONS.c.digest == digest(key)))
