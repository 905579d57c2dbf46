"""Packages that may not be installed."""

from __future__ import annotations

from importlib import import_module

from vtoken.errors import ConfigurationError
from vtoken.hooks import TokenEvent


def require(extra: str, *modules: str) -> None:
    """See to it that modules of an optional package can be imported.

    Args:
        extra: the extra of vtoken that installs them; the integration's own name.
        modules: their dotted names.

    Raises:
        ConfigurationError: one of them cannot; the message names the extra.
    """
    problem = ""
    for module in modules:
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            problem = f"the package {(error.name or module).partition('.')[0]!r}, which is not installed"
        except ImportError as error:
            problem = f"{module!r}, which cannot be imported ({error})"
        if problem:
            break
    if problem:
        raise ConfigurationError(f'vtoken.contrib.{extra} needs {problem}: pip install "vtoken[{extra}]"')


def refuse_event(argument: object) -> None:
    """Raise where an import path names the function that makes a hook instead of a hook: it would be called
    with each event, and do nothing with it."""
    if isinstance(argument, TokenEvent):
        raise ConfigurationError("hook() makes a hook; the hook that can be named by its path is `record`")
