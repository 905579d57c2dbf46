"""One of the processes that the durable cases run against a store: a job a line in, an answer a line out.

Usage: ``python -m vtoken.testing.worker package.module:Suite``. It is told which store to open first.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from importlib import import_module
from operator import attrgetter
from typing import Any

from vtoken.backend import (
    Hold,
    InsertMode,
    Match,
    Outcome,
    SetExtraData,
    TokenBackend,
    Use,
)
from vtoken.errors import InvalidToken, TooManyAttempts
from vtoken.manager import TokenManager
from vtoken.policy import Settings
from vtoken.subject import Subject
from vtoken.testing.harness import (
    CODE,
    MINUTE,
    NOW,
    SECRET,
    SLUG,
    USER,
    Suite,
    a_budget,
    a_digest,
    a_spend,
    a_token,
    at_once,
    race,
)

Job = dict[str, Any]


def tell(answer: object) -> None:
    """Acknowledge: once this line is out, what it tells must not be lost."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


async def consume(manager: TokenManager, job: Job) -> int:
    calls = [manager.consume(USER, job["slug"], job["key"]) for _ in range(job["tasks"])]
    won, _ = await race(calls, InvalidToken)
    return len(won)


async def issue(manager: TokenManager, job: Job) -> list[str]:
    return [
        token.key for token in await at_once(manager.issue(USER, job["slug"]) for _ in range(job["tasks"]))
    ]


async def get_or_create(manager: TokenManager, job: Job) -> list[str]:
    calls = [manager.get_active_or_create(USER, job["slug"]) for _ in range(job["tasks"])]
    return [token.id for token in await at_once(calls)]


async def wrong_codes(manager: TokenManager, job: Job) -> int:
    """How many wrong codes were compared."""
    subject = Subject("auth.user", job["object"])

    async def compared(wrong: str) -> bool:
        try:
            await manager.verify(subject, SLUG, wrong)
        except InvalidToken as error:
            return not isinstance(error, TooManyAttempts)
        return True  # one in a million is right by chance, and was compared as well

    return sum(await at_once(compared(f"{n:06}") for n in range(job["tasks"])))


async def race_for_uses(manager: TokenManager, job: Job) -> tuple[int, int, int]:
    """Use, hold and save one token, and spend from two budgets; how many uses, holds and spendings were
    allowed."""
    backend, number = manager.backend, job["number"]
    key = Match(digests=(a_digest(f"raced {number}"),))
    limited, kept = (a_spend(a_budget(f"{name} {number}"), n) for name, n in (("limit", 4), ("kept", 9_999)))

    async def one(n: int) -> tuple[bool, bool, bool]:
        used = await backend.present(key, Use(at=NOW, use_id=f"{os.getpid()} {n}"), NOW)
        await backend.update(key, SetExtraData("saved"))
        charges = [await backend.spend((kept,), NOW) for _ in range(2)]
        held = await backend.present(key, Hold(hold_id=f"{os.getpid()} {n}", until=NOW + MINUTE), NOW)
        spending = await backend.spend((limited,), NOW)
        await backend.refund(charges[0].charges)
        right = Outcome.RIGHT
        return used.outcome is right, held.outcome is right, spending.full is None

    uses, holds, spendings = zip(*await at_once(one(n) for n in range(job["tasks"])), strict=True)
    return sum(uses), sum(holds), sum(spendings)


async def insert(manager: TokenManager, job: Job) -> list[tuple[str, str]]:
    """Insert tokens into one line in every mode; their digests, and how each insert ended."""
    backend, number = manager.backend, job["number"]
    modes = [*InsertMode, InsertMode.REPLACE]

    async def one(n: int) -> tuple[str, str]:
        mode = modes[n % len(modes)]
        name = f"{os.getpid()} {number} {n}"
        digest = a_digest(f"once {number}" if mode is InsertMode.ONCE else name)
        token = a_token(
            {"digest": digest},
            id=f"{(os.getpid() << 24) + number * 1000 + n:016x}",
            object_id=f"{number}",
            is_beside=mode is InsertMode.ADD,
        )
        inserted = await backend.insert(
            token,
            mode,
            keep_until=NOW + n % 2 * MINUTE,
            wanted_until=NOW if mode is InsertMode.IF_NONE_VALID else 0,
        )
        await _tidy(backend)
        return digest.hex(), inserted.result.value

    return await at_once(one(n) for n in range(max(job["tasks"], len(modes))))


async def _tidy(backend: TokenBackend) -> None:
    purged = await backend.purge(NOW - 1, NOW, 9, 0)
    assert purged.tokens == 0, "what is due later was purged"


async def storm(manager: TokenManager, job: Job) -> None:
    """Issue, consume, issue, replace, for one object after the other, until the process is killed."""
    number = 0
    while True:
        number += 1
        subject = Subject("auth.user", f"{job['name']}-{number}")
        first = await manager.issue(subject, "reset")
        tell([subject.object_id, "issued", first.key])
        await manager.consume(subject, "reset", first.key)
        tell([subject.object_id, "used", first.key])
        second = await manager.issue(subject, "reset")
        tell([subject.object_id, "issued", second.key])
        third = await manager.issue(subject, "reset")
        tell([subject.object_id, "replaced", third.key])


async def hold(manager: TokenManager, job: Job) -> None:
    """Hold a token, and go on holding it until the process is killed."""
    async with manager.redeem(USER, job["slug"], job["key"]):
        tell("held")
        await asyncio.Event().wait()


JOBS: dict[str, Callable[[TokenManager, Job], Awaitable[object]]] = {
    job.__name__: job
    for job in (consume, issue, get_or_create, wrong_codes, race_for_uses, insert, storm, hold)
}


async def main(suite: Suite) -> None:
    """Serve one store after the other."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        await _serve(suite.backend(json.loads(line)["store"]))


async def _serve(backend: TokenBackend) -> None:
    manager = TokenManager(
        backend,
        settings=Settings(secret=SECRET),
        policies=[CODE],
        clock=lambda: datetime.fromtimestamp(NOW / 1000, UTC),
    )
    async with manager:
        tell("ready")
        while line := await asyncio.to_thread(sys.stdin.readline):
            job = json.loads(line)
            if job["do"] == "close":
                break
            tell(await JOBS[job["do"]](manager, job))
    tell("closed")


if __name__ == "__main__":
    module, _, name = sys.argv[1].partition(":")
    asyncio.run(main(attrgetter(name)(import_module(module))()))
