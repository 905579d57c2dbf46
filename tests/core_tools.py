"""What the tests of the core stand on: a world with a clock, a watched store in memory, and its events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Self, TypeVar

import hypothesis
import pytest

from vtoken import (
    ContentTypes,
    InvalidToken,
    Settings,
    Subject,
    TokenBackend,
    TokenEvent,
    TokenManager,
    TokenPolicy,
    VerificationToken,
)
from vtoken.backend import (
    Budget,
    BudgetState,
    Change,
    Charge,
    Hold,
    Inserted,
    InsertMode,
    Match,
    Presented,
    Purged,
    SlugCount,
    Spend,
    Spending,
    StoredToken,
    Use,
)
from vtoken.limits import REMEMBERED
from vtoken.testing.clock import Clock
from vtoken_backends.memory import MemoryBackend

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)

SECRET: Final = "a secret of the tests of the core, 32 bytes or more"
OLD_SECRET: Final = "the secret before it, which was as long as that one"
SECRETS: Final = Settings(secret=SECRET)
USER: Final = Subject("auth.user", 42)
OTHER: Final = Subject("auth.user", 43)
START: Final = datetime(2100, 1, 1, tzinfo=UTC)
MS: Final = timedelta(milliseconds=1)
MINUTE: Final = timedelta(minutes=1)
CODE: Final = TokenPolicy.code("login")
WRONG: Final = "no such key"
WRONG_CODE: Final = "271828"
"""A code that no test issues on purpose: one in a million draws it."""

unhurried: Final = hypothesis.settings(deadline=None)
"""For Hypothesis: its deadline is an assertion about wall time."""


class Watched:
    """A backend that writes down what it is asked, and fails or is interrupted where it is told to.

    Args:
        inner: what does the work.
    """

    def __init__(self, inner: TokenBackend | None = None) -> None:
        self.inner: TokenBackend = inner or MemoryBackend()
        self.calls: list[str] = []
        self.spends: list[Spend] = []
        """Everything that was to be spent."""
        self.charges: list[Charge] = []
        """Everything that was charged, whether or not it was given back."""
        self.failing: dict[str, Exception] = {}
        """By method: what is raised instead of doing it."""
        self.before: dict[str, Callable[[], Awaitable[object]]] = {}
        """By method: what happens first."""
        self.after: dict[str, Callable[[], Awaitable[object]]] = {}
        """By method: what happens once it is done."""

    @classmethod
    def from_url(cls, url: str, **options: object) -> Self:
        return cls(MemoryBackend.from_url(url, **options))

    async def _do(self, name: str, step: Callable[[], Coroutine[Any, Any, T]]) -> T:
        self.calls.append(name)
        if name in self.before:
            await self.before[name]()
        if name in self.failing:
            raise self.failing[name]
        result = await step()
        if name in self.after:
            await self.after[name]()
        return result

    async def open(self) -> None:
        await self._do("open", self.inner.open)

    async def close(self) -> None:
        await self._do("close", self.inner.close)

    async def ping(self) -> None:
        await self._do("ping", self.inner.ping)

    async def note(self, name: str, text: str, *, replace: bool = False) -> str:
        return await self._do("note", lambda: self.inner.note(name, text, replace=replace))

    def within(self, handle: object) -> TokenBackend:
        self.calls.append("within")
        return self.inner.within(handle)

    async def insert(
        self,
        token: StoredToken,
        mode: InsertMode,
        *,
        keep_until: int = 0,
        wanted_until: int = 0,
        also_taken: tuple[bytes, ...] = (),
        spends: tuple[Spend, ...] = (),
    ) -> Inserted:
        self.spends += spends
        answer = await self._do(
            "insert",
            lambda: self.inner.insert(
                token,
                mode,
                keep_until=keep_until,
                wanted_until=wanted_until,
                also_taken=also_taken,
                spends=spends,
            ),
        )
        self.charges += answer.spending.charges
        return answer

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        self.spends += spends
        answer = await self._do("present", lambda: self.inner.present(key, change, now, spends))
        self.charges += answer.spending.charges
        return answer

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        return await self._do("update", lambda: self.inner.update(match, change))

    async def find(self, match: Match, limit: int, after: str | None = None) -> list[StoredToken]:
        return await self._do("find", lambda: self.inner.find(match, limit, after))

    async def deactivate(self, match: Match, at: int, sparing: tuple[str, ...] = ()) -> int:
        return await self._do("deactivate", lambda: self.inner.deactivate(match, at, sparing))

    async def erase(self, content_type: str, object_id: str, budgets_of: bytes) -> int:
        return await self._do("erase", lambda: self.inner.erase(content_type, object_id, budgets_of))

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> Purged:
        return await self._do("purge", lambda: self.inner.purge(before, now, limit, budgets_before))

    async def count(self, now: int) -> list[SlugCount]:
        return await self._do("count", lambda: self.inner.count(now))

    async def spend(self, spends: tuple[Spend, ...], now: int) -> Spending:
        self.spends += spends
        answer = await self._do("spend", lambda: self.inner.spend(spends, now))
        self.charges += answer.charges
        return answer

    async def refund(self, charges: tuple[Charge, ...]) -> None:
        await self._do("refund", lambda: self.inner.refund(charges))

    async def budgets(self, names: tuple[Budget, ...]) -> list[BudgetState | None]:
        return await self._do("budgets", lambda: self.inner.budgets(names))

    async def reset(self, budgets_of: bytes, names: tuple[bytes, ...] | None) -> int:
        return await self._do("reset", lambda: self.inner.reset(budgets_of, names))


class World:
    """A clock that stands still, one watched store, and everything the managers' hooks heard.

    Args:
        inner: the store; one in memory if it is left out.
    """

    def __init__(self, inner: TokenBackend | None = None) -> None:
        self.clock = Clock(START)
        self.backend = Watched(inner)
        self.events: list[TokenEvent] = []
        self._stack = AsyncExitStack()

    async def manager(
        self,
        *policies: TokenPolicy,
        settings: Settings | None = None,
        backend: TokenBackend | None = None,
        content_types: ContentTypes | None = None,
    ) -> TokenManager:
        """An open manager on the world's store."""
        manager = TokenManager(
            backend or self.backend,
            settings=settings or SECRETS,
            policies=policies,
            content_types=content_types,
            clock=self.clock,
            hooks=[self.events.append],
        )
        return await self._stack.enter_async_context(manager)

    @property
    def event_names(self) -> list[str]:
        return [event.name for event in self.events]

    async def stored(self) -> list[StoredToken]:
        """All tokens, newest first, as the store holds them."""
        return await self.backend.inner.find(Match(), 10_000)

    async def due_budgets(self) -> int:
        """How many budgets are stored that a purge would forget now. It forgets them."""
        now = self.clock.milliseconds
        return (await self.backend.inner.purge(0, now, 10_000, now - REMEMBERED)).budgets

    async def aclose(self) -> None:
        await self._stack.aclose()


async def refused(kind: type[E], call: Awaitable[object]) -> E:
    """Await a call that must raise, and return its error."""
    with pytest.raises(kind) as info:
        await call
    return info.value


async def reason(call: Awaitable[object]) -> str:
    """Await a call that must be refused, and say why it was."""
    return (await refused(InvalidToken, call)).reason


async def listed(tokens: AsyncIterator[VerificationToken]) -> list[VerificationToken]:
    """What an iterator of tokens yields."""
    return [token async for token in tokens]


async def redeem(manager: TokenManager, slug: str | None, key: str, **keywords: Any) -> str:
    """Redeem with a block that does nothing; the token's id."""
    async with manager.redeem(USER, slug, key, **keywords) as token:
        return token.id


def wrong_codes(right: str, count: int) -> Iterable[str]:
    """So many six-digit codes, none of them the right one."""
    return [f"{(int(right) + n) % 10**6:06}" for n in range(1, count + 1)]
