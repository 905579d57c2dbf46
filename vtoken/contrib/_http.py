"""What the web frameworks' integrations share."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, nullcontext
from datetime import timedelta
from typing import Final, Literal, NamedTuple

from vtoken.errors import CooldownActive, InvalidInput, InvalidToken, TooManyAttempts
from vtoken.manager import TokenManager

InvalidStatus = Literal[400, 410]

REFUSALS: Final = (InvalidToken, InvalidInput, CooldownActive)
"""The errors that are an answer; ``TooManyAttempts`` is an ``InvalidToken``. ``InvalidInput`` is one of them,
as anybody can send a key that is too long or holds a NUL; it is answered as a wrong key is."""


class Refusal(NamedTuple):
    """The HTTP response for an error."""

    status: int
    headers: dict[str, str]
    body: dict[str, str]


def refusal(error: Exception, invalid_status: InvalidStatus = 400) -> Refusal:
    """The response for an error of :data:`REFUSALS`: it tells when to try again, and never why.

    One status and one body for every refused key: a difference would tell an attacker which guesses came
    close (OWASP Forgot Password Cheat Sheet). A 410 may be cached unless it forbids it (RFC 9110, section
    15.5.11).
    """
    headers = {"Cache-Control": "no-store"}
    if isinstance(error, TooManyAttempts | CooldownActive):
        headers["Retry-After"] = str(math.ceil(error.retry_after))  # whole seconds: RFC 9110, section 10.2.3
        return Refusal(429, headers, {"detail": "Too many attempts. Try again later."})
    return Refusal(invalid_status, headers, {"detail": InvalidToken.message})


@asynccontextmanager
async def opened(manager: TokenManager, sweep_every: timedelta | None) -> AsyncGenerator[None]:
    """The manager open, and sweeping where that is wanted."""
    async with manager, nullcontext() if sweep_every is None else manager.sweeper(sweep_every):
        yield
