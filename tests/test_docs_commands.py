"""The reference of the command line names each command, argument and option that there is, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from tests.test_docs import ROOT
from vtoken.cli.app import app

PAGE: Final = (ROOT / "docs" / "reference" / "command-line.md").read_text()
COMMANDS: Final = {name for name in app if not name.startswith("-")}


def names(command: str) -> tuple[set[str], set[str]]:
    """The arguments and the options of a command."""
    found = {name for argument in app[command].assemble_argument_collection() for name in argument.names}
    options = {name for name in found if name.startswith("--")}
    return found - options - {"*"}, options


def rows() -> Iterator[tuple[str, set[str], set[str]]]:
    """Command, arguments and options of each row of the page's table."""
    for head, options in re.findall(r"^\| `([a-z][^`]*)` \|([^|]*)\|", PAGE, re.MULTILINE):
        command, *arguments = re.findall(r"[\w-]+", head)
        yield command, set(arguments), set(re.findall(r"`(--[\w-]+)`", options))


def test_the_table_has_every_command_with_its_arguments_and_options() -> None:
    [sentence] = re.findall(r"^All commands but (.*?) take `--url`", PAGE, re.MULTILINE | re.DOTALL)
    without_url = set(re.findall(r"`(\w+)`", sentence))
    named: dict[str, tuple[set[str], set[str]]] = {}
    for command, arguments, options in rows():
        shared = {"--json"} if command in without_url else {"--json", "--url", "--manager"}
        named[command] = arguments, options | shared
    assert named == {command: names(command) for command in COMMANDS}


def test_the_page_names_no_option_that_there_is_not() -> None:
    there = {option for command in COMMANDS for option in names(command)[1]}
    everywhere = {"--help", "--version", "--install-completion"}
    assert set(re.findall(r"(?<=[ `])--[a-z][a-z-]*", PAGE)) == there | everywhere
