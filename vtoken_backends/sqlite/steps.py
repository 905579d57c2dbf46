"""An operation as steps: statements one after the other, whoever runs them.

The backend's worker thread runs them on its own connection; ``within`` runs them on the application's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Sequence
from typing import Any, TypeAlias, TypeVar

_T = TypeVar("_T")


class Private(tuple[Any, ...]):
    """The values of a statement, or a row: neither a log nor a traceback shows what is in it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{len(self)} values>"


class Rows(list[tuple[Any, ...]]):
    """The rows that a statement returned. Digests are in them, so no repr shows what is in it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{len(self)} rows>"


Statement: TypeAlias = "tuple[str, Private]"
Steps: TypeAlias = "Generator[Statement, Rows, _T]"
"""Yields statements, each of which is answered by its rows or by the exception that it raised; returns the
answer of the operation."""


def carry_out(steps: Steps[_T], execute: Callable[[str, Sequence[Any]], Rows]) -> _T:
    """Run the steps of an operation, and return its answer."""
    try:
        sql, values = next(steps)
        while True:
            try:
                rows = execute(sql, values)
            except Exception as error:
                sql, values = steps.throw(error)
            else:
                sql, values = steps.send(rows)
    except StopIteration as finished:
        answer: _T = finished.value
        return answer


async def carry_out_elsewhere(
    steps: Steps[_T], execute: Callable[[str, Sequence[Any]], Awaitable[Rows]]
) -> _T:
    """Run the steps of an operation on a connection that is awaited, and return its answer."""
    try:
        sql, values = next(steps)
        while True:
            try:
                rows = await execute(sql, values)
            except Exception as error:
                sql, values = steps.throw(error)
            else:
                sql, values = steps.send(rows)
    except StopIteration as finished:
        answer: _T = finished.value
        return answer
