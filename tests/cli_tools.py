"""What the tests of the command line share."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from typing import Any, Final

import pytest

from vtoken.cli import run

SECRET: Final = "a-secret-of-the-tests-0123456789-0"
USER: Final = "auth.user:42"


class Terminal:
    """What a command printed, and how it ended."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *arguments: str) -> int:
        """Run a command, and return its exit status."""
        status = run(arguments)
        self.out, self.err = self._capsys.readouterr()
        assert "Traceback" not in self.out + self.err
        assert "\x1b" not in self.out + self.err, "no colours without a terminal"
        return status

    def json(self, *arguments: str, status: int = 0) -> Any:
        """Run a command with ``--json``, and return its answer."""
        assert self(*arguments, "--json") == status, self.err
        return json.loads(self.out)

    def error(self) -> Any:
        """The error of the last command, printed as JSON in one line."""
        assert self.err.count("\n") == 1
        return json.loads(self.err)


def feed(stdin: io.BytesIO, content: bytes) -> None:
    """Make this what is read next."""
    stdin.seek(0)
    stdin.truncate()
    stdin.write(content)
    stdin.seek(0)


def process(
    *arguments: str, code: str = "", stdin: str | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m vtoken``, or code, as a process of its own."""
    command = ["-c", code] if code else ["-m", "vtoken"]
    return subprocess.run(
        [sys.executable, *command, *arguments],
        input=stdin or "",
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environ},
        check=False,
    )
