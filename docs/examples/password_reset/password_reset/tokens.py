"""What tokens there are here, and to whom they belong.

Tokens of an account belong to its address. So guesses at the code of an address are counted alike whether or
not there is an account, and no answer tells.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from vtoken import Subject, TokenPolicy

RESET: Final = "password-reset"
CODE: Final = "reset-code"
INVITATION: Final = "invitation"

ANY_ADDRESS: Final = Subject("address")
"""For a link: its key is all that it carries."""

TEAM: Final = Subject("team", "example")
"""What an invitation is to."""

POLICIES: Final = (
    TokenPolicy.link(RESET, cooldown=timedelta(minutes=1), prefix="reset_"),
    # Only for the browser that asked for it, by a nonce in its cookie.
    TokenPolicy.code(CODE, cooldown=timedelta(minutes=1), context="required"),
    TokenPolicy.link(INVITATION, expiration=7 * 24 * 60, max_uses=3, prefix="invite_"),
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
