"""Guarantees 5 and 9 through the manager: purge beside traffic, and calls that are cut short."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from datetime import timedelta
from functools import partial
from typing import Any, Final

from vtoken.errors import BackendClosed, InvalidToken, TooManyAttempts
from vtoken.policy import TokenPolicy
from vtoken.subject import Subject
from vtoken.testing.cases.limits import exhaust
from vtoken.testing.cases.once import active_ids, stored_as
from vtoken.testing.harness import (
    CAP,
    CODE,
    SLUG,
    USER,
    Bench,
    Suite,
    at_once,
    cancel_everywhere,
    case,
    refused,
)
from vtoken.token import IssuedToken

MILLISECOND: Final = timedelta(milliseconds=1)


class PurgeCases(Suite):
    """Cases of the manager's purge."""

    @case(9)
    async def test_purge_removes_no_valid_token(self, bench: Bench) -> None:
        """Purge deletes what was inactive or expired, nothing valid, and a second one finds nothing."""
        manager = await bench.manager()
        last = await manager.issue(USER, "last", expires_in="5m")
        forever = await manager.issue(USER, "forever", expires_in=None)
        used = await manager.issue(USER, "used")
        await manager.consume(USER, "used", used.key)
        await manager.issue(USER, "replaced")
        new = await manager.issue(USER, "replaced")
        bench.clock.advance(timedelta(minutes=5))
        assert await manager.purge() == 2
        assert await manager.purge() == 0
        for token in (last, forever, new):
            assert await manager.verify(USER, token.slug, token.key) == token
        assert await manager.get(used.id) is None
        bench.clock.advance(MILLISECOND)
        assert await manager.purge() == 1
        assert await manager.get(last.id) is None

    @case(9)
    async def test_purge_works_in_batches(self, bench: Bench) -> None:
        """Purge deletes everything due whatever the batch size, and says how many."""
        manager = await bench.manager()
        for batch_size in (1, 2, 7, 8, 1000):
            await at_once(manager.issue(Subject("auth.user", n), "reset", expires_in="1m") for n in range(7))
            bench.clock.advance(timedelta(minutes=1, milliseconds=1))
            told: list[int] = []
            assert await manager.purge(batch_size, progress=told.append) == 7
            assert told[-1] == 7
            assert await bench.stored() == []

    @case(9)
    async def test_purge_keeps_what_ended_lately(self, bench: Bench) -> None:
        """``keep`` leaves what ended no longer ago than that: tombstones of used tokens, say."""
        manager = await bench.manager()
        used = await manager.issue(USER, "reset")
        await manager.consume(USER, "reset", used.key)
        await manager.issue(USER, "expired", expires_in="1m")
        keep = timedelta(hours=1)
        bench.clock.advance(keep - MILLISECOND)
        assert await manager.purge(keep=keep) == 0
        assert (await refused(InvalidToken, manager.consume(USER, "reset", used.key))).reason == "used"
        bench.clock.advance(2 * MILLISECOND)
        assert await manager.purge(keep=keep) == 1
        assert (await refused(InvalidToken, manager.consume(USER, "reset", used.key))).reason == "unknown"
        bench.clock.advance(timedelta(minutes=1))
        assert await manager.purge(keep="1h") == 1

    @case(9)
    async def test_purge_ends_under_live_traffic(self, bench: Bench) -> None:
        """Purge deletes what was due when it began, so that it ends however much becomes due beside it."""
        manager, busy = await bench.two_managers()
        await at_once(manager.issue(Subject("auth.user", n), "reset", expires_in="1m") for n in range(10))
        bench.clock.advance(timedelta(minutes=2))
        purge = asyncio.create_task(manager.purge(batch_size=1))
        made: list[IssuedToken] = []
        while not purge.done() and len(made) < 5000:
            bench.clock.advance(MILLISECOND)
            made.append(await busy.issue(USER, "busy"))
            await asyncio.sleep(0)
        assert purge.done()
        assert purge.result() == 10
        if made:
            assert await manager.verify(USER, "busy", made[-1].key) == made[-1]

    @case(9)
    async def test_concurrent_purges_count_each_token_once(self, bench: Bench) -> None:
        """Purges beside each other delete each token once and leave none."""
        managers = await bench.two_managers()
        await at_once(managers[0].issue(Subject("auth.user", n), "reset", expires_in="1m") for n in range(15))
        bench.clock.advance(timedelta(minutes=2))
        assert sum(await at_once(manager.purge(batch_size=4) for manager in managers * 2)) == 15
        assert await bench.stored() == []


class CancelledCases(Suite):
    """Cases of calls of the manager that are cut short."""

    @case(5)
    async def test_a_manager_opens_and_closes(self, bench: Bench) -> None:
        """A call before opening or after closing raises ``BackendClosed``; opens are counted, and closing
        twice does nothing."""
        manager = bench.new_manager()
        await refused(BackendClosed, manager.issue(USER, "reset"))
        for _ in range(2):
            async with manager:
                async with manager:
                    issued = await manager.issue(USER, "reset")
                assert await manager.verify(USER, "reset", issued.key) == issued
            await manager.aclose()
            calls: list[Callable[[], Awaitable[object]]] = [
                partial(manager.verify, USER, "reset", issued.key),
                partial(manager.get, issued.id),
                lambda: manager.deactivate(USER),
                lambda: manager.status(USER, "reset"),
                lambda: manager.erase(USER),
                manager.purge,
                manager.stats,
                manager.ping,
            ]
            for call in calls:
                await refused(BackendClosed, call())

    @case(5)
    async def test_a_cancelled_issue_leaves_no_token_without_an_owner(self, bench: Bench) -> None:
        """A cancelled ``issue`` leaves the old token valid, or has replaced it and ended the new one, whose
        key nobody has: wherever it was cut."""
        manager, other = await bench.two_managers()
        old = await manager.issue(USER, "reset")
        new: list[IssuedToken] = []

        async def issue() -> None:
            new.append(await manager.issue(USER, "reset"))

        async def check(cancelled: bool) -> None:
            nonlocal old
            active = await active_ids(other)
            if not cancelled:
                assert active == [new[-1].id]
            elif active != [old.id]:
                assert active == []
                latest = [token async for token in other.history(USER)][:2]
                assert latest[1:] == [old]
                assert latest[0].id > old.id
            old = await manager.issue(USER, "reset")

        await cancel_everywhere(issue, check)

    @case(5)
    async def test_a_cancelled_get_active_or_create_makes_at_most_one(self, bench: Bench) -> None:
        """A cancelled ``get_active_or_create`` leaves no token or one, which the next caller gets."""
        manager, other = await bench.two_managers()
        number = 0

        def create() -> Coroutine[Any, Any, object]:
            nonlocal number
            number += 1
            return manager.get_active_or_create(Subject("auth.user", number), "reset")

        async def check(cancelled: bool) -> None:
            subject = Subject("auth.user", number)
            await manager.issue(USER, "after")
            made = await active_ids(manager, subject)
            assert len(made) <= 1 if cancelled else len(made) == 1
            token = await other.get_active_or_create(subject, "reset")
            assert made in ([], [token.id])

        await cancel_everywhere(create, check)

    @case(5)
    async def test_a_cancelled_consume_is_resolved_by_its_id(self, bench: Bench) -> None:
        """A cancelled ``consume`` has used the token or not; the same ``consume_id`` then says yes, once
        in all."""
        manager, other = await bench.two_managers()
        issued = await manager.issue(USER, "reset")

        def consume() -> Coroutine[Any, Any, object]:
            return manager.consume(USER, "reset", issued.key, consume_id="mine")

        async def check(cancelled: bool) -> None:
            nonlocal issued
            again = await manager.consume(USER, "reset", issued.key, consume_id="mine")
            assert (again, again.uses, again.is_active) == (issued, 1, False)
            assert cancelled or again.is_replay
            await refused(InvalidToken, other.consume(USER, "reset", issued.key, consume_id="yours"))
            issued = await other.issue(USER, "reset")

        await cancel_everywhere(consume, check)

    @case(5)
    async def test_a_cancelled_redeem_leaves_the_token_free_or_used(self, bench: Bench) -> None:
        """A ``redeem`` that is cancelled anywhere leaves the token used, or free, at once or once its lease
        has ended."""
        manager, other = await bench.two_managers(TokenPolicy("reset", max_uses=2))
        issued = await manager.issue(USER, "reset")

        async def redeem() -> None:
            async with manager.redeem(USER, "reset", issued.key):
                await asyncio.sleep(0)

        async def check(cancelled: bool) -> None:
            nonlocal issued
            bench.clock.advance(timedelta(seconds=60))
            await manager.issue(USER, "after")
            uses = (await stored_as(other, issued)).uses
            assert uses == 1 or (cancelled and not uses)
            for _ in range(2 - uses):
                assert await other.consume(USER, "reset", issued.key) == issued
            await refused(InvalidToken, manager.consume(USER, "reset", issued.key))
            issued = await other.issue(USER, "reset")

        await cancel_everywhere(redeem, check)

    @case(8)
    async def test_a_cancelled_attempt_is_no_free_attempt(self, bench: Bench) -> None:
        """A wrong code whose caller is cancelled once it was compared is counted: cancelling gains none."""
        manager = await bench.manager(CODE)
        answers = 0

        async def attempt() -> None:
            nonlocal answers
            try:
                await manager.verify(USER, SLUG, "000000")
            except TooManyAttempts:
                pass
            except InvalidToken:
                answers += 1

        async def check(cancelled: bool) -> None:
            assert answers <= CAP

        await cancel_everywhere(attempt, check)
        for _ in range(CAP):
            await attempt()
        await check(False)
        await refused(TooManyAttempts, manager.verify(USER, SLUG, "000000"))
        bench.clock.advance(timedelta(days=3))
        await exhaust(manager)
