"""Killed servers, and fail-overs with and without writes that were not replicated, under a MongoDB store."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from tests.servers import Mongod, ReplicaSet, start_mongod, with_database

from .load import Figures
from .mongodb_load import DRIVERS, Impatient, MongoDBLoad

SLOW_JOURNAL: Final = ("--journalCommitInterval", "500")
"""Milliseconds (the default is 100), so that a write that does not wait for the journal is likely lost."""
_CHANCE: Final = random.Random(2030)  # noqa: S311  # moments


def crash(long: bool) -> None:
    """SIGKILL for a standalone server under load, and the same files served again."""
    with start_mongod(args=SLOW_JOURNAL) as server:
        asyncio.run(kill_servers(server, 20 if long else 2)).report()
        asyncio.run(kill_servers(server, 5, durable=False)).report_planted("durable=False")


def failover(long: bool) -> None:
    """SIGKILL for the primary of a replica set under load."""
    with ReplicaSet() as replica_set:
        replica_set.start()
        asyncio.run(kill_primaries(replica_set, 20 if long else 1)).report()
        if long:
            asyncio.run(hang_primaries(replica_set, 5)).report()
        asyncio.run(kill_primaries(replica_set, 15, durable=False)).report_planted("durable=False")


def rollback(long: bool) -> None:
    """Writes that no secondary gets, and then SIGKILL for the primary."""
    with ReplicaSet() as replica_set:
        replica_set.start()
        asyncio.run(lose_writes(replica_set, 5 if long else 1)).report()
        asyncio.run(lose_writes(replica_set, 1, durable=False)).report_planted("durable=False")


async def kill_servers(server: Mongod, kills: int, **options: Any) -> Figures:
    """Kill a standalone server so many times."""

    async def fault() -> None:
        load.struck()
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        figures.fired += 1

    async with MongoDBLoad(with_database(server.url, _name(options)), **options) as load:
        figures = Figures("kills of a standalone server", load)
        for _ in range(kills):
            await load.strike(_CHANCE.randrange(20, 60), fault)
            await figures.check()
            if options and figures.violations:
                break  # a planted bug, and it was found
    return figures


async def kill_primaries(replica_set: ReplicaSet, times: int, **options: Any) -> Figures:
    """Kill a primary so many times; before the next time it comes back as a secondary."""
    return await _take_away(replica_set, "kills of a primary", Mongod.kill, times, **options)


async def hang_primaries(replica_set: ReplicaSet, times: int) -> Figures:
    """Have a primary hang so many times; once another one has its place, it goes on where it was."""
    return await _take_away(replica_set, "primaries that hung", Mongod.suspend, times)


async def _take_away(
    replica_set: ReplicaSet, title: str, end: Callable[[Mongod], None], times: int, **options: Any
) -> Figures:
    async def fault() -> None:
        primary = await asyncio.to_thread(replica_set.primary)
        gone.append(primary)
        load.struck()
        await asyncio.to_thread(end, primary)

    gone: list[Mongod] = []
    async with MongoDBLoad(with_database(replica_set.url, _name(options)), **options) as load:
        figures = Figures(title, load)
        first = replica_set.status()["term"]
        for _ in range(times):
            await asyncio.to_thread(replica_set.mend)
            await load.strike(_CHANCE.randrange(20, 60), fault)
            figures.fired += await asyncio.to_thread(replica_set.primary) is not gone[-1]
            gone[-1].resume()
            await figures.check()
            if options and figures.violations:
                break  # a planted bug, and it was found
        figures.more = f", {replica_set.status()['term'] - first} elections"
    return figures


async def lose_writes(replica_set: ReplicaSet, times: int, **options: Any) -> Figures:
    """So many times let the primary alone have the latest writes, and kill it."""
    alone = answered = 0

    async def fault() -> None:
        nonlocal alone, answered
        primary = await asyncio.to_thread(replica_set.primary)
        killed.append(primary)
        impatient = [Impatient(load, driver) for driver in DRIVERS]
        for each in impatient:
            await each.issue()
        others = [member for member in replica_set.members if member is not primary]
        await asyncio.to_thread(_replicate, others, False)
        for each in impatient:
            each.use()
        alone += await asyncio.to_thread(_unreplicated, primary)
        answered += sum(await asyncio.gather(*(each.use_again() for each in impatient)))
        if load.strikes % 2 == 0:  # every other time nobody dies before the server has given up
            for each in impatient:
                await each.end()
        load.struck()
        await asyncio.to_thread(primary.kill)
        await asyncio.to_thread(_replicate, others, True)
        for each in impatient:
            await each.end()

    killed: list[Mongod] = []
    async with MongoDBLoad(with_database(replica_set.url, _name(options)), **options) as load:
        figures = Figures("roll-backs", load)
        for _ in range(times):
            await asyncio.to_thread(replica_set.mend)
            await load.strike(_CHANCE.randrange(20, 60), fault)
            await figures.check()
            if answered:
                figures.violations.append(f"acknowledged: {answered} uses that the primary alone had")
            before = _rolled_back(killed[-1])
            await asyncio.to_thread(replica_set.mend)
            figures.fired += _rolled_back(killed[-1]) > before
        figures.more = f", {alone} writes that the primary alone had"
    return figures


def _name(options: dict[str, Any]) -> str:
    return "_".join(["faults", *options])


def _replicate(members: Sequence[Mongod], on: bool) -> None:
    """Let secondaries take over what the primary writes, or not. They go on to talk with it."""
    for member in members:
        with member.direct_client() as client:
            point = {"configureFailPoint": "stopReplProducer", "mode": "off" if on else "alwaysOn"}
            client.admin.command(point)


def _rolled_back(member: Mongod) -> int:
    """How many files a member has of what it rolled back."""
    return sum(1 for _ in member.dbpath.glob("rollback/**/*.bson"))


def _unreplicated(primary: Mongod) -> int:
    """How many writes are on the primary alone, once there are some and no more are coming, or many."""
    counts = [0]
    deadline = time.monotonic() + 30
    with primary.direct_client() as client:
        while not counts[-1] or (len(set(counts[-5:])) > 1 and counts[-1] < 200):
            committed = client.admin.command("replSetGetStatus")["optimes"]["lastCommittedOpTime"]["ts"]
            later = {"ts": {"$gt": committed}, "op": {"$in": ["i", "u"]}}
            counts.append(client["local"]["oplog.rs"].count_documents(later))
            assert time.monotonic() < deadline, "nothing is on the primary alone"
            time.sleep(0.05)
    return counts[-1]
