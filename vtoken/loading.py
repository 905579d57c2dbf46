"""Objects by their import path."""

from __future__ import annotations

from importlib import import_module

from vtoken.errors import ConfigurationError
from vtoken.inputs import nearest


class MissingModule(ConfigurationError):
    """A module cannot be found.

    Args:
        message: what was to be imported, and what is missing.
        module: the module that is missing.
    """

    def __init__(self, message: str, module: str) -> None:
        super().__init__(message, module)
        self.module = module

    def __str__(self) -> str:
        return str(self.args[0])


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
    missing: str | None = None
    found: object = None
    try:
        found = import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
    if missing is not None:
        # A module that is there may need a package that is missing; the message then names that package.
        raise MissingModule(f"cannot import {path!r}: there is no module {missing!r}", missing)
    for part in name.split("."):
        if not hasattr(found, part):
            hint = nearest(part, dir(found))
            raise ConfigurationError(
                f"cannot import {path!r}: {module_name!r} has no {name!r}{'; ' if hint else ''}{hint}"
            )
        found = getattr(found, part)
    return found
