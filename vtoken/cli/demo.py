"""The command ``demo``: the life of a token on a file of its own."""

from __future__ import annotations

from collections.abc import Awaitable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

from rich.text import Text

from vtoken.cli.options import Output
from vtoken.cli.output import Result
from vtoken.errors import InvalidToken
from vtoken.manager import TokenManager
from vtoken.policy import TokenPolicy
from vtoken.subject import Subject

_SLUG = "password-reset"
_WRONG = "0" * 32

Step = dict[str, Any]


_OUTPUT = Output()  # the default of the shared options; it is frozen


async def demo(*, output: Output = _OUTPUT) -> Result:
    """Show the life of a token: issue, check, a wrong key, consume, consume again, purge."""
    del output  # how it is shown is the application's business
    with TemporaryDirectory(prefix="vtoken-demo-") as folder:
        url = f"sqlite:///{quote(Path(folder, 'tokens.db').as_posix())}"
        async with TokenManager.from_url(url, policies=[TokenPolicy.link(_SLUG)]) as manager:
            steps = await _play(manager, Path(folder))
    ok = all(step["ok"] for step in steps)
    return Result({"url": url, "ok": ok, "steps": steps}, _text(url, steps), 0 if ok else 1)


async def _play(manager: TokenManager, folder: Path) -> list[Step]:
    user = Subject("auth.user", 42)
    token = await manager.issue(user, _SLUG)
    key = token.key
    issued = f"a key for auth.user:42 and {_SLUG}, good for an hour: {key}"
    return [
        _step("issue", True, issued),
        await _accepted("check", "consumes nothing", manager.verify(user, _SLUG, key)),
        await _refused("wrong key", manager.verify(user, _SLUG, _WRONG)),
        await _accepted("consume", "now the password may be changed", manager.consume(user, _SLUG, key)),
        await _refused("consume again", manager.consume(user, _SLUG, key)),
        _step("read the file", not _holds(folder, key), "the key is nowhere in it, only its digest"),
        _step("purge", await manager.purge() == 1, "the used token is deleted"),
    ]


async def _accepted(name: str, what: str, attempt: Awaitable[object]) -> Step:
    try:
        await attempt
    except InvalidToken as error:
        return _step(name, False, f"refused: {error.reason}")
    return _step(name, True, f"valid; {what}")


async def _refused(name: str, attempt: Awaitable[object]) -> Step:
    try:
        await attempt
    except InvalidToken as error:
        return _step(name, True, f"refused: {error.reason}")
    return _step(name, False, "accepted")


def _holds(folder: Path, key: str) -> bool:
    return any(key.encode() in file.read_bytes() for file in folder.iterdir())


def _step(name: str, ok: bool, outcome: str) -> Step:
    return {"step": name, "ok": ok, "outcome": outcome}


def _text(url: str, steps: list[Step]) -> Text:
    text = Text(f"A password reset on {url}\n\n")
    for step in steps:
        text.append("  ok     " if step["ok"] else "  WRONG  ", style="green" if step["ok"] else "bold red")
        text.append(f"{step['step']:<16}", style="bold")
        text.append(f"{step['outcome']}\n")
    text.append("\nWith a store of your own: vtoken issue auth.user:42 --slug password-reset")
    return text
