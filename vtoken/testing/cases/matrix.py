"""Every two writes on one token, and on one budget, at once: they end as one of their two orders.

A scene is what is stored of an object. Each pair of calls is made on scenes where their order, or a lost
write, would show; :mod:`vtoken.testing.model.serial` says how they may end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import combinations_with_replacement, islice
from typing import Any, Final

from vtoken.backend import (
    Budget,
    Charge,
    ForgetKey,
    Hold,
    InsertMode,
    Match,
    Release,
    SetExtraData,
    State,
    StoredHold,
    StoredToken,
    TokenBackend,
    Use,
    UseHeld,
)
from vtoken.testing.harness import (
    MINUTE,
    NOW,
    Bench,
    Suite,
    a_budget,
    a_digest,
    a_spend,
    a_token,
    at_once,
    by_key,
    case,
)
from vtoken.testing.model.serial import Call, Held, Meeting, call, end, is_worth_playing, serial_ends

HOLD: Final = "hold of before"
AT_A_TIME: Final = 32
"""So many pairs of calls are made at once, so that a store that gathers calls gathers these."""


class Stage:
    """An object of its own, and what the calls of a pair need to know of it."""

    def __init__(self, object_id: str) -> None:
        self.object_id = object_id
        self.tokens: list[StoredToken] = []
        self.attempts = a_budget("attempts", of=object_id)
        self.issues = a_budget("issues", of=object_id)
        self.contested = a_digest(f"contested by {object_id}")

    def add(self, *keys: dict[str, Any], **fields: Any) -> StoredToken:
        """Another token that is there before the calls; the last one is what they are about."""
        token = a_token(*keys, object_id=self.object_id, **{"created_at": NOW - 9, **fields})
        self.tokens.append(token)
        return token

    def new(self, digest: bytes | None = None, kind: str = "link", **fields: Any) -> StoredToken:
        """A token that a call inserts."""
        key: dict[str, Any] = {"kind": kind} if digest is None else {"digest": digest, "kind": kind}
        return a_token(key, object_id=self.object_id, **{"created_at": NOW, **fields})

    @property
    def token(self) -> StoredToken:
        return self.tokens[-1]

    @property
    def key(self) -> Match:
        """The first key of the token."""
        return by_key(self.token)

    @property
    def other_key(self) -> Match:
        """The second key of the token, or else the key of another one."""
        if len(self.token.keys) > 1:
            return by_key(self.token, 1)
        return next((by_key(t) for t in self.tokens[:-1] if t.keys), self.wrong_key)

    @property
    def wrong_key(self) -> Match:
        return self.key._replace(digests=(a_digest(f"wrong {self.object_id}"),))


# What is there before ------------------------------------------------------------------------------

A_HOLD: Final = StoredHold(hold_id=HOLD, until=NOW + MINUTE, use_id="", origin=f"{1:016x}")


def one_use(stage: Stage) -> None:
    stage.add()


def one_use_held(stage: Stage) -> None:
    stage.add(holds=(A_HOLD,))


def two_uses_one_held(stage: Stage) -> None:
    stage.add(max_uses=2, holds=(A_HOLD,))


def two_uses_two_held(stage: Stage) -> None:
    stage.add(max_uses=3, uses=1, used_at=NOW - 5, holds=(A_HOLD._replace(hold_id="another"), A_HOLD))


def an_overlap(stage: Stage) -> None:
    old = stage.add(state=State.REPLACED, ends_at=NOW - 10, keys=())
    stage.add({}, {"origin": old.id, "expires_at": NOW + MINUTE}, max_uses=2)


def an_expired_token(stage: Stage) -> None:
    stage.add(expires_at=NOW - 1, created_at=NOW - MINUTE)


def a_link_and_a_code(stage: Stage) -> None:
    stage.add({}, {"kind": "code", "digest": stage.contested, "expires_at": NOW + 9}, extra_data="0")


def a_code_that_is_over(stage: Stage) -> None:
    stage.add({"kind": "code", "digest": stage.contested}, state=State.USED, uses=1, ends_at=NOW - 5)


def one_beside(stage: Stage) -> None:
    stage.add(is_beside=True, max_uses=None)
    stage.add()


def nothing_but_one_beside(stage: Stage) -> None:
    stage.add(is_beside=True, holds=(A_HOLD,))


def two_contexts(stage: Stage) -> None:
    stage.add(context=b"another browser", holds=(A_HOLD._replace(hold_id="another"),))
    stage.add(context=b"this browser", max_uses=2, uses=1)


def replaced_while_held(stage: Stage) -> None:
    stage.add(state=State.REPLACED, ends_at=NOW - 1, holds=(A_HOLD,))
    stage.add()


def no_bound(stage: Stage) -> None:
    stage.add(max_uses=None, uses=5, used_at=NOW - 3, keys=(), is_beside=True, state=State.ENDED)
    stage.add({"plain_key": "plain"}, max_uses=None, uses=70_000, used_at=NOW - 5, extra_data="0")


SCENES: Final[Sequence[Callable[[Stage], None]]] = (
    one_use,
    two_uses_one_held,
    an_overlap,
    one_use_held,
    a_link_and_a_code,
    one_beside,
    two_contexts,
    replaced_while_held,
    two_uses_two_held,
    no_bound,
    an_expired_token,
    nothing_but_one_beside,
    a_code_that_is_over,
)


# What happens at once ------------------------------------------------------------------------------


def _hold(stage: Stage, n: int) -> Hold:
    return Hold(hold_id=f"hold {n}", until=NOW + MINUTE + n)


def _insert(stage: Stage, name: str, token: StoredToken, mode: InsertMode, **named: Any) -> Call:
    return call(name, "insert", token, mode, **named)


def _line(stage: Stage) -> Match:
    """The whole line, but its one token where there are several: these may be ended in several steps."""
    token = stage.token
    if any(other.context == token.context and other.keys for other in stage.tokens[:-1]):
        return Match(id=token.id)
    line = by_key(token)
    return line._replace(digests=None, context=token.context)


MakeCall = Callable[[Stage, int], Call]
CALLS: Final[Sequence[MakeCall]] = (
    lambda s, n: call("use", "present", s.key, Use(at=NOW + n), NOW),
    lambda s, n: call("use as somebody", "present", s.key, Use(at=NOW + n, use_id="somebody"), NOW),
    lambda s, n: call("use by the other key", "present", s.other_key, Use(at=NOW + n), NOW),
    lambda s, n: call(
        "use by the other key as somebody", "present", s.other_key, Use(at=NOW + n, use_id="somebody"), NOW
    ),
    lambda s, n: call("hold", "present", s.key, _hold(s, n), NOW),
    lambda s, n: call("hold by the other key", "present", s.other_key, _hold(s, n), NOW),
    lambda s, n: call("check", "present", s.key, None, NOW),
    lambda s, n: call(
        "use what is held",
        "update",
        Match(digests=s.key.digests),
        UseHeld(hold_id=HOLD, at=NOW + n, use_id="somebody"),
    ),
    lambda s, n: call(
        "use what is held on the other", "update", Match(digests=s.other_key.digests), UseHeld(HOLD, NOW + n)
    ),
    lambda s, n: call("give back", "update", Match(id=s.token.id), Release(hold_id=HOLD)),
    lambda s, n: call("save", "update", Match(id=s.token.id), SetExtraData(str(n))),
    lambda s, n: call("forget the key", "update", Match(id=s.token.id), ForgetKey()),
    lambda s, n: call("deactivate the object's", "deactivate", _line(s), NOW + n),
    lambda s, n: call("deactivate by id", "deactivate", Match(id=s.token.id), NOW + n),
    lambda s, n: call("deactivate by key", "deactivate", s.key, NOW + n),
    lambda s, n: call("deactivate by the other key", "deactivate", s.other_key, NOW + n),
    lambda s, n: call("deactivate in the block", "deactivate", s.key, NOW + n, (HOLD,)),
    lambda s, n: _insert(s, "replace", s.new(context=s.token.context, extra_data=None), InsertMode.REPLACE),
    lambda s, n: _insert(
        s,
        "replace with an overlap",
        s.new(context=s.token.context, extra_data=s.token.extra_data),
        InsertMode.REPLACE,
        keep_until=NOW + MINUTE,
    ),
    lambda s, n: _insert(
        s,
        "create if none is valid",
        s.new(context=s.token.context, extra_data=s.token.extra_data),
        InsertMode.IF_NONE_VALID,
        wanted_until=NOW,
    ),
    lambda s, n: _insert(
        s,
        "create if none is valid for long",
        s.new(context=s.token.context, extra_data=s.token.extra_data),
        InsertMode.IF_NONE_VALID,
        wanted_until=NOW + 10 * MINUTE,
        keep_until=NOW + MINUTE,
    ),
    lambda s, n: _insert(s, "add", s.new(context=s.token.context, is_beside=True), InsertMode.ADD),
    lambda s, n: _insert(s, "insert once", s.new(s.contested, context=s.token.context), InsertMode.ONCE),
    lambda s, n: _insert(
        s, "replace by the same code", s.new(s.contested, "code", context=s.token.context), InsertMode.REPLACE
    ),
    lambda s, n: _insert(
        s,
        "replace within a limit",
        s.new(context=s.token.context),
        InsertMode.REPLACE,
        spends=(a_spend(s.issues),),
    ),
)


@lru_cache
def token_meetings(each: int) -> list[Meeting]:
    """The pairs of calls on one token, each on so many of the scenes that are worth playing."""
    meetings: list[Meeting] = []
    for pair, calls in enumerate(combinations_with_replacement(CALLS, 2)):
        scenes = (SCENES[(pair + number) % len(SCENES)] for number in range(len(SCENES)))
        played = (_on_a_token(scene, pair, calls) for scene in scenes)
        meetings += islice(filter(is_worth_playing, played), each)
    return meetings


def _on_a_token(scene: Callable[[Stage], None], pair: int, calls: tuple[MakeCall, MakeCall]) -> Meeting:
    title = scene.__name__.replace("_", " ")
    stage = Stage(f"{title} {pair}")
    scene(stage)
    first, second = calls
    before = [call("before", "insert", token, InsertMode.ADD) for token in stage.tokens]
    later = NOW + 5 * MINUTE
    afterwards = [
        call("ask again", "present", key, Use(at=later, use_id="somebody"), later)
        for key in (stage.key, stage.other_key)
    ]
    both = first(stage, 1), second(stage, 2)
    return Meeting(title, before, both, stage.object_id, (stage.issues,), afterwards)


# Budgets ------------------------------------------------------------------------------------------

WINDOW: Final = 1000
LONGEST: Final = 4000


def _spend_at(budget: Budget, now: int, limit: int = 2) -> Call:
    return call("spend", "spend", (a_spend(budget, limit, WINDOW, LONGEST),), now)


BUDGET_SCENES: Final[dict[str, Callable[[Budget], list[Call]]]] = {
    "fresh": lambda b: [],
    "one of two spent": lambda b: [_spend_at(b, NOW)],
    "all spent": lambda b: [_spend_at(b, NOW), _spend_at(b, NOW)],
    "ended with one spent": lambda b: [_spend_at(b, NOW - WINDOW)],
    "ended with all spent": lambda b: [_spend_at(b, NOW - WINDOW), _spend_at(b, NOW - WINDOW)],
    "given back": lambda b: [
        _spend_at(b, NOW),
        call("refund", "refund", (Charge(budget=b, until=NOW + WINDOW),)),
    ],
    "forgotten": lambda b: [_spend_at(b, NOW - LONGEST - WINDOW), _spend_at(b, NOW - LONGEST - WINDOW)],
}
BUDGET_CALLS: Final[Sequence[MakeCall]] = (
    lambda s, n: _spend_at(s.attempts, NOW),
    lambda s, n: call(
        "spend from two",
        "spend",
        (a_spend(s.issues, 1, WINDOW, WINDOW), a_spend(s.attempts, 2, WINDOW, LONGEST)),
        NOW,
    ),
    lambda s, n: call("give back", "refund", (Charge(budget=s.attempts, until=NOW + WINDOW),)),
    lambda s, n: call("reset", "reset", s.attempts.object, (s.attempts.name,)),
    lambda s, n: call("reset all", "reset", s.attempts.object, None),
    lambda s, n: call("purge", "purge", 0, NOW, 9, NOW),
    lambda s, n: call(
        "insert",
        "insert",
        s.new(),
        InsertMode.REPLACE,
        spends=(a_spend(s.attempts, 2, WINDOW, LONGEST), a_spend(s.issues, 3, WINDOW, WINDOW)),
    ),
    lambda s, n: call("present a wrong key", "present", s.wrong_key, None, NOW, spends=_attempt(s)),
    lambda s, n: call("present a right key", "present", s.key, None, NOW, spends=_attempt(s)),
    lambda s, n: call(
        "use", "present", s.key, Use(at=NOW, use_id="u", resets=(s.attempts,)), NOW, spends=_attempt(s)
    ),
)


def _attempt(stage: Stage) -> tuple[Any, ...]:
    return (a_spend(stage.attempts, 2, WINDOW, LONGEST),)


@lru_cache
def budget_meetings(each: int) -> list[Meeting]:
    """The pairs of calls on one budget, each on so many of the scenes that are worth playing."""
    meetings: list[Meeting] = []
    titles = list(BUDGET_SCENES)
    for pair, calls in enumerate(combinations_with_replacement(BUDGET_CALLS, 2)):
        scenes = (titles[(pair + number) % len(titles)] for number in range(len(titles)))
        played = (_on_a_budget(title, pair, calls) for title in scenes)
        meetings += islice(filter(is_worth_playing, played), each)
    return meetings


def _on_a_budget(title: str, pair: int, calls: tuple[MakeCall, MakeCall]) -> Meeting:
    stage = Stage(f"{title} {pair}")
    stage.add()
    first, second = calls
    before = [
        call("before", "insert", stage.token, InsertMode.ADD),
        *BUDGET_SCENES[title](stage.attempts),
    ]
    both = first(stage, 1), second(stage, 2)
    return Meeting(title, before, both, stage.object_id, (stage.attempts, stage.issues))


# Played -------------------------------------------------------------------------------------------


async def play(backends: Sequence[TokenBackend], meetings: Sequence[Meeting], turn: int = 0) -> None:
    """Make the calls of all meetings at once, and compare how each of them ended.

    Args:
        backends: two of them, on one store.
        meetings: each about an object of its own.
        turn: which call of the first meeting begins: the first, if it is even.
    """
    for number in range(max(len(meeting.before) for meeting in meetings)):
        calls = [meeting.before[number] for meeting in meetings if number < len(meeting.before)]
        await at_once(one.on(backends[0]) for one in calls)
    # The calls of a meeting begin in either order, on one backend or on two.
    started = [meeting.calls[:: _step(turn + n)] for n, meeting in enumerate(meetings)]
    both = [one for calls in started for one in calls]
    answers = await at_once(one.on(backends[(n + n // 4) % 2]) for n, one in enumerate(both))
    for number, meeting in enumerate(meetings):
        held = Held(
            await backends[1].find(Match(object_id=meeting.object_id), 99),
            await backends[1].budgets(meeting.budgets),
        )
        afterwards = [await one.on(backends[1]) for one in meeting.afterwards]
        pair = answers[2 * number : 2 * number + 2]
        got = end(pair[:: _step(turn + number)], held, afterwards)
        ends = serial_ends(meeting)
        assert got in ends, f"{meeting!r} ended as neither order does"


def _step(turn: int) -> int:
    return -1 if turn % 2 else 1


class MatrixCases(Suite):
    """Cases of two calls at once."""

    @case(14)
    async def test_two_writes_on_a_token_have_an_order(self, bench: Bench) -> None:
        """Every two writes on one token, at once, end as one of their two orders."""
        backends = await bench.two_backends()
        meetings = token_meetings(max(1, self.rounds // 4))
        for number in range(0, len(meetings), AT_A_TIME):
            await play(backends, meetings[number : number + AT_A_TIME])

    @case(14)
    async def test_two_writes_on_a_budget_have_an_order(self, bench: Bench) -> None:
        """Every two writes on one budget, at once, a purge included, end as one of their two orders."""
        backends = await bench.two_backends()
        for number, meeting in enumerate(budget_meetings(max(1, self.rounds // 4))):
            await play(backends, [meeting], number)
            for budget in meeting.budgets:
                await backends[0].reset(budget.object, None)
