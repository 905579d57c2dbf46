"""Settings and policies: defaults, presets, floors."""

from __future__ import annotations

import logging
import pickle
import re
import secrets
import traceback
from dataclasses import FrozenInstanceError, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from vtoken import (
    DEFAULT,
    ConfigurationError,
    InvalidInput,
    IssuedToken,
    Limit,
    Settings,
    Subject,
    TokenManager,
    TokenPolicy,
    policy,
)
from vtoken.keys import ALPHANUMERIC, DIGITS, random_key
from vtoken.policy import Policies, ResolvedPolicy, check_call, load_generator
from vtoken_backends.memory import MemoryBackend

from .core_tools import SECRET, SECRETS, USER

MINUTE = 60_000


def fixed_key() -> str:
    return "K" * 32


class TestSettings:
    def test_defaults(self) -> None:
        settings = Settings()
        assert settings.default_expiration == 24 * 60
        assert settings.default_key_generator is random_key
        assert settings.default_key_length == 32
        assert set(settings.default_key_chars) == set(ALPHANUMERIC)
        assert settings.max_key_iterations == 100
        assert settings.secret is None
        assert tuple(settings.previous_secrets) == ()
        assert settings.key_storage == "digest"
        assert settings.unknown_slugs == "allow"

    def test_frozen_and_by_keyword(self) -> None:
        with pytest.raises(FrozenInstanceError):
            Settings().secret = SECRET  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # on purpose
        with pytest.raises(TypeError):
            Settings(5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # on purpose

    def test_a_list_of_secrets_handed_in_may_change(self) -> None:
        previous = [SECRET]
        settings = Settings(secret="n" * 32, previous_secrets=previous)
        previous.clear()
        assert tuple(settings.previous_secrets) == (SECRET,)

    @pytest.mark.parametrize(
        "fields",
        [
            {"default_expiration": 0},
            {"default_expiration": -1},
            {"default_expiration": float("nan")},
            {"default_expiration": 1e308},
            {"default_expiration": True},
            {"default_expiration": "5"},
            {"default_expiration": "0s"},
            {"default_expiration": timedelta(0)},
            {"unknown_slugs": "deny"},
            {"unknown_slugs": None},
            {"secret": SECRET + "\n"},
            {"secret": "\ufeff" + SECRET},
            {"secret": " " * 32},
            {"secret": SECRET, "previous_secrets": [" " + SECRET]},
            {"secret": "keep it in the environment: VTOKEN_SECRET"},
            {"default_expiration": DEFAULT},
            {"default_key_length": 0},
            {"default_key_length": 513},
            {"default_key_length": "8"},
            {"default_key_chars": ""},
            {"default_key_chars": None},
            {"max_key_iterations": 0},
            {"max_key_iterations": True},
            {"secret": ""},
            {"secret": "a" * 31},
            {"secret": "é" * 15},
            {"secret": b"a" * 32},
            {"secret": "\ud800" * 64},
            {"secret": "a" * 32 + "\ud800"},
            {"secret": 32},
            {"secret": SECRET, "previous_secrets": SECRET},
            {"secret": SECRET, "previous_secrets": ["short"]},
            {"secret": SECRET, "previous_secrets": [None]},
            {"secret": SECRET, "previous_secrets": [b"a" * 32]},
            {"secret": SECRET, "previous_secrets": None},
            {"secret": SECRET, "previous_secrets": 5},
            {"previous_secrets": [SECRET]},
            {"key_storage": "encrypted"},
            {"key_storage": None},
        ],
        ids=str,
    )
    def test_what_cannot_work_is_refused(self, fields: dict[str, Any]) -> None:
        with pytest.raises(ConfigurationError):
            Settings(**fields)

    def test_32_bytes_are_counted_in_bytes(self) -> None:
        assert Settings(secret="é" * 16).secret == "é" * 16

    def test_no_secret_is_shown(self) -> None:
        settings = Settings(secret="canary" * 6, previous_secrets=["canary-of-old" * 3])
        for text in (repr(settings), str(settings), f"{settings}", f"{[settings]}"):
            assert "canary" not in text

    @pytest.mark.parametrize(
        "fields", [{"secret": "canary"}, {"secret": "canary" * 6, "default_key_length": 0}], ids=str
    )
    def test_a_refusal_keeps_the_secret_out_of_its_frames(self, fields: dict[str, Any]) -> None:
        with pytest.raises(ConfigurationError) as info:
            Settings(**fields)
        frames = traceback.TracebackException.from_exception(info.value, capture_locals=True).stack
        ours = [frame for frame in frames if frame.filename != __file__]
        assert ours
        assert "canary" not in str([frame.locals for frame in ours])
        assert "canary" not in str(info.value)

    def test_other_values_replace_fields(self) -> None:
        settings = replace(SECRETS, key_storage="plain")
        assert (settings.secret, settings.key_storage) == (SECRET, "plain")
        assert pickle.loads(pickle.dumps(settings)) == settings  # noqa: S301  # our own

    def test_no_secret_that_stands_in_the_pages_is_accepted(self) -> None:
        root = Path(__file__).parent.parent
        pages = [root / "README.md", *(root / "docs").rglob("*.md"), *(root / "vtoken").glob("*.py")]
        literal = re.compile(r"""(?:secret=|_SECRET["']\]? ?[=:] ?|secret = )["']([^"']{32,})["']""")
        for page in pages:
            for secret in literal.findall(page.read_text(encoding="utf-8")):
                with pytest.raises(ConfigurationError, match="documentation"):
                    Settings(secret=secret)
        for secret in policy._PUBLISHED_SECRETS:  # pyright: ignore[reportPrivateUsage]  # a list is either right or wrong
            with pytest.raises(ConfigurationError, match="documentation"):
                Settings(secret=secret)


class TestPresets:
    def test_a_link_lives_an_hour(self) -> None:
        link = TokenPolicy.link("password-reset")
        assert (link.expiration, link.max_attempts, link.max_uses, link.kind) == (60, None, 1, "link")

    def test_a_code_has_6_digits_10_minutes_and_5_attempts_in_15_minutes(self) -> None:
        code = ResolvedPolicy.of(TokenPolicy.code("login"), SECRETS)
        assert (code.code_length, code.code_chars, code.expiration) == (6, DIGITS, 10 * MINUTE)
        assert (code.max_attempts, code.attempt_window) == (5, 15 * MINUTE)
        assert (code.has_link, code.has_code, code.is_capped, code.key_length) == (False, True, True, None)

    def test_a_pair_is_a_link_of_an_hour_and_a_code_of_10_minutes(self) -> None:
        pair = ResolvedPolicy.of(TokenPolicy.pair("login"), SECRETS)
        assert (pair.key_length, pair.key_chars, pair.expiration) == (32, ALPHANUMERIC, 60 * MINUTE)
        assert (pair.code_length, pair.code_chars, pair.code_expiration) == (6, DIGITS, 10 * MINUTE)
        assert (pair.has_link, pair.has_code, pair.max_attempts, pair.is_guarded) == (True, True, 5, True)
        assert (pair.needs_context, pair.code_needs_context) == (False, False)

    def test_a_pair_has_no_generator_of_its_own(self) -> None:
        with pytest.raises(ConfigurationError, match="generator"):
            TokenPolicy("s", kind="pair", max_attempts=5, key_generator=fixed_key)
        settings = replace(SECRETS, default_key_generator=fixed_key)
        assert ResolvedPolicy.of(TokenPolicy.pair("s"), settings).generator is random_key

    @pytest.mark.parametrize(
        ("context", "code_context", "needed"),
        [
            ("required", None, (True, True)),
            ("required", "required", (True, True)),
            ("required", "ignored", (True, False)),
            ("ignored", "ignored", (False, False)),
        ],
    )
    def test_a_pairs_code_may_ignore_the_context(
        self, context: Any, code_context: Any, needed: tuple[bool, bool]
    ) -> None:
        given = TokenPolicy("s", kind="pair", max_attempts=5, context=context, code_context=code_context)
        pair = ResolvedPolicy.of(given, SECRETS)
        assert (pair.needs_context, pair.code_needs_context) == needed
        with pytest.raises(ConfigurationError, match="code_context"):
            TokenPolicy.pair("s", code_context="required")

    def test_overrides(self) -> None:
        code = TokenPolicy.code("login", digits=8, expiration=3, max_attempts=3, cooldown="1m")
        assert (code.key_length, code.expiration, code.max_attempts) == (8, 3, 3)
        assert ResolvedPolicy.of(code, SECRETS).cooldown == MINUTE
        link = TokenPolicy.link("invite", expiration=None, max_uses=None)
        assert (link.expiration, link.max_uses) == (None, None)
        pair = TokenPolicy.pair("login", digits=8, code_expiration="5m", expiration="2h", prefix="vt_")
        assert (pair.digits, pair.code_expiration, pair.prefix) == (8, "5m", "vt_")

    def test_a_plain_policy_takes_the_settings(self) -> None:
        resolved = ResolvedPolicy.of(TokenPolicy("x"), Settings(default_expiration=7, default_key_length=40))
        assert resolved.expiration == 7 * MINUTE
        assert resolved.generator_kwargs == {"length": 40, "allowed_chars": ALPHANUMERIC}
        assert (resolved.max_attempts, resolved.cooldown, resolved.max_uses) == (None, 0, 1)
        assert (resolved.overlap, resolved.is_guarded, resolved.is_policy_given) == (0, False, True)

    def test_a_policy_goes_before_the_settings(self) -> None:
        given = TokenPolicy(
            "x",
            expiration=None,
            key_length=64,
            key_chars="abcdef",
            key_storage="plain",
            cooldown=timedelta(seconds=30),
            overlap="5s",
        )
        resolved = ResolvedPolicy.of(given, Settings(default_key_generator=random_key))
        assert resolved.expiration is None
        assert resolved.generator_kwargs == {"length": 64, "allowed_chars": "abcdef"}
        assert (resolved.storage, resolved.cooldown, resolved.overlap) == ("plain", 30_000, 5_000)

    @pytest.mark.parametrize("given", ["90m", timedelta(minutes=90), 90])
    def test_lifetimes_are_minutes_durations_or_texts(self, given: Any) -> None:
        link = TokenPolicy.link("s", expiration=given)
        assert ResolvedPolicy.of(link, Settings()).expiration == 90 * MINUTE
        assert (
            ResolvedPolicy.of(TokenPolicy("s"), Settings(default_expiration=given)).expiration == 90 * MINUTE
        )


class TestFloors:
    @pytest.mark.parametrize(
        ("make", "fields", "says"),
        [
            (TokenPolicy.code, {"digits": 4}, "6 digits"),
            (TokenPolicy.code, {"digits": 5}, "6 digits"),
            (TokenPolicy.code, {"expiration": 24 * 60}, "at most 10m .*63B"),
            (TokenPolicy.code, {"expiration": "601s"}, "at most 10m"),
            (TokenPolicy.code, {"expiration": None}, "at most 10m"),
            (TokenPolicy.code, {"expiration": DEFAULT}, "at most 10m"),
            (TokenPolicy.code, {"expiration": "25h", "channel": "email"}, "at most 1d .*63A"),
            (TokenPolicy.code, {"digits": 5, "channel": "email"}, "6 digits"),
            (TokenPolicy.code, {"max_attempts": None, "channel": "email"}, "max_attempts"),
            (TokenPolicy.code, {"max_attempts": None, "attempt_limits": [Limit(5, "1h")]}, "max_attempts"),
            (TokenPolicy.pair, {"digits": 5}, "6 digits"),
            (TokenPolicy.pair, {"code_expiration": "11m"}, "at most 10m"),
            (TokenPolicy.pair, {"max_attempts": None}, "max_attempts"),
            (TokenPolicy.pair, {"max_attempts": 101}, "max_attempts"),
            (TokenPolicy.pair, {"key_length": 21}, "128"),
            (TokenPolicy.code, {"max_attempts": None}, "max_attempts"),
            (TokenPolicy.code, {"max_attempts": 101}, "max_attempts"),
            (TokenPolicy.link, {"key_length": 21}, "128"),
            (TokenPolicy, {"key_length": 31, "key_chars": "0123456789abcdef"}, "128"),
        ],
    )
    def test_below_a_floor_it_says_why_unless_allowed_to_be_weak(
        self, make: Any, fields: dict[str, Any], says: str
    ) -> None:
        with pytest.raises(ConfigurationError, match=says):
            make("s", **fields)
        assert make("s", **fields, allow_weak="end-to-end tests").allow_weak == "end-to-end tests"

    @pytest.mark.parametrize(
        "make",
        [
            lambda: TokenPolicy.code("s", digits=6, expiration=10, max_attempts=100),
            lambda: TokenPolicy.code("s", key_chars="ABCDEFGHJKLMNPQRSTUVWXYZ", digits=5),
            lambda: TokenPolicy.code("s", expiration="24h", channel="email"),
            lambda: TokenPolicy.pair("s", code_expiration="24h", channel="email"),
            lambda: TokenPolicy.pair("s", expiration=None, max_uses=None),
            lambda: TokenPolicy.pair("s", key_storage="derived", key_length=1),
            lambda: TokenPolicy.code("s", key_storage="derived"),
            lambda: TokenPolicy.link("s", key_length=22),
            lambda: TokenPolicy("s", key_length=32, key_chars="0123456789abcdef"),
            lambda: TokenPolicy("s", key_length=1, key_storage="derived"),
        ],
    )
    def test_at_a_floor_is_well(self, make: Any) -> None:
        assert make().slug == "s"

    @pytest.mark.parametrize(
        ("given", "settings"),
        [
            (TokenPolicy.link("s"), Settings(default_key_length=4)),
            (TokenPolicy("s"), Settings(default_key_length=21)),
            (TokenPolicy("s", key_length=22), Settings(default_key_chars="ab")),
            (TokenPolicy.link("s", key_generator=random_key, key_length=21), Settings()),
            (TokenPolicy.link("s", key_generator="vtoken.keys:random_key", key_length=21), Settings()),
            (
                TokenPolicy("s", kind="code", expiration=10, max_attempts=5),
                replace(SECRETS, default_key_length=5, default_key_chars="0123456789"),
            ),
        ],
        ids=["link", "plain", "alphabet", "generator", "path of the generator", "code"],
    )
    def test_the_settings_key_passes_below_no_floor(self, given: TokenPolicy, settings: Settings) -> None:
        with pytest.raises(ConfigurationError, match="'s', with these settings"):
            TokenManager(MemoryBackend(), settings, [given])
        ResolvedPolicy.of(replace(given, allow_weak="end-to-end tests"), replace(settings, secret=SECRET))

    @pytest.mark.parametrize(
        ("given", "settings"),
        [
            (TokenPolicy.link("s", key_length=22), Settings(default_key_length=4)),
            (TokenPolicy.link("s", key_storage="derived"), replace(SECRETS, default_key_length=4)),
            (TokenPolicy.link("s", key_generator=fixed_key), Settings(default_key_length=4)),
            (TokenPolicy.link("s"), Settings(default_key_length=4, default_key_generator=fixed_key)),
            (TokenPolicy.code("s"), replace(SECRETS, default_key_length=4)),
        ],
        ids=["length", "derived", "generator", "the settings' generator", "code"],
    )
    def test_a_weak_settings_key_that_the_policy_does_not_take_is_well(
        self, given: TokenPolicy, settings: Settings
    ) -> None:
        TokenManager(MemoryBackend(), settings, [given])

    async def test_without_a_policy_the_settings_alone_say_what_a_key_is(self) -> None:
        async with TokenManager(MemoryBackend(), Settings(default_key_length=4)) as manager:
            assert len((await manager.deactivate_and_create(USER, "s")).key) == 4

    @pytest.mark.parametrize("reason", ["", "  ", 1, True])
    def test_weakness_needs_a_reason(self, reason: Any) -> None:
        with pytest.raises(ConfigurationError, match="why"):
            TokenPolicy.code("s", digits=4, allow_weak=reason)

    @pytest.mark.parametrize(
        "given",
        [
            TokenPolicy.code("s"),
            TokenPolicy.code("s", digits=4, allow_weak="end-to-end tests"),
            TokenPolicy.pair("s"),
            TokenPolicy("s", key_storage="derived"),
        ],
        ids=["code", "weak code", "pair", "derived"],
    )
    def test_without_a_secret_the_manager_refuses(self, given: TokenPolicy) -> None:
        with pytest.raises(ConfigurationError, match="secret"):
            TokenManager(MemoryBackend(), policies=[given])
        TokenManager(MemoryBackend(), policies=[given], settings=SECRETS)

    @pytest.mark.parametrize("weak", [None, "end-to-end tests"])
    @pytest.mark.parametrize(
        ("make", "chars"),
        [
            *((TokenPolicy.link, chars) for chars in ("0123456789abcdefA0", "abc/", "abc d", "äöü")),
            *(
                (TokenPolicy.code, chars)
                for chars in ("00123456789", "01234-56789", "0123 456789", "٠١٢٣٤٥٦٧٨٩")
            ),
            *((TokenPolicy.pair, chars) for chars in ("aabcdef", "abc+")),
        ],
    )
    def test_no_alphabet_that_keys_cannot_be_made_of(self, make: Any, chars: str, weak: str | None) -> None:
        with pytest.raises(ConfigurationError, match="alphabet"):
            make("s", key_chars=chars, allow_weak=weak)

    def test_nor_one_of_the_settings(self) -> None:
        for chars in ("aabcdefghijklmnopq", "abc/"):
            with pytest.raises(ConfigurationError, match="alphabet"):
                Policies([], Settings(default_key_chars=chars))

    def test_derived_without_a_secret_is_refused_in_the_settings_too(self) -> None:
        with pytest.raises(ConfigurationError, match="secret"):
            TokenManager(MemoryBackend(), Settings(key_storage="derived"))


class TestRanges:
    @pytest.mark.parametrize(
        "fields",
        [
            {"slug": ""},
            {"slug": "a" * 256},
            {"slug": 5},
            {"slug": ["s"]},
            {"expiration": 0},
            {"expiration": float("inf")},
            {"expiration": "60"},
            {"expiration": timedelta(0)},
            {"cooldown": "1 minute"},
            {"cooldown": timedelta(days=367)},
            {"cooldown": timedelta(0)},
            {"issue_limits": Limit(1, "1m")},
            {"issue_limits": [(1, "1m")]},
            {"issue_limits": [Limit(1, "60s"), Limit(5, "1m")]},
            {"attempt_limits": None},
            {"attempt_limits": [Limit(1, "1m", by="ip"), Limit(5, "60s", by="ip")]},
            {"digits": 6},
            {"code_expiration": "5m"},
            {"code_context": "ignored"},
            {"channel": "email"},
            {"channel": "sms", "kind": "pair", "max_attempts": 5},
            {"kind": "pair", "max_attempts": 5, "digits": 0},
            {"kind": "pair", "max_attempts": 5, "code_expiration": timedelta(0)},
            {"kind": "pair", "max_attempts": 5, "code_expiration": 10},
            {"kind": None},
            {"context": None},
            {"key_length": 0},
            {"key_length": True},
            {"key_chars": ""},
            {"max_attempts": 0},
            {"max_attempts": 5.0},
            {"attempt_window": timedelta(0)},
            {"attempt_window": timedelta(days=1, milliseconds=1)},
            {"attempt_window": 900},
            {"attempt_window": None},
            {"cooldown": timedelta(seconds=-1)},
            {"cooldown": 60},
            {"overlap": 60},
            {"overlap": timedelta(seconds=-1)},
            {"max_uses": 0},
            {"prefix": "a" * 33},
            {"prefix": "a\0"},
            {"prefix": 5},
            {"prefix": "vt "},
            {"prefix": "vt/"},
            {"key_storage": "encrypted"},
            {"context": "optional"},
            {"kind": "magic"},
        ],
        ids=str,
    )
    def test_out_of_range(self, fields: dict[str, Any]) -> None:
        given: dict[str, Any] = {"slug": "s", **fields}
        with pytest.raises(ConfigurationError):
            TokenPolicy(**given)

    def test_a_prefix_is_for_links_only(self) -> None:
        with pytest.raises(ConfigurationError, match="links"):
            TokenPolicy.code("s", prefix="vt_")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # on purpose

    def test_codes_are_derived_where_the_settings_say_so(self) -> None:
        settings = replace(SECRETS, key_storage="derived")
        code = ResolvedPolicy.of(TokenPolicy.code("s"), settings)
        assert (code.storage, code.code_length, code.code_chars) == ("derived", 6, DIGITS)
        with pytest.raises(ConfigurationError, match="generator"):
            ResolvedPolicy.of(TokenPolicy.code("s", key_generator=fixed_key), settings)

    def test_a_number_of_seconds_is_answered_with_its_right_spelling(self) -> None:
        with pytest.raises(ConfigurationError, match=r"'s': cooldown .* for 60 seconds write '60s'"):
            TokenPolicy.link("s", cooldown=60)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # on purpose

    def test_lists_that_were_handed_in_may_change(self) -> None:
        limits, codes = [Limit(1, "1m")], {Subject("auth.phone", 1): "123456"}
        given = TokenPolicy.code("s", issue_limits=limits, test_codes=codes, test_codes_why="review")
        limits.clear()
        codes.clear()
        assert given.issue_limits == (Limit(1, "1m"),)
        assert len(given.test_codes) == 1
        assert given == replace(given)
        assert hash(given) == hash(replace(given))

    def test_one_policy_a_slug(self) -> None:
        with pytest.raises(ConfigurationError, match="two policies"):
            TokenManager(MemoryBackend(), policies=[TokenPolicy("s"), TokenPolicy.link("s")])

    async def test_a_policy_for_tokens_without_a_slug(self) -> None:
        async with TokenManager(MemoryBackend(), policies=[TokenPolicy(None, max_uses=2)]) as manager:
            assert (await manager.deactivate_and_create(USER)).max_uses == 2
            assert (await manager.deactivate_and_create(USER, "s")).max_uses == 1


class TestGenerators:
    @pytest.mark.parametrize("path", [f"{__name__}.fixed_key", f"{__name__}:fixed_key"])
    async def test_import_paths_in_both_forms(self, path: str) -> None:
        async def issue(**keywords: Any) -> IssuedToken:
            async with TokenManager(MemoryBackend(), **keywords) as manager:
                return await manager.deactivate_and_create(USER, "s")

        assert (await issue(settings=Settings(default_key_generator=path))).key == fixed_key()
        assert (await issue(policies=[TokenPolicy("s", key_generator=path)])).key == fixed_key()

    def test_a_nested_name(self) -> None:
        found = load_generator(f"{__name__}:TestGenerators.made_by_a_class")
        assert found is TestGenerators.made_by_a_class

    @staticmethod
    def made_by_a_class() -> str:
        return "K" * 32

    def test_a_builtin_of_the_standard_library(self) -> None:
        assert load_generator("secrets.token_hex") is secrets.token_hex

    @pytest.mark.parametrize(
        "path",
        ["nope", "", ":", ".", "no.such.module", "vtoken.keys.nope", "vtoken.keys:nope", "vtoken:ANY", 5],
    )
    def test_what_cannot_be_imported_or_called_is_told_at_once(self, path: Any) -> None:
        with pytest.raises(ConfigurationError):
            TokenManager(MemoryBackend(), policies=[TokenPolicy("s", key_generator=path)])
        with pytest.raises(ConfigurationError):
            load_generator(path)

    def test_the_longest_window_is_a_day(self) -> None:
        assert timedelta(days=1) == policy.MAX_ATTEMPT_WINDOW


class TestTestCodes:
    def test_of_codes_and_pairs(self) -> None:
        codes = {Subject("auth.phone", "+15550100"): "123456", Subject("auth.phone", 7): "123 457"}
        for make in (TokenPolicy.code, TokenPolicy.pair):
            resolved = ResolvedPolicy.of(make("s", test_codes=codes, test_codes_why="review"), SECRETS)
            assert resolved.test_codes["auth.phone", "+15550100"] == "123456"
            assert resolved.test_codes["auth.phone", "7"] == "123 457"

    @pytest.mark.parametrize(
        "fields",
        [
            {"test_codes": {Subject("auth.phone", 1): "123456"}},
            {"test_codes_why": " ", "test_codes": {Subject("auth.phone", 1): "123456"}},
            {"test_codes_why": "review", "test_codes": {Subject("auth.phone", 1): "86753"}},
            {"test_codes_why": "review", "test_codes": {Subject("auth.phone", 1): "8675309"}},
            {"test_codes_why": "review", "test_codes": {Subject("auth.phone", 1): "86753a"}},
            {"test_codes_why": "review", "test_codes": {Subject("auth.phone", 1): 867530}},
            {"test_codes_why": "review", "test_codes": {Subject("auth.phone"): "867530"}},
            {"test_codes_why": "review", "test_codes": {Subject("", 1): "867530"}},
            {"test_codes_why": "review", "test_codes": {"auth.phone:1": "867530"}},
            {"test_codes_why": "review", "test_codes": ["867530"]},
        ],
        ids=str,
    )
    def test_refused(self, fields: dict[str, Any]) -> None:
        with pytest.raises(ConfigurationError) as info:
            TokenPolicy.code("s", **fields)
        assert "86753" not in str(info.value)

    def test_not_of_links_and_with_no_floor_lifted(self) -> None:
        codes = {"test_codes": {Subject("auth.phone", 1): "123456"}, "test_codes_why": "review"}
        with pytest.raises(ConfigurationError, match="not for links"):
            TokenPolicy("s", **codes)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # on purpose
        for fields in ({"digits": 5}, {"max_attempts": None}, {"expiration": 60}):
            with pytest.raises(ConfigurationError):
                TokenPolicy.code("s", **{**fields, **codes})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # on purpose

    def test_no_test_code_is_shown(self) -> None:
        given = TokenPolicy.code("s", test_codes={Subject("a", 1): "867530"}, test_codes_why="review")
        shown = f"{given!r} {ResolvedPolicy.of(given, SECRETS)!r}"
        assert "867530" not in shown

    @pytest.mark.parametrize("make", [TokenPolicy, TokenPolicy.code, TokenPolicy.pair])
    def test_a_refusal_keeps_test_codes_out_of_its_frames(self, make: Any) -> None:
        with pytest.raises(ConfigurationError) as info:
            make("s", test_codes={Subject("a", 1): "867530999"}, test_codes_why="review")
        frames = traceback.TracebackException.from_exception(info.value, capture_locals=True).stack
        ours = [frame for frame in frames if frame.filename != __file__]
        assert ours
        assert "867530" not in str([frame.locals for frame in ours])


class TestCalls:
    """Fault 21 of issue 11: floors hold for calls as they do for policies."""

    @pytest.mark.parametrize(
        "kwargs",
        [{"length": 1}, {"allowed_chars": "01"}, {"generator": fixed_key}, {"generator": secrets.token_hex}],
    )
    def test_a_call_gives_a_code_no_other_length_or_alphabet(self, kwargs: dict[str, Any]) -> None:
        code = ResolvedPolicy.of(TokenPolicy.code("s"), SECRETS)
        with pytest.raises(InvalidInput, match="codes"):
            check_call(code, MINUTE, kwargs)
        assert check_call(code, MINUTE, {"length": 6}) == check_call(code, MINUTE, None)

    @pytest.mark.parametrize("lifetime", [None, 10 * MINUTE + 1])
    def test_nor_a_longer_life(self, lifetime: int | None) -> None:
        code = ResolvedPolicy.of(TokenPolicy.code("s"), SECRETS)
        with pytest.raises(InvalidInput, match="at most 10m"):
            check_call(code, lifetime, None)
        check_call(code, 10 * MINUTE, None)
        weak = ResolvedPolicy.of(TokenPolicy.code("s", allow_weak="tests"), SECRETS)
        check_call(weak, lifetime, None)
        mailed = ResolvedPolicy.of(TokenPolicy.code("s", channel="email"), SECRETS)
        check_call(mailed, 24 * 60 * MINUTE, None)

    @pytest.mark.parametrize(
        ("kwargs", "says"),
        [
            ({"length": 21}, "128"),
            ({"allowed_chars": "ab"}, "128"),
            ({"allowed_chars": "aabcdefghijklmnopqrstuv"}, "alphabet"),
            ({"allowed_chars": "abcdefghijklmnopqrstuvwxyz/"}, "alphabet"),
            ({"length": 0}, "length"),
            ({"allowed_chars": ""}, "allowed_chars"),
            ({"digits": 40}, "takes length"),
            ([("length", 40)], "mapping"),
        ],
    )
    def test_a_link_key_stays_long(self, kwargs: Any, says: str) -> None:
        link = ResolvedPolicy.of(TokenPolicy.link("s"), SECRETS)
        with pytest.raises(InvalidInput, match=says):
            check_call(link, None, kwargs)

    def test_unless_the_policy_is_weak_or_there_is_none(self) -> None:
        for given in (TokenPolicy.link("s", allow_weak="tests"), policy.NO_POLICY):
            weak = ResolvedPolicy.of(given, SECRETS)
            found = check_call(weak, None, {"length": 6})
            assert found == (random_key, {"length": 6, "allowed_chars": ALPHANUMERIC})

    def test_another_generator_gets_what_is_given_for_it(self) -> None:
        link = ResolvedPolicy.of(TokenPolicy.link("s"), SECRETS)
        found = check_call(link, None, {"generator": "secrets.token_hex", "nbytes": 40})
        assert found == (secrets.token_hex, {"nbytes": 40})
        own = ResolvedPolicy.of(TokenPolicy.code("s", key_generator=fixed_key), SECRETS)
        assert check_call(own, MINUTE, {"length": 3}) == (fixed_key, {"length": 3})
        with pytest.raises(InvalidInput):
            check_call(own, MINUTE, {"generator": random_key, "length": 3})

    @pytest.mark.parametrize(
        "given",
        [TokenPolicy.link("s", key_storage="derived"), TokenPolicy.pair("s")],
        ids=["derived", "pair"],
    )
    def test_what_has_no_generator_takes_nothing_for_one(self, given: TokenPolicy) -> None:
        resolved = ResolvedPolicy.of(given, SECRETS)
        with pytest.raises(InvalidInput, match="generator"):
            check_call(resolved, None, {"length": 40})
        check_call(resolved, None, {})


class TestPolicies:
    def test_a_slug_without_a_policy_has_the_settings(self) -> None:
        policies = Policies([TokenPolicy.link("reset"), TokenPolicy(None, max_uses=3)], Settings())
        assert (policies.of("reset").slug, policies.of("").max_uses) == ("reset", 3)
        unnamed = policies.of("other")
        assert (unnamed.slug, unnamed.is_policy_given, unnamed.expiration) == ("other", False, 1440 * MINUTE)
        assert policies.get("other") == unnamed
        assert [each.slug for each in policies] == ["reset", ""]

    @pytest.mark.parametrize(
        ("slug", "says"),
        [("pasword-reset", "did you mean password-reset"), ("", "None"), ("zzz", "add a TokenPolicy")],
    )
    def test_a_slug_without_a_policy_can_be_refused(self, slug: str, says: str) -> None:
        strict = Settings(unknown_slugs="refuse")
        policies = Policies([TokenPolicy.link("password-reset"), TokenPolicy.link("invite")], strict)
        with pytest.raises(ConfigurationError, match=says):
            policies.of(slug)
        assert policies.get(slug).is_policy_given is False
        assert policies.of("invite").slug == "invite"

    def test_codes_without_an_issue_limit_are_said_once(self, caplog: pytest.LogCaptureFixture) -> None:
        given = [
            TokenPolicy.code("a"),
            TokenPolicy.pair("b"),
            TokenPolicy.code("c", cooldown="1m"),
            TokenPolicy.pair("d", issue_limits=[Limit(20, "1d")]),
            TokenPolicy.link("e"),
        ]
        assert Policies(given, SECRETS).unlimited_codes() == ("a", "b")
        assert [(record.name, record.levelno) for record in caplog.records] == [("vtoken", logging.WARNING)]
        assert "'a', 'b'" in caplog.text
        caplog.clear()
        assert Policies(given[2:], SECRETS).unlimited_codes() == ()
        assert caplog.records == []
