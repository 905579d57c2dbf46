"""The commands ``list`` and ``show``: tokens as they are stored, without their keys."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from vtoken.backend import PRETENDED, Match, StoredToken, TokenBackend
from vtoken.cli.options import AnySlug, AnySubjectText, Store, any_subject_of, checked_slug
from vtoken.cli.output import Result, pairs, printable, relative, state_of, token_data, token_rows, uses_of
from vtoken.inputs import MAX_NAME_BYTES, check_count, check_text
from vtoken.manager import utc_now
from vtoken.subject import ContentTypes
from vtoken.token import VerificationToken, loaded

_STORE = Store()  # the default of the shared options; it is frozen


async def list_(
    subject: AnySubjectText | None = None,
    /,
    *,
    slug: AnySlug = None,
    limit: Annotated[int, Parameter(help="How many tokens are listed at most.")] = 20,
    store: Store = _STORE,
) -> Result:
    """List tokens, newest first: of an object, of all objects of a content type, or of the whole store."""
    check_count("--limit", limit)
    content_type, object_id = None, None
    if subject is not None:
        content_type, object_id = ContentTypes().resolve(any_subject_of(subject))
    match = Match(content_type=content_type, object_id=object_id, slug=checked_slug(slug))
    async with store.opened() as manager:
        found = [loaded(stored) for stored in await _newest(manager.backend, match, limit + 1)]
    now = utc_now()
    shown, more = found[:limit], len(found) > limit
    data = {"tokens": [{"state": state_of(token, now), **token_data(token)} for token in shown], "more": more}
    return Result(data, tokens_table(shown, now, more=more))


async def _newest(backend: TokenBackend, match: Match, count: int) -> list[StoredToken]:
    """The newest matching tokens, without the records of addresses that nobody has."""
    found: list[StoredToken] = []
    after: str | None = None
    while len(found) < count:
        page = await backend.find(match, count, after)
        found += [token for token in page if token.content_type != PRETENDED]
        if len(page) < count:
            break
        after = page[-1].id
    return found[:count]


async def show(
    token_id: Annotated[str, Parameter(name="ID", help="The token's public id.")],
    /,
    *,
    store: Store = _STORE,
) -> Result:
    """Show one token, whatever its state. Exit status 1: no token has this id."""
    check_text("ID", token_id, MAX_NAME_BYTES)
    async with store.opened() as manager:
        token = await manager.get(token_id)
    if token is None:
        return Result({"found": False}, "no token has this id", 1)
    now = utc_now()
    state = state_of(token, now)
    data = {"found": True, "state": state, **token_data(token)}
    return Result(data, pairs([("state", state), *token_rows(token, now)]))


def tokens_table(tokens: Sequence[VerificationToken], now: datetime, *, more: bool = False) -> Table | str:
    """Tokens for people. Where the terminal is narrow, subjects and slugs are folded; an id never is.

    Args:
        tokens: in the order in which they are shown.
        now: the time.
        more: whether there are more of them.
    """
    if not tokens:
        return "no tokens"
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("id", "subject", "slug", "state", "created", "expires"):
        may_fold = name in ("subject", "slug")
        table.add_column(name, no_wrap=not may_fold, overflow="fold", min_width=None if may_fold else 0)
    table.columns[0].min_width = max(len(token.id) for token in tokens)
    tells_uses = any(token.uses or token.max_uses != 1 for token in tokens)
    if tells_uses:
        table.add_column("used", min_width=8)
    for token in tokens:
        table.add_row(
            Text(token.id),
            Text(printable(f"{token.content_type}:{token.object_id}")),
            Text(printable(token.slug or "(none)")),
            state_of(token, now),
            relative(token.created_at, now),
            "never" if token.expires_at is None else relative(token.expires_at, now),
            *([_used(token, now)] if tells_uses else []),
        )
    if more:
        table.caption, table.caption_justify = "There are more: see --limit.", "left"
    return table


def _used(token: VerificationToken, now: datetime) -> str:
    """How often a token was used, where that may be several times, and when the last time was."""
    parts = [] if token.max_uses == 1 else [uses_of(token)]
    if token.used_at is not None:
        parts.append(relative(token.used_at, now))
    return ", ".join(parts)
