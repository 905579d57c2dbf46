"""Linearizability of a history (Wing and Gong, "Testing and Verifying Concurrent Objects", 1993), with Lowe's
memory of what was tried ("Testing for Linearizability", 2017).

An operation is one or more moves of a sequential specification, each at one instant between its invocation
and its response. One without a response (its process was killed) may have stopped after any of its moves,
and may make them at any later time.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

State = TypeVar("State", bound=Hashable)
NEVER_RETURNED: Final = math.inf


class Operation(NamedTuple):
    """What a client did, by the one monotonic clock of the machine."""

    client: str
    do: str
    token: str
    """The id of the token that it is about, ``""`` for none."""
    name: str
    """Unique, or the same for the repetition of a use."""
    start: float
    end: float = NEVER_RETURNED
    result: tuple[str, ...] | None = None

    def __str__(self) -> str:
        end = "..." if self.end == NEVER_RETURNED else f"{self.end:.6f}"
        return f"{self.start:.6f}-{end} {self.client} {self.do}({self.token}) -> {self.result}"


class Specification(Protocol[State]):
    def initial(self) -> State:
        """The state before the first move."""
        ...

    def only_looks(self, operation: Operation) -> bool:
        """Say whether an operation, by what it is and by its result, changes nothing in any state."""
        ...

    def moves(self, state: State, operation: Operation, done: int) -> Iterable[tuple[State, int, bool]]:
        """The moves that an operation may make next.

        Args:
            state: before the move.
            operation: the one that moves.
            done: how far it is, 0 at first.

        Returns:
            For each the state after it, how far the operation is then, and whether its result stands.
        """
        ...


def is_linearizable(history: Sequence[Operation], specification: Specification[State]) -> bool:
    """Say whether the moves of all operations can be put into one order that explains every result."""
    # By their ends: an operation that returned early most likely moved early.
    operations = sorted(history, key=lambda operation: (operation.end, operation.start))
    closed = sum(operation.end != NEVER_RETURNED for operation in operations)
    start = _Place(frozenset(range(len(operations))), (0,) * len(operations), specification.initial())
    tried, left = {start}, [start]
    while left:
        place = left.pop()
        if min(place.waiting, default=closed) >= closed:
            return True
        for step in reversed(_steps(operations, specification, place)):
            if step not in tried:
                tried.add(step)
                left.append(step)
    return False


class _Place(NamedTuple, Generic[State]):
    """How far a try has come."""

    waiting: frozenset[int]
    """The operations that are not finished."""
    progress: tuple[int, ...]
    state: State


def _steps(
    operations: Sequence[Operation], specification: Specification[State], place: _Place[State]
) -> list[_Place[State]]:
    waiting, progress, state = place
    horizon = operations[min(waiting)].end
    steps: list[_Place[State]] = []
    for n in sorted(waiting):
        operation = operations[n]
        if operation.start > horizon:
            continue  # somebody returned before it began
        for after, done, is_finished in specification.moves(state, operation, progress[n]):
            # How far a finished operation was matters no more.
            moved = (*progress[:n], 0 if is_finished else done, *progress[n + 1 :])
            step = _Place(waiting - {n} if is_finished else waiting, moved, after)
            if is_finished and specification.only_looks(operation):
                return [step]  # no other order can do better
            steps.append(step)
    return steps
