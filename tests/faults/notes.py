"""What was noted of each step, and whether the store that it left behind keeps to it."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from vtoken import InvalidToken, Subject, TokenManager, VerificationToken
from vtoken.backend import TokenBackend
from vtoken.errors import BackendError

TYPE: Final = "auth.user"
SLUG: Final = "reset"
SHARED: Final = "shared"


def fixed_clock() -> datetime:
    """The same in the worker and in whoever looks at the store afterwards."""
    return datetime(2030, 1, 1, tzinfo=UTC)


@dataclass
class Step:
    """One step; ``ended`` is None where it was not acknowledged, ``refused`` tells that its token was."""

    number: int
    what: str
    subject: str
    token: str
    key: str
    started: int
    ended: int | None = None
    refused: bool = False

    def is_use_of(self, issue: Step) -> bool:
        """Is this step about the token of that one?"""
        return self.what == "use" and self.token == issue.token

    def may_end(self, issue: Step) -> bool:
        """Can this step have ended the token of that one?"""
        if self is issue or self.refused or self.subject != issue.subject:
            return False
        if self.what == "use":
            return self.is_use_of(issue)
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
        if "unknown" in note:
            continue
        if "failed" in note:
            del steps[note["failed"]]
            continue
        if "refused" in note:
            steps[note["refused"]].refused = True
            continue
        step = steps[note["done"]]
        if step.ended is None:
            step.ended = place
            step.token, step.key = note.get("token", step.token), note.get("key", step.key)
    return list(steps.values())


async def violations(store: TokenBackend, steps: Sequence[Step]) -> list[str]:
    """Open the store with the library, and compare it with what was noted. Uses up what can be used."""
    try:
        async with TokenManager(store, clock=fixed_clock) as manager:
            return await _Check(manager, steps).run()
    except BackendError as error:
        return [f"broken: {error!r}"]


class _Check:
    def __init__(self, manager: TokenManager, steps: Sequence[Step]) -> None:
        self._manager = manager
        self._steps: dict[str, list[Step]] = {}
        for step in steps:
            self._steps.setdefault(step.subject, []).append(step)

    async def run(self) -> list[str]:
        steps = itertools.chain.from_iterable(self._steps.values())
        issues = [step for step in steps if step.what == "issue" and step.ended is not None]
        of_subjects = await asyncio.gather(*map(self._subject, self._steps))
        of_tokens = await asyncio.gather(*(self._token(issue) for issue in issues))
        return [found for found in (*of_subjects, *of_tokens) if found]

    async def _subject(self, subject: str) -> str | None:
        active = [token async for token in self._manager.filter_active_tokens(Subject(TYPE, subject))]
        return f"two active: {len(active)} of {subject}" if len(active) > 1 else None

    async def _token(self, issue: Step) -> str | None:
        steps = self._steps[issue.subject]
        token = await self._manager.get(issue.token)
        if token is None:
            return f"lost: the token of step {issue.number}"
        if sum(step.is_use_of(issue) and step.ended is not None for step in steps) > 1:
            return f"used twice: the token of step {issue.number}"
        ended_by = [step for step in steps if step.must_end(issue)]
        if ended_by and token.is_active:
            return f"undone: {ended_by[0].what} of step {ended_by[0].number}"
        ends = [step for step in steps if step.may_end(issue)]
        if not ends and any(step.is_use_of(issue) and step.refused for step in steps):
            return f"refused: the token of step {issue.number}, which nobody had ended"
        if not ends and not token.is_active:
            return f"ended by nobody: the token of step {issue.number}"
        if not self._data_fits(token, issue):
            return f"undone: data of the token of step {issue.number}"
        return await self._use(issue, ends)

    def _data_fits(self, token: VerificationToken, issue: Step) -> bool:
        of_subject = self._steps[issue.subject]
        saves = [step for step in of_subject if step.what == "save" and step.token == issue.token]
        acknowledged = [step.number for step in saves if step.ended is not None]
        possible = {(acknowledged or [issue.number])[-1]}
        possible |= {step.number for step in saves if step.ended is None}
        return token.get_extra_data() in [{"n": number} for number in possible]

    async def _use(self, issue: Step, ends: Sequence[Step]) -> str | None:
        """A token that nobody but its uses can have ended gives to one of them the same answer again, to the
        one that was acknowledged if there is such a one, and to no other; one that nobody ended can be used,
        once."""
        if any(step.what != "use" for step in ends):
            return None
        acknowledged = [str(step.number) for step in ends if step.ended is not None]
        consume_ids = [str(step.number) for step in ends] or ["new"]
        winners = [each for each in (*consume_ids, "other") if await self._consumed(issue, each)]
        if not set(acknowledged) <= set(winners) or not set(winners) & set(consume_ids):
            return f"lost: a use of the token of step {issue.number}"
        if len(winners) > 1:
            return f"used twice: the token of step {issue.number}"
        return None

    async def _consumed(self, issue: Step, consume_id: str) -> bool:
        try:
            await self._manager.consume(Subject(TYPE, issue.subject), SLUG, issue.key, consume_id=consume_id)
        except InvalidToken:
            return False
        return True
