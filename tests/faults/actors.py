"""Who issues, uses and deactivates tokens while a fault comes, each step noted before and after it."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import NamedTuple

from vtoken import InvalidToken, Subject, TokenManager, VerificationToken
from vtoken.errors import BackendUnavailable, OutcomeUnknown

from .notes import SHARED, SLUG, TYPE


class Notebook:
    """Notes each step: what is about to be done, and what came of it.

    Args:
        numbers: of the steps; those whose notes are read together share them.
        early: a planted bug: acknowledge before anything was done.
    """

    def __init__(self, numbers: Iterator[int] | None = None, *, early: bool = False) -> None:
        self._numbers = numbers or itertools.count(1)
        self._early = early

    def write(self, note: dict[str, object]) -> None:
        """Keep a note."""
        raise NotImplementedError

    def acknowledge(self, note: dict[str, object]) -> None:
        """Keep the note that a step was done."""
        self.write(note)

    async def step(
        self,
        what: str,
        subject: str,
        act: Callable[[int], Awaitable[VerificationToken | int | None]],
        token_id: str = "",
        key: str = "",
    ) -> VerificationToken | int | None:
        number = next(self._numbers)
        self.write({"n": number, "what": what, "subject": subject, "token": token_id, "key": key})
        if self._early and what != "issue":
            self.acknowledge({"done": number})
        try:
            result = await act(number)
        except OutcomeUnknown:
            self.write({"unknown": number})
            return None
        except BackendUnavailable:  # it says that nothing happened: it is held to that
            self.write({"failed": number})
            return None
        except InvalidToken:  # somebody else must have ended the token
            self.write({"refused": number})
            return None
        done: dict[str, object] = {"done": number}
        if what == "issue" and isinstance(result, VerificationToken):
            done |= {"token": result.id, "key": result.key}
        self.acknowledge(done)
        return result


def line(note: dict[str, object]) -> bytes:
    """A note as it is read again."""
    return json.dumps(note).encode() + b"\n"


class Side(NamedTuple):
    """A way to the store, and where its steps are noted."""

    manager: TokenManager
    notebook: Notebook


class Actor:
    """Does one thing after the other on its own subject; now and then it issues for one that all share.

    Args:
        sides: the first is its own; all of them are rivals for some of its tokens.
        name: of its subject.
        shared: the subject that it has in common with others.
        seed: of its choices.
    """

    def __init__(self, sides: Sequence[Side], name: str, seed: int, shared: str = SHARED) -> None:
        self._sides = sides
        self._manager, self._notebook = sides[0]
        self._name = name
        self._shared = shared
        self._chance = random.Random(seed)  # noqa: S311  # which step comes next
        self._token: VerificationToken | None = None

    async def act(self) -> None:
        """Take one step."""
        steps = [self._issue, self._share, self._use, self._deactivate, self._save]
        await self._chance.choices(steps, [8, 3, 6, 2, 2])[0]()

    async def _issue(self) -> None:
        self._token = await self._issued(self._name)

    async def _share(self) -> None:
        await self._issued(self._shared)

    async def _issued(self, name: str) -> VerificationToken | None:
        def act(number: int) -> Awaitable[VerificationToken]:
            return self._manager.issue(Subject(TYPE, name), SLUG, extra_data={"n": number})

        token = await self._notebook.step("issue", name, act)
        return token if isinstance(token, VerificationToken) else None

    async def _use(self) -> None:
        token, self._token = self._token, None
        if token is None or token.key is None:
            return await self._issue()
        sides = self._sides if self._chance.random() < 0.3 else self._sides[:1]
        asks_again = self._chance.random() < 0.5
        await asyncio.gather(*(self._used(side, token.id, token.key, asks_again) for side in sides))
        return None

    async def _used(self, side: Side, token_id: str, key: str, asks_again: bool) -> None:
        subject = Subject(TYPE, self._name)

        async def act(number: int) -> VerificationToken:
            try:
                return await side.manager.consume(subject, SLUG, key, consume_id=str(number))
            except OutcomeUnknown:
                if not asks_again:
                    raise
            try:
                return await side.manager.consume(subject, SLUG, key, consume_id=str(number))
            except BackendUnavailable:
                pass
            raise OutcomeUnknown("the second time did not happen, the first may have")

        await side.notebook.step("use", self._name, act, token_id, key)

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
