"""What ``TokenManager.stats`` and ``TokenManager.status`` return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime


@dataclass(frozen=True, slots=True)
class SlugStats:
    """Numbers of tokens. A token counts as active, expired or used, or as none of them if it was
    deactivated or replaced without having been used.

    Args:
        total: all that are stored.
        active: active and not expired.
        expired: past their expiry, and neither used up, deactivated nor replaced before.
        used: over, and used at least once.
    """

    total: int = 0
    active: int = 0
    expired: int = 0
    used: int = 0

    @property
    def inactive(self) -> int:
        """The rest: deactivated or replaced, and never used."""
        return self.total - self.active - self.expired - self.used


@dataclass(frozen=True, slots=True)
class Stats(SlugStats):
    """The numbers of the whole store.

    Args:
        by_slug: the same by slug; None holds the tokens without one.
    """

    by_slug: Mapping[str | None, SlugStats] = field(default_factory=dict[str | None, SlugStats])


@dataclass(frozen=True, slots=True)
class Status:
    """How an object and slug stand, for a screen.

    Args:
        has_valid: whether there is a valid token.
        expires_at: when the newest valid token expires; None never, or where there is none.
        attempts_left: how many wrong keys the limits allow now; None without limits.
        attempts_reset_at: when ``attempts_left`` grows again: the end of the window of the limit that decides
            it. None where nothing is spent of that one.
        can_issue_at: when a token may be issued; now, or in the past, if at once.
        code_expires_at: when the code of that token expires, if it is a pair; it may be in the past, while
            the link is still good. None for other tokens.
        can_issue_in: the seconds until ``can_issue_at`` by the manager's clock, 0 if at once.

    .. versionadded:: 0.1
    """

    has_valid: bool
    expires_at: datetime | None
    attempts_left: int | None
    attempts_reset_at: datetime | None
    can_issue_at: datetime
    code_expires_at: datetime | None = None
    can_issue_in: float = 0.0
