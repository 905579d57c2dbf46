"""The store through the application's own transaction, on PyMongo's and Motor's sessions."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, Final, NamedTuple

import pytest
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import AsyncMongoClient, ReadPreference
from pymongo.errors import OperationFailure, PyMongoError

from vtoken import IssuedToken, LeaseLost, Settings, Subject, TokenManager, TokenPolicy
from vtoken.backend import (
    Budget,
    InsertResult,
    Match,
    Outcome,
    Release,
    Spend,
    State,
    TokenBackend,
    UseHeld,
)
from vtoken.errors import BackendClosed, BackendError, BackendUnavailable, InvalidInput
from vtoken_backends.memory import MemoryBackend
from vtoken_backends.mongodb import MongoDBBackend

from . import servers
from .mongodb_tools import (
    ADD,
    LATER,
    REPLACE,
    Commands,
    Died,
    before_write,
    failing,
    hold,
    insert,
    key,
    of,
    opened,
    token,
    use,
)
from .reference_tools import MongoDBPlayer, as_told, check_store

ADA: Final = Subject("auth.user", "ada")
HELD: Final = UseHeld("mine", LATER)
SPEND: Final = Spend(Budget(b"o" * 16, b"n" * 16), limit=5, window=1000, max_window=1000)


class Own(NamedTuple):
    """A transaction of the application's, and what it does there."""

    handle: Any
    set_password: Callable[[str], Awaitable[object]]


class RolledBack(Exception):
    pass


Begin = Callable[[], AbstractAsyncContextManager[Own]]


@asynccontextmanager
async def on_pymongo(client: Any) -> AsyncGenerator[Own]:
    async with client.start_session() as session, await session.start_transaction():
        yield own_of(client, session)


@asynccontextmanager
async def on_motor(client: Any) -> AsyncGenerator[Own]:
    async with await client.start_session() as session, session.start_transaction():
        yield own_of(client, session)


def own_of(client: Any, session: Any) -> Own:
    passwords = client.get_default_database()["passwords"]

    async def set_password(new: str) -> None:
        await passwords.insert_one({"new": new}, session=session)

    return Own(session, set_password)


@pytest.fixture
def url(mongodb_replica_set: str) -> Iterator[str]:
    with servers.fresh_database(mongodb_replica_set) as made:
        yield made


@pytest.fixture
async def backend(url: str) -> AsyncIterator[MongoDBBackend]:
    async with opened(url) as made:
        yield made


@pytest.fixture
async def pymongo_client(url: str) -> AsyncIterator[Any]:
    async with AsyncMongoClient[Any](url) as client:
        yield client


@pytest.fixture(params=["pymongo", "motor"])
def begin(request: pytest.FixtureRequest, url: str, pymongo_client: Any) -> Iterator[Begin]:
    if request.param == "pymongo":
        yield lambda: on_pymongo(pymongo_client)
        return
    client: Any = AsyncIOMotorClient(url)
    yield lambda: on_motor(client)
    client.close()


async def passwords(client: Any) -> list[str]:
    found = await client.get_default_database()["passwords"].find().to_list()
    return [one["new"] for one in found]


async def held(backend: MongoDBBackend) -> None:
    """A stored token, number 1, that is held."""
    await insert(backend, token(1))
    assert (await hold(backend, 1, "mine")).outcome is Outcome.RIGHT


async def one(backend: TokenBackend, number: int) -> Any:
    [found] = await backend.find(key(number), 1)
    return found


# Both or neither.


async def test_the_use_is_committed_with_the_applications_document(
    backend: MongoDBBackend, begin: Begin, pymongo_client: Any
) -> None:
    await held(backend)
    async with begin() as own:
        await own.set_password("new")
        assert await backend.within(own.handle).update(Match(id=token(1).id), HELD) is not None
        assert (await one(backend, 1)).is_active
    used = await one(backend, 1)
    assert (used.state, used.uses, used.holds) == (State.USED, 1, ())
    assert await passwords(pymongo_client) == ["new"]


async def test_a_transaction_that_is_rolled_back_leaves_neither(
    backend: MongoDBBackend, begin: Begin, pymongo_client: Any
) -> None:
    await held(backend)
    with pytest.raises(RolledBack):  # noqa: PT012  # raised within the transaction
        async with begin() as own:
            await own.set_password("new")
            await backend.within(own.handle).update(Match(id=token(1).id), HELD)
            raise RolledBack
    left = await one(backend, 1)
    assert (left.state, left.uses, len(left.holds)) == (State.ACTIVE, 0, 1)
    assert await passwords(pymongo_client) == []


async def test_a_token_is_issued_with_its_charges_or_not_at_all(
    backend: MongoDBBackend, begin: Begin
) -> None:
    spend = Spend(Budget(b"o" * 16, b"n" * 16), limit=1, window=1000, max_window=1000)
    with pytest.raises(RolledBack):  # noqa: PT012  # raised within the transaction
        async with begin() as own:
            within = backend.within(own.handle)
            assert (await insert(within, token(1), spends=(spend,))).result is InsertResult.INSERTED
            assert (await insert(within, token(2), spends=(spend,))).result is InsertResult.LIMITED
            raise RolledBack
    assert await backend.find(Match(), 9) == []
    assert await backend.budgets((spend.budget,)) == [None]


def spend(name: bytes, limit: int, of: bytes = bytes(16)) -> Spend:
    return Spend(Budget(of, name * 16), limit=limit, window=1000, max_window=1000)


async def test_what_belongs_to_no_object_is_charged_apart(backend: MongoDBBackend, begin: Begin) -> None:
    shared, own_spend, others = spend(b"s", 2), spend(b"n", 1, b"o" * 16), spend(b"n", 1, b"p" * 16)
    async with begin() as own:
        within = backend.within(own.handle)
        inserted = await insert(within, token(1), spends=(shared, own_spend))
        assert [charge.budget for charge in inserted.spending.charges] == [shared.budget, own_spend.budget]
        [seen, unseen] = await backend.budgets((shared.budget, own_spend.budget))
        assert seen is not None
        assert (seen.spent, unseen) == (1, None)
        limited = await insert(within, token(2), spends=(shared, own_spend))
        assert (limited.result, limited.spending.full) == (InsertResult.LIMITED, 1)
        taken = await insert(within, of(5, keys=token(1).keys), spends=(others, shared))
        assert taken.result is InsertResult.KEY_TAKEN
        [seen] = await backend.budgets((shared.budget,))
        assert seen is not None
        assert seen.spent == 1
        await insert(backend, of(3), spends=(shared,))
        limited = await insert(within, of(4), spends=(others, shared))
        assert (limited.result, limited.spending.full) == (InsertResult.LIMITED, 1)
    assert await backend.budgets((others.budget,)) == [None]


async def test_a_conflict_charges_nobody(backend: MongoDBBackend, begin: Begin) -> None:
    """The application runs its transaction again, and each run would cost what others share."""
    shared = spend(b"s", 2)
    for own_spends in ((), (spend(b"n", 1, b"o" * 16),)):
        async with begin() as mine, begin() as other:
            await insert(backend.within(other.handle), token(1), spends=own_spends)
            with pytest.raises(BackendUnavailable):
                await insert(backend.within(mine.handle), token(2), spends=(shared, *own_spends))
            with suppress(PyMongoError):  # it is over
                await mine.handle.abort_transaction()
        [state] = await backend.budgets((shared.budget,))
        assert state is None or state.spent == 0


async def test_nobody_is_refused_beside_others_that_their_own_limit_refuses(
    backend: MongoDBBackend, pymongo_client: Any
) -> None:
    shared = spend(b"s", 5)

    async def issue(number: int, object_id: str) -> InsertResult:
        own_spend = spend(b"n", 2, object_id.encode() * 16)
        record = token(number)._replace(object_id=object_id)

        async def issued(session: Any) -> InsertResult:
            return (await insert(backend.within(session), record, spends=(own_spend, shared))).result

        async with pymongo_client.start_session() as session:
            result: InsertResult = await session.with_transaction(issued)
            return result

    calls = [issue(n, "a") for n in range(1, 13)] + [issue(20 + n, name) for n, name in enumerate("xyz")]
    results = await asyncio.gather(*calls)
    assert results[12:] == [InsertResult.INSERTED] * 3
    assert results[:12].count(InsertResult.INSERTED) == 2
    [state] = await backend.budgets((shared.budget,))
    assert state is not None
    assert state.spent == 5


@pytest.mark.parametrize("seed", range(3))
async def test_every_method_does_there_what_it_does_elsewhere(
    backend: MongoDBBackend, begin: Begin, seed: int
) -> None:
    player = MongoDBPlayer(seed)
    memory: TokenBackend = MemoryBackend()
    await memory.open()
    with pytest.raises(RolledBack):  # noqa: PT012  # raised within the transaction
        async with begin() as own:
            within = backend.within(own.handle)
            for step in range(120):
                name, call = player.operation()
                expected = as_told(await call(memory))
                assert as_told(await call(within)) == expected, (step, name)
            await check_store(within, memory)
            assert await within.note("name", "text") == "text"
            await within.ping()
            raise RolledBack
    assert await backend.find(Match(), 9) == []
    assert await backend.note("name", "") == ""


async def test_many_tombstones_and_tokens_beside_a_line(backend: MongoDBBackend, begin: Begin) -> None:
    """A re-issue that moves tombstones into a document of their own, and one that ends what stands beside."""
    for number in range(1, 9):
        await insert(backend, token(number))
    async with begin() as own:
        within = backend.within(own.handle)
        await insert(within, token(9))
        await insert(within, token(10))
        await insert(within, token(11), ADD)
        await insert(within, token(12))
        assert len(await within.find(Match(), 20)) == 12
    assert [found.is_active for found in await backend.find(Match(), 20)] == [True] + [False] * 11
    async with begin() as own:
        assert await backend.within(own.handle).erase("auth.user", "42", b"o" * 16) == 12
        assert await backend.within(own.handle).erase("auth.user", "42", b"o" * 16) == 0
        assert await backend.within(own.handle).deactivate(Match(slug="reset"), LATER) == 0
        same = Match(content_type="auth.user", object_id="42")
        assert await backend.within(own.handle).deactivate(same, LATER) == 0
    assert await backend.find(Match(), 20) == []


# Handles that do not fit.


async def test_a_session_without_a_transaction_is_refused(url: str, pymongo_client: Any) -> None:
    motor: Any = AsyncIOMotorClient(url)
    async with opened(url) as backend:
        sessions = [pymongo_client.start_session(), await motor.start_session()]
        for session in sessions:
            with pytest.raises(InvalidInput, match="no transaction is under way"):
                backend.within(session)
            await session.end_session()
            with pytest.raises(InvalidInput, match="no transaction is under way"):
                backend.within(session)
    motor.close()


@pytest.mark.parametrize("handle", [None, "session", object(), 1])
async def test_a_handle_of_another_kind_is_refused(backend: MongoDBBackend, handle: object) -> None:
    with pytest.raises(InvalidInput, match="must be a client session"):
        backend.within(handle)


async def test_a_transaction_that_is_over_is_refused(backend: MongoDBBackend, begin: Begin) -> None:
    async with begin() as own:
        within = backend.within(own.handle)
        await within.ping()
    with pytest.raises(InvalidInput, match="no transaction is under way"):
        backend.within(own.handle)
    with pytest.raises(InvalidInput, match="has ended"):
        await within.find(Match(), 1)


@pytest.mark.parametrize("name", ["vtoken", "another"])
async def test_a_session_of_another_deployment_is_refused(backend: MongoDBBackend, name: str) -> None:
    with servers.start_mongod(name) as server:
        async with AsyncMongoClient[Any](servers.with_database(server.url, "app")) as client:
            async with on_pymongo(client) as own:
                within = backend.within(own.handle)
                with pytest.raises(InvalidInput, match="another deployment"):
                    await within.update(Match(id=token(1).id), HELD)
                with pytest.raises(InvalidInput, match="another deployment"):
                    await insert(within, token(1))
                await own.set_password("new")  # the transaction is none the worse for it
            assert await passwords(client) == ["new"]
            assert await client.list_database_names() == ["admin", "app", "config", "local"]


async def test_a_standalone_server_is_refused(mongodb_standalone: str) -> None:
    if servers.declared_url():
        pytest.skip(f"{servers.DECLARED_URL} names a server of whatever kind")
    with servers.databases(mongodb_standalone).one() as url:
        async with AsyncMongoClient[Any](url) as client:
            backend = MongoDBBackend(client)
            await backend.open()
            async with client.start_session() as session, await session.start_transaction():
                with pytest.raises(InvalidInput, match="a standalone MongoDB server has no transactions"):
                    await insert(backend.within(session), token(1))
                await session.abort_transaction()
            await backend.close()


async def test_a_session_that_reads_elsewhere_is_refused(
    backend: MongoDBBackend, pymongo_client: Any
) -> None:
    async with pymongo_client.start_session() as session:
        await session.start_transaction(read_preference=ReadPreference.SECONDARY_PREFERRED)
        with pytest.raises(InvalidInput, match="does not read from the primary"):
            await backend.within(session).find(Match(), 1)
        await session.abort_transaction()


async def test_it_needs_the_backend_to_be_open(url: str, begin: Begin) -> None:
    async with begin() as own:
        with pytest.raises(BackendClosed):
            MongoDBBackend.from_url(url).within(own.handle)


async def test_the_sessions_own_client_is_the_one_that_is_used(url: str) -> None:
    commands = Commands()
    async with opened(url) as backend, AsyncMongoClient[Any](url, event_listeners=[commands]) as client:
        await held(backend)
        async with on_pymongo(client) as own:
            await backend.within(own.handle).update(Match(id=token(1).id), HELD)
    assert commands.sent == ["hello", "find", "update", "commitTransaction", "endSessions"]
    assert commands.write_concerns == [("update", None)]  # how durable it is, is the transaction's


# Conflicts.


async def test_a_conflict_is_an_error_that_with_transaction_knows(
    backend: MongoDBBackend, begin: Begin
) -> None:
    await held(backend)
    async with begin() as own:
        within = backend.within(own.handle)
        await within.find(Match(), 1)  # it sees what there is now
        await backend.update(Match(id=token(1).id), Release("mine"))
        with pytest.raises(BackendUnavailable, match="run it again") as caught:
            await within.update(Match(id=token(1).id), HELD)
        assert isinstance(caught.value, PyMongoError)
        assert caught.value.has_error_label("TransientTransactionError")
        assert caught.value.__context__ is None
        again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301  # it is ours
        assert again.has_error_label("TransientTransactionError")
        with pytest.raises(BackendUnavailable, match="run the transaction again"):  # it has ended
            await within.find(Match(), 1)
        await own.handle.abort_transaction()


async def leave_a_key_on_its_way(outside: MongoDBBackend) -> None:
    """The token 62 has given its key away, and the token 70, which gets it, is pending still."""

    async def die() -> None:
        raise Died

    await insert(outside, token(61))
    await outside.insert(token(62), ADD)
    with pytest.MonkeyPatch.context() as patched:
        before_write(patched, 4, die)
        with pytest.raises(BackendError):
            await insert(outside, token(70), REPLACE, keep_until=LATER + 600_000)


Outside = Callable[[MongoDBBackend], Awaitable[object]]
Inside = Callable[[TokenBackend], Awaitable[object]]
UNSEEN: Final[dict[str, tuple[Outside, Inside]]] = {
    "a first token, and a re-issue": (
        lambda outside: insert(outside, token(2)),
        lambda within: insert(within, token(3)),
    ),
    "a token beside": (
        lambda outside: insert(outside, token(2), ADD),
        lambda within: insert(within, token(3)),
    ),
    "a taken key": (lambda outside: insert(outside, of(2)), lambda within: insert(within, token(2))),
    "a first token, and deactivate": (
        lambda outside: insert(outside, of(2)),
        lambda within: within.deactivate(Match(content_type="auth.user", object_id="2"), LATER),
    ),
    "by its id": (
        lambda outside: insert(outside, of(2)),
        lambda within: within.deactivate(Match(id=of(2).id), LATER),
    ),
    "by its key": (lambda outside: insert(outside, of(2)), lambda within: within.deactivate(key(2), LATER)),
    "by a key that is handed over": (
        lambda outside: leave_a_key_on_its_way(outside),
        lambda within: within.deactivate(key(62), LATER),
    ),
    "a first token, and erase": (
        lambda outside: insert(outside, of(2)),
        lambda within: within.erase("auth.user", "2", b"o" * 16),
    ),
    "a hold, and its use": (
        lambda outside: hold(outside, 1, "mine"),
        lambda within: within.update(Match(id=of(1).id), HELD),
    ),
    "a budget": (
        lambda outside: outside.spend((SPEND,), LATER),
        lambda within: within.spend((SPEND,), LATER),
    ),
}


@pytest.mark.parametrize(("outside", "inside"), UNSEEN.values(), ids=UNSEEN)
async def test_what_the_transaction_does_not_see_yet_is_a_conflict(
    backend: MongoDBBackend, begin: Begin, outside: Outside, inside: Inside
) -> None:
    """A transaction began, another call was acknowledged, and a later call in it must heed that."""
    await insert(backend, of(1))
    async with begin() as own:
        within = backend.within(own.handle)
        await within.find(Match(), 1)
        await outside(backend)
        with pytest.raises(BackendUnavailable, match="run it again"):
            await inside(within)
        await own.handle.abort_transaction()
    async with begin() as own:
        await inside(backend.within(own.handle))  # and once it is run again, it is none


async def test_with_transaction_runs_it_again(backend: MongoDBBackend, pymongo_client: Any, url: str) -> None:
    motor: Any = AsyncIOMotorClient(url)
    for number, client in ((1, pymongo_client), (2, motor)):
        await insert(backend, of(number))
        await hold(backend, number, "mine")
        tries = 0

        async def change(session: Any, number: int = number) -> object:
            nonlocal tries
            tries += 1
            within = backend.within(session)
            await within.find(Match(), 1)
            if tries == 1:  # somebody else asks for another token meanwhile
                await backend.update(Match(id=of(number).id), Release("nobody's"))
                await hold(backend, number, "another")
                await insert(backend, of(10 + number, object_id=str(number)))
            return await within.update(Match(id=of(number).id), HELD)

        session = client.start_session()
        async with session if client is pymongo_client else await session as opened_session:
            assert await opened_session.with_transaction(change) is not None
        assert tries == 2
        assert (await one(backend, number)).state is State.USED
    motor.close()


async def test_a_caller_that_catches_the_error_commits_no_half(
    backend: MongoDBBackend, begin: Begin, mongodb_replica_set: str, pymongo_client: Any
) -> None:
    with pytest.raises(OperationFailure):  # noqa: PT012  # raised by the commit
        async with begin() as own:
            await own.set_password("new")
            # The line is written, and the document that moves out of it is not.
            with failing(mongodb_replica_set, 1, "update", errorCode=13), pytest.raises(BackendError):
                await insert(backend.within(own.handle), token(1), ADD)
    assert await passwords(pymongo_client) == []
    assert await backend.find(Match(), 9) == []


# Others.


async def test_others_wait_for_the_commit_and_only_they(backend: MongoDBBackend, begin: Begin) -> None:
    await held(backend)
    async with asyncio.TaskGroup() as group, begin() as own:
        await backend.within(own.handle).update(Match(id=token(1).id), HELD)
        issuing = group.create_task(insert(backend, token(2)))
        using = group.create_task(backend.update(Match(id=token(1).id), HELD))
        presenting = group.create_task(use(backend, 1))
        async with asyncio.timeout(7):
            for start in (100, 200):
                await asyncio.gather(*(insert(backend, of(start + n)) for n in range(50)))
                await asyncio.gather(*(use(backend, start + n) for n in range(50)))
        assert not any(task.done() for task in (issuing, using))
    assert using.result() is None
    assert issuing.result().result is InsertResult.INSERTED
    assert presenting.result().outcome is Outcome.REFUSED


@pytest.mark.parametrize("mode", [REPLACE, ADD])
async def test_a_cancelled_operation_has_happened_wholly(
    backend: MongoDBBackend, begin: Begin, mode: Any
) -> None:
    """An application may catch a timeout inside its transaction, and commit."""
    async with begin() as own:
        inserting = asyncio.create_task(insert(backend.within(own.handle), token(1), mode))
        for _ in range(3):
            await asyncio.sleep(0)
        inserting.cancel()
        await asyncio.wait([inserting])
        assert inserting.cancelled()
    found = await backend.find(Match(), 9)
    assert found == await backend.find(key(1), 9)
    assert len(found) == 1
    assert (await use(backend, 1)).outcome is Outcome.RIGHT


# Managers.


@pytest.fixture
async def manager(url: str) -> AsyncIterator[TokenManager]:
    policies = [TokenPolicy.link("reset")]
    async with TokenManager.from_url(url, policies=policies, settings=Settings()) as made:
        yield made


async def issued(manager: TokenManager) -> IssuedToken:
    return await manager.issue(ADA, "reset")


async def test_the_block_and_with_transaction(manager: TokenManager, begin: Begin) -> None:
    token = await issued(manager)
    async with manager.redeem(ADA, "reset", token.key) as held, begin() as own:
        await manager.mark_used(held, using=own.handle)
        with pytest.raises(InvalidInput, match="already"):
            await manager.mark_used(held, using=own.handle)
        again = await manager.issue(ADA, "reset", using=own.handle)
        assert await manager.deactivate(ADA, "other", using=own.handle) == 0
    assert (await manager.consume(ADA, "reset", again.key)).id == again.id
    assert not await manager.exists_valid(ADA, "reset", token.key)


async def test_a_hold_that_was_revoked(manager: TokenManager, begin: Begin, url: str) -> None:
    token = await issued(manager)

    async def work(outside: TokenManager) -> None:
        async with manager.redeem(ADA, "reset", token.key) as held:
            await outside.deactivate(ADA)
            async with begin() as own:
                await manager.mark_used(held, using=own.handle)

    async with TokenManager.from_url(url, settings=Settings()) as outside:
        with pytest.raises(LeaseLost):
            await work(outside)
