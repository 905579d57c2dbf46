"""The examples in the docstrings of what is public, run as they stand there."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import textwrap
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

import vtoken
from vtoken import ContentTypes, Limit, Settings, Subject, TokenManager, TokenPolicy

from . import postgresql_servers
from .core_tools import SECRET

WITHOUT: Final = {"open", "aclose"}
"""Methods whose use is shown by the class."""
WIDEST: Final = 84
"""Columns of code that a page of the documentation shows without a scroll bar."""
_EXAMPLE: Final = re.compile(r"^Example::\n\n((?: {4}.*\n|\n)+)", re.MULTILINE)


class Example(NamedTuple):
    """A piece of code in the docstring of something public."""

    of: str
    code: str


def documented() -> Iterator[tuple[str, object]]:
    """Everything public, and the public methods of classes."""
    for name in vtoken.__all__:
        thing = getattr(vtoken, name)
        yield name, thing
        if inspect.isclass(thing):
            for attribute, value in vars(thing).items():
                if not attribute.startswith("_"):
                    yield f"{name}.{attribute}", getattr(value, "__func__", value)


def examples() -> Iterator[Example]:
    for name, thing in documented():
        text = f"{inspect.getdoc(thing) or ''}\n"
        yield from (Example(name, textwrap.dedent(found[1])) for found in _EXAMPLE.finditer(text))


ALL: Final = list(examples())


class User:
    """A class of the application's."""

    def __init__(self, user_id: str) -> None:
        self.id = user_id
        self.password = ""


class Phone:
    number = "+15550100"
    id = "+15550100"


class Outbox:
    def __init__(self) -> None:
        self.messages: list[tuple[object, ...]] = []

    async def put(self, *message: object) -> None:
        self.messages.append(message)

    send = put


@asynccontextmanager
async def session_of(url: str) -> AsyncGenerator[AsyncSession]:
    """A session of SQLAlchemy's on the server of a store."""
    engine = create_async_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    try:
        async with AsyncSession(engine) as session:
            yield session
    finally:
        await engine.dispose()


async def namespace(manager: TokenManager) -> dict[str, Any]:
    """What the examples take for granted."""
    ada, phone = User("ada"), Phone()
    link = await manager.issue(ada, "password-reset")
    code = await manager.issue(phone, "sms-login")
    outbox = Outbox()

    def send_mail(*message: object) -> None:
        outbox.messages.append(message)

    async def nobody(_: str) -> None:
        return None

    async def nothing(*_: object) -> None:
        return None

    return {
        **{name: getattr(vtoken, name) for name in vtoken.__all__},
        "manager": manager,
        "User": User,
        "ada": ada,
        "user": ada,
        "phone": phone,
        "team": Subject("app.team", "core"),
        "addresses": [Subject("app.address", f"{n}@b.example") for n in range(3)],
        "address": "nobody@b.example",
        "key": link.key,
        "typed": code.key,
        "form_id": "3f0e",
        "new": "a new password",
        "new_password": "a new password",
        "job": SimpleNamespace(token_id=link.id, address="ada@b.example"),
        "outbox": outbox,
        "sms_provider": outbox,
        "send_mail": send_mail,
        "find_user": nobody,
        "set_password": nothing,
        "serve": nothing,
        "print": send_mail,
    }


def opened(url: str) -> TokenManager:
    types = ContentTypes()
    types.register(User, "auth.user", load=User)
    types.register(Phone, "auth.phone")
    policies = [
        TokenPolicy.link("password-reset", key_storage="derived"),
        TokenPolicy.code("sms-login", issue_limits=[Limit(20, "1d")]),
        TokenPolicy.link("invitation", key_storage="derived", max_uses=50),
    ]
    return TokenManager.from_url(
        url, settings=Settings(secret=SECRET), policies=policies, content_types=types
    )


@pytest.mark.parametrize("example", ALL, ids=[f"{n} {one.of}" for n, one in enumerate(ALL)])
async def test_an_example(example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = compile(example.code, example.of, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    async with AsyncExitStack() as stack:
        url, session = "memory://", None
        if "session" in code.co_names:  # a transaction of the application's own
            server = postgresql_servers.shared_url()
            url = stack.enter_context(postgresql_servers.fresh_store(server))
            session = await stack.enter_async_context(session_of(server))
        manager = await stack.enter_async_context(opened(url))
        names = {**await namespace(manager), "session": session}
        ran: Any = eval(code, names)  # noqa: S307  # our own docstrings
        if inspect.iscoroutine(ran):
            async with asyncio.timeout(60):
                await ran


def test_every_public_method_of_the_manager_has_one() -> None:
    shown = {one.of for one in ALL}
    methods: list[tuple[str, Callable[..., object]]] = inspect.getmembers(TokenManager, callable)
    wanted = {f"TokenManager.{name}" for name, _ in methods if name[0] != "_" and name not in WITHOUT}
    assert wanted - shown == set()
    assert {"TokenPolicy.link", "TokenPolicy.code", "TokenPolicy.pair", "Limit"} <= shown


@pytest.mark.parametrize("example", ALL, ids=[f"{n} {one.of}" for n, one in enumerate(ALL)])
def test_it_fits_on_a_page(example: Example) -> None:
    assert max(map(len, example.code.splitlines())) <= WIDEST
