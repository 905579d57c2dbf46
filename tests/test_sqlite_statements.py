"""The statements that the SQLite backend sends: their plans, many rows at once, what is seen of them."""

# pyright: reportPrivateUsage=false
# The statements that are sent, and the connection's own settings, can be seen from within only.

# ruff: noqa: ASYNC240  # looking at a small file is no wait to speak of

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from vtoken.backend import (
    Budget,
    ForgetKey,
    InsertMode,
    InsertResult,
    Match,
    SetExtraData,
    Use,
)
from vtoken_backends._sqlite_batch import FOR_A_CONNECTION, Operation, Rows
from vtoken_backends.sqlite import SQLiteBackend

from .sqlite_tools import (
    NOW,
    digest,
    opened,
    plain,
    token,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a test has its store."""
    return tmp_path / "tokens.db"


class Spy(SQLiteBackend):
    """Remembers what it sends."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.sent: list[tuple[str, Sequence[Any]]] = []

    async def _submit(self, operation: Operation) -> Rows:
        self.sent.append(operation.alone())
        if operation.kind is not None:
            self.sent.append(operation.kind([operation] * 5))
        return await super()._submit(operation)


SCANS = ("SCAN tokens", "SCAN budgets")


async def test_every_statement_goes_by_an_index(path: Path) -> None:
    async with opened(Spy(path)) as backend:
        two = (digest(1), digest(2))
        user = Match(content_type="auth.user", object_id="1", slug="reset")
        budget = Budget("auth.user", "1", "reset", "attempts")
        for mode in InsertMode:
            await backend.insert(token(1), mode)
        for match in (
            Match(id=token(1).id),
            Match(digests=two),
            user._replace(digests=two, valid_at=NOW, context=b""),
            user._replace(active=True),
            user._replace(valid_at=NOW),
            Match(content_type="auth.user", active=True),
        ):
            await backend.find(match, 10)
            await backend.find(match, 10, (NOW, token(1).id))
            await backend.deactivate(match, NOW)
        for match in (Match(id=token(1).id), Match(digests=two, valid_at=NOW), user._replace(digests=two)):
            await backend.update(match, Use(NOW, "a"))
            await backend.update(match, SetExtraData(None))
            await backend.update(match, ForgetKey())
        for _ in range(2):
            await backend.spend(budget, NOW, 1, 10, 10)
        await backend.refund(budget, NOW)
        await backend.reset(budget)
        await backend.purge(NOW, NOW, 10, NOW)
        # The plan of a statement does not tell those of its triggers: that of a shared use, by itself.
        [update] = re.findall(r"UPDATE tokens.*?(?=;)", FOR_A_CONNECTION[-1], re.DOTALL)
        backend.sent.append((re.sub(r"NEW\.\w+", "0", update), ()))
        with plain(path) as database:
            for statement in FOR_A_CONNECTION:
                database.execute(statement)
            for sql, parameters in backend.sent:
                plan = [row[3] for row in database.execute(f"EXPLAIN QUERY PLAN {sql}", parameters)]
                assert not [step for step in plan if step.startswith(SCANS)], (sql, plan)


async def test_the_plan_of_a_full_scan_would_be_seen(path: Path) -> None:
    async with opened(Spy(path)) as backend:
        await backend.find(Match(slug="reset"), 1)
        (sql, parameters), *_ = backend.sent
        with plain(path) as database:
            plan = [row[3] for row in database.execute(f"EXPLAIN QUERY PLAN {sql}", parameters)]
        assert any(step.startswith(SCANS) for step in plan)


async def test_one_statement_of_many_rows_goes_row_by_row(path: Path) -> None:
    rows = [
        (token(1, "a"), InsertMode.REPLACE, 0),
        (token(2, "a"), InsertMode.REPLACE, 0),  # replaces 1
        (token(2, "b"), InsertMode.ADD, 0),  # its digest is taken
        (token(3, "a"), InsertMode.IF_NONE_VALID, 0),  # 2 is valid
        (token(4, "c"), InsertMode.IF_NONE_VALID, 0),
        (token(5, "c"), InsertMode.IF_NONE_VALID, 0),  # 4 is valid
        (token(6, "a"), InsertMode.REPLACE, NOW + 10),  # overlaps 2
    ]
    async with opened(SQLiteBackend(path)) as backend:
        # All of them wait for the first trip, so they share one statement.
        results = await asyncio.gather(*(backend.insert(*row) for row in rows))
        inserted = [n for n, result in enumerate(results) if result is InsertResult.INSERTED]
        assert inserted == [0, 1, 4, 6]
        active = {int(found.id, 16): found.expires_at for found in await backend.find(Match(active=True), 9)}
        assert active == {2: NOW + 10, 4: NOW + 1000, 6: NOW + 1000}
        assert await backend.update(Match(digests=(digest(6),), valid_at=NOW), Use(NOW + 1)) is not None
        assert await backend.update(Match(digests=(digest(2),), valid_at=NOW), Use(NOW + 1)) is None


async def test_no_digest_in_any_log(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    loop = asyncio.get_running_loop()
    loop.set_debug(True)
    loop.slow_callback_duration = 0  # every callback is logged with its arguments
    async with opened(SQLiteBackend(path)) as backend:
        await backend.insert(token(1)._replace(plain_key="plain-as-day"), InsertMode.REPLACE)
        await backend.insert(token(1), InsertMode.IF_NONE_VALID)
        await backend.find(Match(digests=(digest(1),)), 9)
        await backend.update(Match(digests=(digest(1),)), Use(NOW))
    loop.set_debug(False)
    assert "<1 operations>" in caplog.text
    assert "<1 answers>" in caplog.text
    for secret in ("plain-as-day", repr(digest(1))[2:12], digest(1).hex()[:8]):
        assert secret not in caplog.text


async def test_forgotten_keys_are_overwritten_in_the_file(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        await backend.insert(token(1)._replace(plain_key="plain-as-day"), InsertMode.ADD)
    assert b"plain-as-day" in path.read_bytes()
    async with opened(SQLiteBackend(path)) as backend:
        forgotten = await backend.update(Match(id=token(1).id), ForgetKey())
        assert forgotten == token(1)
    assert b"plain-as-day" not in path.read_bytes()
