"""The command ``doctor``: is the store well? For operators, and for probes."""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple
from urllib.parse import unquote

import anyio.to_thread
from cyclopts import Parameter
from rich.text import Text

from vtoken.backend import Budget, Match, TokenBackend
from vtoken.cli.options import Store
from vtoken.cli.output import Result, printable
from vtoken.cli.servers import SCHEMES, clock_skew
from vtoken.cli.terminal import progress
from vtoken.config import create_backend
from vtoken.errors import BackendError, BackendUnavailable, CorruptStore
from vtoken.inputs import milliseconds
from vtoken.manager import utc_now
from vtoken.transfer import pages

STORE_FAILED: Final = 3
_TOLERANCE: Final = 2_000
"""Milliseconds by which clocks may differ: codes live for minutes."""
_PROBE: Final = Budget("vtoken.doctor", "probe", "", "attempts")

State = Literal["ok", "warning", "failed"]
_STYLES: Final[dict[State, str]] = {"ok": "green", "warning": "yellow", "failed": "bold red"}
_Examine = Callable[[TokenBackend], Awaitable[tuple[State, str]]]


class Finding(NamedTuple):
    """One line of the report."""

    name: str
    state: State
    detail: str


async def doctor(
    *,
    deep: Annotated[bool, Parameter(negative="", show_default=False, help="Read every token, too.")] = False,
    store: Store = Store(),  # noqa: B008  # frozen: the form in which cyclopts takes shared options
) -> Result:
    """Examine the store: reachable, schema, indexes, integrity, clocks. Exit status 3: it is not well.

    An SQLite file is checked whole, whatever its size, and is not made where it is missing; on a server
    what is missing of the store is made, as the application would do.
    """
    findings: list[Finding] = []
    async for finding in _examine(store, deep):
        findings.append(finding)  # noqa: PERF401  # extend() takes no async iterator
    failed = any(finding.state == "failed" for finding in findings)
    data = {"healthy": not failed, "url": store.shown(), "findings": [f._asdict() for f in findings]}
    return Result(data, _text(findings), STORE_FAILED if failed else 0)


async def _examine(store: Store, deep: bool) -> AsyncGenerator[Finding]:
    url = store.configuration().url
    store.manager()  # finds what only the parts together show: a missing driver, a code without a secret
    yield Finding("configuration", "ok", store.shown())
    scheme = url.partition("://")[0].lower()
    options = {"check": "always"} if scheme == "sqlite" else {}
    if scheme == "sqlite":
        about_file = _file(Path(unquote(url.partition("://")[2].partition("?")[0][1:])))
        yield about_file
        if about_file.state == "failed":
            return
        yield sqlite_release(sqlite3.sqlite_version_info)
    backend = create_backend(url, **options)
    try:
        await backend.open()
    except BackendError as error:
        yield _failed_to_open(error)
        return
    try:
        yield Finding("reachable", "ok", "")
        yield Finding("schema", "ok", "known to this version, with the indexes that it needs")
        checked = (
            "checked whole by SQLite" if options else "as far as opening tells; --deep reads every token"
        )
        yield Finding("integrity", "ok", checked)
        for name, examine in (("tokens", _tokens), ("writable", _writable), ("made in time", _newest)):
            yield await _finding(name, examine, backend)
        if deep:
            yield await _finding("every token", _every_token, backend)
    finally:
        with anyio.CancelScope(shield=True):
            await backend.close()
    if scheme in SCHEMES:
        yield await anyio.to_thread.run_sync(_server_clock, url)


async def _finding(name: str, examine: _Examine, backend: TokenBackend) -> Finding:
    try:
        state, detail = await examine(backend)
    except BackendError as error:
        return Finding(name, "failed", f"{type(error).__name__}: {error}")
    return Finding(name, state, detail)


async def _tokens(backend: TokenBackend) -> tuple[State, str]:
    began = time.perf_counter()
    rows = await backend.count(milliseconds(utc_now()))
    took = time.perf_counter() - began
    total, active = sum(row.total for row in rows), sum(row.active for row in rows)
    return "ok", f"{total} stored, {active} of them active; counted in {took * 1000:.0f} ms"


async def _writable(backend: TokenBackend) -> tuple[State, str]:
    """A durable write and its undoing, on a budget that nobody else has."""
    now = milliseconds(utc_now())
    began = time.perf_counter()
    await backend.spend(_PROBE, now, 1, 1, 1)
    took = time.perf_counter() - began
    await backend.reset(_PROBE)
    return "ok", f"a durable write took {took * 1000:.1f} ms"


async def _newest(backend: TokenBackend) -> tuple[State, str]:
    """Whoever issued it has a clock of its own, by which tokens end too early or too late elsewhere."""
    newest = await backend.find(Match(), 1)
    ahead = newest[0].created_at - milliseconds(utc_now()) if newest else 0
    if ahead > _TOLERANCE:
        return (
            "warning",
            f"the newest token is {ahead / 1000:.0f} s in the future: clocks differ between hosts",
        )
    return "ok", "no token is from the future"


async def _every_token(backend: TokenBackend) -> tuple[State, str]:
    done = 0
    with progress("reading", sum(row.total for row in await backend.count(0))) as bar:
        async for tokens in pages(backend):
            done += len(tokens)
            bar(done)
    return "ok", f"{done} read"


def _file(path: Path) -> Finding:
    try:
        found = path.stat()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        hint = "there is no such file; vtoken init makes it" if missing else str(error.strerror)
        return Finding("file", "failed", f"{path}: {hint}")
    size = f"{path}, {found.st_size / 1024:,.0f} KiB"
    if os.name == "posix" and stat.S_IMODE(found.st_mode) & 0o077:
        return Finding("file", "warning", f"{size}: others than its owner may open it (chmod 600)")
    return Finding("file", "ok", size)


def sqlite_release(version: tuple[int, ...]) -> Finding:
    """Name a release with the WAL-reset bug, which in rare cases damages a file that several connections
    write. Where a distribution backported the fix, the version is still the old one."""
    said = ".".join(map(str, version))
    if version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45):
        return Finding("SQLite", "ok", said)
    where = "https://www.sqlite.org/wal.html#walresetbug"
    return Finding(
        "SQLite", "warning", f"{said} may have the WAL-reset bug (unless the fix was backported): {where}"
    )


def _failed_to_open(error: BackendError) -> Finding:
    if isinstance(error, BackendUnavailable):
        return Finding("reachable", "failed", str(error))
    return Finding("integrity" if isinstance(error, CorruptStore) else "schema", "failed", str(error))


def _server_clock(url: str) -> Finding:
    try:
        skew = clock_skew(url).total_seconds()
    except Exception as error:  # the driver's own; its message may quote the URL
        return Finding("server's clock", "warning", f"it was not told ({type(error).__name__})")
    state: State = "ok" if abs(skew) * 1000 <= _TOLERANCE else "warning"
    return Finding("server's clock", state, f"{abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} ours")


def _text(findings: list[Finding]) -> Text:
    text = Text()
    for number, (name, state, detail) in enumerate(findings):
        text.append("\n" * bool(number))
        text.append(f"{state:<8}", style=_STYLES[state])
        text.append(f"{name:<16}", style="bold")
        text.append(printable(detail))
    return text
