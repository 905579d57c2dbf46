"""Operations cancelled at random moments, alone and many at once; then what they left is looked at.

``python -m tests.faults.cancellation BACKEND URL COUNT SEED`` is one storm. It prints its figures, and
must end by itself, which is why each storm is a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, Final, NamedTuple

import anyio

from tests import servers
from tests.faults.histories import MONGODB, ROOT, SQLITE, mongodb
from vtoken import InvalidToken, IssuedToken, Subject, TokenManager, VerificationToken
from vtoken.backend import Match
from vtoken.loading import import_object

MEMORY: Final = "vtoken_backends.memory:MemoryBackend"
POSTGRESQL: Final = "vtoken_backends.postgresql:PostgreSQLBackend"
SLUG: Final = "reset"
PATIENCE: Final = 60
"""Seconds after which something hangs."""


class Call(NamedTuple):
    """An operation on an object of its own."""

    do: str
    obj: Subject
    old: IssuedToken | None
    """The object's token before it."""
    name: str


class Ended(NamedTuple):
    """How it ended: with a result, or cancelled."""

    call: Call
    result: Any
    cancelled: bool


class Storm:
    """Cancels operations of one manager.

    Args:
        manager: an open one.
        url: of its store: an SQLite file is also looked at from outside.
        seed: of all choices.
    """

    def __init__(self, manager: TokenManager, url: str, seed: int) -> None:
        self._manager = manager
        path = url.removeprefix("sqlite:///").partition("?")[0]
        self._file = path if url.startswith("sqlite:///") else None
        self._in_memory = url.startswith("memory:")
        self._dice = random.Random(seed)  # noqa: S311  # it guards nothing
        self._numbers = itertools.count()
        self._operations: dict[str, Callable[[Call], Awaitable[object]]] = {
            "consume": self._consume,
            "consume_by_id": self._consume_by_id,
            "issue": self._issue,
            "ensure": self._ensure,
            "redeem": self._redeem,
            "verify": self._verify,
            "deactivate": self._deactivate,
            "save": self._save,
            "purge": self._purge,
        }
        self._ways = [
            self._by_cancel,
            self._by_two_cancels,
            self._by_timeout,
            self._by_deadline,
            self._by_scope,
        ]
        self.cancelled: Counter[str] = Counter()
        """Calls that had begun when they were cancelled, by operation."""

    async def play(self, count: int) -> None:
        """Until so many calls were cancelled after they had begun."""
        while self.cancelled.total() < count:
            size = self._dice.choice([1, 1, 1, 2, 8, 40])
            calls = [await self._prepared() for _ in range(size)]
            async with asyncio.timeout(PATIENCE):
                ended = await asyncio.gather(*(self._interrupted(call) for call in calls))
                for one in ended:
                    await self._check(one)
            self._check_from_outside()

    async def _prepared(self) -> Call:
        # In memory nothing else waits, so nothing else can be cancelled once it has begun.
        only_redeem = self._in_memory and self._dice.random() < 0.9
        do = "redeem" if only_redeem else self._dice.choice([*self._operations])
        number = next(self._numbers)
        obj = Subject("auth.user", number)
        old = None if do == "ensure" else await self._manager.deactivate_and_create(obj, SLUG)
        return Call(do, obj, old, f"use-{number}")

    # The ways of cancelling ---------------------------------------------------------------------

    async def _interrupted(self, call: Call) -> Ended:
        """Make a call that is cancelled at a random moment, unless it is quicker."""
        began: list[bool] = []
        way = self._dice.choice(self._ways)

        async def made() -> object:
            began.append(True)
            return await self._operations[call.do](call)

        cancelled, result = await way(made)
        self.cancelled[call.do] += bool(cancelled and began)
        return Ended(call, result, cancelled)

    async def _moment(self) -> None:
        if self._dice.random() < 0.5:
            for _ in range(self._dice.randrange(12)):
                await asyncio.sleep(0)
        else:
            await asyncio.sleep(self._span())

    def _span(self) -> float:
        return self._dice.expovariate(1 / 0.002)

    async def _by_cancel(self, make: Callable[[], Awaitable[object]], times: int = 1) -> tuple[bool, Any]:
        task = asyncio.ensure_future(make())
        for _ in range(times):
            await self._moment()
            task.cancel()
        await asyncio.wait([task])
        return (True, None) if task.cancelled() else (False, task.result())

    async def _by_two_cancels(self, make: Callable[[], Awaitable[object]]) -> tuple[bool, Any]:
        return await self._by_cancel(make, 2)

    async def _by_timeout(self, make: Callable[[], Awaitable[object]]) -> tuple[bool, Any]:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._span()):
                return False, await make()
        return True, None

    async def _by_deadline(self, make: Callable[[], Awaitable[object]]) -> tuple[bool, Any]:
        with anyio.move_on_after(self._span()):
            return False, await make()
        return True, None

    async def _by_scope(self, make: Callable[[], Awaitable[object]]) -> tuple[bool, Any]:
        answers: list[object] = []

        async def call() -> None:
            with scope:
                answers.append(await make())

        scope = anyio.CancelScope()
        task = asyncio.ensure_future(call())
        await self._moment()
        scope.cancel()
        await asyncio.wait([task])
        task.result()
        return not answers, answers[0] if answers else None

    # The operations -----------------------------------------------------------------------------

    async def _consume(self, call: Call) -> VerificationToken:
        return await self._manager.consume(call.obj, SLUG, _key(call))

    async def _consume_by_id(self, call: Call) -> VerificationToken:
        return await self._manager.consume(call.obj, SLUG, _key(call), consume_id=call.name)

    async def _issue(self, call: Call) -> VerificationToken:
        return await self._manager.deactivate_and_create(call.obj, SLUG)

    async def _ensure(self, call: Call) -> VerificationToken:
        return await self._manager.get_active_or_create(call.obj, SLUG)

    async def _redeem(self, call: Call) -> VerificationToken:
        async with self._manager.redeem(call.obj, SLUG, _key(call), lease=timedelta(hours=1)) as token:
            await self._moment()
        return token

    async def _verify(self, call: Call) -> VerificationToken:
        return await self._manager.verify(call.obj, SLUG, _key(call))

    async def _deactivate(self, call: Call) -> int:
        return await self._manager.deactivate(call.obj, SLUG)

    async def _save(self, call: Call) -> None:
        assert call.old is not None
        call.old.set_extra_data(call.name)
        await self._manager.save(call.old)

    async def _purge(self, _: Call) -> int:
        return await self._manager.purge(batch_size=7, keep=timedelta(days=1))

    # What they left -----------------------------------------------------------------------------

    async def _check(self, ended: Ended) -> None:
        """The object has at most one active token, in one state, and whatever comes next agrees with it."""
        call, manager = ended.call, self._manager
        active = [token async for token in manager.filter_active_tokens(call.obj, SLUG)]
        is_done = not ended.cancelled
        if call.do == "ensure":
            assert active == ([ended.result] if is_done else [])
            return
        assert call.old is not None
        if call.do == "issue":
            if is_done:
                assert active == [ended.result]
            elif active != [call.old]:  # it was inserted, and ended because nobody has its key
                assert active == []
                history = [token async for token in manager.history(call.obj)]
                assert len(history) == 2, "0 tokens are active after an issue that inserted nothing"
            return
        stored = await manager.get(call.old.id)
        assert stored is not None
        assert active == ([stored] if stored.is_active else [])
        [record] = await manager.backend.find(Match(id=stored.id), 1)
        assert record.holds == (), "a hold was not given back"
        if call.do in ("verify", "save", "purge"):
            assert stored.is_active
            assert call.do != "save" or not is_done or stored.get_extra_data() == call.name
        elif call.do == "deactivate":
            assert not (is_done and stored.is_active)
        else:
            assert stored.is_active is (stored.uses == 0)
            assert not (is_done and stored.is_active)
            await self._check_next_use(call, stored)

    async def _check_next_use(self, call: Call, stored: VerificationToken) -> None:
        if call.do == "consume_by_id" or stored.is_active:
            again = await self._consume_by_id(call)
            assert again.uses == 1
            assert stored.is_active or again.used_at == stored.used_at
            return
        try:
            await self._consume_by_id(call)
        except InvalidToken as error:
            assert error.reason == "used"  # noqa: PT017  # its message is in the traceback
            return
        raise AssertionError("a used token was used again")

    def _check_from_outside(self) -> None:
        """Another program can write at once: there is no lock and no transaction."""
        if self._file is None:
            return
        # What was in flight when its caller was cancelled may need a moment: nobody holds a lock for longer.
        with contextlib.closing(sqlite3.connect(self._file, timeout=10, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("DELETE FROM vtoken_budgets WHERE 0")
            database.execute("COMMIT")


def _key(call: Call) -> str:
    assert call.old is not None
    return call.old.key


async def storm(backend: str, url: str, count: int, seed: int) -> None:
    kind: Any = import_object(backend)
    async with TokenManager(kind.from_url(url)) as manager:
        playing = Storm(manager, url, seed)
        await playing.play(count)
    assert asyncio.all_tasks() == {asyncio.current_task()}, "a task was left"
    names = {thread.name for thread in threading.enumerate() if thread is not threading.main_thread()}
    left = {name for name in names if not name.startswith("asyncio_")}  # the event loop's own
    assert not left, f"threads were left: {left}"
    print(f"{playing.cancelled.total()} calls were cancelled after they had begun: {dict(playing.cancelled)}")


def run(backend: str, url: str, count: int, seed: int) -> str:
    """A storm in a process of its own, which has to end by itself.

    Returns:
        Its figures.

    Raises:
        AssertionError: it failed, or it did not end.
    """
    command = [sys.executable, "-m", "tests.faults.cancellation", backend, url, str(count), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE + count, cwd=ROOT)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def everywhere(long: bool) -> None:
    """``python -m tests.faults cancellation``"""
    count, seed = 3_000 if long else 300, int(time.time())
    with tempfile.TemporaryDirectory() as directory:
        print("memory:", run(MEMORY, "memory://", count, seed), flush=True)
        print("SQLite:", run(SQLITE, f"sqlite:///{directory}/tokens.db", count, seed), flush=True)
    with mongodb() as server, servers.fresh_database(server) as url:
        print("MongoDB:", run(MONGODB, url, count, seed), flush=True)


if __name__ == "__main__":
    asyncio.run(storm(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
