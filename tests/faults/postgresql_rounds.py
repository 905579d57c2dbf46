"""Killed servers, killed sessions, and fail-overs to a standby, under a PostgreSQL store.

The role's default is that a commit waits for nothing. So it is the backend's own setting that keeps what was
acknowledged.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from functools import partial
from typing import Any, Final
from urllib.parse import quote

from tests.postgresql_servers import Pair, PostgreSQL
from vtoken_backends.postgresql import PostgreSQLBackend
from vtoken_backends.postgresql.statements import Statements

from .load import Figures, Load

SLOW_LOG: Final = ("wal_writer_delay=10000", "wal_writer_flush_after=1GB")
"""So that a commit that does not wait for the log is likely lost."""
_NAME: Final = "vtoken-load"
_CHANCE: Final = random.Random(2030)  # noqa: S311  # moments


class TrustsTheRole(PostgreSQLBackend):
    """A planted bug: it leaves it to the role's default how durable a write is."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        vars(self)["_statements"] = Statements(self._schema, is_tuned=False)


def crash(long: bool) -> None:
    """SIGKILL for all processes of a server under load, and for one of its sessions."""
    with PostgreSQL(*SLOW_LOG) as server:
        asyncio.run(kill_servers(server, 20 if long else 2)).report()
        asyncio.run(kill_sessions(server, 20 if long else 2)).report()
        asyncio.run(kill_servers(server, 5, TrustsTheRole)).report_planted("the role's synchronous_commit")


def failover(long: bool) -> None:
    """SIGKILL for a primary under load, every other time amid writes that its standby does not have."""
    with Pair(*SLOW_LOG) as pair:
        asyncio.run(kill_primaries(pair, 10 if long else 2)).report()
        asyncio.run(kill_primaries(pair, 1, TrustsTheRole)).report_planted("the role's synchronous_commit")


async def kill_servers(
    server: PostgreSQL, kills: int, make: type[PostgreSQLBackend] = PostgreSQLBackend
) -> Figures:
    """Kill a server so many times, and start it again on the same files."""

    async def fault() -> None:
        load.struck()
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        figures.fired += 1

    await _make_tables(server.url)
    async with _load(server.url, make, "off") as load:
        figures = Figures("kills of a server", load)
        for _ in range(kills):
            await load.strike(_CHANCE.randrange(20, 60), fault)
            await figures.check()
            if make is not PostgreSQLBackend and figures.violations:
                break  # a planted bug, and it was found
    return figures


async def kill_sessions(server: PostgreSQL, kills: int) -> Figures:
    """Kill one process that serves a connection, as a system does that is out of memory."""

    async def fault() -> None:
        load.struck()
        await asyncio.to_thread(server.kill_session, _NAME)
        figures.fired += 1

    async with _load(server.url, PostgreSQLBackend, "off") as load:
        figures = Figures("kills of a session", load)
        for _ in range(kills):
            await load.strike(_CHANCE.randrange(20, 60), fault)
            await figures.check()
    return figures


async def kill_primaries(
    pair: Pair, times: int, make: type[PostgreSQLBackend] = PostgreSQLBackend
) -> Figures:
    """Kill a primary so many times and promote its standby; it then becomes the standby of the other."""
    alone = 0

    async def fault() -> None:
        nonlocal alone
        if load.strikes % 2 == 1:
            [(sender,)] = await asyncio.to_thread(pair.primary.ask, "SELECT pid FROM pg_stat_replication")
            os.kill(sender, signal.SIGSTOP)
            if make is PostgreSQLBackend:
                alone += await asyncio.to_thread(_waiting_for_standby, pair.primary)
            else:
                await load.acknowledged(5)
        load.struck()
        await asyncio.to_thread(pair.fail_over)
        figures.fired += 1

    async with _load(pair.url, make, "local") as load:
        figures = Figures("fail-overs", load)
        for _ in range(times):
            await asyncio.to_thread(pair.mend)
            await load.strike(_CHANCE.randrange(20, 60), fault)
            await figures.check()
        figures.more = f", {alone} commits that the primary alone had"
    return figures


def _load(url: str, make: type[PostgreSQLBackend], role_default: str) -> Load:
    """Actors of two applications."""
    options = quote(f"-c synchronous_commit={role_default}")
    url = f"{url}?application_name={_NAME}&options={options}"
    return Load(
        {name: partial(make.from_url, url) for name in ("one", "other")},
        partial(PostgreSQLBackend.from_url, url),
    )


async def _make_tables(url: str) -> None:
    """Make the store by a write that waits for the log, so that no planted bug loses the tables."""
    backend = PostgreSQLBackend.from_url(url)
    await backend.open()
    await backend.note("made", "by a round", replace=True)
    await backend.close()


def _waiting_for_standby(primary: PostgreSQL) -> int:
    """How many commits wait for the standby, once there are some."""
    while True:
        [(count,)] = primary.ask("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
        if count:
            return int(count)
