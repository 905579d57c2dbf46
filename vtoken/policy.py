"""Settings and policies: what a token of a slug is like, and the floors below which it is refused."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import lru_cache, partial
from typing import Any, Final, Literal, TypedDict, TypeVar, Unpack, cast, get_args

from vtoken import inputs, limits
from vtoken.errors import ConfigurationError, InvalidInput
from vtoken.inputs import DEFAULT, Duration, Lifetime, Unset
from vtoken.keys import (
    ALPHANUMERIC,
    DIGITS,
    MIN_SECRET_BYTES,
    URL_SAFE,
    KeyGenerator,
    alphabet_problem,
    code_shape_ok,
    normalise_code,
    normalise_link,
    random_key,
)
from vtoken.limits import LONGEST_WINDOW, Limit
from vtoken.loading import import_object
from vtoken.redact import without_locals
from vtoken.subject import Subject

_T = TypeVar("_T")

logger = logging.getLogger("vtoken")

KeyStorage = Literal["digest", "plain", "derived"]
Kind = Literal["link", "code", "pair"]
UnknownSlugs = Literal["allow", "refuse"]
Context = Literal["required", "ignored"]

MAX_ATTEMPT_WINDOW: Final = timedelta(milliseconds=limits.MAX_ATTEMPT_WINDOW)

_LINK_BITS: Final = 128
_CODE_VALUES: Final = 10**6
_CODE_LIFETIME: Final = timedelta(minutes=10)
_EMAIL_CODE_LIFETIME: Final = timedelta(hours=24)
_CODE_ATTEMPTS: Final = 100
_PUBLISHED_SECRETS: Final = frozenset(
    {
        "at least 32 bytes, from a secret manager",
        "at least 32 bytes, from secrets.token_urlsafe(32)",
        "keep it in the environment: VTOKEN_SECRET",
    }
)
"""Secrets that stand in the documentation of this library, and so in the lists of attackers."""


# Settings -----------------------------------------------------------------------------------------


def _hiding_its_secrets(cls: type[_T]) -> type[_T]:
    cls.__init__ = without_locals(Exception)(cls.__init__)  # type: ignore[method-assign]  # of the same signature
    return cls


@_hiding_its_secrets
@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What holds for every slug unless its policy says otherwise.

    A pickle of it holds the secrets.

    Args:
        default_expiration: lifetime: a number of minutes, a ``timedelta``, a text such as ``"1h"``, or None
            for never. One day by default.
        default_key_generator: a callable, or its import path. Ours is called with ``length`` and
            ``allowed_chars``, another one with what ``key_generator_kwargs`` holds.
        default_key_length: characters, 1 to 512. 32 of the default alphabet are 190 bits. Slugs without a
            policy accept less than 128 bits.
        default_key_chars: the alphabet.
        max_key_iterations: how often a generator is called before ``KeyGenerationError``, 1 or more.
        secret: at least 32 bytes, e.g. from ``secrets.token_urlsafe(32)``. Needed for codes and derived keys;
            link keys are then digested with it as well.
        previous_secrets: older secrets, whose tokens are still accepted.
        key_storage: ``"digest"``; ``"plain"`` stores keys readable; ``"derived"`` stores a nonce from
            which the secret makes the key again (see :class:`TokenPolicy`).
        unknown_slugs: ``"refuse"`` makes issuing, checking and using a token of a slug without a policy a
            :class:`ConfigurationError`; ``"allow"`` applies the settings to it.

    Raises:
        ConfigurationError: a value is out of range, or a secret stands in this documentation.
    """

    default_expiration: Lifetime = 24 * 60
    default_key_generator: KeyGenerator | str = random_key
    default_key_length: int = 32
    default_key_chars: str = ALPHANUMERIC
    max_key_iterations: int = 100
    secret: str | None = field(default=None, repr=False)
    previous_secrets: Sequence[str] = field(default=(), repr=False)
    key_storage: KeyStorage = "digest"
    unknown_slugs: UnknownSlugs = "allow"

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ConfigurationError(problem)
        object.__setattr__(self, "previous_secrets", tuple(self.previous_secrets))

    def _problem(self) -> str | None:
        if isinstance(self.previous_secrets, str) or not isinstance(self.previous_secrets, Sequence):
            return "previous_secrets must be a sequence of str, not one str"
        for secret in (*(() if self.secret is None else (self.secret,)), *self.previous_secrets):
            problem = _secret_problem(secret)
            if problem:
                return problem
        if self.previous_secrets and self.secret is None:
            return "previous_secrets need a secret: pass the current one, too"
        try:
            _check_choice("key_storage", self.key_storage, get_args(KeyStorage))
            _check_choice("unknown_slugs", self.unknown_slugs, get_args(UnknownSlugs))
            inputs.lifetime("default_expiration", self.default_expiration)
            inputs.check_count("max_key_iterations", self.max_key_iterations)
            random_key(self.default_key_length, self.default_key_chars)
        except InvalidInput as error:
            return str(error)
        return None


def _secret_problem(secret: object) -> str | None:
    if not isinstance(secret, str) or len(secret.encode(errors="ignore")) < MIN_SECRET_BYTES:
        return f"a secret must be a str of at least {MIN_SECRET_BYTES} bytes (secrets.token_urlsafe(32))"
    if any("\ud800" <= c <= "\udfff" for c in secret):
        return "a secret must not contain lone surrogates"
    if normalise_link(secret) != secret:
        return "a secret must not begin or end with white space, such as the newline at the end of a file"
    if secret in _PUBLISHED_SECRETS:
        return "this secret stands in the documentation of vtoken: make one with secrets.token_urlsafe(32)"
    return None


def _check_choice(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise InvalidInput(f"{name} must be one of {', '.join(known)}")


# Policies -----------------------------------------------------------------------------------------


class CommonOptions(TypedDict, total=False):
    """What every preset takes; see :class:`TokenPolicy`."""

    expiration: Lifetime | Unset
    key_storage: KeyStorage | None
    max_attempts: int | None
    attempt_window: Duration
    attempt_limits: Sequence[Limit]
    cooldown: Duration | None
    issue_limits: Sequence[Limit]
    max_uses: int | None
    overlap: Duration | None
    context: Context
    allow_weak: str | None


class LinkOptions(CommonOptions, total=False):
    """What :meth:`TokenPolicy.link` takes."""

    key_generator: KeyGenerator | str | None
    key_length: int | None
    key_chars: str | None
    prefix: str


class _TypedCodeOptions(CommonOptions, total=False):
    channel: Literal["email"] | None
    test_codes: Mapping[Subject, str]
    test_codes_why: str | None


class CodeOptions(_TypedCodeOptions, total=False):
    """What :meth:`TokenPolicy.code` takes."""

    key_generator: KeyGenerator | str | None
    key_chars: str | None


class PairOptions(_TypedCodeOptions, total=False):
    """What :meth:`TokenPolicy.pair` takes."""

    key_length: int | None
    key_chars: str | None
    prefix: str
    code_context: Context


@_hiding_its_secrets
@dataclass(frozen=True, slots=True)
class TokenPolicy:
    """What tokens of one slug are like. ``TokenPolicy.link``, ``.code`` and ``.pair`` are the presets.

    Durations are a ``timedelta`` or a text such as ``"90s"``, ``"15m"``, ``"1h"`` or ``"7d"``.

    Args:
        slug: the purpose, 1 to 255 bytes of UTF-8; None for tokens without one.
        expiration: lifetime: a number of minutes or a duration; None for never; left out, the settings'.
        key_generator: a callable or its import path; left out, the settings'. A pair has none.
        key_length: characters, 1 to 512; of a pair, those of the link key.
        key_chars: the alphabet; of a pair, that of the link key. For links letters, digits and ``-._~``; for
            codes whatever people can type and no program replaces.
        key_storage: ``"digest"``, ``"plain"`` or ``"derived"``: the key is an HMAC of a stored nonce, so that
            ``get_active_or_create`` and ``reveal`` can give it again; a generator is not called then, nor do
            length and alphabet of a link key matter.
        max_attempts: how many wrong keys a window allows, per object and slug, whether or not there is a
            token; None for no cap. At most 100 for codes, the most consecutive failures
            that NIST SP 800-63B-4, section 3.2.2, allows. A link's key that comes with the object's class
            in place of the object counts against no object's budget.
        attempt_window: from the first wrong key, up to one day. An exhausted window doubles the next
            one, up to a day.
        attempt_limits: further limits on wrong keys, e.g. ``[Limit(100, "1h", by="ip")]``.
        cooldown: the least time between two tokens of an object and context; None for none.
        issue_limits: further limits on new tokens, e.g. ``[Limit(20, "1d", across="sms")]``.
        max_uses: how often a token can be consumed, 1 or more; None for no bound.
        overlap: how long the previous token's key stays good beside the new one; None: not at all.
        prefix: a link key begins with it and ends with a checksum (GitHub's form), e.g. ``"vt_"``.
        context: ``"required"``: a token is bound to a nonce of the caller (a browser's cookie), given as
            ``context=...`` when it is issued and when it is used; ``"ignored"``: it is not.
        kind: ``"link"``: a long key, unique over the store; ``"code"``: a short one, digested with its
            object and slug; ``"pair"``: a token that has both, and either will do.
        digits: how many digits the code of a pair has, 6 if left out.
        code_expiration: how long the code of a pair lives, 10 minutes if left out.
        code_context: ``"ignored"``: the code of a pair is good without the context that its link needs.
        channel: ``"email"``: the code is sent by e-mail, and may live 24 hours (NIST SP 800-63A-4,
            section 3.8).
        test_codes: fixed codes of fixed objects, for an app store's reviewer say:
            ``{Subject("auth.phone", "+15550100"): "123456"}``.
        test_codes_why: why there are test codes.
        allow_weak: why this policy may break a floor, e.g. ``"end-to-end tests"``.

    Floors:
        * a link key has at least 128 bits (RFC 6749, section 10.10: a chance of guessing of at most
          2**-128; OWASP ASVS 5.0, 11.5.1);
        * a code has at least a million values and lives at most 10 minutes (NIST SP 800-63B-4, section
          3.1.3.2), and has a cap;
        * codes and derived keys need ``Settings.secret``, whatever ``allow_weak`` says: without it, a
          six-digit code can be recovered from its digest in about a second.

    Raises:
        ConfigurationError: a value is out of range or below its floor. The manager raises it where the
            value is that of the settings.
    """

    slug: str | None
    expiration: Lifetime | Unset = field(default=DEFAULT, kw_only=True)
    key_generator: KeyGenerator | str | None = field(default=None, kw_only=True)
    key_length: int | None = field(default=None, kw_only=True)
    key_chars: str | None = field(default=None, kw_only=True)
    key_storage: KeyStorage | None = field(default=None, kw_only=True)
    max_attempts: int | None = field(default=None, kw_only=True)
    attempt_window: Duration = field(default=timedelta(minutes=15), kw_only=True)
    attempt_limits: Sequence[Limit] = field(default=(), kw_only=True)
    cooldown: Duration | None = field(default=None, kw_only=True)
    issue_limits: Sequence[Limit] = field(default=(), kw_only=True)
    max_uses: int | None = field(default=1, kw_only=True)
    overlap: Duration | None = field(default=None, kw_only=True)
    prefix: str = field(default="", kw_only=True)
    context: Context = field(default="ignored", kw_only=True)
    kind: Kind = field(default="link", kw_only=True)
    digits: int | None = field(default=None, kw_only=True)
    code_expiration: Duration | None = field(default=None, kw_only=True)
    code_context: Context | None = field(default=None, kw_only=True)
    channel: Literal["email"] | None = field(default=None, kw_only=True)
    test_codes: Mapping[Subject, str] = field(
        default_factory=dict[Subject, str], kw_only=True, repr=False, hash=False
    )
    test_codes_why: str | None = field(default=None, kw_only=True)
    allow_weak: str | None = field(default=None, kw_only=True)

    @classmethod
    def link(cls, slug: str | None, **overrides: Unpack[LinkOptions]) -> TokenPolicy:
        """A policy for links: the settings' key, valid for one hour (OWASP Forgot Password Cheat Sheet:
        single use, an appropriate period; NIST SP 800-63B-4, section 4.2.1.2, allows 24 hours by e-mail).

        Example::

            TokenPolicy.link("password-reset", cooldown="1m")

        Args:
            slug: the purpose.
            **overrides: arguments of :class:`TokenPolicy`.
        """
        preset: dict[str, Any] = {"expiration": 60}
        fields: dict[str, Any] = {**preset, **overrides, "kind": "link"}
        return cls(slug, **fields)

    @classmethod
    @without_locals(ConfigurationError)
    def code(cls, slug: str | None, digits: int = 6, **overrides: Unpack[CodeOptions]) -> TokenPolicy:
        """A policy for codes that people type: digits, valid for 10 minutes, 5 attempts in 15 minutes
        (NIST SP 800-63B-4, section 3.1.3.2: 6 digits, 10 minutes; the cap is stricter than the 100 of
        section 3.2.2).

        Example::

            TokenPolicy.code("sms-login", issue_limits=[Limit(20, "1d", across="sms")])

        Args:
            slug: the purpose.
            digits: how many, 6 or more.
            **overrides: arguments of :class:`TokenPolicy`; ``key_chars`` for another alphabet.
        """
        preset: dict[str, Any] = {
            "expiration": _CODE_LIFETIME,
            "max_attempts": 5,
            "key_length": digits,
            "key_chars": DIGITS,
        }
        fields: dict[str, Any] = {**preset, **overrides, "kind": "code"}
        return cls(slug, **fields)

    @classmethod
    @without_locals(ConfigurationError)
    def pair(
        cls,
        slug: str | None,
        digits: int = 6,
        code_expiration: Duration = "10m",
        **overrides: Unpack[PairOptions],
    ) -> TokenPolicy:
        """A policy for a link and a code in one message: whoever reads the mail on another device types
        the code. Either uses the token. The link is valid for one hour; wrong codes count as those of
        :meth:`code`, and when they are spent the link still works.

        Example::

            TokenPolicy.pair("log-in", cooldown="1m")

        Args:
            slug: the purpose.
            digits: of the code, 6 or more.
            code_expiration: how long the code is good, at most 10 minutes.
            **overrides: arguments of :class:`TokenPolicy`.

        .. versionadded:: 0.1
        """
        preset: dict[str, Any] = {"expiration": 60, "max_attempts": 5}
        lengths: dict[str, Any] = {"digits": digits, "code_expiration": code_expiration, "kind": "pair"}
        fields: dict[str, Any] = {**preset, **overrides, **lengths}
        return cls(slug, **fields)

    def __post_init__(self) -> None:
        for name in ("attempt_limits", "issue_limits"):
            object.__setattr__(self, name, inputs.several(name, getattr(self, name), Limit))
        problem: str | None
        try:
            self._check_ranges()
            self._check_kind()
            # The defaults stand in for the settings here; ResolvedPolicy.of looks again, with the settings.
            length = 32 if self.key_length is None else self.key_length
            chars = ALPHANUMERIC if self.key_chars is None else self.key_chars
            problem = _weakness(self, _is_drawn(self, self.key_generator, self.key_storage), length, chars)
        except InvalidInput as error:
            problem = str(error)
        if problem is None:
            problem = _test_code_problem(self, *_code_shape(self, self.key_length, self.key_chars))
        if problem:
            raise ConfigurationError(f"{_named(self)}: {problem}")
        object.__setattr__(self, "test_codes", dict(self.test_codes))

    def _check_ranges(self) -> None:
        if self.slug is not None:
            inputs.check_text("slug", self.slug, inputs.MAX_NAME_BYTES)
        if self.expiration is not DEFAULT:
            inputs.lifetime("expiration", self.expiration)
        random_key(
            32 if self.key_length is None else self.key_length,
            ALPHANUMERIC if self.key_chars is None else self.key_chars,
        )
        if self.max_attempts is not None:
            inputs.check_count("max_attempts", self.max_attempts)
        inputs.duration("attempt_window", self.attempt_window, most=MAX_ATTEMPT_WINDOW)
        if self.cooldown is not None:
            inputs.duration("cooldown", self.cooldown, most=LONGEST_WINDOW)
        if self.overlap is not None:
            inputs.duration("overlap", self.overlap)
        if self.max_uses is not None:
            inputs.check_count("max_uses", self.max_uses)
        if self.prefix:
            inputs.check_text("prefix", self.prefix, 32)
            if not set(self.prefix) <= URL_SAFE:
                raise InvalidInput("prefix may hold letters, digits and - . _ ~ only (RFC 3986, section 2.3)")
        for name, known in _CHOICES.items():
            if getattr(self, name) is not None or name in ("context", "kind"):
                _check_choice(name, getattr(self, name), known)
        if self.allow_weak is not None:
            _check_reason("allow_weak", self.allow_weak, "end-to-end tests")
        for name in ("attempt_limits", "issue_limits"):
            _check_distinct(name, getattr(self, name))

    def _check_kind(self) -> None:
        """Refuse arguments that the kind of the policy would not heed."""
        if self.kind == "code" and self.prefix:
            raise InvalidInput("a prefix is for links, not for codes")
        if self.kind == "pair":
            if self.key_generator is not None:
                raise InvalidInput("a pair has no generator of its own")
            inputs.check_count("digits", 6 if self.digits is None else self.digits)
            inputs.duration("code_expiration", _code_lifetime(self))
            if self.code_context == "required" and self.context != "required":
                raise InvalidInput("code_context='required' needs context='required'")
        else:
            for name in ("digits", "code_expiration", "code_context"):
                if getattr(self, name) is not None:
                    raise InvalidInput(f"{name} is for pairs: TokenPolicy.pair(slug, ...)")
        if self.kind == "link" and (self.channel is not None or self.test_codes):
            raise InvalidInput("channel and test_codes are for codes and pairs, not for links")


def _named(policy: TokenPolicy) -> str:
    slug = repr(policy.slug) if policy.slug is None or isinstance(policy.slug, str) else "no text"
    return f"the policy for {slug}"


def _is_drawn(policy: TokenPolicy, generator: object, storage: KeyStorage | None) -> bool:
    """Whether it is us who draw characters from the policy's alphabet."""
    if policy.kind == "code":
        return generator is None or storage == "derived"
    return storage != "derived" and (generator is None or policy.kind == "pair")


def _code_lifetime(policy: TokenPolicy) -> Duration:
    """Of a pair's code."""
    return _CODE_LIFETIME if policy.code_expiration is None else policy.code_expiration


_CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "key_storage": get_args(KeyStorage),
    "context": get_args(Context),
    "code_context": get_args(Context),
    "kind": get_args(Kind),
    "channel": ("email",),
}


def _check_reason(name: str, value: object, example: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise InvalidInput(f"{name} must say why, e.g. {name}={example!r}")


def _check_distinct(name: str, limits: Sequence[Limit]) -> None:
    """Two limits of the same window and dimension would share a budget, and each would count twice."""
    seen = {(limit.per_ms, limit.by, limit.across) for limit in limits}
    if len(seen) < len(limits):
        raise InvalidInput(f"{name} has two limits with the same per, by and across: keep the stricter one")


def _test_code_problem(policy: TokenPolicy, length: int | None, chars: str | None) -> str | None:
    """Say what is wrong with the test codes, if anything, without repeating one.

    Args:
        policy: the policy.
        length: of its codes, None where it is not known.
        chars: their alphabet, likewise.
    """
    if not isinstance(policy.test_codes, Mapping):
        return "test_codes must be a mapping from Subject(content_type, object_id) to a code"
    if policy.test_codes:
        try:
            _check_reason("test_codes_why", policy.test_codes_why, "app-store review")
            for subject in policy.test_codes:
                _test_subject(subject)
        except InvalidInput as error:
            return str(error)
    for code in policy.test_codes.values():
        if not isinstance(code, str) or not code_shape_ok(normalise_code(code, chars), length, chars):
            return "a test code must have the length and the alphabet of the policy's codes"
    return None


def _test_subject(subject: object) -> tuple[str, str]:
    if not isinstance(subject, Subject) or isinstance(subject.object_id, inputs.Wildcard):
        raise InvalidInput("test_codes must be a mapping from Subject(content_type, object_id) to a code")
    content_type = inputs.check_text("content_type", subject.content_type, inputs.MAX_NAME_BYTES)
    return content_type, inputs.check_object_id(subject.object_id)


def _code_shape(policy: TokenPolicy, length: int | None, chars: str | None) -> tuple[int | None, str | None]:
    """The length and the alphabet of a policy's codes; no length where a generator of its own decides."""
    if policy.kind == "pair":
        return 6 if policy.digits is None else policy.digits, DIGITS
    if policy.kind == "code":
        return (length if policy.key_generator is None else None), chars
    return None, None


def _longest_code(policy: TokenPolicy) -> timedelta:
    return _CODE_LIFETIME if policy.channel is None else _EMAIL_CODE_LIFETIME


def _weakness(policy: TokenPolicy, is_drawn: bool, length: int, chars: str) -> str | None:
    """Say which floor a policy breaks, if any.

    Args:
        policy: the policy, its ranges checked.
        is_drawn: whether we draw its keys, of this length and alphabet.
        length: of the code of a code policy, else of the link key.
        chars: likewise.
    """
    is_code = policy.kind == "code"
    if is_drawn or (is_code and policy.key_chars is not None):
        problem = alphabet_problem(chars, of_code=is_code)
        if problem:
            return problem
    if policy.allow_weak:
        return None
    if not is_code and is_drawn and length * math.log2(len(chars)) < _LINK_BITS:
        return (
            f"a link key needs at least {_LINK_BITS} random bits (RFC 6749, section 10.10): use a"
            " longer key_length, or TokenPolicy.code(...) for a short code that people type"
        )
    if policy.kind == "link":
        return None
    code_length, code_chars = (length, chars) if is_code else (policy.digits or 6, DIGITS)
    if (is_drawn or not is_code) and len(code_chars) ** code_length < _CODE_VALUES:
        return f"a code needs {_CODE_VALUES:,} values, 6 digits (NIST SP 800-63B-4, section 3.1.3.2)"
    longest = _longest_code(policy) // timedelta(milliseconds=1)
    lifetime = policy.expiration if is_code else _code_lifetime(policy)
    milliseconds = None if lifetime is DEFAULT else inputs.lifetime("expiration", lifetime)
    if milliseconds is None or milliseconds > longest:
        return f"{_too_long(longest)}: set {'expiration' if is_code else 'code_expiration'}"
    if policy.max_attempts is None or policy.max_attempts > _CODE_ATTEMPTS:
        return f"a code needs max_attempts of at most {_CODE_ATTEMPTS} (NIST SP 800-63B-4, section 3.2.2)"
    return None


def _too_long(longest: int) -> str:
    source = "800-63B-4, section 3.1.3.2" if longest <= 600_000 else "800-63A-4, section 3.8"
    return f"a code lives at most {inputs.spelled(longest)} (NIST SP {source})"


# Resolved policies --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ResolvedPolicy:
    """A policy and the settings, combined once for the manager. Durations are milliseconds."""

    slug: str
    """The stored form: ``""`` for none."""
    kind: Kind
    expiration: int | None
    """None: never expires."""
    code_expiration: int | None
    """Of a pair's code; None for the other kinds."""
    longest: int | None
    """How long a call may let a code live; None where there is no such floor."""
    generator: KeyGenerator
    """Draws the link key; of a code policy, the code."""
    generator_kwargs: Mapping[str, Any]
    key_length: int | None
    """Of the link key; None where :func:`vtoken.keys.random_key` does not draw it."""
    key_chars: str | None
    code_length: int | None
    """None where there is no code, or a generator of the application's own decides."""
    code_chars: str | None
    storage: KeyStorage
    issue_limits: tuple[Limit, ...]
    attempt_limits: tuple[Limit, ...]
    cooldown: int
    """0 for none."""
    max_attempts: int | None
    attempt_window: int
    max_uses: int | None
    overlap: int
    """0 for none."""
    prefix: str
    needs_context: bool
    code_needs_context: bool
    test_codes: Mapping[tuple[str, str], str] = field(repr=False)
    """From the content type and object id of a test account to its code."""
    channel: Literal["email"] | None
    is_weak_allowed: bool
    is_policy_given: bool
    """False for a slug that no policy names."""

    # Told by the other fields. They are worked out once because every request asks for them.
    has_link: bool = field(init=False)
    """Whether its tokens have a link key."""
    has_code: bool = field(init=False)
    """Whether its tokens have a code."""
    is_capped: bool = field(init=False)
    """Whether wrong keys are counted."""
    is_guarded: bool = field(init=False)
    """Whether a key is compared only together with its budgets or its context."""

    def __post_init__(self) -> None:
        is_capped = self.max_attempts is not None or bool(self.attempt_limits)
        object.__setattr__(self, "has_link", self.kind != "code")
        object.__setattr__(self, "has_code", self.kind != "link")
        object.__setattr__(self, "is_capped", is_capped)
        object.__setattr__(self, "is_guarded", is_capped or self.needs_context)

    @classmethod
    def of(cls, policy: TokenPolicy, settings: Settings) -> ResolvedPolicy:
        """Combine a policy with the settings.

        Raises:
            ConfigurationError: it needs a secret and there is none, a generator cannot be imported, or the
                settings' key is below the policy's floor.
        """
        storage = policy.key_storage or settings.key_storage
        _check_secret(policy, settings, storage)
        named = settings.default_key_generator if policy.key_generator is None else policy.key_generator
        generator = load_generator(named)
        is_drawn = _is_drawn(policy, None if generator is random_key else generator, storage)
        length = settings.default_key_length if policy.key_length is None else policy.key_length
        chars = settings.default_key_chars if policy.key_chars is None else policy.key_chars
        code_length, code_chars = _code_shape(
            policy, length if is_drawn else None, _code_chars(policy, is_drawn, chars)
        )
        problem = _weakness(policy, is_drawn, length, chars) or _test_code_problem(
            policy, code_length, code_chars
        )
        if problem:
            raise ConfigurationError(f"{_named(policy)}, with these settings: {problem}")
        lifetime = settings.default_expiration if isinstance(policy.expiration, Unset) else policy.expiration
        has_link = policy.kind != "code"
        needs_context = policy.context == "required"
        return cls(
            slug=policy.slug or "",
            kind=policy.kind,
            expiration=inputs.lifetime("expiration", lifetime),
            code_expiration=_milliseconds(_code_lifetime(policy)) if policy.kind == "pair" else None,
            longest=None
            if policy.kind != "code" or policy.allow_weak
            else _milliseconds(_longest_code(policy)),
            generator=random_key if is_drawn else generator,
            generator_kwargs={"length": length, "allowed_chars": chars} if is_drawn else {},
            key_length=length if has_link and is_drawn else None,
            key_chars=chars if has_link and is_drawn else None,
            code_length=code_length,
            code_chars=code_chars,
            storage=storage,
            issue_limits=tuple(policy.issue_limits),
            attempt_limits=tuple(policy.attempt_limits),
            cooldown=_milliseconds(policy.cooldown),
            max_attempts=policy.max_attempts,
            attempt_window=_milliseconds(policy.attempt_window),
            max_uses=policy.max_uses,
            overlap=_milliseconds(policy.overlap),
            prefix=policy.prefix,
            needs_context=needs_context,
            code_needs_context=needs_context and policy.code_context != "ignored",
            test_codes={_test_subject(subject): code for subject, code in policy.test_codes.items()},
            channel=policy.channel,
            is_weak_allowed=policy.allow_weak is not None,
            is_policy_given=policy is not NO_POLICY,
        )


def _milliseconds(duration: Duration | None) -> int:
    return 0 if duration is None else inputs.duration("duration", duration)


def _code_chars(policy: TokenPolicy, is_drawn: bool, chars: str) -> str | None:
    """The alphabet of a code policy, if it is known: that of our generator, or one that the policy names for
    its own."""
    return chars if is_drawn or policy.key_chars is not None else None


def _check_secret(policy: TokenPolicy, settings: Settings, storage: KeyStorage) -> None:
    if policy.kind == "code" and storage == "derived" and policy.key_generator is not None:
        raise ConfigurationError(f"{_named(policy)}: a derived code has no generator of its own")
    if settings.secret is None and (storage == "derived" or policy.kind != "link"):
        what = "codes" if policy.kind != "link" else "derived keys"
        raise ConfigurationError(
            f"{_named(policy)}: {what} need Settings(secret=...), 32 bytes or more"
            " (without a secret, a six-digit code can be recovered from its digest in about a second)"
        )


def check_call(
    policy: ResolvedPolicy, expiration: int | None, key_generator_kwargs: Mapping[str, Any] | None
) -> tuple[KeyGenerator, Mapping[str, Any]]:
    """Hold the arguments of one issue to the floors of its policy, and say who draws the key and how.

    Args:
        policy: the policy.
        expiration: how many milliseconds the token is to live, None for ever.
        key_generator_kwargs: keyword arguments for the generator; ``generator`` among them names another one.

    Raises:
        InvalidInput: the arguments are out of range or below a floor.
    """
    if policy.longest is not None and (expiration is None or expiration > policy.longest):
        raise InvalidInput(_too_long(policy.longest))
    if key_generator_kwargs is None:
        return policy.generator, policy.generator_kwargs
    kwargs = dict(policy.generator_kwargs)
    if not isinstance(key_generator_kwargs, Mapping):
        raise InvalidInput("key_generator_kwargs must be a mapping of keyword arguments")
    own = dict(key_generator_kwargs)
    if own and (policy.storage == "derived" or policy.kind == "pair"):
        what = "a pair" if policy.kind == "pair" else "a derived key"
        raise InvalidInput(f"{what} has no generator that key_generator_kwargs could be for")
    generator = policy.generator
    named = own.pop("generator", None)
    if named is not None:
        generator = load_generator(named)
        kwargs = {} if generator is not policy.generator else kwargs
    kwargs |= own
    if policy.code_length is not None:
        if generator is not policy.generator or kwargs != policy.generator_kwargs:
            raise InvalidInput(
                "the length and the alphabet of codes are their policy's: a call cannot change them"
            )
    elif generator is random_key:
        _check_drawn(policy, kwargs)
    return generator, kwargs


def _check_drawn(policy: ResolvedPolicy, kwargs: Mapping[str, Any]) -> None:
    """Check the arguments of a call for a key that we draw."""
    if not kwargs.keys() <= {"length", "allowed_chars"}:
        raise InvalidInput("the default generator takes length and allowed_chars")
    length, chars = kwargs.get("length", 32), kwargs.get("allowed_chars", ALPHANUMERIC)
    random_key(length, chars)  # checks their ranges
    if policy.has_code:
        raise InvalidInput(
            "this policy's codes have a generator of their own, which a call cannot replace by ours"
        )
    problem = alphabet_problem(str.__str__(chars), of_code=False)
    if problem:
        raise InvalidInput(problem)
    if not policy.is_weak_allowed and length * math.log2(len(chars)) < _LINK_BITS:
        raise InvalidInput(f"a link key needs at least {_LINK_BITS} random bits (RFC 6749, section 10.10)")


def load_generator(generator: KeyGenerator | str) -> KeyGenerator:
    """Return a key generator, imported where it is given by its path.

    Raises:
        ConfigurationError: it cannot be imported or called.
    """
    found = import_object(generator) if isinstance(generator, str) else generator
    if not callable(found):
        raise ConfigurationError(
            f"a key generator must be a callable or its import path, not {type(found).__name__}"
        )
    return cast("KeyGenerator", found)


NO_POLICY: Final = TokenPolicy(None, allow_weak="without a policy the settings alone say what a key is")
"""What holds for a slug that no policy names."""


class Policies:
    """The resolved policies of a manager, by slug.

    Args:
        policies: at most one for each slug; they stay in ``given``.
        settings: what holds where they leave something out.

    Raises:
        ConfigurationError: a policy cannot work with these settings, or two have the same slug.
    """

    __slots__ = ("_by_slug", "_is_strict", "_unnamed", "given")

    def __init__(self, policies: Iterable[TokenPolicy], settings: Settings) -> None:
        self._by_slug: dict[str, ResolvedPolicy] = {}
        self.given = inputs.several("policies", policies, TokenPolicy)
        for policy in self.given:
            resolved = ResolvedPolicy.of(policy, settings)
            if resolved.slug in self._by_slug:
                raise ConfigurationError(f"there are two policies for the slug {policy.slug!r}")
            self._by_slug[resolved.slug] = resolved
        self._is_strict = settings.unknown_slugs == "refuse"
        default = ResolvedPolicy.of(NO_POLICY, settings)
        self._unnamed = lru_cache(256)(partial(_for_slug, default))
        unlimited = self.unlimited_codes()
        if unlimited:
            logger.warning(
                "codes without an issue limit, so that anybody can have any number of messages sent: %s;"
                " give these policies a cooldown or issue_limits",
                ", ".join(repr(slug) for slug in unlimited),
            )

    def of(self, slug: str) -> ResolvedPolicy:
        """The policy for a slug in its stored form, for issuing, checking and using.

        Raises:
            ConfigurationError: no policy names the slug, and the settings refuse such slugs.
        """
        found = self._by_slug.get(slug)
        if found is not None:
            return found
        if self._is_strict:
            hint = inputs.nearest(slug, filter(None, self._by_slug)) or "add a TokenPolicy for it"
            raise ConfigurationError(f"no policy names the slug {slug or None!r}; {hint}")
        return self._unnamed(slug)

    def get(self, slug: str) -> ResolvedPolicy:
        """The policy for a slug in its stored form, for ending and listing: never refused."""
        return self._by_slug.get(slug) or self._unnamed(slug)

    def knows(self, slug: str) -> bool:
        """Whether tokens with a slug, in its stored form, can be issued, checked and used."""
        return slug in self._by_slug or not self._is_strict

    def __iter__(self) -> Iterator[ResolvedPolicy]:
        return iter(self._by_slug.values())

    def unlimited_codes(self) -> tuple[str, ...]:
        """The slugs whose codes can be issued without any limit."""
        return tuple(
            slug
            for slug, policy in self._by_slug.items()
            if policy.has_code and not policy.cooldown and not policy.issue_limits
        )


def _for_slug(policy: ResolvedPolicy, slug: str) -> ResolvedPolicy:
    return replace(policy, slug=slug)
