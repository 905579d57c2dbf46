"""Fixtures that several test modules share."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vtoken import create_backend

from . import loops, sockets
from .core_tools import World

if TYPE_CHECKING:
    from .cli_tools import Terminal


def pytest_configure(config: pytest.Config) -> None:
    for plugin in (loops, sockets):
        config.pluginmanager.register(plugin)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """A clock, a watched store in memory, and the managers on it."""
    made = World()
    yield made
    await made.aclose()


def _mongodb_server(replica_set: str) -> Iterator[str]:
    from . import servers  # here, so that a test of the core needs no driver

    declared = servers.declared_url()
    if declared is not None:
        with closing(servers.databases(declared)):
            yield declared
        return
    try:
        server = servers.start_mongod(replica_set)
    except FileNotFoundError as error:
        if servers.required():
            raise
        pytest.skip(str(error))
    with server, closing(servers.databases(server.url)):
        yield server.url


@pytest.fixture(scope="session")
def mongodb_standalone() -> Iterator[str]:
    """The URL of a standalone MongoDB server, started once per run."""
    yield from _mongodb_server("")


@pytest.fixture(scope="session")
def mongodb_replica_set() -> Iterator[str]:
    """The URL of a one-node MongoDB replica set, started once per run."""
    yield from _mongodb_server("vtoken")


@pytest.fixture(params=["standalone", "replica_set"])
def mongodb_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """A URL with an empty database of this test's own, on each kind of server."""
    from . import servers

    server_url: str = request.getfixturevalue(f"mongodb_{request.param}")
    with servers.databases(server_url).one() as url:
        yield url


@pytest.fixture(params=["standalone", "replica_set"])
def mongodb_new_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same, for a test that looks at what is made in the database."""
    from . import servers

    server_url: str = request.getfixturevalue(f"mongodb_{request.param}")
    with servers.fresh_database(server_url) as url:
        yield url


@pytest.fixture(params=["pymongo", "motor"])
def mongodb_driver(request: pytest.FixtureRequest) -> str:
    """Each MongoDB driver by name."""
    driver: str = request.param
    return driver


@contextmanager
def a_store(kind: str, request: pytest.FixtureRequest, directory: Path) -> Generator[str]:
    """The URL of an empty store of a kind, on the servers that this run shares."""
    if kind == "memory":
        yield "memory://"
    elif kind == "sqlite":
        yield f"sqlite:///{directory}/tokens.db?synchronous=normal"
    elif kind == "mongodb":
        server_url: str = request.getfixturevalue("mongodb_replica_set")
        from . import servers

        with servers.databases(server_url).one() as url:
            yield url
    else:
        from . import postgresql_servers

        with postgresql_servers.emptied_store(postgresql_servers.shared_url()) as url:
            yield url


BACKENDS = ("memory", "sqlite", "mongodb", "postgresql")


@pytest.fixture(params=BACKENDS)
async def any_world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    """The same as :func:`world`, on each backend in turn."""
    with a_store(request.param, request, tmp_path) as url:
        made = World(create_backend(url))
        yield made
        await made.aclose()


@pytest.fixture
def no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the outside, and a folder of this test's own for the default store."""
    for name in [name for name in os.environ if name.startswith("VTOKEN_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def vtoken(no_configuration: None, capsys: pytest.CaptureFixture[str]) -> Terminal:
    """The command line, on an SQLite file."""
    from .cli_tools import Terminal

    return Terminal(capsys)


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.BytesIO]:
    """Standard input; what is written to it is what the command reads."""
    content = io.BytesIO()
    with io.TextIOWrapper(content, encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        yield content
