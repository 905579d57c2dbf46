"""A process that issues, uses and deactivates tokens, and notes each step: what it is about to do, and what
was acknowledged, in a file of its own that it syncs before it goes on."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
from collections.abc import Awaitable, Callable

from tests.sqlite_tools import ask
from vtoken import Subject, TokenManager, VerificationToken
from vtoken.errors import BackendUnavailable, OutcomeUnknown
from vtoken_backends._sqlite_file import Synchronous
from vtoken_backends.sqlite import SQLiteBackend

from .sqlite_notes import SHARED, SLUG, TYPE, fixed_clock

_ACTORS = 6
_STEPS = 12
_CHECKPOINT = 60
"""Pages of the log before it is copied into the database: few, so that a short run has many of these."""


class _Notebook:
    """Args: early: a planted bug: acknowledge before anything was done."""

    def __init__(self, path: str, early: bool) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._numbers = itertools.count(1)
        self._early = early

    async def step(
        self,
        what: str,
        subject: str,
        act: Callable[[int], Awaitable[VerificationToken | int | None]],
        token_id: str = "",
        key: str = "",
    ) -> VerificationToken | int | None:
        number = next(self._numbers)
        self._write({"n": number, "what": what, "subject": subject, "token": token_id, "key": key})
        if self._early and what != "issue":
            self._acknowledge({"done": number})
        try:
            result = await act(number)
        except OutcomeUnknown:
            return None
        except BackendUnavailable:  # it says that nothing happened: it is held to that
            self._write({"failed": number})
            return None
        done: dict[str, object] = {"done": number}
        if what == "issue" and isinstance(result, VerificationToken):
            done |= {"token": result.id, "key": result.key}
        self._acknowledge(done)
        return result

    def _acknowledge(self, note: dict[str, object]) -> None:
        self._write(note)
        os.fsync(self._file)

    def _write(self, note: dict[str, object]) -> None:
        os.write(self._file, json.dumps(note).encode() + b"\n")


class _Actor:
    """Does one thing after the other on its own subject; now and then it issues for one that all share."""

    def __init__(self, manager: TokenManager, notebook: _Notebook, number: int) -> None:
        self._manager = manager
        self._notebook = notebook
        self._name = f"user{number}"
        self._chance = random.Random(number)  # noqa: S311  # which step comes next
        self._token: VerificationToken | None = None

    async def run(self, steps: int) -> None:
        for _ in range(steps):
            await self._chance.choices(
                [self._issue, self._share, self._use, self._deactivate, self._save], [8, 3, 6, 2, 2]
            )[0]()

    async def _issue(self) -> None:
        self._token = await self._issued(self._name)

    async def _share(self) -> None:
        await self._issued(SHARED)

    async def _issued(self, name: str) -> VerificationToken | None:
        def act(number: int) -> Awaitable[VerificationToken]:
            return self._manager.deactivate_and_create(Subject(TYPE, name), SLUG, extra_data={"n": number})

        token = await self._notebook.step("issue", name, act)
        return token if isinstance(token, VerificationToken) else None

    async def _use(self) -> None:
        token, self._token = self._token, None
        if token is None or token.key is None:
            return await self._issue()
        key = token.key

        def act(number: int) -> Awaitable[VerificationToken]:
            return self._manager.consume(Subject(TYPE, self._name), SLUG, key, consume_id=str(number))

        await self._notebook.step("use", self._name, act, token.id, key)
        return None

    async def _deactivate(self) -> None:
        self._token = None
        await self._notebook.step(
            "deactivate", self._name, lambda _: self._manager.deactivate(Subject(TYPE, self._name))
        )

    async def _save(self) -> None:
        token = self._token
        if token is None:
            return await self._issue()

        def act(number: int) -> Awaitable[None]:
            token.set_extra_data({"n": number})
            return self._manager.save(token)

        await self._notebook.step("save", self._name, act, token.id)
        return None


async def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("store")
    parser.add_argument("notes")
    parser.add_argument("--phases", type=int, help="how often the store is opened; endless by default")
    parser.add_argument("--synchronous", choices=("full", "normal"), default="full")
    parser.add_argument("--early", action="store_true", help="the planted bug")
    arguments = parser.parse_args()
    synchronous: Synchronous = arguments.synchronous
    notebook = _Notebook(arguments.notes, arguments.early)
    backend = SQLiteBackend(arguments.store, synchronous=synchronous)
    manager = TokenManager(backend, clock=fixed_clock)
    actors = [_Actor(manager, notebook, number) for number in range(_ACTORS)]
    for phase in itertools.count():
        if phase == arguments.phases:
            return
        with contextlib.suppress(BackendUnavailable):  # at opening or closing; there is the next phase
            async with manager:
                await ask(backend, f"PRAGMA wal_autocheckpoint = {_CHECKPOINT}")
                await asyncio.gather(*(actor.run(_STEPS) for actor in actors))


if __name__ == "__main__":
    asyncio.run(_main())
