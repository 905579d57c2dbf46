"""From the stored record to the application's token."""

from __future__ import annotations

from typing import Any

from vtoken.backend import NEVER, StoredToken
from vtoken.errors import Reason
from vtoken.inputs import from_milliseconds
from vtoken.keys import Hidden
from vtoken.token import IssuedToken, VerificationToken


def issued(stored: StoredToken, key: Hidden) -> IssuedToken:
    """The token at its issue, with its key."""
    return IssuedToken(**_fields(stored), key=key.text())


def loaded(stored: StoredToken, key: str | None = None, *, lease_is_ours: bool = False) -> VerificationToken:
    """The token as it was loaded, with its key only where the store holds it or ``key`` is given."""
    return VerificationToken(
        **_fields(stored), key=key or stored.plain_key or None, lease_is_ours=lease_is_ours
    )


def refusal(stored: StoredToken | None, now: int) -> Reason | None:
    """Why a token cannot be used now, or None if it can."""
    if stored is None:
        return "unknown"
    if not stored.is_active:
        return "used" if stored.uses >= stored.max_uses else "inactive"
    if stored.expires_at < now:
        return "expired"
    return "leased" if stored.lease_until > now else None


def _fields(stored: StoredToken) -> dict[str, Any]:
    at = from_milliseconds
    return {
        "id": stored.id,
        "created_at": at(stored.created_at),
        "content_type": stored.content_type,
        "object_id": stored.object_id,
        "expires_at": None if stored.expires_at >= NEVER else at(stored.expires_at),
        "slug": stored.slug or None,
        "is_active": stored.is_active,
        "extra_data": stored.extra_data,
        "max_uses": stored.max_uses,
        "uses": stored.uses,
        "used_at": at(stored.used_at) if stored.used_at else None,
        "leased_until": at(stored.lease_until) if stored.lease_until else None,
    }
