"""Keys: drawn without bias, digested with their scope, framed with a checksum."""

from __future__ import annotations

import hashlib
import hmac
import string
import sys
import unicodedata
import zlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtoken import ConfigurationError, InvalidInput, keys
from vtoken.backend import StoredKey
from vtoken.keys import (
    ALPHANUMERIC,
    DIGITS,
    Hidden,
    Keyring,
    alphabet_problem,
    code_shape_ok,
    context_digest,
    is_possible_key,
    normalise_code,
    normalise_link,
    random_key,
)

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


PASTED = [
    *("123456", " 123456 ", "123 456", "123-456", "1-2 3\t4\u00a05\n6", "123\u200b456", "\ufeff123456"),
    *("123–456", "123—456", "123\u2011456", "123\u2212456", "1.2.3.4.5.6", "123·456", "123_456", "123…456"),
    *(
        "１２３４５６",
        "١٢٣٤٥٦",
        "۱۲۳۴۵۶",
        "१२३४५६",
        "𝟭𝟮𝟯𝟰𝟱𝟲",
        "12345６",
        "\u202a123456\u202c",
        "123\u00ad456",
    ),
    *("123\x00456", "123\x7f456", "\u2800123456", "123\u3164456", "1\ufe0f23456", "123\u3000456", "①②③④⑤⑥"),
    "".join(f"{digit}\ufe0f\u20e3" for digit in "123456"),  # as emoji
]


class TestPastedCodes:
    @pytest.mark.parametrize("typed", PASTED)
    def test_what_programs_and_keyboards_do_to_digits(self, typed: str) -> None:
        assert normalise_code(typed, DIGITS) == "123456"
        assert normalise_code(typed, None) == "123456"

    @pytest.mark.parametrize(
        ("typed", "chars", "expected"),
        [
            ("abc-def", "ABCDEF", "ABCDEF"),
            ("ABC DEF", "abcdef", "abcdef"),
            ("aBc", "ABCabc", "aBc"),
            ("ab1", "AB123", "AB1"),
            ("ＡＢ１", "AB123", "AB1"),
            ("aB-c D", None, "aBcD"),
            ("é", "É", "É"),
            ("e\u0301", "É", "É"),
            ("я", "БЯ", "Я"),
        ],
    )
    def test_letter_case_where_the_alphabet_has_one(
        self, typed: str, chars: str | None, expected: str
    ) -> None:
        assert normalise_code(typed, chars) == expected

    @pytest.mark.parametrize(
        ("typed", "chars", "expected"),
        [
            ("OIL", DIGITS, "011"),
            ("oil", DIGITS, "011"),
            ("oil", "0123456789abcdef", "011"),
            ("OIL", "OIL01", "OIL"),
            ("oil", "OIL01", "OIL"),
            ("oIl", "0123456789ABCDEFGHJKMNPQRSTVWXYZ", "011"),
            ("Ol", "ABCabc01", "01"),
            ("OIL", None, "OIL"),
        ],
    )
    def test_letters_that_are_read_as_digits(self, typed: str, chars: str | None, expected: str) -> None:
        assert normalise_code(typed, chars) == expected

    def test_every_dash_space_and_invisible_character_of_unicode_is_dropped(self) -> None:
        everything = [chr(n) for n in range(sys.maxunicode + 1) if not 0xD800 <= n <= 0xDFFF]
        dropped = [c for c in everything if unicodedata.category(c) in ("Cc", "Cf", "Pd", "Zl", "Zp", "Zs")]
        assert [char for char in dropped if normalise_code(f"12{char}34", None) != "1234"] == []
        assert normalise_link("".join(c for c in dropped if unicodedata.category(c) != "Pd")) == ""

    def test_every_decimal_digit_of_unicode_is_its_ascii_digit(self) -> None:
        digits = [chr(n) for n in range(sys.maxunicode + 1) if unicodedata.category(chr(n)) == "Nd"]
        assert len(digits) > 600
        assert {normalise_code(digit, DIGITS) for digit in digits} == set(DIGITS)
        assert all(int(normalise_code(digit, None)) == unicodedata.decimal(digit) for digit in digits)

    @unhurried
    @given(st.text(max_size=20), st.sampled_from([DIGITS, "ABCDEF", ALPHANUMERIC, None]))
    def test_no_separator_is_left(self, typed: str, chars: str | None) -> None:
        code = normalise_code(typed, chars)
        assert not set(code) & set(" \t\n\u00a0-–_.\u200b\ufeff\x00")
        assert not any(c.isspace() for c in code)

    @unhurried
    @given(st.text(DIGITS + " -\t.oOlI", max_size=20))
    def test_twice_is_once(self, typed: str) -> None:
        once = normalise_code(typed, DIGITS)
        assert normalise_code(once, DIGITS) == once
        assert set(once) <= set(DIGITS)

    @pytest.mark.parametrize(
        ("code", "length", "chars", "is_ok"),
        [
            ("123456", 6, DIGITS, True),
            ("12345", 6, DIGITS, False),
            ("1234567", 6, DIGITS, False),
            ("12345a", 6, DIGITS, False),
            ("", 6, DIGITS, False),
            ("", None, None, False),
            ("anything", None, None, True),
            ("anything", None, DIGITS, True),
        ],
    )
    def test_the_shape_of_our_own_codes(
        self, code: str, length: int | None, chars: str | None, is_ok: bool
    ) -> None:
        assert code_shape_ok(code, length, chars) is is_ok


class TestPastedLinks:
    @pytest.mark.parametrize(
        "pasted", ["key", "key\n", " key", "\ufeffkey\u200b", "\r\n\tkey\x00", "\u00a0key\u2060\u202c "]
    )
    def test_white_space_and_invisible_characters_at_the_ends(self, pasted: str) -> None:
        assert normalise_link(pasted) == "key"

    @pytest.mark.parametrize("key", ["a b", "a-b_", "-a~", ".a.", "a\u200bb", "Ａ", "", "١", '"a"'])
    def test_nothing_else_changes(self, key: str) -> None:
        assert normalise_link(key) == key

    def test_nothing_may_be_left(self) -> None:
        assert normalise_link(" \u200b\n") == ""

    @pytest.mark.parametrize("key", ["a\0", "\ud800", "x" * 513, "é" * 257])
    def test_what_cannot_be_a_key(self, key: str) -> None:
        assert not is_possible_key(key)

    @pytest.mark.parametrize("key", ["", "a", "x" * 512, "é" * 256, "\n"])
    def test_what_can(self, key: str) -> None:
        assert is_possible_key(key)


class TestAlphabets:
    @pytest.mark.parametrize("chars", [ALPHANUMERIC, DIGITS, "abc-._~", "0123456789abcdef"])
    def test_of_links(self, chars: str) -> None:
        assert alphabet_problem(chars, of_code=False) is None

    @pytest.mark.parametrize(
        "chars", ["aab", "abc ", "ab/", "ab+", "ab=", "abé", "ab%", "ab#", "ab&", "ab\n"]
    )
    def test_not_of_links(self, chars: str) -> None:
        assert alphabet_problem(chars, of_code=False)

    @pytest.mark.parametrize(
        "chars", [DIGITS, ALPHANUMERIC, "BCDFGHJKLM", "бвгджз", "+*#", "OIL01", "あいう"]
    )
    def test_of_codes(self, chars: str) -> None:
        assert alphabet_problem(chars, of_code=True) is None
        assert normalise_code(chars, chars) == chars

    @pytest.mark.parametrize(
        "chars",
        [
            *("00", "01-", "01 ", "0.1", "0_1", "01\u200b", "01\u2013", "٠١٢", "０１", "01²"),
            *("0ﬁ", "e\u0301", "\u1100\u1161", "0\x00"),
        ],
    )
    def test_not_of_codes(self, chars: str) -> None:
        assert alphabet_problem(chars, of_code=True)


class TestContexts:
    def test_the_order_of_a_mapping_does_not_matter(self) -> None:
        assert context_digest({"a": "1", "b": "2"}) == context_digest({"b": "2", "a": "1"})

    def test_names_and_texts_do(self) -> None:
        contexts: list[str | dict[str, str]] = [
            {"a": "1"},
            {"a": "2"},
            {"b": "1"},
            {"a": "1", "b": ""},
            {"a": "1b"},
            {"a1": ""},
            "a1",
            "a",
        ]
        assert len({context_digest(context) for context in contexts}) == len(contexts)

    @unhurried
    @given(NAME, st.dictionaries(NAME, NAME, max_size=3))
    def test_no_text_is_a_mapping(self, text: str, mapping: dict[str, str]) -> None:
        assert context_digest(text) != context_digest(mapping)
        assert len(context_digest(text)) == len(context_digest(mapping)) == 32


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
        messages = [keys.prefixed(*scope) for scope in (one, other)]
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
        digests = {Keyring(s).code("u", "1", "s", "123456").value for s in (SECRET, OLD_SECRET)}
        assert len(digests) == 2
        assert Keyring(None).codes("u", "1", "s", "123456").all() == ()
        with pytest.raises(ConfigurationError, match="secret"):
            Keyring(None).code("u", "1", "s", "123456")

    def test_digests_are_32_bytes(self) -> None:
        keyring = Keyring(SECRET)
        digests = [Keyring(None).link(""), keyring.link(""), keyring.code("", "", "", "")]
        assert {len(digest.value) for digest in digests} == {32}


class TestRotation:
    def test_new_digests_are_of_the_current_secret(self) -> None:
        keyring = Keyring(SECRET, [OLD_SECRET])
        assert keyring.link("key") == Keyring(SECRET).link("key")
        assert keyring.code("u", "1", "s", "1") == Keyring(SECRET).code("u", "1", "s", "1")

    def test_old_ones_are_looked_for_too(self) -> None:
        keyring, rings = Keyring(SECRET, [OLD_SECRET]), [Keyring(SECRET), Keyring(OLD_SECRET)]
        assert keyring.links("key").all() == tuple(k.link("key") for k in (*rings, Keyring(None)))
        codes = keyring.codes("u", "1", "s", "1")
        assert codes.all() == tuple(k.code("u", "1", "s", "1") for k in rings)
        assert codes.digests == tuple(digest.value for digest in codes.all())
        assert keyring.secret_ids == tuple(digest.secret_id for digest in codes.all())

    def test_a_digest_that_was_made_without_the_secret_does_not_pass_for_one_that_was(self) -> None:
        """Fault 22 of issue 11: a row's digest was replaced by a plain SHA-256."""
        keyring = Keyring(SECRET, [OLD_SECRET])
        right, plain = keyring.link("key"), Keyring(None).link("key")
        stored = StoredKey(
            digest=right.value,
            scheme=right.scheme,
            secret_id=right.secret_id,
            nonce="",
            plain_key="",
            kind="link",
            expires_at=0,
            origin="0" * 16,
        )
        candidates = keyring.links("key")
        assert candidates.fit(stored)
        assert not candidates.fit(stored._replace(digest=plain.value))
        assert not candidates.fit(stored._replace(secret_id=keyring.secret_ids[1]))
        # From before there was a secret.
        assert candidates.fit(stored._replace(digest=plain.value, scheme="sha256", secret_id=""))

    def test_secrets_have_ids_that_tell_nothing(self) -> None:
        ids = [Keyring(s).link("").secret_id for s in (SECRET, OLD_SECRET)]
        assert len(set(ids)) == 2
        assert all(len(i) == 8 and set(i) <= set(string.hexdigits) for i in ids)


class TestDerivedKeys:
    def test_the_same_again_and_of_256_bits(self) -> None:
        first, again = (Keyring(SECRET).derive_link("n" * 32, "u", "1", "s") for _ in range(2))
        assert first is not None
        assert first == again
        assert len(first) == 43
        assert set(first) <= set(ALPHANUMERIC + "-_")

    def test_nonce_subject_slug_and_secret_all_matter(self) -> None:
        asked = [("n", "u", "1", "s"), ("m", "u", "1", "s"), ("n", "v", "1", "s"), ("n", "u", "2", "s")]
        asked += [("n", "u", "1", "t"), ("n", "u1", "", "s")]
        rings = [Keyring(secret) for secret in (SECRET, OLD_SECRET)]
        assert len({ring.derive_link(*a) for a in asked for ring in rings}) == 2 * len(asked)
        codes = {ring.derive_code(*a, "", 32, ALPHANUMERIC) for a in asked for ring in rings}
        assert len(codes) == 2 * len(asked)

    def test_an_old_secret_still_derives_until_it_is_dropped(self) -> None:
        old = Keyring(OLD_SECRET)
        secret_id = old.link("").secret_id
        link = old.derive_link("n", "u", "1", "s", secret_id)
        code = old.derive_code("n", "u", "1", "s", secret_id, 6, DIGITS)
        both = Keyring(SECRET, [OLD_SECRET])
        assert both.derive_link("n", "u", "1", "s", secret_id) == link
        assert both.derive_code("n", "u", "1", "s", secret_id, 6, DIGITS) == code
        for ring in (Keyring(SECRET), Keyring(None)):
            assert ring.derive_link("n", "u", "1", "s", secret_id) is None
            assert ring.derive_code("n", "u", "1", "s", secret_id, 6, DIGITS) is None

    @pytest.mark.parametrize(
        "chars", [DIGITS, "0", "abc", ALPHANUMERIC, "é€😀", "".join(map(chr, range(256, 900)))]
    )
    @pytest.mark.parametrize("length", [1, 6, 8, 9, 100])
    def test_codes_of_any_length_and_alphabet(self, chars: str, length: int) -> None:
        code = Keyring(SECRET).derive_code("n", "u", "1", "s", "", length, chars)
        assert code is not None
        assert len(code) == length
        assert set(code) <= set(chars)

    @pytest.mark.parametrize("size", [3, 10, 62, 300])
    def test_no_character_of_a_code_is_likelier(self, size: int) -> None:
        chars = "".join(chr(0x4E00 + n) for n in range(size))
        keyring, count = Keyring(SECRET), Counter[str]()
        for n in range(600):
            count.update(keyring.derive_code(str(n), "u", "1", "s", "", 100, chars) or "")
        expected = 60_000 / size
        chi_square = sum((count[char] - expected) ** 2 / expected for char in chars)
        # Deterministic, as the secret is fixed. Six standard deviations of the distribution.
        assert abs(chi_square - (size - 1)) < 6 * (2 * (size - 1)) ** 0.5

    def test_a_code_does_not_tell_of_the_link(self) -> None:
        keyring = Keyring(SECRET)
        link = keyring.derive_link("n", "u", "1", "s")
        assert keyring.derive_code("n", "u", "1", "s", "", 43, ALPHANUMERIC + "-_") != link

    def test_a_batch_has_one_nonce_for_each_object(self) -> None:
        nonces = [
            keys.batch_nonce(*a) for a in (("b", "u", "1", "s"), ("c", "u", "1", "s"), ("b", "u", "2", "s"))
        ]
        assert len(set(nonces)) == 3
        assert nonces[0] == keys.batch_nonce("b", "u", "1", "s")
        assert {len(nonce) for nonce in nonces} == {32}


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
