"""The protocol's sentences about ``update``, ``deactivate`` and ``purge``."""

from __future__ import annotations

import asyncio
from typing import Any

from vtoken.backend import (
    NEVER,
    Budget,
    Change,
    ForgetKey,
    InsertMode,
    InsertResult,
    Lease,
    Match,
    Release,
    SetExtraData,
    StoredToken,
    Use,
)
from vtoken.testing._bench import MINUTE, NOW, Bench, Suite, a_digest, a_token, at_once, case, ended, find_all
from vtoken.testing._insert import UNICODE, one, put


class ChangeCases(Suite):
    """Cases of the writes that follow an insert."""

    @case(1)
    async def test_a_use_counts_and_ends(self, bench: Bench) -> None:
        """A use counts one, sets ``used_at``, clears the lease; the last one makes inactive, and ends the
        token."""
        backend = await bench.backend()
        other = await put(backend)
        token = await put(backend, max_uses=2, lease_id="l", lease_until=NOW + 1, plain_key="k", nonce="n")
        first = await backend.update(Match(id=token.id), Use(NOW + 5))
        expected = token._replace(uses=1, used_at=NOW + 5, lease_id="", lease_until=0)
        assert first == await one(backend, token) == expected
        second = await backend.update(Match(digests=(token.digest,), active=True), Use(NOW + 9))
        expected = expected._replace(uses=2, used_at=NOW + 9, is_active=False, ends_at=NOW + 8)
        assert second == await one(backend, token) == expected
        assert await one(backend, other) == other

    @case(1)
    async def test_a_late_use_keeps_the_earlier_end(self, bench: Bench) -> None:
        """The last use leaves ``ends_at`` where it is the earlier one."""
        backend = await bench.backend()
        token = await put(backend, expires_at=NOW)
        used = await backend.update(Match(id=token.id, active=True), Use(NOW + MINUTE))
        assert used == token._replace(uses=1, used_at=NOW + MINUTE, is_active=False, ends_at=NOW)

    @case(1)
    async def test_use_ids_are_kept_and_not_repeated(self, bench: Bench) -> None:
        """A ``use_id`` is appended, ``""`` is not, and one that is there already makes the token not
        match."""
        backend = await bench.backend()
        token = await put(backend, max_uses=9)
        for use_id in ("b", "", "a", UNICODE, ""):
            assert await backend.update(Match(id=token.id), Use(NOW, use_id)) is not None
        before = await one(backend, token)
        assert (before.use_ids, before.uses) == (("b", "a", UNICODE), 5)
        for use_id in ("a", "b", UNICODE):
            assert await backend.update(Match(id=token.id), Use(NOW + 1, use_id)) is None
        assert await one(backend, token) == before
        assert await backend.update(Match(id=token.id), Use(NOW + 1, "A")) is not None

    @case(1)
    async def test_of_concurrent_uses_as_many_win_as_are_left(self, bench: Bench) -> None:
        """Of N concurrent uses exactly as many get the token as it has uses left."""
        backends = [await bench.backend(), await bench.backend()]
        for number in range(self.rounds):
            left = 1 + number % 3
            token = await put(backends[0], max_uses=left)
            match = Match(digests=(token.digest,), valid_at=NOW)
            calls = [backends[n % 2].update(match, Use(NOW, f"use{n}")) for n in range(self.tasks)]
            won = await at_once(calls)
            assert sorted(got.uses for got in won if got) == list(range(1, left + 1))
            last = await one(backends[1], token)
            assert (last.uses, last.is_active, len(set(last.use_ids))) == (left, False, left)

    @case(1)
    async def test_of_concurrent_uses_with_one_id_one_wins(self, bench: Bench) -> None:
        """Of N concurrent uses with the same ``use_id`` exactly one is counted."""
        backends = [await bench.backend(), await bench.backend()]
        for _ in range(self.rounds):
            token = await put(backends[0], max_uses=99)
            calls = [backends[n % 2].update(Match(id=token.id), Use(NOW, "same")) for n in range(self.tasks)]
            won = await at_once(calls)
            assert sum(got is not None for got in won) == 1
            assert (await one(backends[0], token)).uses == 1

    @case(6)
    async def test_of_changes_at_once_each_minds_its_own_match(self, bench: Bench) -> None:
        """Changes at once, which a store may gather, each mind every field of their own ``Match``."""
        backend = await bench.backend()
        fits: list[dict[str, Any]] = [{}, {"object_id": None}, {"valid_at": NOW + 1}, {"context": None}]
        misses: list[dict[str, Any]] = [
            {"content_type": "auth.group"},
            {"object_id": "43"},
            {"slug": ""},
            {"slug": "other"},
            {"context": b""},
            {"context": b"d" * 32},
            {"valid_at": NOW + 2},
            {"digests": ()},
            {"digests": (a_digest("nobody"),)},
            {"id": "0" * 32},
            {"lease_id": "l"},
            {"leased_at": NOW},
        ]
        for change in (Use(NOW, "u"), Use(NOW), Lease("l", NOW + 9)):
            calls = []
            # Objects of their own, because a store may well keep one object's changes apart.
            for number, fields in enumerate((*fits, *misses) * 2):
                object_id = f"object {number}"
                token = await put(backend, object_id=object_id, context=b"c" * 32, expires_at=NOW + 1)
                match = Match(
                    digests=(token.digest,),
                    content_type=token.content_type,
                    object_id=token.object_id,
                    slug=token.slug,
                    valid_at=NOW,
                    context=token.context,
                )
                calls.append(backend.update(match._replace(**fields), change))
            changed = [token is not None for token in await asyncio.gather(*calls)]
            assert changed == ([True] * len(fits) + [False] * len(misses)) * 2

    @case(1)
    async def test_of_concurrent_leases_one_wins(self, bench: Bench) -> None:
        """Of N concurrent leases of a valid token exactly one gets it, with its own lease id."""
        backends = [await bench.backend(), await bench.backend()]
        for _ in range(self.rounds):
            token = await put(backends[0])
            match = Match(id=token.id, valid_at=NOW)
            calls = [backends[n % 2].update(match, Lease(f"l{n}", NOW + 1)) for n in range(self.tasks)]
            won = await at_once(calls)
            got = [winner for winner in won if winner]
            assert got == [await one(backends[0], token)]

    @case(1)
    async def test_a_lease_is_fenced_by_its_id(self, bench: Bench) -> None:
        """A change under a ``lease_id`` matches while that very lease runs, and never under another's."""
        backend = await bench.backend()
        token = await put(backend)
        assert await backend.update(Match(id=token.id, valid_at=NOW), Lease("old", NOW + 10)) is not None
        assert await backend.update(Match(id=token.id, valid_at=NOW + 9), Lease("early", NOW + 20)) is None
        assert await backend.update(Match(id=token.id, valid_at=NOW + 10), Lease("new", NOW + 20)) is not None
        before = await one(backend, token)
        for match in (
            Match(id=token.id, lease_id="old", leased_at=NOW + 11),
            Match(id=token.id, lease_id="new", leased_at=NOW + 20),
            Match(id=token.id, lease_id="", leased_at=NOW + 11),
        ):
            for change in (Use(NOW + 11), Release(), Lease("mine", NOW + 99)):
                assert await backend.update(match, change) is None
        assert await one(backend, token) == before
        match = Match(id=token.id, active=True, lease_id="new", leased_at=NOW + 19)
        assert await backend.update(match, Use(NOW + 19)) is not None

    @case(11)
    async def test_a_change_touches_its_own_fields_alone(self, bench: Bench) -> None:
        """Lease, release, extra data and the forgotten key set what they name and nothing else, on one
        token."""
        backend = await bench.backend()
        other = await put(backend, plain_key="other")
        token = await put(backend, plain_key="k", nonce="n", context=b"c", max_uses=3, uses=1, use_ids=("u",))
        changes: list[tuple[Change, dict[str, Any]]] = [
            (Lease("l", NOW + 7), {"lease_id": "l", "lease_until": NOW + 7}),
            (SetExtraData('{"a": 1}'), {"extra_data": '{"a": 1}'}),
            (SetExtraData(""), {"extra_data": ""}),
            (SetExtraData(UNICODE + "x" * 16_000), {"extra_data": UNICODE + "x" * 16_000}),
            (SetExtraData(None), {"extra_data": None}),
            (Release(), {"lease_id": "", "lease_until": 0}),
            (ForgetKey(), {"plain_key": ""}),
        ]
        for change, fields in changes:
            token = token._replace(**fields)
            assert await backend.update(Match(digests=(token.digest,)), change) == token
            assert await one(backend, token) == token
        assert await one(backend, other) == other

    @case(1)
    async def test_what_does_not_match_is_not_changed(self, bench: Bench) -> None:
        """``update`` answers ``None`` where no token matched, and nothing changed."""
        backend = await bench.backend()
        token = await put(backend, context=b"c")
        own = Match(id=token.id)
        matches = [
            Match(id="0" * 32),
            Match(digests=()),
            Match(digests=(a_digest("nobody"),)),
            own._replace(digests=(a_digest("nobody"),)),
            own._replace(content_type="auth"),
            own._replace(object_id="4"),
            own._replace(slug=""),
            own._replace(slug="reset "),
            own._replace(context=b""),
            own._replace(lease_id="l"),
            own._replace(leased_at=NOW),
            own._replace(valid_at=token.expires_at + 1),
        ]
        changes: list[Change] = [Use(NOW), Lease("l", NOW + 1), Release(), SetExtraData("x"), ForgetKey()]
        for match in matches:
            for change in changes:
                assert await backend.update(match, change) is None, match._asdict()
        assert await find_all(backend) == [token]
        assert await backend.update(own._replace(valid_at=token.expires_at), Use(NOW)) is not None
        for gone in (own._replace(active=True), own._replace(valid_at=NOW)):
            assert await backend.update(gone, Use(NOW)) is None

    @case(2)
    async def test_deactivate_changes_every_match(self, bench: Bench) -> None:
        """``deactivate`` makes every matching active token inactive, nothing else, and says how many."""
        backend = await bench.backend()
        old = [
            await put(backend, created_at=NOW),
            await put(backend, created_at=NOW + 1, expires_at=NOW - 9),
            await put(backend, created_at=NOW + 2, slug="", lease_id="l", lease_until=NOW + 9),
        ]
        kept = [
            await put(backend, created_at=NOW + 3, is_active=False, ends_at=NOW - 1),
            await put(backend, created_at=NOW + 4, object_id="43"),
        ]
        match = Match(content_type="auth.user", object_id="42")
        assert await backend.deactivate(match, NOW + 10) == 3
        assert await find_all(backend) == [*kept[::-1], *(ended(token, NOW + 10) for token in old[::-1])]
        assert await backend.deactivate(match, NOW + 20) == 0
        assert await backend.deactivate(Match(id=kept[1].id, digests=(kept[1].digest,)), NOW + 20) == 1

    @case(2)
    async def test_concurrent_deactivations_count_a_token_once(self, bench: Bench) -> None:
        """Of N concurrent deactivations one counts a token."""
        backends = [await bench.backend(), await bench.backend()]
        for number in range(self.rounds):
            for _ in range(3):
                await put(backends[0], object_id=f"d{number}")
            calls = [
                backends[n % 2].deactivate(Match(object_id=f"d{number}"), NOW) for n in range(self.tasks)
            ]
            won = await at_once(calls)
            assert sum(won) == 3

    @case(9)
    async def test_purge_deletes_what_ended_and_no_more(self, bench: Bench) -> None:
        """Purge deletes tokens with ``ends_at < before and lease_until <= now``, and no others."""
        backend = await bench.backend()
        gone = [
            await put(backend, expires_at=NOW - 1),
            await put(backend, ends_at=NOW - 1, is_active=False),
            await put(backend, ends_at=NOW - 1, is_active=False, lease_id="l", lease_until=NOW + 5),
        ]
        kept = [
            await put(backend, created_at=NOW, expires_at=NOW),
            await put(backend, created_at=NOW + 1, is_active=False, ends_at=NOW),
            await put(backend, created_at=NOW + 2, expires_at=NOW - 1, lease_id="l", lease_until=NOW + 6),
            await put(backend, created_at=NOW + 3, expires_at=NEVER),
        ]
        assert await backend.purge(NOW, NOW + 5, 99, 0) == len(gone)
        assert await find_all(backend) == kept[::-1]
        assert await backend.purge(NOW, NOW + 5, 99, 0) == 0

    @case(9)
    async def test_purge_takes_the_longest_ended_first(self, bench: Bench) -> None:
        """One purge deletes at most ``limit`` tokens, the longest ended first."""
        backend = await bench.backend()
        order = [5, 1, 4, 7, 2, 6, 3]
        tokens = {n: await put(backend, expires_at=NOW - MINUTE + n * 1000) for n in order}
        for left in (range(4, 8), range(7, 8), range(0)):
            assert await backend.purge(NOW, NOW, 3, 0) == (3 if left else 1)
            assert {token.id for token in await find_all(backend)} == {tokens[n].id for n in left}
        assert await backend.purge(NOW, NOW, 3, 0) == 0

    @case(9)
    async def test_a_purged_key_is_free_again(self, bench: Bench) -> None:
        """What purge deleted is forgotten: its digest may be stored again."""
        backend = await bench.backend()
        token = await put(backend, expires_at=NOW - 1)
        assert await backend.purge(NOW, NOW, 9, 0) == 1
        again = a_token(digest=token.digest)
        assert await backend.insert(again, InsertMode.ADD) is InsertResult.INSERTED
        assert await find_all(backend) == [again]

    @case(9)
    async def test_concurrent_purges_count_a_token_once(self, bench: Bench) -> None:
        """Concurrent purges delete each token once, beside writes, and no valid one; what one of them holds
        keeps no other from the rest."""
        backends = [await bench.backend(), await bench.backend()]
        for n in range(20):
            await put(backends[0], object_id=str(n), expires_at=NOW - 1 - n)
        fresh: list[StoredToken] = [a_token(object_id=f"fresh{n}") for n in range(5)]
        purges = [backends[n % 2].purge(NOW, NOW, 4, 0) for n in range(8)]
        writes = [backends[0].insert(token, InsertMode.REPLACE) for token in fresh]
        counts, _ = await asyncio.gather(at_once(purges), at_once(writes))
        left = await find_all(backends[1])
        assert {token.id for token in left} == {token.id for token in fresh}
        assert sum(counts) == 20

    @case(9)
    async def test_purge_forgets_ended_budgets(self, bench: Bench) -> None:
        """Purge forgets at most ``limit`` budgets with ``until <= budgets_before``, which it does not
        count."""
        backend = await bench.backend()
        budgets = [Budget("auth.user", str(n), "reset", "attempts") for n in range(4)]
        for n, budget in enumerate(budgets):
            assert (await backend.spend(budget, NOW, 1, 10 + n, MINUTE)).until == NOW + 10 + n
        assert await backend.purge(0, NOW, 99, NOW + 11) == 0
        again = [(await backend.spend(budget, NOW + 5, 1, 10, MINUTE)).allowed for budget in budgets]
        assert again == [True, True, False, False]
        assert await backend.purge(0, NOW, 1, NOW + MINUTE) == 0
        again = [(await backend.spend(budget, NOW + 6, 1, 10, MINUTE)).allowed for budget in budgets]
        assert sum(again) == 1
