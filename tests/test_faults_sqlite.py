"""The short tier of the faults of SQLite (``python -m tests.faults``), and what judges them."""

from __future__ import annotations

import shutil
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from vtoken import Subject, TokenManager
from vtoken_backends.sqlite import SQLiteBackend

from .faults import sqlite_life, sqlite_load, sqlite_rounds
from .faults.notes import SLUG, TYPE, Step, fixed_clock, read_notes, violations
from .faults.sqlite_disk import Disk, Event

needs_shim = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler (cc)"
)


@needs_shim
@pytest.mark.parametrize(
    "fault", [sqlite_rounds.crash, sqlite_rounds.errors, sqlite_rounds.power_loss], ids=lambda f: f.__name__
)
def test_what_was_acknowledged_outlives(fault: Callable[[bool], None]) -> None:
    fault(False)


@pytest.mark.skipif(sys.platform != "linux", reason="memory, threads and descriptors are counted in /proc")
@pytest.mark.parametrize("run", [sqlite_life.opens_and_closes, sqlite_load.load], ids=lambda f: f.__name__)
def test_nothing_leaks(run: Callable[[bool], None]) -> None:
    run(False)


# What judges: planted violations are found


async def _store(path: Path) -> list[Step]:
    """Of one subject: a replaced token, a used one, a deactivated one, a living one."""
    steps: list[Step] = []
    user = Subject(TYPE, "1")

    def note(what: str, token: str, key: str) -> None:
        number = len(steps) + 1
        steps.append(Step(number, what, "1", token, key, 2 * number, 2 * number + 1))

    async with TokenManager(SQLiteBackend(path), clock=fixed_clock) as manager:
        for then in ("", "use", "deactivate", ""):
            number = len(steps) + 1
            token = await manager.deactivate_and_create(user, SLUG, extra_data={"n": number})
            note("issue", token.id, token.key)
            if then == "use":
                await manager.consume(user, SLUG, token.key, consume_id=str(number + 1))
                note("use", token.id, token.key)
            if then == "deactivate":
                await manager.deactivate(user)
                note("deactivate", "", "")
    return steps


def _checked(path: Path) -> SQLiteBackend:
    return SQLiteBackend(path, check="always")


async def test_a_store_that_keeps_to_its_notes_passes(tmp_path: Path) -> None:
    steps = await _store(tmp_path / "tokens.db")
    assert [step.what for step in steps] == ["issue", "issue", "use", "issue", "deactivate", "issue"]
    assert await violations(_checked(tmp_path / "tokens.db"), steps) == []


REVIVE = "UPDATE vtoken_tokens SET state = 0, uses = 0, ends_at = expires_at"


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("DELETE FROM vtoken_tokens WHERE id = ?5", "lost: the token of step 6"),
        (REVIVE + " WHERE id = ?0", "undone: use of step 3"),
        (REVIVE + " WHERE id = ?0", "two active: 2 of 1"),
        (REVIVE + " WHERE id = ?3", "undone: deactivate of step 5"),
        ("UPDATE vtoken_tokens SET state = 2 WHERE id = ?5", "ended by nobody: the token of step 6"),
        ("UPDATE vtoken_tokens SET extra_data = '{}' WHERE id = ?5", "undone: data of the token of step 6"),
        ("UPDATE vtoken_tokens SET max_uses = 2 WHERE id = ?5", "used twice: the token of step 6"),
        ("UPDATE vtoken_tokens SET digests = x'00' WHERE id = ?5", "broken: CorruptStore"),
    ],
)
async def test_a_planted_violation_is_found(tmp_path: Path, sql: str, expected: str) -> None:
    path = tmp_path / "tokens.db"
    steps = await _store(path)
    sql, _, number = sql.partition("?")
    place = 1 if number == "0" else int(number)
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute(f"{sql}?", (int(steps[place].token, 16),))
    assert any(found.startswith(expected) for found in await violations(_checked(path), steps))


@pytest.mark.parametrize(
    ("of", "refused", "expected"),
    [
        (2, False, "used twice: the token of step 2"),
        (2, True, None),
        (6, False, "undone: use of step 7"),
        (6, True, "refused: the token of step 6"),
    ],
)
async def test_what_was_answered_is_judged(
    tmp_path: Path, of: int, refused: bool, expected: str | None
) -> None:
    steps = await _store(tmp_path / "tokens.db")
    issue = steps[of - 1]
    ended = None if refused else 21
    steps.append(Step(7, "use", "1", issue.token, issue.key, 20, ended, refused))
    found = await violations(_checked(tmp_path / "tokens.db"), steps)
    assert [violation.startswith(expected or "nothing") for violation in found] == [True] * bool(expected)


def test_a_step_that_was_not_acknowledged_may_have_happened() -> None:
    lines = [
        b'{"n": 1, "what": "issue", "subject": "1", "token": "", "key": ""}\n',
        b'{"n": 2, "what": "issue", "subject": "1", "token": "", "key": ""}\n',
        b'{"done": 1, "token": "a", "key": "k"}\n',
        b'{"n": 3, "what": "deactivate", "subject": "1", "token": "", "key": ""}\n',
        b'{"failed": 3}\n',
        b'{"done": 2, "tok',
    ]
    first, second = read_notes(lines)
    assert (first.token, first.ended, second.ended) == ("a", 2, None)
    assert second.may_end(first)
    assert not second.must_end(first)


# The disk that is played


class _Chance:
    """As told: what becomes of names, how much is kept, and the fate of each write."""

    def __init__(self, names: int, *fates: float) -> None:
        self._names = names
        self._fates = iter(fates)

    def randint(self, low: int, high: int) -> int:
        return max(low, min(self._names, high))

    def choice(self, _: object) -> float:
        return 0.5

    def random(self) -> float:
        return next(self._fates)


KEPT, DROPPED, TORN = 0.1, 0.6, 0.9


@pytest.mark.parametrize(
    ("fates", "expected", "undone"),
    [
        ((KEPT, KEPT), b"a" * 512 + b"b" * 1024, 0),
        ((DROPPED, KEPT), b"a" * 512 + b"b" * 1024, 1),  # what it truncated is not there either
        ((KEPT, DROPPED), b"a" * 512, 1),
        ((DROPPED, DROPPED), b"a" * 600, 2),
        ((KEPT, TORN, 0.9, 0.1), b"a" * 512 + bytes(512) + b"b" * 512, 1),
        ((KEPT, TORN, 0.1, 0.9), b"a" * 512 + b"b" * 512, 1),
    ],
)
def test_a_power_loss_spares_what_was_synced(fates: tuple[float, ...], expected: bytes, undone: int) -> None:
    disk = Disk()
    disk.apply([Event("C", "d/f", 0, b""), Event("W", "d/f", 0, b"a" * 600), Event("S", "d/f", 0, b"")])
    disk.apply([Event("S", "d", 0, b""), Event("T", "d/f", 512, b""), Event("W", "d/f", 512, b"b" * 1024)])
    assert disk.after_power_loss(_Chance(0, *fates)) == ({"d/f": expected}, undone)  # type: ignore[arg-type]  # what it uses of random.Random


def test_names_come_back_in_order_unless_their_directory_was_synced() -> None:
    disk = Disk()
    disk.apply([Event("C", "d/a", 0, b""), Event("S", "d", 0, b"")])
    disk.apply([Event("U", "d/a", 0, b""), Event("C", "d/b", 0, b"")])
    images = [disk.after_power_loss(_Chance(names)) for names in range(3)]  # type: ignore[arg-type]  # as above
    assert images == [({"d/a": b""}, 2), ({}, 1), ({"d/b": b""}, 0)]
