"""A store that somebody has written to: it takes no wrong key, and what makes no sense is corrupt."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest

from vtoken import (
    CorruptStore,
    InvalidToken,
    IssuedToken,
    Settings,
    Subject,
    TokenManager,
    TokenPolicy,
    VerificationToken,
)
from vtoken.backend import StoredToken
from vtoken_backends.sqlite import SQLiteBackend

from .core_tools import SECRET, USER
from .sqlite_tools import make_store

ODD: Final = {
    "TEXT": [
        *(
            "''",
            "'x'",
            "'[]'",
            "'[1]'",
            "'{}'",
            "'null'",
            "'nan'",
            "'\"'",
            '\'["a", "b"]\'',
            "'a' || char(0)",
        ),
        "char(55296)",
        "CAST(x'ff' AS TEXT)",
        "CAST(x'00' AS TEXT)",
        "replace(hex(zeroblob(60000)), '00', '[')",
        "NULL",
    ],
    "BLOB": ["x''", "x'00'", "zeroblob(32)", "zeroblob(100000)"],
    "INTEGER": ["0", "1", "2", "-1", "9223372036854775807", "-9223372036854775808", "253402300800000"],
}
"""By the type of a column, what somebody may write into it, as SQL."""
POLICIES: Final = [TokenPolicy.code("sms"), TokenPolicy.link("derived", key_storage="derived", max_uses=3)]
Operation = Callable[[TokenManager, IssuedToken], Awaitable[object]]


async def redeem(manager: TokenManager, token: IssuedToken) -> None:
    async with manager.redeem(USER, token.slug, token.key):
        pass


async def listed(manager: TokenManager, _: IssuedToken) -> list[VerificationToken]:
    return [token async for token in manager.filter_active_tokens(USER)]


OPERATIONS: Final[list[Operation]] = [
    lambda manager, token: manager.get(token.id),
    lambda manager, _: manager.exists_valid(USER),
    lambda manager, token: manager.exists_valid(USER, token.slug, token.key),
    lambda manager, token: manager.verify(USER, token.slug, token.key),
    lambda manager, token: manager.get_active_or_create(USER, token.slug),
    lambda manager, _: manager.stats(),
    lambda manager, token: manager.consume(USER, token.slug, token.key, consume_id="mine"),
    lambda manager, token: manager.save(token),
    lambda manager, _: manager.deactivate(USER),
    lambda manager, token: manager.deactivate_and_create(USER, token.slug),
    lambda manager, _: manager.purge(keep=timedelta(0)),
    listed,
    redeem,
]


def columns() -> list[tuple[str, str]]:
    """Each column that holds a field of a token, with the values that its type takes."""
    types = {"digest": "BLOB", "context": "BLOB"}
    text = {"id", "content_type", "object_id", "slug", "scheme", "secret_id", "plain_key", "nonce"}
    text |= {"extra_data", "use_ids", "lease_id"}
    kinds = [(name, types.get(name, "TEXT" if name in text else "INTEGER")) for name in StoredToken._fields]
    return [*kinds, ("mode", "INTEGER"), ("overlap", "INTEGER")]


async def use(answer: object) -> None:
    """Whatever came back can be looked at."""
    for token in answer if isinstance(answer, list) else [answer]:
        if isinstance(token, VerificationToken):
            assert repr(token)
            token.is_valid()
            token.get_extra_data()


@pytest.mark.parametrize("slug", ["sms", "derived"])
@pytest.mark.parametrize(("column", "kind"), columns())
async def test_an_altered_row(tmp_path: Path, column: str, kind: str, slug: str | None) -> None:
    backend = SQLiteBackend(tmp_path / "tokens.db", synchronous="normal")
    altered = 0
    async with TokenManager(backend, Settings(secret=SECRET), POLICIES) as manager:
        with closing(sqlite3.connect(tmp_path / "tokens.db", isolation_level=None)) as database:
            for value in ODD[kind]:
                database.execute("DELETE FROM tokens")
                database.execute("DELETE FROM budgets")
                token = await manager.deactivate_and_create(USER, slug, {"a": 1})
                try:
                    database.execute(f"UPDATE tokens SET {column} = {value}")  # noqa: S608  # our own texts
                except sqlite3.IntegrityError:  # NOT NULL
                    continue
                altered += 1
                await look_at_everything(manager, token)
    assert altered >= len(ODD[kind]) - 1


async def look_at_everything(manager: TokenManager, token: IssuedToken) -> None:
    for wrong in ("wrong", "", token.key[:-1], token.key + "0"):
        for obj, slug in ((USER, token.slug), (Subject("auth.user", "x"), token.slug), (USER, "x")):
            if wrong != token.key:
                with pytest.raises((CorruptStore, InvalidToken)):
                    await manager.verify(obj, slug, wrong)
    for operation in OPERATIONS:
        with suppress(CorruptStore, InvalidToken):
            await use(await operation(manager, token))


@pytest.mark.parametrize(
    "revived",
    [
        "is_active = 1",
        "is_active = 1, uses = 0",
        "is_active = 1, max_uses = 9",
        "is_active = 1, uses = 0, used_at = 0, use_ids = '[]'",
    ],
)
async def test_a_used_token_that_is_switched_on_again_is_told(tmp_path: Path, revived: str) -> None:
    """Its end tells of its use. A hand that mends that, too, has made a sound row: no check tells it."""
    async with TokenManager(SQLiteBackend(tmp_path / "tokens.db")) as manager:
        token = await manager.deactivate_and_create(USER, "reset")
        await manager.consume(USER, "reset", token.key)
        with closing(sqlite3.connect(tmp_path / "tokens.db", isolation_level=None)) as database:
            database.execute(f"UPDATE tokens SET {revived}")  # noqa: S608  # our own texts
        with pytest.raises(CorruptStore):
            await manager.verify(USER, "reset", token.key)


async def test_the_columns_are_those_of_the_store(tmp_path: Path) -> None:
    await make_store(tmp_path / "tokens.db")
    with closing(sqlite3.connect(tmp_path / "tokens.db")) as database:
        found: list[Any] = database.execute("PRAGMA table_info(tokens)").fetchall()
    assert {(row[1], row[2]) for row in found} == {*columns(), ("seq", "INTEGER")}
