"""The event loops of this run are those that it asked for, whoever makes them (:mod:`tests.loops`)."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import anyio.from_thread
import pytest

from . import loops
from .loops import MODE

MODULES = {"": "asyncio", "eager": "asyncio", "uvloop": "uvloop"}


async def mode() -> str:
    """What the running event loop is, by its class and by whether a task has run when it is made."""
    ran: list[str] = []

    async def note() -> None:
        ran.append("at once")

    task = asyncio.create_task(note())
    is_eager = bool(ran)
    await task
    assert ran == ["at once"]
    module: str = type(asyncio.get_running_loop()).__module__.partition(".")[0]
    assert module == MODULES[MODE]
    return module if module == "uvloop" else "eager" if is_eager else ""


def by_asyncio(main: Callable[[], Coroutine[Any, Any, str]]) -> str:
    return asyncio.run(main())


def by_a_runner(main: Callable[[], Coroutine[Any, Any, str]]) -> str:
    with asyncio.Runner() as runner:
        return runner.run(main())


def by_hand(main: Callable[[], Coroutine[Any, Any, str]]) -> str:
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(main())
    finally:
        loop.close()


def by_a_portal(main: Callable[[], Coroutine[Any, Any, str]]) -> str:
    with anyio.from_thread.start_blocking_portal() as portal:
        answer: str = portal.call(main)
        return answer


async def test_tests_run_on_the_event_loop_that_was_asked_for() -> None:
    assert await mode() == MODE


@pytest.mark.parametrize("run", [by_asyncio, by_a_runner, by_hand, by_a_portal, anyio.run])
def test_so_does_what_a_test_runs_itself(
    run: Callable[[Callable[[], Coroutine[Any, Any, str]]], str],
) -> None:
    assert run(mode) == MODE


def test_so_do_the_programs_of_the_tests() -> None:
    program = "import asyncio; from tests import test_loops as t; print(asyncio.run(t.mode()) == t.MODE)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_a_mode_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "MODE", "another")
    with pytest.raises(RuntimeError, match="not 'another'"):
        loops.install()


@pytest.mark.loops("")
def test_marked_for_the_standard_event_loop() -> None:
    assert MODE == ""


@pytest.mark.loops("eager", "uvloop")
def test_marked_for_the_others() -> None:
    assert MODE
