"""Every error that vtoken raises.

The classes carry data, not secrets: no message, attribute or chained exception
holds a key, a digest or a secret. All of them can be pickled.
"""

from __future__ import annotations

from typing import Literal

Reason = Literal["unknown", "expired", "used", "inactive", "leased"]
"""Why a token was refused: for the server side only, never for the person at the door."""


class VTokenError(Exception):
    """The root of all errors below."""


class InvalidToken(VTokenError):
    """The token was refused: wrong, expired, used, leased or unknown.

    The message is the same whatever the reason, so that it can be shown without telling
    an attacker which guesses came close (OWASP Authentication Cheat Sheet,
    "Authentication and Error Messages").

    Args:
        reason: one of ``"unknown"``, ``"expired"``, ``"used"``, ``"inactive"``, ``"leased"``.
    """

    message = "The token is not valid."

    def __init__(self, reason: Reason = "unknown") -> None:
        super().__init__(self.message)
        self.reason: Reason = reason

    def __reduce__(self) -> tuple[type[InvalidToken], tuple[object, ...]]:
        return type(self), (self.reason,)


class TooManyAttempts(InvalidToken):
    """The attempt budget of this object and slug is spent; nothing was compared.

    Args:
        retry_after: seconds until guesses are compared again, more than 0.
    """

    def __init__(self, retry_after: float) -> None:
        super().__init__("unknown")
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type[TooManyAttempts], tuple[object, ...]]:
        return type(self), (self.retry_after,)


class CooldownActive(VTokenError):
    """The last token of this object and slug is too young for a new one.

    Args:
        retry_after: seconds until a new token may be issued, more than 0.
    """

    def __init__(self, retry_after: float) -> None:
        super().__init__("A token was issued for this object a moment ago.")
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type[CooldownActive], tuple[object, ...]]:
        return type(self), (self.retry_after,)


class KeyGenerationError(VTokenError):
    """The key generator yielded only keys that are taken already."""


class LeaseLost(VTokenError):
    """The block of ``redeem`` ended after its lease was lost; the token was not marked used."""


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
