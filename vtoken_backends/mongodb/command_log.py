"""PyMongo's command log without what is ours in it.

At DEBUG, the logger ``pymongo.command`` writes every command and its answer: digests, and keys where a policy
stores them in plain. A filter hides the documents of the commands that concern our collections. It is added
when a backend is opened, and stays, so that an application may set the level at any time.
"""

from __future__ import annotations

import json
import logging
from typing import Any, Final

_HIDDEN: Final = "hidden, because it concerns vtoken's collections"
_FIELDS: Final = ("command", "reply", "failure")


class _Redacting(logging.Filter):
    """Hides what the driver's records say of some collections."""

    def __init__(self) -> None:
        super().__init__()
        self.collections: set[str] = set()
        self._running: set[tuple[object, object]] = set()
        """Our commands whose answers are to come."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno <= logging.DEBUG:
            record.msg, record.args = self._redacted(record.getMessage()), ()
        return True

    def _redacted(self, text: str) -> str:
        try:
            said: Any = json.loads(text)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            return _HIDDEN if self._concerns_us(text) else text
        command = (said.get("driverConnectionId"), said.get("requestId"))
        if "command" in said:
            if not self._concerns_us(str(said["command"])):
                return text
            self._running.add(command)
        elif command in self._running:
            self._running.discard(command)
        else:
            return text
        return json.dumps({name: _HIDDEN if name in _FIELDS else value for name, value in said.items()})

    def _concerns_us(self, command: str) -> bool:
        return any(f'"{name}"' in command for name in self.collections)


_FILTER: Final = _Redacting()


def hide(collection: str) -> None:
    """Hide the documents of a collection, and of those that go with it."""
    _FILTER.collections |= {collection, f"{collection}.budgets", f"{collection}.meta"}
    logging.getLogger("pymongo.command").addFilter(_FILTER)  # it is added once
