"""``vtoken.testing`` for applications: a manager in memory and a clock to turn."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from vtoken import BackendClosed, Subject, TokenPolicy
from vtoken.testing import Clock, memory_manager

ADA = Subject("auth.user", "ada")


async def test_a_manager_in_memory_goes_by_its_clock() -> None:
    manager, clock = memory_manager([TokenPolicy.code("sms-login", cooldown="1m")])
    with pytest.raises(BackendClosed):
        await manager.issue(ADA, "sms-login")
    async with manager:
        token = await manager.issue(ADA, "sms-login")
        assert token.created_at == clock()
        clock.advance(timedelta(minutes=10))
        assert await manager.exists_valid(ADA, "sms-login", token.key)
        clock.advance(timedelta(milliseconds=1))
        assert not await manager.exists_valid(ADA, "sms-login", token.key)


async def test_each_manager_has_a_store_of_its_own() -> None:
    clock = Clock(datetime(2030, 1, 1, tzinfo=UTC))
    (one, _), (two, same) = memory_manager(clock=clock), memory_manager(clock=clock)
    async with one, two:
        await one.issue(ADA, "reset")
        assert not await two.exists_valid(ADA)
    assert same is clock


def test_a_clock_wants_a_time_zone() -> None:
    clock = Clock()
    for naive in (clock.set, Clock):
        with pytest.raises(ValueError, match="aware"):
            naive(datetime(2030, 1, 1))  # the very thing
    clock.set(datetime(2030, 1, 1, microsecond=1500, tzinfo=UTC))
    assert clock.milliseconds == 1_893_456_000_001
