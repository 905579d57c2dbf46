"""The manager for synchronous code and the life of a process: forked, and forgotten."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vtoken import Subject
from vtoken.sync import SyncTokenManager

from . import servers

SCRIPT = """
import os, sys, warnings
from vtoken import BackendClosed, Subject, TokenManager
from vtoken.sync import SyncTokenManager

warnings.simplefilter("default")
manager = SyncTokenManager.from_url(sys.argv[1])
user = Subject("auth.user", 1)
"""

FORK = """
manager.open()
issued = manager.deactivate_and_create(user, "reset")
if os.fork() == 0:
    for call in (manager.stats, manager.open, lambda: manager.redeem(user, "reset", issued.key).__enter__()):
        try:
            call()
        except BackendClosed as error:
            print("child:", error)
    with SyncTokenManager.from_url(sys.argv[1]) as own:
        print("child's own:", own.consume(user, "reset", issued.key) == issued)
    manager.close()
    sys.exit(5)
print("status:", os.waitstatus_to_exitcode(os.wait()[1]))
print("parent:", manager.stats().used)
manager.close()
"""

FORK_IN_A_BLOCK = """
manager.open()
issued = manager.deactivate_and_create(user, "reset")
try:
    with manager.redeem(user, "reset", issued.key):
        child = os.fork()
except BackendClosed as error:
    print("child:", error)
    sys.exit(5)
print("status:", os.waitstatus_to_exitcode(os.wait()[1]))
print("parent:", manager.stats().used)
manager.close()
"""

FORGOTTEN = """
manager.open()
print(manager.deactivate_and_create(user, "reset").slug)
"""


OPENED_BY_ITSELF = """
import threading
issued = [manager.issue(Subject("auth.user", number), "reset") for number in (1, 2)]
entered = threading.Event()


def slow_request():  # it goes on while the process ends
    with manager.redeem(user, "reset", issued[0].key):
        entered.set()
        threading.Event().wait()


threading.Thread(target=slow_request, daemon=True).start()
entered.wait()
print("ends")
"""

OPENED_ON_MONGODB = """
from vtoken_backends.mongodb import MongoDBBackend
made = MongoDBBackend(url=sys.argv[1], driver=os.environ["DRIVER"])
manager = SyncTokenManager(TokenManager(made))
print(manager.issue(user, "reset").slug)
"""

FORKED_UNUSED = """
child = os.fork()
print("child:" if child == 0 else "parent:", manager.issue(user, str(child == 0)).slug)
if child:
    print("status:", os.waitstatus_to_exitcode(os.wait()[1]))
"""


def run_script(tmp_path: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run a script to its end; one that hangs fails."""
    return run_on(f"sqlite:///{tmp_path}/tokens.db", code)


def run_on(url: str, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script on any store."""
    return subprocess.run(
        [sys.executable, "-u", "-c", SCRIPT + code, url],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
class TestForked:
    def test_the_child_is_told_and_ends_and_the_parent_goes_on(self, tmp_path: Path) -> None:
        done = run_script(tmp_path, FORK)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert [line for line in lines if "before a fork" in line] == lines[:3]
        assert lines[3:] == ["child's own: True", "status: 5", "parent: 1"]
        # From 3.13 on sqlite3 warns of the parent's connections, which a forked child must not close.
        warned = [line for line in done.stderr.splitlines() if "ResourceWarning" in line]
        is_expected = sys.version_info >= (3, 13)
        assert all(is_expected and "unclosed database" in line for line in warned), done.stderr

    def test_a_child_that_leaves_the_block_uses_nothing(self, tmp_path: Path) -> None:
        done = run_script(tmp_path, FORK_IN_A_BLOCK)
        assert done.returncode == 0, done.stderr
        child, *parent = done.stdout.splitlines()
        assert "forked" in child
        assert parent == ["status: 5", "parent: 1"]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_one_that_nobody_opened_before_the_fork_opens_in_each_process(tmp_path: Path) -> None:
    done = run_script(tmp_path, FORKED_UNUSED)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == ["child: True", "parent: False", "status: 0"]


def test_one_that_opened_itself_closes_at_the_end_whatever_is_under_way(tmp_path: Path) -> None:
    done = run_script(tmp_path, OPENED_BY_ITSELF)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ends\n", "")
    with SyncTokenManager.from_url(f"sqlite:///{tmp_path}/tokens.db") as manager:
        assert manager.exists_valid(Subject("auth.user", 1), "reset"), "its hold was given back"


def test_a_forgotten_one_warns_and_lets_the_process_end(tmp_path: Path) -> None:
    done = run_script(tmp_path, FORGOTTEN)
    assert (done.returncode, done.stdout) == (0, "reset\n"), done.stderr
    assert done.stderr.count("a SyncTokenManager was not closed") == 1
    assert "Traceback" not in done.stderr


def test_what_has_opened_itself_is_closed_whatever_the_driver(
    mongodb_standalone: str, mongodb_driver: str
) -> None:
    with servers.databases(mongodb_standalone).one() as url:
        done = run_on(url, OPENED_ON_MONGODB, DRIVER=mongodb_driver)
    assert (done.returncode, done.stdout, done.stderr) == (0, "reset\n", "")
