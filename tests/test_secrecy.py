"""A canary key, code, secret, digest or context is found nowhere but in the return value."""

from __future__ import annotations

import asyncio
import base64
import logging
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest

import vtoken
from vtoken import (
    BackendError,
    BackendUnavailable,
    CooldownActive,
    CorruptStore,
    InvalidInput,
    InvalidToken,
    KeyGenerationError,
    LeaseLost,
    OutcomeUnknown,
    Settings,
    TokenEvent,
    TokenManager,
    TooManyAttempts,
    VerificationToken,
)
from vtoken.backend import Match

from .core_tools import USER, refused
from .secrecy_tools import (
    CODE,
    CONSUME_ID,
    CONTEXT,
    KEY,
    POLICIES,
    SECRET,
    WRONG_CODE,
    WRONG_KEY,
    Canary,
    Records,
)


@pytest.fixture
def records() -> Iterator[Records]:
    handler, root = Records(), logging.getLogger()
    levels = {
        name: logging.getLogger(name).level for name in (None, "vtoken", "aiosqlite", "asyncio", "pymongo")
    }
    root.addHandler(handler)
    for name in levels:
        logging.getLogger(name).setLevel(logging.DEBUG)
    yield handler
    root.removeHandler(handler)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(params=["memory", "sqlite"])
async def canary(request: pytest.FixtureRequest, tmp_path: Path, records: Records) -> AsyncIterator[Canary]:
    url = "memory://" if request.param == "memory" else f"sqlite:///{tmp_path}/tokens.db"
    made = Canary(url, tmp_path, records)
    logging.getLogger("vtoken.canary").debug("a record that must be seen")
    yield made
    made.check_all()
    await made.aclose()
    made.check_all()
    assert "vtoken.canary" in records.seen  # else nothing was looked at


async def test_what_is_returned_shows_no_key(canary: Canary) -> None:
    asyncio.get_running_loop().set_debug(True)  # which logs more, and remembers where things were made
    manager = await canary.manager()
    issued = [
        await canary.issue(manager, "link", KEY, extra_data={"n": 1}),
        await canary.issue(manager, "code", CODE),
        await canary.issue(manager, "bound", WRONG_KEY, context=CONTEXT),
    ]
    derived = await manager.get_active_or_create(USER, "derived")
    prefixed = await manager.deactivate_and_create(USER, "prefixed")
    await canary.learn()
    for token in (derived, prefixed):
        assert token.key is not None
        canary.sieve.add(token.key.encode())
    contexts: dict[str | None, Any] = {"bound": {"context": CONTEXT}}
    for token in (*issued, prefixed):
        found = [
            await manager.get(token.id),
            await manager.get_active_or_create(USER, token.slug, **contexts.get(token.slug, {})),
            await manager.verify(USER, token.slug, token.key, **contexts.get(token.slug, {})),
            *[t async for t in manager.filter_active_tokens(USER)],
        ]
        async with manager.redeem(USER, token.slug, token.key, **contexts.get(token.slug, {})) as leased:
            found += [token, leased, await manager.get(token.id)]
        for one in found:
            canary.check_value(one)
    again = await manager.get_active_or_create(USER, "derived")
    assert again.key == derived.key
    pair = await manager.issue(USER, "pair")
    tested = await manager.issue(USER, "tested")
    await canary.learn()
    for secret in (pair.key, pair.code, tested.key):
        assert secret is not None
        canary.sieve.add(secret.encode())
    revealed = await manager.reveal(pair)
    assert revealed is not None
    assert (revealed.key, revealed.code) == (pair.key, pair.code)
    for token in (pair, tested, revealed, await manager.verify(USER, "pair", pair.code or "")):
        canary.check_value(token)
    canary.check_value(await manager.status(USER, "pair"))
    canary.check_value([token async for token in manager.history(USER)])
    for value in (derived, again, await manager.stats(), canary.events, manager, manager.settings):
        canary.check_value(value)
    canary.sieve.check(repr(POLICIES), "the policies")  # a pickle of theirs holds the test codes
    for name, part in vars(manager).items():  # its insides, too
        canary.sieve.check(f"{part!r} {getattr(part, '__dict__', '')!r}", name)


async def test_stored_rows_show_no_digest(canary: Canary) -> None:
    manager = await canary.manager()
    await canary.issue(manager, "link", KEY)
    for stored in await canary.backend.inner.find(Match(), 10):
        canary.sieve.check(f"{stored} {stored!r} {[stored]}", "a row")
        canary.sieve.check(f"{stored.keys} {list(stored.keys)!r}", "a key")
        match = Match(digests=tuple(key.digest for key in stored.keys), context=stored.context)
        canary.sieve.check(f"{match} {match!r} {[match]}", "a condition")


Failing = Callable[[TokenManager], Awaitable[object]]


def redeeming(slug: str, key: Any, error: BaseException | None = None, **keywords: Any) -> Failing:
    async def call(manager: TokenManager) -> None:
        async with manager.redeem(USER, slug, key, **keywords):
            if error is not None:
                raise error

    return call


async def listing(manager: TokenManager, key: Any) -> list[VerificationToken]:
    return [token async for token in manager.filter_active_tokens(USER, "link", key)]


def generating(key: Any) -> dict[str, Any]:
    return {"key_generator_kwargs": {"generator": lambda: key}}


GARBLED_KEYS: Final = [WRONG_KEY * 20, WRONG_KEY + "\0", WRONG_KEY + "\ud800"]
NO_KEYS: Final[list[Any]] = [[WRONG_KEY], {"$ne": WRONG_KEY}, WRONG_KEY.encode(), None]


@pytest.mark.parametrize("slug", ["link", "code", "bound", "prefixed", "derived", "pair", "tested"])
async def test_wrong_keys(canary: Canary, slug: str) -> None:
    manager = await canary.manager()
    await canary.issue(manager, "link", KEY)
    for key in (WRONG_KEY, WRONG_CODE, "", *GARBLED_KEYS, *NO_KEYS):
        for call in presenting(slug, key):
            canary.check_error(await refused(vtoken.VTokenError, call(manager)))
    for key in GARBLED_KEYS:
        for call in asking(slug, key):
            try:
                answer = await call(manager)
            except vtoken.VTokenError as error:
                canary.check_error(error)
            else:
                assert not answer
    for bad in (*GARBLED_KEYS, *NO_KEYS):
        for call in drawing(bad):
            canary.check_error(await refused(InvalidInput, call(manager)))
    for bad in NO_KEYS:
        for call in asking(slug, bad):
            canary.check_error(await refused(InvalidInput, call(manager)))


def presenting(slug: str, key: Any) -> list[Failing]:
    context: dict[str, Any] = {"context": CONTEXT} if slug == "bound" else {}
    return [
        lambda m: m.verify(USER, slug, key, **context),
        lambda m: m.consume(USER, slug, key, consume_id=CONSUME_ID, **context),
        redeeming(slug, key, consume_id=CONSUME_ID, **context),
    ]


def asking(slug: str, key: Any) -> list[Failing]:
    context: dict[str, Any] = {"context": CONTEXT} if slug == "bound" else {}
    calls: list[Failing] = [
        lambda m: m.exists_valid(USER, slug, key, **context),
        lambda m: m.exists_valid(USER, key=key),
        lambda m: m.deactivate(USER, "link", key),
        lambda m: m.deactivate(USER, key=key),
        lambda m: listing(m, key),
    ]
    return calls


def drawing(key: Any) -> list[Failing]:
    return [
        lambda m: m.deactivate_and_create(USER, "link", **generating(key)),
        lambda m: m.get_active_or_create(USER, "other", **generating(key)),
        lambda m: m.generate_key(lambda: key),
    ]


async def test_bad_contexts_and_consume_ids(canary: Canary) -> None:
    manager = await canary.manager()
    bads: list[Any] = [CONTEXT * 20, CONTEXT + "\0", CONTEXT + "\ud800", [CONTEXT], CONTEXT.encode()]
    bads += [{"cookie": CONTEXT * 20}, {"cookie": [CONTEXT]}, {5: CONTEXT}]
    for bad in bads:
        for call in calls_in(bad):
            canary.check_error(await refused(InvalidInput, call(manager)))


def calls_in(bad: Any) -> list[Failing]:
    return [
        lambda m: m.verify(USER, "bound", WRONG_KEY, context=bad),
        lambda m: m.exists_valid(USER, "bound", WRONG_KEY, context=bad),
        lambda m: m.consume(USER, "bound", WRONG_KEY, context=bad),
        lambda m: m.consume(USER, "bound", WRONG_KEY, consume_id="\0", context=CONTEXT),
        lambda m: m.consume(USER, "bound", WRONG_KEY, consume_id=CONSUME_ID * 9, context=CONTEXT),
        redeeming("bound", WRONG_KEY, consume_id=CONSUME_ID * 9, context=CONTEXT),
        redeeming("bound", WRONG_KEY, context=bad),
        lambda m: m.deactivate_and_create(USER, "bound", context=bad),
        lambda m: m.get_active_or_create(USER, "bound", context=bad),
        lambda m: m.deactivate_and_create(USER, "link", context=bad),
        lambda m: m.status(USER, "bound", context=bad),
    ]


async def test_a_used_a_leased_an_expired_and_an_inactive_key(canary: Canary) -> None:
    manager = await canary.manager()
    used, ended = await canary.issue(manager, "link", KEY), await canary.issue(manager, "other", WRONG_KEY)
    async with manager.redeem(USER, "link", used.key):
        canary.check_error(await refused(InvalidToken, manager.consume(USER, "link", KEY)))
    canary.check_error(await refused(InvalidToken, manager.consume(USER, "link", KEY)))
    canary.check_error(await refused(InvalidToken, redeeming("link", KEY)(manager)))
    await manager.deactivate(USER, "other", ended.key)
    canary.check_error(await refused(InvalidToken, manager.verify(USER, "other", WRONG_KEY)))
    expired = await manager.deactivate_and_create(USER, "link")
    canary.sieve.add(expired.key.encode())
    canary.clock.advance(timedelta(days=2))
    canary.check_error(await refused(InvalidToken, manager.verify(USER, "link", expired.key)))


async def test_too_many_attempts_and_cooldown(canary: Canary) -> None:
    manager = await canary.manager()
    await canary.issue(manager, "code", CODE)
    for _ in range(5):
        canary.check_error(await refused(InvalidToken, manager.verify(USER, "code", WRONG_CODE)))
    for call in (manager.verify, manager.consume, manager.exists_valid):
        canary.check_error(await refused(TooManyAttempts, call(USER, "code", CODE)))
    canary.check_error(await refused(TooManyAttempts, redeeming("code", CODE)(manager)))
    canary.check_error(await refused(InvalidInput, manager.deactivate(USER, "code", CODE)))
    await canary.issue(manager, "cooling", KEY)
    error = await refused(
        CooldownActive, manager.deactivate_and_create(USER, "cooling", **generating(WRONG_KEY))
    )
    canary.check_error(error)


async def test_keys_that_are_taken(canary: Canary) -> None:
    manager = await canary.manager()
    await canary.issue(manager, "link", KEY)
    calls: list[Failing] = [
        lambda m: m.deactivate_and_create(USER, "other", **generating(KEY)),
        lambda m: m.get_active_or_create(USER, "other", **generating(KEY)),
        lambda m: m.generate_key(lambda: KEY),
    ]
    for call in calls:
        canary.check_error(await refused(KeyGenerationError, call(manager)))


METHODS: Final = (
    *("insert", "present", "find", "update", "deactivate", "erase", "purge", "count"),
    *("spend", "refund", "budgets", "reset"),
)


def uses_of(slug: str, key: str) -> list[Failing]:
    context: dict[str, Any] = {"context": CONTEXT} if slug == "bound" else {}
    return [
        lambda m: m.verify(USER, slug, key, **context),
        lambda m: m.exists_valid(USER, slug, key, **context),
        redeeming(slug, key, ZeroDivisionError("the block's own"), **context),
        lambda m: m.consume(USER, slug, key, **context),
        lambda m: m.deactivate_and_create(USER, slug, **context, **generating(WRONG_KEY)),
        lambda m: m.get_active_or_create(USER, slug, **context, **generating(WRONG_KEY)),
        lambda m: m.status(USER, slug, **context),
    ]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        *((name, BackendUnavailable) for name in METHODS),
        ("present", OutcomeUnknown),
        ("insert", OutcomeUnknown),
    ],
)
async def test_a_store_that_fails_in_the_middle(canary: Canary, name: str, error: type[BackendError]) -> None:
    manager = await canary.manager()
    issued = [
        await canary.issue(manager, "link", KEY),
        await canary.issue(manager, "code", CODE),
        await canary.issue(manager, "bound", WRONG_KEY, context=CONTEXT),
    ]
    canary.backend.failing[name] = error("the store is away")
    calls: list[Failing] = [
        lambda m: m.deactivate_and_create(USER, "cooling", **generating(WRONG_KEY)),
        lambda m: m.deactivate(USER, "link", KEY),
        lambda m: listing(m, KEY),
        lambda m: m.generate_key(),
        lambda m: m.reset_limits(USER),
        lambda m: m.erase(USER),
        lambda m: m.stats(),
        lambda m: m.purge(),
    ]
    for token in issued:
        assert token.slug is not None
        calls.extend(uses_of(token.slug, token.key))
    failed = 0
    for call in calls:
        try:
            await call(manager)
        except Exception as raised:  # which of them fails depends on the method
            failed += isinstance(raised, error)
            canary.check_error(raised)
    canary.backend.failing.clear()
    assert failed > 0 or name in ("spend", "refund", "update")  # which fail in silence, or are not needed


async def test_generators_and_hooks_that_raise(canary: Canary) -> None:
    def broken() -> str:
        raise ZeroDivisionError("the generator's own")

    def failing(_: TokenEvent) -> None:
        raise ZeroDivisionError("the hook's own")

    manager = await canary.manager(hooks=(failing,))
    await canary.issue(manager, "link", KEY)
    kwargs: dict[str, Any] = {"key_generator_kwargs": {"generator": broken}}
    error = await refused(ZeroDivisionError, manager.deactivate_and_create(USER, "link", **kwargs))
    canary.check_error(error)
    await refused(InvalidToken, manager.verify(USER, "link", WRONG_KEY))
    await manager.verify(USER, "link", KEY)
    await manager.consume(USER, "link", KEY)
    assert len([r for r in canary.records.records if r.name == "vtoken" and r.exc_info]) == 4


async def test_redeem_with_an_exception_in_the_block_or_its_lease_lost(canary: Canary) -> None:
    manager = await canary.manager()
    await canary.issue(manager, "link", KEY)
    canary.check_error(await refused(ZeroDivisionError, redeeming("link", KEY, ZeroDivisionError())(manager)))
    with pytest.raises(LeaseLost) as info:
        async with manager.redeem(USER, "link", KEY):
            canary.clock.advance(timedelta(minutes=2))
    canary.check_error(info.value)
    with pytest.raises(LeaseLost) as info:
        async with manager.redeem(USER, "link", KEY):
            await manager.erase(USER)
    canary.check_error(info.value)


@pytest.mark.parametrize("name", ["find", "present", "update", "deactivate", "insert"])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_cancelled(canary: Canary, name: str, when: str) -> None:
    manager = await canary.manager()
    await canary.issue(manager, "code", CODE)
    reached = asyncio.Event()

    async def hang() -> None:
        del getattr(canary.backend, when)[name]
        reached.set()
        await asyncio.Event().wait()

    calls: dict[str, Failing] = {
        "find": lambda m: listing(m, KEY),
        "present": lambda m: m.consume(USER, "code", CODE),
        "update": redeeming("code", CODE),
        "deactivate": lambda m: m.deactivate(USER, "link", KEY),
        "insert": lambda m: m.deactivate_and_create(USER, "code", **generating(WRONG_CODE)),
    }
    getattr(canary.backend, when)[name] = hang
    task = asyncio.ensure_future(calls[name](manager))
    await reached.wait()
    task.cancel()
    canary.check_error(await refused(asyncio.CancelledError, task))
    canary.sieve.check(repr(task), "the task")


async def test_a_closed_manager(canary: Canary) -> None:
    manager = await canary.manager()
    await canary.issue(manager, "link", KEY)
    await manager.aclose()
    calls: list[Failing] = [
        lambda m: m.verify(USER, "link", KEY),
        lambda m: m.consume(USER, "code", CODE),
        lambda m: m.deactivate(USER, "link", KEY),
        lambda m: m.deactivate_and_create(USER, "link", **generating(WRONG_KEY)),
        redeeming("bound", KEY, context=CONTEXT),
    ]
    for call in calls:
        canary.check_error(await refused(vtoken.BackendClosed, call(manager)))


async def test_a_real_driver_error(tmp_path: Path, records: Records) -> None:
    canary = Canary(f"sqlite:///{tmp_path}/tokens.db", tmp_path, records)
    manager = await canary.manager()
    await canary.issue(manager, "link", KEY)
    await canary.issue(manager, "code", CODE)
    with closing(sqlite3.connect(tmp_path / "tokens.db")) as connection:
        for table in ("tokens", "keys", "budgets"):
            connection.execute(f"DROP TABLE vtoken_{table}")
        connection.commit()
    calls: list[Failing] = [
        lambda m: m.verify(USER, "link", KEY),
        lambda m: m.verify(USER, "code", CODE),
        lambda m: m.consume(USER, "link", KEY),
        lambda m: m.deactivate(USER, "link", KEY),
        lambda m: m.deactivate_and_create(USER, "link", **generating(WRONG_KEY)),
        redeeming("link", KEY),
    ]
    for call in calls:
        canary.check_error(await refused(BackendError, call(manager)))
    canary.check_all()
    with suppress(BackendError):
        await canary.aclose()


async def test_a_damaged_row(tmp_path: Path, records: Records) -> None:
    canary = Canary(f"sqlite:///{tmp_path}/tokens.db", tmp_path, records)
    manager = await canary.manager()
    token = await canary.issue(manager, "link", KEY)
    with closing(sqlite3.connect(tmp_path / "tokens.db")) as connection:
        connection.execute("UPDATE vtoken_tokens SET keys = '5'")
        connection.commit()
    calls: list[Callable[[TokenManager], Awaitable[object]]] = [
        lambda m: m.get(token.id),
        lambda m: m.verify(USER, "link", KEY),
        lambda m: m.consume(USER, "link", KEY, consume_id="request"),
    ]
    for call in calls:
        canary.check_error(await refused(CorruptStore, call(manager)))
    canary.check_logs()
    await canary.aclose()


class TestTheSieve:
    """Each check finds what is planted."""

    def test_in_values(self, tmp_path: Path, records: Records) -> None:
        canary = Canary("memory://", tmp_path, records)
        digest = bytes(range(100, 132))
        canary.sieve.add(digest)
        for leak in (
            KEY,
            [SECRET],
            {"k": CODE},
            digest,
            digest.hex(),
            [digest],
            base64.b64encode(digest),
            list(digest),
        ):
            with pytest.raises(AssertionError, match="in "):
                canary.check_value(leak)
        canary.check_value("nothing")

    def test_in_errors_and_their_frames(self, tmp_path: Path, records: Records) -> None:
        canary = Canary("memory://", tmp_path, records)
        scope: dict[str, Any] = {}
        exec(compile("def f(key):\n    raise ValueError('x')", "vtoken/planted.py", "exec"), scope)  # noqa: S102  # a frame that is not ours
        with pytest.raises(ValueError, match="x") as info:
            scope["f"](KEY)
        with pytest.raises(AssertionError, match="frames"):
            canary.check_error(info.value)
        digest = bytes(range(32))
        canary.sieve.add(digest)
        with pytest.raises(ValueError, match="x") as info:
            scope["f"]([digest])
        with pytest.raises(AssertionError, match="frames"):
            canary.check_error(info.value)
        outer = RuntimeError("outer")
        outer.__context__ = ValueError("no key")
        outer.__context__.__cause__ = ValueError(KEY)
        with pytest.raises(AssertionError, match="ValueError of RuntimeError"):
            canary.check_error(outer)

    def test_in_logs(self, tmp_path: Path, records: Records) -> None:
        canary = Canary("memory://", tmp_path, records)
        canary.check_logs()
        logging.getLogger("aiosqlite").debug("executing %s", [KEY])
        with pytest.raises(AssertionError, match="aiosqlite"):
            canary.check_logs()

    async def test_in_files(self, tmp_path: Path, records: Records) -> None:
        canary = Canary(f"sqlite:///{tmp_path}/tokens.db", tmp_path, records)
        manager = await canary.manager(Settings(secret=SECRET, key_storage="plain"))
        await manager.deactivate_and_create(USER, "link", **generating(KEY))
        with pytest.raises(AssertionError, match=r"tokens\.db"):
            canary.check_store()
        await canary.aclose()
