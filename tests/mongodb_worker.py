"""An application that sets passwords and uses tokens in one transaction each, until somebody kills it.

``python -m tests.mongodb_worker STORE DRIVER`` reads lines of "person key" and writes a line for each step.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import AsyncMongoClient

from tests.core_tools import START
from vtoken import Settings, Subject, TokenManager, TokenPolicy
from vtoken.testing.clock import Clock
from vtoken_backends.mongodb import MongoDBBackend

POLICY = TokenPolicy.link("password-reset")


def manager_of(client: Any) -> TokenManager:
    backend = MongoDBBackend(client)
    return TokenManager(backend, settings=Settings(), policies=[POLICY], clock=Clock(START))


def say(step: str, person: str) -> None:
    print(step, person, flush=True)


async def set_password(client: Any, manager: TokenManager, person: str, key: str) -> None:
    passwords = client.get_default_database()["passwords"]
    async with manager.redeem(Subject("auth.user", person), "password-reset", key) as token:

        async def change(session: Any) -> None:
            say("held", person)
            await passwords.insert_one({"_id": person}, session=session)
            await manager.mark_used(token, using=session)
            say("flushed", person)

        session = client.start_session()
        async with session if isinstance(client, AsyncMongoClient) else await session as opened:
            await opened.with_transaction(change)
    say("done", person)


async def main(store: str, driver: str) -> None:
    client: Any = AsyncMongoClient(store) if driver == "pymongo" else AsyncIOMotorClient(store)
    async with manager_of(client) as manager:
        say("open", "-")
        for line in sys.stdin:
            await set_password(client, manager, *line.split())
    if driver == "pymongo":
        await client.close()
    else:
        client.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
