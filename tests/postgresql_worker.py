"""An application that sets passwords and uses tokens in one transaction each, until somebody kills it.

``python -m tests.postgresql_worker STORE SERVER`` reads lines of "person key" and writes a line for each
step.
"""

from __future__ import annotations

import asyncio
import sys

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from tests.core_tools import START
from vtoken import Settings, Subject, TokenManager, TokenPolicy
from vtoken.testing.clock import Clock

POLICY = TokenPolicy.link("password-reset")


def manager_of(store: str) -> TokenManager:
    return TokenManager.from_url(store, settings=Settings(), policies=[POLICY], clock=Clock(START))


def say(step: str, person: str) -> None:
    print(step, person, flush=True)


async def main(store: str, server: str) -> None:
    engine = create_async_engine(server.replace("postgresql://", "postgresql+psycopg://"))
    async with manager_of(store) as manager:
        say("open", "-")
        for line in sys.stdin:
            person, key = line.split()
            async with (
                manager.redeem(Subject("auth.user", person), "password-reset", key) as token,
                AsyncSession(engine) as session,
                session.begin(),
            ):
                say("held", person)
                await session.execute(text("INSERT INTO passwords VALUES (:person)"), {"person": person})
                await manager.mark_used(token, using=session)
                say("flushed", person)
            say("done", person)
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
