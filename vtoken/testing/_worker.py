"""One of the processes that the durable cases run against a store: a job a line in, an answer a line out.

Usage: ``python -m vtoken.testing._worker package.module:Suite STORE``
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from importlib import import_module
from operator import attrgetter
from typing import Any

from vtoken.errors import InvalidToken, TooManyAttempts
from vtoken.manager import TokenManager
from vtoken.policy import Settings
from vtoken.subject import Subject
from vtoken.testing._bench import NOW, SECRET, USER, Suite, at_once, race
from vtoken.testing._limits import CODE, SLUG

Job = dict[str, Any]


def tell(answer: object) -> None:
    """Acknowledge: once this line is out, what it tells must not be lost."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


async def consume(manager: TokenManager, job: Job) -> int:
    won, _ = await race(
        [manager.consume(USER, job["slug"], job["key"]) for _ in range(job["tasks"])], InvalidToken
    )
    return len(won)


async def issue(manager: TokenManager, job: Job) -> list[str]:
    calls = [manager.deactivate_and_create(USER, job["slug"]) for _ in range(job["tasks"])]
    return [token.key for token in await at_once(calls)]


async def get_or_create(manager: TokenManager, job: Job) -> list[str]:
    calls = [manager.get_active_or_create(USER, job["slug"]) for _ in range(job["tasks"])]
    return [token.id for token in await at_once(calls)]


async def guess(manager: TokenManager, job: Job) -> int:
    """How many wrong guesses were compared."""

    async def compared() -> bool:
        try:
            await manager.verify(USER, SLUG, "not a code")
        except InvalidToken as error:
            return not isinstance(error, TooManyAttempts)
        raise AssertionError("a wrong code passed")

    return sum(await at_once(compared() for _ in range(job["tasks"])))


async def storm(manager: TokenManager, job: Job) -> None:
    """Issue, consume, issue, replace, for one object after the other, until the process is killed."""
    number = 0
    while True:
        number += 1
        subject = Subject("auth.user", f"{job['name']}-{number}")
        first = await manager.deactivate_and_create(subject, "reset")
        tell([subject.object_id, "issued", first.key])
        await manager.consume(subject, "reset", first.key)
        tell([subject.object_id, "used", first.key])
        second = await manager.deactivate_and_create(subject, "reset")
        tell([subject.object_id, "issued", second.key])
        third = await manager.deactivate_and_create(subject, "reset")
        tell([subject.object_id, "replaced", third.key])


async def hold(manager: TokenManager, job: Job) -> None:
    """Lease a token, and go on holding it until the process is killed."""
    async with manager.redeem(USER, job["slug"], job["key"]):
        tell("leased")
        await asyncio.Event().wait()


JOBS: dict[str, Callable[[TokenManager, Job], Awaitable[object]]] = {
    job.__name__: job for job in (consume, issue, get_or_create, guess, storm, hold)
}


async def main(suite: Suite, store: str) -> None:
    manager = TokenManager(
        suite.backend(store),
        settings=Settings(secret=SECRET),
        policies=[CODE],
        clock=lambda: datetime.fromtimestamp(NOW / 1000, UTC),
    )
    async with manager:
        tell("ready")
        while line := await asyncio.to_thread(sys.stdin.readline):
            job = json.loads(line)
            tell(await JOBS[job["do"]](manager, job))


if __name__ == "__main__":
    module, _, name = sys.argv[1].partition(":")
    asyncio.run(main(attrgetter(name)(import_module(module))(), sys.argv[2]))
