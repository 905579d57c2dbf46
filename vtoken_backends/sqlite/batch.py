"""Many operations in one go on the worker thread that writes.

1. Operations of a kind that shares a statement become one statement; each other one is steps of its own.
2. One shared statement alone is its own transaction. Anything else is wrapped in one.
3. Nobody's operation may fail for a neighbour's reason: after a failure nothing has happened, and each is
   tried alone.
4. What may be durable is never tried again.
5. While the lock of another process is waited for, nothing has happened, and an operation whose caller was
   cancelled is left out. SQLite's own waiting (``busy_timeout``) could not be ended.

The operations of a batch are concurrent, so that any order of them will do.
"""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from vtoken_backends.sqlite.shared import Kind, work_together
from vtoken_backends.sqlite.steps import Private, Rows, Steps, carry_out
from vtoken_backends.sqlite.worker import Job


class Operation(ABC):
    """One operation that writes."""

    flight: Flight | None = None
    """The batch that it is in, once that is under way."""

    @abstractmethod
    def alone(self) -> Steps[Any]:
        """What it does where it shares nothing, within a transaction."""


class SingleOperation(Operation):
    """One that is steps of its own.

    Args:
        steps: what it does.
    """

    def __init__(self, steps: Callable[[], Steps[Any]]) -> None:
        self._steps = steps

    def alone(self) -> Steps[Any]:
        return self._steps()


class SharedOperation(Operation):
    """One of a kind that shares a statement.

    Args:
        kind: which.
        row: its row of the statement.
    """

    def __init__(self, kind: Kind, row: Private) -> None:
        self.kind = kind
        self.row = row

    def alone(self) -> Steps[Any]:
        [answer] = yield from work_together(self.kind, [self.row])
        if isinstance(answer, Exception):
            raise answer
        return answer


class Answers(NamedTuple):
    """For each operation its answer, or the error that is its own."""

    answers: list[Any]

    def __repr__(self) -> str:
        return f"<{len(self.answers)} answers>"


class Flight(NamedTuple):
    """A batch that is under way."""

    batch: Batch
    job: Job[Answers]


_HOPELESS: Final = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_IOERR}
"""A lock that was waited for in vain, and a disk that fails: the next write would fail just the same."""
_PAUSES: Final = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.025, 0.025, 0.05)
"""Seconds between attempts to get the lock of another process."""


class Batch:
    """Operations on their way through SQLite.

    Args:
        operations: which.
        busy_timeout: milliseconds to wait for the lock of another process.
    """

    _connection: sqlite3.Connection

    def __init__(self, operations: Sequence[Operation], busy_timeout: int) -> None:
        self._operations = operations
        self._busy_timeout = busy_timeout / 1000
        self._answers: dict[Operation, Any] = {}
        self._waiting = set(operations)
        """Those that have not been begun: nothing of them has happened."""
        self._unwanted = set[Operation]()
        """Those that were to be left out while they were tried."""
        self._changed = threading.Condition(threading.Lock())

    def withdraw(self, operation: Operation) -> bool:
        """Leave an operation out, if it has not been begun. May be called in any thread.

        Returns:
            False where it is too late. If it meets a lock now, it is not tried again.
        """
        with self._changed:
            if operation not in self._waiting:
                self._unwanted.add(operation)
                return False
            self._waiting.remove(operation)
            self._changed.notify()
            return True

    def carry_out(self, connection: sqlite3.Connection) -> Answers:
        """Do it all, and return what came of each. The answer of one that was withdrawn is None."""
        self._connection = connection
        self._work_through(self._operations)
        return Answers([self._answers.get(operation) for operation in self._operations])

    def _work_through(self, operations: Sequence[Operation]) -> None:
        pauses = self._pauses()
        while begun := self._begin(operations):
            try:
                self._answers.update(self._do(begun))
                return
            except Exception as error:
                pause = next(pauses, None) if _code(error) == sqlite3.SQLITE_BUSY else None
                if pause is None:
                    self._recover(begun, error)
                    return
            self._wait(begun, pause)

    def _begin(self, operations: Sequence[Operation]) -> Sequence[Operation]:
        with self._changed:
            begun = [operation for operation in operations if operation in self._waiting]
            self._waiting.difference_update(begun)
        return begun

    def _wait(self, operations: Sequence[Operation], pause: float) -> None:
        with self._changed:
            self._waiting.update(set(operations) - self._unwanted)
            self._changed.wait(pause)

    def _pauses(self) -> Iterator[float]:
        """How long to wait between attempts, as long as there is time."""
        deadline = time.monotonic() + self._busy_timeout
        for pause in itertools.chain(_PAUSES, itertools.repeat(_PAUSES[-1])):
            left = deadline - time.monotonic()
            if left <= 0:
                return
            yield min(pause, left)

    def _do(self, operations: Sequence[Operation]) -> dict[Operation, Any]:
        groups: dict[object, list[Operation]] = {}
        for operation in operations:
            name = operation.kind if isinstance(operation, SharedOperation) else operation
            groups.setdefault(name, []).append(operation)
        if len(groups) == 1 and isinstance(operations[0], SharedOperation):
            return self._run(operations)
        self._execute("BEGIN IMMEDIATE")
        answers: dict[Operation, Any] = {}
        try:
            for group in groups.values():
                answers.update(self._run(group))
        except Exception:
            self._roll_back()
            raise
        try:
            self._execute("COMMIT")
        except Exception as error:  # MemoryError, too
            self._roll_back()
            # As far as we know nothing was committed. It is not tried again, because that might do it twice.
            return dict.fromkeys(operations, error)
        return answers

    def _run(self, group: Sequence[Operation]) -> dict[Operation, Any]:
        shared = [operation for operation in group if isinstance(operation, SharedOperation)]
        if not shared:
            return {operation: carry_out(operation.alone(), self._execute) for operation in group}
        steps = work_together(shared[0].kind, [operation.row for operation in shared])
        return dict(zip(group, carry_out(steps, self._execute), strict=True))

    def _roll_back(self) -> None:
        if self._connection.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                self._execute("ROLLBACK")

    def _recover(self, operations: Sequence[Operation], error: Exception) -> None:
        if len(operations) == 1 or _code(error) in _HOPELESS:
            self._answers.update(dict.fromkeys(operations, error))
            return
        with self._changed:
            self._waiting.update(set(operations) - self._unwanted)
        for operation in operations:
            self._work_through([operation])

    def _execute(self, sql: str, values: Sequence[Any] = ()) -> Rows:
        return Rows(self._connection.execute(sql, values).fetchall())


def _code(error: Exception) -> int:
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF
