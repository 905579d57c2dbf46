"""What may come in from outside: text, identifiers, durations, JSON; one clear error for the rest.

Nothing here puts the refused value into a message: it may be a key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import lru_cache
from typing import Any, Final, TypeVar
from uuid import UUID

from vtoken.errors import ConfigurationError, InvalidInput

T = TypeVar("T")

MAX_NAME_BYTES: Final = 255
"""Slugs and content types, UTF-8."""
MAX_OBJECT_ID_BYTES: Final = 512
MAX_KEY_BYTES: Final = 512
MAX_CONSUME_ID_BYTES: Final = 128
MAX_EXTRA_DATA_BYTES: Final = 16_384
"""Compact UTF-8 JSON text."""
MAX_EXTRA_DATA_DEPTH: Final = 16
"""Nested containers."""

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)
_MAX_MINUTES: Final = timedelta(days=9_999 * 366) // timedelta(minutes=1)


class Wildcard(Enum):
    """The type of :data:`ANY`."""

    ANY = "ANY"

    def __repr__(self) -> str:
        return self.name


ANY: Final = Wildcard.ANY
"""Every slug, every key, every object: what an argument means when it is left out."""


class Unset(Enum):
    """The type of :data:`DEFAULT`."""

    DEFAULT = "DEFAULT"

    def __repr__(self) -> str:
        return self.name


DEFAULT: Final = Unset.DEFAULT
"""Take the policy's value, or the settings'."""


def text_problem(value: object, limit: int, *, may_be_empty: bool = False) -> str | None:
    """Say why ``value`` is not a text of 1 to ``limit`` bytes of UTF-8, or None if it is.

    A separate step from raising, so that a caller can first drop a secret from its frame.
    """
    if type(value) is str and value.isascii() and 0 < len(value) <= limit and "\0" not in value:
        return None
    if not isinstance(value, str):
        return f"must be a str, not {type(value).__name__}"
    value = str.__str__(value)  # what a subclass says about itself may differ from what it holds
    if not value and not may_be_empty:
        return "must not be empty"
    if "\0" in value:
        return "must not contain NUL"
    if len(value) > limit:
        return f"must be at most {limit} bytes long"
    if value.isascii():
        return None
    if any("\ud800" <= c <= "\udfff" for c in value):
        return "must not contain lone surrogates"
    return f"must be at most {limit} bytes long" if len(value.encode()) > limit else None


def check_text(name: str, value: object, limit: int) -> str:
    """Return ``value`` as a plain ``str`` of 1 to ``limit`` bytes of UTF-8.

    Raises:
        InvalidInput: it is none.
    """
    if type(value) is str and value.isascii() and 0 < len(value) <= limit and "\0" not in value:
        return value
    problem = text_problem(value, limit)
    if problem is not None:
        raise InvalidInput(f"{name} {problem}")
    assert isinstance(value, str)  # noqa: S101  # for the type checkers: text_problem has seen to it
    return str.__str__(value)  # a subclass (an enum, say) becomes its plain value


def check_object_id(value: object) -> str:
    """Return the canonical text of an object's id: 1 and "1" are one object on every backend.

    Raises:
        InvalidInput: not a ``str``, ``int`` or ``UUID``, or not 1 to 512 bytes of UTF-8.
    """
    if type(value) is str:
        return check_text("object_id", value, MAX_OBJECT_ID_BYTES)
    if isinstance(value, bool) or not isinstance(value, str | int | UUID):
        raise InvalidInput(f"object_id must be a str, int or UUID, not {type(value).__name__}")
    if isinstance(value, int):
        # Refused before str() does it: that has a limit of its own (sys.set_int_max_str_digits).
        if value.bit_length() > 1_700:
            raise InvalidInput(f"object_id must be at most {MAX_OBJECT_ID_BYTES} bytes long")
        value = int.__repr__(value)
    elif isinstance(value, UUID):
        value = UUID.__str__(value)
    return check_text("object_id", value, MAX_OBJECT_ID_BYTES)


def milliseconds(moment: datetime) -> int:
    """Milliseconds since the epoch, floored.

    Raises:
        InvalidInput: not a ``datetime``, or a naive one.
    """
    if type(moment) is not datetime or moment.tzinfo is not UTC:
        _check_aware(moment)
    since = moment - EPOCH
    # Twice as fast as dividing by a timedelta, on the way of every request (tests/benchmarks, memory).
    return since.days * 86_400_000 + since.seconds * 1000 + since.microseconds // 1000


def _check_aware(moment: object) -> None:
    if not isinstance(moment, datetime) or moment.tzinfo is None or moment.utcoffset() is None:
        raise InvalidInput("a point in time must be an aware datetime, e.g. datetime.now(UTC)")


@lru_cache(1024)  # of many tokens at once, as a loaded application handles them, most share their moments
def from_milliseconds(moment: int) -> datetime:
    """The aware UTC datetime of so many milliseconds since the epoch."""
    return EPOCH + timedelta(0, moment // 1000, moment % 1000 * 1000)


def check_minutes(name: str, value: object) -> int | None:
    """Return a lifetime in whole milliseconds, or None for ``None`` (never expires).

    Raises:
        InvalidInput: neither None nor an ``int`` or ``float`` greater than 0, of at most 9999 years.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidInput(f"{name} must be a number of minutes or None, not {type(value).__name__}")
    if not 0 < value < _MAX_MINUTES:  # which NaN is not either
        raise InvalidInput(f"{name} must be a number of minutes greater than 0, and at most 9999 years")
    return timedelta(minutes=value) // _MILLISECOND


def check_duration(name: str, value: object, *, least: timedelta = _MILLISECOND) -> int:
    """Return a ``timedelta`` in whole milliseconds.

    Raises:
        InvalidInput: not a ``timedelta`` of ``least`` or more.
    """
    if not isinstance(value, timedelta) or value < least:
        raise InvalidInput(f"{name} must be a timedelta of at least {least}")
    return value // _MILLISECOND


def check_count(name: str, value: object, *, least: int = 1) -> int:
    """Return ``value`` as an ``int`` from ``least`` up to 2**31 - 1.

    Raises:
        InvalidInput: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise InvalidInput(f"{name} must be an int from {least} to {2**31 - 1}")
    return value


def check_kind(name: str, value: object, kind: Any) -> None:
    """Say what a part of a configuration must be.

    Raises:
        ConfigurationError: it is no instance of ``kind``.
    """
    if not isinstance(value, kind):
        raise ConfigurationError(f"{name}: a {kind.__name__} is wanted, not {type(value).__name__}")


def several(name: str, values: Iterable[T], kind: type = object) -> tuple[T, ...]:
    """Return the parts of a configuration.

    Raises:
        ConfigurationError: it is not several, or one is no instance of ``kind``.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ConfigurationError(f"{name}: several are wanted, e.g. a list, not {type(values).__name__}")
    values = tuple(values)
    for value in values:
        check_kind(name, value, kind)
    return values


def dump_json(value: object) -> str:
    """Return the compact JSON text of ``value``.

    Only what comes back exactly is taken: dicts with str keys, lists, str, bool, None, integers
    within 64 bits signed, finite floats; at most 16 nested containers and 16,384 bytes.

    Raises:
        InvalidInput: it is something else.
    """
    _check_json(value, MAX_EXTRA_DATA_DEPTH)
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise InvalidInput("extra_data must not contain lone surrogates")
    if len(text.encode()) > MAX_EXTRA_DATA_BYTES:
        raise InvalidInput(f"extra_data must be at most {MAX_EXTRA_DATA_BYTES} bytes of JSON")
    return text


def check_json_text(text: object) -> str:
    """Return ``text`` if it is JSON that :func:`dump_json` could have written, give or take white space.

    Raises:
        InvalidInput: it is none.
    """
    if not isinstance(text, str):
        raise InvalidInput(f"extra_data must be JSON text or None, not {type(text).__name__}")
    text = str.__str__(text)
    if len(text) > MAX_EXTRA_DATA_BYTES or any("\ud800" <= c <= "\udfff" for c in text):
        raise InvalidInput(f"extra_data must be at most {MAX_EXTRA_DATA_BYTES} bytes of JSON")
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        value = DEFAULT
    if value is DEFAULT:
        raise InvalidInput("extra_data is not JSON text; use set_extra_data(value)")
    dump_json(value)
    if len(text.encode()) > MAX_EXTRA_DATA_BYTES:
        raise InvalidInput(f"extra_data must be at most {MAX_EXTRA_DATA_BYTES} bytes of JSON")
    return text


def _check_json(value: object, depth: int) -> None:
    if value is None or isinstance(value, bool | str):
        return
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise InvalidInput("extra_data: integers must fit into 64 bits signed")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidInput("extra_data: NaN and infinities are not JSON")
    elif isinstance(value, dict | list):
        if depth == 0:
            raise InvalidInput(f"extra_data: at most {MAX_EXTRA_DATA_DEPTH} nested containers")
        if isinstance(value, dict):
            for name in value:
                if not isinstance(name, str):
                    raise InvalidInput(f"extra_data: keys must be str, not {type(name).__name__}")
        for item in value.values() if isinstance(value, dict) else value:
            _check_json(item, depth - 1)
    else:
        raise InvalidInput(f"extra_data: {type(value).__name__} is not JSON")
