"""Every error that vtoken raises.

The classes carry data, not secrets: no message, attribute or chained exception
holds a key, a digest or a secret. All of them can be pickled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from vtoken.limits import Limit
    from vtoken.token import VerificationToken

Reason = Literal["unknown", "expired", "used", "inactive", "leased"]
"""Why a token was refused: for the server side only, never for the person who presented the key."""


class VTokenError(Exception):
    """The root of all errors below."""


class InvalidToken(VTokenError):
    """The token was refused: wrong, expired, used, held or unknown.

    The message is the same whatever the reason, so that it can be shown without telling an attacker
    which attempts came close (OWASP Authentication Cheat Sheet, "Authentication and Error Messages").

    Args:
        reason: one of ``"unknown"``, ``"expired"``, ``"used"``, ``"inactive"``, ``"leased"``.
        attempts_left: how many wrong codes are still allowed; None where they are not counted.
        token: the token, without its key, where the presented link key was right but the token is
            expired, used or inactive, so that the application can offer to send its owner another one.
            It appears in no ``repr``, message or pickle.
    """

    message = "The token is not valid."

    def __init__(
        self,
        reason: Reason = "unknown",
        *,
        attempts_left: int | None = None,
        token: VerificationToken | None = None,
    ) -> None:
        super().__init__(self.message)
        self.reason: Reason = reason
        self.attempts_left = attempts_left
        self.token = token

    def __reduce__(self) -> tuple[object, ...]:
        return _invalid_token, (self.reason, self.attempts_left)


class TooManyAttempts(InvalidToken):
    """An attempt limit is reached; nothing was compared.

    Args:
        retry_after: seconds until a key is compared again, more than 0.
        limit: the limit that stays full the longest; None where it is not known.
    """

    def __init__(self, retry_after: float, limit: Limit | None = None) -> None:
        super().__init__("unknown", attempts_left=0)
        self.retry_after = retry_after
        self.limit = limit

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.retry_after, self.limit)


class TokenBusy(InvalidToken):
    """All uses of the token that are left are held by somebody who is about to make them.

    Args:
        retry_after: seconds until the first of these holds ends by itself, more than 0.

    .. versionadded:: 0.1
    """

    def __init__(self, retry_after: float) -> None:
        super().__init__("leased")
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.retry_after,)


class AlreadyUsed(InvalidToken):
    """``redeem`` was given a ``consume_id`` that was counted before: show the success page again.

    Args:
        token: the token that was used, without its key. It appears in no ``repr``, message or pickle.

    .. versionadded:: 0.1
    """

    def __init__(self, token: VerificationToken | None = None) -> None:
        super().__init__("used", token=token)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), ()


class CooldownActive(VTokenError):
    """An issue limit is reached; nothing was issued.

    Args:
        retry_after: seconds until a new token may be issued, more than 0.
        limit: the limit that stays full the longest; None where it is not known.
    """

    def __init__(self, retry_after: float, limit: Limit | None = None) -> None:
        super().__init__("Too many tokens were issued; the next one has to wait.")
        self.retry_after = retry_after
        self.limit = limit

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.retry_after, self.limit)


class KeyGenerationError(VTokenError):
    """The key generator returned only keys that other tokens have already."""


class LeaseLost(VTokenError):
    """The hold of a ``redeem`` block ran out or was revoked; the token was not marked used."""


class InvalidInput(VTokenError, ValueError):
    """An argument is outside of its documented type or range; nothing was stored."""


class ConfigurationError(VTokenError):
    """Settings, policies, a URL or a registration cannot work; the message says what to do."""


class BackendError(VTokenError):
    """The store could not do what was asked."""


class BackendUnavailable(BackendError):
    """The store cannot be reached or written; what was asked did not happen."""


class BackendClosed(BackendError):
    """The backend is not open here: not yet, not any more, or not in this process."""


class OutcomeUnknown(BackendError):
    """The write may or may not have happened; ``consume_id`` resolves it for ``consume``."""


class CorruptStore(BackendError):
    """What is stored is damaged or is not a vtoken store; nothing was changed."""


def _invalid_token(reason: Reason, attempts_left: int | None) -> InvalidToken:
    return InvalidToken(reason, attempts_left=attempts_left)
