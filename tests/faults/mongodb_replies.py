"""Replies of a MongoDB server that are lost after the command was done, and commands that it fails."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any, Final

from tests.servers import Mongod, start_mongod, with_database

from .load import Figures, Load
from .mongodb_load import MongoDBLoad
from .mongodb_proxy import proxy
from .planted import ClaimsTheUnknown, DeniesTheUnknown

_WRITES: Final = ("insert", "update", "findAndModify", "delete")
FAILURES: Final[dict[str, dict[str, Any]]] = {
    "connections closed": {"closeConnection": True, "failCommands": [*_WRITES, "find"]},
    "writes not replicated": {
        "writeConcernError": {"code": 64, "errmsg": "waiting for replication timed out"},
        "failCommands": [*_WRITES],
    },
}
"""By what they are: data of the server's fail point ``failCommand``."""
_SHARE: Final = 0.2
"""Of the commands, those that are struck."""
_STEPS: Final = 8
"""Few with the same subjects, as each one may hide what became of the one before."""
_MOST: Final = 20
"""So often a fault may strike until it has fired, or has shown a planted bug."""


def lost(long: bool) -> None:
    """Replies lost, and the server's own fail points, on a standalone server and on a replica set."""
    times = 20 if long else 2
    for replica_set in ("", "vtoken"):
        with start_mongod(replica_set) as server:
            print("replica set:" if replica_set else "standalone:")
            lose_and_fail(server, times)
    with start_mongod() as server:
        find_planted(server)


def lose_and_fail(server: Mongod, times: int) -> None:
    """Each fault so many times."""
    asyncio.run(lose_replies(server, times)).report()
    for failure in FAILURES:
        asyncio.run(fail_commands(server, failure, times)).report()


def find_planted(server: Mongod) -> None:
    """Bugs that the faults must show."""
    denied = asyncio.run(lose_replies(server, _MOST, make=DeniesTheUnknown))
    denied.report_planted("an unknown use or change is denied")
    claimed = asyncio.run(fail_commands(server, "connections closed", _MOST, make=ClaimsTheUnknown))
    claimed.report_planted("an unknown use or change is claimed")


async def lose_replies(server: Mongod, times: int, **options: Any) -> Figures:
    """Lose the replies to some writes: the server has done them, and the client hears nothing."""
    chance = random.Random(2030)  # noqa: S311  # which replies
    loses = False

    async def fault() -> None:
        nonlocal loses
        loses = True
        await load.acknowledged(_STEPS)
        load.struck()
        loses = False
        figures.fired = way.lost.total()

    async with proxy(server.port, lambda name: loses and name in _WRITES and chance.random() < _SHARE) as way:
        url = f"mongodb://127.0.0.1:{way.port}/?directConnection=true"
        async with MongoDBLoad(with_database(url, "replies"), **options) as load:
            figures = Figures("replies lost", load)
            await _strike(figures, load, times, fault, bool(options))
    figures.more = f", {dict(way.lost)}"
    return figures


async def fail_commands(server: Mongod, failure: str, times: int, **options: Any) -> Figures:
    """Have the server fail some commands: before they are done, or when they were done but not replicated."""
    point = {"configureFailPoint": "failCommand"}

    async def fault() -> None:
        mode = {"activationProbability": _SHARE}
        before = admin.command(point | {"mode": mode, "data": FAILURES[failure]})["count"]
        await load.acknowledged(_STEPS)
        load.struck()
        figures.fired += admin.command(point | {"mode": "off"})["count"] - before

    with server.direct_client() as client:
        admin = client.admin
        async with MongoDBLoad(with_database(server.url, "failures"), **options) as load:
            figures = Figures(failure, load)
            await _strike(figures, load, times, fault, bool(options))
    return figures


async def _strike(
    figures: Figures, load: Load, times: int, fault: Callable[[], Awaitable[None]], is_planted: bool
) -> None:
    while load.strikes < times or (not figures.fired and load.strikes < _MOST):
        await load.strike(_STEPS, fault)
        await figures.check()
        if is_planted and figures.violations:
            return
