"""Two-phase use through the manager: held, then used, given back, or lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, Final

from vtoken.errors import (
    AlreadyUsed,
    BackendClosed,
    InvalidInput,
    InvalidToken,
    LeaseLost,
    TokenBusy,
)
from vtoken.manager import TokenManager
from vtoken.policy import TokenPolicy
from vtoken.testing.cases.once import active_ids, stored_as
from vtoken.testing.harness import USER, Bench, Suite, at_once, case, refused
from vtoken.token import IssuedToken, VerificationToken

LEASE: Final = timedelta(seconds=60)
MILLISECOND: Final = timedelta(milliseconds=1)


async def redeem(manager: TokenManager, key: str, slug: str = "reset", **named: Any) -> str:
    """Redeem with a block that does nothing; the token's id."""
    async with manager.redeem(USER, slug, key, lease=LEASE, **named) as token:
        await asyncio.sleep(0)
        return token.id


class Hanging:
    """A task in a ``redeem`` block, until it is told to go on."""

    def __init__(self, manager: TokenManager, key: str, slug: str = "reset", **named: Any) -> None:
        self.entered = asyncio.Event()
        self.go_on = asyncio.Event()
        self.task = asyncio.ensure_future(self._run(manager, key, slug, named))

    async def _run(self, manager: TokenManager, key: str, slug: str, named: dict[str, Any]) -> None:
        async with manager.redeem(USER, slug, key, lease=LEASE, **named):
            self.entered.set()
            await self.go_on.wait()

    async def inside(self) -> None:
        """Wait until the block is entered, and raise what kept it from being."""
        entering = asyncio.ensure_future(self.entered.wait())
        await asyncio.wait([entering, self.task], return_when=asyncio.FIRST_COMPLETED)
        if not entering.done():
            entering.cancel()
            self.task.result()

    async def end(self) -> None:
        """Let the block end normally, and raise what it raised."""
        self.go_on.set()
        await self.task


async def hanging(*arguments: Any, **named: Any) -> Hanging:
    """A block that was entered."""
    block = Hanging(*arguments, **named)
    await block.inside()
    return block


class RedeemCases(Suite):
    """Cases of ``redeem``."""

    @case(1)
    async def test_a_redeemed_token_is_used(self, bench: Bench) -> None:
        """A block that ends normally leaves the token used; while it runs, whoever needs its use is told how
        long."""
        manager, other = await bench.two_managers()
        issued = await manager.issue(USER, "reset")
        async with manager.redeem(USER, "reset", issued.key, lease=LEASE) as token:
            assert (token, token.is_active) == (issued, True)
            assert token.is_valid(bench.clock())
            bench.clock.advance(LEASE / 4)
            for call in (other.consume, other.verify):
                error = await refused(TokenBusy, call(USER, "reset", issued.key))
                assert (error.reason, error.retry_after) == ("leased", 45)
            await refused(TokenBusy, redeem(other, issued.key))
            assert not await other.exists_valid(USER)
            assert not await other.exists_valid(USER, "reset", issued.key)
            assert not (await stored_as(other, issued)).is_valid(bench.clock())
            assert await other.get_active_or_create(USER, "reset") == issued
        assert (await refused(InvalidToken, manager.consume(USER, "reset", issued.key))).reason == "used"

    @case(1)
    async def test_of_concurrent_redeemers_one_wins(self, bench: Bench) -> None:
        """Of N concurrent redeemers and consumers exactly one gets the token."""
        managers = await bench.two_managers()
        for _ in range(self.rounds):
            key = (await managers[0].issue(USER, "reset")).key

            async def attempt(n: int, key: str = key) -> bool:
                try:
                    if n % 3:
                        await redeem(managers[n % 2], key)
                    else:
                        await managers[n % 2].consume(USER, "reset", key)
                except InvalidToken as error:
                    return error.reason not in ("leased", "used")
                return True

            assert sum(await at_once(attempt(n) for n in range(self.tasks))) == 1

    @case(1)
    async def test_thirty_people_join_with_one_invitation(self, bench: Bench) -> None:
        """Thirty people are inside with one invitation at once, and each is counted; the thirty-first has to
        wait, and the page that shows the link goes on to show the same one."""
        managers = await bench.two_managers(TokenPolicy.link("invite", max_uses=30, key_storage="derived"))
        issued = await managers[0].issue(USER, "invite")
        blocks = [Hanging(managers[n % 2], issued.key, "invite") for n in range(30)]
        await at_once(block.inside() for block in blocks)
        await refused(TokenBusy, redeem(managers[1], issued.key, "invite"))
        shown = await managers[1].get_active_or_create(USER, "invite")
        assert (shown, shown.key) == (issued, issued.key)
        await at_once(block.end() for block in blocks[:20])
        stored = await stored_as(managers[0], issued)
        assert (stored.uses, stored.is_active) == (20, True)
        await at_once(block.end() for block in blocks[20:])
        stored = await stored_as(managers[0], issued)
        assert (stored.uses, stored.is_active) == (30, False)

    @case(1)
    async def test_a_failed_block_gives_the_token_back(self, bench: Bench) -> None:
        """A block that raises gives the token back, unused, and passes its error on."""
        manager = await bench.manager()
        issued = await manager.issue(USER, "reset")

        async def fail() -> None:
            async with manager.redeem(USER, "reset", issued.key):
                raise ZeroDivisionError

        for _ in range(2):
            await refused(ZeroDivisionError, fail())
            assert await manager.verify(USER, "reset", issued.key) == issued
        assert await redeem(manager, issued.key) == issued.id

    @case(5)
    async def test_a_cancelled_block_gives_the_token_back(self, bench: Bench) -> None:
        """A block that is cancelled gives the token back, unused, and the cancellation is raised."""
        manager, other = await bench.two_managers()
        issued = await manager.issue(USER, "reset")
        for _ in range(2):
            block = await hanging(manager, issued.key)
            block.task.cancel()
            await asyncio.wait([block.task])
            assert block.task.cancelled()
            assert await other.verify(USER, "reset", issued.key) == issued

    @case(5)
    async def test_closing_waits_for_cancelled_blocks(self, bench: Bench) -> None:
        """Of blocks that are cancelled while the manager closes, as in a deploy, no hold outlives
        ``aclose``; one that still runs normally ends with ``BackendClosed``, never silently."""
        other = await bench.manager()
        issued = await other.issue(USER, "reset")
        for _ in range(3):
            manager = bench.new_manager()
            await manager.open()
            block = await hanging(manager, issued.key)
            block.task.cancel()
            await manager.aclose()
            assert (await other.verify(USER, "reset", issued.key)) == issued
            await asyncio.wait([block.task])
            assert block.task.cancelled()
        manager = bench.new_manager()
        await manager.open()
        block = await hanging(manager, issued.key)
        await manager.aclose()
        await refused(BackendClosed, block.end())
        assert (await stored_as(other, issued)).uses == 0

    @case(1)
    async def test_a_hold_ends_by_itself(self, bench: Bench) -> None:
        """A hold ends by itself, at its last millisecond and not before: a crashed redeemer frees the
        token."""
        manager, other = await bench.two_managers()
        issued = await manager.issue(USER, "reset")
        crashed = manager.redeem(USER, "reset", issued.key, lease=LEASE)
        await crashed.__aenter__()
        bench.clock.advance(LEASE - MILLISECOND)
        await refused(TokenBusy, redeem(other, issued.key))
        bench.clock.advance(MILLISECOND)
        assert await redeem(other, issued.key) == issued.id
        await refused(LeaseLost, crashed.__aexit__(None, None, None))

    @case(1)
    async def test_a_late_block_loses_its_hold(self, bench: Bench) -> None:
        """A block that ends after its lease gets ``LeaseLost``, though nobody else came, and marks
        nothing."""
        manager, other = await bench.two_managers()
        issued = await manager.issue(USER, "reset")

        async def late() -> None:
            async with manager.redeem(USER, "reset", issued.key, lease=LEASE):
                bench.clock.advance(LEASE)

        await refused(LeaseLost, late())
        assert await manager.verify(USER, "reset", issued.key) == issued
        first = manager.redeem(USER, "reset", issued.key, lease=LEASE)
        await first.__aenter__()
        bench.clock.advance(LEASE)
        second = other.redeem(USER, "reset", issued.key, lease=LEASE)
        await second.__aenter__()
        # By this clock the first hold would run still; but the second has dropped it.
        bench.clock.advance(-LEASE / 2)
        await refused(LeaseLost, first.__aexit__(None, None, None))
        await second.__aexit__(None, None, None)
        assert (await stored_as(manager, issued)).uses == 1

    @case(1)
    async def test_who_waits_for_a_hold_gets_its_turn(self, bench: Bench) -> None:
        """``redeem(wait=...)`` waits for a held use: after a failed block it is its turn, and after the same
        ``consume_id`` it is told that the use was made."""
        managers = await bench.two_managers()
        for same in (False, True):
            issued = await managers[0].issue(USER, "reset")
            block = await hanging(managers[0], issued.key, consume_id="mine")
            name = "mine" if same else "yours"
            waiting = asyncio.ensure_future(
                redeem(managers[1], issued.key, consume_id=name, wait=timedelta(seconds=60))
            )
            await refused(TokenBusy, redeem(managers[1], issued.key, consume_id=name))
            if same:
                await block.end()
                error = await refused(AlreadyUsed, waiting)
                assert (error.reason, error.token) == ("used", issued)
            else:
                block.task.cancel()
                assert await waiting == issued.id

    @case(2)
    async def test_a_replaced_token_is_still_used_once(self, bench: Bench) -> None:
        """A token that is replaced while it is held ends for everybody else at once; the block still ends as
        used, and the new token is on its own, under an overlap, too."""
        managers = await bench.two_managers(TokenPolicy("lap", overlap="5m"))
        for slug in ("reset", "lap"):
            for inside in (True, False):
                issued = await managers[0].issue(USER, slug)
                async with managers[0].redeem(USER, slug, issued.key, lease=LEASE):
                    # A block may issue the next token of its own purpose.
                    new = await managers[not inside].issue(USER, slug)
                    error = await refused(InvalidToken, managers[1].consume(USER, slug, issued.key))
                    assert error.reason == "inactive"
                assert (await stored_as(managers[1], issued)).uses == 1
                assert await managers[1].consume(USER, slug, new.key) == new

    @case(2)
    async def test_giving_back_revives_nothing(self, bench: Bench) -> None:
        """A block that fails after its token was replaced or deactivated, inside or outside, or expired,
        gives back a hold and no token."""
        manager, other = await bench.two_managers()
        ways: list[Any] = [
            lambda: manager.issue(USER, "reset"),
            lambda: other.issue(USER, "reset"),
            lambda: manager.deactivate(USER),
            lambda: other.deactivate(USER),
        ]
        for way in ways:
            issued = await manager.issue(USER, "reset")

            async def fail(way: Any = way, key: str = issued.key) -> None:
                async with manager.redeem(USER, "reset", key):
                    await way()
                    raise _Failed

            await refused(_Failed, fail())
            error = await refused(InvalidToken, other.consume(USER, "reset", issued.key))
            assert error.reason == "inactive"
            stored = await stored_as(other, issued)
            assert (stored.is_active, stored.uses) == (False, 0)

    @case(2)
    async def test_deactivating_inside_spares_the_block(self, bench: Bench) -> None:
        """``deactivate`` inside the block, by the object, the token or in a task that the block started, ends
        the token and lets the block end as used; so does a nested block's own."""
        manager = await bench.manager(TokenPolicy("invite", max_uses=3))
        ways: list[Callable[[VerificationToken], Awaitable[object]]] = [
            lambda token: manager.deactivate(USER),
            lambda token: manager.deactivate(token),
            lambda token: asyncio.create_task(manager.deactivate(USER)),
            lambda token: asyncio.gather(manager.deactivate(USER)),
        ]
        for way in ways:
            issued = await manager.issue(USER, "reset")
            async with manager.redeem(USER, "reset", issued.key) as token:
                await way(token)
                error = await refused(InvalidToken, manager.consume(USER, "reset", issued.key))
                assert error.reason == "inactive"
            stored = await stored_as(manager, issued)
            assert (stored.uses, stored.is_active) == (1, False)
        issued = await manager.issue(USER, "invite")
        async with manager.redeem(USER, "invite", issued.key), manager.redeem(USER, "invite", issued.key):
            await manager.deactivate(USER)
        assert (await stored_as(manager, issued)).uses == 2

    @case(2)
    async def test_deactivating_outside_revokes_the_hold(self, bench: Bench) -> None:
        """``deactivate`` from outside, in another manager or task, and ``erase``, revoke the hold:
        ``LeaseLost``; and giving back revives nothing."""
        manager, other = await bench.two_managers()
        ways: list[Callable[[IssuedToken], Awaitable[object]]] = [
            lambda issued: other.deactivate(USER),
            lambda issued: manager.deactivate(USER, "reset", issued.key),
            lambda issued: manager.deactivate(issued),
            lambda issued: other.erase(USER),
        ]
        for way in ways:
            for fails in (False, True):
                issued = await manager.issue(USER, "reset")
                block = await hanging(manager, issued.key)
                await way(issued)
                if fails:
                    block.task.cancel()
                    await asyncio.wait([block.task])
                else:
                    await refused(LeaseLost, block.end())
                await refused(InvalidToken, other.consume(USER, "reset", issued.key))
                stored = await other.get(issued.id)
                assert stored is None or (stored.is_active, stored.uses) == (False, 0)

    @case(9)
    async def test_purge_leaves_a_held_token(self, bench: Bench) -> None:
        """A token that expires or is replaced while it is held is not purged, and can still be marked
        used."""
        manager, other = await bench.two_managers()
        issued = await manager.issue(USER, "reset", expires_in=0.25)
        async with manager.redeem(USER, "reset", issued.key, lease=LEASE):
            await manager.deactivate(USER)
            bench.clock.advance(LEASE / 2)
            assert await other.purge() == 0
            assert await other.get(issued.id) == issued
        assert (await stored_as(other, issued)).uses == 1
        assert await other.purge() == 1
        assert await other.get(issued.id) is None

    @case(7)
    async def test_no_hold_is_for_ever(self, bench: Bench) -> None:
        """A lease is at most a day; a stored hold that ends later than two days from now was made by a clock
        that was wrong, and keeps nobody out."""
        manager, other = await bench.two_managers()
        issued = await manager.issue(USER, "reset", expires_in=None)
        for lease in ("25h", timedelta(days=1, milliseconds=1), timedelta(0)):
            await refused(InvalidInput, redeem_with(manager, issued.key, lease))
        start = bench.clock()
        bench.clock.set(start + timedelta(days=3650))
        crashed = manager.redeem(USER, "reset", issued.key, lease="24h")
        await crashed.__aenter__()
        bench.clock.set(start)
        assert await other.exists_valid(USER)
        assert await redeem(other, issued.key) == issued.id

    @case(1)
    async def test_what_is_used_up_by_holds_and_uses(self, bench: Bench) -> None:
        """Holds and uses of concurrent people never exceed ``max_uses``, whatever ends how."""
        managers = await bench.two_managers(TokenPolicy("invite", max_uses=4))
        for _ in range(self.rounds):
            issued = await managers[0].issue(USER, "invite")

            async def join(n: int, key: str = issued.key) -> int:
                with suppress(InvalidToken, _Failed):
                    if n % 3:
                        await _block(managers[n % 2], key, fails=n % 3 == 1)
                    else:
                        await managers[n % 2].consume(USER, "invite", key)
                    return 1
                return 0

            joined = sum(await at_once(join(n) for n in range(self.tasks)))
            stored = await stored_as(managers[0], issued)
            assert stored.uses == joined <= 4
            for _ in range(4 - joined):
                await managers[0].consume(USER, "invite", issued.key)
            await refused(InvalidToken, managers[0].consume(USER, "invite", issued.key))


class _Failed(Exception):
    pass


async def _block(manager: TokenManager, key: str, *, fails: bool) -> None:
    async with manager.redeem(USER, "invite", key):
        await asyncio.sleep(0)
        if fails:
            raise _Failed


async def redeem_with(manager: TokenManager, key: str, lease: Any) -> None:
    async with manager.redeem(USER, "reset", key, lease=lease):
        pass


class OverlapUseCases(Suite):
    """Cases of two keys that overlap, through the manager."""

    @case(2)
    async def test_an_overlap_lasts_until_the_first_success(self, bench: Bench) -> None:
        """With ``overlap`` the previous key stays good so long, as the new token's, or until one of the two
        is used; of any number of issues two keys are good."""
        manager = await bench.manager(TokenPolicy("reset", overlap="5m"))
        for winner in range(2):
            tokens = [await manager.issue(USER, "reset") for _ in range(2)]
            for token in tokens:
                assert await manager.verify(USER, "reset", token.key) == tokens[1]
            assert await manager.consume(USER, "reset", tokens[winner].key) == tokens[1]
            for token in tokens:
                await refused(InvalidToken, manager.verify(USER, "reset", token.key))
        many = [await manager.issue(USER, "reset") for _ in range(6)]
        good = [await manager.exists_valid(USER, "reset", token.key) for token in many]
        assert good == [False] * 4 + [True] * 2
        bench.clock.advance(timedelta(minutes=5))
        assert await manager.verify(USER, "reset", many[4].key) == many[5]
        bench.clock.advance(MILLISECOND)
        assert (await refused(InvalidToken, manager.consume(USER, "reset", many[4].key))).reason == "expired"
        assert await manager.consume(USER, "reset", many[5].key) == many[5]

    @case(2)
    async def test_an_overlap_is_redeemed_one_at_a_time(self, bench: Bench) -> None:
        """Redeemed by either key, an overlap is held once, and a use by either counts as the newest
        token's."""
        managers = await bench.two_managers(TokenPolicy("reset", overlap="5m"))
        for first in range(2):
            tokens = [await managers[0].issue(USER, "reset") for _ in range(2)]
            block = await hanging(managers[0], tokens[first].key)
            await refused(TokenBusy, redeem(managers[1], tokens[1 - first].key))
            await block.end()
            await refused(InvalidToken, redeem(managers[1], tokens[1 - first].key))
            uses = [(await stored_as(managers[1], token)).uses for token in tokens]
            assert uses == [0, 1]

    @case(2)
    async def test_an_old_link_does_not_confirm_a_new_address(self, bench: Bench) -> None:
        """A key stays good beside one of the same ``extra_data`` only: an old link must not confirm a new
        address."""
        manager = await bench.manager(TokenPolicy("confirm", overlap="5m"))
        data = [{"a": 1, "b": "x"}, {"a": 1, "b": "x"}, {"a": 1, "b": "y"}, None]
        tokens = [await manager.issue(USER, "confirm", extra_data=value) for value in data[:2]]
        assert (await manager.verify(USER, "confirm", tokens[0].key)) == tokens[1]
        for value in data[2:]:
            tokens.append(await manager.issue(USER, "confirm", extra_data=value))
            good = [await manager.exists_valid(USER, "confirm", token.key) for token in tokens]
            assert good == [False] * (len(tokens) - 1) + [True]

    @case(2)
    async def test_deactivating_by_the_older_key_ends_that_key(self, bench: Bench) -> None:
        """Deactivating by a predecessor's key ends that key alone; by the new one both."""
        manager = await bench.manager(TokenPolicy("reset", overlap="5m"))
        old, new = [await manager.issue(USER, "reset") for _ in range(2)]
        assert await manager.deactivate(USER, "reset", old.key) == 1
        assert await manager.deactivate(USER, "reset", old.key) == 0
        assert not await manager.exists_valid(USER, "reset", old.key)
        assert await manager.verify(USER, "reset", new.key) == new
        old, new = new, await manager.issue(USER, "reset")
        assert await manager.deactivate(USER, "reset", new.key) == 1
        for token in (old, new):
            assert not await manager.exists_valid(USER, "reset", token.key)

    @case(2)
    async def test_an_added_token_overlaps_nothing(self, bench: Bench) -> None:
        """Of tokens beside each other, the use of one ends no other, and the next issue takes over the
        exclusive one's key."""
        manager = await bench.manager(TokenPolicy("reset", overlap="5m"))
        exclusive = await manager.issue(USER, "reset")
        beside = [await manager.issue(USER, "reset", replace=False) for _ in range(2)]
        await manager.consume(USER, "reset", beside[0].key)
        assert sorted(await active_ids(manager)) == sorted([exclusive.id, beside[1].id])
        new = await manager.issue(USER, "reset")
        assert await manager.verify(USER, "reset", exclusive.key) == new
        await refused(InvalidToken, manager.verify(USER, "reset", beside[1].key))

    @case(1)
    async def test_a_use_in_an_overlap_is_answered_again(self, bench: Bench) -> None:
        """A ``consume_id`` is answered again by the same key, before and after a re-issue took it over."""
        manager = await bench.manager(TokenPolicy("reset", overlap="5m", max_uses=3))
        old = await manager.issue(USER, "reset")
        first = await manager.consume(USER, "reset", old.key, consume_id="mine")
        new = await manager.issue(USER, "reset")
        again = await manager.consume(USER, "reset", old.key, consume_id="mine")
        assert (again, again.is_replay, again.used_at) == (first, True, first.used_at)
        used = await manager.consume(USER, "reset", old.key, consume_id="yours")
        assert (used, used.is_replay, used.uses) == (new, False, 1)
        assert (await manager.consume(USER, "reset", old.key, consume_id="yours")).is_replay
        assert not (await manager.consume(USER, "reset", new.key, consume_id="mine")).is_replay
