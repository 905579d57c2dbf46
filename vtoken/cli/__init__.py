"""The command line: ``app`` finds the command, the other modules hold the commands, one group each.

A command is an async function that returns a :class:`~vtoken.cli.output.Result`; errors are raised, and
``app`` turns them into a line on standard error and an exit status. It needs the extra ``vtoken[cli]``.
"""

from vtoken.cli.app import main, run

__all__ = ["main", "run"]
