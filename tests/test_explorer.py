"""The manager's calls in every order of their steps; and the explorer, on managers with a planted fault."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import pytest

from vtoken import redeeming
from vtoken.backend import Hold, InsertMode, Match, Outcome, Presented, Release, Spend, TokenBackend, Use
from vtoken.issuing import Issued, Issuer, IssueRequest
from vtoken.redeeming import PresentedKey, Redeemer
from vtoken.testing.model import explorer
from vtoken.testing.model.explorer import ACTORS, Actor, Scene, explore

SCENES = {scene.name: scene for scene in explorer.SCENES}
BY_NAME = {actor.name: actor for actor in ACTORS}


def violations(scene: Scene, meetings: Iterable[tuple[Actor, ...]]) -> tuple[int, list[str]]:
    """How many schedules were played, and which of them ended as no order of whole calls does."""
    outcomes = [explore(scene, actors) for actors in meetings]
    return sum(outcome.schedules for outcome in outcomes), [w for outcome in outcomes for w in outcome.wrong]


@pytest.mark.parametrize(("number", "scene"), list(enumerate(SCENES.values())), ids=SCENES)
def test_every_two_calls_have_an_order(number: int, scene: Scene) -> None:
    """Every two in one of the scenes."""
    schedules, wrong = violations(scene, islice(explorer.pairs(), number, None, len(SCENES)))
    assert not wrong, "\n".join(wrong[:3])
    assert schedules > 150


@pytest.mark.long
@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES)
def test_every_two_calls_have_an_order_in_every_scene(scene: Scene) -> None:
    schedules, wrong = violations(scene, explorer.pairs())
    assert not wrong, "\n".join(wrong[:3])
    assert schedules > 800


@pytest.mark.long
@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES)
def test_chosen_three_calls_have_an_order(scene: Scene) -> None:
    schedules, wrong = violations(scene, explorer.triples())
    assert not wrong, "\n".join(wrong[:3])
    assert schedules > 150


def test_a_look_before_the_write_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    issue = Issuer.issue

    async def careless(
        self: Issuer, store: TokenBackend, request: IssueRequest, mode: InsertMode, **named: Any
    ) -> Issued:
        """Trusts that there is still no valid token, as somebody has looked just now."""
        mode = InsertMode.REPLACE if mode is InsertMode.IF_NONE_VALID else mode
        return await issue(self, store, request, mode, **named)

    async def nothing(stage: explorer.Stage) -> None:
        pass

    scene = SCENES["a link"]._replace(prepare=nothing)
    meeting = BY_NAME["get or create"], BY_NAME["get or create"]
    assert not explore(scene, meeting).wrong
    monkeypatch.setattr(Issuer, "issue", careless)
    assert explore(scene, meeting).wrong


def test_a_refund_after_the_answer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    present = Redeemer.present

    class ChargesFirst:
        """A store that the manager charges first, and has give back what a right key cost."""

        def __init__(self, store: TokenBackend) -> None:
            self._store = store

        def __getattr__(self, name: str) -> Any:
            return getattr(self._store, name)

        async def present(
            self, key: Any, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
        ) -> Presented:
            spending = await self._store.spend(spends, now)
            if spending.full is not None:
                return Presented(Outcome.LIMITED, spending=spending)
            answer = await self._store.present(key, change, now)
            if answer.outcome is Outcome.RIGHT:
                await self._store.refund(spending.charges)
            return answer._replace(spending=spending)

    class Calls:
        def __init__(self, calls: Any) -> None:
            self._calls = calls

        def __enter__(self) -> Any:
            return ChargesFirst(self._calls.__enter__())

        def __exit__(self, *error: Any) -> Any:
            return self._calls.__exit__(*error)

    async def charging(self: Redeemer, key: PresentedKey, change: Any, **named: Any) -> Any:
        calls = self.opening.calls
        monkeypatch.setattr(self.opening, "calls", lambda: Calls(calls()))
        try:
            return await present(self, key, change, **named)
        finally:
            monkeypatch.setattr(self.opening, "calls", calls)

    scene = SCENES["a code on its last attempt"]
    meeting = BY_NAME["consume"], BY_NAME["check"]
    assert not explore(scene, meeting).wrong
    monkeypatch.setattr(redeeming.Redeemer, "present", charging)
    assert explore(scene, meeting).wrong


def test_a_hold_that_is_not_looked_at_again_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that uses the token without asking whether its hold is still there."""

    async def trusting(self: redeeming.Redemption) -> None:
        assert self.stored is not None
        with self.redeemer.opening.calls() as store:
            found = await store.find(Match(id=self.stored.id), 1)
            if found and found[0].holds:
                digests = (found[0].keys[0].digest,)
                await store.update(Match(id=self.stored.id), Release(self.hold_id))
                await store.present(Match(digests=digests), Use(at=self.redeemer.now()), 0)

    scene = SCENES["a link"]
    meeting = BY_NAME["redeem"], BY_NAME["consume"]
    assert not explore(scene, meeting).wrong
    monkeypatch.setattr(redeeming.Redemption, "_use", trusting)
    assert explore(scene, meeting).wrong
