"""An application that adds users and uses tokens in one transaction each, until somebody kills it.

``python -m tests.sqlite_using_worker FILE`` reads lines of "person key" and writes a line for each step.
"""

from __future__ import annotations

import asyncio
import sys

import aiosqlite

from tests.core_tools import START
from vtoken import Subject, TokenManager
from vtoken.testing.clock import Clock
from vtoken_backends.sqlite import SQLiteBackend


def manager_of(path: str) -> TokenManager:
    return TokenManager(SQLiteBackend(path, shared=True), clock=Clock(START))


def say(step: str, person: str) -> None:
    print(step, person, flush=True)


async def main(path: str) -> None:
    async with manager_of(path) as manager, aiosqlite.connect(path) as application:
        say("open", "-")
        for line in sys.stdin:
            person, key = line.split()
            async with manager.redeem(Subject("auth.user", person), "reset", key) as token:
                say("held", person)
                await application.execute("BEGIN IMMEDIATE")
                await application.execute("INSERT INTO users VALUES (?)", (person,))
                await manager.mark_used(token, using=application)
                say("flushed", person)
                await application.commit()
            say("done", person)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
