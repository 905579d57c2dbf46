"""Coverage-guided fuzzing of what reads foreign bytes, by hand and at night; needs ``pip install atheris``.

    python -m tests.faults.fuzz_atheris TARGET [options of libFuzzer, e.g. -max_total_time=600]

Each target is a plain function of bytes, which the test suite calls as well.
"""

from __future__ import annotations

import copy
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Final

from vtoken import ConfigurationError, CorruptStore, create_backend
from vtoken.backend import Match, State, StoredHold, StoredKey, StoredToken, matches, refusal
from vtoken.keys import (
    CHECKSUM_LENGTH,
    add_checksum,
    code_shape_ok,
    has_checksum,
    normalise_code,
    normalise_link,
)
from vtoken.redact import redact_url
from vtoken.token import loaded
from vtoken_backends.mongodb import documents as mongodb
from vtoken_backends.postgresql import rows as postgresql
from vtoken_backends.sqlite import records as sqlite

_SCHEMES: Final = (
    "memory://",
    "sqlite:///",
    "mongodb://",
    "mongodb://user:secret@",
    "postgresql://user:secret@",
    "",
)
_WORD: Final = re.compile(r"[a-z0-9]+")


def url(data: bytes) -> None:
    """A configuration URL makes a backend, or is refused without its password."""
    text = data[1:].decode(errors="surrogateescape")
    text = _SCHEMES[data[0] % len(_SCHEMES)] + text if data else text
    hidden = f"mongodb://user:hunter2{''.join(_WORD.findall(text))[:20]}@host/x"
    assert "hunter2" not in redact_url(hidden)
    redact_url(text)
    with suppress(ConfigurationError):
        if ":" not in text.partition("://")[0]:  # an import path would run what it names
            create_backend(text)


def checksum(data: bytes) -> None:
    """A framed key passes, and a change of one character does not."""
    prefix, _, body = data.decode(errors="replace").replace("\0", "?").partition("/")
    has_checksum(prefix, body)
    normalise_code(body, prefix or None)
    if not prefix or not body:
        return
    key = add_checksum(prefix, body)
    assert has_checksum(prefix, key)
    assert not has_checksum(prefix, key[:-1] + ("A" if key[-1] != "A" else "B"))
    assert len(key) == len(prefix) + len(body) + CHECKSUM_LENGTH


def pasted(data: bytes) -> None:
    """What is pasted into a form is read in the same way whatever stands around it."""
    text = data.decode(errors="replace").replace("\0", "")
    for chars in (None, "0123456789", "ABCDEF", "abcXYZ"):
        code = normalise_code(text, chars)
        assert normalise_code(f"\u200b {text}-\n", chars) == code
        code_shape_ok(code, 6, chars)
    link = normalise_link(text)
    assert normalise_link(f"\ufeff{link} ") == link
    assert link in text


def sqlite_row(data: bytes) -> None:
    """A row of the SQLite file is a token that can be used, or is said to be corrupt."""
    row = sqlite.to_row(SOUND) | {
        "keys": _lists(sqlite.KEY_ENTRY, SOUND.keys),
        "holds": _lists(sqlite.HOLD_ENTRY, SOUND.holds),
    }
    changed = _changed(row, data)
    for name in ("keys", "holds"):
        changed[name] = json.dumps(changed[name], default=repr)
    if _has_the_types_of(changed, sqlite.to_row(SOUND)):
        with suppress(sqlite.Unreadable):
            _use(sqlite.from_row(tuple(changed.values())))


def postgresql_row(data: bytes) -> None:
    """A row of a PostgreSQL table, likewise."""
    row = postgresql.token_row(SOUND, was_added=False)
    changed = _changed(row, data)
    if _has_the_types_of(changed, row):
        with suppress(CorruptStore):
            _use(postgresql.to_token(json.dumps(changed, default=repr)))


def mongodb_document(data: bytes) -> None:
    """A document of MongoDB, likewise."""
    changed = _changed(mongodb.token_document(mongodb.Kept(SOUND, "")), data)
    shared = {name: getattr(SOUND, name) for name in mongodb.SHARED}
    with suppress(CorruptStore):
        _use(mongodb.kept_of(changed, shared).token)


SOUND: Final = StoredToken(
    id="0" * 15 + "1",
    content_type="auth.user",
    object_id="1",
    slug="pair",
    context=b"",
    is_beside=False,
    created_at=1,
    expires_at=9,
    ends_at=9,
    state=State.ACTIVE,
    extra_data="{}",
    max_uses=2,
    uses=0,
    used_at=0,
    keys=tuple(
        StoredKey(
            digest=bytes([number]) * 32,
            scheme="hmac-sha256",
            secret_id="",
            nonce="",
            plain_key="",
            kind=kind,
            expires_at=9,
            origin="0" * 15 + "1",
        )
        for number, kind in enumerate(("link", "code"))
    ),
    holds=(StoredHold(hold_id="hold", until=5, use_id="", origin="0" * 15 + "1"),),
)
"""What the fuzzer changes."""
_NULLABLE: Final = ("extra_data", "max_uses")


def _use(token: StoredToken) -> None:
    """Do with a token what a manager does: it is a token, or its store is corrupt."""
    with suppress(CorruptStore):
        seen = loaded(token)
        assert repr(seen)
        seen.is_valid()
        seen.get_extra_data()
        refusal(token, None, 2)
        for key in token.keys:
            refusal(token, key, 2)
            matches(token, Match(digests=(key.digest,), valid_at=2))


def _lists(names: tuple[str, ...], records: tuple[Any, ...]) -> list[list[Any]]:
    """Records as SQLite keeps them: lists of their fields, with a number for an id."""
    return [
        [int(value, 16) if name == "origin" else value for name in names for value in [getattr(record, name)]]
        for record in records
    ]


def _has_the_types_of(changed: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether the tables, which are strict, would store these values."""
    return all(
        type(value) is type(row[name]) or (value is None and name in _NULLABLE)
        for name, value in changed.items()
    )


def _changed(row: dict[str, Any], data: bytes) -> dict[str, Any]:
    """A copy of a row, some of whose values are what the bytes say, those inside of lists as well."""
    changed = copy.deepcopy(row)
    for piece in data.split(b"\xff"):
        if len(piece) < 2:
            continue
        places = list(_places(changed))
        container, place = places[piece[0] % len(places)]
        text = piece[2:].decode(errors="replace")
        kinds: tuple[Any, ...] = (
            int.from_bytes(piece[2:10], "big", signed=True),
            text,
            piece[2:],
            None,
            1.5,
            [text],
            True,
            {},
        )
        alike = [kind for kind in kinds if type(kind) is type(container[place])]
        container[place] = alike[0] if alike and piece[1] < 192 else kinds[piece[1] % len(kinds)]
    return changed


def _places(container: Any) -> Iterator[tuple[Any, Any]]:
    for place, value in container.items() if isinstance(container, dict) else enumerate(container):
        yield container, place
        if isinstance(value, dict | list):
            yield from _places(value)


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    target.__name__: target
    for target in (url, checksum, pasted, sqlite_row, postgresql_row, mongodb_document)
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: python -m tests.faults.fuzz_atheris {{{','.join(TARGETS)}}} [option ...]")
    # Optional, and without types: by its name, so that the type checkers need not have it.
    atheris: Any = importlib.import_module("atheris")
    target = TARGETS[sys.argv.pop(1)]
    atheris.instrument_all()
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
