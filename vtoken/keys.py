"""Keys: how they are drawn, checked for typing errors, and digested for the store.

Schemes, each a 32-byte digest that is unique over the store:

* ``sha256``: of a link key, where no secret is set. Enough for keys of 128 random bits and more: they
  cannot be searched (OWASP ASVS 5.0, 6.5.2, and NIST SP 800-63B-4, section 3.1.2.2, ask for slow hashes
  below 112 bits only).
* ``hmac-sha256``: of a link key, with the secret (RFC 2104).
* ``code-hmac-sha256``: of a short code, with the secret, over the length-prefixed content type, object id,
  slug and code. Equal codes of two people have different digests, and nobody can search for them without
  the secret.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
import string
import struct
import unicodedata
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

from vtoken.backend import StoredKey
from vtoken.errors import ConfigurationError, InvalidInput
from vtoken.inputs import MAX_KEY_BYTES, text_problem

ALPHANUMERIC: Final = string.ascii_uppercase + string.ascii_lowercase + string.digits
DIGITS: Final = string.digits
URL_SAFE: Final = frozenset(ALPHANUMERIC + "-._~")
"""What stands in a URL as it is (RFC 3986, section 2.3)."""
MIN_SECRET_BYTES: Final = 32
"""As long as the hash: a shorter HMAC key lowers its strength (RFC 2104, section 3)."""
CHECKSUM_LENGTH: Final = 6

KeyGenerator = Callable[..., str]


class Hidden:
    """A key, kept out of every repr, also of the locals in a traceback."""

    __slots__ = ("_key",)

    def __init__(self, key: object) -> None:
        self._key: Any = key

    def reveal(self) -> object:
        """The key itself."""
        return self._key

    def text(self) -> str:
        """The key, once it was checked to be one, as a plain ``str``: of an enum, its value."""
        return str.__str__(self._key)

    def __repr__(self) -> str:
        return "<hidden>"


NOTHING: Final = Hidden(None)
"""What stands for an argument that was left out."""


class Digest(NamedTuple):
    """What is stored of a key."""

    value: bytes
    scheme: str
    secret_id: str

    def __repr__(self) -> str:
        return f"<{self.scheme} digest>"


class Candidates:
    """What may be stored of a presented key, the current secret's digest first.

    Args:
        digests: the digests alone, which the store is asked for.
        made: the scheme and the secret's id of each.
    """

    # Not a tuple of Digest, because every request needs one of these (tests/benchmarks, memory).
    __slots__ = ("digests", "made")

    def __init__(self, digests: tuple[bytes, ...], made: tuple[tuple[str, str], ...]) -> None:
        self.digests = digests
        self.made = made

    def all(self) -> tuple[Digest, ...]:
        """Each with how it was made."""
        return tuple([Digest(value, *made) for value, made in zip(self.digests, self.made, strict=True)])

    def fit(self, key: StoredKey) -> bool:
        """Whether a stored key is one of these in its scheme and secret, too.

        A digest that was made without the secret does not pass for one that was made with it.
        """
        own = key.digest
        return own in self.digests and self.made[self.digests.index(own)] == (key.scheme, key.secret_id)

    def __repr__(self) -> str:
        return "<candidate digests>"


def random_key(length: int = 32, allowed_chars: str = ALPHANUMERIC) -> str:
    """Draw a key from the system's random source: the default generator.

    Args:
        length: 1 to 512 characters. 32 of the default alphabet are 190 bits.
        allowed_chars: the alphabet, each character equally likely.

    Raises:
        InvalidInput: an argument is out of range.
    """
    if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= MAX_KEY_BYTES:
        raise InvalidInput(f"a key's length must be an int from 1 to {MAX_KEY_BYTES}")
    chars = str.__str__(allowed_chars) if isinstance(allowed_chars, str) else ""  # of an enum, its value
    if not chars:
        raise InvalidInput("allowed_chars must be a str of at least one character")
    if len(chars) > 256 or not chars.isascii():
        return "".join(secrets.choice(chars) for _ in range(length))
    table, rejected = _alphabet(chars)
    key = b""
    while len(key) < length:  # half as much again makes a second round rare
        key += os.urandom(length + length // 2 + 8).translate(table, rejected)
    return key[:length].decode("ascii")


@lru_cache(maxsize=64)
def _alphabet(chars: str) -> tuple[bytes, bytes]:
    """A table from a random byte to a character, and the bytes to reject so that none is likelier."""
    limit = 256 - 256 % len(chars)
    table = bytes(ord(chars[i % len(chars)]) for i in range(256))
    return table, bytes(range(limit, 256))


def add_checksum(prefix: str, body: str) -> str:
    """Frame a key as ``prefix + body + checksum``: six base-62 characters of CRC-32.

    The form is that of GitHub's tokens ("Behind GitHub's new authentication token formats", 2021): secret
    scanners recognise it, and a typing error is told without asking the store.
    """
    return prefix + body + _checksum(prefix + body)


def has_checksum(prefix: str, key: str) -> bool:
    """Say whether a key has the form that :func:`add_checksum` gives."""
    body, checksum = key[:-CHECKSUM_LENGTH], key[-CHECKSUM_LENGTH:]
    return key.startswith(prefix) and len(body) > len(prefix) and checksum == _checksum(body)


def _checksum(text: str) -> str:
    number, digits = zlib.crc32(text.encode()), ""
    for _ in range(CHECKSUM_LENGTH):  # 62**6 > 2**32
        number, digit = divmod(number, 62)
        digits = ALPHANUMERIC[digit] + digits
    return digits


def is_possible_key(text: str) -> bool:
    """Whether a text can be a key at all: no NUL, no lone surrogate, at most 512 bytes of UTF-8."""
    if text.isascii() and len(text) <= MAX_KEY_BYTES and "\0" not in text:  # the usual key, on every request
        return True
    return text_problem(text, MAX_KEY_BYTES, may_be_empty=True) is None


def normalise_link(text: str) -> str:
    """Strip white space and invisible characters from the ends of a link's key, and change nothing else.

    Args:
        text: what was pasted.
    """
    if text and "!" <= text[0] <= "~" and "!" <= text[-1] <= "~":  # the usual key, on every request
        return text
    start, end = 0, len(text)
    while start < end and _is_invisible(text[start]):
        start += 1
    while end > start and _is_invisible(text[end - 1]):
        end -= 1
    return text[start:end]


def normalise_code(text: str, chars: str | None) -> str:
    """Undo what people and their programs do to a code when they type or paste it.

    1. The text becomes NFKC, and every decimal digit of Unicode becomes its ASCII digit.
    2. Spaces, dashes of any kind, dots, underscores, invisible and control characters are dropped.
    3. Where the alphabet has letters of one case only, or none, the text is folded to that case.
    4. ``O``, ``I`` and ``L`` are read as ``0``, ``1`` and ``1`` where the alphabet lacks them.

    Args:
        text: what was typed.
        chars: the code's alphabet; None where a generator of the application's own decides, which leaves
            out steps 3 and 4.
    """
    if not (text.isascii() and text.isalnum()):
        text = unicodedata.normalize("NFKC", text)
        text = "".join(_ascii_digit(char) for char in text if not _is_separator(char))
    if chars is None or (text.isascii() and text.isdigit()):
        return text
    has_lower, has_upper = any(map(str.islower, chars)), any(map(str.isupper, chars))
    if not (has_lower and has_upper):
        text = text.lower() if has_lower else text.upper()
    return "".join(char if char in chars else _LOOKALIKES.get(char, char) for char in text)


def code_shape_ok(code: str, length: int | None, chars: str | None) -> bool:
    """Whether a normalised code has the length and the characters that our own generator gives it.

    Args:
        code: as :func:`normalise_code` returns it.
        length: None where a generator of the application's own decides; any code that is not empty will
            then do.
        chars: the alphabet.
    """
    if length is None or chars is None:
        return bool(code)
    return len(code) == length and not code.strip(chars)


def alphabet_problem(chars: str, *, of_code: bool) -> str | None:
    """Say why keys cannot be made of an alphabet, or None if they can.

    Args:
        chars: the alphabet.
        of_code: whether it is for codes that people type, rather than for keys in links.
    """
    if len(set(chars)) < len(chars):
        return "the alphabet repeats a character, which makes some keys likelier than others"
    if not of_code:
        if set(chars) <= URL_SAFE:
            return None
        return "the alphabet of a link key may hold A-Z, a-z, 0-9 and - . _ ~ only (RFC 3986, section 2.3)"
    if all(normalise_code(char, chars) == char and not _may_compose(char) for char in chars):
        return None
    return (
        "the alphabet of a code must not hold spaces, dashes, dots, underscores, combining or compatibility"
        " characters, or digits other than 0-9, because they are dropped or replaced in what people type"
    )


_LOOKALIKES: Final = {"O": "0", "o": "0", "I": "1", "i": "1", "L": "1", "l": "1"}
_DOTS_AND_DASHES: Final = frozenset(
    "._\u00b7\u2022\u2027\u2043\u2212\u22c5\u3002\u30fb\ufe4d\ufe4e\ufe4f\uff61\uff65"
)
"""Dots, underscores, and dashes that are not of Unicode's category of dashes."""
_FILLERS: Final = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
"""Characters without a shape that are not of the categories of controls, formats and spaces."""


def _is_invisible(char: str) -> bool:
    if char.isascii():
        return not "!" <= char <= "~"
    return (
        unicodedata.category(char) in ("Cc", "Cf", "Zs", "Zl", "Zp")
        or char in _FILLERS
        or "\ufe00" <= char <= "\ufe0f"  # variation selectors, as emoji carry them
        or "\u180b" <= char <= "\u180f"
        or "\U000e0100" <= char <= "\U000e01ef"
    )


def _is_separator(char: str) -> bool:
    # An enclosing mark makes a key cap of a digit.
    return _is_invisible(char) or char in _DOTS_AND_DASHES or unicodedata.category(char) in ("Pd", "Me")


def _ascii_digit(char: str) -> str:
    return char if char.isascii() else str(unicodedata.decimal(char, char))


def _may_compose(char: str) -> bool:
    """Whether a character may melt with the one before it under NFKC: marks, and parts of Hangul."""
    return unicodedata.category(char)[0] == "M" or "\u1100" <= char <= "\u11ff"


class Keyring:
    """The secrets, and every digest that is made with them.

    Args:
        secret: the current one, or None.
        previous_secrets: older ones, with which keys are still accepted and no new ones made.
    """

    __slots__ = ("_codes_made", "_ids", "_links_made", "_secrets")

    def __init__(self, secret: str | None, previous_secrets: Sequence[str] = ()) -> None:
        all_secrets = [secret, *previous_secrets] if secret else previous_secrets
        self._secrets = tuple(each.encode() for each in all_secrets)
        self._ids = tuple(_mac(s, b"vtoken:secret-id:v1")[:4].hex() for s in self._secrets)
        self._codes_made = tuple(("code-hmac-sha256", secret_id) for secret_id in self._ids)
        self._links_made = (*(("hmac-sha256", secret_id) for secret_id in self._ids), ("sha256", ""))

    def __repr__(self) -> str:
        return f"<Keyring of {len(self._secrets)} secrets>"

    @property
    def secret_ids(self) -> tuple[str, ...]:
        """Which secrets there are, the current one first: what a stored key's ``secret_id`` says."""
        return self._ids

    def link(self, key: str) -> Digest:
        """The digest of a new link key."""
        scheme, secret_id = self._links_made[0]
        return Digest(self.links(key).digests[0], scheme, secret_id)

    def links(self, key: str) -> Candidates:
        """What may be stored of a link key: made with any secret, or from before there was one."""
        data = key.encode()
        digests: tuple[bytes, ...] = (hashlib.sha256(data).digest(),)
        if self._secrets:
            digests = (*self._macs(b"vtoken:link:v1" + data), *digests)
        return Candidates(digests, self._links_made)

    def code(self, content_type: str, object_id: str, slug: str, code: str) -> Digest:
        """The digest of a new code of this object and slug.

        Raises:
            ConfigurationError: there is no secret.
        """
        found = self.codes(content_type, object_id, slug, code)
        del code
        if not found.digests:
            raise ConfigurationError("codes need Settings(secret=...)")
        return Digest(found.digests[0], *self._codes_made[0])

    def codes(self, content_type: str, object_id: str, slug: str, code: str) -> Candidates:
        """What may be stored of a code: made with any secret."""
        message = prefixed("vtoken:code:v1", content_type, object_id, slug, code)
        return Candidates(self._macs(message), self._codes_made)

    def derive_link(
        self, nonce: str, content_type: str, object_id: str, slug: str, secret_id: str = ""
    ) -> str | None:
        """The link key that a nonce stands for: 43 characters of base64url, 256 bits.

        Args:
            nonce: as it is stored with the key.
            content_type: of the object.
            object_id: of the object.
            slug: the stored form.
            secret_id: which secret; ``""`` for the current one.

        Returns:
            None where that secret is not in the keyring any more.
        """
        secret = self._secret(secret_id)
        if secret is None:
            return None
        message = prefixed("vtoken:derived:v1", nonce, content_type, object_id, slug)
        return base64.urlsafe_b64encode(_mac(secret, message)).decode("ascii").rstrip("=")

    def derive_code(
        self,
        nonce: str,
        content_type: str,
        object_id: str,
        slug: str,
        secret_id: str,
        length: int,
        chars: str,
    ) -> str | None:
        """The code that a nonce stands for, independent of the link key of the same nonce.

        An HMAC in counter mode gives numbers of 32 bits; those that would make some characters likelier
        are rejected. Arguments and result as of :meth:`derive_link`.
        """
        secret = self._secret(secret_id)
        if secret is None:
            return None
        limit = 2**32 - 2**32 % len(chars)
        code, block = "", 0
        while len(code) < length:
            message = prefixed("vtoken:derived-code:v1", nonce, content_type, object_id, slug, str(block))
            numbers = struct.unpack(">8I", _mac(secret, message))
            code += "".join(chars[number % len(chars)] for number in numbers if number < limit)
            block += 1
        return code[:length]

    def _secret(self, secret_id: str) -> bytes | None:
        for secret, known_id in zip(self._secrets, self._ids, strict=True):
            if secret_id in ("", known_id):
                return secret
        return None

    def _macs(self, message: bytes) -> tuple[bytes, ...]:
        return tuple([_mac(secret, message) for secret in self._secrets])


def batch_nonce(batch: str, content_type: str, object_id: str, slug: str) -> str:
    """The nonce of an object's token in a batch of ``issue_many``: the same for the same arguments, so that
    the same batch makes the same keys again. 32 hexadecimal digits."""
    message = prefixed("vtoken:batch:v1", batch, content_type, object_id, slug)
    return hashlib.sha256(message).hexdigest()[:32]


def context_digest(context: str | Mapping[str, str]) -> bytes:
    """The digest of a caller's context. The order of a mapping does not matter, and no text has the digest
    of a mapping. SHA-256 will do, because a context has entropy of its own.

    Args:
        context: checked by :func:`vtoken.inputs.context_problem`.
    """
    if isinstance(context, str):
        return hashlib.sha256(b"vtoken:context:v1" + context.encode()).digest()
    parts = (part for name in sorted(context) for part in (name, context[name]))
    return hashlib.sha256(prefixed("vtoken:context-names:v1", *parts)).digest()


def use_id(consume_id: str) -> str:
    """What is stored of a ``consume_id``: 32 hexadecimal digits, whatever the caller's id is made of."""
    return hashlib.sha256(b"vtoken:consume-id:v1" + consume_id.encode()).hexdigest()[:32]


def prefixed(*parts: str) -> bytes:
    """Join parts so that no two lists of parts give the same bytes."""
    joined = b""
    for part in parts:
        encoded = part.encode()
        joined += len(encoded).to_bytes(4, "big") + encoded
    return joined


def _mac(secret: bytes, message: bytes) -> bytes:
    return hmac.digest(secret, message, "sha256")
