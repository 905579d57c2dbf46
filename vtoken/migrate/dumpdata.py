"""Tokens from the Django application that this library grew out of: what its ``dumpdata`` wrote, in JSON.

::

    ./manage.py dumpdata --natural-foreign myapp.VerificationToken > tokens.json
    vtoken import tokens.json

A record's ``fields`` are ``key``, ``created`` or ``created_at``, ``content_type``, ``object_id``,
``expires_at``, ``slug``, ``is_active`` and ``extra_data``. The plaintext key becomes a digest on the way.
What has any other shape is refused, and no message repeats a value: it may be a key.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime, tzinfo
from typing import Any, Final, NamedTuple, TextIO, cast

from vtoken import inputs
from vtoken.backend import NEVER, State, StoredKey, StoredToken
from vtoken.errors import InvalidInput
from vtoken.ids import IdSequence
from vtoken.keys import Digest, Hidden, Keyring, code_shape_ok, normalise_code, normalise_link
from vtoken.policy import Policies, ResolvedPolicy, Settings

CONTENT_TYPES: Final = "contenttypes.contenttype"
_FIELDS: Final = frozenset(
    {
        "key",
        "created",
        "created_at",
        "content_type",
        "object_id",
        "expires_at",
        "slug",
        "is_active",
        "extra_data",
    }
)
_CHUNK: Final = 1 << 16
_MAX_RECORD: Final = 1 << 20
"""Characters of one record: extra_data is at most 16,384 bytes, and escaping may make six of one."""


class Useless(NamedTuple):
    """Why tokens of a dump that have not ended cannot be used with the policies that there are."""

    slug: str
    """``""`` for none."""
    why: str


class DumpReader:
    """Reads a dump record by record, so a large one needs no more memory than a small one.

    Args:
        settings: with their secrets keys are digested.
        policies: tell codes, which are digested with their object, from links.
        content_types: names (``"auth.user"``) by primary key, for a dump without ``--natural-foreign``. A
            dump that holds ``contenttypes`` before the tokens names them itself.
        timezone: of times without an offset (``USE_TZ = False``); None refuses them.
        now: milliseconds since the epoch. Tokens that are not active are taken to have ended just before.
    """

    def __init__(
        self,
        settings: Settings,
        policies: Policies,
        *,
        content_types: Mapping[int, str] | None = None,
        timezone: tzinfo | None = None,
        now: int,
    ) -> None:
        self._keyring = Keyring(settings.secret, settings.previous_secrets)
        self._policies = policies
        self._given = dict(content_types or {})
        self._timezone = timezone
        self._now = now
        self.models: set[str] = set()
        """The names of the models whose records were read, such as ``"accounts.verificationtoken"``."""
        self.useless: Counter[Useless] = Counter()
        """How many of the tokens that were read last cannot be used, and why."""

    @property
    def secret_ids(self) -> tuple[str, ...]:
        """Which secrets there are, the one that keys are digested with first; none: they are only hashed."""
        return self._keyring.secret_ids

    def tokens(self, file: TextIO) -> Iterator[StoredToken]:
        """The tokens of a dump, in its order; their ids are new ones.

        Args:
            file: open for reading; a JSON array (``--format json``) or a record a line (``jsonl``).

        Raises:
            InvalidInput: the dump, or a record of it, has another shape; the message says which one.
        """
        dumped: dict[int, str] = {}
        self.useless.clear()
        for number, record in enumerate(_Records(file), 1):
            model = record.get("model") if isinstance(record, dict) else None
            model = model if isinstance(model, str) else None
            token: StoredToken | None = None
            problem: str | None = None
            try:
                if model == CONTENT_TYPES:
                    dumped |= _named(record)
                else:
                    token = self._token(record, dumped | self._given)
                    self.models.add(str(model).lower())
            except InvalidInput as error:
                problem = str(error)
            if problem is not None:
                del record  # it may hold a key where none belongs
                raise InvalidInput(f"record {number}{f' ({model:.80})' if model else ''}: {problem}")
            if token is not None:
                yield token

    def _token(self, record: Any, content_types: Mapping[int, str]) -> StoredToken:
        fields = _fields(record)
        key = Hidden(fields.pop("key"))
        slug = fields.get("slug") or ""
        if slug != "":
            slug = inputs.check_text("slug", slug, inputs.MAX_NAME_BYTES)
        policy = self._policies.get(slug)
        content_type = _content_type(fields["content_type"], content_types)
        object_id = inputs.check_object_id(fields["object_id"])
        digest = self._digest(policy, content_type, object_id, key)
        created_at = self._time(fields, "created_at" if "created_at" in fields else "created")
        expires_at = NEVER if fields.get("expires_at") is None else self._time(fields, "expires_at")
        is_active = fields.get("is_active", True)
        if not isinstance(is_active, bool):
            raise InvalidInput("is_active must be true or false")
        if is_active and expires_at >= self._now and (why := self._problem(policy, key)) is not None:
            self.useless[Useless(slug, why)] += 1
        token_id = IdSequence().next(created_at)
        stored_key = StoredKey(
            digest=digest.value,
            scheme=digest.scheme,
            secret_id=digest.secret_id,
            nonce="",
            plain_key=key.text() if policy.storage == "plain" else "",
            kind="code" if policy.kind == "code" else "link",
            expires_at=expires_at,
            origin=token_id,
        )
        return StoredToken(
            id=token_id,
            content_type=content_type,
            object_id=object_id,
            slug=slug,
            context=b"",
            is_beside=True,  # a dump does not tell which of an object's tokens replaced which
            created_at=created_at,
            expires_at=expires_at,
            ends_at=expires_at if is_active else min(expires_at, self._now - 1),
            state=State.ACTIVE if is_active else State.ENDED,
            extra_data=_extra_data(fields.get("extra_data")),
            max_uses=policy.max_uses,
            uses=0,
            used_at=0,
            keys=(stored_key,),
            holds=(),
        )

    def _problem(self, policy: ResolvedPolicy, key: Hidden) -> str | None:
        """Why nobody can use a token of the dump."""
        if not self._policies.knows(policy.slug):
            return "no policy names this slug, and the settings refuse such slugs (unknown_slugs)"
        if policy.needs_context:
            return "the policy asks for a context, which these were issued without"
        if policy.kind == "code":
            code = Hidden(normalise_code(key.text(), policy.code_chars))
            if not code_shape_ok(code.text(), policy.code_length, policy.code_chars):
                return "the policy is one of codes, and their keys do not have the shape of one"
        return None

    def _digest(self, policy: ResolvedPolicy, content_type: str, object_id: str, key: Hidden) -> Digest:
        problem = inputs.text_problem(key.reveal(), inputs.MAX_KEY_BYTES)
        if problem is not None:
            raise InvalidInput(f"key {problem}")
        if policy.kind == "code":
            code = Hidden(normalise_code(key.text(), policy.code_chars))
            return self._keyring.code(content_type, object_id, policy.slug, code.text())
        return self._keyring.link(normalise_link(key.text()))

    def _time(self, fields: Mapping[str, Any], name: str) -> int:
        try:
            moment = datetime.fromisoformat(fields[name])
        except (TypeError, ValueError):
            moment = None
        if moment is None:
            raise InvalidInput(f"{name} must be a time such as 2024-05-01T12:00:00Z")
        if moment.tzinfo is None:
            if self._timezone is None:
                raise InvalidInput(f"{name} has no offset from UTC: say in which time zone it was written")
            moment = moment.replace(tzinfo=self._timezone)
        at = inputs.milliseconds(moment)
        if at < 0:
            raise InvalidInput(f"{name} lies before 1970")
        return at


def _fields(record: Any) -> dict[str, Any]:
    """The fields of a record, by names that are known."""
    if not isinstance(record, dict) or not isinstance(record.get("model"), str):
        raise InvalidInput("not a record of dumpdata: it needs model and fields")
    fields: Any = record.get("fields")
    if not isinstance(fields, dict):
        raise InvalidInput("not a record of dumpdata: it needs model and fields")
    for name in fields:
        if name not in _FIELDS:
            hint = inputs.nearest(name, _FIELDS) or "dump the model of the tokens only"
            raise InvalidInput(f"unknown field {name!r:.80}; {hint}")
    for name in ("key", "content_type", "object_id"):
        if fields.get(name) is None:
            raise InvalidInput(f"{name} is missing")
    if ("created" in fields) == ("created_at" in fields):
        raise InvalidInput("either created or created_at must be given")
    return fields


def _named(record: Any) -> dict[int, str]:
    """What a dumped content type is called."""
    pk, fields = record.get("pk"), record.get("fields")
    name = _joined(fields.get("app_label"), fields.get("model")) if isinstance(fields, dict) else None
    if not isinstance(pk, int) or name is None:
        raise InvalidInput("not a content type: it needs pk, app_label and model")
    return {pk: name}


def _joined(app_label: object, model: object) -> str | None:
    if not isinstance(app_label, str) or not isinstance(model, str) or not app_label or not model:
        return None
    return f"{app_label}.{model}"


def _content_type(value: Any, names: Mapping[int, str]) -> str:
    name: str | None = None
    if isinstance(value, list) and len(cast("list[object]", value)) == 2:
        name = _joined(*cast("list[object]", value))
    elif isinstance(value, int) and not isinstance(value, bool):
        name = names.get(value)
        if name is None:
            raise InvalidInput(
                f"the content type {value} has no name here: dump with --natural-foreign, or dump"
                f" contenttypes before the tokens, or give --content-types {value}=app.model"
            )
    if name is None:
        raise InvalidInput('content_type must be ["app", "model"] or a number')
    return inputs.check_text("content_type", name, inputs.MAX_NAME_BYTES)


def _extra_data(value: object) -> str | None:
    """Its text field held JSON; a dump of a JSON field holds the value itself."""
    if value is None or value == "":
        return None
    return inputs.check_json_text(value) if isinstance(value, str) else inputs.dump_json(value)


class _Records:
    """The records of a JSON array, or of JSON lines, one after the other. The text is kept out of every
    frame's locals: it holds keys."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text = ""
        self._at = 0
        self._decode = json.JSONDecoder().raw_decode

    def __iter__(self) -> Iterator[Any]:
        in_array = self._take("[")
        number = 0
        while self._more():
            if in_array and self._take("]"):
                if self._more():
                    raise InvalidInput("the dump goes on after its end")
                return
            number += 1
            if in_array and number > 1 and not self._take(","):
                raise InvalidInput(f"the dump has no comma before record {number}")
            yield self._record(number)
        if in_array:
            raise InvalidInput(f"the dump ends too early, after {number} records")

    def _record(self, number: int) -> Any:
        self._more()
        while True:
            try:
                value, self._at = self._decode(self._text, self._at)
            except (ValueError, RecursionError):
                pass  # its text may not be whole yet; and the error quotes it
            else:
                return value
            if len(self._text) - self._at > _MAX_RECORD or not self._fill():
                raise InvalidInput(f"record {number} of the dump is not JSON")

    def _take(self, mark: str) -> bool:
        found = self._more() and self._text[self._at] == mark
        self._at += found
        return found

    def _more(self) -> bool:
        """Skip white space; whether anything follows."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n\ufeff":
                self._at += 1
            if self._at < len(self._text):
                return True
            if not self._fill():
                return False

    def _fill(self) -> bool:
        more = None
        with suppress(ValueError):  # no UTF-8; the error quotes the text
            more = self._file.read(_CHUNK)
        if more is None:
            raise InvalidInput("the dump is not UTF-8 text")
        self._text = self._text[self._at :] + more
        self._at = 0
        return bool(more)
