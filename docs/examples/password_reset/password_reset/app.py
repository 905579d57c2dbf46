"""The application: its parts put together, the headers of every answer, and what errors look like."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from vtoken import BackendError, TokenManager, utc_now
from vtoken.contrib.fastapi import lifespan

from password_reset import members, reset
from password_reset.accounts import open_accounts
from password_reset.config import Config
from password_reset.mail import Deliver, deliverer
from password_reset.outbox import Busy, Outbox
from password_reset.pages import BROWSER, FOLDER, Parts, cookie_name, page, set_cookie
from password_reset.tokens import POLICIES

logger = logging.getLogger("uvicorn.error")  # it is shown where uvicorn's own messages are

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",  # the address of a page may hold a key
    "X-Content-Type-Options": "nosniff",
}


def create_app(
    config: Config, clock: Callable[[], datetime] = utc_now, deliver: Deliver | None = None
) -> FastAPI:
    """Make the application.

    Args:
        config: what the environment says.
        clock: the only clock there is.
        deliver: delivers messages; left out, as the configuration says.
    """
    manager = TokenManager.from_url(
        config.tokens_url, settings=config.settings, policies=POLICIES, clock=clock
    )
    opened = lifespan(manager, sweep_every=timedelta(minutes=10))

    @asynccontextmanager
    async def run(app: FastAPI) -> AsyncGenerator[dict[str, Any]]:
        send = deliver or deliverer(config.smtp, config.data / "mailbox")
        outbox = Outbox(manager, send, config.base_url, config.sender)
        async with opened(app) as state, outbox.running():
            accounts = await open_accounts(config.tokens_url)
            try:
                if await accounts.is_empty():
                    logger.info("Invitation: %s", await members.invitation(manager, config.base_url))
                yield {**state, "parts": Parts(config, clock, accounts, outbox)}
            finally:
                await accounts.close()

    # No redirects from /reset/ to /reset: they would go to the host that the request names, with the key.
    app = FastAPI(lifespan=run, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.mount("/static", StaticFiles(directory=FOLDER / "static"))
    app.include_router(members.router)
    app.include_router(reset.router)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _bad_form)
    for error in (Busy, BackendError):
        app.add_exception_handler(error, _try_again)

    @app.middleware("http")
    async def every_answer(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        request.state.cookie = lambda name: request.cookies.get(cookie_name(config, name))
        nonce = request.state.cookie(BROWSER) or ""
        is_new = not re.fullmatch(r"[\w-]{43}", nonce, re.ASCII)
        request.state.browser = secrets.token_urlsafe(32) if is_new else nonce
        response = await call_next(request)
        if is_new:
            set_cookie(response, config, BROWSER, request.state.browser)
        response.headers.update(_HEADERS)
        return response

    return app


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101  # for which this is the handler
    own = error.detail != HTTPStatus(error.status_code).phrase
    problem = error.detail if own else "There is no such page."
    return page(request, "problem", error.status_code, problem=problem)


async def _bad_form(request: Request, _: Exception) -> Response:
    """Not FastAPI's own answer, which repeats what was typed."""
    return page(request, "problem", 400, problem="The form is not complete.")


async def _try_again(request: Request, error: Exception) -> Response:
    logger.error("%s", error)
    return page(request, "problem", 503, problem="Please try again in a few minutes.")
