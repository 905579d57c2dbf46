"""The commands ``config`` and ``secret``."""

from __future__ import annotations

import json
import secrets
from typing import Any, cast

from vtoken.cli.options import Configured, Output, Store
from vtoken.cli.output import Result, pairs

_CONFIGURED = Configured()  # the default of the shared options; it is frozen
_OUTPUT = Output()


async def config(*, configured: Configured = _CONFIGURED) -> Result:
    """Print what the environment and the configuration file say, secrets redacted. Exit status 2: it cannot
    work."""
    found = configured.configuration()
    Store(url=found.url).made()  # finds what only the parts together show: a code without a secret, say
    data = found.describe()
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
