"""Signing in and out, and invitations, by which accounts are made."""

from __future__ import annotations

from typing import Annotated

import anyio
from fastapi import APIRouter, Depends, Form, Request, Response
from fastapi.responses import RedirectResponse
from vtoken import InvalidToken, TokenBusy, TokenManager

from password_reset import passwords
from password_reset.accounts import AddressTaken, Change
from password_reset.pages import (
    SESSION,
    Account,
    Application,
    Manager,
    Text,
    cookie_name,
    page,
    same_browser,
    set_cookie,
)
from password_reset.tokens import INVITATION, TEAM, normalised

router = APIRouter()
_forms = APIRouter(dependencies=[Depends(same_browser)])


@router.get("/")
async def home(request: Request, account: Account) -> Response:
    return page(request, "home", account=account)


@_forms.post("/sign-in")
async def sign_in(
    request: Request, parts: Application, email: Text, password: Annotated[str, Form()]
) -> Response:
    whose = normalised(email) or ""
    stored = await parts.accounts.password(whose)
    compared = stored or passwords.NOBODYS
    if not await anyio.to_thread.run_sync(passwords.matches, password, compared) or stored is None:
        return page(request, "home", 400, problem="Wrong e-mail address or password.")
    key = await parts.accounts.start_session(whose, stored, parts.clock().timestamp())
    response = RedirectResponse("/", 303)
    set_cookie(response, parts.config, SESSION, key)
    return response


@_forms.post("/sign-out")
async def sign_out(request: Request, parts: Application) -> Response:
    await parts.accounts.end_session(request.state.cookie(SESSION) or "")
    response = RedirectResponse("/", 303)
    response.delete_cookie(
        cookie_name(parts.config, SESSION), secure=parts.config.is_https, httponly=True, samesite="lax"
    )
    return response


async def invitation(manager: TokenManager, base_url: str) -> str:
    """The link of a new invitation; an older one ends."""
    token = await manager.issue(TEAM, INVITATION)
    return f"{base_url}/join?key={token.key}"


@_forms.post("/invitations")
async def invite(request: Request, manager: Manager, parts: Application, account: Account) -> Response:
    if account is None:
        return page(request, "home", 403, problem="Sign in first.")
    return page(request, "invitation", link=await invitation(manager, parts.config.base_url))


@router.get("/join")
async def check_invitation(request: Request, manager: Manager, key: str = "") -> Response:
    try:
        await manager.verify(TEAM, INVITATION, key)
    except InvalidToken:
        return page(request, "not_valid", 400)
    return page(request, "join", key=key)


@_forms.post("/join")
async def join(
    request: Request,
    manager: Manager,
    parts: Application,
    key: Text,
    email: Text,
    password: Annotated[str, Form()],
) -> Response:
    whose = normalised(email)
    problem = "That is no e-mail address." if whose is None else passwords.problem_of(password)
    if whose is None or problem:
        return page(request, "join", 400, key=key, problem=problem)
    try:
        await manager.verify(TEAM, INVITATION, key)
        made = await anyio.to_thread.run_sync(
            passwords.hashed, password
        )  # before, so that the lease is short
        async with manager.redeem(TEAM, INVITATION, key) as token:

            async def change(accounts: Change) -> None:
                await accounts.add(whose, made)  # an address that is taken gives the use back
                await manager.mark_used(token, using=accounts.handle)

            await parts.accounts.in_transaction(change)
    except AddressTaken:  # who was invited may know; strangers don't get here
        return page(request, "join", 400, key=key, problem="That address has an account already.")
    except TokenBusy:  # an invitation has three uses, and three people are joining just now
        return page(request, "join", 409, key=key, problem="Others are joining just now. Try again.")
    except InvalidToken:
        return page(request, "not_valid", 400)
    return page(request, "joined")


router.include_router(_forms)
