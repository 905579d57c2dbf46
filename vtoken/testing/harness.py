"""What the cases stand on: an author's three methods, a bench, a clock, records to store, and races."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Final, NamedTuple, TypeVar

from vtoken.backend import (
    Budget,
    InsertMode,
    InsertResult,
    Match,
    Spend,
    State,
    StoredKey,
    StoredToken,
    TokenBackend,
)
from vtoken.hooks import Hook
from vtoken.manager import TokenManager
from vtoken.policy import Settings, TokenPolicy
from vtoken.subject import Subject
from vtoken.testing.clock import Clock

SuiteT = TypeVar("SuiteT", bound="Suite")
T = TypeVar("T")
E = TypeVar("E", bound=BaseException)

# In the future, so that a store that tidies up by a clock of its own (a TTL index, say) does not
# sweep the tokens away under a case; with odd milliseconds, so that rounding shows.
NOW: Final = 4_102_444_800_123
MINUTE: Final = 60_000
DAY: Final = 24 * 60 * MINUTE
SECRET: Final = "a secret of the conformance suite, 32 bytes or more"
USER: Final = Subject("auth.user", "42")
SLUG: Final = "sms-login"
CAP: Final = 5
WINDOW: Final = timedelta(minutes=15)
CODE: Final = TokenPolicy.code(SLUG, max_attempts=CAP, attempt_window=WINDOW)
PATIENCE: Final = 120
"""Seconds after which a case that hangs is failed."""
MINIMUMS: Final[Mapping[str, int]] = {"rounds": 3, "tasks": 6, "processes": 2, "kills": 1}
"""A suite that asks for less proves too little, and refuses to run."""


class Case(NamedTuple):
    """One test of the suite."""

    name: str
    """The method: call it with an empty directory."""
    guarantee: int
    """Which of the numbered guarantees it belongs to."""
    title: str
    """What it holds the backend to, in one line."""


class Suite(ABC):
    """What an author of a backend fills in."""

    rounds: ClassVar[int] = 8
    """How often a race is repeated; more rounds find rarer races."""
    tasks: ClassVar[int] = 12
    """How many concurrent callers race in one event loop."""

    @abstractmethod
    def new_store(self, directory: Path) -> str:
        """Name a fresh, empty store, by a URL or whatever else :meth:`backend` understands.

        Args:
            directory: an empty directory of this test's own, for a store that lives in files.
        """

    @abstractmethod
    def backend(self, store: str) -> TokenBackend:
        """Make a new backend on that store, not yet open. Called several times for one store."""

    @abstractmethod
    def raw(self, store: str) -> bytes:
        """Everything the store holds, read past the backend (its files, its documents)."""


class Bench:
    """One case's store, with a clock, and what the case opened on it."""

    def __init__(self, suite: Suite, store: str) -> None:
        self.suite = suite
        self.store = store
        self.clock = Clock(datetime.fromtimestamp(NOW / 1000, UTC))
        self.stack = AsyncExitStack()

    async def backend(self) -> TokenBackend:
        """Another backend on the store, open."""
        backend = self.suite.backend(self.store)
        await backend.open()
        self.stack.push_async_callback(backend.close)
        return backend

    async def two_backends(self) -> list[TokenBackend]:
        """Two backends on the store, open, to race on."""
        return [await self.backend(), await self.backend()]

    async def manager(
        self, *policies: TokenPolicy, settings: Settings | None = None, hooks: Iterable[Hook] = ()
    ) -> TokenManager:
        """Another manager on another backend of the store, open."""
        manager = self.new_manager(*policies, settings=settings, hooks=hooks)
        return await self.stack.enter_async_context(manager)

    def new_manager(
        self, *policies: TokenPolicy, settings: Settings | None = None, hooks: Iterable[Hook] = ()
    ) -> TokenManager:
        """The same, not yet open."""
        return TokenManager(
            self.suite.backend(self.store),
            settings=settings or Settings(secret=SECRET),
            policies=policies,
            clock=self.clock,
            hooks=hooks,
        )

    async def two_managers(self, *policies: TokenPolicy) -> list[TokenManager]:
        """Two managers on two backends of the store, open, to race on."""
        return [await self.manager(*policies), await self.manager(*policies)]

    async def stored(self) -> list[StoredToken]:
        """All tokens of the store, newest first, as another backend sees them."""
        backend = self.suite.backend(self.store)
        await backend.open()
        try:
            return await find_all(backend)
        finally:
            await backend.close()

    def raw(self) -> bytes:
        """Everything the store holds, read past the backend."""
        return self.suite.raw(self.store)


def case(
    guarantee: int,
) -> Callable[[Callable[[SuiteT, Bench], Coroutine[Any, Any, None]]], Callable[[SuiteT, Path], None]]:
    """Make a coroutine method a plain synchronous test that runs its own event loop.

    Pytest then needs no plugin, and whichever one is there has nothing to do with it.
    """

    def decorate(
        scenario: Callable[[SuiteT, Bench], Coroutine[Any, Any, None]],
    ) -> Callable[[SuiteT, Path], None]:
        def test(self: SuiteT, tmp_path: Path) -> None:
            if not __debug__:
                raise RuntimeError("the cases are made of assert statements: run them without python -O")
            _refuse_too_little(self)
            asyncio.run(_play(self, scenario, tmp_path))

        # Not functools.wraps: pytest would read the arguments of the coroutine.
        test.__name__ = scenario.__name__
        test.__qualname__ = scenario.__qualname__
        test.__module__ = scenario.__module__
        test.__doc__ = f"Guarantee {guarantee}: {scenario.__doc__}"
        return test

    return decorate


def _refuse_too_little(suite: Suite) -> None:
    for name, least in MINIMUMS.items():
        asked = getattr(suite, name, least)
        if asked < least:
            raise RuntimeError(f"{type(suite).__name__}.{name} is {asked}: {least} or more prove something")


async def _play(
    suite: SuiteT, scenario: Callable[[SuiteT, Bench], Coroutine[Any, Any, None]], directory: Path
) -> None:
    bench = Bench(suite, suite.new_store(directory))
    async with asyncio.timeout(PATIENCE), bench.stack:
        await scenario(suite, bench)


# Records ------------------------------------------------------------------------------------------

_numbers = itertools.count(16)
"""The first ones are left to the cases, which name some ids themselves."""


def a_token(*keys: Mapping[str, Any], **fields: Any) -> StoredToken:
    """A record for the store with an id and digests of its own, valid at ``NOW``.

    Args:
        *keys: for each key, the fields that differ from a link key that is good as long as the token.
        **fields: the fields of the token that differ.
    """
    token_id = fields.get("id", f"{next(_numbers):016x}")
    expires_at = fields.get("expires_at", NOW + 60 * MINUTE)
    token = StoredToken(
        id=token_id,
        content_type="auth.user",
        object_id="42",
        slug="reset",
        context=b"",
        is_beside=False,
        created_at=NOW,
        expires_at=expires_at,
        ends_at=expires_at,
        state=State.ACTIVE,
        extra_data=None,
        max_uses=1,
        uses=0,
        used_at=0,
        keys=tuple(a_key(origin=token_id, expires_at=expires_at)._replace(**key) for key in keys or ({},)),
        holds=(),
    )
    return token._replace(**fields)


def a_key(**fields: Any) -> StoredKey:
    """A link key with a digest of its own."""
    key = StoredKey(
        digest=a_digest(f"key {next(_numbers)}"),
        scheme="sha256",
        secret_id="",
        nonce="",
        plain_key="",
        kind="link",
        expires_at=NOW + 60 * MINUTE,
        origin="",
    )
    return key._replace(**fields)


def a_digest(seed: object) -> bytes:
    """32 bytes, the same for the same seed."""
    return hashlib.sha256(str(seed).encode()).digest()


def a_budget(seed: object, of: object = None) -> Budget:
    """The name of a budget, the same for the same seed and object."""
    of_object = bytes(16) if of is None else a_digest(f"object {of}")[:16]
    return Budget(object=of_object, name=a_digest(f"budget {seed}")[:16])


def a_spend(budget: Budget, limit: int = 1, window: int = MINUTE, max_window: int | None = None) -> Spend:
    """One to be taken from a budget."""
    return Spend(budget=budget, limit=limit, window=window, max_window=max_window or window)


def by_key(token: StoredToken, place: int = 0) -> Match:
    """What somebody presents who has one of the token's keys."""
    return Match(
        digests=(token.keys[place].digest,),
        content_type=token.content_type,
        object_id=token.object_id,
        slug=token.slug,
    )


def where(**fields: Any) -> Match:
    """A condition of fields named at run time."""
    return Match(**fields)


def dice(seed: int) -> Random:
    """A source of variety that is the same in every run."""
    return Random(seed)  # noqa: S311 - it guards nothing


# Calls --------------------------------------------------------------------------------------------


async def put(backend: TokenBackend, *keys: Mapping[str, Any], **fields: Any) -> StoredToken:
    """Store a token with these fields beside all others, and return it."""
    token = a_token(*keys, **fields)
    inserted = await backend.insert(token, InsertMode.ADD)
    assert (inserted.result, inserted.token) == (InsertResult.INSERTED, token)
    return token


async def one(backend: TokenBackend, token: StoredToken) -> StoredToken:
    """The token as it is stored now."""
    found = await backend.find(Match(id=token.id), 2)
    assert len(found) == 1
    return found[0]


async def find_all(backend: TokenBackend, match: Match | None = None) -> list[StoredToken]:
    """Everything that matches, page by page."""
    found: list[StoredToken] = []
    page = await backend.find(match or Match(), 500)
    while page:
        found += page
        assert len({token.id for token in found}) == len(found), "a page repeats the one before"
        page = await backend.find(match or Match(), 500, found[-1].id)
    return found


async def at_once(calls: Iterable[Awaitable[T]]) -> list[T]:
    """Run them all at once, let all of them end, and raise the first error, if any."""
    return (await race(calls, _NoRefusal))[0]


class _NoRefusal(Exception):
    pass


async def race(calls: Iterable[Awaitable[T]], refusal: type[E]) -> tuple[list[T], list[E]]:
    """Run them all at once; the results of those that won, the errors of those refused.

    Any error of another type than exactly ``refusal`` is raised.
    """
    won: list[T] = []
    refused_ones: list[E] = []
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        if type(outcome) is refusal:
            refused_ones.append(outcome)
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            won.append(outcome)
    return won, refused_ones


async def refused(kind: type[E], call: Awaitable[object], what: object = "the call") -> E:
    """Await a call that must raise exactly ``kind``, and return the error."""
    try:
        await call
    except BaseException as error:
        if type(error) is kind:
            return error
        if not isinstance(error, Exception):
            raise
        raise AssertionError(f"{what!r:.200} raised {type(error).__name__}, not {kind.__name__}") from error
    raise AssertionError(f"{what!r:.200} passed and did not raise {kind.__name__}")


async def cancel_everywhere(
    make: Callable[[], Coroutine[Any, Any, object]],
    check: Callable[[bool], Coroutine[Any, Any, None]],
) -> None:
    """Cancel a fresh call after 0, 1, 2, ... turns of the event loop, then ``check`` what it left.

    The turns grow until the call ends before its cancellation three times running. ``check`` is
    told whether the call was cancelled.
    """
    turns, finished = 0, 0
    while finished < 3 and turns < 100_000:
        task = asyncio.ensure_future(make())
        for _ in range(turns):
            await asyncio.sleep(0)
        cancelled = task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() == cancelled, "a cancelled call must raise the cancellation"
        if not cancelled:
            task.result()
        await check(cancelled)
        finished = 0 if cancelled else finished + 1
        turns = turns + 1 if turns < 8 else turns * 5 // 4
