"""Clients, URLs, and where a MongoDB backend may be used."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import subprocess
import sys
import threading
from typing import Any
from urllib.parse import urlsplit

import pytest
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import AsyncMongoClient, MongoClient

from vtoken.backend import Budget, InsertResult, Match, SetExtraData, Spend
from vtoken.config import create_backend
from vtoken.errors import (
    BackendClosed,
    BackendError,
    BackendUnavailable,
    ConfigurationError,
    OutcomeUnknown,
)
from vtoken_backends.mongodb import MongoDBBackend

from . import servers
from .faults.mongodb_proxy import proxy
from .mongodb_tools import (
    ADD,
    IF_NONE_VALID,
    LATER,
    NOW,
    Commands,
    documents,
    insert,
    key,
    of,
    opened,
    token,
    use,
)


async def test_a_client_handed_in_stays_open(mongodb_url: str) -> None:
    database = mongodb_url.rpartition("/")[2].partition("?")[0]
    async with AsyncMongoClient[dict[str, Any]](mongodb_url) as client:
        motor: AsyncIOMotorClient[dict[str, Any]] = AsyncIOMotorClient(mongodb_url)
        either: Any
        for number, either in enumerate((client, motor)):
            backend = MongoDBBackend(either)
            assert repr(backend) == "<MongoDBBackend (default).vtoken>"
            await backend.open()
            assert repr(backend) == f"<MongoDBBackend {database}.vtoken>"
            assert (await insert(backend, token(number))).result is InsertResult.INSERTED
            await backend.close()
            with pytest.raises(BackendClosed):
                await backend.find(Match(), 1)
            assert await either.get_database(database).get_collection("vtoken").find_one({}) is not None
        motor.close()


async def test_closing_has_the_event_loop_go_on(mongodb_standalone: str, mongodb_driver: str) -> None:
    """The proxy is in the same loop: were that to wait, the driver would never get its answer."""
    sent: list[str] = []

    def never(command: str) -> bool:
        sent.append(command)
        return False

    port = urlsplit(mongodb_standalone).port
    assert port is not None
    async with proxy(port, never) as way:
        url = f"mongodb://127.0.0.1:{way.port}/?directConnection=true"
        async with opened(url, mongodb_driver) as backend:
            await backend.find(Match(), 1)
        assert "endSessions" in sent


async def test_a_connection_that_cannot_be_made_is_no_refusal(
    mongodb_standalone: str, mongodb_driver: str
) -> None:
    """PyMongo tries again then, with what a standalone server refuses."""
    fails = False

    def loses(command: str) -> bool:
        nonlocal fails
        lost = fails and command == "ismaster"
        fails = fails and not lost
        return lost

    port = urlsplit(mongodb_standalone).port
    assert port is not None
    async with proxy(port, loses) as way:
        url = f"mongodb://127.0.0.1:{way.port}/connecting?directConnection=true"
        async with opened(url, mongodb_driver) as backend:
            for number in range(20):
                await insert(backend, of(number))
            fails = True
            changes = (backend.update(Match(id=token(n).id), SetExtraData("1")) for n in range(20))
            answers = await asyncio.gather(*changes, return_exceptions=True)
            failed = [n for n, answer in enumerate(answers) if isinstance(answer, BaseException)]
            assert way.lost == {"ismaster": 1}
            # Of the attempt before, the connection may have been lost with the answer.
            assert [type(answers[n]) for n in failed] == [OutcomeUnknown] * len(failed)
            for number in range(20):
                before = of(number)
                [found] = await backend.find(Match(id=before.id, active=True), 1)
                changed = before._replace(extra_data="1")
                assert found == changed or (number in failed and found == before)


async def test_a_client_that_was_closed_says_so(mongodb_url: str) -> None:
    client = AsyncMongoClient[dict[str, Any]](mongodb_url)
    backend = MongoDBBackend(client)
    await backend.open()
    await client.close()
    with pytest.raises(BackendClosed, match="client was closed"):
        await backend.find(Match(), 1)
    await backend.close()


def test_other_clients_are_refused(mongodb_standalone: str) -> None:
    with (
        MongoClient[dict[str, Any]](mongodb_standalone) as client,
        pytest.raises(ConfigurationError, match="AsyncMongoClient"),
    ):
        MongoDBBackend(client)
    with pytest.raises(ConfigurationError, match="either"):
        MongoDBBackend()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"colection": "x"}, "did you mean collection"),
        ({"client": object()}, "no option 'client'"),
        ({"driver": "mongoengine"}, "driver must be"),
        ({"database": "a.b"}, "database"),
        ({"database": 5}, "database"),
        ({"collection": "a$b"}, "collection"),
        ({"collection": ""}, "collection"),
        ({"durable": 1}, "durable"),
    ],
)
def test_options_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        create_backend("mongodb://user:pa55word@localhost", **options)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("mongodb://u:pa55word@h", "(default).vtoken"),
        ("mongodb://u:pa55word@h/", "(default).vtoken"),
        ("mongodb://u:pa55word@h/app", "app.vtoken"),
        ("mongodb://u:pa55word@h,i:27018/app?w=0&collection=a%2Eb&tls=true", "app.a.b"),
        ("mongodb+srv://u:pa55word@h/app?collection=tokens", "app.tokens"),
    ],
)
def test_urls_name_database_and_collection(url: str, shown: str) -> None:
    assert repr(create_backend(url)) == f"<MongoDBBackend {shown}>"


async def test_the_driver_never_sees_our_parameter(mongodb_new_url: str, mongodb_driver: str) -> None:
    mark = "&" if "?" in mongodb_new_url else "?"
    async with opened(f"{mongodb_new_url}{mark}collection=mine", mongodb_driver) as backend:  # no warning
        await insert(backend, token(1), ADD)
    with documents(mongodb_new_url) as stored:
        names = stored.database.list_collection_names()
        assert sorted(names) == ["mine", "mine.budgets", "mine.meta"]


def test_a_missing_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "motor"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "motor", None)
    with pytest.raises(ConfigurationError, match=r'pip install "vtoken\[motor\]"'):
        MongoDBBackend.from_url("mongodb://localhost", driver="motor")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mongodb://user:pa55word@", "percent-encoded"),
        ("mongodb://user:pa55word@host:port", "port"),
        ("mongodb://user:pa55word@host:65536/app", "port"),
        ("mongodb+srv://user:pa55word@host.example.com:27017/app", "port"),
        ("mongodb://user:pa55/word@host", "percent-encoded"),
        ("mongodb://user:pa55?word=1@host", "percent-encoded"),
        ("mongodb://user:pa55word@host/?replicaset=a&replicaSt=a", "'replicaSt'"),
        ("mongodb://user:pa55word@host/?wTimeoutMS=soon", "'wTimeoutMS'"),
        ("mongodb://user:pa55word@host/?authMechanism=pa55word", "'authMechanism'"),
    ],
)
def test_a_mistake_in_the_url_is_told_at_once_and_no_password(
    url: str, said: str, mongodb_driver: str
) -> None:
    with pytest.raises(ConfigurationError, match=said) as caught:
        MongoDBBackend.from_url(url, driver=mongodb_driver)
    assert "pa55" not in f"{caught.value!r} {caught.value.__context__!r} {caught.value.__cause__!r}"


def test_from_url_looks_nothing_up() -> None:
    for url in (
        "mongodb+srv://nobody.invalid/?srvMaxHosts=3",
        "mongodb://h/?tls=true&tlsCAFile=/there/is/none",
    ):
        assert repr(MongoDBBackend.from_url(url)) == "<MongoDBBackend (default).vtoken>"


async def test_refused_credentials(mongodb_standalone: str, mongodb_driver: str) -> None:
    url = mongodb_standalone.replace("://", "://user:pa55word@")
    with pytest.raises(BackendUnavailable, match=r"access denied .*code 18") as caught:
        async with opened(url, mongodb_driver):
            pass
    assert "pa55" not in f"{caught.value!r} {caught.value.__context__!r} {caught.value.__cause__!r}"


async def test_no_server_is_told_soon(mongodb_driver: str) -> None:
    url = f"mongodb://127.0.0.1:{servers.free_port()}/?serverSelectionTimeoutMS=100"
    backend = MongoDBBackend.from_url(url, driver=mongodb_driver)
    async with asyncio.timeout(5):
        for _ in range(2):
            with pytest.raises(BackendUnavailable, match="no server answers"):
                await backend.open()
    with pytest.raises(BackendClosed):
        await backend.find(Match(), 1)
    await backend.close()


class Searching(logging.Handler):
    """Hears from a driver that it waits for a server, which it may say in a thread of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.has_begun = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def emit(self, record: logging.LogRecord) -> None:
        if "Waiting for suitable server" in record.getMessage():
            self._loop.call_soon_threadsafe(self.has_begun.set)


async def test_a_cancelled_search_for_a_server_ends(
    mongodb_driver: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"mongodb://127.0.0.1:{servers.free_port()}/?serverSelectionTimeoutMS=60000"
    backend = MongoDBBackend.from_url(url, driver=mongodb_driver)
    log, searching = logging.getLogger("pymongo.serverSelection"), Searching()
    log.addHandler(searching)
    with caplog.at_level(logging.DEBUG, log.name):
        opening = [asyncio.ensure_future(backend.open()) for _ in range(3)]
        async with asyncio.timeout(30):
            await searching.has_begun.wait()
    log.removeHandler(searching)
    for task in opening:
        task.cancel()
    done, _ = await asyncio.wait(opening, timeout=30)
    assert len(done) == 3
    assert all(task.cancelled() for task in opening)
    with pytest.raises(BackendClosed):
        await backend.find(Match(), 1)
    await backend.close()


@pytest.mark.parametrize("durable", [True, False])
async def test_writes_are_durable_whatever_the_client_was_told(mongodb_url: str, durable: bool) -> None:
    commands = Commands()
    settings: dict[str, Any] = {"w": 0, "tz_aware": True, "readPreference": "secondary"}
    async with AsyncMongoClient[Any](mongodb_url, event_listeners=[commands], **settings) as client:
        backend = MongoDBBackend(client, durable=durable)
        await backend.open()
        spend = Spend(Budget(b"o" * 16, b"n" * 16), 5, 1000, 1000)
        await insert(backend, token(1), ADD)
        await insert(backend, token(2))
        await insert(backend, token(3), IF_NONE_VALID, wanted_until=NOW + 1_000_000_000)
        await asyncio.gather(*(insert(backend, of(10 + n)) for n in range(4)))
        await use(backend, 3)
        await asyncio.gather(*(use(backend, 10 + n) for n in range(4)))
        await backend.update(Match(id=token(3).id), SetExtraData("1"))
        await backend.deactivate(Match(), NOW)
        spending = await backend.spend((spend,), NOW)
        await backend.refund(spending.charges)
        await backend.present(key(99), None, NOW, (spend,))
        await backend.purge(LATER, LATER, 100, NOW)
        await backend.reset(spend.budget.object, None)
        await backend.erase("auth.user", "42", spend.budget.object)
        await backend.note("a", "b")
        await backend.close()
    expected = [{"w": "majority", "j": True}] if durable else [{"w": 1}, {"w": "majority"}]
    assert {name for name, _ in commands.write_concerns} == {"insert", "update", "delete", "findAndModify"}
    for _, found in commands.write_concerns:
        assert {name: value for name, value in found.items() if name != "wtimeout"} in expected


async def test_another_event_loop_is_refused(mongodb_url: str, mongodb_driver: str) -> None:
    async with opened(mongodb_url, mongodb_driver) as backend:
        raised: list[BaseException] = []

        def elsewhere() -> None:
            for call in (backend.find(Match(), 1), backend.deactivate(Match(), NOW), backend.open()):
                try:
                    asyncio.run(call)
                except BackendClosed as error:
                    raised.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        await asyncio.to_thread(thread.join)
        assert ["another event loop" in str(error) for error in raised] == [True] * 3
        assert await backend.find(Match(), 1) == []


def test_it_opens_again_after_its_loop_is_gone(mongodb_standalone: str) -> None:
    with servers.fresh_database(mongodb_standalone) as url:
        backend = MongoDBBackend.from_url(url)

        async def use() -> None:
            await backend.open()
            await insert(backend, token(1), ADD)
            await backend.close()

        asyncio.run(use())
        with pytest.raises(BackendError):
            asyncio.run(backend.deactivate(Match(), NOW))
        asyncio.run(use())


async def test_a_dropped_backend_warns(mongodb_url: str) -> None:
    async with AsyncMongoClient[dict[str, Any]](mongodb_url) as client:
        backend = MongoDBBackend(client)
        await backend.open()
        del backend  # the client is not ours to close
        gc.collect()
    backend = MongoDBBackend.from_url(mongodb_url)
    await backend.open()
    client = backend._client._client  # pyright: ignore[reportPrivateUsage]  # so that the test can close it
    with pytest.warns(ResourceWarning, match="dropped without close"):  # noqa: PT031 - both make the drop
        del backend
        gc.collect()
    await client.close()


FORK = """
import asyncio, os, sys
from vtoken.backend import Match
from vtoken.errors import BackendClosed
from vtoken_backends.mongodb import MongoDBBackend

backend = MongoDBBackend.from_url(sys.argv[1], driver=sys.argv[2])

async def find():
    try:
        return await backend.find(Match(), 1)
    except BackendClosed as error:
        return str(error)

async def child():
    told = await find()
    await backend.close()
    await backend.open()
    again = await find()
    await backend.close()
    os._exit(0 if "another process" in told and again == [] else 1)

async def parent():
    await backend.open()
    pid = os.fork()
    if pid == 0:
        asyncio._set_running_loop(None)
        asyncio.run(child())
    status = (await asyncio.to_thread(os.waitpid, pid, 0))[1]
    found = await find()
    await backend.close()
    return 0 if status == 0 and found == [] else 1

sys.exit(asyncio.run(parent()))
"""


def test_a_forked_child_is_refused_until_it_opens(mongodb_url: str, mongodb_driver: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK, mongodb_url, mongodb_driver],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
