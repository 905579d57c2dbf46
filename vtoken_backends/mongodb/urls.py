"""MongoDB URLs: what is ours in them, and what is wrong with them, told without their passwords."""

from __future__ import annotations

import re
from typing import Any, Final, cast
from urllib.parse import unquote, unquote_plus

from pymongo import errors
from pymongo.uri_parser import parse_uri

from vtoken.errors import ConfigurationError

_LATER: Final = re.compile("srv|[^=]*File=", re.IGNORECASE)
"""Parameters that are checked when the backend is opened: names to be resolved, and files."""


def split_url(url: str) -> tuple[str, dict[str, object]]:
    """The URL without what only we understand, and the options that it names."""
    start, mark, query = url.partition("?")
    parameters = [parameter.partition("=") for parameter in query.split("&")]
    named: dict[str, object] = {
        key: unquote_plus(value) for key, _, value in parameters if key == "collection"
    }
    database = unquote(start.partition("://")[2].partition("/")[2])
    if database:
        named["database"] = database
    rest = "&".join("".join(parameter) for parameter in parameters if parameter[0] != "collection")
    return start + (mark + rest if rest else ""), named


def check_url(url: str) -> None:
    """Refuse what the driver's own parser would refuse, as far as it needs no network and no files.

    Raises:
        ConfigurationError: the message names the parameter, and no password.
    """
    scheme, _, rest = url.partition("://")
    start, _, query = rest.partition("?")
    parameters = [parameter for parameter in query.split("&") if not _LATER.match(parameter)]
    problem = "are user name and password percent-encoded, and is the port a number up to 65535?"
    for parameter in parameters:
        if parameter and _parsed(f"mongodb://host/?{parameter}") is None and "@" not in query:
            problem = f"it has no such parameter as {parameter.partition('=')[0]!r}, or not with that value"
    found = _parsed(f"mongodb://{start}{'' if '/' in start else '/'}?{'&'.join(parameters)}")
    ports = [port for _, port in found["nodelist"]] if found else []
    if found is None or (scheme == "mongodb+srv" and ports != [None]):
        raise ConfigurationError(f"the driver does not understand the MongoDB URL; {problem}")


def check_name(what: str, name: object, forbidden: str) -> str:
    """The name of a database or collection.

    Raises:
        ConfigurationError: MongoDB would not take it.
    """
    if isinstance(name, str) and name and not set(name) & set(forbidden) and len(name.encode()) <= 60:
        return name
    raise ConfigurationError(
        f"the MongoDB {what} is not a valid name: it must be text of 1 to 60 bytes without any of"
        f" {forbidden!r}"
    )


def _parsed(url: str) -> dict[str, Any] | None:
    try:
        return parse_uri(url, default_port=cast("int", None))
    except (errors.PyMongoError, ValueError, TypeError):
        return None  # the driver's message may quote the URL
