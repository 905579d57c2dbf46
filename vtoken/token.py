"""The token as an application sees it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime
from typing import Any, Final, NoReturn, Self

from vtoken import inputs
from vtoken.backend import NEVER, STALE_HOLD, State, StoredKey, StoredToken
from vtoken.errors import CorruptStore

_ACTIVE: Final = State.ACTIVE
_TOO_LATE: Final = "a stored token has a time past the year 9999"


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
        code_expires_at: the last moment at which the code of a pair is good; None for other tokens.
        slug: its purpose, or None.
        is_active: False once it is used up, deactivated or replaced.
        extra_data: JSON text or None.
        max_uses: how many uses it has in all, 1 or more; None for no bound.
        uses: how many of them were made.
        used_at: time of the latest use, or None.
        is_replay: whether ``consume`` returned it for a ``consume_id`` that had been counted before.
    """

    __slots__ = (
        "_code",
        "_held_until",
        "_key",
        "code_expires_at",
        "content_type",
        "created_at",
        "expires_at",
        "extra_data",
        "id",
        "is_active",
        "is_replay",
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
        max_uses: int | None = 1,
        uses: int = 0,
        used_at: datetime | None = None,
        *,
        code: str | None = None,
        code_expires_at: datetime | None = None,
        is_replay: bool = False,
        held_until: tuple[int, ...] = (),
    ) -> None:
        self.id = id
        self.created_at = created_at
        self.content_type = content_type
        self.object_id = object_id
        self._key = key
        self._code = code
        self.expires_at = expires_at
        self.code_expires_at = code_expires_at
        self.slug = slug
        self.is_active = is_active
        self.extra_data = extra_data
        self.max_uses = max_uses
        self.uses = uses
        self.used_at = used_at
        self.is_replay = is_replay
        self._held_until = held_until

    @classmethod
    def _made(
        cls,
        stored: StoredToken,
        link: StoredKey | None,
        own_code: StoredKey | None,
        key: str | None,
        code: str | None,
        own_holds: AbstractSet[str] = frozenset(),
        is_replay: bool = False,
    ) -> Self:
        """A token of its record; see :func:`loaded`."""
        # Half the cost of the constructor with as many named arguments, and every operation makes one.
        token = cls.__new__(cls)
        token.id = stored.id
        token.created_at, token.expires_at, token.used_at = _moments(stored)
        token.content_type = stored.content_type
        token.object_id = stored.object_id
        token._key = key
        token._code = code
        token.slug = stored.slug or None
        token.is_active = stored.state is _ACTIVE
        token.extra_data = stored.extra_data
        token.max_uses = stored.max_uses
        token.uses = stored.uses
        token.is_replay = is_replay
        token.code_expires_at = None
        if own_code is not None and link is not None:
            token.code_expires_at = _moment(own_code.expires_at)
        token._held_until = ()
        if stored.holds:
            token._held_until = tuple(hold.until for hold in stored.holds if hold.hold_id not in own_holds)
        return token

    @property
    def key(self) -> str | None:
        """The plaintext key, or None: a stored token is known by its digest only.

        It is there on an :class:`IssuedToken`, under ``key_storage="plain"``, and on a derived
        key that ``get_active_or_create`` found again. Check for None before you mail it.
        """
        return self._key

    @property
    def code(self) -> str | None:
        """The plaintext short code of a pair, where ``key`` would be there, too; None for other tokens."""
        return self._code

    def is_valid(self, now: datetime | None = None) -> bool:
        """Say whether the token is active, not expired, and has a use that nobody else holds.

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
        held = sum(moment < until <= moment + STALE_HOLD for until in self._held_until)
        return self.max_uses is None or self.uses + held < self.max_uses

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
        """Pickles and copies leave the key behind, because they outlive the moment in which it is needed."""
        return _unpickle, (
            {
                "held_until": self._held_until,
                **{name: getattr(self, name) for name in VerificationToken.__slots__ if name[0] != "_"},
            },
        )


class IssuedToken(VerificationToken):
    """A token at the moment of its issue: the one time that ``key`` is sure to be there.

    It cannot be pickled or copied, because the copy would lack the key.
    """

    __slots__ = ()

    @property
    def key(self) -> str:
        """The plaintext key, to be sent to its owner and kept nowhere."""
        assert self._key is not None  # noqa: S101  # the manager constructs it so
        return self._key

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an IssuedToken cannot be pickled or copied, because its key must not be stored: send token.key"
            " now, or pass token.id to the worker and ask manager.reveal(...) there (key_storage='derived')"
        )


def issued(stored: StoredToken, key: str, code: str | None = None) -> IssuedToken:
    """A token at its issue.

    Args:
        stored: the record.
        key: its key, of a code policy the code.
        code: the code of a pair.
    """
    own = _own_keys(stored)
    return IssuedToken._made(stored, *own, key, code)  # pyright: ignore[reportPrivateUsage]  # this module's own


def loaded(
    stored: StoredToken,
    *,
    key: str | None = None,
    code: str | None = None,
    own_holds: AbstractSet[str] = frozenset(),
    is_replay: bool = False,
) -> VerificationToken:
    """A token as it was loaded, with its key only where the store holds it or the caller knows it.

    Args:
        stored: the record.
        key: its key, if it was derived again.
        code: the code of a pair, likewise.
        own_holds: the ``hold_id`` of holds that are the caller's and so don't make it less valid.
        is_replay: see :class:`VerificationToken`.
    """
    link, own_code = _own_keys(stored)
    first = link or own_code
    if key is None and first is not None:
        key = first.plain_key or None
    if code is None and link is not None and own_code is not None:
        code = own_code.plain_key or None
    made = VerificationToken._made  # pyright: ignore[reportPrivateUsage]  # this module's own
    return made(stored, link, own_code, key, code, own_holds, is_replay)


def loaded_without_keys(stored: StoredToken) -> VerificationToken:
    """A token whose key stays behind even where the store holds it readable."""
    return loaded(stored._replace(keys=tuple(key._replace(plain_key="") for key in stored.keys)))


def _own_keys(stored: StoredToken) -> tuple[StoredKey | None, StoredKey | None]:
    """The link key and the code key that a token was issued with, as far as it still has them."""
    link = code = None
    for key in stored.keys:
        if key.origin == stored.id:
            if key.kind == "link":
                link = key
            else:
                code = key
    return link, code


def _moments(stored: StoredToken) -> tuple[datetime, datetime | None, datetime | None]:
    """When it was created, when it expires, and when it was used."""
    of = inputs.from_milliseconds
    try:
        return (
            of(stored.created_at),
            None if stored.expires_at >= NEVER else of(stored.expires_at),
            of(stored.used_at) if stored.used_at else None,
        )
    except OverflowError:
        pass
    raise CorruptStore(_TOO_LATE)


def _moment(milliseconds: int) -> datetime:
    try:
        return inputs.from_milliseconds(milliseconds)
    except OverflowError:
        pass
    raise CorruptStore(_TOO_LATE)


def _unpickle(fields: dict[str, Any]) -> VerificationToken:
    return VerificationToken(**fields)
