"""The protocol's sentences about opening, closing, threads and cancellation."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from vtoken.backend import (
    Budget,
    InsertMode,
    InsertResult,
    Match,
    TokenBackend,
    Use,
)
from vtoken.errors import BackendClosed, ConfigurationError
from vtoken.testing._bench import (
    MINUTE,
    NOW,
    Bench,
    Suite,
    a_token,
    at_once,
    cancel_everywhere,
    case,
    ended,
    find_all,
    refused,
)
from vtoken.testing._insert import one, put

BUDGET = Budget("auth.user", "42", "sms-login", "attempts")


def every_call(backend: TokenBackend) -> list[Callable[[], Awaitable[object]]]:
    """One call of each method that needs an open backend."""
    return [
        lambda: backend.insert(a_token(), InsertMode.ADD),
        lambda: backend.find(Match(), 1),
        lambda: backend.update(Match(id="0" * 32), Use(NOW)),
        lambda: backend.deactivate(Match(id="0" * 32), NOW),
        lambda: backend.purge(0, NOW, 1, 0),
        lambda: backend.count(NOW),
        lambda: backend.spend(BUDGET, NOW, 1, 1, 1),
        lambda: backend.refund(BUDGET, NOW),
        lambda: backend.reset(BUDGET),
    ]


class LifeCases(Suite):
    """Cases of a backend's own life, and of calls that are cut short."""

    @case(5)
    async def test_a_closed_backend_says_so(self, bench: Bench) -> None:
        """Every method but ``from_url``, ``open`` and ``close`` raises ``BackendClosed`` where it is not
        open."""
        backend = self.backend(bench.store)
        assert isinstance(backend, TokenBackend)
        for call in every_call(backend):
            await refused(BackendClosed, call())
        await backend.open()
        for call in every_call(backend):
            await call()
        await backend.close()
        for call in every_call(backend):
            await refused(BackendClosed, call())

    @case(5)
    async def test_opens_are_counted(self, bench: Bench) -> None:
        """Each ``open`` is paired with one ``close``; without an open one ``close`` does nothing."""
        backend = self.backend(bench.store)
        await backend.close()
        for _ in range(2):
            await backend.open()
            await backend.open()
            await backend.close()
            await put(backend)
            await backend.close()
            await refused(BackendClosed, backend.count(NOW))
            await backend.close()

    @case(5)
    async def test_many_may_open_at_once(self, bench: Bench) -> None:
        """A fresh store may be opened by several backends at once, and a backend by several tasks at once."""
        backends = [self.backend(bench.store) for _ in range(4)]
        await asyncio.gather(*(backend.open() for backend in backends for _ in range(3)))
        tokens = [await put(backend, created_at=NOW + n) for n, backend in enumerate(backends)]
        for backend in backends:
            assert await find_all(backend) == tokens[::-1]
        await asyncio.gather(*(backend.close() for backend in backends for _ in range(2)))
        for backend in backends:
            assert len(await find_all(backend)) == 4
        await asyncio.gather(*(backend.close() for backend in backends))
        for backend in backends:
            await refused(BackendClosed, backend.count(NOW))

    @case(5)
    async def test_a_closed_backend_leaves_no_task(self, bench: Bench) -> None:
        """The last ``close`` ends every task that the backend began."""
        before = asyncio.all_tasks()
        backend = self.backend(bench.store)
        await backend.open()
        await put(backend)
        await backend.close()
        assert asyncio.all_tasks() == before

    @case(13)
    async def test_an_unknown_option_is_refused(self, bench: Bench) -> None:
        """``from_url`` raises ``ConfigurationError`` for what it does not understand, and repeats no
        password."""
        kind = type(self.backend(bench.store))
        for url in (bench.store, "no-such-scheme://someone:canary-password@127.0.0.1/"):
            try:
                kind.from_url(url, no_such_option=1)
            except ConfigurationError as error:
                told = f"{error!r} {error} {error.__cause__!r} {error.__context__!r}"
                assert "canary-password" not in told
            else:
                raise AssertionError(f"an unknown option was taken for {url!r}")

    @case(12)
    async def test_backends_see_each_others_writes(self, bench: Bench) -> None:
        """What one backend has written, another on the same store sees at once."""
        writer, reader = await bench.backend(), await bench.backend()
        token = await put(writer, max_uses=3)
        assert await one(reader, token) == token
        changed = await reader.update(Match(id=token.id), Use(NOW, "first"))
        assert changed == await one(writer, token)
        assert await writer.deactivate(Match(id=token.id), NOW) == 1
        assert await reader.find(Match(active=True), 9) == []
        assert (await writer.spend(BUDGET, NOW, 1, MINUTE, MINUTE)).allowed
        assert not (await reader.spend(BUDGET, NOW, 1, MINUTE, MINUTE)).allowed
        assert await reader.purge(NOW + 1, NOW, 9, 0) == 1
        assert await find_all(writer) == []

    @case(12)
    async def test_event_loops_in_threads_share_a_store(self, bench: Bench) -> None:
        """Event loops in several threads, each with its backend, race as tasks do: one winner, one active
        token."""
        await (await bench.backend()).count(NOW)
        token = a_token(object_id="used")
        barrier = threading.Barrier(3)

        async def compete() -> tuple[int, int]:
            backend = self.backend(bench.store)
            await backend.open()
            try:
                await asyncio.to_thread(barrier.wait, 60)
                await at_once(backend.insert(a_token(slug="new"), InsertMode.REPLACE) for _ in range(5))
                inserted = await backend.insert(token, InsertMode.ADD)
                match = Match(id=token.id, active=True)
                uses = await at_once(backend.update(match, Use(NOW)) for _ in range(5))
                return int(inserted is InsertResult.INSERTED), sum(use is not None for use in uses)
            finally:
                await backend.close()

        outcomes = await asyncio.gather(*(asyncio.to_thread(asyncio.run, compete()) for _ in range(3)))
        assert [sum(column) for column in zip(*outcomes, strict=True)] == [1, 1]
        assert sum(token.is_active for token in await bench.stored()) == 1

    @case(12)
    async def test_another_event_loop_is_served_or_refused(self, bench: Bench) -> None:
        """A backend that is open serves another event loop too, or raises ``BackendClosed`` there; its own
        loop it goes on to serve."""
        backend = await bench.backend()
        token = await put(backend)

        async def elsewhere() -> object:
            try:
                return await one(backend, token)
            except BackendClosed:
                return None
            except Exception as error:
                raise AssertionError(f"in another event loop it raised {error!r}") from error

        for _ in range(2):
            assert await asyncio.to_thread(asyncio.run, elsewhere()) in (token, None)
            assert await one(backend, token) == token

    @case(5)
    async def test_a_cancelled_replace_happens_wholly_or_not_at_all(self, bench: Bench) -> None:
        """A cancelled ``REPLACE`` has inserted and deactivated, or done neither; no lock is left behind."""
        backend, other = await bench.backend(), await bench.backend()
        active = await put(backend)
        new = a_token()

        def insert() -> Coroutine[Any, Any, object]:
            nonlocal new
            new = a_token(created_at=active.created_at + 1)
            return backend.insert(new, InsertMode.REPLACE)

        async def check(cancelled: bool) -> None:
            nonlocal active
            await put(other, slug="unlocked")
            found = await backend.find(Match(slug="reset", active=True), 9)
            stored = await backend.find(Match(id=new.id), 9)
            if stored or not cancelled:
                assert found == stored == [new]
                assert await one(other, active) == ended(active, new.created_at)
                active = new
            else:
                assert found == [active]

        await cancel_everywhere(insert, check)

    @case(5)
    async def test_a_cancelled_update_happens_wholly_or_not_at_all(self, bench: Bench) -> None:
        """A cancelled use is stored in all its fields or in none; no lock is left behind."""
        backend, other = await bench.backend(), await bench.backend()
        before = await put(backend)
        used = before._replace(uses=1, used_at=NOW + 1, use_ids=("mine",), is_active=False, ends_at=NOW)

        def use() -> Coroutine[Any, Any, object]:
            return backend.update(Match(id=before.id, valid_at=NOW), Use(NOW + 1, "mine"))

        async def check(cancelled: bool) -> None:
            nonlocal before, used
            await put(other, slug="unlocked")
            now = await one(backend, before)
            assert now in ([before, used] if cancelled else [used])
            before = await put(other)
            used = used._replace(id=before.id, digest=before.digest)

        await cancel_everywhere(use, check)

    @case(5)
    async def test_cancelled_opens_and_closes_leave_nothing(self, bench: Bench) -> None:
        """A cancelled ``open`` or ``close`` leaves a backend that opens, works and closes, and no lock."""
        other = await bench.backend()
        backend = self.backend(bench.store)

        async def works(cancelled: bool) -> None:
            await backend.open()
            await put(backend)
            for _ in range(2):  # a cancelled close may leave one open to be closed
                await backend.close()
            await refused(BackendClosed, backend.count(NOW))
            await put(other)

        async def open_and_close() -> None:
            await backend.open()
            await backend.close()

        await cancel_everywhere(open_and_close, works)
