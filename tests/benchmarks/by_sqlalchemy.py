"""SQLAlchemy 2, async, on aiosqlite: the same table as the hand-written one, by its ORM."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from .by_hand import PRAGMAS, fill_file, make_schema, rows_of
from .contender import CONTENT_TYPE, DAY_MS, SLUG, Op, Row, Run, by_tasks, digest_of, new_key, now_ms

# Typed as Any, because it need not be installed.
_sql: Any = import_module("sqlalchemy")
_aio: Any = import_module("sqlalchemy.ext.asyncio")
_orm: Any = import_module("sqlalchemy.orm")


class _Token:
    def __init__(self, **columns: object) -> None:
        for name, value in columns.items():
            setattr(self, name, value)


_registry: Any = _orm.registry()
_table: Any = _sql.Table(
    "tokens",
    _registry.metadata,
    _sql.Column("id", _sql.Integer, primary_key=True),
    *(_sql.Column(name, _sql.String) for name in ("content_type", "object_id", "slug", "extra_data")),
    _sql.Column("digest", _sql.LargeBinary),
    *(_sql.Column(name, _sql.Integer) for name in ("created_at", "expires_at")),
    _sql.Column("is_active", _sql.Boolean),
)
_registry.map_imperatively(_Token, _table)
_mapped: Any = _Token


def _prepare(connection: Any, _record: object) -> None:
    # sqlite3 would begin its transactions only at the first write; SQLAlchemy's documentation of this
    # dialect ("Pysqlite / transactions") has it switched off, so that ours begin where we say.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in PRAGMAS:
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


class Contender:
    """One session for each operation, from the engine's own pool."""

    name = "SQLAlchemy async"

    def __init__(self, folder: Path) -> None:
        self._path = folder / "tokens.db"

    async def open(self) -> None:
        make_schema(self._path)
        self._engine = _aio.create_async_engine(f"sqlite+aiosqlite:///{self._path}", pool_timeout=600)
        _sql.event.listen(self._engine.sync_engine, "connect", _prepare)
        self._session = _aio.async_sessionmaker(self._engine, expire_on_commit=False)

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
                _sql.update(_mapped)
                .where(
                    _mapped.content_type == CONTENT_TYPE,
                    _mapped.object_id == object_id,
                    _mapped.slug == SLUG,
                    _mapped.is_active == True,  # noqa: E712  # SQL's, which the partial index matches
                )
                .values(is_active=False)
                .execution_options(synchronize_session=False)
            )
            session.add(
                _mapped(
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
            found: Any = await session.execute(_sql.select(_mapped.id).where(*self._fits(object_id, key)))
            return bool(found.first())

    async def consume(self, object_id: str, key: str) -> bool:
        async with self._session() as session:
            await self._begin_immediate(session)
            result: Any = await session.execute(
                _sql.update(_mapped)
                .where(*self._fits(object_id, key))
                .values(is_active=False)
                .execution_options(synchronize_session=False)
            )
            await session.commit()
        return bool(result.rowcount == 1)

    async def _begin_immediate(self, session: Any) -> None:
        connection = await session.connection()
        await connection.exec_driver_sql("BEGIN IMMEDIATE")

    def _fits(self, object_id: str, key: str) -> tuple[Any, ...]:
        return (
            _mapped.digest == digest_of(key),
            _mapped.content_type == CONTENT_TYPE,
            _mapped.object_id == object_id,
            _mapped.slug == SLUG,
            _mapped.is_active == True,  # noqa: E712  # SQL's
            _mapped.expires_at >= now_ms(),
        )
