"""ASGI applications served in the test's own process, with their lifespans."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

import httpx

Message = MutableMapping[str, Any]
App = Callable[[Any, Any, Any], Awaitable[None]]


@asynccontextmanager
async def serving(app: App) -> AsyncGenerator[httpx.AsyncClient]:
    """Start an application, yield a client for it, and shut it down.

    Raises:
        AssertionError: the application has failed to start or to shut down; the message says why.
    """
    state: dict[str, Any] = {}
    questions: asyncio.Queue[Message] = asyncio.Queue()
    answers: asyncio.Queue[Message] = asyncio.Queue()
    scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": state}
    lifespan = asyncio.ensure_future(app(scope, questions.get, answers.put))

    async def ask(what: str) -> None:
        await questions.put({"type": f"lifespan.{what}"})
        answer = await answers.get()
        if answer["type"] != f"lifespan.{what}.complete":
            await asyncio.gather(lifespan, return_exceptions=True)
            raise AssertionError(answer)

    async def with_state(scope: Message, receive: Any, send: Any) -> None:
        await app({**scope, "state": dict(state)}, receive, send)

    await ask("startup")
    try:
        transport = httpx.ASGITransport(with_state)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client
    finally:
        await ask("shutdown")
        await lifespan
