"""Reading settings and policies from text, TOML and mappings; every mistake names the nearest right spelling.

Values are not repeated in messages: a secret may have been put into the wrong place.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from datetime import timedelta
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar, cast, get_args

from vtoken.errors import ConfigurationError
from vtoken.policy import KeyStorage, Settings, TokenPolicy

T = TypeVar("T")
U = TypeVar("U")

SETTINGS: Final = tuple(field.name for field in fields(Settings))
_POLICY: Final = tuple(field.name for field in fields(TokenPolicy) if field.name != "slug")
_UNITS: Final = {
    "ms": timedelta(milliseconds=1),
    "s": timedelta(seconds=1),
    "m": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
}

Found = tuple[str, object]
"""Where a value was found (for the message about it) and the value."""


def policies_from_mapping(mapping: Mapping[str, Any], source: str = "policies") -> tuple[TokenPolicy, ...]:
    """Make policies from tables by slug, e.g. those of a TOML file.

    Args:
        mapping: slug -> table; the slug ``""`` stands for tokens without one. A table holds ``preset``
            (``"link"`` or ``"code"``, the latter with ``digits``) or none, and the arguments of
            :class:`TokenPolicy` by their names: ``expiration`` in minutes, the other durations in
            seconds, each also as text with a unit such as ``"90s"``, ``"15m"``, ``"1h"``, ``"2d"``;
            ``expiration = "never"``.
        source: what messages call the mapping.

    Raises:
        ConfigurationError: a name is unknown (the nearest right one is named), or a value is out of
            its range or below its floor.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigurationError(f"{source} must be tables by slug, e.g. [policies.password-reset]")
    return tuple(_policy(slug, table, f"{source}.{slug or repr('')}") for slug, table in mapping.items())


def _policy(slug: object, table: object, where: str) -> TokenPolicy:
    if not isinstance(slug, str) or not isinstance(table, Mapping):
        raise ConfigurationError(f"{where} must be a table, e.g. [policies.password-reset]")
    options = dict(cast("Mapping[str, object]", table))
    preset = options.pop("preset", None)
    if preset is not None:
        convert(f"{where}.preset", _choice("link", "code"), preset)
    check_names(options, (*_POLICY, "preset", *(("digits",) if preset == "code" else ())), where)
    values: dict[str, Any] = {
        name: convert(f"{where}.{name}", _POLICY_VALUES.get(name, _as_it_is), value)
        for name, value in options.items()
    }
    make = {"link": TokenPolicy.link, "code": TokenPolicy.code}.get(cast("str", preset), TokenPolicy)
    return convert(where, lambda _: make(slug or None, **values), None)


def settings_from(found: Mapping[str, Found]) -> Settings:
    """Make settings of what was found, by the names of their fields.

    Raises:
        ConfigurationError: a value is out of its range; the message says where it came from.
    """
    settings = Settings()
    for name in SETTINGS:  # one by one, so that an error can be laid at its value's door
        if name in found:
            where, raw = found[name]
            value = convert(where, _SETTINGS_VALUES.get(name, _as_it_is), raw)
            settings = convert(where, partial(_with, settings, name), value)
    return settings


def _with(settings: Settings, name: str, value: Any) -> Settings:
    return replace(settings, **{name: value})


def read_file(path: str) -> dict[str, Any]:
    """Read a TOML file: settings, ``url``, ``hooks``, ``[policies.<slug>]``; or all in ``[tool.vtoken]``.

    Raises:
        ConfigurationError: it cannot be read, is no TOML, or holds an unknown name.
    """
    document: Any = {}
    problem: str | None = None
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        problem = f"cannot be read: {error.strerror or type(error).__name__}"
    except tomllib.TOMLDecodeError as error:
        problem = f"is not TOML: {str(error).splitlines()[0]}"
    except ValueError:  # no UTF-8, or a NUL in the path
        problem = "is not TOML: not UTF-8 text"
    if problem is None and "tool" in document:
        tables = document["tool"]
        document = tables.get("vtoken") if isinstance(tables, dict) else None
        if not isinstance(document, dict):
            problem = "has no table [tool.vtoken]"
    if problem is not None:
        raise ConfigurationError(f"the configuration file {path!r} {problem}")
    check_names(document, (*SETTINGS, "url", "hooks", "policies"), path)
    return cast("dict[str, Any]", document)


def check_names(given: Iterable[object], known: Iterable[str], where: str) -> None:
    """Refuse a name that is not known.

    Raises:
        ConfigurationError: it names the nearest known one, or else all of them.
    """
    known = tuple(known)
    for name in given:
        if name not in known:
            near = get_close_matches(str(name), known, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            raise ConfigurationError(f"{where}: unknown name {name!r}; {hint}")


def convert(where: str, converter: Callable[[T], U], value: T) -> U:
    """Convert a value; an error says where the value came from."""
    problem: str
    try:
        return converter(value)
    except ConfigurationError as error:
        problem = str(error)
    except TypeError:  # of a table where a number belongs, say
        problem = "a value has the wrong type"
    raise ConfigurationError(f"{where}: {problem}")


def texts(value: object) -> tuple[str, ...]:
    """Several texts: a list of them, or one separated by white space or commas."""
    if isinstance(value, str):
        return tuple(part for part in re.split(r"[\s,]+", value) if part)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(cast("list[str]", value))
    raise ConfigurationError("must be a list of texts, or one text that commas or spaces separate")


def text(value: object) -> str:
    """One text."""
    if isinstance(value, str):
        return value
    raise ConfigurationError("must be a text")


def _whole(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,9}\s*", value):
        return int(value)
    raise ConfigurationError("must be a whole number")


def minutes(value: object) -> float | None:
    """A lifetime: minutes as a number, a text with a unit, or "never"."""
    if isinstance(value, str) and value.strip().lower() == "never":
        return None
    number = _duration(value, "m") / _UNITS["m"]
    return int(number) if number.is_integer() else number


def seconds(value: object) -> timedelta:
    """A duration: seconds as a number, or a text with a unit."""
    return _duration(value, "s")


def _duration(value: object, default_unit: str) -> timedelta:
    amount, unit = value, default_unit
    if isinstance(value, str):
        found = re.fullmatch(r"\s*([0-9]{1,12}(?:\.[0-9]{1,9})?)\s*(ms|s|m|h|d)?\s*", value)
        amount, unit = (float(found[1]), found[2] or default_unit) if found else (None, "")
    if isinstance(amount, int | float) and not isinstance(amount, bool) and 0 <= amount < 1e12:
        days = amount * (_UNITS[unit] / _UNITS["d"])
        if days <= timedelta.max.days:
            return amount * _UNITS[unit]
    never = ' or "never"' if default_unit == "m" else ""
    what = "minutes" if default_unit == "m" else "seconds"
    raise ConfigurationError(f'must be a number of {what} or a duration such as "90s", "15m" or "1h"{never}')


def _choice(*known: str) -> Callable[[object], str]:
    def choose(value: object) -> str:
        if isinstance(value, str) and value in known:
            return value
        near = get_close_matches(str(value).strip().lower(), known, 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigurationError(f"must be one of {', '.join(known)}{hint}")

    return choose


def _as_it_is(value: object) -> object:
    return value


_SETTINGS_VALUES: Final[dict[str, Callable[[object], object]]] = {
    "default_expiration": minutes,
    "default_key_generator": text,
    "default_key_length": _whole,
    "default_key_chars": text,
    "max_key_iterations": _whole,
    "secret": text,
    "previous_secrets": texts,
    "key_storage": _choice(*get_args(KeyStorage)),
}
_POLICY_VALUES: Final[dict[str, Callable[[object], object]]] = {
    "expiration": minutes,
    "key_generator": text,
    "key_length": _whole,
    "key_chars": text,
    "key_storage": _choice(*get_args(KeyStorage)),
    "max_attempts": _whole,
    "attempt_window": seconds,
    "cooldown": seconds,
    "max_uses": _whole,
    "overlap": seconds,
    "prefix": text,
    "context": _choice("required", "ignored"),
    "kind": _choice("link", "code"),
    "allow_weak": text,
    "digits": _whole,
}
