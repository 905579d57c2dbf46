"""What may come in, and what is refused: each limit from both sides."""

from __future__ import annotations

import enum
import json
import math
from collections import OrderedDict
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from typing import Any
from unittest import mock
from uuid import UUID

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vtoken import ConfigurationError, InvalidInput, InvalidToken, Subject, TokenManager, TokenPolicy, inputs

from .core_tools import unhurried

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)
ANY_TEXT = st.text(st.characters(), max_size=40)


class Colour(enum.StrEnum):
    RED = "red"


class Number(enum.IntEnum):
    SEVEN = 7


def exactly(value: object) -> str:
    """A value with its types, so that 1, 1.0, True and -0.0 differ; dicts in their order."""
    return repr(value)


class TestText:
    @pytest.mark.parametrize("limit", [1, 5, 255, 512])
    @pytest.mark.parametrize("character", ["a", "é", "€", "😀"])
    def test_limits_are_in_bytes(self, character: str, limit: int) -> None:
        size = len(character.encode())
        fitting = character * (limit // size)
        if fitting:
            assert inputs.check_text("slug", fitting, limit) == fitting
        with pytest.raises(InvalidInput):
            inputs.check_text("slug", fitting + character, limit)

    @pytest.mark.parametrize("value", ["", "\0", "a\0b", "é\0", "\ud800", "a\udfffb", "é\ud83d"])
    def test_empty_nul_and_lone_surrogates_are_refused(self, value: str) -> None:
        with pytest.raises(InvalidInput):
            inputs.check_text("slug", value, 255)

    @pytest.mark.parametrize("value", [None, 1, True, 1.5, b"a", ["a"], {"$ne": ""}, inputs.ANY, object()])
    def test_other_types_are_refused(self, value: object) -> None:
        with pytest.raises(InvalidInput):
            inputs.check_text("slug", value, 255)

    def test_an_enum_of_text_is_its_value(self) -> None:
        found = inputs.check_text("slug", Colour.RED, 255)
        assert (type(found), found) == (str, "red")

    @unhurried
    @given(ANY_TEXT, st.integers(1, 60))
    def test_accepted_is_what_utf8_can_hold_within_the_limit(self, value: str, limit: int) -> None:
        fits = 0 < len(value.encode(errors="surrogatepass")) <= limit and "\0" not in value
        fits = fits and not any(0xD800 <= ord(c) <= 0xDFFF for c in value)
        assert (inputs.text_problem(value, limit) is None) is fits
        if fits:
            assert inputs.check_text("slug", value, limit) == value
        else:
            with pytest.raises(InvalidInput):
                inputs.check_text("slug", value, limit)

    @unhurried
    @given(st.text(st.characters(exclude_characters=" abcdefghijklmnopqrstuvwxyz0123456789"), min_size=3))
    def test_a_refusal_never_repeats_the_value(self, value: str) -> None:
        problem = inputs.text_problem(value, 1)
        assert problem is not None
        assert value not in problem


class Lying(str):
    """Says of itself that it is short, ASCII, equal to anything, and something else."""

    def __len__(self) -> int:
        return 1

    def __contains__(self, _: object) -> bool:
        return False

    def __eq__(self, _: object) -> bool:
        return True

    def __ne__(self, _: object) -> bool:
        return False

    def __hash__(self) -> int:
        return 1

    def __str__(self) -> str:
        return "a lie"

    def isascii(self) -> bool:
        return True

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return b"a lie"


class TestLyingSubclasses:
    @pytest.mark.parametrize("text", ["", "a\0b", "a\ud800b", "x" * 256])
    def test_what_a_text_holds_is_checked(self, text: str) -> None:
        with pytest.raises(InvalidInput):
            inputs.check_text("slug", Lying(text), 255)
        with pytest.raises(InvalidInput):
            inputs.check_object_id(Lying(text * 3))

    @pytest.mark.parametrize("data", [Lying("\ud800"), [Lying("\ud800")], {Lying("\ud800"): 1}])
    def test_extra_data_holds_no_lone_surrogates(self, data: object) -> None:
        with pytest.raises(InvalidInput):
            inputs.dump_json(data)

    def test_what_a_text_holds_is_taken(self) -> None:
        taken = inputs.check_text("slug", Lying("reset"), 255)
        assert (type(taken), taken) == (str, "reset")

    @pytest.mark.parametrize("key", [mock.ANY, 5, None, b"key"])
    async def test_what_is_no_text_is_an_error_of_the_application(self, key: Any) -> None:
        policies = [TokenPolicy.link("bound", context="required")]
        async with TokenManager.from_url("memory://", policies=policies) as manager:
            with pytest.raises(InvalidInput):
                await manager.consume(Subject("auth.user", 1), "reset", key)
            with pytest.raises(InvalidInput):
                await manager.consume(Subject("auth.user", 1), "bound", "key", context=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # on purpose

    @pytest.mark.parametrize("key", [Lying("\ud800"), Lying("\0"), Lying("x" * 513)])
    async def test_a_key_that_the_form_garbled_is_an_invalid_token(self, key: Any) -> None:
        async with TokenManager.from_url("memory://") as manager:
            with pytest.raises(InvalidToken):
                await manager.consume(Subject("auth.user", 1), "reset", key)


class TestContexts:
    @pytest.mark.parametrize("context", ["cookie", {"cookie": "a", "": "b"}, {"a": ""}, {"a": "x" * 512}])
    def test_texts_and_mappings_of_texts(self, context: object) -> None:
        empty_name = isinstance(context, dict) and "" in context
        assert (inputs.context_problem(context) is None) is not empty_name

    @pytest.mark.parametrize(
        "context",
        [
            *("", "\0", "\ud800", "x" * 513, None, 5, b"cookie", ["a"], {}, {"a": None}, {"a": 5}, {5: "a"}),
            *({"a": "\0"}, {"a": "x" * 513}, {"a" * 256: "b"}, {str(n): "b" for n in range(33)}),
        ],
        ids=lambda v: f"{v!r:.20}",
    )
    def test_everything_else_is_refused(self, context: object) -> None:
        problem = inputs.context_problem(context)
        assert problem is not None
        assert "x" * 20 not in problem


class TestObjectId:
    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (1, "1"),
            ("1", "1"),
            (-1, "-1"),
            (0, "0"),
            (2**64, str(2**64)),
            (Number.SEVEN, "7"),
            (Colour.RED, "red"),
            (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
            (" 1", " 1"),
            ("é", "é"),
            (10**511, "1" + "0" * 511),
        ],
    )
    def test_one_text_for_one_object(self, value: object, text: str) -> None:
        found = inputs.check_object_id(value)
        assert (type(found), found) == (str, text)

    def test_an_object_without_an_id_is_not_saved_yet(self) -> None:
        with pytest.raises(InvalidInput, match="no id yet: save it"):
            inputs.check_object_id(None)

    @pytest.mark.parametrize(
        "value",
        [
            True,
            False,
            1.0,
            math.nan,
            None,
            "",
            "a\0",
            "\ud800",
            b"1",
            [1],
            (1,),
            {"$gt": ""},
            {1},
            Decimal(1),
            Fraction(1),
            1j,
            inputs.ANY,
            inputs.DEFAULT,
            object(),
            "a" * 513,
            "é" * 257,
            10**512,
            -(10**511),
            10**100_000,
        ],
        ids=lambda v: f"{type(v).__name__}",
    )
    def test_everything_else_is_refused(self, value: object) -> None:
        with pytest.raises(InvalidInput):
            inputs.check_object_id(value)

    @unhurried
    @given(st.integers())
    def test_an_int_and_its_text_are_one_object(self, value: int) -> None:
        assert inputs.check_object_id(value) == inputs.check_object_id(str(value))

    @unhurried
    @given(st.uuids())
    def test_a_uuid_and_its_text_are_one_object(self, value: UUID) -> None:
        assert inputs.check_object_id(value) == inputs.check_object_id(str(value))


class TestTimes:
    @pytest.mark.parametrize(
        ("moment", "expected"),
        [
            (datetime(1970, 1, 1, tzinfo=UTC), 0),
            (datetime(1970, 1, 1, 0, 0, 0, 999, tzinfo=UTC), 0),
            (datetime(1970, 1, 1, 0, 0, 0, 1000, tzinfo=UTC), 1),
            (datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC), -1),
            (datetime(1969, 12, 31, 23, 59, 59, 999_000, tzinfo=UTC), -1),
            (datetime(1969, 12, 31, 23, 59, 59, 998_999, tzinfo=UTC), -2),
            (datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC), 253_402_300_799_999),
            (datetime(1, 1, 1, tzinfo=UTC), -62_135_596_800_000),
            (datetime(1970, 1, 1, 1, tzinfo=timezone(timedelta(hours=1))), 0),
        ],
    )
    def test_floored(self, moment: datetime, expected: int) -> None:
        assert inputs.milliseconds(moment) == expected

    @unhurried
    @given(st.datetimes(timezones=st.sampled_from([UTC, timezone(timedelta(hours=-11, minutes=7))])))
    def test_never_later_and_less_than_a_millisecond_earlier(self, moment: datetime) -> None:
        # Else the offset leads out of what datetime can hold.
        assume(datetime(1, 1, 2) < moment.replace(tzinfo=None) < datetime(9999, 12, 30))
        floored = inputs.from_milliseconds(inputs.milliseconds(moment))
        assert timedelta(0) <= moment - floored < timedelta(milliseconds=1)
        assert floored.utcoffset() == timedelta(0)

    @unhurried
    @given(st.integers(-62_135_596_800_000, 253_402_300_799_999))
    def test_milliseconds_come_back(self, value: int) -> None:
        assert inputs.milliseconds(inputs.from_milliseconds(value)) == value

    @pytest.mark.parametrize("moment", [datetime(2026, 1, 1), 0, None, "2026-01-01", 1.5])
    def test_naive_times_and_other_types_are_refused(self, moment: object) -> None:
        with pytest.raises(InvalidInput):
            inputs.milliseconds(moment)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # on purpose


class TestLifetimes:
    @pytest.mark.parametrize(
        ("lifetime", "expected"),
        [
            (1, 60_000),
            (0.5, 30_000),
            (0.29, 17_400),
            (24 * 60, 86_400_000),
            (1 / 60_000, 1),
            (60 * 24 * 365 * 900, 60_000 * 60 * 24 * 365 * 900),
            (timedelta(seconds=1, microseconds=1999), 1001),
            ("90s", 90_000),
            ("7d", 7 * 86_400_000),
        ],
    )
    def test_minutes_timedeltas_and_texts(self, lifetime: object, expected: int) -> None:
        assert inputs.lifetime("expiration", lifetime) == expected

    def test_none_is_never(self) -> None:
        assert inputs.lifetime("expiration", None) is None

    @pytest.mark.parametrize(
        "lifetime",
        [
            *(0, 0.0, -0.0, -1, -1e-9, math.nan, math.inf, -math.inf, 1e308, 1e15, 10**18, 2**62, 10**400),
            *(True, False, "5", b"5", [5], Decimal(5), Fraction(5), 1j, inputs.DEFAULT, 1e-9, 5e-324),
            *(timedelta(0), timedelta(-1), "0s", "5 m", "٥m", "m", "", "1w", "-5m", "999999999999999d"),
        ],
    )
    def test_everything_else_is_a_value_error(self, lifetime: object) -> None:
        with pytest.raises(ValueError, match="expiration") as info:
            inputs.lifetime("expiration", lifetime)
        assert type(info.value) is InvalidInput

    @unhurried
    @given(st.floats(allow_nan=True, allow_infinity=True) | st.integers())
    def test_any_number_is_taken_or_refused(self, minutes: float) -> None:
        try:
            found = inputs.lifetime("expiration", minutes)
        except InvalidInput:
            return
        assert found is not None
        assert minutes > 0
        assert found == timedelta(minutes=minutes) // timedelta(milliseconds=1)


class TestDurationsAndCounts:
    @pytest.mark.parametrize(
        ("text", "milliseconds"),
        [("250ms", 250), ("90s", 90_000), ("15m", 900_000), ("1h", 3_600_000), ("7d", 604_800_000)],
    )
    def test_texts(self, text: str, milliseconds: int) -> None:
        assert inputs.duration("keep", text) == milliseconds
        assert inputs.spelled(milliseconds) == text
        assert inputs.duration("keep", timedelta(milliseconds=milliseconds)) == milliseconds

    @unhurried
    @given(st.integers(1, 10**12))
    def test_what_is_spelled_is_read_again(self, milliseconds: int) -> None:
        assert inputs.duration("keep", inputs.spelled(milliseconds)) == milliseconds

    def test_ranges(self) -> None:
        assert inputs.duration("keep", timedelta(seconds=1, microseconds=1999)) == 1001
        assert inputs.duration("keep", timedelta(0), least=timedelta(0)) == 0
        assert inputs.duration("keep", "0s", least=timedelta(0)) == 0
        assert inputs.duration("lease", "1d", most=timedelta(days=1)) == 86_400_000
        with pytest.raises(InvalidInput, match="lease must be at most 1d"):
            inputs.duration("lease", "25h", most=timedelta(days=1))
        with pytest.raises(InvalidInput, match="keep must be at least 1ms"):
            inputs.duration("keep", timedelta(microseconds=999))

    @pytest.mark.parametrize(
        "value", [timedelta(-1), 60, 1.5, None, "1", "1 h", "1h30m", "canary", True, b"1h", inputs.DEFAULT]
    )
    def test_everything_else_is_refused(self, value: object) -> None:
        with pytest.raises(InvalidInput, match="keep must be") as info:
            inputs.duration("keep", value)
        assert "canary" not in str(info.value)

    def test_a_number_is_answered_with_its_right_spelling(self) -> None:
        with pytest.raises(InvalidInput, match="for 60 seconds write '60s', for 60 minutes '60m'"):
            inputs.duration("cooldown", 60)

    def test_counts(self) -> None:
        assert inputs.check_count("batch_size", 2**31 - 1) == 2**31 - 1
        for value in (0, -1, 2**31, True, 1.0, "1", None):
            with pytest.raises(InvalidInput):
                inputs.check_count("batch_size", value)


def nested(depth: int) -> object:
    value: object = 1
    for n in range(depth):
        value = [value] if n % 2 else {"a": value}
    return value


class TestJson:
    @unhurried
    @given(JSON)
    def test_what_is_taken_comes_back_exactly(self, value: object) -> None:
        text = inputs.dump_json(value)
        assert exactly(json.loads(text)) == exactly(value)
        assert inputs.check_json_text(text) == text

    @unhurried
    @given(JSON)
    def test_the_text_is_compact_and_not_escaped(self, value: object) -> None:
        assert inputs.dump_json(value) == json.dumps(value, separators=(",", ":"), ensure_ascii=False)

    @pytest.mark.parametrize(
        "value",
        [
            math.nan,
            math.inf,
            [-math.inf],
            2**63,
            -(2**63) - 1,
            {"a": 10**5000},
            "\ud800",
            {"\udfff": 1},
            {1: 1},
            {None: 1},
            {True: 1},
            {b"a": 1},
            b"a",
            (1, 2),
            {1, 2},
            datetime(2026, 1, 1, tzinfo=UTC),
            UUID(int=0),
            Decimal(1),
            object(),
            1j,
            inputs.DEFAULT,
            nested(17),
        ],
        ids=lambda v: f"{type(v).__name__}",
    )
    def test_everything_else_is_refused(self, value: object) -> None:
        with pytest.raises(InvalidInput):
            inputs.dump_json(value)
        with pytest.raises(InvalidInput):
            inputs.dump_json([value])

    def test_sixteen_nested_containers(self) -> None:
        assert json.loads(inputs.dump_json(nested(16))) == nested(16)

    def test_a_container_in_itself_is_refused(self) -> None:
        value: list[object] = []
        value.append(value)
        with pytest.raises(InvalidInput):
            inputs.dump_json(value)

    @pytest.mark.parametrize("value", [2**63 - 1, -(2**63)])
    def test_integers_of_64_bits(self, value: int) -> None:
        assert inputs.dump_json(value) == str(value)

    def test_enums_and_ordered_dicts_are_their_values(self) -> None:
        # An IntEnum looked up in a range() is compared with each of its 2**64 members: it never ends.
        value = OrderedDict(a=Number.SEVEN, b=Colour.RED, c=[True, None])
        assert inputs.dump_json(value) == '{"a":7,"b":"red","c":[true,null]}'

    @pytest.mark.parametrize("character", ["a", "é", "😀", '"', "\n", "\x00"])
    def test_the_limit_is_in_bytes_of_text(self, character: str) -> None:
        size = len(json.dumps(character, ensure_ascii=False).encode()) - 2
        most = (16_384 - 2) // size
        assert len(inputs.dump_json(character * most).encode()) <= 16_384
        with pytest.raises(InvalidInput):
            inputs.dump_json(character * (most + 1))

    def test_exactly_16384_bytes(self) -> None:
        assert len(inputs.dump_json("a" * 16_382)) == 16_384
        with pytest.raises(InvalidInput):
            inputs.dump_json("a" * 16_383)

    @pytest.mark.parametrize(
        "text",
        [
            *("", "{", "nope", "NaN", "[Infinity]", '"\\ud800"', "\ud800", "1" * 5000, str(2**63)),
            *("[" * 17 + "]" * 17, "[" * 8000 + "]" * 8000, " " * 16_384 + "1", '"' + "é" * 8192 + '"'),
            *(None, b"1", 1, {}),
        ],
        ids=lambda v: f"{v!r:.12}",
    )
    def test_text_that_is_no_json_of_ours_is_refused(self, text: object) -> None:
        with pytest.raises(InvalidInput):
            inputs.check_json_text(text)

    @pytest.mark.parametrize("text", ["null", "{}", ' {"a" : [1.0] } ', '"\\u00e9"', "1e5"])
    def test_other_spellings_are_kept_to_the_letter(self, text: str) -> None:
        assert inputs.check_json_text(text) == text

    @pytest.mark.parametrize("value", [datetime(2026, 1, 1, tzinfo=UTC), [datetime(2026, 1, 1)]])
    def test_a_datetime_is_answered_with_its_right_form(self, value: object) -> None:
        with pytest.raises(InvalidInput, match=r"datetime is not JSON; .*isoformat"):
            inputs.dump_json(value)


class TestConfigurations:
    def test_the_nearest_name(self) -> None:
        known = ["password-reset", "Invite", "login"]
        assert inputs.nearest("pasword-reset", known) == "did you mean password-reset?"
        assert inputs.nearest("INVITE", known) == "did you mean Invite?"
        assert inputs.nearest("zzz", known) == inputs.nearest("zzz", []) == ""

    def test_several(self) -> None:
        assert inputs.several("slugs", iter("ab"), str) == ("a", "b")
        for wrong in ("ab", 5, None):
            with pytest.raises(ConfigurationError, match=r"slugs must be an iterable of str, such as a list"):
                inputs.several("slugs", wrong, str)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # on purpose
        with pytest.raises(ConfigurationError, match="each of slugs must be a str, not int"):
            inputs.several("slugs", [1], str)


@pytest.mark.parametrize(("marker", "name"), [(inputs.ANY, "ANY"), (inputs.DEFAULT, "DEFAULT")])
def test_markers_are_called_by_their_names(marker: object, name: str) -> None:
    assert repr(marker) == name
