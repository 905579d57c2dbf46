"""One application in four frameworks: it issues tokens at ``/issue`` and uses them at ``/consume``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from typing import Annotated, Final

import httpx
from aiohttp import web
from aiohttp.test_utils import TestServer
from fastapi import Depends, FastAPI
from litestar import Litestar, MediaType, Response, get
from litestar.di import NamedDependency
from litestar.params import FromQuery
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Route

from vtoken import TokenManager
from vtoken.contrib import aiohttp as for_aiohttp
from vtoken.contrib import fastapi as for_fastapi
from vtoken.contrib import litestar as for_litestar
from vtoken.contrib import starlette as for_starlette
from vtoken.contrib._http import InvalidStatus

from .core_tools import USER
from .web_tools import serving

Answer = dict[str, str]
Served = AbstractAsyncContextManager[httpx.AsyncClient]
Manager = Annotated[TokenManager, Depends(for_fastapi.get_manager)]


async def issue(manager: TokenManager, slug: str) -> Answer:
    return {"key": (await manager.issue(USER, slug)).key}


async def consume(manager: TokenManager, slug: str, key: str) -> Answer:
    return {"id": (await manager.consume(USER, slug, key)).id}


async def starlette_issue(request: Request) -> JSONResponse:
    return JSONResponse(await issue(for_starlette.get_manager(request), **request.query_params))


async def starlette_consume(request: Request) -> JSONResponse:
    return JSONResponse(await consume(for_starlette.get_manager(request), **request.query_params))


def starlette_page(_: Request, refusal: for_starlette.Refusal) -> HTMLResponse:
    return HTMLResponse(f"<p>{refusal.body['detail']}</p>", refusal.status, refusal.headers)


def starlette_app(
    manager: TokenManager,
    sweep_every: timedelta | None = None,
    invalid_status: InvalidStatus = 400,
    html: bool = False,
) -> Served:
    render = starlette_page if html else None
    app = Starlette(
        routes=[Route("/issue", starlette_issue), Route("/consume", starlette_consume)],
        lifespan=for_starlette.lifespan(manager, sweep_every),
        exception_handlers=for_starlette.exception_handlers(invalid_status, render=render),
        middleware=[Middleware(for_starlette.PrivatePages)],
    )
    return serving(app)


async def fastapi_issue(manager: Manager, slug: str) -> Answer:
    return await issue(manager, slug)


async def fastapi_consume(manager: Manager, slug: str, key: str) -> Answer:
    return await consume(manager, slug, key)


def fastapi_app(
    manager: TokenManager,
    sweep_every: timedelta | None = None,
    invalid_status: InvalidStatus = 400,
    html: bool = False,
) -> Served:
    render = starlette_page if html else None
    app = FastAPI(
        lifespan=for_fastapi.lifespan(manager, sweep_every),
        exception_handlers=for_fastapi.exception_handlers(invalid_status, render=render),
        middleware=[Middleware(for_fastapi.PrivatePages)],
    )
    app.get("/issue")(fastapi_issue)
    app.get("/consume")(fastapi_consume)
    return serving(app)


@get("/issue")
async def litestar_issue(token_manager: NamedDependency[TokenManager], slug: FromQuery[str]) -> Answer:
    return await issue(token_manager, slug)


@get("/consume")
async def litestar_consume(
    token_manager: NamedDependency[TokenManager], slug: FromQuery[str], key: FromQuery[str]
) -> Answer:
    return await consume(token_manager, slug, key)


def litestar_page(_: object, refusal: for_litestar.Refusal) -> Response[str]:
    text = f"<p>{refusal.body['detail']}</p>"
    return Response(text, status_code=refusal.status, headers=refusal.headers, media_type=MediaType.HTML)


def litestar_app(
    manager: TokenManager,
    sweep_every: timedelta | None = None,
    invalid_status: InvalidStatus = 400,
    html: bool = False,
) -> Served:
    render = litestar_page if html else None
    plugin = for_litestar.plugin(manager, sweep_every, invalid_status, render=render)
    app = Litestar([litestar_issue, litestar_consume], plugins=[plugin], openapi_config=None)
    return serving(for_litestar.PrivatePages(app))


async def aiohttp_issue(request: web.Request) -> web.Response:
    return web.json_response(await issue(for_aiohttp.get_manager(request), **request.query))


async def aiohttp_consume(request: web.Request) -> web.Response:
    return web.json_response(await consume(for_aiohttp.get_manager(request), **request.query))


def aiohttp_page(_: web.Request, refusal: for_aiohttp.Refusal) -> web.Response:
    text = f"<p>{refusal.body['detail']}</p>"
    return web.Response(text=text, status=refusal.status, headers=refusal.headers, content_type="text/html")


@asynccontextmanager
async def aiohttp_app(
    manager: TokenManager,
    sweep_every: timedelta | None = None,
    invalid_status: InvalidStatus = 400,
    html: bool = False,
) -> AsyncGenerator[httpx.AsyncClient]:
    render = aiohttp_page if html else None
    errors = for_aiohttp.error_middleware(invalid_status, render=render)
    app = web.Application(middlewares=[for_aiohttp.private_pages(), errors])
    app.cleanup_ctx.append(for_aiohttp.cleanup_ctx(manager, sweep_every))
    app.add_routes([web.get("/issue", aiohttp_issue), web.get("/consume", aiohttp_consume)])
    async with TestServer(app) as server, httpx.AsyncClient(base_url=str(server.make_url("/"))) as client:
        yield client


APPS: Final[dict[str, Callable[..., Served]]] = {
    "starlette": starlette_app,
    "fastapi": fastapi_app,
    "litestar": litestar_app,
    "aiohttp": aiohttp_app,
}
