"""SQLite and the life of loops and processes that end in the middle of something."""

# pyright: reportPrivateUsage=false
# What waits for the thread that writes can be seen from within only.

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vtoken import TokenManager
from vtoken.backend import InsertResult, Match
from vtoken_backends.sqlite import SQLiteBackend

from .sqlite_tools import NOW, insert, make_store, opened, plain, python, token


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a test has its store."""
    return tmp_path / "tokens.db"


def eventually(is_so: Callable[[], bool]) -> None:
    """Wait for another thread, for as long as only a failure takes."""
    waiting = threading.Event()
    for _ in range(60_000):
        if is_so():
            return
        waiting.wait(0.001)
    raise AssertionError("it never came to that")


@contextlib.contextmanager
def a_loop_that_ends_in_mid_operation(backend: SQLiteBackend, path: Path) -> Generator[None]:
    """Another event loop has an operation on its way in the block, and is closed before it is answered."""
    loop = asyncio.new_event_loop()
    loop.run_until_complete(backend.open())
    with plain(path) as database:
        database.execute("BEGIN IMMEDIATE")

        async def start() -> None:
            loop.create_task(insert(backend, token(1)))  # noqa: RUF006  # it is to be lost
            await asyncio.sleep(0)

        loop.run_until_complete(start())
        yield
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        database.execute("ROLLBACK")


def queued(backend: SQLiteBackend) -> int:
    return backend._opened()._write_thread._jobs.qsize()


def test_operations_of_another_loop_outlive_a_loop_that_was_closed(path: Path) -> None:
    backend = SQLiteBackend(path)

    async def other() -> list[object]:
        async with opened(backend), asyncio.timeout(60):
            results = [
                await insert(backend, token(2, "2")),
                await insert(backend, token(3, "3")),
            ]
        async with asyncio.timeout(60):
            return [*results, len(await backend.find(Match(), 9))]

    with ThreadPoolExecutor() as threads:
        with a_loop_that_ends_in_mid_operation(backend, path):
            answer = threads.submit(asyncio.run, other())
            eventually(lambda: queued(backend) == 1)
        *inserted, count = answer.result(60)
        assert inserted == [InsertResult.INSERTED, InsertResult.INSERTED]
        assert count in (2, 3)  # the one that was cancelled may have got the lock at the last moment
    asyncio.run(backend.close())


def test_a_close_in_another_loop_outlives_a_loop_that_was_closed(path: Path) -> None:
    backend = SQLiteBackend(path)

    async def close() -> None:
        async with asyncio.timeout(60):
            await backend.close()

    before = set(threading.enumerate())
    with ThreadPoolExecutor() as threads:
        with a_loop_that_ends_in_mid_operation(backend, path):
            closed = threads.submit(asyncio.run, close())
            eventually(lambda: backend._connections is None)
        closed.result(60)
    assert set(threading.enumerate()) == before


async def test_a_cancelled_wait_for_a_lock_ends_at_once_and_nothing_has_happened(path: Path) -> None:
    async with opened(SQLiteBackend(path, busy_timeout=600_000)) as backend:
        with plain(path) as database:
            database.execute("BEGIN IMMEDIATE")
            inserting = asyncio.ensure_future(insert(backend, token(1)))
            await asyncio.sleep(0)
            inserting.cancel()
            async with asyncio.timeout(60):
                with pytest.raises(asyncio.CancelledError):
                    await inserting
            database.execute("ROLLBACK")
        assert await backend.deactivate(Match(), NOW) == 0


BLOCKED = """
import asyncio, sys
sys.path[:0] = {path!r}
from vtoken_backends.sqlite import SQLiteBackend
from vtoken_backends.sqlite.batch import Batch
from tests.sqlite_tools import insert, token

async def main():
    loop, has_met_the_lock, wait = asyncio.get_running_loop(), asyncio.Event(), Batch._wait

    def tell_and_wait(*arguments):
        loop.call_soon_threadsafe(has_met_the_lock.set)
        wait(*arguments)

    Batch._wait = tell_and_wait
    backend = SQLiteBackend(sys.argv[1], busy_timeout=600_000)
    await backend.open()
    inserting = asyncio.ensure_future(insert(backend, token(1)))
    await has_met_the_lock.wait()
    Batch._wait = wait
    assert not inserting.done()
    print("end", flush=True)
    if sys.argv[2] == "exit":
        sys.exit()

asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["return", "exit"])
def test_a_process_ends_that_waits_for_a_lock(path: Path, how: str) -> None:
    asyncio.run(make_store(path))
    with plain(path) as database:
        database.execute("BEGIN IMMEDIATE")
        process = python(BLOCKED, path, how)
        output, errors = process.communicate(timeout=60)  # the lock is never given back
        assert (output, process.returncode) == ("end\n", 0)
        assert "was dropped without close()" in errors


async def test_a_manager_that_is_dropped_unclosed_warns(path: Path) -> None:
    manager = TokenManager(SQLiteBackend(path))
    await manager.open()
    del manager
    with pytest.warns(ResourceWarning, match="was dropped without close"):
        gc.collect()  # a manager and its parts know each other
