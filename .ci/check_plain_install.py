"""Use an installation without extras: memory and SQLite work, and what is missing is said in words."""

# ruff: noqa: S101, S603  # a check asserts, and runs the command beside its own interpreter

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import vtoken

USER = vtoken.Subject("auth.user", 1)


async def issue_and_consume(url: str) -> None:
    async with vtoken.TokenManager.from_url(url) as manager:
        token = await manager.issue(USER, "password-reset")
        await manager.consume(USER, "password-reset", token.key)
        assert not await manager.exists_valid(USER, "password-reset", token.key), "used twice"


def what_is_missing(url: str) -> str:
    try:
        vtoken.create_backend(url)
    except vtoken.ConfigurationError as error:
        return str(error)
    return "nothing"


def main() -> None:
    unwanted = ("pymongo", "motor", "psycopg", "cyclopts", "rich", "pytest")
    there = [name for name in unwanted if find_spec(name)]
    assert not there, f"a plain installation brings {there}"
    assert "site-packages" in vtoken.__file__, vtoken.__file__
    assert version("vtoken") == vtoken.__version__

    with tempfile.TemporaryDirectory() as folder:
        for url in ("memory://", f"sqlite:///{folder}/tokens.db"):
            asyncio.run(issue_and_consume(url))

    assert "vtoken[mongodb]" in what_is_missing("mongodb://localhost/tokens")
    assert "vtoken[postgresql]" in what_is_missing("postgresql://localhost/tokens")

    command = Path(sys.executable).with_name("vtoken")
    done = subprocess.run([command, "demo"], capture_output=True, text=True, check=False)
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "vtoken[cli]" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr


if __name__ == "__main__":
    main()
