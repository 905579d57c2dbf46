"""One statement for many operations of a kind: inserts, and presented keys.

Beside a busy event loop, each further step of SQLite costs a wait for the interpreter lock, up to its switch
interval of 5 ms (``sys.setswitchinterval``). So the work of 1 or of 128 operations is one statement:

1. Every operation is a row of an ``INSERT`` into a temporary view.
2. An ``INSTEAD OF`` trigger of the view does the work of a row: it looks at the keys and the limits, changes
   or charges, and writes the answer down in a temporary table. An ``INSERT`` works row by row, so that a
   later row sees what the earlier ones did, and it is durable before anybody has read its answers.
3. One ``SELECT`` fetches all answers as one text of JSON.

``SELECT RAISE(IGNORE)`` ends the work of one row and goes on with the next. The views are temporary because
an answer is nothing to store; they are made by :data:`FOR_A_CONNECTION`.
"""

# ruff: noqa: S608  # the SQL is put together from this package's own texts; values are always parameters

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any, Final, NamedTuple

from vtoken.backend import (
    MAX_STRIKES,
    STALE_HOLD,
    BudgetState,
    Charge,
    Hold,
    Inserted,
    InsertMode,
    InsertResult,
    Match,
    Outcome,
    Presented,
    Spend,
    Spending,
    State,
    StoredToken,
    Use,
    budget_step,
    full_spending,
    least_left,
    left_of,
)
from vtoken.errors import InvalidInput
from vtoken_backends.sqlite.records import (
    AS_JSON,
    COLUMNS,
    HOLD_ENTRY,
    KEY_ENTRY,
    budget_state,
    from_json,
    to_row,
)
from vtoken_backends.sqlite.steps import Private, Steps

_MOST_DIGESTS: Final = 1024
_MODES: Final = {mode: number for number, mode in enumerate(InsertMode)}
_ADD, _IF_NONE_VALID, _ONCE = (
    _MODES[mode] for mode in (InsertMode.ADD, InsertMode.IF_NONE_VALID, InsertMode.ONCE)
)
_INSERTED, _KEY_TAKEN, _HAS_VALID, _INSERT_LIMITED = range(4)
_RIGHT, _REPLAYED, _REFUSED, _TOO_LATE, _LIMITED = range(5)
"""What the triggers answer. ``_TOO_LATE`` is a refusal for which nothing is charged."""


# What a connection keeps in memory ----------------------------------------------------------------


def _of_key(name: str) -> str:
    return f"json_extract(value, '$[{KEY_ENTRY.index(name)}]')"


_HOLD_UNTIL: Final = f"json_extract(value, '$[{HOLD_ENTRY.index('until')}]')"
_ACTIVE, _USED, _REPLACED = State.ACTIVE.value, State.USED.value, State.REPLACED.value


def _digest(digests: str) -> str:
    return f"substr({digests}, 1 + 32 * nth, 32)"


def _runs(now: str) -> str:
    """Whether an entry of ``holds`` counts at a time."""
    return f"{_HOLD_UNTIL} > {now} AND {_HOLD_UNTIL} <= {now} + {STALE_HOLD}"


def _has_running_hold(now: str) -> str:
    return f"(holds <> '[]' AND EXISTS (SELECT 1 FROM json_each(holds) WHERE {_runs(now)}))"


# The limits of a row: `limits` is a JSON array of [limit, window, max_window], `budgets` their names.
_LIMITS: Final = """
    json_each(NEW.limits) AS spend LEFT JOIN vtoken_budgets AS budget
        ON budget.object = substr(NEW.budgets, 1 + 32 * spend.key, 16)
        AND budget.name = substr(NEW.budgets, 17 + 32 * spend.key, 16)
"""
_LIMIT, _WINDOW, _MAX_WINDOW = (f"json_extract(spend.value, '$[{place}]')" for place in range(3))
_ENDED: Final = "until + {max} <= {now} OR until > {now} + 2 * {max}"
_FULL: Final = f"""EXISTS (
    SELECT 1 FROM {_LIMITS}
    WHERE spent > 0 AND spent >= {_LIMIT} AND until > NEW.now
        AND NOT ({_ENDED.format(max=_MAX_WINDOW, now="NEW.now")})
)"""
_STATES: Final = f"""(
    SELECT json_group_array(json_array(spent, strikes, until)) FROM (
        SELECT spent, strikes, until FROM {_LIMITS} ORDER BY spend.key
    )
)"""
_CHARGE: Final = """
    INSERT INTO vtoken_budgets (object, name, spent, strikes, until)
    WITH_STATE
    ON CONFLICT DO UPDATE SET spent = excluded.spent, strikes = excluded.strikes, until = excluded.until;
""".replace(
    "WITH_STATE",
    f"""
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
                {_LIMIT} AS most, {_WINDOW} AS window, {_MAX_WINDOW} AS max_window,
                until IS NULL OR {_ENDED.format(max=_MAX_WINDOW, now="NEW.now")} AS is_fresh
            FROM {_LIMITS}
            WHERE EXISTS (SELECT 1 FROM temp.vtoken_answers WHERE place = NEW.place AND outcome = CHARGED)
        )
    ) WHERE true""",
)


def _charge(outcome: int) -> str:
    """Take one from each budget, as :func:`vtoken.backend.budget_step` says."""
    return _CHARGE.replace("CHARGED", str(outcome))


_LINE: Final = (
    "(content_type, object_id, slug, context) = (NEW.content_type, NEW.object_id, NEW.slug, NEW.context)"
)
_INSERT_COLUMNS: Final = (
    *("place", "mode", "keep_until", "wanted_until", "taken", "now", "limits", "budgets"),
    *COLUMNS,
)
_VALID: Final = f"""CASE WHEN NEW.mode = {_IF_NONE_VALID} THEN (
    SELECT max(id) FROM vtoken_tokens AS other
    WHERE {_LINE} AND state = {_ACTIVE} AND expires_at >= NEW.wanted_until AND NOT EXISTS (
        SELECT 1 FROM json_each(other.keys)
        WHERE {_of_key("origin")} = other.id AND {_of_key("expires_at")} < NEW.wanted_until
    )
) END"""
_TAKEN: Final = f"""(
    EXISTS (SELECT 1 FROM vtoken_tokens WHERE id = NEW.id)
    OR EXISTS (
        SELECT 1 FROM temp.vtoken_numbers CROSS JOIN vtoken_keys AS taken CROSS JOIN vtoken_tokens AS owner
        WHERE nth < length(NEW.taken) / 32 AND taken.digest = {_digest("NEW.taken")}
            AND owner.id = taken.token AND NOT (
                NEW.mode <> {_ONCE} AND taken.kind = 'code'
                AND (owner.content_type, owner.object_id, owner.slug)
                    = (NEW.content_type, NEW.object_id, NEW.slug)
                AND (
                    owner.state <> {_ACTIVE} OR owner.expires_at < NEW.created_at
                    OR (NEW.mode <> {_ADD} AND owner.context = NEW.context)
                )
            )
    )
)"""
_OWNER: Final = f"""CASE WHEN NEW.mode = {_ONCE} THEN (
    SELECT token FROM temp.vtoken_numbers CROSS JOIN vtoken_keys
    WHERE nth < length(NEW.taken) / 32 AND digest = {_digest("NEW.taken")} LIMIT 1
) END"""
_PREDECESSOR: Final = f"""(
    SELECT id FROM (
        SELECT * FROM vtoken_tokens
        WHERE {_LINE} AND is_beside = 0 AND state = {_ACTIVE} ORDER BY id DESC LIMIT 1
    )
    WHERE expires_at >= NEW.created_at AND extra_data IS NEW.extra_data
        AND NOT {_has_running_hold("NEW.created_at")}
)"""
_OVERLAPPED: Final = "(SELECT predecessor FROM temp.vtoken_answers WHERE place = NEW.place)"
_IS_TAKEN_OVER: Final = f"{_of_key('origin')} = {_OVERLAPPED} AND {_of_key('expires_at')} >= NEW.created_at"
_TAKEN_OVER: Final = f"""
    vtoken_tokens AS predecessor CROSS JOIN json_each(predecessor.keys)
    WHERE predecessor.id = {_OVERLAPPED} AND {_IS_TAKEN_OVER}
"""
_ALL_KEYS: Final = f"""(
    SELECT json_group_array(json(entry)) FROM (
        SELECT value AS entry FROM json_each(NEW.keys)
        UNION ALL
        SELECT json_set(
            value, '$[{KEY_ENTRY.index("expires_at")}]', min({_of_key("expires_at")}, NEW.keep_until)
        ) FROM {_TAKEN_OVER}
    )
)"""
_ALL_DIGESTS: Final = f"""(
    SELECT CAST(NEW.digests || ifnull(group_concat(digest, ''), '') AS BLOB) FROM (
        SELECT substr(predecessor.digests, 1 + 32 * key, 32) AS digest FROM {_TAKEN_OVER}
    )
)"""
_INSERT_VALUES: Final = ", ".join(
    f"iif({_OVERLAPPED} IS NULL, NEW.keys, {_ALL_KEYS})"
    if name == "keys"
    else f"iif({_OVERLAPPED} IS NULL, NEW.digests, {_ALL_DIGESTS})"
    if name == "digests"
    else f"NEW.{name}"
    for name in COLUMNS
)
_INSERT_TRIGGER: Final = f"""
CREATE TEMP TRIGGER vtoken_inserting INSTEAD OF INSERT ON vtoken_insert WHEN NEW.place IS NOT NULL
BEGIN
    INSERT OR REPLACE INTO vtoken_answers (place, outcome, token, budgets)
    SELECT NEW.place, outcome, CASE outcome WHEN {_KEY_TAKEN} THEN {_OWNER} WHEN {_HAS_VALID} THEN valid END,
        CASE WHEN NEW.limits IS NOT NULL THEN {_STATES} END
    FROM (
        SELECT valid, CASE
            WHEN {_TAKEN} THEN {_KEY_TAKEN}
            WHEN valid IS NOT NULL THEN {_HAS_VALID}
            WHEN NEW.limits IS NOT NULL AND {_FULL} THEN {_INSERT_LIMITED}
            ELSE {_INSERTED}
        END AS outcome
        FROM (SELECT {_VALID} AS valid)
    );
    UPDATE vtoken_answers SET token_row = (SELECT {AS_JSON} FROM vtoken_tokens WHERE id = token)
    WHERE place = NEW.place AND token IS NOT NULL;
    SELECT RAISE(IGNORE) FROM vtoken_answers WHERE place = NEW.place AND outcome <> {_INSERTED};

    DELETE FROM vtoken_keys WHERE digest IN (
        SELECT {_digest("NEW.taken")} FROM temp.vtoken_numbers WHERE nth < length(NEW.taken) / 32
    );
    {_charge(_INSERTED)}
    UPDATE vtoken_answers SET predecessor = {_PREDECESSOR}
    WHERE place = NEW.place AND NEW.keep_until > NEW.created_at AND NEW.mode <> {_ADD};
    INSERT INTO vtoken_tokens ({", ".join(COLUMNS)}) SELECT {_INSERT_VALUES};
    INSERT INTO vtoken_keys (digest, token, origin, kind, expires_at)
    SELECT substr(NEW.digests, 1 + 32 * key, 32), NEW.id, {_of_key("origin")}, {_of_key("kind")},
        {_of_key("expires_at")}
    FROM json_each(NEW.keys);
    UPDATE vtoken_keys SET token = NEW.id, expires_at = min(expires_at, NEW.keep_until)
    WHERE digest IN (SELECT substr(predecessor.digests, 1 + 32 * key, 32) FROM {_TAKEN_OVER});
    UPDATE vtoken_tokens SET keys = (
        SELECT json_group_array(json(iif({_IS_TAKEN_OVER}, {_of_key("origin")}, value))) FROM json_each(keys)
    ) WHERE id = {_OVERLAPPED};
    UPDATE vtoken_tokens SET state = {_REPLACED}, ends_at = min(ends_at, NEW.created_at - 1)
    WHERE {_LINE} AND state = {_ACTIVE} AND id <> NEW.id AND NEW.mode <> {_ADD};
    UPDATE vtoken_answers SET token_row = (SELECT {AS_JSON} FROM vtoken_tokens WHERE id = NEW.id)
    WHERE place = NEW.place AND predecessor IS NOT NULL;
END
"""

_PRESENT_COLUMNS: Final = (
    *("place", "digests", "kind", "id", "content_type", "object_id", "slug", "context", "now"),
    *("use_id", "at", "resets", "hold", "limits", "budgets"),
)
_REFUSAL: Final = f"""CASE
    WHEN state <> {_ACTIVE} THEN iif(state = {_USED}, {_TOO_LATE}, {_REFUSED})
    WHEN vtoken_tokens.expires_at < NEW.now OR presented.expires_at < NEW.now THEN {_REFUSED}
    WHEN max_uses IS NULL THEN {_RIGHT}
    WHEN uses + iif(
        holds = '[]', 0, (SELECT count(*) FROM json_each(holds) WHERE {_runs("NEW.now")})
    ) < max_uses THEN {_RIGHT}
    ELSE {_TOO_LATE}
END"""
# Of several tokens that match: one that was used with this id, else one that can be used, else one whose
# refusal costs nothing.
_FOUND: Final = f"""
    SELECT iif(receipt.at IS NULL, vtoken_tokens.id, receipt.token) AS token, presented.origin AS origin,
        receipt.at AS at, {_REFUSAL} AS refusal
    FROM temp.vtoken_numbers CROSS JOIN vtoken_keys AS presented CROSS JOIN vtoken_tokens
        LEFT JOIN vtoken_receipts AS receipt
            ON receipt.origin = presented.origin AND receipt.use_id = NEW.use_id
    WHERE nth < length(NEW.digests) / 32 AND presented.digest = {_digest("NEW.digests")}
        AND vtoken_tokens.id = presented.token
        AND (NEW.kind IS NULL OR presented.kind = NEW.kind)
        AND (NEW.id IS NULL OR vtoken_tokens.id = NEW.id)
        AND (NEW.content_type IS NULL OR content_type = NEW.content_type)
        AND (NEW.object_id IS NULL OR object_id = NEW.object_id)
        AND (NEW.slug IS NULL OR slug = NEW.slug)
        AND (NEW.context IS NULL OR context = NEW.context)
    ORDER BY receipt.at IS NULL, refusal <> {_RIGHT}, refusal <> {_TOO_LATE}, nth LIMIT 1
"""
_CHANGED: Final = f"(SELECT token FROM temp.vtoken_answers WHERE place = NEW.place AND outcome = {_RIGHT})"
_USE: Final = f"""
    UPDATE vtoken_tokens SET uses = uses + 1, used_at = NEW.at,
        state = iif(uses + 1 >= max_uses, {_USED}, state),
        ends_at = iif(uses + 1 >= max_uses, min(ends_at, NEW.at - 1), ends_at)
    WHERE id = {_CHANGED};
    INSERT OR IGNORE INTO vtoken_receipts (origin, use_id, token, number, at)
    SELECT origin, NEW.use_id, token, (SELECT uses FROM vtoken_tokens WHERE id = token), NEW.at
    FROM temp.vtoken_answers WHERE place = NEW.place AND outcome = {_RIGHT} AND NEW.use_id IS NOT NULL;
    DELETE FROM vtoken_budgets WHERE {_CHANGED} IS NOT NULL AND (object, name) IN (
        SELECT substr(NEW.resets, 1 + 32 * nth, 16), substr(NEW.resets, 17 + 32 * nth, 16)
        FROM temp.vtoken_numbers WHERE nth < length(NEW.resets) / 32
    );
"""
_HOLD: Final = f"""
    UPDATE vtoken_tokens SET holds = json_insert(
        iif(holds = '[]', holds, (
            SELECT json_group_array(json(value)) FROM json_each(holds) WHERE {_runs("NEW.now")}
        )),
        '$[#]', json_set(NEW.hold, '$[{HOLD_ENTRY.index("origin")}]', (
            SELECT origin FROM temp.vtoken_answers WHERE place = NEW.place
        ))
    ) WHERE id = {_CHANGED};
"""


def _present_trigger(view: str, change: str) -> str:
    return f"""
CREATE TEMP TRIGGER {view}_presented INSTEAD OF INSERT ON {view} WHEN NEW.place IS NOT NULL
BEGIN
    INSERT OR REPLACE INTO vtoken_answers (place, outcome, token, origin, at, budgets)
    SELECT NEW.place, CASE
            WHEN found.at IS NOT NULL THEN {_REPLAYED}
            WHEN NEW.limits IS NOT NULL AND {_FULL} THEN {_LIMITED}
            ELSE ifnull(refusal, {_REFUSED})
        END, token, origin, at, CASE WHEN NEW.limits IS NOT NULL THEN {_STATES} END
    FROM (SELECT 1) LEFT JOIN ({_FOUND}) AS found;
    {change}
    {_charge(_REFUSED)}
    UPDATE vtoken_answers SET token_row = (SELECT {AS_JSON} FROM vtoken_tokens WHERE id = token)
    WHERE place = NEW.place AND outcome <> {_LIMITED};
END
"""


def _view(name: str, columns: Sequence[str]) -> str:
    return f"CREATE TEMP VIEW {name} AS SELECT {', '.join(f'NULL AS {column}' for column in columns)}"


_USES, _HOLDS, _CHECKS = "vtoken_use", "vtoken_hold", "vtoken_check"
"""The views for what somebody who presents a key asks for."""
FOR_A_CONNECTION: Final = (
    "CREATE TEMP TABLE vtoken_numbers (nth INTEGER PRIMARY KEY)",
    f"""
    INSERT INTO vtoken_numbers WITH RECURSIVE counting (nth) AS (
        SELECT 0 UNION ALL SELECT nth + 1 FROM counting WHERE nth < {_MOST_DIGESTS - 1}
    ) SELECT nth FROM counting
    """,
    """
    CREATE TEMP TABLE vtoken_answers (
        place INTEGER PRIMARY KEY, outcome, token, origin, predecessor, at, token_row, budgets
    )
    """,
    _view("vtoken_insert", _INSERT_COLUMNS),
    _INSERT_TRIGGER,
    *(_view(view, _PRESENT_COLUMNS) for view in (_USES, _HOLDS, _CHECKS)),
    _present_trigger(_USES, _USE),
    _present_trigger(_HOLDS, _HOLD),
    _present_trigger(_CHECKS, ""),
)
"""What a connection keeps in memory for itself alone."""
_ANSWERS: Final = """
    SELECT '[' || group_concat(
        '[' || outcome || ',' || ifnull(token_row, 'null') || ',' || ifnull(at, 'null') || ','
            || ifnull(budgets, 'null') || ']'
    ) || ']' FROM temp.vtoken_answers WHERE place >= ? AND place < ?
"""


# The operations -----------------------------------------------------------------------------------


class Insert(NamedTuple):
    """What :meth:`TokenBackend.insert` is asked for."""

    token: StoredToken
    mode: InsertMode
    keep_until: int
    wanted_until: int
    also_taken: tuple[bytes, ...]
    spends: tuple[Spend, ...]

    def __repr__(self) -> str:
        return "<Insert>"


class Present(NamedTuple):
    """What :meth:`TokenBackend.present` is asked for."""

    key: Match
    change: Use | Hold | None
    now: int
    spends: tuple[Spend, ...]

    @property
    def kind(self) -> str:
        """Which requests can share a statement."""
        if self.change is None:
            return _CHECKS
        return _USES if isinstance(self.change, Use) else _HOLDS

    def __repr__(self) -> str:
        return "<Present>"


def insert_many(requests: Sequence[Insert]) -> Steps[list[Inserted | Exception]]:
    """Insert, one after the other; a request may see what the ones before it did."""
    rows = [_insert_row(place, request) for place, request in enumerate(requests)]
    yield _insert_sql("vtoken_insert", _INSERT_COLUMNS, len(rows)), _padded(rows, _INSERT_COLUMNS)
    answers = yield from _answers(len(requests))
    return [
        answer if isinstance(answer, Exception) else _inserted(request, answer)
        for request, answer in zip(requests, answers, strict=True)
    ]


def present_many(requests: Sequence[Present]) -> Steps[list[Presented | Exception]]:
    """Present keys, one after the other, for changes of one type."""
    rows = [_present_row(place, request) for place, request in enumerate(requests)]
    yield _insert_sql(requests[0].kind, _PRESENT_COLUMNS, len(rows)), _padded(rows, _PRESENT_COLUMNS)
    answers = yield from _answers(len(requests))
    return [
        answer if isinstance(answer, Exception) else _presented(request, answer)
        for request, answer in zip(requests, answers, strict=True)
    ]


def joined(digests: Sequence[bytes]) -> bytes:
    """Several digests as one value.

    Raises:
        InvalidInput: there are more than one statement can compare.
    """
    if len(digests) > _MOST_DIGESTS:
        raise InvalidInput(f"at most {_MOST_DIGESTS} digests can be compared at once")
    return b"".join(digests)


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


def names_of(budgets: Sequence[Any]) -> bytes:
    """The names of budgets as one value, 32 bytes each."""
    return joined([budget.object + budget.name for budget in budgets])


def _limits(spends: Sequence[Spend]) -> dict[str, Any]:
    if not spends:
        return {"limits": None, "budgets": None}
    limits = [[spend.limit, spend.window, spend.max_window] for spend in spends]
    return {"limits": json.dumps(limits), "budgets": names_of([spend.budget for spend in spends])}


def _insert_row(place: int, request: Insert) -> dict[str, Any]:
    row = to_row(request.token)
    taken = row["digests"] if not request.also_taken else row["digests"] + joined(request.also_taken)
    return (
        row
        | _limits(request.spends)
        | {
            "place": place,
            "mode": _MODES[request.mode],
            "keep_until": request.keep_until,
            "wanted_until": request.wanted_until,
            "taken": taken,
            "now": request.token.created_at,
        }
    )


def _present_row(place: int, request: Present) -> dict[str, Any]:
    key, change = request.key, request.change
    row: dict[str, Any] = {
        "place": place,
        "digests": joined(key.digests or ()),
        "kind": key.kind,
        "id": None if key.id is None else int(key.id, 16),
        "content_type": key.content_type,
        "object_id": key.object_id,
        "slug": key.slug,
        "context": key.context,
        "now": request.now,
        "use_id": (change.use_id or None) if change is not None else None,
        "at": None,
        "resets": None,
        "hold": None,
    }
    if isinstance(change, Use):
        row |= {"at": change.at, "resets": names_of(change.resets)}
    elif change is not None:
        entry = change._asdict()
        row["hold"] = json.dumps([entry.get(name) for name in HOLD_ENTRY])
    return row | _limits(request.spends)


def _padded(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> Private:
    """The values of all rows, and of as many rows of NULLs as the statement has more."""
    missing = padded_size(len(rows)) - len(rows)
    values = [row[column] for row in rows for column in columns]
    return Private(values + [None] * (missing * len(columns)))


def padded_size(count: int) -> int:
    """The next power of two: few statements, each prepared once and then kept."""
    return 1 << (count - 1).bit_length()


def _insert_sql(view: str, columns: Sequence[str], count: int) -> str:
    return _sql_of_size(view, len(columns), padded_size(count))


@cache
def _sql_of_size(view: str, columns: int, size: int) -> str:
    row = f"({', '.join('?' * columns)})"
    return f"INSERT INTO {view} VALUES {', '.join([row] * size)}"


class _Answer(NamedTuple):
    """What a trigger answered."""

    outcome: int
    token: StoredToken | None
    at: int
    states: list[BudgetState | None]


def _answers(count: int) -> Steps[list[_Answer | Exception]]:
    try:
        return list(map(_answer, (yield from _answers_between(0, count))))
    except Exception:  # noqa: S110  # one of them cannot be read: the others are, below
        pass
    answers: list[_Answer | Exception] = []
    for place in range(count):
        try:
            [answer] = yield from _answers_between(place, place + 1)
            answers.append(_answer(answer))
        except Exception as error:
            answers.append(error)
    return answers


def _answers_between(first: int, end: int) -> Steps[Any]:
    [(text,)] = yield _ANSWERS, Private((first, end))
    return json.loads(text)


def _answer(values: list[Any]) -> _Answer:
    outcome, row, at, states = values
    return _Answer(
        outcome=outcome,
        token=None if row is None else from_json(row),
        at=at or 0,
        states=[budget_state(*state) for state in states or ()],
    )


def _inserted(request: Insert, answer: _Answer) -> Inserted:
    spends, now = request.spends, request.token.created_at
    if answer.outcome == _KEY_TAKEN:
        return Inserted(result=InsertResult.KEY_TAKEN, token=answer.token)
    if answer.outcome == _HAS_VALID:
        return Inserted(result=InsertResult.HAS_VALID, token=answer.token)
    if answer.outcome == _INSERT_LIMITED:
        full = full_spending(answer.states, spends, now)
        return Inserted(result=InsertResult.LIMITED, spending=full or Spending())
    spending = charged(answer.states, spends, now)[0] if spends else Spending()
    return Inserted(result=InsertResult.INSERTED, token=answer.token or request.token, spending=spending)


def _presented(request: Present, answer: _Answer) -> Presented:
    spends, now = request.spends, request.now
    if answer.outcome == _LIMITED:
        full = full_spending(answer.states, spends, now)
        return Presented(outcome=Outcome.LIMITED, spending=full or Spending())
    if answer.outcome == _REFUSED:
        spending = charged(answer.states, spends, now)[0] if spends else Spending()
        return Presented(outcome=Outcome.REFUSED, token=answer.token, spending=spending)
    states = answer.states
    if answer.outcome == _RIGHT and isinstance(request.change, Use):
        resets = request.change.resets
        states = [None if s.budget in resets else state for state, s in zip(states, spends, strict=True)]
    spending = uncharged(states, spends, now) if spends else Spending()
    outcome = {_RIGHT: Outcome.RIGHT, _REPLAYED: Outcome.REPLAYED, _TOO_LATE: Outcome.REFUSED}[answer.outcome]
    used_at = answer.at if outcome is Outcome.REPLAYED else 0
    return Presented(outcome=outcome, token=answer.token, used_at=used_at, spending=spending)
