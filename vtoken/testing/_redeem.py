"""Two-phase use through the manager: leased, then used, given back, or lost."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from vtoken.errors import InvalidToken, LeaseLost
from vtoken.manager import TokenManager
from vtoken.policy import TokenPolicy
from vtoken.testing._bench import USER, Bench, Suite, case, race, refused

LEASE = timedelta(seconds=60)


async def redeem(manager: TokenManager, key: str, slug: str = "reset") -> str:
    """Redeem with a block that does nothing; the token's id."""
    async with manager.redeem(USER, slug, key, lease=LEASE) as token:
        await asyncio.sleep(0)
        return token.id


class RedeemCases(Suite):
    """Cases of ``redeem``."""

    @case(1)
    async def test_a_redeemed_token_is_used(self, bench: Bench) -> None:
        """A block that ends normally leaves the token used; while it runs, nobody else gets the token."""
        manager, other = await bench.manager(), await bench.manager()
        issued = await manager.deactivate_and_create(USER, "reset")
        async with manager.redeem(USER, "reset", issued.key) as token:
            assert (token, token.is_active) == (issued, True)
            assert token.is_valid(bench.clock())
            for call in (other.consume, other.verify):
                assert (await refused(InvalidToken, call(USER, "reset", issued.key))).reason == "leased"
            assert (await refused(InvalidToken, redeem(other, issued.key))).reason == "leased"
            assert not await other.exists_valid(USER)
            loaded = await other.get(issued.id)
            assert loaded is not None
            assert not loaded.is_valid(bench.clock())
        assert (await refused(InvalidToken, manager.consume(USER, "reset", issued.key))).reason == "used"

    @case(1)
    async def test_of_concurrent_redeemers_one_wins(self, bench: Bench) -> None:
        """Of N concurrent redeemers and consumers exactly one gets the token."""
        managers = [await bench.manager(), await bench.manager()]
        for _ in range(self.rounds):
            key = (await managers[0].deactivate_and_create(USER, "reset")).key

            async def consume(n: int, key: str = key) -> str:
                return (await managers[n % 2].consume(USER, "reset", key)).id

            calls = [redeem(managers[n % 2], key) for n in range(self.tasks)] + [consume(n) for n in range(2)]
            won, lost = await race(calls, InvalidToken)
            assert len(won) == 1
            assert {error.reason for error in lost} <= {"leased", "used"}

    @case(1)
    async def test_a_failed_block_gives_the_token_back(self, bench: Bench) -> None:
        """A block that raises gives the token back, unused, and passes its error on."""
        manager = await bench.manager()
        issued = await manager.deactivate_and_create(USER, "reset")

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
        manager, other = await bench.manager(), await bench.manager()
        issued = await manager.deactivate_and_create(USER, "reset")
        entered = asyncio.Event()

        async def hang() -> None:
            async with manager.redeem(USER, "reset", issued.key):
                entered.set()
                await asyncio.Event().wait()

        for _ in range(2):
            entered.clear()
            task = asyncio.create_task(hang())
            await entered.wait()
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            assert await other.verify(USER, "reset", issued.key) == issued

    @case(1)
    async def test_an_expired_lease_frees_the_token(self, bench: Bench) -> None:
        """A lease ends by itself, at its last millisecond and not before: a crashed redeemer frees the
        token."""
        manager, other = await bench.manager(), await bench.manager()
        issued = await manager.deactivate_and_create(USER, "reset")
        crashed = manager.redeem(USER, "reset", issued.key, lease=LEASE)
        await crashed.__aenter__()
        bench.clock.advance(LEASE - timedelta(milliseconds=1))
        await refused(InvalidToken, redeem(other, issued.key))
        bench.clock.advance(timedelta(milliseconds=1))
        assert await redeem(other, issued.key) == issued.id
        await refused(LeaseLost, crashed.__aexit__(None, None, None))

    @case(1)
    async def test_a_late_committer_loses_its_lease(self, bench: Bench) -> None:
        """A block that ends after its lease gets ``LeaseLost``, taken by another meanwhile or not, and
        marks nothing."""
        manager, other = await bench.manager(), await bench.manager()
        issued = await manager.deactivate_and_create(USER, "reset")

        async def late() -> None:
            async with manager.redeem(USER, "reset", issued.key, lease=LEASE):
                bench.clock.advance(LEASE)

        await refused(LeaseLost, late())
        assert await manager.verify(USER, "reset", issued.key) == issued

        async def overtaken() -> None:
            async with manager.redeem(USER, "reset", issued.key, lease=LEASE):
                bench.clock.advance(LEASE)
                async with other.redeem(USER, "reset", issued.key, lease=LEASE):
                    raise ZeroDivisionError

        await refused(ZeroDivisionError, overtaken())
        assert await other.verify(USER, "reset", issued.key) == issued

        first = manager.redeem(USER, "reset", issued.key, lease=LEASE)
        await first.__aenter__()
        bench.clock.advance(LEASE)
        second = other.redeem(USER, "reset", issued.key, lease=LEASE)
        await second.__aenter__()
        # By this clock the first lease would be running still; its id is not the token's any more.
        bench.clock.advance(-LEASE / 2)
        await refused(LeaseLost, first.__aexit__(None, None, None))
        await second.__aexit__(None, None, None)
        await refused(InvalidToken, manager.consume(USER, "reset", issued.key))

    @case(2)
    async def test_a_deactivated_token_is_not_redeemed(self, bench: Bench) -> None:
        """Where the token was deactivated or replaced meanwhile, leaving normally is ``LeaseLost``, and
        nothing revives."""
        manager, other = await bench.manager(), await bench.manager()

        async def redeem_while(replace: bool, fail: bool) -> None:
            issued = await manager.deactivate_and_create(USER, "reset")
            try:
                async with manager.redeem(USER, "reset", issued.key):
                    if replace:
                        await other.deactivate_and_create(USER, "reset")
                    else:
                        assert await other.deactivate(USER, "reset") == 1
                    if fail:
                        raise ZeroDivisionError
            finally:
                error = await refused(InvalidToken, other.consume(USER, "reset", issued.key))
                assert error.reason == "inactive"
                stored = await other.get(issued.id)
                assert stored is not None
                assert (stored.is_active, stored.uses) == (False, 0)

        for replace in (False, True):
            await refused(LeaseLost, redeem_while(replace, fail=False))
            await refused(ZeroDivisionError, redeem_while(replace, fail=True))

    @case(9)
    async def test_purge_leaves_a_leased_token(self, bench: Bench) -> None:
        """A token that expires while it is leased is not purged, and can still be marked used."""
        manager, other = await bench.manager(), await bench.manager()
        issued = await manager.deactivate_and_create(USER, "reset", expiration_in_minutes=0.25)
        async with manager.redeem(USER, "reset", issued.key, lease=LEASE):
            bench.clock.advance(LEASE / 2)
            assert await other.purge() == 0
            assert await other.get(issued.id) == issued
        assert await other.purge() == 1
        assert await other.get(issued.id) is None

    @case(1)
    async def test_redeem_counts_one_use(self, bench: Bench) -> None:
        """With ``max_uses`` one block counts one use, and the token is free again after it."""
        manager = await bench.manager(TokenPolicy("invite", max_uses=2))
        issued = await manager.deactivate_and_create(USER, "invite")
        for uses in (1, 2):
            assert await redeem(manager, issued.key, "invite") == issued.id
            stored = await manager.get(issued.id)
            assert stored is not None
            assert (stored.uses, stored.is_active) == (uses, uses < 2)
        await refused(InvalidToken, redeem(manager, issued.key, "invite"))
