"""SQLite beside other writers, under cancellation, in forks and in loops that end early."""

# ruff: noqa: ASYNC240  # looking at a small file is no wait to speak of

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import threading
import warnings
from pathlib import Path

import pytest
import trio

from vtoken.backend import (
    Budget,
    InsertMode,
    InsertResult,
    Match,
    Spend,
)
from vtoken.errors import (
    BackendClosed,
    BackendUnavailable,
    ConfigurationError,
)
from vtoken_backends.sqlite import SQLiteBackend

from .sqlite_tools import (
    NOW,
    beside,
    insert,
    make_store,
    no_more_than,
    opened,
    plain,
    present,
    python,
    subject,
    token,
    use,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a test has its store."""
    return tmp_path / "tokens.db"


SPEND = Spend(budget=Budget(object=b"o" * 16, name=b"n" * 16), limit=9, window=9, max_window=9)

# Several at once


OPENER = """
import asyncio, sys
sys.path[:0] = {path!r}
from vtoken.backend import InsertMode
from vtoken_backends.sqlite import SQLiteBackend
from tests.sqlite_tools import insert, token

async def main(file, number):
    backend = SQLiteBackend(file)
    await backend.open()
    sys.stdin.read(1)
    await insert(backend, token(int(number)), InsertMode.REPLACE)
    await backend.close()

asyncio.run(main(*sys.argv[1:]))
"""


async def test_processes_that_make_the_store_at_once_make_one(path: Path) -> None:
    processes = [python(OPENER, path, number) for number in range(4)]
    for process in processes:
        assert process.communicate("x", timeout=60) == ("", "")
        assert process.returncode == 0
    async with opened(SQLiteBackend(path)) as backend:
        assert len(await backend.find(Match(), 10)) == 4
        assert len(await backend.find(subject(), 10)) == 1


async def test_two_backends_on_one_file_see_each_others_writes(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as one, opened(SQLiteBackend(path)) as other:
        await insert(one, token(1))
        assert await other.find(subject(), 9) == [token(1)]
        assert await use(other, present(1)) is not None
        assert await use(one, present(1)) is None


async def test_another_writer_is_waited_for(path: Path) -> None:
    async with opened(SQLiteBackend(path)) as backend:
        with plain(path) as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("UPDATE vtoken_tokens SET slug = slug")
            inserting = asyncio.ensure_future(insert(backend, token(1)))
            other = SQLiteBackend(path)
            await other.open()  # opening an existing store needs no lock
            assert await other.find(Match(), 1) == []  # nor does reading
            await other.close()
            assert not inserting.done()
            database.execute("COMMIT")
        assert await inserting is InsertResult.INSERTED


async def test_a_writer_that_holds_on_makes_the_store_unavailable(path: Path) -> None:
    async with opened(SQLiteBackend(path, busy_timeout=1)) as backend:
        with plain(path) as database:
            database.execute("BEGIN IMMEDIATE")
            with pytest.raises(BackendUnavailable, match="locked") as caught:
                await insert(backend, token(1))
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None
        assert await insert(backend, token(1)) is InsertResult.INSERTED


async def test_making_a_store_beside_a_writer_waits_or_gives_up_whole(path: Path) -> None:
    path.touch()
    with plain(path) as database:
        database.execute("BEGIN IMMEDIATE")
        with pytest.raises(BackendUnavailable):
            await SQLiteBackend(path, busy_timeout=1).open()
        waiting = SQLiteBackend(path)
        opening = asyncio.ensure_future(waiting.open())
        database.execute("ROLLBACK")
    await opening
    await waiting.close()


@pytest.mark.parametrize("seed", range(4))
async def test_cancelled_at_any_moment_a_write_happened_wholly_or_not_at_all(path: Path, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311  # moments, no secrets
    async with opened(SQLiteBackend(path, synchronous="normal")) as backend:
        await insert(backend, token(0, "use", NOW))
        for number in range(1, 151):
            tasks: list[asyncio.Task[object]] = [
                asyncio.ensure_future(
                    insert(backend, token(number, created_at=NOW + number), InsertMode.REPLACE)
                ),
                asyncio.ensure_future(use(backend, present(number - 1, None))),
                asyncio.ensure_future(backend.deactivate(subject(), NOW)),
                asyncio.ensure_future(backend.spend((SPEND,), NOW)),
            ]
            for _ in range(chance.randrange(30)):
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        with plain(path) as database:
            # Behind the last statement in the worker's queue nobody holds a lock.
            assert len(await backend.find(subject(), 10)) <= 1
            database.execute("BEGIN IMMEDIATE")
            database.execute("ROLLBACK")
        assert (
            await insert(backend, token(999, created_at=NOW + 999), InsertMode.REPLACE)
            is InsertResult.INSERTED
        )
        assert [found.id for found in await backend.find(subject(), 10)] == [token(999).id]


async def test_an_open_cancelled_in_waiting_leaves_nothing_behind(path: Path) -> None:
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    backend = SQLiteBackend(path)
    path.touch()
    with plain(path) as database:
        database.execute("BEGIN EXCLUSIVE")
        for _ in range(20):
            opening = asyncio.ensure_future(backend.open())
            await asyncio.sleep(0)
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
        with pytest.raises(BackendClosed):
            await backend.find(Match(), 1)
        database.execute("ROLLBACK")
    async with opened(backend):
        assert await backend.find(Match(), 1) == []
    await no_more_than(threads, threading.active_count)
    await no_more_than(files, lambda: len(os.listdir("/proc/self/fd")))


async def test_many_opens_and_closes_leave_no_thread_and_no_file(path: Path) -> None:
    backend = SQLiteBackend(path)
    await make_store(path)
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(200):
        async with opened(backend), opened(backend):
            await backend.reset(SPEND.budget.object, None)
    assert threading.active_count() <= threads
    assert len(os.listdir("/proc/self/fd")) <= files


async def test_a_close_cancelled_at_any_moment_closes(path: Path) -> None:
    threads = threading.active_count()
    for pause in range(12):
        backend = SQLiteBackend(path)
        await backend.open()
        inserting = asyncio.ensure_future(insert(backend, token(pause)))
        await asyncio.sleep(0)
        closing = asyncio.ensure_future(backend.close())
        for _ in range(pause):
            await asyncio.sleep(0)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
        assert await inserting is InsertResult.INSERTED
        if not closing.cancelled() or pause > 0:
            with pytest.raises(BackendClosed):
                await backend.find(Match(), 1)
        await backend.close()
    await no_more_than(threads, threading.active_count)


# The life of the process


DROPPED = """
import asyncio, sys
sys.path[:0] = {path!r}
from vtoken.backend import InsertMode
from vtoken_backends.sqlite import SQLiteBackend
from tests.sqlite_tools import insert, token

async def main():
    backend = SQLiteBackend(sys.argv[1])
    await backend.open()
    await insert(backend, token(1))
    if sys.argv[2] == "global":
        globals()["backend"] = backend

asyncio.run(main())
print("end")
"""


@pytest.mark.parametrize("kept", ["local", "global"])
async def test_an_unclosed_backend_warns_and_does_not_keep_the_process(path: Path, kept: str) -> None:
    output, errors = python(DROPPED, path, kept).communicate(timeout=60)
    assert output == "end\n"
    assert f"ResourceWarning: <SQLiteBackend {path}> was dropped without close()" in errors
    assert "Traceback" not in errors
    async with opened(SQLiteBackend(path)) as backend:
        assert await backend.find(subject(), 9) == [token(1)]


async def test_a_dropped_backend_gives_back_its_thread_and_file(path: Path) -> None:
    threads = threading.active_count()
    backend = SQLiteBackend(path)
    await backend.open()
    await insert(backend, token(1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del backend
        gc.collect()
    assert [str(warning.message) for warning in caught] == [
        f"<SQLiteBackend {path}> was dropped without close()"
    ]
    await no_more_than(threads, threading.active_count)
    assert list(beside(path)) == ["tokens.db"]


def test_a_forked_child_is_told_and_can_open_for_itself(path: Path) -> None:
    backend = SQLiteBackend(path)

    async def in_child() -> None:
        with pytest.raises(BackendClosed, match="another process"):
            await backend.find(Match(), 1)
        await backend.close()  # not its own: nothing happens
        async with opened(backend):
            await insert(backend, token(2))
        with pytest.raises(BackendClosed):
            await backend.find(Match(), 1)

    with asyncio.Runner() as runner:
        runner.run(backend.open())
        runner.run(insert(backend, token(1)))
        with warnings.catch_warnings():
            # Forking beside a thread is what this is about; Python 3.12 warns of it.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            status = 1
            with contextlib.suppress(BaseException):
                asyncio.run(in_child())
                status = 0
            os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert len(runner.run(backend.find(Match(), 9))) == 2
        runner.run(backend.close())


def test_a_loop_closed_in_mid_operation_does_not_stop_the_backend(path: Path) -> None:
    backend = SQLiteBackend(path)
    before = set(threading.enumerate())
    loop = asyncio.new_event_loop()
    loop.run_until_complete(backend.open())

    async def start() -> None:
        loop.create_task(insert(backend, token(1)))  # noqa: RUF006  # it is to be lost
        await asyncio.sleep(0)

    with plain(path) as database:
        database.execute("BEGIN IMMEDIATE")
        loop.run_until_complete(start())
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        database.execute("ROLLBACK")

    async def afterwards() -> None:
        async with asyncio.timeout(60):
            assert await insert(backend, token(2), InsertMode.REPLACE) is InsertResult.INSERTED
            assert await backend.find(subject(), 9) == [token(2)]
            await backend.close()

    asyncio.run(afterwards())
    assert set(threading.enumerate()) <= before


async def test_an_operation_in_several_event_loops(path: Path) -> None:
    async with opened(SQLiteBackend(path, synchronous="normal")) as backend:

        async def some(first: int) -> None:
            async with opened(backend):
                await asyncio.gather(
                    *(insert(backend, token(first + n), InsertMode.REPLACE) for n in range(10))
                )

        await asyncio.gather(*(asyncio.to_thread(asyncio.run, some(100 * n)) for n in range(4)))
        assert len(await backend.find(Match(), 99)) == 40
        assert len(await backend.find(subject(), 99)) == 1


def test_under_trio_it_says_that_it_needs_asyncio(path: Path) -> None:
    with pytest.raises(ConfigurationError, match="asyncio"):
        trio.run(SQLiteBackend(path).open)
