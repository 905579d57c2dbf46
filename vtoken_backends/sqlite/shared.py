"""One statement for many operations of a kind: why it exists, and how it works.

Beside a busy event loop, each further step of SQLite costs a wait for the interpreter lock, up to its switch
interval of 5 ms (``sys.setswitchinterval``). So the work of 1 or of 128 operations is one statement:

1. Every operation is a row of an ``INSERT`` into a temporary view.
2. An ``INSTEAD OF`` trigger of the view does the work of a row: it looks at the keys and the limits, changes
   or charges, and writes the answer down in a temporary table. An ``INSERT`` works row by row, so that a
   later row sees what the earlier ones did, and it is durable before anybody has read its answers.
3. One ``SELECT`` fetches all answers as one text. The task that waits for an answer reads its part.

``SELECT RAISE(IGNORE)`` ends the work of one row and goes on with the next. The views are temporary because
an answer is nothing to store. A connection makes one when it needs it first, or when a rollback has undone
it: there is one for each combination of features, so that nobody pays for statements that have nothing to do.
"""

# ruff: noqa: S608  # the SQL is put together from this package's own texts; values are always parameters

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from functools import cache
from operator import itemgetter
from typing import Any, Final, NamedTuple

from vtoken.backend import (
    MAX_STRIKES,
    BudgetState,
    Charge,
    Spend,
    Spending,
    StoredToken,
    budget_step,
    least_left,
    left_of,
)
from vtoken.errors import InvalidInput
from vtoken_backends.sqlite.records import AS_JSON, Unreadable, budget_state, from_row
from vtoken_backends.sqlite.steps import Private, Rows, Steps

_MOST_DIGESTS: Final = 1024
ANSWERS: Final = (
    "CREATE TEMP TABLE vtoken_numbers (nth INTEGER PRIMARY KEY)",
    f"""
    INSERT INTO vtoken_numbers WITH RECURSIVE counting (nth) AS (
        SELECT 0 UNION ALL SELECT nth + 1 FROM counting WHERE nth < {_MOST_DIGESTS - 1}
    ) SELECT nth FROM counting
    """,
    """
    CREATE TEMP TABLE vtoken_answers (
        place INTEGER PRIMARY KEY, outcome, token, origin, at, budgets, superseded, predecessor, token_row
    )
    """,
    # Statements of their own, so that an insert without them does not pay for them.
    f"""
    CREATE TEMP TRIGGER vtoken_found AFTER INSERT ON vtoken_answers
    WHEN NEW.token IS NOT NULL AND NEW.outcome <> 0
    BEGIN
        UPDATE vtoken_answers SET token_row = (SELECT {AS_JSON} FROM vtoken_tokens WHERE id = NEW.token)
        WHERE place = NEW.place;
    END
    """,
    """
    CREATE TEMP TRIGGER vtoken_superseding AFTER INSERT ON vtoken_answers WHEN NEW.superseded IS NOT NULL
    BEGIN
        DELETE FROM vtoken_keys WHERE digest IN (
            SELECT substr(NEW.superseded, 1 + 32 * nth, 32) FROM temp.vtoken_numbers
            WHERE nth < length(NEW.superseded) / 32
        );
    END
    """,
)
"""What each connection that writes keeps in memory for itself alone: where the triggers write their answers,
and numbers, by which a value that holds several digests is taken apart."""
_BETWEEN: Final = b"\x1e"
"""What stands between two answers. In JSON it never stands for itself."""
# As a blob, so that one text that is damaged (not UTF-8) does not keep the others from being read.
_READ_ANSWERS: Final = """
    SELECT CAST(group_concat(
        '[' || outcome || ',' || ifnull(token_row, 'null') || ',' || ifnull(at, 'null') || ','
            || ifnull(budgets, 'null') || ']', char(30)
    ) AS BLOB) FROM temp.vtoken_answers WHERE place < ?
"""
_decode: Final = json.JSONDecoder().raw_decode


class Kind:
    """Operations that share a statement.

    Args:
        view: its name.
        columns: of the view, ``place`` first.
        work: the statements of its trigger, for the row ``NEW``.
    """

    def __init__(self, view: str, columns: tuple[str, ...], work: str) -> None:
        self.view = view
        self.columns = columns
        self.work = work
        self._in_order = itemgetter(*columns[1:])

    def row(self, values: Mapping[str, Any]) -> Private:
        """The values of all columns but ``place``."""
        return Private(self._in_order(values))

    def __repr__(self) -> str:
        return f"<Kind {self.view}>"


class Text(bytes):
    """The text of an answer. Digests are in it, so no repr shows it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


class Answer(NamedTuple):
    """What a trigger answered."""

    outcome: int
    token: StoredToken | None
    at: int
    states: list[BudgetState | None]
    """What was stored of the budgets, before anything was charged."""


def work_together(kind: Kind, rows: Sequence[Private]) -> Steps[list[Text | Exception]]:
    """Have the work of all rows done, and return for each what :func:`answer_of` reads.

    Args:
        kind: what they have in common.
        rows: by :meth:`Kind.row`.
    """
    size = padded_size(len(rows))
    values: list[Any] = []
    for place, row in enumerate(rows):
        values.append(place)
        values += row
    values += [None] * ((size - len(rows)) * len(kind.columns))
    sql = _insert_sql(kind.view, len(kind.columns), size)
    try:
        yield sql, Private(values)
    except sqlite3.OperationalError as error:
        if "no such table: vtoken_" not in str(error):
            raise
        yield _view(kind), Private()
        yield _trigger(kind), Private()
        yield sql, Private(values)
    try:
        return _taken_apart((yield _READ_ANSWERS, Private((len(rows),))), len(rows))
    except Exception as error:  # it is done, and must not be done again
        return [error for _ in rows]


def answer_of(text: Text) -> Answer:
    """The answer of an operation: for the task that waits for it to read, because what the thread does in
    Python keeps the event loop waiting.

    Raises:
        Unreadable: it makes no sense.
    """
    try:
        (outcome, row, at, states), _ = _decode(text.decode())
        return Answer(
            outcome=outcome,
            token=None if row is None else from_row(row),
            at=at or 0,
            states=[budget_state(*state) for state in states] if states else [],
        )
    except (ValueError, TypeError, RecursionError):
        pass
    del text
    raise Unreadable


def joined(digests: Sequence[bytes]) -> bytes:
    """Several digests as one value.

    Raises:
        InvalidInput: there are more than one statement can compare.
    """
    if len(digests) > _MOST_DIGESTS:
        raise InvalidInput(f"at most {_MOST_DIGESTS} digests can be compared at once")
    return b"".join(digests)


def nth_of(digests: str) -> str:
    """SQL: one of several digests, for each row of ``vtoken_numbers``."""
    return f"substr({digests}, 1 + 32 * nth, 32)"


def padded_size(count: int) -> int:
    """The next power of two: few statements, each prepared once and then kept."""
    return 1 << (count - 1).bit_length()


@cache
def _insert_sql(view: str, columns: int, size: int) -> str:
    row = f"({', '.join('?' * columns)})"
    return f"INSERT INTO {view} VALUES {', '.join([row] * size)}"


def _view(kind: Kind) -> str:
    columns = ", ".join(f"NULL AS {column}" for column in kind.columns)
    return f"CREATE TEMP VIEW {kind.view} AS SELECT {columns}"


def _trigger(kind: Kind) -> str:
    # Rows without a place fill a statement up to its size.
    return f"""
        CREATE TEMP TRIGGER {kind.view}_work INSTEAD OF INSERT ON {kind.view} WHEN NEW.place IS NOT NULL
        BEGIN {kind.work} END
    """


def _taken_apart(rows: Rows, count: int) -> list[Text | Exception]:
    [(texts,)] = rows
    found = list(map(Text, texts.split(_BETWEEN)))
    if len(found) != count:
        raise Unreadable
    return [*found]


# Limits -------------------------------------------------------------------------------------------

LIMIT_COLUMNS: Final = ("limits", "budgets")
"""The limits of a row: a JSON array of [limit, window, max_window], and their names, 32 bytes each."""
_BUDGETS: Final = """
    json_each(NEW.limits) AS spend LEFT JOIN vtoken_budgets AS budget
        ON budget.object = substr(NEW.budgets, 1 + 32 * spend.key, 16)
        AND budget.name = substr(NEW.budgets, 17 + 32 * spend.key, 16)
"""
_LIMIT, _WINDOW, _MAX_WINDOW = (f"json_extract(spend.value, '$[{place}]')" for place in range(3))
_IS_FRESH: Final = f"""(
    until IS NULL OR until + {_MAX_WINDOW} <= NEW.now OR until > NEW.now + 2 * {_MAX_WINDOW}
)"""
IS_FULL: Final = f"""EXISTS (
    SELECT 1 FROM {_BUDGETS} WHERE spent > 0 AND spent >= {_LIMIT} AND until > NEW.now AND NOT {_IS_FRESH}
)"""
"""SQL: whether one of the limits of the row ``NEW`` is full at ``NEW.now``."""
STATES: Final = f"""(
    SELECT json_group_array(json_array(spent, strikes, until)) FROM (
        SELECT spent, strikes, until FROM {_BUDGETS} ORDER BY spend.key
    )
)"""
"""SQL: what is stored of the budgets of the row ``NEW``, as JSON."""


def charge_if(outcome: int) -> str:
    """SQL: take one from each budget, as :func:`vtoken.backend.budget_step` says, after an outcome."""
    return f"""
    INSERT INTO vtoken_budgets (object, name, spent, strikes, until)
    SELECT object, name, iif(is_running, spent + 1, 1), strikes,
        iif(is_running, until, NEW.now + min(window << strikes, max_window))
    FROM (
        SELECT object, name, spent, until, window, max_window,
            NOT is_fresh AND spent > 0 AND until > NEW.now AS is_running,
            CASE
                WHEN is_fresh THEN 0
                WHEN spent = 0 OR until > NEW.now THEN strikes
                WHEN spent >= most THEN min(strikes + 1, {MAX_STRIKES})
                ELSE 0
            END AS strikes
        FROM (
            SELECT substr(NEW.budgets, 1 + 32 * spend.key, 16) AS object,
                substr(NEW.budgets, 17 + 32 * spend.key, 16) AS name, spent, strikes, until,
                {_LIMIT} AS most, {_WINDOW} AS window, {_MAX_WINDOW} AS max_window, {_IS_FRESH} AS is_fresh
            FROM {_BUDGETS}
            WHERE EXISTS (SELECT 1 FROM temp.vtoken_answers WHERE place = NEW.place AND outcome = {outcome})
        )
    ) WHERE true
    ON CONFLICT DO UPDATE SET spent = excluded.spent, strikes = excluded.strikes, until = excluded.until;
    """


def limits_of(spends: Sequence[Spend]) -> dict[str, Any]:
    """The values of :data:`LIMIT_COLUMNS`."""
    limits = [[spend.limit, spend.window, spend.max_window] for spend in spends]
    return {"limits": json.dumps(limits), "budgets": names_of([spend.budget for spend in spends])}


def names_of(budgets: Sequence[Any]) -> bytes:
    """The names of budgets as one value, 32 bytes each."""
    return joined([budget.object + budget.name for budget in budgets])


def uncharged(states: Sequence[BudgetState | None], spends: Sequence[Spend], now: int) -> Spending:
    """The answer where nothing was charged."""
    lefts = [left_of(state, spend, now) for state, spend in zip(states, spends, strict=True)]
    return Spending(left=least_left(lefts))


def charged(
    states: Sequence[BudgetState | None], spends: Sequence[Spend], now: int
) -> tuple[Spending, list[BudgetState]]:
    """The answer where all were charged, and what has become of the budgets."""
    after = [budget_step(state, spend, now) for state, spend in zip(states, spends, strict=True)]
    kept = [state for state in after if state is not None]
    charges = tuple(
        Charge(budget=spend.budget, until=state.until) for state, spend in zip(kept, spends, strict=True)
    )
    left = least_left(max(spend.limit - s.spent, 0) for s, spend in zip(kept, spends, strict=True))
    return Spending(charges=charges, left=left), kept
