"""A leaked socket fails the test that runs when it is found; but for PyMongo's, which no later test finds.

PyMongo leaves a socket, or asyncio's transport around it, to the garbage collector where a connection is
cancelled while it is made. So the tests with "mongodb" in their names (``-k "not mongodb"`` goes by these
too) or in those of their fixtures may leak sockets, and after the last of them in a row the garbage is
collected.
"""

from __future__ import annotations

import gc

import pytest

MAY_LEAK = pytest.mark.filterwarnings("ignore:unclosed (<socket|transport):ResourceWarning")


def may_leak(item: pytest.Item | None) -> bool:
    """Whether a test names MongoDB, or has a fixture that does."""
    names = () if item is None else (item.nodeid, *getattr(item, "fixturenames", ()))
    return any("mongodb" in name.lower() for name in names)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if may_leak(item):
            item.add_marker(MAY_LEAK)


@pytest.hookimpl(trylast=True)  # when the fixtures are torn down, and what they held is garbage
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if may_leak(item) and not may_leak(nextitem):
        gc.collect()
