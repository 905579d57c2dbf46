"""Inserts: one statement for many (see ``shared``)."""

# ruff: noqa: S608  # the SQL is put together from this package's own texts; values are always parameters

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Final, NamedTuple

from vtoken.backend import (
    Inserted,
    InsertMode,
    InsertResult,
    Spend,
    Spending,
    State,
    StoredToken,
    full_spending,
)
from vtoken_backends.sqlite.records import (
    AS_JSON,
    COLUMNS,
    KEY_ENTRY,
    expiry_to_store,
    has_running_hold,
    of_key,
    to_row,
)
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
    nth_of,
)
from vtoken_backends.sqlite.steps import Private

_MODES: Final = {mode: number for number, mode in enumerate(InsertMode)}
_ADD, _IF_NONE_VALID, _ONCE = (
    _MODES[mode] for mode in (InsertMode.ADD, InsertMode.IF_NONE_VALID, InsertMode.ONCE)
)
_INSERTED, _KEY_TAKEN, _HAS_VALID, _LIMITED = range(4)
_ACTIVE: Final = State.ACTIVE.value


class Insert(NamedTuple):
    """What :meth:`TokenBackend.insert` is asked for."""

    token: StoredToken
    mode: InsertMode
    keep_until: int
    wanted_until: int
    also_taken: tuple[bytes, ...]
    spends: tuple[Spend, ...]

    @property
    def kind(self) -> Kind:
        """Which requests can share a statement."""
        overlaps = self.keep_until > self.token.created_at and self.mode is not InsertMode.ADD
        return _kind(
            overlaps=overlaps,
            is_limited=bool(self.spends),
            is_usual=not self.also_taken and not overlaps and _is_usual(self.token),
        )

    def row(self, kind: Kind) -> Private:
        """Its row of the statement of its kind."""
        row = to_row(self.token)
        row["mode"] = _MODES[self.mode]
        row["keep_until"] = self.keep_until
        row["wanted_until"] = self.wanted_until
        row["taken"] = row["digests"] + joined(self.also_taken) if self.also_taken else row["digests"]
        if self.token.keys:
            first = self.token.keys[0]
            row["kind"], row["key_expires_at"] = first.kind, expiry_to_store(first, self.token)
        return kind.row(row | limits_of(self.spends) if self.spends else row)

    def __repr__(self) -> str:
        return "<Insert>"


def _is_usual(token: StoredToken) -> bool:
    """Whether a token is like most: new, with one key of its own. Then much need not be told, and no JSON has
    to be read."""
    return (
        len(token.keys) == 1
        and token.keys[0].origin == token.id
        and token.is_active
        and token.ends_at == token.expires_at
        and not token.uses
        and not token.used_at
        and not token.holds
    )


def inserted(request: Insert, answer: Answer) -> Inserted:
    """What :meth:`TokenBackend.insert` returns."""
    spends, now = request.spends, request.token.created_at
    if answer.outcome == _KEY_TAKEN:
        return Inserted(result=InsertResult.KEY_TAKEN, token=answer.token)
    if answer.outcome == _HAS_VALID:
        return Inserted(result=InsertResult.HAS_VALID, token=answer.token)
    if answer.outcome == _LIMITED:
        full = full_spending(answer.states, spends, now)
        return Inserted(result=InsertResult.LIMITED, spending=full or Spending())
    spending = charged(answer.states, spends, now)[0] if spends else Spending()
    return Inserted(result=InsertResult.INSERTED, token=answer.token or request.token, spending=spending)


# The triggers -------------------------------------------------------------------------------------

_USUALLY: Final = {
    "ends_at": "NEW.expires_at",
    "state": str(State.ACTIVE.value),
    "uses": "0",
    "used_at": "0",
    "holds": "'[]'",
}
"""What the columns of a usual token are."""
_LINE: Final = (
    "(content_type, object_id, slug, context) = (NEW.content_type, NEW.object_id, NEW.slug, NEW.context)"
)
_VALID: Final = f"""CASE WHEN NEW.mode = {_IF_NONE_VALID} THEN (
    SELECT max(id) FROM vtoken_tokens AS other
    WHERE {_LINE} AND state = {_ACTIVE} AND expires_at >= NEW.wanted_until AND NOT EXISTS (
        SELECT 1 FROM json_each(other.keys)
        WHERE {of_key("origin")} = 0 AND {of_key("expires_at")} < NEW.wanted_until
    )
) END"""
_IS_SUPERSEDED: Final = f"""
    NEW.mode <> {_ONCE} AND taken.kind = 'code'
    AND (owner.content_type, owner.object_id, owner.slug) = (NEW.content_type, NEW.object_id, NEW.slug)
    AND (
        owner.state <> {_ACTIVE} OR owner.expires_at < NEW.created_at
        OR (NEW.mode <> {_ADD} AND owner.context = NEW.context)
    )
"""
# 1 if a digest is there that the new token may supersede, 2 if one is there that it may not.
_TAKEN_ONE: Final = f"""(
    SELECT 2 - ({_IS_SUPERSEDED}) FROM vtoken_keys AS taken CROSS JOIN vtoken_tokens AS owner
    WHERE taken.digest = NEW.digests AND owner.id = taken.token
)"""
_TAKEN: Final = f"""(
    SELECT max(2 - ({_IS_SUPERSEDED}))
    FROM temp.vtoken_numbers CROSS JOIN vtoken_keys AS taken CROSS JOIN vtoken_tokens AS owner
    WHERE nth < length(NEW.taken) / 32 AND taken.digest = {nth_of("NEW.taken")} AND owner.id = taken.token
)"""
_OWNER: Final = f"""CASE WHEN NEW.mode = {_ONCE} THEN (
    SELECT token FROM temp.vtoken_numbers CROSS JOIN vtoken_keys
    WHERE nth < length(NEW.taken) / 32 AND digest = {nth_of("NEW.taken")} LIMIT 1
) END"""


@cache
def _kind(*, overlaps: bool, is_limited: bool, is_usual: bool) -> Kind:
    features = {"usual": is_usual, "overlapping": overlaps, "limited": is_limited}
    view = "_".join(["vtoken_insert", *(name for name, has_it in features.items() if has_it)])
    columns = ["place", "mode", "wanted_until"]
    if is_usual:
        columns += ["kind", "key_expires_at", *(name for name in COLUMNS if name not in _USUALLY)]
        insert = _insert(_USUALLY) + _INSERT_KEY
    else:
        columns += ["keep_until", "taken", *COLUMNS]
        insert = _INSERT_OVERLAPPING if overlaps else _insert({}) + _INSERT_KEYS
    limited = f"WHEN {IS_FULL} THEN {_LIMITED}" if is_limited else ""
    work = f"""
    INSERT OR REPLACE INTO vtoken_answers (place, outcome, token, budgets, superseded)
    SELECT NEW.place, outcome, CASE outcome WHEN {_KEY_TAKEN} THEN {_OWNER} WHEN {_HAS_VALID} THEN valid END,
        {STATES if is_limited else "NULL"}, iif(taken AND outcome = {_INSERTED}, NEW.taken, NULL)
    FROM (
        SELECT valid, taken, CASE
            WHEN taken = 2 OR EXISTS (SELECT 1 FROM vtoken_tokens WHERE id = NEW.id) THEN {_KEY_TAKEN}
            WHEN valid IS NOT NULL THEN {_HAS_VALID}
            {limited}
            ELSE {_INSERTED}
        END AS outcome
        FROM (SELECT {_VALID} AS valid, {_TAKEN_ONE if is_usual else _TAKEN} AS taken)
    );
    SELECT RAISE(IGNORE) FROM vtoken_answers WHERE place = NEW.place AND outcome <> {_INSERTED};
    {charge_if(_INSERTED) if is_limited else ""}
    {insert}
    """
    if is_usual:
        work = work.replace("NEW.taken", "NEW.digests")
    work = work.replace("NEW.now", "NEW.created_at")
    return Kind(view=view, columns=(*columns, *LIMIT_COLUMNS * is_limited), work=work)


def _insert(values: Mapping[str, str]) -> str:
    """SQL: replace the older tokens of the line, and store the new one.

    Args:
        values: what the columns are that have other values than the row ``NEW``.
    """
    return f"""
    UPDATE vtoken_tokens SET state = {State.REPLACED.value}, ends_at = min(ends_at, NEW.created_at - 1)
    WHERE {_LINE} AND state = {_ACTIVE} AND NEW.mode <> {_ADD};
    INSERT INTO vtoken_tokens ({", ".join(COLUMNS)})
    VALUES ({", ".join(values.get(name, f"NEW.{name}") for name in COLUMNS)});
    """


_INSERT_KEY: Final = """
    INSERT INTO vtoken_keys (digest, token, origin, kind, expires_at)
    VALUES (NEW.digests, NEW.id, 0, NEW.kind, NEW.key_expires_at);
"""
_INSERT_KEYS: Final = f"""
    INSERT INTO vtoken_keys (digest, token, origin, kind, expires_at)
    SELECT substr(NEW.digests, 1 + 32 * key, 32), NEW.id, {of_key("origin")}, {of_key("kind")},
        {of_key("expires_at")}
    FROM json_each(NEW.keys);
"""

# An overlap: the new token takes over the keys of the newest exclusive token that it replaces.
_PREDECESSOR: Final = f"""(
    SELECT id FROM (
        SELECT * FROM vtoken_tokens
        WHERE {_LINE} AND is_beside = 0 AND state = {_ACTIVE} ORDER BY id DESC LIMIT 1
    )
    WHERE expires_at >= NEW.created_at AND extra_data IS NEW.extra_data
        AND NOT {has_running_hold("NEW.created_at")}
)"""
_OVERLAPPED: Final = "(SELECT predecessor FROM temp.vtoken_answers WHERE place = NEW.place)"
# One that expires with its token is not expired: neither is the token.
_IS_TAKEN_OVER: Final = f"{of_key('origin')} = 0 AND ifnull({of_key('expires_at')} >= NEW.created_at, 1)"
_TAKEN_OVER: Final = f"""
    vtoken_tokens AS predecessor CROSS JOIN json_each(predecessor.keys)
    WHERE predecessor.id = {_OVERLAPPED} AND {_IS_TAKEN_OVER}
"""
_ALL_KEYS: Final = f"""(
    SELECT json_group_array(json(entry)) FROM (
        SELECT value AS entry FROM json_each(NEW.keys)
        UNION ALL
        SELECT json_set(
            value,
            '$[{KEY_ENTRY.index("expires_at")}]',
            min(ifnull({of_key("expires_at")}, predecessor.expires_at), NEW.keep_until),
            '$[{KEY_ENTRY.index("origin")}]', predecessor.id
        ) FROM {_TAKEN_OVER}
    )
)"""
_ALL_DIGESTS: Final = f"""(
    SELECT CAST(NEW.digests || ifnull(group_concat(digest, ''), '') AS BLOB) FROM (
        SELECT substr(predecessor.digests, 1 + 32 * key, 32) AS digest FROM {_TAKEN_OVER}
    )
)"""
_INSERT_OVERLAPPING: Final = f"""
    UPDATE vtoken_answers SET predecessor = {_PREDECESSOR} WHERE place = NEW.place;
    {_insert({"keys": _ALL_KEYS, "digests": _ALL_DIGESTS})}
    {_INSERT_KEYS}
    UPDATE vtoken_keys SET token = NEW.id, origin = token, expires_at = min(
        ifnull(expires_at, (SELECT expires_at FROM vtoken_tokens WHERE id = token)), NEW.keep_until
    ) WHERE digest IN (SELECT substr(predecessor.digests, 1 + 32 * key, 32) FROM {_TAKEN_OVER});
    UPDATE vtoken_tokens SET keys = (
        SELECT json_group_array(json(iif({_IS_TAKEN_OVER}, 0, value))) FROM json_each(keys)
    ) WHERE id = {_OVERLAPPED};
    UPDATE vtoken_answers SET token_row = (SELECT {AS_JSON} FROM vtoken_tokens WHERE id = NEW.id)
    WHERE place = NEW.place;
"""
