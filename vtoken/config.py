"""Configuration: a backend from its URL, settings and policies from the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Any, cast

from vtoken.backend import TokenBackend
from vtoken.errors import ConfigurationError
from vtoken.loading import import_object
from vtoken.policy import Settings, TokenPolicy

GROUP = "vtoken.backends"
_EXTRAS = {"pymongo": "mongodb", "bson": "mongodb", "motor": "motor"}
_registered: dict[str, str] = {}


def register_backend(scheme: str, path: str) -> None:
    """Let URLs of a scheme name a backend class, before and instead of the entry points.

    Args:
        scheme: the part of the URL before ``://``.
        path: the class, ``"package.module:Class"``; it is imported when first asked for.

    Raises:
        ConfigurationError: the scheme is no URL scheme (RFC 3986, section 3.1).
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        raise ConfigurationError(f"{scheme!r} is no URL scheme")
    _registered[scheme.lower()] = path


def create_backend(url: str, **options: Any) -> TokenBackend:
    """Make a backend from its URL. It is not open yet.

    Args:
        url: ``memory://``, ``sqlite:///relative.db``, ``sqlite:////absolute.db``, ``mongodb://host/database``, another
            scheme that is registered or installed, or ``"package.module:Class"`` itself.
        **options: passed to the backend.

    Raises:
        ConfigurationError: the scheme is unknown (the known ones are listed), its driver is missing (the extra
            to install is named), or the backend does not understand the URL or an option.
    """
    if not isinstance(url, str):
        raise ConfigurationError(f"a backend's URL must be a str, not {type(url).__name__}")
    scheme, separator, _ = url.partition("://")
    if not separator:
        if ":" not in url:
            raise ConfigurationError(
                "a backend is named by a URL like sqlite:///tokens.db, or by package.module:Class"
            )
        return cast("TokenBackend", _class(url)(**options))
    backend_class = _class(_path(scheme.lower()))
    from_url = getattr(backend_class, "from_url", None)
    if from_url is None:
        raise ConfigurationError(f"{backend_class!r} has no from_url(url, **options), which a URL needs")
    return cast("TokenBackend", from_url(url, **options))


def _path(scheme: str) -> str:
    if scheme in _registered:
        return _registered[scheme]
    installed = {entry.name: entry.value for entry in entry_points(group=GROUP)}
    if scheme in installed:
        return installed[scheme]
    known = sorted({*_registered, *installed})
    near = get_close_matches(scheme, known, 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ConfigurationError(f"unknown backend scheme {scheme!r}; known are {', '.join(known)}.{hint}")


def _class(path: str) -> Any:
    missing: str | None = None
    try:
        return import_object(path)
    except ModuleNotFoundError as error:
        missing = error.name
    extra = _EXTRAS.get((missing or "").partition(".")[0])
    hint = f': pip install "vtoken[{extra}]"' if extra else ""
    raise ConfigurationError(f"the backend {path!r} needs the package {missing!r}{hint}")


@dataclass(frozen=True, slots=True)
class Configuration:
    """What the environment says.

    Args:
        url: the backend's URL (``VTOKEN_URL``).
        settings: of ``VTOKEN_DEFAULT_EXPIRATION``, ``VTOKEN_SECRET`` and so on, one variable a field.
        policies: the policies.
    """

    url: str = field(repr=False)
    settings: Settings
    policies: tuple[TokenPolicy, ...] = ()

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Configuration:
        """Read ``VTOKEN_URL`` and the other ``VTOKEN_*`` variables."""
        return cls(environ["VTOKEN_URL"], Settings())
