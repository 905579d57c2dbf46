"""What the manager promises, as a small program: one caller at a time, no store, nothing done for speed.

It is written from the guarantees and not from the library's code, so that the two can be held against each
other. It raises the library's errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final, NamedTuple

from vtoken.backend import NEVER
from vtoken.errors import (
    AlreadyUsed,
    CooldownActive,
    InvalidInput,
    InvalidToken,
    KeyGenerationError,
    LeaseLost,
    Reason,
    TokenBusy,
    TooManyAttempts,
)
from vtoken.inputs import ANY, Duration, Unset, Wildcard
from vtoken.limits import Limit
from vtoken.policy import TokenPolicy
from vtoken.stats import SlugStats, Stats
from vtoken.subject import Subject

_MS: Final = timedelta(milliseconds=1)
_DAY: Final = timedelta(days=1) // _MS
_REPLAYED_FOR: Final = timedelta(minutes=15) // _MS


@dataclass(eq=False)
class ModelKey:
    """A key of a token."""

    secret: str
    expires: int
    origin: ModelToken
    text: str = ""
    """The library draws it."""


@dataclass(eq=False)
class ModelToken:
    """A token. The library gives it its id and its key."""

    subject: Subject
    policy: TokenPolicy
    created: int
    expires: int
    secret: str
    context: str | None
    extra_data: str | None
    is_beside: bool
    ends: int = 0
    state: str = "active"
    uses: int = 0
    used_at: int = 0
    keys: list[ModelKey] = field(default_factory=list[ModelKey])
    holds: dict[str, ModelHold] = field(default_factory=dict[str, "ModelHold"])
    """By their names."""
    id: str = ""
    key: str = ""

    def __repr__(self) -> str:
        return f"<token of {self.subject.object_id} for {self.policy.slug}>"

    @property
    def line(self) -> tuple[Subject, str | None, str | None]:
        return self.subject, self.policy.slug, self.context

    @property
    def is_active(self) -> bool:
        return self.state == "active"

    def held(self, now: int) -> int:
        """How many of its uses are held."""
        return sum(now < hold.until for hold in self.holds.values())

    def has_free_use(self, now: int) -> bool:
        return self.policy.max_uses is None or self.uses + self.held(now) < self.policy.max_uses

    def is_valid(self, now: int) -> bool:
        """Whether it is active and not expired, held or not."""
        return self.is_active and now <= self.expires

    def in_the_way(self, now: int, key: ModelKey, name: str | None) -> list[ModelHold]:
        """The holds that have to end before it can be used: that of the same use, or all."""
        running = [hold for hold in self.holds.values() if now < hold.until]
        same = [hold for hold in running if name and (hold.origin, hold.use) == (key.origin, name)]
        return same or ([] if self.has_free_use(now) else running)

    def refusal(self, now: int, key: ModelKey, name: str | None) -> Reason | None:
        """Why it cannot be used by a key, for a use of some name."""
        if not self.is_active:
            return "used" if self.state == "used" else "inactive"
        if now > self.expires or now > key.expires:
            return "expired"
        return "leased" if self.in_the_way(now, key, name) else None

    def end(self, state: str, now: int) -> None:
        """``ends``, by which it is purged, is the last millisecond at which it was good."""
        self.state, self.ends = state, min(self.ends, now - 1)


class ModelHold(NamedTuple):
    """A use that somebody is about to make."""

    until: int
    origin: ModelToken
    use: str | None


class ModelUse(NamedTuple):
    """A use that may be asked for again."""

    token: ModelToken
    at: int


class Presented(NamedTuple):
    """A key as somebody presents it."""

    secrets: tuple[str, ...]
    """Those that the manager knows."""
    subject: Subject
    slug: str | Wildcard | None
    key: str
    context: str | None = None


class ModelBudget(NamedTuple):
    spent: int
    strikes: int
    until: int


class ReferenceManager:
    """What the manager promises.

    Args:
        policies: one for each slug that is used. Of limits, it knows cooldowns, ``max_attempts`` and issue
            limits by object.
    """

    def __init__(self, policies: Iterable[TokenPolicy]) -> None:
        self.tokens: list[ModelToken] = []
        self.budgets: dict[tuple[object, ...], ModelBudget] = {}
        self._policies: dict[object, TokenPolicy] = {policy.slug: policy for policy in policies}
        self._uses: dict[tuple[ModelToken, str], ModelUse] = {}

    # Issued

    def issue(
        self,
        now: int,
        subject: Subject,
        slug: str | None,
        secrets: tuple[str, ...],
        context: str | None,
        *,
        replace: bool,
        minutes: float | Unset | None,
        key: str | None = None,
        extra_data: str | None = None,
    ) -> ModelToken:
        """Create a token, under the only key that its generator yields, or (None) under a fresh one."""
        policy = self._policies[slug]
        context = self._bound(policy, context)
        self._check_call(policy, minutes, key)
        token = self._new(now, subject, policy, secrets[0], context, minutes, extra_data, not replace)
        line = [old for old in self.tokens if old.is_active and old.line == token.line and replace]
        superseded = self._free(token, line, secrets, key, now)
        self._charge_issue(now, subject, policy, context)
        for old, code in superseded:
            old.keys.remove(code)
        self._take_over(token, line, now)
        for old in line:
            old.end("replaced", now)
        self.tokens.append(token)
        return token

    def get_active_or_create(
        self,
        now: int,
        subject: Subject,
        slug: str | None,
        secrets: tuple[str, ...],
        context: str | None,
        *,
        minutes: float | Unset | None,
        key: str | None = None,
    ) -> tuple[ModelToken, bool]:
        """The newest valid token or a new one, and whether its key comes with it."""
        policy = self._policies[slug]
        self._check_call(policy, minutes, key)
        line = (subject, slug, self._bound(policy, context))
        for token in newest_first(self.tokens):
            own = [one for one in token.keys if one.origin is token]
            if token.line == line and token.is_valid(now) and all(now <= one.expires for one in own):
                can_derive = policy.key_storage == "derived" and bool(own) and own[0].secret in secrets
                return token, can_derive and self._is_charged(now, subject, policy, line[2])
        return self.issue(now, subject, slug, secrets, context, replace=True, minutes=minutes, key=key), True

    def _bound(self, policy: TokenPolicy, context: str | None) -> str | None:
        if (policy.context == "required") is (context is None):
            raise InvalidInput
        return context

    def _check_call(self, policy: TokenPolicy, minutes: float | Unset | None, key: str | None) -> None:
        """A code lives for ten minutes at most, and is drawn as its policy says."""
        if policy.kind == "code" and (minutes is None or (key is not None and not policy.key_generator)):
            raise InvalidInput

    def _new(
        self,
        now: int,
        subject: Subject,
        policy: TokenPolicy,
        secret: str,
        context: str | None,
        minutes: float | Unset | None,
        extra_data: str | None,
        is_beside: bool,
    ) -> ModelToken:
        lifetime = policy.expiration if isinstance(minutes, Unset) else minutes
        assert not isinstance(lifetime, Unset)
        expires = NEVER if lifetime is None else now + _milliseconds(lifetime)
        token = ModelToken(
            subject, policy, now, expires, secret, context, extra_data, is_beside=is_beside, ends=expires
        )
        token.keys = [ModelKey(secret, expires, token)]
        return token

    def _free(
        self,
        token: ModelToken,
        line: list[ModelToken],
        secrets: tuple[str, ...],
        text: str | None,
        now: int,
    ) -> list[tuple[ModelToken, ModelKey]]:
        """The codes of older tokens that a fixed key supersedes. Keys of links are unique in the store, codes
        within their object and slug."""
        found: list[tuple[ModelToken, ModelKey]] = []
        for other in self.tokens if text is not None else ():
            is_code = token.policy.kind == "code"
            apart = other.line[:2] != token.line[:2] if is_code else other.policy.kind != "link"
            for key in other.keys:
                if apart or key.text != text or key.secret not in secrets:
                    continue
                if not is_code or (other.is_valid(now) and other not in line):
                    raise KeyGenerationError
                found.append((other, key))
        return found

    def _take_over(self, token: ModelToken, line: list[ModelToken], now: int) -> None:
        """Under an overlap, the keys of the newest exclusive token, if nothing has changed but the key."""
        exclusive = newest_first(old for old in line if not old.is_beside)
        if not token.policy.overlap or not exclusive:
            return
        old = exclusive[0]
        if not old.is_valid(now) or old.held(now) or old.extra_data != token.extra_data:
            return
        keep_until = now + _milliseconds(token.policy.overlap)
        for key in [key for key in old.keys if key.origin is old and now <= key.expires]:
            old.keys.remove(key)
            key.expires = min(key.expires, keep_until)
            token.keys.append(key)

    # Checked and used

    def verify(self, now: int, presented: Presented) -> ModelToken:
        return self._present(now, presented)[0]

    def consume(self, now: int, presented: Presented, name: str | None) -> tuple[ModelToken, bool]:
        """The token, and whether it was used before under this name."""
        self._check(presented)
        use = self._replay(now, presented, name)
        if use is not None:
            return use.token, True
        token, key = self._present(now, presented, name)
        self._use(now, token, key.origin, name, presented)
        return token, False

    def enter(
        self, now: int, presented: Presented, hold: str, until: int, name: str | None
    ) -> tuple[ModelToken, ModelToken]:
        """Begin to redeem; the token, and the origin of the key."""
        self._check(presented)
        if self._replay(now, presented, name) is not None:
            raise AlreadyUsed
        token, key = self._present(now, presented, name)
        token.holds = {other: held for other, held in token.holds.items() if now < held.until}
        token.holds[hold] = ModelHold(until, key.origin, name)
        return token, key.origin

    def leave(
        self,
        now: int,
        token: ModelToken,
        origin: ModelToken,
        presented: Presented,
        hold: str,
        name: str | None,
        *,
        done: bool,
    ) -> None:
        """End to redeem, normally or not."""
        held = token.holds.get(hold)
        if done and (token not in self.tokens or held is None or now >= held.until):
            raise LeaseLost  # a hold that has run out stays where it is, and would run for a clock set back
        token.holds.pop(hold, None)
        if not done:
            return
        self._use(now, token, origin, name, presented)

    def _replay(self, now: int, presented: Presented, name: str | None) -> ModelUse | None:
        uses = [self._uses.get((key.origin, name or "")) for _, key in self._fitting(presented)]
        use = next((use for use in uses if use is not None), None) if name else None
        if use is not None and now - use.at > _REPLAYED_FOR:
            raise InvalidToken("used")
        return use

    def _present(
        self, now: int, presented: Presented, name: str | None = None
    ) -> tuple[ModelToken, ModelKey]:
        """The token that a key opens. A wrong one is counted."""
        subject, slug = presented.subject, presented.slug
        policy = self._policies.get(slug)
        if policy is None:  # any slug: what is guarded is not compared without its guard
            fitting = [(t, k) for t, k in self._fitting(presented) if not _is_guarded(t.policy)]
            return self._opened(now, fitting, name)
        self._check(presented)
        attempts = self._attempts(subject, policy)
        if attempts is not None:
            self._require_free(now, attempts, TooManyAttempts)
        fitting = list(self._fitting(presented))
        try:
            return self._opened(now, fitting, name)
        except InvalidToken as error:
            refusals = {token.refusal(now, key, name) for token, key in fitting}
            if attempts is not None and not refusals & {"used", "leased"}:
                error.attempts_left = self._spend(now, attempts)
            elif attempts is not None and error.reason != "leased":
                error.attempts_left = self._left(now, attempts)
            raise

    def _check(self, presented: Presented) -> None:
        """Refuse what cannot be a code, and a code without its object."""
        policy = self._policies.get(presented.slug)
        if policy is not None and policy.kind == "code":
            if presented.subject.object_id is ANY:
                raise InvalidInput
            if policy.key_generator is None and not _has_shape(presented.key, policy):
                raise InvalidToken("unknown")

    def _opened(
        self, now: int, fitting: list[tuple[ModelToken, ModelKey]], name: str | None
    ) -> tuple[ModelToken, ModelKey]:
        for token, key in fitting:
            if token.refusal(now, key, name) is None:
                return token, key
        for token, key in fitting:
            refusal = token.refusal(now, key, name)
            if refusal == "leased":
                free_at = min(hold.until for hold in token.in_the_way(now, key, name))
                raise TokenBusy((free_at - now) / 1000)
            if refusal is not None:
                raise InvalidToken(refusal)
        raise InvalidToken("unknown")

    def _fitting(self, presented: Presented) -> Iterator[tuple[ModelToken, ModelKey]]:
        """The tokens that have the key, those under the current secret first."""
        for secret in presented.secrets:
            yield from self._made_with(secret, presented)

    def _made_with(self, secret: str, presented: Presented) -> Iterator[tuple[ModelToken, ModelKey]]:
        for token in self.of(presented.subject, presented.slug):
            for key in token.keys:
                is_right = key.text == presented.key and key.secret == secret
                if is_right and token.context in (None, presented.context):
                    yield token, key

    def _use(
        self, now: int, token: ModelToken, origin: ModelToken, name: str | None, presented: Presented
    ) -> None:
        token.uses, token.used_at = token.uses + 1, now
        if name:
            self._uses[origin, name] = ModelUse(token, now)
        if token.policy.max_uses is not None and token.uses >= token.policy.max_uses:
            token.end("used", now)
            for other in self.tokens if token.context is not None and not token.is_beside else ():
                if (
                    other.line[:2] == token.line[:2]
                    and other.context != token.context
                    and other.is_active
                    and not other.is_beside
                    and other.id < token.id
                ):
                    other.end("ended", now)
                    other.holds.clear()
        policy = self._policies.get(presented.slug)
        attempts = self._attempts(presented.subject, policy) if policy is not None else None
        if attempts is not None:
            self.budgets.pop(attempts.name, None)

    # Ended and looked at

    def deactivate(self, now: int, presented: Presented | None, subject: Subject, slug: object) -> int:
        """End tokens, and drop the holds on them; by a key that was taken over, the key alone."""
        if presented is None:
            count = 0
            for token in self.of(subject, slug):
                token.holds.clear()
                if token.is_active:
                    token.end("ended", now)
                    count += 1
            return count
        count = 0
        for token, key in self._named(presented):
            if key.origin is token:
                token.holds.clear()
                count += token.is_active
                if token.is_active:
                    token.end("ended", now)
            else:
                count += token.is_active and now <= key.expires
                key.expires = min(key.expires, now - 1)
        return count

    def _named(self, presented: Presented) -> list[tuple[ModelToken, ModelKey]]:
        """The tokens that a key names, where none is counted."""
        policy = self._policies.get(presented.slug)
        if policy is not None and policy.kind == "code" and presented.subject.object_id is ANY:
            raise InvalidInput
        if policy is not None and policy.max_attempts:
            raise InvalidInput
        everywhere = presented._replace(context=None)
        return [
            (token, key)
            for token in self.of(everywhere.subject, everywhere.slug)
            for key in token.keys
            if key.text == presented.key and key.secret in presented.secrets and not token.policy.max_attempts
        ]

    def active(self, subject: Subject, slug: object) -> list[ModelToken]:
        return newest_first(token for token in self.of(subject, slug) if token.is_active)

    def erase(self, subject: Subject) -> int:
        gone = list(self.of(subject, ANY))
        self._delete(gone)
        self.reset_limits(subject)
        return len(gone)

    def reset_limits(self, subject: Subject) -> int:
        names = [name for name in self.budgets if name[0] == subject]
        for name in names:
            del self.budgets[name]
        return len(names)

    def purge(self, now: int, keep: int) -> int:
        gone = [t for t in self.tokens if t.ends < now - keep and not t.held(now)]
        self._delete(gone)
        self.budgets = {name: budget for name, budget in self.budgets.items() if budget.until > now - _DAY}
        return len(gone)

    def stats(self, now: int) -> Stats:
        slugs = {token.policy.slug for token in self.tokens}
        whole = _count(now, self.tokens)
        by_slug = {slug: _count(now, [t for t in self.tokens if t.policy.slug == slug]) for slug in slugs}
        return Stats(whole.total, whole.active, whole.expired, whole.used, by_slug=by_slug)

    def status(self, now: int, subject: Subject, slug: str | None) -> tuple[object, ...]:
        """What a screen shows: validity, expiry, attempts that are left, and when one may ask again."""
        policy = self._policies[slug]
        free = [t for t in newest_first(self.of(subject, slug)) if t.is_valid(now) and t.has_free_use(now)]
        attempts = self._attempts(subject, policy)
        issues = self._issue_limits(subject, policy, None)
        waits = [self._full_until(now, issue) for issue in issues]
        return (
            bool(free),
            free[0].expires if free and free[0].expires < NEVER else None,
            None if attempts is None else self._left(now, attempts),
            max([now, *(wait for wait in waits if wait is not None)]),
        )

    def of(self, subject: Subject, slug: object) -> Iterator[ModelToken]:
        """The tokens of an object, or of any of its type, and of a slug, or of any."""
        for token in self.tokens:
            anyone = subject.object_id is ANY and subject.content_type == token.subject.content_type
            if (anyone or subject == token.subject) and slug in (ANY, token.policy.slug):
                yield token

    def _delete(self, gone: list[ModelToken]) -> None:
        self.tokens = [token for token in self.tokens if token not in gone]
        self._uses = {name: use for name, use in self._uses.items() if use.token not in gone}

    # Limits

    def _attempts(self, subject: Subject, policy: TokenPolicy) -> _Spend | None:
        if not policy.max_attempts or subject.object_id is ANY:
            return None
        window = _milliseconds(policy.attempt_window)
        return _Spend((subject, policy.slug, "attempts"), policy.max_attempts, window, _DAY)

    def _issue_limits(self, subject: Subject, policy: TokenPolicy, context: str | None) -> list[_Spend]:
        spends: list[_Spend] = []
        if policy.cooldown:
            window = _milliseconds(policy.cooldown)
            spends.append(_Spend((subject, policy.slug, "cooldown", context), 1, window, window))
        for limit in policy.issue_limits:
            assert isinstance(limit, Limit)
            window = _milliseconds(limit.per)
            spends.append(_Spend((subject, policy.slug, window), limit.count, window, window))
        return spends

    def _charge_issue(self, now: int, subject: Subject, policy: TokenPolicy, context: str | None) -> None:
        spends = self._issue_limits(subject, policy, context)
        full = [until for until in (self._full_until(now, spend) for spend in spends) if until is not None]
        if full:
            raise CooldownActive((max(full) - now) / 1000)
        for spend in spends:
            self._spend(now, spend)

    def _is_charged(self, now: int, subject: Subject, policy: TokenPolicy, context: str | None) -> bool:
        try:
            self._charge_issue(now, subject, policy, context)
        except CooldownActive:
            return False
        return True

    def _require_free(self, now: int, spend: _Spend, refusal: type[TooManyAttempts]) -> None:
        until = self._full_until(now, spend)
        if until is not None:
            raise refusal((until - now) / 1000)

    def _full_until(self, now: int, spend: _Spend) -> int | None:
        budget = self._running(now, spend)
        return budget.until if budget.spent >= spend.limit else None

    def _left(self, now: int, spend: _Spend) -> int:
        return max(0, spend.limit - self._running(now, spend).spent)

    def _spend(self, now: int, spend: _Spend) -> int:
        budget = self._running(now, spend)
        until = budget.until or now + min(spend.window * 2**budget.strikes, spend.longest)
        self.budgets[spend.name] = ModelBudget(budget.spent + 1, budget.strikes, until)
        return spend.limit - budget.spent - 1

    def _running(self, now: int, spend: _Spend) -> ModelBudget:
        """The budget in its running window; with ``until == 0`` where the next one has not begun."""
        budget = self.budgets.get(spend.name)
        if budget is None or not now - spend.longest < budget.until <= now + 2 * spend.longest:
            return ModelBudget(0, 0, 0)
        if now < budget.until and budget.spent:
            return budget
        strikes = budget.strikes
        if budget.spent:
            strikes = strikes + 1 if budget.spent >= spend.limit else 0
        return ModelBudget(0, strikes, 0)


class _Spend(NamedTuple):
    """What is counted, and how often it may happen in how long."""

    name: tuple[object, ...]
    limit: int
    window: int
    longest: int


def newest_first(tokens: Iterable[ModelToken]) -> list[ModelToken]:
    """By their ids."""
    return sorted(tokens, key=lambda token: token.id, reverse=True)


def _has_shape(key: str, policy: TokenPolicy) -> bool:
    return len(key) == policy.key_length and key.isdecimal()


def _is_guarded(policy: TokenPolicy) -> bool:
    return bool(policy.max_attempts) or policy.context == "required"


def _milliseconds(duration: Duration | float) -> int:
    """Of a number of minutes or a timedelta: the policies of the model have no others."""
    assert not isinstance(duration, str)
    return duration // _MS if isinstance(duration, timedelta) else int(duration * 60_000)


def _count(now: int, tokens: list[ModelToken]) -> SlugStats:
    active = [t for t in tokens if t.is_active]
    expired = sum(now > t.expires for t in active)
    used = sum(not t.is_active and t.uses > 0 for t in tokens)
    return SlugStats(len(tokens), len(active) - expired, expired, used)
