"""What a worker noted, and whether the store that it left behind keeps to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from vtoken import InvalidToken, Subject, TokenManager, VerificationToken
from vtoken.errors import BackendError
from vtoken_backends.sqlite import SQLiteBackend

TYPE: Final = "auth.user"
SLUG: Final = "reset"
SHARED: Final = "shared"


def fixed_clock() -> datetime:
    """The same in the worker and in whoever looks at the store afterwards."""
    return datetime(2030, 1, 1, tzinfo=UTC)


@dataclass
class Step:
    """One step of a worker; ``ended`` is None where it was not acknowledged."""

    number: int
    what: str
    subject: str
    token: str
    key: str
    started: int
    ended: int | None = None

    def may_end(self, issue: Step) -> bool:
        """Can this step have ended the token of that one?"""
        if self is issue or self.subject != issue.subject:
            return False
        if self.what == "use":
            return self.token == issue.token
        in_time = self.ended is None or self.ended > issue.started
        return self.what in ("issue", "deactivate") and in_time

    def must_end(self, issue: Step) -> bool:
        """Must this step have ended the token of that one?"""
        if not self.may_end(issue) or self.ended is None or issue.ended is None:
            return False
        return self.what == "use" or self.started > issue.ended


def read_notes(lines: Iterable[bytes]) -> list[Step]:
    """The steps, in the order in which they began. A last line may be cut short by the fault."""
    steps: dict[int, Step] = {}
    for place, line in enumerate(lines):
        if not line.endswith(b"\n"):
            break
        note = json.loads(line)
        if "n" in note:
            steps[note["n"]] = Step(
                note["n"], note["what"], note["subject"], note["token"], note["key"], place
            )
            continue
        if "failed" in note:
            del steps[note["failed"]]
            continue
        step = steps[note["done"]]
        if step.ended is None:
            step.ended = place
            step.token, step.key = note.get("token", step.token), note.get("key", step.key)
    return list(steps.values())


async def violations(store: Path, steps: Sequence[Step]) -> list[str]:
    """Open the store with the library, and compare it with what was noted. Uses up what can be used."""
    try:
        async with TokenManager(SQLiteBackend(store, check="always"), clock=fixed_clock) as manager:
            return await _Check(manager, steps).run()
    except BackendError as error:
        return [f"broken: {error!r}"]


class _Check:
    def __init__(self, manager: TokenManager, steps: Sequence[Step]) -> None:
        self._manager = manager
        self._steps = steps

    async def run(self) -> list[str]:
        subjects = {step.subject for step in self._steps}
        issues = [step for step in self._steps if step.what == "issue" and step.ended is not None]
        of_subjects = await asyncio.gather(*(self._subject(subject) for subject in subjects))
        of_tokens = await asyncio.gather(*(self._token(issue) for issue in issues))
        return [found for found in (*of_subjects, *of_tokens) if found]

    async def _subject(self, subject: str) -> str | None:
        active = [token async for token in self._manager.filter_active_tokens(Subject(TYPE, subject))]
        return f"two active: {len(active)} of {subject}" if len(active) > 1 else None

    async def _token(self, issue: Step) -> str | None:
        token = await self._manager.get(issue.token)
        if token is None:
            return f"lost: the token of step {issue.number}"
        ended_by = [step for step in self._steps if step.must_end(issue)]
        if ended_by and token.is_active:
            return f"undone: {ended_by[0].what} of step {ended_by[0].number}"
        ends = [step for step in self._steps if step.may_end(issue)]
        if not ends and not token.is_active:
            return f"ended by nobody: the token of step {issue.number}"
        if not self._data_fits(token, issue):
            return f"undone: data of the token of step {issue.number}"
        return await self._use(issue, ends)

    def _data_fits(self, token: VerificationToken, issue: Step) -> bool:
        saves = [step for step in self._steps if step.what == "save" and step.token == issue.token]
        acknowledged = [step.number for step in saves if step.ended is not None]
        possible = {(acknowledged or [issue.number])[-1]}
        possible |= {step.number for step in saves if step.ended is None}
        return token.get_extra_data() in [{"n": number} for number in possible]

    async def _use(self, issue: Step, ends: Sequence[Step]) -> str | None:
        """A token that nobody but one use can have ended gives to that use the same answer again, and to no
        other; one that nobody ended can be used, once."""
        if any(step.what != "use" for step in ends):
            return None
        consume_id = str(ends[0].number) if ends else "new"
        if not await self._consumed(issue, consume_id):
            return f"lost: the use {consume_id} of the token of step {issue.number}"
        if await self._consumed(issue, "other"):
            return f"used twice: the token of step {issue.number}"
        return None

    async def _consumed(self, issue: Step, consume_id: str) -> bool:
        try:
            await self._manager.consume(Subject(TYPE, issue.subject), SLUG, issue.key, consume_id=consume_id)
        except InvalidToken:
            return False
        return True
