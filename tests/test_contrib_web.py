"""The web frameworks: the manager opens with the application, is found, and its refusals are answered."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import anyio
import httpx
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from fastapi import FastAPI, WebSocket
from litestar import Litestar, Request, Response
from starlette.applications import Starlette
from starlette.requests import HTTPConnection
from starlette.responses import Response as StarletteResponse
from starlette.routing import Mount, Route

from vtoken import (
    AlreadyUsed,
    BackendClosed,
    BackendUnavailable,
    ConfigurationError,
    CorruptStore,
    InvalidInput,
    InvalidToken,
    LeaseLost,
    OutcomeUnknown,
    TokenManager,
    TokenPolicy,
    VTokenError,
)
from vtoken.contrib import aiohttp as for_aiohttp
from vtoken.contrib import fastapi as for_fastapi
from vtoken.contrib import litestar as for_litestar
from vtoken.contrib import starlette as for_starlette
from vtoken.testing import Clock

from .core_tools import CODE, SECRETS, USER, WRONG, Watched, refused, wrong_codes
from .web_apps import APPS, Served, aiohttp_issue, litestar_consume, starlette_issue
from .web_tools import Message, serving

REFUSED = {"code": "invalid_token", "detail": "The token is not valid."}
TOO_MANY = {"code": "too_many_attempts", "detail": "Too many attempts. Try again later."}
COOLDOWN = {"code": "cooldown_active", "detail": "Too many requests. Try again later."}

apps = pytest.mark.parametrize("app", APPS.values(), ids=APPS)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def backend() -> Watched:
    return Watched()


@pytest.fixture
def manager(backend: Watched, clock: Clock) -> TokenManager:
    policies = [CODE, TokenPolicy("slow", cooldown="90s")]
    return TokenManager(backend, settings=SECRETS, policies=policies, clock=clock)


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What vtoken logs, also where a framework gives the root logger other handlers."""
    logger = logging.getLogger("vtoken")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@apps
async def test_the_manager_is_open_while_the_application_runs(
    app: Callable[..., Served], manager: TokenManager, backend: Watched
) -> None:
    for turn in (1, 2):  # an application may be started again
        async with app(manager) as client:
            issued = (await client.get("/issue", params={"slug": "reset"})).json()
            answer = await client.get("/consume", params={"slug": "reset", **issued})
            assert answer.status_code == 200
            assert answer.json()["id"]
        assert backend.calls.count("open") == backend.calls.count("close") == turn
        await refused(BackendClosed, manager.stats())


@apps
@pytest.mark.parametrize("status", [400, 410])
async def test_a_refusal_is_the_same_whatever_its_reason(
    app: Callable[..., Served], manager: TokenManager, clock: Clock, status: int
) -> None:
    async with app(manager, invalid_status=status) as client:
        used, expired, inactive = [(await manager.issue(USER, slug)).key for slug in "abc"]
        await manager.consume(USER, "a", used)
        await manager.deactivate(USER, "c")
        clock.advance(timedelta(days=2))
        tries = {"a": used, "b": expired, "c": inactive, "e": WRONG, "f": "", "g": "\0", "h": "x" * 513}
        answers = [await client.get("/consume", params={"slug": s, "key": k}) for s, k in tries.items()]
    assert len(answers) == 7
    for answer in answers:
        assert answer.status_code == status
        assert answer.json() == REFUSED
        assert answer.headers["cache-control"] == "no-store"
        assert "retry-after" not in answer.headers
    without_date = [{k: v for k, v in a.headers.items() if k != "date"} for a in answers]
    assert all(headers == without_date[0] for headers in without_date)


@apps
async def test_a_spent_budget_tells_when_to_come_back(
    app: Callable[..., Served], manager: TokenManager, clock: Clock
) -> None:
    async with app(manager) as client:
        code = (await client.get("/issue", params={"slug": "login"})).json()["key"]
        left: list[int] = []
        for wrong in wrong_codes(code, 5):
            answer = await client.get("/consume", params={"slug": "login", "key": wrong})
            left.append(answer.json()["attempts_left"])
            assert (answer.status_code, answer.json()) == (400, {**REFUSED, "attempts_left": left[-1]})
        assert left == [4, 3, 2, 1, 0]
        clock.advance(timedelta(seconds=100, milliseconds=1))
        answer = await client.get("/consume", params={"slug": "login", "key": code})
    assert (answer.status_code, answer.json()) == (429, {**TOO_MANY, "retry_after": 800})
    assert answer.headers["retry-after"] == "800"  # 799.999 s: never told too early
    assert answer.headers["cache-control"] == "no-store"


@apps
async def test_a_cooldown_tells_when_to_come_back(app: Callable[..., Served], manager: TokenManager) -> None:
    async with app(manager) as client:
        assert (await client.get("/issue", params={"slug": "slow"})).status_code == 200
        answer = await client.get("/issue", params={"slug": "slow"})
    assert (answer.status_code, answer.json()) == (429, {**COOLDOWN, "retry_after": 90})
    assert answer.headers["retry-after"] == "90"


@apps
async def test_a_token_that_is_held_is_a_conflict(app: Callable[..., Served], manager: TokenManager) -> None:
    async with app(manager) as client:
        key = (await manager.issue(USER, "a")).key
        for lease, retry_after in (("30s", 2), ("1s", 1)):  # mostly it is done long before the lease ends
            async with manager.redeem(USER, "a", key, lease=lease):
                answer = await client.get("/consume", params={"slug": "a", "key": key})
                assert answer.status_code == 409
                assert answer.headers["retry-after"] == str(retry_after)
                assert (answer.json()["code"], answer.json()["retry_after"]) == ("token_busy", retry_after)
            key = (await manager.issue(USER, "a")).key


@apps
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (LeaseLost("too late"), 409, "lease_lost"),
        (AlreadyUsed(), 400, "already_used"),
        (BackendUnavailable("no server at db.internal:5432"), 503, "unavailable"),
    ],
    ids=["lease lost", "already used", "unavailable"],
)
async def test_what_else_is_an_answer(
    app: Callable[..., Served],
    manager: TokenManager,
    backend: Watched,
    told: pytest.LogCaptureFixture,
    error: VTokenError,
    status: int,
    code: str,
) -> None:
    async with app(manager) as client:
        backend.failing["present"] = error
        answer = await client.get("/consume", params={"slug": "a", "key": WRONG})
        backend.failing.clear()
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert "db.internal" not in answer.text
    assert ("db.internal" in told.text) is (status == 503), "the operator is told"
    assert ("retry-after" in answer.headers) is (status == 503)


@apps
@pytest.mark.parametrize(
    "error", [InvalidInput("our mistake"), OutcomeUnknown("who knows"), CorruptStore("damaged")]
)
async def test_what_no_visitor_has_caused_is_logged_and_raised(
    app: Callable[..., Served],
    manager: TokenManager,
    backend: Watched,
    told: pytest.LogCaptureFixture,
    error: VTokenError,
) -> None:
    status = 0
    async with app(manager) as client:
        backend.failing["present"] = error
        try:
            status = (await client.get("/consume", params={"slug": "a", "key": WRONG})).status_code
        except type(error):  # a client without a server between gets the error itself
            status = 500
        backend.failing.clear()
    assert status == 500
    assert f"{type(error).__name__}, which is no fault of the visitor's" in told.text


@apps
async def test_a_page_of_the_applications_own(app: Callable[..., Served], manager: TokenManager) -> None:
    async with app(manager, html=True) as client:
        answer = await client.get("/consume", params={"slug": "a", "key": WRONG})
    assert (answer.status_code, answer.text) == (400, "<p>The token is not valid.</p>")
    assert answer.headers["content-type"].startswith("text/html")


@apps
async def test_pages_with_keys_in_their_addresses_are_private(
    app: Callable[..., Served], manager: TokenManager
) -> None:
    async with app(manager) as client:
        answer = await client.get("/issue", params={"slug": "a"})
        missing = await client.get("/no-such-page")
    for one in (answer, missing):
        assert one.headers["referrer-policy"] == "no-referrer"
        assert one.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("kind", [Starlette, FastAPI])
async def test_an_error_that_nobody_handles_is_private_too(kind: type[Starlette]) -> None:
    app = kind()

    async def failing(request: HTTPConnection) -> StarletteResponse:
        raise ZeroDivisionError(request.url.path)

    app.add_route("/reset", failing)
    transport = httpx.ASGITransport(for_starlette.PrivatePages(app), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.get("/reset", params={"key": WRONG})
    assert answer.status_code == 500
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-store"


def test_fastapi_documents_the_responses(manager: TokenManager) -> None:
    app = FastAPI(lifespan=for_fastapi.lifespan(manager))

    async def reset() -> None: ...

    app.post("/reset", responses=for_fastapi.responses(410))(reset)
    responses = app.openapi()["paths"]["/reset"]["post"]["responses"]
    assert {"409", "410", "429", "503"} <= responses.keys()
    schema = responses["429"]["content"]["application/json"]["schema"]
    assert schema["properties"]["code"]["enum"] == ["too_many_attempts", "cooldown_active"]


@apps
async def test_it_sweeps_where_that_is_asked(
    app: Callable[..., Served], manager: TokenManager, backend: Watched
) -> None:
    purged = anyio.Event()

    async def note() -> None:
        purged.set()

    backend.after["purge"] = note
    async with app(manager, timedelta(milliseconds=1)):
        with anyio.fail_after(30):
            await purged.wait()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@apps
async def test_it_does_not_sweep_unless_that_is_asked(
    app: Callable[..., Served], manager: TokenManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(TokenManager, "sweeper")
    async with app(manager) as client:
        assert (await client.get("/issue", params={"slug": "reset"})).status_code == 200


@apps
async def test_a_store_in_trouble_stops_the_start(
    app: Callable[..., Served], manager: TokenManager, backend: Watched
) -> None:
    backend.failing["open"] = BackendUnavailable("no server")
    with pytest.raises((AssertionError, BackendUnavailable), match="no server"):
        await app(manager).__aenter__()


async def test_starlette_without_the_lifespan_says_so() -> None:
    async def find(connection: HTTPConnection) -> None:
        for_starlette.get_manager(connection)

    error = await refused(ConfigurationError, find(HTTPConnection({"type": "http"})))
    assert "lifespan has not run" in str(error)
    assert "with TestClient(app)" in str(error)
    error = await refused(ConfigurationError, find(HTTPConnection({"type": "http", "state": {}})))
    assert "lifespan=lifespan(manager)" in str(error)
    assert "mounted" in str(error)


async def test_starlette_finds_the_manager_in_a_mounted_application(manager: TokenManager) -> None:
    inner = Starlette(routes=[Route("/issue", starlette_issue)])
    outer = Starlette(routes=[Mount("/inner", inner)], lifespan=for_starlette.lifespan(manager))
    async with serving(outer) as client:
        assert (await client.get("/inner/issue", params={"slug": "a"})).json()["key"]


async def test_fastapi_hands_the_manager_to_a_websocket_too(manager: TokenManager) -> None:
    async def endpoint(websocket: WebSocket) -> None:
        assert for_fastapi.get_manager(websocket) is manager
        await websocket.accept()

    app = FastAPI(lifespan=for_fastapi.lifespan(manager))
    app.websocket("/ws")(endpoint)
    sent: list[str] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message["type"])

    scope = {
        "type": "websocket",
        "path": "/ws",
        "headers": [],
        "query_string": b"",
        "state": {"vtoken": manager},
    }
    await app(scope, receive, send)
    assert sent == ["websocket.accept"]


async def test_litestars_own_handlers_go_first(manager: TokenManager) -> None:
    def teapot(_: Request[Any, Any, Any], __: Exception) -> Response[str]:
        return Response("short and stout", status_code=418)

    app = Litestar(
        [litestar_consume],
        plugins=[for_litestar.plugin(manager)],
        exception_handlers={InvalidToken: teapot},
        openapi_config=None,
    )
    async with serving(app) as client:
        assert (await client.get("/consume", params={"slug": "a", "key": WRONG})).status_code == 418


async def test_aiohttp_finds_the_manager_in_a_subapplication(manager: TokenManager) -> None:
    outer, inner = web.Application(), web.Application()
    outer.cleanup_ctx.append(for_aiohttp.cleanup_ctx(manager))
    inner.router.add_get("/issue", aiohttp_issue)
    outer.add_subapp("/inner", inner)
    async with TestServer(outer) as server, httpx.AsyncClient() as client:
        url = str(server.make_url("/inner/issue"))
        assert (await client.get(url, params={"slug": "a"})).json()["key"]


async def test_aiohttp_without_the_cleanup_context_says_so() -> None:
    errors: list[BaseException] = []

    async def handler(request: web.Request) -> web.Response:
        try:
            for_aiohttp.get_manager(request)
        except ConfigurationError as error:
            errors.append(error)
        return web.Response()

    app = web.Application()
    app.router.add_get("/", handler)
    async with TestServer(app) as server, httpx.AsyncClient() as client:
        await client.get(str(server.make_url("/")))
    assert "cleanup_ctx" in str(errors[0])


async def test_aiohttp_may_start_and_clean_up_in_different_tasks(
    manager: TokenManager, backend: Watched
) -> None:
    app = web.Application()
    app.cleanup_ctx.append(for_aiohttp.cleanup_ctx(manager, timedelta(hours=1)))
    runner = web.AppRunner(app)
    await asyncio.create_task(runner.setup())
    await asyncio.create_task(runner.cleanup())
    assert [call for call in backend.calls if call != "note"] == ["open", "close"]
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_wrong_period_stops_the_start_of_aiohttp(manager: TokenManager) -> None:
    app = web.Application()
    app.cleanup_ctx.append(for_aiohttp.cleanup_ctx(manager, timedelta(0)))
    runner = web.AppRunner(app)
    await refused(InvalidInput, runner.setup())
    await runner.cleanup()
