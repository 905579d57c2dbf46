"""Configuration: a backend from its URL; settings, policies and hooks from the environment and a file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import timedelta
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Any, Final, cast

from vtoken.backend import TokenBackend
from vtoken.config_read import (
    SETTINGS,
    Found,
    check_names,
    convert,
    policies_from_mapping,
    read_file,
    settings_from,
    text,
    texts,
)
from vtoken.errors import ConfigurationError, VTokenError
from vtoken.hooks import Hook, LazyHook
from vtoken.inputs import DEFAULT
from vtoken.loading import MissingModule, import_object
from vtoken.policy import Settings, TokenPolicy
from vtoken.redact import redact_url, without_locals

__all__ = ["Configuration", "create_backend", "policies_from_mapping", "redact_url", "register_backend"]

GROUP: Final = "vtoken.backends"
_EXTRAS: Final = {"pymongo": "mongodb", "bson": "mongodb", "gridfs": "mongodb", "motor": "motor"}
_VARIABLES: Final = {f"VTOKEN_{name.upper()}": name for name in (*SETTINGS, "url", "hooks", "config")}
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_IMPORT_PATH: Final = re.compile(r"\w+(?:\.\w+)*:\w+(?:\.\w+)*")
_registered: dict[str, str] = {}


def register_backend(scheme: str, path: str) -> None:
    """Let URLs of a scheme name a backend class, before and instead of the entry points.

    Args:
        scheme: the part of the URL before ``://``.
        path: the class, ``"package.module:Class"``; it is imported when first asked for.

    Raises:
        ConfigurationError: the scheme is no URL scheme (RFC 3986, section 3.1), or the path has another form.
    """
    if not isinstance(scheme, str) or not _SCHEME.fullmatch(scheme):
        raise ConfigurationError("a URL scheme is letters, digits, +, . and -, the first of them a letter")
    if not isinstance(path, str) or not _IMPORT_PATH.fullmatch(path):
        raise ConfigurationError("a backend's class is registered by its path, 'package.module:Class'")
    _registered[scheme.lower()] = path


@without_locals(ConfigurationError)
def create_backend(url: str, **options: Any) -> TokenBackend:
    """Make a backend from its URL. It is not open yet.

    Args:
        url: ``memory://``, ``sqlite:///relative.db``, ``sqlite:////absolute.db``, ``mongodb://host/database``,
            another scheme that is registered or installed, or ``"package.module:Class"`` itself.
        **options: passed to the backend.

    Raises:
        ConfigurationError: the scheme is unknown (the known ones are listed), its driver is missing (the
            extra to install is named), or the backend does not understand the URL or an option. No
            message holds a password of the URL.
    """
    if not isinstance(url, str):
        raise ConfigurationError(f"a backend's URL must be a str, not {type(url).__name__}")
    scheme, separator, _ = url.partition("://")
    if not separator and _IMPORT_PATH.fullmatch(url):
        return _call(url, _class(url), url, **options)
    if not separator or not _SCHEME.fullmatch(scheme):  # not quoted: who knows what was put in here
        raise ConfigurationError(
            "a backend is named by a URL such as sqlite:///tokens.db (scheme, then ://), or by"
            f" package.module:Class; known schemes are {', '.join(_known())}"
        )
    known = _known()
    path = known.get(scheme.lower())
    if path is None:
        near = get_close_matches(scheme.lower(), known, 1)
        hint = f". Did you mean {near[0]}?" if near else ""
        raise ConfigurationError(f"unknown backend scheme {scheme!r}; known are {', '.join(known)}{hint}")
    from_url = getattr(_class(path), "from_url", None)
    if from_url is None:
        raise ConfigurationError(f"the backend {path!r} has no from_url(url, **options), which a URL needs")
    return _call(path, from_url, url, url, **options)


def _known() -> dict[str, str]:
    """The path of the class by scheme: what was registered goes before what is installed."""
    installed = {entry.name.lower(): f"{entry.module}:{entry.attr}" for entry in entry_points(group=GROUP)}
    return dict(sorted({**installed, **_registered}.items()))


def _class(path: str) -> Any:
    """Import a backend's class."""
    try:
        return import_object(path)
    except MissingModule as error:
        if path.startswith((f"{error.module}:", f"{error.module}.")):
            raise  # it is the backend's own module that is not there
        problem = _missing(path, ModuleNotFoundError(name=error.module))
    except ImportError as error:
        problem = _missing(path, error)
    raise ConfigurationError(problem)


def _missing(path: str, error: ImportError) -> str:
    package = (error.name or "").partition(".")[0]
    extra = _EXTRAS.get(package)
    hint = f': pip install "vtoken[{extra}]"' if extra else ""
    if isinstance(error, ModuleNotFoundError):
        return f"the backend {path!r} needs the package {package!r}, which is not installed{hint}"
    return (
        f"the backend {path!r} cannot be imported; the installed {package or 'driver'!r} does not fit{hint}"
    )


def _call(path: str, make: Any, url: str, *arguments: str, **options: Any) -> TokenBackend:
    """Make a backend, and pass on no error but vtoken's own: another one may hold the URL's password."""
    try:
        made = make(*arguments, **options)
        missing = [name for name in vars(TokenBackend) if name[0] != "_" and not hasattr(made, name)]
        if not missing:
            return cast("TokenBackend", made)
        problem = f"{path!r} is no TokenBackend: it has no {', '.join(missing)}"
    except VTokenError:
        raise
    except ImportError as error:  # a driver that an option asks for
        problem = _missing(path, error)
    except Exception as error:
        shown = redact_url(url)
        what = f": {error}" if shown == url else ""
        problem = f"the backend {path!r} could not be made of {shown!r}: {type(error).__name__}{what}"
    raise ConfigurationError(problem)


@dataclass(frozen=True, slots=True)
class Configuration:
    """What the environment and the configuration file say.

    Args:
        url: the backend's URL.
        settings: what holds for every slug.
        policies: what holds for one slug each.
        hooks: callables that hear of each event, mostly as import paths.
    """

    url: str = field(repr=False)
    settings: Settings = field(default_factory=Settings)
    policies: tuple[TokenPolicy, ...] = ()
    hooks: tuple[Hook | LazyHook | str, ...] = ()

    @classmethod
    @without_locals(ConfigurationError)
    def from_env(
        cls,
        environ: Mapping[str, str] = os.environ,
        *,
        url: str | None = None,
        default_url: str | None = None,
    ) -> Configuration:
        """Read the ``VTOKEN_*`` variables, and the TOML file that ``VTOKEN_CONFIG`` names.

        ``VTOKEN_URL``
            the backend's URL; required here or as ``url`` in the file.
        ``VTOKEN_SECRET``, ``VTOKEN_DEFAULT_EXPIRATION`` and so on
            one for each field of :class:`Settings`. Expirations are minutes, a duration such as ``"1h"``, or
            ``"never"``; ``VTOKEN_PREVIOUS_SECRETS`` holds several, which white space or commas separate.
        ``VTOKEN_HOOKS``
            import paths, which white space or commas separate.
        ``VTOKEN_CONFIG``
            a TOML file with the settings by their names, ``url``, ``hooks`` and a table ``[policies.<slug>]``
            for each policy (see :func:`policies_from_mapping`); in a ``pyproject.toml`` all that is in
            ``[tool.vtoken]``.

        A variable goes before the file. Variables that begin with ``VTOKEN_TEST_`` are the test suite's.

        Args:
            environ: the variables; left out, those of the process.
            url: goes before the variable and the file.
            default_url: taken where nothing names one.

        Raises:
            ConfigurationError: the URL is missing, a name is unknown (the nearest right one is named), a
                value is out of its range. No message holds a value that may be secret.
        """
        given = {
            name: value
            for name, value in environ.items()
            if name.startswith("VTOKEN_") and not name.startswith("VTOKEN_TEST_")
        }
        check_names(given, _VARIABLES, "environment variables")
        for name, value in given.items():
            if not value.strip():  # a substitution that failed, say: never quietly the default
                raise ConfigurationError(f"{name} is empty: give it a value or unset it")
        file = given.pop("VTOKEN_CONFIG", None)
        table = read_file(file) if file is not None else {}
        found: dict[str, Found] = {name: (f"{name} in {file}", value) for name, value in table.items()}
        found |= {_VARIABLES[name]: (name, value) for name, value in given.items()}
        if url is not None or "url" not in found:
            found["url"] = ("the URL", default_url if url is None else url)
        if found["url"][1] is None:
            raise ConfigurationError(
                "VTOKEN_URL is not set: it names the store, e.g. VTOKEN_URL=sqlite:///tokens.db"
            )
        return cls(
            url=convert(found["url"][0], text, found["url"][1]),
            settings=settings_from(found),
            policies=policies_from_mapping(table.get("policies", {}), f"policies in {file}"),
            hooks=convert(found["hooks"][0], texts, found["hooks"][1]) if "hooks" in found else (),
        )

    def describe(self) -> dict[str, Any]:
        """The effective configuration as JSON values, ``***`` for secrets and for passwords in the URL."""
        settings = {name: _plain(getattr(self.settings, name)) for name in SETTINGS}
        settings["default_expiration"] = _lifetime(self.settings.default_expiration)
        settings["secret"] = None if self.settings.secret is None else "***"
        settings["previous_secrets"] = ["***"] * len(self.settings.previous_secrets)
        return {
            "url": redact_url(self.url),
            "settings": settings,
            "policies": {policy.slug or "": self._policy(policy) for policy in self.policies},
            "hooks": [_plain(hook) for hook in self.hooks],
        }

    def _policy(self, policy: TokenPolicy) -> dict[str, Any]:
        """A policy with the settings' values where it has none of its own."""
        values = {f.name: _plain(getattr(policy, f.name)) for f in fields(policy) if f.name != "slug"}
        lifetime = self.settings.default_expiration if policy.expiration is DEFAULT else policy.expiration
        values["expiration"] = _lifetime(lifetime)
        for name, default in (
            ("key_generator", "default_key_generator"),
            ("key_length", "default_key_length"),
            ("key_chars", "default_key_chars"),
            ("key_storage", "key_storage"),
        ):
            if values[name] is None:
                values[name] = _plain(getattr(self.settings, default))
        return values


def _lifetime(minutes: object) -> object:
    return "never" if minutes is None else minutes


def _plain(value: Any) -> Any:
    """A value as JSON: durations in seconds, callables by their import path."""
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, LazyHook):
        return _plain(value.factory)
    if callable(value):
        return f"{value.__module__}:{getattr(value, '__qualname__', type(value).__name__)}"
    return value
