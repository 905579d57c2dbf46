"""The parts of a URL that are ours: which schema, and how many connections."""

from __future__ import annotations

from typing import Final, NamedTuple
from urllib.parse import unquote_plus

from vtoken.errors import ConfigurationError

DEFAULT_SCHEMA: Final = "public"
POOL_SIZE: Final = "pool_size must be a number of connections, 1 or more"


class Place(NamedTuple):
    """What a URL says."""

    url: str
    """The URL as libpq takes it."""
    options: dict[str, object]
    """The backend's own options that it names."""

    def __repr__(self) -> str:
        return "<Place>"


def split(url: str) -> Place:
    """Tell our parameters of a URL from libpq's.

    Raises:
        ConfigurationError: one of ours has no possible value.
    """
    start, _, query = url.partition("?")
    options: dict[str, object] = {}
    rest: list[str] = []
    for parameter in query.split("&") if query else ():
        name, _, value = parameter.partition("=")
        if name == "schema":
            options[name] = unquote_plus(value)
        elif name == "pool_size":
            if not (value.isascii() and value.isdigit() and len(value) < 5):
                raise ConfigurationError(POOL_SIZE)
            options[name] = int(value)
        else:
            rest.append(parameter)
    return Place(url=start + ("?" + "&".join(rest) if rest else ""), options=options)
