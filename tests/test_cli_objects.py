"""The commands about one object, and on what commands work: a folder's file, an application's manager."""

from __future__ import annotations

import json
import os
import pty
import re
import sqlite3
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from vtoken.cli.output import relative

from .cli_tools import SECRET, USER, Terminal, process

pytestmark = pytest.mark.usefixtures("no_configuration")

POLICIES = f"""
secret = "{SECRET}"
[policies.login]
preset = "code"
max_attempts = 3
cooldown = "1m"
attempt_limits = [{{count = 100, per = "1h", by = "ip"}}]
[policies.mail]
preset = "pair"
cooldown = "1s"
context = "required"
code_context = "ignored"
[policies.invite]
expiration = "7d"
max_uses = "unlimited"
"""


@pytest.fixture
def configured(tmp_path: Path) -> None:
    """A configuration file in the working directory."""
    (tmp_path / "vtoken.toml").write_text(POLICIES)


# status, history, erase, reset-limits --------------------------------------------------------------


@pytest.mark.usefixtures("configured")
def test_status_tells_how_an_object_stands(vtoken: Terminal) -> None:
    vtoken("init")
    at_first = vtoken.json("status", USER, "--slug", "login")
    assert at_first.keys() == {
        "has_valid",
        "expires_at",
        "attempts_left",
        "attempts_reset_at",
        "can_issue_at",
        "code_expires_at",
        "note",
    }
    assert (at_first["has_valid"], at_first["expires_at"], at_first["attempts_reset_at"]) == (
        False,
        None,
        None,
    )
    assert (at_first["attempts_left"], at_first["note"]) == (3, None)
    code = vtoken.json("issue", USER, "--slug", "login")["key"]
    wrong = f"{(int(code) + 1) % 10**6:06}"
    address = ("--by", "ip=192.0.2.7")
    assert vtoken("check", USER, wrong, "--slug", "login", *address) == 1
    assert "(unknown, 2 attempts left)" in vtoken.err
    told = vtoken.json("status", USER, "--slug", "login", *address)
    assert (told["has_valid"], told["attempts_left"]) == (True, 2)
    assert told["attempts_reset_at"] is not None
    assert datetime.fromisoformat(told["can_issue_at"]) > datetime.now(UTC)
    assert vtoken("status", USER, "--slug", "login") == 0
    assert re.search(r"^attempts left +2$", vtoken.out, re.MULTILINE)
    assert re.search(r"^new token +\d{4}-.* UTC \(in ", vtoken.out, re.MULTILINE)


@pytest.mark.usefixtures("configured")
def test_status_does_not_say_that_there_is_no_limit_where_none_is_known(vtoken: Terminal) -> None:
    """The policies of an application that keeps them in its code are not known here."""
    vtoken("init")
    assert vtoken("status", USER, "--slug", "of-the-code") == 0
    assert re.search(r"^attempts left +not known: see the note$", vtoken.out, re.MULTILINE)
    assert re.search(r"^note +no policy is configured here", vtoken.out, re.MULTILINE)


@pytest.mark.usefixtures("configured")
def test_support_unlocks_an_account(vtoken: Terminal) -> None:
    code = vtoken.json("issue", USER, "--slug", "login")["key"]
    address = ("--by", "ip=192.0.2.7")
    for _ in range(3):
        vtoken("check", USER, f"{(int(code) + 1) % 10**6:06}", "--slug", "login", *address)
    assert vtoken.json("check", USER, code, "--slug", "login", *address, status=1)["retry_after"] > 0
    assert vtoken.error()["limit"] == "3 per 15m by object"
    assert vtoken.json("reset-limits", USER, "--slug", "login")["reset"] == 2
    assert vtoken("check", USER, code, "--slug", "login", *address) == 0
    assert vtoken.json("reset-limits", USER) == {"reset": 0}
    assert vtoken("issue", USER, "--slug", "login") == 0, "the cooldown was forgotten, too"
    assert vtoken("check", USER, code, "--slug", "login") == 2
    assert "counts by 'ip': pass --by ip=..." in vtoken.err


def test_history_is_every_token_of_an_object(vtoken: Terminal) -> None:
    first = vtoken.json("issue", USER, "--slug", "reset")
    vtoken.json("consume", USER, first["key"], "--slug", "reset")
    second = vtoken.json("issue", USER, "--slug", "reset")
    third = vtoken.json("issue", USER, "--slug", "login")
    vtoken.json("issue", "auth.user:43", "--slug", "login")
    told = vtoken.json("history", USER)["tokens"]
    assert [(token["id"], token["state"]) for token in told] == [
        (third["id"], "valid"),
        (second["id"], "valid"),
        (first["id"], "used"),
    ]
    assert [token["id"] for token in vtoken.json("history", USER, "--slug", "login")["tokens"]] == [
        third["id"]
    ]
    assert vtoken("history", USER) == 0
    assert [line.split()[3] for line in vtoken.out.splitlines()] == ["state", "valid", "valid", "used"]
    assert vtoken("history", "auth.user:44") == 0
    assert vtoken.out == "no tokens\n"
    assert vtoken("history", "auth.user") == 2


def test_erase_wants_consent_and_leaves_nothing(vtoken: Terminal) -> None:
    vtoken.json("issue", USER, "--slug", "a")
    vtoken.json("issue", USER, "--slug", "b")
    vtoken.json("issue", "auth.user:43")
    assert vtoken("erase", USER) == 2
    assert "Delete every token of auth.user:42 in sqlite:///tokens.db? There is no terminal" in vtoken.err
    assert vtoken.json("erase", USER, "--yes") == {"erased": 2}
    assert vtoken.json("history", USER) == {"tokens": []}
    assert vtoken.json("stats")["total"] == 1
    assert vtoken("erase", "auth.user", "--yes") == 2


def test_deactivate_one_token_by_its_id(vtoken: Terminal) -> None:
    one = vtoken.json("issue", USER, "--slug", "a")
    vtoken.json("issue", USER, "--slug", "b")
    assert vtoken.json("deactivate", "--id", one["id"]) == {"deactivated": 1, "found": True}
    assert vtoken.json("deactivate", "--id", one["id"]) == {"deactivated": 0, "found": True}
    assert vtoken.json("deactivate", "--id", "0" * 16, status=1) == {"deactivated": 0, "found": False}
    assert vtoken.json("stats")["active"] == 1
    for wrong in ((), (USER, "--id", one["id"]), ("--id", one["id"], "--slug", "a"), ("--id", "")):
        assert vtoken("deactivate", *wrong) == 2, wrong


def test_a_secret_is_drawn(vtoken: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = vtoken.json("secret")["secret"], vtoken.json("secret")["secret"]
    assert first != second
    assert vtoken("secret") == 0
    monkeypatch.setenv("VTOKEN_SECRET", vtoken.out.strip())
    assert vtoken("config") == 0


def test_ping_tells_how_long_the_store_took(vtoken: Terminal) -> None:
    assert vtoken("ping") == 3
    vtoken("init")
    assert 0 < vtoken.json("ping")["seconds"] < 60
    assert vtoken("ping") == 0
    assert re.fullmatch(r"answered in  [0-9.]+ ms\n", vtoken.out)


# Policies ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("configured")
def test_a_pair_is_printed_with_both_keys(vtoken: Terminal) -> None:
    token = vtoken.json("issue", USER, "--slug", "mail", "--context", "cookie")
    assert re.fullmatch("[0-9]{6}", token["code"])
    assert len(token["key"]) == 32
    assert token["code_expires_at"] < token["expires_at"]
    assert vtoken("check", USER, token["key"], "--slug", "mail", "--context", "other") == 1
    assert vtoken("check", USER, token["key"], "--slug", "mail", "--context", "cookie") == 0
    assert vtoken("consume", USER, token["code"], "--slug", "mail") == 0
    assert vtoken("check", USER, token["key"], "--slug", "mail", "--context", "cookie") == 1


@pytest.mark.usefixtures("configured")
def test_a_token_without_a_bound_on_its_uses(vtoken: Terminal) -> None:
    key = vtoken.json("issue", "team:1", "--slug", "invite")["key"]
    for uses in (1, 2):
        assert vtoken.json("consume", "team:1", key, "--slug", "invite")["uses"] == uses
    assert vtoken("check", "team:1", key, "--slug", "invite") == 0
    assert "2 of any number" in vtoken.out
    again = ("consume", "team:1", key, "--slug", "invite", "--consume-id", "click")
    assert vtoken.json(*again)["is_replay"] is False
    assert vtoken.json(*again)["is_replay"] is True


def test_a_slug_without_a_policy_is_said(vtoken: Terminal) -> None:
    token = vtoken.json("issue", USER, "--slug", "login")
    assert "no policy is configured here for the slug 'login'" in token["note"]
    assert vtoken("issue", USER, "--slug", "login") == 0
    assert "no policy is configured here" in vtoken.out
    assert vtoken("check", USER, "123456", "--slug", "login") == 1
    assert "no policy is configured here" in vtoken.err
    assert vtoken("check", USER, token["key"]) == 1
    assert "the object has active tokens of the slugs login: see --slug" in vtoken.err


@pytest.mark.parametrize("given", ["ip", "=x", "ip=\0"])
@pytest.mark.usefixtures("configured")
def test_a_dimension_has_a_name_and_a_value(vtoken: Terminal, given: str) -> None:
    vtoken("init")
    assert vtoken("status", USER, "--slug", "login", "--by", given) == 2


# Which store, which settings -----------------------------------------------------------------------

APPLICATION = """
from vtoken import TokenManager, TokenPolicy
from vtoken.sync import SyncTokenManager
heard = []
manager = TokenManager.from_url(
    "sqlite:///app.db", policies=[TokenPolicy("reset", expiration=5)], hooks=[heard.append]
)
blocking = SyncTokenManager(manager)
no_manager = 5


def opened():
    blocking.open()
    return blocking


def made():
    return TokenManager.from_url("sqlite:///app.db")


def no_store():
    raise RuntimeError("no connection to redis://cache:hunter2@host")
"""
FAILING = """
import os

secret = os.environ["SHOP_SECRET"]
"""


@pytest.mark.usefixtures("configured")
def test_the_applications_own_manager(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(APPLICATION)
    script = Path(sys.executable).with_name("vtoken")
    options = ["--manager", "shop:manager"]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [script, *arguments], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
        )

    for command in (("stats",), ("doctor",), ("erase", USER, "--yes")):
        refused = run(*command, *options)
        assert refused.returncode == 3
        assert f"{tmp_path}/app.db" in refused.stdout + refused.stderr
    assert not (tmp_path / "app.db").exists()
    issued = run("issue", USER, "--slug", "reset", *options)
    assert (issued.returncode, issued.stderr) == (0, "")
    assert re.search(r"\(in (5 min|299 s|4 min)\)", issued.stdout)
    assert "note" not in issued.stdout
    assert (tmp_path / "app.db").exists()
    assert not (tmp_path / "tokens.db").exists()
    listed = run("list", *options)
    assert "reset" in listed.stdout
    assert listed.stderr == ""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of an application, importable in this process."""
    for name, source in (("shop", APPLICATION), ("failing", FAILING)):
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("configured", "shop")
def test_commands_on_the_applications_own_manager(vtoken: Terminal) -> None:
    options = ["--manager", "shop:manager"]
    assert vtoken("init", *options) == 0
    assert vtoken.out == "ready  sqlite:///app.db (shop:manager)\n"
    assert vtoken.json("init", *options)["url"] == "sqlite:///app.db"
    assert vtoken("doctor", *options) == 0
    assert "ok      configuration   sqlite:///app.db (shop:manager)\n" in vtoken.out
    assert vtoken("init", "--sql", *options) == 0
    assert "CREATE TABLE" in vtoken.out
    assert vtoken("issue", USER, "--slug", "reset", *options) == 0
    for name in ("blocking", "opened", "made"):
        assert vtoken("list", "--manager", f"shop:{name}") == 0
        assert "reset" in vtoken.out
        assert vtoken.err == ""
    for arguments, message in (
        (["stats", "--manager", "shop:no_manager"], "returns one, not int"),
        (["stats", "--manager", "shop:heard.clear"], "returns one, not NoneType"),
        (["stats", "--manager", "shop:no_store"], "no connection to redis://cache:***@host (shop.py, li"),
        (["import", "x", "--manager", "failing:x"], "KeyError: 'SHOP_SECRET' (failing.py, line 4)"),
        (["stats", "--manager", "shop:missing"], "has no 'missing'"),
        (["stats", "--manager", "no_such_module:x"], "no module 'no_such_module'"),
        (["stats", *options, "--url", "memory://"], "leave out --url"),
    ):
        assert vtoken(*arguments) == 2
        assert message in vtoken.err
    assert vtoken("doctor", *options) == 0
    assert vtoken("purge", "--every", "1h", "--dry-run", *options) == 2


def test_codes_without_a_limit_are_said_by_doctor_alone(tmp_path: Path) -> None:
    (tmp_path / "vtoken.toml").write_text(f'secret = "{SECRET}"\n[policies.login]\npreset = "code"\n')
    for command in ("init", "stats"):
        done = process(command)
        assert (done.returncode, done.stderr) == (0, "")
    examined = process("doctor")
    assert examined.stderr == ""
    lines = [" ".join(line.split()) for line in examined.stdout.splitlines()]
    assert "warning limits codes without cooldown or issue_limits: login" in lines
    assert f"ok configuration sqlite:///tokens.db, {tmp_path}/vtoken.toml" in lines


def test_an_import_with_the_applications_own_policies(vtoken: Terminal, tmp_path: Path) -> None:
    (tmp_path / "shop_with_codes.py").write_text(
        "from vtoken import Settings, TokenManager, TokenPolicy\n"
        f"manager = TokenManager.from_url('sqlite:///app.db', settings=Settings(secret={SECRET!r}),"
        " policies=[TokenPolicy.code('login', cooldown='1s', expiration=5)])\n"
    )
    moment = datetime.now(UTC)
    fields = {
        "created": moment.isoformat(),
        "expires_at": (moment + timedelta(minutes=5)).isoformat(),
        "content_type": ["auth", "user"],
        "object_id": 42,
        "key": "123456",
        "slug": "login",
    }
    (tmp_path / "dump.json").write_text(json.dumps([{"model": "a.token", "fields": fields}]))
    done = process("import", "dump.json", "--manager", "shop_with_codes:manager", "--json")
    assert json.loads(done.stdout)["imported"] == 1, done.stderr
    assert "useless" not in json.loads(done.stdout)
    fields["key"] = "a link's key, not a code" * 2
    (tmp_path / "links.json").write_text(json.dumps([{"model": "a.token", "fields": fields}]))
    dry = ("import", "links.json", "--manager", "shop_with_codes:manager", "--dry-run")
    [useless] = json.loads(process(*dry, "--json").stdout)["useless"]
    assert (useless["slug"], useless["tokens"]) == ("login", 1)
    said = process(*dry).stdout
    assert "1 with the slug login: the policy is one of codes" in said
    assert "digested with the secret" in said
    (tmp_path / "other_shop.py").write_text(
        (tmp_path / "shop_with_codes.py").read_text().replace(SECRET, SECRET[::-1])
    )
    done = process("import", "dump.json", "--manager", "other_shop:manager")
    assert done.returncode == 2
    assert "another secret" in done.stderr
    done = process("check", USER, "123 456", "--slug", "login", "--manager", "shop_with_codes:manager")
    assert done.returncode == 0, done.stderr


READING = [
    ("stats",),
    ("list",),
    ("show", "0" * 16),
    ("check", USER, "key"),
    ("consume", USER, "key"),
    ("deactivate", USER),
    ("deactivate", "--id", "0" * 16),
    ("purge",),
    ("purge", "--dry-run"),
    ("purge", "--every", "1h"),
    ("status", USER),
    ("history", USER),
    ("erase", USER, "--yes"),
    ("reset-limits", USER),
    ("ping",),
    ("doctor",),
    ("copy", "sqlite:///tokens.db", "memory://"),
]


@pytest.mark.parametrize("arguments", READING, ids=" ".join)
def test_what_only_reads_or_ends_never_makes_a_store(
    vtoken: Terminal, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    assert vtoken(*arguments) == 3
    assert f"{tmp_path}/tokens.db" in vtoken.out + vtoken.err
    assert "vtoken init makes" in vtoken.out + vtoken.err
    (tmp_path / "tokens.db").touch()
    assert vtoken(*arguments) == 3
    assert [(file.name, file.stat().st_size) for file in tmp_path.iterdir()] == [("tokens.db", 0)]


def test_a_file_of_an_application_that_has_no_tables_of_ours_is_no_store(
    vtoken: Terminal, tmp_path: Path
) -> None:
    with closing(sqlite3.connect(tmp_path / "app.db")) as database:
        database.execute("CREATE TABLE users (id INTEGER)")
    shared = ("--url", "sqlite:///app.db?shared=true")
    assert vtoken("stats", *shared) == 3
    assert f"{tmp_path}/app.db has no tables of vtoken" in vtoken.err
    assert vtoken("stats", "--url", "sqlite:///app.db") == 3
    assert vtoken("init", *shared) == 0
    assert vtoken("stats", *shared) == 0


def test_a_database_without_our_collections_is_no_store(vtoken: Terminal, mongodb_new_url: str) -> None:
    assert vtoken("stats", "--url", mongodb_new_url) == 3
    assert "has no collection" in vtoken.err
    assert vtoken("init", "--url", mongodb_new_url) == 0
    assert vtoken("stats", "--url", mongodb_new_url) == 0


# At a terminal -------------------------------------------------------------------------------------


def shown(columns: int, *arguments: str) -> list[str]:
    """What a terminal of this width shows of a command."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, columns))
    with subprocess.Popen(
        [sys.executable, "-m", "vtoken", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "NO_COLOR": "1"},
    ) as child:
        os.close(theirs)
        text = "".join(_read(ours))
        assert child.wait(60) == 0, text
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "").splitlines()


def _read(terminal: int) -> Iterator[str]:
    with os.fdopen(terminal, "rb") as file:
        try:
            while part := file.read1(65_536):
                yield part.decode()
        except OSError:  # Linux says so where the other end was closed
            return


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals there")
@pytest.mark.parametrize("columns", [80, 100, 120])
def test_a_table_fits_and_cuts_nothing(vtoken: Terminal, columns: int) -> None:
    subject = "accounts.customer:0190c5f6-7d1a-7c3e-9b5f-2f1e8a4d6c11"
    slug = "confirm-the-change-of-an-address"
    ids = [vtoken.json("issue", subject, "--slug", name)["id"] for name in (slug, "reset")]
    for command in (("list",), ("history", subject)):
        lines = shown(columns, *command)
        assert max(map(len, lines)) <= columns
        assert [line[:16] for line in lines if re.match("[0-9a-f]{16} ", line)] == ids[::-1]
        assert "…" not in "".join(lines)
        squeezed = re.sub(r"\s+", "", "".join(line[16:] for line in lines))
        assert "in24h" in squeezed or "in23h" in squeezed
        folded = "".join(line[18:].split("  ")[0].strip() for line in lines[1:])
        assert subject in folded


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals there")
def test_a_key_is_shown_in_one_piece(vtoken: Terminal) -> None:
    lines = shown(30, "issue", USER, "--slug", "reset")
    assert any(re.search("key +[A-Za-z0-9]{32}$", line) for line in lines)


@pytest.mark.parametrize(
    ("offset", "text"),
    [
        (timedelta(minutes=59, seconds=30), "in 59 min"),
        (timedelta(seconds=-1), "1 s ago"),
        (timedelta(0), "in 0 s"),
        (timedelta(seconds=90), "in 1 min"),
        (timedelta(hours=25), "in 25 h"),
        (timedelta(days=-3), "3 days ago"),
        (timedelta(days=400), "in 400 days"),
    ],
)
def test_how_far_away_a_moment_is(offset: timedelta, text: str) -> None:
    now = datetime.now(UTC)
    assert relative(now + offset, now) == text


def test_the_module_is_run_with_its_folder_importable(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(APPLICATION)
    done = process("init", "--manager", "shop:manager")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("as_variable", [True, False])
def test_a_setting_names_the_applications_own_manager(
    vtoken: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_variable: bool
) -> None:
    module = f"shop_of_a_setting_{as_variable}"
    (tmp_path / f"{module}.py").write_text(
        "from vtoken import TokenManager, TokenPolicy\n"
        "policies = [TokenPolicy.link('reset', cooldown='1h')]\n"
        "manager = TokenManager.from_env('sqlite:///app.db', policies=policies)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = f"{module}:manager"
    if as_variable:
        monkeypatch.setenv("VTOKEN_MANAGER", path)
    else:
        (tmp_path / "vtoken.toml").write_text(f'manager = "{path}"\n')
    assert vtoken("init") == 0
    assert vtoken.out == f"ready  sqlite:///app.db ({path})\n"
    assert vtoken.json("issue", USER, "--slug", "reset")["note"] is None
    assert vtoken("issue", USER, "--slug", "reset") == 1
    assert "The limit is 1 per 1h" in vtoken.err
    assert vtoken.json("config")["manager"] == path
    # A URL that is given is a store of its own.
    assert vtoken("init", "--url", "sqlite:///other.db") == 0
    assert vtoken.out == "ready  sqlite:///other.db\n"
    told = vtoken.json("config", "--manager", path)
    assert (told["url"], told["manager"]) == ("sqlite:///app.db", path)
    assert told["policies"]["reset"]["cooldown"] == "1h"


def test_a_link_is_found_by_its_key_alone(vtoken: Terminal) -> None:
    key = vtoken.json("issue", "team:chess", "--slug", "group")["key"]
    assert vtoken.json("check", "team", key, "--slug", "group")["object_id"] == "chess"
    assert vtoken("check", "teams", key, "--slug", "group") == 1
    assert vtoken("check", "team", key) == 1
    assert vtoken.json("consume", "team", key, "--slug", "group")["object_id"] == "chess"
    assert vtoken("issue", "team", "--slug", "group") == 2


@pytest.mark.usefixtures("configured")
def test_tables_tell_of_uses(vtoken: Terminal) -> None:
    vtoken.json("issue", USER, "--slug", "reset")
    vtoken("list")
    assert "used" not in vtoken.out
    key = vtoken.json("issue", "team:chess", "--slug", "invite")["key"]
    vtoken("history", "team:chess")
    assert re.search(r"in \S+ \S+ +0 of any number$", vtoken.out, re.MULTILINE)
    vtoken.json("consume", "team:chess", key, "--slug", "invite")
    for command in (("list",), ("history", "team:chess")):
        vtoken(*command)
        assert re.search(r"1 of any number, (in 0|\d) s", vtoken.out)


@pytest.mark.usefixtures("configured")
def test_a_policy_with_a_context_is_told_by_status(vtoken: Terminal) -> None:
    vtoken.json("issue", USER, "--slug", "mail", "--context", "browser")
    assert "binds tokens to a context" in vtoken.json("status", USER, "--slug", "mail")["note"]
    assert vtoken.json("status", USER, "--slug", "mail", "--context", "browser")["note"] is None


# Ids --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("configured")
@pytest.mark.parametrize("text", ["zzz", USER, "f" * 16, "0x1", "ABCDEF0123456789"])
def test_what_is_no_id_is_nobodys(vtoken: Terminal, text: str) -> None:
    vtoken("init")
    assert vtoken.json("show", text, status=1) == {"found": False}
    assert vtoken.json("deactivate", "--id", text, status=1) == {"deactivated": 0, "found": False}
    vtoken("show", text)
    assert "no token has this id" in vtoken.out
