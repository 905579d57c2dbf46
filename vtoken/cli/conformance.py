"""The command ``conformance``: the suite for authors of a backend, as a report."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from vtoken.cli.options import Output, silenced
from vtoken.cli.output import Result, printable

if TYPE_CHECKING:
    from vtoken.cli.cases import Outcome

NOT_CONFORMANT: Final = 1
_OUTPUT = Output()  # the default of the shared options; it is frozen
_STYLES: Final = {"holds": "green", "fails": "bold red", "not run": "yellow"}


def conformance(
    url: Annotated[
        str,
        Parameter(
            name="URL",
            help="memory://, sqlite:///tokens.db, the URL of a server, another scheme with {n} where any text"
            " makes a new store, or the import path of a suite, package.module:TestMine.",
        ),
    ],
    /,
    *,
    in_process: Annotated[
        bool,
        Parameter(
            negative="",
            show_default=False,
            help="The store lives in one process: no case that reopens it or starts processes.",
        ),
    ] = False,
    output: Output = _OUTPUT,
) -> Result:
    """Hold a backend to every guarantee; a line each. Exit status 0 only if all of them hold.

    The cases run on stores of their own, never on the one that the URL names: files in a temporary folder
    beside it, databases or schemas of other names on its server, or for other schemes what {n} makes of the
    URL; the latter stay behind. A case that has to read such a store without its backend is not run, and then
    the exit status is not 0.
    """
    from vtoken.cli import cases  # here, because no other command needs what it loads

    suite, parent = cases.chosen(url)
    outcomes: list[Outcome] = []
    with TemporaryDirectory(prefix="vtoken-conformance-", dir=parent) as folder, silenced():
        for number, case in enumerate(cases.cases(suite, in_process=in_process)):
            directory = Path(folder, str(number))
            directory.mkdir()
            outcomes.append(cases.run_case(suite, case, directory))
            if not output.json:
                _print(outcomes[-1])
    return _report(outcomes)


def _print(outcome: Outcome) -> None:
    line = Text()
    line.append(f"{outcome.state:<8}", style=_STYLES[outcome.state])
    line.append(f"{outcome.case.guarantee:>3}  {printable(outcome.case.title)}")
    if outcome.detail:
        line.append(f" -- {printable(outcome.detail)}", style="bold")
    console = Console(width=None if sys.stdout.isatty() else 10_000, highlight=False, soft_wrap=True)
    console.print(line)
    sys.stdout.flush()


def _report(outcomes: list[Outcome]) -> Result:
    numbers = {state: sum(outcome.state == state for outcome in outcomes) for state in _STYLES}
    holds = numbers["holds"] == len(outcomes)
    data = {
        "conformant": holds,
        "cases": [{**case._asdict(), "state": state, "detail": detail} for case, state, detail in outcomes],
    }
    summary = ", ".join(f"{number} {state}" for state, number in numbers.items() if number)
    return Result(data, Text(f"\n{summary}"), 0 if holds else NOT_CONFORMANT)
