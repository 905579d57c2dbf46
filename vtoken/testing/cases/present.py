"""The protocol's sentences about ``present``: a key is compared, used, held or refused in one step."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from vtoken.backend import (
    REMEMBERED_USES,
    STALE_HOLD,
    Hold,
    InsertMode,
    Match,
    Outcome,
    Presented,
    Release,
    Spending,
    State,
    StoredHold,
    StoredToken,
    TokenBackend,
    Use,
    UseHeld,
)
from vtoken.testing.cases.insert import insert
from vtoken.testing.cases.strings import UNICODE
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
    by_key,
    case,
    find_all,
    one,
    put,
)

RIGHT, REFUSED, REPLAYED, LIMITED = Outcome.RIGHT, Outcome.REFUSED, Outcome.REPLAYED, Outcome.LIMITED


async def use(
    backend: TokenBackend, token: StoredToken, use_id: str = "", at: int = NOW, **named: Any
) -> Presented:
    """Present a token's first key for a use."""
    return await backend.present(by_key(token), Use(at=at, use_id=use_id), at, **named)


def a_hold(name: str, until: int = NOW + MINUTE) -> StoredHold:
    return StoredHold(hold_id=name, until=until, use_id="", origin=f"{1:016x}")


class PresentCases(Suite):
    """Cases of ``present`` without limits."""

    @case(1)
    async def test_a_use_counts_and_ends(self, bench: Bench) -> None:
        """A use counts one and sets ``used_at``; the one that reaches ``max_uses`` ends the token as used;
        nothing else changes."""
        backend = await bench.backend()
        other = await put(backend)
        token = await put(backend, {"plain_key": "k", "nonce": "n"}, {"kind": "code"}, max_uses=2)
        first = await use(backend, token, at=NOW + 5)
        expected = token._replace(uses=1, used_at=NOW + 5)
        assert first == Presented(RIGHT, expected)
        assert await one(backend, token) == expected
        second = await backend.present(by_key(token, 1), Use(at=NOW + 9), NOW + 9)
        expected = expected._replace(uses=2, used_at=NOW + 9, state=State.USED, ends_at=NOW + 8)
        assert second == Presented(RIGHT, expected)
        assert await one(backend, token) == expected
        assert await use(backend, token, at=NOW + 10) == Presented(REFUSED, expected)
        assert await one(backend, other) == other

    @case(1)
    async def test_a_use_without_bound_never_ends(self, bench: Bench) -> None:
        """Without a bound a token is used any number of times, past 32,767 and 65,535, and stays active."""
        backend = await bench.backend()
        for uses in (0, 32_767, 65_535, 2**31 - 3):
            token = await put(backend, max_uses=None, uses=uses)
            for count in (uses + 1, uses + 2):
                assert await use(backend, token) == Presented(RIGHT, token._replace(uses=count, used_at=NOW))

    @case(1)
    async def test_a_late_use_keeps_the_earlier_end(self, bench: Bench) -> None:
        """The last use leaves ``ends_at`` where it is the earlier one."""
        backend = await bench.backend()
        token = await put(backend, expires_at=NOW)
        used = await backend.present(by_key(token), Use(at=NOW + 7), NOW)
        assert used.token == token._replace(uses=1, used_at=NOW + 7, state=State.USED)

    @case(7)
    async def test_what_is_refused_says_why(self, bench: Bench) -> None:
        """A token that cannot be used, because of its state, its expiry, that of the very key, or because its
        uses are used or held, is REFUSED, shown and not changed; an unknown key shows none."""
        backend = await bench.backend()
        tokens = [
            await put(backend, state=State.USED, uses=1, ends_at=NOW - 1),
            await put(backend, state=State.ENDED, ends_at=NOW - 1),
            await put(backend, state=State.REPLACED, ends_at=NOW - 1),
            await put(backend, expires_at=NOW - 1),
            await put(backend, {"expires_at": NOW - 1}, {}),
            await put(backend, holds=(a_hold("a"),)),
            await put(backend, max_uses=3, uses=1, holds=(a_hold("a"), a_hold("b"))),
            await put(backend, holds=(a_hold("a", NOW + 1),)),
        ]
        changes = [None, Use(at=NOW), Hold(hold_id="h", until=NOW + 1)]
        for change in changes:
            for token in tokens:
                assert await backend.present(by_key(token), change, NOW) == Presented(REFUSED, token)
            unknown = Match(digests=(a_digest("nobody"),))
            assert await backend.present(unknown, change, NOW) == Presented(REFUSED)
        assert await find_all(backend) == tokens[::-1]

    @case(7)
    async def test_the_last_millisecond_is_good(self, bench: Bench) -> None:
        """Token and key are good at exactly ``expires_at``, and a key of a token that is good is not good
        itself."""
        backend = await bench.backend()
        token = await put(backend, {"expires_at": NOW + 5}, {}, expires_at=NOW + 9, max_uses=9)
        for place, last in ((0, NOW + 5), (1, NOW + 9)):
            for at, outcome in ((last, RIGHT), (last + 1, REFUSED)):
                assert (await backend.present(by_key(token, place), None, at)).outcome is outcome

    @case(1)
    async def test_a_check_changes_nothing(self, bench: Bench) -> None:
        """Without a change a right key is RIGHT as often as it is asked for, and nothing is written."""
        backend = await bench.backend()
        token = await put(backend, holds=(a_hold("over", NOW),), max_uses=2)
        for _ in range(3):
            assert await backend.present(by_key(token), None, NOW) == Presented(RIGHT, token)
        assert await one(backend, token) == token

    @case(6)
    async def test_of_keys_at_once_each_minds_its_own_match(self, bench: Bench) -> None:
        """Keys presented at once, which a store may gather, each mind every field of their own ``Match``."""
        backend = await bench.backend()
        fits: list[dict[str, Any]] = [{}, {"object_id": None}, {"context": None}, {"kind": None}]
        misses: list[dict[str, Any]] = [
            {"content_type": "auth.group"},
            {"object_id": "43"},
            {"slug": ""},
            {"slug": "other"},
            {"context": b""},
            {"context": b"d" * 32},
            {"kind": "code"},
            {"kind": ""},
            {"digests": ()},
            {"digests": (a_digest("nobody"),)},
            {"id": f"{0:016x}"},
        ]
        changes = [Use(at=NOW, use_id="u"), Use(at=NOW), Hold(hold_id="h", until=NOW + 9), None]
        for change in changes:
            calls = []
            # Objects of their own, because a store may well keep one object's calls apart.
            for number, fields in enumerate((*fits, *misses) * 2):
                token = await put(backend, {}, {"kind": "code"}, object_id=f"{number}", context=b"c" * 32)
                match = by_key(token)._replace(context=token.context, kind="link")
                calls.append(backend.present(match._replace(**fields), change, NOW))
            outcomes = [answer.outcome for answer in await at_once(calls)]
            assert outcomes == ([RIGHT] * len(fits) + [REFUSED] * len(misses)) * 2

    @case(6)
    async def test_kind_is_that_of_the_presented_key(self, bench: Bench) -> None:
        """``kind`` is tested on the key that has the digest, not on another one of the token."""
        backend = await bench.backend()
        token = await put(backend, {}, {"kind": "code"}, max_uses=9)
        for place, kind, outcome in (
            (0, "link", RIGHT),
            (0, "code", REFUSED),
            (1, "code", RIGHT),
            (1, "link", REFUSED),
        ):
            match = by_key(token, place)._replace(kind=kind)
            assert (await backend.present(match, None, NOW)).outcome is outcome

    @case(6)
    async def test_one_of_several_digests_is_enough(self, bench: Bench) -> None:
        """A key may be given by several digests, as under several secrets: one that is stored is enough."""
        backend = await bench.backend()
        token = await put(backend, max_uses=9)
        digest = token.keys[0].digest
        for digests in ((digest, a_digest("x")), (a_digest("x"), a_digest("y"), digest)):
            match = by_key(token)._replace(digests=digests)
            assert (await backend.present(match, Use(at=NOW), NOW)).outcome is RIGHT
        assert (await one(backend, token)).uses == 2
        # What is over under one secret is no reason against what is good under another.
        over = await put(backend, state=State.ENDED, ends_at=NOW - 1)
        for digests in ((over.keys[0].digest, digest), (digest, over.keys[0].digest)):
            match = by_key(token)._replace(digests=digests)
            for change in (None, Use(at=NOW), Hold(hold_id=digests[0].hex(), until=NOW + 9)):
                answer = await backend.present(match, change, NOW)
                assert answer.outcome is RIGHT
                assert answer.token == await one(backend, token)

    @case(1)
    async def test_of_concurrent_uses_as_many_win_as_are_left(self, bench: Bench) -> None:
        """Of N concurrent uses and holds exactly as many are RIGHT as uses were neither used nor held."""
        backends = await bench.two_backends()
        for number in range(self.rounds):
            free = 1 + number % 4
            token = await put(backends[0], max_uses=free + 2, uses=1, holds=(a_hold("before"),))
            changes = [Use(at=NOW, use_id=f"u{n}") if n % 2 else _holding(n) for n in range(self.tasks)]
            calls = [backends[n // 2 % 2].present(by_key(token), c, NOW) for n, c in enumerate(changes)]
            answers = await at_once(calls)
            assert sum(answer.outcome is RIGHT for answer in answers) == free
            last = await one(backends[1], token)
            assert last.uses + len(last.holds) == free + 2
            assert len({hold.hold_id for hold in last.holds}) == len(last.holds)
            uses = sorted(a.token.uses for a in answers if a.token and a.outcome is RIGHT and a.token.used_at)
            assert uses[-1:] in ([], [last.uses])


def _holding(number: int) -> Hold:
    return Hold(hold_id=f"h{number}", until=NOW + MINUTE, use_id=f"u{number}")


class HoldCases(Suite):
    """Cases of holds that are taken; how they end is a matter of ``update``."""

    @case(1)
    async def test_a_hold_takes_one_use(self, bench: Bench) -> None:
        """A hold is added to those that run, with the origin of the presented key; those that have run out
        are dropped; ``uses`` and all else stay."""
        backend = await bench.backend()
        holds: tuple[StoredHold, ...] = (a_hold("over", NOW), a_hold("runs", NOW + 1))
        old = f"{1:016x}"
        token = await put(backend, {}, {"origin": old}, max_uses=4, uses=1, holds=holds)
        for place, name, origin in ((0, UNICODE, token.id), (1, "b", old)):
            held = await backend.present(by_key(token, place), Hold(hold_id=name, until=NOW + 9), NOW)
            running = [hold for hold in holds if hold.hold_id != "over"]
            holds = (*running, StoredHold(hold_id=name, until=NOW + 9, use_id="", origin=origin))
            token = token._replace(holds=holds)
            assert held == Presented(RIGHT, token)
            assert await one(backend, token) == token
        assert [hold.hold_id for hold in token.holds] == ["runs", UNICODE, "b"]
        assert (await use(backend, token)).outcome is REFUSED
        assert (await use(backend, token, at=NOW + 1)).outcome is RIGHT

    @case(1)
    async def test_a_hold_runs_until_its_end(self, bench: Bench) -> None:
        """A hold keeps its use from everybody else while ``now < until``, and not a millisecond longer."""
        backend = await bench.backend()
        token = await put(backend)
        hold = Hold(hold_id="first", until=NOW + 10)
        assert (await backend.present(by_key(token), hold, NOW)).outcome is RIGHT
        for change in (None, Use(at=NOW + 9), Hold(hold_id="second", until=NOW + 20)):
            assert (await backend.present(by_key(token), change, NOW + 9)).outcome is REFUSED
        held = await backend.present(by_key(token), Hold(hold_id="second", until=NOW + 20), NOW + 10)
        assert held.token is not None
        assert [hold.hold_id for hold in held.token.holds] == ["second"]

    @case(7)
    async def test_a_stale_hold_does_not_count(self, bench: Bench) -> None:
        """A hold that ends later than two days from now was made by a clock that was wrong: it does not
        count, and the next hold drops it."""
        backend = await bench.backend()
        for until, counts in ((NOW + STALE_HOLD, True), (NOW + STALE_HOLD + 1, False), (NOW * 2, False)):
            token = await put(backend, holds=(a_hold("stale", until),))
            held = await backend.present(by_key(token), Hold(hold_id="h", until=NOW + 9), NOW)
            assert (held.outcome is REFUSED) is counts
            names = [hold.hold_id for hold in (await one(backend, token)).holds]
            assert names == (["stale"] if counts else ["h"])

    @case(1)
    async def test_of_concurrent_holds_as_many_as_uses_are_free(self, bench: Bench) -> None:
        """Thirty people with one invitation are all inside at once, and nobody more than it has uses."""
        backends = await bench.two_backends()
        token = await put(backends[0], max_uses=30)
        calls = [backends[n % 2].present(by_key(token), _holding(n), NOW) for n in range(40)]
        answers = await at_once(calls)
        assert sum(answer.outcome is RIGHT for answer in answers) == 30
        stored = await one(backends[0], token)
        assert (stored.uses, len({hold.hold_id for hold in stored.holds})) == (0, 30)

    @case(1)
    async def test_a_hold_remembers_no_use(self, bench: Bench) -> None:
        """The ``use_id`` of a hold is not remembered before the use; one that is remembered is REPLAYED."""
        backend = await bench.backend()
        token = await put(backend, max_uses=9)
        for name in ("released", "later"):
            hold = Hold(hold_id=name, until=NOW + 9, use_id="me")
            assert (await backend.present(by_key(token), hold, NOW)).outcome is RIGHT
            assert await backend.update(Match(id=token.id), Release(hold_id=name)) is not None
        assert (await use(backend, token, "me", NOW + 1)).outcome is RIGHT
        before = await one(backend, token)
        assert await backend.present(by_key(token), hold, NOW + 2) == Presented(REPLAYED, before, NOW + 1)
        assert await one(backend, token) == before

    @case(1)
    async def test_one_use_is_held_once(self, bench: Bench) -> None:
        """While a hold runs, the same use (its ``use_id``, by a key of the same ``origin``) can be neither
        held nor made, however many uses are free, and that costs no attempt. Other uses can."""
        backend = await bench.backend()
        spends = (a_spend(a_budget("attempts"), 9),)
        for number, max_uses in enumerate((9, None)):
            old = f"{2**40 + number:016x}"  # no token of the cases has this id
            token = await put(backend, {}, {"origin": old}, max_uses=max_uses)
            mine = Hold(hold_id="mine", until=NOW + 10, use_id=UNICODE)
            held = await backend.present(by_key(token), mine, NOW, spends)
            assert held.outcome is RIGHT
            assert held.token is not None
            hold = StoredHold(hold_id="mine", until=NOW + 10, use_id=UNICODE, origin=token.id)
            assert held.token.holds == (hold,)
            again: list[Use | Hold] = [mine._replace(hold_id="again"), Use(at=NOW + 9, use_id=UNICODE)]
            for change in again:
                answer = await backend.present(by_key(token), change, NOW + 9, spends)
                assert answer == Presented(REFUSED, held.token, spending=Spending(left=9))
            assert await one(backend, token) == held.token
            assert await backend.budgets((spends[0].budget,)) == [None]
            assert (await backend.present(by_key(token), None, NOW + 9, spends)).outcome is RIGHT
            others: list[Use | Hold] = [
                *(Use(at=NOW, use_id=use_id) for use_id in ("", "u", UNICODE + "u")),
                *(Hold(hold_id="other" + u, until=NOW + 10, use_id=u) for u in ("", "v")),
            ]
            for change in others:
                assert (await backend.present(by_key(token), change, NOW, spends)).outcome is RIGHT
            taken_over = await backend.present(by_key(token, 1), Use(at=NOW, use_id=UNICODE), NOW)
            assert taken_over.outcome is RIGHT

    @case(1)
    async def test_a_use_is_free_again_after_its_hold(self, bench: Bench) -> None:
        """The same use can be held again once its hold has run out, is stale or was given back, and is
        REPLAYED once it was counted."""
        backend = await bench.backend()
        token = await put(backend, max_uses=9)
        mine = Hold(hold_id="stale", until=NOW + STALE_HOLD + 10, use_id="me")
        assert (await backend.present(by_key(token), mine, NOW + 10)).outcome is RIGHT
        for at, name in ((NOW, "a"), (NOW + 10, "b"), (NOW + 11, "c")):  # stale, run out, given back
            mine = Hold(hold_id=name, until=NOW + (10 if name == "a" else MINUTE), use_id="me")
            assert (await backend.present(by_key(token), mine, at)).outcome is RIGHT
            if name != "a":
                assert (await backend.present(by_key(token), mine, at)).outcome is REFUSED
            if name == "b":
                assert await backend.update(Match(id=token.id), Release(hold_id="b")) is not None
        used = UseHeld(hold_id="c", at=NOW + 12, use_id="me")
        assert await backend.update(Match(id=token.id), used) is not None
        assert (await backend.present(by_key(token), mine, NOW + 13)).outcome is REPLAYED
        assert (await one(backend, token)).uses == 1

    @case(1)
    async def test_of_concurrent_holds_of_one_use_one_is_taken(self, bench: Bench) -> None:
        """Of N concurrent holds and uses with the same ``use_id`` one is RIGHT, however many uses are
        free."""
        backends = await bench.two_backends()
        for number in range(self.rounds):
            token = await put(backends[0], max_uses=(99, None)[number % 2])
            changes: list[Use | Hold] = [_holding(n)._replace(use_id="same") for n in range(self.tasks)]
            if number % 3 == 2:
                changes[1::2] = [Use(at=NOW, use_id="same") for _ in changes[1::2]]
            calls = [backends[n // 2 % 2].present(by_key(token), c, NOW) for n, c in enumerate(changes)]
            answers = await at_once(calls)
            assert sum(answer.outcome is RIGHT for answer in answers) == 1
            stored = await one(backends[0], token)
            assert stored.uses + len(stored.holds) == 1


class ReplayCases(Suite):
    """Cases of uses that are asked for again."""

    @case(1)
    async def test_the_same_use_is_answered_again(self, bench: Bench) -> None:
        """A ``use_id`` that is remembered for the key is REPLAYED with the token as it is now and the time of
        the use, whatever has become of the token since; nothing changes."""
        backend = await bench.backend()
        token = await put(backend, max_uses=2)
        assert (await use(backend, token, UNICODE, NOW + 1)).outcome is RIGHT
        changes: list[Callable[[], Awaitable[object]]] = [
            lambda: use(backend, token, "other", NOW + 2),
            lambda: backend.deactivate(Match(id=token.id), NOW + 3),
            lambda: backend.insert(a_token(created_at=NOW + 4), InsertMode.REPLACE),
        ]
        for change in changes:
            await change()
            now = await one(backend, token)
            for at in (NOW + 5, NOW + 3 * DAY):
                assert await use(backend, token, UNICODE, at) == Presented(REPLAYED, now, NOW + 1)
            assert await one(backend, token) == now

    @case(1)
    async def test_another_id_is_another_use(self, bench: Bench) -> None:
        """``""`` is never remembered, other ids and other tokens' keys are uses of their own, and a refused
        use is not remembered."""
        backend = await bench.backend()
        token, other = await put(backend, max_uses=4), await put(backend)
        for use_id in ("a", "", "", "A"):
            assert (await use(backend, token, use_id)).outcome is RIGHT
        assert (await use(backend, token, "late")).outcome is REFUSED
        assert (await use(backend, token, "late")).outcome is REFUSED
        assert (await use(backend, other, "a")).outcome is RIGHT
        for match in (
            by_key(token)._replace(slug="other"),
            by_key(token)._replace(object_id="4"),
            by_key(token)._replace(context=b"c"),
            by_key(token)._replace(digests=(a_digest("nobody"),)),
        ):
            assert (await backend.present(match, Use(at=NOW, use_id="a"), NOW)).outcome is REFUSED

    @case(1)
    async def test_of_concurrent_uses_with_one_id_one_counts(self, bench: Bench) -> None:
        """Of N concurrent uses with the same ``use_id`` one is RIGHT and the others REPLAYED, on the last use
        too."""
        backends = await bench.two_backends()
        for number in range(self.rounds):
            token = await put(backends[0], max_uses=(1, 99, None)[number % 3])
            calls = [use(backends[n % 2], token, "same", NOW + n) for n in range(self.tasks)]
            answers = await at_once(calls)
            outcomes = [answer.outcome for answer in answers]
            assert (outcomes.count(RIGHT), outcomes.count(REPLAYED)) == (1, self.tasks - 1)
            stored = await one(backends[0], token)
            assert stored.uses == 1
            assert {answer.used_at for answer in answers if answer.outcome is REPLAYED} == {stored.used_at}

    @case(1)
    async def test_a_use_is_remembered_for_the_origin_of_its_key(self, bench: Bench) -> None:
        """A use is remembered for the ``origin`` of the presented key, before and after it was taken over."""
        backend = await bench.backend()
        old = await put(backend, max_uses=3)
        assert (await use(backend, old, "me", NOW + 1)).outcome is RIGHT
        new = a_token(max_uses=3, created_at=NOW + 2)
        new = await insert(backend, new, InsertMode.REPLACE, keep_until=NOW + MINUTE)
        replaced = await one(backend, old)
        assert await use(backend, old, "me", NOW + 3) == Presented(REPLAYED, replaced, NOW + 1)
        assert (await use(backend, new, "me", NOW + 4)).outcome is RIGHT
        used = await use(backend, old, "you", NOW + 5)
        assert used.outcome is RIGHT
        assert used.token == await one(backend, new)
        assert await use(backend, old, "you", NOW + 6) == Presented(REPLAYED, used.token, NOW + 5)
        assert (await use(backend, new, "you", NOW + 7)).outcome is RIGHT

    @case(1)
    async def test_the_latest_uses_are_remembered(self, bench: Bench) -> None:
        """At least the last 1,000 ``use_id`` values of a token are remembered."""
        backends = await bench.two_backends()
        token = await put(backends[0], max_uses=None)
        names = [f"{n}" for n in range(REMEMBERED_USES)]
        for start in range(0, len(names), 250):
            calls = [use(backends[n % 2], token, name) for n, name in enumerate(names[start : start + 250])]
            assert {answer.outcome for answer in await at_once(calls)} == {RIGHT}
        calls = [use(backends[0], token, name) for name in names]
        assert {answer.outcome for answer in await at_once(calls)} == {REPLAYED}
        assert (await one(backends[1], token)).uses == REMEMBERED_USES

    @case(9)
    async def test_purge_and_erase_forget_uses(self, bench: Bench) -> None:
        """With a purged or erased token, what is remembered of its uses is forgotten: the same id and key
        begin afresh."""
        backend = await bench.backend()
        for way in ("purge", "erase"):
            token = await put(backend, object_id=way)
            assert (await use(backend, token, "me")).outcome is RIGHT
            if way == "purge":
                await backend.purge(NOW + DAY, NOW, 9, 0)
            else:
                await backend.erase("auth.user", way, bytes(16))
            assert await use(backend, token, "me") == Presented(REFUSED)
            assert await insert(backend, token, InsertMode.ADD) == token
            assert (await use(backend, token, "me")).outcome is RIGHT


class OtherContextCases(Suite):
    """Cases of a use that ends tokens of other contexts."""

    @case(2)
    async def test_the_last_use_ends_other_contexts(self, bench: Bench) -> None:
        """The use that ends a token bound to a context ends the active exclusive tokens of that object and
        slug that were issued before it in every other context, and drops their holds."""
        backend = await bench.backend()
        ended = [
            await put(backend, context=b"a", holds=(a_hold("h"),)),
            await put(backend, context=b""),
            await put(backend, context=b"b", expires_at=NOW - 1),
        ]
        kept = [
            await put(backend, context=b"a", is_beside=True),
            await put(backend, context=b"c"),
            await put(backend, context=b"a", slug="other"),
            await put(backend, context=b"a", object_id="4"),
            await put(backend, context=b"a", content_type="auth"),
            await put(backend, context=b"a", state=State.ENDED, ends_at=NOW - 9, holds=(a_hold("h"),)),
        ]
        token = await put(backend, context=b"c", max_uses=2)
        kept.append(await put(backend, context=b"d"))
        before = await find_all(backend)
        first = await use(backend, token, at=NOW + 1)
        assert await find_all(backend) == [first.token if t == token else t for t in before]
        last = await use(backend, token, at=NOW + 2)
        assert last.token is not None
        expected = {t.id: t for t in (*kept, last.token)}
        for other in ended:
            end = min(other.ends_at, NOW + 1)
            expected[other.id] = other._replace(state=State.ENDED, ends_at=end, holds=())
        assert await find_all(backend) == [expected[t.id] for t in before]

    @case(2)
    async def test_without_a_context_others_stay(self, bench: Bench) -> None:
        """The use of a token without a context, or of one beside others, ends no other token."""
        backend = await bench.backend()
        others = [await put(backend, context=context) for context in (b"", b"a", b"b")]
        for fields in ({"context": b""}, {"context": b"c", "is_beside": True}):
            token = await put(backend, **fields)
            assert (await use(backend, token)).outcome is RIGHT
            for other in others:
                assert await one(backend, other) == other


class ResetCases(Suite):
    """Cases of the budgets that a use forgets."""

    @case(8)
    async def test_a_use_forgets_budgets(self, bench: Bench) -> None:
        """The budgets in ``resets`` are forgotten with the use, and with nothing else."""
        backend = await bench.backend()
        mine, yours, other = (a_budget(n, of=1) for n in range(3))
        token = await put(backend, max_uses=2)
        spends = tuple(a_spend(budget, 5) for budget in (mine, yours, other))
        await backend.spend(spends, NOW)
        change = Use(at=NOW, use_id="me", resets=(mine, yours, a_budget("never")))
        wrong = Match(digests=(a_digest("wrong"),))
        assert (await backend.present(wrong, change, NOW)).outcome is REFUSED
        assert None not in await backend.budgets((mine, yours, other))
        assert (await backend.present(by_key(token), change, NOW)).outcome is RIGHT
        assert [state is None for state in await backend.budgets((mine, yours, other))] == [True, True, False]
        await backend.spend(spends[:1], NOW)
        assert (await backend.present(by_key(token), change, NOW)).outcome is REPLAYED
        assert None not in await backend.budgets((mine,))


class PresentLimitCases(Suite):
    """Cases of what a presented key costs."""

    @case(8)
    async def test_a_wrong_key_is_charged(self, bench: Bench) -> None:
        """A wrong key is charged to all spends, which say what is left; one that is expired or inactive is,
        too; a right one, one that is used up and one that is held are not."""
        backend = await bench.backend()
        budget, wide = a_budget("narrow"), a_budget("wide")
        spends = a_spend(budget, 9), a_spend(wide, 20)
        unknown = Match(digests=(a_digest("wrong"),))
        expired, ended = await put(backend, expires_at=NOW - 1), await put(backend, state=State.ENDED)
        key_expired = await put(backend, {"expires_at": NOW - 1}, {})
        charged = [unknown, by_key(expired), by_key(ended), by_key(key_expired), unknown]
        for left, match in zip((8, 7, 6, 5, 4), charged, strict=True):
            answer = await backend.present(match, Use(at=NOW), NOW, spends)
            assert (answer.outcome, answer.spending.left, answer.spending.full) == (REFUSED, left, None)
            until = NOW + MINUTE
            assert [(c.budget, c.until) for c in answer.spending.charges] == [(budget, until), (wide, until)]
        used = await put(backend, state=State.USED, uses=1, ends_at=NOW - 1)
        held = await put(backend, holds=(a_hold("h"),))
        right = await put(backend, max_uses=9)
        free: list[tuple[StoredToken, Outcome]] = [(used, REFUSED), (held, REFUSED), (right, RIGHT)]
        for token, outcome in free:
            answer = await backend.present(by_key(token), None, NOW, spends)
            assert (answer.outcome, answer.spending) == (outcome, answer.spending._replace(charges=()))
            assert answer.spending.left == 4
        for _ in range(2):
            assert (await use(backend, right, "me", spends=spends)).spending.left == 4
        states = await backend.budgets((budget, wide))
        assert [state.spent for state in states if state] == [5, 5]

    @case(8)
    async def test_a_full_limit_compares_nothing(self, bench: Bench) -> None:
        """Where one of the spends is full, the answer is LIMITED, whatever the key: nothing is changed or
        charged, and the one that stays full the longest is named."""
        backend = await bench.backend()
        token = await put(backend, max_uses=9)
        budgets = [a_budget(n) for n in range(4)]
        windows = [MINUTE, 3 * MINUTE, 2 * MINUTE, 9 * MINUTE]
        spends = tuple(a_spend(b, 1, window) for b, window in zip(budgets, windows, strict=True))
        await backend.spend(spends[:3], NOW)
        changes = (None, Use(at=NOW), Use(at=NOW, use_id="me"), Hold(hold_id="h", until=NOW + 9))
        for match in (by_key(token), Match(digests=(a_digest("wrong"),))):
            for change in changes:
                answer = await backend.present(match, change, NOW + 1, spends)
                assert (answer.outcome, answer.token) == (LIMITED, None)
                spending = answer.spending
                assert (spending.full, spending.until, spending.charges) == (1, NOW + 3 * MINUTE, ())
        assert await one(backend, token) == token
        assert (await backend.budgets(tuple(budgets[3:]))) == [None]

    @case(8)
    async def test_a_repeated_use_comes_before_the_limit(self, bench: Bench) -> None:
        """A use that was counted is REPLAYED though the limit is full."""
        backend = await bench.backend()
        token = await put(backend)
        spends = (a_spend(a_budget("full")),)
        assert (await use(backend, token, "me", spends=spends)).outcome is RIGHT
        await backend.spend(spends, NOW)
        assert (await use(backend, token, "me", spends=spends)).outcome is REPLAYED
        assert (await use(backend, token, "you", spends=spends)).outcome is LIMITED

    @case(8)
    async def test_wrong_keys_at_once_hold_the_limit(self, bench: Bench) -> None:
        """Of N wrong keys at once as many are compared as the limit allows, and a right one among them is
        right or limited, and costs nothing."""
        backends = await bench.two_backends()
        token = await put(backends[0], max_uses=None)
        wrong = Match(digests=(a_digest("wrong"),))
        for number in range(self.rounds):
            spends = (a_spend(a_budget(number), 5), a_spend(a_budget(f"wide {number}"), 99))
            keys = [by_key(token) if n == number else wrong for n in range(self.tasks * 2)]
            answers = await at_once(backends[n % 2].present(k, None, NOW, spends) for n, k in enumerate(keys))
            outcomes = [answer.outcome for answer in answers]
            assert outcomes[number] in (RIGHT, LIMITED)
            assert outcomes.count(REFUSED) == 5
            states = await backends[0].budgets(tuple(spend.budget for spend in spends))
            assert [state.spent for state in states if state] == [5, 5]

    @case(8)
    async def test_the_right_key_twice_on_the_last_attempt(self, bench: Bench) -> None:
        """The right key presented twice at once on the last attempt that is left gives one use, and with one
        ``use_id`` one answer: neither is limited by the other."""
        backends = await bench.two_backends()
        for number in range(self.rounds):
            token = await put(backends[0])
            spends = (a_spend(a_budget(number), 2),)
            await backends[0].spend(spends, NOW)
            use_id = "same" if number % 2 else ""
            answers = await at_once(
                use(backends[n * (number // 2 % 2)], token, use_id, spends=spends) for n in range(2)
            )
            assert {a.outcome for a in answers} == {RIGHT, REPLAYED if use_id else REFUSED}
            (state,) = await backends[1].budgets((spends[0].budget,))
            assert state is not None
            assert state.spent == 1

    @case(8)
    async def test_right_keys_at_once_pass_a_small_limit(self, bench: Bench) -> None:
        """N right keys of N tokens, presented at once under a limit far smaller than N that they share, are
        all right, whatever is done with them and beside a wrong one: nobody stands in another's way."""
        backends = await bench.two_backends()
        for number in range(self.rounds):
            shared = a_spend(a_budget(f"address {number}"), 2), a_spend(a_budget(f"tenant {number}"), 3)
            tokens = [await put(backends[0], object_id=f"{number}-{n}") for n in range(self.tasks * 2)]
            calls = [backends[0].present(Match(digests=(a_digest("wrong"),)), None, NOW, shared)]
            for n, token in enumerate(tokens):
                changes = Use(at=NOW), Use(at=NOW, use_id=token.id), Hold(token.id, NOW + MINUTE), None
                own = a_spend(a_budget("own", of=token.object_id), 1)
                calls.append(backends[n // 4 % 2].present(by_key(token), changes[n % 4], NOW, (*shared, own)))
            wrong, *answers = await at_once(calls)
            assert wrong.outcome is REFUSED
            assert {answer.outcome for answer in answers} == {RIGHT}
            states = await backends[0].budgets(tuple(spend.budget for spend in shared))
            assert [state.spent for state in states if state] == [1, 1]

    @case(8)
    async def test_a_right_key_beside_wrong_ones_that_another_limit_refuses(self, bench: Bench) -> None:
        """Of N wrong keys at once most are refused by a narrow limit. They never fill a wide one, which they
        share with right keys: those are all right."""
        backends = await bench.two_backends()
        for number in range(self.rounds):
            wide = a_spend(a_budget(f"address {number}"), 4)
            tenants = [a_spend(a_budget(f"tenant {number} {n}"), 3) for n in range(2)]
            own = a_spend(a_budget("own", of=number), 2)
            wrong = Match(digests=(a_digest("wrong"),))
            tokens = [await put(backends[0], object_id=f"{number}-{n}") for n in range(self.tasks)]
            narrow = own if number % 2 else tenants[0]
            calls = [backends[n % 2].present(wrong, None, NOW, (wide, narrow)) for n in range(self.tasks)] + [
                backends[n % 2].present(by_key(token), Use(at=NOW), NOW, (wide, tenants[1]))
                for n, token in enumerate(tokens)
            ]
            outcomes = [answer.outcome for answer in await at_once(calls)]
            assert outcomes[self.tasks :] == [RIGHT] * self.tasks
            assert outcomes[: self.tasks].count(REFUSED) == narrow.limit
            states = await backends[0].budgets((wide.budget, narrow.budget))
            assert [state.spent for state in states if state] == [narrow.limit] * 2
