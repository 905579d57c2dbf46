"""One of the processes that issue, check, consume and present wrong keys on one store, until they are killed.

Usage: ``python -m tests.faults.history_worker BACKEND URL DIRECTORY NAME SEED``. It ends by itself when
there is a file ``stop`` in the directory.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sys
from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.faults.journal import CAPPED, OPERATIONS_PER_SUBJECT, PLAIN, Journal, Tail, purpose
from vtoken import (
    BackendError,
    InvalidToken,
    LeaseLost,
    Settings,
    Subject,
    TokenManager,
    TokenPolicy,
    TooManyAttempts,
)
from vtoken.loading import import_object

CLIENTS: Final = 4
SUBJECTS: Final = 3
"""Of so many objects at a time."""
CAP: Final = 8
CLOCK: Final = datetime(2100, 1, 1, tzinfo=UTC)
"""It stands still: nothing expires, and no attempt window ends."""
SETTINGS: Final = Settings(secret="a secret of the histories, of 32 bytes or more")
POLICIES: Final = [
    # Derived, so that whoever finds a token by its object has its key too.
    TokenPolicy.link(PLAIN, key_storage="derived"),
    TokenPolicy.code(CAPPED, max_attempts=CAP),
]
ON_PLAIN: Final = [*["consume"] * 4, *["ensure", "verify", "redeem"] * 2, "issue", "deactivate", "wrong"]
ON_CAPPED: Final = ["issue", "verify", "consume", "consume", "wrong"]
WRONG: Final = {PLAIN: "a wrong link", CAPPED: "000000"}  # which is right once in a million


class Known(NamedTuple):
    """A token that some process got to know."""

    id: str
    key: str


class Board:
    """What all processes have told in their journals so far."""

    def __init__(self, directory: Path) -> None:
        self._tail = Tail(directory)
        self._begun: dict[tuple[str, int], str] = {}
        self._answers: Counter[str] = Counter()
        self.tokens: defaultdict[str, list[Known]] = defaultdict(list)
        self.uses: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
        """By subject: the token and the name of each use, acknowledged or not."""
        self.current = 1

    def look(self) -> None:
        for process, line in self._tail:
            if "do" in line:
                self._begun[process, line["n"]] = line["subject"]
                if line["do"] == "consume":
                    self.uses[line["subject"]].append((line["token"], line["name"]))
                continue
            subject = self._begun.pop((process, line["n"]))
            self._answers[subject] += 1
            if line.get("key"):
                self.tokens[subject].append(Known(line["result"][1], line["key"]))
        while self._answers[str(self.current)] >= OPERATIONS_PER_SUBJECT:
            self.current += 1


class Worker:
    """Several clients on one manager, in one journal."""

    def __init__(self, manager: TokenManager, directory: Path, name: str, seed: int) -> None:
        self._manager = manager
        self._name = name
        self._journal = Journal(directory / f"{name}.jsonl")
        self._board = Board(directory)
        self._stop = directory / "stop"
        self._dice = random.Random(seed)  # noqa: S311  # it guards nothing
        self._numbers = 0

    async def run(self) -> None:
        async with asyncio.TaskGroup() as clients:
            for client in range(CLIENTS):
                clients.create_task(self._client(client))
        self._journal.close()

    async def _client(self, client: int) -> None:
        while not self._stop.exists():
            self._board.look()
            subject = str(self._board.current + self._dice.randrange(SUBJECTS))
            tokens = [*self._board.tokens[subject][-3:], *self._board.tokens[subject][-1:] * 3]
            do = self._dice.choice(ON_PLAIN if purpose(subject) == PLAIN else ON_CAPPED)
            if not tokens and do in ("verify", "consume", "redeem"):
                do = "issue" if purpose(subject) == CAPPED else "ensure"
            token = (
                self._dice.choice(tokens)
                if do in ("verify", "consume", "redeem")
                else Known("", WRONG[purpose(subject)])
            )
            await self._perform(client, do, subject, token)

    async def _perform(self, client: int, do: str, subject: str, token: Known) -> None:
        self._numbers += 1
        number = self._numbers
        name = f"{self._name}-{number}"
        if do == "consume" and self._dice.random() < 0.2:
            token, name = self._somebodys_use(subject) or (token, name)
        self._journal.write(n=number, client=client, do=do, subject=subject, token=token.id, name=name)
        try:
            answer = await self._do(do, Subject("auth.user", subject), purpose(subject), token, name)
        except TooManyAttempts:
            answer = {"result": ["capped"]}
        except InvalidToken as error:
            answer = {"result": [error.reason]}
        except LeaseLost:
            answer = {"result": ["lost"]}
        except BackendError:
            return  # whether it happened is left open
        self._journal.write(n=number, **answer)

    def _somebodys_use(self, subject: str) -> tuple[Known, str] | None:
        """A use that was asked for before, perhaps by a process that is dead now."""
        keys = {token.id: token for token in self._board.tokens[subject]}
        uses = [(keys[token], name) for token, name in self._board.uses[subject] if token in keys]
        return self._dice.choice(uses) if uses else None

    async def _do(self, do: str, obj: Subject, slug: str, token: Known, name: str) -> dict[str, Any]:
        manager = self._manager
        if do in ("issue", "ensure"):
            create = manager.issue if do == "issue" else manager.get_active_or_create
            made = await create(obj, slug)
            return {"result": ["ok", made.id], "key": made.key}
        if do == "deactivate":
            return {"result": [str(await manager.deactivate(obj, slug))]}
        if do == "consume":
            await manager.consume(obj, slug, token.key, consume_id=name)
        elif do == "redeem":
            async with manager.redeem(obj, slug, token.key, lease=timedelta(hours=1)):
                await asyncio.sleep(0)
        else:  # verify, wrong
            await manager.verify(obj, slug, token.key)
        return {"result": ["ok"]}


def new_manager(backend: str, url: str) -> TokenManager:
    """A manager on the store, as all processes have it.

    Args:
        backend: the import path of its class.
        url: of the store.
    """
    kind: Any = import_object(backend)
    return TokenManager(kind.from_url(url), SETTINGS, POLICIES, clock=lambda: CLOCK)


async def main(backend: str, url: str, directory: str, name: str, seed: str) -> None:
    async with new_manager(backend, url) as manager:
        await Worker(manager, Path(directory), name, int(seed)).run()


if __name__ == "__main__":
    logging.getLogger("vtoken").setLevel(logging.ERROR)  # whoever started us was warned
    logging.getLogger("vtoken_backends").setLevel(logging.ERROR)
    asyncio.run(main(*sys.argv[1:]))
