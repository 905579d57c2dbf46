"""Kills of an application between its commands and its commit: the password is new if the token is used."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from typing import Any, Final

from pymongo import AsyncMongoClient

from tests import servers
from tests.mongodb_worker import manager_of
from vtoken import Subject

KILLS: Final = int(os.environ.get("VTOKEN_TEST_KILLS", "3"))
"""How often the application is killed; more kills find rarer moments."""
PEOPLE: Final = 25


def killed_at(step: int, store: str, driver: str, lines: list[str]) -> list[str]:
    """Run the application until it has written so many lines, kill it, and return those."""
    command = [sys.executable, "-m", "tests.mongodb_worker", store, driver]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("".join(lines))
        process.stdin.close()
        seen = [process.stdout.readline().strip() for _ in range(step)]
        process.kill()
        return [*seen, *process.stdout.read().split("\n")]


async def test_the_password_is_new_if_and_only_if_the_token_is_used(
    mongodb_replica_set: str, mongodb_driver: str
) -> None:
    dice = random.Random(11)  # noqa: S311  # which moment is chosen is no secret
    moments = set[str]()
    with servers.fresh_database(mongodb_replica_set) as store:
        async with AsyncMongoClient[Any](store) as client, manager_of(client) as manager:
            for kill in range(KILLS):
                people = [f"{kill}-{number}" for number in range(PEOPLE)]
                tokens = [await manager.issue(Subject("auth.user", one), "password-reset") for one in people]
                lines = [f"{one} {token.key}\n" for one, token in zip(people, tokens, strict=True)]
                seen = killed_at(dice.randrange(1, 3 * PEOPLE), store, mongodb_driver, lines)
                moments.add(next(line for line in reversed(seen) if line).split()[0])
                found = await client.get_default_database()["passwords"].find().to_list()
                changed = {document["_id"] for document in found}
                stored = [await manager.get(token.id) for token in tokens]
                used = {one for one, token in zip(people, stored, strict=True) if token and token.uses}
                assert used == changed & set(people)
                acknowledged = {line.split()[1] for line in seen if line.startswith("done")}
                assert acknowledged <= used
    assert moments <= {"open", "held", "flushed", "done"}
