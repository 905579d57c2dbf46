"""aiohttp: a cleanup context that opens the manager, and a middleware that answers refused keys.

::

    app = web.Application(middlewares=[error_middleware()])
    app.cleanup_ctx.append(cleanup_ctx(manager))

    async def reset(request: web.Request) -> web.Response:
        key = request.query["key"]
        await get_manager(request).consume(User, "password-reset", key)
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from functools import cache
from typing import TYPE_CHECKING

from vtoken.contrib._extras import require
from vtoken.contrib._http import PRIVATE, InvalidStatus, Refusal, opened, refusal
from vtoken.errors import ConfigurationError, VTokenError
from vtoken.inputs import Duration
from vtoken.manager import TokenManager

if TYPE_CHECKING:
    from aiohttp import web
    from aiohttp.typedefs import Handler, Middleware

__all__ = ["Refusal", "cleanup_ctx", "error_middleware", "get_manager", "private_pages"]

Render = Callable[["web.Request", Refusal], "web.StreamResponse"]


def cleanup_ctx(
    manager: TokenManager, sweep_every: Duration | None = None
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
        async with opened(manager, sweep_every):
            app[key] = manager
            yield

    return run


def get_manager(request: web.Request) -> TokenManager:
    """The manager of the application, or of one around it, that a request came to.

    Raises:
        ConfigurationError: the application has no :func:`cleanup_ctx`.
    """
    manager = request.config_dict.get(_key())
    if manager is None:
        raise ConfigurationError(
            "the application has no manager: append cleanup_ctx(manager) to app.cleanup_ctx, of the"
            " application or of one around it, before it starts"
        )
    return manager


def error_middleware(invalid_status: InvalidStatus = 400, *, render: Render | None = None) -> Middleware:
    """A middleware that answers the errors that visitors cause, as
    :func:`vtoken.contrib.starlette.exception_handlers` does; all others are logged and raised.

    Args:
        invalid_status: of the response for a refused key.
        render: makes the response, an HTML page say, of the request and the :class:`Refusal`; left out, it
            is JSON.

    Raises:
        ConfigurationError: aiohttp is not installed.
    """
    require("aiohttp", "aiohttp.web")
    from aiohttp import web

    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except VTokenError as error:
            found = refusal(error, invalid_status)
            if found is None:
                raise
        if render is not None:
            return render(request, found)
        return web.json_response(found.body, status=found.status, headers=found.headers)

    return answer


def private_pages() -> Middleware:
    """A middleware for an application whose addresses have keys in them: every response gets
    ``Referrer-Policy: no-referrer`` and ``Cache-Control: no-store``, unless it has a header of that name
    already.

    Raises:
        ConfigurationError: aiohttp is not installed.
    """
    require("aiohttp", "aiohttp.web")
    from aiohttp import web

    @web.middleware
    async def add_headers(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            response = await handler(request)
        except web.HTTPException as error:
            _add_private(error)
            raise
        _add_private(response)
        return response

    return add_headers


def _add_private(response: web.StreamResponse | web.HTTPException) -> None:
    for name, value in PRIVATE.items():
        response.headers.setdefault(name, value)


@cache
def _key() -> web.AppKey[TokenManager]:
    require("aiohttp", "aiohttp.web")
    from aiohttp import web

    return web.AppKey("vtoken", TokenManager)
