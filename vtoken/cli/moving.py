"""The commands ``copy`` and ``import``: tokens from elsewhere."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, TextIO
from zoneinfo import ZoneInfo

from cyclopts import Parameter

from vtoken.cli.options import Output, Store
from vtoken.cli.output import Result, pairs
from vtoken.cli.terminal import progress
from vtoken.config import create_backend
from vtoken.dumpdata import DumpReader
from vtoken.errors import ConfigurationError, InvalidInput
from vtoken.inputs import milliseconds
from vtoken.manager import TokenManager, utc_now
from vtoken.transfer import Copied, add
from vtoken.transfer import copy as copy_tokens

INCOMPLETE = 1


async def copy(
    source: Annotated[str, Parameter(name="SRC", help="The URL of the store to copy from.")],
    destination: Annotated[str, Parameter(name="DST", help="The URL of the store to copy to.")],
    /,
    *,
    output: Output = Output(),  # noqa: B008  # frozen: the form in which cyclopts takes shared options
) -> Result:
    """Copy every token from one store to another, then compare both. Exit status 1: they are not equal.

    Interrupted, it is started again and goes on where it was. Beside live traffic, run it once more with the
    application stopped: what was used or deactivated meanwhile then ends in the copy, too.

    Not copied is what no token carries. Budgets of attempts and cooldowns begin anew, and of tokens that
    overlap, using one no longer ends the other.
    """
    del output  # how it is shown is the application's business
    async with (
        TokenManager(create_backend(source)) as one,
        TokenManager(create_backend(destination)) as other,
    ):
        total = (await one.stats()).total
        with progress("copying and comparing", 2 * total) as bar:
            copied = await copy_tokens(one.backend, other.backend, progress=bar)
    data = {**copied._asdict(), "complete": copied.is_complete}
    return Result(data, pairs(_rows(copied)), 0 if copied.is_complete else INCOMPLETE)


def _rows(copied: Copied) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [("copied", copied.inserted), ("there already", copied.skipped)]
    if copied.ended:
        rows.append(("ended since", copied.ended))
    rows += [("in the source", copied.tokens), ("missing", copied.missing), ("different", copied.different)]
    if copied.others:
        rows.append(("others there", copied.others))
    rows += [
        ("source SHA-256", copied.source_digest),
        ("copies' SHA-256", copied.destination_digest),
        ("equal", "yes" if copied.is_complete else "no: stop the application and run it again"),
        ("not copied", "budgets of attempts and cooldowns, overlaps: see vtoken copy --help"),
    ]
    return rows


async def import_(
    file: Annotated[Path, Parameter(name="FILE", help="What dumpdata wrote: JSON or JSON lines.")],
    /,
    *,
    content_types: Annotated[
        str | None,
        Parameter(
            help="Names by primary key, e.g. 7=auth.user,9=shop.order: for a dump that has only numbers."
        ),
    ] = None,
    timezone: Annotated[
        str | None, Parameter(help="The zone of times without an offset, e.g. UTC or Europe/Berlin.")
    ] = None,
    dry_run: Annotated[
        bool, Parameter(negative="", show_default=False, help="Read and check the file, store nothing.")
    ] = False,
    store: Store = Store(),  # noqa: B008  # as above
) -> Result:
    """Import the tokens of the Django application from its dumpdata; the plaintext keys become digests.

    The settings and policies say how, so that keys that people hold go on working. The whole file is checked
    before anything is stored. Started again, it skips what is there.
    """
    found = store.configuration()
    reader = DumpReader(
        found.settings,
        found.policies,
        content_types=_names(content_types),
        timezone=_zone(timezone),
        now=milliseconds(utc_now()),
    )
    with _opened(file) as dump, progress("checking") as bar:
        count = 0
        for count, _ in enumerate(reader.tokens(dump), 1):
            if count % 500 == 0:
                bar(count)
    if dry_run:
        return Result({"readable": count}, pairs([("readable", count)]))
    async with store.manager() as manager:
        with _opened(file) as dump, progress("importing", count) as bar:
            added = await add(manager.backend, reader.tokens(dump), progress=bar)
    return Result(
        {"imported": added.inserted, "skipped": added.skipped},
        pairs([("imported", added.inserted), ("there already", added.skipped)]),
    )


def _opened(file: Path) -> TextIO:
    problem = "it is read twice, so it must be a file and no pipe"
    try:
        if file.is_file() or not file.exists():
            return file.open(encoding="utf-8-sig")
    except OSError as error:
        problem = error.strerror or type(error).__name__
    raise InvalidInput(f"FILE cannot be read: {problem}")


def _names(text: str | None) -> dict[int, str]:
    names: dict[int, str] = {}
    for part in filter(None, (text or "").split(",")):
        number, equals, name = part.partition("=")
        if not equals or not name.strip() or not number.strip().isdecimal():
            raise InvalidInput("--content-types: must be such as 7=auth.user,9=shop.order")
        names[int(number)] = name.strip()
    return names


def _zone(name: str | None) -> ZoneInfo | None:
    if name is None:
        return None
    with suppress(OSError, ValueError, KeyError):  # ZoneInfoNotFoundError is a KeyError
        return ZoneInfo(name)
    raise ConfigurationError("--timezone: must be the name of a time zone, e.g. UTC or Europe/Berlin")
