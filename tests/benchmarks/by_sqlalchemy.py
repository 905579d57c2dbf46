"""SQLAlchemy 2, async, on aiosqlite: the same table as the hand-written one, by its ORM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import LargeBinary, event, select, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from .by_hand import PRAGMAS, fill_file, make_schema, rows_of
from .contender import CONTENT_TYPE, DAY_MS, SLUG, Op, Row, Run, by_tasks, digest_of, new_key, now_ms


class _Base(DeclarativeBase):
    pass


class _Token(_Base):
    __tablename__ = "tokens"
    id: Mapped[int] = mapped_column(primary_key=True)
    content_type: Mapped[str]
    object_id: Mapped[str]
    slug: Mapped[str]
    digest: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[int]
    expires_at: Mapped[int]
    is_active: Mapped[bool]
    extra_data: Mapped[str | None]


def _prepare(connection: Any, _record: object) -> None:
    # sqlite3 would begin its transactions only at the first write; SQLAlchemy's documentation of this
    # dialect ("Pysqlite / transactions") has it switched off, so that ours begin where we say.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in PRAGMAS:
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


class SQLAlchemy:
    """One session for each operation, from the engine's own pool."""

    name = "SQLAlchemy async"

    def __init__(self, folder: Path) -> None:
        self._path = folder / "tokens.db"

    async def open(self) -> None:
        make_schema(self._path)
        self._engine = create_async_engine(f"sqlite+aiosqlite:///{self._path}", pool_timeout=600)
        event.listen(self._engine.sync_engine, "connect", _prepare)
        self._session: async_sessionmaker[AsyncSession] = async_sessionmaker(
            self._engine, expire_on_commit=False
        )

    async def close(self) -> None:
        await self._engine.dispose()

    async def fill(self, object_ids: Sequence[str]) -> list[str]:
        return fill_file(self._path, object_ids)

    async def run(self, ops: Sequence[Op], tasks: int) -> Run:
        return await by_tasks(self, ops, tasks)

    async def rows(self) -> list[Row]:
        return rows_of(self._path)

    async def issue(self, object_id: str) -> str:
        key, now = new_key(), now_ms()
        async with self._session() as session:
            await self._begin_immediate(session)
            await session.execute(
                update(_Token)
                .where(
                    _Token.content_type == CONTENT_TYPE,
                    _Token.object_id == object_id,
                    _Token.slug == SLUG,
                    _Token.is_active == True,  # noqa: E712  # SQL's, which the partial index matches
                )
                .values(is_active=False)
                .execution_options(synchronize_session=False)
            )
            session.add(
                _Token(
                    content_type=CONTENT_TYPE,
                    object_id=object_id,
                    slug=SLUG,
                    digest=digest_of(key),
                    created_at=now,
                    expires_at=now + DAY_MS,
                    is_active=True,
                )
            )
            await session.commit()
        return key

    async def check(self, object_id: str, key: str) -> bool:
        async with self._session() as session:
            found = await session.execute(select(_Token.id).where(*self._fits(object_id, key)))
            return found.first() is not None

    async def consume(self, object_id: str, key: str) -> bool:
        async with self._session() as session:
            await self._begin_immediate(session)
            result: Any = await session.execute(
                update(_Token)
                .where(*self._fits(object_id, key))
                .values(is_active=False)
                .execution_options(synchronize_session=False)
            )
            await session.commit()
        return bool(result.rowcount == 1)

    async def _begin_immediate(self, session: AsyncSession) -> None:
        connection = await session.connection()
        await connection.exec_driver_sql("BEGIN IMMEDIATE")

    def _fits(self, object_id: str, key: str) -> tuple[Any, ...]:
        return (
            _Token.digest == digest_of(key),
            _Token.content_type == CONTENT_TYPE,
            _Token.object_id == object_id,
            _Token.slug == SLUG,
            _Token.is_active == True,  # noqa: E712  # SQL's
            _Token.expires_at >= now_ms(),
        )
