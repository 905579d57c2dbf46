"""The contract as a small program: one caller at a time, no store, nothing done for speed.

It is written from the guarantees and not from the library's code, so that the two can be held against
each other. It raises the library's errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Final, NamedTuple

from vtoken.backend import NEVER
from vtoken.errors import (
    CooldownActive,
    InvalidInput,
    InvalidToken,
    KeyGenerationError,
    LeaseLost,
    TooManyAttempts,
)
from vtoken.inputs import ANY, Unset, Wildcard
from vtoken.policy import TokenPolicy
from vtoken.stats import SlugStats, Stats
from vtoken.subject import Subject

_MS: Final = timedelta(milliseconds=1)
_DAY: Final = timedelta(days=1) // _MS


class ModelToken:
    """A token; the library's own gives it ``id`` and ``key``."""

    def __init__(
        self, subject: Subject, policy: TokenPolicy, now: int, expires: int, secret: str, context: str | None
    ) -> None:
        self.subject, self.policy, self.created = subject, policy, now
        self.expires = self.ends = expires
        self.secret = secret
        self.context = context if policy.context == "required" else None
        self.id = self.key = self.lease = ""
        self.extra_data: str | None = None
        self.is_active, self.overlaps = True, False
        self.uses = self.used_at = self.leased_until = 0
        self.use_names: list[str] = []

    def __repr__(self) -> str:
        return f"<token of {self.subject.object_id} for {self.policy.slug}>"

    def refusal(self, now: int) -> str:
        """Why it can't be used, ``""`` if it can."""
        if not self.is_active:
            return "used" if self.uses >= self.policy.max_uses else "inactive"
        return "expired" if now > self.expires else "leased" if self.leased_until > now else ""

    def end(self, now: int) -> None:
        """``ends``, by which it is purged, is the last millisecond at which it was good."""
        self.is_active, self.ends = False, min(self.ends, now - 1)


class Presented(NamedTuple):
    """A key as somebody presents it."""

    secrets: tuple[str, ...]
    """Those that the manager knows."""
    subject: Subject
    slug: str | Wildcard | None
    key: str
    context: str | None = None


class Contract:
    """What the manager promises.

    Args:
        policies: one for each slug that is used.
    """

    def __init__(self, policies: Iterable[TokenPolicy]) -> None:
        self.tokens: list[ModelToken] = []
        self._policies: dict[object, TokenPolicy] = {policy.slug: policy for policy in policies}
        self._budgets: dict[tuple[Subject, object, str], tuple[int, int, int]] = {}

    def issue(
        self,
        now: int,
        subject: Subject,
        slug: str | None,
        secret: str,
        context: str | None,
        *,
        replace: bool,
        minutes: float | Unset | None,
        key: str | None = None,
    ) -> ModelToken:
        """Create a token, under the only key that its generator yields, or (None) under a fresh one."""
        policy, issues = self._policies[slug], (subject, slug, "issues")
        if policy.context == "required" and context is None:
            raise InvalidInput
        if policy.cooldown:
            self._spend(issues, now, 1, policy.cooldown // _MS, policy.cooldown // _MS, CooldownActive)
        if key is not None and self._is_taken(subject, policy, key, secret):
            self._refund(issues)
            raise KeyGenerationError
        lifetime = policy.expiration if isinstance(minutes, Unset) else minutes
        assert not isinstance(lifetime, Unset)
        expires = NEVER if lifetime is None else now + int(lifetime * 60_000)
        token = ModelToken(subject, policy, now, expires, secret, context)
        for old in [t for t in self.of(subject, slug) if t.is_active and replace]:
            if policy.overlap:
                old.expires = min(old.expires, now + policy.overlap // _MS)
                old.ends = min(old.ends, old.expires)
                old.overlaps = token.overlaps = True
            else:
                old.end(now)
        self.tokens.append(token)
        return token

    def verify(self, now: int, presented: Presented) -> ModelToken:
        token = self._guess(now, presented)
        self._refund((presented.subject, presented.slug, "attempts"))
        return token

    def consume(self, now: int, presented: Presented, name: str | None) -> ModelToken:
        token = self._guess(now, presented, name)
        attempts = presented.subject, presented.slug, "attempts"
        if name is not None and name in token.use_names:
            self._refund(attempts)
            return token
        self._use(token, now)
        token.use_names += [name] if name else []
        self._budgets.pop(attempts, None)
        return token

    def enter(self, now: int, presented: Presented, lease: str, until: int) -> ModelToken:
        """Begin to redeem."""
        token = self.verify(now, presented)
        token.lease, token.leased_until = lease, until
        return token

    def leave(self, now: int, token: ModelToken, presented: Presented, lease: str, *, done: bool) -> None:
        """End to redeem, normally or not."""
        if not done and token.lease == lease:
            token.lease, token.leased_until = "", 0
        if not done:
            return
        if not (
            token in self.tokens and token.is_active and token.lease == lease and now < token.leased_until
        ):
            raise LeaseLost
        self._use(token, now)
        self._budgets.pop((presented.subject, presented.slug, "attempts"), None)

    def active(
        self, presented: Presented | None, subject: Subject, slug: str | Wildcard | None
    ) -> list[ModelToken]:
        """What ``deactivate`` ends and ``filter_active_tokens`` yields, newest first."""
        if presented is None:
            return newest_first(t for t in self.of(subject, slug) if t.is_active)
        self._refuse_code_without_object(presented)
        if slug is not ANY and self._policies[slug].max_attempts:
            raise InvalidInput
        fitting = (t for t in self.of(subject, slug) if _has_key(t, presented) and not t.policy.max_attempts)
        return [t for t in fitting if t.is_active]

    def purge(self, now: int, keep: int) -> int:
        kept = [t for t in self.tokens if t.ends >= now - keep or t.leased_until > now]
        purged, self.tokens = len(self.tokens) - len(kept), kept
        self._budgets = {name: budget for name, budget in self._budgets.items() if budget[2] > now - _DAY}
        return purged

    def stats(self, now: int) -> Stats:
        slugs = {t.policy.slug for t in self.tokens}
        whole = _count(now, self.tokens)
        by_slug = {slug: _count(now, [t for t in self.tokens if t.policy.slug == slug]) for slug in slugs}
        return Stats(whole.total, whole.active, whole.expired, whole.used, by_slug=by_slug)

    def of(self, subject: Subject, slug: str | Wildcard | None) -> Iterator[ModelToken]:
        """The tokens of an object, or of any of its type, and of a slug, or of any."""
        for token in self.tokens:
            anyone = subject.object_id is ANY and subject.content_type == token.subject.content_type
            if (anyone or subject == token.subject) and slug in (ANY, token.policy.slug):
                yield token

    def _is_taken(self, subject: Subject, policy: TokenPolicy, key: str, secret: str) -> bool:
        """Keys of links are unique in the store, codes within their object and slug."""
        same = [t for t in self.tokens if (t.key, t.secret, t.policy.kind) == (key, secret, policy.kind)]
        return any(policy.kind == "link" or (t.subject, t.policy) == (subject, policy) for t in same)

    def _guess(self, now: int, presented: Presented, name: str | None = None) -> ModelToken:
        """The token that a key opens. A guess is counted first, and given back where it was right."""
        self._refuse_code_without_object(presented)
        subject, slug = presented.subject, presented.slug
        policy, attempts = self._policies.get(slug), (subject, slug, "attempts")
        if policy and policy.max_attempts and subject.object_id is not ANY:
            window = policy.attempt_window // _MS
            self._spend(attempts, now, policy.max_attempts, window, _DAY, TooManyAttempts)
        for token in self.of(subject, slug):
            guarded = token.policy.max_attempts or token.context is not None or token.policy.kind == "code"
            if not _has_key(token, presented) or (slug is ANY and guarded):
                continue
            if token.context not in (None, presented.context):
                continue
            refusal = token.refusal(now)
            if not refusal or (name and name in token.use_names):
                return token
            if refusal in ("used", "leased"):
                self._refund(attempts)
            raise InvalidToken(refusal)  # type: ignore[arg-type]  # a Reason, as it is not empty
        raise InvalidToken("unknown")

    def _refuse_code_without_object(self, presented: Presented) -> None:
        policy = self._policies.get(presented.slug)
        if policy and policy.kind == "code" and presented.subject.object_id is ANY:
            raise InvalidInput

    def _use(self, token: ModelToken, now: int) -> None:
        token.uses, token.used_at, token.lease, token.leased_until = token.uses + 1, now, "", 0
        if token.uses >= token.policy.max_uses:
            token.end(now)
        for other in self.of(token.subject, token.policy.slug):
            if token.overlaps and other.overlaps and other.is_active and other is not token:
                other.end(now)

    def _spend(
        self,
        name: tuple[Subject, object, str],
        now: int,
        limit: int,
        window: int,
        longest: int,
        refusal: type[CooldownActive | TooManyAttempts],
    ) -> None:
        spent, strikes, until = self._budgets.get(name, (0, 0, -longest))
        if until + longest <= now:
            spent, strikes = 0, 0
        elif spent and until <= now:
            spent, strikes = 0, strikes + 1 if spent >= limit else 0
        if spent >= limit:
            raise refusal((until - now) / 1000)
        self._budgets[name] = spent + 1, strikes, until if spent else now + min(window * 2**strikes, longest)

    def _refund(self, name: tuple[Subject, object, str]) -> None:
        spent, strikes, until = self._budgets.get(name, (0, 0, 0))
        if spent:
            self._budgets[name] = spent - 1, strikes, until


def newest_first(tokens: Iterable[ModelToken]) -> list[ModelToken]:
    return sorted(tokens, key=lambda t: (t.created, t.id), reverse=True)


def _has_key(token: ModelToken, presented: Presented) -> bool:
    return token.key == presented.key and token.secret in presented.secrets


def _count(now: int, tokens: list[ModelToken]) -> SlugStats:
    active = [t for t in tokens if t.is_active]
    expired = sum(now > t.expires for t in active)
    used = sum(not t.is_active and t.uses > 0 for t in tokens)
    return SlugStats(len(tokens), len(active) - expired, expired, used)
