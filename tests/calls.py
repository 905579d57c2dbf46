"""``python -m tests.calls``: how much code a lone issue and a lone consume of a code pass through, on memory.

For each operation: the calls of functions of the library and its backend, how many different functions these
are, in how many files of the core, and how often two calls in a row are in different files. A reader has to
follow each of these moves. Each item that a generator expression yields counts as a call.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Final, NamedTuple

import vtoken
from vtoken import Settings, Subject, TokenManager, TokenPolicy

CORE: Final = Path(vtoken.__file__).parent
SUBJECT: Final = Subject("auth.user", "ada")


class Passed(NamedTuple):
    """What an operation passed through."""

    calls: int
    functions: int
    files: int
    moves: int

    def __str__(self) -> str:
        return (
            f"{self.calls} calls of {self.functions} functions in {self.files} files of the core,"
            f" {self.moves} moves between files"
        )


async def counted(operation: Callable[[], Coroutine[Any, Any, object]]) -> Passed:
    """Run an operation, and count the calls that it makes in the core."""
    called: list[CodeType] = []

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(CORE)):  # vtoken_backends, too
            called.append(frame.f_code)

    sys.setprofile(profile)
    try:
        await operation()
    finally:
        sys.setprofile(None)
    files = [code.co_filename for code in called]
    moves = sum(one != following for one, following in itertools.pairwise(files))
    in_core = {file for file in files if Path(file).is_relative_to(CORE)}
    return Passed(calls=len(called), functions=len(set(called)), files=len(in_core), moves=moves)


async def measured() -> dict[str, Passed]:
    """Each operation, once everything that is made once has been made."""
    policy, settings = (
        TokenPolicy.code("login"),
        Settings(secret="a secret of this program, 32 bytes or more"),
    )
    async with TokenManager.from_url("memory://", policies=[policy], settings=settings) as manager:
        for _ in range(2):
            token = await manager.deactivate_and_create(SUBJECT, "login")
            await manager.consume(SUBJECT, "login", token.key)
        made: list[str] = []

        async def issue() -> None:
            made.append((await manager.deactivate_and_create(SUBJECT, "login")).key)

        issued = await counted(issue)
        consumed = await counted(lambda: manager.consume(SUBJECT, "login", made[0]))
    return {"issue": issued, "consume": consumed}


def main() -> None:
    for operation, passed in asyncio.run(measured()).items():
        print(f"{operation}: {passed}")


if __name__ == "__main__":
    main()
