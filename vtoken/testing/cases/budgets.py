"""The protocol's sentences about budgets: ``spend``, ``refund``, ``budgets``, ``reset``, and what an insert
costs."""

from __future__ import annotations

from typing import Any, Final

from vtoken.backend import (
    BudgetState,
    Charge,
    Inserted,
    InsertMode,
    InsertResult,
    Match,
    Spend,
    Spending,
    StoredToken,
    TokenBackend,
)
from vtoken.testing.cases.insert import IF_NONE_VALID, INSERTED, REPLACE
from vtoken.testing.harness import (
    DAY,
    MINUTE,
    NOW,
    Bench,
    Suite,
    a_budget,
    a_digest,
    a_spend,
    a_token,
    at_once,
    case,
    dice,
    find_all,
    put,
)
from vtoken.testing.model.store import ReferenceStore

BUDGET: Final = a_budget("sms", of=42)
WINDOW: Final = 1000
LONGEST: Final = 4000
LIMIT: Final = 2
MAX_SPAN: Final = 366 * DAY
"""The longest window there is."""


def two_in(window: int = WINDOW, budget: Any = BUDGET) -> Spend:
    return Spend(budget=budget, limit=LIMIT, window=window, max_window=LONGEST)


async def spent(backend: TokenBackend, spend: Spend, now: int) -> int | None:
    """Take one; the end of the window, or None where it is full."""
    answer = await backend.spend((spend,), now)
    if answer.full is not None:
        assert (answer.full, answer.charges, answer.left) == (0, (), 0)
        return None
    (charge,) = answer.charges
    assert charge.budget == spend.budget
    return charge.until


async def state_of(backend: TokenBackend, budget: Any = BUDGET) -> BudgetState | None:
    (state,) = await backend.budgets((budget,))
    return state


class BudgetCases(Suite):
    """Cases of one budget, step by step."""

    @case(8)
    async def test_a_window_holds_its_limit(self, bench: Bench) -> None:
        """A budget begins with its first spending, allows ``limit`` until its window ends, says what is left,
        and then begins anew."""
        backend = await bench.backend()
        spends = (a_spend(BUDGET, 3, WINDOW),)
        until = NOW + WINDOW
        charges = (Charge(budget=BUDGET, until=until),)
        for at, left in ((NOW, 2), (NOW + 1, 1), (until - 1, 0)):
            assert await backend.spend(spends, at) == Spending(charges=charges, left=left)
            state = BudgetState(spent=3 - left, strikes=0, until=until)
            assert await backend.budgets((BUDGET,)) == [state]
        for at in (until - 1, NOW):
            assert await backend.spend(spends, at) == Spending(left=0, full=0, until=until)
        assert await backend.budgets((BUDGET,)) == [BudgetState(spent=3, strikes=0, until=until)]
        assert await spent(backend, spends[0], until) == until + WINDOW

    @case(8)
    async def test_an_exhausted_window_doubles_the_next(self, bench: Bench) -> None:
        """Each exhausted window doubles the next up to ``max_window``; after one that was not, the next is
        short again."""
        backend = await bench.backend()
        now = NOW
        for strikes, length in enumerate((1000, 2000, 4000, 4000)):
            for _ in range(LIMIT):
                assert await spent(backend, two_in(), now) == now + length
            assert await spent(backend, two_in(), now) is None
            assert await state_of(backend) == BudgetState(spent=LIMIT, strikes=strikes, until=now + length)
            now += length
        assert await spent(backend, two_in(), now) == now + 4000
        now += 4000
        assert await spent(backend, two_in(), now) == now + 1000
        assert await state_of(backend) == BudgetState(spent=1, strikes=0, until=now + 1000)

    @case(8)
    async def test_strikes_are_forgotten_in_time(self, bench: Bench) -> None:
        """A budget that rested for ``max_window`` after its window begins anew, one millisecond earlier it
        does not."""
        backend = await bench.backend()
        for early, length in ((0, WINDOW), (1, 2 * WINDOW)):
            spend = two_in(budget=a_budget(early))
            for _ in range(LIMIT):
                assert await spent(backend, spend, NOW) == NOW + WINDOW
            late = NOW + WINDOW + LONGEST - early
            assert await spent(backend, spend, late) == late + length

    @case(7)
    async def test_a_clock_that_was_ahead_locks_nobody_out(self, bench: Bench) -> None:
        """A budget that ends later than ``now`` and twice its ``max_window`` is stale and begins anew, one
        millisecond earlier it goes on."""
        backend = await bench.backend()
        for ahead, until in ((2 * LONGEST - WINDOW, None), (2 * LONGEST - WINDOW + 1, NOW + WINDOW)):
            spend = two_in(budget=a_budget(ahead))
            for _ in range(LIMIT):
                await spent(backend, spend, NOW + ahead)
            assert await spent(backend, spend, NOW) == until
        ten_years = 3650 * DAY
        spend = two_in(budget=a_budget("years"))
        await spent(backend, spend, NOW + ten_years)
        assert await spent(backend, spend, NOW) == NOW + WINDOW
        assert await state_of(backend, spend.budget) == BudgetState(spent=1, strikes=0, until=NOW + WINDOW)

    @case(8)
    async def test_windows_do_not_overflow(self, bench: Bench) -> None:
        """However often a window is exhausted, the next is ``max_window`` long at the most, and ``strikes``
        stop at twenty."""
        backend = await bench.backend()
        for name, window, longest in (("a", 1, 2**20), ("b", MAX_SPAN, MAX_SPAN), ("c", 2**30, MAX_SPAN)):
            spend = a_spend(a_budget(name), 1, window, longest)
            now = NOW
            for strikes in range(25):
                until = now + min(window << min(strikes, 20), longest)
                assert await spent(backend, spend, now) == until
                now = until
            state = await state_of(backend, spend.budget)
            assert state is not None
            assert state.strikes == 20

    @case(8)
    async def test_a_limit_may_change(self, bench: Bench) -> None:
        """What is stored of a budget is counted against the limit and window of the call, whatever those
        were before."""
        backend = await bench.backend()
        for _ in range(3):
            await backend.spend((a_spend(BUDGET, 3, WINDOW, LONGEST),), NOW)
        assert await spent(backend, a_spend(BUDGET, 2, WINDOW, LONGEST), NOW) is None
        assert await spent(backend, a_spend(BUDGET, 4, 9 * WINDOW, 9 * LONGEST), NOW) == NOW + WINDOW
        assert await state_of(backend) == BudgetState(spent=4, strikes=0, until=NOW + WINDOW)
        later = NOW + WINDOW
        assert await spent(backend, a_spend(BUDGET, 9, 5, LONGEST), later) == later + 5

    @case(8)
    async def test_refund_gives_back_to_the_running_window(self, bench: Bench) -> None:
        """``refund`` gives one back to the window that ends at ``until``, to no other, never more than was
        spent, and leaves the strikes."""
        backend = await bench.backend()
        until = NOW + WINDOW
        charge = Charge(budget=BUDGET, until=until)
        await backend.refund((charge,))
        await backend.refund(())
        assert await state_of(backend) is None
        spend = a_spend(BUDGET, 1, WINDOW, LONGEST)
        assert await spent(backend, spend, NOW) == until
        for wrong in (until - 1, until + 1, 0):
            await backend.refund((charge._replace(until=wrong),))
        await backend.refund((charge._replace(budget=a_budget("other", of=42)),))
        await backend.refund((charge._replace(budget=a_budget("sms", of=43)),))
        assert await spent(backend, spend, NOW) is None
        for _ in range(3):
            await backend.refund((charge,))
        assert await state_of(backend) == BudgetState(spent=0, strikes=0, until=until)
        # Nothing is spent, so that the window begins with the next spending.
        assert await spent(backend, spend, NOW + 5) == NOW + 5 + WINDOW
        await backend.refund((charge,))
        assert await spent(backend, spend, NOW + 5) is None
        # The next one, which is exhausted before it is given back, keeps its strike.
        until = NOW + 5 + WINDOW
        assert await spent(backend, spend, until) == until + 2 * WINDOW
        await backend.refund((charge._replace(until=until + 2 * WINDOW),))
        assert await spent(backend, spend, until + 7) == until + 7 + 2 * WINDOW

    @case(8)
    async def test_refund_takes_several_charges(self, bench: Bench) -> None:
        """Each charge is given back by itself, the same one twice as well, and a wrong one among them spoils
        nothing."""
        backend = await bench.backend()
        names = [a_budget(n, of=n % 2) for n in range(3)]
        spends = tuple(a_spend(name, 9, WINDOW + n) for n, name in enumerate(names))
        charges = (await backend.spend(spends, NOW)).charges
        for _ in range(2):
            assert (await backend.spend(spends, NOW)).charges == charges
        wrong = charges[2]._replace(until=1)
        await backend.refund((charges[0], wrong, charges[1], charges[0], wrong))
        assert [state.spent for state in await backend.budgets(tuple(names)) if state] == [1, 2, 3]

    @case(8)
    async def test_reset_forgets_what_it_names(self, bench: Bench) -> None:
        """``reset`` forgets the budgets of an object with these names, or all of them, strikes included, says
        how many there were, and touches no other object's."""
        backend = await bench.backend()
        mine = [a_budget(n, of=1) for n in range(4)]
        others = [a_budget(0, of=2), a_budget(0)]
        spends = tuple(a_spend(budget, 1, WINDOW, LONGEST) for budget in (*mine, *others))
        await backend.spend(spends, NOW)
        await backend.spend(spends, NOW + WINDOW)
        of = mine[0].object
        assert await backend.reset(of, ()) == 0
        assert await backend.reset(of, (mine[0].name, mine[2].name, a_budget("never").name)) == 2
        states = await backend.budgets(tuple(mine))
        assert [state is None for state in states] == [True, False, True, False]
        assert await spent(backend, spends[0], NOW + WINDOW) == NOW + 2 * WINDOW
        assert await backend.reset(of, None) == 3
        assert await backend.reset(of, None) == 0
        assert None not in await backend.budgets(tuple(others))
        assert await backend.reset(bytes(16), None) == 1
        assert await backend.budgets((*mine, *others)) == [None] * 4 + [
            BudgetState(spent=1, strikes=1, until=NOW + WINDOW + 2 * WINDOW),
            None,
        ]

    @case(8)
    async def test_both_parts_of_a_name_count(self, bench: Bench) -> None:
        """Budgets of another object or another name are apart."""
        backend = await bench.backend()
        names = [a_budget(name, of=of) for name in range(3) for of in (None, 1, 2)]
        names += [name._replace(object=name.name, name=name.object) for name in names]
        for full in (None, 0):
            for name in names:
                assert (await backend.spend((a_spend(name),), NOW)).full == full
        assert await backend.budgets((names[3], a_budget("never"), names[0])) == [
            BudgetState(spent=1, strikes=0, until=NOW + MINUTE),
            None,
            BudgetState(spent=1, strikes=0, until=NOW + MINUTE),
        ]
        assert await backend.budgets(()) == []

    @case(8)
    async def test_budgets_follow_their_steps(self, bench: Bench) -> None:
        """A long random history gives what the steps of the protocol give, one by one."""
        backend, reference = await bench.backend(), ReferenceStore()
        choice = dice(8)
        names = [a_budget(n, of=n % 2) for n in range(3)]
        now, charges = NOW, list[Charge]()
        for step in range(200):
            now += choice.choice([0, 0, 0, 1, 300, WINDOW, 2 * WINDOW, LONGEST + 1, -3 * LONGEST])
            chosen = choice.sample(names, choice.randint(1, 3))
            spends = tuple(two_in(choice.choice([1, WINDOW]), name) for name in chosen)
            if choice.random() < 0.25 and charges:
                given_back = tuple(choice.choices(charges[-5:], k=2))
                reference.refund(given_back)
                await backend.refund(given_back)
            if choice.random() < 0.05:
                forgotten = chosen[0]
                expected = reference.reset(forgotten.object, (forgotten.name,))
                assert await backend.reset(forgotten.object, (forgotten.name,)) == expected
            answer = reference.spend(spends, now)
            assert await backend.spend(spends, now) == answer, step
            charges += answer.charges
            assert await backend.budgets(tuple(names)) == reference.budgets(tuple(names)), step


class SpendingCases(Suite):
    """Cases of several budgets at once, and of several callers."""

    @case(8)
    async def test_all_are_charged_or_none(self, bench: Bench) -> None:
        """A request spends from all its limits or, where one is full, from none; the one that stays full the
        longest is named by its place."""
        backend = await bench.backend()
        names = [a_budget(n, of=n // 2 or None) for n in range(4)]
        limits, windows = (9, 1, 1, 9), (MINUTE, 2 * MINUTE, 3 * MINUTE, 9 * MINUTE)
        spends = tuple(
            a_spend(name, limit, window) for name, limit, window in zip(names, limits, windows, strict=True)
        )
        expected = tuple(Charge(budget=s.budget, until=NOW + s.window) for s in spends)
        assert await backend.spend(spends, NOW) == Spending(charges=expected, left=0)
        before = await backend.budgets(tuple(names))
        for at in (NOW, NOW + 2 * MINUTE - 1):
            refusal = Spending(left=0, full=2, until=NOW + 3 * MINUTE)
            assert await backend.spend(spends, at) == refusal
            assert await backend.spend(spends[::-1], at) == refusal._replace(full=1)
        assert await backend.spend(spends[:2], NOW) == Spending(left=0, full=1, until=NOW + 2 * MINUTE)
        assert await backend.budgets(tuple(names)) == before
        assert await backend.spend((), NOW) == Spending()

    @case(8)
    async def test_of_concurrent_spendings_the_limit_is_allowed(self, bench: Bench) -> None:
        """Of N concurrent calls in one window ``limit`` are allowed, on a fresh budget, a running one and one
        whose window has ended."""
        backends = await bench.two_backends()
        for number in range(self.rounds):
            budget = a_budget(number, of=number % 3 or None)
            for limit, now in ((5, NOW), (7, NOW + MINUTE), (9, NOW + MINUTE)):
                allowed = limit - (7 if limit == 9 else 0)
                spend = a_spend(budget, limit, MINUTE)
                calls = [backends[n // 2 % 2].spend((spend,), now) for n in range(max(self.tasks, limit + 3))]
                answers = await at_once(calls)
                charged = [answer for answer in answers if answer.full is None]
                assert len(charged) == allowed
                assert {c.until for answer in charged for c in answer.charges} == {now + MINUTE}
                assert sorted(answer.left or 0 for answer in charged) == list(range(allowed))

    @case(8)
    async def test_of_concurrent_spendings_the_narrowest_limit_counts(self, bench: Bench) -> None:
        """Of N concurrent calls that spend from two budgets of one object, as many are allowed as the
        narrower has, and neither is charged for the others."""
        backends = await bench.two_backends()
        for number in range(self.rounds):
            wide, narrow = a_budget("wide", of=number), a_budget("narrow", of=number)
            spends = (a_spend(wide, 50), a_spend(narrow, 3))
            calls = [backends[n % 2].spend(spends[:: 1 if n % 4 < 2 else -1], NOW) for n in range(self.tasks)]
            answers = await at_once(calls)
            assert sum(answer.full is None for answer in answers) == 3
            assert [s.spent for s in await backends[0].budgets((wide, narrow)) if s] == [3, 3]

    @case(8)
    async def test_concurrent_refunds_lose_none(self, bench: Bench) -> None:
        """N concurrent refunds give back N, and spending beside them is not lost."""
        backends = await bench.two_backends()
        for number in range(self.rounds):
            spend = a_spend(a_budget(number, of=42), 10_000)
            (charge,) = (await backends[0].spend((spend,), NOW)).charges
            for _ in range(self.tasks - 1):
                await backends[0].spend((spend,), NOW)
            refunds = [backends[n % 2].refund((charge,)) for n in range(self.tasks - 1)]
            spendings = [backends[n // 2 % 2].spend((spend,), NOW) for n in range(self.tasks)]
            _, answers = await at_once([_all(refunds), _all(spendings)])
            assert {answer.charges for answer in answers} == {(charge,)}
            state = await state_of(backends[1], spend.budget)
            assert state == BudgetState(spent=self.tasks + 1, strikes=0, until=NOW + MINUTE)


async def _all(calls: Any) -> Any:
    return await at_once(calls)


class InsertLimitCases(Suite):
    """Cases of what an insert costs."""

    @case(8)
    async def test_an_insert_charges_in_its_step(self, bench: Bench) -> None:
        """An insert charges all its spends, or is LIMITED and changes nothing; the window begins at
        ``created_at``."""
        backend = await bench.backend()
        spends = (a_spend(BUDGET, 3), a_spend(a_budget("ip"), 1, 5 * MINUTE))
        first = a_token(created_at=NOW + 7)
        charges = tuple(Charge(budget=s.budget, until=NOW + 7 + s.window) for s in spends)
        answer = await backend.insert(first, REPLACE, spends=spends)
        assert answer == Inserted(INSERTED, first, Spending(charges=charges, left=0))
        for mode in InsertMode:
            new = a_token(created_at=NOW + 8)
            wanted = DAY + NOW if mode is IF_NONE_VALID else 0
            refused = Spending(left=0, full=1, until=NOW + 7 + 5 * MINUTE)
            answer = await backend.insert(new, mode, spends=spends, wanted_until=wanted, keep_until=DAY + NOW)
            assert answer == Inserted(InsertResult.LIMITED, None, refused)
        assert await find_all(backend) == [first]
        states = await backend.budgets((BUDGET, a_budget("ip")))
        assert [state.spent for state in states if state] == [1, 1]
        answer = await backend.insert(a_token(created_at=NOW + 9), REPLACE, spends=spends[:1])
        assert (answer.result, answer.spending.left) == (INSERTED, 1)

    @case(8)
    async def test_what_inserts_nothing_costs_nothing(self, bench: Bench) -> None:
        """Where a key is taken, a valid token is in the way or the token was inserted before, nothing stays
        charged, and a full limit is not asked."""
        backend = await bench.backend()
        stored = await put(backend)
        digest = {"digest": stored.keys[0].digest}
        spends = (a_spend(BUDGET, 1),)
        unfit: list[tuple[StoredToken, InsertMode, dict[str, Any]]] = [
            (a_token(digest), REPLACE, {}),
            (a_token(), InsertMode.ADD, {"also_taken": (digest["digest"],)}),
            (a_token(), IF_NONE_VALID, {"wanted_until": NOW}),
            (a_token(digest), InsertMode.ONCE, {}),
        ]
        for full in (False, True):
            if full:
                await backend.spend(spends, NOW)
            for token, mode, named in unfit:
                answer = await backend.insert(token, mode, spends=spends, **named)
                assert answer.result in (InsertResult.KEY_TAKEN, InsertResult.HAS_VALID)
                assert answer.spending.charges == ()
                state = await state_of(backend)
                assert (state.spent if state else 0) == full

    @case(8)
    async def test_of_concurrent_inserts_under_a_limit_so_many_succeed(self, bench: Bench) -> None:
        """Of N concurrent inserts as many succeed as their narrowest limit allows, however their objects
        differ; the others change nothing."""
        backends = await bench.two_backends()
        for number in range(self.rounds):
            shared, of_object = a_budget(f"everybody {number}"), a_budget("cooldown", of=number)
            tokens = [
                a_token(object_id=f"{number}", slug=str(n % 2 if number % 2 else 0))
                for n in range(self.tasks)
            ]
            spends = (a_spend(shared, 4), a_spend(of_object, 3))
            calls = [backends[n % 2].insert(t, REPLACE, spends=spends) for n, t in enumerate(tokens)]
            results = [answer.result for answer in await at_once(calls)]
            assert (results.count(INSERTED), results.count(InsertResult.LIMITED)) == (3, self.tasks - 3)
            assert len(await backends[0].find(Match(object_id=f"{number}"), 99)) == 3
            states = await backends[1].budgets((shared, of_object))
            assert [state.spent for state in states if state] == [3, 3]

    @case(8)
    async def test_of_concurrent_ifs_the_one_that_inserts_pays(self, bench: Bench) -> None:
        """Of N concurrent ``IF_NONE_VALID`` and ``ONCE`` under a wide limit one is charged: nothing is spent
        for what was not inserted."""
        backends = await bench.two_backends()
        for number in range(self.rounds):
            mode = (IF_NONE_VALID, InsertMode.ONCE)[number % 2]
            digest = a_digest(f"pays {number}")
            spends = (a_spend(BUDGET, 10_000),)
            calls = [
                backends[n % 2].insert(
                    a_token({"digest": digest} if mode is InsertMode.ONCE else {}, object_id=f"{number}"),
                    mode,
                    wanted_until=NOW if mode is IF_NONE_VALID else 0,
                    spends=spends,
                )
                for n in range(self.tasks)
            ]
            results = [answer.result for answer in await at_once(calls)]
            assert results.count(INSERTED) == 1
            state = await state_of(backends[0])
            assert state is not None
            assert state.spent == number + 1

    @case(8)
    async def test_an_insert_beside_others_that_another_limit_refuses(self, bench: Bench) -> None:
        """Of N inserts at once most are refused by a narrow limit, or insert nothing. They never fill a wide
        one, which they share with other objects: whose inserts succeed, up to the last that it allows."""
        backends = await bench.two_backends()
        for number in range(self.rounds):
            mode = (REPLACE, REPLACE, IF_NONE_VALID)[number % 3]
            own = a_spend(a_budget("own", of=number), 2)
            narrow = (own, a_spend(a_budget(f"tenant {number}"), 2), own)[number % 3]
            inserted = 1 if mode is IF_NONE_VALID else narrow.limit
            wide = a_spend(a_budget(f"address {number}"), inserted + 3)
            crowd = [a_token(object_id=f"{number}") for _ in range(self.tasks * 2)]
            calls = [
                backends[n % 2].insert(
                    token,
                    mode,
                    wanted_until=NOW if mode is IF_NONE_VALID else 0,
                    spends=(wide, narrow)[:: 1 if number % 2 else -1],
                )
                for n, token in enumerate(crowd)
            ]
            others = [a_token(object_id=f"{number}-{n}") for n in range(3)]
            calls[5:5] = [backends[n % 2].insert(t, REPLACE, spends=(wide,)) for n, t in enumerate(others)]
            results = [answer.result for answer in await at_once(calls)]
            assert results[5:8] == [INSERTED] * 3
            assert results.count(INSERTED) == inserted + 3
            states = await backends[1].budgets((wide.budget, narrow.budget))
            assert [state.spent for state in states if state] == [inserted + 3, inserted]
