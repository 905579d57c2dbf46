"""The commands ``copy`` and ``import``: tokens from elsewhere."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TextIO
from zoneinfo import ZoneInfo

from cyclopts import Parameter

from vtoken.cli.options import Output, Store, require_store
from vtoken.cli.output import Result, pairs
from vtoken.cli.terminal import progress
from vtoken.config import create_backend
from vtoken.errors import ConfigurationError, InvalidInput
from vtoken.inputs import milliseconds
from vtoken.manager import TokenManager, utc_now
from vtoken.migrate import Copied, DumpReader, check_secret, import_tokens
from vtoken.migrate import copy as copy_tokens

INCOMPLETE = 1
_STORE = Store()  # the default of the shared options; it is frozen
_OUTPUT = Output()


async def copy(
    source: Annotated[str, Parameter(name="SRC", help="The URL of the store to copy from.")],
    destination: Annotated[str, Parameter(name="DST", help="The URL of the store to copy to.")],
    /,
    *,
    output: Output = _OUTPUT,
) -> Result:
    """Copy every token from one store to another, then compare both. Exit status 1: they are not equal.

    Interrupted, it is started again and goes on where it was. Beside live traffic, run it once more with the
    application stopped: what was used or deactivated meanwhile then ends in the copy, too. What ended and was
    purged in DST since an earlier copy is not taken again.

    Budgets of attempts and cooldowns are not copied, and consume ids are forgotten.
    """
    del output  # how it is shown is the application's business
    await require_store(source)
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
    rows += [
        (name, count)
        for name, count in (
            ("taken before, not again", copied.taken_before),
            ("id or key taken, skipped", copied.refused),
            ("ended since", copied.ended),
        )
        if count
    ]
    rows += [("in the source", copied.tokens), ("missing", copied.missing), ("different", copied.different)]
    if copied.others:
        rows.append(("others there", copied.others))
    explained = copied.taken_before + copied.refused
    remedy = "no: stop the application and run it again"
    if copied.missing and copied.missing <= explained and not copied.different:
        remedy = "no: the missing ones are those that were not taken"
    rows += [
        ("source SHA-256", copied.source_digest),
        ("copies' SHA-256", copied.destination_digest),
        ("equal", "yes" if copied.is_complete else remedy),
        ("not copied", "budgets of attempts and cooldowns, consume ids: see vtoken copy --help"),
    ]
    return rows


async def import_(
    file: Annotated[Path, Parameter(name="FILE", help="What dumpdata wrote: JSON or JSON lines.")],
    /,
    *,
    content_types: Annotated[
        str | None,
        Parameter(
            help="Names by primary key, such as 7=auth.user,9=shop.order: for a dump that has only numbers."
        ),
    ] = None,
    timezone: Annotated[
        str | None, Parameter(help="The zone of times without an offset, such as UTC or Europe/Berlin.")
    ] = None,
    source: Annotated[
        str | None,
        Parameter(
            help="A name of the application, where dumps of several are imported. Left out: the model's name."
        ),
    ] = None,
    dry_run: Annotated[
        bool, Parameter(negative="", show_default=False, help="Read and check the file, store nothing.")
    ] = False,
    store: Store = _STORE,
) -> Result:
    """Import the tokens of the Django application from its dumpdata; the plaintext keys become digests.

    The settings and policies say how, so that keys that people hold go on working: give it the application's
    own, by --manager. It says which tokens cannot be used with them. The whole file is checked before
    anything is stored. Interrupted, it is started again and goes on where it was. What was imported
    before and has ended and been purged since is not taken again.
    """
    made = store.made()
    reader = DumpReader(
        made.settings,
        made.policies,
        content_types=_names(content_types),
        timezone=_zone(timezone),
        now=milliseconds(utc_now()),
    )
    with _opened(file) as dump, progress("checking") as bar:
        count = 0
        for count, _ in enumerate(reader.tokens(dump), 1):
            if count % 500 == 0:
                bar(count)
    about, about_rows = _about(reader)
    if dry_run:
        return Result({"readable": count} | about, pairs([("readable", count), *about_rows]))
    with file.open("rb") as raw:
        digest = hashlib.file_digest(raw, "sha256").hexdigest()
    async with store.opened(may_make_it=True) as manager:
        await check_secret(manager.backend, reader.secret_ids)
        with _opened(file) as dump, progress("importing", count) as bar:
            imported = await import_tokens(
                manager.backend,
                reader.tokens(dump),
                source=source or ",".join(sorted(reader.models)),
                dump=digest,
                now=milliseconds(utc_now()),
                progress=bar,
            )
    rows: list[tuple[str, object]] = [("imported", imported.imported), ("there already", imported.skipped)]
    if imported.taken_before:
        rows.append(("taken before, not again", imported.taken_before))
    return Result(imported._asdict() | about, pairs([*rows, *about_rows]))


def _about(reader: DumpReader) -> tuple[dict[str, Any], list[tuple[str, object]]]:
    """What there is to say of the tokens of a dump: as JSON values, and as rows."""
    data: dict[str, Any] = {}
    rows: list[tuple[str, object]] = []
    if reader.secret_ids:
        data["secret_id"] = reader.secret_ids[0]
        rows.append(("digested with the secret", f"{reader.secret_ids[0]} (its id in the store)"))
    else:
        rows.append(("digested", "without a secret"))
    found = sorted(reader.useless.items())
    if found:
        data["useless"] = [{**useless._asdict(), "tokens": count} for useless, count in found]
    rows += [
        ("cannot be used", f"{count} with {f'the slug {slug}' if slug else 'no slug'}: {why}")
        for (slug, why), count in found
    ]
    return data, rows


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
            raise InvalidInput("--content-types: must be numbers and names, such as 7=auth.user,9=shop.order")
        names[int(number)] = name.strip()
    return names


def _zone(name: str | None) -> ZoneInfo | None:
    if name is None:
        return None
    with suppress(OSError, ValueError, KeyError):  # ZoneInfoNotFoundError is a KeyError
        return ZoneInfo(name)
    raise ConfigurationError("--timezone: must be the name of a time zone, such as UTC or Europe/Berlin")
