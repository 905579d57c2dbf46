"""Guarantees 1, 2, 3 and 12 through the manager: one winner, one valid token, one view of the store."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Final

from vtoken.backend import Match
from vtoken.errors import AlreadyUsed, InvalidInput, InvalidToken, KeyGenerationError, OutcomeUnknown
from vtoken.hooks import TokenEvent
from vtoken.manager import TokenManager
from vtoken.policy import Settings, TokenPolicy
from vtoken.subject import Subject
from vtoken.testing.harness import SECRET, USER, Bench, Suite, at_once, case, put, race, refused
from vtoken.token import VerificationToken

MINUTE: Final = timedelta(minutes=1)
MILLISECOND: Final = timedelta(milliseconds=1)


async def active_ids(manager: TokenManager, subject: Subject = USER, slug: Any = "reset") -> list[str]:
    """The ids of the active tokens; nothing expires in these cases."""
    return [token.id async for token in manager.filter_active_tokens(subject, slug)]


async def stored_as(manager: TokenManager, token: VerificationToken) -> VerificationToken:
    """The token as it is stored now."""
    found = await manager.get(token.id)
    assert found is not None
    return found


def _match(subject: Subject, slug: str) -> Match:
    return Match(content_type=subject.content_type, object_id=str(subject.object_id), slug=slug)


class OnceCases(Suite):
    """Cases of tokens that are used."""

    @case(1)
    async def test_consume_works_once(self, bench: Bench) -> None:
        """A key is consumed once; afterwards it is "used", whatever is asked, and a check before consumes
        nothing."""
        manager = await bench.manager()
        issued = await manager.issue(USER, "reset")
        for _ in range(3):
            assert (await manager.verify(USER, "reset", issued.key)).is_active
            assert await manager.exists_valid(USER, "reset", issued.key)
        used = await manager.consume(USER, "reset", issued.key)
        assert used == issued
        assert (used.is_active, used.uses, used.is_replay) == (False, 1, False)
        for call in (manager.consume, manager.verify):
            error = await refused(InvalidToken, call(USER, "reset", issued.key))
            assert (error.reason, error.token) == ("used", issued)
        assert not await manager.exists_valid(USER, "reset", issued.key)
        assert not await manager.exists_valid(USER)
        assert await active_ids(manager) == []

    @case(1)
    async def test_of_concurrent_consumers_one_wins(self, bench: Bench) -> None:
        """Of N concurrent consumers, in two managers on two backends of one store, exactly one wins."""
        managers = await bench.two_managers()
        for _ in range(self.rounds):
            issued = await managers[0].issue(USER, "reset")
            won, lost = await race(
                [managers[n % 2].consume(USER, "reset", issued.key) for n in range(self.tasks)], InvalidToken
            )
            assert won == [issued]
            assert {error.reason for error in lost} == {"used"}

    @case(1)
    async def test_of_consumers_in_threads_one_wins(self, bench: Bench) -> None:
        """Of consumers in event loops of several threads exactly one wins each round."""
        manager = await bench.manager()
        subjects = [Subject("auth.user", number) for number in range(self.rounds)]
        keys = [(await manager.issue(subject, "reset")).key for subject in subjects]
        barrier = threading.Barrier(3)

        async def compete() -> list[int]:
            async with bench.new_manager() as mine:
                wins = []
                for subject, key in zip(subjects, keys, strict=True):
                    await asyncio.to_thread(barrier.wait, 60)
                    calls = [mine.consume(subject, "reset", key) for _ in range(2)]
                    won, _ = await race(calls, InvalidToken)
                    wins.append(len(won))
                return wins

        outcomes = await asyncio.gather(*(asyncio.to_thread(asyncio.run, compete()) for _ in range(3)))
        assert [sum(wins) for wins in zip(*outcomes, strict=True)] == [1] * len(keys)

    @case(1)
    async def test_a_token_has_as_many_uses_as_its_policy_says(self, bench: Bench) -> None:
        """Of N concurrent consumers of a token with ``max_uses`` exactly so many win; without a bound all
        do."""
        policies = TokenPolicy("invite", max_uses=3), TokenPolicy("join", max_uses=None)
        managers = await bench.two_managers(*policies)
        for slug, uses in (("invite", 3), ("join", self.tasks)):
            issued = await managers[0].issue(USER, slug)
            calls = [managers[n % 2].consume(USER, slug, issued.key) for n in range(self.tasks)]
            won, lost = await race(calls, InvalidToken)
            assert sorted(token.uses for token in won) == list(range(1, uses + 1))
            assert {error.reason for error in lost} == ({"used"} if lost else set())
        assert await managers[0].exists_valid(USER, "join")

    @case(1)
    async def test_saving_a_stale_copy_revives_nothing(self, bench: Bench) -> None:
        """``save`` stores ``extra_data`` and nothing else: a copy from before the use stays used."""
        manager = await bench.manager()
        issued = await manager.issue(USER, "reset", extra_data={"a": 1})
        stale = await manager.verify(USER, "reset", issued.key)
        await manager.consume(USER, "reset", issued.key)
        assert stale.is_active
        stale.set_extra_data({"a": 2})
        stale.slug = "other"
        await manager.save(stale)
        now = await stored_as(manager, issued)
        assert (now.is_active, now.slug, now.get_extra_data()) == (False, "reset", {"a": 2})
        await refused(InvalidToken, manager.consume(USER, "reset", issued.key))
        await manager.erase(USER)
        assert (await refused(InvalidToken, manager.save(stale))).reason == "unknown"

    @case(1)
    async def test_the_same_consume_id_gives_the_same_answer(self, bench: Bench) -> None:
        """The same ``consume_id`` gets the same answer for 15 minutes from its use, marked as a replay and
        told to hooks, past expiry and revocation too; another id, key, slug or object does not."""
        events: list[TokenEvent] = []
        managers = [await bench.manager(hooks=[events.append]) for _ in range(2)]
        issued = await managers[0].issue(USER, "reset", extra_data={"a": 1}, expires_in="1m")
        start = bench.clock()
        won = await at_once(
            managers[n % 2].consume(USER, "reset", issued.key, consume_id="mine") for n in range(self.tasks)
        )
        assert {(token.id, token.uses, token.used_at) for token in won} == {(issued.id, 1, start)}
        assert sum(not token.is_replay for token in won) == 1
        told = [event.name for event in events]
        assert (told.count("consumed"), told.count("replayed")) == (1, self.tasks - 1)
        await managers[1].deactivate(USER)
        await managers[1].issue(USER, "reset")
        bench.clock.set(start + 15 * MINUTE)
        again = await managers[1].consume(USER, "reset", issued.key, consume_id="mine")
        assert (again, again.uses, again.get_extra_data(), again.is_replay) == (issued, 1, {"a": 1}, True)
        others: list[tuple[Subject, str, str, str | None]] = [
            (USER, "reset", issued.key, "yours"),
            (USER, "reset", issued.key, None),
            (USER, "reset", issued.key + "x", "mine"),
            (USER, "confirm", issued.key, "mine"),
            (Subject("auth.user", "4"), "reset", issued.key, "mine"),
        ]
        for subject, slug, key, consume_id in others:
            await refused(InvalidToken, managers[0].consume(subject, slug, key, consume_id=consume_id))
        await refused(InvalidToken, managers[0].verify(USER, "reset", issued.key))
        bench.clock.advance(MILLISECOND)
        await refused(InvalidToken, managers[0].consume(USER, "reset", issued.key, consume_id="mine"))

    @case(1)
    async def test_a_purged_use_is_forgotten(self, bench: Bench) -> None:
        """A ``consume_id`` is answered again unless its token was purged or erased."""
        manager = await bench.manager()
        for way in ("purge", "erase"):
            issued = await manager.issue(USER, "reset")
            await manager.consume(USER, "reset", issued.key, consume_id="mine")
            bench.clock.advance(MILLISECOND)
            assert (await manager.purge() if way == "purge" else await manager.erase(USER)) == 1
            error = await refused(InvalidToken, manager.consume(USER, "reset", issued.key, consume_id="mine"))
            assert error.reason == "unknown"

    @case(1)
    async def test_of_concurrent_consume_ids_one_wins(self, bench: Bench) -> None:
        """Of N concurrent consumers with ids of their own one wins, and only success is remembered."""
        managers = await bench.two_managers()
        for _ in range(3):
            issued = await managers[0].issue(USER, "reset")
            wrong = issued.key + "x"
            await refused(InvalidToken, managers[0].consume(USER, "reset", wrong, consume_id="id0"))
            calls = [
                managers[n % 2].consume(USER, "reset", issued.key, consume_id=f"id{n}")
                for n in range(self.tasks)
            ]
            won, lost = await race(calls, InvalidToken)
            assert len(won) == 1
            assert {error.reason for error in lost} == {"used"}

    @case(1)
    async def test_a_consume_id_counts_one_of_several_uses(self, bench: Bench) -> None:
        """With ``max_uses`` the same ``consume_id`` counts once, by ``consume`` or by ``redeem``, which says
        so; of N at once as well."""
        managers = await bench.two_managers(TokenPolicy("invite", max_uses=3))
        issued = await managers[0].issue(USER, "invite")
        for consume_id in ("a", "a", "b", "a", "b"):
            assert await managers[0].consume(USER, "invite", issued.key, consume_id=consume_id) == issued
        assert (await stored_as(managers[0], issued)).uses == 2

        async def redeemed(n: int) -> bool:
            try:
                async with managers[n % 2].redeem(USER, "invite", issued.key, consume_id="a"):
                    return False
            except AlreadyUsed as error:
                return error.token == issued

        assert all(await at_once(redeemed(n) for n in range(self.tasks)))
        async with managers[1].redeem(USER, "invite", issued.key, consume_id="c"):
            pass
        assert (await managers[0].consume(USER, "invite", issued.key, consume_id="c")).is_replay
        await refused(InvalidToken, managers[0].consume(USER, "invite", issued.key, consume_id="d"))

    @case(4)
    async def test_an_unknown_outcome_is_settled_by_its_id(self, bench: Bench) -> None:
        """A right code on the last attempt whose answer was lost is asked for again with its ``consume_id``:
        the answer is the use, not a spent limit."""
        policy = TokenPolicy.code("sms-login", max_attempts=2)
        manager = await bench.manager(policy)
        code = (await manager.issue(USER, "sms-login")).key
        wrong = f"{(int(code) + 1) % 10**6:06}"
        await refused(InvalidToken, manager.verify(USER, "sms-login", wrong))

        async def lost() -> None:
            await manager.consume(USER, "sms-login", code, consume_id="mine")
            raise OutcomeUnknown("the answer was lost on its way")

        await refused(OutcomeUnknown, lost())
        for _ in range(2):
            await refused(InvalidToken, manager.verify(USER, "sms-login", wrong))
        assert (await manager.consume(USER, "sms-login", code, consume_id="mine")).is_replay


class IssueCases(Suite):
    """Cases of tokens that are issued, found and ended."""

    @case(2)
    async def test_a_new_token_ends_the_old(self, bench: Bench) -> None:
        """After ``issue`` no earlier token of that object and slug is valid; others stay, and with
        ``replace=False`` all do."""
        manager = await bench.manager()
        old = await manager.issue(USER, "reset")
        others = [
            await manager.issue(Subject("auth.user", "43"), "reset"),
            await manager.issue(Subject("shop.order", "42"), "reset"),
            await manager.issue(USER, "confirm"),
            await manager.issue(USER),
        ]
        new = await manager.issue(USER, "reset")
        error = await refused(InvalidToken, manager.verify(USER, "reset", old.key))
        assert (error.reason, error.token) == ("inactive", old)
        for token in [*others, new]:
            subject = Subject(token.content_type, token.object_id)
            assert await manager.verify(subject, token.slug, token.key) == token
        kept = await manager.issue(USER, "reset", replace=False)
        for token in (new, kept):
            assert await manager.verify(USER, "reset", token.key) == token
        last = await manager.deactivate_and_create(USER, "reset")
        assert await active_ids(manager) == [last.id]

    @case(2)
    async def test_of_concurrent_issues_one_stays_valid(self, bench: Bench) -> None:
        """Of N concurrent ``issue`` each gets a key, and exactly one of the tokens stays valid."""
        managers = await bench.two_managers()
        for number in range(self.rounds):
            subject = Subject("auth.user", number)
            issued = await at_once(managers[n % 2].issue(subject, "reset") for n in range(self.tasks))
            assert len({token.key for token in issued}) == self.tasks
            valid, _ = await race([managers[0].verify(subject, "reset", t.key) for t in issued], InvalidToken)
            assert len(valid) == 1
            assert await active_ids(managers[1], subject) == [valid[0].id]

    @case(2)
    async def test_a_key_collision_leaves_the_old_token(self, bench: Bench) -> None:
        """A generator of taken keys only is ``KeyGenerationError``; its own error passes; the old token
        stays."""
        manager = await bench.manager(settings=Settings(secret=SECRET, max_key_iterations=4))
        taken = (await manager.issue(Subject("auth.user", "1"), "reset")).key
        old = await manager.issue(USER, "reset")
        calls = 0

        def generator() -> str:
            nonlocal calls
            calls += 1
            return taken

        def broken() -> str:
            raise ZeroDivisionError

        async def issue(generator: Any) -> Any:
            return await manager.issue(USER, "reset", key_generator_kwargs={"generator": generator})

        await refused(KeyGenerationError, issue(generator))
        assert calls == 4
        await refused(KeyGenerationError, issue(lambda: old.key))
        await refused(ZeroDivisionError, issue(broken))
        assert await manager.verify(USER, "reset", old.key) == old
        assert await active_ids(manager) == [old.id]
        keys: Iterator[str] = iter([taken, old.key, "fresh-key-of-the-third-try"])
        new = await issue(lambda: next(keys))
        assert new.key == "fresh-key-of-the-third-try"
        assert await active_ids(manager) == [new.id]

    @case(2)
    async def test_an_unsent_token_is_ended(self, bench: Bench) -> None:
        """A block of ``issuing`` that fails ends its token and gives the cooldown back; one that is cancelled
        ends it and gives nothing back; one that ends normally keeps it."""
        manager = await bench.manager(TokenPolicy("reset", cooldown="1m"))

        async def send(problem: BaseException | None) -> None:
            async with manager.issuing(USER, "reset") as token:
                assert await active_ids(manager) == [token.id]
                if problem is not None:
                    raise problem

        for _ in range(2):
            await refused(ZeroDivisionError, send(ZeroDivisionError()))
            assert await active_ids(manager) == []
        task = asyncio.ensure_future(send(asyncio.CancelledError()))
        await asyncio.wait([task])
        assert task.cancelled()
        assert await active_ids(manager) == []
        status = await manager.status(USER, "reset")
        assert status.can_issue_at == bench.clock() + MINUTE
        bench.clock.advance(MINUTE)
        await send(None)
        assert len(await active_ids(manager)) == 1

    @case(3)
    async def test_get_active_or_create_gives_the_valid_token(self, bench: Bench) -> None:
        """``get_active_or_create`` gives the newest valid token, or a new one where there is none or it lives
        for less than ``at_least``."""
        manager = await bench.manager()
        first = await manager.get_active_or_create(USER, "reset", {"a": 1}, expiration_in_minutes=5)
        assert first.key is not None
        again = await manager.get_active_or_create(USER, "reset", {"a": 2}, at_least=5 * MINUTE)
        assert (again, again.key, again.get_extra_data()) == (first, None, {"a": 1})
        assert await manager.get_active_or_create(USER) != first
        bench.clock.advance(timedelta(minutes=5))
        assert await manager.get_active_or_create(USER, "reset") == first
        second = await manager.get_active_or_create(USER, "reset", at_least="1m")
        assert second not in (first, again)
        assert second.key is not None
        assert (await refused(InvalidToken, manager.verify(USER, "reset", first.key))).reason == "inactive"
        await manager.deactivate(USER, "reset")
        third = await manager.get_active_or_create(USER, "reset")
        assert third not in (first, second)
        assert third.key is not None

    @case(3)
    async def test_of_concurrent_get_active_or_create_one_creates(self, bench: Bench) -> None:
        """N concurrent ``get_active_or_create`` give one token, and one of the callers its key, with a
        cooldown, too."""
        managers = await bench.two_managers(TokenPolicy("cool", cooldown="1m"))
        for number in range(self.rounds):
            subject, slug = Subject("auth.user", number), ("reset", "cool")[number % 2]
            tokens = await at_once(
                managers[n % 2].get_active_or_create(subject, slug) for n in range(self.tasks)
            )
            assert len(set(tokens)) == 1
            assert len([token for token in tokens if token.key is not None]) == 1
            assert await active_ids(managers[0], subject, slug) == [tokens[0].id]

    @case(3)
    async def test_get_active_or_create_beside_other_writes(self, bench: Bench) -> None:
        """``get_active_or_create`` beside re-issues and added tokens leaves one valid exclusive token, and
        nobody gets one that had been ended before."""
        managers = await bench.two_managers(TokenPolicy("lap", overlap="5m"))
        for number in range(self.rounds):
            subject, slug = Subject("auth.user", number), ("reset", "lap")[number % 2]
            if number % 3:
                await managers[0].issue(subject, slug)
            calls: list[Any] = []
            for n in range(self.tasks // 2):
                calls += [managers[n % 2].get_active_or_create(subject, slug)]
                calls += [managers[n // 2 % 2].issue(subject, slug, replace=n % 3 > 0)]
            await at_once(calls)
            stored = await (await bench.backend()).find(_match(subject, slug), 99)
            assert sum(token.is_active and not token.is_beside for token in stored) == 1

    @case(2)
    async def test_deactivate_ends_what_it_names(self, bench: Bench) -> None:
        """``deactivate`` ends the active tokens of its object, of any slug, one slug, none, one key, or one
        token; a whole class only where that is said."""
        manager = await bench.manager()
        others = [
            await manager.issue(Subject("auth.user", "43"), "reset"),
            await manager.issue(Subject("auth.group", "42"), "reset"),
        ]

        async def left(*arguments: Any, **named: Any) -> tuple[int, list[str | None]]:
            for slug in ("reset", "confirm", None):
                await manager.issue(USER, slug)
            ended = await manager.deactivate(USER, *arguments, **named)
            return ended, sorted([t.slug async for t in manager.filter_active_tokens(USER)], key=str)

        assert await left() == (3, [])
        assert await left("reset") == (1, [None, "confirm"])
        assert await left(None) == (1, ["confirm", "reset"])
        assert await left("res") == (0, [None, "confirm", "reset"])
        assert await left(key="no such key") == (0, [None, "confirm", "reset"])
        issued = await manager.issue(USER, "reset")
        assert await manager.deactivate(USER, "confirm", issued.key) == 0
        assert await manager.deactivate(USER, key=issued.key) == 1
        assert await manager.deactivate(USER, key=issued.key) == 0
        by_id = await manager.issue(USER, "reset")
        assert await manager.deactivate(by_id) == 1
        assert await manager.deactivate(by_id) == 0
        for token in others:
            subject = Subject(token.content_type, token.object_id)
            assert await manager.verify(subject, "reset", token.key) == token
        await refused(InvalidInput, manager.deactivate(Subject("auth.user")))
        assert await manager.deactivate(Subject("auth.user"), all_objects=True) == 3
        assert await manager.exists_valid(Subject("auth.group", "42"))

    @case(11)
    async def test_active_tokens_are_listed_newest_first(self, bench: Bench) -> None:
        """``filter_active_tokens`` lists every active token of its object and slug once, newest first, and
        ``history`` all of them."""
        backend, manager = await bench.backend(), await bench.manager()
        made = [await put(backend) for _ in range(120)]
        await backend.deactivate(_match(USER, "reset")._replace(id=made[7].id), 1)
        await put(backend, object_id="43")
        nameless = await put(backend, slug="")
        ids = [token.id for token in reversed(made)]
        active = [token_id for token_id in ids if token_id != made[7].id]
        assert await active_ids(manager) == active
        assert await active_ids(manager, slug=None) == [nameless.id]
        assert [token.id async for token in manager.filter_active_tokens(USER)] == [nameless.id, *active]
        assert [token.id async for token in manager.history(USER, "reset")] == ids
        assert [token.id async for token in manager.history(USER)] == [nameless.id, *ids]
        assert [token.id async for token in manager.history(USER, None)] == [nameless.id]

    @case(12)
    async def test_managers_see_each_others_writes(self, bench: Bench) -> None:
        """What one manager has done, another on the same store sees at once."""
        one, two = await bench.two_managers()
        issued = await one.issue(USER, "reset")
        assert await two.verify(USER, "reset", issued.key) == issued
        assert await two.deactivate(USER, "reset", issued.key) == 1
        assert not await one.exists_valid(USER, "reset", issued.key)
        shared = await two.get_active_or_create(USER, "reset")
        assert await one.get_active_or_create(USER, "reset") == shared
        shared.set_extra_data("seen")
        await two.save(shared)
        assert (await stored_as(one, shared)).get_extra_data() == "seen"
        assert shared.key is not None
        await one.consume(USER, "reset", shared.key)
        assert (await refused(InvalidToken, two.consume(USER, "reset", shared.key))).reason == "used"
        stats = await two.stats()
        assert (stats.total, stats.used) == (2, 1)
        assert await two.ping() >= 0
