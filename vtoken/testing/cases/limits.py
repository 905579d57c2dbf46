"""Guarantee 8 and its kin through the manager: attempts, issues and what they cost."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final

from vtoken.errors import (
    CooldownActive,
    InvalidInput,
    InvalidToken,
    KeyGenerationError,
    TokenBusy,
    TooManyAttempts,
)
from vtoken.hooks import TokenEvent
from vtoken.limits import Limit
from vtoken.manager import TokenManager
from vtoken.policy import TokenPolicy
from vtoken.subject import Subject
from vtoken.testing.cases.redeem import hanging
from vtoken.testing.harness import (
    CAP,
    CODE,
    SLUG,
    USER,
    WINDOW,
    Bench,
    Suite,
    at_once,
    case,
    put,
    race,
    refused,
)

COOLDOWN: Final = timedelta(minutes=1)
SECOND: Final = timedelta(seconds=1)
DAY: Final = timedelta(days=1)


def a_wrong_code(right: str) -> str:
    """Another code of the same length."""
    return f"{(int(right) + 1) % 10 ** len(right):0{len(right)}}"


async def exhaust(
    manager: TokenManager, subject: Subject = USER, *, codes: int = CAP, slug: str = SLUG
) -> None:
    """Present so many wrong codes, whether or not there is a token; all of them are compared."""
    for number in range(codes):
        await refused(InvalidToken, manager.verify(subject, slug, f"00000{number}"))


class AttemptCases(Suite):
    """Cases of limits on wrong keys."""

    @case(8)
    async def test_parallel_wrong_codes_cost_at_most_the_cap(self, bench: Bench) -> None:
        """Of 200 wrong codes at once at most the cap is compared; then the right code fails as well."""
        managers = await bench.two_managers(CODE)
        code = (await managers[0].issue(USER, SLUG)).key
        wrong = a_wrong_code(code)

        async def attempt(n: int) -> str:
            call = managers[n % 2].consume if n % 3 else managers[n % 2].verify
            try:
                await call(USER, SLUG, wrong)
            except InvalidToken as error:
                return type(error).__name__
            return "passed"

        outcomes = await at_once(attempt(n) for n in range(200))
        assert outcomes.count("InvalidToken") == CAP
        assert outcomes.count("TooManyAttempts") == 200 - CAP
        error = await refused(TooManyAttempts, managers[1].consume(USER, SLUG, code))
        assert error.retry_after == WINDOW.total_seconds()
        assert error.limit is not None
        assert (error.limit.count, error.limit.by) == (CAP, "object")

    @case(8)
    async def test_a_wrong_code_says_what_is_left(self, bench: Bench) -> None:
        """``attempts_left`` counts down with each wrong code, and ``status`` says the same; what is no code
        at all costs nothing."""
        manager = await bench.manager(CODE)
        code = (await manager.issue(USER, SLUG)).key
        for left in (4, 3, 2):
            error = await refused(InvalidToken, manager.consume(USER, SLUG, a_wrong_code(code)))
            assert error.attempts_left == left
            for typo in ("", "12345", "1234567", "12345x", "not a code", "\0", "x" * 600, code[:-1]):
                error = await refused(InvalidToken, manager.consume(USER, SLUG, typo), typo)
                assert (error.reason, error.attempts_left) == ("unknown", None)
            status = await manager.status(USER, SLUG)
            assert (status.attempts_left, status.attempts_reset_at) == (left, bench.clock() + WINDOW)
        await manager.consume(USER, SLUG, f" {code[:3]}-{code[3:]}\n")

    @case(8)
    async def test_the_last_attempt_may_be_right(self, bench: Bench) -> None:
        """The last attempt under the cap may be right, and a right code costs nothing."""
        manager = await bench.manager(CODE)
        for _ in range(3):
            code = (await manager.issue(USER, SLUG)).key
            for _ in range(CAP - 1):
                await refused(InvalidToken, manager.verify(USER, SLUG, a_wrong_code(code)))
            for _ in range(CAP * 2):
                await manager.verify(USER, SLUG, code)
                assert await manager.exists_valid(USER, SLUG, code)
            await manager.consume(USER, SLUG, code)

    @case(8)
    async def test_the_right_code_twice_at_once(self, bench: Bench) -> None:
        """The right code twice at once on the last attempt gives one use, with one ``consume_id`` one answer,
        and no ``TooManyAttempts``."""
        managers = await bench.two_managers(CODE)
        for number in range(self.rounds):
            subject = Subject("auth.user", number)
            code = (await managers[0].issue(subject, SLUG)).key
            for _ in range(CAP - 1):
                await refused(InvalidToken, managers[0].verify(subject, SLUG, a_wrong_code(code)))
            name = "mine" if number % 2 else None
            won, lost = await race(
                [managers[n].consume(subject, SLUG, code, consume_id=name) for n in range(2)], InvalidToken
            )
            assert (len(won), [error.reason for error in lost]) == ((2, []) if name else (1, ["used"]))

    @case(8)
    async def test_a_success_resets_the_budget(self, bench: Bench) -> None:
        """A successful use, by ``consume`` or ``redeem``, resets the budget: the next token has all its
        attempts."""
        manager = await bench.manager(CODE)
        for redeems in (False, True):
            code = (await manager.issue(USER, SLUG)).key
            for _ in range(CAP - 1):
                await refused(InvalidToken, manager.verify(USER, SLUG, a_wrong_code(code)))
            if redeems:
                async with manager.redeem(USER, SLUG, code):
                    pass
            else:
                await manager.consume(USER, SLUG, code)
            assert (await manager.status(USER, SLUG)).attempts_left == CAP
        await exhaust(manager)
        await refused(TooManyAttempts, manager.verify(USER, SLUG, "000000"))

    @case(8)
    async def test_a_held_code_costs_nothing(self, bench: Bench) -> None:
        """The right code of a token whose use is held, or was made, is no wrong one."""
        manager, other = await bench.two_managers(CODE)
        code = (await manager.issue(USER, SLUG)).key
        block = await hanging(manager, code, SLUG)
        for _ in range(CAP * 2):
            await refused(TokenBusy, other.consume(USER, SLUG, code))
        await block.end()
        for _ in range(CAP * 2):
            assert (await refused(InvalidToken, other.consume(USER, SLUG, code))).reason == "used"
        assert (await other.status(USER, SLUG)).attempts_left == CAP

    @case(8)
    async def test_a_new_token_does_not_reset_the_budget(self, bench: Bench) -> None:
        """Re-issuing, deactivating and purging leave the spent attempts spent, and the cap in force; a hook
        that hears of the new code is told."""
        events: list[TokenEvent] = []
        manager = await bench.manager(CODE, hooks=[events.append])
        await manager.issue(USER, SLUG)
        await exhaust(manager)
        for _ in range(2):
            code = (await manager.issue(USER, SLUG)).key
            assert events[-1].attempts_reset_at == bench.clock() + WINDOW
            await refused(TooManyAttempts, manager.consume(USER, SLUG, code))
        await manager.deactivate(USER)
        await manager.purge()
        found = await manager.get_active_or_create(USER, SLUG)
        assert found.key is not None
        for call in (manager.consume, manager.verify, manager.exists_valid):
            await refused(TooManyAttempts, call(USER, SLUG, found.key))
        names = {event.limit for event in events if event.name == "capped"}
        assert [str(name).endswith(" by object") for name in names] == [True]

    @case(8)
    async def test_attempts_count_without_a_token(self, bench: Bench) -> None:
        """The budget is there whether or not a token is: attempts before the issue count."""
        manager = await bench.manager(CODE)
        await exhaust(manager)
        await refused(TooManyAttempts, manager.verify(USER, SLUG, "000000"))
        code = (await manager.issue(USER, SLUG)).key
        await refused(TooManyAttempts, manager.consume(USER, SLUG, code))

    @case(8)
    async def test_the_window_ends_and_grows(self, bench: Bench) -> None:
        """The window ends by itself, and one that was exhausted makes the next twice as long, up to a day;
        that is remembered for a day after its end, by purge as well."""
        manager = await bench.manager(CODE)
        window = WINDOW
        for _ in range(9):
            await exhaust(manager)
            bench.clock.advance(window - SECOND)
            code = (await manager.issue(USER, SLUG)).key
            error = await refused(TooManyAttempts, manager.consume(USER, SLUG, code))
            assert error.retry_after == 1
            bench.clock.advance(SECOND)
            assert (await manager.verify(USER, SLUG, code)).is_active
            await manager.purge()
            window = min(window * 2, DAY)
        await exhaust(manager)
        bench.clock.advance(2 * DAY)
        await exhaust(manager)
        status = await manager.status(USER, SLUG)
        assert (status.attempts_left, status.attempts_reset_at) == (0, bench.clock() + WINDOW)

    @case(7)
    async def test_a_moment_ten_years_ahead_locks_nobody_out(self, bench: Bench) -> None:
        """After a moment with a clock ten years ahead, attempts and issues are as free as if nothing had
        been."""
        manager = await bench.manager(TokenPolicy.code(SLUG, cooldown="1m"))
        start = bench.clock()
        bench.clock.set(start + timedelta(days=3650))
        await manager.issue(USER, SLUG)
        await exhaust(manager)
        bench.clock.set(start)
        status = await manager.status(USER, SLUG)
        assert (status.attempts_left, status.can_issue_at <= start) == (CAP, True)
        code = (await manager.issue(USER, SLUG)).key
        await exhaust(manager, codes=CAP - 1)
        await manager.consume(USER, SLUG, code)

    @case(8)
    async def test_budgets_are_apart(self, bench: Bench) -> None:
        """A budget belongs to one object and slug: another object, content type or slug has its own."""
        manager = await bench.manager(CODE, TokenPolicy.code("confirm"))
        await exhaust(manager)
        await refused(TooManyAttempts, manager.verify(USER, SLUG, "000000"))
        for subject, slug in (
            (Subject("auth.user", "4"), SLUG),
            (Subject("auth", "42"), SLUG),
            (USER, "confirm"),
        ):
            code = (await manager.issue(subject, slug)).key
            await refused(InvalidToken, manager.verify(subject, slug, a_wrong_code(code)))
            await manager.consume(subject, slug, code)

    @case(8)
    async def test_no_method_is_an_oracle(self, bench: Bench) -> None:
        """Where attempts are capped ``exists_valid`` and ``redeem`` count too; deactivating and listing
        take no code."""
        manager = await bench.manager(CODE)
        code = (await manager.issue(USER, SLUG)).key
        await refused(InvalidInput, manager.deactivate(USER, SLUG, code))

        async def listed() -> None:
            async for _ in manager.filter_active_tokens(USER, SLUG, code):
                raise AssertionError("a code was compared without counting")

        await refused(InvalidInput, listed())

        async def redeemed(key: str) -> None:
            async with manager.redeem(USER, SLUG, key):
                raise AssertionError("a wrong code was redeemed")

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
        issued = await manager.issue(USER, "reset")
        calls = [manager.verify(USER, "reset", f"wrong{n}") for n in range(30)]
        _, lost = await race(calls, InvalidToken)
        assert {error.attempts_left for error in lost} == {None}
        assert len(lost) == 30
        assert await manager.consume(USER, "reset", issued.key) == issued

    @case(8)
    async def test_attempts_by_address(self, bench: Bench) -> None:
        """A limit by a dimension counts over all objects, does not grow, and takes an IPv6 address by its
        network; a call without it is ``InvalidInput``, one that no limit names is ignored."""
        policy = TokenPolicy.code(SLUG, max_attempts=90, attempt_limits=[Limit(3, "1h", by="ip")])
        managers = await bench.two_managers(policy)
        await refused(InvalidInput, managers[0].verify(USER, SLUG, "000000"))
        addresses = ["2001:db8::1", "2001:db8::ffff%eth0", "2001:DB8:0:0::2", "2001:db8::9"]
        wrong = [Subject("auth.user", n) for n in range(4)]
        calls = [
            managers[n % 2].verify(subject, SLUG, "000000", by={"ip": address, "browser": "x"})
            for n, (subject, address) in enumerate(zip(wrong, addresses, strict=True))
        ]
        outcomes = [type(error) for error in (await _errors(calls))]
        assert (outcomes.count(InvalidToken), outcomes.count(TooManyAttempts)) == (3, 1)
        code = (await managers[0].issue(USER, SLUG)).key
        error = await refused(
            TooManyAttempts, managers[0].consume(USER, SLUG, code, by={"ip": "2001:db8::3"})
        )
        assert error.limit == policy.attempt_limits[0]
        for address in ("2001:db8:0:1::1", "192.0.2.7"):
            await managers[1].verify(USER, SLUG, code, by={"ip": address})
        for address in ("192.0.2.7", "::ffff:192.0.2.7", "192.0.2.7"):
            wrong_code = a_wrong_code(code)
            await refused(InvalidToken, managers[0].verify(USER, SLUG, wrong_code, by={"ip": address}))
        await refused(TooManyAttempts, managers[0].verify(USER, SLUG, code, by={"ip": "192.0.2.7"}))
        # What a success clears is the object's own.
        await managers[0].consume(USER, SLUG, code, by={"ip": "192.0.2.8"})
        await refused(TooManyAttempts, managers[0].verify(USER, SLUG, "111111", by={"ip": "192.0.2.7"}))
        bench.clock.advance(timedelta(hours=1))
        for _ in range(3):
            await refused(InvalidToken, managers[0].verify(USER, SLUG, "000000", by={"ip": "192.0.2.7"}))

    @case(8)
    async def test_codes_are_scoped_to_their_object(self, bench: Bench) -> None:
        """Equal codes of many objects and slugs live side by side, and each is its own object's alone."""
        policies = [TokenPolicy.code(slug, key_generator=lambda: "123456") for slug in (SLUG, "confirm")]
        manager = await bench.manager(*policies)
        subjects = [Subject("auth.user", n) for n in range(5)] + [Subject("auth.group", 1)]
        issued = [await manager.issue(subject, slug) for subject in subjects for slug in (SLUG, "confirm")]
        digests = [key.digest for token in await bench.stored() for key in token.keys]
        assert len(set(digests)) == len(issued)
        used = await manager.consume(subjects[1], SLUG, "123456")
        for token in issued:
            subject = Subject(token.content_type, token.object_id)
            if token != used:
                assert await manager.consume(subject, token.slug, "123456") == token
            await refused(InvalidToken, manager.verify(subject, token.slug, "123456"))

    @case(8)
    async def test_a_fixed_code_is_issued_without_end(self, bench: Bench) -> None:
        """A reviewer's fixed code is issued again and again, used or not, and belongs to its object alone."""
        reviewer = Subject("auth.phone", "+15550100")
        policy = TokenPolicy.code(SLUG, test_codes={reviewer: "123456"}, test_codes_why="store review")
        manager = await bench.manager(policy)
        for number in range(4):
            issued = await manager.issue(reviewer, SLUG)
            assert issued.key == "123456"
            if number % 2:
                assert await manager.consume(reviewer, SLUG, "123456") == issued
        assert len([token async for token in manager.history(reviewer)]) == 4
        others = await manager.issue(USER, SLUG)
        if others.key != "123456":
            await refused(InvalidToken, manager.verify(USER, SLUG, "123456"))


async def _errors(calls: Any) -> list[InvalidToken]:
    errors: list[InvalidToken] = []
    for call in calls:
        try:
            await call
        except InvalidToken as error:
            errors.append(error)
    return errors


class IssueLimitCases(Suite):
    """Cases of limits on new tokens."""

    @case(8)
    async def test_of_concurrent_issues_under_a_cooldown_one_goes_out(self, bench: Bench) -> None:
        """Of N concurrent issues under a cooldown exactly one token is made, however it is asked for."""
        managers = await bench.two_managers(TokenPolicy("reset", cooldown=COOLDOWN))
        for number in range(3):
            subject = Subject("auth.user", number)
            won, lost = await race(
                [managers[n % 2].issue(subject, "reset") for n in range(self.tasks)], CooldownActive
            )
            assert len(won) == 1
            assert {error.retry_after for error in lost} == {COOLDOWN.total_seconds()}
            assert await managers[0].verify(subject, "reset", won[0].key) == won[0]

    @case(8)
    async def test_a_cooldown_counts_from_the_last_token(self, bench: Bench) -> None:
        """The cooldown counts from the last token's creation, whatever became of it, for its object and
        slug alone; ``status`` says when it ends."""
        manager = await bench.manager(TokenPolicy("reset", cooldown=COOLDOWN))
        assert (await manager.status(USER, "reset")).can_issue_at <= bench.clock()
        first = await manager.issue(USER, "reset")
        again_at = bench.clock() + COOLDOWN
        bench.clock.advance(COOLDOWN - SECOND)
        assert await manager.get_active_or_create(USER, "reset") == first
        error = await refused(CooldownActive, manager.issue(USER, "reset"))
        assert (error.retry_after, error.limit and error.limit.count) == (1, 1)
        assert (await manager.status(USER, "reset")).can_issue_at == again_at
        assert await manager.consume(USER, "reset", first.key) == first
        for call in (manager.issue, manager.get_active_or_create):
            await refused(CooldownActive, call(USER, "reset"))
        await manager.issue(Subject("auth.user", "43"), "reset")
        await manager.issue(USER, "confirm")
        bench.clock.advance(SECOND)
        second = await manager.get_active_or_create(USER, "reset")
        assert second != first
        await refused(CooldownActive, manager.issue(USER, "reset"))

    @case(8)
    async def test_a_failed_issue_costs_no_cooldown(self, bench: Bench) -> None:
        """An issue that fails makes no token, and so no cooldown."""
        manager = await bench.manager(TokenPolicy("reset", cooldown=COOLDOWN))
        other = await manager.issue(Subject("auth.user", "43"), "reset")

        def broken() -> str:
            raise ZeroDivisionError

        kwargs = {"generator": broken}
        for call in (manager.issue, manager.get_active_or_create):
            await refused(ZeroDivisionError, call(USER, "reset", key_generator_kwargs=kwargs))
        await refused(InvalidInput, manager.issue(USER, "reset", extra_data={1}))
        taken = {"generator": lambda: other.key}
        for call in (manager.issue, manager.get_active_or_create):
            await refused(KeyGenerationError, call(USER, "reset", key_generator_kwargs=taken))
        assert (await manager.issue(USER, "reset")).is_active

    @case(8)
    async def test_contexts_cool_down_apart(self, bench: Bench) -> None:
        """A stranger who asks for the owner's token with a cookie of his own neither delays nor ends it; a
        limit on the object bounds the mails; and the owner's use ends the stranger's tokens."""
        policy = TokenPolicy.link(
            "login", context="required", cooldown=COOLDOWN, issue_limits=[Limit(4, "1h")]
        )
        manager = await bench.manager(policy)
        mine = await manager.issue(USER, "login", context="my browser")
        others = [await manager.issue(USER, "login", context=f"stranger {n}") for n in range(3)]
        error = await refused(CooldownActive, manager.issue(USER, "login", context="stranger 4"))
        assert error.limit == policy.issue_limits[0]
        error = await refused(CooldownActive, manager.issue(USER, "login", context="my browser"))
        for stranger in ("stranger 0", ""):
            await refused(InvalidToken, manager.verify(USER, "login", mine.key, context=stranger))
        last = others[-1]
        assert await manager.verify(USER, "login", mine.key, context="my browser") == mine
        assert await manager.consume(USER, "login", last.key, context="stranger 2") == last
        for number, token in enumerate([mine, *others[:-1]]):
            context = f"stranger {number - 1}" if number else "my browser"
            await refused(InvalidToken, manager.verify(USER, "login", token.key, context=context))
        bench.clock.advance(timedelta(hours=1))
        await manager.issue(USER, "login", context="my browser")

    @case(8)
    async def test_purposes_share_a_budget(self, bench: Bench) -> None:
        """Slugs whose limits name one ``across`` share a budget; a request is charged by all its limits or by
        none."""
        policies = [
            TokenPolicy.code(slug, issue_limits=[Limit(5, "1d", across="sms"), Limit(3, "1h", by="slug")])
            for slug in (SLUG, "confirm")
        ]
        managers = await bench.two_managers(*policies)
        for number in range(3):
            await managers[number % 2].issue(USER, SLUG)
        for _ in range(3):  # refused by the slug's limit, so that the other is not charged
            error = await refused(CooldownActive, managers[1].issue(USER, SLUG))
            assert error.limit == policies[0].issue_limits[1]
            await refused(CooldownActive, managers[1].issue(Subject("auth.user", 7), SLUG))
        for number in range(2):
            await managers[number % 2].issue(USER, "confirm")
        error = await refused(CooldownActive, managers[0].issue(USER, "confirm"))
        assert (error.limit, error.retry_after) == (policies[1].issue_limits[0], DAY.total_seconds())
        await managers[0].issue(Subject("auth.user", 7), "confirm")

    @case(8)
    async def test_an_answer_that_is_sent_again_counts(self, bench: Bench) -> None:
        """``get_active_or_create`` with derived keys gives the key again as often as the limits allow, and
        then the token without it: no page view buys a mail."""
        policy = TokenPolicy.link("invite", key_storage="derived", issue_limits=[Limit(3, "1h")])
        managers = await bench.two_managers(policy)
        shown = [await managers[n % 2].get_active_or_create(USER, "invite") for n in range(self.tasks)]
        assert len(set(shown)) == 1
        keys = [token.key for token in shown]
        assert keys == [shown[0].key] * 3 + [None] * (self.tasks - 3)
        assert keys[0] is not None
        await refused(CooldownActive, managers[0].issue(USER, "invite"))
        bench.clock.advance(timedelta(hours=1))
        await managers[0].issue(USER, "invite")

    @case(8)
    async def test_support_unlocks_an_account(self, bench: Bench) -> None:
        """``reset_limits`` starts an object's budgets afresh, of one purpose or of all, and nobody else's."""
        policies = [TokenPolicy.code(slug, cooldown="1h") for slug in (SLUG, "confirm")]
        manager = await bench.manager(*policies)
        other = Subject("auth.user", "43")
        for subject in (USER, other):
            for slug in (SLUG, "confirm"):
                await manager.issue(subject, slug)
                await exhaust(manager, subject, slug=slug)
        assert await manager.reset_limits(USER, SLUG) == 2
        await manager.issue(USER, SLUG)
        await refused(CooldownActive, manager.issue(USER, "confirm"))
        await refused(TooManyAttempts, manager.verify(USER, "confirm", "000000"))
        assert await manager.reset_limits(USER) == 3
        await manager.issue(USER, "confirm")
        await exhaust(manager, slug="confirm")
        await refused(TooManyAttempts, manager.verify(other, SLUG, "000000"))
        await refused(InvalidInput, manager.reset_limits(Subject("auth.user")))

    @case(9)
    async def test_budgets_are_drained(self, bench: Bench) -> None:
        """Thousands of attempts at unknown objects leave budgets that one purge removes, though there is no
        token; nothing of an attacker's length or text is stored in them."""
        managers = await bench.two_managers(CODE)
        long = "a stranger's address " + "x" * 400
        subjects = [Subject("auth.user", f"{long}{n}") for n in range(150)]
        _, lost = await race(
            [managers[n % 2].verify(s, SLUG, "000000") for n, s in enumerate(subjects)], InvalidToken
        )
        assert len(lost) == len(subjects)
        assert b"stranger" not in bench.raw()
        bench.clock.advance(WINDOW + DAY)
        assert await managers[0].purge(batch_size=40) == 0
        backend = await bench.backend()
        late = 2 * bench.clock.milliseconds
        await put(backend)  # beside which a store may purge what it did not purge alone
        assert await backend.purge(late, late, 9_999, late) == (1, 0)
