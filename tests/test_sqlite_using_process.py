"""Kills of an application between its statements and its commit: the user is there if the token is used.

``VTOKEN_TEST_KILLS=50 python -m pytest tests/test_sqlite_using_process.py`` is the long tier.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

from tests.sqlite_using_worker import manager_of
from vtoken import Subject

from . import killed
from .sqlite_tools import plain


async def test_the_user_is_there_if_and_only_if_the_token_is_used(tmp_path: Path) -> None:
    dice = random.Random(11)  # noqa: S311  # which moment is chosen is no secret
    moments = Counter[str]()
    path = tmp_path / "app.db"
    with plain(path) as database:
        database.execute("CREATE TABLE users (name TEXT PRIMARY KEY)")
    for kill in range(killed.KILLS):
        people = [f"{kill}-{number}" for number in range(killed.PEOPLE)]
        async with manager_of(str(path)) as manager:
            tokens = [await manager.issue(Subject("auth.user", one), "reset") for one in people]
        lines = [f"{one} {token.key}\n" for one, token in zip(people, tokens, strict=True)]
        step = dice.randrange(1, killed.LATEST)
        seen = killed.killed_at(step, "tests.sqlite_using_worker", str(path), lines=lines)
        moments[seen[-1].split()[0]] += 1
        ids = [token.id for token in tokens]

        async def used(ids: list[str] = ids) -> set[str]:
            async with manager_of(str(path)) as manager:
                stored = [await manager.get(one) for one in ids]
            return {token.object_id for token in stored if token is not None and token.uses}

        async def changed(people: list[str] = people) -> set[str]:
            with plain(path) as database:
                found = database.execute("SELECT name FROM users").fetchall()
            return {name for (name,) in found} & set(people)

        await killed.check(seen, used, changed)
    print("the last that it said:", dict(moments))
