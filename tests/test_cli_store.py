"""The commands that tend a whole store: init, doctor, list, show, purge, copy, import, deactivating many."""

from __future__ import annotations

import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from vtoken.cli import migrating

from . import postgresql_servers
from .cli_tools import USER, Terminal
from .servers import free_port, fresh_database

pytestmark = pytest.mark.usefixtures("no_configuration")


@contextmanager
def changed(file: str) -> Generator[sqlite3.Connection]:
    """The file in the hands of another program."""
    with closing(sqlite3.connect(file, isolation_level=None)) as database:
        yield database


def findings(vtoken: Terminal, *arguments: str, status: int = 0) -> dict[str, str]:
    """What the doctor says: the state by name."""
    told = vtoken.json("doctor", *arguments, status=status)
    assert told["healthy"] is (status == 0)
    return {found["name"]: found["state"] for found in told["findings"]}


# init and doctor -----------------------------------------------------------------------------------


def test_init_makes_the_store_once(vtoken: Terminal, tmp_path: Path) -> None:
    assert vtoken.json("init") == {"ready": True, "url": "sqlite:///tokens.db"}
    vtoken.json("issue", USER)
    assert vtoken("init") == 0
    assert vtoken.out.split() == ["ready", "sqlite:///tokens.db"]
    assert vtoken.json("stats")["total"] == 1
    assert vtoken("init", "--url", f"sqlite:///{tmp_path}/no/folder.db") == 3


def test_doctor_on_a_healthy_store(vtoken: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 51, 3))
    vtoken.json("issue", USER)
    before = Path("tokens.db").read_bytes()
    found = findings(vtoken, "--deep")
    assert set(found.values()) == {"ok"}
    assert list(found) == [
        "configuration",
        "file",
        "SQLite",
        "reachable",
        "schema",
        "integrity",
        "answers",
        "tokens",
        "writable",
        "made in time",
        "secrets",
        "every token",
    ]
    assert vtoken("doctor") == 0
    assert vtoken.out.count("\n") == len(found) - 1
    assert "1 stored, 1 of them active" in vtoken.out
    with changed("tokens.db") as database:
        assert database.execute("SELECT count(*) FROM vtoken_budgets").fetchone() == (0,), (
            "it leaves nothing behind"
        )
    assert len(Path("tokens.db").read_bytes()) == len(before)


def test_doctor_counts_tokens_by_their_secret(
    vtoken: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old, new, random = (f"a-secret-of-the-doctor-{n}-0123456789" for n in range(3))
    (tmp_path / "vtoken.toml").write_text("")

    def told(secret: str, *previous: str) -> tuple[str, str]:
        monkeypatch.setenv("VTOKEN_SECRET", secret)
        monkeypatch.delenv("VTOKEN_PREVIOUS_SECRETS", raising=False)
        if previous:
            monkeypatch.setenv("VTOKEN_PREVIOUS_SECRETS", ",".join(previous))
        found = {one["name"]: one for one in vtoken.json("doctor", "--deep")["findings"]}
        return found["secrets"]["state"], found["every token"]["detail"]

    vtoken("init")
    monkeypatch.setenv("VTOKEN_SECRET", old)
    tokens = [vtoken.json("issue", USER, "--slug", slug) for slug in ("a", "b", "c")]
    assert vtoken("deactivate", "--id", tokens[2]["id"]) == 0
    assert told(old) == ("ok", "3 read")
    assert told(new, old) == ("ok", "3 read; 2 valid ones still need a previous secret")
    state, detail = told(random)
    assert (state, detail) == (
        "warning",
        "3 read; 2 valid ones were made with a secret that is not configured",
    )
    monkeypatch.setenv("VTOKEN_SECRET", new)
    for slug in ("a", "b"):
        vtoken.json("issue", USER, "--slug", slug)
    assert told(new, old) == ("ok", "5 read; none needs a previous secret any more")
    assert told(new) == ("ok", "5 read")
    vtoken("doctor", "--deep")
    assert not any(secret in vtoken.out for secret in (old, new, random))


def test_doctor_names_an_sqlite_with_the_wal_reset_bug(
    vtoken: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 51, 2))
    vtoken.json("init")
    assert findings(vtoken)["SQLite"] == "warning", "a warning, and still no failure"
    assert vtoken("doctor") == 0
    assert "3.51.2 may have the WAL-reset bug" in vtoken.out.replace("\n", " ")


def test_doctor_does_not_make_what_is_missing(vtoken: Terminal, tmp_path: Path) -> None:
    assert findings(vtoken, status=3) == {"configuration": "ok", "file": "failed"}
    assert list(tmp_path.iterdir()) == []
    assert vtoken("doctor") == 3
    assert "vtoken init makes it" in vtoken.out


def test_doctor_checks_a_file_whole_whatever_the_url_says(vtoken: Terminal) -> None:
    url = "sqlite:///tokens.db?check=never"
    for number in range(40):
        vtoken.json("issue", f"user:{number}", "--extra", json.dumps("x" * 400))
    with changed("tokens.db") as database:
        [(page,)] = database.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'vtoken_tokens_line'")
        [(size,)] = database.execute("PRAGMA page_size")
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with Path("tokens.db").open("r+b") as file:  # an index that names other rows than the table
        file.seek((page - 1) * size + 4 * size // 5)
        file.write(bytes(size // 5))
    assert vtoken.json("stats", "--url", url)["total"] == 40, "nobody has noticed"
    found = findings(vtoken, "--url", url, status=3)
    assert found["integrity"] == "failed"
    assert "reachable" not in found


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        ("DROP INDEX vtoken_tokens_line", "integrity"),
        ("UPDATE vtoken_schema SET version = 99", "schema"),
    ],
)
def test_doctor_on_a_schema_that_is_not_ours_to_use(vtoken: Terminal, damage: str, name: str) -> None:
    vtoken.json("init")
    with changed("tokens.db") as database:
        database.execute(damage)
    assert findings(vtoken, status=3)[name] == "failed"
    assert vtoken("doctor") == 3
    assert "failed" in vtoken.out


def test_doctor_on_a_file_that_is_no_database(vtoken: Terminal) -> None:
    Path("tokens.db").write_text("This is no database." * 500)
    assert findings(vtoken, status=3)["integrity"] == "failed"
    assert Path("tokens.db").read_text().startswith("This is no database.")


def test_doctor_reads_every_token_when_asked(vtoken: Terminal) -> None:
    vtoken.json("issue", USER)
    with changed("tokens.db") as database:
        database.execute("UPDATE vtoken_tokens SET keys = 'nonsense'")
    assert findings(vtoken, "--deep", status=3)["every token"] == "failed"


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
def test_doctor_warns_of_an_open_file_and_of_the_future(vtoken: Terminal) -> None:
    vtoken.json("issue", USER)
    with changed("tokens.db") as database:
        database.execute("UPDATE vtoken_tokens SET created_at = created_at + 60000")
    Path("tokens.db").chmod(0o644)
    found = findings(vtoken)
    assert (found["file"], found["made in time"]) == ("warning", "warning")


def test_doctor_compares_the_clock_of_a_server(vtoken: Terminal, mongodb_replica_set: str) -> None:
    with fresh_database(mongodb_replica_set) as url:
        store = ("--url", f"{url}&collection=mine")
        assert findings(vtoken, *store, status=3) == {"configuration": "ok", "reachable": "failed"}
        assert vtoken("init", *store) == 0
        found = findings(vtoken, *store)
    assert found["server's clock"] == "ok"
    assert "file" not in found


def test_doctor_compares_the_clock_of_a_postgresql_server(vtoken: Terminal) -> None:
    with postgresql_servers.fresh_store(postgresql_servers.shared_url()) as url:
        store = ("--url", url)
        assert vtoken("stats", *store) == 3
        assert "has no table" in vtoken.err
        assert findings(vtoken, *store, status=3)["reachable"] == "failed"
        assert vtoken("init", *store) == 0
        assert findings(vtoken, *store, "--deep")["server's clock"] == "ok"


def test_doctor_on_a_mongodb_server_that_is_not_there(vtoken: Terminal) -> None:
    url = f"mongodb://me:hunter2@127.0.0.1:{free_port()}/db?serverSelectionTimeoutMS=200"
    assert findings(vtoken, "--url", url, status=3) == {"configuration": "ok", "reachable": "failed"}
    assert "hunter2" not in vtoken.out + vtoken.err


# list and show -------------------------------------------------------------------------------------


def test_list_narrows_down(vtoken: Terminal) -> None:
    ids = [
        vtoken.json("issue", who, "--slug", slug)["id"]
        for who, slug in (("u:1", "a"), ("u:2", "b"), ("g:1", "a"))
    ]
    assert vtoken("deactivate", "u:1") == 0

    def listed(*arguments: str) -> list[str]:
        return [token["id"] for token in vtoken.json("list", *arguments)["tokens"]]

    assert listed() == ids[::-1]
    assert listed("u") == [ids[1], ids[0]]
    assert listed("u:1") == [ids[0]]
    assert listed("--slug", "a") == [ids[2], ids[0]]
    assert listed("u", "--slug", "a") == [ids[0]]
    assert listed("x") == []
    told = vtoken.json("list", "--limit", "1")
    assert (len(told["tokens"]), told["more"]) == (1, True)
    assert vtoken.json("list", "--limit", "3")["more"] is False
    assert vtoken("list") == 0
    lines = vtoken.out.splitlines()
    assert lines[0].split() == ["id", "subject", "slug", "state", "created", "expires"]
    assert [line.split()[1:4] for line in lines[1:]] == [
        ["g:1", "a", "valid"],
        ["u:2", "b", "valid"],
        ["u:1", "a", "inactive"],
    ]
    assert vtoken("list", "--limit", "2") == 0
    assert "There are more" in vtoken.out
    assert vtoken("list", "--limit", "0") == 2
    assert vtoken("list", ":1") == 2


def test_show_tells_all_but_the_key(vtoken: Terminal) -> None:
    token = vtoken.json("issue", USER, "--slug", "reset")
    shown = vtoken.json("show", token["id"])
    told = {name: value for name, value in token.items() if name not in ("key", "code", "note")}
    assert shown == {"found": True, "state": "valid"} | told
    vtoken.json("consume", USER, token["key"], "--slug", "reset")
    assert vtoken("show", token["id"]) == 0
    lines = dict(line.split(maxsplit=1) for line in vtoken.out.splitlines())
    assert (lines["state"], lines["subject"], lines["uses"]) == ("used", USER, "1 of 1")
    assert token["key"] not in vtoken.out
    assert vtoken.json("show", "0" * 32, status=1) == {"found": False}
    assert vtoken("show", "") == 2


# purge ---------------------------------------------------------------------------------------------


def ended(vtoken: Terminal, slugs: str) -> None:
    """One valid token, and one of each slug that is used."""
    for slug in slugs:
        key = vtoken.json("issue", USER, "--slug", slug)["key"]
        vtoken.json("consume", USER, key, "--slug", slug)
    vtoken.json("issue", USER)


def test_a_dry_run_deletes_nothing(vtoken: Terminal) -> None:
    ended(vtoken, "aab")
    assert vtoken.json("purge", "--dry-run") == {"would_purge": 3, "by_slug": {"a": 2, "b": 1}}
    assert vtoken("purge", "--dry-run") == 0
    assert vtoken.out.splitlines()[-1].split() == ["would", "be", "purged", "3"]
    assert vtoken.json("purge", "--dry-run", "--keep", "1h") == {"would_purge": 0, "by_slug": {}}
    assert vtoken.json("purge", "--keep", "1h") == {"purged": 0}
    assert vtoken.json("stats")["total"] == 4
    assert vtoken.json("purge", "--yes") == {"purged": 3}
    assert vtoken.json("purge", "--dry-run")["would_purge"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--every", "often"), "--every must be a timedelta or a text such as '90s'"),
        (("--every", "0s"), "--every: must be more than 0"),
        (("--every", "60"), "--every must be"),
        (("--keep", "-1"), "keep"),
        (("--every", "10m", "--dry-run"), "--dry-run counts once"),
    ],
)
def test_wrong_usage_of_purge(vtoken: Terminal, arguments: tuple[str, ...], message: str) -> None:
    assert vtoken("purge", *arguments) == 2
    assert message in vtoken.err


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM there")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("as_json", [False, True])
def test_purge_as_a_service_ends_at_a_signal(vtoken: Terminal, number: signal.Signals, as_json: bool) -> None:
    ended(vtoken, "ab")
    options = ["--every", "1h", "--keep", "0s", *(["--json"] if as_json else [])]
    with subprocess.Popen(
        [sys.executable, "-m", "vtoken", "purge", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as service:
        assert service.stdout is not None
        first, second = service.stdout.readline(), service.stdout.readline()
        assert service.poll() is None
        service.send_signal(number)
        out, err = service.communicate(timeout=60)
    assert service.returncode == 0, err
    if as_json:
        assert [json.loads(line) for line in (first, second, out)] == [
            {"every": 3600},
            {"purged": 2},
            {"purged": 2},
        ]
    else:
        assert (first, second) == ("purging every 1h, keeping 0s\n", "purged 2\n")
        assert out.split() == ["purged", "2"]
    assert vtoken.json("stats")["total"] == 1
    assert findings(vtoken).items() >= {"integrity": "ok", "writable": "ok"}.items()


# Questions -----------------------------------------------------------------------------------------


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], io.StringIO]:
    """Someone at a terminal who answers; what was asked."""

    def answer(text: str) -> io.StringIO:
        asked = _Terminal()
        monkeypatch.setattr(sys, "stdin", _Terminal(text))
        monkeypatch.setattr(sys, "stderr", asked)
        return asked

    return answer


@pytest.mark.parametrize(("answer", "status"), [("y\n", 0), (" YES \n", 0), ("n\n", 1), ("\n", 1), ("", 1)])
def test_purge_asks_at_a_terminal(
    vtoken: Terminal, answered: Callable[[str], io.StringIO], answer: str, status: int
) -> None:
    ended(vtoken, "a")
    asked = answered(answer)
    assert vtoken("purge") == status
    assert asked.getvalue().startswith("Delete what has ended in sqlite:///tokens.db? [y/N] ")
    assert ("nothing was done" in asked.getvalue()) is (status == 1)
    assert vtoken.json("stats")["total"] == 1 + status


def test_yes_skips_the_question(vtoken: Terminal, answered: Callable[[str], io.StringIO]) -> None:
    ended(vtoken, "a")
    asked = answered("n\n")
    assert vtoken("purge", "--yes") == 0
    assert "[y/N]" not in asked.getvalue()


def test_deactivating_many_wants_consent(vtoken: Terminal, answered: Callable[[str], io.StringIO]) -> None:
    for who in ("u:1", "u:2", "g:1"):
        vtoken.json("issue", who)
    assert vtoken("deactivate", "u") == 2
    assert "every u in sqlite:///tokens.db? There is no terminal to ask on; pass --yes." in vtoken.err
    assert vtoken("deactivate", "") == 2
    asked = answered("no\n")
    assert vtoken("deactivate", "u", "--slug", "a") == 1
    assert "Deactivate the a tokens of every u" in asked.getvalue()
    assert vtoken.json("stats")["active"] == 3
    answered("y\n")
    assert vtoken.json("deactivate", "u") == {"deactivated": 2}
    asked = answered("")
    assert vtoken.json("deactivate", "g:1") == {"deactivated": 1}
    assert asked.getvalue() == "", "one object's are no question"


def test_yes_deactivates_many_without_a_terminal(vtoken: Terminal) -> None:
    vtoken.json("issue", USER)
    assert vtoken.json("deactivate", "auth.user", "--yes") == {"deactivated": 1}


# copy and import -----------------------------------------------------------------------------------


def test_copy_compares_and_goes_on(vtoken: Terminal) -> None:
    arguments = ("copy", "sqlite:///tokens.db", "sqlite:///other.db")
    ended(vtoken, "abc")
    told = vtoken.json(*arguments)
    assert (told["inserted"], told["tokens"], told["complete"]) == (4, 4, True)
    assert told["source_digest"] == told["destination_digest"]
    assert vtoken(*arguments) == 0
    lines = dict(line.rsplit("  ", 1) for line in vtoken.out.splitlines())
    assert {name.strip(): value for name, value in lines.items()}["there already"] == "4"
    assert "budgets of attempts and cooldowns" in vtoken.out
    vtoken.json("deactivate", USER, "--url", "sqlite:///other.db")
    assert vtoken(*arguments) == 1
    assert "run it again" in vtoken.out
    assert vtoken("copy", "sqlite:///tokens.db", "sqlite:///no/folder.db") == 3
    assert vtoken("copy", "sqlite:///tokens.db", "nosuch://") == 2
    assert vtoken("copy", "sqlite:///tokens.db") == 2


def test_an_interrupted_copy_says_how_to_go_on(vtoken: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    async def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    ended(vtoken, "a")
    monkeypatch.setattr(migrating, "copy_tokens", interrupted)
    assert vtoken("copy", "sqlite:///tokens.db", "sqlite:///other.db") == 130
    assert vtoken.err == "vtoken: interrupted: the same command again goes on where it was\n"


def test_import_a_dump(vtoken: Terminal, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "created": "2024-05-01T12:00:00",
        "content_type": 7,
        "object_id": "42",
        "key": "hunter2" * 5,
        "expires_at": None,
        "slug": "reset",
        "is_active": True,
        "extra_data": None,
    }
    dump = [
        {"model": "tokens.token", "pk": n, "fields": fields | {"key": f"{'hunter2' * 5}{n}"}}
        for n in range(3)
    ]
    (tmp_path / "dump.json").write_text(json.dumps(dump))
    arguments = ("import", "dump.json", "--content-types", "7=auth.user", "--timezone", "UTC")
    assert vtoken.json(*arguments, "--dry-run") == {"readable": 3}
    assert not (tmp_path / "tokens.db").exists()
    assert vtoken.json(*arguments) == {"imported": 3, "skipped": 0, "taken_before": 0}
    assert vtoken.json(*arguments) == {"imported": 0, "skipped": 3, "taken_before": 0}
    assert vtoken("check", USER, "hunter2" * 5 + "1", "--slug", "reset") == 0
    assert b"hunter2" not in (tmp_path / "tokens.db").read_bytes()
    for wrong, message in (
        (("import", "dump.json", "--timezone", "UTC"), "--content-types 7=app.model"),
        (("import", "dump.json", "--content-types", "7=auth.user"), "no offset from UTC"),
        ((*arguments[:-1], "Europe/Nowhere"), "--timezone: must be the name"),
        ((*arguments[:-1], "../UTC"), "--timezone: must be the name"),
        (("import", "dump.json", "--content-types", "auth.user=7"), "--content-types: must be"),
        (("import", "."), "no pipe"),
        (("import", "missing.json"), "FILE cannot be read: No such file"),
    ):
        assert vtoken(*wrong) == 2
        assert message in vtoken.err
        assert "hunter2" not in vtoken.err


def test_a_dump_with_a_mistake_stores_nothing(vtoken: Terminal, tmp_path: Path) -> None:
    good = {
        "created": "2024-05-01T12:00:00Z",
        "content_type": ["auth", "user"],
        "object_id": 1,
        "key": "x" * 32,
    }
    dump = [{"model": "a.b", "fields": good}, {"model": "a.b", "fields": good | {"key": "hunter2" * 100}}]
    (tmp_path / "dump.json").write_text(json.dumps(dump))
    assert vtoken("import", "dump.json") == 2
    assert vtoken.err == "vtoken: record 2 (a.b): key must be at most 512 bytes long\n"
    assert not (tmp_path / "tokens.db").exists()
