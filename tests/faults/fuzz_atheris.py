"""Coverage-guided fuzzing of what reads foreign bytes, by hand and at night; needs ``pip install atheris``.

    python -m tests.faults.fuzz_atheris TARGET [options of libFuzzer, e.g. -max_total_time=600]

Each target is a plain function of bytes, which the test suite calls as well.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from vtoken import ConfigurationError, CorruptStore, create_backend
from vtoken.backend import StoredToken
from vtoken.keys import CHECKSUM_LENGTH, add_checksum, has_checksum, normalise_code
from vtoken.loaded import loaded
from vtoken.redact import redact_url
from vtoken_backends import _mongodb_documents as documents
from vtoken_backends import _sqlite_statements as statements

_SCHEMES: Final = ("memory://", "sqlite:///", "mongodb://", "mongodb://user:secret@", "")
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


def row(data: bytes) -> None:
    """A row of the SQLite file, or a document, is a token that can be looked at, or is said to be corrupt."""
    values = _values(data)
    # The tables are STRICT: SQLite lets no value of another type into a column.
    if [type(v) for v in values] == [type(v) for v in _sound().values()]:
        found = statements.decode(tuple(values))
        if found is not None:
            _look(found)
    names = ["_id" if name == "id" else name for name in StoredToken._fields]
    with suppress(CorruptStore):
        _look(documents.state(dict(zip(names, values, strict=True))).token)


def _look(token: StoredToken) -> None:
    with suppress(CorruptStore):
        seen = loaded(token)
        assert repr(seen)
        seen.is_valid()
        seen.get_extra_data()


def _sound() -> dict[str, Any]:
    sound: dict[str, Any] = dict.fromkeys(StoredToken._fields, "")
    sound |= dict.fromkeys(("created_at", "expires_at", "ends_at", "max_uses"), 1)
    sound |= dict.fromkeys(("uses", "used_at", "lease_until"), 0)
    return sound | {"digest": bytes(32), "context": b"", "is_active": 1, "use_ids": "[]"}


def _values(data: bytes) -> list[Any]:
    """A sound row, with some of its fields overwritten by what the bytes say."""
    values = list(_sound().values())
    for piece in data.split(b"\xff"):
        if len(piece) < 2:
            continue
        text = piece[2:].decode(errors="replace")
        kinds = (int.from_bytes(piece[2:10], "big", signed=True), text, piece[2:], None, 1.5, [text], True)
        place = piece[0] % len(values)
        alike = [kind for kind in kinds if type(kind) is type(values[place])]
        values[place] = alike[0] if alike and piece[1] < 192 else kinds[piece[1] % len(kinds)]
    return values


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {t.__name__: t for t in (url, checksum, row)}


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
