"""FastAPI: a lifespan that opens the manager, a dependency that finds it, and responses for refused keys.

::

    app = FastAPI(
        lifespan=lifespan(manager), exception_handlers=exception_handlers()
    )

    @app.post("/reset", responses=responses())
    async def reset(
        key: str, manager: Annotated[TokenManager, Depends(get_manager)]
    ) -> None:
        await manager.consume(User, "password-reset", key)
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from vtoken.contrib import starlette
from vtoken.contrib._extras import require
from vtoken.contrib._http import InvalidStatus, PrivatePages, Refusal, openapi_responses
from vtoken.contrib.starlette import Handler, Lifespan, Render
from vtoken.inputs import Duration
from vtoken.manager import TokenManager

with suppress(ImportError):  # without it nobody calls get_manager, whose annotation FastAPI looks up here
    from starlette.requests import HTTPConnection

__all__ = ["PrivatePages", "Refusal", "exception_handlers", "get_manager", "lifespan", "responses"]


def lifespan(manager: TokenManager, sweep_every: Duration | None = None) -> Lifespan:
    """As :func:`vtoken.contrib.starlette.lifespan`: FastAPI is built on Starlette.

    Raises:
        ConfigurationError: FastAPI is not installed.
    """
    require("fastapi", "fastapi")
    return starlette.lifespan(manager, sweep_every)


def get_manager(connection: HTTPConnection) -> TokenManager:
    """A dependency: the manager of the application that a request, or a WebSocket, came to.

    Raises:
        ConfigurationError: the application was not started with :func:`lifespan`.
    """
    return starlette.get_manager(connection)


def exception_handlers(
    invalid_status: InvalidStatus = 400, *, render: Render | None = None
) -> dict[Any, Handler]:
    """As :func:`vtoken.contrib.starlette.exception_handlers`: errors that visitors cause are answered.

    Raises:
        ConfigurationError: FastAPI is not installed.
    """
    require("fastapi", "fastapi")
    return starlette.exception_handlers(invalid_status, render=render)


def responses(invalid_status: InvalidStatus = 400) -> dict[int | str, dict[str, Any]]:
    """What :func:`exception_handlers` answers, for the argument ``responses`` of FastAPI's routes.

    Args:
        invalid_status: the same as that of :func:`exception_handlers`.
    """
    return openapi_responses(invalid_status)
