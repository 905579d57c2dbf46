"""The SQL, and what goes in and comes out: tokens, conditions and changes as columns and parameters.

The statements count on READ COMMITTED. There, ``FOR UPDATE`` waits for the writer of a row and then looks at
the row again, as it is now: what a statement has locked is what it changes. Most lock rows in the order of
their ids, so that they don't wait for each other; where two do after all, PostgreSQL ends one, which is run
again.
"""

# ruff: noqa: S608  # the SQL is put together from this module's own texts; values are always parameters

from __future__ import annotations

from typing import Final, LiteralString

from vtoken.backend import Change, ForgetKey, Lease, Match, Release, SetExtraData, StoredToken, Use

SCHEMA: Final = 1

# text COLLATE "C" compares bytes. `overlap` is the id of the token whose insert began the overlap.
CREATE: Final = """
CREATE TABLE vtoken_tokens (
    id text COLLATE "C" CONSTRAINT vtoken_tokens_id PRIMARY KEY,
    content_type text COLLATE "C" NOT NULL,
    object_id text COLLATE "C" NOT NULL,
    slug text COLLATE "C" NOT NULL,
    digest bytea NOT NULL CONSTRAINT vtoken_tokens_digest UNIQUE,
    scheme text NOT NULL,
    secret_id text NOT NULL,
    plain_key text NOT NULL,
    nonce text NOT NULL,
    context bytea NOT NULL,
    created_at bigint NOT NULL,
    expires_at bigint NOT NULL,
    ends_at bigint NOT NULL,
    is_active boolean NOT NULL,
    extra_data text,
    max_uses bigint NOT NULL,
    uses bigint NOT NULL,
    used_at bigint NOT NULL,
    use_ids text[] COLLATE "C" NOT NULL,
    lease_id text COLLATE "C" NOT NULL,
    lease_until bigint NOT NULL,
    overlap text COLLATE "C" NOT NULL
);
CREATE INDEX vtoken_tokens_active ON vtoken_tokens (object_id, content_type, slug) WHERE is_active;
CREATE INDEX vtoken_tokens_age ON vtoken_tokens (created_at, id);
CREATE INDEX vtoken_tokens_end ON vtoken_tokens (ends_at);
CREATE TABLE vtoken_budgets (
    content_type text COLLATE "C",
    object_id text COLLATE "C",
    slug text COLLATE "C",
    kind text COLLATE "C",
    spent bigint NOT NULL,
    strikes integer NOT NULL,
    until bigint NOT NULL,
    CONSTRAINT vtoken_budgets_name PRIMARY KEY (object_id, content_type, slug, kind)
);
CREATE INDEX vtoken_budgets_until ON vtoken_budgets (until);
CREATE TABLE vtoken_schema AS SELECT 1 AS version;
"""
RELATIONS: Final = [
    "vtoken_schema",
    "vtoken_tokens",
    "vtoken_tokens_id",
    "vtoken_tokens_digest",
    "vtoken_tokens_active",
    "vtoken_tokens_age",
    "vtoken_tokens_end",
    "vtoken_budgets",
    "vtoken_budgets_name",
    "vtoken_budgets_until",
]
MISSING: Final = "SELECT name FROM unnest(%(names)s::text[]) AS name WHERE to_regclass(name) IS NULL"

_COLUMNS: Final[LiteralString] = """
    t.id, t.content_type, t.object_id, t.slug, t.digest, t.scheme, t.secret_id, t.plain_key, t.nonce,
    t.context, t.created_at, t.expires_at, t.ends_at, t.is_active, t.extra_data, t.max_uses, t.uses,
    t.used_at, t.use_ids, t.lease_id, t.lease_until
"""
_NEW: Final[LiteralString] = """
    %(id)s, %(content_type)s, %(object_id)s, %(slug)s, %(digest)s, %(scheme)s, %(secret_id)s, %(plain_key)s,
    %(nonce)s, %(context)s, %(created_at)s, %(expires_at)s, %(ends_at)s, %(is_active)s, %(extra_data)s,
    %(max_uses)s, %(uses)s, %(used_at)s, %(use_ids)s::text[], %(lease_id)s, %(lease_until)s
"""

# One lock for a content type, object id and slug, until the end of the transaction. The statement after it
# sees all that others did under it, because its snapshot is taken when it begins. Two names that share a lock
# by accident wait for each other, no more.
LOCK: Final = """
SELECT pg_advisory_xact_lock(
    hashtextextended(concat_ws('/', %(content_type)s::text, %(object_id)s::text, %(slug)s::text), 0)
)
"""
_LOCK_OVERLAP: Final[LiteralString] = """
SELECT pg_advisory_xact_lock(hashtextextended(concat_ws('/', content_type, object_id, slug), 0))
FROM vtoken_tokens WHERE {match} AND overlap <> ''
"""

ADD: Final = f"INSERT INTO vtoken_tokens VALUES ({_NEW}, '') ON CONFLICT DO NOTHING"

# Returns whether it was inserted, and whether there was a valid one.
_REPLACE: Final[LiteralString] = """
WITH old AS (
    SELECT id, expires_at >= %(created_at)s AND lease_until <= %(created_at)s AS is_valid
    FROM vtoken_tokens
    WHERE object_id = %(object_id)s AND content_type = %(content_type)s AND slug = %(slug)s AND is_active
    ORDER BY id FOR UPDATE
),
inserted AS (
    INSERT INTO vtoken_tokens
    SELECT {new}, CASE WHEN %(overlaps)s AND EXISTS (SELECT FROM old) THEN %(id)s ELSE '' END
    WHERE NOT (%(only_if_none_valid)s AND EXISTS (SELECT FROM old WHERE is_valid))
    ON CONFLICT DO NOTHING
    RETURNING id
),
changed AS (
    UPDATE vtoken_tokens AS t SET {change} FROM old, inserted WHERE t.id = old.id
)
SELECT EXISTS (SELECT FROM inserted), EXISTS (SELECT FROM old WHERE is_valid)
"""
REPLACE: Final = _REPLACE.format(
    new=_NEW, change="is_active = false, ends_at = LEAST(t.ends_at, %(created_at)s - 1)"
)
OVERLAP: Final = _REPLACE.format(
    new=_NEW,
    change="""
        expires_at = LEAST(t.expires_at, %(keep_until)s),
        ends_at = LEAST(t.ends_at, %(keep_until)s),
        overlap = %(id)s
    """,
)

_FIND: Final[LiteralString] = f"""
SELECT {_COLUMNS} FROM vtoken_tokens AS t
WHERE {{match}} ORDER BY created_at DESC, id DESC LIMIT %(limit)s
"""

_UPDATE: Final[LiteralString] = f"""
WITH found AS (
    SELECT * FROM vtoken_tokens
    WHERE {{match}} ORDER BY created_at DESC, id DESC LIMIT 1 FOR UPDATE
)
UPDATE vtoken_tokens AS t SET {{change}} FROM found WHERE t.id = found.id
RETURNING {_COLUMNS}
"""
_USE: Final[LiteralString] = f"""
WITH found AS (
    SELECT * FROM vtoken_tokens
    WHERE {{match}} AND NOT %(use_id)s = ANY (use_ids)
    ORDER BY created_at DESC, id DESC LIMIT 1 FOR UPDATE
),
others AS (
    UPDATE vtoken_tokens AS t SET is_active = false, ends_at = LEAST(t.ends_at, %(at)s - 1)
    FROM found
    WHERE found.is_active AND found.overlap <> '' AND t.overlap = found.overlap AND t.id <> found.id
        AND t.object_id = found.object_id AND t.content_type = found.content_type AND t.slug = found.slug
        AND t.is_active
)
UPDATE vtoken_tokens AS t SET
    uses = t.uses + 1,
    used_at = %(at)s,
    use_ids = CASE WHEN %(use_id)s = '' THEN t.use_ids ELSE t.use_ids || %(use_id)s::text END,
    lease_id = '',
    lease_until = 0,
    is_active = t.is_active AND t.uses + 1 < t.max_uses,
    ends_at = CASE WHEN t.uses + 1 < t.max_uses THEN t.ends_at ELSE LEAST(t.ends_at, %(at)s - 1) END
FROM found WHERE t.id = found.id
RETURNING {_COLUMNS}
"""

_DEACTIVATE: Final[LiteralString] = """
WITH found AS (
    SELECT id FROM vtoken_tokens WHERE {match} AND is_active ORDER BY id FOR UPDATE
)
UPDATE vtoken_tokens AS t SET is_active = false, ends_at = LEAST(t.ends_at, %(at)s - 1)
FROM found WHERE t.id = found.id
"""

PURGE: Final = """
WITH due AS (
    SELECT id FROM vtoken_tokens
    WHERE ends_at < %(before)s AND lease_until <= %(now)s
    ORDER BY ends_at, id LIMIT %(limit)s FOR UPDATE
)
DELETE FROM vtoken_tokens AS t USING due WHERE t.id = due.id
"""
PURGE_BUDGETS: Final = """
WITH due AS (
    SELECT object_id, content_type, slug, kind FROM vtoken_budgets
    WHERE until <= %(budgets_before)s
    ORDER BY until, object_id, content_type, slug, kind LIMIT %(limit)s FOR UPDATE
)
DELETE FROM vtoken_budgets AS b USING due
WHERE (b.object_id, b.content_type, b.slug, b.kind) = (due.object_id, due.content_type, due.slug, due.kind)
"""

COUNT: Final = """
SELECT slug,
    count(*),
    count(*) FILTER (WHERE is_active AND expires_at >= %(now)s),
    count(*) FILTER (WHERE is_active AND expires_at < %(now)s),
    count(*) FILTER (WHERE NOT is_active AND uses > 0)
FROM vtoken_tokens GROUP BY slug
"""

_BUDGET: Final[LiteralString] = """
    object_id = %(object_id)s AND content_type = %(content_type)s AND slug = %(slug)s AND kind = %(kind)s
"""
# Returns (allowed, until). ON CONFLICT locks the budget and reads it as it is then. What denies is read as it
# was when the statement began: where there was nothing to deny yet, it returns no row and is to be run again.
SPEND: Final = f"""
WITH taken AS (
    INSERT INTO vtoken_budgets AS b
    VALUES (
        %(content_type)s, %(object_id)s, %(slug)s, %(kind)s,
        1, 0, %(now)s::bigint + %(window)s::bigint
    )
    ON CONFLICT ON CONSTRAINT vtoken_budgets_name DO UPDATE SET (spent, strikes, until) = (
        SELECT
            CASE WHEN is_running THEN b.spent + 1 ELSE 1 END,
            next_strikes,
            CASE WHEN is_running THEN b.until ELSE
                %(now)s::bigint + LEAST(%(window)s::numeric * (1 << next_strikes), %(max_window)s)::bigint
            END
        FROM (
            SELECT
                b.spent > 0 AND b.until > %(now)s AS is_running,
                CASE
                    WHEN b.until + %(max_window)s <= %(now)s THEN 0
                    WHEN b.spent = 0 OR b.until > %(now)s THEN b.strikes
                    WHEN b.spent >= %(most)s THEN LEAST(b.strikes + 1, 20)
                    ELSE 0
                END AS next_strikes
        ) AS state
    )
    WHERE b.until <= %(now)s OR b.spent < %(most)s
    RETURNING until
)
SELECT true, until FROM taken
UNION ALL
SELECT false, until FROM vtoken_budgets
WHERE {_BUDGET} AND until > %(now)s AND spent >= %(most)s AND NOT EXISTS (SELECT FROM taken)
"""
REFUND: Final = f"""
UPDATE vtoken_budgets SET spent = spent - 1 WHERE {_BUDGET} AND until = %(until)s AND spent > 0
"""
RESET: Final = f"DELETE FROM vtoken_budgets WHERE {_BUDGET}"

_CONDITIONS: Final[dict[str, LiteralString]] = {
    "id": "id = %(id)s",
    "digests": "digest = ANY (%(digests)s::bytea[])",
    "content_type": "content_type = %(content_type)s",
    "object_id": "object_id = %(object_id)s",
    "slug": "slug = %(slug)s",
    "active": "is_active",
    "valid_at": "is_active AND expires_at >= %(valid_at)s AND lease_until <= %(valid_at)s",
    "context": "context = %(context)s",
    "lease_id": "lease_id = %(lease_id)s",
    "leased_at": "lease_until > %(leased_at)s",
}
_USE_IDS: Final = StoredToken._fields.index("use_ids")


class Parameters(dict[str, object]):
    """What goes in. Shows no digest where a traceback shows the locals of a frame."""

    def __repr__(self) -> str:
        return f"<{', '.join(self)}>"


def of_token(token: StoredToken) -> Parameters:
    return Parameters(token._asdict(), use_ids=list(token.use_ids))


def of_match(match: Match, **others: object) -> Parameters:
    digests = None if match.digests is None else list(match.digests)
    return Parameters(match._asdict(), digests=digests, **others)


def to_token(*row: object) -> StoredToken:
    values = list(row)
    values[_USE_IDS] = tuple(row[_USE_IDS])  # type: ignore[arg-type]  # the driver makes lists of arrays
    return StoredToken._make(values)


def find(match: Match, *, after: bool) -> LiteralString:
    """Takes ``limit``, and for a page after another ``after`` and ``after_id``."""
    page: LiteralString = " AND (created_at, id) < (%(after)s, %(after_id)s)" if after else ""
    return _FIND.format(match=_where(match) + page)


def update(match: Match, change: Change) -> LiteralString:
    """Takes the fields of the change with ``new_`` before their names."""
    return _UPDATE.format(match=_where(match), change=_assignments(change))


def use(match: Match, *, overlapping: bool) -> LiteralString:
    """Takes ``at`` and ``use_id``."""
    return _USE.format(match=_where(match) + ("" if overlapping else " AND overlap = ''"))


def lock_overlap(match: Match) -> LiteralString:
    return _LOCK_OVERLAP.format(match=_where(match))


def deactivate(match: Match) -> LiteralString:
    """Takes ``at``."""
    return _DEACTIVATE.format(match=_where(match))


def _where(match: Match) -> LiteralString:
    given = [name for name, value in match._asdict().items() if value is not None and value is not False]
    return " AND ".join([_CONDITIONS[name] for name in given] or ["true"])


def _assignments(change: Change) -> LiteralString:
    match change:
        case Lease():
            return "lease_id = %(new_lease_id)s, lease_until = %(new_until)s"
        case Release():
            return "lease_id = '', lease_until = 0"
        case SetExtraData():
            return "extra_data = %(new_extra_data)s"
        case ForgetKey():
            return "plain_key = ''"
        case Use():
            raise AssertionError("a use has a statement of its own")
