"""The protocol's sentences about an insert with an overlap: keys that a new token takes over."""

from __future__ import annotations

from typing import Any

from vtoken.backend import (
    Hold,
    InsertMode,
    Match,
    Outcome,
    State,
    StoredHold,
    StoredToken,
    Use,
    replaced,
)
from vtoken.testing.cases.insert import IF_NONE_VALID, REPLACE, insert
from vtoken.testing.harness import MINUTE, NOW, Bench, Suite, a_token, at_once, by_key, case, one, put

UNTIL = NOW + MINUTE
RUNNING = StoredHold(hold_id="h", until=NOW + 1, use_id="", origin=f"{1:016x}")


class OverlapCases(Suite):
    """Cases of an insert with ``keep_until``."""

    @case(2)
    async def test_a_new_token_takes_over_the_keys(self, bench: Bench) -> None:
        """The new token takes over the keys of its predecessor that are not expired, until the earlier of
        ``keep_until`` and their own expiry; the predecessor is replaced and keeps the others."""
        backend = await bench.backend()
        for mode in (REPLACE, IF_NONE_VALID, InsertMode.ONCE):
            who = mode.value
            old = await put(
                backend,
                {"plain_key": "k", "nonce": "n"},
                {"kind": "code", "expires_at": NOW + 5},
                {"expires_at": NOW - 1},
                {"expires_at": NOW},
                object_id=who,
                extra_data='{"a": 1}',
            )
            new = a_token(object_id=who, extra_data='{"a": 1}')
            stored = await insert(backend, new, mode, keep_until=UNTIL, wanted_until=NOW + 6)
            link, code, over, last = old.keys
            taken = (link._replace(expires_at=UNTIL), code, last)
            assert stored == new._replace(keys=(*new.keys, *taken))
            assert await one(backend, old) == replaced(old, NOW)._replace(keys=(over,))

    @case(2)
    async def test_what_is_not_the_same_is_not_taken_over(self, bench: Bench) -> None:
        """Nothing is taken over without ``keep_until``, from a token that is expired, held, was added beside
        others, or has other ``extra_data``, or from one of another line."""
        backend = await bench.backend()
        cases: list[tuple[dict[str, Any], int]] = [
            ({}, 0),
            ({}, NOW),
            ({"expires_at": NOW - 1}, UNTIL),
            ({"holds": (RUNNING,)}, UNTIL),
            ({"is_beside": True}, UNTIL),
            ({"extra_data": '{"a":1}'}, UNTIL),
            ({"extra_data": None}, UNTIL),
            ({"state": State.ENDED, "ends_at": NOW - 1}, UNTIL),
            ({"context": b"c"}, UNTIL),
            ({"slug": ""}, UNTIL),
            ({"content_type": "auth"}, UNTIL),
        ]
        for number, (fields, keep_until) in enumerate(cases):
            who = f"o{number}"
            old = await put(backend, object_id=who, **{"extra_data": '{"a": 1}', **fields})
            new = a_token(object_id=who, extra_data='{"a": 1}')
            assert await insert(backend, new, REPLACE, keep_until=keep_until) == new
            assert (await one(backend, old)).keys == old.keys
        for holds in ((RUNNING._replace(until=NOW),), (RUNNING._replace(until=NOW * 2),)):  # over, and stale
            old = await put(backend, object_id="free", holds=holds)
            stored = await insert(backend, a_token(object_id="free"), REPLACE, keep_until=UNTIL)
            assert len(stored.keys) == 2

    @case(2)
    async def test_only_the_newest_exclusive_token_is_a_predecessor(self, bench: Bench) -> None:
        """The keys of the newest token that is not beside others are taken over, those of no other; where
        that one cannot give them, none are."""
        backend = await bench.backend()
        for newest_is_held in (False, True):
            who = f"newest {newest_is_held}"
            holds = (RUNNING,) if newest_is_held else ()
            older = await put(backend, object_id=who)
            newest = await put(backend, object_id=who, holds=holds)
            beside = await put(backend, object_id=who, is_beside=True)
            new = a_token(object_id=who)
            stored = await insert(backend, new, REPLACE, keep_until=UNTIL)
            taken = () if newest_is_held else (newest.keys[0]._replace(expires_at=UNTIL),)
            assert stored.keys == (*new.keys, *taken)
            for token in (older, beside):
                assert await one(backend, token) == replaced(token, NOW)

    @case(2)
    async def test_a_key_is_taken_over_once(self, bench: Bench) -> None:
        """Keys that the predecessor had taken over itself stay with it and are over: of any number of issues
        two keys are good."""
        backend = await bench.backend()
        tokens: list[StoredToken] = []
        for number in range(4):
            token = a_token(created_at=NOW + number)
            tokens.append(await insert(backend, token, REPLACE, keep_until=UNTIL))
        presented = [
            await backend.present(Match(digests=(token.keys[0].digest,)), None, NOW + 9) for token in tokens
        ]
        outcomes = [answer.outcome for answer in presented]
        assert outcomes == [Outcome.REFUSED, Outcome.REFUSED, Outcome.RIGHT, Outcome.RIGHT]
        for answer in presented[2:]:
            assert answer.token == tokens[3]
        first = await one(backend, tokens[1])
        assert [key.origin for key in first.keys] == [tokens[0].id]

    @case(2)
    async def test_a_taken_over_key_keeps_its_own_end(self, bench: Bench) -> None:
        """A key that was taken over is good until its own last millisecond, the new token's key longer."""
        backend = await bench.backend()
        old = await put(backend)
        new = await insert(backend, a_token(), REPLACE, keep_until=UNTIL)
        for at, outcome in ((UNTIL, Outcome.RIGHT), (UNTIL + 1, Outcome.REFUSED)):
            answer = await backend.present(by_key(old), None, at)
            assert (answer.outcome, answer.token) == (outcome, new)
            assert (await backend.present(by_key(new), None, at)).outcome is Outcome.RIGHT

    @case(1)
    async def test_of_concurrent_uses_of_an_overlap_one_wins(self, bench: Bench) -> None:
        """Of uses and holds by both keys of an overlap at once, one is right, and it counts as the new
        token's."""
        backends = await bench.two_backends()
        for number in range(self.rounds):
            old = await put(backends[0], object_id=f"o{number}")
            new = await insert(backends[0], a_token(object_id=f"o{number}"), REPLACE, keep_until=UNTIL)
            changes: list[Use | Hold] = [Use(at=NOW + 1), Hold(hold_id="h", until=NOW + MINUTE)]
            calls = [
                backends[(n + number) % 2].present(by_key((old, new)[n % 2]), changes[n // 2 % 2], NOW + 1)
                for n in range(self.tasks)
            ]
            outcomes = [answer.outcome for answer in await at_once(calls)]
            assert (outcomes.count(Outcome.RIGHT), outcomes.count(Outcome.REFUSED)) == (1, self.tasks - 1)
            stored = await one(backends[0], new)
            assert stored.uses + len(stored.holds) == 1
            assert (await one(backends[0], old)).uses == 0

    @case(2)
    async def test_of_concurrent_overlapping_replaces_the_chain_is_whole(self, bench: Bench) -> None:
        """Of N concurrent ``REPLACE`` with an overlap one token stays active with two good keys, and no key
        is lost or doubled."""
        backends = await bench.two_backends()
        for number in range(self.rounds):
            who = f"chain{number}"
            tokens = [a_token(object_id=who) for _ in range(self.tasks)]
            calls = [
                backends[n % 2].insert(token, REPLACE, keep_until=UNTIL) for n, token in enumerate(tokens)
            ]
            await at_once(calls)
            found = await backends[0].find(Match(object_id=who), 99)
            digests = sorted(key.digest for token in found for key in token.keys)
            assert digests == sorted(token.keys[0].digest for token in tokens)
            (active,) = (token for token in found if token.is_active)
            assert sum(key.expires_at >= NOW for key in active.keys) == 2
