"""Kills of an application between its statements and its commit: the password is new if the token is used."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Final

import psycopg
import pytest

from tests import postgresql_servers as servers
from tests.postgresql_worker import manager_of
from vtoken import IssuedToken, Subject, TokenManager

KILLS: Final = int(os.environ.get("VTOKEN_TEST_KILLS", "3"))
"""How often the application is killed; more kills find rarer moments."""
PEOPLE: Final = 25


@pytest.fixture
async def store() -> AsyncIterator[str]:
    url = servers.shared_url()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS passwords; CREATE TABLE passwords (new text PRIMARY KEY)")
    with servers.fresh_store(url) as made:
        yield made


def killed_at(step: int, store: str, lines: list[str]) -> list[str]:
    """Run the application until it has written so many lines, kill it, and return those."""
    command = [sys.executable, "-m", "tests.postgresql_worker", store, servers.shared_url()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("".join(lines))
        process.stdin.close()
        seen = [process.stdout.readline().strip() for _ in range(step)]
        process.kill()
        return [*seen, *process.stdout.read().split("\n")]


async def test_the_password_is_new_if_and_only_if_the_token_is_used(store: str) -> None:
    dice = random.Random(11)  # noqa: S311  # which moment is chosen is no secret
    moments = set[str]()
    async with manager_of(store) as manager:
        for kill in range(KILLS):
            people = [f"{kill}-{number}" for number in range(PEOPLE)]
            tokens = [await manager.issue(Subject("auth.user", one), "password-reset") for one in people]
            lines = [f"{one} {token.key}\n" for one, token in zip(people, tokens, strict=True)]
            seen = killed_at(dice.randrange(1, 3 * PEOPLE), store, lines)
            moments.add(next(line for line in reversed(seen) if line).split()[0])
            with psycopg.connect(servers.shared_url()) as connection:
                changed = {row[0] for row in connection.execute("SELECT new FROM passwords").fetchall()}
            used = {one for one, token in zip(people, tokens, strict=True) if await uses_of(manager, token)}
            assert used == changed & set(people)
            acknowledged = {line.split()[1] for line in seen if line.startswith("done")}
            assert acknowledged <= used
    assert moments <= {"open", "held", "flushed", "done"}


async def uses_of(manager: TokenManager, token: IssuedToken) -> int:
    found = await manager.get(token.id)
    assert found is not None
    return found.uses
