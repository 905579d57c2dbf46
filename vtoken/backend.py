"""The storage protocol: its docstrings are the contract, and ``vtoken.testing`` holds a backend to it.

A backend is a dumb, careful store. It holds no policy, reads no clock and never sees a plaintext key (except
``StoredKey.plain_key``, which is filled only under the opt-in ``key_storage="plain"``). Everything that needs
judgement is done by :class:`vtoken.TokenManager`, once, for all backends.

One token is one record. Everything that shares a fate shares that record: a token's link key and code key,
the key that it took over from its predecessor, the holds on its uses.

Times are ``int`` milliseconds since 1970-01-01 UTC. Every integer that arrives, and every one that is stored
or returned, fits into 64 bits, signed; ``max_uses`` and ``uses`` fit into 32. Strings arrive checked: no NUL,
no lone surrogate, at most 512 bytes of UTF-8 (``extra_data``: 16,384 bytes). They are equal if their code
points are, and sort by these.

The pure functions at the end of this module say what becomes of a record. A backend that works on records in
Python calls them; one that works in a query language writes the same rules in that language.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from enum import Enum
from typing import Final, NamedTuple, Protocol, Self, runtime_checkable

from vtoken.errors import Reason

NEVER: Final = 253_402_300_799_999
"""9999-12-31T23:59:59.999Z, the expiry of a token that never expires."""
STALE_HOLD: Final = 2 * 24 * 60 * 60 * 1000
"""A hold that ends later than this many milliseconds from now was stored by a clock that was wrong."""
MAX_STRIKES: Final = 20
"""How far ``strikes`` grows. A day is reached long before, whatever the window."""
REMEMBERED_USES: Final = 1_000
"""At least so many of a token's latest ``use_id`` values are remembered."""
PRETENDED: Final = "vtoken:pretended"
"""The content type of records that stand for a token of somebody who does not exist. They are never
active."""


# Records ------------------------------------------------------------------------------------------


class State(Enum):
    """What has become of a token."""

    ACTIVE = 0
    USED = 1
    """Its last use was counted."""
    ENDED = 2
    """It was deactivated."""
    REPLACED = 3
    """A newer token took its place."""


_ACTIVE: Final = State.ACTIVE
"""A member of an enum costs twice as much as a global name, and this one is asked for in every operation."""
_USED: Final = State.USED


class StoredKey(NamedTuple):
    """One key of a token: what is stored of it, and how long it is good."""

    digest: bytes
    """32 bytes, unique over the whole store."""
    scheme: str
    """How the digest was made: ``"sha256"``, ``"hmac-sha256"`` or ``"code-hmac-sha256"``."""
    secret_id: str
    """Which secret made the digest; ``""`` for none."""
    nonce: str
    """What a derived key is derived from (``key_storage="derived"``), else ``""``."""
    plain_key: str
    """The plaintext key under ``key_storage="plain"``, else ``""``."""
    kind: str
    """``"link"`` or ``"code"``."""
    expires_at: int
    """The last millisecond at which this key is good, no later than the token it came with."""
    origin: str
    """The ``id`` of the token that it was issued with: another one than its record's where it was taken
    over."""

    def __repr__(self) -> str:
        return f"<StoredKey {self.kind}>"


class StoredHold(NamedTuple):
    """A use of a token that somebody is about to make."""

    hold_id: str
    until: int
    """The hold runs while ``now < until``, unless ``until`` is stale (:data:`STALE_HOLD`)."""
    use_id: str
    """The one that its use will have, or ``""``."""
    origin: str
    """The ``origin`` of the key that was presented for it."""

    def __repr__(self) -> str:
        return "<StoredHold>"


class StoredToken(NamedTuple):
    """A token as it is stored: immutable, so that a backend may hand out its own record.

    Build, read and change it by field name only: a field may be inserted anywhere.
    """

    id: str
    """Unique: 16 hexadecimal digits below 2**63, in the order of creation within a manager."""
    content_type: str
    object_id: str
    slug: str
    """``""`` for a token without a slug (a real slug is never empty)."""
    context: bytes
    """Digest of the caller's context (a browser's cookie, say), ``b""`` for none."""
    is_beside: bool
    """It was added beside other tokens (:attr:`InsertMode.ADD`) and did not replace them."""
    created_at: int
    expires_at: int
    """The last millisecond at which the token is valid; :data:`NEVER` for no expiry."""
    ends_at: int
    """``expires_at`` while active; afterwards the last millisecond before it ended, if that is earlier. Purge
    goes by it alone."""
    state: State
    extra_data: str | None
    """JSON text, stored and returned to the letter."""
    max_uses: int | None
    """None for no bound."""
    uses: int
    used_at: int
    """Time of the latest use, 0 for never."""
    keys: tuple[StoredKey, ...]
    """Its own keys first, then those that it took over. Empty where all were taken over or superseded."""
    holds: tuple[StoredHold, ...]
    """Oldest first. Those that have run out may still be among them."""

    @property
    def is_active(self) -> bool:
        """Whether it was neither used up, deactivated nor replaced."""
        return self.state is State.ACTIVE

    def __repr__(self) -> str:
        return f"<StoredToken {self.id}>"


class Match(NamedTuple):
    """A closed condition: every field that is given must hold, compared by value and type.

    ``Match()`` alone matches every token.
    """

    id: str | None = None
    """Any text: what is no token's id, to the letter, matches nothing."""
    digests: tuple[bytes, ...] | None = None
    """One of the token's keys has one of these digests. ``kind`` and ``valid_at`` are then tested on that
    key."""
    kind: str | None = None
    """The kind of the key that has the digest; without ``digests`` it says nothing."""
    content_type: str | None = None
    object_id: str | None = None
    slug: str | None = None
    """``None``: any slug. ``""``: tokens without one."""
    context: bytes | None = None
    active: bool = False
    """``True``: only tokens whose state is ACTIVE."""
    valid_at: int | None = None
    """The token is active and ``expires_at >= valid_at``, whether or not its uses are held; with ``digests``
    the key's ``expires_at >= valid_at``, too."""

    def __repr__(self) -> str:
        given = [name for name, value in self._asdict().items() if value is not None and value is not False]
        return f"<Match {' '.join(given)}>"


# Changes ------------------------------------------------------------------------------------------


class Use(NamedTuple):
    """Count one use, by whoever presents a key: ``uses + 1``, ``used_at = at``.

    When ``uses`` reaches ``max_uses``, the state becomes USED and ``ends_at = min(ends_at, at - 1)``. If the
    token is bound to a context and not ``is_beside``, the same step ends, as by
    :meth:`TokenBackend.deactivate`, the active tokens of the same content type, object id and slug that have
    another context, are not ``is_beside`` and were created before it (by ``id``).

    A ``use_id`` that is not ``""`` is remembered for the ``origin`` of the presented key, with the token and
    ``at``. The budgets in ``resets`` are forgotten in the same step.
    """

    at: int
    use_id: str = ""
    resets: tuple[Budget, ...] = ()


class Hold(NamedTuple):
    """Take a hold on one use until ``until``, by whoever presents a key. Holds that have run out at the time
    of the call are dropped. ``use_id`` is the one that the use will have. It is stored with the hold and not
    yet remembered: while the hold runs, the same use is refused (:func:`holds_in_the_way`)."""

    hold_id: str
    until: int
    use_id: str = ""


class UseHeld(NamedTuple):
    """Count the use that a hold stands for, and drop the hold: as :class:`Use` otherwise.

    The token matches only while the hold is there and runs at ``at``, whatever the token's state and expiry:
    a token that was replaced, or deactivated with this hold spared, is still used once. A state that is not
    ACTIVE becomes USED only when ``uses`` reaches ``max_uses``; ``ends_at`` never grows. A token whose uses
    are up does not match: a host whose clock is ahead may have used it after the hold ran out there.
    """

    hold_id: str
    at: int
    use_id: str = ""
    resets: tuple[Budget, ...] = ()


class Release(NamedTuple):
    """Drop a hold and change nothing else. The token matches only if the hold is there, run out or not."""

    hold_id: str


class SetExtraData(NamedTuple):
    """Set ``extra_data`` and nothing else."""

    extra_data: str | None


class ForgetKey(NamedTuple):
    """Clear ``plain_key`` of all keys and nothing else."""


Change = UseHeld | Release | SetExtraData | ForgetKey


# Budgets ------------------------------------------------------------------------------------------


class Budget(NamedTuple):
    """The name of a budget: something that may happen so often in a window of time."""

    object: bytes
    """16 bytes that stand for the object it belongs to; 16 zero bytes where it belongs to none."""
    name: bytes
    """16 bytes that stand for everything else."""

    def __repr__(self) -> str:
        return "<Budget>"


class Spend(NamedTuple):
    """One to be taken from a budget."""

    budget: Budget
    limit: int
    """How many a window holds, 1 or more."""
    window: int
    """Milliseconds, 1 or more, at most 366 days."""
    max_window: int
    """Milliseconds: how far an exhausted window grows, ``window`` or more, at most 366 days."""


class BudgetState(NamedTuple):
    """What is stored of a budget."""

    spent: int
    strikes: int
    """How many windows in a row were exhausted."""
    until: int
    """When the running window ends."""


class Charge(NamedTuple):
    """One that was taken from a budget, and the end of the window that it was taken from."""

    budget: Budget
    until: int


class Spending(NamedTuple):
    """What became of several :class:`Spend` that go together."""

    charges: tuple[Charge, ...] = ()
    """One for each spend, in their order; empty where none was taken."""
    left: int | None = None
    """The least that any of them has left now; None without spends."""
    full: int | None = None
    """None where all were allowed. Else nothing was taken, and this is the place, among the spends, of the
    one that stays full the longest."""
    until: int = 0
    """When the window of that one ends."""


# Answers ------------------------------------------------------------------------------------------


class InsertMode(Enum):
    """What :meth:`TokenBackend.insert` does about the tokens that are there.

    A *line* is what has the same content type, object id, slug and context.
    """

    ADD = "add"
    """Leave them as they are. The new token is ``is_beside``."""
    REPLACE = "replace"
    """End the active tokens of the line: their state becomes REPLACED and ``ends_at = min(ends_at,
    token.created_at - 1)``; their holds go on. An ``ADD`` at the same time comes before it, and its token is
    replaced, or after it, and both stay active."""
    IF_NONE_VALID = "if-none-valid"
    """Insert only if no token of the line is active, with its ``expires_at`` and that of all of its own keys
    at ``wanted_until`` or later; whether its uses are held doesn't matter. Then replace the active ones."""
    ONCE = "once"
    """Insert, and replace, unless a token with one of the keys is stored, whatever its state."""


class InsertResult(Enum):
    """How an insert ended."""

    INSERTED = "inserted"
    KEY_TAKEN = "key-taken"
    """Another token has one of the digests, or this id; nothing was changed."""
    HAS_VALID = "has-valid"
    """``IF_NONE_VALID`` found a token; nothing was changed. Where a key is taken as well, either answer will
    do."""
    LIMITED = "limited"
    """One of the spends was not allowed; nothing was changed."""


class Inserted(NamedTuple):
    """The answer of :meth:`TokenBackend.insert`."""

    result: InsertResult
    token: StoredToken | None = None
    """INSERTED: the token as it is stored. HAS_VALID: the newest of those found. KEY_TAKEN under ``ONCE``:
    the token that has the key. Else None."""
    spending: Spending = Spending()


class Outcome(Enum):
    """What became of a presented key."""

    RIGHT = "right"
    """It is the key of a token that can be used; the change was made, and nothing was charged."""
    REPLAYED = "replayed"
    """Its ``use_id`` was counted before; nothing was changed and nothing was charged."""
    REFUSED = "refused"
    """It is not; nothing was changed, but all spends were charged (see :meth:`TokenBackend.present`)."""
    LIMITED = "limited"
    """One of the spends is full; nothing was compared, changed or charged."""


class Presented(NamedTuple):
    """The answer of :meth:`TokenBackend.present`."""

    outcome: Outcome
    token: StoredToken | None = None
    """RIGHT: as it is after the change. REPLAYED: the token that was used, as it is now. REFUSED: the token
    that has the key and cannot be used, or None."""
    used_at: int = 0
    """REPLAYED: when that use was counted."""
    spending: Spending = Spending()
    """REFUSED: what was charged. LIMITED: which one was full. RIGHT and REPLAYED: no charges, but
    ``left``."""

    def __repr__(self) -> str:
        return f"<Presented {self.outcome.value}>"


class Purged(NamedTuple):
    """The answer of :meth:`TokenBackend.purge`."""

    tokens: int
    budgets: int


class SlugCount(NamedTuple):
    """How many tokens a slug has. A token counts as one of active, expired, used, or none of them."""

    slug: str
    total: int
    active: int
    """Its state is ACTIVE and ``expires_at >= now``."""
    expired: int
    """Its state is ACTIVE and ``expires_at < now``."""
    used: int
    """Its state is not ACTIVE and ``uses > 0``."""


# The protocol -------------------------------------------------------------------------------------


@runtime_checkable
class TokenBackend(Protocol):
    """What a store must do. One method is one atomic step, unless it says otherwise; all are safe from any
    number of tasks, threads, processes and event loops on the same store.

    One backend object serves the event loop in which it was opened. In any other event loop it may work or
    raise :class:`~vtoken.BackendClosed`. To share a store between loops, open one backend in each.

    Every method but ``from_url``, ``open`` and ``close`` raises :class:`~vtoken.BackendClosed` when the
    backend is not open. Failures of the store are raised as :class:`~vtoken.BackendError` or a subclass,
    never as the driver's own error, and neither message nor ``__cause__`` nor ``__context__`` carries a
    digest, a key or a password. :class:`~vtoken.OutcomeUnknown` is for a write that may have happened,
    :class:`~vtoken.BackendUnavailable` for one that did not. Ordinary contention waits and raises nothing:
    what the store refuses because another call was quicker (a lock, a deadlock, a failed serialization), the
    backend tries again. No call waits for ever: after a time limit of the backend's own, a store that does
    not answer is an error.

    A write that has returned is durable. A cancelled call raises the cancellation; its step has then happened
    wholly or not at all, and no lock or transaction is left behind. No context variable of one caller reaches
    the operation of another.
    """

    @classmethod
    def from_url(cls, url: str, **options: object) -> Self:
        """Make a backend, not yet open, from a configuration URL. Does no input or output.

        Raises:
            ConfigurationError: the URL or an option is not understood; a password in the URL is never
                repeated.
        """
        ...

    async def open(self) -> None:
        """Connect, and make or check what the store needs (tables, indexes).

        May be called several times; each call is paired with one :meth:`close`, and only the first connects.
        A store that is damaged or foreign (:class:`~vtoken.CorruptStore`) or of a newer schema
        (:class:`~vtoken.BackendError` itself) is refused untouched.
        """
        ...

    async def close(self) -> None:
        """Undo one :meth:`open`; the last one disconnects. Without an open one it does nothing. Cancellation
        does not leave it half done."""
        ...

    async def ping(self) -> None:
        """Ask the store itself for an answer, and look whether what :meth:`open` made is still there.

        Raises:
            BackendError: as every method.
        """
        ...

    async def note(self, name: str, text: str, *, replace: bool = False) -> str:
        """Write down a short text under a name, beside the store's schema, and return what stands there now.

        A note that is there already stays as it is unless ``replace`` is true. Of concurrent first notes
        under one name, one wins and all callers get it. Notes are never purged.

        Args:
            name: 1 to 255 bytes.
            text: 0 to 1,024 bytes. ``""`` reads: it leaves no note where there is none.
        """
        ...

    def within(self, handle: object) -> TokenBackend:
        """The same store through a transaction of the application's own: a backend whose methods run on
        ``handle`` and nowhere else, and commit nothing. There is one exception, for stores that have more
        than one writer: what :meth:`insert` takes from budgets that belong to no object is charged apart,
        after the object's own, because one slow transaction must not lock a budget that everybody shares.

        Raises:
            InvalidInput: this backend has no such thing, the handle is of another kind or another store, or
                no transaction is under way on it.
        """
        ...

    async def insert(
        self,
        token: StoredToken,
        mode: InsertMode,
        *,
        keep_until: int = 0,
        wanted_until: int = 0,
        also_taken: tuple[bytes, ...] = (),
        spends: tuple[Spend, ...] = (),
    ) -> Inserted:
        """Store a new token, all or nothing.

        In one step: look whether a key is taken, whether ``IF_NONE_VALID`` finds a token, then whether each
        spend is allowed; charge all spends, replace the tokens that ``mode`` says, and store the token. A
        backend whose store cannot charge in the same step charges first, and refunds what it charged where
        nothing was inserted; a crash or a cancellation in between leaves the charge. Nobody is LIMITED by
        what is charged only to be given back: a spend that such charges fill is waited for, and if they stay
        for seconds, ``until`` is soon.

        When a ``REPLACE`` has returned, no earlier token of the line is active; of N concurrent ones exactly
        one token stays active. Of N concurrent ``IF_NONE_VALID`` exactly one inserts. On a store without
        multi-document transactions a crash half-way may leave no active token, never two.

        A digest is taken if another token has a key with it, or with one of ``also_taken``. One exception:
        under every mode but ``ONCE``, a key of the kind ``"code"`` is superseded, that is the older token
        loses it, if that token has the same content type, object id and slug, and is not active, is expired
        at ``token.created_at``, or is replaced by this very insert.

        Args:
            token: the record, to be stored in all its fields. Its ``state`` need not be ACTIVE; ``REPLACE``
                is done all the same.
            mode: see :class:`InsertMode`.
            keep_until: later than ``token.created_at`` asks for an *overlap*, unless ``mode`` is ``ADD``: of
                the tokens that are replaced, the newest that is not ``is_beside`` gives those of its own keys
                (``origin`` is its id) that are not expired at ``token.created_at`` to the new token, which
                keeps them until the earlier of ``keep_until`` and their ``expires_at``. It does so only if it
                is not expired, no hold on it runs and its ``extra_data`` is the same text. Keys that it had
                taken over itself stay with it and are over.
            wanted_until: for ``IF_NONE_VALID``, ``token.created_at`` or later.
            also_taken: further digests that count as taken: those of the same key under previous secrets.
            spends: what the insert costs.
        """
        ...

    async def present(
        self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...] = ()
    ) -> Presented:
        """Somebody presents a key: compare it, and use the token, hold it, or only look.

        In one step:

        1. ``change`` has a ``use_id`` that is remembered for the ``origin`` of a key that matches: REPLAYED.
        2. A spend is not allowed: LIMITED, whatever the key.
        3. A token matches, and :func:`refusal` finds nothing against it, given the ``use_id`` of ``change``:
           the change is made, RIGHT.
        4. Otherwise REFUSED. All spends are charged, unless a token matches and :func:`refusal` says
           ``"used"`` or ``"leased"``: a right key that came too late or too early is no wrong key.

        A right key is never LIMITED because of other right keys that are presented at the same moment, nor by
        what is charged to wrong ones only to be given back. A backend whose store cannot do this in one step
        looks first, and tells nobody what it has found before the spends have been charged or, for a right
        key, allowed. Right and wrong keys queue up for that alike, so that of N keys at once no more are
        answered than the limit has room for.

        Of N concurrent uses of a token, as many are RIGHT as it has uses that are neither used nor held.

        Args:
            key: names ``digests``, and neither ``active`` nor ``valid_at``.
            change: None to look only.
            now: the time.
            spends: what a wrong key costs.
        """
        ...

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        """Change exactly one matching token, by compare-and-set, and return it as it is after the change.

        ``match`` names the token by ``id`` or by ``digests``. ``None``: no token matched, nothing changed.
        """
        ...

    async def find(self, match: Match, limit: int, after: str | None = None) -> list[StoredToken]:
        """The matching tokens, newest first: by ``id``, descending.

        Args:
            match: the condition.
            limit: at most so many, 1 or more.
            after: the ``id`` of the last token of the page before; only what sorts after it is returned.
        """
        ...

    async def deactivate(self, match: Match, at: int, sparing: tuple[str, ...] = ()) -> int:
        """End every matching token that is active: its state becomes ENDED, ``ends_at = min(ends_at, at -
        1)``. Returns how many it ended.

        Holds on matching tokens, active or not, are dropped, except those whose ``hold_id`` is in
        ``sparing``.

        Where ``match`` names ``digests`` and the key was taken over (``origin`` is not the token's id), only
        the key ends: its ``expires_at`` becomes 0, so that no clock that is behind finds it good again. That
        counts as one if the token is active and the key was not over at ``at``.
        """
        ...

    async def erase(self, content_type: str, object_id: str, budgets_of: bytes) -> int:
        """Delete every token of an object, what is remembered of their uses, and the budgets whose ``object``
        is ``budgets_of``. Returns how many tokens. It may be several atomic steps."""
        ...

    async def purge(self, before: int, now: int, limit: int, budgets_before: int) -> Purged:
        """Delete at most ``limit`` tokens with ``ends_at < before`` on which no hold runs at ``now``, the
        longest ended first, with what is remembered of their uses. What another call holds at that moment is
        waited for and looked at again, not left out. Then forget at most ``limit`` budgets with ``until <=
        budgets_before``. Returns how many of each: fewer than ``limit`` only where no more are left.

        It may be several atomic steps; of a call that is cut short, some have happened."""
        ...

    async def count(self, now: int) -> list[SlugCount]:
        """The number of tokens by slug, in any order. Slugs without tokens and records of the content type
        :data:`PRETENDED` are left out."""
        ...

    async def spend(self, spends: tuple[Spend, ...], now: int) -> Spending:
        """Take one from each of several budgets, in a committed write, or none from any (see
        :func:`budget_step`). Of N concurrent calls in one window of a budget at most ``limit`` are allowed.

        On a store without multi-document transactions a crash half-way may leave some of them taken.
        """
        ...

    async def refund(self, charges: tuple[Charge, ...]) -> None:
        """Give back what :meth:`spend` or :meth:`insert` took: ``spent - 1`` for each charge whose ``until``
        is still the one stored and whose budget has ``spent > 0``. It may be one step for each charge."""
        ...

    async def budgets(self, names: tuple[Budget, ...]) -> list[BudgetState | None]:
        """What is stored of several budgets, in their order; None for one that is not. Writes nothing."""
        ...

    async def reset(self, budgets_of: bytes, names: tuple[bytes, ...] | None) -> int:
        """Forget budgets whose ``object`` is ``budgets_of``: those with these names, or all of them for None.
        Returns how many."""
        ...


# What becomes of a record -------------------------------------------------------------------------


def key_of(token: StoredToken, match: Match) -> StoredKey | None:
    """The key of a token that a match with ``digests`` is about, or None."""
    digests = match.digests or ()
    for key in token.keys:
        if (
            key.digest in digests
            and (match.kind is None or key.kind == match.kind)
            and (match.valid_at is None or key.expires_at >= match.valid_at)
        ):
            return key
    return None


def matches(token: StoredToken, match: Match) -> bool:
    """Whether every field of the match that is given holds for the token."""
    return _fits(token, match) and (match.digests is None or key_of(token, match) is not None)


def matching_key(token: StoredToken, match: Match) -> StoredKey | None:
    """The key by which a token matches a match with ``digests``, or None where it does not."""
    return key_of(token, match) if _fits(token, match) else None


def _fits(token: StoredToken, match: Match) -> bool:
    """Whether all fields hold but those that are about a key."""
    return (
        (match.id is None or token.id == match.id)
        and (match.content_type is None or token.content_type == match.content_type)
        and (match.object_id is None or token.object_id == match.object_id)
        and (match.slug is None or token.slug == match.slug)
        and (match.context is None or token.context == match.context)
        and (not match.active or token.state is _ACTIVE)
        and (match.valid_at is None or is_valid(token, match.valid_at))
    )


def is_valid(token: StoredToken, now: int) -> bool:
    """Whether a token is active and not expired, held or not."""
    return token.state is _ACTIVE and token.expires_at >= now


def runs(hold: StoredHold, now: int) -> bool:
    """Whether a hold counts at a time: it has not run out and is not stale."""
    return now < hold.until <= now + STALE_HOLD


def running_holds(token: StoredToken, now: int) -> tuple[StoredHold, ...]:
    """The holds on a token that count at a time."""
    return tuple(hold for hold in token.holds if runs(hold, now)) if token.holds else ()


def has_free_use(token: StoredToken, now: int) -> bool:
    """Whether a token has a use that is neither used nor held."""
    if token.max_uses is None:
        return True
    held = len(running_holds(token, now)) if token.holds else 0
    return token.uses + held < token.max_uses


def holds_in_the_way(
    token: StoredToken, key: StoredKey | None, now: int, use_id: str = ""
) -> tuple[StoredHold, ...]:
    """The holds for whose end a right key has to wait: that of the very same use, which must not be counted
    twice, else all that run where no use is free."""
    running = running_holds(token, now)
    if use_id and key is not None:
        same = tuple(hold for hold in running if hold.use_id == use_id and hold.origin == key.origin)
        if same:
            return same
    return () if has_free_use(token, now) else running


def refusal(token: StoredToken, key: StoredKey | None, now: int, use_id: str = "") -> Reason | None:
    """Why a token cannot be used now by one of its keys, or None if it can. Without a key: by any. With a
    ``use_id``: for that use."""
    if token.state is not _ACTIVE:
        return "used" if token.state is _USED else "inactive"
    if token.expires_at < now or (key is not None and key.expires_at < now):
        return "expired"
    if not token.holds:  # the usual token
        return None if token.max_uses is None or token.uses < token.max_uses else "leased"
    return "leased" if holds_in_the_way(token, key, now, use_id) else None


_USES, _USED_AT, _STATE, _ENDS_AT = map(StoredToken._fields.index, ("uses", "used_at", "state", "ends_at"))


def with_use(token: StoredToken, change: Use | UseHeld) -> StoredToken:
    """A token after a use that was found to be allowed."""
    if isinstance(change, UseHeld):
        token = token._replace(holds=tuple(hold for hold in token.holds if hold.hold_id != change.hold_id))
    uses, at = token.uses + 1, change.at
    if token.max_uses is None or uses < token.max_uses:
        return token._replace(uses=uses, used_at=at)
    ends_at = token.ends_at if token.ends_at < at else at - 1
    values = list(token)  # as token._replace(...) at half its cost, because most uses are a token's last
    values[_USES], values[_USED_AT], values[_STATE], values[_ENDS_AT] = uses, at, _USED, ends_at
    return tuple.__new__(StoredToken, values)


def with_hold(token: StoredToken, key: StoredKey, change: Hold, now: int) -> StoredToken:
    """A token after a hold that was found to be allowed."""
    hold = StoredHold(hold_id=change.hold_id, until=change.until, use_id=change.use_id, origin=key.origin)
    return token._replace(holds=(*running_holds(token, now), hold))


def changed(token: StoredToken, change: Change) -> StoredToken | None:
    """A token after a change of :meth:`TokenBackend.update`, or None where it does not match."""
    match change:
        case UseHeld(hold_id=hold_id, at=at):
            is_left = token.max_uses is None or token.uses < token.max_uses
            if is_left and any(hold.hold_id == hold_id and runs(hold, at) for hold in token.holds):
                return with_use(token, change)
            return None
        case Release(hold_id=hold_id):
            left = tuple(hold for hold in token.holds if hold.hold_id != hold_id)
            return token._replace(holds=left) if len(left) < len(token.holds) else None
        case SetExtraData(extra_data=extra_data):
            return token._replace(extra_data=extra_data)
        case ForgetKey():
            return token._replace(keys=tuple(key._replace(plain_key="") for key in token.keys))


def ended(token: StoredToken, at: int, sparing: tuple[str, ...] = ()) -> StoredToken:
    """A token after :meth:`TokenBackend.deactivate`."""
    left = tuple(hold for hold in token.holds if hold.hold_id in sparing) if token.holds else ()
    if not token.is_active:
        return token._replace(holds=left)
    return token._replace(state=State.ENDED, ends_at=min(token.ends_at, at - 1), holds=left)


def key_ended(token: StoredToken, key: StoredKey) -> StoredToken:
    """A token after :meth:`TokenBackend.deactivate` by a key that it had taken over."""
    over = key._replace(expires_at=0)
    return token._replace(keys=tuple(over if other is key else other for other in token.keys))


def replaced(token: StoredToken, at: int) -> StoredToken:
    """An active token after a newer one took its place."""
    return token._replace(state=State.REPLACED, ends_at=min(token.ends_at, at - 1))


def overlapping_keys(predecessor: StoredToken, new: StoredToken, keep_until: int) -> tuple[StoredKey, ...]:
    """The keys that a new token takes over from the one that it replaces (see
    :meth:`TokenBackend.insert`)."""
    now = new.created_at
    if (
        keep_until <= now
        or predecessor.is_beside
        or not is_valid(predecessor, now)
        or predecessor.extra_data != new.extra_data
        or running_holds(predecessor, now)
    ):
        return ()
    return tuple(
        key._replace(expires_at=min(key.expires_at, keep_until))
        for key in predecessor.keys
        if key.origin == predecessor.id and key.expires_at >= now
    )


def is_superseded(
    owner: StoredToken, digests: Collection[bytes], new: StoredToken, line: Collection[StoredToken]
) -> bool:
    """Whether a token that has keys with digests of a new one loses them to it, under every mode but ``ONCE``
    (see :meth:`TokenBackend.insert`). ``line``: the tokens that the insert replaces."""
    return (
        all(key.kind == "code" for key in owner.keys if key.digest in digests)
        and (owner.content_type, owner.object_id, owner.slug) == (new.content_type, new.object_id, new.slug)
        and (not is_valid(owner, new.created_at) or any(other.id == owner.id for other in line))
    )


def without_keys(token: StoredToken, digests: Collection[bytes]) -> StoredToken:
    """A token after it lost the keys with these digests."""
    return token._replace(keys=tuple(key for key in token.keys if key.digest not in digests))


def satisfies(token: StoredToken, wanted_until: int) -> bool:
    """Whether a token is in the way of an ``IF_NONE_VALID`` insert into its line."""
    return is_valid(token, wanted_until) and all(
        key.expires_at >= wanted_until for key in token.keys if key.origin == token.id
    )


def ends_other_context(used: StoredToken, other: StoredToken) -> bool:
    """Whether the use that ended a token ends another one, too (see :class:`Use`)."""
    return (
        used.state is State.USED
        and bool(used.context)
        and not used.is_beside
        and other.is_active
        and not other.is_beside
        and other.context != used.context
        and other.id < used.id
        and (other.content_type, other.object_id, other.slug)
        == (used.content_type, used.object_id, used.slug)
    )


def budget_step(state: BudgetState | None, spend: Spend, now: int) -> BudgetState | None:
    """A budget after one was taken, or None where it is full.

    1. There is none, ``until + max_window <= now``, or ``until > now + 2 * max_window`` (a clock was wrong):
       it begins with ``spent = 1``, ``strikes = 0`` and ``until = now + window``.
    2. ``spent == 0``: ``spent = 1``, ``until = now + min(window * 2**strikes, max_window)``.
    3. ``until <= now``: ``strikes`` becomes ``strikes + 1``, at most :data:`MAX_STRIKES`, if ``spent >=
       limit``, else 0; then as in 2.
    4. ``spent < limit``: ``spent + 1``.
    5. Otherwise it is full.
    """
    if state is None or state.until + spend.max_window <= now or state.until > now + 2 * spend.max_window:
        return BudgetState(spent=1, strikes=0, until=now + spend.window)
    if state.spent and now < state.until:
        return state._replace(spent=state.spent + 1) if state.spent < spend.limit else None
    strikes = state.strikes
    if state.spent:
        strikes = min(strikes + 1, MAX_STRIKES) if state.spent >= spend.limit else 0
    until = now + min(spend.window << strikes, spend.max_window)
    return BudgetState(spent=1, strikes=strikes, until=until)


def left_of(state: BudgetState | None, spend: Spend, now: int) -> int:
    """How many a budget allows now, were it asked for no more than one window."""
    after = budget_step(state, spend, now)
    return 0 if after is None else max(spend.limit - after.spent + 1, 0)


def full_spending(states: Sequence[BudgetState | None], spends: Sequence[Spend], now: int) -> Spending | None:
    """The answer that names the spend that stays full the longest, or None where all are allowed."""
    full = [
        (state.until, place)
        for place, (state, spend) in enumerate(zip(states, spends, strict=True))
        if state is not None and budget_step(state, spend, now) is None
    ]
    if not full:
        return None
    until, place = max(full)
    return Spending(left=0, full=place, until=until)


def least_left(lefts: Iterable[int]) -> int | None:
    """``Spending.left`` of what each spend has left; None without spends."""
    return min(lefts, default=None)
