"""aiohttp: a cleanup context that opens the manager, and a middleware that answers refused keys.

::

    app = web.Application(middlewares=[error_middleware()])
    app.cleanup_ctx.append(cleanup_ctx(manager))

    async def reset(request: web.Request) -> web.Response:
        await get_manager(request).consume(User, "password-reset", request.query["key"])
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING

import anyio

from vtoken.contrib._extras import require
from vtoken.contrib._http import REFUSALS, InvalidStatus, refusal
from vtoken.errors import ConfigurationError
from vtoken.manager import TokenManager
from vtoken.sweeper import Sweeper

if TYPE_CHECKING:
    from aiohttp import web
    from aiohttp.typedefs import Handler, Middleware


def cleanup_ctx(
    manager: TokenManager, sweep_every: timedelta | None = None
) -> Callable[[web.Application], AsyncIterator[None]]:
    """A cleanup context that opens the manager, closes it in the end, and lets :func:`get_manager` find it.

    Args:
        manager: not open yet.
        sweep_every: purge in the background this often, see :meth:`TokenManager.sweeper`; None never.

    Raises:
        ConfigurationError: aiohttp is not installed.
    """
    key = _key()

    async def run(app: web.Application) -> AsyncGenerator[None]:
        async with manager:
            app[key] = manager
            sweeping = None
            if sweep_every is not None:
                sweeping = asyncio.create_task(_sweep(manager.sweeper(sweep_every)))
            yield
            if sweeping is not None:
                sweeping.cancel()
                await asyncio.wait([sweeping])

    return run


async def _sweep(sweeper: Sweeper) -> None:
    """Sweep in a task of its own: aiohttp may clean up in another one than it started in."""
    async with sweeper:
        await anyio.sleep_forever()


def get_manager(request: web.Request) -> TokenManager:
    """The manager of the application, or of one around it, that a request came to.

    Raises:
        ConfigurationError: the application has no :func:`cleanup_ctx`.
    """
    manager = request.config_dict.get(_key())
    if manager is None:
        raise ConfigurationError(
            "the application has no manager: append cleanup_ctx(manager) to app.cleanup_ctx"
        )
    return manager


def error_middleware(invalid_status: InvalidStatus = 400) -> Middleware:
    """A middleware that answers :class:`InvalidToken` with one body, whatever the reason, and
    :class:`TooManyAttempts` and :class:`CooldownActive` with 429 and ``Retry-After``.

    A cooldown is one of an account: where strangers ask for a token by an address, catch it and answer as
    always, or the answer tells that there is such an account.

    Args:
        invalid_status: of the response for a refused key.

    Raises:
        ConfigurationError: aiohttp is not installed.
    """
    require("aiohttp", "aiohttp.web")
    from aiohttp import web

    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except REFUSALS as error:
            status, headers, body = refusal(error, invalid_status)
        return web.json_response(body, status=status, headers=headers)

    return answer


@cache
def _key() -> web.AppKey[TokenManager]:
    require("aiohttp", "aiohttp.web")
    from aiohttp import web

    return web.AppKey("vtoken", TokenManager)
