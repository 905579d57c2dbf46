"""Guarantee 8 and its kin through the manager: guesses, issues and repeated answers are counted."""

from __future__ import annotations

from datetime import timedelta

from vtoken.errors import CooldownActive, InvalidInput, InvalidToken, KeyGenerationError, TooManyAttempts
from vtoken.manager import TokenManager
from vtoken.policy import TokenPolicy
from vtoken.subject import Subject
from vtoken.testing._bench import USER, Bench, Suite, at_once, case, race, refused

SLUG = "sms-login"
CAP = 5
WINDOW = timedelta(minutes=15)
CODE = TokenPolicy.code(SLUG, max_attempts=CAP, attempt_window=WINDOW)
COOLDOWN = timedelta(minutes=1)
SECOND = timedelta(seconds=1)


def a_wrong_code(right: str) -> str:
    """Another code of the same length."""
    return f"{(int(right) + 1) % 10 ** len(right):0{len(right)}}"


async def exhaust(manager: TokenManager, subject: Subject = USER, guesses: int = CAP) -> None:
    """Guess wrongly that often where there may be a token or none; all of them are compared."""
    for _ in range(guesses):
        await refused(InvalidToken, manager.verify(subject, SLUG, "not a code"))


class LimitCases(Suite):
    """Cases about what may happen so often and no oftener."""

    @case(8)
    async def test_parallel_guesses_cost_at_most_the_cap(self, bench: Bench) -> None:
        """Of 200 parallel wrong guesses at most the cap is compared; then the right key fails as well."""
        managers = [await bench.manager(CODE), await bench.manager(CODE)]
        code = (await managers[0].deactivate_and_create(USER, SLUG)).key
        wrong = a_wrong_code(code)

        async def guess(n: int) -> str:
            call = managers[n % 2].consume if n % 3 else managers[n % 2].verify
            try:
                await call(USER, SLUG, wrong)
            except InvalidToken as error:
                return type(error).__name__
            return "passed"

        outcomes = await at_once([guess(n) for n in range(200)])
        assert outcomes.count("InvalidToken") == CAP
        assert outcomes.count("TooManyAttempts") == 200 - CAP
        error = await refused(TooManyAttempts, managers[1].consume(USER, SLUG, code))
        assert error.retry_after == WINDOW.total_seconds()

    @case(8)
    async def test_the_last_attempt_may_be_right(self, bench: Bench) -> None:
        """The last guess under the cap may be right, and a right key costs nothing."""
        manager = await bench.manager(CODE)
        for _ in range(3):
            code = (await manager.deactivate_and_create(USER, SLUG)).key
            await exhaust(manager, guesses=CAP - 1)
            for _ in range(CAP * 2):
                await manager.verify(USER, SLUG, code)
                assert await manager.exists_valid(USER, SLUG, code)
            await manager.consume(USER, SLUG, code)

    @case(8)
    async def test_a_success_resets_the_budget(self, bench: Bench) -> None:
        """A successful consume resets the budget: the next token has all its guesses."""
        manager = await bench.manager(CODE)
        for _ in range(2):
            code = (await manager.deactivate_and_create(USER, SLUG)).key
            await exhaust(manager, guesses=CAP - 1)
            await manager.consume(USER, SLUG, code)
        await exhaust(manager)
        await refused(TooManyAttempts, manager.verify(USER, SLUG, "not a code"))

    @case(8)
    async def test_a_new_token_does_not_reset_the_budget(self, bench: Bench) -> None:
        """Re-issuing, deactivating and purging leave the spent guesses spent, and the cap in force."""
        manager = await bench.manager(CODE)
        await manager.deactivate_and_create(USER, SLUG)
        await exhaust(manager)
        for _ in range(2):
            code = (await manager.deactivate_and_create(USER, SLUG)).key
            await refused(TooManyAttempts, manager.consume(USER, SLUG, code))
        await manager.deactivate(USER)
        await manager.purge()
        found = await manager.get_active_or_create(USER, SLUG)
        assert found.key is not None
        for call in (manager.consume, manager.verify):
            await refused(TooManyAttempts, call(USER, SLUG, found.key))
        await refused(TooManyAttempts, manager.exists_valid(USER, SLUG, found.key))

    @case(8)
    async def test_guesses_count_without_a_token(self, bench: Bench) -> None:
        """The budget is there whether or not a token is: guesses before the issue count."""
        manager = await bench.manager(CODE)
        await exhaust(manager, guesses=CAP)
        await refused(TooManyAttempts, manager.verify(USER, SLUG, "not a code"))
        code = (await manager.deactivate_and_create(USER, SLUG)).key
        await refused(TooManyAttempts, manager.consume(USER, SLUG, code))

    @case(8)
    async def test_the_window_ends_and_grows(self, bench: Bench) -> None:
        """The window ends by itself, and one that was exhausted makes the next twice as long."""
        manager = await bench.manager(CODE)
        window = WINDOW
        for _ in range(3):
            await exhaust(manager)
            bench.clock.advance(window - SECOND)
            code = (await manager.deactivate_and_create(USER, SLUG)).key
            error = await refused(TooManyAttempts, manager.consume(USER, SLUG, code))
            assert error.retry_after == 1
            bench.clock.advance(SECOND)
            assert (await manager.verify(USER, SLUG, code)).is_active
            window *= 2

    @case(8)
    async def test_budgets_are_apart(self, bench: Bench) -> None:
        """A budget belongs to one object and slug: another object, content type or slug has its own."""
        manager = await bench.manager(CODE, TokenPolicy.code("confirm"))
        await exhaust(manager)
        await refused(TooManyAttempts, manager.verify(USER, SLUG, "not a code"))
        for subject, slug in (
            (Subject("auth.user", "4"), SLUG),
            (Subject("auth", "42"), SLUG),
            (USER, "confirm"),
        ):
            code = (await manager.deactivate_and_create(subject, slug)).key
            await refused(InvalidToken, manager.verify(subject, slug, a_wrong_code(code)))
            await manager.consume(subject, slug, code)

    @case(8)
    async def test_no_method_is_an_oracle(self, bench: Bench) -> None:
        """Where attempts are capped ``exists_valid`` and ``redeem`` count too; deactivating and listing
        take no key."""
        manager = await bench.manager(CODE)
        code = (await manager.deactivate_and_create(USER, SLUG)).key
        await refused(InvalidInput, manager.deactivate(USER, SLUG, code))

        async def listed() -> None:
            async for _ in manager.filter_active_tokens(USER, SLUG, code):
                raise AssertionError("a key was compared without counting")

        await refused(InvalidInput, listed())

        async def redeemed(key: str) -> None:
            async with manager.redeem(USER, SLUG, key):
                raise AssertionError("a wrong key was redeemed")

        for _ in range(CAP - 2):
            assert not await manager.exists_valid(USER, SLUG, a_wrong_code(code))
        for _ in range(2):
            await refused(InvalidToken, redeemed(a_wrong_code(code)))
        await refused(TooManyAttempts, manager.exists_valid(USER, SLUG, code))
        await refused(TooManyAttempts, redeemed(code))

    @case(8)
    async def test_wrong_links_spend_nothing(self, bench: Bench) -> None:
        """Without a cap no number of wrong keys keeps the right one out."""
        manager = await bench.manager()
        issued = await manager.deactivate_and_create(USER, "reset")
        calls = [manager.verify(USER, "reset", f"wrong{n}") for n in range(30)]
        _, lost = await race(calls, InvalidToken)
        assert len(lost) == 30
        assert await manager.consume(USER, "reset", issued.key) == issued

    @case(8)
    async def test_codes_are_scoped_to_their_object(self, bench: Bench) -> None:
        """Equal codes of many objects and slugs live side by side, and each is its own object's alone."""
        policies = [TokenPolicy.code(slug, key_generator=lambda: "123456") for slug in (SLUG, "confirm")]
        manager = await bench.manager(*policies)
        subjects = [Subject("auth.user", n) for n in range(5)] + [Subject("auth.group", 1)]
        issued = [
            await manager.deactivate_and_create(subject, slug)
            for subject in subjects
            for slug in (SLUG, "confirm")
        ]
        digests = [token.digest for token in await bench.stored()]
        assert len(set(digests)) == len(issued)
        used = await manager.consume(subjects[1], SLUG, "123456")
        for token in issued:
            subject = Subject(token.content_type, token.object_id)
            if token != used:
                assert await manager.consume(subject, token.slug, "123456") == token
            await refused(InvalidToken, manager.verify(subject, token.slug, "123456"))

    @case(8)
    async def test_of_concurrent_issues_under_a_cooldown_one_goes_out(self, bench: Bench) -> None:
        """Of N concurrent issues under a cooldown exactly one token is made, however it is asked for."""
        policy = TokenPolicy("reset", cooldown=COOLDOWN)
        managers = [await bench.manager(policy), await bench.manager(policy)]
        for number in range(3):
            subject = Subject("auth.user", number)
            won, lost = await race(
                [managers[n % 2].deactivate_and_create(subject, "reset") for n in range(self.tasks)],
                CooldownActive,
            )
            assert len(won) == 1
            assert {error.retry_after for error in lost} == {COOLDOWN.total_seconds()}
            assert await managers[0].verify(subject, "reset", won[0].key) == won[0]

    @case(8)
    async def test_a_cooldown_counts_from_the_last_token(self, bench: Bench) -> None:
        """The cooldown counts from the last token's creation, whatever became of it, for its object and
        slug alone."""
        manager = await bench.manager(TokenPolicy("reset", cooldown=COOLDOWN))
        first = await manager.deactivate_and_create(USER, "reset")
        bench.clock.advance(COOLDOWN - SECOND)
        assert await manager.get_active_or_create(USER, "reset") == first
        error = await refused(CooldownActive, manager.deactivate_and_create(USER, "reset"))
        assert error.retry_after == 1
        assert await manager.consume(USER, "reset", first.key) == first
        for call in (manager.deactivate_and_create, manager.get_active_or_create):
            await refused(CooldownActive, call(USER, "reset"))
        await manager.deactivate_and_create(Subject("auth.user", "43"), "reset")
        await manager.deactivate_and_create(USER, "confirm")
        bench.clock.advance(SECOND)
        second = await manager.get_active_or_create(USER, "reset")
        assert second != first
        await refused(CooldownActive, manager.deactivate_and_create(USER, "reset"))

    @case(8)
    async def test_a_failed_issue_costs_no_cooldown(self, bench: Bench) -> None:
        """An issue that fails makes no token, and so no cooldown."""
        manager = await bench.manager(TokenPolicy("reset", cooldown=COOLDOWN))
        other = await manager.deactivate_and_create(Subject("auth.user", "43"), "reset")

        def broken() -> str:
            raise ZeroDivisionError

        kwargs = {"generator": broken}
        for call in (manager.deactivate_and_create, manager.get_active_or_create):
            await refused(ZeroDivisionError, call(USER, "reset", key_generator_kwargs=kwargs))
        await refused(InvalidInput, manager.deactivate_and_create(USER, "reset", {1}))
        taken = {"generator": lambda: other.key}
        for call in (manager.deactivate_and_create, manager.get_active_or_create):
            await refused(KeyGenerationError, call(USER, "reset", key_generator_kwargs=taken))
        assert (await manager.deactivate_and_create(USER, "reset")).is_active

    @case(8)
    async def test_overlapping_codes_share_one_budget(self, bench: Bench) -> None:
        """Two codes that overlap share one budget: guesses at either spend the same."""
        manager = await bench.manager(TokenPolicy.code(SLUG, overlap=timedelta(minutes=5)))
        codes = [(await manager.deactivate_and_create(USER, SLUG)).key for _ in range(2)]
        for code in codes:
            assert (await manager.verify(USER, SLUG, code)).is_active
        await exhaust(manager, guesses=CAP)
        for code in codes:
            await refused(TooManyAttempts, manager.consume(USER, SLUG, code))

    @case(1)
    async def test_the_same_consume_id_gives_the_same_answer(self, bench: Bench) -> None:
        """The same ``consume_id`` again gives the same answer, past expiry too; another one
        ``InvalidToken``."""
        managers = [await bench.manager(), await bench.manager()]
        issued = await managers[0].deactivate_and_create(USER, "reset", {"a": 1})
        won = await at_once(
            [managers[n % 2].consume(USER, "reset", issued.key, consume_id="mine") for n in range(self.tasks)]
        )
        assert {(token.id, token.uses, token.used_at) for token in won} == {(issued.id, 1, bench.clock())}
        bench.clock.advance(timedelta(days=2))
        again = await managers[1].consume(USER, "reset", issued.key, consume_id="mine")
        assert (again, again.uses, again.get_extra_data()) == (issued, 1, {"a": 1})
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
        assert await managers[0].purge() == 1
        await refused(InvalidToken, managers[0].consume(USER, "reset", issued.key, consume_id="mine"))

    @case(1)
    async def test_of_concurrent_consume_ids_one_wins(self, bench: Bench) -> None:
        """Of N concurrent consumers with ids of their own one wins, and only success is remembered."""
        managers = [await bench.manager(), await bench.manager()]
        for _ in range(3):
            issued = await managers[0].deactivate_and_create(USER, "reset")
            await refused(
                InvalidToken, managers[0].consume(USER, "reset", issued.key + "x", consume_id="id0")
            )
            calls = [
                managers[n % 2].consume(USER, "reset", issued.key, consume_id=f"id{n}")
                for n in range(self.tasks)
            ]
            won, lost = await race(calls, InvalidToken)
            assert len(won) == 1
            assert {error.reason for error in lost} == {"used"}

    @case(1)
    async def test_a_consume_id_counts_one_of_several_uses(self, bench: Bench) -> None:
        """With ``max_uses`` the same ``consume_id`` counts once, however often and however late it comes."""
        manager = await bench.manager(TokenPolicy("invite", max_uses=2))
        issued = await manager.deactivate_and_create(USER, "invite")
        for consume_id in ("a", "a", "b", "a", "b"):
            assert await manager.consume(USER, "invite", issued.key, consume_id=consume_id) == issued
        stored = await manager.get(issued.id)
        assert stored is not None
        assert stored.uses == 2
        await refused(InvalidToken, manager.consume(USER, "invite", issued.key, consume_id="c"))
