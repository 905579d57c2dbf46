"""Kills of an application between its commands and its commit: the password is new if the token is used."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from pymongo import AsyncMongoClient

from tests import servers
from tests.mongodb_worker import manager_of
from vtoken import Subject

from . import killed


@pytest.fixture(scope="module")
def server(mongodb_replica_set: str) -> Iterator[str]:
    """A server of this module's own: a killed application leaves a transaction open, for a minute and more,
    and as long nobody can drop the database."""
    assert mongodb_replica_set, "where no server can be had, this has said so"
    with servers.start_mongod("vtoken") as made:
        yield made.url


async def test_the_password_is_new_if_and_only_if_the_token_is_used(server: str, mongodb_driver: str) -> None:
    dice = random.Random(11)  # noqa: S311  # which moment is chosen is no secret
    store = servers.with_database(server, mongodb_driver)
    async with AsyncMongoClient[Any](store) as client, manager_of(client) as manager:
        passwords = client.get_default_database()["passwords"]
        for kill in range(killed.KILLS):
            people = [f"{kill}-{number}" for number in range(killed.PEOPLE)]
            tokens = [await manager.issue(Subject("auth.user", one), "password-reset") for one in people]
            lines = [f"{one} {token.key}\n" for one, token in zip(people, tokens, strict=True)]
            step = dice.randrange(1, killed.LATEST)
            seen = killed.killed_at(step, "tests.mongodb_worker", store, mongodb_driver, lines=lines)
            ids = [token.id for token in tokens]

            async def used(ids: list[str] = ids) -> set[str]:
                stored = [await manager.get(one) for one in ids]
                return {token.object_id for token in stored if token is not None and token.uses}

            async def changed(people: list[str] = people) -> set[str]:
                found = await passwords.find({"_id": {"$in": people}}).to_list()
                return {document["_id"] for document in found}

            await killed.check(seen, used, changed)
