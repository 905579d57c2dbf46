"""What ``TokenManager.stats`` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class SlugStats:
    """Numbers of tokens. A token counts as active, expired, used or, deactivated, as none of them.

    Args:
        total: all that are stored.
        active: active and not expired.
        expired: past their expiry, never used up nor deactivated.
        used: used up.
    """

    total: int = 0
    active: int = 0
    expired: int = 0
    used: int = 0


@dataclass(frozen=True, slots=True)
class Stats(SlugStats):
    """The numbers of the whole store.

    Args:
        by_slug: the same by slug; None holds the tokens without one.
    """

    by_slug: Mapping[str | None, SlugStats] = field(default_factory=dict[str | None, SlugStats])
