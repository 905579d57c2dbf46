"""What takes part in a benchmark, and how its operations are run and timed."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from array import array
from collections.abc import Sequence
from time import perf_counter, time
from typing import Final, Literal, NamedTuple, Protocol

Kind = Literal["issue", "check", "consume"]

CONTENT_TYPE: Final = "auth.user"
SLUG: Final = "password-reset"
DAY_MS: Final = 24 * 60 * 60 * 1000


class Op(NamedTuple):
    """One operation of an application."""

    kind: Kind
    object_id: str
    key: str = ""


class Run(NamedTuple):
    """What became of a sequence of operations."""

    answers: list[str | bool]
    """The key of an issue, whether it went well of the others; in the order of the operations."""
    waits: array[float]
    """Seconds that each operation took, for the task that asked for it."""
    seconds: float
    """From the first to the last."""


class Row(NamedTuple):
    """A token as the store's own driver shows it, past the contender's methods."""

    object_id: str
    digest: bytes
    is_active: bool


class Contender(Protocol):
    """A way to keep tokens. Every instance gets an empty store of its own."""

    name: str

    async def open(self) -> None:
        """Connect, and make what the store needs."""
        ...

    async def close(self) -> None:
        """Disconnect."""
        ...

    async def fill(self, object_ids: Sequence[str]) -> list[str]:
        """Store an active token for each object, as fast as may be, and return their keys."""
        ...

    async def run(self, ops: Sequence[Op], tasks: int) -> Run:
        """Carry out the operations by so many concurrent tasks."""
        ...

    async def rows(self) -> list[Row]:
        """All that is stored."""
        ...


class Calls(Protocol):
    """A contender of which each operation is one call."""

    async def issue(self, object_id: str) -> str: ...

    async def check(self, object_id: str, key: str) -> bool: ...

    async def consume(self, object_id: str, key: str) -> bool: ...


async def by_tasks(calls: Calls, ops: Sequence[Op], tasks: int) -> Run:
    """Carry out the operations in their order; each task takes the next one when it is done with its last."""
    answers: list[str | bool] = [False] * len(ops)
    waits = array("d", bytes(8 * len(ops)))
    left = iter(enumerate(ops))

    async def work() -> None:
        for index, (kind, object_id, key) in left:
            begun = perf_counter()
            if kind == "check":
                answers[index] = await calls.check(object_id, key)
            elif kind == "consume":
                answers[index] = await calls.consume(object_id, key)
            else:
                answers[index] = await calls.issue(object_id)
            waits[index] = perf_counter() - begun

    begun = perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(tasks):
            group.create_task(work())
    return Run(answers, waits, perf_counter() - begun)


def new_key() -> str:
    """A key as an application would draw it by hand: 192 bits."""
    return secrets.token_urlsafe(24)


def digest_of(key: str) -> bytes:
    """What an application would store of it."""
    return hashlib.sha256(key.encode()).digest()


def now_ms() -> int:
    """The real clock."""
    return int(time() * 1000)
