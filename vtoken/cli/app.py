"""The application: from arguments to a command, and from its end to an exit status.

====== =============================================================================
status meaning
====== =============================================================================
0      valid, or done
1      not valid; a limit is reached; a copy is not equal, a guarantee does not hold; declined
2      usage or configuration; also an argument out of its range
3      the store failed: not there, not reachable, damaged, outcome unknown
4      an unexpected error: a mistake in vtoken, or in the application's own hooks and generators
130    interrupted by Ctrl-C
141    the reader of the answer is gone, as for every program in a pipe
====== =============================================================================
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import sys
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, Final, cast

from cyclopts import App, CycloptsError
from cyclopts.exceptions import UnknownOptionError, UnusedCliTokensError

from vtoken._version import __version__
from vtoken.cli import (
    completion,
    conformance,
    demo,
    doctor,
    issue_many,
    listing,
    migrating,
    objects,
    purge,
    settings,
    store,
    tokens,
)
from vtoken.cli.options import Output
from vtoken.cli.output import Result, print_json, show, show_error
from vtoken.cli.terminal import Declined, Interrupted
from vtoken.errors import (
    BackendError,
    CooldownActive,
    InvalidToken,
    TokenBusy,
    TooManyAttempts,
    VTokenError,
)
from vtoken.registry import BUILT_IN_LOGGER

NOT_VALID: Final = 1
USAGE: Final = 2
STORE_FAILED: Final = 3
UNEXPECTED: Final = 4
INTERRUPTED: Final = 130
READER_GONE: Final = 141
_BY: Final = re.compile(r"pass by=\{'([^']*)': \.\.\.\}")

_RESUMABLE: Final = (migrating.copy, migrating.import_, purge.purge)

app = App(
    name="vtoken",
    version=__version__,
    help="""Verification tokens: password reset, e-mail confirmation, codes, magic links, invitations.

    Exit status: 0 valid or done, 1 not valid, 2 usage or configuration, 3 the store failed, 4 unexpected.
    """,
)
for _command in (
    demo.demo,
    store.init,
    doctor.doctor,
    tokens.issue,
    issue_many.issue_many,
    tokens.check,
    tokens.consume,
    tokens.deactivate,
    objects.status,
    objects.history,
    objects.erase,
    objects.reset_limits,
    listing.show,
    store.stats,
    store.ping,
    purge.purge,
    migrating.copy,
    conformance.conformance,
    settings.config,
    settings.secret,
):
    app.command(_command)
app.command(listing.list_, name="list")
app.command(migrating.import_, name="import")
app.command(completion.command(app), name="--install-completion")


def main() -> int:
    """Run the command that the process was started with, and return its exit status."""
    if sys.stdout is None or sys.stderr is None:  # started with one of them closed
        nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  # as long as the process
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a real stream has it
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    # What is doubtful about a store is said by doctor, and not again by every command.
    logging.getLogger(BUILT_IN_LOGGER).setLevel(logging.ERROR)
    folder = str(Path.cwd())
    if not sys.flags.safe_path and folder not in sys.path:  # as under `python -m`
        sys.path.insert(0, folder)
    status = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # quiets the flush at exit
        return READER_GONE if isinstance(error, BrokenPipeError) else status or STORE_FAILED
    return status


def run(arguments: Sequence[str]) -> int:
    """Run a command, print its answer or its error, and return the exit status.

    Args:
        arguments: without the program's name.
    """
    as_json, command = "--json" in arguments, None
    try:
        command, bound, _ = app.parse_args(list(arguments), exit_on_error=False, print_error=False)
        bound.apply_defaults()
        as_json = any(isinstance(value, Output) and value.json for value in bound.arguments.values())
        answer = command(*bound.args, **bound.kwargs)
        if asyncio.iscoroutine(answer):
            answer = asyncio.run(cast("Coroutine[Any, Any, Result]", answer))
        if not isinstance(answer, Result):  # --help and --version have printed theirs
            return 0
        show(answer, as_json)
    except KeyboardInterrupt:
        go_on = ": the same command again goes on where it was" if command in _RESUMABLE else ""
        show_error("Interrupted", f"interrupted{go_on}", as_json)
        return INTERRUPTED
    except Interrupted as error:
        show_error("Interrupted", f"interrupted: {error}", as_json)
        return INTERRUPTED
    except BrokenPipeError:
        return READER_GONE
    except Declined:
        show_error("Declined", "nothing was done", as_json)
        return NOT_VALID
    except Exception as error:
        return _report(error, as_json)
    return answer.status


def _report(error: Exception, as_json: bool) -> int:
    """Print an error in one line, and return the exit status that it stands for."""
    kind, data = type(error).__name__, dict[str, Any]()
    if isinstance(error, CycloptsError):
        show_error("UsageError", _usage(error), as_json)
        return USAGE
    if isinstance(error, TooManyAttempts | CooldownActive | TokenBusy):
        data["retry_after"] = error.retry_after
    if isinstance(error, TooManyAttempts | CooldownActive):
        data["limit"] = None if error.limit is None else error.limit.name
    if isinstance(error, InvalidToken):
        data |= {"reason": error.reason, "attempts_left": error.attempts_left}
        if as_json:
            print_json({"valid": False, **data})
    if isinstance(error, VTokenError):
        show_error(kind, _message(error), as_json, **data)
        return _status(error)
    if isinstance(error, OSError):  # a file or folder that cannot be written, say
        where = "" if error.filename is None else f"{error.filename}: "
        show_error(kind, f"{where}{error.strerror or kind}", as_json)
        return STORE_FAILED
    show_error(kind, f"unexpected {kind}{_place(error)}", as_json)
    return UNEXPECTED


def _status(error: VTokenError) -> int:
    if isinstance(error, InvalidToken | CooldownActive):
        return NOT_VALID
    return STORE_FAILED if isinstance(error, BackendError) else USAGE


def _message(error: VTokenError) -> str:
    # What is written in Python for the library's callers is an option here.
    text = _BY.sub(r"pass --by \1=...", str(error)) or type(error).__name__
    if isinstance(error, TooManyAttempts):
        text = "Too many attempts: the key was not compared."
    elif isinstance(error, InvalidToken):
        left = "" if error.attempts_left is None else f", {error.attempts_left} attempts left"
        text = f"{error} ({error.reason}{left})"
    if isinstance(error, TooManyAttempts | CooldownActive | TokenBusy):
        text += f" Try again in {math.ceil(error.retry_after)} seconds."
    if isinstance(error, TooManyAttempts | CooldownActive) and error.limit is not None:
        text += f" The limit is {error.limit.name}."
    # Notes are for the operator: what may be wrong on this side.
    return " ".join([text, *(f"Note: {note}." for note in getattr(error, "__notes__", ()))])


def _usage(error: CycloptsError) -> str:
    """What was wrong with the arguments, without repeating one that may be a key."""
    error.verbose = False
    text = str(error)
    if isinstance(error, UnusedCliTokensError):
        text = "Too many arguments: one that holds spaces needs quotes."
    elif isinstance(error, UnknownOptionError) and "Did you mean" not in text:
        text = "Unknown option."
    command = " ".join(("vtoken", *(error.command_chain or ())))
    return f"{text} See {command} --help."


def _place(error: Exception) -> str:
    """Where an unexpected error came from; its message is not shown, because it may hold a key."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return ""
    return f" in {Path(traceback.tb_frame.f_code.co_filename).name}, line {traceback.tb_lineno}"


class _OneLine(logging.Formatter):
    """A log record in one line: of an exception its type only."""

    def format(self, record: logging.LogRecord) -> str:
        kind = record.exc_info[0] if record.exc_info else None
        return f"vtoken: {record.getMessage()}{f' ({kind.__name__})' if kind else ''}"
