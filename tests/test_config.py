"""Configuration: the environment and TOML to settings, policies and hooks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vtoken import (
    Configuration,
    ConfigurationError,
    LazyHook,
    Limit,
    Settings,
    Subject,
    TokenEvent,
    TokenManager,
    TokenPolicy,
)
from vtoken.config import policies_from_mapping

SECRET = "first-secret-0123456789-0123456789"
OLDER = "older-secret-0123456789-0123456789"
OLDEST = "oldest-secret-0123456789-012345678"
MEMORY = {"VTOKEN_URL": "memory://"}


def plain_generator(length: int = 32) -> str:
    """A key generator."""
    return "k" * length


events: list[TokenEvent] = []


def remember(event: TokenEvent) -> None:
    """A hook."""
    events.append(event)


# The environment ---------------------------------------------------------------------------------


def test_every_setting_has_its_variable() -> None:
    found = Configuration.from_env(
        {
            "VTOKEN_URL": "sqlite:///tokens.db",
            "VTOKEN_SECRET": SECRET,
            "VTOKEN_PREVIOUS_SECRETS": f"{OLDER}, {OLDEST}\n",
            "VTOKEN_DEFAULT_EXPIRATION": "90",
            "VTOKEN_DEFAULT_KEY_LENGTH": "40",
            "VTOKEN_DEFAULT_KEY_CHARS": "abcdefghijklmnop",
            "VTOKEN_DEFAULT_KEY_GENERATOR": f"{__name__}:plain_generator",
            "VTOKEN_MAX_KEY_ITERATIONS": "7",
            "VTOKEN_KEY_STORAGE": "derived",
            "VTOKEN_UNKNOWN_SLUGS": "refuse",
            "VTOKEN_HOOKS": "a.b:c, d.e\tf:g",
            "VTOKEN_TEST_MONGODB_URL": "mongodb://ignored",
            "PATH": "/bin",
        }
    )
    assert found == Configuration(
        url="sqlite:///tokens.db",
        settings=Settings(
            secret=SECRET,
            previous_secrets=[OLDER, OLDEST],
            default_expiration=90,
            default_key_length=40,
            default_key_chars="abcdefghijklmnop",
            default_key_generator=f"{__name__}:plain_generator",
            max_key_iterations=7,
            key_storage="derived",
            unknown_slugs="refuse",
        ),
        policies=(),
        hooks=("a.b:c", "d.e", "f:g"),
    )
    assert "secret-0123" not in repr(found)


@pytest.mark.parametrize(
    ("text", "shown"),
    [("15", "15m"), ("0.5", "30s"), ("never", "never"), (" Never ", "never"), ("90s", "90s"), ("24h", "1d")],
)
def test_expirations(text: str, shown: str) -> None:
    found = Configuration.from_env({**MEMORY, "VTOKEN_DEFAULT_EXPIRATION": text})
    assert found.describe()["settings"]["default_expiration"] == shown


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("VTOKEN_SECERT", "VTOKEN_SECRET"),
        ("VTOKEN_EXPIRATION", "VTOKEN_DEFAULT_EXPIRATION"),
        ("VTOKEN_PREVIOUS_SECRET", "VTOKEN_PREVIOUS_SECRETS"),
        ("VTOKEN_HOOK", "VTOKEN_HOOKS"),
        ("VTOKEN_KEYSTORAGE", "VTOKEN_KEY_STORAGE"),
        ("VTOKEN_TESTING", "VTOKEN_"),
    ],
)
def test_a_misspelt_variable_names_the_right_one(wrong: str, right: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{wrong}.*{right}") as caught:
        Configuration.from_env({**MEMORY, wrong: "hunter2"})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("VTOKEN_SECRET", "hunter2", "at least 32 bytes"),
        ("VTOKEN_SECRET", "  ", "empty"),
        ("VTOKEN_PREVIOUS_SECRETS", OLDER, "pass the current one"),
        ("VTOKEN_DEFAULT_EXPIRATION", "hunter2", "number of minutes"),
        ("VTOKEN_DEFAULT_EXPIRATION", "0", "more than 0 minutes"),
        ("VTOKEN_DEFAULT_EXPIRATION", "-5", "number of minutes"),
        ("VTOKEN_DEFAULT_EXPIRATION", "nan", "number of minutes"),
        ("VTOKEN_DEFAULT_KEY_LENGTH", "hunter2", "whole number"),
        ("VTOKEN_DEFAULT_KEY_LENGTH", "513", "512"),
        ("VTOKEN_DEFAULT_KEY_LENGTH", "٣", "whole number"),
        ("VTOKEN_MAX_KEY_ITERATIONS", "0", "from 1"),
        ("VTOKEN_KEY_STORAGE", "digset", "one of digest, plain"),
        ("VTOKEN_CONFIG", "/no/such/file.toml", "No such file"),
        ("VTOKEN_CONFIG", "nul\0.toml", "cannot be read|not TOML"),
    ],
)
def test_a_bad_value_names_its_variable(name: str, value: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        Configuration.from_env({**MEMORY, name: value})
    assert name in str(caught.value) or name == "VTOKEN_CONFIG"
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None


def test_a_missing_url_says_how_to_set_it() -> None:
    with pytest.raises(ConfigurationError, match=r"VTOKEN_URL is not set.*VTOKEN_URL=sqlite:///"):
        Configuration.from_env({})


def test_a_given_url_goes_first_and_the_default_last() -> None:
    assert Configuration.from_env({}, default_url="memory://d").url == "memory://d"
    assert Configuration.from_env(MEMORY, default_url="memory://d").url == "memory://"
    assert Configuration.from_env(MEMORY, url="memory://u", default_url="memory://d").url == "memory://u"


async def test_a_manager_is_made_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "vtoken.toml"
    file.write_text('[policies.login]\npreset = "code"\ndigits = 8\n')
    monkeypatch.setenv("VTOKEN_URL", "memory://")
    monkeypatch.setenv("VTOKEN_SECRET", SECRET)
    monkeypatch.setenv("VTOKEN_DEFAULT_KEY_LENGTH", "44")
    monkeypatch.setenv("VTOKEN_CONFIG", str(file))
    monkeypatch.setenv("VTOKEN_HOOKS", f"{__name__}:remember")
    events.clear()
    async with TokenManager.from_env() as manager:
        assert len((await manager.deactivate_and_create(Subject("user", 1))).key) == 44
        code = (await manager.deactivate_and_create(Subject("user", 1), "login")).key
    assert len(code) == 8
    assert code.isdigit()
    assert [event.slug for event in events] == [None, "login"]
    async with TokenManager.from_env(settings=Settings(), policies=[], hooks=[]) as manager:
        assert len((await manager.deactivate_and_create(Subject("user", 1))).key) == 32
    assert len(events) == 2


# TOML --------------------------------------------------------------------------------------------

TOML = f"""
url = "memory://file"
secret = "{SECRET}"
previous_secrets = ["{OLDER}"]
default_expiration = "never"
default_key_length = 33
hooks = ["a:b"]

[policies.password-reset]
preset = "link"
expiration = 30
cooldown = "60s"
overlap = "90s"
issue_limits = [{{count = 5, per = "1d", by = "ip"}}, {{count = 20, per = "7d", across = "mails"}}]

[policies."sms login"]
preset = "code"
digits = 7
attempt_window = "1h"
cooldown = "1m"
test_codes = {{"auth.phone:+1555:01" = "1234567"}}
test_codes_why = "app-store review"

[policies.log-in]
preset = "pair"
digits = 8
code_expiration = "5m"
cooldown = "1m"

[policies.invitation]
expiration = "never"
max_uses = "unlimited"
prefix = "inv_"

[policies.""]
key_storage = "digest"
"""


EXPECTED = Configuration(
    "memory://file",
    Settings(secret=SECRET, previous_secrets=(OLDER,), default_expiration=None, default_key_length=33),
    (
        TokenPolicy.link(
            "password-reset",
            expiration=30,
            cooldown="60s",
            overlap="90s",
            issue_limits=(Limit(5, "1d", by="ip"), Limit(20, "7d", across="mails")),
        ),
        TokenPolicy.code(
            "sms login",
            digits=7,
            attempt_window="1h",
            cooldown="1m",
            test_codes={Subject("auth.phone", "+1555:01"): "1234567"},
            test_codes_why="app-store review",
        ),
        TokenPolicy.pair("log-in", digits=8, code_expiration="5m", cooldown="1m"),
        TokenPolicy("invitation", expiration=None, max_uses=None, prefix="inv_"),
        TokenPolicy(None, key_storage="digest"),
    ),
    ("a:b",),
)


def from_toml(folder: Path, text: str, name: str = "vtoken.toml", **variables: str) -> Configuration:
    """Read a file with this text."""
    (folder / name).write_text(text)
    return Configuration.from_env({"VTOKEN_CONFIG": str(folder / name), **variables})


def test_a_file_holds_it_all(tmp_path: Path) -> None:
    assert from_toml(tmp_path, TOML) == EXPECTED


def test_a_pyproject_holds_it_all_in_its_table(tmp_path: Path) -> None:
    text = TOML.replace("[policies", "[tool.vtoken.policies")
    assert from_toml(tmp_path, f"[tool.vtoken]\n{text}", "pyproject.toml") == EXPECTED


def test_a_variable_goes_before_the_file(tmp_path: Path) -> None:
    found = from_toml(
        tmp_path, TOML, VTOKEN_URL="memory://variable", VTOKEN_DEFAULT_EXPIRATION="5", VTOKEN_HOOKS="x:y"
    )
    assert (found.url, found.settings.default_expiration, found.hooks) == ("memory://variable", 5, ("x:y",))
    assert found.settings.default_key_length == 33


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('secert = "hunter2"', "'secert'; did you mean secret"),
        ('secret = "hunter2"', "secret in .*vtoken.toml: .*32 bytes"),
        ("secret = 5", "must be a text"),
        ('secret = ["hunter2"]', "must be a text"),
        ("default_key_length = true", "whole number"),
        ("hooks = 3", "list of texts"),
        ("policies = 3", "tables by slug"),
        ("[policy.reset]", "'policy'; did you mean policies"),
        ("[policies]\nreset = 3", "policies in .*reset must be a table"),
        ("secret = hunter2", "not TOML"),
        ("[tool.other]", r"has no table \[tool.vtoken\]"),
        ("tool = 3", r"has no table \[tool.vtoken\]"),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        from_toml(tmp_path, text, VTOKEN_URL="memory://")
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None


def test_a_url_in_a_file_must_be_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"url in .*must be a text"):
        from_toml(tmp_path, "url = 3")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="UTF-8"):
        Configuration.from_env({**MEMORY, "VTOKEN_CONFIG": str(tmp_path / "x.toml")})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"preset": "lnik"}, "did you mean link"),
        ({"exipration": 5}, "'exipration'; did you mean expiration"),
        ({"slug": "other"}, "unknown name 'slug'"),
        ({"digits": 8}, "digits is for pairs"),
        ({"preset": "code", "digits": 4}, "6 digits"),
        ({"preset": "code", "expiration": "1d"}, "lives at most 10m"),
        ({"cooldown": "1 fortnight"}, "cooldown must be a timedelta or a text such as '90s'"),
        ({"cooldown": 60}, "for 60 seconds write '60s', for 60 minutes '60m'"),
        ({"cooldown": True}, "cooldown must be"),
        ({"cooldown": "0s"}, "cooldown must be at least"),
        ({"attempt_window": "2d"}, "at most 1d"),
        ({"max_uses": "many"}, "max_uses: must be a whole number"),
        ({"max_uses": True}, "max_uses: must be a whole number"),
        ({"issue_limits": 5}, "issue_limits: must be a list of tables"),
        ({"issue_limits": [5]}, "issue_limits: must be a list of tables"),
        ({"issue_limits": [{"count": 5}]}, "issue_limits: a limit needs per"),
        ({"issue_limits": [{"count": 5, "pre": "1d"}]}, "unknown name 'pre'; did you mean per"),
        ({"issue_limits": [{"count": 5, "per": "1y"}]}, "issue_limits: Limit: per must be"),
        ({"attempt_limits": [{"count": 0, "per": "1d"}]}, "attempt_limits: Limit: count must be"),
        ({"preset": "code", "test_codes": ["123456"]}, "test_codes: must be a table"),
        ({"preset": "code", "test_codes": {"x": "123456"}}, "test_codes: each name must be content_type"),
        ({"max_uses": 0}, "max_uses must be"),
        ({"key_storage": "plian"}, "one of digest, plain"),
        ({"key_generator": 5}, "must be a text"),
        ({"context": "require"}, "one of required, ignored"),
        ({"key_length": 8}, "128 random bits"),
        (3, "must be a table"),
    ],
)
def test_a_mistake_in_a_policy_is_named(table: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        policies_from_mapping({"reset": table})
    assert str(caught.value).startswith("policies.reset")


@pytest.mark.parametrize("mapping", [None, [], "reset", {1: {}}])
def test_policies_are_tables_by_slug(mapping: Any) -> None:
    with pytest.raises(ConfigurationError, match="table"):
        policies_from_mapping(mapping)


# Files that nobody named ---------------------------------------------------------------------------


def test_a_folder_is_read_only_where_that_is_asked(tmp_path: Path) -> None:
    (tmp_path / "vtoken.toml").write_text(TOML)
    assert Configuration.from_env(MEMORY).policies == ()
    assert Configuration.from_env({}, folder=tmp_path) == EXPECTED
    assert Configuration.from_env(MEMORY, folder=tmp_path).url == "memory://"


def test_in_a_folder_the_file_of_its_own_goes_first(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.vtoken]\nurl = "memory://project"\n')
    assert Configuration.from_env({}, folder=tmp_path).url == "memory://project"
    (tmp_path / "vtoken.toml").write_text('url = "memory://own"\n')
    assert Configuration.from_env({}, folder=tmp_path).url == "memory://own"
    (tmp_path / "named.toml").write_text('url = "memory://named"\n')
    named = {"VTOKEN_CONFIG": str(tmp_path / "named.toml")}
    assert Configuration.from_env(named, folder=tmp_path).url == "memory://named"


def test_a_project_without_a_table_of_ours_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.other]\nurl = "x"\n')
    assert Configuration.from_env({}, default_url="memory://d", folder=tmp_path).url == "memory://d"


# What is in effect -------------------------------------------------------------------------------


def test_the_description_is_json_without_secrets(tmp_path: Path) -> None:
    password = "hunter2"
    found = from_toml(tmp_path, TOML, VTOKEN_URL=f"mongodb://user:{password}@host/db")
    said = found.describe()
    text = json.dumps(said)
    assert not any(word in text for word in (password, SECRET, OLDER))
    assert said["url"] == "mongodb://user:***@host/db"
    assert said["settings"]["secret"] == "***"
    assert said["settings"]["previous_secrets"] == ["***"]
    assert said["settings"]["default_expiration"] == "never"
    assert said["hooks"] == ["a:b"]
    policies: Mapping[str, Mapping[str, object]] = said["policies"]
    assert list(policies) == ["password-reset", "sms login", "log-in", "invitation", ""]
    assert policies["password-reset"]["cooldown"] == "60s"
    assert policies["password-reset"]["expiration"] == "30m"
    assert policies["password-reset"]["issue_limits"] == [
        {"count": 5, "per": "1d", "by": "ip"},
        {"count": 20, "per": "7d", "by": "object", "across": "mails"},
    ]
    assert policies["invitation"]["max_uses"] == "unlimited"
    assert policies["sms login"]["test_codes"] == {"auth.phone:+1555:01": "***"}
    assert policies["sms login"]["attempt_window"] == "1h"
    assert policies["log-in"]["attempt_window"] == "15m"
    assert policies["password-reset"]["key_length"] == 33, "the settings' value is in effect"
    assert policies[""]["expiration"] == "never", "the settings' value is in effect"
    assert policies["sms login"]["key_length"] == 7


def test_the_description_names_callables_by_their_path() -> None:
    found = Configuration(
        "memory://",
        Settings(default_key_generator=plain_generator),
        hooks=(remember, LazyHook(lambda: remember), "a:b"),
    )
    said = found.describe()
    assert said["settings"]["default_key_generator"] == f"{__name__}:plain_generator"
    assert said["settings"]["secret"] is None
    assert said["hooks"][0] == f"{__name__}:remember"
    assert said["hooks"][2] == "a:b"
    json.dumps(said)
