"""What tokens there are here, and to whom they belong.

Tokens of an account belong to its address. So wrong codes for an address are counted alike whether or not
there is an account, and no answer tells.
"""

from __future__ import annotations

from typing import Final

from vtoken import Limit, Subject, TokenPolicy

RESET: Final = "password-reset"
INVITATION: Final = "invitation"

ANY_ADDRESS: Final = Subject("address")
"""For a link: its key is all that it carries."""

TEAM: Final = Subject("team", "example")
"""What an invitation is to."""

POLICIES: Final = (
    # One message with a link and a code. Using either ends both.
    TokenPolicy.pair(
        RESET,
        expiration="1h",
        code_expiration="10m",
        prefix="reset_",
        cooldown="1m",
        issue_limits=[Limit(20, "1d"), Limit(100, "1h", by="ip")],
        attempt_limits=[Limit(100, "1h", by="ip")],
    ),
    TokenPolicy.link(INVITATION, expiration="7d", max_uses=3, prefix="invite_"),
)


def address(email: str) -> Subject:
    """Whom the tokens of an account belong to."""
    return Subject("address", email)


def normalised(email: str) -> str | None:
    """An address as accounts are known by it, or None where it is none."""
    email = email.strip().lower()
    local, at, domain = email.rpartition("@")
    is_one = at and local and domain and len(email.encode(errors="replace")) <= 254
    return email if is_one and email.isprintable() and " " not in email else None
