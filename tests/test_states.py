"""The table of docs/reference/states.md, each row played on each backend."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import aiosqlite
import psycopg
import pytest
from pymongo import AsyncMongoClient

from . import postgresql_servers
from .conftest import BACKENDS, a_store
from .states import BLOCK, OPERATIONS, POLICIES, STATES, Cell, Handle, Player, new_world

PAGE: Final = Path(__file__).parent.parent / "docs" / "reference" / "states.md"


def written() -> list[Cell]:
    """The rows of the page's table."""
    rows = [
        [text.strip() for text in line.strip("|\n").split("|")]
        for line in PAGE.read_text().splitlines()
        if line.startswith("| ")
    ]
    assert rows[0] == ["Operation", "State before", "Result", "Charged", "Event", "State after"]
    return [
        Cell(*[text.strip("`") if place == 0 else text for place, text in enumerate(row)]) for row in rows[2:]
    ]


def test_every_state_meets_every_operation_once() -> None:
    said = [(cell.operation, cell.state) for cell in written()]
    assert said == [(operation, state) for operation in (*OPERATIONS, *BLOCK) for state in STATES]


@pytest.mark.parametrize("kind", BACKENDS)
async def test_each_cell(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    with a_store(kind, request, tmp_path) as url:
        async with new_world(url) as world:
            manager, other = await world.manager(*POLICIES), await world.manager(*POLICIES)
            player = Player(world, manager, other, transactions(kind, url, tmp_path))
            differing: list[str] = []
            for cell in written():
                played = await player.play(cell.operation, cell.state)
                if played != (cell if kind in TRANSACTIONS else without_transactions(cell)):
                    differing.append(f"written: {cell.row}\nplayed:  {played.row}")
            assert not differing, "\n".join(differing)


TRANSACTIONS: Final = ("postgresql", "sqlite", "mongodb")
"""The backends on which this test opens a transaction of the application's own."""


def transactions(kind: str, url: str, directory: Path) -> Handle | None:
    @asynccontextmanager
    async def on_postgresql() -> AsyncGenerator[object]:
        server = postgresql_servers.shared_url()
        async with await psycopg.AsyncConnection.connect(server) as connection, connection.transaction():
            yield connection

    @asynccontextmanager
    async def on_sqlite() -> AsyncGenerator[object]:
        async with aiosqlite.connect(directory / "tokens.db") as connection:
            await connection.execute("BEGIN IMMEDIATE")
            yield connection
            await connection.commit()

    @asynccontextmanager
    async def on_mongodb() -> AsyncGenerator[object]:
        async with (
            AsyncMongoClient[Any](url) as client,
            client.start_session() as session,
            await session.start_transaction(),
        ):
            yield session

    return {"postgresql": on_postgresql, "sqlite": on_sqlite, "mongodb": on_mongodb}.get(kind)


def without_transactions(cell: Cell) -> Cell:
    """What the page says of ``mark_used`` holds where a store can take part in a transaction."""
    if cell.operation != "mark_used" or cell.result.startswith("cannot be"):
        return cell
    [failed] = [c for c in written() if c.operation == "the block fails" and c.state == cell.state]
    return cell._replace(result="`InvalidInput`", event="none", after=failed.after)
