"""A browser, a site on each store, and people with accounts."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from password_reset import passwords
from password_reset.accounts import Accounts
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


@pytest.fixture(scope="session")
def servers() -> ModuleType:
    """The module of vtoken's own tests that starts mongod; ``VTOKEN_SERVERS`` says where it is."""
    in_the_tree = Path(__file__).parents[4] / "tests" / "servers.py"
    file = os.environ.get("VTOKEN_SERVERS", in_the_tree)
    spec = importlib.util.spec_from_file_location("servers", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def mongodb(servers: ModuleType) -> Generator[str]:
    """The URL of a MongoDB server."""
    declared = servers.declared_url()
    started: AbstractContextManager[object] = nullcontext() if declared else servers.start_mongod("rs0")
    with started:
        yield declared or started.url  # type: ignore[attr-defined]  # of servers.Mongod


@pytest.fixture(params=["sqlite", "mongodb"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[Site]:
    """The application with ada's account, on each store."""
    if request.param == "sqlite":
        url: AbstractContextManager[str] = nullcontext(f"sqlite:///{tmp_path.as_posix()}/tokens.db")
    else:
        servers = request.getfixturevalue("servers")
        url = servers.fresh_database(request.getfixturevalue("mongodb"))
    in_a_thread(_add_account(tmp_path))
    with url as tokens_url, Site(tmp_path, tokens_url) as running:
        yield running


async def _add_account(data: Path) -> None:
    accounts = await Accounts.open(data / "accounts.db")
    try:
        await accounts.add(ADA, passwords.hashed(OLD))
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
