"""From a URL to the backend that it names. Nothing else in the library names a backend.

A scheme is looked up in this order:

1. what the application registered (:func:`register_backend`);
2. the built-in ones, which need no installed metadata, so that frozen and stripped applications have them;
3. what other distributions registered under the entry-point group ``vtoken.backends``.

What is no URL may be the import path of a class, ``"package.module:Class"``.
"""

from __future__ import annotations

import re
from contextlib import suppress
from importlib.metadata import entry_points
from typing import Any, Final, cast
from weakref import WeakKeyDictionary

from vtoken.backend import TokenBackend
from vtoken.errors import ConfigurationError, VTokenError
from vtoken.inputs import nearest
from vtoken.loading import MissingModule, import_object
from vtoken.redact import redact_url, without_locals

BACKENDS: Final = "vtoken.backends"
"""The entry-point group of backends: scheme = ``package.module:Class``."""
DIAGNOSTICS: Final = "vtoken.diagnostics"
"""The entry-point group of their :class:`~vtoken.diagnostics.Diagnostics`, which may be left out."""

BUILT_IN_LOGGER: Final = "vtoken_backends"
"""The logger above those of the built-in backends."""

_BUILT_IN: Final = {
    "memory": "vtoken_backends.memory:MemoryBackend",
    "mongodb": "vtoken_backends.mongodb:MongoDBBackend",
    "mongodb+srv": "vtoken_backends.mongodb:MongoDBBackend",
    "postgres": "vtoken_backends.postgresql:PostgreSQLBackend",
    "postgresql": "vtoken_backends.postgresql:PostgreSQLBackend",
    "sqlite": "vtoken_backends.sqlite:SQLiteBackend",
}
_BUILT_IN_DIAGNOSTICS: Final = {
    "memory": "vtoken.diagnostics:MemoryDiagnostics",
    "mongodb": "vtoken_backends.mongodb.diagnostics:MongoDBDiagnostics",
    "mongodb+srv": "vtoken_backends.mongodb.diagnostics:MongoDBDiagnostics",
    "postgres": "vtoken_backends.postgresql.diagnostics:PostgreSQLDiagnostics",
    "postgresql": "vtoken_backends.postgresql.diagnostics:PostgreSQLDiagnostics",
    "sqlite": "vtoken_backends.sqlite.diagnostics:SQLiteDiagnostics",
}
_EXTRAS: Final = {
    "bson": "mongodb",
    "gridfs": "mongodb",
    "motor": "motor",
    "psycopg": "postgresql",
    "psycopg_pool": "postgresql",
    "pymongo": "mongodb",
}
"""The extra that brings a driver, by the name under which it is imported."""

_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_IMPORT_PATH: Final = re.compile(r"\w+(?:\.\w+)*:\w+(?:\.\w+)*")
_registered: dict[str, str] = {}
_urls: WeakKeyDictionary[TokenBackend, str] = WeakKeyDictionary()
"""From which URL each backend was made, as long as it is there."""


def register_backend(scheme: str, path: str) -> None:
    """Let URLs of a scheme name a backend class, before and instead of the built-in and installed ones.

    Args:
        scheme: the part of the URL before ``://``.
        path: the class, ``"package.module:Class"``; it is imported when first asked for.

    Raises:
        ConfigurationError: the scheme is not a URL scheme (RFC 3986, section 3.1), or the path has another
            form.
    """
    if not isinstance(scheme, str) or not _SCHEME.fullmatch(scheme):
        raise ConfigurationError(
            "scheme must be a URL scheme: a letter, then letters, digits, +, . and -, such as redis"
        )
    if not isinstance(path, str) or not _IMPORT_PATH.fullmatch(path):
        raise ConfigurationError("path must be the import path of a class, such as package.module:Class")
    _registered[scheme.lower()] = path


@without_locals(Exception)
def create_backend(url: str, **options: Any) -> TokenBackend:
    """Make a backend from its URL. It is not open yet.

    Args:
        url: ``memory://``, ``sqlite:///relative.db``, ``sqlite:////absolute.db``,
            ``mongodb://host/database``, ``postgresql://host/database``, another scheme that is registered
            or installed, or ``"package.module:Class"`` itself.
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
        return _made(url, _class(url), url, **options)
    if not separator or not _SCHEME.fullmatch(scheme):  # not quoted: it may be a misplaced password
        raise ConfigurationError(
            "a backend is named by a URL such as sqlite:///tokens.db (scheme, then ://), or by"
            f" package.module:Class; known schemes are {', '.join(_known())}"
        )
    path = _path(scheme.lower())
    if path is None:
        known = _known()
        hint = nearest(scheme, known)
        raise ConfigurationError(
            f"unknown backend scheme {scheme!r}; known are {', '.join(known)}{hint and f'; {hint}'}"
        )
    from_url = getattr(_class(path), "from_url", None)
    if from_url is None:
        raise ConfigurationError(f"the backend {path!r} has no from_url(url, **options), which a URL needs")
    return _made(path, from_url, url, url, **options)


def url_of(backend: TokenBackend) -> str | None:
    """The URL that a backend was made from by :func:`create_backend`, passwords included; else None."""
    return _urls.get(backend)


def diagnostics_path(scheme: str) -> str | None:
    """The import path of the :class:`~vtoken.diagnostics.Diagnostics` of a scheme, or None for none."""
    scheme = scheme.lower()
    if scheme in _registered and _registered[scheme] != _BUILT_IN.get(scheme):
        return None
    return _BUILT_IN_DIAGNOSTICS.get(scheme) or _installed(DIAGNOSTICS).get(scheme)


def _path(scheme: str) -> str | None:
    return _registered.get(scheme) or _BUILT_IN.get(scheme) or _installed(BACKENDS).get(scheme)


def _known() -> list[str]:
    return sorted({**_registered, **_BUILT_IN, **_installed(BACKENDS)})


def _installed(group: str) -> dict[str, str]:
    return {entry.name.lower(): f"{entry.module}:{entry.attr}" for entry in entry_points(group=group)}


def _class(path: str) -> Any:
    """Import a backend's class."""
    try:
        return import_object(path)
    except MissingModule as error:
        if path.startswith((f"{error.module}:", f"{error.module}.")):
            raise  # the backend's own module is missing
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


def _made(path: str, make: Any, url: str, *arguments: str, **options: Any) -> TokenBackend:
    """Make a backend, and pass on no error but vtoken's own: another one may hold the URL's password."""
    try:
        made = make(*arguments, **options)
        missing = [name for name in vars(TokenBackend) if name[0] != "_" and not hasattr(made, name)]
        if not missing:
            with suppress(TypeError):  # a class without __weakref__, or one that cannot be hashed
                _urls[made] = url
            return cast("TokenBackend", made)
        problem = f"{path!r} is not a TokenBackend: it has no {', '.join(missing)}"
    except VTokenError:
        raise
    except ImportError as error:  # a driver that an option asks for
        problem = _missing(path, error)
    except Exception as error:
        shown = redact_url(url)
        what = f": {error}" if shown == url else ""
        problem = f"the backend {path!r} could not be made of {shown!r}: {type(error).__name__}{what}"
    raise ConfigurationError(problem)
