"""From the stored record to the application's token."""

from __future__ import annotations

from datetime import datetime

from vtoken.backend import NEVER, StoredToken
from vtoken.errors import CorruptStore, Reason
from vtoken.inputs import from_milliseconds
from vtoken.keys import Hidden
from vtoken.token import IssuedToken, VerificationToken

_Fields = tuple[
    str,
    datetime,
    str,
    str,
    str | None,
    datetime | None,
    str | None,
    bool,
    str | None,
    int,
    int,
    datetime | None,
    datetime | None,
]


def issued(stored: StoredToken, key: Hidden) -> IssuedToken:
    """The token at its issue, with its key."""
    return IssuedToken(*_fields(stored, key.text()))


def loaded(stored: StoredToken, key: str | None = None, *, lease_is_ours: bool = False) -> VerificationToken:
    """The token as it was loaded, with its key only where the store holds it or ``key`` is given."""
    return VerificationToken(*_fields(stored, key or stored.plain_key or None), lease_is_ours=lease_is_ours)


def refusal(stored: StoredToken | None, now: int) -> Reason | None:
    """Why a token cannot be used now, or None if it can."""
    if stored is None:
        return "unknown"
    if not stored.is_active:
        return "used" if stored.uses >= stored.max_uses else "inactive"
    if stored.expires_at < now:
        return "expired"
    return "leased" if stored.lease_until > now else None


def _fields(stored: StoredToken, key: str | None) -> _Fields:
    """The arguments of a token, in their order."""
    at = _moment
    return (
        stored.id,
        at(stored.created_at),
        stored.content_type,
        stored.object_id,
        key,
        None if stored.expires_at >= NEVER else at(stored.expires_at),
        stored.slug or None,
        stored.is_active,
        stored.extra_data,
        stored.max_uses,
        stored.uses,
        at(stored.used_at) if stored.used_at else None,
        at(stored.lease_until) if stored.lease_until else None,
    )


def _moment(milliseconds: int) -> datetime:
    try:
        return from_milliseconds(milliseconds)
    except OverflowError:
        pass
    raise CorruptStore("a stored token has a time past the year 9999")
