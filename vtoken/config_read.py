"""Reading settings and policies from text, TOML and mappings.

What a value may be is checked where it is used, by :class:`Settings` and :class:`TokenPolicy`; here it only
becomes a value of the right type. A message says where a value was found and never repeats it: a secret may
have been put into the wrong place.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from vtoken.errors import ConfigurationError, InvalidInput
from vtoken.inputs import nearest
from vtoken.limits import Limit
from vtoken.policy import Settings, TokenPolicy
from vtoken.subject import Subject

T = TypeVar("T")
U = TypeVar("U")

SETTINGS: Final = tuple(field.name for field in fields(Settings))
_POLICY: Final = tuple(field.name for field in fields(TokenPolicy) if field.name != "slug")
_LIMIT: Final = tuple(field.name for field in fields(Limit) if field.init)
_FILES: Final = ("vtoken.toml", "pyproject.toml")

Found = tuple[str, object]
"""Where a value was found (for the message about it) and the value."""


def policies_from_mapping(mapping: Mapping[str, Any], source: str = "policies") -> tuple[TokenPolicy, ...]:
    """Make policies from tables by slug, such as those of a TOML file.

    Args:
        mapping: slug -> table; the slug ``""`` stands for tokens without one. A table holds ``preset``
            (``"link"``, ``"code"`` or ``"pair"``; the latter two with ``digits``) or none, and the arguments
            of :class:`TokenPolicy` by their names. Durations are texts such as ``"90s"``, ``"15m"``,
            ``"1h"``, ``"7d"``; ``expiration`` may also be a number of minutes or ``"never"``, ``max_uses``
            may be ``"unlimited"``. A limit is a table, ``{count = 5, per = "1d", by = "ip"}``.
        source: what messages call the mapping.

    Raises:
        ConfigurationError: a name is unknown (the nearest right one is named), or a value is out of
            its range or below its floor.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigurationError(f"{source} must be tables by slug, such as [policies.password-reset]")
    return tuple(_policy(slug, table, f"{source}.{slug or repr('')}") for slug, table in mapping.items())


def _policy(slug: object, table: object, where: str) -> TokenPolicy:
    if not isinstance(slug, str) or not isinstance(table, Mapping):
        raise ConfigurationError(f"{where} must be a table, such as [policies.password-reset]")
    options = dict(cast("Mapping[str, object]", table))
    preset = options.pop("preset", None)
    if preset is not None:
        convert(f"{where}.preset", _preset, preset)
    check_names(options, (*_POLICY, "preset"), where)
    values: dict[str, Any] = {
        name: convert(f"{where}.{name}", _VALUES[name], value) if name in _VALUES else value
        for name, value in options.items()
    }
    make: Any = TokenPolicy if preset is None else getattr(TokenPolicy, cast("str", preset))
    return convert(where, lambda _: cast("TokenPolicy", make(slug or None, **values)), None)


def settings_from(found: Mapping[str, Found]) -> Settings:
    """Make settings of what was found, by the names of their fields.

    Raises:
        ConfigurationError: a value is out of its range; the message says where it came from.
    """
    settings = Settings()
    for name in SETTINGS:  # one by one, so that an error can say where its value came from
        if name in found:
            where, value = found[name]
            if name in _VALUES:
                value = convert(where, _VALUES[name], value)
            settings = convert(where, partial(_with, settings, name), value)
    return settings


def _with(settings: Settings, name: str, value: Any) -> Settings:
    return replace(settings, **{name: value})


def read_file(path: str | Path) -> dict[str, Any]:
    """Read a TOML file: settings, ``url``, ``hooks``, ``manager``, ``[policies.<slug>]``; or all of these in
    ``[tool.vtoken]``.

    Raises:
        ConfigurationError: it cannot be read, is not TOML, or holds an unknown name.
    """
    document = _document(path)
    if "tool" in document:
        table = _tool_table(document)
        if table is None:
            raise ConfigurationError(f"the configuration file {str(path)!r} has no table [tool.vtoken]")
        document = table
    check_names(document, (*SETTINGS, "url", "hooks", "manager", "policies"), str(path))
    return document


def file_in(folder: Path) -> Path | None:
    """The configuration file of a folder: ``vtoken.toml``, else a ``pyproject.toml`` with ``[tool.vtoken]``.

    Raises:
        ConfigurationError: ``pyproject.toml`` cannot be read, or is not TOML.
    """
    own, project = (folder / name for name in _FILES)
    if own.is_file():
        return own
    return project if project.is_file() and _tool_table(_document(project)) is not None else None


def _document(path: str | Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        problem = f"cannot be read: {error.strerror or type(error).__name__}"
    except tomllib.TOMLDecodeError as error:
        problem = f"is not TOML: {str(error).splitlines()[0]}"
    except ValueError:  # not UTF-8, or a NUL in the path
        problem = "is not TOML: not UTF-8 text"
    raise ConfigurationError(f"the configuration file {str(path)!r} {problem}")


def _tool_table(document: Mapping[str, Any]) -> dict[str, Any] | None:
    tools = document.get("tool")
    table = cast("dict[str, Any]", tools).get("vtoken") if isinstance(tools, dict) else None
    return cast("dict[str, Any]", table) if isinstance(table, dict) else None


def check_names(given: Iterable[object], known: Iterable[str], where: str) -> None:
    """Refuse a name that is not known.

    Raises:
        ConfigurationError: it names the nearest known one, or else all of them.
    """
    known = tuple(known)
    for name in given:
        if name not in known:
            hint = nearest(str(name), known) or f"known are {', '.join(sorted(known))}"
            raise ConfigurationError(f"{where}: unknown name {name!r}; {hint}")


def convert(where: str, converter: Callable[[T], U], value: T) -> U:
    """Convert a value; an error says where the value came from."""
    problem: str
    try:
        return converter(value)
    except (ConfigurationError, InvalidInput) as error:
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


def lifetime(value: object) -> object:
    """A lifetime: a number of minutes, a text with a unit, or "never", which is None."""
    if isinstance(value, str) and value.strip().lower() == "never":
        return None
    return _number(value)


def _number(value: object) -> object:
    """A number where a text holds one, as an environment variable or an option does."""
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,12}(\.[0-9]{1,9})?\s*", value, re.ASCII):
        return float(value) if "." in value else int(value)
    return value


def _count(value: object) -> int:
    number = _number(value)
    if isinstance(number, int) and not isinstance(number, bool):
        return number
    raise ConfigurationError("must be a whole number")


def _uses(value: object) -> int | None:
    return None if isinstance(value, str) and value.strip().lower() == "unlimited" else _count(value)


def _preset(value: object) -> str:
    known = ("link", "code", "pair")
    if isinstance(value, str) and value in known:
        return value
    hint = nearest(str(value).strip(), known)
    raise ConfigurationError(f"must be one of {', '.join(known)}{hint and f'; {hint}'}")


def _limits(value: object) -> tuple[Limit, ...]:
    """Limits, each a table: ``[{count = 5, per = "1d", by = "ip"}]``."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ConfigurationError('must be a list of tables, such as [{count = 5, per = "1d", by = "ip"}]')
    limits: list[Limit] = []
    for item in cast("list[dict[str, Any]]", value):
        check_names(item, _LIMIT, "a limit")
        missing = [name for name in ("count", "per") if name not in item]
        if missing:
            raise ConfigurationError(f"a limit needs {missing[0]}")
        limits.append(Limit(**item))
    return tuple(limits)


def _test_codes(value: object) -> dict[Subject, Any]:
    """Fixed codes by ``content_type:object_id``."""
    if not isinstance(value, dict):
        raise ConfigurationError('must be a table, such as {"auth.phone:+15550100" = "123456"}')
    codes: dict[Subject, Any] = {}
    for name, code in cast("dict[str, Any]", value).items():
        content_type, colon, object_id = name.partition(":")
        if not colon:
            raise ConfigurationError("each name must be content_type:object_id, such as auth.phone:+15550100")
        codes[Subject(content_type, object_id)] = code
    return codes


_VALUES: Final[dict[str, Callable[[object], object]]] = {
    "attempt_limits": _limits,
    "default_expiration": lifetime,
    "default_key_chars": text,
    "default_key_generator": text,
    "default_key_length": _count,
    "expiration": lifetime,
    "issue_limits": _limits,
    "key_chars": text,
    "key_generator": text,
    "key_length": _count,
    "max_attempts": _count,
    "max_key_iterations": _count,
    "max_uses": _uses,
    "previous_secrets": texts,
    "secret": text,
    "test_codes": _test_codes,
}
"""From what a file or a variable holds to what a field takes; other values are passed on as they are."""
