"""Guarantees 1, 2, 3 and 12 through the manager: who wins, what stays valid, who sees it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from vtoken.errors import InvalidToken, KeyGenerationError
from vtoken.manager import TokenManager
from vtoken.policy import Settings, TokenPolicy
from vtoken.subject import Subject
from vtoken.testing._bench import NOW, SECRET, USER, Bench, Suite, at_once, case, race, refused
from vtoken.testing._insert import put


async def valid_tokens(manager: TokenManager, subject: Subject = USER, slug: str = "reset") -> int:
    """How many active tokens the subject has; nothing expires in these cases."""
    return len([token async for token in manager.filter_active_tokens(subject, slug)])


class OnceCases(Suite):
    """Cases about one winner and one valid token."""

    @case(1)
    async def test_consume_works_once(self, bench: Bench) -> None:
        """A key is consumed once; afterwards it is "used", whatever is asked, and a check before takes
        nothing."""
        manager = await bench.manager()
        issued = await manager.deactivate_and_create(USER, "reset")
        for _ in range(3):
            assert (await manager.verify(USER, "reset", issued.key)).is_active
            assert await manager.exists_valid(USER, "reset", issued.key)
        used = await manager.consume(USER, "reset", issued.key)
        assert used == issued
        assert (used.is_active, used.uses) == (False, 1)
        for call in (manager.consume, manager.verify):
            assert (await refused(InvalidToken, call(USER, "reset", issued.key))).reason == "used"
        assert not await manager.exists_valid(USER, "reset", issued.key)
        assert not await manager.exists_valid(USER)
        assert await valid_tokens(manager) == 0

    @case(1)
    async def test_of_concurrent_consumers_one_wins(self, bench: Bench) -> None:
        """Of N concurrent consumers, in two managers on two backends of one store, exactly one wins."""
        managers = [await bench.manager(), await bench.manager()]
        for _ in range(self.rounds):
            issued = await managers[0].deactivate_and_create(USER, "reset")
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
        keys = [(await manager.deactivate_and_create(subject, "reset")).key for subject in subjects]
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
        """Of N concurrent consumers of a token with ``max_uses`` exactly so many win."""
        policy = TokenPolicy("invite", max_uses=3)
        managers = [await bench.manager(policy), await bench.manager(policy)]
        for _ in range(3):
            issued = await managers[0].deactivate_and_create(USER, "invite")
            calls = [managers[n % 2].consume(USER, "invite", issued.key) for n in range(self.tasks)]
            won, lost = await race(calls, InvalidToken)
            assert sorted(token.uses for token in won) == [1, 2, 3]
            assert {error.reason for error in lost} == {"used"}

    @case(1)
    async def test_saving_a_stale_copy_revives_nothing(self, bench: Bench) -> None:
        """``save`` stores ``extra_data`` and nothing else: a copy from before the use stays used."""
        manager = await bench.manager()
        issued = await manager.deactivate_and_create(USER, "reset", {"a": 1})
        stale = await manager.verify(USER, "reset", issued.key)
        await manager.consume(USER, "reset", issued.key)
        assert stale.is_active
        stale.set_extra_data({"a": 2})
        stale.slug = "other"
        await manager.save(stale)
        now = await manager.get(issued.id)
        assert now is not None
        assert (now.is_active, now.slug, now.get_extra_data()) == (False, "reset", {"a": 2})
        await refused(InvalidToken, manager.consume(USER, "reset", issued.key))

    @case(2)
    async def test_a_new_token_ends_the_old(self, bench: Bench) -> None:
        """After ``deactivate_and_create`` no earlier token of that object and slug is valid; others stay."""
        manager = await bench.manager()
        old = await manager.deactivate_and_create(USER, "reset")
        others = [
            await manager.deactivate_and_create(Subject("auth.user", "43"), "reset"),
            await manager.deactivate_and_create(Subject("shop.order", "42"), "reset"),
            await manager.deactivate_and_create(USER, "confirm"),
            await manager.deactivate_and_create(USER),
        ]
        new = await manager.deactivate_and_create(USER, "reset")
        assert (await refused(InvalidToken, manager.verify(USER, "reset", old.key))).reason == "inactive"
        for token in [*others, new]:
            subject = Subject(token.content_type, token.object_id)
            assert await manager.verify(subject, token.slug, token.key) == token
        kept = await manager.deactivate_and_create(USER, "reset", deactivate_old_tokens=False)
        for token in (new, kept):
            assert await manager.verify(USER, "reset", token.key) == token

    @case(2)
    async def test_of_concurrent_issues_one_stays_valid(self, bench: Bench) -> None:
        """Of N concurrent ``deactivate_and_create`` each gets a key, and exactly one of the tokens stays
        valid."""
        managers = [await bench.manager(), await bench.manager()]
        for number in range(self.rounds):
            subject = Subject("auth.user", number)
            issued = await at_once(
                [managers[n % 2].deactivate_and_create(subject, "reset") for n in range(self.tasks)]
            )
            assert len({token.key for token in issued}) == self.tasks
            valid, _ = await race([managers[0].verify(subject, "reset", t.key) for t in issued], InvalidToken)
            assert len(valid) == 1
            assert await valid_tokens(managers[1], subject) == 1

    @case(2)
    async def test_a_key_collision_leaves_the_old_token(self, bench: Bench) -> None:
        """A generator of taken keys only is ``KeyGenerationError``; its own error passes; the old token
        stays."""
        manager = await bench.manager(settings=Settings(secret=SECRET, max_key_iterations=4))
        taken = (await manager.deactivate_and_create(Subject("auth.user", "1"), "reset")).key
        old = await manager.deactivate_and_create(USER, "reset")
        calls = 0

        def generator() -> str:
            nonlocal calls
            calls += 1
            return taken

        kwargs = {"generator": generator}
        await refused(
            KeyGenerationError, manager.deactivate_and_create(USER, "reset", key_generator_kwargs=kwargs)
        )
        assert calls == 4
        own_key = {"generator": lambda: old.key}
        await refused(
            KeyGenerationError, manager.deactivate_and_create(USER, "reset", key_generator_kwargs=own_key)
        )

        def broken() -> str:
            raise ZeroDivisionError

        own_error = {"generator": broken}
        await refused(
            ZeroDivisionError, manager.deactivate_and_create(USER, "reset", key_generator_kwargs=own_error)
        )
        assert await manager.verify(USER, "reset", old.key) == old
        assert await valid_tokens(manager) == 1

        keys: Iterator[str] = iter([taken, old.key, "fresh-key-of-the-third-try"])
        third = {"generator": lambda: next(keys)}
        new = await manager.deactivate_and_create(USER, "reset", key_generator_kwargs=third)
        assert new.key == "fresh-key-of-the-third-try"
        assert await valid_tokens(manager) == 1

    @case(2)
    async def test_an_overlap_lasts_until_the_first_success(self, bench: Bench) -> None:
        """With ``overlap`` the old token stays good so long, or until one of the two is used."""
        manager = await bench.manager(TokenPolicy("reset", overlap=timedelta(minutes=5)))
        for winner in range(2):
            tokens = [await manager.deactivate_and_create(USER, "reset") for _ in range(2)]
            for token in tokens:
                assert await manager.verify(USER, "reset", token.key) == token
            await manager.consume(USER, "reset", tokens[winner].key)
            for token in tokens:
                await refused(InvalidToken, manager.verify(USER, "reset", token.key))
        old = await manager.deactivate_and_create(USER, "reset")
        new = await manager.deactivate_and_create(USER, "reset")
        bench.clock.advance(timedelta(minutes=5))
        assert await manager.verify(USER, "reset", old.key) == old
        bench.clock.advance(timedelta(milliseconds=1))
        assert (await refused(InvalidToken, manager.consume(USER, "reset", old.key))).reason == "expired"
        assert await manager.consume(USER, "reset", new.key) == new

    @case(3)
    async def test_get_active_or_create_gives_the_valid_token(self, bench: Bench) -> None:
        """``get_active_or_create`` gives the newest valid token, or a new one where there is none."""
        manager = await bench.manager()
        first = await manager.get_active_or_create(USER, "reset", {"a": 1}, expiration_in_minutes=5)
        assert first.key is not None
        again = await manager.get_active_or_create(USER, "reset", {"a": 2})
        assert (again, again.key, again.get_extra_data()) == (first, None, {"a": 1})
        assert await manager.get_active_or_create(USER) != first
        bench.clock.advance(timedelta(minutes=5))
        assert await manager.get_active_or_create(USER, "reset") == first
        bench.clock.advance(timedelta(milliseconds=1))
        second = await manager.get_active_or_create(USER, "reset")
        assert second != first
        await manager.deactivate(USER, "reset")
        third = await manager.get_active_or_create(USER, "reset")
        assert third not in (first, second)
        assert third.key is not None

    @case(3)
    async def test_of_concurrent_get_active_or_create_one_creates(self, bench: Bench) -> None:
        """N concurrent ``get_active_or_create`` give one token, and one of the callers its key."""
        managers = [await bench.manager(), await bench.manager()]
        for number in range(self.rounds):
            subject = Subject("auth.user", number)
            tokens = await at_once(
                [managers[n % 2].get_active_or_create(subject, "reset") for n in range(self.tasks)]
            )
            assert len(set(tokens)) == 1
            assert len([token for token in tokens if token.key is not None]) == 1
            assert await valid_tokens(managers[0], subject) == 1

    @case(2)
    async def test_deactivate_ends_what_it_names(self, bench: Bench) -> None:
        """``deactivate`` ends the active tokens of its object, of any slug, one slug, none, or one key."""
        manager = await bench.manager()
        others = [
            await manager.deactivate_and_create(Subject("auth.user", "43"), "reset"),
            await manager.deactivate_and_create(Subject("auth.group", "42"), "reset"),
        ]

        async def left(*arguments: Any, **named: Any) -> tuple[int, list[str | None]]:
            for slug in ("reset", "confirm", None):
                await manager.deactivate_and_create(USER, slug)
            ended = await manager.deactivate(USER, *arguments, **named)
            return ended, sorted([t.slug async for t in manager.filter_active_tokens(USER)], key=str)

        assert await left() == (3, [])
        assert await left("reset") == (1, [None, "confirm"])
        assert await left(None) == (1, ["confirm", "reset"])
        assert await left("res") == (0, [None, "confirm", "reset"])
        assert await left(key="no such key") == (0, [None, "confirm", "reset"])
        issued = await manager.deactivate_and_create(USER, "reset")
        assert await manager.deactivate(USER, "confirm", issued.key) == 0
        assert await manager.deactivate(USER, key=issued.key) == 1
        assert await manager.deactivate(USER, key=issued.key) == 0
        for token in others:
            subject = Subject(token.content_type, token.object_id)
            assert await manager.verify(subject, "reset", token.key) == token
        assert await manager.deactivate(Subject("auth.user")) == 3

    @case(11)
    async def test_active_tokens_are_listed_newest_first(self, bench: Bench) -> None:
        """``filter_active_tokens`` lists every active token of its object and slug once, newest first."""
        backend, manager = await bench.backend(), await bench.manager()
        made = [await put(backend, created_at=NOW + n // 2, expires_at=NOW + n - 5) for n in range(120)]
        await put(backend, is_active=False)
        await put(backend, object_id="43")
        nameless = await put(backend, slug="", created_at=NOW + 999)
        ids = [token.id for token in reversed(made)]
        assert [token.id async for token in manager.filter_active_tokens(USER, "reset")] == ids
        assert [token.id async for token in manager.filter_active_tokens(USER)] == [nameless.id, *ids]
        assert [token.id async for token in manager.filter_active_tokens(USER, None)] == [nameless.id]

    @case(12)
    async def test_managers_see_each_others_writes(self, bench: Bench) -> None:
        """What one manager has done, another on the same store sees at once."""
        one, two = await bench.manager(), await bench.manager()
        issued = await one.deactivate_and_create(USER, "reset")
        assert await two.verify(USER, "reset", issued.key) == issued
        assert await two.deactivate(USER, "reset", issued.key) == 1
        assert not await one.exists_valid(USER, "reset", issued.key)
        shared = await two.get_active_or_create(USER, "reset")
        assert await one.get_active_or_create(USER, "reset") == shared
        shared.set_extra_data("seen")
        await two.save(shared)
        found = await one.get(shared.id)
        assert found is not None
        assert found.get_extra_data() == "seen"
        assert shared.key is not None
        await one.consume(USER, "reset", shared.key)
        assert (await refused(InvalidToken, two.consume(USER, "reset", shared.key))).reason == "used"
        stats = await two.stats()
        assert (stats.total, stats.used) == (2, 1)
