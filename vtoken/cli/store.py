"""Commands about a whole store."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from vtoken.cli.options import Store
from vtoken.cli.output import Result, pairs, printable
from vtoken.stats import SlugStats, Stats


async def init(*, store: Store = Store()) -> Result:  # noqa: B008  # frozen: cyclopts' form
    """Make the store, with its tables and indexes; one that is there already is checked and left as it is."""
    async with store.manager():
        url = store.shown()
    return Result({"ready": True, "url": url}, pairs([("ready", url)]))


async def stats(*, store: Store = Store()) -> Result:  # noqa: B008  # as above
    """Count the tokens, in all and by slug."""
    async with store.manager() as manager:
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


async def config(*, store: Store = Store()) -> Result:  # noqa: B008  # as above
    """Print the effective configuration, secrets redacted. Exit status 2: it cannot work."""
    store.manager()  # finds what only the parts together show: a missing driver, a code without a secret
    data = store.configuration().describe()
    return Result(data, pairs(_flat("", data)))


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


def _flat(prefix: str, value: Any) -> list[tuple[str, object]]:
    """Nested tables as dotted names."""
    if isinstance(value, dict) and value:
        return [row for name, item in value.items() for row in _flat(f"{prefix}{name}.", item)]
    return [(prefix.rstrip("."), value if isinstance(value, str) else json.dumps(value))]
