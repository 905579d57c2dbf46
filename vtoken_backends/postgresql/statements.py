"""The SQL. It reads and writes rows as JSON texts by the names of their columns, and holds no value.

Reading: one statement returns everything that a batch needs, so that all of it is of one moment. With each
row comes its version, ``xmin``: the transaction that wrote it.

Writing: rows are changed only if they still have the version that was read. A statement that finds less than
it was to change divides by zero (:data:`CONFLICT`), which undoes the whole transaction without a key in the
server's log. Rows are locked in the order of their primary keys, so that two batches do not wait for each
other. Every statement also makes its transaction durable, whatever the role's ``synchronous_commit``, and
bounds its wait for locks. It does so by itself, because a connection pooler hands sessions around.
"""

# ruff: noqa: S608  # the SQL is made from this module's own texts; values are always parameters

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, cast

from vtoken.backend import PRETENDED, REMEMBERED_USES, STALE_HOLD, Budget, Match, State, StoredToken, Use
from vtoken_backends.postgresql.board import Board, Insert, Needs, Present, line_of
from vtoken_backends.postgresql.rows import (
    Row,
    binary,
    binary_array,
    budget_row,
    first_number_not_below,
    number_of,
    patch,
    to_json,
    token_row,
)
from vtoken_backends.postgresql.tables import quoted

CONFLICT: Final = "22012"
"""The SQLSTATE of a division by zero."""


class Statement(NamedTuple):
    """A statement with its parameters, which are not shown."""

    text: str
    parameters: Sequence[object] = ()

    def __repr__(self) -> str:
        return "<Statement>"


# In these texts `@` stands for the schema and the beginning of the tables' names, and `{n}` for the number of
# a parameter.

# PostgreSQL expects 100 rows of a list in JSON. `LIMIT` tells it how many there are: otherwise it would read
# a whole table for one row.

# Reading. `origin` is loaded beside `token`, because a use may have been counted by the token that the key
# came from.
_BY_DIGEST: Final = "SELECT unnest(ARRAY[token, origin]) FROM @keys WHERE digest = ANY (${n}::text::bytea[])"
_BY_ID: Final = "SELECT unnest(${n}::bigint[])"
# Lateral, with an `OFFSET` that keeps it so: each line is looked for in the index of active tokens. A plan
# that was made while that index was small would otherwise read the whole of it.
_BY_LINE: Final = """
    SELECT o.id
    FROM (
        SELECT * FROM json_to_recordset(${n}::text::json)
            AS n(content_type text, object_id text, slug text, context bytea)
        LIMIT {count}
    ) AS n
    CROSS JOIN LATERAL (
        SELECT t.id FROM @tokens AS t
        WHERE t.content_type = n.content_type AND t.object_id = n.object_id AND t.slug = n.slug
            AND t.context = n.context AND t.state = 0
        OFFSET 0
    ) AS o
"""
_BY_PURPOSE: Final = """
    SELECT o.id
    FROM (
        SELECT * FROM json_to_recordset(${n}::text::json)
            AS n(content_type text, object_id text, slug text)
        LIMIT {count}
    ) AS n
    CROSS JOIN LATERAL (
        SELECT t.id FROM @tokens AS t
        WHERE t.content_type = n.content_type AND t.object_id = n.object_id AND t.slug = n.slug
            AND t.state = 0
        OFFSET 0
    ) AS o
"""
_TOKENS: Final = """
SELECT 'token', t.xmin::text, row_to_json(t)::text FROM @tokens AS t WHERE t.id = ANY (ARRAY({sources}))
"""
_RECEIPTS: Final = """
SELECT 'receipt', '', row_to_json(r)::text
FROM (
    SELECT * FROM json_to_recordset(${n}::text::json)
            AS n(digest bytea, use_id text) LIMIT {count}
) AS n
JOIN @keys AS k ON k.digest = n.digest
JOIN @receipts AS r
    ON r.token = ANY (ARRAY[k.token, k.origin]) AND r.origin = k.origin AND r.use_id = n.use_id
"""
_BUDGETS: Final = """
SELECT 'budget', b.xmin::text, row_to_json(b)::text
FROM (SELECT * FROM json_to_recordset(${n}::text::json)
            AS n(object bytea, name bytea) LIMIT {count}) AS n
JOIN @budgets AS b ON b.object = n.object AND b.name = n.name
"""
_FOUND: Final = "SELECT t.xmin::text, row_to_json(t)::text FROM @tokens AS t"

# Writing. `$1` is the rows, `$2` how many milliseconds to wait for a lock, `$3` how many rows are to change.
# Each statement joins `tuned` so that it is evaluated before the first row is locked.
_TUNED: Final = """
tuned AS MATERIALIZED (
    SELECT set_config('lock_timeout', $2::text, true),
        set_config('synchronous_commit', CASE current_setting('synchronous_commit')
            WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, true)
)
"""
_UNTUNED: Final = "tuned AS MATERIALIZED (SELECT $2::text)"
_ALL_OR_NOTHING: Final = "SELECT 1 / (count(*) = $3::bigint)::integer FROM changed"
_MUTABLE: Final = ", ".join(
    name
    for name in StoredToken._fields
    if name not in ("id", "content_type", "object_id", "slug", "context", "is_beside", "created_at")
)
_UPDATE_TOKENS: Final = f"""
WITH {_TUNED},
same AS MATERIALIZED (
    SELECT t.id, n.patch
    FROM tuned CROSS JOIN (
        SELECT * FROM json_to_recordset($1::text::json)
            AS n(id bigint, version text, patch json) LIMIT $3::bigint
    ) AS n
    JOIN @tokens AS t ON t.id = n.id AND t.xmin::text = n.version
    ORDER BY t.id FOR UPDATE OF t
),
changed AS (
    UPDATE @tokens AS t
    SET ({_MUTABLE}) = (SELECT {_MUTABLE} FROM json_populate_record(t, same.patch))
    FROM same WHERE t.id = same.id
    RETURNING 1
)
{_ALL_OR_NOTHING}
"""
_UPDATE_BUDGETS: Final = f"""
WITH {_TUNED},
same AS MATERIALIZED (
    SELECT b.object, b.name, n.spent, n.strikes, n.until
    FROM tuned CROSS JOIN (
        SELECT * FROM json_to_recordset($1::text::json)
            AS n(object bytea, name bytea, version text, spent bigint, strikes integer, until bigint)
        LIMIT $3::bigint
    ) AS n
    JOIN @budgets AS b ON b.object = n.object AND b.name = n.name AND b.xmin::text = n.version
    ORDER BY b.object, b.name FOR UPDATE OF b
),
changed AS (
    UPDATE @budgets AS b SET spent = same.spent, strikes = same.strikes, until = same.until
    FROM same WHERE b.object = same.object AND b.name = same.name
    RETURNING 1
)
{_ALL_OR_NOTHING}
"""
_DELETE_BUDGETS: Final = f"""
WITH {_TUNED},
same AS MATERIALIZED (
    SELECT b.object, b.name
    FROM tuned CROSS JOIN (
        SELECT * FROM json_to_recordset($1::text::json)
            AS n(object bytea, name bytea, version text)
        LIMIT $3::bigint
    ) AS n
    JOIN @budgets AS b ON b.object = n.object AND b.name = n.name AND b.xmin::text = n.version
    ORDER BY b.object, b.name FOR UPDATE OF b
),
changed AS (
    DELETE FROM @budgets AS b USING same WHERE b.object = same.object AND b.name = same.name RETURNING 1
)
{_ALL_OR_NOTHING}
"""
_INSERT: Final = f"""
WITH {_TUNED},
changed AS (
    INSERT INTO @{{table}} SELECT n.*
    FROM tuned, json_populate_recordset(NULL::@{{table}}, $1::text::json) AS n
    ON CONFLICT DO NOTHING
    RETURNING 1
)
"""
_INSERT_TOKENS: Final = _INSERT.format(table="tokens") + _ALL_OR_NOTHING
_INSERT_KEYS: Final = _INSERT.format(table="keys") + _ALL_OR_NOTHING
_INSERT_BUDGETS: Final = _INSERT.format(table="budgets") + _ALL_OR_NOTHING
_INSERT_RECEIPTS: Final = _INSERT.format(table="receipts") + "SELECT count(*) FROM changed"
# The keys of a token are changed by nobody else while its row is locked.
_MOVE_KEYS: Final = f"""
WITH {_TUNED},
changed AS (
    UPDATE @keys AS k SET token = n.token, origin = n.origin
    FROM tuned, (
        SELECT * FROM json_to_recordset($1::text::json)
            AS n(digest bytea, old bigint, token bigint, origin bigint)
        LIMIT $3::bigint
    ) AS n
    WHERE k.digest = n.digest AND k.token = n.old
    RETURNING 1
)
{_ALL_OR_NOTHING}
"""
_DELETE_KEYS: Final = f"""
WITH {_TUNED},
changed AS (
    DELETE FROM @keys AS k
    USING tuned, (
        SELECT * FROM json_to_recordset($1::text::json)
            AS n(digest bytea, old bigint) LIMIT $3::bigint
    ) AS n
    WHERE k.digest = n.digest AND k.token = n.old
    RETURNING 1
)
{_ALL_OR_NOTHING}
"""
_FORGET_RECEIPTS: Final = f"""
WITH {_TUNED},
oldest AS MATERIALIZED (
    SELECT n.token, (
        SELECT latest.at FROM @receipts AS latest WHERE latest.token = n.token
        ORDER BY latest.at DESC OFFSET {REMEMBERED_USES - 1} LIMIT 1
    ) AS at
    FROM (SELECT * FROM json_to_recordset($1::text::json) AS n(token bigint) LIMIT $3::bigint) AS n
)
DELETE FROM @receipts AS r USING tuned, oldest WHERE r.token = oldest.token AND r.at < oldest.at
"""

# A use in one round trip, of the tokens that most are: not held, bound to no context, presented by a key of
# their own, and with no receipt of the same use. It changes nothing where one of this does not hold, and the
# use is then played on a board. The row itself is looked at again once it is locked, so that of several uses
# of one token, here or elsewhere, each finds what the others left. `state + 0` keeps PostgreSQL from reading
# the whole index of active tokens while it has no statistics.
_USE: Final = f"""
WITH {_TUNED},
usable AS MATERIALIZED (
    SELECT t.id, n.place, n.at, n.use_id
    FROM tuned CROSS JOIN (
        SELECT * FROM json_to_recordset($1::text::json)
            AS n(place integer, digest bytea, kind text, content_type text, object_id text, slug text,
                context bytea, now bigint, at bigint, use_id text)
        LIMIT $3::bigint
    ) AS n
    JOIN @keys AS k ON k.digest = n.digest AND k.origin = k.token
    JOIN @tokens AS t ON t.id = k.token
    WHERE t.state + 0 = 0 AND t.holds = '[]' AND t.expires_at >= n.now AND t.context = ''
        AND (t.max_uses IS NULL OR t.uses < t.max_uses) AND (t.uses = 0 OR n.use_id = '')
        AND (n.content_type IS NULL OR t.content_type = n.content_type)
        AND (n.object_id IS NULL OR t.object_id = n.object_id)
        AND (n.slug IS NULL OR t.slug = n.slug)
        AND (n.context IS NULL OR t.context = n.context)
        AND EXISTS (
            SELECT FROM jsonb_array_elements(t.keys) AS key
            WHERE key ->> 'digest' = encode(n.digest, 'hex') AND (key ->> 'expires_at')::bigint >= n.now
                AND (n.kind IS NULL OR key ->> 'kind' = n.kind)
        )
    ORDER BY t.id FOR UPDATE OF t
),
used AS (
    UPDATE @tokens AS t
    SET uses = t.uses + 1, used_at = usable.at,
        state = CASE WHEN t.uses + 1 >= t.max_uses THEN {State.USED.value} ELSE t.state END,
        ends_at = CASE WHEN t.uses + 1 >= t.max_uses THEN LEAST(t.ends_at, usable.at - 1) ELSE t.ends_at END
    FROM usable WHERE t.id = usable.id
    RETURNING usable.place, usable.use_id, usable.at, t.id, row_to_json(t)::text AS new
),
receipts AS (
    INSERT INTO @receipts (token, origin, use_id, at) SELECT id, id, use_id, at FROM used WHERE use_id <> ''
    ON CONFLICT DO NOTHING
)
SELECT place, new FROM used
"""

# An insert in one round trip that replaces what is active in its line, where nothing is in its way: no key or
# id is taken, and nobody else issues for the line at the same time. It changes nothing where one of the rows
# cannot be inserted, and all of them are then played on a board. Each `count(*)` has the statement before it
# carried out first.
_ISSUE: Final = f"""
WITH {_TUNED},
new AS MATERIALIZED (
    SELECT n.* FROM tuned, (
        SELECT * FROM json_populate_recordset(NULL::@tokens, $1::text::json) LIMIT $3::bigint
    ) AS n
),
old AS MATERIALIZED (
    SELECT t.id, o.at
    FROM (
        SELECT o.id, new.created_at AS at
        FROM new CROSS JOIN LATERAL (
            SELECT t.id FROM @tokens AS t
            WHERE t.content_type = new.content_type AND t.object_id = new.object_id AND t.slug = new.slug
                AND t.context = new.context AND t.state = 0
            OFFSET 0
        ) AS o
    ) AS o
    JOIN @tokens AS t ON t.id = o.id
    WHERE t.state + 0 = 0
    ORDER BY t.id FOR UPDATE OF t
),
replaced AS (
    UPDATE @tokens AS t SET state = {State.REPLACED.value}, ends_at = LEAST(t.ends_at, old.at - 1)
    FROM old WHERE t.id = old.id
    RETURNING 1
),
inserted AS (
    INSERT INTO @tokens SELECT new.* FROM (SELECT count(*) FROM replaced) AS first, new
    ON CONFLICT DO NOTHING
    RETURNING 1
),
changed AS (
    INSERT INTO @keys (digest, token, origin)
    SELECT decode(key ->> 'digest', 'hex'), new.id, new.id
    FROM (SELECT count(*) FROM inserted) AS first, new, jsonb_array_elements(new.keys) AS key
    ON CONFLICT DO NOTHING
    RETURNING 1
)
SELECT 1 / (
    (SELECT count(*) FROM inserted) = $3::bigint AND (SELECT count(*) FROM changed) = $4::bigint
)::integer
"""

# Removing. Returns how many tokens were found, and how many of them were still to be removed once they were
# locked.
_HELD: Final = f"""EXISTS (
    SELECT FROM jsonb_array_elements(t.holds) AS hold
    WHERE (hold ->> 'until')::bigint > $3::bigint
        AND (hold ->> 'until')::bigint <= $3::bigint + {STALE_HOLD}
)"""
_REMOVE: Final = f"""
WITH {_TUNED},
found AS MATERIALIZED (
    SELECT t.id FROM @tokens AS t WHERE {{where}} ORDER BY {{order}} LIMIT $1::bigint
),
due AS MATERIALIZED (
    SELECT t.id FROM tuned, found JOIN @tokens AS t ON t.id = found.id
    WHERE {{where}} ORDER BY t.id FOR UPDATE OF t
),
removed AS (
    DELETE FROM @tokens AS t WHERE t.id = ANY (ARRAY(SELECT id FROM due)) RETURNING t.id, t.keys
),
removed_keys AS (
    DELETE FROM @keys AS k WHERE k.digest = ANY (ARRAY(
        SELECT decode(key ->> 'digest', 'hex') FROM removed, jsonb_array_elements(removed.keys) AS key
    ))
),
removed_receipts AS (
    DELETE FROM @receipts AS r WHERE r.token = ANY (ARRAY(SELECT id FROM removed))
)
SELECT (SELECT count(*) FROM found), (SELECT count(*) FROM removed)
"""
_PURGE: Final = _REMOVE.format(where=f"t.ends_at < $4::bigint AND NOT {_HELD}", order="t.ends_at, t.id")
_ERASE: Final = _REMOVE.format(where="t.content_type = $3::text AND t.object_id = $4::text", order="t.id")
_PURGE_BUDGETS: Final = f"""
WITH {_TUNED},
found AS MATERIALIZED (
    SELECT b.object, b.name FROM @budgets AS b WHERE b.until <= $3::bigint ORDER BY b.until LIMIT $1::bigint
),
due AS MATERIALIZED (
    SELECT b.object, b.name
    FROM tuned, found JOIN @budgets AS b ON b.object = found.object AND b.name = found.name
    WHERE b.until <= $3::bigint ORDER BY b.object, b.name FOR UPDATE OF b
),
removed AS (
    DELETE FROM @budgets AS b USING due WHERE b.object = due.object AND b.name = due.name RETURNING 1
)
SELECT (SELECT count(*) FROM found), (SELECT count(*) FROM removed)
"""
_RESET: Final = f"""
WITH {_TUNED},
due AS MATERIALIZED (
    SELECT b.object, b.name FROM tuned, @budgets AS b
    WHERE b.object = $1::bytea AND ($3::text::bytea[] IS NULL OR b.name = ANY ($3::text::bytea[]))
    ORDER BY b.object, b.name FOR UPDATE OF b
),
removed AS (
    DELETE FROM @budgets AS b USING due WHERE b.object = due.object AND b.name = due.name RETURNING 1
)
SELECT count(*) FROM removed
"""
_COUNT: Final = f"""
SELECT slug,
    count(*),
    count(*) FILTER (WHERE state = 0 AND expires_at >= $1::bigint),
    count(*) FILTER (WHERE state = 0 AND expires_at < $1::bigint),
    count(*) FILTER (WHERE state <> 0 AND uses > 0)
FROM @tokens WHERE content_type <> '{PRETENDED}' GROUP BY slug
"""
_NOTE: Final = f"""
WITH {_TUNED}
INSERT INTO @notes AS old SELECT $1::text, $3::text FROM tuned
ON CONFLICT (name) DO UPDATE SET text = CASE WHEN $4::boolean THEN $3::text ELSE old.text END
RETURNING text
"""
_READ_NOTE: Final = "SELECT text FROM @notes WHERE name = $1::text"


class Statements:
    """The statements on the tables of one schema.

    Args:
        schema: its name, not quoted.
        is_tuned: whether they make their transaction durable and bound its wait for locks. Within a
            transaction of the application's own, that is the application's affair.
    """

    def __init__(self, schema: str, *, is_tuned: bool = True) -> None:
        self._prefix = f"{quoted(schema)}.vtoken_"
        self._tuned = _TUNED if is_tuned else _UNTUNED
        self._texts: dict[str, str] = {}

    def _text(self, template: str) -> str:
        text = self._texts.get(template)
        if text is None:
            text = self._texts[template] = template.replace(_TUNED, self._tuned).replace("@", self._prefix)
        return text

    # Reading --------------------------------------------------------------------------------------

    def read(self, needs: Needs) -> Statement:
        """Returns rows of (kind, version, JSON text)."""
        parameters: list[object] = []

        def with_parameter(template: str, value: object, count: int = 0) -> str:
            parameters.append(value)
            n = len(parameters)
            if not count:
                return template.format(n=n)
            parameters.append(count)
            return template.format(n=n, count=f"${n + 1}::bigint")

        sources: list[str] = []
        parts: list[str] = []
        if needs.digests:
            sources.append(with_parameter(_BY_DIGEST, binary_array(needs.digests)))
        if needs.ids:
            numbers = [number for token_id in needs.ids if (number := number_of(token_id)) is not None]
            sources.append(with_parameter(_BY_ID, numbers))
        if needs.lines:
            lines = [{**line._asdict(), "context": binary(line.context)} for line in needs.lines]
            sources.append(with_parameter(_BY_LINE, to_json(lines), len(lines)))
        if needs.purposes:
            purposes = [purpose._asdict() for purpose in needs.purposes]
            sources.append(with_parameter(_BY_PURPOSE, to_json(purposes), len(purposes)))
        if sources:
            parts.append(_TOKENS.format(sources=" UNION ".join(sources)))
        if needs.uses:
            uses = [{"digest": binary(use.digest), "use_id": use.use_id} for use in needs.uses]
            parts.append(with_parameter(_RECEIPTS, to_json(uses), len(uses)))
        if needs.budgets:
            budgets = [budget_row(budget) for budget in needs.budgets]
            parts.append(with_parameter(_BUDGETS, to_json(budgets), len(budgets)))
        return Statement(self._text(" UNION ALL ".join(parts)), parameters)

    def find(self, match: Match, limit: int, after: str | None) -> Statement:
        """Returns rows of (version, JSON text)."""
        where, parameters = _where(match)
        if after is not None:
            parameters.append(first_number_not_below(after))
            where += f" AND t.id < ${len(parameters)}::bigint"
        parameters.append(limit)
        text = f"{_FOUND} WHERE {where} ORDER BY t.id DESC LIMIT ${len(parameters)}::bigint"
        return Statement(self._text(text), parameters)

    def count(self, now: int) -> Statement:
        """Returns the fields of :class:`~vtoken.backend.SlugCount`, in the order of :data:`_COUNT`."""
        return Statement(self._text(_COUNT), [now])

    def read_note(self, name: str) -> Statement:
        return Statement(self._text(_READ_NOTE), [name])

    # Locking --------------------------------------------------------------------------------------

    def lock(self, board: Board, patience: int) -> list[Statement]:
        """Lock the rows of a board until the end of the transaction, in the order in which all do it.

        Args:
            board: what was loaded.
            patience: how many milliseconds to wait for a lock.
        """
        statements = [self.tune(patience)]
        if board.tokens_before:
            numbers = [number_of(token_id) for token_id in board.tokens_before]
            text = "SELECT FROM @tokens WHERE id = ANY ($1::bigint[]) ORDER BY id FOR UPDATE"
            statements.append(Statement(self._text(text), [numbers]))
        if board.budgets_before:
            text = (
                "SELECT FROM json_to_recordset($1::text::json) AS n(object bytea, name bytea)"
                " JOIN @budgets AS b ON b.object = n.object AND b.name = n.name"
                " ORDER BY b.object, b.name FOR UPDATE OF b"
            )
            rows = [budget_row(budget) for budget in board.budgets_before]
            statements.append(Statement(self._text(text), [to_json(rows)]))
        return statements

    def tune(self, patience: int) -> Statement:
        return Statement(f"WITH {self._tuned.replace('$2', '$1')} SELECT FROM tuned", [str(patience)])

    def page(self, match: Match, after: int, limit: int, *, is_locking: bool) -> Statement:
        """The next of the tokens that ``deactivate`` may have to change. Returns rows as :meth:`find`.

        Args:
            match: as of ``deactivate``.
            after: the number of the last one of the page before; -1 for the first page.
            limit: how many at most.
            is_locking: whether they are locked.
        """
        where, parameters = _where(match)
        parameters += [after, limit]
        # A key that was taken over ends in a token that has ended, too.
        to_change = "true" if match.digests is not None else "(t.state = 0 OR t.holds <> '[]')"
        text = (
            f"{_FOUND} WHERE {where} AND {to_change}"
            f" AND t.id > ${len(parameters) - 1}::bigint"
            f" ORDER BY t.id LIMIT ${len(parameters)}::bigint"
        )
        if is_locking:
            text += " FOR UPDATE OF t"
        return Statement(self._text(text), parameters)

    # Writing --------------------------------------------------------------------------------------

    def write(self, board: Board, patience: int) -> list[Statement]:
        """What makes the store as the board is; empty where nothing has changed.

        Args:
            board: what was loaded, and what became of it.
            patience: how many milliseconds to wait for a lock.
        """
        changes = [
            (before, after)
            for token_id, before in board.tokens_before.items()
            if (after := board.tokens[token_id]) is not before
        ]
        new = [token for token_id, token in board.tokens.items() if token_id not in board.tokens_before]
        patches = [
            {"id": number_of(before.id), "version": board.versions[before.id], "patch": patch(before, after)}
            for before, after in changes
        ]
        new_rows = [token_row(token, was_added=token.id in board.added) for token in sorted(new, key=line_of)]
        moved, lost, added = _keys(changes, new)
        receipts = [
            {**receipt._asdict(), "token": number_of(receipt.token), "origin": number_of(receipt.origin)}
            for receipt in board.new_receipts
        ]
        changed_budgets, new_budgets, lost_budgets = _budgets(board)
        steps: list[tuple[str, list[Row]]] = [
            (_UPDATE_TOKENS, patches),
            (_INSERT_TOKENS, new_rows),
            (_DELETE_KEYS, lost),
            (_MOVE_KEYS, moved),
            (_INSERT_KEYS, added),
            (_UPDATE_BUDGETS, changed_budgets),
            (_DELETE_BUDGETS, lost_budgets),
            (_INSERT_BUDGETS, new_budgets),
        ]
        wait = str(patience)
        statements = [
            Statement(self._text(template), [to_json(rows), wait, len(rows)])
            for template, rows in steps
            if rows
        ]
        if receipts:
            statements.append(Statement(self._text(_INSERT_RECEIPTS), [to_json(receipts), wait]))
        if board.full_of_receipts:
            rows = [{"token": number_of(token_id)} for token_id in board.full_of_receipts]
            statements.append(Statement(self._text(_FORGET_RECEIPTS), [to_json(rows), wait, len(rows)]))
        return statements

    def use(self, operations: Sequence[Present], patience: int) -> Statement:
        """Returns (place among the operations, JSON text of the token) of those that were carried out.

        Args:
            operations: for which :attr:`Present.is_plain` holds.
            patience: how many milliseconds to wait for a lock.
        """
        rows = [_use_row(place, operation) for place, operation in enumerate(operations)]
        return Statement(self._text(_USE), [to_json(rows), str(patience), len(rows)])

    def issue(self, operations: Sequence[Insert], patience: int) -> Statement:
        """Returns nothing of use: all of them are carried out, or none.

        Args:
            operations: for which :attr:`Insert.is_plain` holds, each of a line of its own.
            patience: how many milliseconds to wait for a lock.
        """
        tokens = sorted([operation.token for operation in operations], key=line_of)
        rows = [token_row(token, was_added=False) for token in tokens]
        keys = sum([len(token.keys) for token in tokens])
        return Statement(self._text(_ISSUE), [to_json(rows), str(patience), len(rows), keys])

    def purge(self, limit: int, patience: int, now: int, before: int) -> Statement:
        """Returns (how many were found, how many of them were removed)."""
        return Statement(self._text(_PURGE), [limit, str(patience), now, before])

    def purge_budgets(self, limit: int, patience: int, before: int) -> Statement:
        """As :meth:`purge`."""
        return Statement(self._text(_PURGE_BUDGETS), [limit, str(patience), before])

    def erase(self, limit: int, patience: int, content_type: str, object_id: str) -> Statement:
        """As :meth:`purge`."""
        return Statement(self._text(_ERASE), [limit, str(patience), content_type, object_id])

    def reset(self, budgets_of: bytes, patience: int, names: tuple[bytes, ...] | None) -> Statement:
        """Returns how many budgets were forgotten."""
        chosen = None if names is None else binary_array(names)
        return Statement(self._text(_RESET), [budgets_of, str(patience), chosen])

    def note(self, name: str, patience: int, text: str, replace: bool) -> Statement:
        return Statement(self._text(_NOTE), [name, str(patience), text, replace])


def _use_row(place: int, operation: Present) -> Row:
    match, change = operation.key, cast("Use", operation.change)
    [digest] = cast("tuple[bytes, ...]", match.digests)
    return {
        "place": place,
        "digest": binary(digest),
        "kind": match.kind,
        "content_type": match.content_type,
        "object_id": match.object_id,
        "slug": match.slug,
        "context": None if match.context is None else binary(match.context),
        "now": operation.now,
        "at": change.at,
        "use_id": change.use_id,
    }


def _where(match: Match) -> tuple[str, list[object]]:
    """The condition on ``t`` of a match, but for what is to be tested on the key that has a digest."""
    parameters: list[object] = []
    conditions = ["true"]

    def add(condition: str, value: object) -> None:
        parameters.append(value)
        conditions.append(condition.format(n=len(parameters)))

    if match.id is not None:
        add("t.id = ${n}::bigint", number_of(match.id))  # NULL equals nothing
    if match.digests is not None:
        by_key = "SELECT token FROM @keys WHERE digest = ANY (${n}::text::bytea[])"
        add(f"t.id = ANY (ARRAY({by_key}))", binary_array(match.digests))
    if match.content_type is not None:
        add("t.content_type = ${n}::text", match.content_type)
    if match.object_id is not None:
        add("t.object_id = ${n}::text", match.object_id)
    if match.slug is not None:
        add("t.slug = ${n}::text", match.slug)
    if match.context is not None:
        add("t.context = ${n}::bytea", match.context)
    if match.active or match.valid_at is not None:
        conditions.append("t.state = 0")
    if match.valid_at is not None:
        add("t.expires_at >= ${n}::bigint", match.valid_at)
    return " AND ".join(conditions), parameters


def _keys(
    changes: list[tuple[StoredToken, StoredToken]], new: list[StoredToken]
) -> tuple[list[Row], list[Row], list[Row]]:
    """The keys that go from one token to another, those that are lost, and the new ones."""
    differing = [(before, after) for before, after in changes if before.keys is not after.keys]
    old = {key.digest: before for before, _ in differing for key in before.keys}
    now = {key.digest: (after, key) for after in (*(a for _, a in differing), *new) for key in after.keys}
    moved: list[Row] = []
    added: list[Row] = []
    for digest, (after, key) in sorted(now.items(), key=lambda item: item[0]):
        row: Row = {"digest": binary(digest), "token": number_of(after.id)}
        if digest not in old:
            added.append({**row, "origin": number_of(key.origin)})
        elif old[digest].id != after.id:
            moved.append({**row, "old": number_of(old[digest].id), "origin": number_of(key.origin)})
    lost: list[Row] = [
        {"digest": binary(digest), "old": number_of(before.id)}
        for digest, before in sorted(old.items())
        if digest not in now
    ]
    return moved, lost, added


def _budgets(board: Board) -> tuple[list[Row], list[Row], list[Row]]:
    """The budgets that have changed, the new ones, and those that are forgotten."""
    changed: list[Row] = []
    new: list[Row] = []
    lost: list[Row] = []
    for budget, state in sorted(board.budgets.items(), key=_name):
        before = board.budgets_before.get(budget)
        if before is None:
            if state is not None:
                new.append({**budget_row(budget), **state._asdict()})
        elif state is None:
            lost.append({**budget_row(budget), "version": before.version})
        elif state != before.state:
            changed.append({**budget_row(budget), "version": before.version, **state._asdict()})
    return changed, new, lost


def _name(item: tuple[Budget, object]) -> tuple[bytes, bytes]:
    return item[0].object, item[0].name
