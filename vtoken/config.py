"""Configuration: settings, policies, hooks and the backend's URL from the environment and a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from vtoken import inputs
from vtoken.config_read import (
    SETTINGS,
    Found,
    check_names,
    convert,
    file_in,
    policies_from_mapping,
    read_file,
    settings_from,
    text,
    texts,
)
from vtoken.errors import ConfigurationError
from vtoken.hooks import Hook, LazyHook
from vtoken.inputs import Lifetime, Unset
from vtoken.limits import Limit
from vtoken.policy import Settings, TokenPolicy
from vtoken.redact import redact_url, without_locals
from vtoken.registry import create_backend, register_backend

__all__ = ["Configuration", "create_backend", "policies_from_mapping", "redact_url", "register_backend"]

_VARIABLES: Final = {
    f"VTOKEN_{name.upper()}": name for name in (*SETTINGS, "url", "hooks", "manager", "config")
}


@dataclass(frozen=True, slots=True)
class Configuration:
    """What the environment and the configuration file say.

    Args:
        url: the backend's URL.
        settings: what holds for every slug.
        policies: what holds for one slug each.
        hooks: callables that are told of each event, mostly as import paths.
        manager: the import path of the application's own manager, for the command line; the library itself
            never looks at it.
    """

    url: str = field(repr=False)
    settings: Settings = field(default_factory=Settings)
    policies: tuple[TokenPolicy, ...] = ()
    hooks: tuple[Hook | LazyHook | str, ...] = ()
    manager: str | None = None

    @classmethod
    @without_locals(ConfigurationError)
    def from_env(
        cls,
        environ: Mapping[str, str] = os.environ,
        *,
        url: str | None = None,
        default_url: str | None = None,
        folder: Path | None = None,
    ) -> Configuration:
        """Read the ``VTOKEN_*`` variables, and the TOML file that ``VTOKEN_CONFIG`` names.

        ``VTOKEN_URL``
            the backend's URL; required here or as ``url`` in the file.
        ``VTOKEN_SECRET``, ``VTOKEN_DEFAULT_EXPIRATION`` and so on
            one for each field of :class:`Settings`. A lifetime is a number of minutes, a duration such as
            ``"1h"``, or ``"never"``; ``VTOKEN_PREVIOUS_SECRETS`` holds several secrets, which white space or
            commas separate.
        ``VTOKEN_MANAGER``
            the import path of the application's own manager, which the command line uses.
        ``VTOKEN_HOOKS``
            import paths, which white space or commas separate.
        ``VTOKEN_CONFIG``
            a TOML file with the settings by their names, ``url``, ``hooks``, ``manager`` and a table
            ``[policies.<slug>]`` for each policy (see :func:`policies_from_mapping`); in a ``pyproject.toml``
            all of that stands in ``[tool.vtoken]``.

        A variable overrides the file. Variables that begin with ``VTOKEN_TEST_`` are the test suite's.

        Args:
            environ: the variables; left out, those of the process.
            url: overrides the variable and the file.
            default_url: is used where nothing names one.
            folder: where to read ``vtoken.toml``, or else ``[tool.vtoken]`` of ``pyproject.toml``, unless
                ``VTOKEN_CONFIG`` names a file. Left out, no file is read that was not named.

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
            if not value.strip():  # a failed substitution, say; the default may be something else
                raise ConfigurationError(f"{name} is empty: give it a value or unset it")
        file: str | Path | None = given.pop("VTOKEN_CONFIG", None)
        if file is None and folder is not None:
            file = file_in(folder)
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
            manager=convert(found["manager"][0], text, found["manager"][1]) if "manager" in found else None,
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
            "manager": self.manager,
        }

    def _policy(self, policy: TokenPolicy) -> dict[str, Any]:
        """A policy with the settings' values where it has none of its own."""
        values = {f.name: _plain(getattr(policy, f.name)) for f in fields(policy) if f.name != "slug"}
        lifetime = (
            self.settings.default_expiration if isinstance(policy.expiration, Unset) else policy.expiration
        )
        values["expiration"] = _lifetime(lifetime)
        values["max_uses"] = "unlimited" if policy.max_uses is None else policy.max_uses
        values["test_codes"] = {f"{s.content_type}:{s.object_id}": "***" for s in policy.test_codes}
        for name, default in (
            ("key_generator", "default_key_generator"),
            ("key_length", "default_key_length"),
            ("key_chars", "default_key_chars"),
            ("key_storage", "key_storage"),
        ):
            if values[name] is None:
                values[name] = _plain(getattr(self.settings, default))
        return values


def _lifetime(value: Lifetime) -> str:
    milliseconds = inputs.lifetime("expiration", value)
    return "never" if milliseconds is None else inputs.spelled(milliseconds)


def _plain(value: Any) -> Any:
    """A value as JSON, as TOML could have it: durations as texts, callables by their import path."""
    if isinstance(value, timedelta):
        return inputs.spelled(value // timedelta(milliseconds=1))
    if isinstance(value, Limit):
        plain = {"count": value.count, "per": inputs.spelled(value.per_ms), "by": value.by}
        return plain if value.across is None else {**plain, "across": value.across}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, LazyHook):
        return _plain(value.factory)
    if callable(value):
        return f"{value.__module__}:{getattr(value, '__qualname__', type(value).__name__)}"
    return value
