"""What the cases stand on: the suite's three questions to an author, a bench, a clock, a few verbs."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Final, NamedTuple, TypeVar

from vtoken.backend import Match, StoredToken, TokenBackend
from vtoken.manager import TokenManager
from vtoken.policy import Settings, TokenPolicy
from vtoken.subject import Subject

SuiteT = TypeVar("SuiteT", bound="Suite")
T = TypeVar("T")
E = TypeVar("E", bound=BaseException)

# In the future, so that a store that tidies up by a clock of its own (a TTL index, say) does not
# sweep the tokens away under a case; with odd milliseconds, so that rounding shows.
NOW: Final = 4_102_444_800_123
MINUTE: Final = 60_000
SECRET: Final = "a secret of the conformance suite, 32 bytes or more"
USER: Final = Subject("auth.user", "42")
PATIENCE: Final = 120
"""Seconds after which a case that hangs is failed."""


class Clock:
    """A clock for tests: it stands still until it is moved.

    Pass it to a manager as ``clock``. Moving it back is allowed.

    Args:
        start: an aware datetime.
    """

    def __init__(self, start: datetime = datetime(2100, 1, 1, tzinfo=UTC)) -> None:
        if start.tzinfo is None:
            raise ValueError("start must be an aware datetime")
        self._now = start

    def __call__(self) -> datetime:
        """The time it shows, aware and in UTC."""
        return self._now.astimezone(UTC)

    def advance(self, by: timedelta) -> None:
        """Move by that much; a negative timedelta moves it back."""
        self._now += by

    def set(self, to: datetime) -> None:
        """Move to an aware datetime."""
        if to.tzinfo is None:
            raise ValueError("to must be an aware datetime")
        self._now = to

    @property
    def milliseconds(self) -> int:
        """The time it shows, in whole milliseconds since 1970-01-01 UTC."""
        return (self._now - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


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
        self._stack = AsyncExitStack()

    async def backend(self) -> TokenBackend:
        """Another backend on the store, open."""
        backend = self.suite.backend(self.store)
        await backend.open()
        self._stack.push_async_callback(backend.close)
        return backend

    async def manager(self, *policies: TokenPolicy, settings: Settings | None = None) -> TokenManager:
        """Another manager on another backend of the store, open."""
        manager = self.new_manager(*policies, settings=settings)
        return await self._stack.enter_async_context(manager)

    def new_manager(self, *policies: TokenPolicy, settings: Settings | None = None) -> TokenManager:
        """The same, not yet open."""
        return TokenManager(
            self.suite.backend(self.store),
            settings=settings or Settings(secret=SECRET),
            policies=policies,
            clock=self.clock,
        )

    async def stored(self) -> list[StoredToken]:
        """All tokens of the store, newest first, as another backend sees them."""
        backend = self.suite.backend(self.store)
        await backend.open()
        try:
            return await find_all(backend)
        finally:
            await backend.close()

    def raw(self) -> bytes:
        return self.suite.raw(self.store)

    async def aclose(self) -> None:
        await self._stack.aclose()


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
            asyncio.run(_play(self, scenario, tmp_path))

        # Not functools.wraps: pytest would read the arguments of the coroutine.
        test.__name__ = scenario.__name__
        test.__qualname__ = scenario.__qualname__
        test.__module__ = scenario.__module__
        test.__doc__ = f"Guarantee {guarantee}: {scenario.__doc__}"
        return test

    return decorate


async def _play(
    suite: SuiteT, scenario: Callable[[SuiteT, Bench], Coroutine[Any, Any, None]], directory: Path
) -> None:
    bench = Bench(suite, suite.new_store(directory))
    async with asyncio.timeout(PATIENCE):
        try:
            await scenario(suite, bench)
        finally:
            await bench.aclose()


_numbers = itertools.count(1)


def a_token(**fields: Any) -> StoredToken:
    """A record for the store, of its own id and digest, valid at ``NOW``, with these fields instead."""
    number = next(_numbers)
    token = StoredToken(
        id=f"{number:032x}",
        content_type="auth.user",
        object_id="42",
        slug="reset",
        digest=a_digest(number),
        scheme="sha256",
        secret_id="",
        plain_key="",
        nonce="",
        context=b"",
        created_at=NOW,
        expires_at=NOW + 60 * MINUTE,
        ends_at=NOW + 60 * MINUTE,
        is_active=True,
        extra_data=None,
        max_uses=1,
        uses=0,
        used_at=0,
        use_ids=(),
        lease_id="",
        lease_until=0,
    )
    if "expires_at" in fields and "ends_at" not in fields:
        fields["ends_at"] = fields["expires_at"]
    return token._replace(**fields)


def where(**fields: Any) -> Match:
    """A condition of fields named at run time."""
    return Match(**fields)


def dice(seed: int) -> Random:
    """A source of variety that is the same in every run."""
    return Random(seed)  # noqa: S311 - it guards nothing


def a_digest(seed: object) -> bytes:
    return hashlib.sha256(str(seed).encode()).digest()


def ended(token: StoredToken, at: int) -> StoredToken:
    """The token as :meth:`TokenBackend.deactivate` leaves it."""
    return token._replace(is_active=False, ends_at=min(token.ends_at, at - 1))


async def find_all(backend: TokenBackend) -> list[StoredToken]:
    """Everything, page by page."""
    found: list[StoredToken] = []
    page = await backend.find(Match(), 500)
    while page:
        found += page
        assert len({token.id for token in found}) == len(found), "a page repeats the one before"
        page = await backend.find(Match(), 500, (found[-1].created_at, found[-1].id))
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
