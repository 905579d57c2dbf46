"""A new password, by a link or by a code.

GET only ever checks: mail scanners and previews open links. POST redeems.
"""

from __future__ import annotations

import math
from typing import Annotated

import anyio
from fastapi import APIRouter, Depends, Form, Request, Response
from vtoken import InvalidInput, InvalidToken, TooManyAttempts

from password_reset import passwords
from password_reset.outbox import Wanted
from password_reset.pages import Application, Manager, Parts, Text, page, same_browser
from password_reset.tokens import ANY_ADDRESS, CODE, RESET, address, normalised

router = APIRouter()
_forms = APIRouter(dependencies=[Depends(same_browser)])


@router.get("/forgot")
async def forgot(request: Request) -> Response:
    return page(request, "forgot")


@_forms.post("/forgot")
async def send_link(request: Request, parts: Application, email: Text) -> Response:
    wanted = normalised(email)
    if wanted is None:
        return page(request, "forgot", 400, problem="That is no e-mail address.")
    parts.outbox.ask(Wanted("link", wanted))
    return page(request, "sent", email=wanted)  # the same, whether or not there is such an account


@router.get("/reset")
async def check_link(request: Request, manager: Manager, key: str = "") -> Response:
    try:
        token = await manager.verify(ANY_ADDRESS, RESET, key)
    except (InvalidToken, InvalidInput):
        return _not_valid(request)
    return page(request, "reset", key=key, email=token.object_id)


@_forms.post("/reset")
async def reset_by_link(
    request: Request, manager: Manager, parts: Application, key: Text, password: Annotated[str, Form()]
) -> Response:
    problem = passwords.problem_of(password)
    try:
        if problem:  # costs nothing: the link stays good
            token = await manager.verify(ANY_ADDRESS, RESET, key)
            return page(request, "reset", 400, key=key, email=token.object_id, problem=problem)
        async with manager.redeem(ANY_ADDRESS, RESET, key) as token:
            await _set_password(parts, token.object_id, password)
    except (InvalidToken, InvalidInput):
        return _not_valid(request)
    return await _changed(request, manager, parts, token.object_id)


@router.get("/code")
async def forgot_by_code(request: Request) -> Response:
    return page(request, "code_ask")


@_forms.post("/code")
async def send_code(request: Request, parts: Application, email: Text) -> Response:
    wanted = normalised(email)
    if wanted is None:
        return page(request, "code_ask", 400, problem="That is no e-mail address.")
    parts.outbox.ask(Wanted("code", wanted, request.state.browser))
    return page(request, "code", email=wanted)


@_forms.post("/code/reset")
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
        return page(request, "code_ask", 400, problem="That is no e-mail address.")
    problem = passwords.problem_of(password)
    if problem:
        return page(request, "code", 400, email=whose, problem=problem)
    try:
        async with manager.redeem(address(whose), CODE, code, context=request.state.browser):
            await _set_password(parts, whose, password)
    except TooManyAttempts as error:
        minutes = math.ceil(error.retry_after / 60)
        response = page(request, "code", 429, email=whose, problem=f"Too many codes. Wait {minutes} minutes.")
        response.headers["Retry-After"] = str(math.ceil(error.retry_after))
        return response
    except (InvalidToken, InvalidInput):
        return page(request, "code", 400, email=whose, problem="That code is not valid.")
    return await _changed(request, manager, parts, whose)


async def _set_password(parts: Parts, email: str, password: str) -> None:
    await parts.accounts.set_password(email, await anyio.to_thread.run_sync(passwords.hashed, password))


async def _changed(request: Request, manager: Manager, parts: Parts, email: str) -> Response:
    """The other link or code must not outlive the password. A reset is no login."""
    await manager.deactivate(address(email))
    parts.outbox.ask(Wanted("changed", email))
    return page(request, "changed")


def _not_valid(request: Request) -> Response:
    return page(request, "not_valid", 400, again="/forgot")


router.include_router(_forms)
