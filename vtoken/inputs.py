"""Checks of what comes from outside: text, identifiers, durations, JSON. All else is one clear error.

No message repeats a text that was refused, because it may be a key.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime, timedelta
from difflib import get_close_matches
from enum import Enum
from functools import lru_cache
from typing import Any, Final, TypeVar
from uuid import UUID

from vtoken.errors import ConfigurationError, InvalidInput

T = TypeVar("T")

Duration = timedelta | str
"""How long: a ``timedelta``, or a text such as ``"90s"``, ``"15m"``, ``"1h"`` or ``"7d"``."""
Lifetime = float | timedelta | str | None
"""How long a token lives: a number of minutes, a :data:`Duration`, or None for ever."""

MAX_NAME_BYTES: Final = 255
"""Slugs and content types, UTF-8."""
MAX_OBJECT_ID_BYTES: Final = 512
MAX_KEY_BYTES: Final = 512
MAX_CONTEXT_NAMES: Final = 32
MAX_CONSUME_ID_BYTES: Final = 128
MAX_EXTRA_DATA_BYTES: Final = 16_384
"""Compact UTF-8 JSON text."""
MAX_EXTRA_DATA_DEPTH: Final = 16
"""Nested containers."""

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)
_MAX_DURATION: Final = timedelta(days=9_999 * 366)
_DURATION: Final = re.compile(r"([0-9]{1,15})(ms|s|m|h|d)")
_UNITS: Final = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1_000, "ms": 1}


class Wildcard(Enum):
    """The type of :data:`ANY`."""

    ANY = "ANY"

    def __repr__(self) -> str:
        return self.name


ANY: Final = Wildcard.ANY
"""Every slug, every key or every object: the meaning of an argument that is left out."""


class Unset(Enum):
    """The type of :data:`DEFAULT`."""

    DEFAULT = "DEFAULT"

    def __repr__(self) -> str:
        return self.name


DEFAULT: Final = Unset.DEFAULT
"""Use the policy's value, or else that of the settings."""


def text_problem(value: object, limit: int, *, may_be_empty: bool = False) -> str | None:
    """Say why ``value`` is not a text of 1 to ``limit`` bytes of UTF-8, or None if it is.

    It does not raise, so that a caller can first drop a secret from its frame.
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


def context_problem(value: object) -> str | None:
    """Say why ``value`` is not a context, a text or a mapping of names to texts, or None if it is one.

    A context is a secret: a caller drops it from its frame before it raises.
    """
    if not isinstance(value, Mapping):
        if not isinstance(value, str):
            return f"must be a str or a mapping of names to str, not {type(value).__name__}"
        return text_problem(value, MAX_KEY_BYTES)
    if not 1 <= len(value) <= MAX_CONTEXT_NAMES:
        return f"must be a mapping of 1 to {MAX_CONTEXT_NAMES} names"
    for name, text in value.items():
        problem = text_problem(name, MAX_NAME_BYTES)
        if problem is not None:
            return f"must be a mapping whose names are texts: a name {problem}"
        problem = text_problem(text, MAX_KEY_BYTES, may_be_empty=True)
        if problem is not None:
            return f"must be a mapping whose values are texts: the value of {name!r} {problem}"
    return None


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
        if value.isascii() and 0 < len(value) <= MAX_OBJECT_ID_BYTES and "\0" not in value:
            return value
        return check_text("object_id", value, MAX_OBJECT_ID_BYTES)
    if value is None:
        raise InvalidInput("the object has no id yet: save it before you issue a token for it")
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


def duration(
    name: str, value: object, *, least: timedelta = _MILLISECOND, most: timedelta | None = None
) -> int:
    """Return a duration in whole milliseconds.

    Args:
        name: what the duration is, for the message.
        value: a ``timedelta``, or a text of a number and a unit: ``"250ms"``, ``"90s"``, ``"15m"``,
            ``"1h"``, ``"7d"``.
        least: the shortest that is allowed.
        most: the longest that is allowed, 9999 years if left out.

    Raises:
        InvalidInput: it is neither, or out of range.
    """
    milliseconds = _duration(value)
    if milliseconds is None:
        raise InvalidInput(
            f"{name} must be a timedelta or a text such as '90s', '15m', '1h' or '7d'{_hint(value)}"
        )
    if milliseconds < least // _MILLISECOND:
        raise InvalidInput(f"{name} must be at least {spelled(least // _MILLISECOND)}")
    longest = (_MAX_DURATION if most is None else most) // _MILLISECOND
    if milliseconds > longest:
        raise InvalidInput(f"{name} must be at most {spelled(longest)}")
    return milliseconds


def lifetime(name: str, value: object) -> int | None:
    """Return a lifetime in whole milliseconds, or None for ``None`` (never expires).

    Args:
        name: what the lifetime is, for the message.
        value: None, a number of minutes, or what :func:`duration` takes.

    Raises:
        InvalidInput: it is none of these, shorter than a millisecond or longer than 9999 years.
    """
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not 0 < value <= _MAX_DURATION / timedelta(minutes=1):  # which also refuses NaN
            raise InvalidInput(
                f"{name} must be more than 0 minutes and at most 9999 years, or None for never"
            )
        value = timedelta(minutes=value)
    if _duration(value) is None:
        raise InvalidInput(
            f"{name} must be None, a number of minutes, a timedelta or a text such as '15m', '1h' or '7d',"
            f" not {_kind(value)}"
        )
    return duration(name, value)


def spelled(milliseconds: int) -> str:
    """A duration as :func:`duration` reads it: ``"90s"``, ``"15m"``."""
    for unit, length in _UNITS.items():
        if milliseconds and milliseconds % length == 0:
            return f"{milliseconds // length}{unit}"
    return "0s"


def _duration(value: object) -> int | None:
    if isinstance(value, timedelta):
        return value // _MILLISECOND
    if isinstance(value, str):
        found = _DURATION.fullmatch(value)
        return int(found[1]) * _UNITS[found[2]] if found else None
    return None


def _hint(value: object) -> str:
    """The right spelling of a duration that was given as a number."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**9:
        return f", not an int: for {value} seconds write '{value}s', for {value} minutes '{value}m'"
    return f", not {_kind(value)}"


def _kind(value: object) -> str:
    return "another text" if isinstance(value, str) else type(value).__name__


def check_count(name: str, value: object, *, least: int = 1) -> int:
    """Return ``value`` as an ``int`` from ``least`` up to 2**31 - 1.

    Raises:
        InvalidInput: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise InvalidInput(f"{name} must be an int from {least} to {2**31 - 1}")
    return value


def check_kind(name: str, value: object, kind: Any) -> None:
    """Check the type of a part of a configuration.

    Raises:
        ConfigurationError: it is no instance of ``kind``.
    """
    if not isinstance(value, kind):
        raise ConfigurationError(f"{name} must be {_a(kind.__name__)}, not {type(value).__name__}")


def several(name: str, values: Iterable[T], kind: type = object) -> tuple[T, ...]:
    """Return the parts of a configuration.

    Raises:
        ConfigurationError: it is not iterable, or one of its items is no instance of ``kind``.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        of = "" if kind is object else f" of {kind.__name__}"
        raise ConfigurationError(
            f"{name} must be an iterable{of}, such as a list, not {type(values).__name__}"
        )
    values = tuple(values)
    for value in values:
        check_kind(f"each of {name}", value, kind)
    return values


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "AEIOU" else f"a {noun}"


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``"did you mean ...?"`` with the known name that is spelled most alike, or ``""``.

    Args:
        word: a name that is not known.
        known: the names that are.
    """
    by_lower = {name.lower(): name for name in known}
    near = get_close_matches(word.lower(), by_lower, 1, 0.5)
    return f"did you mean {by_lower[near[0]]}?" if near else ""


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
        hint = "; store a datetime as value.isoformat()" if isinstance(value, date) else ""
        raise InvalidInput(f"extra_data: {type(value).__name__} is not JSON{hint}")
