"""Any object as any argument: the documented result, or one of the documented errors and nothing stored."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import math
import os
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final

import hypothesis
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from tests.faults import fuzz_atheris
from vtoken import (
    ANY,
    DEFAULT,
    ConfigurationError,
    ContentTypes,
    InvalidInput,
    InvalidToken,
    KeyGenerationError,
    Limit,
    Settings,
    Subject,
    TokenManager,
    TokenPolicy,
    VerificationToken,
    create_backend,
    register_backend,
)
from vtoken.backend import Match
from vtoken.config import Configuration, policies_from_mapping, redact_url
from vtoken.keys import random_key
from vtoken.testing.clock import Clock
from vtoken_backends.memory import MemoryBackend
from vtoken_backends.mongodb import MongoDBBackend
from vtoken_backends.postgresql import PostgreSQLBackend
from vtoken_backends.sqlite import SQLiteBackend

REFUSED: Final = (InvalidInput, InvalidToken, ConfigurationError, KeyGenerationError)

ASKED: Final = os.environ.get("VTOKEN_TEST_EXAMPLES")
thorough: Final = hypothesis.settings(
    deadline=None,
    max_examples=int(ASKED or 60),
    derandomize=ASKED is None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
"""The same examples in every run, or as many others as the environment asks for."""


class Colour(enum.StrEnum):
    RED = "red"


class Plain:
    """An object of a class that nobody registered."""


class Hostile:
    """Equal to everything, of every length, and without a word for itself."""

    id = "1"

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]  # as of a class that defines __eq__ alone

    def __len__(self) -> int:
        return 1

    def __getattr__(self, name: str) -> object:
        return self


class Text(str):
    """A text that lies about itself."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = str.__hash__

    def isascii(self) -> bool:
        return True

    def encode(self, *_: object, **__: object) -> bytes:
        return b""

    def __len__(self) -> int:
        return 1


odd_texts = ["", "\0", "\ud800", "x" * 256, "é" * 200, "x" * 513, "😀" * 129, "1", "$ne", "a.b", "a:b", ":"]
wild_texts = st.text(st.characters(), max_size=20) | st.sampled_from(odd_texts)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | wild_texts
    | wild_texts.map(Text)
    | st.binary(max_size=8)
    | st.sampled_from([2**63, -(2**63) - 1, 10**400, math.nan, math.inf, -0.0, 1e308, 5e-324])
    | st.sampled_from([ANY, DEFAULT, Colour.RED, Decimal("1.5"), Decimal("NaN"), complex(1, 2), Ellipsis])
    | st.sampled_from(
        [timedelta(0), timedelta.max, timedelta.min, timedelta(microseconds=1), timedelta(days=1)]
    )
    | st.sampled_from([datetime.max, datetime.min, datetime.max.replace(tzinfo=UTC), uuid.UUID(int=0)])
    | st.builds(object)
    | st.builds(Plain)
    | st.builds(Hostile)
    | st.sampled_from([int, str, object, Hostile, Plain, Subject, len, print, type])
)


def of(kinds: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        kinds,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.tuples(inner, inner)
            | st.frozensets(st.integers(), max_size=2)
            | st.dictionaries(wild_texts | st.integers() | st.none(), inner, max_size=3)
            | st.builds(Subject, inner, inner)
        ),
        max_leaves=6,
    )


wild = of(scalars)
visitors = of(scalars | st.builds(pow, st.just(10), st.just(5_000)))
"""What a visitor may send; the number has more digits than ``str`` gives."""


def nested(depth: int) -> object:
    value: object = []
    for _ in range(depth):
        value = [value]
    return value


USER: Final = Subject("auth.user", "1")
SETTINGS: Final = Settings(secret="a secret for the fuzzer of 32 bytes and more", max_key_iterations=2)
POLICIES: Final = [
    TokenPolicy.code("sms", cooldown="1ms"),
    TokenPolicy.pair("pair", issue_limits=[Limit(1000, "1d")]),
    TokenPolicy.link("guarded", max_attempts=3),
    TokenPolicy.link("bound", context="required"),
    TokenPolicy.link("derived", key_storage="derived"),
    TokenPolicy.link("prefixed", prefix="vt_"),
]


def either(*usual: Any) -> st.SearchStrategy[Any]:
    """What is right, half of the time, so that the other arguments come to be looked at."""
    return st.sampled_from(usual) | wild


def sent(*usual: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(usual) | visitors


def is_no_generator(kwargs: object) -> bool:
    """A generator's own exception is passed on, so none of ours is called."""
    return not (isinstance(kwargs, dict) and callable(kwargs.get("generator")))


objects = sent(USER, Subject("auth.user"))
slugs = sent(None, *(policy.slug for policy in POLICIES), "there", "other")
contexts = sent(None, "a context")
data = visitors | st.builds(nested, st.sampled_from([15, 20, 5_000]))
kwargs = (
    sent(None)
    | st.fixed_dictionaries(
        {}, optional={"length": visitors, "allowed_chars": visitors, "generator": visitors, "other": visitors}
    )
    | visitors.map(lambda key: {"generator": lambda: key})
)
quiet_kwargs = kwargs.filter(is_no_generator) | visitors.map(lambda key: {"generator": lambda: key})
times = sent(DEFAULT, None, 5, "5m", timedelta(minutes=5))
spans = sent(timedelta(seconds=60), "60s")
dimensions = sent(None, {}, {"ip": "192.0.2.7"})


async def redeem(manager: TokenManager, *arguments: Any, **keywords: Any) -> None:
    async with manager.redeem(*arguments, wait=timedelta(0), **keywords):
        pass


async def issuing(manager: TokenManager, *arguments: Any, **keywords: Any) -> None:
    async with manager.issuing(*arguments, **keywords):
        pass


async def many(manager: TokenManager, subjects: Any, *arguments: Any, **keywords: Any) -> None:
    async for _ in manager.issue_many([subjects], *arguments, **keywords):
        pass


async def listed(manager: TokenManager, *arguments: Any) -> list[VerificationToken]:
    return [token async for token in manager.filter_active_tokens(*arguments)]


async def recorded(manager: TokenManager, *arguments: Any) -> list[VerificationToken]:
    return [token async for token in manager.history(*arguments)]


async def save(manager: TokenManager, **fields: Any) -> None:
    token = VerificationToken(created_at=datetime.now(UTC), content_type="a", object_id="1", **fields)
    await manager.save(token)


Call = Callable[..., Awaitable[object]]
OPERATIONS: Final[dict[str, tuple[Call, list[Any], dict[str, Any]]]] = {
    "create": (
        TokenManager.deactivate_and_create,
        [objects, slugs, data, sent(True), times, quiet_kwargs],
        {"context": contexts},
    ),
    "issue": (
        TokenManager.issue,
        [objects, slugs],
        {"extra_data": data, "expires_in": times, "context": contexts, "by": dimensions},
    ),
    "issuing": (issuing, [objects, slugs], {"expires_in": times, "context": contexts, "by": dimensions}),
    "issue many": (many, [objects, slugs], {"batch": sent(None, "spring"), "context": contexts}),
    "pretend": (
        TokenManager.pretend,
        [objects, slugs],
        {"extra_data": data, "expires_in": times, "context": contexts, "by": dimensions},
    ),
    "get or create": (
        TokenManager.get_active_or_create,
        [objects, slugs, data, times, quiet_kwargs],
        {"context": contexts, "at_least": sent(timedelta(0), "1m")},
    ),
    "status": (TokenManager.status, [objects, slugs], {"context": contexts, "by": dimensions}),
    "generate": (TokenManager.generate_key, [st.none() | visitors.filter(lambda g: not callable(g))], {}),
    "exists": (
        TokenManager.exists_valid,
        [objects, slugs | st.just(ANY), sent(ANY)],
        {"context": contexts},
    ),
    "verify": (TokenManager.verify, [objects, slugs, sent("wrong")], {"context": contexts}),
    "consume": (
        TokenManager.consume,
        [objects, slugs, sent("wrong")],
        {"consume_id": sent(None, "mine"), "context": contexts},
    ),
    "redeem": (
        redeem,
        [objects, slugs, sent("wrong")],
        {"lease": spans, "context": contexts, "consume_id": sent(None, "mine"), "by": dimensions},
    ),
    "deactivate": (
        TokenManager.deactivate,
        [visitors, slugs, sent(ANY, "wrong")],
        {"all_objects": sent(False, True)},
    ),
    "history": (recorded, [objects, slugs | st.just(ANY)], {}),
    "erase": (TokenManager.erase, [visitors], {}),
    "reset limits": (TokenManager.reset_limits, [objects, slugs | st.just(ANY)], {}),
    "filter": (listed, [objects, slugs | st.just(ANY), sent(ANY, "wrong")], {}),
    "get": (TokenManager.get, [visitors], {}),
    "save": (save, [], {"id": sent("0" * 16), "extra_data": sent(None, "{}")}),
    "purge": (TokenManager.purge, [sent(10), spans], {}),
}


@pytest.mark.parametrize("name", OPERATIONS)
@thorough
@given(drawn=st.data())
def test_an_operation(name: str, drawn: st.DataObject) -> None:
    call, positional, named = OPERATIONS[name]
    given_positional = [drawn.draw(strategy) for strategy in positional]
    given_named = {key: drawn.draw(strategy) for key, strategy in named.items()}
    asyncio.run(fate(lambda manager: call(manager, *given_positional, **given_named)))


async def fate(call: Callable[[TokenManager], Awaitable[object]]) -> None:
    """Call it on an open manager: it succeeds, or it is refused with nothing stored."""
    backend = MemoryBackend()
    async with TokenManager(backend, SETTINGS, POLICIES, clock=Clock()) as manager:
        await manager.deactivate_and_create(USER, "there")
        before = await backend.find(Match(), 10)
        try:
            await call(manager)
        except REFUSED:
            assert await backend.find(Match(), 10) == before


def new_token() -> VerificationToken:
    return VerificationToken(id="0", created_at=datetime.now(UTC), content_type="a", object_id="1")


urls = (
    wild
    | st.text("/:?#@%&=;.[]\\ aZ0\0é", max_size=30)
    | st.builds(
        "{}://{}".format,
        st.sampled_from(
            ["memory", "sqlite", "mongodb", "mongodb+srv", "postgresql", "SQLITE", "http", "x" * 300]
        ),
        st.text(max_size=40),
    )
)
values = either(
    *(None, 5, "5", True, "digest", "derived", "code", "link", "pair", "required", "email", "refuse", "1m"),
    *(timedelta(minutes=1), [Limit(1, "1m")], {Subject("auth.user", 1): "123456"}),
)
SETTING_NAMES: Final = [f.name for f in dataclasses.fields(Settings)]
POLICY_NAMES: Final = [f.name for f in dataclasses.fields(TokenPolicy) if f.name != "slug"]
PAIR_NAMES: Final = [name for name in POLICY_NAMES if name not in ("digits", "code_expiration")]
VARIABLES: Final = [f"VTOKEN_{name.upper()}" for name in (*SETTING_NAMES, "url", "hooks", "config", "other")]


def some(names: list[str], strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(names), strategy, max_size=3)


def make_code(digits: Any, given: Any) -> TokenPolicy:
    return TokenPolicy.code("a", digits, **given)


def make_pair(digits: Any, lifetime: Any, given: Any) -> TokenPolicy:
    return TokenPolicy.pair("a", digits, lifetime, **given)


def make_manager(given: dict[str, Any]) -> TokenManager:
    parts: dict[str, Any] = {"backend": MemoryBackend(), **given}
    return TokenManager(**parts)


def check_validity(now: Any) -> bool:
    return new_token().is_valid(now)


def set_data(value: Any) -> None:
    new_token().set_extra_data(value)


def by_name(make: Callable[..., object]) -> Callable[..., object]:
    """A maker whose last argument holds the named ones."""

    def call(*arguments: Any) -> object:
        return make(*arguments[:-1], **arguments[-1])

    return call


PARTS: Final = ["backend", "settings", "policies", "content_types", "clock", "hooks"]
MAKERS: Final[dict[str, tuple[Callable[..., object], list[Any]]]] = {
    "settings": (by_name(Settings), [some(SETTING_NAMES, values)]),
    "policy": (by_name(TokenPolicy), [values, some(POLICY_NAMES, values)]),
    "link": (by_name(TokenPolicy.link), [values, some(POLICY_NAMES, values)]),
    "code": (make_code, [values, some(PAIR_NAMES, values)]),
    "pair": (make_pair, [either(6), either("10m"), some(PAIR_NAMES, values)]),
    "limit": (Limit, [either(1), either("1m"), either("ip"), either(None)]),
    "policies": (policies_from_mapping, [wild | some(["a", "b"], some(POLICY_NAMES, values) | wild)]),
    "environment": (Configuration.from_env, [some(VARIABLES, st.text(max_size=20))]),
    "manager": (make_manager, [some(PARTS, wild)]),
    "content type": (ContentTypes().register, [either(Plain), either("a.b"), either(None), either(None)]),
    "backend": (create_backend, [urls]),
    "scheme": (register_backend, [either("fuzz"), either("a.b:C")]),
    "PostgreSQL URL": (PostgreSQLBackend.from_url, [urls]),
    "memory": (MemoryBackend.from_url, [urls]),
    "SQLite URL": (SQLiteBackend.from_url, [urls]),
    "SQLite": (
        by_name(SQLiteBackend),
        [either("a"), some(["synchronous", "busy_timeout", "check"], values)],
    ),
    "MongoDB": (by_name(MongoDBBackend), [some(["client", "database", "collection", "driver"], values)]),
    "redacted URL": (redact_url, [st.text()]),
    "validity": (check_validity, [either(None, datetime.now(UTC))]),
    "extra data": (set_data, [data]),
    "key": (random_key, [either(32), either("abc")]),
}


@pytest.mark.parametrize("name", MAKERS)
@thorough
@given(drawn=st.data())
def test_a_maker(name: str, drawn: st.DataObject) -> None:
    make, strategies = MAKERS[name]
    arguments = [drawn.draw(strategy) for strategy in strategies]
    with contextlib.suppress(*REFUSED):
        make(*arguments)


@pytest.mark.parametrize("name", fuzz_atheris.TARGETS)
@thorough
@given(written=st.binary(max_size=60) | st.lists(st.binary(min_size=3, max_size=12)).map(b"\xff".join))
def test_a_target_of_the_coverage_guided_fuzzer(name: str, written: bytes) -> None:
    fuzz_atheris.TARGETS[name](written)
