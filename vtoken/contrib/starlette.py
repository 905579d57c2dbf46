"""Starlette: a lifespan that opens the manager, and responses for refused keys.

::

    app = Starlette(routes, lifespan=lifespan(manager), exception_handlers=exception_handlers())

    async def reset(request: Request) -> Response:
        await get_manager(request).consume(User, "password-reset", request.query_params["key"])
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from vtoken.contrib._extras import require
from vtoken.contrib._http import REFUSALS, InvalidStatus, opened, refusal
from vtoken.errors import ConfigurationError
from vtoken.manager import TokenManager

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.requests import HTTPConnection, Request
    from starlette.responses import Response

Lifespan = Callable[[Any], AbstractAsyncContextManager[dict[str, Any]]]
Handler = Callable[["Request", Exception], "Coroutine[Any, Any, Response]"]


def lifespan(manager: TokenManager, sweep_every: timedelta | None = None) -> Lifespan:
    """A lifespan that opens the manager, closes it in the end, and lets :func:`get_manager` find it.

    Args:
        manager: not open yet.
        sweep_every: purge in the background this often, see :meth:`TokenManager.sweeper`; None never.

    Raises:
        ConfigurationError: Starlette is not installed.
    """
    require("starlette", "starlette.applications")

    @asynccontextmanager
    async def run(_: Any) -> AsyncGenerator[dict[str, Any]]:
        async with opened(manager, sweep_every):
            yield {"vtoken": manager}

    return run


def get_manager(connection: HTTPConnection) -> TokenManager:
    """The manager of the application that a request, or a WebSocket, came to.

    Raises:
        ConfigurationError: the application was not started with :func:`lifespan`.
    """
    manager = getattr(connection.state, "vtoken", None)
    if isinstance(manager, TokenManager):
        return manager
    raise ConfigurationError("the application has no manager: make it with lifespan=lifespan(manager)")


def exception_handlers(invalid_status: InvalidStatus = 400) -> dict[Any, Handler]:
    """Handlers that answer :class:`InvalidToken` with one body, whatever the reason, and
    :class:`TooManyAttempts` and :class:`CooldownActive` with 429 and ``Retry-After``.

    A cooldown is one of an account: where strangers ask for a token by an address, catch it and answer as
    always, or the answer tells that there is such an account.

    Args:
        invalid_status: of the response for a refused key.

    Raises:
        ConfigurationError: Starlette is not installed.
    """
    require("starlette", "starlette.responses")
    from starlette.responses import JSONResponse

    async def answer(_: Request, error: Exception) -> Response:
        status, headers, body = refusal(error, invalid_status)
        return JSONResponse(body, status, headers)

    return dict.fromkeys(REFUSALS, answer)
