"""Log records of the standard library for what happens to tokens, with structured ``extra`` fields.

::

    TokenManager(backend, hooks=[vtoken.contrib.logging.hook()])

or ``VTOKEN_HOOKS=vtoken.contrib.logging:record``. A record has ``vtoken_event``, ``vtoken_purpose``,
``vtoken_reason``, ``vtoken_token_id``, which is public, and ``vtoken_count``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

from vtoken.contrib._extras import refuse_event
from vtoken.hooks import TokenEvent

_SUSPICIOUS: Final = ("failed", "reused", "capped")


def hook(logger: logging.Logger | None = None, *, with_subject: bool = False) -> Callable[[TokenEvent], None]:
    """A hook that logs each event: refused keys as warnings, all else as information.

    Args:
        logger: left out, ``vtoken.events``.
        with_subject: adds ``vtoken_content_type`` and ``vtoken_object_id``, which may be personal data.
    """
    refuse_event(logger)
    target = logging.getLogger("vtoken.events") if logger is None else logger

    def log(event: TokenEvent) -> None:
        fields: dict[str, Any] = {
            "vtoken_event": event.name,
            "vtoken_purpose": event.slug,
            "vtoken_reason": event.reason,
            "vtoken_token_id": event.token_id,
            "vtoken_count": event.count,
        }
        if with_subject:
            fields |= {"vtoken_content_type": event.content_type, "vtoken_object_id": event.object_id}
        level = logging.WARNING if event.name in _SUSPICIOUS else logging.INFO
        message = "token %s: id=%s purpose=%r reason=%s count=%d"
        target.log(
            level, message, event.name, event.token_id, event.slug, event.reason, event.count, extra=fields
        )

    return log


record: Final = hook()
"""The hook as it is without arguments, to be named by its path."""
