"""Many operations in one go on the worker thread that writes.

1. Operations of a kind that shares a statement become one statement; each other one is steps of its own.
2. One shared statement alone is its own transaction. Anything else is wrapped in one.
3. Nobody's operation may fail for a neighbour's reason: after a failure nothing has happened, and each is
   tried alone.
4. What may be durable is never tried again.

The operations of a batch are concurrent, so that any order of them will do.
"""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from vtoken_backends.sqlite.steps import Rows, Steps, carry_out


class Operation(NamedTuple):
    """One operation that writes."""

    steps: Callable[[], Steps[Any]]
    """What it does alone, in a transaction of its own."""

    def __repr__(self) -> str:
        return "<Operation>"


class SharedOperation(NamedTuple):
    """One operation of a kind that shares a statement."""

    kind: Hashable
    many: Callable[[Sequence[Any]], Steps[list[Any]]]
    """What several of the kind do together, in one statement; an answer for each."""
    request: Any

    def __repr__(self) -> str:
        return "<SharedOperation>"


class Answers(NamedTuple):
    """For each operation its answer, or the error that is its own."""

    answers: list[Any]

    def __repr__(self) -> str:
        return f"<{len(self.answers)} answers>"


_NOT_YET: Final = object()
_OVER: Final = object()
_HOPELESS: Final = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_IOERR}
"""A lock that was waited for in vain, and a disk that fails: the next write would fail just the same."""


class Patience:
    """How long to wait for the lock of another process; it may end early.

    SQLite's own waiting cannot be ended. Whoever is cancelled would have to wait with it, because nothing may
    change once the cancellation was raised.

    Args:
        milliseconds: how long at most, for each statement that needs the lock.
    """

    def __init__(self, milliseconds: int) -> None:
        self._seconds = milliseconds / 1000
        self._is_over = threading.Event()

    def end(self) -> None:
        """Wait no longer. May be called in any thread."""
        self._is_over.set()

    def retries(self) -> Iterator[None]:
        """Wait, for longer each time, and come back, as long as there is time."""
        deadline = time.monotonic() + self._seconds
        for delay in itertools.chain(_DELAYS, itertools.repeat(_DELAYS[-1])):
            left = deadline - time.monotonic()
            if left <= 0 or self._is_over.wait(min(delay, left)):
                return
            yield


_DELAYS: Final = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.025, 0.025, 0.05)
"""Seconds between attempts to get the lock of another process."""


class Batch:
    """Operations on their way through SQLite."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        operations: Sequence[Operation | SharedOperation],
        patience: Patience,
    ) -> None:
        self._connection = connection
        self._operations = operations
        self._patience = patience
        self._answers: list[Any] = [_NOT_YET] * len(operations)

    def carry_out(self) -> Answers:
        """Do it all, and return what came of each."""
        groups = self._groups()
        try:
            if len(groups) == 1 and isinstance(self._operations[0], SharedOperation):
                self._run(groups[0])
            else:
                self._in_transaction(groups)
        except Exception as error:
            self._recover(error)
        return Answers(self._answers)

    def _groups(self) -> list[list[int]]:
        """The places of operations that go together."""
        groups: dict[Hashable, list[int]] = {}
        for place, operation in enumerate(self._operations):
            name = operation.kind if isinstance(operation, SharedOperation) else place
            groups.setdefault(name, []).append(place)
        return list(groups.values())

    def _in_transaction(self, groups: Sequence[list[int]]) -> None:
        answered = list(self._answers)
        try:
            self._execute("BEGIN IMMEDIATE")
            for group in groups:
                self._run(group)
        except Exception:
            self._roll_back()
            self._answers = answered
            raise
        try:
            self._execute("COMMIT")
        except Exception as error:  # MemoryError, too
            self._roll_back()
            # As far as we know nothing was committed. It is not tried again, because that might do it twice.
            self._answers = [error if answer is _NOT_YET else answer for answer in answered]

    def _roll_back(self) -> None:
        if self._connection.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                self._execute("ROLLBACK")

    def _run(self, group: Sequence[int]) -> None:
        first = self._operations[group[0]]
        if isinstance(first, SharedOperation):
            requests = [operation.request for operation in self._shared(group)]
            answers = carry_out(first.many(requests), self._execute)
            for place, answer in zip(group, answers, strict=True):
                self._answers[place] = answer
        else:
            self._answers[group[0]] = carry_out(first.steps(), self._execute)

    def _shared(self, group: Sequence[int]) -> list[SharedOperation]:
        operations = [self._operations[place] for place in group]
        return [operation for operation in operations if isinstance(operation, SharedOperation)]

    def _recover(self, error: Exception) -> None:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if len(self._operations) == 1 or code in _HOPELESS:
            self._answers = [error if answer is _NOT_YET else answer for answer in self._answers]
            return
        for place, operation in enumerate(self._operations):
            if self._answers[place] is _NOT_YET:
                alone = Batch(self._connection, [operation], self._patience)
                [self._answers[place]] = alone.carry_out().answers

    def _execute(self, sql: str, values: Sequence[Any] = ()) -> Rows:
        if self._connection.in_transaction:
            return Rows(self._connection.execute(sql, values).fetchall())
        retries = self._patience.retries()
        while True:
            try:
                return Rows(self._connection.execute(sql, values).fetchall())
            except sqlite3.OperationalError as error:
                code = getattr(error, "sqlite_errorcode", 0) & 0xFF
                if code != sqlite3.SQLITE_BUSY or next(retries, _OVER) is _OVER:
                    raise
