"""On which event loop the tests run: ``VTOKEN_TEST_LOOP=eager`` or ``VTOKEN_TEST_LOOP=uvloop``.

``eager`` is the standard event loop with ``asyncio.eager_task_factory`` (Python 3.12 or later): a task runs
at once until it waits for the first time. The mode is in force in every process that imports the package
``tests``, and for every event loop that is made without a factory of its own: by pytest-asyncio,
``asyncio.run``, ``asyncio.new_event_loop`` and anyio's portals.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import pytest  # every program of the tests imports this module, and needs no pytest

VARIABLE: Final = "VTOKEN_TEST_LOOP"
MODE: Final = os.environ.get(VARIABLE, "")
"""``""`` is the standard event loop as it is."""


class _Policy(asyncio.DefaultEventLoopPolicy):
    """Makes the event loops that were asked for."""

    def __init__(self, new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
        super().__init__()
        self._new_loop = new_loop

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return self._new_loop()


def _new_eager_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.SelectorEventLoop()
    loop.set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009  # not before Python 3.12
    return loop


def install() -> None:
    """Have the event loops made that the environment asks for.

    Raises:
        RuntimeError: it asks for something that is not there.
    """
    if MODE == "":
        return
    if MODE == "uvloop":
        new_loop = import_module("uvloop").new_event_loop
    elif MODE == "eager" and sys.version_info >= (3, 12):
        new_loop = _new_eager_loop
    else:
        raise RuntimeError(f"{VARIABLE} is 'eager' (Python 3.12 or later) or 'uvloop', not {MODE!r}")
    asyncio.set_event_loop_policy(_Policy(new_loop))  # pyright: ignore[reportDeprecated]  # from Python 3.14 on


def pytest_report_header() -> str:
    return f"event loops: {MODE or 'standard'}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out, as deselected, the tests that are marked with ``loops`` but not with this run's mode."""
    marks = {item: item.get_closest_marker("loops") for item in items}
    left_out = [item for item, mark in marks.items() if mark is not None and MODE not in mark.args]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
