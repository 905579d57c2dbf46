"""Async verification tokens: password reset, e-mail confirmation, codes, magic links, invitations."""

from vtoken._version import __version__
from vtoken.backend import TokenBackend
from vtoken.config import Configuration
from vtoken.errors import (
    AlreadyUsed,
    BackendClosed,
    BackendError,
    BackendUnavailable,
    ConfigurationError,
    CooldownActive,
    CorruptStore,
    InvalidInput,
    InvalidToken,
    KeyGenerationError,
    LeaseLost,
    OutcomeUnknown,
    TokenBusy,
    TooManyAttempts,
    VTokenError,
)
from vtoken.hooks import LazyHook, TokenEvent
from vtoken.inputs import ANY, DEFAULT
from vtoken.limits import Limit
from vtoken.manager import TokenManager, utc_now
from vtoken.policy import Settings, TokenPolicy
from vtoken.registry import create_backend, register_backend
from vtoken.stats import SlugStats, Stats, Status
from vtoken.subject import ContentTypes, Subject
from vtoken.token import IssuedToken, VerificationToken

__all__ = [
    "ANY",
    "DEFAULT",
    "AlreadyUsed",
    "BackendClosed",
    "BackendError",
    "BackendUnavailable",
    "Configuration",
    "ConfigurationError",
    "ContentTypes",
    "CooldownActive",
    "CorruptStore",
    "InvalidInput",
    "InvalidToken",
    "IssuedToken",
    "KeyGenerationError",
    "LazyHook",
    "LeaseLost",
    "Limit",
    "OutcomeUnknown",
    "Settings",
    "SlugStats",
    "Stats",
    "Status",
    "Subject",
    "TokenBackend",
    "TokenBusy",
    "TokenEvent",
    "TokenManager",
    "TokenPolicy",
    "TooManyAttempts",
    "VTokenError",
    "VerificationToken",
    "__version__",
    "create_backend",
    "register_backend",
    "utc_now",
]
