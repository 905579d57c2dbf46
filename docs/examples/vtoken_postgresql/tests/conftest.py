from __future__ import annotations

from collections.abc import Iterator

import pytest

import servers


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """A server for all tests that don't harm it."""
    with servers.any_server() as url:
        yield url


@pytest.fixture
def url(server_url: str) -> str:
    """An empty store."""
    return servers.fresh_store(server_url)
