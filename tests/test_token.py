"""The token as an application sees it."""

from __future__ import annotations

import copy
import pickle
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given

from vtoken import InvalidInput, IssuedToken, VerificationToken

from .core_tools import MS, START, unhurried
from .test_inputs import JSON, exactly

SIXTY: Any = timedelta(seconds=60)


def token(cls: type[VerificationToken] = VerificationToken, **fields: Any) -> VerificationToken:
    given: dict[str, Any] = {
        "id": "0" * 32,
        "created_at": START,
        "content_type": "auth.user",
        "object_id": "42",
        "expires_at": START + SIXTY,
    }
    return cls(**{**given, **fields})


class TestValidity:
    @pytest.mark.parametrize(
        ("after", "valid"),
        [(-MS, True), (timedelta(0), True), (timedelta(microseconds=999), True), (MS, False), (SIXTY, False)],
    )
    def test_valid_at_exactly_expires_at_and_not_a_millisecond_later(
        self, after: timedelta, valid: bool
    ) -> None:
        assert token().is_valid(START + SIXTY + after) is valid

    def test_none_never_expires(self) -> None:
        assert token(expires_at=None).is_valid(datetime.max.replace(tzinfo=UTC))

    def test_inactive_is_not_valid(self) -> None:
        assert not token(is_active=False, expires_at=None).is_valid(START)

    @pytest.mark.parametrize(("now", "valid"), [(timedelta(0), False), (SIXTY - MS, False), (SIXTY, True)])
    def test_leased_to_someone_else_is_not_valid(self, now: timedelta, valid: bool) -> None:
        assert token(leased_until=START + SIXTY).is_valid(START + now) is valid

    def test_leased_to_us_is_valid_while_it_lives(self) -> None:
        ours = token(leased_until=START + SIXTY, lease_is_ours=True)
        assert ours.is_valid(START)
        assert not ours.is_valid(START + SIXTY + MS)
        ours.is_active = False
        assert not ours.is_valid(START)

    def test_any_time_zone_will_do(self) -> None:
        zone = timezone(timedelta(hours=5, minutes=30))
        assert token().is_valid((START + SIXTY).astimezone(zone))
        assert not token().is_valid((START + SIXTY + MS).astimezone(zone))

    def test_without_now_the_real_clock_counts(self) -> None:
        assert token(expires_at=datetime.now(UTC) + timedelta(days=1)).is_valid()
        assert not token(expires_at=datetime.now(UTC) - timedelta(days=1)).is_valid()

    @pytest.mark.parametrize("now", [datetime(2100, 1, 1), 0, "2100-01-01"])
    def test_a_naive_now_is_refused(self, now: Any) -> None:
        for any_token in (token(), token(expires_at=None), token(is_active=False)):
            with pytest.raises(InvalidInput):
                any_token.is_valid(now)


class TestIdentity:
    def test_equality_and_hash_go_by_id(self) -> None:
        same = token(IssuedToken, key="k", is_active=False, object_id="43")
        assert token() == same
        assert same == token()
        assert hash(token()) == hash(same)
        assert token() != token(id="1" * 32)
        assert token() != "0" * 32
        assert len({token(), same, token(id="1" * 32)}) == 2

    def test_repr_shows_what_is_public(self) -> None:
        shown = repr(token(IssuedToken, key="canary", slug="reset", extra_data='{"canary":1}'))
        assert shown == f"<IssuedToken {'0' * 32} 'auth.user:42' slug='reset' active>"
        assert "inactive" in repr(token(is_active=False))

    def test_repr_is_one_line_whatever_the_object_is_called(self) -> None:
        forged = "7\nINFO signed in: \x1b[1madmin\u2028"
        shown = repr(token(object_id=forged, content_type="a\r\nb", slug="c\x85d"))
        assert shown.isprintable()
        assert len(shown.splitlines()) == 1

    @pytest.mark.parametrize("cls", [VerificationToken, IssuedToken])
    def test_pickles_keep_everything_but_the_key(self, cls: type[VerificationToken]) -> None:
        original = token(
            cls,
            key="canary",
            slug="reset",
            extra_data="{}",
            max_uses=3,
            uses=2,
            used_at=START,
            leased_until=START,
        )
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            data = pickle.dumps(original, protocol)
            assert b"canary" not in data
            same = pickle.loads(data)  # noqa: S301  # our own
            assert type(same) is VerificationToken
            assert same.key is None
            for name in VerificationToken.__slots__:
                if name[0] != "_":
                    assert getattr(same, name) == getattr(original, name)

    def test_copies_are_pickles(self) -> None:
        for same in (copy.copy(token(key="k")), copy.deepcopy(token(key="k"))):
            assert (same, same.key) == (token(), None)

    def test_an_issued_key_cannot_be_swapped(self) -> None:
        issued = token(IssuedToken, key="canary")
        assert issued.key == "canary"
        with pytest.raises(AttributeError):
            issued.key = "other"  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # on purpose

    def test_a_misspelt_field_is_an_error(self) -> None:
        with pytest.raises(AttributeError):
            token().extra_dta = "{}"  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]  # on purpose


class TestExtraData:
    @unhurried
    @given(JSON)
    def test_set_and_get(self, value: object) -> None:
        holder = token()
        holder.set_extra_data(value)
        assert exactly(holder.get_extra_data()) == exactly(value)

    def test_none_is_none_and_empty_is_empty(self) -> None:
        holder = token(extra_data="1")
        holder.set_extra_data(None)
        assert (holder.extra_data, holder.get_extra_data()) == (None, None)
        holder.set_extra_data({})
        assert (holder.extra_data, holder.get_extra_data()) == ("{}", {})

    def test_a_refused_value_changes_nothing(self) -> None:
        holder = token(extra_data="1")
        with pytest.raises(InvalidInput):
            holder.set_extra_data({1: 2})
        assert holder.extra_data == "1"
