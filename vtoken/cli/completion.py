"""The option ``--install-completion``: says what it edits, asks, and then does it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter
from cyclopts.completion.detect import ShellDetectionError, detect_shell
from cyclopts.completion.install import get_default_completion_path, powershell_profile

from vtoken.cli.options import Output, Yes
from vtoken.cli.output import Result
from vtoken.cli.terminal import ask
from vtoken.errors import InvalidInput

Shell = Literal["zsh", "bash", "fish", "powershell"]
_OUTPUT = Output()  # the default of the shared options; it is frozen


def command(app: App) -> Callable[..., Result]:
    """The command for an application.

    Args:
        app: whose commands are to be completed.
    """

    def install_completion(
        *,
        shell: Annotated[Shell | None, Parameter(help="Left out: the one that runs this.")] = None,
        output: Annotated[
            Path | None, Parameter(name=["-o", "--output"], help="Another place for the script.")
        ] = None,
        yes: Yes = False,
        answer: Output = _OUTPUT,
    ) -> Result:
        """Install tab completion for a shell: says first which files it writes, and asks."""
        del answer  # how it is shown is the application's business
        found: Shell | None = shell
        if found is None:
            with suppress(ShellDetectionError):
                found = detect_shell()
        if found is None:
            raise InvalidInput("the shell cannot be told: pass --shell")
        script = output or get_default_completion_path(found, app.name[0])
        edited = _startup_file(found, script)
        also = f" and add a line to {edited} that loads it" if edited else ""
        ask(f"Write the completion script {script}{also}?", yes, without_terminal=True)
        app.install_completion(shell=found, output=script, add_to_startup=edited is not None)
        rows = [f"wrote {script}", *([f"edited {edited}"] if edited else []), "open a new shell to use it"]
        data = {"written": str(script), "edited": str(edited) if edited else None}
        return Result(data, "\n".join(rows))

    return install_completion


def _startup_file(shell: Shell, script: Path) -> Path | None:
    """The file of the shell to which a line is added, None where the shell finds the script by itself."""
    if shell == "bash":
        return Path.home() / ".bashrc"
    if shell == "zsh":
        return None if "oh-my-zsh" in script.parts or ".oh-my-zsh" in script.parts else Path.home() / ".zshrc"
    return powershell_profile() if shell == "powershell" else None
