"""The command ``purge``: once, as a service, or only counted."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Coroutine
from contextlib import suppress
from datetime import timedelta
from typing import Annotated, Any

import anyio
from cyclopts import Parameter

from vtoken.backend import running_holds
from vtoken.cli.options import Store, Yes, duration
from vtoken.cli.output import Result, pairs, printable, say
from vtoken.cli.terminal import ask, progress
from vtoken.errors import InvalidInput
from vtoken.inputs import Duration, check_count, milliseconds, spelled
from vtoken.manager import TokenManager, utc_now
from vtoken.migrate import pages
from vtoken.sweeper import Sweeper

_STORE = Store()  # the default of the shared options; it is frozen
_KEEP_AS_A_SERVICE = timedelta(hours=24)


def purge(
    *,
    batch_size: Annotated[int, Parameter(help="How many tokens are deleted in one step.")] = 1000,
    keep: Annotated[
        str | None,
        Parameter(
            help="Tokens that ended no longer ago than this stay, such as 24h. Left out: 0s; with"
            " --every, 24h."
        ),
    ] = None,
    every: Annotated[
        str | None,
        Parameter(help="Go on, and purge again every so often, such as 10m, until SIGTERM or Ctrl-C."),
    ] = None,
    dry_run: Annotated[
        bool, Parameter(negative="", show_default=False, help="Delete nothing: count what would be deleted.")
    ] = False,
    yes: Yes = False,
    store: Store = _STORE,
) -> Coroutine[Any, Any, Result]:
    """Delete the tokens that are used, deactivated or expired, and spent budgets; valid tokens stay.

    It asks on a terminal. Elsewhere (cron, a service) it does not: what it deletes is of no use any more.
    """
    period = None if every is None else duration("--every", every)
    kept = timedelta(0) if period is None else _KEEP_AS_A_SERVICE
    kept = kept if keep is None else duration("--keep", keep)
    check_count("--batch-size", batch_size)
    if dry_run:
        if period is not None:
            raise InvalidInput("--dry-run counts once: leave out --every")
        return _count(store, kept)
    manager = store.made()
    ask(f"Delete what has ended in {store.shown(manager)}?", yes, without_terminal=True)
    if period is None:
        return _once(store, manager, batch_size, kept)
    if period <= timedelta(0):
        raise InvalidInput("--every: must be more than 0")
    return _serve(store, manager, batch_size, kept, period)


async def _once(store: Store, manager: TokenManager, batch_size: int, keep: timedelta) -> Result:
    async with store.opened(manager):
        with progress("purging") as bar:
            count = await manager.purge(batch_size, keep, bar)
    return _purged(count)


async def _count(store: Store, keep: timedelta) -> Result:
    """What a purge would delete, by the condition of ``TokenBackend.purge``. The whole store is read."""
    async with store.opened() as manager:
        total = (await manager.stats()).total
        now = milliseconds(utc_now())
        before = now - milliseconds_of(keep)
        by_slug: Counter[str] = Counter()
        done = 0
        with progress("counting", total) as bar:
            async for tokens in pages(manager.backend):
                by_slug.update(t.slug for t in tokens if t.ends_at < before and not running_holds(t, now))
                done += len(tokens)
                bar(done)
    count = by_slug.total()
    rows = [(printable(slug) or "(none)", number) for slug, number in sorted(by_slug.items())]
    return Result(
        {"would_purge": count, "by_slug": dict(sorted(by_slug.items()))},
        pairs([*rows, ("would be purged", count)]),
    )


async def _serve(
    store: Store, manager: TokenManager, batch_size: int, keep: timedelta, every: timedelta
) -> Result:
    """Purge until a signal comes. Each step is atomic, so it ends at once."""
    total = 0

    with anyio.CancelScope() as until_a_signal:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(NotImplementedError):  # Windows: Ctrl-C interrupts as always
                loop.add_signal_handler(number, until_a_signal.cancel)
        async with store.opened(manager):

            async def purge_and_tell(limit: int, kept: Duration) -> None:
                nonlocal total
                count = await manager.purge(limit, kept)
                total += count
                if count:
                    say({"purged": count}, f"purged {count}", store.json)

            period, kept = spelled(milliseconds_of(every)), spelled(milliseconds_of(keep))
            say({"every": every.total_seconds()}, f"purging every {period}, keeping {kept}", store.json)
            await purge_and_tell(batch_size, keep)
            async with Sweeper(purge_and_tell, every, keep, batch_size, anyio.sleep):
                await anyio.sleep_forever()
    return _purged(total)


def milliseconds_of(duration: timedelta) -> int:
    """A duration in whole milliseconds."""
    return duration // timedelta(milliseconds=1)


def _purged(count: int) -> Result:
    return Result({"purged": count}, pairs([("purged", count)]))
