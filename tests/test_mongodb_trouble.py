"""A MongoDB store that is not as it must be, and a server that goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pymongo import MongoClient

from vtoken.backend import Budget, InsertResult, Match, SetExtraData, Use
from vtoken.errors import (
    BackendError,
    BackendUnavailable,
    CorruptStore,
    OutcomeUnknown,
)

from . import servers
from .mongodb_tools import (
    ADD,
    IF_NONE_VALID,
    LATER,
    NOW,
    REPLACE,
    Documents,
    active,
    documents,
    locals_of,
    opened,
    token,
    valid,
)


def leave_duplicates(stored: Documents) -> None:
    stored.drop_index("digest_1")
    stored.insert_many([{"_id": n, "digest": b"same", "ends_at": 0, "is_active": False} for n in range(2)])


def make_it_not_unique(stored: Documents) -> None:
    stored.drop_index("digest_1")
    stored.create_index("digest")


def make_it_partial(stored: Documents) -> None:
    name = "content_type_1_object_id_1_slug_1_slot_1"
    key = stored.index_information()[name]["key"]
    stored.drop_index(name)
    stored.create_index(key, unique=True, partialFilterExpression={"is_active": True, "uses": 0}, name=name)


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
        "is_active": [1, None],
        "uses": ["0", True],
        "expires_at": [4e12, None],
        "digest": ["x"],
        "slug": [5],
        "use_ids": ["x"],
        "extra_data": [{"a": 1}],
    }
    async with opened(mongodb_url) as backend:
        await backend.insert(token(1), ADD)
        with documents(mongodb_url) as stored:
            whole = stored.find_one({})
            assert whole is not None
            for field, values in damages.items():
                for value in values:
                    stored.replace_one({}, whole | {field: value})
                    with pytest.raises(CorruptStore, match=field) as caught:
                        await backend.find(Match(id=token(1).id), 1)
                    assert caught.value.__context__ is None
            stored.replace_one({}, whole)
        assert await backend.find(Match(), 1) == [token(1)]


async def test_an_error_shows_no_digest(mongodb_url: str, mongodb_driver: str) -> None:
    digest = b"abcdefgh" * 4
    record = token(1, digest=digest, object_id="43", plain_key="plain-key", nonce="a-nonce", uses=1)
    async with opened(mongodb_url, mongodb_driver) as backend:
        with documents(mongodb_url) as stored:  # a refusal whose message quotes the document
            await backend.insert(token(2, digest=digest[::-1]), ADD)
            rule = {"$jsonSchema": {"properties": {"uses": {"maximum": 0}}}}
            stored.database.command("collMod", "vtoken", validator=rule)
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: backend.insert(record, ADD),
            lambda: backend.insert(record, REPLACE),
            lambda: backend.insert(record, IF_NONE_VALID),
            lambda: backend.update(Match(digests=(digest[::-1],)), Use(LATER)),
        ]
        for call in calls:
            with pytest.raises(BackendError, match="code 121") as caught:
                await call()
            assert caught.value.__context__ is None
            assert caught.value.__cause__ is None
            shown = f"{caught.value!r} {locals_of(caught.value)}"
            for secret in ("abcdefgh", "hgfedcba", "plain-key", "a-nonce"):
                assert secret not in shown


# A server that goes away.


async def test_a_killed_server_is_told_and_found_again(mongodb_driver: str) -> None:
    if servers.declared_url():
        pytest.skip(f"{servers.DECLARED_URL} names a server that is not ours to kill")
    with servers.start_mongod("vtoken") as server:
        url = servers.with_database(server.url, "faults") + "&serverSelectionTimeoutMS=500"
        async with opened(url, mongodb_driver) as backend:
            assert await backend.insert(token(1), REPLACE) is InsertResult.INSERTED
            assert await backend.update(valid(1), Use(LATER)) is not None
            server.kill()
            with pytest.raises((BackendUnavailable, OutcomeUnknown)):
                await backend.insert(token(2), REPLACE)
            with pytest.raises(BackendUnavailable):
                await backend.find(Match(), 1)
            with pytest.raises((BackendUnavailable, OutcomeUnknown)):
                await backend.update(Match(id=token(1).id), SetExtraData("{}"))
            await asyncio.to_thread(server.start)
            async with asyncio.timeout(30):
                while True:
                    try:
                        assert await backend.update(valid(1), Use(LATER)) is None
                        break
                    except BackendError:
                        continue
            assert await backend.insert(token(3), REPLACE) is InsertResult.INSERTED
            assert await active(backend) == [3]


async def test_a_server_without_a_journal_is_refused() -> None:
    if servers.declared_url():
        pytest.skip(f"{servers.DECLARED_URL} names a server that has a journal")
    with servers.start_mongod(args=["--nojournal"]) as server:
        with pytest.raises(BackendError):
            async with opened(servers.with_database(server.url, "faults")):
                pass
        async with opened(servers.with_database(server.url, "relaxed"), durable=False) as backend:
            assert await backend.insert(token(1), REPLACE) is InsertResult.INSERTED


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
            await backend.insert(token(1), REPLACE)
            guarded[name].command("revokeRolesFromUser", "user", roles=["readWrite"])
            calls: list[Callable[[], Awaitable[object]]] = [
                lambda: backend.insert(token(2), REPLACE),
                lambda: backend.find(Match(), 1),
                lambda: backend.update(valid(1), Use(LATER)),
                lambda: asyncio.gather(*(backend.update(valid(1), Use(LATER)) for _ in range(8))),
                lambda: backend.deactivate(Match(), LATER),
                lambda: backend.purge(LATER, LATER, 10, LATER),
                lambda: backend.count(LATER),
                lambda: backend.spend(Budget("auth.user", "1", "reset", "attempts"), NOW, 5, 1, 1),
            ]
            async with asyncio.timeout(30):
                for call in calls:
                    with pytest.raises(BackendUnavailable, match=r"access denied .*code 13"):
                        await call()
            guarded[name].command("grantRolesToUser", "user", roles=["readWrite"])
            assert await backend.find(Match(), 2) == [token(1)]
            assert await backend.update(valid(1), Use(LATER)) is not None
