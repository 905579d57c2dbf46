"""Which results two calls at once may have: those of one of their two orders.

The reference store plays both orders. One exception is documented (see :meth:`TokenBackend.insert` and
:meth:`TokenBackend.present`): a backend may charge the limits of a call first and give them back afterwards,
and the other call may come in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vtoken.backend import (
    Budget,
    BudgetState,
    Hold,
    Inserted,
    InsertResult,
    Match,
    Outcome,
    Presented,
    Spending,
    StoredToken,
    TokenBackend,
    Use,
    key_of,
    refusal,
)
from vtoken.testing.model.store import ReferenceStore


class Call(NamedTuple):
    """One call of a backend."""

    name: str
    """What a person calls it."""
    method: str
    arguments: tuple[Any, ...]
    named: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"<{self.name}>"

    async def on(self, backend: TokenBackend) -> Any:
        """The answer of a backend."""
        return await getattr(backend, self.method)(*self.arguments, **self.named)

    def by(self, store: ReferenceStore) -> Any:
        """The answer of the reference store."""
        return store.call(self.method, *self.arguments, **self.named)


def call(name: str, method: str, /, *arguments: Any, **named: Any) -> Call:
    """Name a call, to be made once or several times."""
    return Call(name, method, arguments, named)


class Held(NamedTuple):
    """What a store holds of an object."""

    tokens: list[StoredToken]
    budgets: list[BudgetState | None]


class End(NamedTuple):
    """How two calls at once ended."""

    answers: tuple[Any, Any]
    held: Held
    afterwards: tuple[Any, ...]
    """The answers of some further calls: they tell which uses are remembered."""


class Meeting(NamedTuple):
    """Two calls that are made at once on what was there before, and what is asked afterwards."""

    scene: str
    before: Sequence[Call]
    calls: tuple[Call, Call]
    object_id: str
    budgets: tuple[Budget, ...] = ()
    afterwards: Sequence[Call] = ()

    def __repr__(self) -> str:
        return f"<{self.scene}: {self.calls[0].name} beside {self.calls[1].name}>"


def serial_ends(meeting: Meeting) -> list[End]:
    """Every end that the meeting may have."""
    start = ReferenceStore()
    for one in meeting.before:
        one.by(start)
    first, second = meeting.calls
    return [_ended(meeting, answers, store) for answers, store in _orders(start, first, second)]


def is_worth_playing(meeting: Meeting) -> bool:
    """Whether something could go wrong: both calls write, or their order shows."""
    start = ReferenceStore()
    for one in meeting.before:
        one.by(start)
    ends = serial_ends(meeting)
    return ends[0] != ends[1] or all(_writes(start, one) for one in meeting.calls)


def comparable(answer: Any) -> Any:
    """An answer without what two right backends may answer differently while calls run beside it."""
    if isinstance(answer, Presented | Inserted):
        return answer._replace(spending=answer.spending._replace(left=None))
    return answer._replace(left=None) if isinstance(answer, Spending) else answer


def _orders(
    start: ReferenceStore, first: Call, second: Call
) -> Iterator[tuple[tuple[Any, Any], ReferenceStore]]:
    store = start.copy()
    yield (first.by(store), second.by(store)), store
    store = start.copy()
    answer = second.by(store)
    yield (first.by(store), answer), store
    if first.method != second.method:
        store = start.copy()
        for split in _charged_first(store, first, second):
            yield split, store
        store = start.copy()
        for answer_second, answer_first in _charged_first(store, second, first):
            yield (answer_first, answer_second), store


def _charged_first(store: ReferenceStore, charging: Call, other: Call) -> Iterator[tuple[Any, Any]]:
    """The charge, then the other call, then what was charged for; the two answers."""
    spends = charging.named.get("spends", ())
    if not spends:
        return
    now = charging.arguments[0].created_at if charging.method == "insert" else charging.arguments[2]
    spending = store.spend(spends, now)
    if spending.full is not None:
        return
    answer_of_other = other.by(store)
    answer = charging._replace(named={**charging.named, "spends": ()}).by(store)
    if _is_charged(answer, charging, now):
        answer = answer._replace(spending=spending)
    else:
        store.refund(spending.charges)
    yield answer, answer_of_other


def _is_charged(answer: Inserted | Presented, charging: Call, now: int) -> bool:
    if isinstance(answer, Inserted):
        return answer.result is InsertResult.INSERTED
    if answer.outcome is not Outcome.REFUSED:
        return False
    match: Match = charging.arguments[0]
    change: Use | Hold | None = charging.arguments[1]
    token, use_id = answer.token, "" if change is None else change.use_id
    return token is None or refusal(token, key_of(token, match), now, use_id) not in ("used", "leased")


def _ended(meeting: Meeting, answers: tuple[Any, Any], store: ReferenceStore) -> End:
    held = Held(store.find(Match(object_id=meeting.object_id), 99), store.budgets(meeting.budgets))
    return end(answers, held, [one.by(store) for one in meeting.afterwards])


def end(answers: Iterable[Any], held: Held, afterwards: Iterable[Any]) -> End:
    """An end in the form that is compared."""
    first, second = map(comparable, answers)
    return End((first, second), held, tuple(map(comparable, afterwards)))


def _writes(start: ReferenceStore, one: Call) -> bool:
    store = start.copy()
    one.by(store)
    return (store.tokens, store.used, store.spent) != (start.tokens, start.used, start.spent)
