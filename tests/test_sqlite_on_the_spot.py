"""SQLite: look-ups on the event loop's own thread, and when they are not done there."""

# pyright: reportPrivateUsage=false
# Where a look-up was done can be seen from within only.

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest

from vtoken.backend import InsertMode, Match
from vtoken.errors import CorruptStore
from vtoken_backends.sqlite import SQLiteBackend
from vtoken_backends.sqlite.on_the_spot import AGAIN, QUICK, SLOW, TURN, OnTheSpot
from vtoken_backends.sqlite.steps import Private

from .sqlite_tools import digest, insert, opened, plain, present, token, use


class Disk:
    """A clock that goes on by what a look-up takes."""

    def __init__(self) -> None:
        self.now = 0.0
        self.takes = 0.0

    def __call__(self) -> float:
        self.now += self.takes
        return self.now


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    """A database in memory, with one row to be looked up."""
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        yield connection


def made(connection: sqlite3.Connection, disk: Disk) -> OnTheSpot:
    return OnTheSpot(connection, asyncio.get_running_loop(), disk)


async def look_up(spot: OnTheSpot) -> bool:
    """Whether a look-up was done on the spot."""
    return await spot.look_up("SELECT 1", Private()) is not None


async def test_it_begins_once_look_ups_are_quick_elsewhere(connection: sqlite3.Connection) -> None:
    spot = made(connection, Disk())
    assert not await look_up(spot)
    spot.took_elsewhere(10 * QUICK, 10)
    assert not await look_up(spot)
    spot.took_elsewhere(5 * QUICK, 10)
    assert await look_up(spot)


async def test_after_a_slow_one_they_go_elsewhere_for_a_while(connection: sqlite3.Connection) -> None:
    disk = Disk()
    spot = made(connection, disk)
    spot.took_elsewhere(0, 1)
    disk.takes = 2 * SLOW
    assert await look_up(spot)  # nobody knew
    assert not await look_up(spot)
    disk.takes = 0
    spot.took_elsewhere(0, 1)
    assert not await look_up(spot)
    disk.now += 2 * AGAIN
    spot.took_elsewhere(0, 1)
    assert await look_up(spot)


async def test_a_turn_of_the_loop_is_bounded_and_the_rest_waits_for_the_next(
    connection: sqlite3.Connection,
) -> None:
    disk = Disk()
    spot = made(connection, disk)
    spot.took_elsewhere(0, 1)
    disk.takes = TURN / 23.5  # a look-up asks for the time three times, so that eight fit into a turn
    turns: list[int] = []
    done = 0

    async def count() -> None:
        nonlocal done
        assert await look_up(spot)
        done += 1

    tasks = [asyncio.create_task(count()) for _ in range(40)]
    turns.append(done)  # eager tasks have begun
    while done < 40:
        before = done
        await asyncio.sleep(0)
        turns.append(done - before)
    await asyncio.gather(*tasks)
    first, *others = filter(None, turns)
    assert first == 8
    assert max(others) == 2  # what their tasks do next takes time, too
    assert sum(turns) == 40


async def test_a_task_whose_look_ups_never_wait_lets_others_run(connection: sqlite3.Connection) -> None:
    """Whatever it does between two of them counts."""
    disk = Disk()
    spot = made(connection, disk)
    spot.took_elsewhere(0, 1)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while not task.done():
            turns += 1
            await asyncio.sleep(0)

    async def busy() -> None:
        for _ in range(40):
            assert await look_up(spot)
            disk.now += TURN / 3

    task = asyncio.create_task(busy())
    await other()
    await task
    assert turns >= 10


async def test_those_that_wait_go_elsewhere_after_a_slow_one(connection: sqlite3.Connection) -> None:
    disk = Disk()
    spot = made(connection, disk)
    spot.took_elsewhere(0, 1)
    disk.takes = 2 * SLOW
    answers = await asyncio.gather(*(look_up(spot) for _ in range(10)))
    assert answers == [True] + [False] * 9


async def test_a_cancelled_one_is_left_out(connection: sqlite3.Connection) -> None:
    disk = Disk()
    spot = made(connection, disk)
    spot.took_elsewhere(0, 1)
    disk.takes = TURN / 2
    tasks = [asyncio.create_task(look_up(spot)) for _ in range(6)]
    await asyncio.sleep(0)
    tasks[3].cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [answer is True for answer in answers] == [True, True, True, False, True, True]


async def test_another_event_loop_goes_elsewhere(connection: sqlite3.Connection) -> None:
    spot = made(connection, Disk())
    spot.took_elsewhere(0, 1)
    assert not await asyncio.to_thread(asyncio.run, look_up(spot))
    assert await look_up(spot)


async def test_a_closed_one_goes_elsewhere(connection: sqlite3.Connection) -> None:
    spot = made(connection, Disk())
    spot.took_elsewhere(0, 1)
    spot.close()
    assert not await look_up(spot)


# With a store


@contextlib.asynccontextmanager
async def on_the_spot(path: Path) -> AsyncGenerator[SQLiteBackend]:
    async with opened(SQLiteBackend(path)) as backend:
        spot = backend._opened().on_the_spot
        assert spot is not None
        spot.took_elsewhere(0, 1)
        yield backend


async def test_a_write_that_was_acknowledged_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "tokens.db"
    async with on_the_spot(path) as backend, opened(SQLiteBackend(path)) as other:
        for number in range(50):
            writer = (backend, other)[number % 2]
            assert await backend.find(present(number), 1) == []
            await insert(writer, token(number), InsertMode.ADD)
            assert await backend.find(present(number), 1) == [token(number)]
            used = await use(writer, present(number))
            assert await backend.find(present(number), 1) == [used]


async def test_it_waits_for_no_writer(tmp_path: Path) -> None:
    path = tmp_path / "tokens.db"
    async with on_the_spot(path) as backend:
        await insert(backend, token(1))
        with plain(path) as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("UPDATE vtoken_tokens SET uses = 1")
            assert await backend.find(present(1), 1) == [token(1)]
            database.execute("ROLLBACK")


async def test_damage_is_told(tmp_path: Path) -> None:
    path = tmp_path / "tokens.db"
    async with on_the_spot(path) as backend:
        await insert(backend, token(1))
        with plain(path) as database:
            database.execute("UPDATE vtoken_tokens SET digests = x'00'")
        with pytest.raises(CorruptStore, match="invalid token row") as caught:
            await backend.find(present(1), 1)
        assert caught.value.__context__ is None
        assert repr(digest(1))[2:12] not in str(caught.value)


async def test_by_an_option_of_the_url_it_never_is(tmp_path: Path) -> None:
    backend = SQLiteBackend.from_url(f"sqlite:///{tmp_path}/tokens.db?reads=worker")
    async with opened(backend):
        assert backend._opened().on_the_spot is None
        await insert(backend, token(1))
        assert await backend.find(present(1), 1) == [token(1)]
        assert await backend.find(Match(id=token(1).id), 1) == [token(1)]
