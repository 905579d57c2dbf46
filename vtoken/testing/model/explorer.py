"""An explorer of interleavings: calls of the manager in every order of their steps.

Some actors, each with a short script of calls, share a manager on a memory backend. A step is one call of the
backend; a scheduler lets one actor after the other make its next step. It plays every schedule: it runs
the whole from its beginning with the first schedule, goes back to the last step at which another actor could
have been next, and runs it again, until none is left. There is no chance in it, and nothing waits for a
clock.

How a run may end is found out in the same way, with steps that are whole calls of the manager: the ends of
all orders of these are right, and no other is, except where a call is documented not to be a single step.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations_with_replacement
from typing import Any, Final, NamedTuple, Self, TypeVar

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
    TokenBackend,
    Use,
)
from vtoken.errors import InvalidToken, VTokenError
from vtoken.limits import Limit
from vtoken.manager import TokenManager
from vtoken.policy import Settings, TokenPolicy
from vtoken.registry import create_backend
from vtoken.testing.clock import Clock
from vtoken.testing.harness import SECRET, USER
from vtoken.token import IssuedToken, VerificationToken

T = TypeVar("T")
_QUIET: Final = 4
"""After so many turns of the event loop in which nothing happened, nothing more happens by itself."""
_PATIENCE: Final = 10
"""Seconds after which a schedule that hangs is failed."""
Script = Callable[["Stage"], Awaitable[object]]


class Actor(NamedTuple):
    """Somebody who makes calls."""

    name: str
    script: Script
    reaches_others: bool = False
    """It changes more than the store, so that it matters when the others begin and end."""
    undone: Script | None = None
    """What a cancelled script comes to that was carried out all the same, and then undid what it had done."""


class Scene(NamedTuple):
    """What is there before the actors come."""

    name: str
    policy: TokenPolicy
    prepare: Callable[[Stage], Awaitable[object]]


class End(NamedTuple):
    """How a run ended, in words that do not depend on what was drawn by chance."""

    told: tuple[tuple[str, tuple[str, ...]], ...]
    """By actor: what its calls returned or raised."""
    tokens: tuple[str, ...]
    budgets: tuple[str, ...]


@dataclass
class Outcome:
    """What an exploration found."""

    schedules: int = 0
    wrong: list[str] = field(default_factory=list[str])


def explore(scene: Scene, actors: Sequence[Actor]) -> Outcome:
    """Play every schedule, and list those whose end no order of whole calls has."""
    serial = {end for end, _ in _runs(scene, actors, in_steps=False)}
    for number, actor in enumerate(actors):
        if actor.undone is not None:
            others = [*actors[:number], actor._replace(script=actor.undone), *actors[number + 1 :]]
            ends = {end for end, _ in _runs(scene, others, in_steps=False)}
            serial |= {end for end in ends if (f"{actor.name}/{number}", ("cancelled",)) in end.told}
    outcome = Outcome()
    for end, schedule in _runs(scene, actors, in_steps=True):
        outcome.schedules += 1
        if end not in serial:
            names = " beside ".join(actor.name for actor in actors)
            outcome.wrong.append(f"{scene.name}: {names}, in the order {' '.join(schedule)}: {end}")
    return outcome


def _runs(scene: Scene, actors: Sequence[Actor], *, in_steps: bool) -> Iterator[tuple[End, list[str]]]:
    """The end of every schedule."""
    choices: list[int] = []
    with asyncio.Runner() as runner:
        while True:
            stage = Stage(scene, actors, choices, in_steps)
            end = runner.run(stage.play())
            yield end, stage.schedule
            taken = stage.taken
            while taken and taken[-1][0] + 1 == taken[-1][1]:
                taken.pop()
            if not taken:
                return
            choices = [choice for choice, _ in taken[:-1]] + [taken[-1][0] + 1]


class Stage:
    """One run of a schedule.

    Args:
        scene: what is there before.
        actors: who makes calls.
        choices: which of the actors that could be next is, step by step; the first where it ends.
        in_steps: whether each call of the backend is a step, or each call of the manager.
    """

    def __init__(self, scene: Scene, actors: Sequence[Actor], choices: Sequence[int], in_steps: bool) -> None:
        self.clock = Clock()
        self.in_steps = in_steps
        self.policy = scene.policy
        self.slug = scene.policy.slug
        self.tokens: dict[str, IssuedToken] = {}
        """Those that were there before, by name."""
        self.labels: dict[str, str] = {}
        """Who issued a token, by its id."""
        self.schedule: list[str] = []
        self.taken: list[tuple[int, int]] = []
        """Step by step: which actor was next, and of how many."""
        self.tasks: list[asyncio.Task[None]] = []
        self.is_call_made_when_cancelled = False
        self._prepare = scene.prepare
        self._actors = actors
        self._choices = choices
        self._told: dict[str, list[str]] = {}
        self._running = ""
        """Whose step it is. A manager may make a call in a task of its own, which does not know."""
        self._waiting: list[_Ticket] = []
        self._activity = 0
        self._backend = _Stepping(self)
        self.manager = TokenManager(
            self._backend, settings=Settings(secret=SECRET), policies=[scene.policy], clock=self.clock
        )

    def key(self, name: str = "first") -> str:
        """The key of a token that was there before."""
        return self.tokens[name].key

    async def play(self) -> End:
        """Run the schedule."""
        async with asyncio.timeout(_PATIENCE):
            return await self._play()

    async def _play(self) -> End:
        await self._backend.open()
        await self._backend.note("seed", "5e" * 32)  # so that budgets have the same names in all runs
        await self.manager.open()
        await self._prepare(self)
        for number, actor in enumerate(self._actors):
            name = f"{actor.name}/{number}"
            self._told[name] = []
            self._running = name
            self.tasks.append(asyncio.create_task(self._act(name, actor.script)))
            await self._settle()
        await self._schedule()
        self._running = ""
        end = await self._end()
        await self.manager.aclose()
        await self._backend.close()
        return end

    async def turn(self) -> None:
        """A step begins: wait until it is the running actor's turn."""
        name = _actor.get() or self._running
        if not name:
            return
        self._activity += 1
        ticket = _Ticket(name, asyncio.get_running_loop().create_future())
        self._waiting.append(ticket)
        try:
            await ticket.called
        finally:
            self._waiting = [other for other in self._waiting if other is not ticket]

    async def call(self, make: Callable[[], Awaitable[Any]]) -> Any:
        """Make a call of the manager, and note what it gave. An error of the library is returned."""
        if not self.in_steps:
            await self.turn()
        return await self._noted(make)

    async def _noted(self, make: Callable[[], Awaitable[Any]]) -> Any:
        try:
            answer = await make()
        except VTokenError as error:
            answer = error
        self._told[_actor.get()].append(self._as_told(answer))
        return answer

    async def prepare(self, name: str) -> None:
        """Issue a token that is there before."""
        self.tokens[name] = await self.manager.issue(USER, self.slug)
        self.labels[self.tokens[name].id] = name

    def issues(self, token_id: str) -> None:
        """The running actor is about to insert a token."""
        self.labels[token_id] = self._running

    async def block(
        self,
        block: AbstractAsyncContextManager[VerificationToken],
        body: Callable[[], Awaitable[object]] | None = None,
        *,
        fails: bool = False,
    ) -> None:
        """Enter a block of the manager, do something in it, and leave it."""
        if isinstance(await self.call(block.__aenter__), VTokenError):
            return
        try:
            if body is not None:
                await body()
            if not self.in_steps:
                await self.turn()
            if fails:
                raise _Failed  # noqa: TRY301  # the block itself fails, inside of it
        except BaseException as error:
            await self._noted(partial(block.__aexit__, type(error), error, None))
            raise
        await self._noted(partial(block.__aexit__, None, None, None))

    async def _act(self, name: str, script: Script) -> None:
        _actor.set(name)
        has_ends = any(actor.reaches_others for actor in self._actors)
        try:
            if has_ends:
                await self.turn()
            await script(self)
            if has_ends:
                await self.turn()
        except asyncio.CancelledError:
            self._told[name] = ["cancelled"]  # it heard no answer
        except _Failed:
            self._told[name].append("failed")
        finally:
            self._activity += 1

    async def _schedule(self) -> None:
        while not all(task.done() for task in self.tasks):
            await self._settle()
            ready = sorted(self._waiting, key=_number)
            if not ready:
                await asyncio.sleep(0.001)  # somebody waits in real time for what another may do
                continue
            place = len(self.taken)
            choice = self._choices[place] if place < len(self._choices) else 0
            self.taken.append((choice, len(ready)))
            self._running = ready[choice].name
            self.schedule.append(self._running)
            self._waiting.remove(ready[choice])
            ready[choice].called.set_result(None)

    async def _settle(self) -> None:
        quiet, seen = 0, -1
        while quiet < _QUIET:
            quiet = quiet + 1 if self._activity == seen else 0
            seen = self._activity
            await asyncio.sleep(0)

    # What it came to

    async def _end(self) -> End:
        tokens = await self._backend.find(Match(), 99)
        names = sorted(self._backend.names)
        states = await self._backend.budgets(tuple(names))
        budgets = [f"{name.name.hex()} {state}" for name, state in zip(names, states, strict=True)]
        told = tuple((name, tuple(answers)) for name, answers in sorted(self._told.items()))
        return End(told, tuple(sorted(map(self._as_held, tokens))), tuple(budgets))

    def _label(self, token_id: str) -> str:
        return self.labels.get(token_id, "nobody")

    def _as_held(self, token: StoredToken) -> str:
        keys = [f"{key.kind} of {self._label(key.origin)} until {key.expires_at}" for key in token.keys]
        return (
            f"{self._label(token.id)}: {token.state.name}, used {token.uses} at {token.used_at}, held"
            f" {len(token.holds)}, beside {token.is_beside}, ends {token.ends_at}, {token.extra_data}, {keys}"
        )

    def _as_told(self, answer: object) -> str:
        if isinstance(answer, VerificationToken):
            key = "with its key" if answer.key is not None else ""
            again = "again" if answer.is_replay else ""
            return f"{self._label(answer.id)} used {answer.uses} {again} {key}"
        if isinstance(answer, VTokenError):
            carried = {name: value for name, value in vars(answer).items() if name not in ("token", "limit")}
            return f"{type(answer).__name__} {carried}"
        return str(answer)


class _Ticket(NamedTuple):
    """An actor that waits for its turn."""

    name: str
    called: asyncio.Future[None]


def _number(ticket: _Ticket) -> int:
    return int(ticket.name.rpartition("/")[2])


class _Failed(Exception):
    """What a block of a script raises."""


_actor: contextvars.ContextVar[str] = contextvars.ContextVar("actor", default="")
_loose: contextvars.ContextVar[bool] = contextvars.ContextVar("loose", default=False)
"""Whether the running call is documented not to be a single step."""


class _Stepping:
    """A memory backend, each call of which is a step."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._store = create_backend("memory://")
        self.names: set[Budget] = set()
        """Of the budgets that were asked for."""

    @classmethod
    def from_url(cls, url: str, **options: object) -> Self:
        raise NotImplementedError

    async def open(self) -> None:
        await self._store.open()

    async def close(self) -> None:
        await self._store.close()

    async def ping(self) -> None:
        await self._store.ping()

    async def note(self, name: str, text: str, *, replace: bool = False) -> str:
        return await self._store.note(name, text, replace=replace)

    def within(self, handle: object) -> TokenBackend:
        return self._store.within(handle)

    async def insert(self, token: StoredToken, mode: InsertMode, **named: Any) -> Inserted:
        self._stage.issues(token.id)
        self.names.update(spend.budget for spend in named.get("spends", ()))
        return await self._step(lambda: self._store.insert(token, mode, **named))

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        self.names.update(spend.budget for spend in spends)
        return await self._step(lambda: self._store.present(key, change, now, spends))

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        return await self._step(lambda: self._store.update(match, change))

    async def find(self, match: Match, limit: int, after: str | None = None) -> list[StoredToken]:
        return await self._step(lambda: self._store.find(match, limit, after))

    async def deactivate(self, match: Match, at: int, sparing: tuple[str, ...] = ()) -> int:
        return await self._step(lambda: self._store.deactivate(match, at, sparing))

    async def erase(self, content_type: str, object_id: str, budgets_of: bytes) -> int:
        return await self._step(lambda: self._store.erase(content_type, object_id, budgets_of))

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> Purged:
        return await self._step(lambda: self._store.purge(before, now, limit, budgets_before))

    async def count(self, now: int) -> list[SlugCount]:
        return await self._step(lambda: self._store.count(now))

    async def spend(self, spends: tuple[Spend, ...], now: int) -> Spending:
        self.names.update(spend.budget for spend in spends)
        return await self._step(lambda: self._store.spend(spends, now))

    async def refund(self, charges: tuple[Charge, ...]) -> None:
        await self._step(lambda: self._store.refund(charges))

    async def budgets(self, names: tuple[Budget, ...]) -> list[BudgetState | None]:
        return await self._step(lambda: self._store.budgets(names))

    async def reset(self, budgets_of: bytes, names: tuple[bytes, ...] | None) -> int:
        return await self._step(lambda: self._store.reset(budgets_of, names))

    async def _step(self, call: Callable[[], Awaitable[T]]) -> T:
        if self._stage.in_steps or _loose.get():
            try:
                await self._stage.turn()
            except asyncio.CancelledError:
                if self._stage.is_call_made_when_cancelled:
                    await call()
                raise
        return await call()


# Scenes -------------------------------------------------------------------------------------------


async def _first(stage: Stage) -> None:
    await stage.prepare("first")


async def _two(stage: Stage) -> None:
    await stage.prepare("older")
    await _first(stage)


async def _last_attempt(stage: Stage) -> None:
    await _first(stage)
    await _attempt(stage)


async def _attempt(stage: Stage) -> None:
    with suppress(InvalidToken):
        await stage.manager.verify(USER, stage.slug, _wrong(stage.key()))


def _wrong(key: str) -> str:
    return f"{(int(key) + 1) % 10 ** len(key):0{len(key)}}" if key.isdecimal() else "a wrong link"


SCENES: Final = (
    Scene("a link", TokenPolicy("reset"), _first),
    Scene("an overlap of derived links", TokenPolicy("lap", overlap="5m", key_storage="derived"), _two),
    Scene(
        "a code on its last attempt",
        TokenPolicy.code("sms", max_attempts=2, issue_limits=[Limit(2, "1h")]),
        _last_attempt,
    ),
    Scene("an invitation for two", TokenPolicy("invite", max_uses=2), _first),
)


# Actors -------------------------------------------------------------------------------------------


def _in_steps(make: Callable[[Stage], Awaitable[object]]) -> Script:
    """A script of one call that is documented not to be a single step."""

    async def script(stage: Stage) -> None:
        _loose.set(True)
        await stage.call(lambda: make(stage))

    return script


def _redeem(
    body: Callable[[Stage], Awaitable[object]] | None = None, fails: bool = False, **named: Any
) -> Script:
    async def script(stage: Stage) -> None:
        inside = None if body is None else partial(body, stage)
        block = stage.manager.redeem(USER, stage.slug, stage.key(), **named)
        await stage.block(block, inside, fails=fails)

    return script


def _calling(make: Callable[[Stage], Awaitable[object]]) -> Script:
    """A script of one call."""

    async def script(stage: Stage) -> None:
        await stage.call(lambda: make(stage))

    return script


def _issuing(**named: Any) -> Actor:
    """Somebody who issues a token; cancelled, the manager ends what it may have inserted."""
    name = "issue" if named.get("replace", True) else "add"

    async def undone(stage: Stage) -> None:
        await stage.manager.deactivate(await stage.manager.issue(USER, stage.slug, **named))

    issue = _calling(lambda s: s.manager.issue(USER, s.slug, **named))
    return Actor(name, issue, undone=_calling(undone))


async def _send(stage: Stage) -> None:
    await stage.block(stage.manager.issuing(USER, stage.slug), fails=True)


SENDER: Final = Actor("send and fail", _send)
ISSUE: Final = _issuing()
ACTORS: Final = (
    ISSUE,
    _issuing(replace=False),
    Actor("get or create", _calling(lambda s: s.manager.get_active_or_create(USER, s.slug))),
    SENDER,
    Actor("consume", _calling(lambda s: s.manager.consume(USER, s.slug, s.key()))),
    Actor("consume as me", _calling(lambda s: s.manager.consume(USER, s.slug, s.key(), consume_id="me"))),
    Actor("present a wrong key", _calling(lambda s: s.manager.consume(USER, s.slug, _wrong(s.key())))),
    Actor("check", _calling(lambda s: s.manager.verify(USER, s.slug, s.key()))),
    Actor("redeem", _redeem()),
    Actor("redeem as me", _redeem(consume_id="me")),
    Actor("redeem and fail", _redeem(fails=True)),
    Actor("redeem and deactivate", _redeem(_calling(lambda s: s.manager.deactivate(USER)))),
    Actor("redeem and issue", _redeem(ISSUE.script), undone=ISSUE.undone and _redeem(ISSUE.undone)),
    Actor("deactivate", _calling(lambda s: s.manager.deactivate(USER, s.slug))),
    Actor("deactivate the token", _calling(lambda s: s.manager.deactivate(s.tokens["first"]))),
    Actor("ask for the status", _in_steps(lambda s: s.manager.status(USER, s.slug))),
    Actor("reset the limits", _calling(lambda s: s.manager.reset_limits(USER))),
    Actor("erase", _in_steps(lambda s: s.manager.erase(USER))),
    Actor("close", _calling(lambda s: s.manager.aclose()), reaches_others=True),
)


def cancelling(number: int, *, late: bool) -> Actor:
    """Somebody who cancels the actor of this number, whose call of the backend then has not happened, or
    has."""

    async def script(stage: Stage) -> None:
        stage.is_call_made_when_cancelled = late
        stage.tasks[number].cancel()

    return Actor(f"cancel {'late' if late else 'early'}", script, reaches_others=True)


def pairs() -> Iterator[tuple[Actor, ...]]:
    """Every two actors, and each with somebody who cancels it."""
    yield from combinations_with_replacement(ACTORS, 2)
    for actor in ACTORS:
        yield actor, cancelling(0, late=False)
        if actor is not SENDER:  # whose token stays where it was stored, but the caller was not told of it
            yield actor, cancelling(0, late=True)


def triples() -> Iterator[tuple[Actor, ...]]:
    """Chosen three."""
    by_name = {actor.name: actor for actor in ACTORS}
    for names in (
        ("issue", "get or create", "consume"),
        ("issue", "add", "get or create"),
        ("consume", "redeem and fail", "deactivate"),
        ("consume as me", "redeem as me", "issue"),
        ("consume as me", "consume as me", "deactivate"),
        ("present a wrong key", "consume", "consume"),
        ("present a wrong key", "redeem and fail", "consume"),
        ("redeem", "redeem", "redeem and deactivate"),
        ("redeem and issue", "redeem and issue", "consume"),
        ("redeem and fail", "redeem and fail", "issue"),
        ("send and fail", "issue", "consume"),
        ("send and fail", "send and fail", "get or create"),
        ("reset the limits", "present a wrong key", "issue"),
        ("erase", "redeem", "get or create"),
    ):
        yield tuple(by_name[name] for name in names)
