"""Plays every operation on a token in every state, as ``docs/reference/states.md`` describes them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Final, NamedTuple

from vtoken import (
    InvalidInput,
    InvalidToken,
    LeaseLost,
    Limit,
    Subject,
    TokenManager,
    TokenPolicy,
    VerificationToken,
    create_backend,
)
from vtoken.backend import Match, State, StoredToken, has_free_use, running_holds

from .core_tools import MINUTE, MS, World

NO_KEY: Final = "x" * 32
_LIMITS: Final = [Limit(1000, "1d")]
POLICIES: Final = (
    TokenPolicy.link("single", max_attempts=5, issue_limits=_LIMITS),
    TokenPolicy.link("twice", max_attempts=5, issue_limits=_LIMITS, max_uses=2),
    TokenPolicy.link("overlapping", max_attempts=5, issue_limits=_LIMITS, overlap="10m"),
)
STATES: Final = (
    "active",
    "held",
    "all uses held",
    "overlapped",
    "expired",
    "used",
    "deactivated",
    "replaced",
    "purged",
    "never there",
)
SLUGS: Final = {"held": "twice", "overlapped": "overlapping"}
CANNOT_BE: Final = {
    "active": "cannot be: the block holds a use",
    "used": "cannot be: the block holds a use",
    "never there": "cannot be: the block was not entered",
}
"""For what happens in a block."""
ENDED: Final = {
    State.USED: "used",
    State.ENDED: "deactivated",
    State.REPLACED: "replaced",
}
Handle = Callable[[], AbstractAsyncContextManager[object]]
"""Opens a transaction of the application's own, and gives what ``using=`` takes."""


class Cell(NamedTuple):
    """What an operation does to a token in a state."""

    operation: str
    state: str
    result: str
    charged: str
    event: str
    after: str

    @property
    def row(self) -> str:
        """The cell as a row of the table."""
        return f"| {' | '.join(self)} |"


class Subjected(NamedTuple):
    """A token in its state, and what is presented of it."""

    person: Subject
    slug: str
    key: str
    token_id: str
    block: AbstractAsyncContextManager[VerificationToken] | None = None
    held: VerificationToken | None = None
    """What the block was given."""


class Player:
    """Plays cells on one store, each with an object of its own.

    Args:
        world: a clock, the store and the events.
        manager: the one that is asked.
        other: another one, for what happens outside.
        transaction: of the application's own; None where the store knows none.
    """

    def __init__(
        self, world: World, manager: TokenManager, other: TokenManager, transaction: Handle | None = None
    ) -> None:
        self._world = world
        self._manager = manager
        self._other = other
        self._transaction = transaction
        self._people = itertools.count()
        self._now: Subjected

    async def play(self, operation: str, state: str) -> Cell:
        """Bring a token into a state, do something, and say what came of it."""
        in_block = operation in BLOCK
        if in_block and state in CANNOT_BE:
            return Cell(operation, state, CANNOT_BE[state], "", "", "")
        await self._manager.purge()
        self._now = now = await (self._in_block(state) if in_block else self._prepared(state))
        self._world.events.clear()
        self._world.backend.charges.clear()
        doing = OPERATIONS.get(operation) or BLOCK[operation]
        try:
            result = await doing(self)
        except InvalidToken as error:
            given = ", with `token`" if error.token is not None else ""
            result = f"`{type(error).__name__}` {error.reason}{given}"
        except (LeaseLost, InvalidInput) as error:
            result = f"`{type(error).__name__}`"
        charged = len(self._world.backend.charges)
        kind = "issue" if operation in ("issue", "get_active_or_create") else "attempt"
        events = ", ".join(f"`{name}`" for name in self._world.event_names)
        after = await self._after(now)
        await self._manager.erase(now.person)
        return Cell(operation, state, result, f"1 {kind}" if charged else "nothing", events or "none", after)

    # The states ---------------------------------------------------------------------------------

    async def _prepared(self, state: str) -> Subjected:
        made = await self._issued(state)
        await self._bring(made, state)
        return made

    async def _issued(self, state: str) -> Subjected:
        """A token that can be brought into a state."""
        person, slug = Subject("auth.user", f"person {next(self._people)}"), SLUGS.get(state, "single")
        if state == "never there":
            return Subjected(person, slug, NO_KEY, "")
        token = await self._manager.issue(person, slug, expires_in="1m" if state == "expired" else "1h")
        return Subjected(person, slug, token.key, token.id)

    async def _in_block(self, state: str) -> Subjected:
        """A token that a block of ours holds, brought into a state meanwhile."""
        made = await self._issued(state)
        if state == "overlapped":
            await self._bring(made, state)
        lease = "30s" if state == "purged" else "10m"
        block = self._manager.redeem(made.person, made.slug, made.key, lease=lease)
        made = made._replace(block=block, held=await block.__aenter__())
        if state == "purged":  # a token that is held stays: the lease has to end first
            self._world.clock.advance(MINUTE)
        if state not in ("held", "all uses held", "overlapped"):
            await self._bring(made, state)
        return made

    async def _bring(self, made: Subjected, state: str) -> None:
        """Bring a token into its state, from outside of any block of ours."""
        person, slug = made.person, made.slug
        if state in ("held", "all uses held"):
            await self._elsewhere(self._other.redeem(person, slug, made.key, lease="10m").__aenter__())
        elif state == "overlapped":
            await self._other.issue(person, slug)
        elif state == "expired":
            self._world.clock.advance(MINUTE + MS)
        elif state == "used":
            await self._other.consume(person, slug, made.key)
        elif state in ("deactivated", "purged"):
            await self._other.deactivate(person)
        elif state == "replaced":
            await self._other.issue(person, slug)
        if state == "purged":
            await self._other.purge()

    async def _elsewhere(self, call: Awaitable[object]) -> None:
        """Await a call in a task of its own, so that this one is not inside what it enters."""

        async def run() -> None:
            await call

        await asyncio.create_task(run())

    async def _after(self, now: Subjected) -> str:
        """What has become of the key that was presented."""
        if not now.token_id:
            return "never there"
        store, moment = self._world.backend.inner, self._world.clock.milliseconds
        found = await store.find(Match(content_type="auth.user", object_id=str(now.person.object_id)), 10)
        for stored in found:
            if any(key.origin == now.token_id for key in stored.keys):
                return _named(stored, now.token_id, moment)
        return "gone"

    # The operations -----------------------------------------------------------------------------

    async def issue(self) -> str:
        token = await self._manager.issue(self._now.person, self._now.slug)
        assert token.key
        return "a new token"

    async def get_active_or_create(self) -> str:
        before = await self._manager.status(self._now.person, self._now.slug)
        token = await self._manager.get_active_or_create(self._now.person, self._now.slug)
        if token.key is not None:
            return "a new token"
        assert before.expires_at in (None, token.expires_at)
        return (
            "the token, without its key" if token.id == self._now.token_id else "the token that replaced it"
        )

    async def exists_valid(self) -> str:
        return f"`{await self._manager.exists_valid(self._now.person, self._now.slug, self._now.key)}`"

    async def verify(self) -> str:
        return self._token(await self._manager.verify(self._now.person, self._now.slug, self._now.key))

    async def consume(self) -> str:
        return self._token(await self._manager.consume(self._now.person, self._now.slug, self._now.key))

    async def redeem(self) -> str:
        async with self._manager.redeem(self._now.person, self._now.slug, self._now.key) as token:
            return self._token(token)

    async def deactivate(self) -> str:
        return f"{await self._manager.deactivate(self._now.person, self._now.slug)}"

    async def erase(self) -> str:
        return f"{await self._manager.erase(self._now.person)}"

    async def purge(self) -> str:
        return f"{await self._manager.purge()}"

    def _token(self, token: VerificationToken) -> str:
        return "the token" if token.id == self._now.token_id else "the token that replaced it"

    # In a block ---------------------------------------------------------------------------------

    async def end(self) -> str:
        assert self._now.block is not None
        await self._now.block.__aexit__(None, None, None)
        return "the use is counted"

    async def fail(self) -> str:
        assert self._now.block is not None
        error = ZeroDivisionError()
        await self._now.block.__aexit__(type(error), error, None)
        return "the block's own exception"

    async def deactivate_inside(self) -> str:
        count = await self._manager.deactivate(self._now.person, self._now.slug)
        return f"{count}; {await self.end()}"

    async def mark_used(self) -> str:
        assert self._now.held is not None
        assert self._now.block is not None
        try:
            async with nullcontext(object()) if self._transaction is None else self._transaction() as handle:
                await self._manager.mark_used(self._now.held, using=handle)
        except BaseException as error:
            await self._now.block.__aexit__(type(error), error, None)
            raise
        return await self.end()


OPERATIONS: Final[dict[str, Callable[[Player], Awaitable[str]]]] = {
    "issue": Player.issue,
    "get_active_or_create": Player.get_active_or_create,
    "exists_valid": Player.exists_valid,
    "verify": Player.verify,
    "consume": Player.consume,
    "redeem": Player.redeem,
    "deactivate": Player.deactivate,
    "erase": Player.erase,
    "purge": Player.purge,
}
BLOCK: Final[dict[str, Callable[[Player], Awaitable[str]]]] = {
    "the block ends": Player.end,
    "the block fails": Player.fail,
    "mark_used": Player.mark_used,
    "deactivate inside the block": Player.deactivate_inside,
}
"""What happens at the end of a ``redeem`` block, or inside it."""


def _named(stored: StoredToken, origin: str, now: int) -> str:
    if not stored.is_active:
        return ENDED[stored.state]
    [key] = [key for key in stored.keys if key.origin == origin]
    if stored.expires_at < now or key.expires_at < now:
        return "expired"
    if not has_free_use(stored, now):
        return "all uses held"
    if running_holds(stored, now):
        return "held"
    return "active" if stored.id == origin else "overlapped"


@asynccontextmanager
async def new_world(url: str) -> AsyncGenerator[World]:
    """A world on the store that a URL names."""
    world = World(create_backend(url))
    try:
        yield world
    finally:
        await world.aclose()
