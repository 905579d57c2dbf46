"""Presented keys: one statement for many (see ``shared``)."""

# ruff: noqa: S608  # the SQL is put together from this package's own texts; values are always parameters

from __future__ import annotations

import json
from functools import cache
from typing import Any, Final, NamedTuple

from vtoken.backend import (
    Hold,
    Match,
    Outcome,
    Presented,
    Spend,
    Spending,
    State,
    Use,
    full_spending,
)
from vtoken_backends.sqlite.records import AS_JSON, HOLD_ENTRY, hold_runs, number_of, of_hold
from vtoken_backends.sqlite.shared import (
    IS_FULL,
    LIMIT_COLUMNS,
    STATES,
    Answer,
    Kind,
    charge_if,
    charged,
    joined,
    limits_of,
    names_of,
    nth_of,
    uncharged,
)
from vtoken_backends.sqlite.steps import Private

_RIGHT, _REPLAYED, _REFUSED, _TOO_LATE, _LIMITED = range(5)
"""``_TOO_LATE`` is a refusal for which nothing is charged."""
_OUTCOMES: Final = {
    _RIGHT: Outcome.RIGHT,
    _REPLAYED: Outcome.REPLAYED,
    _REFUSED: Outcome.REFUSED,
    _TOO_LATE: Outcome.REFUSED,
    _LIMITED: Outcome.LIMITED,
}
_ACTIVE, _USED = State.ACTIVE.value, State.USED.value


class Present(NamedTuple):
    """What :meth:`TokenBackend.present` is asked for."""

    key: Match
    change: Use | Hold | None
    now: int
    spends: tuple[Spend, ...]

    @property
    def kind(self) -> Kind:
        """Which requests can share a statement."""
        change = self.change
        return _kind(
            "check" if change is None else "use" if isinstance(change, Use) else "hold",
            many_digests=len(self.key.digests or ()) != 1,
            has_use_id=change is not None and bool(change.use_id),
            is_limited=bool(self.spends),
            resets=isinstance(change, Use) and bool(change.resets),
        )

    def row(self, kind: Kind) -> Private:
        """Its row of the statement of its kind."""
        key, change = self.key, self.change
        row: dict[str, Any] = {
            "digests": joined(key.digests or ()),
            "kind": key.kind,
            "id": None if key.id is None else number_of(key.id),
            "content_type": key.content_type,
            "object_id": key.object_id,
            "slug": key.slug,
            "context": key.context,
            "now": self.now,
        }
        if isinstance(change, Use):
            row["use_id"], row["at"] = change.use_id, change.at
            row["resets"] = names_of(change.resets) if change.resets else None
        elif change is not None:
            row["use_id"] = change.use_id
            entry = change._asdict()
            row["hold"] = json.dumps([entry.get(name) for name in HOLD_ENTRY])
        return kind.row(row | limits_of(self.spends) if self.spends else row)

    def __repr__(self) -> str:
        return "<Present>"


def presented(request: Present, answer: Answer) -> Presented:
    """What :meth:`TokenBackend.present` returns."""
    outcome, spends, now = _OUTCOMES[answer.outcome], request.spends, request.now
    token = None if answer.outcome == _LIMITED else answer.token
    used_at = answer.at if answer.outcome == _REPLAYED else 0
    if not spends:
        return Presented(outcome=outcome, token=token, used_at=used_at)
    states = answer.states
    if answer.outcome == _LIMITED:
        spending = full_spending(states, spends, now) or Spending()
    elif answer.outcome == _REFUSED:
        spending = charged(states, spends, now)[0]
    else:
        if answer.outcome == _RIGHT and isinstance(request.change, Use):
            resets = request.change.resets
            states = [None if s.budget in resets else state for state, s in zip(states, spends, strict=True)]
        spending = uncharged(states, spends, now)
    return Presented(outcome=outcome, token=token, used_at=used_at, spending=spending)


# The triggers -------------------------------------------------------------------------------------

_COLUMNS: Final = (
    *("place", "digests", "kind", "id", "content_type", "object_id", "slug", "context", "now"),
)
_CHANGE_COLUMNS: Final = {"check": (), "use": ("use_id", "at", "resets"), "hold": ("use_id", "hold")}
_ORIGIN: Final = "iif(presented.origin = 0, presented.token, presented.origin)"
_HAS_FREE_USE: Final = f"""(
    max_uses IS NULL OR uses + iif(
        holds = '[]', 0, (SELECT count(*) FROM json_each(holds) WHERE {hold_runs("NEW.now")})
    ) < max_uses
)"""
_IS_HELD: Final = f"""(
    holds <> '[]' AND EXISTS (
        SELECT 1 FROM json_each(holds)
        WHERE {hold_runs("NEW.now")} AND {of_hold("use_id")} = NEW.use_id AND {of_hold("origin")} = {_ORIGIN}
    )
)"""
"""Whether this very use is held already."""
_FITS: Final = """
    (NEW.id IS NULL OR vtoken_tokens.id = NEW.id)
    AND (NEW.content_type IS NULL OR content_type = NEW.content_type)
    AND (NEW.object_id IS NULL OR object_id = NEW.object_id)
    AND (NEW.slug IS NULL OR slug = NEW.slug)
    AND (NEW.context IS NULL OR context = NEW.context)
"""
_MATCHES: Final = f"""
    vtoken_tokens.id = presented.token AND (NEW.kind IS NULL OR presented.kind = NEW.kind) AND {_FITS}
"""
_CHANGED: Final = f"(SELECT token FROM temp.vtoken_answers WHERE place = NEW.place AND outcome = {_RIGHT})"
_COUNT_USE: Final = f"""
    UPDATE vtoken_tokens SET uses = uses + 1, used_at = NEW.at,
        state = iif(uses + 1 >= max_uses, {_USED}, state),
        ends_at = iif(uses + 1 >= max_uses, min(ends_at, NEW.at - 1), ends_at)
"""
_REMEMBER: Final = f"""
    INSERT OR IGNORE INTO vtoken_receipts (origin, use_id, token, number, at)
    SELECT origin, NEW.use_id, token, (SELECT uses FROM vtoken_tokens WHERE id = token), NEW.at
    FROM temp.vtoken_answers WHERE place = NEW.place AND outcome = {_RIGHT};
"""
_RESET: Final = f"""
    DELETE FROM vtoken_budgets WHERE (object, name) IN (
        SELECT substr(NEW.resets, 1 + 32 * nth, 16), substr(NEW.resets, 17 + 32 * nth, 16)
        FROM temp.vtoken_answers CROSS JOIN temp.vtoken_numbers
        WHERE place = NEW.place AND outcome = {_RIGHT} AND nth < length(NEW.resets) / 32
    );
"""
_HOLD: Final = f"""
    UPDATE vtoken_tokens SET holds = json_insert(
        iif(holds = '[]', holds, (
            SELECT json_group_array(json(value)) FROM json_each(holds) WHERE {hold_runs("NEW.now")}
        )),
        '$[#]', json_set(NEW.hold, '$[{HOLD_ENTRY.index("origin")}]', (
            SELECT origin FROM temp.vtoken_answers WHERE place = NEW.place
        ))
    ) WHERE id = {_CHANGED};
"""


@cache
def _kind(change: str, *, many_digests: bool, has_use_id: bool, is_limited: bool, resets: bool) -> Kind:
    features = {"many": many_digests, "once": has_use_id, "limited": is_limited, "resetting": resets}
    view = "_".join(["vtoken", change, *(name for name, has_it in features.items() if has_it)])
    changes = {
        "check": "",
        "use": f"{_COUNT_USE} WHERE id = {_CHANGED};" + _REMEMBER * has_use_id + _RESET * resets,
        "hold": _HOLD,
    }
    columns = _COLUMNS + _CHANGE_COLUMNS[change] + LIMIT_COLUMNS * is_limited
    if change == "use" and not any(features.values()):
        return Kind(view=view, columns=columns, work=_USUAL_USE)
    limited = f"WHEN {IS_FULL} THEN {_LIMITED}" if is_limited else ""
    work = f"""
    INSERT OR REPLACE INTO vtoken_answers (place, outcome, token, origin, at, budgets)
    SELECT NEW.place, CASE
            WHEN found.at IS NOT NULL THEN {_REPLAYED}
            {limited}
            ELSE ifnull(refusal, {_REFUSED})
        END, token, origin, at, {STATES if is_limited else "NULL"}
    FROM (SELECT 1) LEFT JOIN ({_found(many_digests, has_use_id)}) AS found;
    {changes[change]}
    {charge_if(_REFUSED) if is_limited else ""}
    UPDATE vtoken_answers SET token_row = (SELECT {AS_JSON} FROM vtoken_tokens WHERE id = token)
    WHERE place = NEW.place AND outcome = {_RIGHT};
    """
    return Kind(view=view, columns=columns, work=work)


def _found(many_digests: bool, has_use_id: bool) -> str:
    """The token that a key is about, and what is against it."""
    token, at, receipt = "vtoken_tokens.id", "NULL", ""
    refusal = _refusal(has_use_id)
    if has_use_id:
        token, at = "iif(receipt.at IS NULL, vtoken_tokens.id, receipt.token)", "receipt.at"
        receipt = f"""LEFT JOIN vtoken_receipts AS receipt
            ON receipt.origin = {_ORIGIN} AND receipt.use_id = NEW.use_id"""
    if not many_digests:
        return f"""
            SELECT {token} AS token, {_ORIGIN} AS origin, {at} AS at, {refusal} AS refusal
            FROM vtoken_keys AS presented CROSS JOIN vtoken_tokens {receipt}
            WHERE presented.digest = NEW.digests AND {_MATCHES}
        """
    # Of several that match: one that was used with this id, else one that can be used, else the first; and a
    # refusal costs nothing if that of one of them costs nothing.
    return f"""
        SELECT token, origin, at, iif(refusal = {_RIGHT}, refusal, max(refusal) OVER ()) AS refusal FROM (
            SELECT nth, {token} AS token, {_ORIGIN} AS origin, {at} AS at, {refusal} AS refusal
            FROM temp.vtoken_numbers CROSS JOIN vtoken_keys AS presented CROSS JOIN vtoken_tokens {receipt}
            WHERE nth < length(NEW.digests) / 32 AND presented.digest = {nth_of("NEW.digests")}
                AND {_MATCHES}
        ) ORDER BY at IS NULL, refusal <> {_RIGHT}, nth LIMIT 1
    """


def _refusal(has_use_id: bool) -> str:
    """What is against a key, as :func:`vtoken.backend.refusal` says."""
    is_held_already = _IS_HELD if has_use_id else "FALSE"
    return f"""CASE
        WHEN state <> {_ACTIVE} THEN iif(state = {_USED}, {_TOO_LATE}, {_REFUSED})
        WHEN vtoken_tokens.expires_at < NEW.now OR presented.expires_at < NEW.now THEN {_REFUSED}
        ELSE iif({_HAS_FREE_USE} AND NOT {is_held_already}, {_RIGHT}, {_TOO_LATE})
    END"""


# The use of a link costs half as much if it is tried first, and explained only where it was not possible.
_USUAL_USE: Final = f"""
    {_COUNT_USE}
    WHERE id = (
        SELECT token FROM vtoken_keys WHERE digest = NEW.digests AND ifnull(expires_at >= NEW.now, 1)
            AND (NEW.kind IS NULL OR kind = NEW.kind)
    ) AND {_FITS} AND state = {_ACTIVE} AND expires_at >= NEW.now AND {_HAS_FREE_USE};
    INSERT OR REPLACE INTO vtoken_answers (place, outcome, token_row)
    SELECT NEW.place, iif(changes() = 1, {_RIGHT}, {_REFUSED}), (
        SELECT {AS_JSON} FROM vtoken_tokens WHERE id = (
            SELECT token FROM vtoken_keys WHERE digest = NEW.digests AND (NEW.kind IS NULL OR kind = NEW.kind)
        ) AND {_FITS}
    );
"""
