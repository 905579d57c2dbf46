"""Kills of an application between its statements and its commit: the password is new if the token is used."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import psycopg
import pytest

from tests import postgresql_servers as servers
from tests.postgresql_worker import manager_of
from vtoken import Subject

from . import killed


@pytest.fixture
async def store() -> AsyncIterator[str]:
    url = servers.shared_url()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS passwords; CREATE TABLE passwords (new text PRIMARY KEY)")
    with servers.fresh_store(url) as made:
        yield made


async def test_the_password_is_new_if_and_only_if_the_token_is_used(store: str) -> None:
    dice = random.Random(11)  # noqa: S311  # which moment is chosen is no secret
    server = servers.shared_url()
    async with manager_of(store) as manager:
        for kill in range(killed.KILLS):
            people = [f"{kill}-{number}" for number in range(killed.PEOPLE)]
            tokens = [await manager.issue(Subject("auth.user", one), "password-reset") for one in people]
            lines = [f"{one} {token.key}\n" for one, token in zip(people, tokens, strict=True)]
            step = dice.randrange(1, killed.LATEST)
            seen = killed.killed_at(step, "tests.postgresql_worker", store, server, lines=lines)
            ids = [token.id for token in tokens]

            async def used(ids: list[str] = ids) -> set[str]:
                stored = [await manager.get(one) for one in ids]
                return {token.object_id for token in stored if token is not None and token.uses}

            async def changed(people: list[str] = people) -> set[str]:
                with psycopg.connect(server) as connection:
                    found = connection.execute("SELECT new FROM passwords").fetchall()
                return {name for (name,) in found} & set(people)

            await killed.check(seen, used, changed)
