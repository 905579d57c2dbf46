"""A :class:`~vtoken.backend.Match` decided in Python, where the token is at hand already."""

from __future__ import annotations

from vtoken.backend import Match, StoredToken


def is_valid(token: StoredToken, now: int) -> bool:
    """As ``Match.valid_at`` says."""
    return token.is_active and token.expires_at >= now and token.lease_until <= now


def matches(token: StoredToken, match: Match) -> bool:
    """Whether every field of the match that is given holds for the token."""
    return (
        (match.id is None or token.id == match.id)
        and (match.digests is None or token.digest in match.digests)
        and (match.content_type is None or token.content_type == match.content_type)
        and (match.object_id is None or token.object_id == match.object_id)
        and (match.slug is None or token.slug == match.slug)
        and (not match.active or token.is_active)
        and (match.valid_at is None or is_valid(token, match.valid_at))
        and (match.context is None or token.context == match.context)
        and (match.lease_id is None or token.lease_id == match.lease_id)
        and (match.leased_at is None or token.lease_until > match.leased_at)
    )
