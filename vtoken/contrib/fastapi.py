"""FastAPI: a lifespan that opens the manager, a dependency that finds it, and responses for refused keys.

::

    app = FastAPI(lifespan=lifespan(manager), exception_handlers=exception_handlers())

    @app.post("/reset")
    async def reset(key: str, manager: Annotated[TokenManager, Depends(get_manager)]) -> None:
        await manager.consume(User, "password-reset", key)
"""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from typing import Any

from vtoken.contrib import starlette
from vtoken.contrib._extras import require
from vtoken.contrib._http import InvalidStatus
from vtoken.contrib.starlette import Handler, Lifespan
from vtoken.manager import TokenManager

with suppress(ImportError):  # without it nobody calls get_manager, whose annotation FastAPI looks up here
    from starlette.requests import HTTPConnection


def lifespan(manager: TokenManager, sweep_every: timedelta | None = None) -> Lifespan:
    """A lifespan that opens the manager, closes it in the end, and lets :func:`get_manager` find it.

    Args:
        manager: not open yet.
        sweep_every: purge in the background this often, see :meth:`TokenManager.sweeper`; None never.

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


def exception_handlers(invalid_status: InvalidStatus = 400) -> dict[Any, Handler]:
    """Handlers that answer :class:`InvalidToken` with one body, whatever the reason, and
    :class:`TooManyAttempts` and :class:`CooldownActive` with 429 and ``Retry-After``.

    A cooldown is one of an account: where strangers ask for a token by an address, catch it and answer as
    always, or the answer tells that there is such an account.

    Args:
        invalid_status: of the response for a refused key.

    Raises:
        ConfigurationError: FastAPI is not installed.
    """
    require("fastapi", "fastapi")
    return starlette.exception_handlers(invalid_status)
