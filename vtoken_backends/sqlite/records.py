"""Stored tokens as rows, and back.

The tables are declared in ``schema``. A row is read and written by the names of its columns, and the JSON of
a key by :data:`KEY_ENTRY`, so that neither depends on the order of the fields of the records.
"""

# ruff: noqa: S608  # the SQL is put together from this package's own texts; values are always parameters

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any, Final

from vtoken.backend import STALE_HOLD, BudgetState, State, StoredHold, StoredKey, StoredToken

COLUMNS: Final = {
    "id": "INTEGER PRIMARY KEY",
    "content_type": "TEXT NOT NULL",
    "object_id": "TEXT NOT NULL",
    "slug": "TEXT NOT NULL",
    "context": "BLOB NOT NULL",
    "is_beside": "INTEGER NOT NULL",
    "created_at": "INTEGER NOT NULL",
    "expires_at": "INTEGER NOT NULL",
    "ends_at": "INTEGER NOT NULL",
    "state": "INTEGER NOT NULL",
    "extra_data": "TEXT",
    "max_uses": "INTEGER",
    "uses": "INTEGER NOT NULL",
    "used_at": "INTEGER NOT NULL",
    "keys": "TEXT NOT NULL",
    "digests": "BLOB NOT NULL",
    "holds": "TEXT NOT NULL",
}
"""The columns of the table of tokens. Each but ``digests`` is the field of :class:`StoredToken` that has its
name.

``keys`` is a JSON array with one entry for each 32 bytes of ``digests``: :data:`KEY_ENTRY` of the key, or,
where the token has lost the key since, the key's origin alone. The origin 0 stands for the token itself, and
a null ``expires_at`` for that of the token."""

KEY_ENTRY: Final = ("scheme", "secret_id", "nonce", "plain_key", "kind", "expires_at", "origin")
"""What the JSON array of a key consists of. A new field goes before the last two, by a migration."""
HOLD_ENTRY: Final = ("hold_id", "until", "use_id", "origin")
"""What the JSON array of a hold consists of. A new field goes before ``origin``, by a migration."""

_BLOBS: Final = tuple(name for name, declaration in COLUMNS.items() if declaration.startswith("BLOB"))
_IN_JSON: Final = {name: f"hex({name})" for name in _BLOBS} | {"keys": "json(keys)", "holds": "json(holds)"}
AS_JSON: Final = f"json_array({', '.join(_IN_JSON.get(name, name) for name in COLUMNS)})"
"""SQL: a row as JSON."""


def of_key(name: str) -> str:
    """SQL: a field of a key, for each row of ``json_each(keys)``."""
    return f"json_extract(value, '$[{KEY_ENTRY.index(name)}]')"


def of_hold(name: str) -> str:
    """SQL: a field of a hold, for each row of ``json_each(holds)``."""
    return f"json_extract(value, '$[{HOLD_ENTRY.index(name)}]')"


def hold_runs(now: str) -> str:
    """SQL: whether a hold counts at a time, for each row of ``json_each(holds)``."""
    return f"{of_hold('until')} > {now} AND {of_hold('until')} <= {now} + {STALE_HOLD}"


def has_running_hold(now: str) -> str:
    """SQL: whether one of the holds of a token counts at a time."""
    return f"(holds <> '[]' AND EXISTS (SELECT 1 FROM json_each(holds) WHERE {hold_runs(now)}))"


_ID: Final = re.compile(r"[0-7][0-9a-f]{15}")
_dump: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Unreadable(Exception):
    """A row that no backend of ours can have written: the file is not trusted."""


def to_row(token: StoredToken) -> dict[str, Any]:
    """The values of a token, by column."""
    row = token._asdict()
    row["id"] = int(token.id, 16)
    row["state"] = token.state.value
    row["keys"] = _keys_text(token)
    row["digests"] = b"".join([key.digest for key in token.keys])
    row["holds"] = "[]"
    if token.holds:
        row["holds"] = _dump([(*_fields_of_hold(hold), int(hold.origin, 16)) for hold in token.holds])
    return row


def from_row(values: Sequence[Any]) -> StoredToken:
    """The token of a row, or of a row that came as JSON (see :data:`AS_JSON`).

    Args:
        values: in the order of :data:`COLUMNS`.

    Raises:
        Unreadable: it makes no sense.
    """
    try:
        return _token(*values)
    except (ValueError, TypeError, LookupError, RecursionError):
        pass
    raise Unreadable


def number_of(token_id: str) -> int:
    """The number that a token's row has for its id; for a text that is no token's id, one that no row has."""
    return int(token_id, 16) if _ID.fullmatch(token_id) else -1


def token_id(number: int) -> str:
    """The public id of a token, from the number that its row has."""
    return f"{number:016x}"


def budget_state(spent: int | None, strikes: int, until: int) -> BudgetState | None:
    """What a budget's row says; None for the NULLs of a budget without a row."""
    return None if spent is None else BudgetState(spent=spent, strikes=strikes, until=until)


_ACTIVE: Final = State.ACTIVE
_NO_HOLDS: Final[tuple[str, list[Any]]] = ("[]", [])
_decode: Final = json.JSONDecoder().raw_decode


def expiry_to_store(key: StoredKey, token: StoredToken) -> int | None:
    """When a key expires, or None for when its token does."""
    return None if key.expires_at == token.expires_at else key.expires_at


_STATES: Final = {state.value: state for state in State}
_fields_of_key: Final = attrgetter(*KEY_ENTRY[:-2])
_fields_of_hold: Final = attrgetter(*HOLD_ENTRY[:-1])


def _key_entry(key: StoredKey, token: StoredToken) -> tuple[Any, ...]:
    origin = 0 if key.origin == token.id else int(key.origin, 16)
    return (*_fields_of_key(key), expiry_to_store(key, token), origin)


def _keys_text(token: StoredToken) -> str:
    entries = tuple([_key_entry(key, token) for key in token.keys])
    if any(key.nonce or key.plain_key for key in token.keys):
        return _dump(entries)
    return _without_secrets(entries)


@lru_cache(64)  # most tokens have the same: what makes a key's own is its digest
def _without_secrets(entries: tuple[tuple[Any, ...], ...]) -> str:
    return _dump(entries)


def _token(
    id: int,  # noqa: A002  # the column's name, as of all of these
    content_type: str,
    object_id: str,
    slug: str,
    context: bytes | str,
    is_beside: int,
    created_at: int,
    expires_at: int,
    ends_at: int,
    state: int,
    extra_data: str | None,
    max_uses: int | None,
    uses: int,
    used_at: int,
    keys: str | list[Any],
    digests: bytes | str,
    holds: str | list[Any],
) -> StoredToken:
    """The token of the values of :data:`COLUMNS`, in their order. In a row that came as JSON, blobs are
    hexadecimal text, and ``keys`` and ``holds`` were read already."""
    if id < 0:
        raise ValueError
    own = token_id(id)
    token = StoredToken(
        id=own,
        content_type=content_type,
        object_id=object_id,
        slug=slug,
        context=_blob(context) if context else b"",
        is_beside=(False, True)[is_beside],
        created_at=created_at,
        expires_at=expires_at,
        ends_at=ends_at,
        state=_STATES[state],
        extra_data=extra_data,
        max_uses=max_uses,
        uses=uses,
        used_at=used_at,
        keys=_keys(_read(keys), _blob(digests), own, expires_at),
        holds=() if holds in _NO_HOLDS else _holds(_read(holds)),
    )
    if not _is_sound(token):
        raise ValueError
    return token


def _blob(value: bytes | str) -> bytes:
    return bytes.fromhex(value) if isinstance(value, str) else value


def _read(value: str | list[Any]) -> list[Any]:
    if not isinstance(value, str):
        return value
    found, end = _decode(value)
    if end != len(value) or not isinstance(found, list):
        raise ValueError
    return found


def _keys(entries: list[Any], digests: bytes, own: str, ends: int) -> tuple[StoredKey, ...]:
    if len(digests) != 32 * len(entries):
        raise ValueError
    keys: list[StoredKey] = []
    for place, entry in enumerate(entries):
        if isinstance(entry, int):  # the origin of a key that the token lost
            continue
        keys.append(_key(own, ends, digests[32 * place : 32 * place + 32], *entry))
    return tuple(keys)


def _key(
    own: str,
    ends: int,
    digest: bytes,
    scheme: str,
    secret_id: str,
    nonce: str,
    plain_key: str,
    kind: str,
    expires_at: int | None,
    origin: int,
) -> StoredKey:
    """A key, of the id and the expiry of its token, its digest and what :data:`KEY_ENTRY` names."""
    if expires_at is None:
        expires_at = ends
    if type(expires_at) is not int or kind not in ("link", "code"):
        raise ValueError
    return StoredKey(
        digest=digest,
        scheme=scheme,
        secret_id=secret_id,
        nonce=nonce,
        plain_key=plain_key,
        kind=kind,
        expires_at=expires_at,
        origin=token_id(origin) if origin else own,
    )


def _holds(entries: list[Any]) -> tuple[StoredHold, ...]:
    holds: list[StoredHold] = []
    for entry in entries:
        fields = dict(zip(HOLD_ENTRY, entry, strict=True))
        fields["origin"] = token_id(fields["origin"])
        hold = StoredHold(**fields)
        if type(hold.until) is not int or type(hold.hold_id) is not str or type(hold.use_id) is not str:
            raise ValueError
        holds.append(hold)
    return tuple(holds)


def _is_sound(token: StoredToken) -> bool:
    if token.created_at < 0 or token.expires_at < 0 or token.used_at < 0 or token.uses < 0:
        return False
    max_uses = token.max_uses
    if max_uses is not None and max_uses < 1:
        return False
    if token.state is not _ACTIVE:
        return True
    # A token that was switched on again by hand: its end tells of it.
    return token.ends_at == token.expires_at and (max_uses is None or token.uses < max_uses)
