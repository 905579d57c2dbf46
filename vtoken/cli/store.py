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
from vtoken.registry import url_of
from vtoken.stats import SlugStats, Stats

_STORE = Store()  # the default of the shared options; it is frozen
_NUMBERS = ("total", "active", "expired", "used", "inactive")


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
        url = store.configuration().url if store.managers_path() is None else url_of(store.made().backend)
        statements = diagnostics_of(url or "").ddl()
        return Result({"statements": statements}, Text(";\n".join([*statements, ""])))
    async with store.opened(may_make_it=True) as manager:
        pass
    data = {"ready": True, "url": store.address(manager)}
    return Result(data, pairs([("ready", store.shown(manager))]))


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
    for name in _NUMBERS:
        table.add_column(name, justify="right", no_wrap=True)
    for slug, row in slugs:
        label = Text("(none)" if slug is None else printable(slug))
        table.add_row(label, *[str(getattr(row, name)) for name in _NUMBERS])
    table.add_section()
    table.add_row("all", *[str(getattr(found, name)) for name in _NUMBERS], style="bold")
    return table
