"""The command line, run in this process: a token's life, keys, errors, configuration."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from vtoken import __version__
from vtoken.cli.options import DEFAULT_URL
from vtoken.keys import random_key

from .cli_tools import SECRET, USER, Terminal, feed

pytestmark = pytest.mark.usefixtures("no_configuration")


# A token's life ----------------------------------------------------------------------------------


def test_a_token_is_issued_checked_and_consumed_once(vtoken: Terminal) -> None:
    token = vtoken.json("issue", USER, "--slug", "reset", "--expires-in", "30", "--extra", '{"a": [1]}')
    assert re.fullmatch("[A-Za-z0-9]{32}", token["key"])
    assert (token["content_type"], token["object_id"], token["slug"]) == ("auth.user", "42", "reset")
    assert token["extra_data"] == {"a": [1]}
    assert token["is_active"] is True

    checked = vtoken.json("check", USER, token["key"], "--slug", "reset")
    assert (checked["valid"], checked["id"], checked["uses"]) == (True, token["id"], 0)
    consumed = vtoken.json("consume", USER, token["key"], "--slug", "reset")
    assert (consumed["valid"], consumed["id"], consumed["uses"]) == (True, token["id"], 1)
    assert consumed["is_active"] is False
    assert "key" not in checked
    assert "key" not in consumed

    refused = vtoken.json("consume", USER, token["key"], "--slug", "reset", status=1)
    assert refused == {"valid": False, "reason": "used", "attempts_left": None}
    assert vtoken.error()["error"] == "InvalidToken"
    assert token["key"] not in vtoken.err


def test_people_can_read_it(vtoken: Terminal) -> None:
    assert vtoken("issue", USER, "--slug", "reset", "--expires-in", "never") == 0
    lines = dict(line.split(maxsplit=1) for line in vtoken.out.splitlines())
    assert (lines["subject"], lines["slug"], lines["expires"]) == (USER, "reset", "never")
    key = lines["key"]
    assert vtoken("check", USER, key, "--slug", "reset") == 0
    assert vtoken.out.splitlines()[0].split() == ["valid", "yes"]
    assert vtoken("consume", USER, key, "--slug", "reset") == 0
    assert vtoken("check", USER, key, "--slug", "reset") == 1
    assert (vtoken.out, vtoken.err) == ("", "vtoken: The token is not valid. (used)\n")


@pytest.mark.parametrize(
    ("subject", "slug"),
    [("auth.user:43", "reset"), ("auth.group:42", "reset"), (USER, "login"), (USER, None)],
)
def test_another_object_or_purpose_does_not_match(vtoken: Terminal, subject: str, slug: str | None) -> None:
    key = vtoken.json("issue", USER, "--slug", "reset")["key"]
    option = [] if slug is None else ["--slug", slug]
    assert vtoken.json("check", subject, key, *option, status=1)["reason"] == "unknown"
    assert vtoken("check", USER, key, "--slug", "reset") == 0


def test_without_a_slug_a_token_without_one_is_meant(vtoken: Terminal) -> None:
    token = vtoken.json("issue", USER)
    assert token["slug"] is None
    assert vtoken("consume", USER, token["key"], "--slug", "reset") == 1
    assert vtoken("consume", USER, token["key"]) == 0


def test_the_first_colon_splits_the_subject(vtoken: Terminal) -> None:
    token = vtoken.json("issue", "urn:isbn:978")
    assert (token["content_type"], token["object_id"]) == ("urn", "isbn:978")


def test_a_new_token_ends_the_old_one(vtoken: Terminal) -> None:
    old = vtoken.json("issue", USER, "--slug", "reset")["key"]
    new = vtoken.json("issue", USER, "--slug", "reset")["key"]
    assert vtoken("check", USER, old, "--slug", "reset") == 1
    assert vtoken("check", USER, new, "--slug", "reset") == 0


def test_deactivate_takes_one_slug_or_all(vtoken: Terminal) -> None:
    for slug in ("a", "b", "c"):
        vtoken.json("issue", USER, "--slug", slug)
    vtoken.json("issue", USER)
    assert vtoken.json("deactivate", USER, "--slug", "a") == {"deactivated": 1}
    assert vtoken.json("deactivate", USER) == {"deactivated": 3}
    assert vtoken.json("deactivate", USER) == {"deactivated": 0}


def test_stats_and_purge(vtoken: Terminal) -> None:
    key = vtoken.json("issue", USER, "--slug", "reset")["key"]
    vtoken.json("consume", USER, key, "--slug", "reset")
    vtoken.json("issue", USER, "--slug", "reset")
    vtoken.json("issue", USER)
    assert vtoken.json("stats") == {
        "total": 3,
        "active": 2,
        "expired": 0,
        "used": 1,
        "by_slug": {
            "": {"total": 1, "active": 1, "expired": 0, "used": 0},
            "reset": {"total": 2, "active": 1, "expired": 0, "used": 1},
        },
    }
    assert vtoken("stats") == 0
    assert [line.split() for line in vtoken.out.splitlines()] == [
        ["slug", "total", "active", "expired", "used", "inactive"],
        ["(none)", "1", "1", "0", "0", "0"],
        ["reset", "2", "1", "0", "1", "0"],
        ["all", "3", "2", "0", "1", "0"],
    ]
    assert vtoken.json("purge", "--batch-size", "1") == {"purged": 1}
    assert vtoken.json("purge") == {"purged": 0}
    assert vtoken.json("stats")["total"] == 2


def test_stats_of_an_empty_store(vtoken: Terminal) -> None:
    vtoken("init")
    assert vtoken.json("stats") == {"total": 0, "active": 0, "expired": 0, "used": 0, "by_slug": {}}
    assert vtoken("stats") == 0


def test_the_demo_shows_a_life(vtoken: Terminal, tmp_path: Path) -> None:
    told = vtoken.json("demo")
    assert told["ok"] is True
    assert [step["step"] for step in told["steps"]] == [
        "issue",
        "check",
        "wrong key",
        "consume",
        "consume again",
        "read the file",
        "purge",
    ]
    assert told["steps"][2]["outcome"] == "refused: unknown"
    assert told["steps"][4]["outcome"] == "refused: used"
    assert vtoken("demo") == 0
    assert vtoken.out.count("  ok  ") == 7
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"


# Keys --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["", "\n", "\r\n", "\nmore\n"])
def test_a_key_is_read_from_standard_input(vtoken: Terminal, stdin: io.BytesIO, ending: str) -> None:
    key = vtoken.json("issue", USER)["key"]
    feed(stdin, (key + ending).encode())
    assert vtoken("check", USER, "-") == 0
    feed(stdin, (key + ending).encode())
    assert vtoken("consume", USER, "-") == 0


@pytest.mark.parametrize(
    ("content", "status"), [(b"", 1), (b"\n", 1), (b"x" * 512, 1), (b"x" * 513, 1), (b"\xff\n", 1)]
)
def test_a_wrong_key_on_standard_input(
    vtoken: Terminal, stdin: io.BytesIO, content: bytes, status: int
) -> None:
    vtoken.json("issue", USER)
    feed(stdin, content)
    assert vtoken("check", USER, "-") == status
    assert "xx" not in vtoken.err


@pytest.mark.parametrize("key", ["-hunter2", "--hunter2", "@hunter2", "hunter2=1", "hunter 2", ""])
def test_a_wrong_key_may_look_like_an_option(vtoken: Terminal, key: str) -> None:
    vtoken("init")
    assert vtoken.json("check", USER, key, status=1)["reason"] == "unknown"
    assert vtoken.json("check", "--slug", "reset", USER, key, status=1)
    assert "hunter" not in vtoken.out + vtoken.err


def hyphened() -> str:
    """A key generator whose keys look like options."""
    return f"-{random_key()}"


def test_a_right_key_may_look_like_an_option(vtoken: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTOKEN_DEFAULT_KEY_GENERATOR", f"{__name__}:hyphened")
    key = vtoken.json("issue", USER)["key"]
    assert key.startswith("-")
    assert vtoken("check", USER, key) == 0
    assert vtoken("check", USER, "--", key) == 0
    assert vtoken("consume", USER, key) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", USER, "hunter2", "hunter2"),
        ("check", USER, "hunter2", "-hunter2"),
        ("check", USER, "hunter2", "--hunter2"),
        ("consume", USER, "hunter2", "--hunter2=hunter2"),
        ("check", USER, "hunter2", "--slug"),
        ("check", USER, "hunter2", "--slug", "a", "--slug", "b"),
        ("check", USER, "hunter2", "--slug", ""),
        ("check", "user:", "hunter2"),
        ("check", ":1", "hunter2"),
        ("check", USER, "hunter2", "--url", "nosuch://me:hunter2@host"),
        ("check", USER, "hunter2", "--url", "mongodb:/me:hunter2@host"),
        ("check", USER, "hunter2", "--url", ""),
    ],
)
def test_an_error_repeats_no_key_and_no_password(vtoken: Terminal, arguments: tuple[str, ...]) -> None:
    assert vtoken(*arguments) == 2
    assert vtoken.err.startswith("vtoken: ")
    assert vtoken.err.count("\n") == 1
    assert "hunter2" not in vtoken.out + vtoken.err
    assert vtoken(*arguments[:3], "--json", *arguments[3:]) == 2
    assert set(vtoken.error()) == {"error", "message"}
    assert "hunter2" not in vtoken.out + vtoken.err


# Errors and exit statuses ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chekc",), 'Did you mean "check"?'),
        (("check", USER), "KEY"),
        (("issue",), "SUBJECT"),
        (("purge", "--bach-size", "3"), "Did you mean"),
        (("purge", "--batch-size", "many"), "batch-size"),
        (("purge", "--batch-size", "0"), "from 1"),
        (("issue", USER, "--expires-in", "soon"), "--expires-in must be"),
        (("issue", USER, "--expires-in", "0"), "more than 0 minutes"),
        (("issue", USER, "--extra", "{hunter2"), "--extra is not JSON"),
        (("issue", USER, "--extra", "[" * 100_000), "--extra is not JSON"),
        (("issue", USER, "--extra", "NaN"), "NaN"),
        (("issue", "x" * 256 + ":1"), "255"),
    ],
)
def test_wrong_usage_is_status_2(vtoken: Terminal, arguments: tuple[str, ...], message: str) -> None:
    assert vtoken(*arguments) == 2
    assert vtoken.out == ""
    assert message in vtoken.err
    assert vtoken.err.count("\n") == 1
    assert vtoken(*arguments, "--json") == 2
    assert "message" in vtoken.error()


def test_a_store_that_fails_is_status_3(vtoken: Terminal, tmp_path: Path) -> None:
    assert vtoken("issue", USER, "--url", f"sqlite:///{tmp_path}/no/such/folder/x.db") == 3
    assert vtoken.err.startswith("vtoken: ")
    (tmp_path / "text.db").write_text("This is no database." * 100)
    assert vtoken("stats", "--url", "sqlite:///text.db", "--json") == 3
    assert vtoken.out == ""
    assert vtoken.error()["error"] == "CorruptStore"
    assert (tmp_path / "text.db").read_text().startswith("This is no database.")


def test_too_many_attempts_and_a_cooldown_are_status_1(vtoken: Terminal, tmp_path: Path) -> None:
    (tmp_path / "vtoken.toml").write_text(
        f'secret = "{SECRET}"\n[policies.login]\npreset = "code"\nmax_attempts = 2\ncooldown = "1h"\n'
    )
    code = vtoken.json("issue", USER, "--slug", "login")["key"]
    assert re.fullmatch("[0-9]{6}", code)
    wrong = f"{(int(code) + 1) % 10**6:06}"

    assert vtoken("issue", USER, "--slug", "login", "--json") == 1
    error = vtoken.error()
    assert (error["error"], vtoken.out) == ("CooldownActive", "")
    assert 0 < error["retry_after"] <= 3600
    assert error["limit"] == "1 per 1h by object"
    assert vtoken("issue", USER, "--slug", "login") == 1
    assert re.search(r"Try again in \d+ seconds", vtoken.err)

    for left in (1, 0):
        refused = vtoken.json("check", USER, wrong, "--slug", "login", status=1)
        assert (refused["reason"], refused["attempts_left"]) == ("unknown", left)
        assert vtoken.error()["attempts_left"] == left
    capped = vtoken.json("check", USER, code, "--slug", "login", status=1)
    assert capped["valid"] is False
    assert 0 < capped["retry_after"] <= 900
    assert vtoken.error()["error"] == "TooManyAttempts"
    assert vtoken("consume", USER, code, "--slug", "login") == 1
    assert re.search(r"Too many attempts: .* Try again in \d+ seconds", vtoken.err)


def explode() -> str:
    """A key generator with a mistake."""
    raise RuntimeError("hunter2")


def test_an_unexpected_error_is_status_4(vtoken: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTOKEN_DEFAULT_KEY_GENERATOR", f"{__name__}:explode")
    assert vtoken("issue", USER) == 4
    assert re.fullmatch(r"vtoken: unexpected RuntimeError in test_cli\.py, line \d+\n", vtoken.err)


def test_control_characters_do_not_reach_the_terminal(vtoken: Terminal) -> None:
    assert vtoken("issue", "user:\x1b[31mred\u202e", "--slug", "a\nb") == 0
    assert r"user:\x1b[31mred\u202e" in vtoken.out
    assert r"a\nb" in vtoken.out
    assert vtoken("stats") == 0
    assert r"a\nb" in vtoken.out
    assert vtoken("list") == 0
    assert r"a\nb" in vtoken.out
    assert vtoken("deactivate", "user:\x1b[31mred\u202e") == 0
    assert vtoken("purge", "--dry-run") == 0
    assert r"a\nb" in vtoken.out


def test_help_and_version(vtoken: Terminal) -> None:
    assert vtoken("--version") == 0
    assert vtoken.out.strip() == __version__
    assert vtoken() == 0
    assert "Exit status: 0 valid" in vtoken.out
    for name in (
        "demo",
        "issue",
        "issue-many",
        "status",
        "history",
        "erase",
        "reset-limits",
        "secret",
        "list",
    ):
        assert name in vtoken.out
        assert vtoken(name, "--help") == 0
        assert "--json" in vtoken.out
        vtoken()


# Configuration -----------------------------------------------------------------------------------


def test_config_shows_what_is_in_effect(
    vtoken: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert vtoken.json("config")["url"] == DEFAULT_URL
    (tmp_path / "pyproject.toml").write_text(
        f'[tool.vtoken]\nurl = "memory://file"\nsecret = "{SECRET}"\n'
        '[tool.vtoken.policies.login]\npreset = "code"\n'
    )
    assert vtoken.json("config")["url"] == "memory://file", "the working directory's file is read by itself"
    monkeypatch.setenv("VTOKEN_URL", "mongodb://me:hunter2@host/db")
    told = vtoken.json("config")
    assert told["url"] == "mongodb://me:***@host/db"
    assert told["settings"]["secret"] == "***"
    assert told["policies"]["login"]["max_attempts"] == 5
    assert told["policies"]["login"]["expiration"] == "10m"
    assert vtoken.json("config", "--url", "memory://option")["url"] == "memory://option"
    assert vtoken("config") == 0
    assert re.search(r"^policies\.login\.max_attempts +5$", vtoken.out, re.MULTILINE)
    assert re.search(r"^settings\.secret +\*\*\*$", vtoken.out, re.MULTILINE)
    assert SECRET not in vtoken.out
    assert "hunter2" not in vtoken.out
    assert list(tmp_path.iterdir()) == [tmp_path / "pyproject.toml"], "nothing was opened"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("VTOKEN_SECERT", "hunter2", "did you mean VTOKEN_SECRET?"),
        ("VTOKEN_SECRET", "hunter2", "32 bytes"),
        ("VTOKEN_URL", "mongdb://me:hunter2@host", "did you mean mongodb?"),
        ("VTOKEN_KEY_STORAGE", "derived", "Settings(secret=...)"),
        ("VTOKEN_HOOKS", "no.such:hook", "no module"),
    ],
)
def test_config_tells_what_cannot_work(
    vtoken: Terminal, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    assert vtoken("config") == 2
    assert message in vtoken.err
    assert "hunter2" not in vtoken.out + vtoken.err


def test_the_demo_needs_no_configuration(vtoken: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTOKEN_SECERT", "x")
    assert vtoken("demo") == 0
