"""The statements that the SQLite backend sends: their plans, the pages they touch, what is seen of them."""

# pyright: reportPrivateUsage=false
# The statements that are sent, and the work of the triggers, can be seen from within only.

# ruff: noqa: ASYNC240  # looking at a small file is no wait to speak of

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from vtoken.backend import (
    Budget,
    Charge,
    ForgetKey,
    Hold,
    InsertMode,
    Match,
    Release,
    SetExtraData,
    Spend,
    Use,
    UseHeld,
)
from vtoken_backends.sqlite import SQLiteBackend, file, inserts, operations, presents, shared
from vtoken_backends.sqlite.connections import execute_on
from vtoken_backends.sqlite.schema import TRIGGERS
from vtoken_backends.sqlite.steps import Rows, Steps, carry_out

from .sqlite_tools import NOW, digest, insert, make_store, opened, present, token, use


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a test has its store."""
    return tmp_path / "tokens.db"


@pytest.fixture
def database(path: Path) -> Iterator[sqlite3.Connection]:
    """A store's connection that writes."""
    options = file.Options(synchronous="full", busy_timeout=0, check="auto", reads="auto", shared=False)
    database = file.open_file(str(path), options)
    yield database
    database.close()


# Plans

BUDGET = Budget(object=b"o" * 16, name=b"n" * 16)
SPEND = Spend(budget=BUDGET, limit=3, window=9, max_window=9)
KEPT_IN_MEMORY = ("vtoken_numbers", "vtoken_answers", "json_each", "by_end", "by_expiry", "horizon")


def scans(database: sqlite3.Connection, sql: str) -> list[str]:
    """The steps of a statement's plan that read a whole table or index of the file."""
    values = dict.fromkeys(re.findall(r":(\w+)", sql))
    plan = [str(row[3]) for row in database.execute(f"EXPLAIN QUERY PLAN {sql}", values or ())]
    return [
        step
        for step in plan
        if re.match(r"SCAN (vtoken_\w+|taken|owner|other|presented|budget)\b", step)
        and not any(name in step for name in KEPT_IN_MEMORY)
    ]


def work_of(kind: shared.Kind) -> list[str]:
    """The statements of a trigger, which an outer plan does not show, for parameters in place of ``NEW``."""
    statements = [text for text in kind.work.split(";") if text.strip()]
    return [re.sub(r"NEW\.(\w+)", ":new_\\1", text) for text in statements if "RAISE" not in text]


INSERT_KINDS = [
    inserts._kind(overlaps=overlaps, is_limited=is_limited, is_usual=is_usual)
    for overlaps, is_limited, is_usual in itertools.product([False, True], repeat=3)
    if not (overlaps and is_usual)
]
PRESENT_KINDS = [
    presents._kind(change, many_digests=many, has_use_id=once, is_limited=limited, resets=resets)
    for change in ("check", "use", "hold")
    for many, once, limited, resets in itertools.product([False, True], repeat=4)
]


@pytest.mark.parametrize("kind", [*INSERT_KINDS, *PRESENT_KINDS], ids=lambda kind: kind.view)
def test_every_statement_of_the_shared_work_goes_by_an_index(
    database: sqlite3.Connection, kind: shared.Kind
) -> None:
    for sql in work_of(kind):
        # An outcome of the first statement decides about the others; its table is in memory.
        assert scans(database, sql.replace("changes()", "1")) == []


@pytest.mark.parametrize("trigger", TRIGGERS)
def test_every_statement_of_the_triggers_goes_by_an_index(database: sqlite3.Connection, trigger: str) -> None:
    body = trigger.partition("BEGIN")[2].rpartition("END")[0]
    for sql in filter(str.strip, body.split(";")):
        assert scans(database, re.sub(r"(NEW|OLD)\.(\w+)", ":\\1_\\2", sql)) == []


def sent(database: sqlite3.Connection, steps: Steps[object]) -> list[str]:
    """The statements that an operation sends, carried out."""
    statements: list[str] = []
    try:
        sql, values = next(steps)
        while True:
            statements.append(sql)
            rows = Rows(database.execute(sql, values).fetchall())
            assert scans(database, re.sub(r"\?\d*", ":value", sql)) == [], sql
            sql, values = steps.send(rows)
    except StopIteration:
        return statements


def test_every_other_statement_goes_by_an_index(database: sqlite3.Connection) -> None:
    two = (digest(1), digest(2))
    user = Match(content_type="auth.user", object_id="1", slug="reset")
    stored = token(1)._replace(max_uses=None)
    request = inserts.Insert(
        token=stored, mode=InsertMode.REPLACE, keep_until=0, wanted_until=0, also_taken=(), spends=()
    )
    carry_out(shared.work_together(request.kind, [request.row(request.kind)]), execute_on(database))
    hold = presents.Present(key=present(1), change=Hold(hold_id="h", until=NOW + 9), now=NOW, spends=())
    carry_out(shared.work_together(hold.kind, [hold.row(hold.kind)]), execute_on(database))
    for match in (
        Match(id=token(1).id),
        Match(digests=two),
        user._replace(digests=two, valid_at=NOW, context=b""),
        user._replace(active=True),
        user._replace(valid_at=NOW),
    ):
        sent(database, operations.find(match, 10))
        sent(database, operations.find(match, 10, token(1).id))
        sent(database, operations.deactivate(match._replace(context=b"?"), NOW, ("h",)))
    for change in (
        UseHeld(hold_id="h", at=NOW, use_id="a", resets=(BUDGET,)),
        Release(hold_id="h"),
        SetExtraData(extra_data=None),
        ForgetKey(),
    ):
        sent(database, operations.update(Match(digests=two), change))
    sent(database, operations.deactivate(user, NOW, ()))
    sent(database, operations.spend((SPEND,), NOW))
    sent(database, operations.refund((Charge(budget=BUDGET, until=NOW + 9),)))
    sent(database, operations.budgets((BUDGET,)))
    sent(database, operations.reset(BUDGET.object, (BUDGET.name,)))
    sent(database, operations.purge_tokens(NOW, NOW, 10))
    sent(database, operations.purge_budgets(NOW, 10))
    sent(database, operations.write_note("name", "text", True))
    sent(database, operations.erase("auth.user", "1", BUDGET.object))


def test_the_plan_of_a_full_scan_would_be_seen(database: sqlite3.Connection) -> None:
    assert scans(database, "SELECT 1 FROM vtoken_tokens WHERE slug = 'reset'")
    assert scans(database, "DELETE FROM vtoken_keys WHERE token = 1")
    assert scans(database, "SELECT count(*) FROM vtoken_budgets WHERE name = x''")


def test_a_listing_of_everything_walks_in_its_own_order(database: sqlite3.Connection) -> None:
    sql, values = next(operations.find(Match(content_type="auth.user"), 10))
    plan = [str(row[3]) for row in database.execute(f"EXPLAIN QUERY PLAN {sql}", values)]
    assert plan == ["SCAN vtoken_tokens"]  # by id, and no sorting


# Pages


async def pages_written(path: Path, backend: SQLiteBackend, write: object) -> int:
    """Frames that a write adds to the log, of pages of 2,048 bytes."""
    before = os.stat(f"{path}-wal").st_size
    await write  # type: ignore[misc]  # a coroutine
    return (os.stat(f"{path}-wal").st_size - before) // (2048 + 24)


async def test_a_lone_write_touches_few_pages(path: Path) -> None:
    async with opened(SQLiteBackend(path, synchronous="normal")) as backend:
        for number in range(400):
            await insert(backend, token(2 * number, str(number)))

    async with opened(SQLiteBackend(path, synchronous="normal")) as backend:
        await insert(backend, token(2001, "x"))
        issue = insert(backend, token(2003, "7"), InsertMode.REPLACE)
        assert await pages_written(path, backend, issue) <= 6
        used = use(backend, present(2003, "7"))
        assert await pages_written(path, backend, used) <= 3
        refused = backend.present(present(1), Use(at=NOW), NOW)
        assert await pages_written(path, backend, refused) == 0
        wrong = backend.present(present(1), Use(at=NOW), NOW, (SPEND,))
        assert await pages_written(path, backend, wrong) <= 3


# What is seen of them


async def test_no_digest_in_any_log(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    loop = asyncio.get_running_loop()
    loop.set_debug(True)
    loop.slow_callback_duration = 0  # every callback is logged with its arguments
    async with opened(SQLiteBackend(path)) as backend:
        plain_key = token(1).keys[0]._replace(plain_key="plain-as-day")
        await insert(backend, token(1)._replace(keys=(plain_key,)), InsertMode.REPLACE)
        await insert(backend, token(1), InsertMode.IF_NONE_VALID)
        await backend.find(Match(digests=(digest(1),)), 9)
        await use(backend, Match(digests=(digest(1),)))
        await asyncio.gather(*(insert(backend, token(number)) for number in range(2, 9)))
    loop.set_debug(False)
    assert "_deliver" in caplog.text
    for secret in ("plain-as-day", repr(digest(1))[2:12], digest(1).hex()[:8]):
        assert secret not in caplog.text


async def test_forgotten_keys_are_overwritten_in_the_file(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        plain_key = token(1).keys[0]._replace(plain_key="plain-as-day")
        await insert(backend, token(1)._replace(keys=(plain_key,)))
    assert b"plain-as-day" in path.read_bytes()
    async with opened(SQLiteBackend(path)) as backend:
        assert await backend.update(Match(id=token(1).id), ForgetKey()) == token(1)
    assert b"plain-as-day" not in path.read_bytes()


async def test_new_files_have_small_pages_and_old_ones_keep_theirs(path: Path, tmp_path: Path) -> None:
    await make_store(path)
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as made:
        made.execute("PRAGMA page_size = 8192")
        made.execute("VACUUM")
    made.close()
    await make_store(other)
    sizes: list[int] = []
    for name in (path, other):
        made = sqlite3.connect(name)
        sizes += made.execute("PRAGMA page_size").fetchone()
        made.close()
    assert sizes == [2048, 8192]
