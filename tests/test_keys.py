"""Keys: drawn without bias, digested with their scope, framed with a checksum."""

from __future__ import annotations

import hashlib
import hmac
import string
import zlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtoken import InvalidInput, keys
from vtoken.keys import ALPHANUMERIC, DIGITS, Hidden, Keyring, normalise_code, random_key

from .core_tools import OLD_SECRET, SECRET, unhurried

NAME = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SCOPE = st.tuples(NAME, NAME, NAME, NAME)


class TestRandomKeys:
    def test_the_default_is_32_of_62_characters(self) -> None:
        key = random_key()
        assert len(key) == 32
        assert set(key) <= set(string.ascii_letters + string.digits)
        assert len(ALPHANUMERIC) == len(set(ALPHANUMERIC)) == 62

    @pytest.mark.parametrize("length", [1, 2, 31, 512])
    @pytest.mark.parametrize("chars", ["0", DIGITS, ALPHANUMERIC, "é€😀", "abc" * 86])
    def test_as_many_of_those_characters(self, length: int, chars: str) -> None:
        key = random_key(length, chars)
        assert len(key) == length
        assert set(key) <= set(chars)

    @pytest.mark.parametrize("chars", ["a", "ab", "abc", DIGITS, ALPHANUMERIC, string.printable, "abcd" * 64])
    def test_no_character_is_likelier(self, chars: str) -> None:
        # Exact, not by sampling: of the 256 bytes those left over are rejected, the rest is dealt out evenly.
        table, rejected = keys._alphabet(chars)  # pyright: ignore[reportPrivateUsage]  # the table is the proof
        dealt = Counter(chr(table[byte]) for byte in range(256) if byte not in rejected)
        share = 256 // len(chars)
        assert dealt == Counter({c: share * chars.count(c) for c in set(chars)})
        assert len(rejected) == 256 % len(chars)

    def test_every_character_comes_up(self) -> None:
        # 100 characters, each missing from 51,200 draws with a chance of less than 1e-223.
        drawn = "".join(random_key(512, string.printable) for _ in range(100))
        assert set(drawn) == set(string.printable)

    def test_two_keys_differ(self) -> None:
        assert len({random_key() for _ in range(1000)}) == 1000

    @pytest.mark.parametrize("length", [0, -1, 513, True, 8.0, "8", None])
    def test_refused_lengths(self, length: object) -> None:
        with pytest.raises(InvalidInput):
            random_key(length)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # on purpose

    @pytest.mark.parametrize("chars", ["", None, 5, b"ab", ["a"]])
    def test_refused_alphabets(self, chars: object) -> None:
        with pytest.raises(InvalidInput):
            random_key(8, chars)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # on purpose


class TestChecksums:
    def test_the_frame(self) -> None:
        framed = keys.add_checksum("vt_", "body")
        assert framed.startswith("vt_body")
        number = 0
        for digit in framed[-6:]:
            number = number * 62 + ALPHANUMERIC.index(digit)
        assert number == zlib.crc32(b"vt_body")
        assert keys.has_checksum("vt_", framed)

    @pytest.mark.parametrize("position", range(3 + 32 + 6))
    def test_one_wrong_character_is_told(self, position: int) -> None:
        framed = keys.add_checksum("vt_", random_key())
        other = "x" if framed[position] != "x" else "y"
        assert not keys.has_checksum("vt_", framed[:position] + other + framed[position + 1 :])

    @pytest.mark.parametrize("cut", range(1, 41))
    def test_a_cut_key_is_told(self, cut: int) -> None:
        framed = keys.add_checksum("vt_", "a" * 32)
        assert not keys.has_checksum("vt_", framed[:-cut])

    @unhurried
    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
    def test_anything_at_all_may_be_presented(self, key: str) -> None:
        assert not keys.has_checksum("vt_", key)
        assert not keys.has_checksum("vt_", f"vt_{key}")

    def test_a_prefix_alone_is_no_key(self) -> None:
        assert not keys.has_checksum("vt_", keys.add_checksum("vt_", ""))


class TestNormalisedCodes:
    @pytest.mark.parametrize("typed", ["123456", " 123456 ", "123 456", "123-456", "1-2 3\t4\u00a05\n6"])
    def test_spaces_and_hyphens(self, typed: str) -> None:
        assert normalise_code(typed, DIGITS) == "123456"

    @pytest.mark.parametrize(
        ("typed", "chars", "expected"),
        [
            ("abc-def", "ABCDEF", "ABCDEF"),
            ("ABC DEF", "abcdef", "abcdef"),
            ("aBc", "ABCabc", "aBc"),
            ("ab1", "AB123", "AB1"),
            ("a-b", "ab-", "a-b"),
            ("a b", "ab ", "a b"),
            ("aB-c D", None, "aBcD"),
            ("ß", "S", "ß"),
            ("ı", "I", "ı"),
            ("ſ", "S", "ſ"),
            ("\u212a", "K", "\u212a"),
            ("é", "É", "é"),
        ],
    )
    def test_letter_case_where_the_alphabet_has_one(
        self, typed: str, chars: str | None, expected: str
    ) -> None:
        assert normalise_code(typed, chars) == expected

    @pytest.mark.parametrize("typed", ["１２３４５６", "١٢٣٤٥٦", "12345６", "¹23456", "۱۲۳۴۵۶"])
    def test_other_scripts_digits_stay_what_they_are(self, typed: str) -> None:
        assert normalise_code(typed, DIGITS) == typed

    @unhurried
    @given(st.text(DIGITS + " -\t", max_size=20))
    def test_twice_is_once(self, typed: str) -> None:
        once = normalise_code(typed, DIGITS)
        assert normalise_code(once, DIGITS) == once
        assert set(once) <= set(DIGITS)


class TestDigests:
    def test_links_without_a_secret_are_sha256(self) -> None:
        digest = Keyring(None).link("key")
        assert digest == (hashlib.sha256(b"key").digest(), "sha256", "")

    def test_links_with_a_secret_are_hmac(self) -> None:
        value, scheme, secret_id = Keyring(SECRET).link("key")
        assert value == hmac.digest(SECRET.encode(), b"vtoken:link:v1key", "sha256")
        assert scheme == "hmac-sha256"
        assert secret_id

    def test_codes_are_hmac_over_their_scope(self) -> None:
        value, scheme, secret_id = Keyring(SECRET).code("auth.user", "42", "login", "123456")
        parts = [b"vtoken:code:v1", b"auth.user", b"42", b"login", b"123456"]
        message = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        assert value == hmac.digest(SECRET.encode(), message, "sha256")
        assert (scheme, bool(secret_id)) == ("code-hmac-sha256", True)

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (("ab", "c", "s", "1"), ("a", "bc", "s", "1")),
            (("a", "b", "cs", "1"), ("a", "bc", "s", "1")),
            (("a", "b", "s1", "1"), ("a", "b", "s", "11")),
            (("a", "b", "", "s1"), ("a", "b", "s", "1")),
            (("a", "1", "2", "1"), ("a", "2", "1", "1")),
        ],
    )
    def test_no_boundary_can_be_moved(self, one: tuple[str, ...], other: tuple[str, ...]) -> None:
        keyring = Keyring(SECRET)
        assert keyring.code(*one) != keyring.code(*other)

    @unhurried
    @given(SCOPE, SCOPE)
    def test_equal_digests_mean_equal_scopes(self, one: tuple[str, ...], other: tuple[str, ...]) -> None:
        keyring = Keyring(SECRET)
        assert (keyring.code(*one) == keyring.code(*other)) is (one == other)
        messages = [keys._code_message(*scope) for scope in (one, other)]  # pyright: ignore[reportPrivateUsage]  # what is digested is looked at itself
        assert (messages[0] == messages[1]) is (one == other)

    @unhurried
    @given(NAME)
    def test_a_link_is_never_a_code_or_a_derived_key_or_a_secret_id(self, text: str) -> None:
        keyring = Keyring(SECRET)
        digests = [keyring.link(text).value, keyring.code("", "", "", text).value, keys.context_digest(text)]
        assert len(set(digests)) == 3

    def test_equal_codes_of_two_people_differ(self) -> None:
        keyring = Keyring(SECRET)
        assert keyring.code("u", "1", "s", "123456") != keyring.code("u", "2", "s", "123456")

    def test_a_code_needs_the_secret(self) -> None:
        digests = {Keyring(s).code("u", "1", "s", "123456").value for s in (SECRET, OLD_SECRET, None)}
        assert len(digests) == 3

    def test_digests_are_32_bytes(self) -> None:
        for keyring in (Keyring(None), Keyring(SECRET)):
            assert len(keyring.link("").value) == len(keyring.code("", "", "", "").value) == 32


class TestRotation:
    def test_new_digests_are_of_the_current_secret(self) -> None:
        keyring = Keyring(SECRET, [OLD_SECRET])
        assert keyring.link("key") == Keyring(SECRET).link("key")
        assert keyring.code("u", "1", "s", "1") == Keyring(SECRET).code("u", "1", "s", "1")

    def test_old_ones_are_looked_for_too(self) -> None:
        keyring = Keyring(SECRET, [OLD_SECRET])
        wanted = keyring.links("key")
        assert wanted == tuple(
            k.link("key").value for k in (Keyring(SECRET), Keyring(OLD_SECRET), Keyring(None))
        )
        codes = keyring.codes("u", "1", "s", "1")
        assert codes == tuple(
            k.code("u", "1", "s", "1").value for k in (Keyring(SECRET), Keyring(OLD_SECRET))
        )

    def test_a_code_from_before_any_secret_is_not(self) -> None:
        assert Keyring(None).code("u", "1", "s", "1").value not in Keyring(SECRET).codes("u", "1", "s", "1")

    def test_secrets_have_ids_that_tell_nothing(self) -> None:
        ids = [Keyring(s).link("").secret_id for s in (SECRET, OLD_SECRET)]
        assert len(set(ids)) == 2
        assert all(len(i) == 8 and set(i) <= set(string.hexdigits) for i in ids)


class TestDerivedKeys:
    def test_the_same_again_and_of_256_bits(self) -> None:
        first, again = (Keyring(SECRET).derive("n" * 32, "u", "1", "s", "") for _ in range(2))
        assert first is not None
        assert first == again
        assert len(first) == 43
        assert set(first) <= set(ALPHANUMERIC + "-_")

    def test_nonce_subject_slug_and_secret_all_matter(self) -> None:
        asked = [("n", "u", "1", "s"), ("m", "u", "1", "s"), ("n", "v", "1", "s"), ("n", "u", "2", "s")]
        asked += [("n", "u", "1", "t"), ("n", "u1", "", "s")]
        found = {Keyring(secret).derive(*a, "") for a in asked for secret in (SECRET, OLD_SECRET)}
        assert len(found) == 2 * len(asked)

    def test_an_old_secret_still_derives_until_it_is_dropped(self) -> None:
        old = Keyring(OLD_SECRET)
        secret_id = old.link("").secret_id
        key = old.derive("n", "u", "1", "s", secret_id)
        assert Keyring(SECRET, [OLD_SECRET]).derive("n", "u", "1", "s", secret_id) == key
        assert Keyring(SECRET).derive("n", "u", "1", "s", secret_id) is None
        assert Keyring(None).derive("n", "u", "1", "s", secret_id) is None


def test_use_ids_are_short_and_differ() -> None:
    assert keys.use_id("a") == keys.use_id("a") != keys.use_id("b")
    assert len(keys.use_id("x" * 128)) == 32


def test_reprs_hide() -> None:
    key, keyring = Hidden("canary"), Keyring(SECRET, [OLD_SECRET])
    shown = [
        key,
        keyring,
        keyring.link("canary"),
        keyring.links("canary"),
        keyring.codes("u", "1", "s", "canary"),
    ]
    for value in shown:
        for text in (repr(value), str(value), f"{value}", f"{[value]}"):
            assert "canary" not in text
            assert SECRET not in text
            assert OLD_SECRET not in text
            assert "\\x" not in text
    assert key.reveal() == key.text() == "canary"
