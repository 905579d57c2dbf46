"""Objects by their import path."""

from __future__ import annotations

from importlib import import_module

from vtoken.errors import ConfigurationError


def import_object(path: str) -> object:
    """Import ``package.module:name`` or ``package.module.name``.

    Raises:
        ConfigurationError: the path has another form, the module cannot be found, or it has no such name.
    """
    module_name, colon, name = path.partition(":")
    if not colon:
        module_name, _, name = path.rpartition(".")
    if not module_name or not name:
        raise ConfigurationError(f"{path!r} is not an import path like 'package.module:name'")
    try:
        found: object = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there and misses a package of its own: that is the better message
        found = None
    if found is None:
        raise ConfigurationError(f"cannot import {path!r}: there is no module {module_name!r}")
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigurationError(f"cannot import {path!r}: {module_name!r} has no {name!r}")
        found = getattr(found, part)
    return found
