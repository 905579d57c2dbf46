"""Settings and policies: what a token of a slug is like, and the floors below which it is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, Literal, TypeVar, cast, get_args

from vtoken.errors import ConfigurationError, InvalidInput
from vtoken.inputs import (
    DEFAULT,
    MAX_NAME_BYTES,
    Unset,
    check_count,
    check_duration,
    check_minutes,
    check_text,
)
from vtoken.keys import ALPHANUMERIC, DIGITS, MIN_SECRET_BYTES, KeyGenerator, random_key
from vtoken.loading import import_object
from vtoken.redact import without_locals

_T = TypeVar("_T")

KeyStorage = Literal["digest", "plain", "derived"]

MAX_WINDOW: Final = timedelta(days=1)
"""How far an attempt window grows: a budget slows an attacker down and never locks the account
(OWASP Forgot Password Cheat Sheet, "Account Lockout")."""

_LINK_BITS: Final = 128
_CODE_VALUES: Final = 10**6
_CODE_MINUTES: Final = 10
_CODE_ATTEMPTS: Final = 100


def _hiding_its_secrets(cls: type[_T]) -> type[_T]:
    cls.__init__ = without_locals(Exception)(cls.__init__)  # type: ignore[method-assign]  # of the same signature
    return cls


@_hiding_its_secrets
@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What holds for every slug unless its policy says otherwise.

    Args:
        default_expiration: lifetime in minutes, greater than 0, or None for never. One day by default.
        default_key_generator: a callable, or its import path. Ours is called with ``length`` and
            ``allowed_chars``, another one with what ``key_generator_kwargs`` holds.
        default_key_length: characters, 1 to 512. 32 of the default alphabet are 190 bits; less than 128
            bits only slugs without a policy take.
        default_key_chars: the alphabet.
        max_key_iterations: how often a generator is called before ``KeyGenerationError``, 1 or more.
        secret: at least 32 bytes, e.g. from ``secrets.token_urlsafe(32)``. Needed for codes and derived keys;
            link keys are then digested with it as well.
        previous_secrets: older secrets, whose tokens are still accepted.
        key_storage: ``"digest"``; ``"plain"`` stores keys readable; ``"derived"`` stores a nonce from
            which the secret makes the key again (see :class:`TokenPolicy`).

    Raises:
        ConfigurationError: a value is out of range.
    """

    default_expiration: float | None = 24 * 60
    default_key_generator: KeyGenerator | str = random_key
    default_key_length: int = 32
    default_key_chars: str = ALPHANUMERIC
    max_key_iterations: int = 100
    secret: str | None = field(default=None, repr=False)
    previous_secrets: Sequence[str] = field(default=(), repr=False)
    key_storage: KeyStorage = "digest"

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ConfigurationError(problem)
        object.__setattr__(self, "previous_secrets", tuple(self.previous_secrets))

    def _problem(self) -> str | None:
        if isinstance(self.previous_secrets, str) or not isinstance(self.previous_secrets, Sequence):
            return "previous_secrets must be a sequence of str, not one str"
        for secret in (*(() if self.secret is None else (self.secret,)), *self.previous_secrets):
            if not isinstance(secret, str) or len(secret.encode(errors="ignore")) < MIN_SECRET_BYTES:
                return (
                    f"a secret must be a str of at least {MIN_SECRET_BYTES} bytes (secrets.token_urlsafe(32))"
                )
            if any("\ud800" <= c <= "\udfff" for c in secret):
                return "a secret must not contain lone surrogates"
        if self.previous_secrets and self.secret is None:
            return "previous_secrets without a secret: name the current one too"
        if self.key_storage not in get_args(KeyStorage):
            return f"key_storage must be one of {', '.join(get_args(KeyStorage))}"
        try:
            check_minutes("default_expiration", self.default_expiration)
            check_count("max_key_iterations", self.max_key_iterations)
            random_key(self.default_key_length, self.default_key_chars)
        except InvalidInput as error:
            return str(error)
        return None


@dataclass(frozen=True, slots=True)
class TokenPolicy:
    """What tokens of one slug are like. ``TokenPolicy.link`` and ``TokenPolicy.code`` are the presets.

    Args:
        slug: the purpose, 1 to 255 bytes of UTF-8; None for tokens without one.
        expiration: lifetime in minutes, greater than 0; None for never; left out, the settings'.
        key_generator: a callable or its import path; left out, the settings'.
        key_length: characters, 1 to 512.
        key_chars: the alphabet.
        key_storage: ``"digest"``, ``"plain"`` or ``"derived"``: the key is an HMAC of a stored nonce, so that
            ``get_active_or_create`` can give it again; generator, length and alphabet don't matter then.
        max_attempts: how many wrong guesses a window holds, per object and slug, whether or not there is a
            token; None for no cap. At most 100 for codes, the most consecutive failures
            that NIST SP 800-63B-4, section 3.2.2, allows. A link's key that comes with the object's class
            in place of the object counts against no budget.
        attempt_window: from the first wrong guess, up to one day. An exhausted window doubles the next
            one, up to a day.
        cooldown: the least time between two tokens of an object; None for none.
        max_uses: how often a token can be consumed, 1 or more.
        overlap: how long the previous token stays good beside a new one, or until one of them is used;
            None: not at all.
        prefix: a link key begins with it and ends with a checksum (GitHub's form), e.g. ``"vt_"``.
        context: ``"required"``: a token is bound to a nonce of the caller (a browser's cookie), given as
            ``context=...`` when it is issued and when it is used; ``"ignored"``: it is not.
        kind: ``"link"``: a long key, unique over the store; ``"code"``: a short one, digested with its
            object and slug.
        allow_weak: why this policy may break a floor, e.g. ``"end-to-end tests"``.

    Floors:
        * a link key has at least 128 bits (RFC 6749, section 10.10: a chance of guessing of at most
          2**-128; OWASP ASVS 5.0, 11.5.1);
        * a code has at least a million values and lives at most 10 minutes (NIST SP 800-63B-4, section
          3.1.3.2), has a cap, and needs ``Settings.secret``.

    Raises:
        ConfigurationError: a value is out of range or below its floor; where it is the settings', the
            manager raises it.
    """

    slug: str | None
    expiration: float | Unset | None = field(default=DEFAULT, kw_only=True)
    key_generator: KeyGenerator | str | None = field(default=None, kw_only=True)
    key_length: int | None = field(default=None, kw_only=True)
    key_chars: str | None = field(default=None, kw_only=True)
    key_storage: KeyStorage | None = field(default=None, kw_only=True)
    max_attempts: int | None = field(default=None, kw_only=True)
    attempt_window: timedelta = field(default=timedelta(minutes=15), kw_only=True)
    cooldown: timedelta | None = field(default=None, kw_only=True)
    max_uses: int = field(default=1, kw_only=True)
    overlap: timedelta | None = field(default=None, kw_only=True)
    prefix: str = field(default="", kw_only=True)
    context: Literal["required", "ignored"] = field(default="ignored", kw_only=True)
    kind: Literal["link", "code"] = field(default="link", kw_only=True)
    allow_weak: str | None = field(default=None, kw_only=True)

    @classmethod
    def link(cls, slug: str | None, **overrides: Any) -> TokenPolicy:
        """A policy for links: the settings' key, valid for one hour (OWASP Forgot Password Cheat Sheet:
        single use, an appropriate period; NIST SP 800-63B-4, section 4.2.1.2, allows 24 hours by e-mail).

        Args:
            slug: the purpose.
            **overrides: any argument of :class:`TokenPolicy`.
        """
        fields: dict[str, Any] = {"expiration": 60, **overrides, "kind": "link"}
        return cls(slug, **fields)

    @classmethod
    def code(cls, slug: str | None, digits: int = 6, **overrides: Any) -> TokenPolicy:
        """A policy for codes that people type: digits, valid for 10 minutes, 5 attempts in 15 minutes
        (NIST SP
        800-63B-4, section 3.1.3.2: 6 digits, 10 minutes; the cap is stricter than the 100 of section 3.2.2).

        Args:
            slug: the purpose.
            digits: how many, 6 or more.
            **overrides: any argument of :class:`TokenPolicy`; ``key_chars`` for another alphabet.
        """
        preset: dict[str, Any] = {
            "expiration": _CODE_MINUTES,
            "max_attempts": 5,
            "key_length": digits,
            "key_chars": DIGITS,
        }
        fields: dict[str, Any] = {**preset, **overrides, "kind": "code"}
        return cls(slug, **fields)

    def __post_init__(self) -> None:
        try:
            self._check_ranges()
        except InvalidInput as error:
            problem: str | None = str(error)
        else:
            ours = self.key_generator is None and self.key_storage != "derived"
            length = 32 if self.key_length is None else self.key_length
            chars = ALPHANUMERIC if self.key_chars is None else self.key_chars
            problem = _weakness(self, ours, length, chars)
        if problem:
            named = repr(self.slug) if self.slug is None or isinstance(self.slug, str) else "no text"
            raise ConfigurationError(f"the policy for {named}: {problem}")

    def _check_ranges(self) -> None:
        if self.slug is not None:
            check_text("slug", self.slug, MAX_NAME_BYTES)
        if self.expiration is not DEFAULT:
            check_minutes("expiration", self.expiration)
        random_key(
            32 if self.key_length is None else self.key_length,
            ALPHANUMERIC if self.key_chars is None else self.key_chars,
        )
        if self.max_attempts is not None:
            check_count("max_attempts", self.max_attempts)
        if check_duration("attempt_window", self.attempt_window) > MAX_WINDOW // timedelta(milliseconds=1):
            raise InvalidInput(f"attempt_window must be at most {MAX_WINDOW}")
        for name in ("cooldown", "overlap"):
            if getattr(self, name) is not None:
                check_duration(name, getattr(self, name))
        check_count("max_uses", self.max_uses)
        if self.prefix:
            check_text("prefix", self.prefix, 32)
        for name, known in (
            ("key_storage", (None, *get_args(KeyStorage))),
            ("context", ("required", "ignored")),
            ("kind", ("link", "code")),
        ):
            if getattr(self, name) not in known:
                raise InvalidInput(f"{name} must be one of {', '.join(str(k) for k in known if k)}")
        if self.kind == "code" and (self.prefix or self.key_storage == "derived"):
            raise InvalidInput("prefix and derived keys are for links, not for codes")
        if self.allow_weak is not None and (
            not isinstance(self.allow_weak, str) or not self.allow_weak.strip()
        ):
            raise InvalidInput("allow_weak must say why, e.g. allow_weak='end-to-end tests'")


@dataclass(frozen=True, slots=True)
class Rules:
    """A policy and the settings, put together once for the manager: durations in milliseconds."""

    expiration: int | None
    generator: KeyGenerator
    generator_kwargs: dict[str, Any]
    key_chars: str | None
    storage: KeyStorage
    is_code: bool
    max_attempts: int | None
    attempt_window: int
    cooldown: int
    max_uses: int
    overlap: int
    prefix: str
    needs_context: bool

    @property
    def is_guarded(self) -> bool:
        """A key is checked only beside its budget or its context."""
        return self.max_attempts is not None or self.needs_context

    @classmethod
    def of(cls, policy: TokenPolicy, settings: Settings) -> Rules:
        """Resolve a policy.

        Raises:
            ConfigurationError: it needs a secret and there is none, a generator cannot be imported, or the
                settings' key is below the policy's floor.
        """
        storage = policy.key_storage or settings.key_storage
        is_code = policy.kind == "code"
        if is_code and storage == "derived":
            storage = "digest"
        if settings.secret is None and (storage == "derived" or (is_code and not policy.allow_weak)):
            what = "codes" if is_code else "derived keys"
            raise ConfigurationError(
                f"the policy for {policy.slug!r}: {what} need Settings(secret=...), 32 bytes or more"
                " (a code's digest without one is searched in a second)"
            )
        named = policy.key_generator
        generator = load_generator(settings.default_key_generator if named is None else named)
        length = settings.default_key_length if policy.key_length is None else policy.key_length
        chars = settings.default_key_chars if policy.key_chars is None else policy.key_chars
        ours = generator is random_key
        problem = _weakness(policy, ours and storage != "derived", length, chars)
        if problem:
            raise ConfigurationError(f"the policy for {policy.slug!r}, with these settings: {problem}")
        minutes = settings.default_expiration if isinstance(policy.expiration, Unset) else policy.expiration
        return cls(
            expiration=check_minutes("expiration", minutes),
            generator=generator,
            generator_kwargs={"length": length, "allowed_chars": chars} if ours else {},
            key_chars=chars if ours or policy.key_chars is not None else None,
            storage=storage,
            is_code=is_code,
            max_attempts=policy.max_attempts,
            attempt_window=check_duration("attempt_window", policy.attempt_window),
            cooldown=check_duration("cooldown", policy.cooldown) if policy.cooldown else 0,
            max_uses=policy.max_uses,
            overlap=check_duration("overlap", policy.overlap) if policy.overlap else 0,
            prefix=policy.prefix,
            needs_context=policy.context == "required",
        )


def _weakness(policy: TokenPolicy, drawn_by_us: bool, length: int, chars: str) -> str | None:
    """Which floor the policy breaks, if any, with keys of this length and alphabet."""
    if policy.allow_weak:
        return None
    values = len(set(chars))
    if policy.kind == "link":
        if drawn_by_us and length * math.log2(values) < _LINK_BITS:
            return (
                f"a link key needs at least {_LINK_BITS} random bits (RFC 6749, section 10.10): take a"
                " longer key_length, or TokenPolicy.code(...) for a short code that people type"
            )
        return None
    if drawn_by_us and values**length < _CODE_VALUES:
        return f"a code needs {_CODE_VALUES:,} values, 6 digits (NIST SP 800-63B-4, section 3.1.3.2)"
    if policy.expiration is DEFAULT or policy.expiration is None or policy.expiration > _CODE_MINUTES:
        return f"a code lives at most {_CODE_MINUTES} minutes (NIST SP 800-63B-4, section 3.1.3.2)"
    if policy.max_attempts is None or policy.max_attempts > _CODE_ATTEMPTS:
        return f"a code needs max_attempts of at most {_CODE_ATTEMPTS} (NIST SP 800-63B-4, section 3.2.2)"
    return None


def load_generator(generator: KeyGenerator | str) -> KeyGenerator:
    """Return a key generator, imported where it is given by its path.

    Raises:
        ConfigurationError: it cannot be imported or called.
    """
    found = import_object(generator) if isinstance(generator, str) else generator
    if not callable(found):
        raise ConfigurationError(f"a key generator is a callable or its path, not {type(found).__name__}")
    return cast("KeyGenerator", found)


NO_POLICY: Final = TokenPolicy(None, allow_weak="without a policy the settings alone say what a key is")
"""What holds for a slug that no policy names."""
