"""The tables of the SQLite backend, and what each of its connections keeps in memory.

What has to follow from a change of one row (a digest that finds its token, the keys that a token lost, the
receipts of its uses) is done by triggers, whichever statement makes the change. They are temporary because
SQLite refuses functions of JSON in triggers that come with an untrusted file.
"""

# ruff: noqa: S608  # the SQL is put together from this package's own texts; values are always parameters

from __future__ import annotations

import textwrap
from typing import Final

from vtoken.backend import REMEMBERED_USES, State
from vtoken_backends.sqlite.records import COLUMNS, KEY_ENTRY

_ORIGIN: Final = f"ifnull(json_extract(value, '$[{KEY_ENTRY.index('origin')}]'), value)"
"""The origin of a key's entry, whether or not the token still has the key."""
_COLUMNS: Final = ",\n        ".join(f"{name} {declaration}" for name, declaration in COLUMNS.items())

_SCHEMA_1: Final = (
    "CREATE TABLE vtoken_schema (version INTEGER NOT NULL) STRICT",
    "CREATE TABLE vtoken_notes (name TEXT PRIMARY KEY, text TEXT NOT NULL) STRICT, WITHOUT ROWID",
    # The id is the table's own key: 63 bits, in the order of creation, so that new rows go to the end.
    f"CREATE TABLE vtoken_tokens (\n        {_COLUMNS}\n    ) STRICT",
    # Ended tokens are in it, too: a use does not touch it, and it serves a token's history.
    """CREATE INDEX vtoken_tokens_line
    ON vtoken_tokens (content_type, object_id, slug, context, is_beside)""",
    # `expires_at` never changes, so neither a use nor a re-issue touches its index. The ends of tokens that
    # are not active are in an index of their own, which grows at its end.
    "CREATE INDEX vtoken_tokens_expires ON vtoken_tokens (expires_at)",
    f"CREATE INDEX vtoken_tokens_ends ON vtoken_tokens (ends_at) WHERE state <> {State.ACTIVE.value}",
    # The origin 0 stands for the token itself, and no expires_at for that of the token.
    """CREATE TABLE vtoken_keys (
        digest BLOB PRIMARY KEY,
        token INTEGER NOT NULL, origin INTEGER NOT NULL, kind TEXT NOT NULL, expires_at INTEGER
    ) STRICT, WITHOUT ROWID""",
    # `number` is how many uses the token had by then: the order of its receipts.
    """CREATE TABLE vtoken_receipts (
        origin INTEGER NOT NULL, use_id TEXT NOT NULL,
        token INTEGER NOT NULL, number INTEGER NOT NULL, at INTEGER NOT NULL,
        PRIMARY KEY (origin, use_id)
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE vtoken_budgets (
        object BLOB NOT NULL, name BLOB NOT NULL,
        spent INTEGER NOT NULL, strikes INTEGER NOT NULL, until INTEGER NOT NULL,
        PRIMARY KEY (object, name)
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX vtoken_budgets_until ON vtoken_budgets (until)",
)
MIGRATIONS: tuple[tuple[str, ...], ...] = (_SCHEMA_1,)
"""The statements that make schema 1 of an empty file, schema 2 of schema 1, and so on: what was released is
never changed. Processes of the older release must have ended: they look at the schema at open only."""


def ddl() -> list[str]:
    """The statements that make an empty store of the newest schema."""
    steps = [textwrap.dedent(statement) for schema in MIGRATIONS for statement in schema]
    return [*steps, f"INSERT INTO vtoken_schema (version) VALUES ({len(MIGRATIONS)})"]


TRIGGERS: Final = (
    f"""CREATE TEMP TRIGGER vtoken_token_deleted AFTER DELETE ON main.vtoken_tokens
    BEGIN
        DELETE FROM vtoken_keys WHERE token = OLD.id AND digest IN (
            SELECT substr(OLD.digests, 1 + 32 * key, 32) FROM json_each(OLD.keys)
        );
        DELETE FROM vtoken_receipts WHERE token = OLD.id AND OLD.uses > 0 AND origin IN (
            SELECT OLD.id UNION SELECT {_ORIGIN} FROM json_each(OLD.keys)
        );
    END""",
    """CREATE TEMP TRIGGER vtoken_key_deleted AFTER DELETE ON main.vtoken_keys
    BEGIN
        UPDATE vtoken_tokens
        SET keys = json_replace(keys, '$[' || ((instr(digests, OLD.digest) - 1) / 32) || ']', OLD.origin)
        WHERE id = OLD.token;
    END""",
    # The use that ends a token ends the older exclusive tokens of its object and slug in other contexts.
    f"""CREATE TEMP TRIGGER vtoken_token_used AFTER UPDATE OF uses ON main.vtoken_tokens
    WHEN NEW.state = {State.USED.value} AND NEW.uses > OLD.uses
        AND NEW.context <> x'' AND NEW.is_beside = 0
    BEGIN
        UPDATE vtoken_tokens
        SET state = {State.ENDED.value}, ends_at = min(ends_at, NEW.used_at - 1), holds = '[]'
        WHERE (content_type, object_id, slug) = (NEW.content_type, NEW.object_id, NEW.slug)
            AND context <> NEW.context AND is_beside = 0 AND state = {State.ACTIVE.value} AND id < NEW.id;
    END""",
    # Now and then, so that the cost of a use stays flat.
    f"""CREATE TEMP TRIGGER vtoken_receipts_trimmed AFTER UPDATE OF uses ON main.vtoken_tokens
    WHEN NEW.uses % {REMEMBERED_USES} = 0 AND NEW.uses > OLD.uses
    BEGIN
        DELETE FROM vtoken_receipts WHERE token = NEW.id AND origin IN (
            SELECT NEW.id UNION SELECT {_ORIGIN} FROM json_each(NEW.keys)
        ) AND number < (
            SELECT number FROM vtoken_receipts WHERE token = NEW.id AND origin IN (
                SELECT NEW.id UNION SELECT {_ORIGIN} FROM json_each(NEW.keys)
            ) ORDER BY number DESC LIMIT 1 OFFSET {REMEMBERED_USES - 1}
        );
    END""",
)
"""What each connection that writes adds to the tables, for itself alone."""
