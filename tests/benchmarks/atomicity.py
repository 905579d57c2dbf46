"""Fast and wrong is no result: what a store holds after a cell, and who wins a race on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from .contender import Contender, Op, Row, Run

_RIVALS: Final = 4
"""Tasks that want the same token at once, and tokens that they race for."""


class NotAtomicError(Exception):
    """A contender has broken what every contender must keep."""


async def verify(
    contender: Contender, filled: Sequence[str], ops: Sequence[Op], run: Run, *, keeps_ended: bool
) -> None:
    """Check the answers of a cell and what is stored afterwards; then race for single tokens.

    Args:
        contender: its store held nothing but a token for each of ``filled`` before the operations.
        filled: the objects whose tokens were there.
        ops: what was asked of it.
        run: what it answered.
        keeps_ended: whether a used or replaced token is still stored.

    Raises:
        NotAtomicError: an operation failed that had to succeed, a key was used twice, an object has another
            number of active tokens than one (none after its key was used), rows are missing or too many.
    """
    _check_answers(contender.name, ops, run)
    rows = await contender.rows()
    _check_rows(contender.name, rows, filled, ops, keeps_ended)
    await _race_to_consume(contender)
    await _race_to_issue(contender)
    await _replay(contender, ops)


def _require(holds: bool, name: str, what: str) -> None:
    if not holds:
        raise NotAtomicError(f"{name}: {what}")


def _check_answers(name: str, ops: Sequence[Op], run: Run) -> None:
    _require(len(run.answers) == len(ops) == len(run.waits), name, "answers are missing")
    failed = Counter(op.kind for op, answer in zip(ops, run.answers, strict=True) if not answer)
    _require(not failed, name, f"operations failed: {dict(failed)}")
    keys = [answer for op, answer in zip(ops, run.answers, strict=True) if op.kind == "issue"]
    _require(len(set(keys)) == len(keys), name, "a key was issued twice")


def _check_rows(
    name: str, rows: Sequence[Row], filled: Sequence[str], ops: Sequence[Op], keeps_ended: bool
) -> None:
    issued = [op.object_id for op in ops if op.kind == "issue"]
    used = {op.object_id for op in ops if op.kind == "consume"}
    left = len(filled) + len(issued) if keeps_ended else len({*filled, *issued} - used)
    _require(len(rows) == left, name, f"{len(rows)} rows are stored")
    _require(len({row.digest for row in rows}) == len(rows), name, "two rows have one digest")
    active = Counter(row.object_id for row in rows if row.is_active)
    expected = Counter(dict.fromkeys({*filled, *issued} - used, 1))
    _require(active == expected, name, "an object has not exactly one active token, or a used one is active")


async def _race_to_consume(contender: Contender) -> None:
    objects = [f"race-to-consume-{number}" for number in range(_RIVALS)]
    keys = await contender.fill(objects)
    ops = [Op("consume", o, k) for o, k in zip(objects, keys, strict=True) for _ in range(_RIVALS)]
    answers = (await contender.run(ops, len(ops))).answers
    won = Counter(op.object_id for op, answer in zip(ops, answers, strict=True) if answer)
    _require(won == Counter(objects), contender.name, f"uses of one key by {_RIVALS} rivals: {dict(won)}")


async def _race_to_issue(contender: Contender) -> None:
    objects = [f"race-to-issue-{number}" for number in range(_RIVALS)]
    ops = [Op("issue", object_id) for object_id in objects for _ in range(_RIVALS)]
    run = await contender.run(ops, len(ops))
    active = Counter(row.object_id for row in await contender.rows() if row.is_active)
    left = {object_id: active[object_id] for object_id in objects}
    _require(set(left.values()) == {1}, contender.name, f"active after {_RIVALS} issues at once: {left}")
    checks = [Op("check", op.object_id, str(key)) for op, key in zip(ops, run.answers, strict=True)]
    valid = sum(map(bool, (await contender.run(checks, 1)).answers))
    _require(valid == len(objects), contender.name, f"{valid} keys of {len(objects)} objects are valid")


async def _replay(contender: Contender, ops: Sequence[Op]) -> None:
    """A used key is not valid and can't be used again; a key of one object is no other object's."""
    used = [op for op in ops if op.kind == "consume"][:_RIVALS]
    wrong = [*used, *(op._replace(kind="check") for op in used)]
    wrong += [op._replace(object_id="another") for op in ops if op.kind == "check"][:_RIVALS]
    answers = (await contender.run(wrong, 1)).answers if wrong else []
    _require(not any(answers), contender.name, "a used key, or another object's, was accepted")
