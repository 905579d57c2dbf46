"""URLs without their passwords, and errors without the arguments that led to them, for what is printed."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from typing import Final, ParamSpec, TypeVar
from urllib.parse import unquote

_P = ParamSpec("_P")
_T = TypeVar("_T")

_USERINFO: Final = re.compile(r"^((?:[A-Za-z][A-Za-z0-9+.-]*:/+)?+[^:]*):(.*)@", re.DOTALL)
_PARAMETER: Final = re.compile(r"([?&;])([^=&;?#]*)=([^&;#]*)")
_SECRET_NAME: Final = re.compile(
    r"pass|pwd|^pw|secret|token|cred|key|auth(?!source|mechanism$)|signature|^sig$", re.IGNORECASE
)
_FRAGMENT: Final = re.compile(r"#.*", re.DOTALL)


def redact_url(url: str) -> str:
    """A URL with ``***`` for its passwords: before the host, in its query, and for its whole fragment.

    It errs towards hiding too much: in a URL that is mistyped (a ``/`` or ``@`` of the password not
    percent-encoded), all up to the last ``@`` is hidden.

    Args:
        url: any text.
    """
    without_userinfo = _USERINFO.sub(r"\1:***@", url)
    return _FRAGMENT.sub("#***", _PARAMETER.sub(_redact_parameter, without_userinfo))


def _redact_parameter(found: re.Match[str]) -> str:
    hidden = _SECRET_NAME.search(unquote(found[2])) and found[3]
    return f"{found[1]}{found[2]}={'***' if hidden else found[3]}"


def without_locals(kind: type[Exception]) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Let a function raise errors from a frame that holds none of its arguments: error trackers record the
    locals of each frame, and one of them is a secret.

    Args:
        kind: which errors; their messages have to do without a traceback into the function.
    """

    def decorate(function: Callable[_P, _T]) -> Callable[_P, _T]:
        @wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            try:
                return function(*args, **kwargs)
            except kind as error:
                refused = error.with_traceback(None)
            del args, kwargs
            raise refused

        return call

    return decorate
