"""Limits: what may happen so often, and the budgets that count it.

A limit is what a policy says; a budget is what the store counts. A budget's name is a digest of fixed size,
made with a random value that the store keeps, so that nothing personal and nothing of an attacker's length is
stored, and rotating secrets renames none.

This module says which budgets a request spends from; the store decides whether they allow it, in the same
step as the request (:func:`vtoken.backend.budget_step`). A policy's ``cooldown`` is a limit of one in its
window: :meth:`Limiter.issues` names its budget, and :meth:`TokenBackend.insert` charges it together with the
new token, or refuses both.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from vtoken import inputs
from vtoken.backend import Budget, BudgetState, Spend, Spending, budget_step, left_of
from vtoken.errors import ConfigurationError, InvalidInput
from vtoken.keys import prefixed

if TYPE_CHECKING:
    from vtoken.policy import ResolvedPolicy

_DAY: Final = 24 * 60 * 60 * 1000
MAX_ATTEMPT_WINDOW: Final = _DAY
"""How far an object's attempt window grows, in milliseconds. A budget slows an attacker down and never locks
the account (OWASP Forgot Password Cheat Sheet, "Account Lockout")."""
REMEMBERED: Final = _DAY
"""How long after its end, in milliseconds, a budget is remembered, so that the next window can have grown."""
LONGEST_WINDOW: Final = timedelta(days=366)
NO_OBJECT: Final = bytes(16)
"""The ``object`` of a budget that belongs to none."""

By = Mapping[str, str]
"""The dimensions that a call passes: ``{"ip": "192.0.2.7"}``."""


@dataclass(frozen=True, slots=True)
class Limit:
    """How often something may happen in a window of time.

    Example::

        TokenPolicy.code("sms-login", issue_limits=[
            Limit(1, "60s"),                # one code a minute for a number
            Limit(20, "1d", across="sms"),  # twenty a day, together with other purposes
            Limit(100, "1h", by="ip"),      # issue(..., by={"ip": request.client.host})
        ])

    Args:
        count: how often, 1 or more.
        per: the window, a ``timedelta`` or a text such as ``"15m"``: 1 millisecond to 366 days.
        by: whose budget it is. ``"object"``: the token's object and slug. ``"slug"``: everybody together. Any
            other name is a dimension that the call passes as ``by={name: value}``; under ``"ip"`` an IPv6
            address counts as its /64 network.
        across: slugs whose limits have the same ``across`` share one budget; left out, each slug has its own.

    Raises:
        ConfigurationError: a value is out of its range.

    .. versionadded:: 0.1
    """

    count: int
    per: timedelta | str
    by: str = "object"
    across: str | None = None
    per_ms: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            inputs.check_count("count", self.count)
            window = inputs.duration("per", self.per, most=LONGEST_WINDOW)
            inputs.check_text("by", self.by, inputs.MAX_NAME_BYTES)
            if self.across is not None:
                inputs.check_text("across", self.across, inputs.MAX_NAME_BYTES)
        except InvalidInput as error:
            problem = str(error)
        else:
            object.__setattr__(self, "per_ms", window)
            return
        raise ConfigurationError(f"Limit: {problem}")

    @property
    def name(self) -> str:
        """A short name for logs and metrics, such as ``"5 per 1d by ip across sms"``."""
        shared = f" across {self.across}" if self.across else ""
        return f"{self.count} per {inputs.spelled(self.per_ms)} by {self.by}{shared}"


class Spends(NamedTuple):
    """What a request spends: the limits that apply to it, and what the store is asked for."""

    limits: tuple[Limit, ...] = ()
    spends: tuple[Spend, ...] = ()

    @property
    def of_the_object(self) -> tuple[Budget, ...]:
        """The budgets that belong to the object, which a success clears."""
        return tuple([spend.budget for spend in self.spends if spend.budget.object != NO_OBJECT])


NOTHING_TO_SPEND: Final = Spends()


class Limiter:
    """Names the budgets of requests.

    Args:
        seed: the random value of the store.
    """

    __slots__ = ("_seed",)

    def __init__(self, seed: bytes) -> None:
        self._seed = seed

    def object_name(self, content_type: str, object_id: str) -> bytes:
        """The 16 bytes that stand for an object."""
        return self._digest("object", content_type, object_id)

    def attempts(
        self,
        policy: ResolvedPolicy,
        slug: str,
        content_type: str,
        object_id: str | None,
        by: By,
        *,
        lenient: bool = False,
    ) -> Spends:
        """What a wrong key costs. Where the object is not known, limits by object do not apply.

        Args:
            policy: of the slug.
            slug: in its stored form.
            content_type: of the object.
            object_id: None where it is not known.
            by: the dimensions that the call passes.
            lenient: leave out limits whose dimension ``by`` lacks.

        Raises:
            InvalidInput: a limit asks for a dimension that ``by`` lacks.
        """
        if not policy.is_capped:
            return NOTHING_TO_SPEND
        plan: list[tuple[str, Limit]] = [("attempts", limit) for limit in policy.attempt_limits]
        if policy.max_attempts is not None:
            plan.insert(0, ("max-attempts", _usual(policy.max_attempts, policy.attempt_window)))
        if object_id is None:
            plan = [(kind, limit) for kind, limit in plan if limit.by != "object"]
        # Only an object's attempt windows grow: nobody may lock a whole address block or a purpose for a day.
        return self._spends(_known(plan, by, lenient), slug, content_type, object_id, b"", by, grows=True)

    def attempts_of_object(
        self, policy: ResolvedPolicy, slug: str, content_type: str, object_id: str
    ) -> Spends:
        """The part of :meth:`attempts` that the object alone decides."""
        found = self.attempts(policy, slug, content_type, object_id, {}, lenient=True)
        own = [
            (limit, spend)
            for limit, spend in zip(found.limits, found.spends, strict=True)
            if spend.budget.object != NO_OBJECT
        ]
        return Spends(tuple(limit for limit, _ in own), tuple(spend for _, spend in own))

    def issues(
        self,
        policy: ResolvedPolicy,
        slug: str,
        content_type: str,
        object_id: str,
        context: bytes,
        by: By,
        *,
        lenient: bool = False,
    ) -> Spends:
        """What a new token costs. The first one is the cooldown's, if the policy has one. Arguments as of
        :meth:`attempts`.

        Raises:
            InvalidInput: a limit asks for a dimension that ``by`` lacks.
        """
        if not policy.cooldown and not policy.issue_limits:
            return NOTHING_TO_SPEND
        plan: list[tuple[str, Limit]] = [("issues", limit) for limit in policy.issue_limits]
        if policy.cooldown:
            plan.insert(0, ("cooldown", _usual(1, policy.cooldown)))
        return self._spends(
            _known(plan, by, lenient), slug, content_type, object_id, context, by, grows=False
        )

    def first_reveal(self, content_type: str, object_id: str, token_id: str, lifetime: int) -> Spend:
        """The one time that a token's key is revealed without counting toward its issue limits."""
        budget = Budget(
            object=self.object_name(content_type, object_id), name=self._digest("reveal", token_id)
        )
        window = max(1, min(lifetime, LONGEST_WINDOW // timedelta(milliseconds=1)))
        return Spend(budget=budget, limit=1, window=window, max_window=window)

    def _spends(
        self,
        plan: Sequence[tuple[str, Limit]],
        slug: str,
        content_type: str,
        object_id: str | None,
        context: bytes,
        by: By,
        *,
        grows: bool,
    ) -> Spends:
        spends: list[Spend] = []
        for kind, limit in plan:
            scope = ("across", limit.across) if limit.across is not None else ("slug", slug)
            owner, parts = NO_OBJECT, [kind, str(limit.per_ms), *scope]
            if limit.by == "object":
                assert object_id is not None  # noqa: S101  # the callers have left these out
                owner = self.object_name(content_type, object_id)
                # Cooldowns belong to a context: a stranger with another cookie must not delay the owner.
                parts += [context.hex()] if kind == "cooldown" else []
            elif limit.by != "slug":
                parts += [limit.by, _dimension(limit.by, by)]
            longest = max(limit.per_ms, MAX_ATTEMPT_WINDOW) if grows and owner != NO_OBJECT else limit.per_ms
            budget = Budget(object=owner, name=self._digest(limit.by, *parts))
            spends.append(Spend(budget=budget, limit=limit.count, window=limit.per_ms, max_window=longest))
        return Spends(tuple(limit for _, limit in plan), tuple(spends))

    def _digest(self, *parts: str) -> bytes:
        return hashlib.blake2b(prefixed(*parts), key=self._seed, digest_size=16).digest()


@lru_cache(1024)
def _usual(count: int, window: int) -> Limit:
    """The limit that ``max_attempts`` or ``cooldown`` stands for."""
    return Limit(count, timedelta(milliseconds=window))


def _known(plan: list[tuple[str, Limit]], by: By, lenient: bool) -> list[tuple[str, Limit]]:
    """The limits whose dimension is known, or all of them where one that is missing is an error."""
    if not lenient:
        return plan
    return [(kind, limit) for kind, limit in plan if limit.by in ("object", "slug") or limit.by in by]


def checked_by(by: By | None) -> By:
    """Return the dimensions that a call passes.

    Raises:
        InvalidInput: not a mapping of names to texts of 1 to 512 bytes.
    """
    if by is None:
        return {}
    if not isinstance(by, Mapping):
        raise InvalidInput(f"by must be a mapping such as {{'ip': '192.0.2.7'}}, not {type(by).__name__}")
    return {
        inputs.check_text("a name in by", name, inputs.MAX_NAME_BYTES): inputs.check_text(
            f"by[{name!r}]", value, inputs.MAX_OBJECT_ID_BYTES
        )
        for name, value in by.items()
    }


def _dimension(name: str, by: By) -> str:
    value = by.get(name)
    if value is None:
        raise InvalidInput(f"a limit of this policy counts by {name!r}: pass by={{{name!r}: ...}}")
    return _network(value) if name == "ip" else value


def _network(address: str) -> str:
    """An IP address as it is counted: whoever has an IPv6 address has the 2**64 of its network as well
    (RFC 4291, section 2.5.1). Any other text stays as it is."""
    try:
        found = ipaddress.ip_address(address.strip().partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(found) >> 64 << 64, 64)))


def seconds(span: int) -> float:
    """Milliseconds of waiting as seconds, more than 0."""
    return max(span, 1) / 1000


def attempts_left(states: Iterable[BudgetState | None], spends: Spends, now: int) -> int | None:
    """How many wrong keys are left before the first limit is full; None without limits."""
    lefts = [left_of(state, spend, now) for state, spend in zip(states, spends.spends, strict=True)]
    return min(lefts, default=None)


def resets_at(states: Iterable[BudgetState | None], spends: Spends, now: int) -> int | None:
    """When :func:`attempts_left` grows again: the end of the limit that decides it. Of several, which may be
    full, the last one ends the wait. None where one of them is unspent, so that waiting gains nothing: what
    others have spent of a limit with more left is no concern of this object's."""
    found = [
        (left_of(state, spend, now), None if state is None or not _runs(state, spend, now) else state.until)
        for state, spend in zip(states, spends.spends, strict=True)
    ]
    least = min([left for left, _ in found], default=None)
    ends = [until for left, until in found if left == least]
    known = [until for until in ends if until is not None]
    return max(known) if known and len(known) == len(ends) else None


def _runs(state: BudgetState, spend: Spend, now: int) -> bool:
    """Whether something is spent in a window that has not ended (and is not stale)."""
    return state.spent > 0 and now < state.until <= now + 2 * spend.max_window


def allowed_at(states: Iterable[BudgetState | None], spends: Spends, now: int) -> int:
    """When all spends are allowed: now, or the end of the last window that is full."""
    ends = [
        state.until
        for state, spend in zip(states, spends.spends, strict=True)
        if state is not None and budget_step(state, spend, now) is None
    ]
    return max(ends, default=now)


def full_limit(spends: Spends, spending: Spending) -> Limit | None:
    """Which limit a refused spending names."""
    return None if spending.full is None else spends.limits[spending.full]
