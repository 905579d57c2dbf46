"""Many operations in one trip to SQLite.

Each operation is a statement of its own, and gets the rows that this statement alone would have
returned. Where several are of one kind, one statement with many rows does the work of all: beside
a busy event loop each further statement costs a wait for the interpreter lock, up to its switch interval
of 5 ms (``sys.setswitchinterval``). What cannot be told from the shared statement is asked again, alone.

All of this runs in one go on aiosqlite's worker thread.
"""

# ruff: noqa: S608  # the SQL is put together from this package's own texts; values are always parameters

from __future__ import annotations

import contextlib
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cache
from typing import Any, Final, NamedTuple

from vtoken.backend import Match, StoredToken

COLUMNS: Final = ", ".join(StoredToken._fields)
_ROW: Final = f"({', '.join('?' * (len(StoredToken._fields) + 2))})"
TELLING: Final = " ON CONFLICT DO NOTHING RETURNING id, digest"
INSERT: Final = f"INSERT INTO tokens ({COLUMNS}, mode, overlap) VALUES {_ROW}{TELLING}"
IF_NONE_VALID: Final = 2
_MODE: Final = len(StoredToken._fields)
USE: Final = (
    "uses = uses + 1, used_at = {at}, lease_id = '', lease_until = 0,"
    " use_ids = iif({use_id} = '', use_ids, json_insert(use_ids, '$[#]', {use_id})),"
    " is_active = is_active AND uses + 1 < max_uses,"
    " ends_at = iif(uses + 1 < max_uses, ends_at, min(ends_at, {at} - 1))"
)

(
    _ID,
    _CONTENT_TYPE,
    _OBJECT_ID,
    _SLUG,
    _DIGEST,
    _CONTEXT,
    _CREATED_AT,
    _EXPIRES_AT,
    _IS_ACTIVE,
    _LEASE_UNTIL,
) = (
    StoredToken._fields.index(name)
    for name in (
        "id",
        "content_type",
        "object_id",
        "slug",
        "digest",
        "context",
        "created_at",
        "expires_at",
        "is_active",
        "lease_until",
    )
)


class Private(tuple[Any, ...]):
    """The parameters of a statement, or a row: neither a driver's log nor a traceback shows what is in it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{len(self)} values>"


class Rows(list[tuple[Any, ...]]):
    """The rows that a statement returned. Digests are in them, so no repr shows what is in it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{len(self)} rows>"


class Operation(NamedTuple):
    """One operation on the store.

    Operations that share one of their ``subjects`` are carried out in the order in which they came.
    """

    alone: Callable[[], tuple[str, Private]]
    """Makes its own statement, with the values."""
    writes: bool
    subjects: tuple[Hashable, ...]
    kind: Callable[[Sequence[Operation]], tuple[str, list[Any]]] | None = None
    """How several operations make one statement; None where they don't."""
    shared: Any = None
    """What the shared statement needs to know of this one."""

    def __repr__(self) -> str:
        return "<Operation>"


class Batch(NamedTuple):
    """Operations as the parameters of one call of aiosqlite."""

    operations: Sequence[Operation]

    def __repr__(self) -> str:
        return f"<{len(self.operations)} operations>"


class Answers(NamedTuple):
    """For each operation its rows, or the error that is its own."""

    answers: list[Rows | Exception]

    def __repr__(self) -> str:
        return f"<{len(self.answers)} answers>"

    def fetchall(self) -> Answers:
        """What aiosqlite asks of a cursor."""
        return self


class Connection(sqlite3.Connection):
    """A connection that carries out a whole :class:`Batch` in one call of ``execute``."""

    def execute(self, sql: str, parameters: Any = (), /) -> Any:
        if isinstance(parameters, Batch):
            return Answers(_Trip(self, parameters.operations).carry_out())
        return super().execute(sql, parameters)


class Take(NamedTuple):
    """A use of a token by its digest, among others."""

    digest: bytes
    match: Match
    at: int
    use_id: str


class Look(NamedTuple):
    """A search for tokens by their digests, among others."""

    match: Match
    limit: int


def insert_many(operations: Sequence[Operation]) -> tuple[str, list[Any]]:
    """Row by row, with the triggers after each: later rows see what the earlier ones did."""
    size = _padded(len(operations))
    values: list[Any] = []
    for operation in operations:
        values += operation.shared
    values += [None] * ((size - len(operations)) * _ROW.count("?"))
    return _insert_sql(size), values


def use_many(operations: Sequence[Operation]) -> tuple[str, list[Any]]:
    """A token that stands in an overlap is left out: its siblings may be in the same statement."""
    size = _padded(len(operations))
    values: list[Any] = []
    for operation in operations:
        digest, match, at, use_id = operation.shared
        values += (digest, match.content_type, match.object_id, match.slug, match.context)
        values += (match.valid_at, at, use_id)
    values += [None] * ((size - len(operations)) * 8)
    return _use_sql(size), values


def find_many(operations: Sequence[Operation]) -> tuple[str, list[Any]]:
    """All tokens with any of the digests; which operation they belong to is told afterwards."""
    digests = [digest for operation in operations for digest in operation.shared.match.digests]
    return _find_sql(_padded(len(digests))), digests + [None] * (_padded(len(digests)) - len(digests))


def _padded(count: int) -> int:
    """The next power of two: few statements, each prepared once and then kept."""
    return 1 << (count - 1).bit_length()


@cache
def _insert_sql(size: int) -> str:
    columns = ", ".join(f"column{number + 1}" for number in range(_ROW.count("?")))
    return (
        f"INSERT INTO tokens ({COLUMNS}, mode, overlap)"
        f" SELECT {columns} FROM (VALUES {', '.join([_ROW] * size)}) WHERE column1 IS NOT NULL"
        f"{TELLING}"
    )


@cache
def _use_sql(size: int) -> str:
    return (
        "WITH asked (asked_digest, asked_type, asked_object, asked_slug, asked_context, valid_at, at,"
        f" asked_use) AS (VALUES {', '.join(['(?, ?, ?, ?, ?, ?, ?, ?)'] * size)})"
        f" UPDATE tokens SET {USE.format(at='at', use_id='asked_use')} FROM asked"
        " WHERE digest = asked_digest AND content_type = asked_type AND slug = asked_slug"
        " AND (asked_object IS NULL OR object_id = asked_object)"
        " AND (asked_context IS NULL OR context = asked_context)"
        " AND is_active = 1 AND expires_at >= valid_at AND lease_until <= valid_at AND overlap = 0"
        " AND (asked_use = '' OR use_ids = '[]')"
        f" RETURNING {COLUMNS}"
    )


@cache
def _find_sql(size: int) -> str:
    return f"SELECT {COLUMNS} FROM tokens WHERE digest IN ({', '.join('?' * size)})"


class _Trip:
    """The way of one batch through SQLite."""

    def __init__(self, connection: Connection, operations: Sequence[Operation]) -> None:
        self._connection = connection
        self._operations = operations
        self._answers: list[Rows | Exception] = [_NOT_YET] * len(operations)

    def carry_out(self) -> list[Rows | Exception]:
        groups = _in_order(self._operations)
        trips = sum(1 if _is_shared(self._operations, group) else len(group) for group in groups)
        writes = any(operation.writes for operation in self._operations)
        try:
            if writes and trips > 1:
                self._in_one_transaction(groups)
            else:
                self._run(groups)
        except Exception as error:
            self._recover(error)
        return self._answers

    def _in_one_transaction(self, groups: Iterable[list[int]]) -> None:
        settled = list(self._answers)
        try:
            self._execute("BEGIN IMMEDIATE")
            self._run(groups)
        except Exception:
            self._roll_back()
            self._answers = settled
            raise
        try:
            self._execute("COMMIT")
        except sqlite3.Error as error:
            self._roll_back()
            # Nothing of it was committed that we know of; it is not tried again, as that might do it twice.
            self._answers = [error if answer is _NOT_YET else answer for answer in settled]

    def _roll_back(self) -> None:
        if self._connection.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                self._execute("ROLLBACK")

    def _run(self, groups: Iterable[list[int]]) -> None:
        for group in groups:
            if _is_shared(self._operations, group):
                self._run_shared(group)
            else:
                self._run_alone(group)

    def _run_alone(self, group: Iterable[int]) -> None:
        for number in group:
            operation = self._operations[number]
            self._answers[number] = self._execute(*operation.alone())

    def _run_shared(self, group: list[int]) -> None:
        operations = [self._operations[number] for number in group]
        many = operations[0].kind
        assert many is not None  # noqa: S101  # _is_shared has seen to it
        if many is insert_many and all(operation.shared[_MODE] != IF_NONE_VALID for operation in operations):
            # Without a word about each row the statement ends, and is durable, in one step: the event loop,
            # busy with the callers of the batch before, gets no chance to hold it up.
            with contextlib.suppress(sqlite3.IntegrityError):  # a key is taken, and nothing was inserted
                sql, values = many(operations)
                self._execute(sql.removesuffix(TELLING), values)
                for number, operation in zip(group, operations, strict=True):
                    self._answers[number] = Rows([(operation.shared[_ID], operation.shared[_DIGEST])])
                return
        rows = self._execute(*many(operations))
        if many is find_many:
            by_digest = {row[_DIGEST]: row for row in rows}
            for number, operation in zip(group, operations, strict=True):
                self._answers[number] = _found(by_digest, *operation.shared)
            return
        if many is insert_many:
            inserted = set(rows)
            for number, operation in zip(group, operations, strict=True):
                name = operation.shared[_ID], operation.shared[_DIGEST]
                self._answers[number] = Rows([name] if name in inserted else ())
                inserted.discard(name)
            return
        used = {row[_DIGEST]: row for row in rows}
        left = []
        for number, operation in zip(group, operations, strict=True):
            if operation.shared.digest in used:
                self._answers[number] = Rows([used[operation.shared.digest]])
            else:
                left.append(number)
        if len(left) > 1 and not self._connection.in_transaction:
            self._in_one_transaction([left[:1], *([number] for number in left[1:])])
        else:
            self._run_alone(left)

    def _recover(self, error: Exception) -> None:
        """Nobody's operation may fail for a neighbour's reason: what is not answered is tried alone."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        for number, operation in enumerate(self._operations):
            if self._answers[number] is not _NOT_YET:
                continue
            if (operation.writes and code in _HOPELESS) or len(self._operations) == 1:
                self._answers[number] = error
                continue
            try:
                self._run_alone([number])
            except Exception as own:
                self._answers[number] = own

    def _execute(self, sql: str, parameters: Sequence[Any] = ()) -> Rows:
        return Rows(self._connection.execute(sql, parameters).fetchall())


_NOT_YET: Final = Rows()
_HOPELESS: Final = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_IOERR}
"""A lock that was waited for in vain, and a disk that fails: for the next write just the same."""


def _in_order(operations: Sequence[Operation]) -> list[list[int]]:
    """Groups of one kind each, by their places, so that operations on one subject keep their order."""
    kind = operations[0].kind
    if all(operation.kind is kind for operation in operations):
        subjects = [subject for operation in operations for subject in operation.subjects]
        if kind is not use_many or len(set(subjects)) == len(subjects):
            return [list(range(len(operations)))]
    last: dict[Hashable, tuple[int, object]] = {}
    levels: defaultdict[int, defaultdict[object, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, operation in enumerate(operations):
        level, kind = 0, operation.kind
        for subject in operation.subjects:
            seen = last.get(subject)
            if seen is not None:
                # Of one subject's uses only one fits into a statement: it reads before it writes.
                together = seen[1] is kind and kind is not use_many
                level = max(level, seen[0] + (not together))
        for subject in operation.subjects:
            last[subject] = level, kind
        levels[level][kind].append(number)
    return [group for level in sorted(levels) for group in levels[level].values()]


def _is_shared(operations: Sequence[Operation], group: list[int]) -> bool:
    return len(group) > 1 and operations[group[0]].kind is not None


def _found(by_digest: dict[bytes, tuple[Any, ...]], match: Match, limit: int) -> Rows:
    found = [by_digest[d] for d in match.digests or () if d in by_digest and _fits(by_digest[d], match)]
    if len(found) > 1:
        found.sort(key=lambda row: (row[_CREATED_AT], row[_ID]), reverse=True)
    return Rows(found[:limit])


def _fits(row: tuple[Any, ...], match: Match) -> bool:
    return (
        (match.content_type is None or row[_CONTENT_TYPE] == match.content_type)
        and (match.object_id is None or row[_OBJECT_ID] == match.object_id)
        and (match.slug is None or row[_SLUG] == match.slug)
        and (match.context is None or row[_CONTEXT] == match.context)
        and (not match.active or row[_IS_ACTIVE] == 1)
        and (
            match.valid_at is None
            or (
                row[_IS_ACTIVE] == 1
                and row[_EXPIRES_AT] >= match.valid_at
                and row[_LEASE_UNTIL] <= match.valid_at
            )
        )
    )
