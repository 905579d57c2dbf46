"""The commands ``list`` and ``show``: tokens as they are stored, without their keys."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from vtoken.backend import Match, StoredToken
from vtoken.cli.options import AnySubjectText, Store, any_subject_of
from vtoken.cli.output import Result, moment, pairs, printable, token_data, token_rows
from vtoken.inputs import MAX_NAME_BYTES, check_count, check_text, milliseconds
from vtoken.loaded import loaded, refusal
from vtoken.manager import utc_now
from vtoken.subject import ContentTypes


async def list_(
    subject: AnySubjectText | None = None,
    /,
    *,
    slug: Annotated[str | None, Parameter(help="Only this purpose. Left out: every one.")] = None,
    limit: Annotated[int, Parameter(help="At most so many.")] = 20,
    store: Store = Store(),  # noqa: B008  # frozen: the form in which cyclopts takes shared options
) -> Result:
    """List tokens, newest first: of an object, of all objects of a content type, or of the whole store."""
    check_count("--limit", limit)
    if slug is not None:
        check_text("--slug", slug, MAX_NAME_BYTES)
    content_type, object_id = None, None
    if subject is not None:
        content_type, object_id = ContentTypes().resolve(any_subject_of(subject))
    match = Match(content_type=content_type, object_id=object_id, slug=slug)
    async with store.manager() as manager:
        found = await manager.backend.find(match, limit + 1)
    now = milliseconds(utc_now())
    shown, more = found[:limit], len(found) > limit
    return Result({"tokens": [_data(token, now) for token in shown], "more": more}, _table(shown, now, more))


async def show(
    token_id: Annotated[str, Parameter(name="ID", help="The token's public id.")],
    /,
    *,
    store: Store = Store(),  # noqa: B008  # as above
) -> Result:
    """Show one token, whatever its state. Exit status 1: there is none of this id."""
    check_text("ID", token_id, MAX_NAME_BYTES)
    async with store.manager() as manager:
        found = await manager.backend.find(Match(id=token_id), 1)
    if not found:
        return Result({"found": False}, "no token has this id", 1)
    now = milliseconds(utc_now())
    rows = token_rows(loaded(found[0]))
    return Result({"found": True, **_data(found[0], now)}, pairs([("state", _state(found[0], now)), *rows]))


def _data(token: StoredToken, now: int) -> dict[str, Any]:
    return {"state": _state(token, now), **token_data(loaded(token))}


def _state(token: StoredToken, now: int) -> str:
    return refusal(token, now) or "valid"


def _table(tokens: list[StoredToken], now: int, more: bool) -> Table | str:
    if not tokens:
        return "no tokens"
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("id", "subject", "slug", "state", "created", "expires"):
        table.add_column(name, no_wrap=name != "subject", overflow="fold")
    for stored in tokens:
        token = loaded(stored)
        table.add_row(
            Text(token.id),
            Text(printable(f"{token.content_type}:{token.object_id}")),
            Text(printable(token.slug or "(none)")),
            _state(stored, now),
            moment(token.created_at),
            "never" if token.expires_at is None else moment(token.expires_at),
        )
    if more:
        table.caption, table.caption_justify = "There are more: see --limit.", "left"
    return table
