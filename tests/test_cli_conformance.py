"""``vtoken conformance``: green only where every case holds; also completion and progress bars."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
from pymongo import MongoClient

from vtoken import register_backend, registry
from vtoken.cli import cases
from vtoken.testing import BackendConformance, DurableBackendConformance
from vtoken_backends.memory import MemoryBackend
from vtoken_backends.mongodb.diagnostics import with_database
from vtoken_backends.postgresql.urls import split

from . import postgresql_servers
from .cli_tools import Terminal
from .servers import fresh_database
from .test_memory_conformance import TestMemory

pytestmark = pytest.mark.usefixtures("no_configuration")
ALL: Final = len(BackendConformance.cases())


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schemes of backends of others: one with a planted bug, and one without."""
    monkeypatch.setattr(registry, "_registered", {})
    register_backend("racy", "tests.broken:RacyUse")
    register_backend("sound", f"{__name__}:Sound")


class Sound(MemoryBackend):
    """Somebody's backend."""


class Fine(TestMemory):
    """The author's own suite."""

    rounds = 3


del TestMemory  # it is not collected here, too


def test_memory_holds_every_guarantee(vtoken: Terminal) -> None:
    assert vtoken("conformance", "memory://") == 0
    lines = vtoken.out.splitlines()
    assert len(lines) == ALL + 2
    assert all(re.match(r"holds +\d+  \S", line) for line in lines[:ALL])
    assert lines[-1] == f"{ALL} holds"


def test_a_broken_backend_is_found_out(vtoken: Terminal, broken: None) -> None:
    told = vtoken.json("conformance", "racy://{n}", "--in-process", status=1)
    states = {case["name"]: case["state"] for case in told["cases"]}
    assert told["conformant"] is False
    assert states["test_of_concurrent_consumers_one_wins"] == "fails"
    assert 0 < list(states.values()).count("fails") < ALL // 2
    assert "not run" in states.values()
    [failed] = [case for case in told["cases"] if case["name"] == "test_of_concurrent_consumers_one_wins"]
    assert failed["detail"].startswith("AssertionError")
    assert "assert " in failed["detail"]


def test_what_cannot_be_looked_at_is_not_run_and_no_success(vtoken: Terminal, broken: None) -> None:
    assert vtoken("conformance", "sound://{n}", "--in-process") == 1
    not_run = [line for line in vtoken.out.splitlines() if line.startswith("not run")]
    assert vtoken.out.splitlines()[-1] == f"{ALL - len(not_run)} holds, {len(not_run)} not run"
    assert "finds no key" in "".join(not_run)
    assert all("can read it without the backend" in line for line in not_run)


def test_the_suite_of_an_author_is_run_whole(vtoken: Terminal) -> None:
    told = vtoken.json("conformance", f"{__name__}:Fine")
    assert told["conformant"] is True
    assert {case["state"] for case in told["cases"]} == {"holds"}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sound://one", "put {n} into the URL"),
        ("nosuch://{n}", "unknown backend scheme"),
        ("sqlite:///x.db?chek=always", "did you mean check"),
        ("vtoken.testing:Clock", "BackendConformance"),
        ("no.such:Suite", "no module"),
        ("memory", "not an import path"),
    ],
)
def test_wrong_usage(vtoken: Terminal, broken: None, url: str, message: str) -> None:
    assert vtoken("conformance", url) == 2
    assert message in vtoken.err
    assert vtoken.out == ""


def cases_of(suite: BackendConformance, directory: Path, *names: str) -> list[cases.Outcome]:
    """Run a few of its cases."""
    outcomes: list[cases.Outcome] = []
    for case in cases.cases(suite, in_process=False):
        if case.name in names:
            (directory / case.name).mkdir()
            outcomes.append(cases.run_case(suite, case, directory / case.name))
    return outcomes


SOME: Final = (
    "test_the_store_holds_no_key",
    "test_the_raw_probe_sees_a_plain_key",
    "test_a_reopened_store_holds_everything",
    "test_a_killed_redeemer_frees_the_token",
)


def test_sqlite_files_of_its_own_beside_the_one_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokens.db").write_text("not touched")
    suite, parent = cases.chosen(f"sqlite:///{tmp_path}/tokens.db?synchronous=normal")
    assert parent == tmp_path
    assert isinstance(suite, DurableBackendConformance)
    outcomes = cases_of(suite, tmp_path, *SOME)
    assert [outcome.state for outcome in outcomes] == ["holds"] * len(SOME), outcomes
    assert (tmp_path / "tokens.db").read_text() == "not touched"


def test_mongodb_databases_of_its_own_which_are_dropped(mongodb_replica_set: str, tmp_path: Path) -> None:
    with fresh_database(mongodb_replica_set) as url:
        suite, _ = cases.chosen(f"{url}&collection=mine")
        outcomes = cases_of(suite, tmp_path, *SOME)
        assert [outcome.state for outcome in outcomes] == ["holds"] * len(SOME), outcomes
        with MongoClient[dict[str, Any]](url) as client:
            names = client.list_database_names()
            assert client.get_default_database().list_collection_names() == []
    assert not [name for name in names if name.startswith("vtoken_conformance_")]


def test_postgresql_schemas_of_its_own_which_are_dropped(tmp_path: Path) -> None:
    with postgresql_servers.fresh_store(postgresql_servers.shared_url()) as url:
        suite, _ = cases.chosen(f"{url}&pool_size=3")
        outcomes = cases_of(suite, tmp_path, *SOME)
        assert [outcome.state for outcome in outcomes] == ["holds"] * len(SOME), outcomes
        with psycopg.connect(split(url).url) as connection:
            schemas = [str(name) for (name,) in connection.execute("SELECT nspname FROM pg_namespace")]
    assert not [name for name in schemas if name.startswith("vtoken_conformance_")]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("mongodb://host/db", "mongodb://host/new"),
        ("mongodb://host:1,b:2/?w=1", "mongodb://host:1,b:2/new?w=1"),
        ("mongodb://me:pw@host/db?w=1", "mongodb://me:pw@host/new?w=1&authSource=db"),
        ("mongodb+srv://me:pw@host", "mongodb+srv://me:pw@host/new?authSource=admin"),
        ("mongodb://me:pw@host/db?authSource=x", "mongodb://me:pw@host/new?authSource=x"),
    ],
)
def test_a_user_is_looked_up_where_it_was(url: str, expected: str) -> None:
    assert with_database(url, "new") == expected


# The shell and the terminal ------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_installed(
    vtoken: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    script = tmp_path / "completion"
    assert vtoken("--install-completion", "--shell", shell, "--output", str(script)) == 0
    text = script.read_text()
    for name in ("conformance", "doctor", "import", "list"):
        assert name in text


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "status"), [("n\n", 1), ("y\n", 0)])
def test_what_completion_edits_is_said_before(
    vtoken: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, status: int
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = _Terminal()
    monkeypatch.setattr(sys, "stdin", _Terminal(answer))
    monkeypatch.setattr(sys, "stderr", asked)
    assert vtoken("--install-completion", "--shell", "bash") == status
    script = tmp_path / ".local/share/bash-completion/completions/vtoken"
    assert asked.getvalue().startswith(
        f"Write the completion script {script} and add a line to {tmp_path}/.bashrc that loads it? [y/N] "
    )
    assert script.exists() is (tmp_path / ".bashrc").exists() is (status == 0)


def test_long_work_shows_how_fast_it_is(vtoken: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    vtoken.json("issue", "user:1")
    shown = _Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    assert vtoken("copy", "sqlite:///tokens.db", "memory://") == 0
    assert "copying and comparing" in shown.getvalue()
    assert "2 of 2" in shown.getvalue()
    assert "copying" not in vtoken.out


def test_a_purge_shows_how_many_are_gone(vtoken: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        vtoken.json("issue", f"user:{number}")
        vtoken.json("deactivate", f"user:{number}")
    shown = _Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    assert vtoken("purge", "--yes", "--batch-size", "2") == 0
    assert "purging" in shown.getvalue()
    assert re.search(r"m5\b", shown.getvalue())  # after the code of its colour


def test_without_a_terminal_it_is_quiet(vtoken: Terminal) -> None:
    vtoken.json("issue", "user:1")
    assert vtoken("copy", "sqlite:///tokens.db", "memory://") == 0
    assert vtoken.err == ""
