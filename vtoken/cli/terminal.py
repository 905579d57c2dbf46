"""What is for people at a terminal only: questions and progress bars. Both are on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from vtoken.errors import InvalidInput


class Declined(Exception):
    """The operator said no."""


def ask(question: str, yes: bool, *, without_terminal: bool) -> None:
    """Go on only with the operator's consent. Not for use in an event loop: a blocking read there would not
    react to Ctrl-C.

    Args:
        question: what is about to be done.
        yes: consent was given beforehand.
        without_terminal: whether to go on where there is no terminal to ask on.

    Raises:
        Declined: the answer was no.
        InvalidInput: there is no terminal to ask on.
    """
    if yes:
        return
    if sys.stdin is None or not sys.stdin.isatty() or not sys.stderr.isatty():
        if without_terminal:
            return
        raise InvalidInput(f"{question} There is no terminal to ask on; pass --yes.")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Declined


class Interrupted(Exception):
    """The operator interrupted a work that can be gone on with; the message says how."""


@contextmanager
def progress(what: str, total: int | None = None) -> Generator[Callable[[int], None]]:
    """Show a bar while a block runs, which tells it how much is done. Without a terminal, show nothing.

    Args:
        what: the work, in a word or two.
        total: how much there is to do; None if that is not known.
    """
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), _Rate(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(what, total=total)
        yield lambda done: shown.update(task, completed=done)


class _Rate(ProgressColumn):
    """How many are done, of how many, and how fast."""

    def render(self, task: Task) -> Text:
        of = "" if task.total is None else f" of {task.total:,.0f}"
        rate = "" if task.speed is None else f"  {task.speed:,.0f}/s"
        return Text(f"{task.completed:,.0f}{of}{rate}", style="progress.download")
