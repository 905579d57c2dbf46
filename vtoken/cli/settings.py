"""The commands ``config`` and ``secret``."""

from __future__ import annotations

import json
import secrets
from typing import Any, cast

from vtoken.cli.options import Output, Store
from vtoken.cli.output import Result, pairs
from vtoken.config import Configuration

_STORE = Store()  # the default of the shared options; it is frozen
_OUTPUT = Output()


async def config(*, store: Store = _STORE) -> Result:
    """Print the effective configuration, or that of the application's own manager, secrets redacted. Exit
    status 2: it cannot work."""
    manager = store.made()  # finds what only the parts together show, such as a code without a secret
    if store.managers_path() is None:
        data = store.configuration().describe()
    else:
        own = Configuration(store.address(manager), manager.settings, manager.policies.given)
        data = own.describe() | {"manager": store.managers_path()}
        del data["hooks"]  # which are the manager's own affair
    return Result(data, pairs(_flat("", data)))


def secret(*, output: Output = _OUTPUT) -> Result:
    """Draw a secret, for VTOKEN_SECRET: keep it where the application's other secrets are."""
    del output  # how it is shown is the application's business
    drawn = secrets.token_urlsafe(32)
    return Result({"secret": drawn}, drawn)


def _flat(prefix: str, value: Any) -> list[tuple[str, object]]:
    """Nested tables as dotted names."""
    if isinstance(value, dict) and value:
        items = cast("dict[str, Any]", value).items()
        return [row for name, item in items for row in _flat(f"{prefix}{name}.", item)]
    return [(prefix.rstrip("."), value if isinstance(value, str) else json.dumps(value))]
