"""Litestar: a plugin that opens the manager, hands it to handlers, and answers refused keys.

::

    app = Litestar([reset], plugins=[plugin(manager)])

    @post("/reset")
    async def reset(
        data: Form, token_manager: NamedDependency[TokenManager]
    ) -> None:
        await token_manager.consume(User, "password-reset", data.key)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from vtoken.contrib._extras import require
from vtoken.contrib._http import InvalidStatus, PrivatePages, Refusal, opened, refusal
from vtoken.errors import VTokenError
from vtoken.inputs import Duration
from vtoken.manager import TokenManager

if TYPE_CHECKING:
    from litestar import Request, Response
    from litestar.config.app import AppConfig
    from litestar.plugins import InitPlugin

__all__ = ["PrivatePages", "Refusal", "plugin"]

Render = Callable[["Request[Any, Any, Any]", Refusal], "Response[Any]"]


def plugin(
    manager: TokenManager,
    sweep_every: Duration | None = None,
    invalid_status: InvalidStatus = 400,
    *,
    render: Render | None = None,
) -> InitPlugin:
    """A plugin for ``Litestar(plugins=[...])``: handlers get the manager as ``token_manager``.

    Errors that visitors cause are answered as by :func:`vtoken.contrib.starlette.exception_handlers`, unless
    the application has handlers of its own; all others are logged and raised.

    Args:
        manager: not open yet.
        sweep_every: purge in the background this often, see :meth:`TokenManager.sweeper`; None never.
        invalid_status: of the response for a refused key.
        render: makes the response, an HTML page say, of the request and the :class:`Refusal`; left out, it
            is JSON.

    Raises:
        ConfigurationError: Litestar is not installed.
    """
    require("litestar", "litestar.plugins")
    from litestar import Response
    from litestar.di import Provide
    from litestar.plugins import InitPlugin

    def answer(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
        found = refusal(cast("VTokenError", error), invalid_status)
        if found is None:
            raise error
        if render is not None:
            return render(request, found)
        return Response(found.body, status_code=found.status, headers=found.headers)

    def token_manager() -> TokenManager:
        return manager

    class VTokenPlugin(InitPlugin):
        def on_app_init(self, app_config: AppConfig) -> AppConfig:
            app_config.lifespan.append(lambda _: opened(manager, sweep_every))
            app_config.dependencies["token_manager"] = Provide(token_manager, sync_to_thread=False)
            app_config.exception_handlers.setdefault(VTokenError, answer)
            return app_config

    return VTokenPlugin()
