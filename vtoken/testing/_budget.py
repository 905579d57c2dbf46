"""The protocol's sentences about ``spend``, ``refund`` and ``reset``."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from vtoken.backend import Budget, Spent
from vtoken.testing._bench import MINUTE, NOW, Bench, Suite, at_once, case, dice

BUDGET: Final = Budget("auth.user", "42", "sms-login", "attempts")
WINDOW: Final = 1000
MAX_WINDOW: Final = 4000
LIMIT: Final = 2
MAX_SPAN: Final = timedelta.max // timedelta(milliseconds=1)
"""The longest cooldown there is."""


class Model:
    """One budget, written off the docstring sentence by sentence, to compare a backend with."""

    def __init__(self) -> None:
        self.state: tuple[int, int, int] | None = None

    def spend(self, now: int, limit: int, window: int, max_window: int) -> Spent:
        spent, strikes, until = self.state or (0, 0, 0)
        if self.state is None or until + max_window <= now:
            return self._begin(0, now, window, max_window)
        if spent == 0:
            return self._begin(strikes, now, window, max_window)
        if until <= now:
            return self._begin(strikes + 1 if spent >= limit else 0, now, window, max_window)
        if spent < limit:
            self.state = spent + 1, strikes, until
            return Spent(True, until)
        return Spent(False, until)

    def _begin(self, strikes: int, now: int, window: int, max_window: int) -> Spent:
        self.state = 1, strikes, now + min(window * 2**strikes, max_window)
        return Spent(True, self.state[2])

    def refund(self, until: int) -> None:
        if self.state and self.state[0] > 0 and self.state[2] == until:
            self.state = self.state[0] - 1, self.state[1], until


class BudgetCases(Suite):
    """Cases of the budgets."""

    @case(8)
    async def test_a_window_holds_its_limit(self, bench: Bench) -> None:
        """A budget begins with its first spending, allows ``limit`` until its window ends, and then begins
        anew."""
        backend = await bench.backend()

        async def spend(now: int) -> Spent:
            return await backend.spend(BUDGET, now, 3, WINDOW, WINDOW)

        until = NOW + WINDOW
        assert await spend(NOW) == Spent(True, until)
        assert await spend(NOW + 1) == Spent(True, until)
        assert await spend(until - 1) == Spent(True, until)
        for _ in range(3):
            assert await spend(until - 1) == Spent(False, until)
        assert await spend(until) == Spent(True, until + WINDOW)

    @case(8)
    async def test_an_exhausted_window_doubles_the_next(self, bench: Bench) -> None:
        """Each exhausted window doubles the next up to ``max_window``; one that was not begins small
        again."""
        backend = await bench.backend()
        now = NOW
        for length in (1000, 2000, 4000, 4000):
            for _ in range(LIMIT):
                spent = await backend.spend(BUDGET, now, LIMIT, WINDOW, MAX_WINDOW)
                assert spent == Spent(True, now + length)
            assert not (await backend.spend(BUDGET, now, LIMIT, WINDOW, MAX_WINDOW)).allowed
            now += length
        assert await backend.spend(BUDGET, now, LIMIT, WINDOW, MAX_WINDOW) == Spent(True, now + 4000)
        now += 4000
        assert await backend.spend(BUDGET, now, LIMIT, WINDOW, MAX_WINDOW) == Spent(True, now + 1000)

    @case(8)
    async def test_strikes_are_forgotten_in_time(self, bench: Bench) -> None:
        """A budget that rested for ``max_window`` after its window begins anew, one millisecond earlier it
        does not."""
        backend = await bench.backend()
        for early, length in ((0, WINDOW), (1, 2 * WINDOW)):
            budget = BUDGET._replace(object_id=str(early))
            for _ in range(LIMIT):
                assert (await backend.spend(budget, NOW, LIMIT, WINDOW, MAX_WINDOW)).allowed
            late = NOW + WINDOW + MAX_WINDOW - early
            assert await backend.spend(budget, late, LIMIT, WINDOW, MAX_WINDOW) == Spent(True, late + length)

    @case(8)
    async def test_strikes_do_not_overflow(self, bench: Bench) -> None:
        """However often a window is exhausted, the next is ``max_window`` long at the most."""
        backend = await bench.backend()
        now, longest = NOW, 2**20
        for _ in range(70):
            now = (await backend.spend(BUDGET, now, 1, 1, longest)).until
        assert await backend.spend(BUDGET, now, 1, 1, longest) == Spent(True, now + longest)
        # Twice these windows is past 64 bits long before they have doubled as often as they may.
        for name, window in (("a", MAX_SPAN), ("b", MAX_SPAN >> 16)):
            budget, now = BUDGET._replace(object_id=name), NOW
            for strikes in range(25):
                until = now + min(window << min(strikes, 20), MAX_SPAN)
                assert await backend.spend(budget, now, 1, window, MAX_SPAN) == Spent(True, until)
                now = until

    @case(8)
    async def test_refund_gives_back_to_the_running_window(self, bench: Bench) -> None:
        """``refund`` gives one back to the window that ends at ``until``, to no other, and never more than
        was spent."""
        backend = await bench.backend()
        await backend.refund(BUDGET, NOW + WINDOW)
        until = (await backend.spend(BUDGET, NOW, 1, WINDOW, MAX_WINDOW)).until
        assert until == NOW + WINDOW
        for wrong in (until - 1, until + 1, 0):
            await backend.refund(BUDGET, wrong)
        await backend.refund(BUDGET._replace(kind="issues"), until)
        assert not (await backend.spend(BUDGET, NOW, 1, WINDOW, MAX_WINDOW)).allowed
        for _ in range(3):
            await backend.refund(BUDGET, until)
        # Nothing is spent, so that the window begins with the next spending.
        assert await backend.spend(BUDGET, NOW + 5, 1, WINDOW, MAX_WINDOW) == Spent(True, NOW + 5 + WINDOW)
        await backend.refund(BUDGET, until)
        assert not (await backend.spend(BUDGET, NOW + 5, 1, WINDOW, MAX_WINDOW)).allowed

    @case(8)
    async def test_refund_forgets_no_strike(self, bench: Bench) -> None:
        """``refund`` leaves the strikes: the window that begins after it is as long as it would have been."""
        backend = await bench.backend()
        until = NOW
        for _ in range(2):
            until = (await backend.spend(BUDGET, until, 1, WINDOW, MAX_WINDOW)).until
        await backend.refund(BUDGET, until)
        now = NOW + WINDOW + 7
        assert await backend.spend(BUDGET, now, 1, WINDOW, MAX_WINDOW) == Spent(True, now + 2 * WINDOW)

    @case(8)
    async def test_reset_forgets_the_budget(self, bench: Bench) -> None:
        """``reset`` forgets what was spent and the strikes, of this budget alone."""
        backend = await bench.backend()
        other = BUDGET._replace(kind="issues")
        await backend.reset(BUDGET)
        now = NOW
        for budget in (BUDGET, other):
            await backend.spend(budget, NOW, 1, WINDOW, MAX_WINDOW)
        now += WINDOW
        await backend.spend(BUDGET, now, 1, WINDOW, MAX_WINDOW)
        await backend.reset(BUDGET)
        assert await backend.spend(BUDGET, now, 1, WINDOW, MAX_WINDOW) == Spent(True, now + WINDOW)
        assert await backend.spend(other, now - 1, 1, WINDOW, MAX_WINDOW) == Spent(False, now)

    @case(8)
    async def test_every_part_of_its_name_makes_another_budget(self, bench: Bench) -> None:
        """Budgets of another content type, object id, slug or kind are apart, however their names join."""
        backend = await bench.backend()
        names = [
            Budget("a", "b", "c", "attempts"),
            Budget("a", "b", "c", "issues"),
            Budget("A", "b", "c", "attempts"),
            Budget("a", "B", "c", "attempts"),
            Budget("a", "b", "", "attempts"),
            Budget("ab", "", "c", "attempts"),
            Budget("a", "bc", "", "attempts"),
            Budget("a:b", "c", "", "attempts"),
            Budget("a", "b:c", "", "attempts"),
            Budget("a", "b ", "c", "attempts"),
        ]
        for allowed in (True, False):
            for name in names:
                assert (await backend.spend(name, NOW, 1, WINDOW, WINDOW)).allowed is allowed, name

    @case(8)
    async def test_budgets_follow_their_rules(self, bench: Bench) -> None:
        """A long random history gives what the rules give, one by one."""
        backend = await bench.backend()
        choice = dice(8)
        model, now, until = Model(), NOW, 0
        for step in range(150):
            now += choice.choice([0, 0, 1, 300, WINDOW, 2 * WINDOW, MAX_WINDOW + 1])
            if choice.random() < 0.25:
                model.refund(until)
                await backend.refund(BUDGET, until)
            expected = model.spend(now, LIMIT, WINDOW, MAX_WINDOW)
            assert await backend.spend(BUDGET, now, LIMIT, WINDOW, MAX_WINDOW) == expected, step
            until = expected.until

    @case(8)
    async def test_of_concurrent_spendings_the_limit_is_allowed(self, bench: Bench) -> None:
        """Of N concurrent calls in one window at most ``limit`` are allowed, and as many as that."""
        backends = [await bench.backend(), await bench.backend()]
        for number in range(3):
            budget = BUDGET._replace(object_id=str(number))
            for limit, now in ((5, NOW), (7, NOW + MINUTE)):
                calls = [backends[n % 2].spend(budget, now, limit, MINUTE, MINUTE) for n in range(40)]
                won = await at_once(calls)
                assert sum(spent.allowed for spent in won) == limit
                assert {spent.until for spent in won} == {now + MINUTE}

    @case(8)
    async def test_concurrent_refunds_lose_none(self, bench: Bench) -> None:
        """N concurrent refunds give back N, and spending beside them is not lost."""
        backends = [await bench.backend(), await bench.backend()]
        until = NOW + MINUTE
        for _ in range(10):
            await backends[0].spend(BUDGET, NOW, 10, MINUTE, MINUTE)
        await at_once([backends[n % 2].refund(BUDGET, until) for n in range(6)])
        won = await at_once([backends[n % 2].spend(BUDGET, NOW, 10, MINUTE, MINUTE) for n in range(20)])
        assert sum(spent.allowed for spent in won) == 6
