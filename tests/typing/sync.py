"""The manager for synchronous code: the same, without ``await``."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager
from typing import assert_type

from vtoken import IssuedToken, Stats, Status, Subject, VerificationToken
from vtoken.sync import SyncTokenManager


def used(user: Subject) -> None:
    with SyncTokenManager.from_url("memory://") as manager:
        assert_type(manager, SyncTokenManager)
        token = manager.deactivate_and_create(user, "password-reset", expiration_in_minutes=5)
        assert_type(token, IssuedToken)
        assert_type(token.key, str)
        assert_type(manager.get_active_or_create(user, "password-reset"), VerificationToken)
        assert_type(manager.exists_valid(user), bool)
        assert_type(manager.consume(user, "password-reset", token.key), VerificationToken)
        manager.consume(user, "password-reset", None)  # type: ignore[arg-type]  # no key
        manager.consume(user, "password-reset")  # type: ignore[call-arg]  # no key
        assert_type(manager.issue(user, "log-in", expires_in="5m"), IssuedToken)
        for one in manager.issue_many([user], "invite", batch="spring"):
            assert_type(one, VerificationToken)
        with manager.issuing(user, "log-in") as sent:
            assert_type(sent, IssuedToken)
        assert_type(manager.pretend(user, "log-in"), None)
        assert_type(manager.reveal(token), IssuedToken | None)
        assert_type(manager.status(user, "log-in"), Status)
        assert_type(manager.history(user), Generator[VerificationToken, None, None])
        assert_type(manager.erase(user), int)
        assert_type(manager.reset_limits(user), int)
        assert_type(manager.ping(), float)
        assert_type(manager.content_object(token), object | None)
        manager.issue(user, "log-in", context=lambda object_id: {"id": object_id})
        block = manager.redeem(user, "password-reset", token.key)
        assert_type(block, AbstractContextManager[VerificationToken])
        assert_type(manager.filter_active_tokens(user), Generator[VerificationToken, None, None])
        assert_type(manager.deactivate(user), int)
        assert_type(manager.stats(), Stats)
