"""Many operations in one trip to SQLite.

Each operation is a statement of its own, and gets the rows that this statement alone would have
returned. Where several are of one kind, one statement with many rows does the work of all, row by row,
and all that is to be said about them comes back as the JSON of one row: beside a busy event loop each further
step of SQLite, a row of an answer is one, costs a wait for the interpreter lock, up to its switch interval of
5 ms (``sys.setswitchinterval``). What cannot be told from the shared statement is asked again, alone.

All of this runs in one go on aiosqlite's worker thread.
"""

# ruff: noqa: S608  # the SQL is put together from this package's own texts; values are always parameters

from __future__ import annotations

import contextlib
import json
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


_ASKED: Final = "(?, ?, ?, ?, ?, ?, ?, ?, ?)"
_AS_JSON: Final = "json_array({})".format(
    ", ".join(f"hex({name})" if name in ("digest", "context") else name for name in StoredToken._fields)
)
FOR_A_CONNECTION: Final = (
    # Uses are inserted into a view, because an INSERT works row by row, where an UPDATE reads all of its rows
    # before it writes the first. It is also the only statement that ends, and is durable, before anybody
    # has read its answers: RETURNING commits after the last row was fetched.
    "CREATE TEMP TABLE answers (place INTEGER PRIMARY KEY, used TEXT)",
    """
    CREATE TEMP VIEW uses AS SELECT NULL AS place, NULL AS digest, NULL AS content_type, NULL AS object_id,
        NULL AS slug, NULL AS context, NULL AS valid_at, NULL AS at, NULL AS use_id
    """,
    f"""
    CREATE TEMP TRIGGER use_token INSTEAD OF INSERT ON uses WHEN NEW.place IS NOT NULL
    BEGIN
        UPDATE tokens SET {USE.format(at="NEW.at", use_id="NEW.use_id")}
        WHERE digest = NEW.digest
            AND (NEW.content_type IS NULL OR content_type = NEW.content_type)
            AND (NEW.slug IS NULL OR slug = NEW.slug)
            AND (NEW.object_id IS NULL OR object_id = NEW.object_id)
            AND (NEW.context IS NULL OR context = NEW.context)
            AND is_active = 1 AND expires_at >= NEW.valid_at AND lease_until <= NEW.valid_at
            AND (NEW.use_id = '' OR NOT EXISTS (SELECT 1 FROM json_each(use_ids) WHERE value = NEW.use_id));
        INSERT OR REPLACE INTO answers VALUES (
            NEW.place,
            iif(
                changes() = 1,
                (SELECT json_array(NEW.place, {_AS_JSON}) FROM tokens WHERE digest = NEW.digest),
                NULL
            )
        );
    END
    """,
)
"""What a connection keeps in memory for itself alone."""


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

    Operations of different kinds that share one of their ``subjects`` are carried out in the order in which
    they came.
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

    def __repr__(self) -> str:
        return "<Take>"


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
    """Row by row, with the triggers after each: of two that could meet only the first finds its token."""
    size = _padded(len(operations))
    values: list[Any] = []
    for place, operation in enumerate(operations):
        digest, match, at, use_id = operation.shared
        values += (place, digest, match.content_type, match.object_id, match.slug, match.context)
        values += (match.valid_at, at, use_id)
    values += [None] * ((size - len(operations)) * _ASKED.count("?"))
    return _use_sql(size), values


def find_many(operations: Sequence[Operation]) -> tuple[str, list[Any]]:
    """All tokens with any of the digests; which operation they belong to is told afterwards."""
    digests = [digest for operation in operations for digest in operation.shared.match.digests]
    return _find_sql(_padded(len(digests))), digests + [None] * (_padded(len(digests)) - len(digests))


_ANSWERS: Final = "SELECT '[' || ifnull(group_concat(used), '') || ']' FROM answers WHERE place < ?"
_ANSWER: Final = _ANSWERS.replace("<", "=")


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
    return f"INSERT INTO uses VALUES {', '.join([_ASKED] * size)}"


@cache
def _find_sql(size: int) -> str:
    return f"SELECT json_group_array({_AS_JSON}) FROM tokens WHERE digest IN ({', '.join('?' * size)})"


def _from_json(values: list[Any]) -> tuple[Any, ...]:
    """A row that came as JSON, as SQLite itself would have returned it."""
    values[_DIGEST] = bytes.fromhex(values[_DIGEST])
    values[_CONTEXT] = bytes.fromhex(values[_CONTEXT])
    return tuple(values)


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
        except Exception as error:  # MemoryError too
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
        if many is find_many:
            rows = map(_from_json, self._json(*many(operations)))
            by_digest = {row[_DIGEST]: row for row in rows}
            for number, operation in zip(group, operations, strict=True):
                self._answers[number] = _found(by_digest, *operation.shared)
            return
        if many is insert_many:
            inserted = set(self._execute(*many(operations)))
            for number, operation in zip(group, operations, strict=True):
                name = operation.shared[_ID], operation.shared[_DIGEST]
                self._answers[number] = Rows([name] if name in inserted else ())
                inserted.discard(name)
            return
        self._execute(*many(operations))
        used = self._used(len(operations))
        left = []
        for place, (number, operation) in enumerate(zip(group, operations, strict=True)):
            if place in used:
                self._answers[number] = used[place]
            elif len(operation.shared.match.digests) > 1:  # it may be there under an older secret
                left.append(number)
            else:
                self._answers[number] = Rows()
        if len(left) > 1 and not self._connection.in_transaction:
            self._in_one_transaction([left[:1], *([number] for number in left[1:])])
        else:
            self._run_alone(left)

    def _used(self, count: int) -> dict[int, Rows | Exception]:
        """What the shared uses got, by their places. Outside of a transaction they are durable, so none
        is tried again: where one row cannot be read, the others are read one by one."""
        is_durable = not self._connection.in_transaction  # asked before: an error may end a transaction
        with contextlib.suppress(Exception) if is_durable else contextlib.nullcontext():
            return {place: Rows([_from_json(row)]) for place, row in self._json(_ANSWERS, (count,))}
        answers: dict[int, Rows | Exception] = {}
        for place in range(count):
            try:
                answers |= {its: Rows([_from_json(row)]) for its, row in self._json(_ANSWER, (place,))}
            except Exception as own:
                answers[place] = own
        return answers

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

    def _json(self, sql: str, parameters: Sequence[Any]) -> Any:
        [(text,)] = self._execute(sql, parameters)
        return json.loads(text)

    def _execute(self, sql: str, parameters: Sequence[Any] = ()) -> Rows:
        return Rows(self._connection.execute(sql, parameters).fetchall())


_NOT_YET: Final = Rows()
_HOPELESS: Final = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_IOERR}
"""A lock that was waited for in vain, and a disk that fails: for the next write just the same."""


def _in_order(operations: Sequence[Operation]) -> list[list[int]]:
    """Groups of one kind each, by their places, so that operations on one subject keep their order."""
    kind = operations[0].kind
    if all(operation.kind is kind for operation in operations):
        return [list(range(len(operations)))]
    last: dict[Hashable, tuple[int, object]] = {}
    levels: defaultdict[int, defaultdict[object, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, operation in enumerate(operations):
        level, kind = 0, operation.kind
        for subject in operation.subjects:
            seen = last.get(subject)
            if seen is not None:
                level = max(level, seen[0] + (seen[1] is not kind))
        for subject in operation.subjects:
            last[subject] = level, kind
        levels[level][kind].append(number)
    return [group for level in sorted(levels) for group in levels[level].values()]


def _is_shared(operations: Sequence[Operation], group: list[int]) -> bool:
    return len(group) > 1 and operations[group[0]].kind is not None


def _found(by_digest: dict[bytes, tuple[Any, ...]], match: Match, limit: int) -> Rows:
    if len(match.digests or ()) == 1:
        row = by_digest.get(match.digests[0]) if match.digests else None
        return Rows((row,) if row is not None and _fits(row, match) else ())
    digests = dict.fromkeys(match.digests or ())
    found = [by_digest[d] for d in digests if d in by_digest and _fits(by_digest[d], match)]
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
