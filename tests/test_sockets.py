"""Who may leak a socket: the tests that name MongoDB, and none into the next test. Nobody leaks a stream."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LEAKING = """
import asyncio, gc, socket

class Leak:
    def __init__(self):
        self.socket, self.cycle = socket.socket(), self

def test_first_mongodb():
    Leak()

def test_second_mongodb():
    Leak()

async def leave_a_stream():
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    server.close()
    return writer

def test_stream_mongodb():
    Leak.writer = asyncio.run(leave_a_stream())

def test_after_it():
    gc.collect()

def test_stream():
    asyncio.run(leave_a_stream())

def test_after_the_stream():
    gc.collect()

def test_of_ours():
    Leak()
    gc.collect()

def test_after_that():
    gc.collect()
"""


@pytest.mark.loops(
    "", "eager"
)  # uvloop's transports are its own, and an open one holds up the end of its loop
def test_a_leaked_socket_fails_its_own_test_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "test_leaks.py").write_text(LEAKING)
    command = [sys.executable, "-m", "pytest", "-p", "tests.sockets", "-p", "no:cacheprovider", "-q", "-rA"]
    command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    outcomes = ("PASSED", "FAILED", "ERROR")
    told = [line.split() for line in done.stdout.splitlines() if line.startswith(outcomes)]
    assert {(name.partition("::")[2], outcome) for outcome, name, *_ in told} == {
        ("test_first_mongodb", "PASSED"),
        ("test_second_mongodb", "PASSED"),
        # From 3.13 on Python itself warns of a stream that is collected unclosed.
        ("test_stream_mongodb", "FAILED" if sys.version_info >= (3, 13) else "PASSED"),
        ("test_stream_mongodb", "ERROR"),
        ("test_after_it", "PASSED"),
        ("test_stream", "FAILED"),
        ("test_stream", "ERROR"),
        ("test_after_the_stream", "PASSED"),
        ("test_of_ours", "FAILED"),
        ("test_after_that", "PASSED"),
    }, done.stdout
