"""The protocol's sentences about opening, closing, notes, threads, context variables and cancellation."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from vtoken.backend import (
    Charge,
    Hold,
    InsertMode,
    InsertResult,
    Match,
    Outcome,
    SetExtraData,
    State,
    TokenBackend,
    Use,
    replaced,
)
from vtoken.errors import BackendClosed, ConfigurationError, InvalidInput
from vtoken.testing.cases.present import use
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
    cancel_everywhere,
    case,
    find_all,
    one,
    put,
    refused,
)

BUDGET: Final = a_budget("sms", of=42)


def every_call(backend: TokenBackend) -> list[Callable[[], Awaitable[object]]]:
    """One call of each method that needs an open backend and does input or output."""
    nobody = Match(digests=(a_digest("nobody"),))
    return [
        lambda: backend.ping(),
        lambda: backend.note("a note", ""),
        lambda: backend.insert(a_token(), InsertMode.ADD),
        lambda: backend.present(nobody, None, NOW),
        lambda: backend.present(nobody, Use(at=NOW), NOW, (a_spend(BUDGET, 9),)),
        lambda: backend.present(nobody, Hold(hold_id="h", until=NOW), NOW),
        lambda: backend.update(nobody, SetExtraData(None)),
        lambda: backend.find(Match(), 1),
        lambda: backend.find(nobody, 1),
        lambda: backend.deactivate(nobody, NOW),
        lambda: backend.erase("auth.user", "nobody", bytes(16)),
        lambda: backend.purge(0, NOW, 1, 0),
        lambda: backend.count(NOW),
        lambda: backend.spend((a_spend(BUDGET, 9),), NOW),
        lambda: backend.refund((Charge(budget=BUDGET, until=NOW),)),
        lambda: backend.budgets((BUDGET,)),
        lambda: backend.reset(BUDGET.object, None),
    ]


class LifeCases(Suite):
    """Cases of a backend's own life."""

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
        tokens = [await put(backend) for backend in backends]
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
        await at_once(use(backend, a_token()) for _ in range(self.tasks))
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
                raise AssertionError(f"an unknown option was accepted for {url!r}")

    @case(13)
    async def test_a_handle_of_another_kind_is_refused(self, bench: Bench) -> None:
        """``within`` raises ``InvalidInput`` for what is no handle of this store, and the store goes on to
        work."""
        backend = await bench.backend()
        for handle in (None, object(), "connection", backend, 42):
            try:
                backend.within(handle)
            except InvalidInput:
                continue
            raise AssertionError(f"{type(handle).__name__} was accepted as a transaction")
        await put(backend)

    @case(12)
    async def test_notes_are_kept(self, bench: Bench) -> None:
        """The first note under a name stays and is what all get, unless it is replaced; ``""`` reads and
        leaves none; purge and erase leave notes alone."""
        writer, reader = await bench.two_backends()
        assert await reader.note("a", "") == ""
        assert await writer.note("a", "first é") == "first é"
        assert await reader.note("a", "second") == "first é"
        assert await reader.note("A", "other") == "other"
        assert await writer.note("a", "third", replace=True) == "third"
        assert await reader.note("a", "", replace=True) == "third"
        assert await writer.note("never", "", replace=True) == ""
        assert await writer.note("never", "x" * 1024) == "x" * 1024
        await writer.purge(NOW * 2, NOW, 99, NOW * 2)
        await writer.erase("auth.user", "42", bytes(16))
        assert [await reader.note(name, "") for name in ("a", "A", "never")] == ["third", "other", "x" * 1024]

    @case(12)
    async def test_of_concurrent_first_notes_one_wins(self, bench: Bench) -> None:
        """Of N concurrent first notes under one name one is kept, and all callers get it."""
        backends = await bench.two_backends()
        for number in range(self.rounds):
            calls = [backends[n % 2].note(f"note {number}", f"by {n}") for n in range(self.tasks)]
            (kept,) = set(await at_once(calls))
            assert await backends[0].note(f"note {number}", "") == kept

    @case(12)
    async def test_backends_see_each_others_writes(self, bench: Bench) -> None:
        """What one backend has written, another on the same store sees at once."""
        writer, reader = await bench.two_backends()
        token = await put(writer, max_uses=3)
        assert await one(reader, token) == token
        assert (await reader.present(by_key(token), None, NOW)).token == token
        used = await use(reader, token, "first")
        assert used.token == await one(writer, token)
        assert (await use(writer, token, "first")).outcome is Outcome.REPLAYED
        assert await writer.deactivate(Match(id=token.id), NOW) == 1
        assert await reader.find(Match(active=True), 9) == []
        assert (await reader.present(by_key(token), None, NOW)).outcome is Outcome.REFUSED
        spends = (a_spend(BUDGET),)
        assert (await writer.spend(spends, NOW)).full is None
        assert (await reader.spend(spends, NOW)).full == 0
        assert (await reader.purge(NOW + 1, NOW, 9, NOW + MINUTE)) == (1, 1)
        assert await find_all(writer) == []
        assert await writer.budgets((BUDGET,)) == [None]

    @case(12)
    async def test_event_loops_in_threads_share_a_store(self, bench: Bench) -> None:
        """Event loops in several threads, each with its backend, race as tasks do: one winner, one active
        token, one limit, nothing lost, in each round."""
        await (await bench.backend()).count(NOW)
        tokens = [a_token(object_id=f"used {n}") for n in range(self.rounds)]
        barrier = threading.Barrier(3)

        async def compete() -> list[tuple[int, int, int]]:
            backend = self.backend(bench.store)
            await backend.open()
            try:
                wins = []
                for number, token in enumerate(tokens):
                    await asyncio.to_thread(barrier.wait, 60)
                    wins.append(await _compete(backend, number, token))
                return wins
            finally:
                await backend.close()

        outcomes = await asyncio.gather(*(asyncio.to_thread(asyncio.run, compete()) for _ in range(3)))
        for wins in zip(*outcomes, strict=True):
            assert [sum(column) for column in zip(*wins, strict=True)] == [1, 1, 4]
        active = [token for token in await bench.stored() if token.is_active]
        assert sorted(token.object_id for token in active) == sorted(f"new {n}" for n in range(self.rounds))
        budgets = tuple(a_budget(f"refunded {n}") for n in range(self.rounds))
        states = await (await bench.backend()).budgets(budgets)
        assert [state.spent for state in states if state] == [0] * self.rounds

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
    async def test_eager_tasks_work(self, bench: Bench) -> None:
        """Under an eager task factory, where there is one, calls at once end as they do otherwise."""
        factory = getattr(asyncio, "eager_task_factory", None)
        asyncio.get_running_loop().set_task_factory(factory)
        backends = await bench.two_backends()
        for _ in range(3):
            token = await put(backends[0])
            answers = await at_once(use(backends[n % 2], token) for n in range(self.tasks))
            assert sum(answer.outcome is Outcome.RIGHT for answer in answers) == 1
            tokens = [a_token() for _ in range(self.tasks)]
            await at_once(backends[0].insert(token, InsertMode.REPLACE) for token in tokens)
            assert len(await backends[0].find(Match(active=True), 9)) == 1

    @case(5)
    async def test_context_variables_stay_with_their_caller(self, bench: Bench) -> None:
        """Calls at once from callers with context variables of their own are answered alike, and set none for
        the others."""
        backend = await bench.backend()
        variable: contextvars.ContextVar[int] = contextvars.ContextVar("caller")

        async def caller(number: int) -> int:
            variable.set(number)
            token = await put(backend, object_id=str(number))
            assert (await use(backend, token)).outcome is Outcome.RIGHT
            return variable.get()

        assert await at_once(caller(n) for n in range(self.tasks)) == list(range(self.tasks))
        assert variable.get(None) is None


async def _compete(backend: TokenBackend, number: int, token: Any) -> tuple[int, int, int]:
    new = [a_token(object_id=f"new {number}") for _ in range(3)]
    await at_once(backend.insert(each, InsertMode.REPLACE) for each in new)
    inserted = await backend.insert(token, InsertMode.ADD)
    uses = await at_once(use(backend, token) for _ in range(3))
    spends = (a_spend(a_budget(f"limited {number}"), 4),)
    spent = await at_once(backend.spend(spends, NOW) for _ in range(3))
    refunded = (a_spend(a_budget(f"refunded {number}"), 99),)
    charged = await at_once(backend.spend(refunded, NOW) for _ in range(3))
    await at_once(backend.refund(answer.charges) for answer in charged)
    return (
        int(inserted.result is InsertResult.INSERTED),
        sum(answer.outcome is Outcome.RIGHT for answer in uses),
        sum(answer.full is None for answer in spent),
    )


async def _unlocked(*backends: TokenBackend) -> None:
    """Write on each of them. What a cancelled call has left under way comes before the write of its own
    backend."""
    for backend in backends:
        await put(backend, slug="unlocked")


class CancellationCases(Suite):
    """Cases of calls that are cut short."""

    @case(5)
    async def test_a_cancelled_replace_happens_wholly_or_not_at_all(self, bench: Bench) -> None:
        """A cancelled ``REPLACE`` has inserted and replaced, or done neither; no lock is left behind."""
        backend, other = await bench.two_backends()
        active = await put(backend)
        new = a_token()

        def insert() -> Coroutine[Any, Any, object]:
            nonlocal new
            new = a_token(created_at=active.created_at + 1)
            return backend.insert(new, InsertMode.REPLACE)

        async def check(cancelled: bool) -> None:
            nonlocal active
            await _unlocked(backend, other)
            found = await backend.find(Match(slug="reset", active=True), 9)
            stored = await backend.find(Match(id=new.id), 9)
            if stored or not cancelled:
                assert found == stored == [new]
                assert await one(other, active) == replaced(active, new.created_at)
                active = new
            else:
                assert found == [active]

        await cancel_everywhere(insert, check)

    @case(5)
    async def test_a_cancelled_overlap_happens_wholly_or_not_at_all(self, bench: Bench) -> None:
        """A cancelled insert that takes over a key and charges a limit has done all of it, or inserted
        nothing and lost no key; its charge may stay."""
        backend, other = await bench.two_backends()
        active = await put(backend)
        new = a_token()

        def insert() -> Coroutine[Any, Any, object]:
            nonlocal new
            new = a_token()
            spends = (a_spend(BUDGET, 10_000),)
            return backend.insert(new, InsertMode.REPLACE, keep_until=NOW + MINUTE, spends=spends)

        async def check(cancelled: bool) -> None:
            nonlocal active
            await _unlocked(backend, other)
            (found,) = await other.find(Match(slug="reset", active=True), 9)
            own = active.keys[0]
            if found.id == new.id or not cancelled:
                taken = own._replace(expires_at=NOW + MINUTE)
                assert found == new._replace(keys=(*new.keys, taken))
                assert own not in (await one(other, active)).keys
                active = found
            else:
                assert found == active

        await cancel_everywhere(insert, check)

    @case(5)
    async def test_a_cancelled_use_happens_wholly_or_not_at_all(self, bench: Bench) -> None:
        """A cancelled use is stored in all its fields, with its id and what it resets, or in none; no lock is
        left behind."""
        backend, other = await bench.two_backends()
        before = await put(backend)

        def used() -> Coroutine[Any, Any, object]:
            change = Use(at=NOW + 1, use_id="mine", resets=(BUDGET,))
            return backend.present(by_key(before), change, NOW)

        async def check(cancelled: bool) -> None:
            nonlocal before
            await _unlocked(backend, other)
            after = before._replace(uses=1, used_at=NOW + 1, state=State.USED, ends_at=NOW)
            now = await one(other, before)
            assert now in ([before, after] if cancelled else [after])
            replay = await other.present(by_key(before), Use(at=NOW + 2, use_id="mine"), NOW + 2)
            assert replay.outcome is (Outcome.REPLAYED if now == after else Outcome.RIGHT)
            before = await put(other)
            await other.spend((a_spend(BUDGET, 10_000),), NOW)

        await cancel_everywhere(used, check)

    @case(8)
    async def test_a_cancelled_key_is_compared_and_charged_or_neither(self, bench: Bench) -> None:
        """A wrong key whose caller is cancelled never gives a free attempt: whatever was answered is
        charged."""
        backend, other = await bench.two_backends()
        spends = (a_spend(BUDGET, 10_000),)
        wrong = Match(digests=(a_digest("wrong"),))
        calls = answered = 0

        async def present() -> None:
            nonlocal calls, answered
            calls += 1
            assert (await backend.present(wrong, None, NOW, spends)).outcome is Outcome.REFUSED
            answered += 1

        async def check(cancelled: bool) -> None:
            (state,) = await other.budgets((BUDGET,))
            assert answered <= (state.spent if state else 0) <= calls

        await cancel_everywhere(present, check)

    @case(5)
    async def test_a_cancelled_call_leaves_the_others(self, bench: Bench) -> None:
        """Of calls at once, which a store may gather, some are cancelled: all others are answered, and each
        cancelled one has happened wholly or not at all."""
        backends = await bench.two_backends()
        for number in range(self.rounds):
            tokens = [await put(backends[0], object_id=f"{number} {n}") for n in range(self.tasks)]
            tasks = [
                asyncio.ensure_future(use(backends[n // 3 % 2], token)) for n, token in enumerate(tokens)
            ]
            for _ in range(number):
                await asyncio.sleep(0)
            cancelled = [task.cancel() for task in tasks[::3]]
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            for n, token in enumerate(tokens):
                uses = (await one(backends[1], token)).uses
                if n % 3 == 0 and cancelled[n // 3]:
                    assert isinstance(answers[n], asyncio.CancelledError)
                    assert uses in (0, 1)
                else:
                    assert uses == 1

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
