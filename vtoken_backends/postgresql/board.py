"""What an operation does, played on the records that were loaded for it.

1. Every operation of a batch says what it has to see (:class:`Needs`).
2. That is loaded, in one statement, onto a :class:`Board`.
3. The operations are played on the board one after the other, as the functions of :mod:`vtoken.backend` say.
4. What has changed is written, under the condition that the rows are still those that were loaded.

Where an operation turns out to need more than it said, it raises :class:`Missing`; all are then played again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple, Protocol

from vtoken.backend import (
    REMEMBERED_USES,
    Budget,
    BudgetState,
    Change,
    Charge,
    Hold,
    Inserted,
    InsertMode,
    InsertResult,
    Match,
    Outcome,
    Presented,
    Spend,
    Spending,
    State,
    StoredKey,
    StoredToken,
    Use,
    UseHeld,
    budget_step,
    changed,
    ended,
    ends_other_context,
    full_spending,
    is_superseded,
    key_of,
    least_left,
    left_of,
    matches,
    overlapping_keys,
    refusal,
    replaced,
    satisfies,
    with_hold,
    with_use,
    without_keys,
)


class Purpose(NamedTuple):
    """What the contexts of an object and slug have in common."""

    content_type: str
    object_id: str
    slug: str


class Line(NamedTuple):
    content_type: str
    object_id: str
    slug: str
    context: bytes


class Asked(NamedTuple):
    """A key that is presented with the id of a use, which may have been counted before."""

    digest: bytes
    use_id: str

    def __repr__(self) -> str:
        return "<Asked>"


class Receipt(NamedTuple):
    """A use that is remembered."""

    token: str
    origin: str
    use_id: str
    at: int


class LoadedBudget(NamedTuple):
    state: BudgetState
    version: str


class Needs:
    """What operations have to see: all tokens that one of the following names, and budgets."""

    __slots__ = ("budgets", "digests", "ids", "lines", "purposes", "uses")

    def __init__(self) -> None:
        self.digests: set[bytes] = set()
        self.ids: set[str] = set()
        self.lines: set[Line] = set()
        self.purposes: set[Purpose] = set()
        self.uses: set[Asked] = set()
        self.budgets: set[Budget] = set()

    def add_spends(self, spends: Iterable[Spend]) -> None:
        self.budgets.update([spend.budget for spend in spends])

    def __bool__(self) -> bool:
        return bool(self.digests or self.ids or self.lines or self.purposes or self.uses or self.budgets)

    def __repr__(self) -> str:
        return "<Needs>"


class Missing(Exception):
    """An operation needs the active tokens of a purpose, which it could not know before it saw its token."""

    def __init__(self, purpose: Purpose) -> None:
        super().__init__()
        self.purpose = purpose


class Board:
    """Loaded records, and what becomes of them. Changes nothing that was handed to it."""

    def __init__(self, purposes: Iterable[Purpose] = ()) -> None:
        self.tokens: dict[str, StoredToken] = {}
        self.tokens_before: dict[str, StoredToken] = {}
        self.versions: dict[str, str] = {}
        self.budgets: dict[Budget, BudgetState | None] = {}
        self.budgets_before: dict[Budget, LoadedBudget] = {}
        self.receipts: dict[tuple[str, str], Receipt] = {}
        self.new_receipts: list[Receipt] = []
        self.added: set[str] = set()
        """New tokens that leave the others of their line as they are."""
        self.full_of_receipts: set[str] = set()
        """Tokens of whose receipts the oldest are to be forgotten."""
        self._owners: dict[bytes, str] = {}
        self._of_purpose: dict[Purpose, set[str]] = {}
        self._purposes = frozenset(purposes)

    def __repr__(self) -> str:
        return "<Board>"

    def load(self, token: StoredToken, version: str) -> None:
        self.tokens_before[token.id] = token
        self.versions[token.id] = version
        self.save(token)

    def load_budget(self, budget: Budget, state: BudgetState, version: str) -> None:
        self.budgets_before[budget] = LoadedBudget(state=state, version=version)
        self.budgets[budget] = state

    def load_receipt(self, receipt: Receipt) -> None:
        # One use id may have been counted both by the key's own token and by the one that took the key over.
        known = self.receipts.get((receipt.origin, receipt.use_id))
        if known is None or receipt.at < known.at:
            self.receipts[receipt.origin, receipt.use_id] = receipt

    def save(self, token: StoredToken) -> None:
        """Note a new token, or what has become of one."""
        old = self.tokens.get(token.id)
        self.tokens[token.id] = token
        if old is None or old.keys is not token.keys:
            for key in old.keys if old is not None else ():
                if self._owners.get(key.digest) == token.id:
                    del self._owners[key.digest]
            for key in token.keys:
                self._owners[key.digest] = token.id
        if old is None:
            self._of_purpose.setdefault(purpose_of(token), set()).add(token.id)

    @property
    def has_changed(self) -> bool:
        """Whether a token is not as it was loaded."""
        return any(self.tokens[token_id] is not before for token_id, before in self.tokens_before.items())

    def matching(self, match: Match) -> list[StoredToken]:
        """The loaded tokens that match, by ``digests`` or ``id``."""
        if match.digests is not None:
            found = self.owners(match.digests)
        else:
            token = self.tokens.get(match.id or "")
            found = [] if token is None else [token]
        return [token for token in found if matches(token, match)]

    def owners(self, digests: Iterable[bytes]) -> list[StoredToken]:
        """The tokens that have keys with these digests, each once, in the order of the digests."""
        ids = dict.fromkeys(self._owners[digest] for digest in digests if digest in self._owners)
        return [self.tokens[token_id] for token_id in ids]

    def active_line(self, token: StoredToken) -> list[StoredToken]:
        """The active tokens with the same content type, object id, slug and context."""
        others = self._of_purpose.get(purpose_of(token), ())
        found = [self.tokens[other] for other in others]
        return [other for other in found if other.is_active and other.context == token.context]

    def used(self, token: StoredToken, origin: str, change: Use | UseHeld) -> None:
        """What a use does beside the record of its token."""
        if change.use_id and (origin, change.use_id) not in self.receipts:
            receipt = Receipt(token=token.id, origin=origin, use_id=change.use_id, at=change.at)
            self.receipts[origin, change.use_id] = receipt
            self.new_receipts.append(receipt)
            if token.uses % REMEMBERED_USES == 0:
                self.full_of_receipts.add(token.id)
        for budget in change.resets:
            self.budgets[budget] = None
        purpose = purpose_of(token)
        if not token.context or token.is_beside or token.state is not State.USED:
            return
        if purpose not in self._purposes:
            raise Missing(purpose)
        for other in [self.tokens[token_id] for token_id in self._of_purpose[purpose]]:
            if ends_other_context(token, other):
                self.save(ended(other, change.at))

    # Budgets

    def full(self, spends: tuple[Spend, ...], now: int) -> Spending | None:
        """The refusal if one of the spends is not allowed."""
        return full_spending([self.budgets.get(spend.budget) for spend in spends], spends, now)

    def left(self, spends: tuple[Spend, ...], now: int) -> Spending:
        """What is left where nothing was charged."""
        return Spending(
            left=least_left(left_of(self.budgets.get(spend.budget), spend, now) for spend in spends)
        )

    def spend(self, spends: tuple[Spend, ...], now: int) -> Spending:
        """Charge all of them, or none."""
        full = self.full(spends, now) if spends else None
        if full is not None:
            return full
        charges: list[Charge] = []
        lefts: list[int] = []
        for spend in spends:
            state = budget_step(self.budgets.get(spend.budget), spend, now)
            if state is not None:  # a budget that is named twice may be full now
                self.budgets[spend.budget] = state
                charges.append(Charge(budget=spend.budget, until=state.until))
                lefts.append(max(spend.limit - state.spent, 0))
        return Spending(charges=tuple(charges), left=least_left(lefts))


def purpose_of(token: StoredToken) -> Purpose:
    return Purpose(content_type=token.content_type, object_id=token.object_id, slug=token.slug)


def line_of(token: StoredToken) -> Line:
    return Line(
        content_type=token.content_type,
        object_id=token.object_id,
        slug=token.slug,
        context=token.context,
    )


# The operations -----------------------------------------------------------------------------------


class Operation(Protocol):
    """A call that can share a batch with others."""

    def ask(self, needs: Needs) -> None:
        """Say what it has to see."""
        ...

    def play(self, board: Board) -> object:
        """Carry it out on the board, and return the answer of its caller."""
        ...


class Insert:
    __slots__ = ("also_taken", "is_plain", "keep_until", "mode", "spends", "token", "wanted_until")

    def __init__(
        self,
        token: StoredToken,
        mode: InsertMode,
        keep_until: int,
        wanted_until: int,
        also_taken: tuple[bytes, ...],
        spends: tuple[Spend, ...],
    ) -> None:
        self.token: Final = token
        self.mode: Final = mode
        self.keep_until: Final = keep_until
        self.wanted_until: Final = wanted_until
        self.also_taken: Final = also_taken
        self.spends: Final = spends
        self.is_plain: Final = (
            mode is InsertMode.REPLACE
            and keep_until <= token.created_at
            and not also_taken
            and not spends
            and token.is_active
            and all(key.origin == token.id for key in token.keys)
        )
        """Whether it may be done without a board, if nothing is in its way."""

    def ask(self, needs: Needs) -> None:
        token = self.token
        needs.digests.update([key.digest for key in token.keys], self.also_taken)
        needs.ids.add(token.id)
        if self.mode is not InsertMode.ADD:
            needs.lines.add(line_of(token))
        needs.add_spends(self.spends)

    def play(self, board: Board) -> Inserted:
        token = self.token
        line = [] if self.mode is InsertMode.ADD else board.active_line(token)
        digests = (*(key.digest for key in token.keys), *self.also_taken)
        owners = board.owners(digests)
        for owner in owners:
            if self.mode is InsertMode.ONCE:
                return Inserted(InsertResult.KEY_TAKEN, owner)
            if not is_superseded(owner, digests, token, line):
                return Inserted(InsertResult.KEY_TAKEN)
        if token.id in board.tokens:
            return Inserted(InsertResult.KEY_TAKEN)
        if self.mode is InsertMode.IF_NONE_VALID:
            valid = [other for other in line if satisfies(other, self.wanted_until)]
            if valid:
                return Inserted(InsertResult.HAS_VALID, max(valid, key=lambda other: other.id))
        spending = board.spend(self.spends, token.created_at)
        if spending.full is not None:
            return Inserted(InsertResult.LIMITED, None, spending)
        for owner in owners:
            board.save(without_keys(owner, digests))
        stored = self._replace(board, [board.tokens[other.id] for other in line])
        board.save(stored)
        if self.mode is InsertMode.ADD:
            board.added.add(stored.id)
        return Inserted(InsertResult.INSERTED, stored, spending)

    def _replace(self, board: Board, line: list[StoredToken]) -> StoredToken:
        """Replace the tokens of the line, and return the new one with the keys that it takes over."""
        exclusive = [other for other in line if not other.is_beside]
        taken: tuple[StoredKey, ...] = ()
        if exclusive:
            newest = max(exclusive, key=lambda other: other.id)
            taken = overlapping_keys(newest, self.token, self.keep_until)
        digests = tuple(key.digest for key in taken)
        for other in line:
            other = without_keys(other, digests) if digests else other
            board.save(replaced(other, self.token.created_at))
        return self.token._replace(keys=(*self.token.keys, *taken))


class Present:
    __slots__ = ("change", "is_plain", "key", "now", "spends")

    def __init__(self, key: Match, change: Use | Hold | None, now: int, spends: tuple[Spend, ...]) -> None:
        self.key: Final = key
        self.change: Final = change
        self.now: Final = now
        self.spends: Final = spends
        self.is_plain: Final = (
            isinstance(change, Use)
            and not spends
            and not change.resets
            and len(key.digests or ()) == 1
            and key.id is None
        )
        """Whether it may be done without a board, if its token is one of most."""

    def ask(self, needs: Needs) -> None:
        digests = self.key.digests or ()
        needs.digests.update(digests)
        change = self.change
        if change is not None and change.use_id:
            needs.uses.update([Asked(digest=digest, use_id=change.use_id) for digest in digests])
        if isinstance(change, Use):
            needs.budgets.update(change.resets)
        needs.add_spends(self.spends)

    def play(self, board: Board) -> Presented:
        key, change, now, spends = self.key, self.change, self.now, self.spends
        found = [(token, held) for token in board.matching(key) if (held := key_of(token, key))]
        use_id = "" if change is None else change.use_id
        if use_id:
            for _, held in found:
                use = board.receipts.get((held.origin, use_id))
                if use is not None and use.token in board.tokens:
                    left = board.left(spends, now)
                    return Presented(Outcome.REPLAYED, board.tokens[use.token], use.at, left)
        full = board.full(spends, now) if spends else None
        if full is not None:
            return Presented(Outcome.LIMITED, spending=full)
        is_charged = True
        for token, held in found:
            why = refusal(token, held, now, use_id)
            if why is None:
                after = self._changed(board, token, held)
                return Presented(Outcome.RIGHT, after, spending=board.left(spends, now))
            is_charged = is_charged and why not in ("used", "leased")
        spending = board.spend(spends, now) if is_charged else board.left(spends, now)
        return Presented(Outcome.REFUSED, found[0][0] if found else None, spending=spending)

    def _changed(self, board: Board, token: StoredToken, key: StoredKey) -> StoredToken:
        change = self.change
        if change is None:
            return token
        if isinstance(change, Hold):
            after = with_hold(token, key, change, self.now)
            board.save(after)
            return after
        after = with_use(token, change)
        board.save(after)
        board.used(after, key.origin, change)
        return after


class Update:
    __slots__ = ("change", "match")

    def __init__(self, match: Match, change: Change) -> None:
        self.match: Final = match
        self.change: Final = change

    def ask(self, needs: Needs) -> None:
        if self.match.digests is not None:
            needs.digests.update(self.match.digests)
        elif self.match.id is not None:
            needs.ids.add(self.match.id)
        if isinstance(self.change, UseHeld):
            needs.budgets.update(self.change.resets)

    def play(self, board: Board) -> StoredToken | None:
        for token in board.matching(self.match):
            after = changed(token, self.change)
            if after is None:
                continue
            board.save(after)
            if isinstance(self.change, UseHeld):
                hold = next(hold for hold in token.holds if hold.hold_id == self.change.hold_id)
                board.used(after, hold.origin, self.change)
            return board.tokens[after.id]
        return None


class Find:
    """The tokens that have one of several keys."""

    __slots__ = ("after", "limit", "match")

    def __init__(self, match: Match, limit: int, after: str | None) -> None:
        self.match: Final = match
        self.limit: Final = limit
        self.after: Final = after

    def ask(self, needs: Needs) -> None:
        needs.digests.update(self.match.digests or ())

    def play(self, board: Board) -> list[StoredToken]:
        found = [token for token in board.matching(self.match) if self.after is None or token.id < self.after]
        return sorted(found, key=lambda token: token.id, reverse=True)[: self.limit]


class SpendAll:
    __slots__ = ("now", "spends")

    def __init__(self, spends: tuple[Spend, ...], now: int) -> None:
        self.spends: Final = spends
        self.now: Final = now

    def ask(self, needs: Needs) -> None:
        needs.add_spends(self.spends)

    def play(self, board: Board) -> Spending:
        return board.spend(self.spends, self.now)


class Refund:
    __slots__ = ("charges",)

    def __init__(self, charges: tuple[Charge, ...]) -> None:
        self.charges: Final = charges

    def ask(self, needs: Needs) -> None:
        needs.budgets.update([charge.budget for charge in self.charges])

    def play(self, board: Board) -> None:
        for charge in self.charges:
            state = board.budgets.get(charge.budget)
            if state is not None and state.spent > 0 and state.until == charge.until:
                board.budgets[charge.budget] = state._replace(spent=state.spent - 1)
