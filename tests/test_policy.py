"""Settings and policies: defaults, presets, floors."""

from __future__ import annotations

import pickle
import secrets
import traceback
from dataclasses import FrozenInstanceError, replace
from datetime import timedelta
from typing import Any

import pytest

from vtoken import DEFAULT, ConfigurationError, IssuedToken, Settings, TokenManager, TokenPolicy, policy
from vtoken.keys import ALPHANUMERIC, random_key
from vtoken.policy import Rules, load_generator
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


class TestPresets:
    def test_a_link_lives_an_hour(self) -> None:
        link = TokenPolicy.link("password-reset")
        assert (link.expiration, link.max_attempts, link.max_uses, link.kind) == (60, None, 1, "link")

    def test_a_code_has_6_digits_10_minutes_and_5_attempts_in_15_minutes(self) -> None:
        code = TokenPolicy.code("login")
        assert (code.key_length, code.key_chars, code.expiration) == (6, "0123456789", 10)
        assert (code.max_attempts, code.attempt_window) == (5, timedelta(minutes=15))

    def test_overrides(self) -> None:
        code = TokenPolicy.code(
            "login", digits=8, expiration=3, max_attempts=3, cooldown=timedelta(minutes=1)
        )
        assert (code.key_length, code.expiration, code.max_attempts) == (8, 3, 3)
        assert code.cooldown == timedelta(minutes=1)
        link = TokenPolicy.link("invite", expiration=None, max_uses=5)
        assert (link.expiration, link.max_uses) == (None, 5)

    def test_a_plain_policy_takes_the_settings(self) -> None:
        rules = Rules.of(TokenPolicy("x"), Settings(default_expiration=7, default_key_length=40))
        assert rules.expiration == 7 * MINUTE
        assert rules.generator_kwargs == {"length": 40, "allowed_chars": ALPHANUMERIC}
        assert (rules.max_attempts, rules.cooldown, rules.max_uses, rules.overlap) == (None, 0, 1, 0)
        assert not rules.is_guarded

    def test_a_policy_goes_before_the_settings(self) -> None:
        given = TokenPolicy(
            "x",
            expiration=None,
            key_length=64,
            key_chars="abcdef",
            key_storage="plain",
            cooldown=timedelta(seconds=30),
            overlap=timedelta(seconds=5),
        )
        rules = Rules.of(given, Settings(default_key_generator=random_key))
        assert rules.expiration is None
        assert rules.generator_kwargs == {"length": 64, "allowed_chars": "abcdef"}
        assert (rules.storage, rules.cooldown, rules.overlap) == ("plain", 30_000, 5_000)


class TestFloors:
    @pytest.mark.parametrize(
        ("make", "fields", "says"),
        [
            (TokenPolicy.code, {"digits": 4}, "6 digits"),
            (TokenPolicy.code, {"digits": 5}, "6 digits"),
            (TokenPolicy.code, {"key_chars": "0000000000"}, "6 digits"),
            (TokenPolicy.code, {"expiration": 24 * 60}, "10 minutes"),
            (TokenPolicy.code, {"expiration": 10.001}, "10 minutes"),
            (TokenPolicy.code, {"expiration": None}, "10 minutes"),
            (TokenPolicy.code, {"expiration": DEFAULT}, "10 minutes"),
            (TokenPolicy.code, {"max_attempts": None}, "max_attempts"),
            (TokenPolicy.code, {"max_attempts": 101}, "max_attempts"),
            (TokenPolicy.link, {"key_length": 21}, "128"),
            (TokenPolicy, {"key_length": 31, "key_chars": "0123456789abcdef"}, "128"),
            (TokenPolicy, {"key_chars": "aaaa"}, "128"),
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
        TokenManager(MemoryBackend(), settings, [replace(given, allow_weak="end-to-end tests")])

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
        "given", [TokenPolicy.code("s"), TokenPolicy("s", key_storage="derived")], ids=["code", "derived"]
    )
    def test_without_a_secret_the_manager_refuses(self, given: TokenPolicy) -> None:
        with pytest.raises(ConfigurationError, match="secret"):
            TokenManager(MemoryBackend(), policies=[given])
        TokenManager(MemoryBackend(), policies=[given], settings=SECRETS)

    async def test_weak_codes_without_a_secret_work_where_they_are_allowed(self) -> None:
        weak = TokenPolicy.code("s", digits=4, allow_weak="end-to-end tests")
        async with TokenManager(MemoryBackend(), policies=[weak]) as manager:
            issued = await manager.deactivate_and_create(USER, "s")
            assert len(issued.key) == 4
            assert await manager.consume(USER, "s", issued.key) == issued

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
            {"max_uses": None},
            {"prefix": "a" * 33},
            {"prefix": "a\0"},
            {"prefix": 5},
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

    @pytest.mark.parametrize("fields", [{"prefix": "vt_"}, {"key_storage": "derived"}], ids=str)
    def test_what_is_for_links_only(self, fields: dict[str, Any]) -> None:
        with pytest.raises(ConfigurationError, match="links"):
            TokenPolicy.code("s", **fields)

    def test_a_code_stays_a_digest_where_the_settings_say_derived(self) -> None:
        settings = replace(SECRETS, key_storage="derived")
        assert Rules.of(TokenPolicy.code("s"), settings).storage == "digest"

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
        assert timedelta(days=1) == policy.MAX_WINDOW
