"""The command line: ``app`` finds the command, the other modules hold the commands, one group each.

A command is a function that returns a :class:`~vtoken.cli.output.Result` or, mostly, is async; one that asks
does so before it returns its coroutine, outside of the event loop. Errors are raised, and ``app`` turns them
into a line on standard error and an exit status. It needs the extra ``vtoken[cli]``.
"""

from vtoken.cli.app import main, run

__all__ = ["main", "run"]
