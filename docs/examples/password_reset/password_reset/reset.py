"""A new password, by the link or by the code of one message.

GET only ever checks, because mail scanners and previews open links. POST redeems.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from typing import Annotated

import anyio
from fastapi import APIRouter, Depends, Form, Request, Response
from vtoken import (
    AlreadyUsed,
    CooldownActive,
    InvalidToken,
    Subject,
    TokenBusy,
    TokenManager,
    TooManyAttempts,
    VerificationToken,
)

from password_reset import passwords
from password_reset.accounts import Change
from password_reset.pages import Application, Manager, Parts, Text, page, same_browser, set_cookie
from password_reset.tokens import ANY_ADDRESS, RESET, address, normalised

router = APIRouter()
_forms = APIRouter(dependencies=[Depends(same_browser)])

_DONE = "done"
"""A cookie: the id of the token by which this browser has changed a password."""


@router.get("/forgot")
async def forgot(request: Request) -> Response:
    return page(request, "forgot")


@_forms.post("/forgot")
async def send(request: Request, manager: Manager, parts: Application, email: Text) -> Response:
    wanted = normalised(email)
    if wanted is None:
        return page(request, "forgot", 400, problem="That is no e-mail address.")
    await _send(request, manager, parts, wanted)
    return await _code_page(request, manager, parts, wanted)


async def _send(request: Request, manager: TokenManager, parts: Parts, email: str) -> None:
    """Issue a token and have it sent; for an address without an account do the same and send nothing.

    Both take as long, meet the same limits and lead to the same page.
    """
    parts.outbox.require_room()
    is_known = await parts.accounts.password(email) is not None
    try:
        if is_known:
            parts.outbox.send(email, await manager.issue(address(email), RESET, by=_by(request)))
        else:
            await manager.pretend(address(email), RESET, by=_by(request))
            parts.outbox.send(email, None)
    except CooldownActive:
        pass  # the page says when the next message can be sent


async def _code_page(
    request: Request,
    manager: TokenManager,
    parts: Parts,
    email: str,
    status: int = 200,
    problem: str | None = None,
) -> Response:
    """The page for a code, with the attempts that are left and the time until another message."""
    now = await manager.status(address(email), RESET, by=_by(request))
    wait = math.ceil((now.can_issue_at - parts.clock()).total_seconds())
    return page(
        request,
        "code",
        status,
        email=email,
        problem=problem,
        attempts_left=now.attempts_left,
        resend_in=f"{wait // 60}:{wait % 60:02}" if wait > 0 else None,
    )


@_forms.post("/code")
async def reset_by_code(
    request: Request,
    manager: Manager,
    parts: Application,
    email: Text,
    code: Text,
    password: Annotated[str, Form()],
) -> Response:
    whose = normalised(email)
    if whose is None:
        return page(request, "forgot", 400, problem="That is no e-mail address.")
    weak = passwords.problem_of(password)
    if weak:
        return await _code_page(request, manager, parts, whose, 400, weak)
    try:
        return await _redeem(request, manager, parts, address(whose), code, password)
    except TooManyAttempts as error:
        minutes = math.ceil(error.retry_after / 60)
        many = f"Too many codes. Wait {minutes} minutes."
        response = await _code_page(request, manager, parts, whose, 429, many)
        response.headers["Retry-After"] = str(math.ceil(error.retry_after))
        return response
    except TokenBusy:
        return await _code_page(request, manager, parts, whose, 409, "This code is being used. Try again.")
    except InvalidToken:
        return await _code_page(request, manager, parts, whose, 400, "That code is not valid.")


@router.get("/reset")
async def check_link(request: Request, manager: Manager, key: str = "") -> Response:
    try:
        token = await manager.verify(ANY_ADDRESS, RESET, key)
    except TokenBusy:
        return page(request, "problem", 409, problem="This link is being used. Try again in a minute.")
    except InvalidToken as error:
        return _over(request, key, error.token)
    return page(request, "reset", key=key, email=token.object_id)


@_forms.post("/reset")
async def reset_by_link(
    request: Request, manager: Manager, parts: Application, key: Text, password: Annotated[str, Form()]
) -> Response:
    weak = passwords.problem_of(password)
    try:
        if weak:  # this costs nothing: the link stays good
            token = await manager.verify(ANY_ADDRESS, RESET, key)
            return page(request, "reset", 400, key=key, email=token.object_id, problem=weak)
        return await _redeem(request, manager, parts, ANY_ADDRESS, key, password)
    except TokenBusy:
        return page(request, "problem", 409, problem="This link is being used. Try again in a minute.")
    except InvalidToken as error:
        return _over(request, key, error.token)


@_forms.post("/again")
async def send_another(request: Request, manager: Manager, parts: Application, key: Text) -> Response:
    """A link that was right but is over: another one goes to whom the first one belonged."""
    try:
        owner = (await manager.verify(ANY_ADDRESS, RESET, key)).object_id
    except InvalidToken as error:
        if error.token is None:
            return page(request, "not_valid", 400, again="/forgot")
        owner = error.token.object_id
    await _send(request, manager, parts, owner)
    return await _code_page(request, manager, parts, owner)


async def _redeem(
    request: Request, manager: TokenManager, parts: Parts, whose: Subject, key: str, password: str
) -> Response:
    """Set the password and use the token by one commit: both happen, or neither.

    Whatever matters for security is done inside of the block, because what comes after it might be made to
    fail on purpose.
    """
    hashed = await anyio.to_thread.run_sync(passwords.hashed, password)  # before, so that the lease is short
    try:
        async with manager.redeem(
            whose, RESET, key, consume_id=_consume_id(request, parts, key), by=_by(request)
        ) as token:
            email = token.object_id

            async def change(accounts: Change) -> None:
                await accounts.set_password(email, hashed)  # and end its sessions
                await manager.mark_used(token, using=accounts.handle)
                # No other link may outlive the password.
                await manager.deactivate(address(email), using=accounts.handle)

            await parts.accounts.in_transaction(change)
            parts.outbox.notify(email)
    except AlreadyUsed as error:  # the same form a second time
        return page(request, "changed", done=error.token is not None)
    response = page(request, "changed")
    set_cookie(response, parts.config, _DONE, token.id)
    return response


def _over(request: Request, key: str, token: VerificationToken | None) -> Response:
    """A link that is not good, or not any more."""
    if token is None:
        return page(request, "not_valid", 400, again="/forgot")
    cookie = request.state.cookie(_DONE)
    if token.uses and cookie is not None and hmac.compare_digest(cookie, token.id):
        return page(request, "changed", done=True)
    return page(request, "over", 400, key=key)


def _consume_id(request: Request, parts: Parts, key: str) -> str:
    """A name for this use, which the same form in the same browser has again, and nobody can guess."""
    message = f"{request.state.browser}:{key}".encode(errors="replace")
    return hmac.new(parts.config.secret.encode(), b"consume:" + message, hashlib.sha256).hexdigest()


def _by(request: Request) -> dict[str, str]:
    """What limits by address count by. Behind a proxy, let uvicorn know it (``--forwarded-allow-ips``)."""
    return {"ip": request.client.host if request.client else "unknown"}


router.include_router(_forms)
