"""A store that somebody has written to: it takes no wrong key, and what makes no sense is corrupt."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest

from vtoken import (
    ConfigurationError,
    CooldownActive,
    CorruptStore,
    InvalidToken,
    IssuedToken,
    KeyGenerationError,
    LeaseLost,
    Limit,
    Settings,
    Subject,
    TokenManager,
    TokenPolicy,
    VerificationToken,
)
from vtoken_backends.sqlite import SQLiteBackend
from vtoken_backends.sqlite.schema import MIGRATIONS

from .core_tools import SECRET, USER

ODD: Final = {
    "TEXT": [
        *("''", "'x'", "'[]'", "'[1]'", "'[[]]'", "'{}'", "'null'", "'nan'", "'\"'", '\'["a", "b"]\''),
        "'a' || char(0)",
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
ODD_JSON: Final = [
    *("'[[\"a\", 1, 2]]'", "'[[1]]'", "'[[\"a\", 4102444999999, 1], 5]'", "'[[[[]]]]'", "'[null]'"),
    "replace(keys, 'link', 'code')",
    "replace(keys, 'hmac-sha256', 'sha256')",
    "json_insert(keys, '$[#]', json(json_extract(keys, '$[0]')))",
]
"""What somebody may write into a column that holds JSON."""
TABLES: Final = ("vtoken_tokens", "vtoken_keys", "vtoken_receipts", "vtoken_budgets")
JSON_COLUMNS: Final = {("vtoken_tokens", "keys"), ("vtoken_tokens", "holds")}
POLICIES: Final = [
    TokenPolicy.code("sms", issue_limits=[Limit(9, "1h")]),
    TokenPolicy.link("derived", key_storage="derived", max_uses=3),
]
REFUSALS: Final = (
    CorruptStore,
    InvalidToken,
    CooldownActive,
    LeaseLost,
    KeyGenerationError,
    ConfigurationError,  # reveal(), where the policy is not derived
)
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
    lambda manager, _: manager.status(USER, "sms"),
    lambda manager, token: manager.reveal(token),
    lambda manager, _: manager.reset_limits(USER),
    lambda manager, _: manager.purge(keep=timedelta(0)),
    lambda manager, _: manager.erase(USER),
    listed,
    redeem,
]


def columns() -> list[tuple[str, str, str]]:
    """Each column of each table that holds tokens, uses or budgets, with its type."""
    found: list[tuple[str, str, str]] = []
    with closing(sqlite3.connect(":memory:")) as database:
        for statement in itertools.chain(*MIGRATIONS):
            database.execute(statement)
        for table in TABLES:
            rows: list[Any] = database.execute(f"PRAGMA table_info({table})").fetchall()
            found += [(table, row[1], row[2]) for row in rows]
    return found


async def use(answer: object) -> None:
    """Whatever came back can be looked at."""
    for token in answer if isinstance(answer, list) else [answer]:
        if isinstance(token, VerificationToken):
            assert repr(token)
            token.is_valid()
            token.get_extra_data()


@pytest.mark.parametrize("slug", ["sms", "derived"])
@pytest.mark.parametrize(("table", "column", "kind"), columns())
async def test_an_altered_row(tmp_path: Path, table: str, column: str, kind: str, slug: str) -> None:
    backend = SQLiteBackend(tmp_path / "tokens.db", synchronous="normal")
    altered = 0
    values = ODD[kind] + (ODD_JSON if (table, column) in JSON_COLUMNS else [])
    async with TokenManager(backend, Settings(secret=SECRET), POLICIES) as manager:
        with closing(sqlite3.connect(tmp_path / "tokens.db", isolation_level=None)) as database:
            for value in values:
                for each in TABLES:
                    database.execute(f"DELETE FROM {each}")  # noqa: S608  # our own texts
                before = await manager.issue(USER, slug, extra_data={"a": 1})
                await manager.consume(USER, slug, before.key, consume_id="before")
                token = await manager.issue(USER, slug, extra_data={"a": 1})
                with suppress(InvalidToken):
                    await manager.verify(USER, slug, "271828")
                try:
                    database.execute(f"UPDATE OR REPLACE {table} SET {column} = {value}")  # noqa: S608  # our own texts
                except sqlite3.DatabaseError:  # NOT NULL, UNIQUE, or a text that is no JSON
                    continue
                altered += 1
                await look_at_everything(manager, token)
    assert altered >= 1


async def look_at_everything(manager: TokenManager, token: IssuedToken) -> None:
    for wrong in ("wrong", "", token.key[:-1], token.key + "0"):
        for obj, slug in ((USER, token.slug), (Subject("auth.user", "x"), token.slug), (USER, "x")):
            if wrong != token.key:
                with pytest.raises((CorruptStore, InvalidToken)):
                    await manager.verify(obj, slug, wrong)
    for operation in OPERATIONS:
        with suppress(*REFUSALS):
            await use(await operation(manager, token))


@pytest.mark.parametrize(
    "revived", ["state = 0", "state = 0, max_uses = 9", "state = 0, uses = 0, used_at = 0"]
)
async def test_a_used_token_that_is_switched_on_again_is_told(tmp_path: Path, revived: str) -> None:
    """Its end tells of its use. A hand that mends that, too, has made a sound row: no check tells it."""
    async with TokenManager(SQLiteBackend(tmp_path / "tokens.db")) as manager:
        token = await manager.issue(USER, "reset")
        await manager.consume(USER, "reset", token.key)
        with closing(sqlite3.connect(tmp_path / "tokens.db", isolation_level=None)) as database:
            database.execute(f"UPDATE vtoken_tokens SET {revived}")  # noqa: S608  # our own texts
        with pytest.raises(CorruptStore):
            await manager.verify(USER, "reset", token.key)
