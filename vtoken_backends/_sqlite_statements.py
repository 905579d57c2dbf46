"""The operations of the SQLite backend as SQL, and the rows as tokens.

What an operation does beside its own row (replacing older tokens, ending an overlap) is done by triggers
(see the schema), within the same statement and row by row, so that a statement stays right when it
carries the rows of many operations.
"""

# ruff: noqa: S608  # the SQL is put together from this package's own texts; values are always parameters

from __future__ import annotations

import json
from collections.abc import Hashable
from typing import Any, Final

from vtoken.backend import (
    Budget,
    Change,
    ForgetKey,
    InsertMode,
    Lease,
    Match,
    Release,
    SetExtraData,
    StoredToken,
    Use,
)
from vtoken_backends._sqlite_batch import (
    COLUMNS,
    INSERT,
    USE,
    Look,
    Operation,
    Private,
    Take,
    find_many,
    insert_many,
    use_many,
)

_MODES: Final = {InsertMode.ADD: 0, InsertMode.REPLACE: 1, InsertMode.IF_NONE_VALID: 2}
_WHY_NOT_INSERTED: Final = """
    SELECT EXISTS (SELECT 1 FROM tokens WHERE digest = ?) OR EXISTS (SELECT 1 FROM tokens WHERE id = ?),
        EXISTS (
            SELECT 1 FROM tokens
            WHERE (content_type, object_id, slug) = (?, ?, ?) AND is_active = 1
                AND expires_at >= ? AND lease_until <= ?
        )
    """
_PURGE: Final = """
    DELETE FROM tokens WHERE seq IN (
        SELECT seq FROM tokens WHERE ends_at < ? AND lease_until <= ? ORDER BY ends_at LIMIT ?
    ) RETURNING 1
    """
_PURGE_BUDGETS: Final = """
    DELETE FROM budgets WHERE (content_type, object_id, slug, kind) IN (
        SELECT content_type, object_id, slug, kind FROM budgets WHERE until <= ? ORDER BY until LIMIT ?
    )
    """
_COUNT: Final = """
    SELECT slug, count(*), sum(is_active = 1 AND expires_at >= asked.now),
        sum(is_active = 1 AND expires_at < asked.now), sum(is_active = 0 AND uses > 0)
    FROM tokens, (SELECT ? AS now) AS asked GROUP BY slug
    """
# The write lock is held from the beginning of the statement, so what it reads is what it changes.
# A product too great for an integer becomes a float and loses against max_window.
_SPEND: Final = """
    INSERT INTO budgets (content_type, object_id, slug, kind, spent, strikes, until)
    WITH asked (content_type, object_id, slug, kind, now, most, window, max_window) AS (
        VALUES (?, ?, ?, ?, ?, ?, ?, ?)
    ),
    state AS (
        SELECT asked.*, spent, until,
            spent > 0 AND until > now AND until + max_window > now AS running,
            CASE
                WHEN until IS NULL OR until + max_window <= now THEN 0
                WHEN spent = 0 OR until > now THEN strikes
                WHEN spent >= most THEN min(strikes + 1, 20)
                ELSE 0
            END AS strikes
        FROM asked LEFT JOIN budgets USING (content_type, object_id, slug, kind)
    )
    SELECT content_type, object_id, slug, kind, iif(running, spent + 1, 1), strikes,
        iif(running, until, now + min(window * (1 << strikes), max_window))
    FROM state WHERE NOT ifnull(running, 0) OR spent < most
    ON CONFLICT DO UPDATE SET spent = excluded.spent, strikes = excluded.strikes, until = excluded.until
    RETURNING until
    """
_BUDGET: Final = "(content_type, object_id, slug, kind) = (?, ?, ?, ?)"
_DENIED: Final = f"SELECT until FROM budgets WHERE {_BUDGET} AND until > ? AND spent >= ?"
_REFUND: Final = f"UPDATE budgets SET spent = spent - 1 WHERE {_BUDGET} AND until = ? AND spent > 0"
_RESET: Final = f"DELETE FROM budgets WHERE {_BUDGET}"


def insert(token: StoredToken, mode: InsertMode, keep_until: int) -> Operation:
    """Returns a row where it inserted."""
    overlap = keep_until if mode is InsertMode.REPLACE and keep_until > token.created_at else 0
    row = Private((*_encode(token), _MODES[mode], overlap))
    subjects = (token.digest, (token.content_type, token.object_id))
    return Operation(lambda: (INSERT, row), True, subjects, insert_many, row)


def why_not_inserted(token: StoredToken) -> Operation:
    """Returns (is the key taken, is there a valid token)."""
    now = token.created_at
    values = Private((token.digest, token.id, token.content_type, token.object_id, token.slug, now, now))
    return _plain(_WHY_NOT_INSERTED, values, token.content_type, token.object_id, writes=False)


def find(match: Match, limit: int, after: tuple[int, str] | None) -> Operation:
    """Returns tokens, newest first."""

    def alone() -> tuple[str, Private]:
        where, values = _conditions(match)
        if after is not None:
            where += " AND (created_at, id) < (?, ?)"
        sql = f"SELECT {COLUMNS} FROM tokens WHERE {where} ORDER BY created_at DESC, id DESC LIMIT ?"
        return sql, Private((*values, *(after or ()), limit))

    by_digest = match.digests is not None and after is None and _is_by_digest(match)
    return Operation(alone, False, _subjects(match), find_many if by_digest else None, Look(match, limit))


def update(match: Match, change: Change) -> Operation:
    """Returns the one token that it changed, as it is after the change."""

    def alone() -> tuple[str, Private]:
        where, values = _conditions(match)
        assignments, new_values = _assignments(change)
        if isinstance(change, Use) and change.use_id:
            where += " AND NOT EXISTS (SELECT 1 FROM json_each(use_ids) WHERE value = ?)"
            values = Private((*values, change.use_id))
        sql = (
            f"UPDATE tokens SET {assignments} WHERE seq = ("
            f"SELECT seq FROM tokens WHERE {where} ORDER BY created_at DESC, id DESC LIMIT 1"
            f") RETURNING {COLUMNS}"
        )
        return sql, Private((*new_values, *values))

    shared = None
    if isinstance(change, Use) and match.digests and match.valid_at is not None and _is_by_digest(match):
        # The current secret's digest; a token of an older one is found when it is asked for alone.
        shared = Take(match.digests[0], match, change.at, change.use_id)
    return Operation(alone, True, _subjects(match), use_many if shared else None, shared)


def deactivate(match: Match, at: int) -> Operation:
    """Returns a row for each token that it changed."""

    def alone() -> tuple[str, Private]:
        where, values = _conditions(match._replace(active=True))
        sql = f"UPDATE tokens SET is_active = 0, ends_at = min(ends_at, ?) WHERE {where} RETURNING 1"
        return sql, Private((at - 1, *values))

    return Operation(alone, True, _subjects(match))


def purge(before: int, now: int, limit: int) -> Operation:
    """Returns a row for each token that it deleted."""
    return Operation(lambda: (_PURGE, Private((before, now, limit))), True, ())


def purge_budgets(until: int, limit: int) -> Operation:
    return Operation(lambda: (_PURGE_BUDGETS, Private((until, limit))), True, ())


def count(now: int) -> Operation:
    """Returns the rows of ``SlugCount``."""
    return Operation(lambda: (_COUNT, Private((now,))), False, ())


def spend(budget: Budget, now: int, limit: int, window: int, max_window: int) -> Operation:
    """Returns (until) where it was allowed."""
    values = Private((*budget, now, limit, window, max_window))
    return _plain(_SPEND, values, budget.content_type, budget.object_id)


def denied(budget: Budget, now: int, limit: int) -> Operation:
    """Returns (until) where nothing is left."""
    values = Private((*budget, now, limit))
    return _plain(_DENIED, values, budget.content_type, budget.object_id, writes=False)


def refund(budget: Budget, until: int) -> Operation:
    return _plain(_REFUND, Private((*budget, until)), budget.content_type, budget.object_id)


def reset(budget: Budget) -> Operation:
    return _plain(_RESET, Private(budget), budget.content_type, budget.object_id)


def _plain(sql: str, values: Private, content_type: str, object_id: str, *, writes: bool = True) -> Operation:
    return Operation(lambda: (sql, values), writes, ((content_type, object_id),))


def _subjects(match: Match) -> tuple[Hashable, ...]:
    names: tuple[Hashable, ...] = match.digests or ()
    return names if match.object_id is None else (*names, (match.content_type, match.object_id))


def _is_by_digest(match: Match) -> bool:
    return match.id is None and match.lease_id is None and match.leased_at is None


def _conditions(match: Match) -> tuple[str, Private]:
    """The WHERE of a match, and its values. is_active = 1 is spelled out, as its partial index wants."""
    terms = ["1"]
    values: list[object] = []
    for column, value in (
        ("id", match.id),
        ("content_type", match.content_type),
        ("object_id", match.object_id),
        ("slug", match.slug),
        ("context", match.context),
        ("lease_id", match.lease_id),
    ):
        if value is not None:
            terms.append(f"{column} = ?")
            values.append(value)
    if match.digests is not None:
        terms.append(f"digest IN ({', '.join('?' * len(match.digests))})")
        values.extend(match.digests)
    if match.active or match.valid_at is not None:
        terms.append("is_active = 1")
    if match.valid_at is not None:
        terms.append("expires_at >= ? AND lease_until <= ?")
        values += (match.valid_at, match.valid_at)
    if match.leased_at is not None:
        terms.append("lease_until > ?")
        values.append(match.leased_at)
    return " AND ".join(terms), Private(values)


def _assignments(change: Change) -> tuple[str, Private]:
    match change:
        case Use(at, use_id):
            return _USE_ALONE, Private((at, use_id, use_id, at))
        case Lease(lease_id, until):
            return "lease_id = ?, lease_until = ?", Private((lease_id, until))
        case Release():
            return "lease_id = '', lease_until = 0", Private()
        case SetExtraData(extra_data):
            return "extra_data = ?", Private((extra_data,))
        case ForgetKey():
            return "plain_key = ''", Private()


_USE_ALONE: Final = USE.format(at="?", use_id="?")
_ACTIVE: Final = StoredToken._fields.index("is_active")
_USE_IDS: Final = StoredToken._fields.index("use_ids")


def _encode(token: StoredToken) -> tuple[Any, ...]:
    use_ids = json.dumps(token.use_ids, ensure_ascii=False) if token.use_ids else "[]"
    return (*token[:_USE_IDS], use_ids, *token[_USE_IDS + 1 :])


def decode(row: tuple[Any, ...]) -> StoredToken | None:
    """The token of a row, or None where no backend of ours can have written it: the file is not trusted."""
    use_ids = _decode_use_ids(row[_USE_IDS])
    if use_ids is None or row[_ACTIVE] not in (0, 1):
        return None
    values = list(row)
    values[_ACTIVE] = row[_ACTIVE] == 1
    values[_USE_IDS] = use_ids
    token = StoredToken._make(values)
    return token if _is_sound(token) else None


def _decode_use_ids(text: str) -> tuple[str, ...] | None:
    if text == "[]":
        return ()
    try:
        use_ids = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(use_ids, list) or not all(isinstance(use_id, str) for use_id in use_ids):
        return None
    return tuple(use_ids)


def _is_sound(token: StoredToken) -> bool:
    if len(token.digest) != 32 or token.max_uses < 1 or len(token.use_ids) > token.uses:
        return False
    if min(token.created_at, token.expires_at, token.used_at, token.lease_until) < 0:
        return False
    # A token that was switched on again by hand: its end tells of it.
    return not token.is_active or (token.ends_at == token.expires_at and token.uses < token.max_uses)
