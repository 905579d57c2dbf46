"""The integrations, as their frameworks take them."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from datetime import timedelta

from aiohttp import web
from fastapi import FastAPI
from litestar import Litestar
from starlette.applications import Starlette

import vtoken.contrib.aiohttp as for_aiohttp
import vtoken.contrib.fastapi as for_fastapi
import vtoken.contrib.litestar as for_litestar
import vtoken.contrib.logging as for_logging
import vtoken.contrib.opentelemetry as for_opentelemetry
import vtoken.contrib.prometheus as for_prometheus
import vtoken.contrib.starlette as for_starlette
from vtoken import TokenManager, create_backend


def used(manager: TokenManager) -> None:
    every = timedelta(minutes=10)
    FastAPI(
        lifespan=for_fastapi.lifespan(manager, every), exception_handlers=for_fastapi.exception_handlers(410)
    )
    Starlette(lifespan=for_starlette.lifespan(manager), exception_handlers=for_starlette.exception_handlers())
    Litestar([], plugins=[for_litestar.plugin(manager, sweep_every=every)])
    app = web.Application(middlewares=[for_aiohttp.error_middleware()])
    app.cleanup_ctx.append(for_aiohttp.cleanup_ctx(manager))
    for_fastapi.exception_handlers(404)  # type: ignore[arg-type]  # only 400 or 410
    for_fastapi.lifespan(manager, 600)  # type: ignore[arg-type]  # of what?
    hooks = [for_logging.hook(), for_opentelemetry.hook("memory"), for_prometheus.hook("memory")]
    TokenManager(create_backend("memory://"), hooks=[*hooks, for_prometheus.record])
