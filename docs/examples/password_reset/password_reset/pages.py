"""What the pages share: templates, the nonce of a browser, and who is signed in."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Form, HTTPException, Request, Response
from fastapi.templating import Jinja2Templates
from vtoken import TokenManager
from vtoken.contrib.fastapi import get_manager

from password_reset.accounts import Accounts
from password_reset.config import Config
from password_reset.outbox import Outbox

FOLDER = Path(__file__).parent
BROWSER, SESSION = "browser", "session"
"""Cookies: a nonce of each browser, and the session of who is signed in there."""

_templates = Jinja2Templates(FOLDER / "templates")


@dataclass(frozen=True)
class Parts:
    """What the application is made of, while it runs."""

    config: Config
    clock: Callable[[], datetime]
    accounts: Accounts
    outbox: Outbox


def get_parts(request: Request) -> Parts:
    """What the application is made of."""
    parts = request.state.parts
    assert isinstance(parts, Parts)  # noqa: S101  # the lifespan has put it there
    return parts


async def get_account(request: Request, parts: Annotated[Parts, Depends(get_parts)]) -> str | None:
    """The address of who is signed in, or None."""
    key = request.state.cookie(SESSION)
    return None if key is None else await parts.accounts.of_session(key, parts.clock().timestamp())


def same_browser(
    request: Request, parts: Annotated[Parts, Depends(get_parts)], csrf: Annotated[str, Form()] = ""
) -> None:
    """Refuse a form that was not made for this browser (cross-site request forgery)."""
    expected = csrf_token(parts.config, request.state.browser)
    if not hmac.compare_digest(csrf.encode(errors="replace"), expected.encode()):
        raise HTTPException(
            403, "This form is too old, or your browser sends no cookies. Open the page again."
        )


Manager = Annotated[TokenManager, Depends(get_manager)]
Application = Annotated[Parts, Depends(get_parts)]
Account = Annotated[str | None, Depends(get_account)]
Text = Annotated[str, Form(max_length=1024)]


def csrf_token(config: Config, browser: str) -> str:
    """What the forms of a browser carry: an HMAC of the nonce in its cookie."""
    return hmac.new(config.secret.encode(), b"csrf:" + browser.encode(), hashlib.sha256).hexdigest()


def page(request: Request, name: str, status: int = 200, **values: object) -> Response:
    """A page from its template."""
    token = csrf_token(get_parts(request).config, request.state.browser)
    return _templates.TemplateResponse(request, f"{name}.html", {"csrf": token, **values}, status)


def set_cookie(response: Response, config: Config, name: str, value: str) -> None:
    """Set a cookie for the site only. Lax, so that a link in a message comes with it."""
    response.set_cookie(
        cookie_name(config, name), value, httponly=True, samesite="lax", secure=config.is_https
    )


def cookie_name(config: Config, name: str) -> str:
    """The name of a cookie. Under HTTPS the prefix lets browsers refuse one that another host of the domain
    has set (RFC 6265bis, section 4.1.3.2)."""
    return f"__Host-{name}" if config.is_https else name
