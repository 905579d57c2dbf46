"""The protocol's sentences about ``purge`` and ``erase``."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from vtoken.backend import (
    NEVER,
    STALE_HOLD,
    InsertMode,
    InsertResult,
    Match,
    Outcome,
    Purged,
    State,
    Use,
)
from vtoken.testing.cases.insert import insert
from vtoken.testing.cases.present import a_hold, use
from vtoken.testing.harness import (
    DAY,
    MINUTE,
    NOW,
    Bench,
    Suite,
    a_budget,
    a_spend,
    a_token,
    at_once,
    by_key,
    case,
    find_all,
    one,
    put,
)


class SweepCases(Suite):
    """Cases of ``purge`` and ``erase``."""

    @case(9)
    async def test_purge_deletes_what_ended_and_no_more(self, bench: Bench) -> None:
        """Purge deletes tokens with ``ends_at < before`` on which no hold runs at ``now``, and no others."""
        backend = await bench.backend()
        now = NOW + 5
        gone = [
            await put(backend, expires_at=NOW - 1),
            await put(backend, ends_at=NOW - 1, state=State.USED, uses=1),
            await put(backend, ends_at=NOW - 1, state=State.REPLACED, keys=()),
            await put(backend, ends_at=-1, state=State.ENDED, holds=(a_hold("h", now),)),
            await put(backend, expires_at=NOW - 1, holds=(a_hold("stale", now + STALE_HOLD + 1),)),
        ]
        kept = [
            await put(backend, expires_at=NOW),
            await put(backend, state=State.ENDED, ends_at=NOW),
            await put(backend, expires_at=NOW - 1, holds=(a_hold("over", now), a_hold("h", now + 1))),
            await put(backend, state=State.REPLACED, ends_at=NOW - 1, holds=(a_hold("h", now + STALE_HOLD),)),
            await put(backend, expires_at=NEVER),
            # Purge goes by ``ends_at`` alone.
            await put(backend, expires_at=NOW - 1, ends_at=NOW, state=State.ENDED),
        ]
        assert await backend.purge(NOW, now, 99, 0) == Purged(tokens=len(gone), budgets=0)
        assert await find_all(backend) == kept[::-1]
        assert await backend.purge(NOW, now, 99, 0) == Purged(tokens=0, budgets=0)

    @case(9)
    async def test_purge_takes_the_longest_ended_first(self, bench: Bench) -> None:
        """One purge deletes at most ``limit`` tokens, the longest ended first, and fewer only where no more
        are left."""
        backend = await bench.backend()
        order = [5, 1, 4, 7, 2, 6, 3]
        tokens = {n: await put(backend, expires_at=NOW - MINUTE + n * 1000) for n in order}
        held = await put(backend, expires_at=NOW - DAY, holds=(a_hold("h"),))
        for left in (range(4, 8), range(7, 8), range(0)):
            assert (await backend.purge(NOW, NOW, 3, 0)).tokens == (3 if left else 1)
            ids = {held.id, *(tokens[n].id for n in left)}
            assert {token.id for token in await find_all(backend)} == ids
        assert (await backend.purge(NOW, NOW, 3, 0)).tokens == 0
        # What ends between two purges has its place among what the first one left.
        _, last = await put(backend, expires_at=NOW - 3), await put(backend, expires_at=NOW - 1)
        assert (await backend.purge(NOW, NOW, 1, 0)).tokens == 1
        await put(backend, expires_at=NOW - 2)
        assert (await backend.purge(NOW, NOW, 1, 0)).tokens == 1
        assert {token.id for token in await find_all(backend)} == {held.id, last.id}

    @case(9)
    async def test_a_purged_key_is_free_again(self, bench: Bench) -> None:
        """What purge deleted is forgotten: its digests and its id may be stored again."""
        backend = await bench.backend()
        token = await put(backend, {}, {"kind": "code"}, expires_at=NOW - 1)
        assert (await backend.purge(NOW, NOW, 9, 0)).tokens == 1
        assert await insert(backend, token, InsertMode.REPLACE) == token
        assert (await backend.purge(NOW, NOW, 9, 0)).tokens == 1
        assert await find_all(backend) == []

    @case(9)
    async def test_the_end_moves_with_the_token(self, bench: Bench) -> None:
        """What ends early is purged early, and what was found in the way of a purge is found by the next."""
        backend = await bench.backend()
        token = await put(backend, expires_at=NEVER, max_uses=2, holds=(a_hold("h", NOW + 5),))
        other = await put(backend, object_id="7", expires_at=NOW - 3, holds=(a_hold("h", NOW + 5),))
        await backend.deactivate(Match(id=token.id), NOW, ("h",))
        assert (await backend.purge(NOW + 1, NOW + 4, 9, 0)).tokens == 0
        assert (await backend.purge(NOW - 3, NOW + 5, 9, 0)).tokens == 0
        assert (await backend.purge(NOW + 1, NOW + 5, 1, 0)).tokens == 1
        assert await find_all(backend) == [token_now := await one(backend, token)]
        assert token_now.ends_at == NOW - 1
        assert (await backend.purge(NOW + 1, NOW + 5, 1, 0)).tokens == 1
        assert await backend.find(Match(id=other.id), 1) == []

    @case(9)
    async def test_concurrent_purges_count_a_token_once(self, bench: Bench) -> None:
        """Concurrent purges delete each token once, beside writes, and no valid one; what one of them holds
        is waited for, so that a purge that finds fewer than it may has left none."""
        backends = await bench.two_backends()
        for n in range(20):
            await put(backends[0], object_id=str(n), expires_at=NOW - 1 - n)
        fresh = [a_token(object_id=f"fresh{n}") for n in range(5)]
        purges = [backends[n % 2].purge(NOW, NOW, 4, 0) for n in range(8)]
        writes = [backends[0].insert(token, InsertMode.REPLACE) for token in fresh]
        purged, written = await at_once([_any(at_once(purges)), _any(at_once(writes))])
        left = await find_all(backends[1])
        assert left == fresh[::-1]
        assert sum(answer.tokens for answer in purged) == 20
        assert all(answer.result is InsertResult.INSERTED for answer in written)

    @case(9)
    async def test_a_purge_beside_calls_purges_nothing_valid(self, bench: Bench) -> None:
        """A purge beside a use, a hold and a re-issue of the same tokens takes none that is held or valid,
        and each of the calls is answered as if it came before or after."""
        backends = await bench.two_backends()
        for number in range(self.rounds):
            who = f"p{number}"
            token = await put(backends[0], object_id=who, expires_at=NOW - 1)
            old = await put(backends[0], object_id=f"{who} old", expires_at=NOW - 1)
            new = a_token(object_id=f"{who} old")
            held, purged, inserted = await at_once(
                [
                    _any(use(backends[number % 2], token, at=NOW - 1)),
                    _any(backends[0].purge(NOW, NOW, 9, 0)),
                    _any(backends[1].insert(new, InsertMode.REPLACE)),
                ]
            )
            left = await find_all(backends[0])
            assert new in left
            assert inserted.result is InsertResult.INSERTED
            assert held.outcome is Outcome.RIGHT or held.token is None
            assert purged.tokens <= 2
            await backends[0].purge(NOW, NOW, 9, 0)
            for gone in (token, old):
                assert await backends[0].find(Match(id=gone.id), 1) == []
            await backends[0].erase("auth.user", f"{who} old", bytes(16))

    @case(9)
    async def test_purge_forgets_ended_budgets(self, bench: Bench) -> None:
        """Purge forgets at most ``limit`` budgets with ``until <= budgets_before``, counts them apart, and
        leaves the others as they are."""
        backend = await bench.backend()
        budgets = [a_budget(n, of=n % 2 or None) for n in range(6)]
        for n, budget in enumerate(budgets):
            await backend.spend((a_spend(budget, 1, 10 + n),), NOW)
        assert await backend.purge(0, NOW, 99, NOW + 9) == Purged(tokens=0, budgets=0)
        before = await backend.budgets(tuple(budgets))
        assert await backend.purge(0, NOW, 99, NOW + 11) == Purged(tokens=0, budgets=2)
        assert await backend.budgets(tuple(budgets)) == [None, None, *before[2:]]
        assert await backend.purge(0, NOW, 3, NOW + MINUTE) == Purged(tokens=0, budgets=3)
        assert sum(state is not None for state in await backend.budgets(tuple(budgets))) == 1
        await put(backend, expires_at=NOW - 1)
        assert await backend.purge(NOW, NOW, 3, NOW + MINUTE) == Purged(tokens=1, budgets=1)

    @case(9)
    async def test_purge_drains_any_number_of_budgets(self, bench: Bench) -> None:
        """Purges in bounded batches drain budgets whatever their number, though no token is stored."""
        backends = await bench.two_backends()
        number, limit = 240, 50
        await at_once(backends[n % 2].spend((a_spend(a_budget(n, of=n)),), NOW) for n in range(number))
        answers = [await backends[0].purge(NOW, NOW, limit, NOW + MINUTE) for _ in range(5)]
        assert [answer.budgets for answer in answers] == [50, 50, 50, 50, 40]
        assert await backends[1].budgets(tuple(a_budget(n, of=n) for n in range(number))) == [None] * number

    @case(9)
    async def test_a_budget_that_began_anew_stays(self, bench: Bench) -> None:
        """A purge beside a spending that begins a budget anew forgets what was over, and never what began
        just now."""
        backends = await bench.two_backends()
        for number in range(self.rounds):
            budgets = tuple(a_budget(f"{number} {n}", of=n % 3) for n in range(self.tasks))
            for budget in budgets:
                await backends[0].spend((a_spend(budget, 3, 1000, 4000),), NOW - 2000)
            calls = [_any(backends[n % 2].purge(0, NOW, 99, NOW)) for n in range(2)]
            calls += [
                _any(backends[n % 2].spend((a_spend(budget, 3, 1000, 4000),), NOW))
                for n, budget in enumerate(budgets)
            ]
            await at_once(calls[::-1] if number % 2 else calls)
            for state in await backends[number % 2].budgets(budgets):
                assert state is not None
                assert (state.spent, state.until) == (1, NOW + 1000)

    @case(9)
    async def test_erase_removes_an_object(self, bench: Bench) -> None:
        """``erase`` deletes every token of an object whatever its state, what is remembered of their uses,
        and the object's budgets; nothing of another one."""
        backend = await bench.backend()
        mine = [
            await put(backend, slug=slug, state=state, context=context, holds=(a_hold("h"),), max_uses=9)
            for slug in ("", "reset")
            for state in State
            for context in (b"", b"c")
        ]
        used = await put(backend)
        await backend.present(by_key(used), Use(at=NOW, use_id="me"), NOW)
        others = [await put(backend, object_id="4"), await put(backend, content_type="auth")]
        budgets = a_budget(1, of=1), a_budget(2, of=1), a_budget(1, of=2), a_budget(1)
        await backend.spend(tuple(a_spend(budget) for budget in budgets), NOW)
        assert await backend.erase("auth.user", "42", budgets[0].object) == len(mine) + 1
        assert await find_all(backend) == others[::-1]
        states = await backend.budgets(budgets)
        assert [state is None for state in states] == [True, True, False, False]
        assert await backend.erase("auth.user", "42", budgets[0].object) == 0
        assert await insert(backend, used, InsertMode.REPLACE) == used
        assert (await use(backend, used, "me")).outcome is Outcome.RIGHT


async def _any(call: Awaitable[Any]) -> Any:
    """Its answer, as one of several of different types."""
    return await call
