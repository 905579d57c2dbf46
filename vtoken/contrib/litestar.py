"""Litestar: a plugin that opens the manager, hands it to handlers, and answers refused keys.

::

    app = Litestar([reset], plugins=[plugin(manager)])

    @post("/reset")
    async def reset(data: Form, token_manager: NamedDependency[TokenManager]) -> None:
        await token_manager.consume(User, "password-reset", data.key)
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from vtoken.contrib._extras import require
from vtoken.contrib._http import REFUSALS, InvalidStatus, opened, refusal
from vtoken.manager import TokenManager

if TYPE_CHECKING:
    from litestar import Request, Response
    from litestar.config.app import AppConfig
    from litestar.plugins import InitPlugin


def plugin(
    manager: TokenManager, sweep_every: timedelta | None = None, invalid_status: InvalidStatus = 400
) -> InitPlugin:
    """A plugin for ``Litestar(plugins=[...])``: handlers get the manager as ``token_manager``.

    A refused key is answered with one body, whatever the reason; a spent budget and a running cooldown with
    429 and ``Retry-After``, unless the application has handlers of its own. A cooldown is one of an account:
    where strangers ask for a token by an address, catch it and answer as always, or the answer tells that
    there is such an account.

    Args:
        manager: not open yet.
        sweep_every: purge in the background this often, see :meth:`TokenManager.sweeper`; None never.
        invalid_status: of the response for a refused key.

    Raises:
        ConfigurationError: Litestar is not installed.
    """
    require("litestar", "litestar.plugins")
    from litestar import Response
    from litestar.di import Provide
    from litestar.plugins import InitPlugin

    def answer(_: Request[Any, Any, Any], error: Exception) -> Response[dict[str, str]]:
        status, headers, body = refusal(error, invalid_status)
        return Response(body, status_code=status, headers=headers)

    def token_manager() -> TokenManager:
        return manager

    class VTokenPlugin(InitPlugin):
        def on_app_init(self, app_config: AppConfig) -> AppConfig:
            app_config.lifespan.append(lambda _: opened(manager, sweep_every))
            app_config.dependencies["token_manager"] = Provide(token_manager, sync_to_thread=False)
            for kind in REFUSALS:
                app_config.exception_handlers.setdefault(kind, answer)
            return app_config

    return VTokenPlugin()
