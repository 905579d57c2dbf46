"""The plans: none reads a table or an index as a whole, even one that was made while the store was empty."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests import postgresql_servers as servers
from vtoken.backend import Budget, Match
from vtoken_backends.postgresql import PostgreSQLBackend
from vtoken_backends.postgresql import statements as module
from vtoken_backends.postgresql.board import Asked, Line, Needs, Purpose
from vtoken_backends.postgresql.statements import Statement, Statements

_WRITE = re.compile("_(UPDATE|DELETE|INSERT_|MOVE|FORGET|USE$|ISSUE|RESET)")
WRITES = [name for name in vars(module) if _WRITE.match(name)]
_SCAN = re.compile(r"(Seq Scan on|Index (Only )?Scan using|Bitmap Index Scan on) .*vtoken_")


@pytest.fixture
async def backend() -> AsyncIterator[PostgreSQLBackend]:
    with servers.fresh_store(servers.shared_url()) as url:
        made = PostgreSQLBackend.from_url(url, pool_size=1)
        await made.open()
        yield made
        await made.close()


async def plan(backend: PostgreSQLBackend, statement: Statement) -> list[str]:
    """The plan that a connection of the backend keeps for a statement, line by line."""

    async def explain(connection: Any) -> list[str]:
        numbers = [int(number) for number in re.findall(r"\$(\d+)", statement.text)]
        nothing = f"({', '.join(['NULL'] * max(numbers))})" if numbers else ""
        await connection.fetch(Statement(f"PREPARE kept AS {statement.text}"))
        rows = await connection.fetch(Statement(f"EXPLAIN EXECUTE kept{nothing}"))
        await connection.fetch(Statement("DEALLOCATE kept"))
        return [row for (row,) in rows]

    return await backend._run(explain)


def whole_reads(lines: list[str]) -> list[str]:
    """The scans of our tables and indexes that go by no condition."""
    return [
        line.strip()
        for line, below in zip(lines, [*lines[1:], ""], strict=True)
        if _SCAN.search(line) and "Index Cond" not in below
    ]


def statements(backend: PostgreSQLBackend) -> Statements:
    return backend._statements


def everything() -> Needs:
    needs = Needs()
    needs.digests.add(b"d" * 32)
    needs.ids.add("0" * 16)
    needs.lines.add(Line(content_type="t", object_id="o", slug="s", context=b""))
    needs.purposes.add(Purpose(content_type="t", object_id="o", slug="s"))
    needs.uses.add(Asked(digest=b"d" * 32, use_id="u"))
    needs.budgets.add(Budget(object=b"o" * 16, name=b"n" * 16))
    return needs


async def test_reading_goes_by_indexes(backend: PostgreSQLBackend) -> None:
    read = statements(backend).read(everything())
    lines = await plan(backend, read)
    assert any(_SCAN.search(line) for line in lines)
    assert whole_reads(lines) == []


@pytest.mark.parametrize("name", WRITES)
async def test_writing_goes_by_indexes(backend: PostgreSQLBackend, name: str) -> None:
    text = statements(backend)._text(getattr(module, name))
    assert whole_reads(await plan(backend, Statement(text))) == []


async def test_removing_goes_by_indexes(backend: PostgreSQLBackend) -> None:
    made = statements(backend)
    for statement in (
        made.purge(10, 10, 10, 10),
        made.purge_budgets(10, 10, 10),
        made.erase(10, 10, "t", "o"),
    ):
        assert whole_reads(await plan(backend, statement)) == []


@pytest.mark.parametrize(
    "match",
    [
        Match(id="0" * 16),
        Match(digests=(b"d" * 32,)),
        Match(content_type="t", object_id="o"),
        Match(content_type="t", object_id="o", slug="s", context=b"", valid_at=1),
    ],
)
async def test_finding_goes_by_indexes(backend: PostgreSQLBackend, match: Match) -> None:
    made = statements(backend)
    for statement in (made.find(match, 10, None), made.page(match, 1, 10, is_locking=True)):
        assert whole_reads(await plan(backend, statement)) == []
