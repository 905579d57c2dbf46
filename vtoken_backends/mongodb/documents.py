"""What is stored: records as documents, and back. No input or output here.

One document is one line: its current exclusive token, and the tokens that this one replaced::

    {_id, names: [line, digests..., ids...], line, object, content_type, object_id, slug,
     context, token: {...}, former: [{...}, ...], revision, claims, due, beside, adding}

- ``names``: what the document is found by, in one unique index: the line (16 bytes), the digests of all
  keys (32 bytes) and the ids of all tokens (numbers, the newest first: see :func:`id_name`).
- ``object``: a digest of content type and object id, by which ``find``, ``deactivate`` and ``erase`` go.
- ``token``, ``former``: records by field name, without what all tokens of the line share. ``receipts`` is
  what is remembered of a token's uses (see :class:`Kept`).
- ``revision``: grows by one with every write. ``claims``: the flushes of the latest ones, the newest last.
- ``due``: when purge looks at the document: no later than the earliest ``ends_at`` in it, or where it has no
  tokens, than the latest one beside it.
- ``beside``: how many tokens were added beside the line (see ``writes``).
- ``adding``: the documents that are about to be inserted beside the line, by ``_id``, and when they end.
- ``pending``: the token that is about to replace those beside the line, which end first. It is no token yet.
  ``given``: the keys that it gets from one of them, ``giver``.
- ``spill``, ``spill_id``: tombstones on their way into a document of their own.
- ``moved``: names on their way between documents, and those that have arrived. Who looks here after ``names``
  misses nothing that moves meanwhile.

A token that was added beside others is a document of its own, with ``beside_line`` instead of the line among
its names. Tombstones that a line has no room for are a document with ``former`` alone.

Callers' strings stand only as values of ``$eq``, ``$ne``, ``$in`` and ``$set``, or under ``$literal``, where
the server takes nothing for an operator or a path.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from operator import attrgetter, itemgetter
from typing import Any, Final, Generic, NamedTuple, TypeVar, cast, get_args, get_type_hints

from bson.int64 import Int64

from vtoken.backend import Match, SlugCount, State, StoredHold, StoredKey, StoredToken
from vtoken.errors import CorruptStore

Document = dict[str, Any]
_Record = TypeVar("_Record")

SHARED: Final = ("content_type", "object_id", "slug", "context")
"""The fields that all tokens of a line share."""
TOKEN_INDEXES: Final[tuple[Document, ...]] = (
    {"key": {"names": 1}, "unique": True},
    {"key": {"object": 1, "beside_line": 1}},
    {"key": {"due": 1, "_id": 1}},
    {"key": {"moved": 1}, "sparse": True},
)
BUDGET_INDEXES: Final[tuple[Document, ...]] = ({"key": {"due": 1}},)
_HEAVY: Final = ("names", "former", "spill", "moved", "claims", "pending", "given")
LIGHT: Final[Document] = dict.fromkeys(_HEAVY, 0)
"""The projection that leaves out tombstones: they are rarely asked for, and may be many."""
MOST_FORMER: Final = 8
"""Tombstones in a line, until those that nobody holds are spilled."""
RECEIPT: Final = 54
"""Characters of a receipt: a digest of the use id (22), the key's origin (16), the time (16)."""
MOST_RECEIPTS: Final = 1_024
MOST_CLAIMS: Final = 8
"""Of so many latest writes of a document, it can be told which flush each of them was of."""
_ID: Final = re.compile("[0-7][0-9a-f]{15}")


class Kept(NamedTuple):
    """A token and what is remembered of its uses: one text of fixed-size receipts, oldest first."""

    token: StoredToken
    receipts: str = ""

    def __repr__(self) -> str:
        return f"<Kept {self.token.id}>"

    def used_at(self, origin: str, use_id: str) -> int | None:
        """When a use was counted, or None."""
        wanted = receipt_of(use_id) + origin
        place = self.receipts.find(wanted)
        return None if place < 0 else _signed(self.receipts[place + len(wanted) : place + RECEIPT])

    def with_receipt(self, origin: str, use_id: str, at: int) -> Kept:
        receipts = self.receipts + receipt_of(use_id) + origin + receipt_time(at)
        return self._replace(receipts=receipts[-RECEIPT * MOST_RECEIPTS :])


def receipt_of(use_id: str) -> str:
    """22 characters that stand for a use id."""
    return hashlib.sha256(use_id.encode()).hexdigest()[:22]


def receipt_time(at: int) -> str:
    """16 characters for a time."""
    return f"{at & 0xFFFF_FFFF_FFFF_FFFF:016x}"


def _signed(text: str) -> int:
    number = int(text, 16)
    return number - (1 << 64) if number >> 63 else number


# Names --------------------------------------------------------------------------------------------


def id_name(token_id: str) -> int | str:
    """The name of an id: a number that is the smaller the newer the id is. What is no id names nothing."""
    return Int64(~int(token_id, 16)) if _ID.fullmatch(token_id) else token_id


def names_of(tokens: Iterable[StoredToken]) -> list[object]:
    """The names by which a document with these tokens is found, without that of a line."""
    names: list[object] = []
    for token in tokens:
        for key in token.keys:
            names.append(key.digest)  # noqa: PERF401  # an inner list costs more than it saves
        names.append(Int64(~int(token.id, 16)))
    return names


def line_of(content_type: str, object_id: str, slug: str, context: bytes) -> bytes:
    """16 bytes that stand for a line."""
    return _digest(content_type.encode(), object_id.encode(), slug.encode(), context)


def object_of(content_type: str, object_id: str) -> bytes:
    """16 bytes that stand for an object."""
    return _digest(content_type.encode(), object_id.encode())


def _digest(*parts: bytes) -> bytes:
    # A NUL is in no text, so it keeps the parts apart; only the last one is of bytes.
    return hashlib.sha256(b"\0".join(parts)).digest()[:16]


def new_id() -> bytes:
    """12 bytes for a document or a flush, which sort by their time.

    An ``ObjectId`` would do as well, and costs the drivers three times as much to make and to read.
    """
    return time.time_ns().to_bytes(8, "big") + os.urandom(4)


# Records by field name ----------------------------------------------------------------------------


class _Shape(Generic[_Record]):
    """How the records of a class become documents, as its annotations say.

    Args:
        cls: the class.
        defaults: values that are left out of a document.
    """

    def __init__(self, cls: type[_Record], defaults: Document) -> None:
        self.cls = cls
        self.defaults = defaults
        fields: tuple[str, ...] = getattr(cls, "_fields")  # noqa: B009  # of a NamedTuple
        self.names = fields
        self.make: Callable[[Iterable[Any]], _Record] = getattr(cls, "_make")  # noqa: B009  # of a NamedTuple
        self.values = itemgetter(*fields)
        self.left_out = tuple((name, defaults.get(name, ...)) for name in fields if name not in SHARED)
        self.stored_values = attrgetter(*(name for name, _ in self.left_out))
        hints = get_type_hints(cls)
        self.types = {name: _stored_types(hints[name]) for name in fields}
        self.checked = lru_cache(256)(self._checked)  # there are few such tuples, and many records to be read

    def document(self, record: _Record) -> Document:
        """The document of a record."""
        document: Document = {}
        for (name, default), value in zip(self.left_out, self.stored_values(record), strict=True):
            if value != default:
                document[name] = value
        return document

    def read(self, found: Document) -> _Record:
        """The record of a document that has its defaults.

        Raises:
            CorruptStore: a field is missing or of another type than it was stored with.
        """
        try:
            values = self.values(found)
        except KeyError:
            values = tuple([found.get(name, ...) for name in self.names])
        damaged, places = self.checked(tuple(map(type, values)))
        if damaged:
            raise CorruptStore(f"the field {damaged!r} of a stored {self.cls.__name__} is damaged")
        if places:
            values = list(values)
            for place in places:
                values[place] = int(values[place])
        return self.make(values)

    def _checked(self, types_: tuple[type, ...]) -> tuple[str, list[int]]:
        """The first field of another type than it was stored with, and the places of those that are Int64."""
        for name, type_ in zip(self.names, types_, strict=True):
            if type_ not in self.types[name]:
                return name, []
        return "", [place for place, type_ in enumerate(types_) if type_ is Int64]


def _stored_types(hint: Any) -> tuple[type, ...]:
    """The types that a field's values come back as."""
    if isinstance(hint, types.UnionType):
        return tuple(type_ for part in get_args(hint) for type_ in _stored_types(part))
    if hint is int:
        return (int, Int64)
    return (hint,) if isinstance(hint, type) else (tuple,)


_TOKEN: Final = _Shape(
    StoredToken,
    {"is_beside": False, "extra_data": None, "uses": 0, "used_at": 0, "holds": ()},
)
_KEY: Final = _Shape(StoredKey, {"nonce": "", "plain_key": "", "secret_id": "", "kind": "link"})
_HOLD: Final = _Shape(StoredHold, {"use_id": ""})
_STATES: Final = {state.value: state for state in State}


def token_document(kept: Kept) -> Document:
    """The document within a document of a token."""
    token = kept.token
    document = _TOKEN.document(token)
    document["state"] = token.state.value
    document["keys"] = [_KEY.document(key) for key in token.keys]
    if token.holds:
        document["holds"] = [_HOLD.document(hold) for hold in token.holds]
    if kept.receipts:
        document["receipts"] = kept.receipts
    return document


def kept_of(found: Document, shared: Document) -> Kept:
    """A token of its document, and of the fields that it shares with its line.

    Raises:
        CorruptStore: it is damaged.
    """
    values = {**_TOKEN.defaults, **found, **shared}
    state = values.get("state")
    values["state"] = _STATES.get(state) if type(state) is int else None
    defaults = _KEY.defaults
    values["keys"] = tuple([_KEY.read({**defaults, **key}) for key in _documents(values, "keys")])
    if values["holds"]:
        values["holds"] = tuple(
            [_HOLD.read({**_HOLD.defaults, **hold}) for hold in _documents(values, "holds")]
        )
    receipts = found.get("receipts", "")
    if type(receipts) is not str or len(receipts) % RECEIPT:
        raise CorruptStore("the field 'receipts' of a stored StoredToken is damaged")
    return Kept(_TOKEN.read(values), receipts)


def _documents(found: Document, name: str) -> list[Document]:
    """A list of documents within a document.

    Raises:
        CorruptStore: it is something else.
    """
    documents: Any = found.get(name)
    if type(documents) is list and all(isinstance(each, dict) for each in documents):
        return cast("list[Document]", documents)
    raise CorruptStore(f"the field {name!r} of a stored StoredToken is damaged")


# Documents as they are worked on ------------------------------------------------------------------


@dataclass(slots=True)
class Stored:
    """A document, as it was read and as it will be written."""

    shared: Document
    """The values of :data:`SHARED`."""
    line: bytes | None = None
    """The line that it is; None for what stands beside one, and for tombstones of their own."""
    beside_line: bytes | None = None
    beside: int = 0
    adding: dict[bytes, int] = field(default_factory=dict)
    """What is about to be inserted beside this line, and when that ends."""
    kept: Kept | None = None
    former: list[Kept] | None = field(default_factory=list)
    """None: not read. What is appended then stands in ``pushed``."""
    pushed: list[Kept] = field(default_factory=list)
    pending: Kept | None = None
    """What is about to replace the tokens beside this line."""
    keep_until: int = 0
    """Of the overlap that it asks for."""
    giver: str | None = None
    """The id of its predecessor, if that stands beside the line."""
    given: tuple[StoredKey, ...] = ()
    """The keys that it gets from that one."""
    spill: list[Kept] = field(default_factory=list)
    spill_id: bytes | None = None
    oid: bytes = field(default_factory=new_id)
    due: int = 0
    """As it was read, or as it has to be of a document without tokens."""
    revision: int | None = None
    """None: it is not stored yet."""
    claims: list[bytes] = field(default_factory=list)
    before: Kept | None = None
    """``kept``, as it was read."""
    found: Document | None = None
    """The document of ``before``, as it was read."""
    edits: int = 0
    """How often it was changed since it was read."""
    seen: int = 0
    """How often it had been changed before the latest operation."""

    def __repr__(self) -> str:
        return f"<Stored {self.oid.hex()}>"

    def tokens(self) -> list[Kept]:
        """All tokens in it, as far as they were read."""
        return [*self.settled(), *self.spill]

    def settled(self) -> list[Kept]:
        """Those that do not move to another document."""
        current = [self.kept] if self.kept is not None else []
        return [*current, *(self.former or ()), *self.pushed]

    def is_apart(self) -> bool:
        """Whether it is tombstones alone, that a line had no room for."""
        return self.line is None and self.beside_line is None

    def differences(self) -> tuple[tuple[str, object], ...]:
        """The fields of the current token that are not as they were read, and ``receipts``."""
        kept, before = self.kept, self.before
        if kept is None or before is None:
            return ()
        fields = zip(StoredToken._fields, kept.token, before.token, strict=True)
        changed = [(name, new) for name, new, old in fields if new is not old and new != old]
        if kept.receipts != before.receipts:
            changed.append(("receipts", kept.receipts))
        return tuple(changed)

    def has_new_token(self) -> bool:
        """Whether another token is the current one than when it was read."""
        if self.kept is None or self.before is None:
            return self.kept is not self.before
        return self.kept.token.id != self.before.token.id

    def replace(self, old: Kept, new: Kept) -> None:
        """Put what has become of a token in its place."""
        self.edits += 1
        if self.kept is old:
            self.kept = new
        elif self.former is not None and any(other is old for other in self.former):
            self.former = [new if other is old else other for other in self.former]
        else:
            self.pushed = [new if other is old else other for other in self.pushed]


_SHARED_VALUES: Final = itemgetter(*SHARED)
_SHARED_TYPES: Final = (str, str, str, bytes)


def stored_of(found: Document, *, is_whole: bool) -> Stored:
    """A document that was read, whole or without what :data:`LIGHT` leaves out.

    Raises:
        CorruptStore: it is damaged.
    """
    try:
        values = _SHARED_VALUES(found)
        shared: Document = dict(zip(SHARED, values, strict=True))
        if tuple(map(type, values)) != _SHARED_TYPES:
            kinds = zip(SHARED, values, _SHARED_TYPES, strict=True)
            damaged = next(name for name, value, kind in kinds if type(value) is not kind)
            raise CorruptStore(f"the field {damaged!r} of a stored document is damaged")
        token = found.get("token")
        kept = None if token is None else kept_of(token, shared)
        return Stored(
            shared=shared,
            line=found.get("line"),
            beside_line=found.get("beside_line"),
            beside=int(found.get("beside", 0)),
            adding={bytes(one["_id"]): int(one["ends_at"]) for one in found.get("adding", ())},
            due=int(found.get("due", 0)),
            kept=kept,
            former=[kept_of(one, shared) for one in found.get("former", ())] if is_whole else None,
            pending=kept_of(found["pending"], shared) if is_whole and "pending" in found else None,
            keep_until=int(found.get("keep_until", 0)),
            giver=found.get("giver") if is_whole and "pending" in found else None,
            given=_given(found) if is_whole and "pending" in found and "giver" in found else (),
            spill=[kept_of(one, shared) for one in found.get("spill", ())] if is_whole else [],
            spill_id=found.get("spill_id"),
            oid=bytes(found["_id"]),
            revision=int(found["revision"]),
            claims=found["claims"] if is_whole else [],
            before=kept,
            found=token,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = type(error).__name__
    raise CorruptStore(f"a stored document is damaged ({problem})")


def _given(found: Document) -> tuple[StoredKey, ...]:
    return tuple([_KEY.read({**_KEY.defaults, **key}) for key in _documents(found, "given")])


def shared_of(token: StoredToken) -> Document:
    return {name: getattr(token, name) for name in SHARED}


def whole(stored: Stored, claim: bytes) -> Document:
    """The document, to be inserted or to take the place of what was read whole."""
    tokens = [kept.token for kept in (*([stored.kept] if stored.kept else ()), *(stored.former or ()))]
    line: list[object] = [stored.line] if stored.line is not None else []
    document: Document = {
        "_id": stored.oid,
        "names": line + names_of(tokens) + reserved_names(stored),
        "object": object_of(stored.shared["content_type"], stored.shared["object_id"]),
        **stored.shared,
        "revision": 0 if stored.revision is None else stored.revision + 1,
        "claims": [*stored.claims, claim][-MOST_CLAIMS:],
        "due": Int64(due_of(stored)),
    }
    if stored.line is not None:
        document["line"] = stored.line
    if stored.beside_line is not None:
        document["beside_line"] = stored.beside_line
    if stored.beside:
        document["beside"] = stored.beside
    if stored.adding:
        document["adding"] = [{"_id": oid, "ends_at": Int64(end)} for oid, end in stored.adding.items()]
    if stored.kept is not None:
        document["token"] = token_document(stored.kept)
    if stored.former:
        document["former"] = [token_document(kept) for kept in stored.former]
    if stored.pending is not None:
        document |= {"pending": token_document(stored.pending), "keep_until": Int64(stored.keep_until)}
    if stored.giver is not None:
        document |= {"giver": stored.giver, "given": [_KEY.document(key) for key in stored.given]}
    if stored.spill:
        document["spill"] = [token_document(kept) for kept in stored.spill]
        document["spill_id"] = stored.spill_id
    moved = _moved_names(stored)
    if moved:
        document["moved"] = moved
    return document


def _moved_names(stored: Stored) -> list[object]:
    """The names that come from, or go to, another document: tombstones, and keys that were handed over."""
    tombstones = [*stored.spill, *(stored.former or () if stored.is_apart() else ())]
    handed_over = [
        key.digest
        for kept in stored.settled()
        for key in kept.token.keys
        if key.origin != kept.token.id and not stored.is_apart()
    ]
    given = [key.digest for key in stored.given]
    return [*names_of([kept.token for kept in tombstones]), *handed_over, *given]


def reserved_names(stored: Stored) -> list[object]:
    """The digests of a token that is about to be in a document. Its id is none: pages go by the ids."""
    return [key.digest for key in stored.pending.token.keys] if stored.pending is not None else []


def due_of(stored: Stored) -> int:
    """The earliest end of its tokens; of a document without tokens it stays what it is."""
    return min((kept.token.ends_at for kept in stored.tokens()), default=stored.due)


def condition(match: Match) -> Document:
    """What a match says of a document, as far as it says anything of every token in it."""
    query: Document = {}
    for name in SHARED:
        value = getattr(match, name)
        if value is not None:
            query[name] = {"$eq": value}
    if match.content_type is not None and match.object_id is not None:
        query["object"] = object_of(match.content_type, match.object_id)
    return query


def slug_count(found: Document) -> SlugCount:
    """One row of what counts tokens."""
    numbers = {name: int(found[name]) for name in ("total", "active", "expired", "used")}
    return SlugCount(slug=found["_id"], **numbers)
