"""Answers and tokens of the library and of the model, in one form."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from vtoken.backend import NEVER, StoredToken
from vtoken.errors import VTokenError
from vtoken.subject import Subject
from vtoken.testing._contract import ModelToken
from vtoken.token import VerificationToken


def said(answer: object) -> object:
    """An answer so that it can be compared: errors by their type and what they carry."""
    if isinstance(answer, VTokenError):
        return type(answer).__name__, vars(answer)
    return answer


def as_seen(token: VerificationToken | ModelToken, valid: bool, key: str | None) -> tuple[object, ...]:
    """A token as the application sees it."""
    if isinstance(token, ModelToken):
        times = (token.created, token.expires, token.used_at, token.leased_until)
        subject, slug, max_uses = token.subject, token.policy.slug, token.policy.max_uses
    else:
        times = (
            _milliseconds(token.created_at),
            NEVER if token.expires_at is None else _milliseconds(token.expires_at),
            0 if token.used_at is None else _milliseconds(token.used_at),
            0 if token.leased_until is None else _milliseconds(token.leased_until),
        )
        subject, slug, max_uses = Subject(token.content_type, token.object_id), token.slug, token.max_uses
    return token.id, subject, slug, times, token.is_active, valid, token.uses, max_uses, token.extra_data, key


def as_stored(token: StoredToken | ModelToken) -> tuple[object, ...]:
    """A token as it is stored, but for its digests."""
    if isinstance(token, ModelToken):
        times = (token.created, token.expires, token.ends, token.used_at, token.leased_until)
        subject, slug, max_uses = token.subject, token.policy.slug or "", token.policy.max_uses
        names, leased = len(token.use_names), bool(token.lease)
    else:
        times = (token.created_at, token.expires_at, token.ends_at, token.used_at, token.lease_until)
        subject, slug, max_uses = Subject(token.content_type, token.object_id), token.slug, token.max_uses
        names, leased = len(token.use_ids), bool(token.lease_id)
    return (
        token.id,
        subject,
        slug,
        times,
        token.is_active,
        token.uses,
        max_uses,
        token.extra_data,
        names,
        leased,
    )


def _milliseconds(moment: datetime) -> int:
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
