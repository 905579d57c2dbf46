"""Guarantees 5 and 9 through the manager: purge, and calls that are cut short."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from datetime import timedelta
from typing import Any

from vtoken.errors import BackendClosed, InvalidToken, TooManyAttempts
from vtoken.subject import Subject
from vtoken.testing._bench import (
    USER,
    Bench,
    Suite,
    at_once,
    cancel_everywhere,
    case,
    refused,
)
from vtoken.testing._limits import CAP, CODE, SLUG, exhaust
from vtoken.token import IssuedToken

MILLISECOND = timedelta(milliseconds=1)


class SweepCases(Suite):
    """Cases of purge and of cancellation."""

    @case(9)
    async def test_purge_removes_no_valid_token(self, bench: Bench) -> None:
        """Purge deletes what was inactive or expired, nothing valid, and a second one finds nothing."""
        manager = await bench.manager()
        last = await manager.deactivate_and_create(USER, "last", expiration_in_minutes=5)
        forever = await manager.deactivate_and_create(USER, "forever", expiration_in_minutes=None)
        used = await manager.deactivate_and_create(USER, "used")
        await manager.consume(USER, "used", used.key)
        await manager.deactivate_and_create(USER, "replaced")
        new = await manager.deactivate_and_create(USER, "replaced")
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
            for n in range(7):
                await manager.deactivate_and_create(Subject("auth.user", n), "reset", expiration_in_minutes=1)
            bench.clock.advance(timedelta(minutes=1, milliseconds=1))
            assert await manager.purge(batch_size) == 7
            assert await bench.stored() == []

    @case(9)
    async def test_purge_keeps_what_ended_lately(self, bench: Bench) -> None:
        """``keep`` leaves what ended no longer ago than that: tombstones of used tokens, say."""
        manager = await bench.manager()
        used = await manager.deactivate_and_create(USER, "reset")
        await manager.consume(USER, "reset", used.key)
        await manager.deactivate_and_create(USER, "expired", expiration_in_minutes=1)
        keep = timedelta(hours=1)
        bench.clock.advance(keep - MILLISECOND)
        assert await manager.purge(keep=keep) == 0
        assert (await refused(InvalidToken, manager.consume(USER, "reset", used.key))).reason == "used"
        bench.clock.advance(2 * MILLISECOND)
        assert await manager.purge(keep=keep) == 1
        assert (await refused(InvalidToken, manager.consume(USER, "reset", used.key))).reason == "unknown"
        bench.clock.advance(timedelta(minutes=1))
        assert await manager.purge(keep=keep) == 1

    @case(9)
    async def test_purge_ends_under_live_traffic(self, bench: Bench) -> None:
        """Purge deletes what was due when it began, so that it ends however much becomes due beside it."""
        manager, busy = await bench.manager(), await bench.manager()
        for n in range(10):
            await manager.deactivate_and_create(Subject("auth.user", n), "reset", expiration_in_minutes=1)
        bench.clock.advance(timedelta(minutes=2))
        purge = asyncio.create_task(manager.purge(batch_size=1))
        made: list[IssuedToken] = []
        while not purge.done() and len(made) < 5000:
            bench.clock.advance(MILLISECOND)
            made.append(await busy.deactivate_and_create(USER, "busy"))
            await asyncio.sleep(0)
        assert purge.done()
        assert purge.result() == 10
        if made:
            assert await manager.verify(USER, "busy", made[-1].key) == made[-1]

    @case(9)
    async def test_concurrent_purges_count_each_token_once(self, bench: Bench) -> None:
        """Purges beside each other delete each token once and leave none."""
        managers = [await bench.manager(), await bench.manager()]
        for n in range(15):
            await managers[0].deactivate_and_create(Subject("auth.user", n), "reset", expiration_in_minutes=1)
        bench.clock.advance(timedelta(minutes=2))
        assert sum(await at_once([manager.purge(batch_size=4) for manager in managers * 2])) == 15
        assert await bench.stored() == []

    @case(5)
    async def test_a_manager_opens_and_closes(self, bench: Bench) -> None:
        """A call before opening or after closing raises ``BackendClosed``; closing twice does nothing."""
        manager = bench.new_manager()
        await refused(BackendClosed, manager.deactivate_and_create(USER, "reset"))
        for _ in range(2):
            async with manager:
                issued = await manager.deactivate_and_create(USER, "reset")
            await manager.aclose()
            await refused(BackendClosed, manager.verify(USER, "reset", issued.key))
            await refused(BackendClosed, manager.get(issued.id))
            await refused(BackendClosed, manager.deactivate(USER))
            await refused(BackendClosed, manager.purge())
            await refused(BackendClosed, manager.stats())

    @case(5)
    async def test_a_cancelled_issue_leaves_one_valid_token(self, bench: Bench) -> None:
        """A cancelled ``deactivate_and_create`` leaves the old token or a new one valid: one, wherever it
        was cut."""
        manager, other = await bench.manager(), await bench.manager()
        await manager.deactivate_and_create(USER, "reset")

        async def check(cancelled: bool) -> None:
            active = [token async for token in manager.filter_active_tokens(USER, "reset")]
            assert len(active) == 1
            assert await other.get_active_or_create(USER, "reset") == active[0]

        await cancel_everywhere(lambda: manager.deactivate_and_create(USER, "reset"), check)

    @case(5)
    async def test_a_cancelled_get_active_or_create_makes_at_most_one(self, bench: Bench) -> None:
        """A cancelled ``get_active_or_create`` leaves no token or one, which the next caller gets."""
        manager, other = await bench.manager(), await bench.manager()
        number = 0

        def create() -> Coroutine[Any, Any, object]:
            nonlocal number
            number += 1
            return manager.get_active_or_create(Subject("auth.user", number), "reset")

        async def check(cancelled: bool) -> None:
            subject = Subject("auth.user", number)
            made = [token async for token in manager.filter_active_tokens(subject)]
            assert len(made) <= 1 if cancelled else len(made) == 1
            token = await other.get_active_or_create(subject, "reset")
            assert made in ([], [token])

        await cancel_everywhere(create, check)

    @case(5)
    async def test_a_cancelled_consume_is_resolved_by_its_id(self, bench: Bench) -> None:
        """A cancelled ``consume`` has used the token or not; the same ``consume_id`` then says yes, once
        in all."""
        manager, other = await bench.manager(), await bench.manager()
        issued = await manager.deactivate_and_create(USER, "reset")

        def consume() -> Coroutine[Any, Any, object]:
            return manager.consume(USER, "reset", issued.key, consume_id="mine")

        async def check(cancelled: bool) -> None:
            nonlocal issued
            again = await manager.consume(USER, "reset", issued.key, consume_id="mine")
            assert (again, again.uses, again.is_active) == (issued, 1, False)
            await refused(InvalidToken, other.consume(USER, "reset", issued.key, consume_id="yours"))
            issued = await other.deactivate_and_create(USER, "reset")

        await cancel_everywhere(consume, check)

    @case(5)
    async def test_a_cancelled_redeem_leaves_the_token_free_or_used(self, bench: Bench) -> None:
        """A ``redeem`` that is cancelled anywhere leaves the token used, or free once its lease has ended."""
        manager, other = await bench.manager(), await bench.manager()
        issued = await manager.deactivate_and_create(USER, "reset")

        async def redeem() -> None:
            async with manager.redeem(USER, "reset", issued.key):
                pass

        async def check(cancelled: bool) -> None:
            nonlocal issued
            bench.clock.advance(timedelta(seconds=60))
            stored = await other.get(issued.id)
            assert stored is not None
            assert stored.is_active == (stored.uses == 0)
            if stored.is_active:
                assert cancelled
                assert await other.consume(USER, "reset", issued.key) == issued
            await refused(InvalidToken, manager.consume(USER, "reset", issued.key))
            issued = await other.deactivate_and_create(USER, "reset")

        await cancel_everywhere(redeem, check)

    @case(8)
    async def test_cancelled_guesses_are_no_free_guesses(self, bench: Bench) -> None:
        """A guess that is cancelled once it was compared is counted: cancelling gains no attempt."""
        manager = await bench.manager(CODE)
        answers = 0

        async def guess() -> None:
            nonlocal answers
            try:
                await manager.verify(USER, SLUG, "not a code")
            except TooManyAttempts:
                pass
            except InvalidToken:
                answers += 1

        async def check(cancelled: bool) -> None:
            assert answers <= CAP

        await cancel_everywhere(guess, check)
        for _ in range(CAP):
            await guess()
        await check(False)
        await refused(TooManyAttempts, manager.verify(USER, SLUG, "not a code"))
        bench.clock.advance(timedelta(days=3))
        await exhaust(manager)
