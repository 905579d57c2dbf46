"""A browser, a site on each store, and people with accounts."""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from psycopg.sql import SQL, Identifier

from password_reset import passwords
from password_reset.accounts import Change, open_accounts
from tests.site import SECONDS, Site, in_a_thread

ADA, OLD = "ada@example.org", "the old long password"

_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

NewPage = Callable[[], Page]
Databases = Callable[[], AbstractContextManager[str]]


@pytest.fixture(scope="session")
def browser() -> Generator[Browser]:
    """Chromium; ``CHROMIUM`` says where it is, if it is not Debian's."""
    expect.set_options(timeout=SECONDS * 1000)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=list(_ARGUMENTS)
        )
        with started:
            yield started


@pytest.fixture
def new_page(browser: Browser) -> Generator[NewPage]:
    """Makes pages, each in a browser profile of its own: another person, or another device."""
    contexts: list[BrowserContext] = []

    def make() -> Page:
        context = browser.new_context(viewport={"width": 640, "height": 560})
        context.set_default_timeout(SECONDS * 1000)
        contexts.append(context)
        return context.new_page()

    yield make
    for context in contexts:
        context.close()


@pytest.fixture
def page(new_page: NewPage) -> Page:
    return new_page()


def _servers(name: str) -> ModuleType:
    """A module of vtoken's own tests that starts servers; ``VTOKEN_TESTS`` says where they are."""
    folder = os.environ.get("VTOKEN_TESTS", Path(__file__).parents[4] / "tests")
    spec = importlib.util.spec_from_file_location(name, Path(folder, f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def mongodb() -> Generator[Databases]:
    """Makes databases on a MongoDB server."""
    servers = _servers("servers")
    declared = servers.declared_url()
    started: AbstractContextManager[Any] = nullcontext() if declared else servers.start_mongod("rs0")
    with started as server:
        yield partial(servers.fresh_database, declared or server.url)


@pytest.fixture(scope="session")
def postgresql() -> Generator[Databases]:
    """Makes databases on a PostgreSQL server."""
    servers = _servers("postgresql_servers")
    declared = servers.declared_url()
    started: AbstractContextManager[Any] = nullcontext() if declared else servers.PostgreSQL()
    with started as server:
        yield partial(_postgresql_database, declared or server.url)


@contextmanager
def _postgresql_database(server_url: str) -> Generator[str]:
    name = f"example_{secrets.token_hex(8)}"
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(SQL("CREATE DATABASE {}").format(Identifier(name)))
        try:
            yield urlunsplit(urlsplit(server_url)._replace(path=f"/{name}"))
        finally:
            connection.execute(SQL("DROP DATABASE {} WITH (FORCE)").format(Identifier(name)))


@pytest.fixture(params=["sqlite", "postgresql", "mongodb"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[Site]:
    """The application with ada's account, on each store."""
    url: AbstractContextManager[str] = nullcontext(f"sqlite:///{tmp_path.as_posix()}/app.db?shared=true")
    if request.param != "sqlite":
        url = request.getfixturevalue(request.param)()
    with url as tokens_url, Site(tmp_path, tokens_url) as running:
        in_a_thread(_add_account(tokens_url))
        yield running


async def _add_account(tokens_url: str) -> None:
    async def add(accounts: Change) -> None:
        await accounts.add(ADA, passwords.hashed(OLD))

    accounts = await open_accounts(tokens_url)
    try:
        await accounts.in_transaction(add)
    finally:
        await accounts.close()


@pytest.fixture(scope="session")
def take_picture() -> Callable[[Page, str], None]:
    """Keeps pictures of pages where ``SCREENSHOTS`` names a directory."""
    folder = os.environ.get("SCREENSHOTS")

    def take(page: Page, name: str) -> None:
        if folder:
            page.screenshot(path=Path(folder, f"password-reset-{name}.png"))

    return take
