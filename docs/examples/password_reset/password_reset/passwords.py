"""Password hashes by scrypt, from the standard library."""

from __future__ import annotations

import hashlib
import hmac
import secrets

MIN_LENGTH = 15
MAX_LENGTH = 256
"""Characters: NIST SP 800-63B-4, section 3.1.1.2, asks for 15 where a password is the only factor, and that
at least 64 are allowed."""

# One of the equal choices of the OWASP Password Storage Cheat Sheet: 16 MiB of memory.
_N, _R, _P = 2**14, 8, 5


def problem_of(password: str) -> str | None:
    """Why a new password is refused, or None."""
    if len(password) < MIN_LENGTH:
        return f"Please take a password of at least {MIN_LENGTH} characters."
    if len(password) > MAX_LENGTH:
        return f"Please take a password of at most {MAX_LENGTH} characters."
    return None


def hashed(password: str) -> str:
    """A new hash, with a salt of its own. Takes some 50 milliseconds: call it in a thread."""
    salt = secrets.token_bytes(16)
    return f"scrypt${_N}${_R}${_P}${salt.hex()}${_scrypt(password, salt, _N, _R, _P).hex()}"


def matches(password: str, stored: str) -> bool:
    """Whether a password is the one that was hashed. As slow as :func:`hashed`."""
    _, n, r, p, salt, digest = stored.split("$")
    found = _scrypt(password[:MAX_LENGTH], bytes.fromhex(salt), int(n), int(r), int(p))
    return hmac.compare_digest(found, bytes.fromhex(digest))


def _scrypt(password: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    return hashlib.scrypt(password.encode(errors="surrogatepass"), salt=salt, n=n, r=r, p=p)


NOBODYS = hashed(secrets.token_urlsafe())
"""What is compared with where there is no account, so that the answer takes as long."""
