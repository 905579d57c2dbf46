"""A server for the whole run."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

from servers import DECLARED_URL, Server


@pytest.fixture(scope="session")
def server_url() -> Generator[str]:
    """The URL of a server."""
    declared = os.environ.get(DECLARED_URL)
    if declared:
        yield declared
        return
    with Server() as server:
        yield server.url
