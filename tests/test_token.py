"""The token as an application sees it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given

from vtoken import CorruptStore, InvalidInput, IssuedToken, VerificationToken
from vtoken.backend import NEVER, STALE_HOLD, State, StoredHold, StoredKey, StoredToken
from vtoken.inputs import milliseconds
from vtoken.token import issued, loaded

from .core_tools import MS, START, unhurried
from .test_inputs import JSON, exactly

SIXTY: Any = timedelta(seconds=60)


def token(cls: type[VerificationToken] = VerificationToken, **fields: Any) -> VerificationToken:
    given: dict[str, Any] = {
        "id": "0" * 16,
        "created_at": START,
        "content_type": "auth.user",
        "object_id": "42",
        "expires_at": START + SIXTY,
    }
    return cls(**{**given, **fields})


STALE: Any = timedelta(milliseconds=STALE_HOLD) - SIXTY
LIFE: dict[str, Any] = {"expires_at": milliseconds(START + SIXTY), "ends_at": milliseconds(START + SIXTY)}


def hold(number: int) -> StoredHold:
    return StoredHold(hold_id=f"hold-{number}", until=milliseconds(START + SIXTY), use_id="", origin="0" * 16)


def stored_key(kind: str = "link", plain_key: str = "", **fields: Any) -> StoredKey:
    given: dict[str, Any] = {
        "digest": bytes(32),
        "scheme": "sha256",
        "secret_id": "",
        "nonce": "",
        "plain_key": plain_key,
        "kind": kind,
        "expires_at": milliseconds(START + SIXTY / 2),
        "origin": "0" * 16,
    }
    return StoredKey(**{**given, **fields})


def stored(*keys: StoredKey, **fields: Any) -> StoredToken:
    given: dict[str, Any] = {
        "id": "0" * 16,
        "content_type": "auth.user",
        "object_id": "42",
        "slug": "",
        "context": b"",
        "is_beside": False,
        "created_at": milliseconds(START),
        "state": State.ACTIVE,
        "extra_data": None,
        "max_uses": 1,
        "uses": 0,
        "used_at": 0,
        "keys": keys,
        "holds": (),
    }
    return StoredToken(**{**given, **LIFE, **fields})


class TestFromTheRecord:
    def test_every_field(self) -> None:
        found = loaded(
            stored(
                slug="reset",
                state=State.USED,
                extra_data="{}",
                max_uses=None,
                uses=3,
                used_at=milliseconds(START + MS),
            ),
            is_replay=True,
        )
        assert (found.id, found.content_type, found.object_id, found.slug) == (
            "0" * 16,
            "auth.user",
            "42",
            "reset",
        )
        assert (found.created_at, found.expires_at, found.used_at) == (START, START + SIXTY, START + MS)
        assert (found.is_active, found.extra_data, found.max_uses, found.uses) == (False, "{}", None, 3)
        assert (found.is_replay, found.key, found.code, found.code_expires_at) == (True, None, None, None)

    def test_what_is_not_there_is_none(self) -> None:
        found = loaded(stored(expires_at=NEVER))
        assert (found.slug, found.expires_at, found.used_at, found.is_replay) == (None, None, None, False)

    def test_keys_that_are_stored_readable(self) -> None:
        taken_over = stored_key("link", "older", origin="f" * 16)
        cases = [
            (stored(stored_key("link", "l"), taken_over), ("l", None)),
            (stored(stored_key("code", "c")), ("c", None)),
            (stored(stored_key("link", "l"), stored_key("code", "c")), ("l", "c")),
            (stored(stored_key("link"), stored_key("code")), (None, None)),
            (stored(taken_over), (None, None)),
        ]
        for record, expected in cases:
            found = loaded(record)
            assert (found.key, found.code) == expected

    def test_keys_that_were_derived_again(self) -> None:
        found = loaded(stored(stored_key("link"), stored_key("code")), key="l", code="c")
        assert (found.key, found.code) == ("l", "c")

    def test_a_pair_at_its_issue(self) -> None:
        pair = issued(stored(stored_key("link"), stored_key("code")), "l", "c")
        assert (pair.key, pair.code, pair.code_expires_at) == ("l", "c", START + SIXTY / 2)
        code = issued(stored(stored_key("code")), "123456")
        assert (code.key, code.code, code.code_expires_at) == ("123456", None, None)

    def test_a_time_past_the_year_9999_is_damage(self) -> None:
        with pytest.raises(CorruptStore, match="year 9999"):
            loaded(stored(created_at=NEVER + 1))


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

    @pytest.mark.parametrize(
        ("max_uses", "uses", "holds", "valid"),
        [
            (1, 0, 0, True),
            (1, 0, 1, False),
            (3, 1, 1, True),
            (3, 1, 2, False),
            (3, 3, 0, False),
            (None, 10**6, 50, True),
        ],
    )
    def test_a_use_is_free_that_is_neither_used_nor_held(
        self, max_uses: int | None, uses: int, holds: int, valid: bool
    ) -> None:
        held = loaded(stored(max_uses=max_uses, uses=uses, holds=tuple(map(hold, range(holds)))))
        assert held.is_valid(START) is valid

    @pytest.mark.parametrize(
        ("now", "valid"), [(timedelta(0), False), (SIXTY - MS, False), (SIXTY, True), (-STALE - MS, True)]
    )
    def test_a_hold_ends_by_itself_and_a_stale_one_does_not_count(self, now: timedelta, valid: bool) -> None:
        held = loaded(stored(expires_at=NEVER, holds=(hold(1),)))
        assert held.is_valid(START + now) is valid

    def test_our_own_hold_is_no_hindrance(self) -> None:
        ours = loaded(stored(holds=(hold(1),)), own_holds=frozenset({"hold-1"}))
        assert ours.is_valid(START)
        assert not ours.is_valid(START + SIXTY + MS)
        both = loaded(stored(holds=(hold(1), hold(2)), max_uses=2, uses=1), own_holds=frozenset({"hold-1"}))
        assert not both.is_valid(START)

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
        assert token() != token(id="1" * 16)
        assert token() != "0" * 16
        assert len({token(), same, token(id="1" * 16)}) == 2

    def test_repr_shows_what_is_public(self) -> None:
        shown = repr(token(IssuedToken, key="canary", slug="reset", extra_data='{"canary":1}'))
        assert shown == f"<IssuedToken {'0' * 16} 'auth.user:42' slug='reset' active>"
        assert "inactive" in repr(token(is_active=False))

    def test_repr_is_one_line_whatever_the_object_is_called(self) -> None:
        forged = "7\nINFO signed in: \x1b[1madmin\u2028"
        shown = repr(token(object_id=forged, content_type="a\r\nb", slug="c\x85d"))
        assert shown.isprintable()
        assert len(shown.splitlines()) == 1

    def test_pickles_and_copies_keep_everything_but_the_key(self) -> None:
        original = loaded(
            stored(
                stored_key("link", "canary"),
                stored_key("code", "canary"),
                slug="reset",
                extra_data="{}",
                max_uses=3,
                uses=2,
                used_at=milliseconds(START),
                holds=(hold(1),),
            ),
            is_replay=True,
        )
        assert (original.key, original.code) == ("canary", "canary")
        pickled = [pickle.dumps(original, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
        assert not any(b"canary" in data for data in pickled)
        unpickled = [pickle.loads(data) for data in pickled]  # noqa: S301  # our own
        for same in (*unpickled, copy.copy(original), copy.deepcopy(original)):
            assert type(same) is VerificationToken
            assert (same.key, same.code) == (None, None)
            assert not same.is_valid(START)  # its last use is held
            for name in VerificationToken.__slots__:
                if name[0] != "_":
                    assert getattr(same, name) == getattr(original, name)

    @pytest.mark.parametrize("how", [pickle.dumps, copy.copy, copy.deepcopy])
    def test_an_issued_token_is_not_copied_without_its_key(self, how: Callable[[object], object]) -> None:
        """Fault 25 of issue 11: a mail with "None" in the place of the key was sent."""
        for kept in (token(IssuedToken, key="canary"), [token(IssuedToken, key="canary")]):
            if how is copy.copy and isinstance(kept, list):
                continue  # which copies the list alone
            with pytest.raises(TypeError, match=r"its key must not be stored: send token\.key now") as info:
                how(kept)
            assert "canary" not in str(info.value)

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
