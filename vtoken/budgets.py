"""Attempt budgets and cooldowns: charged in a committed write before anything else is done."""

from __future__ import annotations

from datetime import timedelta
from typing import Final, NamedTuple

from vtoken.backend import Budget, TokenBackend
from vtoken.errors import CooldownActive, TooManyAttempts
from vtoken.guess import Guess
from vtoken.issue import Order
from vtoken.policy import MAX_WINDOW

MAX_WINDOW_MS: Final = MAX_WINDOW // timedelta(milliseconds=1)


class Charge(NamedTuple):
    """One that was taken from a budget, and the window it was taken from."""

    budget: Budget
    until: int


async def charge_attempt(store: TokenBackend, guess: Guess, now: int) -> Charge | None:
    """Count an attempt before it is compared; None where the policy has no cap.

    An exhausted window doubles the next one up to a day (NIST SP 800-63B-4, section 3.2.2, allows growing
    waits), so that a budget slows guessing down and never locks an account.

    Raises:
        TooManyAttempts: the budget is spent.
    """
    budget, rules = guess.budget(guess.object_id), guess.rules
    if budget is None or rules.max_attempts is None:
        return None
    spent = await store.spend(budget, now, rules.max_attempts, rules.attempt_window, MAX_WINDOW_MS)
    if not spent.allowed:
        raise TooManyAttempts(_seconds(spent.until - now))
    return Charge(budget, spent.until)


async def charge_cooldown(store: TokenBackend, order: Order, now: int) -> Charge | None:
    """Take the one issue that a cooldown holds; None where the policy has no cooldown.

    Raises:
        CooldownActive: it is taken.
    """
    cooldown = order.rules.cooldown
    if not cooldown:
        return None
    budget = Budget(order.content_type, order.object_id, order.slug, "issues")
    spent = await store.spend(budget, now, 1, cooldown, cooldown)
    if not spent.allowed:
        raise CooldownActive(_seconds(spent.until - now))
    return Charge(budget, spent.until)


async def refund(store: TokenBackend, charge: Charge | None) -> None:
    """Give a charge back: the guess was right, or nothing was issued."""
    if charge is not None:
        await store.refund(charge.budget, charge.until)


def _seconds(span: int) -> float:
    return max(span, 1) / 1000
