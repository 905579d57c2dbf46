"""The errors: one tree, data and no secrets, picklable."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from vtoken import errors
from vtoken.errors import (
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
    TooManyAttempts,
    VTokenError,
)

TREE = {
    VTokenError: Exception,
    InvalidToken: VTokenError,
    TooManyAttempts: InvalidToken,
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
    kind for kind in TREE if kind not in (InvalidToken, TooManyAttempts, CooldownActive)
]
EXAMPLES = [
    InvalidToken(),
    InvalidToken("leased"),
    TooManyAttempts(12.5),
    CooldownActive(0.001),
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


def test_retry_after_is_kept() -> None:
    assert TooManyAttempts(12.5).retry_after == 12.5
    assert CooldownActive(0.001).retry_after == 0.001
