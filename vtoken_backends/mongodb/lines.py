"""What becomes of documents by each operation. No input or output here.

Documents are read *light* first, without their tombstones, because most operations need none. An operation
that needs more answers :class:`Unread`, and is decided again on whole documents. One that needs another write
before its own answers with that :class:`Step`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

from vtoken.backend import (
    Change,
    Hold,
    Inserted,
    InsertMode,
    InsertResult,
    Match,
    Outcome,
    Presented,
    State,
    StoredKey,
    StoredToken,
    Use,
    UseHeld,
    changed,
    is_superseded,
    key_of,
    matches,
    overlapping_keys,
    refusal,
    replaced,
    running_holds,
    satisfies,
    with_hold,
    with_use,
    without_keys,
)
from vtoken_backends.mongodb.documents import (
    MOST_FORMER,
    Kept,
    Stored,
    id_name,
    line_of,
    names_of,
    new_id,
    reserved_names,
    shared_of,
)

# Operations ---------------------------------------------------------------------------------------


class Insert(NamedTuple):
    """``TokenBackend.insert`` without its spends."""

    token: StoredToken
    mode: InsertMode
    keep_until: int
    wanted_until: int
    also_taken: tuple[bytes, ...]
    line: bytes
    names: tuple[object, ...]
    """Of the token."""
    is_begun: bool = False
    """It was pending, and somebody else may have gone on with it."""
    is_anothers: bool = False
    """Go on with it if it is pending, and do nothing otherwise."""

    def __repr__(self) -> str:
        return f"<Insert {self.token.id}>"

    @classmethod
    def of(
        cls,
        token: StoredToken,
        mode: InsertMode,
        keep_until: int,
        wanted_until: int,
        also_taken: tuple[bytes, ...],
    ) -> Insert:
        line = line_of(token.content_type, token.object_id, token.slug, token.context)
        names = tuple(names_of([token]))
        return cls(token, mode, keep_until, wanted_until, also_taken, line, names)

    @classmethod
    def begun(cls, pending: Kept, keep_until: int) -> Insert:
        """What another call has begun with."""
        op = cls.of(pending.token, InsertMode.REPLACE, keep_until, 0, ())
        return op._replace(is_begun=True, is_anothers=True)

    def digests(self) -> list[bytes]:
        """All that count as taken."""
        return [*(key.digest for key in self.token.keys), *self.also_taken]


class Present(NamedTuple):
    """``TokenBackend.present`` without its spends."""

    key: Match
    change: Use | Hold | None
    now: int

    def __repr__(self) -> str:
        return "<Present>"

    @property
    def use_id(self) -> str:
        return "" if self.change is None else self.change.use_id


class Update(NamedTuple):
    """``TokenBackend.update``."""

    match: Match
    change: Change

    def __repr__(self) -> str:
        return "<Update>"


Operation: TypeAlias = Insert | Present | Update
Answer: TypeAlias = Inserted | Presented | StoredToken | None


class Unread(NamedTuple):
    """It takes whole documents to decide."""


class Spill(NamedTuple):
    """Finish moving a document's tombstones into one of their own."""

    stored: Stored


class Finish(NamedTuple):
    """Finish a replacement that another call has begun in a line."""

    stored: Stored


class Again(NamedTuple):
    """Write what was changed in other documents, and decide again."""

    begun: Stored | None = None
    """The line in which the token is pending by this write."""

    def __repr__(self) -> str:
        return "<Again>"


Step: TypeAlias = Spill | Finish | Again
UNREAD: Final = Unread()
AGAIN: Final = Again()


# Documents at hand --------------------------------------------------------------------------------


class Holder(NamedTuple):
    """A token and the document that it is in."""

    stored: Stored
    kept: Kept

    def __repr__(self) -> str:
        return f"<Holder {self.kept.token.id}>"


@dataclass(slots=True)
class Documents:
    """What was read, and what has been made of it so far."""

    is_whole: bool
    lines: dict[bytes, Stored] = field(default_factory=dict)
    by_name: dict[object, Stored] = field(default_factory=dict)
    beside: dict[bytes, list[Stored]] = field(default_factory=dict)
    """Documents with active tokens that stand beside a line; read where a line has such."""
    added: list[Stored] = field(default_factory=list)
    """Documents that are to be inserted beside a line."""
    counted: set[bytes] = field(default_factory=set)
    """These lines."""
    all: dict[bytes, Stored] = field(default_factory=dict)
    reserved: set[object] = field(default_factory=set)
    """Digests that tokens get which are pending."""
    handed_over: dict[object, Stored] = field(default_factory=dict)
    """Digests on their way from a token beside a line to the one that is pending in the line."""
    consulted: list[Stored] = field(default_factory=list)
    """What the latest operation has looked at or made."""

    def __repr__(self) -> str:
        return f"<Documents {len(self.all)}>"

    def add(self, stored: Stored) -> None:
        """Add a document that was read or made."""
        self.all[stored.oid] = stored
        self.consulted.append(stored)
        if stored.line is not None:
            self.lines[stored.line] = stored
        self.reserved.update(reserved_names(stored))
        for key in stored.given:
            self.handed_over[key.digest] = stored
            self.reserved.add(key.digest)
        self.index(stored, names_of([kept.token for kept in stored.tokens()]))

    def line(self, line: bytes) -> Stored | None:
        """The document of a line."""
        stored = self.lines.get(line)
        if stored is not None:
            self.consulted.append(stored)
        return stored

    def add_new(self, stored: Stored) -> Stored:
        """Add a document unless it is there, and return the one that is there."""
        if stored.oid not in self.all:
            self.add(stored)
        return self.all[stored.oid]

    def index(self, stored: Stored, names: Iterable[object]) -> None:
        """Let a document be found by some names."""
        for name in names:
            # A tombstone that is being spilled may stand in two documents: its own one counts.
            if not stored.spill or name not in self.by_name:
                self.by_name[name] = stored

    def holder(self, name: object) -> Holder | None:
        """The token that has a digest or an id."""
        stored = self.by_name.get(name)
        if stored is None:
            return None
        self.consulted.append(stored)
        for kept in stored.tokens():
            token = kept.token
            for key in token.keys:
                if key.digest == name:
                    return Holder(stored, kept)
            if not isinstance(name, bytes) and id_name(token.id) == name:
                return Holder(stored, kept)
        return None

    def handing_over(self, names: Iterable[object]) -> Stored | None:
        """The line in which a token is pending that gets a key which nobody has at the moment."""
        for name in names:
            stored = self.handed_over.get(name)
            if stored is not None and self.holder(name) is None:
                return stored
        return None

    def holders(self, digests: Iterable[bytes]) -> list[Holder]:
        """The tokens that have keys with these digests, each once."""
        found: dict[str, Holder] = {}
        for digest in digests:
            holder = self.holder(digest)
            if holder is not None:
                found.setdefault(holder.kept.token.id, holder)
        return list(found.values())


# Present ------------------------------------------------------------------------------------------


class _Fitting(NamedTuple):
    holder: Holder
    key: StoredKey


def present(op: Present, documents: Documents) -> Presented | Unread | Spill | Finish:
    """Decide :meth:`TokenBackend.present`, and make the change where the key is right."""
    digests = op.key.digests or ()
    line = documents.handing_over(digests)
    if line is not None:
        return Finish(line)
    found = _fitting(op, documents)
    if not documents.is_whole and op.use_id and any(f.key.origin != f.holder.kept.token.id for f in found):
        return UNREAD  # the uses of the token that the key came with have to be read, too
    before = replayed(op, documents)
    if before is not None:
        return before
    for holder, key in found:
        if refusal(holder.kept.token, key, op.now, op.use_id) is None:
            if op.change is not None and holder.stored.spill and holder.kept in holder.stored.spill:
                return Spill(holder.stored)
            return Presented(Outcome.RIGHT, _changed_by(holder, key, op).token)
    if not documents.is_whole and any(documents.holder(digest) is None for digest in digests):
        return UNREAD
    return Presented(Outcome.REFUSED, found[0].holder.kept.token if found else None)


def replayed(op: Present, documents: Documents) -> Presented | None:
    """The answer to a key whose use was counted before under the same id."""
    for fitting in _fitting(op, documents) if op.use_id else ():
        answer = _replayed(fitting, op.use_id, documents)
        if answer is not None:
            return answer
    return None


def _fitting(op: Present, documents: Documents) -> list[_Fitting]:
    """The tokens that match, with the keys that were presented."""
    found: list[_Fitting] = []
    for holder in documents.holders(op.key.digests or ()):
        key = key_of(holder.kept.token, op.key) if matches(holder.kept.token, op.key) else None
        if key is not None:
            found.append(_Fitting(holder, key))
    return found


def is_to_be_charged(op: Present, presented: Presented) -> bool:
    """Whether a refused key is to be charged for."""
    token = presented.token
    if token is None:
        return True
    return refusal(token, key_of(token, op.key), op.now, op.use_id) not in ("used", "leased")


def _replayed(fitting: _Fitting, use_id: str, documents: Documents) -> Presented | None:
    origin = fitting.key.origin
    first = fitting.holder
    other = documents.holder(id_name(origin)) if origin != first.kept.token.id else None
    for holder in (first, other):
        used_at = holder.kept.used_at(origin, use_id) if holder is not None else None
        if holder is not None and used_at is not None:
            return Presented(Outcome.REPLAYED, holder.kept.token, used_at)
    return None


def _changed_by(holder: Holder, key: StoredKey, op: Present) -> Kept:
    kept = holder.kept
    match op.change:
        case None:
            return kept  # nothing is changed
        case Hold():
            after = kept._replace(token=with_hold(kept.token, key, op.change, op.now))
        case Use():
            after = _used(kept, key.origin, op.change)
    holder.stored.replace(kept, after)
    return after


def _used(kept: Kept, origin: str, change: Use | UseHeld) -> Kept:
    after = kept._replace(token=with_use(kept.token, change))
    is_new = bool(change.use_id) and kept.used_at(origin, change.use_id) is None
    return after.with_receipt(origin, change.use_id, change.at) if is_new else after


# Update -------------------------------------------------------------------------------------------


def update(op: Update, documents: Documents) -> StoredToken | Unread | Spill | Finish | None:
    """Decide :meth:`TokenBackend.update`, and make the change."""
    match, change = op
    names = [id_name(match.id)] if match.id is not None else match.digests or ()
    line = documents.handing_over(names)
    if line is not None:
        return Finish(line)
    for name in names:
        holder = documents.holder(name)
        if holder is None and not documents.is_whole:
            return UNREAD
        if holder is None or not matches(holder.kept.token, match):
            continue
        kept = holder.kept
        after = changed(kept.token, change)
        if after is None:
            continue
        if holder.stored.spill and kept in holder.stored.spill:
            return Spill(holder.stored)
        if isinstance(change, UseHeld):
            hold = next(hold for hold in kept.token.holds if hold.hold_id == change.hold_id)
            new = _used(kept, hold.origin, change)
            # `changed` drops the hold, and `_used` counts the use: `with_use` does both.
        else:
            new = kept._replace(token=after)
        holder.stored.replace(kept, new)
        return new.token
    return None


# Insert -------------------------------------------------------------------------------------------


def insert(op: Insert, documents: Documents) -> Inserted | Unread | Step:
    """Decide :meth:`TokenBackend.insert`, and make the change where nothing is in the way."""
    line = documents.line(op.line)
    own = line.kept if line is not None else None
    if not documents.is_whole:
        is_crowded = line is not None and line.beside > 0 and op.mode is not InsertMode.ADD
        is_full = line is not None and (len(line.pushed) >= MOST_FORMER or line.spill_id is not None)
        if may_be_elsewhere(op) or op.also_taken or is_crowded or is_full:
            return UNREAD
        if any(documents.holder(name) is not None for name in op.names):
            return UNREAD
    elif line is not None and line.spill:
        return Spill(line)
    pending = line.pending if line is not None and op.mode is not InsertMode.ADD else None
    if pending is not None or op.is_begun:
        begun = _begun(op, line, pending, documents)
        if begun is not None:
            return begun
    replacing = [] if op.mode is InsertMode.ADD else list(_active(op, own, documents))
    if documents.is_whole:
        taken = _taken(op, documents, replacing)
        if taken is not None:
            return taken
    if op.mode is InsertMode.IF_NONE_VALID:
        valid = [kept.token for kept in replacing if satisfies(kept.token, op.wanted_until)]
        if valid:
            return Inserted(InsertResult.HAS_VALID, max(valid, key=_id))
    if line is not None and op.mode is not InsertMode.ADD and _beside(op, documents):
        _begin(op, line, documents)
        return Again(begun=line)
    return _inserted(op, line, documents)


def may_be_elsewhere(op: Insert) -> bool:
    """Whether its key may be stored in another line already: one that follows from a batch is the same in
    every context. The unique index does not know of a key whose token moves at the moment."""
    return op.mode is InsertMode.ONCE


def _begin(op: Insert, line: Stored, documents: Documents) -> None:
    """Let the token be pending in its line.

    Which keys the giver has for it is written later, when everybody can see that the line is pending: nobody
    deletes the giver then, so that it tells whether it gave a key away or was used with it.
    """
    line.pending, line.keep_until = Kept(op.token), op.keep_until
    giver = _giver(line, documents.beside.get(op.line, ()))
    line.giver = giver.kept.token.id if giver is not None else None
    line.edits += 1


def _giver(line: Stored, beside: Iterable[Stored]) -> Holder | None:
    """The predecessor, if it stands beside the line: the newest exclusive token that is active."""
    own = line.kept.token.id if line.kept is not None and line.kept.token.is_active else ""
    exclusive = [holder for holder in _active_of(beside) if not holder.kept.token.is_beside]
    newest = max(exclusive, key=lambda holder: holder.kept.token.id, default=None)
    return newest if newest is not None and newest.kept.token.id > own else None


def _begun(
    op: Insert, line: Stored | None, pending: Kept | None, documents: Documents
) -> Inserted | Step | None:
    """Go on with a replacement that has begun, from where it is. None: it begins.

    What stands beside the line ends first, and then the pending token becomes the line's own. Nobody decides
    anything about the line in between. Else an ``IF_NONE_VALID`` would find no token, though the line has a
    valid one at every time.
    """
    if line is not None and pending is not None and pending.token.id == op.token.id:
        again = _end_beside(op, line, documents)
        inserted = _inserted(op, line, documents) if again is None else again
        if isinstance(inserted, Inserted):
            line.pending, line.giver, line.given = None, None, ()
        return inserted
    done = documents.holder(id_name(op.token.id)) if op.is_begun else None
    if done is not None:  # and somebody may have used or replaced it since
        taken_over = [key for key in done.kept.token.keys if key.origin != op.token.id]
        token = op.token._replace(keys=(*op.token.keys, *taken_over))
        return Inserted(InsertResult.INSERTED, token)
    if op.is_anothers:
        return Inserted(InsertResult.KEY_TAKEN)
    return Finish(line) if line is not None and pending is not None else None


def _beside(op: Insert, documents: Documents) -> list[Holder]:
    """The active tokens beside the line."""
    return _active_of(documents.beside.get(op.line, ()))


def _active_of(beside: Iterable[Stored]) -> list[Holder]:
    return [Holder(one, one.kept) for one in beside if one.kept is not None and one.kept.token.is_active]


def _end_beside(op: Insert, line: Stored, documents: Documents) -> Again | None:
    """Replace the active tokens beside the line. None: there are none.

    The line names the keys that one of them gives before that one drops them. If it has changed since the
    line was written, the line is written first.
    """
    holders = _beside(op, documents)
    if not holders:
        return None
    giver = next((holder.kept.token for holder in holders if holder.kept.token.id == line.giver), None)
    if giver is not None:
        given = overlapping_keys(giver, op.token, op.keep_until)
        if given != line.given:
            line.given = given
            line.edits += 1
            return AGAIN
    for holder in holders:
        token = holder.kept.token
        if token is giver:
            token = _without(token, line.given)
        token = replaced(token, op.token.created_at)
        holder.stored.replace(holder.kept, holder.kept._replace(token=token))
    return AGAIN


def _without(token: StoredToken, keys: Collection[StoredKey]) -> StoredToken:
    if not keys:
        return token
    digests = {key.digest for key in keys}
    return token._replace(keys=tuple(key for key in token.keys if key.digest not in digests))


def _id(token: StoredToken) -> str:
    return token.id


def _active(op: Insert, own: Kept | None, documents: Documents) -> Iterator[Kept]:
    """The active tokens of the line."""
    if own is not None and own.token.is_active:
        yield own
    for holder in _beside(op, documents):
        yield holder.kept


def _taken(op: Insert, documents: Documents, replacing: Collection[Kept]) -> Inserted | Step | None:
    """The answer where a key or the id is taken; keys that are superseded are taken away."""
    digests = op.digests()
    if not documents.reserved.isdisjoint(digests):
        return Inserted(InsertResult.KEY_TAKEN)
    line = [kept.token for kept in replacing]
    losers: list[Holder] = []
    for holder in documents.holders(digests):
        if op.mode is InsertMode.ONCE:
            return Inserted(InsertResult.KEY_TAKEN, holder.kept.token)
        if not is_superseded(holder.kept.token, digests, op.token, line):
            return Inserted(InsertResult.KEY_TAKEN)
        losers.append(holder)
    if documents.holder(id_name(op.token.id)) is not None:
        return Inserted(InsertResult.KEY_TAKEN)
    if any(satisfies(kept.token, op.wanted_until) for kept in replacing) and (
        op.mode is InsertMode.IF_NONE_VALID
    ):
        return None
    is_elsewhere = False
    for stored, kept in losers:
        if stored.spill and kept in stored.spill:
            return Spill(stored)
        stored.replace(kept, kept._replace(token=without_keys(kept.token, digests)))
        is_elsewhere = is_elsewhere or stored.line != op.line or op.mode is InsertMode.ADD
    return AGAIN if is_elsewhere else None


def _inserted(op: Insert, line: Stored | None, documents: Documents) -> Inserted | Again:
    token = op.token
    own = line.kept if line is not None else None
    is_apart = op.mode is InsertMode.ADD and (
        token.is_beside or (token.is_active and own is not None and own.token.is_active)
    )
    # What stands beside a line is counted in the line before the line itself is written.
    if (line is not None and line.edits) if is_apart else op.line in documents.counted:
        return AGAIN
    if is_apart:
        documents.counted.add(op.line)
        stored = Stored(shared=shared_of(token), beside_line=op.line, kept=Kept(token), edits=1)
        documents.add(stored)
        documents.added.append(stored)
        return Inserted(InsertResult.INSERTED, token)
    if line is None:
        line = Stored(shared=shared_of(token), line=op.line)
        documents.add(line)
    line.edits += 1
    if op.mode is InsertMode.ADD and not token.is_active and own is not None:
        _push(line, Kept(token))  # a tombstone that is copied
    else:
        token = _replace_own(op, line, documents)
    documents.index(line, names_of([token]))
    _spill(line, token.created_at)
    return Inserted(InsertResult.INSERTED, token)


def _replace_own(op: Insert, line: Stored, documents: Documents) -> StoredToken:
    """Let the new token be the line's own one, and return it as it is stored."""
    own = line.kept
    token = op.token
    if line.given:  # what somebody has got or kept meanwhile is not given
        free = [key for key in line.given if documents.holder(key.digest) is None]
        token = token._replace(keys=(*token.keys, *free))
    if own is not None:
        old = own.token
        if old.is_active and op.mode is not InsertMode.ADD:
            given = overlapping_keys(old, token, op.keep_until) if line.giver is None else ()
            old = replaced(_without(old, given), token.created_at)
            if given:
                token = token._replace(keys=(*token.keys, *given))
        _push(line, own._replace(token=old))
    line.kept = Kept(token)
    return token


def _push(line: Stored, kept: Kept) -> None:
    if line.former is None:
        line.pushed.append(kept)
    else:
        line.former.append(kept)


def _spill(line: Stored, now: int) -> None:
    """Begin to move tombstones out of a line that has too many."""
    if line.former is None or line.spill or len(line.former) <= MOST_FORMER:
        return
    line.spill = [kept for kept in line.former if not running_holds(kept.token, now)]
    line.former = [kept for kept in line.former if running_holds(kept.token, now)]
    line.spill_id = new_id() if line.spill else None


def is_last_use(op: Operation, answer: Answer) -> StoredToken | None:
    """The token whose last use an operation counted, if that ends the object's tokens of other contexts.

    One that was counted before is among these: what came after the use may have failed then.
    """
    change = op.change if isinstance(op, Present | Update) else None
    is_counted = isinstance(answer, Presented) and answer.outcome in (Outcome.RIGHT, Outcome.REPLAYED)
    token = answer.token if isinstance(answer, Presented) and is_counted else answer
    if not isinstance(change, Use | UseHeld) or not isinstance(token, StoredToken):
        return None
    is_last = token.state is State.USED and bool(token.context) and not token.is_beside
    return token if is_last else None


def needed_names(op: Operation, *, is_whole: bool) -> Sequence[object]:
    """The names of the documents that it takes to decide an operation."""
    match op:
        case Insert():
            return [op.line, *op.names, *op.also_taken] if is_whole or op.also_taken else [op.line]
        case Present():
            return op.key.digests or ()
        case Update():
            match = op.match
            return [id_name(match.id)] if match.id is not None else match.digests or ()
