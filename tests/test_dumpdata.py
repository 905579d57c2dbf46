"""The Django application's dumpdata: what is read, how keys are digested, what is refused."""

from __future__ import annotations

import io
import json
import traceback
from datetime import UTC, datetime
from typing import Any, Final
from zoneinfo import ZoneInfo

import pytest

from vtoken import InvalidInput, Settings, Subject, TokenManager, TokenPolicy
from vtoken.backend import NEVER, StoredToken
from vtoken.dumpdata import DumpReader
from vtoken.transfer import add

from .core_tools import World

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
    reader = DumpReader(settings or Settings(), policies, now=NOW, **options)
    return list(reader.tokens(io.StringIO(text)))


def test_every_field_arrives() -> None:
    [token] = read([record()])
    assert (token.content_type, token.object_id, token.slug) == ("auth.user", "42", "reset")
    assert (
        datetime.fromtimestamp(token.created_at / 1000, UTC).isoformat() == "2024-05-01T12:00:00.123000+00:00"
    )
    assert token.expires_at == token.ends_at == token.created_at + 24 * 3_600_000
    assert (token.is_active, token.uses, token.max_uses, token.extra_data) == (True, 0, 1, '{"a": [1]}')
    assert (token.plain_key, token.scheme) == ("", "sha256")
    assert KEY.encode() not in token.digest
    assert int(token.id[:12], 16) == token.created_at


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
        ({"is_active": False}, {"is_active": False, "ends_at": 1_714_651_200_123}),
        ({"is_active": False, "expires_at": None}, {"is_active": False, "ends_at": NOW - 1}),
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
    expected = [(t.object_id, t.digest) for t in read(records)]
    assert len(expected) == 300
    for text in (
        json.dumps(records, indent=4),
        "\ufeff \n" + json.dumps(records, ensure_ascii=False) + "\n\n",
        "\n".join(map(json.dumps, records)) + "\n",
    ):
        assert [(t.object_id, t.digest) for t in read(text)] == expected
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
    tokens = DumpReader(Settings(), now=NOW).tokens(file)
    next(tokens)
    assert file.pieces == 1
    assert len(list(tokens)) == 99


# Keys go on working --------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [Settings(), Settings(secret=SECRET)])
async def test_imported_links_and_codes_are_consumed(settings: Settings) -> None:
    world = World()
    policies = [TokenPolicy.code("login", allow_weak="old codes")]
    world.clock.set(datetime(2024, 5, 1, 13, tzinfo=UTC))
    manager = TokenManager(world.backend, settings, policies, clock=world.clock)
    async with manager:
        dump = [
            record(),
            record(key="123456", slug="login", object_id=1),
            record(key="123456", slug="login", object_id=2),
            record(key="spent" * 4, is_active=False),
        ]
        assert (await add(world.backend, read(dump, settings, *policies))).inserted == 4
        assert (await add(world.backend, read(dump, settings, *policies))).skipped == 4, "again"
        assert (await manager.consume(Subject("auth.user", 42), "reset", KEY)).get_extra_data() == {"a": [1]}
        assert (await manager.consume(Subject("auth.user", 1), "login", "123 456")).object_id == "1"
        assert (await manager.verify(Subject("auth.user", 2), "login", "123456")).object_id == "2"
        assert not await manager.exists_valid(Subject("auth.user", 42), "reset", "spent" * 4)
    await world.aclose()


def test_plain_keys_stay_plain_where_the_settings_say_so() -> None:
    assert read([record()], Settings(key_storage="plain"))[0].plain_key == KEY
    assert read([record()], Settings(), TokenPolicy("reset", key_storage="plain"))[0].plain_key == KEY
    assert read([record()], Settings(secret=SECRET, key_storage="derived"))[0].plain_key == ""


# Refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dump", "message"),
    [
        (f'"{KEY}"', "record 1: no record of dumpdata"),
        ([KEY], "record 1: no record of dumpdata"),
        ([[KEY]], "record 1: no record of dumpdata"),
        ([{"model": "a.b", "pk": 1}], "record 1 (a.b): no record"),
        ([{"model": "a.b", "fields": [KEY]}], "record 1 (a.b): no record"),
        ([{"fields": {"key": KEY}}], "record 1: no record"),
        ([{"model": {"a": KEY}, "fields": {"key": KEY}}], "record 1: no record"),
        ([record(), record(token=KEY)], "record 2 (tokens.verificationtoken): unknown field 'token'"),
        ([record(expire_at=KEY)], "did you mean expires_at?"),
        ([record(key=...)], "key is missing"),
        ([record(object_id=...)], "object_id is missing"),
        ([record(content_type=...)], "content_type is missing"),
        ([record(created_at=...)], "one of created and created_at"),
        ([record(created="2024-05-01T12:00:00Z")], "one of created and created_at"),
        ([record(key="")], "key must not be empty"),
        ([record(key=None)], "key must be a str"),
        ([record(key=KEY * 17)], "key must be at most 512"),
        ([record(object_id=None)], "object_id must be"),
        ([record(object_id=True)], "object_id must be"),
        ([record(content_type=KEY)], 'content_type must be ["app", "model"]'),
        ([record(content_type=["auth"])], "content_type must be"),
        ([record(content_type=["auth", 1])], "content_type must be"),
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
        ([{"model": "contenttypes.contenttype", "pk": 1, "fields": {"model": KEY}}], "no content type"),
        ([{"model": "contenttypes.contenttype", "pk": KEY, "fields": None}], "no content type"),
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
        list(DumpReader(Settings(), now=NOW).tokens(file))
