"""Errors: what hangs below what, and what they carry."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from typing import Literal, assert_type

from vtoken import (
    AlreadyUsed,
    BackendError,
    CooldownActive,
    InvalidInput,
    InvalidToken,
    Limit,
    OutcomeUnknown,
    TokenBusy,
    TooManyAttempts,
    VerificationToken,
    VTokenError,
)


def handled(error: VTokenError) -> None:
    match error:
        case TooManyAttempts() | CooldownActive():
            assert_type(error.retry_after, float)
            assert_type(error.limit, Limit | None)
        case TokenBusy():
            assert_type(error.retry_after, float)
        case AlreadyUsed():
            assert_type(error.token, VerificationToken | None)
        case InvalidToken():
            assert_type(error.attempts_left, int | None)
            assert_type(error.token, VerificationToken | None)
            assert_type(error.reason, Literal["unknown", "expired", "used", "inactive", "leased"])
            error.retry_after  # type: ignore[attr-defined]  # noqa: B018  # only where there is one
        case _:
            pass


def below(invalid: InvalidInput, unknown: OutcomeUnknown, many: TooManyAttempts) -> None:
    _value: ValueError = invalid
    _store: BackendError = unknown
    _token: InvalidToken = many
    _other: ValueError = many  # type: ignore[assignment]  # it is none
