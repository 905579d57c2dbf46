"""Kills of an application between its statements and its commit: the user is there if the token is used.

``VTOKEN_TEST_KILLS=50 python -m pytest tests/test_sqlite_using_process.py`` is the long tier.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Final

from tests.sqlite_using_worker import manager_of
from vtoken import IssuedToken, Subject, TokenManager

from .sqlite_tools import plain

KILLS: Final = int(os.environ.get("VTOKEN_TEST_KILLS", "3"))
"""How often the application is killed; more kills find rarer moments."""
PEOPLE: Final = 25


def killed_at(step: int, path: Path, lines: list[str]) -> list[str]:
    """Run the application until it has written so many lines, kill it, and return all that it wrote."""
    command = [sys.executable, "-m", "tests.sqlite_using_worker", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("".join(lines))
        process.stdin.close()
        seen = [process.stdout.readline().strip() for _ in range(step)]
        process.kill()
        return [*seen, *process.stdout.read().splitlines()]


async def test_the_user_is_there_if_and_only_if_the_token_is_used(tmp_path: Path) -> None:
    dice = random.Random(11)  # noqa: S311  # which moment is chosen is no secret
    moments = Counter[str]()
    path = tmp_path / "app.db"
    with plain(path) as database:
        database.execute("CREATE TABLE users (name TEXT PRIMARY KEY)")
    for kill in range(KILLS):
        people = [f"{kill}-{number}" for number in range(PEOPLE)]
        async with manager_of(str(path)) as manager:
            tokens = [await manager.issue(Subject("auth.user", one), "reset") for one in people]
        lines = [f"{one} {token.key}\n" for one, token in zip(people, tokens, strict=True)]
        seen = killed_at(dice.randrange(1, 2 * PEOPLE), path, lines)
        moments[seen[-1].split()[0]] += 1
        with plain(path) as database:
            found = {name for (name,) in database.execute("SELECT name FROM users").fetchall()}
        async with manager_of(str(path)) as manager:
            used = {one for one, token in zip(people, tokens, strict=True) if await uses_of(manager, token)}
        assert used == found & set(people)
        acknowledged = {line.split()[1] for line in seen if line.startswith("done")}
        assert acknowledged <= used
        assert len(used) < PEOPLE, "it was not killed amid its work"
    assert moments.total() == KILLS
    print("the last that it said:", dict(moments))


async def uses_of(manager: TokenManager, token: IssuedToken) -> int:
    found = await manager.get(token.id)
    assert found is not None
    return found.uses
