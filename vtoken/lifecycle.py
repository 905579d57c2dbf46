"""The steps of a token's life, each composed of the backend's atomic ones."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, Final, NoReturn, cast

import anyio

from vtoken import inputs
from vtoken.backend import (
    NEVER,
    ForgetKey,
    InsertMode,
    InsertResult,
    Lease,
    Match,
    Release,
    StoredToken,
    TokenBackend,
    Use,
)
from vtoken.budgets import Charge, charge_attempt, charge_cooldown, refund
from vtoken.errors import (
    BackendClosed,
    BackendError,
    ConfigurationError,
    CooldownActive,
    InvalidInput,
    InvalidToken,
    KeyGenerationError,
    LeaseLost,
    Reason,
    TooManyAttempts,
)
from vtoken.guess import Guess, make_guess
from vtoken.hooks import EventName, Hooks, logger
from vtoken.ids import IdSequence
from vtoken.inputs import ANY, Unset, Wildcard
from vtoken.issue import NewKey, Order, make_order, new_key, reveal_derived_key
from vtoken.keys import NOTHING, Hidden, Keyring, random_key, use_id
from vtoken.loaded import issued, loaded, refusal
from vtoken.policy import NO_POLICY, Rules, Settings, TokenPolicy
from vtoken.subject import ContentTypes
from vtoken.token import IssuedToken, VerificationToken

_WAIT_FOR_WINNER: Final = (0.0, 0.005, 0.02, 0.1)
"""Seconds: how long ``get_active_or_create`` waits for a concurrent caller's token to appear."""


def closed() -> BackendClosed:
    """The error of every call before opening and after closing."""
    return BackendClosed("the manager is not open: use `async with manager:`, or await manager.open() first")


class _Closed:
    """What stands in for the backend while the manager is not open."""

    def __getattr__(self, name: str) -> NoReturn:
        raise closed()


CLOSED: Final = cast("TokenBackend", _Closed())


class Lifecycle:
    """What the manager's methods are made of: rules by slug, guesses, charges, uses.

    Args: as in :class:`~vtoken.TokenManager`; ``store`` is set while it is open.
    """

    def __init__(
        self,
        settings: Settings,
        policies: Iterable[TokenPolicy],
        content_types: ContentTypes,
        clock: Callable[[], datetime],
        hooks: Hooks,
    ) -> None:
        self.store: TokenBackend = CLOSED
        self.content_types = content_types
        self.hooks = hooks
        self.keyring = Keyring(settings.secret, settings.previous_secrets)
        self.max_key_iterations = settings.max_key_iterations
        self.default_rules = Rules.of(NO_POLICY, settings)
        self._rules: dict[str, Rules] = {}
        for policy in policies:
            slug = slug_text(policy.slug)
            if slug in self._rules:
                raise ConfigurationError(f"two policies for the slug {policy.slug!r}")
            self._rules[slug] = Rules.of(policy, settings)
        self._clock = clock
        self._ids = IdSequence()

    def now(self) -> int:
        """The injected clock's time, in milliseconds."""
        now = inputs.milliseconds(self._clock())
        if now < 0:  # what it would store, no backend would take for a token
            raise ConfigurationError("the clock shows a time before 1970")
        return now

    def require_open(self) -> None:
        """Raise :class:`BackendClosed` unless the manager is open, where the store is not asked."""
        if self.store is CLOSED:
            raise closed()

    def rules_of(self, slug: str) -> Rules:
        """The rules of a slug in its stored form."""
        return self._rules.get(slug, self.default_rules)

    def order(
        self,
        obj: object,
        slug: str | None,
        extra_data: object,
        expiration: float | Unset | None,
        key_generator_kwargs: Mapping[str, Any] | None,
        context: Hidden,
    ) -> Order:
        """Check the arguments of issuing, and put them together."""
        subject, slug_name = self.content_types.resolve(obj), slug_text(slug)
        rules = self.rules_of(slug_name)
        return make_order(rules, subject, slug_name, extra_data, expiration, key_generator_kwargs, context)

    async def issue(self, order: Order, mode: InsertMode) -> IssuedToken | None:
        """Insert a token with a fresh key; None where ``IF_NONE_VALID`` found a valid one."""
        now = self.now()
        drawn = new_key(self.keyring, order)
        token = order.token(self._ids.next(now), now, drawn)
        # What may raise for its arguments, the generator's own exception too, has done so: charge only now.
        charge = await charge_cooldown(self.store, order, now) if order.rules.cooldown else None
        try:
            for iteration in range(self.max_key_iterations):
                if iteration:
                    drawn = new_key(self.keyring, order)
                    token = order.token(self._ids.next(now), now, drawn)
                if await self._is_taken(order, drawn):
                    continue
                result = await self.store.insert(token, mode, now + order.rules.overlap)
                if result is InsertResult.INSERTED:
                    if self.hooks:
                        await self.hooks.tell("issued", token)
                    return issued(token, drawn.key)
                if result is InsertResult.HAS_VALID:
                    await self._give_cooldown_back(charge)
                    return None
        except Exception:
            await self._give_cooldown_back(charge)
            raise
        await self._give_cooldown_back(charge)
        raise KeyGenerationError(f"{self.max_key_iterations} draws yielded only keys that are taken")

    async def _is_taken(self, order: Order, drawn: NewKey) -> bool:
        """Whether a token from before the current secret has the key: the store tells only equal digests.
        The keys of our own generator are too many to meet one twice."""
        if order.generator is random_key:
            return False
        subject = order.content_type, order.object_id
        guess = make_guess(self.keyring, order.rules, subject, order.slug, drawn.key, NOTHING)
        older = Match(digests=guess.digests[1:])
        return bool(older.digests) and bool(await self.store.find(older, 1))

    async def get_or_issue(self, order: Order) -> VerificationToken:
        """The newest valid token of an order's object and slug, or a new one."""
        wanted = Match(content_type=order.content_type, object_id=order.object_id, slug=order.slug)
        if order.rules.needs_context:
            wanted = wanted._replace(context=order.context)
        cooling: CooldownActive | None = None
        for pause in _WAIT_FOR_WINNER:
            if pause:
                await anyio.sleep(pause)
            found = await self.store.find(wanted._replace(valid_at=self.now()), 1)
            if found:
                return loaded(found[0], reveal_derived_key(self.keyring, order.rules, found[0]))
            try:
                token = await self.issue(order, InsertMode.IF_NONE_VALID)
            except CooldownActive as error:  # perhaps by a concurrent caller, whose token is about to appear
                cooling = error
                continue
            if token is not None:
                return token
            if order.rules.needs_context:
                await self._end_other_contexts(order)
        raise cooling or BackendError("another caller's token appeared and vanished again, several times")

    async def _end_other_contexts(self, order: Order) -> None:
        """What is valid and in an order's way is bound to another context: the new token takes its place."""
        now = self.now()
        valid = Match(
            content_type=order.content_type, object_id=order.object_id, slug=order.slug, valid_at=now
        )
        found = await self.store.find(valid, 100)
        others = valid._replace(digests=tuple(t.digest for t in found if t.context != order.context))
        if others.digests:
            await self.store.deactivate(others, now)

    async def _give_cooldown_back(self, charge: Charge | None) -> None:
        """Nothing was issued, so nothing cools down; what went wrong before matters more than this."""
        try:
            await refund(self.store, charge)
        except BackendError as error:
            logger.warning("a cooldown could not be given back and ends by itself: %r", error)

    async def check(self, guess: Guess) -> StoredToken:
        """Find the valid token that a guess fits, and charge a wrong guess to the budget."""
        now = self.now()
        charge = await self.charge(guess, now) if guess.is_charged else None
        stored = self._fitting(guess, await self.store.find(guess.match(), len(guess.digests)))
        reason = refusal(stored, now)
        if stored is None or reason is not None:
            await self._refuse(guess, stored, reason or "unknown", charge)
        if charge is not None:
            await refund(self.store, charge)
        if stored.plain_key:
            await self._forget_plain_key(guess.rules, stored)
        if self.hooks:
            await self.hooks.tell("verified", stored)
        return stored

    async def charge(self, guess: Guess, now: int) -> Charge | None:
        """Count an attempt, in a committed write, before anything is compared. Guesses that are not
        ``is_charged`` need not come by."""
        self.require_open()
        if not guess.digests:  # a typing error: refused before the store is asked
            await self.hooks.tell("failed", guess, reason="unknown")
            raise InvalidToken("unknown")
        if guess.rules.max_attempts is None:
            return None
        capped: TooManyAttempts | None = None
        try:
            return await charge_attempt(self.store, guess, now)
        except TooManyAttempts as error:
            capped = error
        await self.hooks.tell("capped", guess)
        raise capped

    def _fitting(self, guess: Guess, found: Iterable[StoredToken]) -> StoredToken | None:
        for stored in found:
            if guess.slug is None and self.rules_of(stored.slug).is_guarded:
                continue  # a slug with a cap or a context is asked for by its name
            # In constant time, over all candidates: the store's index has only narrowed them down.
            if sum([hmac.compare_digest(stored.digest, digest) for digest in guess.digests]):
                return stored
        return None

    async def _refuse(
        self, guess: Guess, stored: StoredToken | None, reason: Reason, charge: Charge | None
    ) -> NoReturn:
        if reason in ("used", "leased"):  # the right key, too late or too early, is no guess
            await refund(self.store, charge)
        token_id = None if stored is None else stored.id
        name: EventName = "reused" if reason == "used" else "failed"
        await self.hooks.tell(name, guess, token_id=token_id, reason=reason)
        raise InvalidToken(reason)

    @asynccontextmanager
    async def redeem(self, guess: Guess, lease: int) -> AsyncGenerator[VerificationToken]:
        """Lease a token, and use it when the block ends normally."""
        lease_id = secrets.token_hex(16)  # the fencing id: nobody else's lease can pass for this one
        now = self.now()
        if now + lease >= NEVER:
            raise InvalidInput("the lease ends after the year 9999")
        charge = await self.charge(guess, now) if guess.is_charged else None
        try:
            stored, _ = await self.take(guess, now, Lease(lease_id, now + lease), charge)
        except InvalidToken:
            raise  # no lease was taken
        except BaseException:
            await self._give_back(guess, lease_id)
            raise
        try:
            await refund(self.store, charge)
            yield loaded(stored, lease_is_ours=True)
            now = self.now()
            held = Match(id=stored.id, active=True, lease_id=lease_id, leased_at=now)
            used = await self.store.update(held, Use(now))
        except BaseException:
            await self._give_back(guess, lease_id)
            raise
        if used is None:
            raise LeaseLost("the lease ended, or the token was deactivated, before the block was done")
        await self.settle(guess, used)

    async def _give_back(self, guess: Guess, lease_id: str) -> None:
        """Clear a lease, whatever became of the token: this never revives it."""
        with anyio.CancelScope(shield=True):
            try:
                await self.store.update(guess.match()._replace(lease_id=lease_id), Release())
            except BackendError as error:  # the block's own exception matters more
                logger.warning("a lease could not be given back and ends by itself: %r", error)

    async def take(
        self, guess: Guess, now: int, change: Use | Lease, charge: Charge | None
    ) -> tuple[StoredToken, bool]:
        """Use or lease the token that a guess fits, by compare-and-set; False where that use was counted
        before, under the same ``consume_id``."""
        for _ in range(3):
            taken = await self.store.update(guess.match(valid_at=now), change)
            if taken is not None:
                return taken, True
            stored = self._fitting(guess, await self.store.find(guess.match(), len(guess.digests)))
            if stored is not None and isinstance(change, Use) and change.use_id in stored.use_ids:
                # Nothing is reset: an old key and its consume_id would buy guesses at a new code for ever.
                await refund(self.store, charge)
                return stored, False
            reason = refusal(stored, now)
            if reason is not None:
                await self._refuse(guess, stored, reason, charge)
            # Valid after all: a lease was given back in between. Try again.
        return await self._refuse(guess, None, "leased", charge)

    async def settle(self, guess: Guess, stored: StoredToken) -> None:
        """What follows a use: the attempt budget starts afresh. The use stands, whatever fails here."""
        budget = guess.budget(stored.object_id)  # known by now, if it was not before
        try:
            if budget is not None:
                await self.store.reset(budget)
            if stored.plain_key:
                await self._forget_plain_key(guess.rules, stored)
        except BackendError as error:
            logger.warning("a token was used, but what follows its use failed: %r", error)
        if self.hooks:
            await self.hooks.tell("consumed", stored)

    def guess(self, obj: object, slug: str | Wildcard | None, key: Hidden, context: Hidden) -> Guess:
        """Digest a presented key for an object and a slug."""
        subject = self.content_types.resolve(obj)
        if slug is ANY:
            return make_guess(self.keyring, self.default_rules, subject, None, key, context)
        slug_name = slug_text(slug)
        return make_guess(self.keyring, self.rules_of(slug_name), subject, slug_name, key, context)

    async def active(self, obj: object, slug: str | Wildcard | None, key: Hidden | None) -> Match:
        """The active tokens that ``deactivate`` and ``filter_active_tokens`` are about."""
        if key is not None:
            guess = self.guess(obj, slug, key, NOTHING)
            if guess.rules.max_attempts is not None:
                raise InvalidInput("the policy caps attempts: use verify() or consume(), which count them")
            match = guess.match()._replace(active=True, context=None)
            if guess.slug is not None:
                return match
            # With any slug, a key says nothing about tokens whose slug caps attempts.
            found = await self.store.find(match, len(guess.digests))
            free = [stored for stored in found if self.rules_of(stored.slug).max_attempts is None]
            return match._replace(digests=tuple(stored.digest for stored in free))
        content_type, object_id = self.content_types.resolve(obj)
        wanted = None if isinstance(slug, Wildcard) else slug_text(slug)
        return Match(content_type=content_type, object_id=object_id, slug=wanted, active=True)

    async def _forget_plain_key(self, rules: Rules, stored: StoredToken) -> None:
        """Rewrite a row from the time of ``key_storage="plain"``: its digest is there already."""
        if rules.storage != "plain":
            await self.store.update(Match(id=stored.id), ForgetKey())


def slug_text(slug: object) -> str:
    """The stored form of a slug: ``""`` for none, which no real slug is."""
    return "" if slug is None else inputs.check_text("slug", slug, inputs.MAX_NAME_BYTES)


def one_slug(slug: str | Wildcard | None) -> str | None:
    """Refuse ``ANY`` where a token for one purpose must not pass for another."""
    if slug is ANY:
        raise InvalidInput("slug must be given: a token for one purpose never passes for another")
    return slug


def checked_use_id(consume_id: str) -> str:
    """What is stored of a checked ``consume_id``."""
    return use_id(inputs.check_text("consume_id", consume_id, inputs.MAX_CONSUME_ID_BYTES))
