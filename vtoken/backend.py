"""The storage protocol. Its docstrings are the contract; ``vtoken.testing`` holds a backend to it.

A backend is a dumb, careful store: eleven methods, each one atomic step. It holds no
policy, reads no clock and never sees a plaintext key (but for ``StoredToken.plain_key``, which is
filled only under the opt-in ``key_storage="plain"``). Everything that needs judgement is
done by :class:`vtoken.TokenManager`, once, for all backends.

Times are ``int`` milliseconds since 1970-01-01 UTC. Every integer that arrives, and every one that is
stored or returned, fits into 64 bits, signed; ``max_uses`` and ``uses`` into 32. Strings arrive checked: no
NUL, no lone surrogate, at most 512 bytes of UTF-8 (``extra_data``: 16,384 bytes). They are equal if their
code points are, and sort by these.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple, Protocol, Self, runtime_checkable

NEVER: Final = 253_402_300_799_999
"""9999-12-31T23:59:59.999Z, the expiry of a token that never expires."""


class StoredToken(NamedTuple):
    """A token as it is stored: immutable, so that a backend may hand out its own record."""

    id: str
    """Unique, 32 hexadecimal digits, in the order of creation within a manager (RFC 9562, UUIDv7)."""
    content_type: str
    object_id: str
    slug: str
    """``""`` for a token without a slug (a real slug is never empty)."""
    digest: bytes
    """32 bytes, unique over the whole store."""
    scheme: str
    """How the digest was made: ``"sha256"``, ``"hmac-sha256"`` or ``"code-hmac-sha256"``."""
    secret_id: str
    """Which secret made the digest; ``""`` for none."""
    plain_key: str
    """The plaintext key under ``key_storage="plain"``, else ``""``."""
    nonce: str
    """What a derived key is derived from (``key_storage="derived"``), else ``""``."""
    context: bytes
    """Digest of the caller's context (a browser's cookie, say), ``b""`` for none."""
    created_at: int
    expires_at: int
    """The last millisecond at which the token is valid; :data:`NEVER` for no expiry."""
    ends_at: int
    """``expires_at`` while active; once inactive, the last millisecond before it became so, if
    that is earlier. Purge goes by it alone."""
    is_active: bool
    extra_data: str | None
    """JSON text, stored and returned to the letter."""
    max_uses: int
    uses: int
    used_at: int
    """Time of the latest use, 0 for never."""
    use_ids: tuple[str, ...]
    """The ``use_id`` of each use that had one, oldest first."""
    lease_id: str
    """``""`` for none."""
    lease_until: int
    """The token is leased while ``now < lease_until``; 0 for none."""

    def __repr__(self) -> str:
        return f"<StoredToken {self.id}>"


class Match(NamedTuple):
    """A closed condition: every field that is given must hold, compared by value and type.

    ``Match()`` alone matches every token.
    """

    id: str | None = None
    digests: tuple[bytes, ...] | None = None
    """The token's digest is one of these."""
    content_type: str | None = None
    object_id: str | None = None
    slug: str | None = None
    """``None``: any slug. ``""``: tokens without one."""
    active: bool = False
    """``True``: only tokens with ``is_active``."""
    valid_at: int | None = None
    """``is_active and expires_at >= valid_at and lease_until <= valid_at``."""
    context: bytes | None = None
    lease_id: str | None = None
    leased_at: int | None = None
    """The lease is still running: ``lease_until > leased_at``."""

    def __repr__(self) -> str:
        given = [f for f, v in zip(self._fields, self, strict=True) if v is not None and v is not False]
        return f"<Match {' '.join(given)}>"


class Use(NamedTuple):
    """Count one use: ``uses + 1``, ``used_at = at``, ``use_id`` (unless ``""``) appended to
    ``use_ids``, the lease cleared (``lease_id = ""``, ``lease_until = 0``). When ``uses`` reaches
    ``max_uses`` the token becomes inactive and ``ends_at = min(ends_at, at - 1)``.

    Where ``use_id`` is in ``use_ids`` already, the token does not match.

    An active token that stands in an overlap (see :meth:`TokenBackend.insert`) takes the others of its
    overlap with it, in the same atomic step: they become inactive as by :meth:`TokenBackend.deactivate`.
    Of two overlapping tokens used at once, one use wins.
    """

    at: int
    use_id: str = ""


class Lease(NamedTuple):
    """Set ``lease_id`` and ``lease_until``."""

    lease_id: str
    until: int


class Release(NamedTuple):
    """Clear ``lease_id`` and ``lease_until`` and nothing else."""


class SetExtraData(NamedTuple):
    """Set ``extra_data`` and nothing else."""

    extra_data: str | None


class ForgetKey(NamedTuple):
    """Clear ``plain_key`` and nothing else."""


Change = Use | Lease | Release | SetExtraData | ForgetKey


class InsertMode(Enum):
    """What :meth:`TokenBackend.insert` does about the tokens that are there."""

    ADD = "add"
    """Leave them as they are."""
    REPLACE = "replace"
    """Deactivate the active tokens of the same content type, object id and slug. An ``ADD`` at the same
    time comes before it, and its token is deactivated, or after it, and both stay active."""
    IF_NONE_VALID = "if-none-valid"
    """Insert only if no token of the same content type, object id and slug is valid at
    ``created_at``, and deactivate the active ones (expired or leased) as ``REPLACE`` does."""


class InsertResult(Enum):
    """How an insert ended."""

    INSERTED = "inserted"
    KEY_TAKEN = "key-taken"
    """Another token has this digest, or this id; nothing was changed."""
    HAS_VALID = "has-valid"
    """``IF_NONE_VALID`` found a valid token; nothing was changed. Where the key is taken as well, either
    answer will do."""


class Budget(NamedTuple):
    """The name of a budget: something that may happen so often in a window of time."""

    content_type: str
    object_id: str
    slug: str
    kind: str
    """``"attempts"`` or ``"issues"``."""


class Spent(NamedTuple):
    """The answer of :meth:`TokenBackend.spend`."""

    allowed: bool
    until: int
    """When the running window ends."""


class SlugCount(NamedTuple):
    """How many tokens a slug has. A token counts as one of active, expired, used, or none of them."""

    slug: str
    total: int
    active: int
    """``is_active and expires_at >= now``"""
    expired: int
    """``is_active and expires_at < now``"""
    used: int
    """``not is_active and uses > 0``"""


@runtime_checkable
class TokenBackend(Protocol):
    """What a store must do. One method is one atomic step; all are safe from any number of
    tasks, threads, processes and event loops on the same store.

    One backend object serves the event loop in which it was opened. In another one it serves as well, or
    raises :class:`~vtoken.BackendClosed`: for certain, a store is shared by an object in each.

    Every method but ``from_url``, ``open`` and ``close`` raises :class:`~vtoken.BackendClosed` when
    the backend is not open. Failures of the store are raised as :class:`~vtoken.BackendError` or a
    subclass, never as the driver's own error, and neither message nor ``__cause__`` nor
    ``__context__`` carries a digest, a key or a password. :class:`~vtoken.OutcomeUnknown` is for a
    write that may have happened, :class:`~vtoken.BackendUnavailable` for one that did not.
    Ordinary contention waits and raises nothing: what the store refuses because another call was quicker (a
    lock, a deadlock, a failed serialization), the backend tries again. No call waits for ever: after a time
    limit of the backend's own, a store that does not answer is an error.

    A write that has returned is durable. A cancelled call raises the cancellation; its step has
    then happened wholly or not at all, and no lock or transaction is left behind.
    """

    @classmethod
    def from_url(cls, url: str, **options: object) -> Self:
        """Make a backend, not yet open, from a configuration URL. Does no input or output.

        Raises:
            ConfigurationError: the URL or an option is not understood; a password in the URL is
                never repeated.
        """
        ...

    async def open(self) -> None:
        """Connect, and make or check what the store needs (tables, indexes).

        May be called several times; each call is paired with one :meth:`close`, and only the first
        connects. A store that is damaged or foreign (:class:`~vtoken.CorruptStore`) or of a newer schema
        (:class:`~vtoken.BackendError` itself) is refused untouched.
        """
        ...

    async def close(self) -> None:
        """Undo one :meth:`open`; the last one disconnects. Without an open one it does nothing.
        Cancellation does not leave it half done."""
        ...

    async def insert(self, token: StoredToken, mode: InsertMode, keep_until: int = 0) -> InsertResult:
        """Store a new token, all or nothing.

        When a ``REPLACE`` has returned, no earlier token of the same content type, object id
        and slug is active; of N concurrent ones exactly one token stays active. Of N concurrent
        ``IF_NONE_VALID`` exactly one inserts. On a store without multi-document transactions a crash
        half-way may leave no active token, never two.

        Args:
            token: the record, to be stored in all its fields.
            mode: see :class:`InsertMode`. Deactivated tokens end as by :meth:`deactivate` at
                ``token.created_at``.
            keep_until: with ``REPLACE`` only. When later than ``token.created_at``, the old tokens are not
                deactivated: their ``expires_at`` and ``ends_at`` become the earlier of what they are and
                ``keep_until``, and they and the new one stand in one *overlap* (see :class:`Use`). A
                token stands in one at most, the latest; an inactive one in none. A use at the same time comes
                before the insert, and ends its token first, or after it, and ends the new one as well.
        """
        ...

    async def find(self, match: Match, limit: int, after: tuple[int, str] | None = None) -> list[StoredToken]:
        """The matching tokens, newest first: by ``created_at``, then ``id``, both descending.

        Args:
            match: the condition.
            limit: at most so many, 1 or more.
            after: ``(created_at, id)`` of the last token of the page before; only what sorts after
                it is returned.
        """
        ...

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        """Change exactly one matching token, by compare-and-set, and return it as it is after the change.

        Of N concurrent updates whose change makes the match untrue, exactly one gets the token.
        ``match`` names the token by ``id`` or by ``digests``; where several have one of these digests,
        any of them is changed. ``None``: no token matched, nothing changed.
        """
        ...

    async def deactivate(self, match: Match, at: int) -> int:
        """Make every matching active token inactive: ``is_active = False``,
        ``ends_at = min(ends_at, at - 1)``, nothing else. Returns how many it changed."""
        ...

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> int:
        """Delete at most ``limit`` tokens with ``ends_at < before and lease_until <= now``, the
        longest ended first, and return how many: fewer than ``limit`` only where no more are left. What
        another call holds at that moment is waited for and looked at again, not left out.
        Then forget at most ``limit`` budgets with ``until <= budgets_before``, which are not counted.
        Each of the two may be several atomic steps; of one that is cut short, some have happened."""
        ...

    async def count(self, now: int) -> list[SlugCount]:
        """The number of tokens by slug, in any order; a slug without tokens is left out."""
        ...

    async def spend(self, budget: Budget, now: int, limit: int, window: int, max_window: int) -> Spent:
        """Take one from a budget, in a committed write, if one is left.

        A budget has ``spent``, ``strikes`` and ``until``. In one atomic step:

        1. There is none, or ``until + max_window <= now``: it begins with ``spent = 1, strikes = 0``
           and ``until = now + window``. Allowed.
        2. ``spent == 0``: ``spent = 1``, ``until = now + min(window * 2**strikes, max_window)``. Allowed.
        3. ``until <= now``: ``strikes`` becomes ``strikes + 1`` if ``spent >= limit``, else 0; then as in 2.
        4. ``spent < limit``: ``spent + 1``. Allowed.
        5. Otherwise nothing changes. Not allowed.

        Of N concurrent calls in one window at most ``limit`` are allowed.
        ``strikes`` need not grow past 20. ``window * 2**strikes`` may be past 64 bits; ``until`` is not.

        Args:
            budget: its name.
            now: the time.
            limit: how many a window holds, 1 or more.
            window: milliseconds, 1 or more; a cooldown may be as long as ``datetime.timedelta.max``.
            max_window: milliseconds, ``window`` or more.
        """
        ...

    async def refund(self, budget: Budget, until: int) -> None:
        """Give one back (``spent - 1``) to the window that ends at ``until``, if it is still the
        running one and ``spent > 0``."""
        ...

    async def reset(self, budget: Budget) -> None:
        """Forget the budget."""
        ...
