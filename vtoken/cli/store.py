"""The commands ``init``, ``stats`` and ``ping``: about a whole store."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from vtoken.cli.options import Store
from vtoken.cli.output import Result, pairs, printable
from vtoken.diagnostics import diagnostics_of
from vtoken.stats import SlugStats, Stats

_STORE = Store()  # the default of the shared options; it is frozen


async def init(
    *,
    sql: Annotated[
        bool,
        Parameter(
            negative="",
            show_default=False,
            help="Print the statements that make the tables, and connect to nothing.",
        ),
    ] = False,
    store: Store = _STORE,
) -> Result:
    """Make the store, with its tables and indexes; one that is there already is checked and left as it is."""
    if sql:
        statements = diagnostics_of(store.configuration().url).ddl()
        return Result({"statements": statements}, Text(";\n".join([*statements, ""])))
    async with store.opened(may_make_it=True):
        url = store.shown()
    return Result({"ready": True, "url": url}, pairs([("ready", url)]))


async def ping(*, store: Store = _STORE) -> Result:
    """Ask the store for an answer, and tell how long it took: for health probes."""
    async with store.opened() as manager:
        seconds = await manager.ping()
    return Result({"seconds": seconds}, pairs([("answered in", f"{seconds * 1000:.1f} ms")]))


async def stats(*, store: Store = _STORE) -> Result:
    """Count the tokens, in all and by slug."""
    async with store.opened() as manager:
        found = await manager.stats()
    slugs = sorted(found.by_slug.items(), key=lambda item: item[0] or "")
    data = {
        "total": found.total,
        "active": found.active,
        "expired": found.expired,
        "used": found.used,
        # "" for tokens without a slug: no real slug is empty.
        "by_slug": {slug or "": asdict(numbers) for slug, numbers in slugs},
    }
    return Result(data, _stats_table(found, slugs))


def _stats_table(found: Stats, slugs: list[tuple[str | None, SlugStats]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("slug", overflow="fold")
    for name in ("total", "active", "expired", "used"):
        table.add_column(name, justify="right", no_wrap=True)
    for slug, row in slugs:
        label = Text("(none)" if slug is None else printable(slug))
        table.add_row(label, str(row.total), str(row.active), str(row.expired), str(row.used))
    table.add_section()
    table.add_row(
        "all", str(found.total), str(found.active), str(found.expired), str(found.used), style="bold"
    )
    return table
