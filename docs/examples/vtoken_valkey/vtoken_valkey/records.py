"""What is stored of an object, as JSON: its tokens, and which uses are remembered of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from vtoken import CorruptStore
from vtoken.backend import REMEMBERED_USES, BudgetState, State, StoredHold, StoredKey, StoredToken


@dataclass
class StoredObject:
    """Everything about one object that has to change in one step."""

    tokens: dict[str, StoredToken] = field(default_factory=dict[str, StoredToken])
    uses: list[tuple[str, str, str, int]] = field(default_factory=list[tuple[str, str, str, int]])
    """Origin of the key, use id, id of the token that was used, and when; oldest first."""

    def use(self, origin: str, use_id: str) -> tuple[str, int] | None:
        """The token and the time of a use that is remembered."""
        for known_origin, known_id, token_id, at in reversed(self.uses):
            if (known_origin, known_id) == (origin, use_id) and token_id in self.tokens:
                return token_id, at
        return None

    def remember(self, origin: str, use_id: str, token_id: str, at: int) -> None:
        """Remember a use, and forget the oldest ones of a key that has more than need be remembered."""
        self.uses.append((origin, use_id, token_id, at))
        of_origin = [use for use in self.uses if use[0] == origin]
        if len(of_origin) > REMEMBERED_USES:
            self.uses.remove(of_origin[0])

    def remove(self, token: StoredToken) -> None:
        """Forget a token and what is remembered of its uses."""
        del self.tokens[token.id]
        self.uses = [use for use in self.uses if use[2] != token.id]


def dump_object(stored: StoredObject) -> bytes:
    """An object as JSON; ``b""`` where nothing is left of it."""
    if not stored.tokens:
        return b""
    tokens = [_dumped(token) for token in stored.tokens.values()]
    return json.dumps([tokens, stored.uses], separators=(",", ":")).encode()


def load_object(raw: bytes | None) -> StoredObject:
    """An object from its JSON.

    Raises:
        CorruptStore: no backend of ours can have written it.
    """
    if not raw:
        return StoredObject()
    try:
        tokens, uses = json.loads(raw)
        found = [_loaded(token) for token in tokens]
        return StoredObject({token.id: token for token in found}, [_use(*use) for use in uses])
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise CorruptStore("Valkey: an object's tokens are damaged")


def dump_budget(state: BudgetState) -> bytes:
    """A budget as JSON."""
    return json.dumps(state).encode()


def load_budget(raw: bytes | None) -> BudgetState | None:
    """A budget from its JSON; None where there is none.

    Raises:
        CorruptStore: no backend of ours can have written it.
    """
    if not raw:
        return None
    try:
        spent, strikes, until = (_int(number) for number in json.loads(raw))
    except (ValueError, TypeError, RecursionError):
        pass
    else:
        return BudgetState(spent=spent, strikes=strikes, until=until)
    raise CorruptStore("Valkey: a budget is damaged")


def _dumped(token: StoredToken) -> dict[str, Any]:
    record = token._asdict()
    record |= {"context": token.context.hex(), "state": token.state.value}
    record["keys"] = [key._asdict() | {"digest": key.digest.hex()} for key in token.keys]
    record["holds"] = [hold._asdict() for hold in token.holds]
    return record


def _loaded(record: dict[str, Any]) -> StoredToken:
    token = StoredToken(
        **record
        | {
            "context": bytes.fromhex(record["context"]),
            "state": State(record["state"]),
            "keys": tuple(
                StoredKey(**key | {"digest": bytes.fromhex(key["digest"])}) for key in record["keys"]
            ),
            "holds": tuple(StoredHold(**hold) for hold in record["holds"]),
        }
    )
    for name in ("created_at", "expires_at", "ends_at", "uses", "used_at"):
        _int(getattr(token, name))
    return token


def _use(origin: str, use_id: str, token_id: str, at: int) -> tuple[str, str, str, int]:
    return origin, use_id, token_id, _int(at)


def _int(value: object) -> int:
    if type(value) is not int:
        raise TypeError
    return value
