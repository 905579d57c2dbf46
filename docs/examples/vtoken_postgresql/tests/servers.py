"""A real PostgreSQL server for the tests: a cluster of its own in a temporary directory."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psycopg
import pytest

DECLARED_URL: Final = "VTOKEN_TEST_POSTGRESQL_URL"

# PostgreSQL refuses to run as root: there it becomes an ordinary user. And it dies with the process that
# started it, even by `kill -9`: PR_SET_PDEATHSIG (prctl(2)) outlives exec. SIGQUIT is PostgreSQL's immediate
# shutdown, which leaves neither processes nor shared memory.
_START: Final = """
import ctypes, os, pwd, signal, sys
parent, user, *command = sys.argv[1:]
if os.geteuid() == 0:
    entry = pwd.getpwnam(user)
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGQUIT)
if os.getppid() != int(parent):
    sys.exit("the parent is gone")
os.execv(command[0], command)
"""
_USER: Final = "nobody"
_numbers = itertools.count()


def binary(name: str) -> str:
    """A program of PostgreSQL, on the PATH or where Debian puts them.

    Raises:
        FileNotFoundError: it is not installed.
    """
    if found := shutil.which(name):
        return found
    for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: -float(p.parent.name)):
        if (folder / name).is_file():
            return str(folder / name)
    raise FileNotFoundError(f"no {name}: install PostgreSQL, or set {DECLARED_URL} to a server")


def _command(program: str, *arguments: str) -> list[str]:
    return [sys.executable, "-ISc", _START, str(os.getpid()), _USER, binary(program), *arguments]


class PostgreSQL:
    """One server on a free port of 127.0.0.1. Leaving :meth:`running` stops it."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "data"
        self._process: subprocess.Popen[bytes] | None = None
        if os.geteuid() == 0:
            os.chown(folder, pwd.getpwnam(_USER).pw_uid, -1)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        command = _command("initdb", "--pgdata", str(self.data), "--username", "vtoken", "--auth", "trust")
        command += ["--encoding", "UTF8", "--locale", "C", "--no-sync", "--no-instructions"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder)

    @property
    def url(self) -> str:
        return f"postgresql://vtoken@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start it, again after :meth:`crash`, and wait until it answers.

        Raises:
            RuntimeError: it ended at once, or did not answer.
        """
        command = _command("postgres", "-D", str(self.data), "-p", str(self.port))
        for setting in (
            "listen_addresses=127.0.0.1",
            "unix_socket_directories=",
            "max_connections=200",
            "fsync=off",  # these tests cut no power: a kill of the processes loses nothing that was written
        ):
            command += ["-c", setting]
        with (self.data / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.data
            )
        ready = [binary("pg_isready"), "-q", "-t", "1", "-h", "127.0.0.1", "-p", str(self.port)]
        for _ in range(600):
            if subprocess.run(ready, check=False).returncode == 0:
                return
            try:
                self._process.wait(0.1)
                break
            except subprocess.TimeoutExpired:
                continue
        raise RuntimeError(f"PostgreSQL does not answer:\n{(self.data / 'log').read_text()[-2000:]}")

    def crash(self) -> None:
        """End all its processes at once, without a checkpoint; :meth:`start` recovers from its log."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()

    @contextmanager
    def running(self) -> Generator[PostgreSQL]:
        try:
            self.start()
            yield self
        finally:
            self.crash()  # the quickest way; its files go anyway


@contextmanager
def own_server() -> Generator[PostgreSQL]:
    """A server of this test's own, to be killed. Without PostgreSQL here, skips; in CI, fails."""
    try:
        binary("initdb")
    except FileNotFoundError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    with (
        tempfile.TemporaryDirectory(prefix="vtoken-postgresql-") as folder,
        PostgreSQL(Path(folder)).running() as server,
    ):
        yield server


@contextmanager
def any_server() -> Generator[str]:
    """The URL of the declared server, or of one of our own."""
    if declared := os.environ.get(DECLARED_URL):
        yield declared
        return
    with own_server() as server:
        yield server.url


def fresh_store(url: str) -> str:
    """A URL of the same database with an empty schema of its own, which the options make the current one."""
    name = f"store_{os.getpid()}_{next(_numbers)}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"DROP SCHEMA IF EXISTS {name} CASCADE; CREATE SCHEMA {name}".encode())
    return f"{url}{'&' if '?' in url else '?'}options=-csearch_path%3D{name}"
