"""The errors: one tree, data and no secrets, picklable."""

from __future__ import annotations

import copy
import inspect
import pickle
from datetime import UTC, datetime

import pytest

from vtoken import errors
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
    Reason,
    TokenBusy,
    TooManyAttempts,
    VTokenError,
)
from vtoken.limits import Limit
from vtoken.token import VerificationToken

TREE = {
    VTokenError: Exception,
    InvalidToken: VTokenError,
    TooManyAttempts: InvalidToken,
    TokenBusy: InvalidToken,
    AlreadyUsed: InvalidToken,
    CooldownActive: VTokenError,
    KeyGenerationError: VTokenError,
    LeaseLost: VTokenError,
    InvalidInput: VTokenError,
    ConfigurationError: VTokenError,
    BackendError: VTokenError,
    BackendUnavailable: BackendError,
    BackendClosed: BackendError,
    OutcomeUnknown: BackendError,
    CorruptStore: BackendError,
}
WITH_A_MESSAGE: list[type[VTokenError]] = [
    kind
    for kind in TREE
    if kind not in (InvalidToken, TooManyAttempts, TokenBusy, AlreadyUsed, CooldownActive)
]
TOKEN = VerificationToken("0" * 16, datetime(2026, 1, 1, tzinfo=UTC), "auth.user", "canary-of-an-object")
LIMIT = Limit(20, "1d", by="ip", across="sms")
EXAMPLES = [
    InvalidToken(),
    InvalidToken("leased"),
    InvalidToken(attempts_left=3),
    TooManyAttempts(12.5),
    TooManyAttempts(12.5, LIMIT),
    TokenBusy(0.5),
    AlreadyUsed(),
    CooldownActive(0.001),
    CooldownActive(0.001, LIMIT),
    *(kind("what happened") for kind in WITH_A_MESSAGE),
]


def test_the_tree_is_the_contracts() -> None:
    defined = {c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, Exception)}
    assert defined == set(TREE)
    for kind, parent in TREE.items():
        assert kind.__bases__[0] is parent


def test_invalid_input_is_a_value_error_too() -> None:
    assert issubclass(InvalidInput, ValueError)
    assert not issubclass(ConfigurationError, ValueError)


@pytest.mark.parametrize("reason", ["unknown", "expired", "used", "inactive", "leased"])
def test_one_public_message_whatever_the_reason(reason: Reason) -> None:
    error = InvalidToken(reason)
    assert error.reason == reason
    assert (str(error), repr(error)) == (str(InvalidToken()), repr(InvalidToken()))


def test_too_many_attempts_says_no_more_than_invalid_token() -> None:
    assert str(TooManyAttempts(3.0)) == str(InvalidToken())
    assert TooManyAttempts(3.0).reason == "unknown"


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda e: type(e).__name__)
def test_all_can_be_pickled_and_copied(error: VTokenError) -> None:
    copies = [pickle.loads(pickle.dumps(error, p)) for p in range(pickle.HIGHEST_PROTOCOL + 1)]  # noqa: S301  # our own
    for same in (*copies, copy.copy(error), copy.deepcopy(error)):
        assert type(same) is type(error)
        assert (str(same), vars(same), same.args) == (str(error), vars(error), error.args)


@pytest.mark.parametrize("kind", [TooManyAttempts, CooldownActive])
def test_what_refuses_says_how_long_and_which_limit(kind: type[TooManyAttempts | CooldownActive]) -> None:
    error = kind(12.5, LIMIT)
    assert (error.retry_after, error.limit) == (12.5, LIMIT)
    assert kind(0.001).limit is None
    assert "canary" not in repr(kind(1, Limit(1, "1m", across="canary")))


def test_the_reasons_of_what_is_held_and_of_what_was_used() -> None:
    busy, used = TokenBusy(2.5), AlreadyUsed(TOKEN)
    assert (busy.reason, busy.retry_after, busy.token) == ("leased", 2.5, None)
    assert (used.reason, used.token) == ("used", TOKEN)
    assert str(busy) == str(used) == str(InvalidToken())


@pytest.mark.parametrize("error", [InvalidToken("used", attempts_left=2, token=TOKEN), AlreadyUsed(TOKEN)])
def test_its_token_is_for_the_application_alone(error: InvalidToken) -> None:
    assert error.token is TOKEN
    assert "canary" not in f"{error!r} {error} {error.args}"
    pickled = pickle.dumps(error)
    assert b"canary" not in pickled
    same: InvalidToken = pickle.loads(pickled)  # noqa: S301  # our own
    assert (same.reason, same.attempts_left, same.token) == (error.reason, error.attempts_left, None)
