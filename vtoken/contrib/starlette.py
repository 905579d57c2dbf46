"""Starlette: a lifespan that opens the manager, and responses for refused keys.

::

    app = Starlette(
        routes, lifespan=lifespan(manager), exception_handlers=exception_handlers()
    )

    async def reset(request: Request) -> Response:
        key = request.query_params["key"]
        await get_manager(request).consume(User, "password-reset", key)
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

from vtoken.contrib._extras import require
from vtoken.contrib._http import InvalidStatus, PrivatePages, Refusal, openapi_responses, opened, refusal
from vtoken.errors import ConfigurationError, VTokenError
from vtoken.inputs import Duration
from vtoken.manager import TokenManager

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.requests import HTTPConnection, Request
    from starlette.responses import Response

__all__ = [
    "PrivatePages",
    "Refusal",
    "exception_handlers",
    "get_manager",
    "lifespan",
    "openapi_responses",
]

Lifespan = Callable[[Any], AbstractAsyncContextManager[dict[str, Any]]]
Handler = Callable[["Request", Exception], "Coroutine[Any, Any, Response]"]
Render = Callable[["Request", Refusal], "Response"]


def lifespan(manager: TokenManager, sweep_every: Duration | None = None) -> Lifespan:
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
        ConfigurationError: the application was not started with :func:`lifespan`; the message says what may
            have happened.
    """
    has_run = "state" in connection.scope  # looked up first, because connection.state makes one
    manager = getattr(connection.state, "vtoken", None)
    if isinstance(manager, TokenManager):
        return manager
    if not has_run:
        raise ConfigurationError(
            "the application's lifespan has not run, so it has no manager: use TestClient as"
            " `with TestClient(app)`, run the lifespan around httpx.ASGITransport, or serve with lifespans"
            " (uvicorn: --lifespan on)"
        )
    raise ConfigurationError(
        "the application's lifespan has run and yielded no manager: make the application with"
        " lifespan=lifespan(manager), or yield its state from your own lifespan; of mounted applications,"
        " only the outermost one's lifespan runs"
    )


def exception_handlers(
    invalid_status: InvalidStatus = 400, *, render: Render | None = None
) -> dict[Any, Handler]:
    """Handlers that answer the errors that visitors cause; all others are logged and raised.

    ====== ======================= ==================================================================
    status code                    error
    ====== ======================= ==================================================================
    400    ``invalid_token``       :class:`InvalidToken`, one body whatever the reason
    400    ``already_used``        :class:`AlreadyUsed`
    409    ``token_busy``          :class:`TokenBusy`, with ``Retry-After``
    409    ``lease_lost``          :class:`LeaseLost`
    429    ``too_many_attempts``   :class:`TooManyAttempts`, with ``Retry-After``
    429    ``cooldown_active``     :class:`CooldownActive`, with ``Retry-After``
    503    ``unavailable``         :class:`BackendUnavailable`, with ``Retry-After``
    ====== ======================= ==================================================================

    For a refused code the body has ``attempts_left``, where attempts are limited. The ``Retry-After`` of a
    busy token is two seconds at most, because its block is mostly done by then.

    A cooldown belongs to an account. Where strangers ask for a token by an address, catch it and answer as
    always, or the answer tells that there is such an account.

    Args:
        invalid_status: of the response for a refused key.
        render: makes the response, an HTML page say, of the request and the :class:`Refusal`; left out, it
            is JSON.

    Raises:
        ConfigurationError: Starlette is not installed.
    """
    require("starlette", "starlette.responses")
    from starlette.responses import JSONResponse

    async def answer(request: Request, error: Exception) -> Response:
        found = refusal(cast("VTokenError", error), invalid_status)
        if found is None:
            raise error
        if render is not None:
            return render(request, found)
        return JSONResponse(found.body, found.status, found.headers)

    return {VTokenError: answer}
