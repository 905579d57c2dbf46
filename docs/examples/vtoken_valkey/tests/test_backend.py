"""What only this backend has: its entry point, a server that is killed, one that is not durable."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from vtoken import (
    BackendUnavailable,
    ConfigurationError,
    CorruptStore,
    InvalidInput,
    Subject,
    TokenManager,
    create_backend,
)

from servers import Server, client, fresh_store
from vtoken_valkey import ValkeyBackend

ADA = Subject("auth.user", "ada")


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[TokenManager]:
    async with TokenManager.from_url(url) as manager:
        yield manager


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await scenario()

    asyncio.run(main())


def test_the_scheme_is_known_once_the_package_is_installed() -> None:
    assert isinstance(create_backend("valkey://localhost:1/0"), ValkeyBackend)
    with pytest.raises(ConfigurationError, match="durable"):
        create_backend("valkey://localhost:1/0", durabel=True)
    with pytest.raises(ConfigurationError):
        create_backend("valkey://localhost:port/0")


def test_nobody_answers() -> None:
    async def scenario() -> None:
        backend = ValkeyBackend("valkey://:a-password@127.0.0.1:1/0")
        with pytest.raises(BackendUnavailable) as caught:
            await backend.open()
        assert "a-password" not in f"{caught.value!r} {backend!r}"
        assert caught.value.__cause__ is caught.value.__context__ is None

    run(scenario)


def test_what_was_acknowledged_survives_a_killed_server() -> None:
    async def scenario() -> None:
        with Server() as server:
            async with opened(f"{server.url}/0") as manager:
                used = await manager.issue(ADA, "reset")
                await manager.consume(ADA, "reset", used.key)
                token = await manager.issue(ADA, "reset")
                server.kill()
                server.start()
                assert not await manager.exists_valid(ADA, "reset", used.key)
                assert await manager.exists_valid(ADA, "reset", token.key)
                await manager.consume(
                    ADA, "reset", token.key
                )  # by a script that the new server does not know

    run(scenario)


def test_a_server_that_would_forget_is_refused() -> None:
    async def scenario() -> None:
        with Server("--appendonly", "no") as server:
            with pytest.raises(BackendUnavailable, match="append-only"):
                await create_backend(f"{server.url}/0").open()
            backend = create_backend(f"{server.url}/0", durable=False)
            await backend.open()
            await backend.close()

    run(scenario)


def test_a_store_that_is_damaged_says_so(server_url: str) -> None:
    async def scenario() -> None:
        store = fresh_store(server_url)
        async with opened(store) as manager:
            token = await manager.issue(ADA, "reset")
            raw = client(store)
            for key in raw.scan_iter("vtoken:object:*"):
                raw.set(key, b"no JSON")
            with pytest.raises(CorruptStore):
                await manager.consume(ADA, "reset", token.key)
            raw.delete("vtoken:schema")
            raw.close()
            with pytest.raises(CorruptStore):
                await manager.ping()

    run(scenario)


def test_there_are_no_transactions_to_share(server_url: str) -> None:
    async def scenario() -> None:
        async with opened(fresh_store(server_url)) as manager:
            with pytest.raises(InvalidInput, match="leave it out"):
                await manager.issue(ADA, "reset", using=object())

    run(scenario)
