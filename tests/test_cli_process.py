"""The command line as processes of their own."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vtoken import TokenEvent, __version__

from .cli_tools import USER, Terminal, process

pytestmark = pytest.mark.usefixtures("no_configuration")


def complain(event: TokenEvent) -> None:
    """A hook with a mistake."""
    raise RuntimeError(f"hunter2 {event.name}")


def test_the_module_runs_as_a_process(tmp_path: Path) -> None:
    issued = process("issue", USER, "--slug", "reset", "--json", VTOKEN_URL="sqlite:///mine.db")
    assert (issued.returncode, issued.stderr) == (0, "")
    key = json.loads(issued.stdout)["key"]
    assert (tmp_path / "mine.db").exists()
    arguments = ("consume", USER, "-", "--slug", "reset", "--url", "sqlite:///mine.db")
    first, second = process(*arguments, stdin=key + "\n"), process(*arguments, stdin=key + "\n")
    assert (first.returncode, first.stderr) == (0, "")
    assert (second.returncode, second.stdout) == (1, "")
    assert key not in second.stderr


def test_the_script_is_installed() -> None:
    script = shutil.which("vtoken", path=str(Path(sys.executable).parent))
    assert script is not None
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, __version__)


@pytest.mark.parametrize("package", ["cyclopts", "rich", "attrs"])
def test_without_the_extra_it_says_what_to_install(package: str) -> None:
    code = f"""
import runpy, sys
sys.modules[{package!r}] = None
runpy.run_module("vtoken", run_name="__main__", alter_sys=True)
"""
    done = process("stats", code=code)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f'vtoken: the command line needs {package}: pip install "vtoken[cli]"\n'
    done = process("stats", "--json", code=code)
    assert done.returncode == 2
    assert 'pip install "vtoken[cli]"' in json.loads(done.stderr)["message"]


def test_a_missing_driver_is_status_2() -> None:
    code = """
import runpy, sys
sys.modules["pymongo"] = None
runpy.run_module("vtoken", run_name="__main__", alter_sys=True)
"""
    done = process("stats", "--url", "mongodb://me:hunter2@host/db", code=code)
    assert done.returncode == 2
    assert 'pip install "vtoken[mongodb]"' in done.stderr
    assert done.stderr.count("\n") == 1
    assert "hunter2" not in done.stderr


def test_a_hook_that_fails_is_one_line_on_standard_error() -> None:
    tests = str(Path(__file__).parent.parent)
    done = process("issue", USER, VTOKEN_HOOKS=f"{__name__}:complain", PYTHONPATH=tests)
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1
    assert "a hook failed" in done.stderr
    assert "(RuntimeError)" in done.stderr
    assert "hunter2" not in done.stderr


def test_ctrl_c_is_status_130() -> None:
    with subprocess.Popen(
        [sys.executable, "-u", "-c", _ANNOUNCED, "check", USER, "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "reading\n"
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (130, "vtoken: interrupted\n")


_ANNOUNCED = """
import io, signal, sys
from vtoken.__main__ import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started the tests with `&`
class Announced(io.TextIOWrapper):
    @property
    def buffer(self):
        print("reading", flush=True)
        return super().buffer
sys.stdin = Announced(sys.stdin.detach())
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGPIPE there")
def test_a_reader_that_is_gone_is_status_141() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as nobody:
        done = subprocess.run(
            [sys.executable, "-m", "vtoken", "config"],
            stdout=nobody,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_an_answer_that_cannot_be_written_is_status_3() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "vtoken", "config"],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert done.returncode == 3
    assert b"Traceback" not in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_running_in_process_leaves_logging_alone(vtoken: Terminal) -> None:
    before = list(logging.getLogger().handlers)
    assert vtoken("init") == 0
    assert logging.getLogger().handlers == before
