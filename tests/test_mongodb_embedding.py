"""MongoDB in an application: its context variables, time limits and logs, and what it is told of a server."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pymongo
import pytest
from pymongo import AsyncMongoClient

from vtoken.backend import Budget, Match, Outcome, Spend
from vtoken.errors import BackendClosed, BackendError, BackendUnavailable, OutcomeUnknown
from vtoken_backends.mongodb import MongoDBBackend
from vtoken_backends.mongodb.failures import cause_of

from . import servers
from .mongodb_tools import (
    LATER,
    NOW,
    Commands,
    documents,
    failing,
    insert,
    key,
    of,
    opened,
    token,
    use,
)

# Context variables.


async def test_a_time_limit_of_one_caller_reaches_no_operation(mongodb_url: str) -> None:
    commands = Commands()
    async with AsyncMongoClient[Any](mongodb_url, event_listeners=[commands]) as client:
        backend = MongoDBBackend(client)
        await backend.open()
        spend = Spend(Budget(b"o" * 16, b"n" * 16), 5, 1000, 1000)
        with pymongo.timeout(0.000_001):  # shorter than anything takes
            await insert(backend, token(1))
            await asyncio.gather(*(insert(backend, of(n)) for n in range(2, 8)))
            await asyncio.gather(*(use(backend, n) for n in range(1, 8)))
            await backend.find(key(1), 1)
            await backend.find(Match(), 1)
            await backend.spend((spend,), NOW)
            await backend.deactivate(Match(), NOW)
            await backend.purge(NOW, NOW, 10, NOW)
            await backend.count(NOW)
            await backend.note("a", "b")
            await backend.ping()
            other = MongoDBBackend(client)
            await other.open()
            await other.close()
        await backend.close()
    limits = {limit for _, limit in commands.limits if limit is not None}
    assert min(limits) > 1_000


async def test_a_transaction_of_one_caller_reaches_no_operation(mongodb_replica_set: str) -> None:
    with servers.databases(mongodb_replica_set).one() as url:
        async with AsyncMongoClient[Any](url) as client, opened(url) as seen:
            backend = MongoDBBackend(client)
            await backend.open()
            async with client.start_session() as session:
                bind: Any = getattr(session, "bind", None)
                async with await session.start_transaction():
                    if bind is None:  # before PyMongo 4.17
                        await insert(backend, token(1))
                    else:
                        async with bind(end_session=False):
                            await insert(backend, token(1))
                            await asyncio.gather(*(insert(backend, of(n)) for n in range(2, 8)))
                    assert (await use(seen, 1)).outcome is Outcome.RIGHT
                    await session.abort_transaction()
            assert (await use(backend, 1)).outcome is Outcome.REFUSED
            await backend.close()


# Time limits.


async def test_a_look_up_is_left_at_once_while_the_server_hangs(mongodb_driver: str) -> None:
    if servers.declared_url():
        pytest.skip(f"{servers.DECLARED_URL} names a server that is not ours to suspend")
    with servers.start_mongod() as server:
        url = servers.with_database(server.url, "hangs")
        async with (
            # Whose own limits are far off: a look-up that ends before them was left, however busy we are.
            opened(url + limits(60_000), mongodb_driver) as backend,
            opened(url + limits(500), mongodb_driver) as hasty,
        ):
            await insert(backend, token(1))
            server.suspend()
            try:
                calls: list[Callable[[], Awaitable[object]]] = [
                    lambda: backend.find(key(1), 1),
                    lambda: backend.find(Match(), 1),
                    lambda: backend.present(key(1), None, LATER),
                    lambda: backend.count(NOW),
                    lambda: backend.budgets((Budget(b"o" * 16, b"n" * 16),)),
                    backend.ping,
                ]
                async with asyncio.timeout(40):
                    for call in calls:
                        with pytest.raises(TimeoutError):
                            async with asyncio.timeout(0.05):
                                await call()
                # A write is bounded, too.
                async with asyncio.timeout(40):
                    with pytest.raises((BackendUnavailable, OutcomeUnknown)):
                        await insert(hasty, token(2))
            finally:
                server.resume()


def limits(milliseconds: int) -> str:
    """The driver's time limits, as parameters of a URL."""
    names = ("socketTimeoutMS", "serverSelectionTimeoutMS", "connectTimeoutMS")
    return "".join([f"&{name}={milliseconds}" for name in names])


# Logs.


@pytest.mark.parametrize("driver", ["pymongo", "motor"])
async def test_the_command_log_hides_what_is_ours(
    mongodb_url: str, driver: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain = {"plain_key": "a-plain-key", "digest": b"0123456789abcdef" * 2}
    with caplog.at_level(logging.DEBUG, logger="pymongo.command"):
        async with opened(mongodb_url, driver) as backend:
            await insert(backend, token(1, key=plain))
            await asyncio.gather(*(insert(backend, of(n, key={"plain_key": "a-plain-key"})) for n in (2, 3)))
            presented = Match(digests=(plain["digest"],))  # type: ignore[arg-type]  # a dict of two types
            await backend.find(presented, 1)
            await backend.find(Match(), 10)
            await backend.deactivate(presented, NOW)
            with failing(mongodb_url, 1, "findAndModify", errorCode=13), pytest.raises(BackendError):
                await insert(backend, token(4, key=plain))
        with documents(mongodb_url) as stored:
            stored.database["theirs"].find_one({"name": "a-name-of-theirs"})
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert '"commandName": "findAndModify"' in said
    assert "a-name-of-theirs" in said
    for secret in ("a-plain-key", "MDEyMzQ1Njc4OWFiY2RlZjAx", "auth.user"):
        assert secret not in said


# What is told of a server.


async def told(url: str, driver: str = "pymongo") -> str:
    backend = MongoDBBackend.from_url(url, driver=driver)
    with pytest.raises(BackendUnavailable) as caught:
        await backend.open()
    assert caught.value.__context__ is None
    assert "pa55" not in str(caught.value)
    with pytest.raises(BackendClosed):
        await backend.find(Match(), 1)
    return str(caught.value)


_SOON = "serverSelectionTimeoutMS=300"


async def test_a_wrong_port_is_named(mongodb_driver: str) -> None:
    port = servers.free_port()
    said = await told(f"mongodb://user:pa55word@127.0.0.1:{port}/?{_SOON}", mongodb_driver)
    assert f"127.0.0.1:{port}: nothing listens on that port" in said


async def test_a_wrong_host_is_named(mongodb_driver: str) -> None:
    said = await told(f"mongodb://user:pa55word@nobody.invalid/?{_SOON}", mongodb_driver)
    assert "nobody.invalid:27017: there is no host of that name" in said


async def test_a_wrong_replica_set_is_named(mongodb_replica_set: str, mongodb_driver: str) -> None:
    if servers.declared_url():
        pytest.skip(f"{servers.DECLARED_URL} names a server whose set is not known")
    port = urlsplit(mongodb_replica_set).port
    said = await told(f"mongodb://127.0.0.1:{port}/?replicaSet=theirs&{_SOON}", mongodb_driver)
    assert "'theirs'" in said
    assert "replica set" in said


async def test_tls_that_the_server_lacks_is_named(mongodb_standalone: str, mongodb_driver: str) -> None:
    if servers.declared_url():
        pytest.skip(f"{servers.DECLARED_URL} names a server that may want TLS")
    port = urlsplit(mongodb_standalone).port
    said = await told(f"mongodb://127.0.0.1:{port}/?tls=true&directConnection=true&{_SOON}", mongodb_driver)
    assert f"127.0.0.1:{port}" in said
    assert "TLS" in said or "tls" in said


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        (str(ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1)")), "no TLS"),
        ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate", "known CA"),
        ("certificate verify failed: unable to get local issuer certificate", "known CA"),
        ("certificate verify failed: Hostname mismatch, certificate is not valid for 'db'", "another host"),
        ("certificate verify failed: certificate has expired", "not valid"),
        ("[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] tlsv13 alert certificate required", "our TLS certificate"),
        ("[Errno 111] Connection refused", "nothing listens"),
        ("[Errno -2] Name or service not known", "no host of that name"),
        ("127.0.0.1:1: connection closed", "closed the connection"),
        ("db:27017: timed out", "does not answer"),
        ("[Errno 113] No route to host", "no way to it"),
    ],
)
def test_causes_have_their_words(message: str, cause: str) -> None:
    assert cause in (cause_of(message) or "")


async def test_a_secondary_is_no_unknown_outcome(mongodb_driver: str) -> None:
    if servers.declared_url():
        pytest.skip(f"{servers.DECLARED_URL} names a server that is not ours")
    with servers.start_mongod("lonely", initiate=False) as server:  # it waits for a configuration
        said = await told(f"mongodb://127.0.0.1:{server.port}/?directConnection=true", mongodb_driver)
    assert "not the primary" in said


def test_a_ca_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    backend = MongoDBBackend.from_url(f"mongodb://h/?tls=true&tlsCAFile={tmp_path}/none.pem")
    with pytest.raises(BackendError.__mro__[1], match="file that it names cannot be read"):
        asyncio.run(backend.open())
