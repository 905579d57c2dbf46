"""What the web frameworks' integrations share."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager, nullcontext
from typing import Any, Final, Literal, NamedTuple

from vtoken.errors import (
    AlreadyUsed,
    BackendUnavailable,
    CooldownActive,
    InvalidToken,
    LeaseLost,
    TokenBusy,
    TooManyAttempts,
    VTokenError,
)
from vtoken.inputs import Duration
from vtoken.manager import TokenManager

logger = logging.getLogger("vtoken")

InvalidStatus = Literal[400, 410]

_RETRY: Final = 5
"""Seconds after which a store that was not there is worth another try."""
_BUSY: Final = 2
"""Seconds after which a block that uses the token is mostly done. The error says when its lease ends."""
PRIVATE: Final = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
"""Headers for pages whose address has a key in it: no cache keeps them, and no other site is told the address
(OWASP Forgot Password Cheat Sheet, "URL Tokens")."""


class Refusal(NamedTuple):
    """The HTTP response for an error.

    Its body says which error it was and what to tell people, as in ``{"code": "too_many_attempts", "detail":
    "Too many attempts. Try again later.", "retry_after": 40}``; ``retry_after``, in seconds, and
    ``attempts_left``, of a refused code, only where they are known.
    """

    status: int
    headers: dict[str, str]
    body: dict[str, Any]


class _Answer(NamedTuple):
    status: int
    code: str
    detail: str


# The first class that fits decides.
_ANSWERS: Final[dict[type[VTokenError], _Answer]] = {
    TooManyAttempts: _Answer(429, "too_many_attempts", "Too many attempts. Try again later."),
    CooldownActive: _Answer(429, "cooldown_active", "Too many requests. Try again later."),
    TokenBusy: _Answer(409, "token_busy", "This is being done already. Try again in a moment."),
    LeaseLost: _Answer(409, "lease_lost", "This took too long. Start again."),
    AlreadyUsed: _Answer(400, "already_used", "This has been done already."),
    InvalidToken: _Answer(400, "invalid_token", InvalidToken.message),
    BackendUnavailable: _Answer(503, "unavailable", "This is not available at the moment. Try again later."),
}


def refusal(error: VTokenError, invalid_status: InvalidStatus = 400) -> Refusal | None:
    """The response for an error, or None for one that no visitor has caused, which is logged.

    It tells when to try again, and of a refused key never why; of a code it tells how many attempts are left,
    which is the same whatever the reason. One status and one body for every refused
    key: a difference would tell an attacker which ones came close (OWASP Forgot Password Cheat Sheet). A 410
    may be cached unless the response forbids it (RFC 9110, section 15.5.11).
    """
    answer = next((answer for kind, answer in _ANSWERS.items() if isinstance(error, kind)), None)
    if answer is None:
        logger.error("%s, which is no fault of the visitor's: %s", type(error).__name__, error)
        return None
    if isinstance(error, BackendUnavailable):
        logger.error("the store is not available: %s", error)
    status = invalid_status if answer.status == 400 else answer.status
    headers = {"Cache-Control": "no-store"}
    body: dict[str, Any] = {"code": answer.code, "detail": answer.detail}
    if answer is _ANSWERS[InvalidToken] and (left := getattr(error, "attempts_left", None)) is not None:
        body["attempts_left"] = left
    retry_after = _RETRY if isinstance(error, BackendUnavailable) else getattr(error, "retry_after", None)
    if isinstance(error, TokenBusy):
        retry_after = min(error.retry_after, _BUSY)
    if retry_after is not None:
        # Whole seconds (RFC 9110, section 10.2.3), rounded up: never told too early.
        body["retry_after"] = math.ceil(retry_after)
        headers["Retry-After"] = str(body["retry_after"])
    return Refusal(status, headers, body)


def openapi_responses(invalid_status: InvalidStatus = 400) -> dict[int | str, dict[str, Any]]:
    """What the responses of :func:`refusal` look like, for an OpenAPI document."""
    by_status: dict[int, list[_Answer]] = {}
    for answer in _ANSWERS.values():
        by_status.setdefault(invalid_status if answer.status == 400 else answer.status, []).append(answer)
    return {
        status: {
            "description": " Or: ".join(answer.detail for answer in answers),
            "content": {"application/json": {"schema": _schema([answer.code for answer in answers])}},
        }
        for status, answers in sorted(by_status.items())
    }


def _schema(codes: list[str]) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["code", "detail"],
        "properties": {
            "code": {"type": "string", "enum": codes},
            "detail": {"type": "string"},
            "retry_after": {"type": "integer", "description": "Seconds."},
            "attempts_left": {"type": "integer", "description": "Of a refused code."},
        },
    }


@asynccontextmanager
async def opened(manager: TokenManager, sweep_every: Duration | None) -> AsyncGenerator[None]:
    """The manager open, and sweeping where that is asked for."""
    async with manager, nullcontext() if sweep_every is None else manager.sweeper(sweep_every):
        yield


# ASGI --------------------------------------------------------------------------------------------

ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]
"""The types of the frameworks differ, and each fits only itself."""


class PrivatePages:
    """ASGI middleware for an application, or a part of it, whose addresses have keys in them.

    Every response that passes through it gets ``Referrer-Policy: no-referrer`` and ``Cache-Control:
    no-store``, unless it has a header of that name already. Starlette and FastAPI answer an error that nobody
    handles outside of all middleware that was added: ``PrivatePages(app)``, served in place of ``app``, is
    around that answer, too.

    Args:
        app: the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                given = list(message.get("headers", ()))
                names = {bytes(name).lower() for name, _ in given}
                more = [(name.lower().encode(), value.encode()) for name, value in PRIVATE.items()]
                message = {**message, "headers": [*given, *(pair for pair in more if pair[0] not in names)]}
            await send(message)

        await self._app(scope, receive, send_with_headers)
