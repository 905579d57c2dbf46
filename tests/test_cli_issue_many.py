"""``vtoken issue-many``: files in, keys out, and the same again after an interruption."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from .cli_tools import SECRET, Terminal, feed

pytestmark = pytest.mark.usefixtures("no_configuration")

DERIVED = ("--slug", "invite", "--batch", "spring-26")


@pytest.fixture(autouse=True)
def _configured(no_configuration: None, tmp_path: Path) -> None:
    (tmp_path / "vtoken.toml").write_text(
        f'secret = "{SECRET}"\n[policies.invite]\nkey_storage = "derived"\nexpiration = "7d"\n'
        '[policies.log-in]\npreset = "pair"\nissue_limits = [{count = 1, per = "1h"}]\n'
    )


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    "content",
    [
        "content_type,object_id\nauth.user,1\nauth.user,2\n",
        "\ufeffobject_id,name,content_type\r\n1,Ada,auth.user\r\n\r\n2,Ben,auth.user\r\n",
        "subject\nauth.user:1\nauth.user:2\n",
        "auth.user:1\nauth.user:2",
        '{"content_type": "auth.user", "object_id": 1}\n\n{"subject": "auth.user:2", "name": "Ben"}\n',
        '"auth.user:1"\n"auth.user:2"\n',
    ],
)
def test_files_of_every_form(vtoken: Terminal, tmp_path: Path, content: str) -> None:
    (tmp_path / "in.txt").write_text(content, newline="")
    told = vtoken.json("issue-many", "in.txt", "--slug", "invite", "--out", "keys.jsonl")
    assert told == {"issued": 2, "over": 0, "out": "keys.jsonl", "note": None}
    written = lines_of(tmp_path / "keys.jsonl")
    assert [(row["content_type"], row["object_id"]) for row in written] == [
        ("auth.user", "1"),
        ("auth.user", "2"),
    ]
    for row in written:
        assert vtoken("check", f"auth.user:{row['object_id']}", row["key"], "--slug", "invite") == 0


def test_commas_and_quotes_in_csv(vtoken: Terminal, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text('content_type,object_id\nauth.user,"Doe, ""Jo"""\n')
    assert vtoken("issue-many", "in.csv", "--slug", "invite", "--out", "keys.csv") == 0
    [row] = csv.DictReader(io.StringIO((tmp_path / "keys.csv").read_text()))
    assert row["object_id"] == 'Doe, "Jo"'
    assert list(row) == ["id", "content_type", "object_id", "slug", "expires_at", "key", "code"]


def test_standard_input_and_output(vtoken: Terminal, stdin: io.BytesIO) -> None:
    feed(stdin, "auth.user:1\nauth.user:ü\n".encode())
    assert vtoken("issue-many", "-", "--slug", "log-in", "--extra", '{"a": 1}') == 0
    rows = [json.loads(line) for line in vtoken.out.splitlines()]
    assert [row["object_id"] for row in rows] == ["1", "ü"]
    assert all(len(row["code"]) == 6 and row["code"].isdigit() for row in rows)
    assert vtoken.err == "issued 2\n"
    assert vtoken.json("show", rows[0]["id"])["extra_data"] == {"a": 1}


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
def test_only_its_owner_can_read_the_keys(vtoken: Terminal, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("auth.user:1\n")
    (tmp_path / "keys.jsonl.part").touch(0o644)
    assert vtoken("issue-many", "in.txt", "--slug", "invite", "--out", "keys.jsonl") == 0
    assert stat.S_IMODE((tmp_path / "keys.jsonl").stat().st_mode) == 0o600
    assert not (tmp_path / "keys.jsonl.part").exists()


def test_a_batch_again_gives_the_same_keys(vtoken: Terminal, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("".join(f"auth.user:{n}\n" for n in range(600)))
    arguments = ("issue-many", "in.txt", *DERIVED, "--out", "keys.jsonl")
    assert vtoken.json(*arguments)["issued"] == 600
    first = lines_of(tmp_path / "keys.jsonl")
    assert vtoken("consume", "auth.user:7", first[7]["key"], "--slug", "invite") == 0
    again = vtoken.json(*arguments)
    assert (again["issued"], again["over"]) == (599, 1)
    assert lines_of(tmp_path / "keys.jsonl") == [*first[:7], {**first[7], "key": None}, *first[8:]]
    assert vtoken.json("stats")["total"] == 600
    (tmp_path / "in.txt").write_text("auth.user:1\nauth.user:900\n")
    assert vtoken.json(*arguments)["issued"] == 2
    assert vtoken.json("stats")["total"] == 601


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_killed_and_run_again(vtoken: Terminal, tmp_path: Path) -> None:
    count = 3_000
    (tmp_path / "in.txt").write_text("".join(f"auth.user:{n}\n" for n in range(count)))
    arguments = ["issue-many", "in.txt", *DERIVED, "--out", "keys.jsonl"]
    part = tmp_path / "keys.jsonl.part"
    with subprocess.Popen([sys.executable, "-m", "vtoken", *arguments], stderr=subprocess.PIPE) as child:
        until = time.monotonic() + 60
        while not (part.exists() and part.stat().st_size > 50_000):
            assert child.poll() is None, "it ended before it was killed"
            assert time.monotonic() < until
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=60)
    assert not (tmp_path / "keys.jsonl").exists()
    before = vtoken.json("stats")["total"]
    assert 0 < before < count
    assert vtoken.json(*arguments)["issued"] == count
    assert len({row["key"] for row in lines_of(tmp_path / "keys.jsonl")}) == count
    assert vtoken.json("stats")["total"] == count


def test_at_a_limit_what_was_issued_is_kept(vtoken: Terminal, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("auth.user:1\nauth.user:2\nauth.user:1\nauth.user:3\n")
    assert vtoken("issue-many", "in.txt", "--slug", "log-in", "--out", "keys.jsonl") == 1
    assert "The limit is 1 per 1h by object." in vtoken.err
    assert "Note: what was issued before is in keys.jsonl.part." in vtoken.err
    rows = lines_of(tmp_path / "keys.jsonl.part")
    assert [row["object_id"] for row in rows] == ["1", "2"]
    assert not (tmp_path / "keys.jsonl").exists(), "an earlier output would still be whole"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"auth.user:1\nno colon\n", "FILE, line 2: SUBJECT must be content_type:object_id"),
        (b"auth.user:1\nauth.user:\n", "FILE, line 2: object_id must not be empty"),
        (b"content_type,object_id\nauth.user\n", "FILE, line 2: object_id must not be empty"),
        (b"object_id\n5\n", "FILE, line 2: needs content_type and object_id, or subject"),
        (b'{"subject": "auth.user:1"}\n{"name": "hunter2"}\n', "FILE, line 2: needs content_type"),
        (b'{"subject": "auth.user:1"}\nhunter2\n', "FILE, line 2: needs content_type"),
        (b'{"content_type": "a", "object_id": 1.5}\n', "FILE, line 1: object_id must be"),
        (b"auth.user:1\nauth.user:\xff\n", "neither CSV nor JSON lines in UTF-8"),
    ],
)
def test_a_mistake_in_the_file_issues_nothing(
    vtoken: Terminal, tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "in.txt").write_bytes(content)
    assert vtoken("issue-many", "in.txt", "--slug", "invite", "--out", "keys.jsonl") == 2
    assert message in vtoken.err
    assert "hunter2" not in vtoken.err
    assert {file.name for file in tmp_path.iterdir()} == {"in.txt", "vtoken.toml"}


def test_wrong_usage(vtoken: Terminal, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("auth.user:1\n")
    (tmp_path / "notes.txt").write_text("do not lose me")
    for arguments, message in (
        (("in.txt", "--slug", "invite", "--out", "notes.txt"), "is not an output of issue-many"),
        (("in.txt", "--slug", "log-in", "--batch", "x"), "key_storage='derived'"),
        (("in.txt", "--slug", "invite", "--batch", "x" * 129), "batch must be at most 128"),
        (("missing.txt", "--slug", "invite"), "FILE cannot be read: missing.txt: No such file"),
        ((".", "--slug", "invite"), "it is read twice"),
        (("in.txt", "--slug", "invite", "--extra", "{"), "--extra is not JSON"),
    ):
        assert vtoken("issue-many", *arguments) == 2, arguments
        assert message in vtoken.err
    assert (tmp_path / "notes.txt").read_text() == "do not lose me"
    assert vtoken("issue-many", "in.txt", "--slug", "invite", "--out", "no/folder/x") == 3


def test_what_is_no_list_of_objects_is_told_what_is_wanted(vtoken: Terminal, tmp_path: Path) -> None:
    for content in ("name,email\nAda,ada@example.org\n", "content-type;object-id\nauth.user;1\n"):
        (tmp_path / "in.csv").write_text(content)
        assert vtoken("issue-many", "in.csv", "--slug", "invite") == 2
        assert "line 1: needs the columns content_type and object_id" in vtoken.err
        assert "separated by commas" in vtoken.err


def test_a_repeated_object_is_told(vtoken: Terminal, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("auth.user:1\nauth.user:2\nauth.user:1\n")
    told = vtoken.json("issue-many", "in.txt", "--slug", "invite", "--out", "keys.jsonl")
    assert (told["issued"], told["note"][:35]) == (3, "1 line names an object that came be")
    first, _, last = (row["key"] for row in lines_of(tmp_path / "keys.jsonl"))
    assert vtoken("check", "auth.user:1", first, "--slug", "invite") == 1
    assert vtoken("check", "auth.user:1", last, "--slug", "invite") == 0
    told = vtoken.json("issue-many", "in.txt", *DERIVED, "--out", "batch.jsonl")
    assert told["note"] is None  # of a batch it is the same token, and its key is good


def test_the_keys_of_another_run_are_not_replaced(vtoken: Terminal, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("auth.user:1\n")
    for name in ("keys.csv", "keys.jsonl"):
        out, arguments = tmp_path / name, ("issue-many", "in.txt", "--slug", "invite", "--out", name)
        for batch in ((), ("--batch", f"spring {name}")):
            assert vtoken(*arguments, *batch) == 0
            before = out.read_text()
            others = ((), ("--batch", "autumn"))
            for other in others:
                assert vtoken(*arguments, *other) == 2
                assert f"{name} has the keys of another run" in vtoken.err
            assert out.read_text() == before
            if batch:
                assert vtoken(*arguments, *batch) == 0
                assert out.read_text() == before
            out.unlink()
    (tmp_path / "keys.csv").write_bytes(b"\xff\xfe not text")
    assert vtoken("issue-many", "in.txt", "--slug", "invite", "--out", "keys.csv") == 2
    assert "is not an output of issue-many" in vtoken.err


def test_a_file_that_cannot_be_written_is_named(vtoken: Terminal, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("auth.user:1\n")
    assert vtoken("issue-many", "in.txt", "--slug", "invite", "--out", "nowhere/k.csv") == 3
    assert vtoken.err == "vtoken: nowhere/k.csv.part: No such file or directory\n"
    (tmp_path / "folder").mkdir()
    assert vtoken("issue-many", "in.txt", "--slug", "invite", "--out", "folder") == 3
    assert vtoken.err == "vtoken: folder: Is a directory\n"
    assert vtoken.json("stats")["total"] == 0, "it is found out before anything is issued"


_INTERRUPTIBLE = """
import signal, sys
from vtoken.__main__ import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started the tests with `&`
sys.exit(main())
"""


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize("options", [DERIVED, DERIVED[:2]])
def test_interrupted_it_says_how_to_go_on(tmp_path: Path, options: tuple[str, ...]) -> None:
    (tmp_path / "in.txt").write_text("".join(f"auth.user:{n}\n" for n in range(20_000)))
    with subprocess.Popen(
        [sys.executable, "-c", _INTERRUPTIBLE, "issue-many", "in.txt", *options, "--out", "keys.csv"],
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        part = tmp_path / "keys.csv.part"
        until = time.monotonic() + 60
        while not (part.exists() and part.stat().st_size):
            assert child.poll() is None, "it ended before it was interrupted"
            assert time.monotonic() < until
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert err.startswith("vtoken: interrupted: what was issued before is in keys.csv.part; ")
    assert ("the same command again issues the rest" in err) == ("--batch" in options)
