"""A MongoDB store that is not as it must be, and a server that goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pymongo import MongoClient

from vtoken.backend import Budget, InsertResult, Match, Outcome, SetExtraData, Spend, Use
from vtoken.errors import (
    BackendError,
    BackendUnavailable,
    CorruptStore,
    OutcomeUnknown,
)
from vtoken_backends.mongodb.documents import TOKEN_INDEXES
from vtoken_backends.mongodb.schema import SMALL_PAGES

from . import servers
from .mongodb_tools import (
    ADD,
    IF_NONE_VALID,
    LATER,
    Documents,
    active,
    documents,
    failing,
    insert,
    key,
    locals_of,
    of,
    opened,
    token,
    use,
)


def leave_duplicates(stored: Documents) -> None:
    stored.drop_index("names_1")
    stored.insert_many([{"_id": n, "names": [b"same"]} for n in range(2)])


def make_it_not_unique(stored: Documents) -> None:
    stored.drop_index("names_1")
    stored.create_index("names")


def make_it_partial(stored: Documents) -> None:
    stored.drop_index("names_1")
    stored.create_index("names", unique=True, partialFilterExpression={"token.state": 0})


@pytest.mark.parametrize("spoil", [leave_duplicates, make_it_not_unique, make_it_partial])
async def test_a_missing_or_other_unique_index_is_refused(mongodb_url: str, spoil: Any) -> None:
    async with opened(mongodb_url):
        pass
    with documents(mongodb_url) as stored:
        spoil(stored)
        with pytest.raises(CorruptStore, match="index on"):
            async with opened(mongodb_url):
                pass
        stored.drop()
    async with opened(mongodb_url):  # made anew
        pass


def pages_of(stored: Documents) -> dict[str, Any]:
    """How the indexes of the backend are stored."""
    indexes = stored.index_information().items()
    return {name: index.get("storageEngine") for name, index in indexes if name != "_id_"}


async def test_indexes_have_small_pages(mongodb_url: str) -> None:
    async with opened(mongodb_url):
        pass
    with documents(mongodb_url) as stored:
        assert all(pages == SMALL_PAGES["storageEngine"] for pages in pages_of(stored).values())


async def test_indexes_that_were_restored_with_other_pages_stay(mongodb_url: str) -> None:
    async with opened(mongodb_url):
        pass
    with documents(mongodb_url) as stored:
        stored.drop_index("names_1")
        stored.create_index("names", unique=True)
        stored.drop_index("due_1__id_1")
        async with opened(mongodb_url) as backend:
            await insert(backend, token(1))
        pages = pages_of(stored)
        assert (pages.pop("names_1"), len(pages), None in pages.values()) == (None, 3, False)


@pytest.mark.parametrize("code", [2, 72])
async def test_a_service_without_the_option_has_the_indexes_all_the_same(
    mongodb_new_url: str, code: int
) -> None:
    with failing(mongodb_new_url, 1, "createIndexes", errorCode=code):
        async with opened(mongodb_new_url) as backend:
            await insert(backend, token(1))
    with documents(mongodb_new_url) as stored:
        assert set(pages_of(stored).values()) == {None}
        assert len(pages_of(stored)) == len(TOKEN_INDEXES)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"collation": {"locale": "en", "strength": 2}}, "collation"),
        ({"capped": True, "size": 4096}, "capped"),
    ],
)
async def test_a_collection_that_compares_or_forgets_is_refused(
    mongodb_new_url: str, options: dict[str, Any], said: str
) -> None:
    with documents(mongodb_new_url) as stored:
        stored.database.create_collection("vtoken", **options)
        with pytest.raises(CorruptStore, match=said):
            async with opened(mongodb_new_url):
                pass
        assert stored.database.list_collection_names() == ["vtoken"]


@pytest.mark.parametrize(
    ("marker", "error"),
    [
        ({}, CorruptStore),
        ({"version": "1"}, CorruptStore),
        ({"version": 2}, BackendError),
        (None, CorruptStore),
    ],
)
async def test_a_newer_or_foreign_store_is_refused_untouched(
    mongodb_new_url: str, marker: dict[str, Any] | None, error: type[BackendError]
) -> None:
    with documents(mongodb_new_url) as stored:
        stored.insert_one({"_id": "theirs"})
        if marker is not None:
            stored.database["vtoken.meta"].insert_one({"_id": "schema", **marker})
        names = sorted(stored.database.list_collection_names())
        with pytest.raises(BackendError) as caught:
            async with opened(mongodb_new_url):
                pass
        assert type(caught.value) is error
        assert sorted(stored.database.list_collection_names()) == names
        assert list(stored.index_information()) == ["_id_"]


async def test_a_damaged_document_is_told(mongodb_url: str) -> None:
    damages: dict[str, list[Any]] = {
        "token.state": ["0", 7],
        "token.uses": ["0", True],
        "token.expires_at": [4e12, None],
        "token.max_uses": ["1"],
        "token.keys.0.digest": ["x", None],
        "token.keys": ["x"],
        "token.extra_data": [{"a": 1}],
        "token.receipts": ["x", 5],
        "slug": [5, None],
        "revision": ["x"],
    }
    async with opened(mongodb_url) as backend:
        await insert(backend, token(1))
        with documents(mongodb_url) as stored:
            whole = stored.find_one({})
            assert whole is not None
            for field, values in damages.items():
                for value in values:
                    stored.update_one({}, {"$set": {field: value}})
                    with pytest.raises(CorruptStore, match="damaged") as caught:
                        await backend.find(Match(id=token(1).id), 1)
                    assert caught.value.__context__ is None
                    assert await backend_answers(backend.find(key(1), 1)) is CorruptStore
                    stored.replace_one({}, whole)
        assert await backend.find(Match(), 1) == [token(1)]


async def test_a_damaged_document_harms_no_neighbour(mongodb_url: str) -> None:
    async with opened(mongodb_url) as backend:
        await asyncio.gather(*(insert(backend, of(n)) for n in range(10)))
        with documents(mongodb_url) as stored:
            stored.update_one({"object_id": "5"}, {"$set": {"token.uses": "x"}})
        calls: list[Callable[[int], Awaitable[object]]] = [
            lambda n: backend.find(key(n), 1),
            lambda n: backend.present(key(n), None, LATER),
            lambda n: use(backend, n),
            lambda n: insert(backend, of(100 + n, object_id=str(n))),
        ]
        for call in calls:
            answers = await asyncio.gather(*(call(n) for n in range(10)), return_exceptions=True)
            damaged = [n for n, answer in enumerate(answers) if isinstance(answer, BaseException)]
            assert damaged == [5]
            assert isinstance(answers[5], CorruptStore)


async def test_a_shard_that_is_connected_directly_is_refused() -> None:
    if servers.declared_url():
        pytest.skip(f"{servers.DECLARED_URL} names a server that is no shard")
    with servers.start_mongod("shard", args=["--shardsvr"]) as server:
        url = servers.with_database(server.url, "sharded")
        async with opened(url):
            pass
        with server.direct_client() as client:  # as a shard knows of collections that are sharded
            client["config"]["cache.collections"].insert_one({"_id": "sharded.vtoken"})
        with pytest.raises(CorruptStore, match="connect to mongos"):
            async with opened(url):
                pass


async def backend_answers(call: Awaitable[object]) -> type[BaseException] | None:
    try:
        await call
    except BackendError as error:
        return type(error)
    return None


async def test_an_error_shows_no_digest(mongodb_url: str, mongodb_driver: str) -> None:
    digest = b"abcdefgh" * 4
    hidden = {"digest": digest, "plain_key": "plain-key", "nonce": "a-nonce"}
    record = token(1, key=hidden, object_id="43", uses=1, max_uses=3)
    async with opened(mongodb_url, mongodb_driver) as backend:
        with documents(mongodb_url) as stored:  # a refusal whose message quotes the document
            await insert(backend, token(2, key={"digest": digest[::-1]}))
            rule = {"$jsonSchema": {"properties": {"token": {"properties": {"uses": {"maximum": 0}}}}}}
            stored.database.command("collMod", "vtoken", validator=rule)
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: insert(backend, record, ADD),
            lambda: insert(backend, record),
            lambda: insert(backend, record, IF_NONE_VALID),
            lambda: backend.present(Match(digests=(digest[::-1],)), Use(LATER), LATER),
            lambda: backend.present(Match(digests=(digest[::-1],)), Use(LATER, "a use"), LATER),
        ]
        for call in calls:
            with pytest.raises(BackendError, match="code 121") as caught:
                await call()
            assert caught.value.__context__ is None
            assert caught.value.__cause__ is None
            shown = f"{caught.value!r} {locals_of(caught.value)}"
            for secret in ("abcdefgh", "hgfedcba", "plain-key", "a-nonce"):
                assert secret not in shown


async def test_what_was_dropped_is_told_and_healed(mongodb_new_url: str) -> None:
    """Nothing is issued without the unique index; an empty store is made anew by opening it."""
    async with opened(mongodb_new_url) as backend:
        await insert(backend, token(1))
        await backend.ping()
        with documents(mongodb_new_url) as stored:
            stored.drop_index("names_1")
            calls: list[Callable[[], Awaitable[object]]] = [
                lambda: insert(backend, token(2)),
                lambda: insert(backend, token(2), ADD),
                lambda: insert(backend, of(2), IF_NONE_VALID),
                lambda: asyncio.gather(*(insert(backend, of(20 + n)) for n in range(5))),
                lambda: use(backend, 1),
                lambda: backend.find(key(1), 1),
                backend.ping,
            ]
            for call in calls:
                with pytest.raises(CorruptStore, match="names"):
                    await call()
            assert stored.count_documents({}) == 1
            stored.drop()
            for call in calls[:4]:
                with pytest.raises(CorruptStore, match="names"):
                    await call()
            with pytest.raises(CorruptStore):
                await backend.ping()
            assert stored.count_documents({}) == 0
        async with opened(mongodb_new_url) as again:
            await again.ping()
            assert (await insert(again, token(3))).result is InsertResult.INSERTED
        assert (await insert(backend, token(4))).result is InsertResult.INSERTED


# A server that goes away.


async def test_a_killed_server_is_told_and_found_again(mongodb_driver: str) -> None:
    if servers.declared_url():
        pytest.skip(f"{servers.DECLARED_URL} names a server that is not ours to kill")
    with servers.start_mongod("vtoken") as server:
        url = servers.with_database(server.url, "faults") + "&serverSelectionTimeoutMS=500"
        async with opened(url, mongodb_driver) as backend:
            assert (await insert(backend, token(1))).result is InsertResult.INSERTED
            assert (await use(backend, 1)).outcome is Outcome.RIGHT
            server.kill()
            with pytest.raises((BackendUnavailable, OutcomeUnknown)):
                await insert(backend, token(2))
            with pytest.raises(BackendUnavailable):
                await backend.find(Match(), 1)
            with pytest.raises((BackendUnavailable, OutcomeUnknown)):
                await backend.update(Match(id=token(1).id), SetExtraData("{}"))
            await asyncio.to_thread(server.start)
            async with asyncio.timeout(30):
                while True:
                    try:
                        assert (await use(backend, 1)).outcome is Outcome.REFUSED
                        break
                    except BackendError:
                        continue
            assert (await insert(backend, token(3))).result is InsertResult.INSERTED
            assert await active(backend) == [3]


async def test_a_server_without_a_journal_is_refused() -> None:
    if servers.declared_url():
        pytest.skip(f"{servers.DECLARED_URL} names a server that has a journal")
    with servers.start_mongod(args=["--nojournal"]) as server:
        with pytest.raises(BackendError):
            async with opened(servers.with_database(server.url, "faults")):
                pass
        async with opened(servers.with_database(server.url, "relaxed"), durable=False) as backend:
            assert (await insert(backend, token(1))).result is InsertResult.INSERTED


# A server that asks who is there.


@pytest.fixture(scope="module")
def guarded() -> Iterator[MongoClient[Any]]:
    """A server with access control, as its administrator; no other test uses it."""
    if servers.declared_url():
        pytest.skip(f"{servers.DECLARED_URL} names a server whose users are not ours to make")
    with servers.start_mongod(args=["--auth"]) as server:
        with server.direct_client() as nobody:  # the first user may be made by anybody from this machine
            nobody.admin.command("createUser", "root", pwd="root", roles=["root"])
        with server.direct_client(username="root", password="root") as client:
            yield client


@contextmanager
def user_of(admin: MongoClient[Any], role: str) -> Generator[tuple[str, str]]:
    """The URL of a new database with a user who has this role there, and its name."""
    name = f"faults_{role}"
    admin[name].command("createUser", "user", pwd="pa55word", roles=[role])
    host, port = admin.address or ("", 0)
    try:
        yield f"mongodb://user:pa55word@{host}:{port}/{name}?directConnection=true", name
    finally:
        admin[name].command("dropUser", "user")
        admin.drop_database(name)


@pytest.mark.parametrize(
    ("instead", "code"),
    [("", 13), ("user:pa55word2@", 18), ("user:pa55word@", 13)],
    ids=["nobody", "wrong", "reader"],
)
async def test_who_may_not_write_is_refused_at_open(
    guarded: MongoClient[Any], mongodb_driver: str, instead: str, code: int
) -> None:
    with user_of(guarded, "read") as (url, name):
        async with asyncio.timeout(30):
            with pytest.raises(BackendUnavailable, match=f"access denied .*code {code}") as caught:
                async with opened(url.replace("user:pa55word@", instead), mongodb_driver):
                    pass
        assert "pa55" not in f"{caught.value!r} {caught.value.__context__!r} {caught.value.__cause__!r}"
        assert guarded[name].list_collection_names() == []


async def test_rights_that_are_taken_away_are_told_and_missed_by_nothing(
    guarded: MongoClient[Any], mongodb_driver: str
) -> None:
    with user_of(guarded, "readWrite") as (url, name):
        async with opened(url, mongodb_driver) as backend:
            await insert(backend, token(1))
            guarded[name].command("revokeRolesFromUser", "user", roles=["readWrite"])
            calls: list[Callable[[], Awaitable[object]]] = [
                lambda: insert(backend, token(2)),
                lambda: backend.find(Match(), 1),
                lambda: use(backend, 1),
                lambda: asyncio.gather(*(use(backend, 1) for _ in range(8))),
                lambda: backend.deactivate(Match(), LATER),
                lambda: backend.purge(LATER, LATER, 10, LATER),
                lambda: backend.count(LATER),
                lambda: backend.spend((Spend(Budget(b"o" * 16, b"n" * 16), 5, 1, 1),), LATER),
                backend.ping,
            ]
            async with asyncio.timeout(30):
                for call in calls:
                    with pytest.raises(BackendUnavailable, match=r"access denied .*code 13"):
                        await call()
            guarded[name].command("grantRolesToUser", "user", roles=["readWrite"])
            assert await backend.find(Match(), 2) == [token(1)]
            assert (await use(backend, 1)).outcome is Outcome.RIGHT
