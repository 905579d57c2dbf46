"""Long random histories of all methods, one call at a time, beside the reference store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from vtoken.backend import (
    PRETENDED,
    Charge,
    ForgetKey,
    Hold,
    InsertMode,
    Match,
    Presented,
    Release,
    SetExtraData,
    Spend,
    State,
    Use,
    UseHeld,
)
from vtoken.testing.harness import (
    MINUTE,
    NOW,
    Bench,
    Suite,
    a_budget,
    a_digest,
    a_spend,
    a_token,
    case,
    dice,
    find_all,
)
from vtoken.testing.model.serial import Call, call
from vtoken.testing.model.store import ReferenceStore

OBJECTS: Final = ("1", "2")
BUDGETS: Final = tuple(a_budget(n, of=n % 3 or None) for n in range(4))
HOLDS: Final = ("a", "b", "c")


class Storyteller:
    """Makes up the next call, mostly about what is there.

    Args:
        seed: of all choices.
        reference: what is there.
    """

    def __init__(self, seed: int, reference: ReferenceStore) -> None:
        self._dice = dice(seed)
        self._reference = reference
        self._charges: list[Charge] = []
        self.now = NOW
        self._calls: list[Callable[[], Call]] = [
            *[self._insert] * 6,
            *[self._present] * 8,
            *[self._update] * 5,
            *[self._deactivate] * 2,
            *[self._budget] * 3,
            self._sweep,
        ]

    def next(self) -> Call:
        """Another call, some time later."""
        self.now += self._dice.choice([0, 0, 1, 500, 20_000, MINUTE])
        return self._dice.choice(self._calls)()

    def heard(self, answer: Any) -> None:
        """What the last call was answered: its charges may be given back later."""
        spending = getattr(answer, "spending", answer)
        self._charges += getattr(spending, "charges", ())

    def _insert(self) -> Call:
        pick = self._dice
        expires = self.now + pick.choice([-1, 0, 30_000, 5 * MINUTE, 60 * MINUTE])
        mode = pick.choice([*InsertMode, InsertMode.REPLACE, InsertMode.REPLACE])
        keys: list[dict[str, Any]] = [{"expires_at": expires, "plain_key": pick.choice(["", "k"])}]
        if pick.random() < 0.4:
            code = a_digest(f"code {pick.randint(1, 6)}")
            keys.append({"digest": code, "kind": "code", "expires_at": min(expires, self.now + MINUTE)})
        token = a_token(
            *keys,
            content_type=pick.choice(["auth.user", "auth.user", PRETENDED]),
            object_id=pick.choice(OBJECTS),
            slug=pick.choice(["reset", "reset", ""]),
            context=pick.choice([b"", b"", b"c" * 32]),
            is_beside=mode is InsertMode.ADD,
            created_at=self.now,
            expires_at=expires,
            state=pick.choice([State.ACTIVE] * 6 + [State.ENDED]),
            extra_data=pick.choice([None, None, "{}"]),
            max_uses=pick.choice([1, 2, 3, None]),
        )
        return call(
            "insert",
            "insert",
            token,
            mode,
            keep_until=pick.choice([0, 0, self.now + MINUTE]),
            wanted_until=self.now + pick.choice([0, MINUTE]) if mode is InsertMode.IF_NONE_VALID else 0,
            also_taken=pick.choice([(), (a_digest("code 1"),)]),
            spends=self._spends(),
        )

    def _present(self) -> Call:
        pick = self._dice
        use_id = pick.choice(["", "", "me", "you"])
        change = pick.choice(
            [
                None,
                Use(at=self.now, use_id=use_id),
                Use(at=self.now, use_id=use_id, resets=BUDGETS[:2]),
                Hold(pick.choice(HOLDS) + str(self.now), self.now + pick.choice([1, 9_000, MINUTE]), use_id),
            ]
        )
        match = self._some_key()._replace(kind=pick.choice([None, None, "link", "code"]))
        if pick.random() < 0.1:
            match = match._replace(context=b"")
        return call("present", "present", match, change, self.now, spends=self._spends())

    def _update(self) -> Call:
        pick = self._dice
        holds = [hold.hold_id for token in self._reference.tokens.values() for hold in token.holds]
        hold_id = pick.choice(holds or HOLDS)
        holders = [t.id for t in self._reference.tokens.values() if hold_id in {h.hold_id for h in t.holds}]
        match = Match(id=pick.choice(holders)) if holders and pick.random() < 0.9 else self._some_key()
        change = pick.choice(
            [
                UseHeld(hold_id, self.now, pick.choice(["", "me", "you"]), BUDGETS[:1]),
                UseHeld(hold_id, self.now),
                Release(hold_id),
                SetExtraData(pick.choice([None, "{}", "{ }"])),
                ForgetKey(),
            ]
        )
        return call("update", "update", match, change)

    def _deactivate(self) -> Call:
        pick = self._dice
        holds = [hold.hold_id for token in self._reference.tokens.values() for hold in token.holds]
        match = pick.choice(
            [
                self._some_key(),
                Match(content_type="auth.user", object_id=pick.choice(OBJECTS)),
                Match(object_id=pick.choice(OBJECTS), slug="reset", active=True),
                self._some_key()._replace(active=True, valid_at=self.now),
            ]
        )
        return call("deactivate", "deactivate", match, self.now, tuple(holds[:1]))

    def _budget(self) -> Call:
        pick = self._dice
        if pick.random() < 0.4 and self._charges:
            return call("refund", "refund", tuple(pick.choices(self._charges[-4:], k=2)))
        if pick.random() < 0.2:
            budget = pick.choice(BUDGETS)
            return call("reset", "reset", budget.object, pick.choice([None, (budget.name,)]))
        return call("spend", "spend", self._spends(always=True), self.now)

    def _sweep(self) -> Call:
        pick = self._dice
        if pick.random() < 0.2:
            return call("erase", "erase", "auth.user", pick.choice(OBJECTS), BUDGETS[1].object)
        before = self.now - pick.choice([0, MINUTE])
        return call("purge", "purge", before, self.now, 9_999, before - MINUTE)

    def _some_key(self) -> Match:
        pick = self._dice
        tokens = [token for token in self._reference.tokens.values() if token.keys]
        if not tokens or pick.random() < 0.1:
            return Match(digests=(a_digest("nobody"),))
        token = pick.choice(tokens[-6:])
        match = Match(digests=(pick.choice(token.keys).digest,), object_id=token.object_id)
        return match._replace(content_type=token.content_type, slug=token.slug)

    def _spends(self, always: bool = False) -> tuple[Spend, ...]:
        pick = self._dice
        if not always and pick.random() < 0.5:
            return ()
        budgets = pick.sample(BUDGETS, pick.randint(1, 2))
        return tuple(a_spend(budget, pick.choice([1, 3]), 20_000, 60_000) for budget in budgets)


class HistoryCases(Suite):
    """Cases of long histories."""

    @case(14)
    async def test_a_long_history_follows_the_reference(self, bench: Bench) -> None:
        """Each of a long row of calls of all methods answers what the reference store answers, and leaves
        what it leaves."""
        backends = await bench.two_backends()
        for seed in range(max(1, self.rounds // 4)):
            reference = ReferenceStore()
            story = Storyteller(seed, reference)
            for step in range(150):
                told = story.next()
                expected = told.by(reference)
                answer = await told.on(backends[step % 2])
                story.heard(expected)
                assert _as_told(answer) == _as_told(expected), f"step {step} of {seed}: {told!r}"
                stored = await find_all(backends[(step + 1) % 2])
                assert stored == reference.find(Match(), 9_999), f"after step {step} of {seed}: {told!r}"
                assert await backends[step % 2].budgets(BUDGETS) == reference.budgets(BUDGETS), told
                if step % 10 == 0:
                    assert sorted(await backends[0].count(story.now)) == sorted(reference.count(story.now))
            await backends[0].deactivate(Match(), 0)
            await backends[0].purge(NOW * 2, NOW, 9_999, NOW * 2)


def _as_told(answer: Any) -> Any:
    """Without what is left after a use that forgets budgets, which may be told as before or after it."""
    if isinstance(answer, Presented):
        return answer._replace(spending=answer.spending._replace(left=None))
    return answer
