"""PostgreSQL behind a real PgBouncer in transaction mode, which hands few sessions around."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import psycopg
import pytest

from tests import postgresql_servers as servers
from tests.postgresql_random import Calls, everything
from vtoken.backend import Hold, InsertMode, Match, Outcome, Use, UseHeld
from vtoken.testing.harness import MINUTE, NOW, a_token
from vtoken_backends.memory import MemoryBackend
from vtoken_backends.postgresql import PostgreSQLBackend

pytestmark = pytest.mark.skipif(servers.pooler_binary() is None, reason="no pgbouncer on the PATH")


@pytest.fixture
def store() -> Iterator[str]:
    schema = servers.new_schema()
    with servers.pooler(servers.shared_url(), 3) as url:
        yield servers.with_schema(url, schema)
    servers.drop_schema(servers.shared_url(), schema)


async def test_it_answers_as_memory_does(store: str) -> None:
    backend, memory = PostgreSQLBackend.from_url(store), MemoryBackend()
    await backend.open()
    await memory.open()
    calls = Calls(seed=1)
    for _ in range(300):
        call = calls.call()
        assert await call.on(backend) == await call.on(memory), call.name
    assert await everything(backend) == await everything(memory)
    await backend.close()


async def test_many_clients_share_few_sessions(store: str) -> None:
    """Two applications use the same tokens at once, and the pooler gives each transaction any session."""
    backends = [PostgreSQLBackend.from_url(store) for _ in range(2)]
    for backend in backends:
        await backend.open()
    tokens = [a_token(object_id=str(number)) for number in range(200)]
    await asyncio.gather(
        *(backends[n % 2].insert(token, InsertMode.REPLACE) for n, token in enumerate(tokens))
    )
    uses = [
        backend.present(Match(digests=(token.keys[0].digest,)), Use(at=NOW), NOW)
        for token in tokens
        for backend in backends
    ]
    answers = await asyncio.gather(*uses)
    for first, second in zip(answers[::2], answers[1::2], strict=True):
        assert {first.outcome, second.outcome} == {Outcome.RIGHT, Outcome.REFUSED}
    for backend in backends:
        await backend.close()


async def test_a_transaction_of_the_applications_own(store: str) -> None:
    backend = PostgreSQLBackend.from_url(store)
    await backend.open()
    token = a_token()
    await backend.insert(token, InsertMode.REPLACE)
    hold = Hold(hold_id="mine", until=NOW + MINUTE)
    await backend.present(Match(digests=(token.keys[0].digest,)), hold, NOW)
    url = store.partition("?")[0]
    async with (
        await psycopg.AsyncConnection.connect(url, prepare_threshold=None) as connection,
        connection.transaction(),
    ):
        used = await backend.within(connection).update(Match(id=token.id), UseHeld(hold_id="mine", at=NOW))
        assert used is not None
    [stored] = await backend.find(Match(id=token.id), 1)
    assert stored.uses == 1
    await backend.close()
