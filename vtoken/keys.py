"""Keys: how they are drawn, checked for typing errors, and digested for the store.

Schemes, each a 32-byte digest that is unique over the store:

* ``sha256``: of a link key, where no secret is set. Enough for keys of 128 random bits and more: they
  cannot be searched (OWASP ASVS 5.0, 6.5.2, and NIST SP 800-63B-4, section 3.1.2.2, ask for slow hashes
  below 112 bits only).
* ``hmac-sha256``: of a link key, with the secret (RFC 2104).
* ``code-hmac-sha256``: of a short code, with the secret, over the length-prefixed content type, object id,
  slug and code. Equal codes of two people differ at rest, and without the secret they can't be searched.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
import string
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

from vtoken.errors import InvalidInput
from vtoken.inputs import MAX_KEY_BYTES

ALPHANUMERIC: Final = string.ascii_uppercase + string.ascii_lowercase + string.digits
DIGITS: Final = string.digits
MIN_SECRET_BYTES: Final = 32
"""As long as the hash: a shorter HMAC key lowers its strength (RFC 2104, section 3)."""
CHECKSUM_LENGTH: Final = 6

KeyGenerator = Callable[..., str]


class Hidden:
    """A key, kept out of every repr: those of the locals in a traceback too."""

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


class Digests(tuple[bytes, ...]):
    """The digests under which a presented key may be stored, the current secret's first."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "<digests>"


NOTHING: Final = Hidden(None)
"""No key, or no context."""


class Digest(NamedTuple):
    """The digest under which a new key is stored."""

    value: bytes
    scheme: str
    secret_id: str

    def __repr__(self) -> str:
        return f"<{self.scheme} digest>"


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


def normalise_code(code: str, chars: str | None) -> str:
    """Undo what people do to a code when they type it: spaces, hyphens, and letter case where the
    alphabet has one case only. Digits stay as they are: other scripts' digits match nothing.

    Args:
        code: what was typed.
        chars: the code's alphabet, None where a generator of the application's own decides.
    """
    code = "".join(code.split()) if chars is None or " " not in chars else code
    if chars is None or "-" not in chars:
        code = code.replace("-", "")
    if chars is None or not code.isascii() or not chars.isascii():
        return code
    if not any(c.islower() for c in chars):
        return code.upper()
    return code if any(c.isupper() for c in chars) else code.lower()


class Keyring:
    """The secrets, and every digest that is made with them.

    Args:
        secret: the current one, or None.
        previous_secrets: still accepted, none of them for new tokens.
    """

    __slots__ = ("_ids", "_secrets")

    def __init__(self, secret: str | None, previous_secrets: Sequence[str] = ()) -> None:
        self._secrets = tuple(s.encode() for s in (*((secret,) if secret else ()), *previous_secrets))
        self._ids = tuple(_mac(s, b"vtoken:secret-id:v1")[:4].hex() for s in self._secrets)

    def __repr__(self) -> str:
        return f"<Keyring of {len(self._secrets)} secrets>"

    def link(self, key: str) -> Digest:
        """The digest for a new link key."""
        if not self._secrets:
            return Digest(hashlib.sha256(key.encode()).digest(), "sha256", "")
        return Digest(_mac(self._secrets[0], b"vtoken:link:v1" + key.encode()), "hmac-sha256", self._ids[0])

    def links(self, key: str) -> Digests:
        """Where a link key may be stored: under any secret, and from before there was one."""
        data = key.encode()
        plain = hashlib.sha256(data).digest()
        if not self._secrets:
            return Digests((plain,))
        return Digests((*(_mac(s, b"vtoken:link:v1" + data) for s in self._secrets), plain))

    def code(self, content_type: str, object_id: str, slug: str, code: str) -> Digest:
        """The digest for a new code of this object and slug."""
        scoped = _code_message(content_type, object_id, slug, code)
        if not self._secrets:  # allow_weak only
            return Digest(_mac(b"", scoped), "code-hmac-sha256", "")
        return Digest(_mac(self._secrets[0], scoped), "code-hmac-sha256", self._ids[0])

    def codes(self, content_type: str, object_id: str, slug: str, code: str) -> Digests:
        """Where a code may be stored: under any secret."""
        scoped = _code_message(content_type, object_id, slug, code)
        return Digests(tuple(_mac(s, scoped) for s in self._secrets or (b"",)))

    def derive(self, nonce: str, content_type: str, object_id: str, slug: str, secret_id: str) -> str | None:
        """The derived key of a nonce: 43 characters of base64url, 256 bits; None where the secret
        ``secret_id`` is not here any more (``""`` is the current one)."""
        for secret, known_id in zip(self._secrets, self._ids, strict=True):
            if secret_id in ("", known_id):
                message = _prefixed("vtoken:derived:v1", nonce, content_type, object_id, slug)
                return base64.urlsafe_b64encode(_mac(secret, message)).decode("ascii").rstrip("=")
        return None


def context_digest(context: str) -> bytes:
    """The digest of a caller's context: a nonce with entropy of its own, so SHA-256 does."""
    return hashlib.sha256(b"vtoken:context:v1" + context.encode()).digest()


def use_id(consume_id: str) -> str:
    """What is stored of a ``consume_id``: 32 hexadecimal digits, whatever the caller's id is made of."""
    return hashlib.sha256(b"vtoken:consume-id:v1" + consume_id.encode()).hexdigest()[:32]


def _code_message(content_type: str, object_id: str, slug: str, code: str) -> bytes:
    return _prefixed("vtoken:code:v1", content_type, object_id, slug, code)


def _prefixed(*parts: str) -> bytes:
    """Join parts so that no two lists of parts give the same bytes."""
    encoded = [part.encode() for part in parts]
    return b"".join(len(part).to_bytes(4, "big") + part for part in encoded)


def _mac(secret: bytes, message: bytes) -> bytes:
    return hmac.digest(secret, message, "sha256")
