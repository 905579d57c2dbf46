"""Log records of the standard library for what happens to tokens, with structured ``extra`` fields; and keys
that are kept out of the logs of web servers.

::

    TokenManager(backend, hooks=[vtoken.contrib.logging.hook()])
    vtoken.contrib.logging.hide_keys("uvicorn.access")

or ``VTOKEN_HOOKS=vtoken.contrib.logging:record``. A record has ``vtoken_event``, ``vtoken_purpose``,
``vtoken_reason``, ``vtoken_limit``, ``vtoken_channel``, ``vtoken_batch``, ``vtoken_token_id``, which is
public, and ``vtoken_count``.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from vtoken.contrib._extras import refuse_event
from vtoken.hooks import TokenEvent

_SUSPICIOUS: Final = ("failed", "reused", "capped", "limited")
KEY_PARAMETERS: Final = ("key", "code", "token")
"""Names of query parameters that are likely to hold a key."""


def hook(logger: logging.Logger | None = None, *, with_subject: bool = False) -> Callable[[TokenEvent], None]:
    """A hook that logs each event: refused keys and requests as warnings, all else as information.

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
            "vtoken_limit": event.limit,
            "vtoken_channel": event.channel,
            "vtoken_batch": event.batch,
            "vtoken_token_id": event.token_id,
            "vtoken_count": event.count,
            "vtoken_in_transaction": event.in_transaction,
            "vtoken_is_test_code": event.is_test_code,
        }
        if with_subject:
            fields |= {"vtoken_content_type": event.content_type, "vtoken_object_id": event.object_id}
        level = logging.WARNING if event.name in _SUSPICIOUS else logging.INFO
        message = "token %s: id=%s purpose=%r reason=%s limit=%s count=%d"
        values = event.name, event.token_id, event.slug, event.reason, event.limit, event.count
        target.log(level, message, *values, extra=fields)

    return log


record: Final = hook()
"""The hook as it is without arguments, to be named by its path."""


def hide_keys(
    *loggers: str, parameters: Iterable[str] = KEY_PARAMETERS, paths: Iterable[str] = ()
) -> logging.Filter:
    """Keep keys out of the logs of web servers, which write down the address of each request.

    Call it once, after the logging was configured::

        hide_keys("uvicorn.access", paths=["/reset/"])

    Args:
        *loggers: names, such as ``"uvicorn.access"``, ``"gunicorn.access"``, ``"aiohttp.access"``; of each
        only
            what is logged by that name itself passes the filter, and not what its children log.
        parameters: query parameters whose values are replaced by ``***``.
        paths: beginnings of paths after which the next part is a key.

    Returns:
        The filter, which may be added to handlers, too.
    """
    found = _HideKeys(tuple(parameters), tuple(paths))
    for name in loggers:
        logging.getLogger(name).addFilter(found)
    return found


class _HideKeys(logging.Filter):
    """Changes what a record says before it is formatted."""

    def __init__(self, parameters: tuple[str, ...], paths: tuple[str, ...]) -> None:
        super().__init__()
        names = "|".join(map(re.escape, parameters))
        starts = "|".join(map(re.escape, paths))
        parts = [rf"[?&;](?:{names})="] if names else []
        parts += [starts] if starts else []
        # A colon or a bracket may follow an address in a log line, but stands in no key unescaped either.
        self._pattern = re.compile(rf"({'|'.join(parts)})[^&;#/?\s\"']+", re.IGNORECASE) if parts else None

    def filter(self, record: logging.LogRecord) -> bool:
        if self._pattern is not None:
            record.msg = self._hidden(record.msg)
            if isinstance(record.args, tuple):
                record.args = tuple(self._hidden(value) for value in record.args)
            elif isinstance(record.args, Mapping):
                hidden: Any = copy.copy(record.args)  # gunicorn's answers for names that it does not have
                hidden.update({name: self._hidden(value) for name, value in record.args.items()})
                record.args = hidden
        return True

    def _hidden(self, value: Any) -> Any:
        return self._pattern.sub(r"\1***", value) if self._pattern and isinstance(value, str) else value
