"""Actors on a MongoDB store, with both drivers at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from functools import partial
from typing import Any, Final

from vtoken import InvalidToken, Subject, TokenManager, VerificationToken
from vtoken.errors import BackendUnavailable, OutcomeUnknown
from vtoken_backends.mongodb import MongoDBBackend

from .load import Load
from .notes import SLUG, TYPE

DRIVERS: Final = ("pymongo", "motor")


class MongoDBLoad(Load):
    """Actors with each driver on one store.

    Args:
        url: of the store.
        make: the backend's class, or one with a planted bug.
        **options: of the backend.
    """

    def __init__(self, url: str, make: type[MongoDBBackend] = MongoDBBackend, **options: Any) -> None:
        super().__init__(
            {driver: partial(make.from_url, url, driver=driver, **options) for driver in DRIVERS},
            partial(MongoDBBackend.from_url, url),
        )


class Impatient:
    """Uses tokens, and before there is an answer uses them once more, by the same names and from another
    process.

    Args:
        load: whose notes it writes to.
        driver: of both.
    """

    def __init__(self, load: Load, driver: str) -> None:
        self._manager, self._notebook = load.sides[driver]
        self._other = load.others[driver]
        self._subjects = [f"{load.strikes} impatient {driver} {n}" for n in range(8)]
        self._tokens: list[VerificationToken] = []
        self._uses: list[asyncio.Task[VerificationToken | int | None]] = []
        self._again: list[asyncio.Task[bool]] = []
        self._numbers: dict[str, int] = {}

    async def issue(self) -> None:
        """Issue its tokens."""
        tokens = await asyncio.gather(*map(self._issued, self._subjects))
        self._tokens = [token for token in tokens if isinstance(token, VerificationToken)]

    async def _issued(self, subject: str) -> VerificationToken | int | None:
        def act(number: int) -> Awaitable[VerificationToken]:
            obj, data = Subject(TYPE, subject), {"n": number}
            return self._manager.deactivate_and_create(obj, SLUG, extra_data=data)

        return await self._notebook.step("issue", subject, act)

    def use(self) -> None:
        """Begin to use them, all at once."""
        self._uses = [
            asyncio.ensure_future(
                self._notebook.step("use", token.object_id, partial(self._use, token), token.id)
            )
            for token in self._tokens
        ]

    async def _use(self, token: VerificationToken, number: int) -> VerificationToken:
        self._numbers[token.id] = number
        return await _consume(self._manager, token, number)

    async def use_again(self) -> int:
        """Use them once more, all at once, and return how many got an answer soon."""
        self._again = [asyncio.ensure_future(self._used_again(token)) for token in self._tokens]
        done, _ = await asyncio.wait(self._again, timeout=0.5)
        return sum(again.result() for again in done)

    async def _used_again(self, token: VerificationToken) -> bool:
        number = self._numbers[token.id]
        try:
            await _consume(self._other, token, number)
        except (OutcomeUnknown, BackendUnavailable, InvalidToken):
            return False
        self._notebook.write({"done": number, "again": True})
        return True

    async def end(self) -> None:
        """Wait until all have an answer."""
        await asyncio.gather(*self._uses, *self._again)


async def _consume(manager: TokenManager, token: VerificationToken, number: int) -> VerificationToken:
    assert token.key is not None
    subject = Subject(TYPE, token.object_id)
    return await manager.consume(subject, SLUG, token.key, consume_id=str(number))
