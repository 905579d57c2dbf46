"""What was reported of other software that does this job, tried on this one: each report with its input, on
each backend.

The numbers are those of the list that these tests were written from.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import hashlib
import logging
import pickle
from collections import Counter
from datetime import datetime, timedelta
from typing import Any, Final

import pytest

from vtoken import (
    AlreadyUsed,
    ConfigurationError,
    ContentTypes,
    CooldownActive,
    InvalidInput,
    InvalidToken,
    IssuedToken,
    LeaseLost,
    Limit,
    OutcomeUnknown,
    Settings,
    Subject,
    TokenBusy,
    TokenManager,
    TokenPolicy,
    TooManyAttempts,
    VerificationToken,
)
from vtoken.backend import InsertMode
from vtoken.migrate import copy as copy_tokens
from vtoken.redact import redact_url
from vtoken_backends.memory import MemoryBackend

from .core_tools import (
    CODE,
    MINUTE,
    MS,
    OTHER,
    SECRET,
    SECRETS,
    USER,
    WRONG,
    WRONG_CODE,
    World,
    listed,
    reason,
    redeem,
    refused,
    wrong_codes,
)

DAY: Final = timedelta(days=1)
SHARED: Final = TokenPolicy("invite", max_uses=50, key_storage="derived")


class User:
    def __init__(self, number: int | None = 42) -> None:
        self.id = number


class Lazy:
    """What Django's SimpleLazyObject does about its class."""

    def __init__(self, of: object) -> None:
        self.__dict__["of"] = of

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["of"], name)

    @property  # type: ignore[misc]  # it is how such proxies are made
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]  # likewise
        return type(self.__dict__["of"])


class TestRedemption:
    async def test_01_a_page_view_does_not_revoke_a_shared_invitation(self, any_world: World) -> None:
        manager = await any_world.manager(SHARED)
        posted = await manager.get_active_or_create(USER, "invite")
        assert posted.key is not None
        async with manager.redeem(USER, "invite", posted.key):
            shown = await manager.get_active_or_create(USER, "invite")
            assert (shown, shown.key) == (posted, posted.key)
        together, entered = asyncio.Event(), 0

        async def join(key: str) -> None:
            nonlocal entered
            async with manager.redeem(USER, "invite", key):
                entered += 1
                if entered == 30:
                    together.set()
                await together.wait()

        await asyncio.gather(*[join(posted.key) for _ in range(30)])
        found = await manager.get(posted.id)
        assert found is not None
        assert (found.uses, found.is_active) == (31, True)

    async def test_02_deactivating_the_persons_tokens_inside_the_block(self, any_world: World) -> None:
        manager = await any_world.manager()
        token = await manager.issue(USER, "password-reset")
        other = await manager.issue(USER, "log-in")
        async with manager.redeem(USER, "password-reset", token.key, consume_id="form"):
            assert await manager.deactivate(USER) == 2
        assert (await manager.consume(USER, "password-reset", token.key, consume_id="form")).uses == 1
        assert await reason(manager.consume(USER, "log-in", other.key)) == "inactive"

    async def test_03_a_reissue_while_a_block_runs(self, any_world: World) -> None:
        manager = await any_world.manager(TokenPolicy("overlapping", overlap="10m"))
        for slug in ("plain", "overlapping"):
            old = await manager.issue(USER, slug)
            async with manager.redeem(USER, slug, old.key):
                new = await manager.issue(USER, slug)
                # No second block runs on the old link.
                assert await reason(redeem(manager, slug, old.key)) == "inactive"
            assert await reason(manager.verify(USER, slug, old.key)) == "used"
            assert await redeem(manager, slug, new.key) == new.id

    async def test_04_aclose_during_redeem(self, any_world: World) -> None:
        manager = TokenManager(any_world.backend, clock=any_world.clock)
        for _ in range(5):
            await manager.open()
            token = await manager.issue(USER, "a")
            entered = asyncio.Event()

            async def work(key: str = token.key, entered: asyncio.Event = entered) -> None:
                async with manager.redeem(USER, "a", key):
                    entered.set()
                    await asyncio.Event().wait()

            task = asyncio.create_task(work())
            await entered.wait()
            task.cancel()
            await manager.aclose()
            await asyncio.wait([task])
            async with manager:
                assert await manager.consume(USER, "a", token.key) == token

    async def test_05_a_second_click(self, any_world: World) -> None:
        manager = await any_world.manager(CODE)
        for slug in ("reset", "login"):
            token = await manager.issue(USER, slug)
            async with manager.redeem(USER, slug, token.key, consume_id="form"):
                await refused(TokenBusy, redeem(manager, slug, token.key, consume_id="form"))
                waiting = asyncio.create_task(redeem(manager, slug, token.key, consume_id="form", wait="60s"))
            assert (await refused(AlreadyUsed, waiting)).token == token
            assert (
                await refused(AlreadyUsed, redeem(manager, slug, token.key, consume_id="form"))
            ).token == token

    async def test_06_a_token_beside_given_back_while_another_is_asked_for(self, any_world: World) -> None:
        manager = await any_world.manager(TokenPolicy("b", overlap="10m"))
        for number in range(8):
            person = Subject("auth.user", number)
            token = await manager.issue(person, "a", replace=False)

            async def fail(person: Subject = person, key: str = token.key) -> None:
                async with manager.redeem(person, "a", key):
                    await asyncio.sleep(0)
                    raise ZeroDivisionError

            asked = asyncio.create_task(manager.get_active_or_create(person, "a"))
            await refused(ZeroDivisionError, fail())
            assert await asked == token
            assert await listed(manager.filter_active_tokens(person, "a")) == [token]

    async def test_06_if_none_valid_beside_an_overlapping_replace(self, any_world: World) -> None:
        manager = await any_world.manager(TokenPolicy("b", overlap="10m"))
        for number in range(8):
            person = Subject("auth.user", number)
            held = await manager.issue(person, "b")
            block = manager.redeem(person, "b", held.key)
            await block.__aenter__()
            found, new = await asyncio.gather(
                manager.get_active_or_create(person, "b"), manager.issue(person, "b")
            )
            assert found in (held, new)
            assert await listed(manager.filter_active_tokens(person, "b")) == [new]
            await block.__aexit__(None, None, None)
            assert await manager.consume(person, "b", new.key) == new

    async def test_07_an_overlap_keeps_one_predecessor(self, any_world: World) -> None:
        manager = await any_world.manager(TokenPolicy.code("sms", overlap="10m", max_attempts=100))
        codes = [(await manager.issue(USER, "sms")).key for _ in range(20)]
        good = [await manager.exists_valid(USER, "sms", code) for code in codes[-5:]]
        assert good == [False, False, False, True, True]
        [token] = await listed(manager.filter_active_tokens(USER))
        [stored] = [stored for stored in await any_world.stored() if stored.id == token.id]
        assert len(stored.keys) == 2

    async def test_08_a_consume_id_after_its_time(self, any_world: World) -> None:
        manager = await any_world.manager()
        token = await manager.issue(USER, "a")
        await manager.consume(USER, "a", token.key, consume_id="constant")
        await manager.deactivate(USER)
        assert (await manager.consume(USER, "a", token.key, consume_id="constant")).is_replay
        assert any_world.event_names == ["issued", "consumed", "replayed"]
        any_world.clock.advance(2 * DAY)
        assert await reason(manager.consume(USER, "a", token.key, consume_id="constant")) == "used"
        assert any_world.event_names[-1] == "reused"

    async def test_08_a_constant_id_is_told_to_the_hundred(self, any_world: World) -> None:
        manager = await any_world.manager(TokenPolicy("invite", max_uses=3))
        token = await manager.issue(USER, "invite")
        calls = [manager.consume(USER, "invite", token.key, consume_id="constant") for _ in range(100)]
        answers = await asyncio.gather(*calls)
        assert Counter(answer.is_replay for answer in answers) == {False: 1, True: 99}
        assert any_world.event_names.count("replayed") == 99
        assert answers[0].uses == 1

    async def test_08_the_right_code_on_the_last_attempt_with_an_unknown_outcome(
        self, any_world: World
    ) -> None:
        manager = await any_world.manager(CODE)
        for happened in (True, False):
            token = await manager.issue(USER, "login")
            for code in wrong_codes(token.key, 4):
                await refused(InvalidToken, manager.verify(USER, "login", code))

            async def lost() -> None:
                raise OutcomeUnknown("the connection broke")

            when = any_world.backend.after if happened else any_world.backend.before
            when["present"] = lost
            await refused(OutcomeUnknown, manager.consume(USER, "login", token.key, consume_id="form"))
            when.clear()
            answer = await manager.consume(USER, "login", token.key, consume_id="form")
            assert (answer, answer.is_replay) == (token, happened)

    async def test_09_many_uses_do_not_grow_the_record(self, any_world: World) -> None:
        manager = await any_world.manager(TokenPolicy("invite", max_uses=None))
        token = await manager.issue(USER, "invite")
        sizes: list[int] = []
        for start, end in ((0, 100), (100, 140), (140, 180)):
            names = [f"use {number}" for number in range(start, end)]
            await asyncio.gather(
                *[manager.consume(USER, "invite", token.key, consume_id=name) for name in names]
            )
            [stored] = await any_world.stored()
            sizes.append(len(repr(tuple(stored))))
        assert len(set(sizes)) == 1
        assert (await manager.consume(USER, "invite", token.key, consume_id="use 0")).is_replay
        found = await manager.get(token.id)
        assert found is not None
        assert found.uses == 180


class TestLimits:
    async def test_10_the_right_code_twice_at_once_after_four_wrong_ones(self, any_world: World) -> None:
        manager = await any_world.manager(CODE)
        for number in range(8):
            person = Subject("auth.user", number)
            token = await manager.issue(person, "login")
            for code in wrong_codes(token.key, 4):
                await refused(InvalidToken, manager.verify(person, "login", code))
            name = "form" if number % 2 else None
            calls = [manager.consume(person, "login", token.key, consume_id=name) for _ in range(2)]
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert not [result for result in results if isinstance(result, TooManyAttempts)]
            won = [result for result in results if isinstance(result, VerificationToken)]
            assert len(won) == (2 if name else 1)
            assert sorted(token.is_replay for token in won) == [False, True][: len(won)]

    async def test_11_a_stranger_with_another_cookie_keeps_nobody_out(self, any_world: World) -> None:
        policy = TokenPolicy.link(
            "magic", context="required", cooldown="1m", issue_limits=[Limit(5, "1h", by="ip")]
        )
        manager = await any_world.manager(policy)
        logged_in = 0
        refusals = 0
        for number in range(24):
            try:
                await manager.issue(USER, "magic", context="the stranger's", by={"ip": "198.51.100.1"})
            except CooldownActive:
                refusals += 1
            token = await manager.issue(USER, "magic", context="the owner's", by={"ip": "192.0.2.7"})
            await manager.issue(
                USER, "magic", context=f"another {number}", by={"ip": f"198.51.100.{2 + number}"}
            )
            await manager.consume(USER, "magic", token.key, context="the owner's", by={"ip": "192.0.2.7"})
            logged_in += 1
            any_world.clock.advance(timedelta(minutes=15))
        assert logged_in == 24
        assert refusals == 0  # four an hour of one address are within its limit

    async def test_12_many_calls_are_not_many_mails(self, any_world: World) -> None:
        manager = await any_world.manager(TokenPolicy("reset", key_storage="derived", cooldown="1m"))
        answers = [await manager.get_active_or_create(USER, "reset") for _ in range(20)]
        assert len(set(answers)) == 1
        assert len([answer for answer in answers if answer.key is not None]) == 1

    async def test_12_what_one_number_gets_in_a_day_over_several_purposes(self, any_world: World) -> None:
        limits = [Limit(20, "1d", across="sms")]
        slugs = ("log-in", "confirm", "pay", "change")
        policies = [TokenPolicy.code(slug, cooldown="1m", issue_limits=limits) for slug in slugs]
        manager = await any_world.manager(*policies)
        sent = 0
        for _ in range(10):
            for slug in slugs:
                try:
                    await manager.issue(USER, slug)
                    sent += 1
                except CooldownActive as error:
                    assert error.limit == limits[0]  # noqa: PT017  # most of the calls are refused
            any_world.clock.advance(MINUTE)
        assert sent == 20

    async def test_13_a_purge_drains_the_budgets_too(self, any_world: World) -> None:
        policy = TokenPolicy.code("login", attempt_limits=[Limit(10_000, "1h", by="address")])
        manager = await any_world.manager(policy)

        async def attempt(number: int) -> None:
            person = Subject("auth.phone", f"{number}" + "x" * 400)
            await refused(
                InvalidToken, manager.verify(person, "login", WRONG_CODE, by={"address": "y" * 512})
            )

        await asyncio.gather(*[attempt(number) for number in range(100)])
        assert {len(part) for spend in any_world.backend.spends for part in spend.budget} == {16}
        any_world.clock.advance(2 * DAY)
        assert await manager.purge(batch_size=16) == 0
        assert await any_world.due_budgets() == 0

    async def test_14_one_moment_with_a_clock_ten_years_ahead(self, any_world: World) -> None:
        manager = await any_world.manager(TokenPolicy.code("login", cooldown="1m"))
        kept = await manager.issue(OTHER, "login")
        any_world.clock.advance(3650 * DAY)
        await manager.issue(USER, "login")
        for code in (WRONG_CODE,) * 5:
            await refused(InvalidToken, manager.verify(USER, "login", code))
        link = await manager.issue(USER, "link", expires_in=None)
        await manager.redeem(USER, "link", link.key).__aenter__()
        any_world.clock.advance(-3650 * DAY)
        assert await manager.verify(OTHER, "login", kept.key) == kept
        token = await manager.issue(USER, "login")
        assert await manager.consume(USER, "login", token.key) == token
        assert await manager.consume(USER, "link", link.key) == link

    async def test_15_empty_forms_and_short_codes_spend_nothing(self, any_world: World) -> None:
        manager = await any_world.manager(CODE)
        token = await manager.issue(USER, "login")
        for text in ("", " ", "12345", "-----", "1234567", "abcdef") * 5:
            assert (await refused(InvalidToken, manager.consume(USER, "login", text))).attempts_left is None
        assert (await manager.status(USER, "login")).attempts_left == 5
        assert await manager.consume(USER, "login", token.key) == token

    async def test_16_an_issue_during_a_lock_out_says_so(self, any_world: World) -> None:
        manager = await any_world.manager(CODE)
        for _ in range(5):
            await refused(InvalidToken, manager.verify(USER, "login", WRONG_CODE))
        until = any_world.clock() + 15 * MINUTE
        status = await manager.status(USER, "login")
        assert (status.attempts_left, status.attempts_reset_at) == (0, until)
        await manager.issue(USER, "login")
        assert any_world.events[-1].attempts_reset_at == until


class TestKeysAndArguments:
    async def test_17_as_people_paste_them(self, any_world: World) -> None:
        manager = await any_world.manager(CODE)
        for spelling in (
            "{0}\u200b{1}",
            "\ufeff{0}{1}",
            "{0}\u2013{1}",
            "{0}\u2011{1}",
            "{0}.{1}.",
            "full",
            "arabic",
        ):
            token = await manager.issue(USER, "login")
            zero = {"full": 0xFF10, "arabic": 0x0660}.get(spelling)
            typed = spelling.format(token.key[:3], token.key[3:])
            if zero is not None:
                typed = "".join(chr(zero + int(digit)) for digit in token.key)
            assert await manager.consume(USER, "login", typed) == token
        link = await manager.issue(USER, "reset")
        assert await manager.consume(USER, "reset", link.key + "\n") == link

    async def test_18_only_what_a_visitor_typed_is_a_bad_token(self, any_world: World) -> None:
        types = ContentTypes()
        types.register(User, "auth.user")
        manager = await any_world.manager(content_types=types)
        for key in ("a\0b", "x" * 600, "\ud800"):
            for call in (manager.verify, manager.consume):
                assert await reason(call(USER, "a", key)) == "unknown"
        naive = TokenManager(any_world.backend, clock=lambda: datetime(2100, 1, 1))  # on purpose
        async with naive:
            await refused(ConfigurationError, naive.issue(USER))
        assert "no id yet" in str(await refused(InvalidInput, manager.issue(User(None))))
        assert "isoformat" in str(
            await refused(InvalidInput, manager.issue(USER, extra_data=datetime.now()))
        )  # on purpose
        await refused(InvalidInput, manager.deactivate_and_create(USER, expiration_in_minutes=0))

    async def test_19_a_changed_prefix_kills_no_link(self, any_world: World) -> None:
        keys: list[IssuedToken] = []
        for prefix in ("", "vt_", "app_"):
            manager = await any_world.manager(TokenPolicy("reset", prefix=prefix))
            keys.append(await manager.issue(Subject("auth.user", prefix or "none"), "reset"))
            for token in keys:
                person = Subject("auth.user", token.object_id)
                assert await manager.exists_valid(person, "reset")
                assert await manager.verify(person, "reset", token.key) == token

    async def test_20_a_fixed_code_again(self, any_world: World) -> None:
        policy = TokenPolicy.code("login", test_codes={USER: "123456"}, test_codes_why="app-store review")
        manager = await any_world.manager(policy)
        for _ in range(3):
            assert (await manager.issue(USER, "login")).key == "123456"
            assert (await manager.consume(USER, "login", "123456")).uses == 1
        await manager.issue(USER, "login")
        token = await manager.issue(USER, "login")
        assert await manager.consume(USER, "login", "123456") == token

    async def test_21_floors_hold_for_calls_too(self, any_world: World) -> None:
        manager = await any_world.manager(CODE)
        await refused(InvalidInput, manager.deactivate_and_create(USER, "login", expiration_in_minutes=None))
        await refused(InvalidInput, manager.issue(USER, "login", key_generator_kwargs={"length": 1}))
        with pytest.raises(ConfigurationError):
            TokenManager(any_world.backend, policies=[TokenPolicy.code("x", allow_weak="end-to-end tests")])
        for chars in ("0123456789" * 2, "abc/?"):
            with pytest.raises(ConfigurationError):
                TokenPolicy.link("x", key_chars=chars)
        separators = TokenPolicy.code("sep", key_generator=lambda: "- -")
        manager = await any_world.manager(separators)
        await refused(ConfigurationError, manager.issue(USER, "sep"))
        assert await reason(manager.consume(USER, "sep", "")) == "unknown"

    async def test_22_a_digest_that_somebody_replaced(self, any_world: World) -> None:
        manager = await any_world.manager()
        await manager.issue(USER, "reset")
        [stored] = await any_world.stored()
        [key] = stored.keys
        digest = hashlib.sha256(b"chosen by somebody who can write to the store").digest()
        forged = stored._replace(
            id="7000000000000000", keys=(key._replace(digest=digest, origin="7000000000000000"),)
        )
        await any_world.backend.insert(forged, InsertMode.ADD)
        for call in (manager.verify, manager.consume):
            error = await refused(
                InvalidToken, call(USER, "reset", "chosen by somebody who can write to the store")
            )
            assert (error.reason, error.token) == ("unknown", None)

    async def test_23_a_context_that_nobody_asked_for(self, any_world: World) -> None:
        manager = await any_world.manager()
        token = await manager.issue(USER, "a")
        for call in (manager.verify, manager.consume):
            await refused(InvalidInput, call(USER, "a", token.key, context="cookie"))
        await refused(InvalidInput, manager.issue(USER, "a", context="cookie"))

    async def test_24_a_lazy_proxy(self, any_world: World) -> None:
        types = ContentTypes()
        types.register(User, "auth.user")
        manager = await any_world.manager(content_types=types)
        lazy = Lazy(User())
        assert isinstance(lazy, User)
        token = await manager.issue(lazy, "a")
        assert await manager.consume(User(), "a", token.key) == token

    async def test_25_a_copy_would_lose_its_key(self, any_world: World) -> None:
        manager = await any_world.manager()
        token = await manager.issue(USER, "a")
        for copied in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="key"):
                copied(token)
        loaded = await manager.get(token.id)
        assert pickle.loads(pickle.dumps(loaded)) == copy.deepcopy(loaded) == token  # noqa: S301  # our own

    async def test_26_a_thousand_tokens_are_not_ended_unasked(self, any_world: World) -> None:
        manager = await any_world.manager()
        for person in (USER, OTHER):
            await manager.issue(person, "a")
        await refused(InvalidInput, manager.deactivate(Subject("auth.user")))
        assert len(await listed(manager.filter_active_tokens(Subject("auth.user")))) == 2
        assert await manager.deactivate(Subject("auth.user"), all_objects=True) == 2

    async def test_27_no_log_shows_a_key_or_a_digest(
        self, any_world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        settings = Settings(secret=SECRET, key_storage="plain")
        manager = await any_world.manager(CODE, settings=settings)
        secrets: list[str] = [SECRET]
        for slug in ("reset", "login"):
            token = await manager.issue(USER, slug)
            secrets.append(token.key)
            await refused(InvalidToken, manager.verify(USER, slug, WRONG if slug == "reset" else WRONG_CODE))
            with pytest.raises(ZeroDivisionError):
                async with manager.redeem(USER, slug, token.key, consume_id="form"):
                    raise ZeroDivisionError
            await manager.consume(USER, slug, token.key, consume_id="form")
            await manager.deactivate(USER, "reset", token.key)
        for stored in await any_world.stored():
            secrets += [key.digest.hex() for key in stored.keys]
            secrets += [base64.b64encode(key.digest).decode() for key in stored.keys]
        text = "\n".join(f"{record.getMessage()} {record.args!r}" for record in caplog.records)
        assert not [secret for secret in secrets if len(secret) > 6 and secret in text]

    def test_27_urls_and_a_typing_error(self) -> None:
        for url in ("memory://u@h/?pw=canary", "x://h/?key=canary", "x://h/?auth=canary", "x://h/#canary"):
            assert "canary" not in redact_url(url)
        with pytest.raises((TypeError, ConfigurationError)) as info:
            TokenManager.from_url("mongodb://user:canary@h/", typo=1)
        frame = info.value.__traceback__
        while frame is not None:
            if "/vtoken/" in frame.tb_frame.f_code.co_filename:
                assert "canary" not in repr(frame.tb_frame.f_locals)
            frame = frame.tb_next


class TestMoving:
    async def test_28_a_second_copy_revives_nothing(self, any_world: World) -> None:
        source = MemoryBackend()
        async with TokenManager(source, SECRETS, clock=any_world.clock) as before:
            token = await before.issue(USER, "a")
            manager = await any_world.manager()
            await copy_tokens(source, any_world.backend.inner, clock=any_world.clock)
            await manager.consume(USER, "a", token.key)
            any_world.clock.advance(MS)
            await manager.purge()
            await copy_tokens(source, any_world.backend.inner, clock=any_world.clock)
            assert await reason(manager.consume(USER, "a", token.key)) == "unknown"

    async def test_29_an_objects_ended_tokens_are_found(self, any_world: World) -> None:
        manager = await any_world.manager()
        tokens = await asyncio.gather(*[manager.issue(USER, "a", replace=False) for _ in range(110)])
        assert await manager.deactivate(USER) == 110
        await manager.issue(OTHER, "a")
        assert await listed(manager.history(USER)) == sorted(tokens, key=lambda token: token.id, reverse=True)
        assert await manager.erase(USER) == 110
        assert await listed(manager.history(USER)) == []
        assert len(await listed(manager.history(OTHER))) == 1


async def test_lease_lost_is_for_what_happened_outside(any_world: World) -> None:
    """The other side of reports 2 and 3: a revocation from outside still counts."""
    manager, outside = await any_world.manager(), await any_world.manager()
    token = await manager.issue(USER, "a")
    with pytest.raises(LeaseLost):
        async with manager.redeem(USER, "a", token.key):
            await outside.deactivate(USER)
    assert await reason(manager.consume(USER, "a", token.key)) == "inactive"
