"""The token as an application sees it."""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, datetime
from typing import Any

from vtoken import inputs
from vtoken.errors import CorruptStore


class VerificationToken:
    """A token of an object, as it was when it was loaded.

    Changing it changes nothing stored; :meth:`TokenManager.save` stores its ``extra_data``.
    Tokens are equal, and hash alike, when they have the same ``id``.

    Attributes:
        id: public and not secret: safe in logs and URLs of the back office.
        created_at: aware UTC, floored to milliseconds.
        content_type: what kind of object it belongs to.
        object_id: which one, as text.
        expires_at: the last moment at which it is valid; None never expires.
        slug: its purpose, or None.
        is_active: False once it is used up or deactivated.
        extra_data: JSON text or None.
        max_uses: how many uses it has in all, 1 or more.
        uses: how many of them are gone.
        used_at: time of the latest use, or None.
        leased_until: until when a ``redeem`` holds it, or None.
    """

    __slots__ = (
        "_key",
        "_lease_is_ours",
        "content_type",
        "created_at",
        "expires_at",
        "extra_data",
        "id",
        "is_active",
        "leased_until",
        "max_uses",
        "object_id",
        "slug",
        "used_at",
        "uses",
    )

    def __init__(
        self,
        id: str,  # noqa: A002  # the contract's name for the field
        created_at: datetime,
        content_type: str,
        object_id: str,
        key: str | None = None,
        expires_at: datetime | None = None,
        slug: str | None = None,
        is_active: bool = True,
        extra_data: str | None = None,
        max_uses: int = 1,
        uses: int = 0,
        used_at: datetime | None = None,
        leased_until: datetime | None = None,
        lease_is_ours: bool = False,
    ) -> None:
        self.id = id
        self.created_at = created_at
        self.content_type = content_type
        self.object_id = object_id
        self._key = key
        self.expires_at = expires_at
        self.slug = slug
        self.is_active = is_active
        self.extra_data = extra_data
        self.max_uses = max_uses
        self.uses = uses
        self.used_at = used_at
        self.leased_until = leased_until
        self._lease_is_ours = lease_is_ours

    @property
    def key(self) -> str | None:
        """The plaintext key, or None: a stored token is known by its digest only.

        It is there on an :class:`IssuedToken`, under ``key_storage="plain"``, and on a derived
        key that ``get_active_or_create`` found again. Check for None before you mail it.
        """
        return self._key

    def is_valid(self, now: datetime | None = None) -> bool:
        """Say whether the token is active, not leased to someone else and not expired.

        It is valid at exactly ``expires_at`` and not one millisecond later. What is stored may have
        changed since the token was loaded: to let somebody in, use ``TokenManager.consume``.

        Args:
            now: an aware time, floored to milliseconds; left out, the real UTC clock.

        Raises:
            InvalidInput: ``now`` is naive.
        """
        moment = inputs.milliseconds(datetime.now(UTC) if now is None else now)
        if not self.is_active:
            return False
        if self.expires_at is not None and moment > inputs.milliseconds(self.expires_at):
            return False
        leased = self.leased_until is not None and moment < inputs.milliseconds(self.leased_until)
        return self._lease_is_ours or not leased

    def set_extra_data(self, data: object) -> None:
        """Set ``extra_data`` on this copy; ``TokenManager.save`` stores it.

        Args:
            data: any JSON value of at most 16,384 bytes and 16 nested containers, keys ``str``,
                integers within 64 bits signed; None stores none.

        Raises:
            InvalidInput: it is none of these.
        """
        self.extra_data = None if data is None else inputs.dump_json(data)

    def get_extra_data(self) -> Any:
        """The value that ``extra_data`` holds, or None.

        Raises:
            CorruptStore: it is no JSON text.
        """
        if self.extra_data is None:
            return None
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(self.extra_data)
        raise CorruptStore(f"the extra_data of the token {self.id} is no JSON text")

    def __eq__(self, other: object) -> bool:
        return self.id == other.id if isinstance(other, VerificationToken) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        state = "active" if self.is_active else "inactive"
        subject = f"{self.content_type}:{self.object_id}"
        return f"<{type(self).__name__} {self.id} {subject!r} slug={self.slug!r} {state}>"

    def __reduce__(self) -> tuple[object, ...]:
        """Pickles leave the key behind: they outlive the moment in which it is needed."""
        return _unpickle, (
            {name: getattr(self, name) for name in VerificationToken.__slots__ if name[0] != "_"},
        )


class IssuedToken(VerificationToken):
    """A token at the moment of its issue: the one time that ``key`` is sure to be there."""

    __slots__ = ()

    @property
    def key(self) -> str:
        """The plaintext key, to be sent to its owner and kept nowhere."""
        assert self._key is not None  # noqa: S101  # the manager constructs it so
        return self._key


def _unpickle(fields: dict[str, Any]) -> VerificationToken:
    return VerificationToken(**fields)
