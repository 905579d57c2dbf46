"""Guarantees 6, 7, 10 and 11 through the manager: what matches, until when, and what is stored of it."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, Final, cast
from uuid import UUID

from vtoken.errors import (
    BackendClosed,
    InvalidInput,
    InvalidToken,
    KeyGenerationError,
    TokenBusy,
    TooManyAttempts,
    VTokenError,
)
from vtoken.manager import TokenManager
from vtoken.policy import Settings, TokenPolicy
from vtoken.subject import Subject
from vtoken.testing.cases.find import no_ids
from vtoken.testing.harness import USER, Bench, Suite, case, refused
from vtoken.token import VerificationToken

MILLISECOND: Final = timedelta(milliseconds=1)
CODE: Final = TokenPolicy.code("sms-login", digits=12)

# Operator documents, wrong types, controls and sizes: no text of any kind.
NO_TEXT: list[Any] = [
    True,
    1.0,
    b"reset",
    [],
    ["reset"],
    {},
    {"$ne": None},
    {"$gt": ""},
    object(),
    "a\0b",
    "\0",
    "\ud800",
    "a\udfff",
]
NO_OBJECT_ID: list[Any] = [*NO_TEXT, None, "", "x" * 513, "é" * 257, 10**512, 10**5000]
NO_SLUG: list[Any] = [*NO_TEXT, 1, "", "x" * 256, "é" * 128]
NO_CONSUME_ID: list[Any] = [*NO_TEXT, "", "x" * 129]


def deep(levels: int) -> list[Any]:
    data: list[Any] = []
    for _ in range(levels - 1):
        data = [data]
    return data


def looped() -> list[Any]:
    data: list[Any] = []
    data.append(data)
    return data


NO_EXTRA_DATA: list[Any] = [
    b"",
    {1},
    object(),
    {1: 2},
    {"a": [{None: 1}]},
    float("nan"),
    [float("inf")],
    2**63,
    {"a": -(2**63) - 1},
    "\ud800",
    {"\udfff": 1},
    datetime(2100, 1, 1, tzinfo=UTC),
    deep(17),
    deep(100_000),
    looped(),
    "x" * 16_383,
    ["é" * 8_191],
]


NO_LIFETIME: list[Any] = [
    *[0, -1, True, "5", "", "5 weeks", "-5m", float("nan"), float("inf"), 10**400, timedelta(0), {}, b"5m"],
]
NO_CONTEXT: list[Any] = [
    True,
    1.0,
    b"x",
    [],
    ["x"],
    "a\0b",
    "\ud800",
    "x" * 513,
    {"a": 1},
    {"a": None},
    {1: "a"},
]
NO_BY: list[Any] = [
    "ip",
    ["ip"],
    {"ip": 1},
    {1: "x"},
    {"": "x"},
    {"ip": ""},
    {"ip": "a\0b"},
    {"ip": "x" * 513},
]


def key_calls(manager: TokenManager, slug: str = "reset") -> list[Callable[[Any], Awaitable[object]]]:
    """Every method that is given a key."""

    async def redeem(key: Any) -> None:
        async with manager.redeem(USER, slug, key):
            pass

    async def listed(key: Any) -> list[object]:
        return [token async for token in manager.filter_active_tokens(USER, slug, key)]

    return [
        redeem,
        lambda key: manager.verify(USER, slug, key),
        lambda key: manager.consume(USER, slug, key),
        lambda key: manager.exists_valid(USER, slug, key),
        lambda key: manager.deactivate(USER, slug, key),
        listed,
    ]


async def history(manager: TokenManager, *arguments: Any) -> None:
    async for _ in manager.history(*arguments):
        raise AssertionError("a token was found")


async def many(manager: TokenManager, subjects: list[Any], slug: Any = "reset", **named: Any) -> None:
    async for _ in manager.issue_many(subjects, slug, **named):
        raise AssertionError("a token was issued")


def subject_calls(manager: TokenManager, subject: Any, slug: Any) -> Iterator[Awaitable[object]]:
    """Every method that is given an object and a slug, called with these, one made after the other."""
    yield manager.issue(subject, slug)
    yield manager.deactivate_and_create(subject, slug)
    yield manager.get_active_or_create(subject, slug)
    yield manager.pretend(subject, slug)
    yield many(manager, [subject], slug)
    yield manager.consume(subject, slug, "key")
    yield manager.verify(subject, slug, "key")
    yield manager.deactivate(subject, slug)
    yield manager.exists_valid(subject, slug)
    yield manager.status(subject, slug)
    yield manager.reset_limits(subject, slug)
    yield history(manager, subject, slug)


def hostile_calls(manager: TokenManager) -> Iterator[tuple[object, Awaitable[object]]]:
    """Calls with something in them that must be refused, one made after the other."""
    for bad in NO_OBJECT_ID:
        for call in subject_calls(manager, Subject("auth.user", bad), "reset"):
            yield bad, call
        yield bad, manager.erase(Subject("auth.user", bad))
    for bad in NO_SLUG:
        for call in subject_calls(manager, USER, bad):
            yield bad, call
        yield bad, manager.issue(Subject(bad, "42"), "reset")
    for bad in NO_CONSUME_ID:
        yield bad, manager.consume(USER, "reset", "key", consume_id=bad)
    for bad in NO_EXTRA_DATA:
        yield type(bad), manager.issue(USER, "reset", extra_data=bad)
        yield type(bad), manager.pretend(USER, "reset", extra_data=bad)
    for bad in NO_LIFETIME:
        yield bad, manager.issue(USER, "reset", expires_in=bad)
        yield bad, manager.get_active_or_create(USER, "reset", expiration_in_minutes=bad)
    for bad in NO_CONTEXT:
        yield bad, manager.issue(USER, "bound", context=bad)
    for bad in NO_BY:
        yield bad, manager.issue(USER, "reset", by=bad)
    for bad in ("", "x" * 129, "a\0b", 1):
        yield bad, many(manager, [USER], "derived", batch=cast("Any", bad))
    yield "a context that is not heeded", manager.issue(USER, "reset", context="a browser")
    yield "a naive clock", manager.get_active_or_create(USER, "reset", at_least=timedelta(days=400))


class MatchingCases(Suite):
    """Cases about what matches, and what comes back."""

    @case(6)
    async def test_another_object_type_or_slug_never_matches(self, bench: Bench) -> None:
        """A key is good for its own object, content type and slug, for no other, and a slug is no ANY."""
        manager = await bench.manager(CODE)
        key = (await manager.issue(USER, "reset")).key
        code = (await manager.issue(USER, "sms-login")).key
        nameless = (await manager.issue(USER)).key
        others = [
            (Subject("auth.user", "4"), "reset", key),
            (Subject("auth.user", "420"), "reset", key),
            (Subject("auth.group", "42"), "reset", key),
            (Subject("auth"), "reset", key),
            (USER, "confirm", key),
            (USER, "RESET", key),
            (USER, None, key),
            (USER, "sms-login", key),
            (USER, "reset", nameless),
            (USER, "reset", code),
            (Subject("auth.user", "43"), "sms-login", code),
            (Subject("auth.group", "42"), "sms-login", code),
        ]
        for subject, slug, presented in others:
            where = (subject, slug)
            for call in (manager.verify, manager.consume):
                error = await refused(InvalidToken, call(subject, slug, presented), where)
                assert error.reason == "unknown"
            assert not await manager.exists_valid(subject, slug, presented), where
        for slug, good in (("reset", key), ("sms-login", code), (None, nameless)):
            assert (await manager.consume(USER, slug, good)).slug == slug

    @case(6)
    async def test_a_content_type_alone_means_any_object(self, bench: Bench) -> None:
        """A link's key matches by content type alone where the object is not known, and creating needs
        one."""
        manager = await bench.manager(CODE)
        issued = await manager.issue(USER, "reset")
        await refused(InvalidToken, manager.verify(Subject("auth.group"), "reset", issued.key))
        await refused(InvalidInput, manager.issue(Subject("auth.user"), "reset"))
        await refused(InvalidInput, manager.get_active_or_create(Subject("auth.user"), "reset"))
        await refused(InvalidInput, manager.verify(Subject("auth.user"), "sms-login", "0" * 12))
        assert await manager.consume(Subject("auth.user"), "reset", issued.key) == issued

    @case(6)
    async def test_an_object_id_is_text(self, bench: Bench) -> None:
        """1 and "1" are one object, and so are a UUID and its text; True, 1.0 and "01" are none of them."""
        manager = await bench.manager()
        uuid = "0f0e0d0c-0b0a-4908-8706-050403020100"
        for stored, asked in ((1, "1"), ("2", 2), (UUID(uuid), uuid), (-3, "-3")):
            issued = await manager.issue(Subject("auth.user", stored), "reset")
            assert issued.object_id == str(stored)
            for other in ("01", "+1", " 1", "1.0", uuid.upper()):
                await refused(InvalidToken, manager.verify(Subject("auth.user", other), "reset", issued.key))
            assert await manager.consume(Subject("auth.user", asked), "reset", issued.key) == issued

    @case(6)
    async def test_a_foreign_id_is_nobodys(self, bench: Bench) -> None:
        """A text that is no token's id, from a URL say, is no error of the store's: ``get`` and ``reveal``
        find nothing, ``deactivate`` ends nothing, and ``save`` says that the token isn't there."""
        manager = await bench.manager(TokenPolicy("reset", key_storage="derived"))
        issued = await manager.issue(USER, "reset")
        for text in no_ids(issued.id):
            assert await manager.get(text) is None, text
            foreign = VerificationToken(
                id=text, created_at=bench.clock(), content_type="auth.user", object_id="42", slug="reset"
            )
            assert await manager.reveal(foreign) is None, text
            assert await manager.deactivate(foreign) == 0, text
            assert (await refused(InvalidToken, manager.save(foreign), text)).reason == "unknown"
        assert await manager.get(issued.id) == issued

    @case(6)
    async def test_hostile_input_is_refused_and_stores_nothing(self, bench: Bench) -> None:
        """Operator documents, arrays, NUL, surrogates and huge values are ``InvalidInput`` in every method;
        nothing is stored."""
        manager = await bench.manager(
            CODE,
            TokenPolicy("bound", context="required"),
            TokenPolicy("derived", key_storage="derived"),
        )
        for what, call in hostile_calls(manager):
            await refused(InvalidInput, call, what)
        assert await bench.stored() == []

    @case(6)
    async def test_a_hostile_key_matches_nothing(self, bench: Bench) -> None:
        """A key that is missing or no text is ``InvalidInput``, never "any". One that is impossible is a bad
        token, because a form field is a visitor's input; what ends or lists tokens finds nothing for it."""
        manager = await bench.manager(CODE)
        issued = await manager.issue(USER, "reset")
        code = (await manager.issue(USER, "sms-login")).key
        before = await bench.stored()
        impossible = ["", " ", "\n", "a\0b", "\0", "\ud800", "x" * 513, "é" * 257, "' OR '1'='1", "$ne", "%"]
        wrong = [*impossible, issued.key.swapcase(), issued.key[:-1], issued.key + "x", "x" + issued.key]
        for slug, keys in (("reset", wrong), ("sms-login", [*impossible, code + "1", code[1:], "x" + code])):
            for call in key_calls(manager, slug):
                for bad in (None, True, 1, b"key", ["key"], {"$ne": None}, object()):
                    await refused(InvalidInput, call(bad), bad)
            redeem, verify, consume, exists_valid, deactivate, listed = key_calls(manager, slug)
            for key in keys:
                for call in (redeem, verify, consume):
                    assert (await refused(InvalidToken, call(key), key)).reason == "unknown"
                assert not await exists_valid(key)
                if slug == "reset":
                    assert (await deactivate(key), await listed(key)) == (0, [])
        assert await bench.stored() == before
        assert await manager.consume(USER, "reset", issued.key) == issued

    @case(6)
    async def test_keys_are_taken_as_people_paste_them(self, bench: Bench) -> None:
        """Between the characters of a code, and at the ends of a link, invisible characters, white space,
        dashes and dots do not matter; digits of any script and full-width ones are the ASCII digits."""
        policy = TokenPolicy.code("sms-login", key_generator=lambda: "123456", max_uses=None)
        manager = await bench.manager(policy, TokenPolicy("link", max_uses=None))
        await manager.issue(USER, "sms-login")
        codes = ["123-456", "123 456", "123.456", "1_2_3_4_5_6", "\u200b123456\ufeff", "123\u2013456"]
        codes += [
            "123\u2011456\r\n",
            "１２３４５６",
            "١٢٣٤٥٦",
            "१२३४५६",
            "12345６",
            "1\u00ad23456",
            "\t123456\x00"[:-1],
        ]
        for typed in codes:
            await manager.consume(USER, "sms-login", typed)
        for wrong in ("12345", "1234567", "123456a", "12345\u2170"):
            await refused(InvalidToken, manager.verify(USER, "sms-login", wrong), wrong)
        key = (await manager.issue(USER, "link")).key
        for pasted in (key + "\n", f" {key}\r\n", f"\ufeff{key}\u200b", f"\u2060{key}\u00a0"):
            await manager.consume(USER, "link", pasted)
        for wrong in (f"{key[:9]} {key[9:]}", f"{key[:9]}\u200b{key[9:]}", f"-{key}"):
            await refused(InvalidToken, manager.verify(USER, "link", wrong), wrong)

    @case(6)
    async def test_a_prefix_is_a_shortcut_only(self, bench: Bench) -> None:
        """Links that were sent before the policy had this prefix stay good, in every method."""
        old = await bench.manager(TokenPolicy("reset", max_uses=3))
        keys = [(await old.issue(USER, "reset", replace=False)).key]
        middle = await bench.manager(TokenPolicy("reset", prefix="old_", max_uses=3))
        keys.append((await middle.issue(USER, "reset", replace=False)).key)
        new = await bench.manager(TokenPolicy("reset", prefix="new_", max_uses=3))
        keys.append((await new.issue(USER, "reset", replace=False)).key)
        for key in keys:
            await new.verify(USER, "reset", key)
            assert await new.exists_valid(USER, "reset", key)
            await new.consume(USER, "reset", key)
        await refused(
            InvalidToken, new.verify(USER, "reset", keys[2][:-1] + ("y" if keys[2][-1] == "x" else "x"))
        )

    @case(7)
    async def test_the_last_millisecond_is_valid(self, bench: Bench) -> None:
        """A token is valid at exactly ``expires_at``, by the floored clock, and not one millisecond later."""
        manager = await bench.manager()
        issued = await manager.issue(USER, "reset", expires_in=5)
        end = issued.created_at + timedelta(minutes=5)
        assert issued.expires_at == end
        for moment in (issued.created_at, end, end + timedelta(microseconds=999)):
            bench.clock.set(moment)
            loaded = await manager.verify(USER, "reset", issued.key)
            assert loaded.is_valid(moment)
            assert await manager.exists_valid(USER)
        bench.clock.set(end + MILLISECOND)
        assert not issued.is_valid(bench.clock())
        assert not await manager.exists_valid(USER)
        for call in (manager.verify, manager.consume):
            assert (await refused(InvalidToken, call(USER, "reset", issued.key))).reason == "expired"
        assert [token async for token in manager.filter_active_tokens(USER)] == [issued]
        bench.clock.set(end)
        assert await manager.consume(USER, "reset", issued.key) == issued

    @case(7)
    async def test_a_token_without_expiry_stays(self, bench: Bench) -> None:
        """``expires_in=None`` never expires, and says so when it is loaded."""
        manager = await bench.manager()
        issued = await manager.issue(USER, "reset", expires_in=None)
        bench.clock.set(datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC))
        loaded = await manager.consume(USER, "reset", issued.key)
        assert issued.expires_at is loaded.expires_at is None

    @case(7)
    async def test_a_clock_that_jumps_back_revives_nothing(self, bench: Bench) -> None:
        """A used or deactivated token stays so when the clock jumps back, and so does "one valid token"."""
        manager = await bench.manager()
        start = bench.clock()
        used = await manager.issue(USER, "reset")
        await manager.consume(USER, "reset", used.key)
        gone = await manager.issue(USER, "reset")
        await manager.deactivate(USER)
        replaced = await manager.issue(USER, "reset")
        bench.clock.set(start - timedelta(days=1))
        new = await manager.issue(USER, "reset")
        for token in (used, gone, replaced):
            await refused(InvalidToken, manager.consume(USER, "reset", token.key))
        assert await manager.get_active_or_create(USER, "reset") == new
        bench.clock.set(start - timedelta(days=2))
        for token in (used, gone, replaced):
            await refused(InvalidToken, manager.consume(USER, "reset", token.key))
        assert await manager.consume(USER, "reset", new.key) == new

    @case(10)
    async def test_the_store_holds_no_key(self, bench: Bench) -> None:
        """A raw look into the store, past the backend, finds no key, right or wrong, in any common
        writing."""
        manager = await bench.manager(CODE)
        keys = []
        for slug in ("reset", "sms-login"):
            for number in range(3):
                issued = await manager.issue(
                    USER, slug, extra_data={"marker": "probe-sees-this"}, replace=not number
                )
                keys.append(issued.key)
            await manager.verify(USER, slug, keys[-1])
            await refused(InvalidToken, manager.consume(USER, slug, wrong := "9" * 12))
            await manager.consume(USER, slug, keys[-1], consume_id="an id")
            keys.append(wrong)
        raw = bench.raw()
        assert b"probe-sees-this" in raw, "raw() must return what is stored"
        for key in keys:
            text = key.encode()
            for form in (text, text.hex().encode(), base64.b64encode(text).rstrip(b"="), text[::-1]):
                assert form not in raw

    @case(10)
    async def test_the_raw_probe_sees_a_plain_key(self, bench: Bench) -> None:
        """The control of the raw probe: with ``key_storage="plain"``, which is opt-in, it does find the
        key."""
        manager = await bench.manager(settings=Settings(key_storage="plain"))
        issued = await manager.issue(USER, "reset")
        loaded = await manager.verify(USER, "reset", issued.key)
        assert loaded.key == issued.key
        assert issued.key.encode() in bench.raw()

    @case(11)
    async def test_times_come_back_exactly(self, bench: Bench) -> None:
        """Times are aware UTC, floored to milliseconds when the token is made, and the same when it is
        loaded."""
        manager = await bench.manager()
        summer = timezone(timedelta(hours=2))
        for microsecond in (0, 999, 1_000, 123_456, 500_500, 999_999):
            moment = datetime(2100, 7, 1, 1, 30, 59, microsecond, tzinfo=summer)
            bench.clock.set(moment)
            issued = await manager.issue(USER, "reset", expires_in=0.5)
            floored = moment.replace(microsecond=microsecond // 1000 * 1000)
            loaded = await manager.get(issued.id)
            assert loaded is not None
            for token in (issued, loaded):
                assert token.created_at == floored
                assert token.expires_at == floored + timedelta(seconds=30)
                for time in (token.created_at, token.expires_at):
                    assert time is not None
                    assert time.utcoffset() == timedelta(0)

    @case(11)
    async def test_extra_data_comes_back_exactly(self, bench: Bench) -> None:
        """Any JSON value comes back equal and of its type, ``{}`` as ``{}``, and none as none."""
        manager = await bench.manager()
        values: list[Any] = [
            {},
            [],
            "",
            0,
            False,
            "null",
            1.0,
            0.1,
            -0.0,
            1e308,
            2**63 - 1,
            -(2**63),
            deep(16),
        ]
        values += [
            "x" * 16_382,
            "é" * 8_191,
            "\x00\x7f\u2028🤷🏽\u200d♀️",
            {"": None, "$ne": {"a.b": [1, True, "1"]}},
        ]
        for value in [None, *values]:
            issued = await manager.issue(USER, "reset", extra_data=value)
            loaded = await manager.verify(USER, "reset", issued.key)
            assert loaded.extra_data == issued.extra_data
            assert repr(loaded.get_extra_data()) == repr(value)
            loaded.set_extra_data({"was": loaded.id})
            await manager.save(loaded)
            saved = await manager.get(issued.id)
            assert saved is not None
            assert saved.extra_data == loaded.extra_data

    @case(5)
    async def test_errors_carry_data_and_no_key(self, bench: Bench) -> None:
        """Every error can be pickled with its data, and neither it nor what caused it holds the key."""
        manager = await bench.manager(TokenPolicy.code("sms-login", digits=12, max_attempts=1))
        await manager.issue(USER, "sms-login")
        canary = "Canary-of-a-key-that-nothing-may-repeat"
        kwargs = {"generator": lambda: canary}
        assert (await manager.issue(USER, "reset", key_generator_kwargs=kwargs)).key == canary
        await manager.consume(USER, "reset", canary)
        held = await manager.issue(USER, "held")
        await manager.redeem(USER, "held", held.key).__aenter__()
        wrong = "271828182845"
        closed = bench.new_manager()
        calls: list[tuple[type[VTokenError], Callable[[], Awaitable[object]]]] = [
            (InvalidToken, lambda: manager.consume(USER, "sms-login", wrong)),
            (TooManyAttempts, lambda: manager.consume(USER, "sms-login", wrong)),
            (InvalidToken, lambda: manager.consume(USER, "confirm", canary)),
            (InvalidToken, lambda: manager.verify(USER, "reset", canary * 20)),
            (InvalidToken, lambda: manager.verify(USER, "reset", canary)),
            (TokenBusy, lambda: manager.consume(USER, "held", held.key)),
            (InvalidInput, lambda: manager.verify(USER, "reset", cast("Any", canary.encode()))),
            (InvalidInput, lambda: manager.verify(USER, canary + "\0", canary)),
            (
                KeyGenerationError,
                lambda: manager.issue(USER, "x", key_generator_kwargs=kwargs),
            ),
            (BackendClosed, lambda: closed.consume(USER, "reset", canary)),
            (BackendClosed, lambda: closed.deactivate(USER, "reset", canary)),
        ]
        for kind, call in calls:
            error = await refused(kind, call())
            copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - pickled on this line
            stays = {"token": None} if isinstance(error, InvalidToken) else {}
            assert type(copy) is kind
            assert (str(copy), vars(copy)) == (str(error), vars(error) | stays)
            link: BaseException | None = error
            while link is not None:
                told = f"{link!r} {link} {vars(link)}"
                assert canary not in told
                assert wrong not in told
                assert held.key not in told
                assert link.__cause__ is None or link.__context__ is link.__cause__
                link = link.__context__
