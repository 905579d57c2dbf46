"""Records as rows and back: each row travels as one JSON text, by the names of its columns."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

from vtoken.backend import Budget, BudgetState, State, StoredHold, StoredKey, StoredToken
from vtoken.errors import CorruptStore
from vtoken_backends.postgresql.board import Receipt
from vtoken_backends.postgresql.tables import WAS_ADDED

Row = dict[str, Any]
_R = TypeVar("_R", StoredKey, StoredHold)

_ID: Final = re.compile(r"[0-7][0-9a-f]{15}")
_ESCAPED: Final = re.compile(rb"\\(\\|[0-7]{3})")
_STATES: Final = {state.value: state for state in State}
_KEY_TYPES: Final = tuple({"digest": bytes, "expires_at": int}.get(name, str) for name in StoredKey._fields)
_HOLD_TYPES: Final = tuple({"until": int}.get(name, str) for name in StoredHold._fields)
_encode: Final = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


def to_json(rows: Sequence[Mapping[str, object]]) -> str:
    return _encode(rows)


def number_of(token_id: str) -> int | None:
    """A token's id as it is stored, or None for what no token has as its id."""
    return int(token_id, 16) if _ID.fullmatch(token_id) else None


def first_number_not_below(token_id: str) -> int:
    """How many of the possible ids sort before a text. Where the text is an id, that is its number."""
    number = number_of(token_id)
    return bisect_left(range(2**63 - 1), token_id, key=id_of) if number is None else number


def id_of(number: int) -> str:
    return f"{number:016x}"


def binary(value: bytes) -> str:
    """Bytes as PostgreSQL reads and writes them as text."""
    return "\\x" + value.hex()


def binary_array(values: Iterable[bytes]) -> str:
    """The text of a ``bytea[]``: the driver takes ten times as long to write one from a list."""
    return "{" + ",".join([f'"\\\\x{value.hex()}"' for value in values]) + "}"


def from_binary(text: str) -> bytes:
    if text.startswith("\\x"):
        return bytes.fromhex(text[2:])
    # The role or the database has `bytea_output = escape`.
    return _ESCAPED.sub(lambda found: _unescaped(found[1]), text.encode())


def _unescaped(escaped: bytes) -> bytes:
    return b"\\" if escaped == b"\\" else bytes([int(escaped, 8)])


def key_row(key: StoredKey) -> Row:
    row = key._asdict()
    row["digest"] = key.digest.hex()
    return row


def _to_key(row: Row) -> StoredKey:
    row["digest"] = bytes.fromhex(row["digest"])
    return _checked(StoredKey(**row), _KEY_TYPES)


def _checked(record: _R, types: tuple[type, ...]) -> _R:
    """A record of a JSON column, whose values the table does not check."""
    if tuple(map(type, record)) != types:
        raise TypeError
    return record


# What differs between a field and its column; all others are stored as they are.
_TO_COLUMN: Final[dict[str, Callable[[Any], object]]] = {
    "id": lambda token_id: int(token_id, 16),
    "context": binary,
    "state": lambda state: state.value,
    "keys": lambda keys: [key_row(key) for key in keys],
    "holds": lambda holds: [hold._asdict() for hold in holds],
}


def token_row(token: StoredToken, *, was_added: bool) -> Row:
    row = token._asdict()
    row[WAS_ADDED] = was_added
    for name, convert in _TO_COLUMN.items():
        row[name] = convert(row[name])
    return row


def patch(before: StoredToken, after: StoredToken) -> Row:
    """The columns that a change of a token changes, with their new values."""
    old = before._asdict()
    return {
        name: _TO_COLUMN[name](value) if name in _TO_COLUMN else value
        for name, value in after._asdict().items()
        if value is not old[name] and value != old[name]
    }


def to_token(text: str) -> StoredToken:
    """A token from the JSON text of its row.

    Raises:
        CorruptStore: the row is not a token's.
    """
    token = _parsed(text)
    if token is None:
        del text  # so that no traceback shows the row
        raise CorruptStore("PostgreSQL: vtoken_tokens contains an invalid row")
    return token


def _parsed(text: str) -> StoredToken | None:
    try:
        row = json.loads(text)
        del row[WAS_ADDED]
        row["id"] = id_of(row["id"])
        row["context"] = from_binary(row["context"])
        row["state"] = _STATES[row["state"]]
        row["keys"] = tuple([_to_key(key) for key in row["keys"]])
        row["holds"] = (
            tuple([_checked(StoredHold(**hold), _HOLD_TYPES) for hold in row["holds"]])
            if row["holds"]
            else ()
        )
        return StoredToken(**row)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def budget_row(budget: Budget) -> Row:
    return {name: binary(value) for name, value in budget._asdict().items()}


def to_budget(text: str) -> tuple[Budget, BudgetState]:
    row = json.loads(text)
    budget = Budget(**{name: from_binary(row.pop(name)) for name in Budget._fields})
    return budget, BudgetState(**row)


def to_receipt(text: str) -> Receipt:
    row = json.loads(text)
    row["token"], row["origin"] = id_of(row["token"]), id_of(row["origin"])
    return Receipt(**row)
