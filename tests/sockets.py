"""A test that leaves a connection open fails itself, and no later test.

Every transport and stream of asyncio is remembered while it is open. What a test has left open at its end is
closed here, so that the garbage collector never finds it in another test, and the test fails. Of uvloop only
the streams are: its transports are its own.

PyMongo leaves a socket, or asyncio's transport around it, to the garbage collector where a connection is
cancelled while it is made. So the tests with "mongodb" in their names (``-k "not mongodb"`` goes by these
too) or in those of their fixtures may leave such behind, though no stream: PyMongo has none. After the last
of them in a row the garbage is collected.
"""

from __future__ import annotations

import asyncio
import gc
from asyncio import selector_events
from collections.abc import Callable
from functools import wraps
from typing import Any, Final
from weakref import WeakSet

import pytest

MAY_LEAK = pytest.mark.filterwarnings("ignore:unclosed (<socket|transport):ResourceWarning")

_transports: Final[WeakSet[Any]] = WeakSet()
_writers: Final[WeakSet[asyncio.StreamWriter]] = WeakSet()


def _remember(cls: Any, made: WeakSet[Any]) -> None:
    """Have every new object of a class remembered."""
    init: Callable[..., None] = cls.__init__

    @wraps(init)
    def remembering(self: Any, *args: Any, **kwargs: Any) -> None:
        made.add(self)
        init(self, *args, **kwargs)

    cls.__init__ = remembering


# A private class of asyncio: every transport of a selector event loop is one, and nothing public tells of
# them.
_remember(selector_events._SelectorTransport, _transports)  # type: ignore[attr-defined]  # pyright: ignore  # private
_remember(asyncio.StreamWriter, _writers)


def close_what_is_open() -> tuple[int, int]:
    """Close what was left open, and say how many transports and streams there were of it."""
    transports = [one for one in _transports if getattr(one, "_sock", None) is not None]
    writers = [one for one in _writers if not one.transport.is_closing()]
    for transport in transports:
        # By its socket: the event loop of the transport is closed by now.
        sock, transport._sock = transport._sock, None
        sock.close()
        transport._closing = True
    _transports.clear()
    _writers.clear()
    return len(transports), len(writers)


def may_leak(item: pytest.Item | None) -> bool:
    """Whether a test names MongoDB, or has a fixture that does."""
    names = () if item is None else (item.nodeid, *getattr(item, "fixturenames", ()))
    return any("mongodb" in name.lower() for name in names)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if may_leak(item):
            item.add_marker(MAY_LEAK)


def pytest_collection_finish() -> None:
    """What was there before the first test is nobody's leak. Looking through it takes a fifth of a second
    each time that the garbage is collected."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)  # when the fixtures are torn down, and what they held is garbage
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    transports, writers = close_what_is_open()
    if may_leak(item) and not may_leak(nextitem):
        gc.collect()
    if writers or (transports and not may_leak(item)):
        pytest.fail(f"the test has left {transports} transports and {writers} streams of asyncio open")
