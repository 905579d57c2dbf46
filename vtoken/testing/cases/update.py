"""The protocol's sentences about ``update``: what is known by its id or by a hold."""

from __future__ import annotations

from typing import Any

from vtoken.backend import (
    STALE_HOLD,
    Change,
    ForgetKey,
    Match,
    Outcome,
    Presented,
    Release,
    SetExtraData,
    State,
    StoredHold,
    Use,
    UseHeld,
)
from vtoken.testing.cases.present import a_hold, use
from vtoken.testing.cases.strings import UNICODE
from vtoken.testing.harness import (
    MINUTE,
    NOW,
    Bench,
    Suite,
    a_budget,
    a_digest,
    a_spend,
    at_once,
    by_key,
    case,
    find_all,
    one,
    put,
)

MINE = a_hold("mine", NOW + 10)


class UpdateCases(Suite):
    """Cases of the changes that ``update`` makes."""

    @case(1)
    async def test_a_use_of_what_is_held(self, bench: Bench) -> None:
        """``UseHeld`` counts the use, drops its hold and no other, and ends the token with its last use."""
        backend = await bench.backend()
        other, over = a_hold("other"), a_hold("over", NOW - 9)
        token = await put(backend, {}, {"kind": "code"}, max_uses=2, holds=(over, MINE, other))
        used = await backend.update(Match(id=token.id), UseHeld(hold_id="mine", at=NOW + 9))
        expected = token._replace(uses=1, used_at=NOW + 9, holds=(over, other))
        assert used == expected == await one(backend, token)
        used = await backend.update(by_key(token, 1), UseHeld(hold_id="other", at=NOW + 10))
        expected = expected._replace(
            uses=2, used_at=NOW + 10, state=State.USED, ends_at=NOW + 9, holds=(over,)
        )
        assert used == expected == await one(backend, token)

    @case(1)
    async def test_a_hold_is_used_while_it_runs(self, bench: Bench) -> None:
        """``UseHeld`` matches while the very hold is there and runs at its time, not for another one, nor
        when it has run out, is stale, was dropped or was used."""
        backend = await bench.backend()
        token = await put(backend, holds=(MINE,), max_uses=9)
        misses = [("mine", NOW + 10), ("mine", NOW + 10 - STALE_HOLD - 1), ("Mine", NOW), ("", NOW)]
        for name, at in misses:
            assert await backend.update(Match(id=token.id), UseHeld(hold_id=name, at=at)) is None
        assert await one(backend, token) == token
        for at in (NOW + 9, NOW + 9):
            used = await backend.update(Match(id=token.id), UseHeld(hold_id="mine", at=at))
            token = used or token
        assert (token.uses, token.holds) == (1, ())

    @case(1)
    async def test_a_hold_does_not_outlive_the_uses(self, bench: Bench) -> None:
        """``UseHeld`` finds no use where others have made them all, as they may have where their clock is
        ahead and the hold had run out by it."""
        backend = await bench.backend()
        for max_uses in (1, 2):
            token = await put(backend, holds=(MINE,), max_uses=max_uses)
            for _ in range(max_uses):
                answer = await backend.present(by_key(token), Use(at=NOW + 10), NOW + 10)
                assert answer.outcome is Outcome.RIGHT
            used = await one(backend, token)
            assert await backend.update(Match(id=token.id), UseHeld(hold_id="mine", at=NOW + 9)) is None
            assert (
                await one(backend, token)
                == used
                == token._replace(uses=max_uses, used_at=NOW + 10, state=State.USED, ends_at=NOW + 9)
            )

    @case(2)
    async def test_a_hold_outlives_what_ended_its_token(self, bench: Bench) -> None:
        """A token that expired, was replaced, or was deactivated with its hold spared is still used once; its
        state becomes USED only with its last use, and ``ends_at`` never grows."""
        backend = await bench.backend()
        ends: list[dict[str, Any]] = [
            {"expires_at": NOW - 5},
            {"state": State.REPLACED, "ends_at": NOW - 5},
            {"state": State.ENDED, "ends_at": NOW - 5},
        ]
        for fields in ends:
            for max_uses in (1, 2, None):
                token = await put(backend, max_uses=max_uses, holds=(MINE,), **fields)
                used = await backend.update(Match(id=token.id), UseHeld(hold_id="mine", at=NOW))
                state = State.USED if max_uses == 1 else token.state
                expected = token._replace(uses=1, used_at=NOW, holds=(), state=state)
                assert used == expected == await one(backend, token)

    @case(1)
    async def test_a_use_of_what_is_held_is_remembered(self, bench: Bench) -> None:
        """The ``use_id`` of a ``UseHeld`` is remembered for the origin of the key that the hold was taken
        with; budgets are forgotten with it."""
        backend = await bench.backend()
        budget = a_budget("attempts", of=1)
        old = f"{1:016x}"
        hold = StoredHold(hold_id="mine", until=NOW + 10, use_id="me", origin=old)
        token = await put(backend, {}, {"origin": old}, max_uses=3, holds=(hold,))
        await backend.spend((a_spend(budget),), NOW)
        change = UseHeld(hold_id="mine", at=NOW + 1, use_id=UNICODE, resets=(budget,))
        used = await backend.update(Match(id=token.id), change)
        assert await backend.budgets((budget,)) == [None]
        replay = await backend.present(by_key(token, 1), Use(at=NOW + 2, use_id=UNICODE), NOW + 2)
        assert replay == Presented(Outcome.REPLAYED, used, NOW + 1)
        assert (await use(backend, token, UNICODE)).outcome is Outcome.RIGHT

    @case(2)
    async def test_a_use_of_what_is_held_ends_other_contexts(self, bench: Bench) -> None:
        """The last use of a token that is bound to a context, through a hold, ends the older tokens of other
        contexts as any other use does."""
        backend = await bench.backend()
        other = await put(backend, context=b"a")
        token = await put(backend, context=b"b", holds=(MINE,))
        assert await backend.update(Match(id=token.id), UseHeld(hold_id="mine", at=NOW)) is not None
        assert (await one(backend, other)).state is State.ENDED

    @case(1)
    async def test_giving_back_changes_nothing_else(self, bench: Bench) -> None:
        """``Release`` drops its hold, run out or not, on a token in any state, revives nothing, and matches
        only where the hold is there."""
        backend = await bench.backend()
        for state in State:
            for hold in (MINE, MINE._replace(until=NOW - 5), MINE._replace(until=NOW * 2)):
                other = a_hold("other")
                fields: dict[str, Any] = {} if state is State.ACTIVE else {"ends_at": NOW - 9, "uses": 1}
                token = await put(backend, state=state, holds=(other, hold), max_uses=2, **fields)
                released = await backend.update(Match(id=token.id), Release(hold_id="mine"))
                assert released == token._replace(holds=(other,)) == await one(backend, token)
                assert await backend.update(Match(id=token.id), Release(hold_id="mine")) is None
                assert await one(backend, token) == released

    @case(1)
    async def test_of_concurrent_ends_of_a_hold_one_wins(self, bench: Bench) -> None:
        """Of N concurrent uses and releases of one hold, and of its revocation, exactly one finds it."""
        backends = await bench.two_backends()
        for number in range(self.rounds):
            token = await put(backends[0], holds=(MINE,), max_uses=2)
            changes: list[Change] = [UseHeld(hold_id="mine", at=NOW), Release(hold_id="mine")]
            calls = [
                backends[(n + number) % 2].update(Match(id=token.id), changes[n // 2 % 2])
                for n in range(self.tasks)
            ]
            revoked, won = await at_once(
                [backends[number % 2].deactivate(by_key(token), NOW), _wins(at_once(calls))]
                if number % 2
                else [backends[0].ping(), _wins(at_once(calls))]
            )
            stored = await one(backends[1], token)
            assert won == 1 or (revoked and not won)
            assert (stored.holds, stored.uses <= 1) == ((), True)

    @case(11)
    async def test_a_change_touches_its_own_fields_alone(self, bench: Bench) -> None:
        """Extra data and the forgotten keys set what they name and nothing else, on one token, in any
        state."""
        backend = await bench.backend()
        other = await put(backend, {"plain_key": "other"})
        for state in State:
            keys: list[dict[str, Any]] = [
                {"plain_key": "k", "nonce": "n"},
                {"plain_key": "c", "kind": "code"},
            ]
            token = await put(backend, *keys, context=b"c", max_uses=3, uses=1, state=state, holds=(MINE,))
            changes: list[tuple[Change, dict[str, Any]]] = [
                (SetExtraData('{"a": 1}'), {"extra_data": '{"a": 1}'}),
                (SetExtraData(""), {"extra_data": ""}),
                (SetExtraData(UNICODE + "x" * 16_000), {"extra_data": UNICODE + "x" * 16_000}),
                (SetExtraData(None), {"extra_data": None}),
                (ForgetKey(), {"keys": tuple(key._replace(plain_key="") for key in token.keys)}),
            ]
            for change, fields in changes:
                token = token._replace(**fields)
                for match in (by_key(token), by_key(token, 1), Match(id=token.id)):
                    assert await backend.update(match, change) == token
                    assert await one(backend, token) == token
        assert await one(backend, other) == other

    @case(1)
    async def test_a_save_beside_a_use_loses_neither(self, bench: Bench) -> None:
        """Changes of different fields at once all happen: none writes back what another has changed."""
        backends = await bench.two_backends()
        for number in range(self.rounds):
            token = await put(
                backends[0], {"plain_key": "k"}, max_uses=99, holds=(MINE, a_hold("other")), context=b"c"
            )
            own = Match(id=token.id)
            calls = [
                backends[0].update(own, SetExtraData("saved")),
                backends[1].update(own, UseHeld(hold_id="mine", at=NOW + 1)),
                backends[number % 2].update(own, ForgetKey()),
                backends[1].update(own, Release(hold_id="other")),
            ]
            others = [use(backends[n % 2], token, at=NOW + 1) for n in range(3)]
            await at_once([_wins(at_once(calls)), _wins(at_once(others))])
            key = token.keys[0]._replace(plain_key="")
            assert await one(backends[0], token) == token._replace(
                extra_data="saved", uses=4, used_at=NOW + 1, holds=(), keys=(key,)
            )

    @case(1)
    async def test_what_does_not_match_is_not_changed(self, bench: Bench) -> None:
        """``update`` answers ``None`` where no token matched, and nothing changed."""
        backend = await bench.backend()
        token = await put(backend, {"plain_key": "k"}, context=b"c", holds=(MINE,))
        own = by_key(token)
        matches = [
            Match(id=f"{0:016x}"),
            Match(digests=()),
            Match(digests=(a_digest("nobody"),)),
            own._replace(id=f"{0:016x}"),
            own._replace(content_type="auth"),
            own._replace(object_id="4"),
            own._replace(slug=""),
            own._replace(slug="reset "),
            own._replace(context=b""),
            own._replace(kind="code"),
            own._replace(valid_at=token.expires_at + 1),
        ]
        changes: list[Change] = [
            UseHeld(hold_id="mine", at=NOW),
            Release(hold_id="mine"),
            SetExtraData("x"),
            ForgetKey(),
        ]
        for match in matches:
            for change in changes:
                assert await backend.update(match, change) is None, match._asdict()
        assert await find_all(backend) == [token]
        valid = own._replace(valid_at=token.expires_at)
        assert await backend.update(valid, UseHeld(hold_id="mine", at=NOW)) is not None
        for gone in (own._replace(active=True), own._replace(valid_at=NOW)):
            assert await backend.update(gone, SetExtraData("x")) is None


async def _wins(answers: Any) -> int:
    """How many of the answers are not None."""
    return sum(answer is not None for answer in await answers)


class DeactivateCases(Suite):
    """Cases of ``deactivate``."""

    @case(2)
    async def test_deactivate_ends_every_match(self, bench: Bench) -> None:
        """``deactivate`` ends every matching token that is active, drops the holds of all that match, and
        says how many it ended; nothing else changes."""
        backend = await bench.backend()
        active = [
            await put(backend),
            await put(backend, expires_at=NOW - 9),
            await put(backend, slug="", holds=(MINE, a_hold("other")), extra_data="x", max_uses=5, uses=2),
            await put(backend, context=b"c", is_beside=True),
        ]
        over = [
            await put(backend, state=State.REPLACED, ends_at=NOW - 1, holds=(MINE,)),
            await put(backend, state=State.USED, ends_at=NOW - 1, uses=1),
        ]
        others = [await put(backend, object_id="43", holds=(MINE,)), await put(backend, content_type="auth")]
        match = Match(content_type="auth.user", object_id="42")
        assert await backend.deactivate(match, NOW + 10) == len(active)
        expected = [
            token._replace(state=State.ENDED, ends_at=min(token.ends_at, NOW + 9), holds=())
            for token in active
        ]
        expected += [token._replace(holds=()) for token in over]
        assert await find_all(backend) == [*expected, *others][::-1]
        assert await backend.deactivate(match, NOW + 20) == 0
        assert await backend.deactivate(Match(content_type="auth.user", slug="reset"), NOW + 20) == 1
        assert await backend.deactivate(Match(), NOW + 20) == 1

    @case(2)
    async def test_deactivate_spares_named_holds(self, bench: Bench) -> None:
        """Holds that are spared go on, on tokens that it ends and on those that had ended, and can be used;
        all others are revoked."""
        backend = await bench.backend()
        holds = (a_hold("a"), MINE, a_hold("b"))
        active = await put(backend, holds=holds, max_uses=9)
        over = await put(backend, holds=holds, max_uses=9, state=State.REPLACED, ends_at=NOW - 1)
        assert await backend.deactivate(Match(object_id="42"), NOW, ("mine", "not there")) == 1
        for token in (active, over):
            stored = await one(backend, token)
            assert (stored.holds, stored.is_active) == ((MINE,), False)
            assert await backend.update(Match(id=token.id), UseHeld(hold_id="a", at=NOW)) is None
            assert await backend.update(Match(id=token.id), UseHeld(hold_id="mine", at=NOW)) is not None

    @case(2)
    async def test_deactivate_by_a_key(self, bench: Bench) -> None:
        """By one of its own keys the whole token ends; by a key that it took over only that key does, for a
        clock that is behind as well, and it counts if it was still good."""
        backend = await bench.backend()
        token = await put(
            backend, {}, {"origin": f"{1:016x}"}, {"kind": "code"}, max_uses=9, holds=(a_hold("h"),)
        )
        own, taken, code = token.keys
        assert await backend.deactivate(by_key(token, 1), NOW + 5) == 1
        token = token._replace(keys=(own, taken._replace(expires_at=0), code))
        assert await one(backend, token) == token
        for at in (NOW + 5, NOW + 9):
            assert await backend.deactivate(by_key(token, 1), at) == 0
        assert await one(backend, token) == token
        for place, outcome in ((0, Outcome.RIGHT), (1, Outcome.REFUSED), (2, Outcome.RIGHT)):
            for now in (NOW, NOW + 5):
                assert (await backend.present(by_key(token, place), None, now)).outcome is outcome
        assert await backend.deactivate(by_key(token, 2), NOW + 6) == 1
        token = token._replace(state=State.ENDED, ends_at=NOW + 5, holds=())
        assert await one(backend, token) == token
        ended = await put(backend, {}, {"origin": f"{1:016x}"}, state=State.ENDED, ends_at=NOW - 1)
        assert await backend.deactivate(by_key(ended, 1), NOW) == 0

    @case(6)
    async def test_deactivate_minds_every_field(self, bench: Bench) -> None:
        """Where one field of the ``Match`` does not hold, nothing is ended."""
        backend = await bench.backend()
        token = await put(backend, context=b"c", holds=(MINE,))
        own = by_key(token)
        for other in (
            own._replace(digests=()),
            own._replace(digests=(a_digest("nobody"),)),
            own._replace(content_type="auth"),
            own._replace(object_id="4"),
            own._replace(slug=""),
            own._replace(context=b""),
            own._replace(kind="code"),
            own._replace(id=f"{0:016x}"),
            own._replace(valid_at=token.expires_at + 1),
        ):
            assert await backend.deactivate(other, NOW) == 0
        assert await find_all(backend) == [token]
        assert await backend.deactivate(own._replace(valid_at=NOW, active=True, kind="link"), NOW) == 1
        assert await backend.deactivate(own._replace(active=True), NOW) == 0

    @case(2)
    async def test_concurrent_deactivations_count_a_token_once(self, bench: Bench) -> None:
        """Of N concurrent deactivations one counts a token."""
        backends = await bench.two_backends()
        for number in range(self.rounds):
            for _ in range(3):
                await put(backends[0], object_id=f"d{number}")
            match = Match(object_id=f"d{number}")
            calls = [backends[n % 2].deactivate(match, NOW + MINUTE) for n in range(self.tasks)]
            assert sum(await at_once(calls)) == 3
