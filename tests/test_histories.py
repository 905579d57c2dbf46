"""Histories of several processes on one store; and the checker, on histories with planted violations."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.histories import MONGODB, POSTGRESQL, SQLITE, Round
from tests.faults.journal import Journal, Tail, histories, unanswered
from tests.faults.linear import NEVER_RETURNED, Operation
from tests.faults.tokens import is_sound

from .conftest import a_store
from .servers import fresh_database


def history(*lines: str) -> list[Operation]:
    """Operations from lines such as ``"1-4 consume a ok"``; ``"1- issue"`` never returned."""
    operations: list[Operation] = []
    for number, line in enumerate(lines):
        times, do, *rest = line.split()
        start, _, end = times.partition("-")
        token = rest.pop(0) if do in ("verify", "consume", "redeem") else ""
        name = rest.pop().removeprefix("as:") if rest and rest[-1].startswith("as:") else str(number)
        result = tuple(rest) or ("",)
        operations.append(
            Operation("c", do, token, name, float(start), float(end), result)
            if end
            else Operation("c", do, token, name, float(start))
        )
    return operations


SOUND = {
    "one after the other": ["1-2 issue ok a", "3-4 verify a ok", "5-6 consume a ok", "7-8 consume a used"],
    "one of two at once wins": ["1-2 issue ok a", "3-5 consume a used", "4-6 consume a ok", "7-7 final"],
    "a late check may be early": ["1-2 issue ok a", "3-9 verify a ok", "4-5 issue ok b", "9-9 final b"],
    "the last issue stays": ["1-4 issue ok a", "2-3 issue ok b", "5-6 verify a ok", "7-8 verify b inactive"],
    "an unknown use happened late": [
        "1-2 issue ok a",
        "3- consume a",
        "4-5 verify a ok",
        "6-7 verify a used",
    ],
    "an unknown use never happened": ["1-2 issue ok a", "3- consume a", "9-9 final a"],
    "an unknown issue happened": ["1-2 issue ok a", "3- issue", "4-5 verify a inactive", "9-9 final x"],
    "an unknown issue was found": ["1- issue", "2-3 ensure ok x", "4-5 consume x ok", "9-9 final"],
    "a use once more": [
        "1-2 issue ok a",
        "3- consume a as:n",
        "4-5 consume a ok as:n",
        "6-7 consume a ok as:n",
    ],
    "redeemed": ["1-2 issue ok a", "3-6 redeem a ok", "4-5 verify a leased", "7-8 consume a used"],
    "replaced while held": [
        "1-2 issue ok a",
        "3-8 redeem a ok",
        "4-5 issue ok b",
        "6-7 consume a inactive",
        "9-9 consume a used",
        "10-10 final b",
    ],
    "found while held": ["1-2 issue ok a", "3-6 redeem a ok", "4-5 ensure ok a"],
    "revoked while held": ["1-2 issue ok a", "3-6 redeem a lost", "4-5 deactivate 1", "9-9 final"],
    "revoked after it was replaced": [
        "1-2 issue ok a",
        "3-8 redeem a lost",
        "4-5 issue ok b",
        "6-7 deactivate 1",
    ],
    "ended": ["1-2 issue ok a", "3-4 deactivate 1", "5-6 deactivate 0", "7-8 verify a inactive"],
}
VIOLATED = {
    "used twice": ["1-2 issue ok a", "3-5 consume a ok", "4-6 consume a ok"],
    "used twice, one of them unknown": [
        "1-2 issue ok a",
        "3- consume a",
        "4-5 verify a used",
        "6-7 consume a ok",
    ],
    "valid after its use": ["1-2 issue ok a", "3-4 consume a ok", "5-6 verify a ok"],
    "revived": ["1-2 issue ok a", "3-4 deactivate 1", "5-6 verify a ok"],
    "valid after its replacement": ["1-2 issue ok a", "3-4 issue ok b", "5-6 verify a ok"],
    "two are active": ["1-4 issue ok a", "2-3 issue ok b", "9-9 final a b"],
    "an acknowledged issue is lost": ["1-2 issue ok a", "9-9 final"],
    "an acknowledged use is lost": ["1-2 issue ok a", "3-4 consume a ok", "9-9 final a"],
    "read forwards, then back": ["1- issue", "2-3 ensure ok x", "4-5 issue ok b", "6-7 ensure ok x"],
    "two at once got different ones": ["1-4 ensure ok a", "2-3 ensure ok b", "9-9 final b"],
    "lost without a reason": ["1-2 issue ok a", "3-6 redeem a lost"],
    "used after its revocation": [
        "1-2 issue ok a",
        "3-6 redeem a ok",
        "4-5 deactivate 1",
        "9-9 verify a used",
    ],
    "redeemed and used": ["1-2 issue ok a", "3-6 redeem a ok", "4-5 consume a ok"],
    "counted twice": ["1-2 issue ok a", "3-5 deactivate 1", "4-6 deactivate 1"],
    "found before it was issued": ["1-2 ensure ok a", "3-4 issue ok a"],
    "capped without a cap": ["1-2 wrong capped"],
}


@pytest.mark.parametrize("lines", SOUND.values(), ids=SOUND)
def test_a_sound_history_is_explained(lines: list[str]) -> None:
    assert is_sound(history(*lines), None)


@pytest.mark.parametrize("lines", VIOLATED.values(), ids=VIOLATED)
def test_a_violation_is_found(lines: list[str]) -> None:
    assert not is_sound(history(*lines), None)


def test_a_reader_between_two_steps_sees_none_where_that_is_promised() -> None:
    seen = history("1-2 issue ok a", "3-8 issue ok b", "4-5 deactivate 0", "6-7 verify a inactive")
    assert is_sound(seen, None, in_two_steps=True)
    assert not is_sound(seen, None)


WRONG = ["1-2 wrong unknown", "3-4 wrong unknown"]
WRONG_LATER = ["4-5 wrong unknown", "6-7 wrong unknown", "8-9 wrong unknown"]


@pytest.mark.parametrize(
    ("lines", "is_right"),
    [
        ([*WRONG, "5-6 wrong capped"], True),
        ([*WRONG, "5-6 wrong unknown"], False),
        (["1-2 wrong unknown", "3-4 wrong capped"], False),
        (["1-2 wrong unknown", "3- wrong", "4-5 wrong capped"], True),
        (["1-2 wrong unknown", "3- wrong", "4-5 wrong unknown", "6-7 wrong capped"], True),
        (["1-2 wrong unknown", "3-9 verify a inactive", "4-5 wrong capped"], True),
        (["0-0 issue ok a", "1-2 wrong unknown", "3-4 verify a ok", "5-6 wrong unknown"], True),
        (["0-0 issue ok a", "1-2 wrong unknown", "3-4 consume a ok", "5-6 wrong capped"], False),
        (["0-0 issue ok a", *WRONG, "5-6 consume a capped", "7-8 wrong capped"], True),
        (["0-0 issue ok a", *WRONG, "5-6 consume a ok"], False),
        # A use that is asked for again is neither limited nor charged.
        (["0-0 issue ok a", "1-2 consume a ok as:n", *WRONG_LATER[:2], "9-9 consume a ok as:n"], True),
        (["0-0 issue ok a", "1-2 consume a ok as:n", *WRONG_LATER[:2], "9-9 wrong capped"], True),
        # A right key is never counted, so it has nothing to be given back, either.
        (["0-0 issue ok a", "1-9 consume a used", "2-3 consume a ok", *WRONG_LATER], False),
        (["0-0 issue ok a", "1-2 wrong unknown", "3-9 consume a ok", "4-5 wrong capped"], False),
    ],
)
def test_wrong_keys_are_counted(lines: list[str], is_right: bool) -> None:
    assert is_sound(history(*lines), 2) is is_right


def test_wrong_keys_may_fill_the_limit_after_a_right_one_was_let_through() -> None:
    seen = history("0-0 issue ok a", *WRONG[:1], "3-9 consume a ok", "4-5 wrong unknown", "6-7 wrong capped")
    assert is_sound(seen, 2, in_two_steps=True)
    assert not is_sound(seen, 2)


def test_a_journal_tells_what_was_under_way(tmp_path: Path) -> None:
    journal, tail = Journal(tmp_path / "one.jsonl"), Tail(tmp_path)
    journal.write(n=1, client=0, do="issue", subject="7", token="", name="one-1")
    assert [line["n"] for _, line in tail] == [1]
    journal.write(n=1, result=["ok", "a"])
    journal.write(n=2, client=1, do="consume", subject="7", token="a", name="one-2")
    with (tmp_path / "one.jsonl").open("ab") as file:
        file.write(b'{"at": 1, "n": 2, "res')  # killed in the middle of a line
    assert len(list(tail)) == 2
    journal.close()
    tail.close()
    [(subject, (first, second))] = histories(tmp_path).items()
    assert (subject, first.result, second.end) == ("7", ("ok", "a"), NEVER_RETURNED)
    assert unanswered([first, second]) == 1


def test_processes_on_one_sqlite_store_are_linearizable(tmp_path: Path) -> None:
    outcome = Round(SQLITE, f"sqlite:///{tmp_path}/tokens.db", tmp_path, seed=1).play(800, kills=2)
    assert not outcome.violations, "\n".join(outcome.violations)
    assert (outcome.kills, outcome.operations >= 800) == (2, True)
    assert outcome.unanswered >= 2


def test_processes_on_one_mongodb_store_are_linearizable(tmp_path: Path, mongodb_replica_set: str) -> None:
    with fresh_database(mongodb_replica_set) as url:
        outcome = Round(MONGODB, url, tmp_path, seed=1).play(500, kills=1)
    assert not outcome.violations, "\n".join(outcome.violations)
    assert (outcome.kills, outcome.operations >= 500) == (1, True)
    assert outcome.unanswered >= 1


def test_processes_on_one_postgresql_store_are_linearizable(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with a_store("postgresql", request, tmp_path) as url:
        outcome = Round(POSTGRESQL, url, tmp_path, seed=1).play(500, kills=1)
    assert not outcome.violations, "\n".join(outcome.violations)
    assert (outcome.kills, outcome.operations >= 500) == (1, True)
    assert outcome.unanswered >= 1


@pytest.mark.parametrize("planted", ["UsesTwice", "KeepsTwo", "CountsFarTooMany"])
def test_a_planted_bug_is_found(tmp_path: Path, planted: str) -> None:
    """A race shows itself in one round or in one of the next."""
    for number in range(10):
        directory = tmp_path / str(number)
        directory.mkdir()
        url = f"sqlite:///{directory}/tokens.db"
        if Round(f"tests.faults.histories_planted:{planted}", url, directory).play(600, kills=0).violations:
            return
    raise AssertionError("10 rounds have found nothing")
