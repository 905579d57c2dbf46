"""What an application needs around a token: pairs, batches, keys had again, screens, erasure."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any, Final

from vtoken.errors import ConfigurationError, CooldownActive, InvalidInput, InvalidToken, TooManyAttempts
from vtoken.limits import Limit
from vtoken.manager import TokenManager
from vtoken.policy import Settings, TokenPolicy
from vtoken.subject import Subject
from vtoken.testing.cases.limits import a_wrong_code
from vtoken.testing.cases.once import active_ids, stored_as
from vtoken.testing.harness import SECRET, USER, Bench, Suite, at_once, case, refused
from vtoken.token import IssuedToken, VerificationToken

MILLISECOND: Final = timedelta(milliseconds=1)
MINUTE: Final = timedelta(minutes=1)
PAIR: Final = TokenPolicy.pair("login", expiration="1h", max_attempts=3)


def code_of(token: VerificationToken) -> str:
    assert token.code is not None
    return token.code


class PairCases(Suite):
    """Cases of tokens with a link and a code."""

    @case(1)
    async def test_either_key_of_a_pair_ends_both(self, bench: Bench) -> None:
        """Either key of a pair is accepted by every method, and the use by one ends both."""
        managers = await bench.two_managers(PAIR)
        for by_code in (False, True):
            issued = await managers[0].issue(USER, "login")
            keys = [issued.key, code_of(issued)]
            for key in keys:
                assert await managers[1].verify(USER, "login", key) == issued
                assert await managers[1].exists_valid(USER, "login", key)
            calls = [managers[n % 2].consume(USER, "login", keys[n // 2 % 2]) for n in range(self.tasks)]
            assert len([won for won in await _wins(calls) if won == issued]) == 1
            async_key = keys[by_code]
            await refused(InvalidToken, managers[0].verify(USER, "login", async_key))
            issued = await managers[0].issue(USER, "login")
            async with managers[0].redeem(USER, "login", (issued.key, code_of(issued))[by_code]):
                for key in (issued.key, code_of(issued)):
                    assert (await refused_reason(managers[1], key)) == "leased"

    @case(8)
    async def test_a_spent_budget_leaves_the_link(self, bench: Bench) -> None:
        """Only what has the shape of a code is charged; a spent budget leaves the link usable, and the code
        ends before the link."""
        manager = await bench.manager(PAIR)
        issued = await manager.issue(USER, "login")
        for wrong in ("no code", "12345", issued.key[:-1], "x" * 32):
            error = await refused(InvalidToken, manager.verify(USER, "login", wrong), wrong)
            assert error.attempts_left is None
        for left in (2, 1, 0):
            wrong = a_wrong_code(code_of(issued))
            error = await refused(InvalidToken, manager.verify(USER, "login", wrong))
            assert error.attempts_left == left
        await refused(TooManyAttempts, manager.consume(USER, "login", code_of(issued)))
        assert await manager.verify(USER, "login", issued.key) == issued
        await manager.consume(USER, "login", issued.key)
        bench.clock.advance(timedelta(days=3))
        issued = await manager.issue(USER, "login")
        assert issued.code_expires_at == bench.clock() + 10 * MINUTE
        bench.clock.advance(10 * MINUTE)
        assert await manager.verify(USER, "login", code_of(issued)) == issued
        bench.clock.advance(MILLISECOND)
        error = await refused(InvalidToken, manager.verify(USER, "login", code_of(issued)))
        assert (error.reason, error.token) == ("expired", None)
        assert await manager.verify(USER, "login", issued.key) == issued
        # What is sent as a link and a code is replaced when one of the two is over.
        assert await manager.get_active_or_create(USER, "login") != issued
        await refused(InvalidToken, manager.verify(USER, "login", issued.key))

    @case(6)
    async def test_a_pair_may_be_bound_by_its_link_alone(self, bench: Bench) -> None:
        """``context="required"`` binds both keys, ``code_context="ignored"`` the link alone; a class in place
        of the object will do for the link, never for the code."""
        both = TokenPolicy.pair("both", context="required")
        link = TokenPolicy.pair("link", context="required", code_context="ignored")
        manager = await bench.manager(both, link)
        for slug in ("both", "link"):
            issued = await manager.issue(USER, slug, context="my browser")
            for key in (issued.key, code_of(issued)):
                assert await manager.verify(USER, slug, key, context="my browser") == issued
            for context in (None, "another"):
                await refused(InvalidToken, manager.verify(USER, slug, issued.key, context=context))
            if slug == "link":
                assert await manager.verify(USER, slug, code_of(issued)) == issued
            else:
                await refused(InvalidToken, manager.verify(USER, slug, code_of(issued), context="another"))
            anyone = Subject("auth.user")
            assert await manager.verify(anyone, slug, issued.key, context="my browser") == issued
            await refused(InvalidToken, manager.verify(anyone, slug, code_of(issued), context="my browser"))

    @case(2)
    async def test_pairs_overlap_as_one(self, bench: Bench) -> None:
        """Under an overlap both keys of the predecessor stay good, and a use by any of the four ends all."""
        manager = await bench.manager(TokenPolicy.pair("login", overlap="5m", max_attempts=50))
        for used in range(4):
            tokens = [await manager.issue(USER, "login") for _ in range(3)][1:]
            keys = [key for token in tokens for key in (token.key, code_of(token))]
            if len({*keys}) < len(keys):
                continue  # both drew one code, once in a million
            for key in keys:
                assert await manager.verify(USER, "login", key) == tokens[1]
            assert await manager.consume(USER, "login", keys[used]) == tokens[1]
            for key in keys:
                await refused(InvalidToken, manager.verify(USER, "login", key))


async def refused_reason(manager: TokenManager, key: str) -> str:
    try:
        await manager.verify(USER, "login", key)
    except InvalidToken as error:
        return error.reason
    return ""


async def _wins(calls: list[Any]) -> list[Any]:
    async def attempt(call: Any) -> Any:
        try:
            return await call
        except InvalidToken:
            return None

    return await at_once(attempt(call) for call in calls)


class AgainCases(Suite):
    """Cases of keys that can be had again."""

    @case(10)
    async def test_a_derived_key_is_revealed(self, bench: Bench) -> None:
        """``reveal`` gives key and code of a derived token again, the first time without a charge, and None
        once it is over; the store holds neither."""
        policies = [
            TokenPolicy.link("link", key_storage="derived", issue_limits=[Limit(2, "1h")]),
            TokenPolicy.pair("pair", key_storage="derived", issue_limits=[Limit(2, "1h")]),
            TokenPolicy.code("code", key_storage="derived", issue_limits=[Limit(2, "1h")]),
        ]
        issuer, worker = await bench.two_managers(*policies)
        for policy in policies:
            issued = await issuer.issue(USER, policy.slug)
            loaded = await stored_as(worker, issued)
            assert (loaded.key, loaded.code) == (None, None)
            for _ in range(2):  # the first is free, the second spends what the issue has left
                again = await worker.reveal(loaded)
                assert again is not None
                assert (again, again.key, again.code) == (issued, issued.key, issued.code)
            await refused(CooldownActive, issuer.reveal(issued))
            raw = bench.raw()
            for key in (issued.key, issued.code):
                assert key is None or key.encode() not in raw or len(key) < 9
            await issuer.consume(USER, policy.slug, issued.key)
            assert await worker.reveal(loaded) is None
        await issuer.reset_limits(USER)
        erased = await issuer.issue(USER, "link")
        await issuer.erase(USER)
        assert await worker.reveal(erased) is None
        plain = await issuer.issue(USER, "plain")
        await refused(ConfigurationError, worker.reveal(plain))

    @case(3)
    async def test_a_batch_creates_nothing_twice(self, bench: Bench) -> None:
        """``issue_many`` with a ``batch``, run again after it was cut short and twice at once, creates and
        charges nothing twice, yields the same keys in the order of the objects, and None for what is over."""
        policy = TokenPolicy.link("invite", key_storage="derived", issue_limits=[Limit(1, "1h")])
        managers = await bench.two_managers(policy)
        subjects = [Subject("auth.user", n) for n in range(25)]

        async def run(n: int, count: int = 25) -> list[VerificationToken]:
            tokens = managers[n].issue_many(_slowly(subjects), "invite", batch="spring")
            return [await anext(tokens) for _ in range(count)]

        first = await run(0, 10)
        runs = await at_once([run(0), run(1)])
        keys = [token.key for token in runs[0]]
        assert [token.key for token in runs[1]] == keys
        assert keys[:10] == [token.key for token in first]
        assert None not in keys
        assert [token.object_id for token in runs[0]] == [str(n) for n in range(25)]
        assert len(await bench.stored()) == 25
        await managers[0].consume(subjects[3], "invite", str(keys[3]))
        await managers[0].deactivate(subjects[5])
        again = await run(1)
        assert [token.key for token in again] == [None if n in (3, 5) else key for n, key in enumerate(keys)]
        assert len(await bench.stored()) == 25

    @case(8)
    async def test_many_are_issued_in_order(self, bench: Bench) -> None:
        """``issue_many`` yields a token for each object in their order, tells its progress, and raises at the
        first that is over a limit, after those before it."""
        policy = TokenPolicy.link("news", cooldown="1h")
        manager = await bench.manager(policy)
        subjects = [Subject("auth.user", n) for n in range(20)]
        await manager.issue(subjects[12], "news")
        told: list[int] = []
        made: list[VerificationToken] = []

        async def run() -> None:
            tokens = manager.issue_many(subjects, "news", progress=told.append)
            while True:
                made.append(await anext(tokens))

        await refused(CooldownActive, run())
        assert [token.object_id for token in made] == [str(n) for n in range(12)]
        assert all(isinstance(token, IssuedToken) for token in made)
        for token in made:
            subject = Subject(token.content_type, token.object_id)
            assert await manager.verify(subject, "news", str(token.key)) == token
        assert told
        await refused(ConfigurationError, anext(manager.issue_many(subjects, "news", batch="x")))


async def _slowly(subjects: list[Subject]) -> AsyncIterator[Subject]:
    for subject in subjects:
        yield subject


class ScreenCases(Suite):
    """Cases of what is shown, and of what is erased."""

    @case(6)
    async def test_nobody_is_told_from_somebody(self, bench: Bench) -> None:
        """``pretend`` meets the limits of ``issue``, shows the same status and errors, leaves no name and
        nothing that is valid, active, listed or counted, and nothing at all after a purge."""
        policy = TokenPolicy.code("sms-login", cooldown="1m", issue_limits=[Limit(2, "1h")])
        manager, other = await bench.two_managers(policy)
        nobody = Subject("auth.phone", "+15550199-nobody")

        async def seen(subject: Subject) -> list[object]:
            status = await other.status(subject, "sms-login")
            wrong = await refused(InvalidToken, other.verify(subject, "sms-login", "000000"))
            return [status, wrong.reason, wrong.attempts_left]

        steps: list[tuple[object, object]] = []
        for _ in range(2):
            await manager.issue(USER, "sms-login")
            await manager.pretend(nobody, "sms-login")
            for _ in range(2):
                errors = [
                    await refused(CooldownActive, manager.issue(USER, "sms-login")),
                    await refused(CooldownActive, manager.pretend(nobody, "sms-login")),
                ]
                assert len({(error.retry_after, error.limit) for error in errors}) == 1
            steps.append((await seen(USER), await seen(nobody)))
            bench.clock.advance(MINUTE)
        for real, pretended in steps:
            assert real == pretended
        assert not await manager.exists_valid(nobody)
        assert await active_ids(manager, nobody, "sms-login") == []
        assert [token async for token in manager.history(nobody)] == []
        assert (await manager.stats()).total == 2
        assert b"nobody" not in bench.raw()
        await manager.issue(Subject("auth.phone", "real"), "sms-login")
        await manager.purge()
        assert [token.object_id for token in await bench.stored() if token.content_type != "auth.phone"] == [
            "42"
        ]

    @case(6)
    async def test_status_says_how_things_stand(self, bench: Bench) -> None:
        """``status`` tells of the newest valid token and of the limits, and writes nothing."""
        policy = TokenPolicy.code("sms-login", cooldown="1m")
        manager, other = await bench.two_managers(policy)
        now = bench.clock()
        status = await other.status(USER, "sms-login")
        assert (status.has_valid, status.expires_at, status.attempts_left) == (False, None, 5)
        assert status.attempts_reset_at is None
        assert status.can_issue_at <= now
        code = (await manager.issue(USER, "sms-login")).key
        status = await other.status(USER, "sms-login")
        assert (status.has_valid, status.expires_at) == (True, now + 10 * MINUTE)
        assert status.can_issue_at == now + MINUTE
        async with manager.redeem(USER, "sms-login", code):
            assert not (await other.status(USER, "sms-login")).has_valid  # its only use is held
        before = await bench.stored()
        for _ in range(3):
            assert not (await other.status(USER, "sms-login")).has_valid
        forever = await manager.issue(USER, "reset", expires_in=None)
        status = await other.status(USER, "reset")
        assert (status.has_valid, status.expires_at, status.attempts_left) == (True, None, None)
        pair = TokenPolicy.pair("log-in")
        manager, other = await bench.two_managers(pair)
        for subject, call in ((USER, manager.issue), (Subject("auth.user", "nobody"), manager.pretend)):
            await call(subject, "log-in")
            for _ in range(2):  # the code is over when the link is still good
                status = await other.status(subject, "log-in")
                assert (status.expires_at, status.code_expires_at) == (now + 60 * MINUTE, now + 10 * MINUTE)
                bench.clock.advance(11 * MINUTE)
            bench.clock.set(now)
        await manager.erase(USER)
        assert forever not in before
        assert not (await other.status(USER, "reset")).has_valid
        await refused(InvalidInput, manager.status(Subject("auth.user"), "reset"))

    @case(6)
    async def test_erase_removes_a_person(self, bench: Bench) -> None:
        """``erase`` removes every token of an object whatever its state, with its budgets, nobody else's, and
        says how many; a class is refused."""
        policy = TokenPolicy.code("sms-login", cooldown="1h")
        manager, other = await bench.two_managers(policy)
        gone = Subject("auth.user", "somebody-who-leaves")
        issued = await manager.issue(gone, "sms-login")
        await refused(InvalidToken, manager.verify(gone, "sms-login", a_wrong_code(issued.key)))
        used = await manager.issue(gone, "reset")
        await manager.consume(gone, "reset", used.key, consume_id="mine")
        await manager.issue(gone, "reset")
        await manager.issue(gone)
        await manager.pretend(gone, "news")
        kept = await manager.issue(USER, "reset")
        assert await manager.erase(gone) == 4
        assert [token async for token in other.history(gone)] == []
        assert await bench.stored() == [token for token in await bench.stored() if token.id == kept.id]
        status = await other.status(gone, "sms-login")
        assert (status.attempts_left, status.can_issue_at <= bench.clock()) == (5, True)
        assert await manager.erase(gone) == 0
        await refused(InvalidInput, manager.erase(Subject("auth.user")))

    @case(11)
    async def test_stats_tell_the_states_apart(self, bench: Bench) -> None:
        """``stats`` counts each token as active, expired, used or none of them, in all and by slug."""
        manager = await bench.manager()
        await manager.issue(USER, "a")
        await manager.issue(USER, "b", expires_in="1m")
        await manager.issue(USER)
        await manager.issue(USER)
        used = await manager.issue(USER, "c")
        await manager.consume(USER, "c", used.key)
        bench.clock.advance(2 * MINUTE)
        stats = await manager.stats()
        assert (stats.total, stats.active, stats.expired, stats.used) == (5, 2, 1, 1)
        assert {slug: one.total for slug, one in stats.by_slug.items()} == {"a": 1, "b": 1, None: 2, "c": 1}

    @case(4)
    async def test_secrets_may_be_rotated(self, bench: Bench) -> None:
        """Keys that were issued under a previous secret stay good, each once, and rotating renames no
        budget."""
        policies = [TokenPolicy.code("sms-login", cooldown="1h"), TokenPolicy("reset", key_storage="derived")]
        old = await bench.manager(*policies)
        code = (await old.issue(USER, "sms-login")).key
        link = (await old.issue(USER, "reset")).key
        settings = Settings(secret="another secret of the suite, of 32 bytes", previous_secrets=[SECRET])
        new = await bench.manager(*policies, settings=settings)
        await refused(CooldownActive, new.issue(USER, "sms-login"))
        await refused(InvalidToken, new.verify(USER, "sms-login", a_wrong_code(code)))
        assert (await old.status(USER, "sms-login")).attempts_left == 4
        again = await new.get_active_or_create(USER, "reset")
        assert again.key == link
        await new.consume(USER, "sms-login", code)
        await new.consume(USER, "reset", link)
        for manager in (old, new):
            await refused(InvalidToken, manager.consume(USER, "sms-login", code))
            await refused(InvalidToken, manager.consume(USER, "reset", link))
