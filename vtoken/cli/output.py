"""How commands answer: a table for people or JSON for programs, and errors in one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

from vtoken.token import VerificationToken

_WIDE = 10_000


@dataclass(frozen=True, slots=True)
class Result:
    """A command's answer.

    Args:
        data: the answer as JSON values.
        text: the same for people.
        status: the exit status.
    """

    data: Mapping[str, Any]
    text: RenderableType
    status: int = 0


def show(result: Result, as_json: bool) -> None:
    """Print an answer on standard output."""
    if as_json:
        print_json(result.data)
        return
    # Without a terminal nothing is cut or wrapped to a width that nobody has.
    console = Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False, soft_wrap=True)
    with console.capture() as captured:  # rich itself exits with status 1 when the reader has gone
        console.print(result.text)
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
        "created_at": _iso(token.created_at),
        "expires_at": _iso(token.expires_at),
        "is_active": token.is_active,
        "uses": token.uses,
        "max_uses": token.max_uses,
        "used_at": _iso(token.used_at),
        "extra_data": token.get_extra_data(),
    }


def token_rows(token: VerificationToken) -> list[tuple[str, object]]:
    """A token for people, without its key."""
    rows: list[tuple[str, object]] = [
        ("id", token.id),
        ("subject", f"{token.content_type}:{token.object_id}"),
        ("slug", "(none)" if token.slug is None else token.slug),
        ("created", moment(token.created_at)),
        ("expires", "never" if token.expires_at is None else moment(token.expires_at)),
    ]
    if token.max_uses > 1 or token.uses:
        rows.append(("uses", f"{token.uses} of {token.max_uses}"))
    if token.extra_data is not None:
        rows.append(("extra data", token.extra_data))
    return rows


def moment(at: datetime) -> str:
    """A point in time for people."""
    return f"{at:%Y-%m-%d %H:%M:%S} UTC"


def _iso(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat(timespec="milliseconds")
