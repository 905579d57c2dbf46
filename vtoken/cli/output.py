"""How commands answer: a table for people or JSON for programs, and errors in one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from vtoken.policy import Policies
from vtoken.token import VerificationToken

_WIDE = 10_000


@dataclass(frozen=True, slots=True)
class Result:
    """A command's answer.

    Args:
        data: the answer as JSON values.
        text: the same for people; None where the command has printed its answer itself.
        status: the exit status.
    """

    data: Mapping[str, Any]
    text: RenderableType | None
    status: int = 0


def show(result: Result, as_json: bool) -> None:
    """Print an answer on standard output, unless the command has printed it already."""
    if result.text is None:
        return
    if as_json:
        print_json(result.data)
        return
    # Without a terminal nothing is cut or wrapped to a width that nobody has. Lines of text are left to the
    # terminal to wrap, so that a key can be copied in one piece; a table has to fold its own cells.
    console = Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)
    with console.capture() as captured:  # rich itself exits with status 1 when the reader has gone
        console.print(result.text, soft_wrap=not isinstance(result.text, Table))
    sys.stdout.write(captured.get())


def print_json(data: Mapping[str, Any]) -> None:
    """Print one line of JSON on standard output; ASCII, so that it survives any locale."""
    print(json.dumps(data))


def say(data: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Print a line at once, for who watches a long work or reads its log."""
    if as_json:
        print_json(data)
    else:
        print(printable(text))
    sys.stdout.flush()


def show_error(kind: str, message: str, as_json: bool, **data: Any) -> None:
    """Print one line on standard error."""
    line = printable(" ".join(message.split()))
    print(
        json.dumps({"error": kind, "message": line, **data}) if as_json else f"vtoken: {line}",
        file=sys.stderr,
    )


def printable(text: str) -> str:
    """Text whose control characters are escaped: an object id must not steer the operator's terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def pairs(rows: Sequence[tuple[str, object]]) -> Text:
    """Names and values, one a line."""
    width = max((len(name) for name, _ in rows), default=0)
    lines = Text()
    for number, (name, value) in enumerate(rows):
        lines.append("\n" * bool(number))
        lines.append(name.ljust(width), style="bold")
        lines.append(f"  {printable(str(value))}")
    return lines


def token_data(token: VerificationToken) -> dict[str, Any]:
    """A token as JSON values, without its key."""
    return {
        "id": token.id,
        "content_type": token.content_type,
        "object_id": token.object_id,
        "slug": token.slug,
        "created_at": iso(token.created_at),
        "expires_at": iso(token.expires_at),
        "code_expires_at": iso(token.code_expires_at),
        "is_active": token.is_active,
        "uses": token.uses,
        "max_uses": token.max_uses,
        "used_at": iso(token.used_at),
        "is_replay": token.is_replay,
        "extra_data": token.get_extra_data(),
    }


def token_rows(token: VerificationToken, now: datetime) -> list[tuple[str, object]]:
    """A token for people, without its key."""
    rows: list[tuple[str, object]] = [
        ("id", token.id),
        ("subject", f"{token.content_type}:{token.object_id}"),
        ("slug", "(none)" if token.slug is None else token.slug),
        ("created", when(token.created_at, now)),
        ("expires", "never" if token.expires_at is None else when(token.expires_at, now)),
    ]
    if token.code_expires_at is not None:
        rows.append(("code expires", when(token.code_expires_at, now)))
    if token.max_uses != 1 or token.uses:
        rows.append(("uses", uses_of(token)))
    if token.used_at is not None:
        rows.append(("used", when(token.used_at, now)))
    if token.extra_data is not None:
        rows.append(("extra data", token.extra_data))
    return rows


def uses_of(token: VerificationToken) -> str:
    """How many uses a token has had, of how many."""
    return f"{token.uses} of {'any number' if token.max_uses is None else token.max_uses}"


def state_of(token: VerificationToken, now: datetime) -> str:
    """``"valid"``, or why a token cannot be used: ``"used"``, ``"inactive"``, ``"expired"``, ``"leased"``."""
    if not token.is_active:
        return "used" if token.max_uses is not None and token.uses >= token.max_uses else "inactive"
    if token.expires_at is not None and token.expires_at < now:
        return "expired"
    return "valid" if token.is_valid(now) else "leased"


def when(at: datetime, now: datetime) -> str:
    """A point in time for people, and how far away it is."""
    return f"{at:%Y-%m-%d %H:%M:%S} UTC ({relative(at, now)})"


def relative(at: datetime, now: datetime) -> str:
    """How far away a point in time is: ``"in 59 min"``, ``"3 days ago"``."""
    seconds = round(abs((at - now).total_seconds()))
    if seconds >= 2 * 86_400:
        named = f"{seconds // 86_400} days"
    elif seconds >= 3_600:
        named = f"{seconds // 3_600} h"
    else:
        named = f"{seconds // 60} min" if seconds >= 60 else f"{seconds} s"
    return f"in {named}" if at >= now else f"{named} ago"


def iso(at: datetime | None) -> str | None:
    """A point in time as JSON has it."""
    return None if at is None else at.isoformat(timespec="milliseconds")


def without_policy(policies: Policies, slug: str | None) -> str | None:
    """A sentence for a slug that no policy names here, as another configuration may have one; else None."""
    if policies.get(slug or "").is_policy_given:
        return None
    named = "tokens without a slug" if slug is None else f"the slug {slug!r}"
    return f"no policy is configured here for {named}, so the settings alone apply"
