"""The Django application's dumpdata: what is read, how keys are digested, what is refused."""

from __future__ import annotations

import io
import json
import traceback
from datetime import UTC, datetime
from typing import Any, Final
from zoneinfo import ZoneInfo

import pytest

from vtoken.backend import NEVER, State, StoredToken
from vtoken.errors import ConfigurationError, InvalidInput
from vtoken.manager import TokenManager
from vtoken.migrate import DumpReader, check_secret, import_tokens
from vtoken.policy import Policies, Settings, TokenPolicy
from vtoken.subject import Subject
from vtoken.testing import Clock
from vtoken_backends.memory import MemoryBackend

SECRET: Final = "a-secret-of-the-tests-0123456789-0"
KEY: Final = "hunter2hunter2hunter2hunter2hunt"
NOW: Final = 1_720_000_000_000


def record(**fields: Any) -> dict[str, Any]:
    """A record as ``dumpdata --natural-foreign`` writes it, with other fields; ``...`` leaves one out."""
    whole: dict[str, Any] = {
        "created_at": "2024-05-01T12:00:00.123Z",
        "content_type": ["auth", "user"],
        "object_id": "42",
        "key": KEY,
        "expires_at": "2024-05-02T12:00:00.123Z",
        "slug": "reset",
        "is_active": True,
        "extra_data": '{"a": [1]}',
    } | fields
    given = {name: value for name, value in whole.items() if value is not ...}
    return {"model": "tokens.verificationtoken", "pk": 1, "fields": given}


def read(
    dump: object, settings: Settings | None = None, *policies: TokenPolicy, **options: Any
) -> list[StoredToken]:
    """The tokens of a dump, given as its text or as what the text says."""
    text = dump if isinstance(dump, str) else json.dumps(dump)
    settings = settings or Settings()
    reader = DumpReader(settings, Policies(policies, settings), now=NOW, **options)
    return list(reader.tokens(io.StringIO(text)))


def test_every_field_arrives() -> None:
    [token] = read([record()])
    assert (token.content_type, token.object_id, token.slug) == ("auth.user", "42", "reset")
    assert (
        datetime.fromtimestamp(token.created_at / 1000, UTC).isoformat() == "2024-05-01T12:00:00.123000+00:00"
    )
    assert token.expires_at == token.ends_at == token.created_at + 24 * 3_600_000
    assert (token.is_active, token.uses, token.max_uses, token.extra_data) == (True, 0, 1, '{"a": [1]}')
    [key] = token.keys
    assert (key.plain_key, key.scheme, key.kind, key.origin) == ("", "sha256", "link", token.id)
    assert key.expires_at == token.expires_at
    assert KEY.encode() not in key.digest
    assert int(token.id, 16) >> 21 == token.created_at


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"expires_at": None}, {"expires_at": NEVER, "ends_at": NEVER}),
        ({"slug": None}, {"slug": ""}),
        ({"slug": ""}, {"slug": ""}),
        ({"slug": ...}, {"slug": ""}),
        ({"object_id": 7}, {"object_id": "7"}),
        ({"extra_data": None}, {"extra_data": None}),
        ({"extra_data": ""}, {"extra_data": None}),
        ({"extra_data": {"a": 1}}, {"extra_data": '{"a":1}'}),
        ({"created": "1970-01-01T00:00:01Z", "created_at": ...}, {"created_at": 1000}),
        ({"created_at": "2024-05-01T14:00:00+02:00"}, {"created_at": 1_714_564_800_000}),
        ({"is_active": False}, {"state": State.ENDED, "ends_at": 1_714_651_200_123}),
        ({"is_active": False, "expires_at": None}, {"state": State.ENDED, "ends_at": NOW - 1}),
    ],
)
def test_what_a_field_may_be(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    [token] = read([record(**fields)])
    assert {name: getattr(token, name) for name in expected} == expected


def test_content_types_by_number() -> None:
    named = {"model": "contenttypes.contenttype", "pk": 7, "fields": {"app_label": "shop", "model": "order"}}
    by_number = record(content_type=7)
    assert read([named, by_number])[0].content_type == "shop.order"
    assert read([by_number], content_types={7: "auth.group"})[0].content_type == "auth.group"
    assert read([named, by_number], content_types={7: "auth.group"})[0].content_type == "auth.group"
    with pytest.raises(InvalidInput, match=r"record 1 .*--content-types 7="):
        read([by_number, named])


def test_times_without_an_offset_need_a_zone() -> None:
    dump = [record(created_at="2024-05-01T14:00:00", expires_at=None)]
    assert read(dump, timezone=ZoneInfo("Europe/Berlin"))[0].created_at == 1_714_564_800_000
    with pytest.raises(InvalidInput, match="created_at has no offset"):
        read(dump)


def test_lines_and_layout_make_no_difference() -> None:
    records = [record(key=f"{KEY}{n}", object_id=n) for n in range(300)]
    expected = [(t.object_id, t.keys[0].digest) for t in read(records)]
    assert len(expected) == 300
    for text in (
        json.dumps(records, indent=4),
        "\ufeff \n" + json.dumps(records, ensure_ascii=False) + "\n\n",
        "\n".join(map(json.dumps, records)) + "\n",
    ):
        assert [(t.object_id, t.keys[0].digest) for t in read(text)] == expected
    assert read("[]") == read(" [ ] ") == read("") == []


def test_a_large_dump_is_read_piece_by_piece() -> None:
    class Counting(io.StringIO):
        pieces = 0

        def read(self, size: int | None = -1) -> str:
            assert size is not None
            assert 0 < size <= 1 << 20
            self.pieces += 1
            return super().read(size)

    file = Counting(json.dumps([record(object_id=n, extra_data={"x": "y" * 10_000}) for n in range(100)]))
    tokens = DumpReader(Settings(), Policies((), Settings()), now=NOW).tokens(file)
    next(tokens)
    assert file.pieces == 1
    assert len(list(tokens)) == 99


# Keys go on working --------------------------------------------------------------------------------


async def test_imported_links_and_codes_are_consumed() -> None:
    settings = Settings(secret=SECRET)
    policies = [TokenPolicy.code("login", cooldown="1m"), TokenPolicy.pair("invite", cooldown="1m")]
    clock = Clock(datetime(2024, 5, 1, 13, tzinfo=UTC))
    dump = [
        record(key=f"{KEY}\n"),
        record(key="123-456", slug="login", object_id=1),
        record(key="123456", slug="login", object_id=2),
        record(key="spent" * 4, is_active=False),
        record(key=f"{KEY}2", slug="invite"),
    ]
    async with TokenManager(MemoryBackend(), settings, policies, clock=clock) as manager:
        tokens = read(dump, settings, *policies)
        added = await import_tokens(manager.backend, tokens, source="app", dump="ab", now=NOW)
        assert added.imported == 5
        assert (await manager.consume(Subject("auth.user", 42), "reset", KEY)).get_extra_data() == {"a": [1]}
        assert (await manager.consume(Subject("auth.user", 1), "login", "123 456")).object_id == "1"
        assert (await manager.verify(Subject("auth.user", 2), "login", "123456")).object_id == "2"
        assert (await manager.consume(Subject("auth.user", 42), "invite", f"{KEY}2")).uses == 1
        assert not await manager.exists_valid(Subject("auth.user", 42), "reset", "spent" * 4)


def test_tokens_that_the_policies_make_useless_are_counted() -> None:
    settings = Settings(secret=SECRET, unknown_slugs="refuse")
    policies = [
        TokenPolicy.link("reset"),
        TokenPolicy.link("leave", context="required"),
        TokenPolicy.code("login", cooldown="1m"),
    ]
    later: dict[str, Any] = {"expires_at": None}
    dump = [
        record(**later),
        record(slug="leave", **later),
        record(slug="leave", key=f"{KEY}2", **later),
        record(slug="leave", is_active=False, **later),
        record(slug="leave"),  # expired
        record(slug="login", **later),
        record(slug="login", key="123 456", **later),
        record(slug=None, **later),
    ]
    reader = DumpReader(settings, Policies(policies, settings), now=NOW)
    for _ in range(2):
        assert len(list(reader.tokens(io.StringIO(json.dumps(dump))))) == 8
        found = {(slug, why.split(",")[0]): count for (slug, why), count in reader.useless.items()}
        assert found == {
            ("leave", "the policy asks for a context"): 2,
            ("login", "the policy is one of codes"): 1,
            ("", "no policy names this slug"): 1,
        }
    assert len(reader.secret_ids) == 1


async def test_another_secret_than_the_stores_is_refused() -> None:
    own, others = Settings(secret=SECRET), Settings(secret=SECRET[::-1])
    async with TokenManager(MemoryBackend(), own) as manager:
        reader = DumpReader(others, Policies([], others), now=NOW)
        await check_secret(manager.backend, reader.secret_ids)  # the store is empty
        await manager.issue(Subject("auth.user", 1))
        with pytest.raises(ConfigurationError, match="another secret"):
            await check_secret(manager.backend, reader.secret_ids)
        rotated = Settings(secret=SECRET[::-1], previous_secrets=[SECRET])
        for settings in (own, rotated, Settings()):
            accepted = DumpReader(settings, Policies([], settings), now=NOW)
            await check_secret(manager.backend, accepted.secret_ids)


def test_plain_keys_stay_plain_where_the_settings_say_so() -> None:
    def plain_key(settings: Settings, *policies: TokenPolicy) -> str:
        return read([record()], settings, *policies)[0].keys[0].plain_key

    assert plain_key(Settings(key_storage="plain")) == KEY
    assert plain_key(Settings(), TokenPolicy("reset", key_storage="plain")) == KEY
    assert plain_key(Settings(secret=SECRET, key_storage="derived")) == ""


def test_the_reader_names_the_models() -> None:
    reader = DumpReader(Settings(), Policies((), Settings()), now=NOW)
    assert len(list(reader.tokens(io.StringIO(json.dumps([record(), record(key="k" * 32)]))))) == 2
    assert reader.models == {"tokens.verificationtoken"}


# Refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dump", "message"),
    [
        (f'"{KEY}"', "record 1: not a record of dumpdata"),
        ([KEY], "record 1: not a record of dumpdata"),
        ([[KEY]], "record 1: not a record of dumpdata"),
        ([{"model": "a.b", "pk": 1}], "record 1 (a.b): not a record"),
        ([{"model": "a.b", "fields": [KEY]}], "record 1 (a.b): not a record"),
        ([{"fields": {"key": KEY}}], "record 1: not a record"),
        ([{"model": {"a": KEY}, "fields": {"key": KEY}}], "record 1: not a record"),
        ([record(), record(token=KEY)], "record 2 (tokens.verificationtoken): unknown field 'token'"),
        ([record(expire_at=KEY)], "did you mean expires_at?"),
        ([record(key=...)], "key is missing"),
        ([record(object_id=...)], "object_id is missing"),
        ([record(content_type=...)], "content_type is missing"),
        ([record(created_at=...)], "either created or created_at"),
        ([record(created="2024-05-01T12:00:00Z")], "either created or created_at"),
        ([record(key="")], "key must not be empty"),
        ([record(key=None)], "key is missing"),
        ([record(key=5)], "key must be a str"),
        ([record(key=KEY * 17)], "key must be at most 512"),
        ([record(object_id=None)], "object_id is missing"),
        ([record(object_id=True)], "object_id must be"),
        ([record(content_type=KEY)], 'content_type must be ["app", "model"]'),
        ([record(content_type=["auth"])], "content_type must be"),
        ([record(content_type=["auth", 1])], "content_type must be"),
        ([record(content_type=None)], "content_type is missing"),
        ([record(content_type=True)], "content_type must be"),
        ([record(content_type=7)], "the content type 7 has no name"),
        ([record(created_at=KEY)], "created_at must be a time"),
        ([record(created_at=None)], "created_at must be a time"),
        ([record(created_at=1)], "created_at must be a time"),
        ([record(created_at="1969-12-31T23:59:59Z")], "before 1970"),
        ([record(expires_at=False)], "expires_at must be a time"),
        ([record(slug=1)], "slug must be a str"),
        ([record(slug="x" * 256)], "slug must be at most 255"),
        ([record(is_active="yes")], "is_active must be"),
        ([record(extra_data=KEY)], "extra_data is not JSON"),
        ([record(extra_data={"a": float("nan")})], "NaN"),
        ([{"model": "contenttypes.contenttype", "pk": 1, "fields": {"model": KEY}}], "not a content type"),
        ([{"model": "contenttypes.contenttype", "pk": KEY, "fields": None}], "not a content type"),
        (json.dumps([record()])[:-1], "ends too early, after 1 records"),
        (json.dumps([record()])[:-2], "record 1 of the dump is not JSON"),
        (json.dumps([record()]) + "x", "goes on after its end"),
        (f"[{json.dumps(record())} {json.dumps(record())}]", "no comma before record 2"),
        (f"[{json.dumps(record())},]", "record 2 of the dump is not JSON"),
        (f"{KEY}", "record 1 of the dump is not JSON"),
        (f"- {KEY}: yaml", "record 1 of the dump is not JSON"),
        ("[" + "[" * 100_000, "record 1 of the dump is not JSON"),
        ('[{"model": "' + "x" * 2_000_000, "record 1 of the dump is not JSON"),
    ],
)
def test_another_shape_is_refused_and_no_key_repeated(dump: object, message: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        read(dump)
    assert message in str(refused.value)
    error: BaseException = refused.value
    assert error.__cause__ is None
    assert error.__context__ is None
    shown = "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
    ours = [part for part in shown.split('  File "') if "/vtoken/" in part]
    assert ours
    assert not [part for part in ours if "hunter2" in part]


def test_bytes_that_are_no_text_are_refused() -> None:
    file = io.TextIOWrapper(io.BytesIO(b'[{"a": "\xff'), encoding="utf-8")
    with file, pytest.raises(InvalidInput, match="not UTF-8"):
        list(DumpReader(Settings(), Policies((), Settings()), now=NOW).tokens(file))
