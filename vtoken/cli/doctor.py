"""The command ``doctor``: is the store well? For operators, and for probes."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import anyio
import anyio.to_thread
from cyclopts import Parameter
from rich.text import Text

from vtoken.backend import Budget, Match, Spend, StoredToken, TokenBackend, is_valid
from vtoken.cli.options import Store
from vtoken.cli.output import Result, printable
from vtoken.cli.terminal import progress
from vtoken.config import create_backend
from vtoken.config_read import file_in
from vtoken.diagnostics import CLOCK_TOLERANCE, Diagnostics, Finding, FindingState, diagnostics_of
from vtoken.errors import BackendError, BackendUnavailable, CorruptStore
from vtoken.inputs import milliseconds
from vtoken.keys import Keyring
from vtoken.manager import TokenManager, utc_now
from vtoken.migrate import pages
from vtoken.registry import url_of

STORE_FAILED: Final = 3
_STORE = Store()  # the default of the shared options; it is frozen
_PROBE: Final = Budget(object=b"vtoken doctor".ljust(16, b"\0"), name=b"probe".ljust(16, b"\0"))
_NEWEST: Final = 100
_STYLES: Final[dict[FindingState, str]] = {"ok": "green", "warning": "yellow", "failed": "bold red"}
_Examine = Callable[[TokenBackend], Awaitable[tuple[FindingState, str]]]


async def doctor(
    *,
    deep: Annotated[bool, Parameter(negative="", show_default=False, help="Read every token, too.")] = False,
    store: Store = _STORE,
) -> Result:
    """Examine the store: reachable, schema, indexes, integrity, clocks. Exit status 3: it is not well.

    A store that is missing is not made. One that is there is examined as a whole, whatever its size, if its
    backend can do that.
    """
    findings: list[Finding] = []
    manager = store.made()  # finds what only the parts together show, such as a missing driver
    async for finding in _examine(store, manager, deep):
        findings.append(finding)  # noqa: PERF401  # extend() accepts no async iterator
    failed = any(finding.state == "failed" for finding in findings)
    data = {"healthy": not failed, "url": store.address(manager), "findings": [f._asdict() for f in findings]}
    return Result(data, _text(findings), STORE_FAILED if failed else 0)


async def _examine(store: Store, manager: TokenManager, deep: bool) -> AsyncGenerator[Finding]:
    yield _configuration(store, manager)
    unlimited = manager.policies.unlimited_codes()
    if unlimited:
        named = ", ".join(slug or "(none)" for slug in unlimited)
        yield Finding("limits", "warning", f"codes without cooldown or issue_limits: {named}")
    url = url_of(manager.backend)
    about = Diagnostics("") if url is None else diagnostics_of(url)
    for finding in await anyio.to_thread.run_sync(about.before_opening):
        yield finding
        if finding.state == "failed":
            return
    missing = await anyio.to_thread.run_sync(about.missing)
    if missing is not None:
        yield Finding("reachable", "failed", f"{missing}; vtoken init makes a store")
        return
    backend = manager.backend if url is None else create_backend(url, **about.open_options)
    is_open = False
    keyring = Keyring(manager.settings.secret, manager.settings.previous_secrets)
    async for finding in _open_and_examine(backend, about, keyring.secret_ids, deep):
        is_open = is_open or (finding.name, finding.state) == ("reachable", "ok")
        yield finding
    if is_open:
        for finding in await anyio.to_thread.run_sync(about.after_closing):
            yield finding


def _configuration(store: Store, manager: TokenManager) -> Finding:
    file = None
    if store.managers_path() is None:
        file = os.environ.get("VTOKEN_CONFIG") or file_in(Path.cwd())
    return Finding("configuration", "ok", f"{store.shown(manager)}{f', {file}' if file else ''}")


async def _open_and_examine(
    backend: TokenBackend, about: Diagnostics, secret_ids: Sequence[str], deep: bool
) -> AsyncGenerator[Finding]:
    try:
        await backend.open()
    except BackendError as error:
        yield _failed_to_open(error)
        return
    try:
        yield Finding("reachable", "ok", "")
        yield Finding("schema", "ok", "known to this version, with the indexes that it needs")
        yield Finding("integrity", "ok", about.integrity)
        for name, examine in (
            ("answers", _answers),
            ("tokens", _tokens),
            ("writable", _writable),
            ("made in time", _newest),
            ("secrets", partial(_secrets_of_the_newest, secret_ids)),
        ):
            yield await _finding(name, examine, backend)
        if deep:
            yield await _finding("every token", partial(_every_token, secret_ids), backend)
    finally:
        with anyio.CancelScope(shield=True):
            await backend.close()


async def _finding(name: str, examine: _Examine, backend: TokenBackend) -> Finding:
    try:
        state, detail = await examine(backend)
    except BackendError as error:
        return Finding(name, "failed", f"{type(error).__name__}: {error}")
    return Finding(name, state, detail)


async def _answers(backend: TokenBackend) -> tuple[FindingState, str]:
    began = time.perf_counter()
    await backend.ping()
    return "ok", f"in {(time.perf_counter() - began) * 1000:.1f} ms"


async def _tokens(backend: TokenBackend) -> tuple[FindingState, str]:
    began = time.perf_counter()
    rows = await backend.count(milliseconds(utc_now()))
    took = time.perf_counter() - began
    total, active = sum(row.total for row in rows), sum(row.active for row in rows)
    return "ok", f"{total} stored, {active} of them active; counted in {took * 1000:.0f} ms"


async def _writable(backend: TokenBackend) -> tuple[FindingState, str]:
    """A durable write and its undoing, on a budget that nobody else has."""
    now = milliseconds(utc_now())
    began = time.perf_counter()
    await backend.spend((Spend(budget=_PROBE, limit=1, window=1, max_window=1),), now)
    took = time.perf_counter() - began
    await backend.reset(_PROBE.object, (_PROBE.name,))
    return "ok", f"a durable write took {took * 1000:.1f} ms"


async def _newest(backend: TokenBackend) -> tuple[FindingState, str]:
    """A host that issues tokens has a clock of its own, by which tokens end too early or too late
    elsewhere."""
    newest = await backend.find(Match(), 1)
    ahead = newest[0].created_at - milliseconds(utc_now()) if newest else 0
    if ahead > CLOCK_TOLERANCE * 1000:
        return (
            "warning",
            f"the newest token is {ahead / 1000:.0f} s in the future: clocks differ between hosts,"
            " or it was issued with a test's clock",
        )
    return "ok", "no token is from the future"


async def _secrets_of_the_newest(
    secret_ids: Sequence[str], backend: TokenBackend
) -> tuple[FindingState, str]:
    """A process with another secret than the rest issues tokens that nobody else finds."""
    count = Counter(_keys_by_secret(await backend.find(Match(), _NEWEST), secret_ids))
    if not count["unknown"]:
        return "ok", "those of the newest tokens are configured; --deep looks at all"
    return "warning", f"of the newest tokens, {_unknown(count)}"


async def _every_token(secret_ids: Sequence[str], backend: TokenBackend) -> tuple[FindingState, str]:
    done = 0
    count = Counter[str]()
    with progress("reading", sum(row.total for row in await backend.count(0))) as bar:
        async for tokens in pages(backend):
            done += len(tokens)
            count.update(_keys_by_secret(tokens, secret_ids))
            bar(done)
    told = [f"{done} read"]
    if count["unknown"]:
        told.append(_unknown(count))
    if count["previous"]:
        told.append(f"{count['previous']} valid ones still need a previous secret")
    elif len(secret_ids) > 1:
        told.append("none needs a previous secret any more")
    return "warning" if count["unknown"] else "ok", "; ".join(told)


def _keys_by_secret(tokens: Iterable[StoredToken], secret_ids: Sequence[str]) -> Iterator[str]:
    """For each valid token whether its keys were made with a ``"previous"`` secret or with an ``"unknown"``
    one, that is not configured."""
    now = milliseconds(utc_now())
    for token in tokens:
        made_with = {key.secret_id for key in token.keys if key.expires_at >= now} - {"", *secret_ids[:1]}
        if is_valid(token, now) and made_with:
            yield "unknown" if made_with - set(secret_ids) else "previous"


def _unknown(count: Counter[str]) -> str:
    number = count["unknown"]
    were = "one was" if number == 1 else "ones were"
    return f"{number} valid {were} made with a secret that is not configured"


def _failed_to_open(error: BackendError) -> Finding:
    if isinstance(error, BackendUnavailable):
        return Finding("reachable", "failed", str(error))
    return Finding("integrity" if isinstance(error, CorruptStore) else "schema", "failed", str(error))


def _text(findings: list[Finding]) -> Text:
    text = Text()
    for number, (name, state, detail) in enumerate(findings):
        text.append("\n" * bool(number))
        text.append(f"{state:<8}", style=_STYLES[state])
        text.append(f"{name:<16}", style="bold")
        text.append(printable(detail))
    return text
