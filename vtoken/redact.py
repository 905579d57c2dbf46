"""URLs without their passwords, for messages and for what we print."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote

_USERINFO: Final = re.compile(r"^((?:[A-Za-z][A-Za-z0-9+.-]*:/+)?+[^:]*):(.*)@", re.DOTALL)
_PARAMETER: Final = re.compile(r"([?&;])([^=&;?]*)=([^&;]*)")
_SECRET_NAME: Final = re.compile(
    r"pass|pwd|secret|token|credential|api_?key|authmechanismproperties", re.IGNORECASE
)


def redact_url(url: str) -> str:
    """A URL with ``***`` for its passwords: before the host, and in its query.

    It errs towards hiding too much: in a URL that is mistyped (a ``/`` or ``@`` of the password not
    percent-encoded), all up to the last ``@`` is hidden.

    Args:
        url: any text.
    """
    return _PARAMETER.sub(_redact_parameter, _USERINFO.sub(r"\1:***@", url))


def _redact_parameter(found: re.Match[str]) -> str:
    hidden = _SECRET_NAME.search(unquote(found[2])) and found[3]
    return f"{found[1]}{found[2]}={'***' if hidden else found[3]}"
