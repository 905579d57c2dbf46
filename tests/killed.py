"""Applications that are killed amid their work, and what they had said by then."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Final

KILLS: Final = int(os.environ.get("VTOKEN_TEST_KILLS", "3"))
"""How often the application is killed; more kills find rarer moments."""
PEOPLE: Final = 25
LATEST: Final = 2 * PEOPLE
"""An application says three lines of each person, so it is killed before it is done."""


def killed_at(step: int, worker: str, *arguments: str, lines: list[str]) -> list[str]:
    """Run an application until it has written so many lines, kill it, and return all that it wrote.

    Args:
        step: the line after which it is killed.
        worker: its module.
        arguments: those of its command line.
        lines: its input.
    """
    command = [sys.executable, "-m", worker, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("".join(lines))
        process.stdin.close()
        seen = [process.stdout.readline().strip() for _ in range(step)]
        process.kill()
        return [*seen, *process.stdout.read().splitlines()]


async def check(
    seen: list[str], used: Callable[[], Awaitable[set[str]]], changed: Callable[[], Awaitable[set[str]]]
) -> None:
    """Hold what is stored of the people of one run to what the application had said.

    Args:
        seen: what it had said.
        used: reads whose tokens are used.
        changed: reads for whom the application has committed what a token is for.
    """
    committed: set[str] | None = None
    found = set[str]()
    while committed is None or committed != await changed():  # a commit that was on its way may arrive late
        committed, found = await changed(), await used()
    assert found == committed
    assert {line.split()[1] for line in seen if line.startswith("done")} <= found
    assert len(found) < PEOPLE, "it was not killed amid its work"
