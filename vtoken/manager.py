"""The life of a token, top to bottom: issued, checked, used, ended.

The manager owns the clock, the policies and the keys, and composes the backend's atomic steps. It
keeps nothing about any token, so any number of managers may work on one store.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn, Self, cast

import anyio

from vtoken import inputs
from vtoken.backend import (
    ForgetKey,
    InsertMode,
    InsertResult,
    Lease,
    Match,
    Release,
    SetExtraData,
    StoredToken,
    TokenBackend,
    Use,
)
from vtoken.budgets import MAX_WINDOW_MS, Charge, charge_attempt, charge_cooldown, refund
from vtoken.config import Configuration, create_backend
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
from vtoken.hooks import EventName, Hook, Hooks, LazyHook, logger
from vtoken.ids import IdSequence
from vtoken.inputs import ANY, DEFAULT, Unset, Wildcard
from vtoken.issue import Order, make_order, new_key, reveal_derived_key
from vtoken.keys import Hidden, KeyGenerator, Keyring, use_id
from vtoken.loaded import issued, loaded, refusal
from vtoken.policy import Rules, Settings, TokenPolicy, load_generator
from vtoken.stats import SlugStats, Stats
from vtoken.subject import ContentTypes
from vtoken.token import IssuedToken, VerificationToken

_PAGE = 100
_WAIT_FOR_WINNER = (0.0, 0.005, 0.02, 0.1)
"""Seconds: how long ``get_active_or_create`` waits for a concurrent caller's token to appear."""


def utc_now() -> datetime:
    """The real clock."""
    return datetime.now(UTC)


class TokenManager:
    """Issues and redeems tokens, on any backend.

    Args:
        backend: where tokens are kept. Two managers may share one backend object.
        settings: what holds for every slug.
        policies: what holds for one slug each; a slug without a policy has single use, no cap, no cooldown.
        content_types: the application's classes that tokens may belong to.
        clock: returns an aware ``datetime``; the only clock there is.
        hooks: callables, sync or async, that hear of each :class:`TokenEvent`; import paths and
            :class:`LazyHook` too. One that fails is logged and changes nothing.

    Raises:
        ConfigurationError: two policies of one slug, a code or derived keys without a secret, a
            generator or hook that cannot be imported.

    Use it as ``async with manager:``. Every other method raises :class:`BackendClosed` before opening and after
    closing, :class:`InvalidInput` for an argument out of its range, before anything is stored, and
    :class:`BackendError` or a subclass when the store fails.
    """

    def __init__(
        self,
        backend: TokenBackend,
        settings: Settings | None = None,
        policies: Iterable[TokenPolicy] = (),
        content_types: ContentTypes | None = None,
        clock: Callable[[], datetime] = utc_now,
        hooks: Iterable[Hook | LazyHook | str] = (),
    ) -> None:
        if not isinstance(backend, TokenBackend):
            raise ConfigurationError(
                f"{type(backend).__name__} is no TokenBackend: use create_backend(url), or TokenManager.from_url(url)"
            )
        self.backend = backend
        self.settings = settings or Settings()
        self.content_types = content_types or ContentTypes()
        self._clock = clock
        self._hooks = Hooks(hooks, clock)
        self._keyring = Keyring(self.settings.secret, self.settings.previous_secrets)
        self._default_rules = Rules.of(TokenPolicy(None), self.settings)
        self._rules: dict[str | None, Rules] = {}
        for policy in policies:
            if policy.slug in self._rules:
                raise ConfigurationError(f"two policies for the slug {policy.slug!r}")
            self._rules[policy.slug] = Rules.of(policy, self.settings)
        self._ids = IdSequence()
        self._opening = anyio.Lock()
        self._store: TokenBackend = _CLOSED

    @classmethod
    def from_url(cls, url: str, **keywords: Any) -> Self:
        """A manager on the backend that a URL names, e.g. ``"sqlite:///tokens.db"``.

        Args:
            url: see :func:`create_backend`.
            **keywords: the other arguments of :class:`TokenManager`.

        Raises:
            ConfigurationError: the URL is not understood, or a driver is missing.
        """
        return cls(create_backend(url), **keywords)

    @classmethod
    def from_env(cls, **keywords: Any) -> Self:
        """A manager as ``VTOKEN_URL`` and the other ``VTOKEN_*`` variables say; see :class:`Configuration`.

        Args:
            **keywords: arguments of :class:`TokenManager`, which go before the environment's.

        Raises:
            ConfigurationError: a variable is missing or not understood.
        """
        found = Configuration.from_env()
        return cls.from_url(found.url, **{"settings": found.settings, "policies": found.policies, **keywords})

    async def open(self) -> None:
        """Open the backend, unless this manager has opened it already.

        Raises:
            BackendError: the store cannot be used; the subclass and the message say why.
        """
        async with self._opening:
            if self._store is _CLOSED:
                await self.backend.open()
                self._store = self.backend

    async def aclose(self) -> None:
        """Close what this manager opened. May be called again, and before :meth:`open`."""
        async with self._opening:
            if self._store is not _CLOSED:
                self._store = _CLOSED
                await self.backend.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        with anyio.CancelScope(shield=True):
            await self.aclose()

    def __repr__(self) -> str:
        return f"<TokenManager on {self.backend!r}>"

    # Issued ------------------------------------------------------------------------------------

    async def deactivate_and_create(
        self,
        obj: object,
        slug: str | None = None,
        extra_data: object = None,
        deactivate_old_tokens: bool = True,
        expiration_in_minutes: float | Unset | None = DEFAULT,
        key_generator_kwargs: Mapping[str, Any] | None = None,
        *,
        context: str | None = None,
    ) -> IssuedToken:
        """Create a token and, in the same atomic step, deactivate the old ones of its object and slug.

        Whatever fails here leaves the old token as it is.

        Args:
            obj: an instance of a registered class, or a ``Subject`` with its ``object_id``.
            slug: the purpose, 1 to 255 bytes of UTF-8, or None for none.
            extra_data: any JSON value, see :meth:`VerificationToken.set_extra_data`.
            deactivate_old_tokens: False leaves the old ones valid.
            expiration_in_minutes: greater than 0; None never expires; left out, the policy's or settings'.
            key_generator_kwargs: arguments for the key generator; ``"generator"`` names another one.
            context: what the token is bound to, where the policy asks for it; at most 512 bytes.

        Returns:
            The token with its ``key``: the only time that the key is there.

        Raises:
            CooldownActive: the policy's cooldown since the last token of this object and slug runs.
            KeyGenerationError: the generator yielded only keys that are taken.
            ConfigurationError: the object's class is not registered.
        """
        order = self._order(obj, slug, extra_data, expiration_in_minutes, key_generator_kwargs, context)
        mode = InsertMode.REPLACE if deactivate_old_tokens else InsertMode.ADD
        token = await self._issue(order, mode)
        assert token is not None  # noqa: S101  # only IF_NONE_VALID finds a valid token
        return token

    async def get_active_or_create(
        self,
        obj: object,
        slug: str | None = None,
        extra_data: object = None,
        expiration_in_minutes: float | Unset | None = DEFAULT,
        key_generator_kwargs: Mapping[str, Any] | None = None,
        *,
        context: str | None = None,
    ) -> VerificationToken:
        """The newest valid token of an object and slug, or a new one; concurrent callers get the same one.

        A token that was there already has ``key=None`` unless its policy says ``key_storage="derived"`` (or
        ``"plain"``), because only a digest is stored: check for None before you mail it.

        Args: as in :meth:`deactivate_and_create`; they are for the new token.

        Raises: as in :meth:`deactivate_and_create`.
        """
        order = self._order(obj, slug, extra_data, expiration_in_minutes, key_generator_kwargs, context)
        subject = Match(content_type=order.content_type, object_id=order.object_id, slug=order.slug)
        for pause in _WAIT_FOR_WINNER:
            if pause:
                await anyio.sleep(pause)
            found = await self._store.find(subject._replace(valid_at=self._now()), 1)
            if found:
                return loaded(found[0], reveal_derived_key(self._keyring, order.rules, found[0]))
            cooling: CooldownActive | None = None
            try:
                token = await self._issue(order, InsertMode.IF_NONE_VALID)
            except CooldownActive as error:  # perhaps by a concurrent caller, whose token is about to appear
                cooling, token = error, None
            if token is not None:
                return token
        raise cooling or BackendError("another caller's token appeared and vanished again, several times")

    async def generate_key(
        self, generator: KeyGenerator | str | None = None, *args: Any, **kwargs: Any
    ) -> str:
        """Draw a link key that no stored token has.

        Args:
            generator: a callable or its import path; left out, the settings' default.
            *args: for the generator.
            **kwargs: for the generator.

        Raises:
            KeyGenerationError: ``Settings.max_key_iterations`` draws yielded only keys that are taken.
        """
        rules = self._default_rules
        draw = rules.generator if generator is None else load_generator(generator)
        kwargs = {**(rules.generator_kwargs if generator is None and not args else {}), **kwargs}
        for _ in range(self.settings.max_key_iterations):
            key = Hidden(draw(*args, **kwargs))
            guess = make_guess(self._keyring, rules, ("", None), None, key, Hidden(None))
            if not await self._store.find(Match(digests=guess.digests), 1):
                return str(key.reveal())
        raise KeyGenerationError(f"{self.settings.max_key_iterations} draws yielded only keys that are taken")

    def _order(
        self,
        obj: object,
        slug: str | None,
        extra_data: object,
        expiration: float | Unset | None,
        key_generator_kwargs: Mapping[str, Any] | None,
        context: str | None,
    ) -> Order:
        subject = self.content_types.resolve(obj)
        slug_text = _slug_text(slug)
        return make_order(
            self._rules_of(slug),
            subject,
            slug_text,
            extra_data,
            expiration,
            key_generator_kwargs,
            Hidden(context),
        )

    async def _issue(self, order: Order, mode: InsertMode) -> IssuedToken | None:
        """Insert a token with a fresh key; None where ``IF_NONE_VALID`` found a valid one."""
        now = self._now()
        drawn = new_key(self._keyring, order)  # before the cooldown is charge: the generator may raise
        charge = await charge_cooldown(self._store, order, now)
        try:
            for iteration in range(self.settings.max_key_iterations):
                if iteration:
                    drawn = new_key(self._keyring, order)
                token = order.token(self._ids.next(now), now, drawn)
                result = await self._store.insert(token, mode, now + order.rules.overlap)
                if result is InsertResult.INSERTED:
                    await self._hooks.tell("issued", token)
                    return issued(token, drawn.key)
                if result is InsertResult.HAS_VALID:
                    await refund(self._store, charge)
                    return None
        except Exception:
            await refund(self._store, charge)
            raise
        await refund(self._store, charge)
        raise KeyGenerationError(f"{self.settings.max_key_iterations} draws yielded only keys that are taken")

    # Checked -----------------------------------------------------------------------------------

    async def exists_valid(
        self,
        obj: object,
        slug: str | Wildcard | None = ANY,
        key: str | Wildcard = ANY,
        *,
        context: str | None = None,
    ) -> bool:
        """Say whether there is such a valid token. Consumes nothing.

        Args:
            obj: the object, or its class or ``Subject(content_type)`` for any object.
            slug: left out, any; None, tokens without one.
            key: left out, any. With any slug, a key matches link tokens only. ``""`` is a wrong key.
            context: what the token was bound to, where the policy asks for it.

        Raises:
            TooManyAttempts: a key was given and the policy's budget is spent; a wrong one counts as in :meth:`verify`.
            InvalidInput: ``key=None``, so that a missing form field can't pass as "any".
        """
        presented = Hidden(key)
        if key is ANY:
            content_type, object_id = self.content_types.resolve(obj)
            slug_text = None if slug is ANY else _slug_text(slug)
            match = Match(None, None, content_type, object_id, slug_text, False, self._now())
            return bool(await self._store.find(match, 1))
        del key
        guess = self._guess(obj, slug, presented, Hidden(context))
        try:
            await self._check(guess)
        except TooManyAttempts:
            raise
        except InvalidToken:
            return False
        return True

    async def verify(
        self, obj: object, slug: str | None, key: str, *, context: str | None = None
    ) -> VerificationToken:
        """Check a key without consuming the token: for the GET request that shows the form.

        Args: as in :meth:`consume`.

        Raises: as in :meth:`consume`.
        """
        presented = Hidden(key)
        del key
        return loaded(await self._check(self._guess(obj, _one_slug(slug), presented, Hidden(context))))

    async def filter_active_tokens(
        self, obj: object, slug: str | Wildcard | None = ANY, key: str | Wildcard = ANY
    ) -> AsyncIterator[VerificationToken]:
        """Iterate over active tokens, expired ones included, newest first, in batches of 100.

        Args: as in :meth:`exists_valid`.

        Raises:
            InvalidInput: a key was given and the policy caps attempts: this method counts none.
        """
        presented = Hidden(key)
        any_key = key is ANY
        del key
        match = self._active(obj, slug, None if any_key else presented)
        after: tuple[int, str] | None = None
        while True:
            page = await self._store.find(match, _PAGE, after)
            for stored in page:
                yield loaded(stored)
            if len(page) < _PAGE:
                return
            after = page[-1].created_at, page[-1].id

    async def get(self, id: str) -> VerificationToken | None:  # noqa: A002  # the contract's name
        """One token as it is stored now, whatever its state, or None.

        Args:
            id: its public id.
        """
        found = await self._store.find(Match(id=inputs.check_text("id", id, inputs.MAX_NAME_BYTES)), 1)
        return loaded(found[0]) if found else None

    async def content_object(self, token: VerificationToken) -> object | None:
        """The application's object that a token belongs to, by the registered loader; None where it is gone.

        Raises:
            ConfigurationError: no loader is registered for its content type.
        """
        return await self.content_types.loader(token.content_type)(token.object_id)

    async def _check(self, guess: Guess) -> StoredToken:
        """Find the valid token that a guess fits, and charge a wrong guess to the budget."""
        now = self._now()
        charge = await self._charge(guess, now)
        stored = await self._look_up(guess)
        reason = refusal(stored, now)
        if stored is None or reason is not None:
            await self._refuse(guess, stored, reason or "unknown", charge)
        await refund(self._store, charge)
        await self._forget_plain_key(guess.rules, stored)
        await self._hooks.tell("verified", stored)
        return stored

    async def _charge(self, guess: Guess, now: int) -> Charge | None:
        """Count an attempt, in a committed write, before anything is compared."""
        if not guess.digests:  # a typing error: refused before the store is asked
            await self._hooks.tell("failed", guess, reason="unknown")
            raise InvalidToken("unknown")
        capped: TooManyAttempts | None = None
        try:
            return await charge_attempt(self._store, guess, now)
        except TooManyAttempts as error:
            capped = error
        await self._hooks.tell("capped", guess)
        raise capped

    async def _look_up(self, guess: Guess) -> StoredToken | None:
        found = await self._store.find(guess.match(), len(guess.digests))
        for stored in found:
            # In constant time, over all candidates: the store's index has only narrowed them down.
            if sum(hmac.compare_digest(stored.digest, digest) for digest in guess.digests):
                return stored
        return None

    async def _refuse(
        self, guess: Guess, stored: StoredToken | None, reason: Reason, charge: Charge | None
    ) -> NoReturn:
        if reason in ("used", "leased"):  # the right key, too late or too early, is no guess
            await refund(self._store, charge)
        token_id = None if stored is None else stored.id
        name: EventName = "reused" if reason == "used" else "failed"
        await self._hooks.tell(name, guess, token_id=token_id, reason=reason)
        raise InvalidToken(reason)

    # Used --------------------------------------------------------------------------------------

    async def consume(
        self,
        obj: object,
        slug: str | None,
        key: str,
        *,
        consume_id: str | None = None,
        context: str | None = None,
    ) -> VerificationToken:
        """Use a token once; of any number of concurrent callers exactly one gets it.

        Args:
            obj: the object, or its class or ``Subject(content_type)`` where a link carries only the key. Codes need the object.
            slug: the purpose; None for tokens without one. A token for one purpose never passes for another.
            key: what was presented, at most 512 bytes.
            consume_id: the caller's name for this use, 1 to 128 bytes: the same one again gives the same
                answer until purge removes the token, which settles an :class:`OutcomeUnknown`.
            context: what the token was bound to, where the policy asks for it.

        Returns:
            The token after its use.

        Raises:
            InvalidToken: wrong, expired, used, leased or unknown; ``reason`` is for the server side only.
            TooManyAttempts: the policy's attempt budget is spent; nothing was compared.
            OutcomeUnknown: the connection broke; the use may have been counted.
        """
        presented = Hidden(key)
        del key
        guess = self._guess(obj, _one_slug(slug), presented, Hidden(context))
        use = "" if consume_id is None else _use_id(consume_id)
        now = self._now()
        charge = await self._charge(guess, now)
        stored = await self._take(guess, now, Use(now, use), charge)
        await self._settle(guess, stored)
        return loaded(stored)

    def redeem(
        self,
        obj: object,
        slug: str | None,
        key: str,
        *,
        lease: timedelta = timedelta(seconds=60),
        context: str | None = None,
    ) -> AbstractAsyncContextManager[VerificationToken]:
        """Use a token around a side effect: ``async with manager.redeem(user, slug, key) as token:``.

        The token is leased on entry, marked used when the block ends normally, and given back when it ends with an
        exception or a cancellation. After a crash it is free again when the lease ends: a crash after the
        side effect and before the mark means that the side effect can happen again (at least once).

        Args:
            obj: as in :meth:`consume`.
            slug: as in :meth:`consume`.
            key: as in :meth:`consume`.
            lease: how long the block may take, 1 millisecond or more.
            context: as in :meth:`consume`.

        Raises:
            InvalidToken, TooManyAttempts: on entry, as in :meth:`consume`.
            LeaseLost: on exit: the lease ended before the block did, or the token was deactivated meanwhile.
        """
        presented = Hidden(key)
        del key
        guess = self._guess(obj, _one_slug(slug), presented, Hidden(context))
        return self._redeem(guess, inputs.check_duration("lease", lease))

    @asynccontextmanager
    async def _redeem(self, guess: Guess, lease: int) -> AsyncIterator[VerificationToken]:
        lease_id = secrets.token_hex(16)  # the fencing id: nobody else's lease can pass for this one
        now = self._now()
        charge = await self._charge(guess, now)
        try:
            stored = await self._take(guess, now, Lease(lease_id, now + lease), charge)
            await refund(self._store, charge)
            yield loaded(stored, lease_is_ours=True)
            now = self._now()
            held = Match(id=stored.id, active=True, lease_id=lease_id, leased_at=now)
            used = await self._store.update(held, Use(now))
        except BaseException:
            await self._give_back(guess, lease_id)
            raise
        if used is None:
            raise LeaseLost("the lease ended, or the token was deactivated, before the block was done")
        await self._settle(guess, used)

    async def _give_back(self, guess: Guess, lease_id: str) -> None:
        """Clear a lease, whatever became of the token: this never revives it."""
        with anyio.CancelScope(shield=True):
            try:
                await self._store.update(guess.match()._replace(lease_id=lease_id), Release())
            except BackendError:  # the block's own exception matters more; the lease ends by itself
                logger.warning("a lease could not be given back and ends by itself", exc_info=True)

    async def _take(self, guess: Guess, now: int, change: Use | Lease, charge: Charge | None) -> StoredToken:
        """Use or lease the token that a guess fits, by compare-and-set."""
        for _ in range(3):
            taken = await self._store.update(guess.match(valid_at=now), change)
            if taken is not None:
                return taken
            stored = await self._look_up(guess)
            if stored is not None and isinstance(change, Use) and change.use_id in stored.use_ids:
                return stored
            reason = refusal(stored, now)
            if reason is not None:
                await self._refuse(guess, stored, reason, charge)
            # Valid after all: a lease was given back in between. Try again.
        await self._refuse(guess, None, "leased", charge)

    async def _settle(self, guess: Guess, stored: StoredToken) -> None:
        """What follows a use: the attempt budget starts afresh."""
        budget = guess.budget()
        if budget is not None:
            await self._store.reset(budget)
        await self._forget_plain_key(guess.rules, stored)
        await self._hooks.tell("consumed", stored)

    # Ended -------------------------------------------------------------------------------------

    async def deactivate(
        self, obj: object, slug: str | Wildcard | None = ANY, key: str | Wildcard = ANY
    ) -> int:
        """Deactivate an object's active tokens, and return how many there were.

        Args: as in :meth:`exists_valid`; with ``slug`` or ``key`` only those.

        Raises:
            InvalidInput: a key was given and the policy caps attempts: this method counts none.
        """
        presented = Hidden(key)
        any_key = key is ANY
        del key
        match = self._active(obj, slug, None if any_key else presented)
        count = await self._store.deactivate(match, self._now())
        if count:
            await self._hooks.tell("deactivated", match, count=count)
        return count

    async def save(self, token: VerificationToken) -> None:
        """Store a token's ``extra_data`` and nothing else, so that a stale copy can never revive a used token.

        Raises:
            InvalidToken: it is not stored any more.
            InvalidInput: ``extra_data`` is no JSON text; see :meth:`VerificationToken.set_extra_data`.
        """
        text = None if token.extra_data is None else inputs.check_json_text(token.extra_data)
        match = Match(id=inputs.check_text("id", token.id, inputs.MAX_NAME_BYTES))
        if await self._store.update(match, SetExtraData(text)) is None:
            raise InvalidToken("unknown")

    async def purge(self, batch_size: int = 1000, keep: timedelta = timedelta(0)) -> int:
        """Delete the tokens that were inactive or expired when it began; leased tokens stay.

        Used tokens that are kept for a while (``keep``) let a second use be told from a guess.

        Args:
            batch_size: how many tokens are deleted in one step, beside which live traffic goes on.
            keep: tokens that ended no longer ago than this stay, 0 or more.

        Returns:
            How many were deleted.
        """
        limit = inputs.check_count("batch_size", batch_size)
        now = self._now()
        before = now - inputs.check_duration("keep", keep, least=timedelta(0))
        total = 0
        while True:
            deleted = await self._store.purge(before, now, limit, now - MAX_WINDOW_MS)
            total += deleted
            if deleted < limit:
                break
        if total:
            await self._hooks.tell("purged", Match(), count=total)
        return total

    async def stats(self) -> Stats:
        """Count the tokens, in all and by slug."""
        rows = await self._store.count(self._now())
        by_slug = {row.slug or None: SlugStats(*row[1:]) for row in rows}
        total, active, expired, used = (
            sum(numbers) for numbers in zip((0,) * 4, *(r[1:] for r in rows), strict=True)
        )
        return Stats(total=total, active=active, expired=expired, used=used, by_slug=by_slug)

    # ------------------------------------------------------------------------------------------

    def _now(self) -> int:
        return inputs.milliseconds(self._clock())

    def _rules_of(self, slug: str | None) -> Rules:
        return self._rules.get(slug, self._default_rules)

    def _guess(self, obj: object, slug: str | Wildcard | None, key: Hidden, context: Hidden) -> Guess:
        subject = self.content_types.resolve(obj)
        if isinstance(slug, Wildcard):
            return make_guess(self._keyring, self._default_rules, subject, None, key, context)
        slug_text = _slug_text(slug)
        return make_guess(self._keyring, self._rules_of(slug), subject, slug_text, key, context)

    def _active(self, obj: object, slug: str | Wildcard | None, key: Hidden | None) -> Match:
        """The active tokens that ``deactivate`` and ``filter_active_tokens`` are about."""
        if key is not None:
            guess = self._guess(obj, slug, key, Hidden(None))
            if guess.rules.max_attempts is not None:
                raise InvalidInput("the policy caps attempts: use verify() or consume(), which count them")
            return guess.match()._replace(active=True, context=None)
        content_type, object_id = self.content_types.resolve(obj)
        slug_text = None if isinstance(slug, Wildcard) else _slug_text(slug)
        return Match(content_type=content_type, object_id=object_id, slug=slug_text, active=True)

    async def _forget_plain_key(self, rules: Rules, stored: StoredToken) -> None:
        """Rewrite a row from the time of ``key_storage="plain"``: its digest is there already."""
        if stored.plain_key and rules.storage != "plain":
            await self._store.update(Match(id=stored.id), ForgetKey())


class _Closed:
    """What stands in for the backend while the manager is not open."""

    def __getattr__(self, name: str) -> NoReturn:
        raise BackendClosed(
            "the manager is not open: use `async with manager:`, or await manager.open() first"
        )


_CLOSED = cast("TokenBackend", _Closed())


def _slug_text(slug: object) -> str:
    """The stored form of a slug: ``""`` for none, which no real slug is."""
    return "" if slug is None else inputs.check_text("slug", slug, inputs.MAX_NAME_BYTES)


def _one_slug(slug: str | None) -> str | None:
    """Refuse ``ANY`` where a token for one purpose must not pass for another."""
    if isinstance(slug, Wildcard):
        raise InvalidInput("slug must be given: a token for one purpose never passes for another")
    return slug


def _use_id(consume_id: str) -> str:
    return use_id(inputs.check_text("consume_id", consume_id, inputs.MAX_CONSUME_ID_BYTES))
