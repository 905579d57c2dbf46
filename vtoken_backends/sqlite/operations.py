"""The operations of the SQLite backend that are not worth a shared statement: one by one, as plain SQL.

Each of them is one transaction. Where it is about few records, it reads them, asks the pure functions of
:mod:`vtoken.backend` what becomes of them, and writes what has changed.
"""

# ruff: noqa: S608  # the SQL is put together from this package's own texts; values are always parameters

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from typing import Any, Final

from vtoken.backend import (
    PRETENDED,
    Budget,
    BudgetState,
    Change,
    Charge,
    Match,
    Outcome,
    Presented,
    SlugCount,
    Spend,
    Spending,
    State,
    StoredToken,
    UseHeld,
    changed,
    ended,
    full_spending,
    key_ended,
    key_of,
    matches,
    matching_key,
    refusal,
)
from vtoken_backends.sqlite.records import (
    AS_JSON,
    COLUMNS,
    budget_state,
    from_row,
    has_running_hold,
    number_of,
    of_hold,
    to_row,
)
from vtoken_backends.sqlite.shared import charged, padded_size
from vtoken_backends.sqlite.steps import Private, Rows, Steps, carry_out

_SELECT: Final = f"SELECT {', '.join(COLUMNS)} FROM vtoken_tokens"
# `ends_at` of an active token is its `expires_at`, so that each has its own index. Every ended token that
# expired before the last of the first `most` that ended is among those: the second search passes over no more
# than `most` of them. The values are asked for by name, because Python 3.12 warns of numbered parameters.
_BEFORE, _NOW, _MOST = "(SELECT before FROM asked)", "(SELECT now FROM asked)", "(SELECT most FROM asked)"
_DUE: Final = f"""
    WITH asked (before, now, most) AS (VALUES (?, ?, ?)), by_end (id, ends_at) AS (
        SELECT id, ends_at FROM vtoken_tokens
        WHERE state <> {State.ACTIVE.value} AND ends_at < {_BEFORE} AND NOT {has_running_hold(_NOW)}
        ORDER BY ends_at, id LIMIT {_MOST}
    ), horizon (ends_at) AS (
        SELECT iif(count(*) < {_MOST}, {_BEFORE}, max(ends_at) + 1) FROM by_end
    ), by_expiry (id, ends_at) AS (
        SELECT id, expires_at FROM vtoken_tokens
        WHERE expires_at < (SELECT ends_at FROM horizon) AND state = {State.ACTIVE.value}
            AND NOT {has_running_hold(_NOW)}
        ORDER BY expires_at, id LIMIT {_MOST}
    )
    SELECT id FROM (SELECT * FROM by_end UNION ALL SELECT * FROM by_expiry)
    ORDER BY ends_at, id LIMIT {_MOST}
"""
_PURGE: Final = f"DELETE FROM vtoken_tokens WHERE id IN ({_DUE}) RETURNING 1"
_PURGE_BUDGETS: Final = """
    DELETE FROM vtoken_budgets WHERE (object, name) IN (
        SELECT object, name FROM vtoken_budgets WHERE until <= ? ORDER BY until LIMIT ?
    ) RETURNING 1
"""
_COUNT: Final = f"""
    SELECT slug, count(*), sum(state = {State.ACTIVE.value} AND expires_at >= asked.now),
        sum(state = {State.ACTIVE.value} AND expires_at < asked.now),
        sum(state <> {State.ACTIVE.value} AND uses > 0)
    FROM vtoken_tokens, (SELECT ? AS now) AS asked WHERE content_type <> '{PRETENDED}' GROUP BY slug
"""
_KEEP_BUDGET: Final = """
    INSERT INTO vtoken_budgets (object, name, spent, strikes, until) VALUES (?, ?, ?, ?, ?)
    ON CONFLICT DO UPDATE SET spent = excluded.spent, strikes = excluded.strikes, until = excluded.until
"""
_REFUND: Final = """
    UPDATE vtoken_budgets SET spent = spent - 1 WHERE object = ? AND name = ? AND until = ? AND spent > 0
"""


# Tokens -------------------------------------------------------------------------------------------


def find(match: Match, limit: int, after: str | None = None) -> Steps[list[StoredToken]]:
    """As :meth:`TokenBackend.find`."""
    if match.digests is not None or match.id is not None:
        # Few: told apart in Python, by the protocol's own function.
        tokens = yield from candidates(match)
        return page(tokens, match, limit, after)
    where, values = _conditions(match)
    if after is not None:
        where.append("id < ?")
        values.append(int(after, 16))
    # Without an object, walking in the order of the page is best: the walk ends with the page's last row.
    of_object = match.content_type is not None and match.object_id is not None
    index = "INDEXED BY vtoken_tokens_line" if of_object else "NOT INDEXED"
    sql = f"{_SELECT} {index} WHERE {' AND '.join(where) or '1'} ORDER BY id DESC LIMIT ?"
    rows = yield sql, Private((*values, limit))
    return [from_row(row) for row in rows]


def page(tokens: Sequence[StoredToken], match: Match, limit: int, after: str | None) -> list[StoredToken]:
    """The tokens among few that match, newest first."""
    found = [t for t in tokens if matches(t, match) and (after is None or t.id < after)]
    if len(found) > 1:
        found.sort(key=lambda token: token.id, reverse=True)
    return found[:limit]


def candidates(match: Match) -> Steps[list[StoredToken]]:
    """The tokens with the id or one of the digests of a match."""
    sql, values = look_up(match)
    return in_order([from_row(row) for row in (yield sql, values)], match)


def in_order(tokens: list[StoredToken], match: Match) -> list[StoredToken]:
    """Tokens in the order of the digests by which they were looked up."""
    if len(tokens) > 1 and match.digests is not None:
        places = {digest: place for place, digest in reversed(list(enumerate(match.digests)))}
        tokens.sort(key=lambda token: min(places.get(key.digest, len(places)) for key in token.keys))
    return tokens


def look_up(match: Match) -> tuple[str, Private]:
    """The statement for :func:`candidates`."""
    if match.digests is None:
        return f"{_SELECT} WHERE id = ?", Private((number_of(match.id or ""),))
    if len(match.digests) == 1:
        return _BY_DIGEST, Private(match.digests)
    marks = ", ".join("?" * len(match.digests))
    sql = f"{_SELECT} WHERE id IN (SELECT token FROM vtoken_keys WHERE digest IN ({marks}))"
    return sql, Private(match.digests)


_BY_DIGEST: Final = f"{_SELECT} WHERE id = (SELECT token FROM vtoken_keys WHERE digest = ?)"


def look_up_many(
    asked: Sequence[Match], execute: Callable[[str, Any], Rows]
) -> list[list[StoredToken] | Exception]:
    """The :func:`candidates` for several matches, by one statement for those that name digests."""
    by_digest: dict[bytes, StoredToken] | None = None
    if len(asked) > 1:
        digests = [digest for match in asked for digest in match.digests or ()]
        with contextlib.suppress(Exception):  # one row cannot be read: each is looked up alone
            by_digest = carry_out(_by_digest(digests), execute)
    answers: list[list[StoredToken] | Exception] = []
    for match in asked:
        if by_digest is not None and match.digests is not None:
            found = {
                by_digest[digest].id: by_digest[digest] for digest in match.digests if digest in by_digest
            }
            answers.append(list(found.values()))
            continue
        try:
            answers.append(carry_out(candidates(match), execute))
        except Exception as error:
            answers.append(error)
    return answers


def _by_digest(digests: Sequence[bytes]) -> Steps[dict[bytes, StoredToken]]:
    size = padded_size(len(digests))
    marks = ", ".join("?" * size)
    sql = f"""
        SELECT json_group_array({AS_JSON}) FROM vtoken_tokens
        WHERE id IN (SELECT token FROM vtoken_keys WHERE digest IN ({marks}))
    """
    [(text,)] = yield sql, Private((*digests, *[None] * (size - len(digests))))
    tokens = [from_row(row) for row in json.loads(text)]
    return {key.digest: token for token in tokens for key in token.keys}


def checked(tokens: Sequence[StoredToken], key: Match, now: int) -> Presented:
    """The answer to a presented key that is to be neither used nor charged for.

    Args:
        tokens: the :func:`candidates`.
        key: the condition.
        now: the time.
    """
    refused: StoredToken | None = None
    for token in tokens:
        presented = matching_key(token, key)
        if presented is None:
            continue
        if refusal(token, presented, now) is None:
            return Presented(outcome=Outcome.RIGHT, token=token)
        refused = refused or token
    return Presented(outcome=Outcome.REFUSED, token=refused)


def update(match: Match, change: Change) -> Steps[StoredToken | None]:
    """As :meth:`TokenBackend.update`."""
    tokens = yield from candidates(match)
    for token in tokens:
        after = changed(token, change) if matches(token, match) else None
        if after is None:
            continue
        yield from _save(token, after)
        if isinstance(change, UseHeld):
            yield from _count_use(token, after, change)
        return after
    return None


def deactivate(match: Match, at: int, sparing: tuple[str, ...]) -> Steps[int]:
    """As :meth:`TokenBackend.deactivate`."""
    if match.digests is None and match.id is None:
        return (yield from _deactivate_many(match, at, sparing))
    count = 0
    for token in (yield from candidates(match)):
        if not matches(token, match):
            continue
        key = key_of(token, match) if match.digests is not None else None
        if key is None or key.origin == token.id:
            count += token.is_active
            yield from _save(token, ended(token, at, sparing))
        else:
            count += token.is_active and key.expires_at >= at
            yield from _save(token, key_ended(token, key))
    return count


def erase(content_type: str, object_id: str, budgets_of: bytes) -> Steps[int]:
    """As :meth:`TokenBackend.erase`."""
    of_object = Private((content_type, object_id))
    erased = yield (
        "DELETE FROM vtoken_tokens WHERE content_type = ? AND object_id = ? RETURNING 1",
        of_object,
    )
    yield from reset(budgets_of, None)
    return len(erased)


def purge_tokens(before: int, now: int, limit: int) -> Steps[int]:
    """Delete ended tokens, and return how many."""
    return len((yield _PURGE, Private((before, now, limit))))


def count(now: int) -> Steps[list[SlugCount]]:
    """As :meth:`TokenBackend.count`."""
    return [
        SlugCount(slug=slug, total=total, active=active, expired=expired, used=used)
        for slug, total, active, expired, used in (yield _COUNT, Private((now,)))
    ]


def _deactivate_many(match: Match, at: int, sparing: tuple[str, ...]) -> Steps[int]:
    where, values = _conditions(match)
    if sparing:
        spared = ", ".join("?" * len(sparing))
        holds = f"""(
            SELECT json_group_array(json(value)) FROM json_each(holds)
            WHERE {of_hold("hold_id")} IN ({spared})
        )"""
    else:
        holds = "'[]'"
    of_ended = " AND ".join([*where, f"state <> {State.ACTIVE.value}", "holds <> '[]'"])
    yield f"UPDATE vtoken_tokens SET holds = {holds} WHERE {of_ended}", Private((*sparing, *values))
    of_active = " AND ".join([*where, f"state = {State.ACTIVE.value}"])
    sql = f"""
        UPDATE vtoken_tokens SET state = {State.ENDED.value}, ends_at = min(ends_at, ?), holds = {holds}
        WHERE {of_active} RETURNING 1
    """
    return len((yield sql, Private((at - 1, *sparing, *values))))


def _save(before: StoredToken, after: StoredToken) -> Steps[None]:
    """Write what has changed of a token. It neither gets nor loses a key."""
    old, new = to_row(before), to_row(after)
    row = {name: value for name, value in new.items() if value != old[name]}
    if not row:
        return
    if "keys" in row:  # the row may also have entries of keys that the token has lost
        row["digests"] = new["digests"]
    sql = f"UPDATE vtoken_tokens SET {', '.join(f'{name} = ?' for name in row)} WHERE id = ?"
    yield sql, Private((*row.values(), new["id"]))
    for key, key_before in zip(after.keys, before.keys, strict=True):
        if key.expires_at != key_before.expires_at:
            sql = "UPDATE vtoken_keys SET expires_at = ? WHERE digest = ?"
            yield sql, Private((key.expires_at, key.digest))


def _count_use(before: StoredToken, after: StoredToken, change: UseHeld) -> Steps[None]:
    """What a use does beside the record of its token (other contexts are ended by a trigger)."""
    if change.use_id:
        origin = next(hold.origin for hold in before.holds if hold.hold_id == change.hold_id)
        values = (int(origin, 16), change.use_id, int(after.id, 16), after.uses, change.at)
        sql = """
            INSERT OR IGNORE INTO vtoken_receipts (origin, use_id, token, number, at) VALUES (?, ?, ?, ?, ?)
        """
        yield sql, Private(values)
    for budget in change.resets:
        yield from reset(budget.object, (budget.name,))


def _conditions(match: Match) -> tuple[list[str], list[Any]]:
    """The terms of a match without digests and id, and their values."""
    terms: list[str] = []
    values: list[Any] = []
    for column, value in (
        ("content_type", match.content_type),
        ("object_id", match.object_id),
        ("slug", match.slug),
        ("context", match.context),
    ):
        if value is not None:
            terms.append(f"{column} = ?")
            values.append(value)
    if match.active or match.valid_at is not None:
        terms.append(f"state = {State.ACTIVE.value}")
    if match.valid_at is not None:
        terms.append("expires_at >= ?")
        values.append(match.valid_at)
    return terms, values


# Budgets and notes --------------------------------------------------------------------------------


def budgets(names: Sequence[Budget]) -> Steps[list[BudgetState | None]]:
    """As :meth:`TokenBackend.budgets`."""
    states: list[BudgetState | None] = []
    for budget in names:
        sql = "SELECT spent, strikes, until FROM vtoken_budgets WHERE object = ? AND name = ?"
        rows = yield sql, Private((budget.object, budget.name))
        states.append(budget_state(*rows[0]) if rows else None)
    return states


def spend(spends: Sequence[Spend], now: int) -> Steps[Spending]:
    """As :meth:`TokenBackend.spend`."""
    states = yield from budgets([spend.budget for spend in spends])
    full = full_spending(states, spends, now)
    if full is not None:
        return full
    spending, kept = charged(states, spends, now)
    for asked, state in zip(spends, kept, strict=True):
        values = (*_name(asked.budget), state.spent, state.strikes, state.until)
        yield _KEEP_BUDGET, Private(values)
    return spending


def refund(charges: Sequence[Charge]) -> Steps[None]:
    """As :meth:`TokenBackend.refund`."""
    for charge in charges:
        yield _REFUND, Private((*_name(charge.budget), charge.until))


def reset(budgets_of: bytes, names: Sequence[bytes] | None) -> Steps[int]:
    """As :meth:`TokenBackend.reset`."""
    sql, values = "DELETE FROM vtoken_budgets WHERE object = ?", [budgets_of]
    if names is not None:
        sql += f" AND name IN ({', '.join('?' * len(names))})"
        values += names
    return len((yield f"{sql} RETURNING 1", Private(values)))


def purge_budgets(until: int, limit: int) -> Steps[int]:
    """Forget budgets that ended, and return how many."""
    return len((yield _PURGE_BUDGETS, Private((until, limit))))


def read_note(name: str) -> Steps[str]:
    """The text of a note, or ``""``."""
    rows = yield "SELECT text FROM vtoken_notes WHERE name = ?", Private((name,))
    return str(rows[0][0]) if rows else ""


def write_note(name: str, text: str, replace: bool) -> Steps[str]:
    """As :meth:`TokenBackend.note`."""
    conflict = "REPLACE" if replace else "IGNORE"
    yield f"INSERT OR {conflict} INTO vtoken_notes (name, text) VALUES (?, ?)", Private((name, text))
    return (yield from read_note(name))


def _name(budget: Budget) -> tuple[bytes, bytes]:
    return budget.object, budget.name
