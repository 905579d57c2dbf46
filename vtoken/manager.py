"""The life of a token, top to bottom: issued, checked, used, ended.

Every public method is here, with its arguments checked. What it takes to issue a token is in
:mod:`vtoken.issuing`; what becomes of a presented key is in :mod:`vtoken.redeeming`; what may happen how
often is in :mod:`vtoken.limits`. The manager keeps nothing about any token, so any number of managers may
work on one store.
"""

from __future__ import annotations

import secrets
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
)
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from time import perf_counter, time_ns
from typing import Any, Final, Self

import anyio

from vtoken import inputs
from vtoken.backend import (
    PRETENDED,
    Charge,
    InsertMode,
    Match,
    SetExtraData,
    StoredToken,
    TokenBackend,
    Use,
    has_free_use,
    is_valid,
)
from vtoken.config import Configuration
from vtoken.errors import (
    BackendError,
    ConfigurationError,
    CooldownActive,
    CorruptStore,
    InvalidInput,
    InvalidToken,
    KeyGenerationError,
    TooManyAttempts,
    VTokenError,
)
from vtoken.hooks import EventName, Hook, Hooks, LazyHook, logger
from vtoken.inputs import ANY, DEFAULT, Duration, Lifetime, Unset, Wildcard
from vtoken.issuing import Issued, Issuer, IssueRequest, drawn_key, reveal
from vtoken.keys import NOTHING, Hidden, KeyGenerator, Keyring, context_digest, use_id
from vtoken.limits import (
    NOTHING_TO_SPEND,
    By,
    Limiter,
    Spends,
    allowed_at,
    attempts_left,
    checked_by,
    full_limit,
    resets_at,
    seconds,
)
from vtoken.opening import Opening, to_the_end
from vtoken.policy import (
    NO_POLICY,
    Policies,
    ResolvedPolicy,
    Settings,
    TokenPolicy,
    check_call,
    load_generator,
)
from vtoken.redact import without_locals
from vtoken.redeeming import (
    MAX_LEASE,
    Context,
    PresentedKey,
    Redeemer,
    Redemption,
    bound,
    own_holds,
    presented_key,
)
from vtoken.registry import create_backend
from vtoken.stats import SlugStats, Stats, Status
from vtoken.subject import ContentTypes
from vtoken.sweeper import Sweeper, purge_in_steps
from vtoken.token import IssuedToken, VerificationToken, issued, loaded, loaded_without_keys

_PAGE: Final = 100
_AT_ONCE: Final = 256
"""How many tokens ``issue_many`` has in flight: as many as two batches of a backend that gathers them."""
_BATCH_BYTES: Final = 128


def utc_now() -> datetime:
    """The real clock."""
    return datetime.now(UTC)


class TokenManager:
    """Issues and redeems tokens, on any backend.

    Example::

        policies = [TokenPolicy.link("password-reset")]
        manager = TokenManager.from_url("sqlite:///tokens.db", policies=policies)
        async with manager:
            token = await manager.issue(Subject("auth.user", "ada"), "password-reset")

    Args:
        backend: where tokens are kept. Two managers may share one backend object.
        settings: what holds for every slug.
        policies: what holds for one slug each; without one: single use, no cap, no cooldown.
        content_types: the application's classes that tokens may belong to.
        clock: returns an aware ``datetime``; the only clock there is.
        hooks: callables, sync or async, that hear of each :class:`TokenEvent`; import paths and
            :class:`LazyHook` too. One that fails is logged and changes nothing.

    Raises:
        ConfigurationError: two policies of one slug, a code or derived keys without a secret, a generator or
            hook that cannot be imported.

    Use it as ``async with manager:``, as often and from as many tasks as you like. Every other method raises
    :class:`BackendClosed` before opening and after closing, :class:`InvalidInput` for an argument out of its
    range, before anything is stored, and :class:`BackendError` or a subclass when the store fails.
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
                f"backend must be a TokenBackend, not {type(backend).__name__}: use create_backend(url), or"
                " TokenManager.from_url(url)"
            )
        self.backend = backend
        self.settings = Settings() if settings is None else settings
        self.content_types = ContentTypes() if content_types is None else content_types
        inputs.check_kind("settings", self.settings, Settings)
        inputs.check_kind("content_types", self.content_types, ContentTypes)
        inputs.check_kind("clock", clock, Callable)
        self.policies = Policies(inputs.several("policies", policies, TokenPolicy), self.settings)
        self._default_policy = ResolvedPolicy.of(NO_POLICY, self.settings)
        self._clock = clock
        self._hooks = Hooks(inputs.several("hooks", hooks), clock)
        self._keyring = Keyring(self.settings.secret, self.settings.previous_secrets)
        self._opening = Opening(backend, self._prepare)
        self._issuer = Issuer(self._keyring, self.settings.max_key_iterations, self._now)
        self._redeemer = Redeemer(self._opening, self._hooks, self._now, self.policies.get)
        self._limiter = Limiter(b"")

    @classmethod
    @without_locals(Exception)
    def from_url(cls, url: str, **keywords: Any) -> Self:
        """A manager on the backend that a URL names.

        Example::

            manager = TokenManager.from_url("sqlite:///tokens.db")

        Args:
            url: see :func:`create_backend`.
            **keywords: the other arguments of :class:`TokenManager`.

        Raises:
            ConfigurationError: the URL is not understood, or a driver is missing.
        """
        return cls(create_backend(url), **keywords)

    @classmethod
    def from_env(cls, default_url: str | None = None, **keywords: Any) -> Self:
        """A manager as ``VTOKEN_URL`` and the other ``VTOKEN_*`` variables say; see :class:`Configuration`.

        Example::

            manager = TokenManager.from_env(default_url="sqlite:///tokens.db")

        Args:
            default_url: the store where ``VTOKEN_URL`` is not set.
            **keywords: arguments of :class:`TokenManager`, which override the environment's.

        Raises:
            ConfigurationError: a variable is missing or not understood.
        """
        found = Configuration.from_env(default_url=default_url)
        said = {"settings": found.settings, "policies": found.policies, "hooks": found.hooks}
        return cls.from_url(found.url, **(said | keywords))

    # Opened and closed --------------------------------------------------------------------------

    async def open(self) -> None:
        """Open the backend. Opens are counted for each event loop, so that blocks may be nested or
        concurrent.

        Raises:
            BackendError: the store cannot be used; the subclass and the message say why.
        """
        await self._opening.open()

    async def aclose(self) -> None:
        """Undo one :meth:`open`; the last one of an event loop closes the backend there.

        It waits, up to 5 seconds, for calls that are running and for ``redeem`` blocks that are being
        cancelled to give their holds back. A block that still runs normally then ends with
        :class:`BackendClosed`. May be called again, and before :meth:`open`.
        """
        with anyio.CancelScope(shield=True):
            await self._opening.aclose()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<TokenManager on {self.backend!r}>"

    async def _prepare(self, store: TokenBackend) -> None:
        """Learn the store's random value, by which budgets are named; the first manager on a store draws
        it."""
        noted = await store.note("seed", secrets.token_hex(32))
        try:
            seed = bytes.fromhex(noted)
        except ValueError:
            seed = b""
        if len(seed) != 32:
            raise CorruptStore("the store's note 'seed', by which budgets are named, is damaged")
        self._limiter = Limiter(seed)

    # Issued -------------------------------------------------------------------------------------

    async def issue(
        self,
        obj: object,
        slug: str | None = None,
        *,
        extra_data: object = None,
        replace: bool = True,
        expires_in: Lifetime | Unset = DEFAULT,
        key_generator_kwargs: Mapping[str, Any] | None = None,
        context: Context | None = None,
        by: By | None = None,
        using: object = None,
    ) -> IssuedToken:
        """Create a token and, in the same atomic step, end the older ones of its object, slug and context.

        Whatever fails here leaves the old token as it is.

        Example::

            token = await manager.issue(ada, "password-reset")
            send_mail(ada, f"https://example.org/reset?key={token.key}")

        Args:
            obj: an instance of a registered class, or a ``Subject`` with its ``object_id``.
            slug: the purpose, 1 to 255 bytes of UTF-8, or None for none.
            extra_data: any JSON value, see :meth:`VerificationToken.set_extra_data`.
            replace: False leaves the older tokens valid.
            expires_in: a number of minutes greater than 0, a ``timedelta`` or a text such as ``"1h"``; None
                never expires; left out, the policy's or settings'. Held to the policy's floors.
            key_generator_kwargs: arguments for the key generator; ``"generator"`` names another one.
            context: what the token is bound to, where the policy asks for it: a text of at most 512 bytes, a
                mapping of names to such texts, or an async callable that is given the ``object_id`` and
                returns one of them.
            by: the dimensions that the policy's limits count by, e.g. ``{"ip": request.client.host}``.
            using: a connection or session of the application's own, with a transaction under way: the token
                is stored when that commits.

        Returns:
            The token with its ``key``, and of a pair with its ``code``; they are there at no other time.

        Raises:
            CooldownActive: one of the policy's limits for issuing is full.
            KeyGenerationError: the generator yielded only keys that are taken.
            ConfigurationError: the object's class is not registered.

        .. versionadded:: 0.1
        """
        hidden = NOTHING if context is None else Hidden(context)
        del context
        request = await self._request(obj, slug, extra_data, expires_in, key_generator_kwargs, hidden, by)
        mode = InsertMode.REPLACE if replace else InsertMode.ADD
        return self._with_keys(await self._issue(request, mode, using))

    async def deactivate_and_create(
        self,
        obj: object,
        slug: str | None = None,
        extra_data: object = None,
        deactivate_old_tokens: bool = True,
        expiration_in_minutes: Lifetime | Unset = DEFAULT,
        key_generator_kwargs: Mapping[str, Any] | None = None,
        *,
        context: Context | None = None,
        by: By | None = None,
        using: object = None,
    ) -> IssuedToken:
        """:meth:`issue` under the name and with the arguments of the Django app that vtoken grew out of.

        Example::

            token = await manager.deactivate_and_create(ada, "password-reset")

        Args:
            obj: as in :meth:`issue`.
            slug: as in :meth:`issue`.
            extra_data: as in :meth:`issue`.
            deactivate_old_tokens: ``replace`` of :meth:`issue`.
            expiration_in_minutes: ``expires_in`` of :meth:`issue`.
            key_generator_kwargs: as in :meth:`issue`.
            context: as in :meth:`issue`.
            by: as in :meth:`issue`.
            using: as in :meth:`issue`.

        Raises: as in :meth:`issue`.
        """
        hidden = NOTHING if context is None else Hidden(context)
        del context
        request = await self._request(
            obj, slug, extra_data, expiration_in_minutes, key_generator_kwargs, hidden, by
        )
        mode = InsertMode.REPLACE if deactivate_old_tokens else InsertMode.ADD
        return self._with_keys(await self._issue(request, mode, using))

    @asynccontextmanager
    async def issuing(
        self,
        obj: object,
        slug: str | None = None,
        *,
        extra_data: object = None,
        replace: bool = True,
        expires_in: Lifetime | Unset = DEFAULT,
        key_generator_kwargs: Mapping[str, Any] | None = None,
        context: Context | None = None,
        by: By | None = None,
    ) -> AsyncGenerator[IssuedToken]:
        """Issue a token and send it inside the block.

        An exception ends the new token and gives the policy's cooldown back, so that people can ask again at
        once; the other limits stay spent. A cancellation ends the token and gives nothing back: the provider
        may have sent the message all the same, and a dropped connection must not buy messages.

        Example::

            async with manager.issuing(phone, "sms-login") as token:
                await sms_provider.send(phone.number, f"Your code is {token.key}")

        Args: as in :meth:`issue`.

        Raises: as in :meth:`issue`, on entry.

        .. versionadded:: 0.1
        """
        hidden = NOTHING if context is None else Hidden(context)
        del context
        request = await self._request(obj, slug, extra_data, expires_in, key_generator_kwargs, hidden, by)
        made = await self._issue(request, InsertMode.REPLACE if replace else InsertMode.ADD, None)
        try:
            yield self._with_keys(made)
        except BaseException as error:
            has_failed = isinstance(error, Exception) and request.policy.cooldown
            refunds = made.charges[:1] if has_failed else ()  # the cooldown's comes first
            await to_the_end(partial(self._take_back, made, refunds))
            raise

    async def _take_back(self, made: Issued, refunds: tuple[Charge, ...]) -> None:
        """End a token that could not be sent. The block's own exception matters more than what fails here."""
        try:
            with self._opening.calls() as store:
                await store.deactivate(Match(id=made.stored.id), self._now())
                if refunds:
                    await store.refund(refunds)
        except BackendError as error:
            logger.warning("a token that was not sent could not be ended: %r", error)

    async def _take_back_all(self, issued: Iterable[Issued]) -> None:
        """End tokens of ``issue_many`` that nobody was given, as if they had never been asked for."""
        for made in issued:
            await self._take_back(made, made.charges)

    async def issue_many(
        self,
        subjects: Iterable[object] | AsyncIterable[object],
        slug: str | None = None,
        *,
        batch: str | None = None,
        extra_data: object = None,
        replace: bool = True,
        expires_in: Lifetime | Unset = DEFAULT,
        key_generator_kwargs: Mapping[str, Any] | None = None,
        context: Context | None = None,
        by: By | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> AsyncGenerator[VerificationToken]:
        """Issue a token for each of many objects, in bounded memory and grouped writes.

        With ``batch``, the batch and the object name each token: the same call again, after a crash or beside
        the first, creates nothing twice, charges nothing twice, and yields the same keys.

        Example::

            async for token in manager.issue_many(addresses, "invitation", batch="spring-26"):
                await outbox.put(token.object_id, token.key)

        Args:
            subjects: the objects, an iterable or async iterable of any length.
            slug: as in :meth:`issue`.
            batch: 1 to 128 bytes; needs a policy with ``key_storage="derived"``, because a key that was
                stored but not yet handed out must be had again. Run a batch again only while its tokens are
                kept (``purge(keep=...)``): the store knows a token that was purged no more. Keep every secret
                that it had among ``previous_secrets``.
            extra_data: as in :meth:`issue`, for each of them.
            replace: as in :meth:`issue`; False does not go with ``batch``.
            expires_in: as in :meth:`issue`.
            key_generator_kwargs: as in :meth:`issue`.
            context: as in :meth:`issue`.
            by: as in :meth:`issue`.
            progress: is told after each group how many tokens were yielded or are about to be.

        Yields:
            The tokens in the order of the objects, each an :class:`IssuedToken`, except those that an earlier
            run of the batch created and that are over: they come with ``key=None``.

        Raises:
            ConfigurationError: ``batch`` without derived keys; or an earlier run of it had a secret that is
                not configured any more, or keys of another form, so that its tokens would not be recognised.
            CooldownActive: at the first object that is over a limit. A later call goes on from there: with
                ``batch``, what was issued for later objects is found again; without, it was ended, and its
                limits were given back.
            Exception: else as in :meth:`issue`.

        .. versionadded:: 0.1
        """
        hidden = NOTHING if context is None else Hidden(context)
        del context
        policy = self.policies.of(_slug_text(slug))
        if batch is not None:
            inputs.check_text("batch", batch, _BATCH_BYTES)
            if policy.storage != "derived":
                raise ConfigurationError(
                    f"batch needs a policy with key_storage='derived' for the slug {slug!r}, so that a run"
                    " that was interrupted can have its keys again"
                )
            if not replace:
                raise InvalidInput("the tokens of a batch replace older ones: leave out replace=False")
        mode = InsertMode.ONCE if batch is not None else InsertMode.REPLACE if replace else InsertMode.ADD

        async def one(obj: object) -> Issued:
            request = await self._request(obj, slug, extra_data, expires_in, key_generator_kwargs, hidden, by)
            return await self._issue(request._replace(batch=batch), mode, None)

        if batch is not None:
            with self._opening.calls() as store:
                await self._issuer.begin_batch(store, batch, _slug_text(slug), policy)
        done = 0
        async with aclosing(_groups(subjects, _AT_ONCE, self.content_types.resolve)) as groups:
            async for group in groups:
                results: dict[int, Issued | Exception] = {}
                try:
                    await _all_of(one, group, results)
                    failed = [place for place, made in results.items() if isinstance(made, Exception)]
                    done += min(failed, default=len(group))
                    if progress is not None:
                        progress(done)
                    for place in range(len(group)):
                        made = results.pop(place)
                        if isinstance(made, Exception):
                            raise made
                        yield loaded(made.stored) if made.key is None else self._with_keys(made)
                finally:
                    rest = [made for made in results.values() if isinstance(made, Issued)]
                    if rest and batch is None:
                        await to_the_end(partial(self._take_back_all, rest))

    async def pretend(
        self,
        obj: object,
        slug: str | None = None,
        *,
        extra_data: object = None,
        replace: bool = True,
        expires_in: Lifetime | Unset = DEFAULT,
        key_generator_kwargs: Mapping[str, Any] | None = None,
        context: Context | None = None,
        by: By | None = None,
    ) -> None:
        """Do for somebody who does not exist what :meth:`issue` does, so that nobody can tell the difference.

        It meets the same checks, limits, errors, writes and time, and leaves nothing that is ever valid,
        active or counted as such, and nothing at all after a purge. :meth:`status` answers for it as for a
        real one (OWASP Forgot Password Cheat Sheet: "Return a consistent message for both existent and
        non-existent accounts").

        Example::

            user = await find_user(address)
            if user is None:
                await manager.pretend(Subject("auth.user", address), "password-reset")
            else:
                send_mail(user, await manager.issue(user, "password-reset"))

        Args: as in :meth:`issue`.

        Raises: as in :meth:`issue`.

        .. versionadded:: 0.1
        """
        hidden = NOTHING if context is None else Hidden(context)
        del context, replace
        request = await self._request(obj, slug, extra_data, expires_in, key_generator_kwargs, hidden, by)
        try:
            with self._opening.calls() as store:
                await self._issuer.pretend(store, request, self._limiter)
                if self._hooks and request.policy.is_capped:
                    await self._locked_until(store, request)  # which issue() asks for its event
        except CooldownActive as error:
            await self._tell_limited(request, error)
            raise
        if self._hooks:
            await self._hooks.tell("pretended", content_type=request.content_type, slug=slug)

    async def get_active_or_create(
        self,
        obj: object,
        slug: str | None = None,
        extra_data: object = None,
        expiration_in_minutes: Lifetime | Unset = DEFAULT,
        key_generator_kwargs: Mapping[str, Any] | None = None,
        *,
        context: Context | None = None,
        by: By | None = None,
        at_least: Duration = timedelta(0),
    ) -> VerificationToken:
        """The newest valid token of an object, slug and context, or a new one; concurrent callers get the
        same.

        A token that was there already has ``key=None`` unless its policy says ``key_storage="derived"`` (or
        ``"plain"``), because only a digest is stored. An answer that carries a key again counts toward the
        policy's limits for issuing, because it will be sent again; where they are spent, it comes without the
        key. Check for None before you mail it.

        Example::

            token = await manager.get_active_or_create(team, "invitation")
            if token.key is not None:
                send_mail(ada, f"https://example.org/join?key={token.key}")

        Args:
            obj: as in :meth:`issue`, like the next four, which are for the new token.
            slug: as in :meth:`issue`.
            extra_data: as in :meth:`issue`.
            expiration_in_minutes: ``expires_in`` of :meth:`issue`.
            key_generator_kwargs: as in :meth:`issue`.
            context: as in :meth:`issue`.
            by: as in :meth:`issue`.
            at_least: a token that lives for less than this is replaced; of a pair, the shorter-lived of its
                two keys decides. At most the new token's lifetime.

        Raises: as in :meth:`issue`.
        """
        hidden = NOTHING if context is None else Hidden(context)
        del context
        request = await self._request(
            obj, slug, extra_data, expiration_in_minutes, key_generator_kwargs, hidden, by
        )
        least = inputs.duration("at_least", at_least, least=timedelta(0))
        if any(life is not None and least > life for life in (request.lifetime, request.code_lifetime)):
            raise InvalidInput("at_least must be no longer than the lifetime of a new token and its keys")
        try:
            with self._opening.calls() as store:
                made = await self._issuer.get_or_issue(store, request, least)
                if made.is_new:
                    if self._hooks:
                        # Under derived or plain keys another caller may have been given the key already.
                        keeps = request.policy.storage != "digest"
                        await self._tell_issued(store, request, made, keeps=keeps)
                    return self._with_keys(made)
                now = self._now()
                key, code = reveal(self._keyring, request.policy, made.stored, at=now)
                if key is None and code is None:
                    return loaded(made.stored)
                if request.spends.spends:
                    spending = await store.spend(request.spends.spends, now)
                    if spending.full is not None:
                        return loaded_without_keys(made.stored)
        except CooldownActive as error:
            await self._tell_limited(request, error)
            raise
        if self._hooks:
            await self._tell_of("revealed", made.stored)
        return loaded(
            made.stored,
            key=None if key is None else key.text(),
            code=None if code is None else code.text(),
        )

    async def reveal(self, token: VerificationToken) -> IssuedToken | None:
        """The key and the code of a derived token again: for an outbox that holds no secret, or a second
        channel.

        The first time is free. Each further time counts toward the policy's limits for issuing, except
        those by a dimension that only a request has, such as an address.

        Example::

            token = await manager.get(job.token_id)
            fresh = token and await manager.reveal(token)
            if fresh is not None:
                send_mail(job.address, fresh.key)

        Args:
            token: a token of this store, by whose ``id`` it is looked up.

        Returns:
            The token with its keys; None where it is over, or its secret is not among the settings' any more.

        Raises:
            ConfigurationError: its policy does not say ``key_storage="derived"``.
            CooldownActive: the limits are spent.

        .. versionadded:: 0.1
        """
        token_id = _token_id(token)
        with self._opening.calls() as store:
            found = await store.find(Match(id=token_id), 1)
            if not found:
                return None
            stored = found[0]
            policy = self.policies.of(stored.slug)
            if policy.storage != "derived":
                raise ConfigurationError(
                    f"the keys of the slug {stored.slug!r} cannot be had again: its policy must say"
                    " key_storage='derived'"
                )
            now = self._now()
            key, code = reveal(self._keyring, policy, stored, at=now)
            if not is_valid(stored, now) or key is None:
                return None
            await self._charge_reveal(store, policy, stored, now)
        if self._hooks:
            await self._tell_of("revealed", stored)
        return issued(stored, key.text(), None if code is None else code.text())

    async def _charge_reveal(
        self, store: TokenBackend, policy: ResolvedPolicy, stored: StoredToken, now: int
    ) -> None:
        subject = stored.content_type, stored.object_id
        first = self._limiter.first_reveal(*subject, stored.id, stored.expires_at - now)
        if (await store.spend((first,), now)).full is None:
            return
        spends = self._limiter.issues(policy, stored.slug, *subject, stored.context, {}, lenient=True)
        spending = await store.spend(spends.spends, now)
        if spending.full is not None:
            raise CooldownActive(seconds(spending.until - now), full_limit(spends, spending))

    async def generate_key(
        self, generator: KeyGenerator | str | None = None, *args: Any, **kwargs: Any
    ) -> str:
        """Draw a link key that no stored token has.

        Example::

            key = await manager.generate_key(length=64)

        Args:
            generator: a callable or its import path; left out, the settings' default.
            *args: for the generator.
            **kwargs: for the generator.

        Raises:
            KeyGenerationError: ``Settings.max_key_iterations`` draws yielded only keys that are taken.
            InvalidInput: the generator returned no text of 1 to 512 bytes.
        """
        policy = self._default_policy
        draw = policy.generator if generator is None else load_generator(generator)
        kwargs = {**(policy.generator_kwargs if generator is None and not args else {}), **kwargs}
        with self._opening.calls() as store:
            for _ in range(self.settings.max_key_iterations):
                key = drawn_key(draw(*args, **kwargs))
                if not await store.find(Match(digests=self._keyring.links(key.text()).digests), 1):
                    return key.text()
        raise KeyGenerationError(f"{self.settings.max_key_iterations} draws yielded only keys that are taken")

    async def _request(
        self,
        obj: object,
        slug: str | None,
        extra_data: object,
        expires_in: Lifetime | Unset,
        key_generator_kwargs: Mapping[str, Any] | None,
        context: Hidden,
        by: By | None,
    ) -> IssueRequest:
        """Check the arguments of issuing, and put them together."""
        content_type, object_id = self.content_types.resolve(obj)
        if object_id is None:
            raise InvalidInput("a new token belongs to one object: pass the object, not its class")
        slug_text = _slug_text(slug)
        policy = self.policies.of(slug_text)
        lifetime = (
            policy.expiration
            if isinstance(expires_in, Unset)
            else inputs.lifetime("the token's lifetime", expires_in)
        )
        generator, kwargs = check_call(policy, lifetime, key_generator_kwargs)
        bound_to = b""
        if policy.needs_context or context is not NOTHING:
            bound_to = await self._bound_at_issue(policy, context, object_id)
        return _new_request(
            IssueRequest,
            content_type=content_type,
            object_id=object_id,
            slug=slug_text,
            policy=policy,
            extra_data=None if extra_data is None else inputs.dump_json(extra_data),
            lifetime=lifetime,
            code_lifetime=policy.code_expiration if policy.kind == "pair" else lifetime,
            generator=generator,
            generator_kwargs=kwargs,
            context=bound_to,
            spends=self._limiter.issues(policy, slug_text, content_type, object_id, bound_to, checked_by(by)),
        )

    async def _bound_at_issue(self, policy: ResolvedPolicy, context: Hidden, object_id: str) -> bytes:
        given = context.reveal() is not None
        if not policy.needs_context:
            if given:
                raise InvalidInput(_CONTEXT_NOT_HEEDED)
            return b""
        digest = await bound(context, object_id) if given else context_digest("")
        if digest == context_digest(""):
            raise InvalidInput("context must be given and not be empty: the policy binds tokens to one")
        return digest

    async def _issue(self, request: IssueRequest, mode: InsertMode, using: object) -> Issued:
        try:
            with self._opening.calls() as store:
                target, is_in_transaction = store, using is not None
                if is_in_transaction:
                    target = store.within(using)
                keeps = is_in_transaction or request.batch is not None
                made = await self._issuer.issue(target, request, mode, keeps=keeps)
                if self._hooks and made.is_new:
                    await self._tell_issued(
                        store, request, made, in_transaction=is_in_transaction, keeps=keeps
                    )
        except CooldownActive as error:
            await self._tell_limited(request, error)
            raise
        return made

    async def _tell_issued(
        self,
        store: TokenBackend,
        request: IssueRequest,
        made: Issued,
        *,
        in_transaction: bool = False,
        keeps: bool = False,
    ) -> None:
        """Tell the hooks of a new token. Where this is cancelled, nobody will ever have its key: it ends,
        unless ``keeps`` says that the key can be had again, or that somebody else decides about the token."""
        policy = request.policy
        try:
            locked_until: int | None = None
            if policy.is_capped and not in_transaction:
                locked_until = await self._locked_until(store, request)
            await self._hooks.tell(
                "issued",
                content_type=request.content_type,
                object_id=request.object_id,
                slug=request.slug or None,
                token_id=made.stored.id,
                channel=policy.channel,
                batch=request.batch,
                attempts_reset_at=None if locked_until is None else inputs.from_milliseconds(locked_until),
                in_transaction=in_transaction,
                is_test_code=(request.content_type, request.object_id) in policy.test_codes,
            )
        except BaseException:
            if not keeps:
                await to_the_end(partial(self._take_back, made, ()))
            raise

    async def _locked_until(self, store: TokenBackend, request: IssueRequest) -> int | None:
        """Until when the object's attempts are spent, or None: the new token cannot be used before. Limits by
        a dimension of the call are left out: who asks for a code need not be who presents it."""
        now = self._now()
        subject = request.content_type, request.object_id
        spends = self._limiter.attempts(request.policy, request.slug, *subject, {}, lenient=True)
        try:
            states = await store.budgets(tuple(spend.budget for spend in spends.spends))
        except BackendError as error:  # the token is issued, whatever fails here
            logger.warning("the attempts of an object could not be read: %r", error)
            return None
        until = allowed_at(states, spends, now)
        return until if until > now else None

    def _with_keys(self, made: Issued) -> IssuedToken:
        assert made.key is not None  # noqa: S101  # it is new, or was found with its key
        return issued(made.stored, made.key.text(), None if made.code is None else made.code.text())

    async def _tell_limited(self, request: IssueRequest, error: CooldownActive) -> None:
        if self._hooks:
            await self._hooks.tell(
                "limited",
                content_type=request.content_type,
                object_id=request.object_id,
                slug=request.slug or None,
                limit=None if error.limit is None else error.limit.name,
                channel=request.policy.channel,
            )

    # Checked ------------------------------------------------------------------------------------

    async def exists_valid(
        self,
        obj: object,
        slug: str | Wildcard | None = ANY,
        key: str | Wildcard = ANY,
        *,
        context: Context | None = None,
        by: By | None = None,
    ) -> bool:
        """Say whether there is such a valid token. Consumes nothing.

        Example::

            if await manager.exists_valid(ada, "password-reset"):
                page = "We have sent you a link already."

        Args:
            obj: the object, or its class or ``Subject(content_type)`` for any object.
            slug: left out, any; None, tokens without one.
            key: left out, any. With any slug, a key matches link tokens only. ``""`` is a wrong key.
            context: what the token was bound to, where the policy asks for it.
            by: as in :meth:`issue`, for the limits of attempts.

        Raises:
            TooManyAttempts: a key was given and a limit for attempts is full; a wrong one counts as in
                :meth:`verify`.
            InvalidInput: ``key=None``, so that a missing form field can't pass as "any".
        """
        presented, hidden = Hidden(key), NOTHING if context is None else Hidden(context)
        any_key = key is ANY
        del key, context
        if any_key:
            return await self._has_free(obj, slug, hidden)
        asked = self._check_presented(obj, slug, presented, hidden)
        if by is not None or asked.policy.is_guarded:
            await self._complete(asked, hidden, by)
        try:
            stored, _ = await self._redeemer.present(asked, None)
        except TooManyAttempts:
            raise
        except InvalidToken:
            return False
        if self._hooks:
            await self._tell_of("verified", stored)
        return True

    async def _has_free(self, obj: object, slug: str | Wildcard | None, context: Hidden) -> bool:
        content_type, object_id = self.content_types.resolve(obj)
        wanted = Match(content_type=content_type, object_id=object_id)
        if isinstance(slug, Wildcard):
            if context.reveal() is not None:
                raise InvalidInput(
                    "context goes with a slug, whose policy asks for it: with any slug, leave it out"
                )
        else:
            slug_text = _slug_text(slug)
            policy = self.policies.of(slug_text)
            if context.reveal() is not None and not policy.needs_context:
                raise InvalidInput(_CONTEXT_NOT_HEEDED)
            given = await bound(context, object_id) if context.reveal() is not None else None
            wanted = wanted._replace(slug=slug_text, context=given)
        now = self._now()
        async with aclosing(self._pages(wanted._replace(valid_at=now))) as pages:
            async for stored in pages:
                if has_free_use(stored, now) and stored.content_type != PRETENDED:
                    return True
        return False

    async def verify(
        self,
        obj: object,
        slug: str | None,
        key: str,
        *,
        context: Context | None = None,
        by: By | None = None,
    ) -> VerificationToken:
        """Check a key without consuming the token: for the GET request that shows the form.

        Example::

            token = await manager.verify(ada, "password-reset", key)

        Args: as in :meth:`consume`.

        Raises: as in :meth:`consume`.
        """
        presented, hidden = Hidden(key), NOTHING if context is None else Hidden(context)
        del key, context
        asked = self._check_presented(obj, _one_slug(slug), presented, hidden)
        if by is not None or asked.policy.is_guarded:
            await self._complete(asked, hidden, by)
        stored, _ = await self._redeemer.present(asked, None)
        if self._hooks:
            await self._tell_of("verified", stored)
        return loaded(stored)

    async def status(
        self,
        obj: object,
        slug: str | None,
        *,
        context: Context | None = None,
        by: By | None = None,
    ) -> Status:
        """What a screen wants to show: is a token under way, how many attempts are left, when may one ask
        again.

        It consumes, charges and writes nothing.

        Example::

            status = await manager.status(phone, "sms-login")
            left, wait = status.attempts_left, status.can_issue_in
            page = f"{left} attempts left; you may ask for a new code in {wait:.0f} s"

        Args:
            obj: the object, not its class.
            slug: the purpose; None for tokens without one.
            context: as in :meth:`issue`; where the policy asks for one and it is left out, tokens of any
                context are looked at, and the cooldown of none.
            by: as in :meth:`issue`; limits by dimensions that are left out are left out here, too.

        .. versionadded:: 0.1
        """
        hidden = NOTHING if context is None else Hidden(context)
        del context
        content_type, object_id = self.content_types.resolve(obj)
        if object_id is None:
            raise InvalidInput("status is of one object: pass the object, not its class")
        slug_text, dimensions = _slug_text(_one_slug(slug)), checked_by(by)
        policy = self.policies.of(slug_text)
        if hidden.reveal() is not None and not policy.needs_context:
            raise InvalidInput(_CONTEXT_NOT_HEEDED)
        line = Match(
            content_type=content_type,
            object_id=object_id,
            slug=slug_text,
            context=await bound(hidden, object_id) if hidden.reveal() is not None else None,
        )
        now, limiter = self._now(), self._limiter
        attempts = limiter.attempts(policy, slug_text, content_type, object_id, dimensions, lenient=True)
        issues = limiter.issues(
            policy, slug_text, content_type, object_id, line.context or b"", dimensions, lenient=True
        )
        with self._opening.calls() as store:
            newest = await self._newest(store, line, limiter.object_name(content_type, object_id), now)
            budgets = tuple(spend.budget for spend in (*attempts.spends, *issues.spends))
            states = await store.budgets(budgets) if budgets else []
        of_attempts, of_issues = states[: len(attempts.spends)], states[len(attempts.spends) :]
        more_at, can_issue_at = resets_at(of_attempts, attempts, now), allowed_at(of_issues, issues, now)
        return Status(
            has_valid=newest is not None,
            expires_at=None if newest is None else newest.expires_at,
            attempts_left=attempts_left(of_attempts, attempts, now),
            attempts_reset_at=None if more_at is None else inputs.from_milliseconds(more_at),
            can_issue_at=inputs.from_milliseconds(can_issue_at),
            can_issue_in=(can_issue_at - now) / 1000,
            code_expires_at=None if newest is None else newest.code_expires_at,
        )

    async def _newest(
        self, store: TokenBackend, line: Match, pretended_for: bytes, now: int
    ) -> VerificationToken | None:
        """The newest valid token of a line. One that was pretended counts like a real one, and is looked for
        in either case, so that neither the answer nor its time tells them apart."""
        stand_in = line._replace(content_type=PRETENDED, object_id=pretended_for.hex())
        valid = await store.find(line._replace(valid_at=now), _PAGE)
        found = [one for one in valid if has_free_use(one, now)]
        pretended = [one for one in await store.find(stand_in, 1) if one.expires_at >= now]
        return next((loaded(one) for one in found or pretended), None)

    async def filter_active_tokens(
        self, obj: object, slug: str | Wildcard | None = ANY, key: str | Wildcard = ANY
    ) -> AsyncGenerator[VerificationToken]:
        """Iterate over active tokens, expired ones included, newest first, in batches of 100.

        Example::

            async for token in manager.filter_active_tokens(ada):
                print(token.slug, token.expires_at)

        Args: as in :meth:`exists_valid`.

        Raises:
            InvalidInput: a key was given and the policy caps attempts: this method counts none.
        """
        presented = None if key is ANY else Hidden(key)
        del key
        match = await self._active(obj, slug, presented)
        if match is None:
            return
        async with aclosing(self._pages(match._replace(active=True))) as pages:
            async for stored in pages:
                yield loaded(stored)

    async def history(
        self, obj: object, slug: str | Wildcard | None = ANY
    ) -> AsyncGenerator[VerificationToken]:
        """Iterate over every stored token of an object, whatever its state, newest first, in batches of 100.

        Example::

            async for token in manager.history(ada):
                print(token.created_at, token.slug, token.is_active, token.used_at)

        Args:
            obj: the object, not its class.
            slug: left out, any; None, tokens without one.

        Raises:
            InvalidInput: a class was given.

        .. versionadded:: 0.1
        """
        content_type, object_id = self.content_types.resolve(obj)
        if object_id is None:
            raise InvalidInput("history is of one object: pass the object, not its class")
        wanted = None if isinstance(slug, Wildcard) else _slug_text(slug)
        match = Match(content_type=content_type, object_id=object_id, slug=wanted)
        async with aclosing(self._pages(match)) as pages:
            async for stored in pages:
                yield loaded(stored)

    async def _pages(self, match: Match) -> AsyncGenerator[StoredToken]:
        after: str | None = None
        while True:
            with self._opening.calls() as store:
                page = await store.find(match, _PAGE, after)
            for stored in page:
                yield stored
            if len(page) < _PAGE:
                return
            after = page[-1].id

    async def get(self, id: str) -> VerificationToken | None:  # noqa: A002  # the contract's name
        """One token as it is stored now, whatever its state, or None.

        Example::

            token = await manager.get(job.token_id)

        Args:
            id: its public id.
        """
        token_id = inputs.check_text("id", id, inputs.MAX_NAME_BYTES)
        with self._opening.calls() as store:
            found = await store.find(Match(id=token_id), 1)
        return loaded(found[0]) if found and found[0].content_type != PRETENDED else None

    async def content_object(self, token: VerificationToken) -> object | None:
        """The application's object that a token belongs to, by the registered loader; None where it is gone.

        Example::

            token = await manager.consume(User, "password-reset", key)
            user = await manager.content_object(token)

        Raises:
            ConfigurationError: no loader is registered for its content type.
        """
        self._opening.require_open()
        return await self.content_types.loader(token.content_type)(token.object_id)

    # Used ---------------------------------------------------------------------------------------

    async def consume(
        self,
        obj: object,
        slug: str | None,
        key: str,
        *,
        consume_id: str | None = None,
        context: Context | None = None,
        by: By | None = None,
    ) -> VerificationToken:
        """Use a token once; of any number of concurrent callers exactly one gets each of its uses.

        Example::

            try:
                token = await manager.consume(phone, "sms-login", typed, consume_id=form_id)
            except InvalidToken as error:
                page = f"That is not the code. {error.attempts_left} attempts left."

        Args:
            obj: the object, or its class or ``Subject(content_type)`` where a link carries only the key.
                Codes need the object.
            slug: the purpose; None for tokens without one. A token for one purpose never passes for another.
            key: what was presented. White space, dashes and the like don't matter in codes.
            consume_id: the caller's name for this use, 1 to 128 bytes, unguessable and per person: the same
                one again gets the same answer for 15 minutes, which settles an :class:`OutcomeUnknown`.
            context: what the token was bound to, where the policy asks for it.
            by: as in :meth:`issue`, for the limits of attempts.

        Returns:
            The token after its use; ``is_replay`` is True where this ``consume_id`` had been counted before.

        Raises:
            InvalidToken: wrong, expired, used or unknown; ``reason`` is for the server side only.
            TokenBusy: all of its uses, or the one of this ``consume_id``, are held by ``redeem`` blocks.
            TooManyAttempts: a limit for attempts is full; nothing was compared.
            OutcomeUnknown: the connection broke; the use may have been counted.
        """
        presented, hidden = Hidden(key), NOTHING if context is None else Hidden(context)
        use_name = NOTHING if consume_id is None else Hidden(consume_id)
        del key, context, consume_id
        name = "" if use_name is NOTHING else _use_id(use_name)
        asked = self._check_presented(obj, _one_slug(slug), presented, hidden)
        if by is not None or asked.policy.is_guarded:
            await self._complete(asked, hidden, by)
        resets = asked.spends.of_the_object if asked.spends.spends else ()
        use = _new_use(Use, at=self._now(), use_id=name, resets=resets)
        stored, is_replay = await self._redeemer.present(asked, use)
        if not is_replay:
            await self._redeemer.after_use(asked, stored)
        return loaded(stored, is_replay=is_replay)

    def redeem(
        self,
        obj: object,
        slug: str | None,
        key: str,
        *,
        lease: Duration = "60s",
        wait: Duration = timedelta(0),
        consume_id: str | None = None,
        context: Context | None = None,
        by: By | None = None,
    ) -> AbstractAsyncContextManager[VerificationToken, None]:
        """Use a token around a side effect.

        One use is held on entry, counted when the block ends normally, and given back when it ends with an
        exception or a cancellation. After a crash it is free again when the lease ends: a crash after the
        side effect and before the use was counted means that the side effect can happen again (at least
        once). Inside the block the application may deactivate the person's tokens, this one included, or
        issue the next one. Do so last: what that has ended stays ended if the block fails afterwards.

        Example::

            async with manager.redeem(User, "password-reset", key) as token:
                await set_password(token.object_id, new_password)

        Args:
            obj: as in :meth:`consume`.
            slug: as in :meth:`consume`.
            key: as in :meth:`consume`.
            lease: how long the block may take, 1 millisecond to a day.
            wait: how long to wait, in real time, where all uses are held by others.
            consume_id: as in :meth:`consume`. A block cannot be skipped: where this id was counted before,
                entry raises :class:`AlreadyUsed`, for which the application shows success. While another
                block with this id runs, its use counts as held, however many others are free.
            context: as in :meth:`consume`.
            by: as in :meth:`consume`.

        Raises:
            InvalidInput: by the call itself, not on entry, where an argument is out of its range.
            InvalidToken, TooManyAttempts: on entry, as in :meth:`consume`.
            TokenBusy: on entry: all uses, or the one of this ``consume_id``, are held for longer than
                ``wait``.
            AlreadyUsed: on entry: see ``consume_id``.
            LeaseLost: on exit: the lease ended before the block did, or the token was deactivated or erased
                from outside.
            BackendClosed: on exit: the manager was closed meanwhile, and the use was not counted.
        """
        presented, hidden = Hidden(key), NOTHING if context is None else Hidden(context)
        use_name = NOTHING if consume_id is None else Hidden(consume_id)
        del key, context, consume_id
        checked = self._check_presented(obj, _one_slug(slug), presented, hidden)
        self._spends_of(checked, checked_by(by))  # to raise now for a dimension that `by` lacks
        name = "" if use_name is NOTHING else _use_id(use_name)
        length = inputs.duration("lease", lease, most=timedelta(milliseconds=MAX_LEASE))
        patience = inputs.duration("wait", wait, least=timedelta(0))

        async def asked() -> PresentedKey:
            await self._complete(checked, hidden, by)
            return checked

        return Redemption(self._redeemer, asked, length, patience, name)

    async def mark_used(self, token: VerificationToken, *, using: object) -> None:
        """Inside a ``redeem`` block: count the use in the application's own transaction, so that both happen
        or neither. The transaction must have ended when the block ends.

        Example::

            async with manager.redeem(ada, "password-reset", key) as token, session.begin():
                user.password = new
                await manager.mark_used(token, using=session)

        Args:
            token: what ``redeem`` gave to the block.
            using: a connection or session of the store's own kind, with a transaction under way. None where
                there is none, on another store say: the use is counted when the block ends, as always.

        Raises:
            InvalidInput: the token is not held by a block of this manager, it was marked already, or the
                handle does not fit.
            LeaseLost: the lease ended, or the token was deactivated or erased from outside.

        .. versionadded:: 0.1
        """
        block = self._opening.block_of(token)
        if not isinstance(block, Redemption):
            raise InvalidInput("mark_used takes the token of a redeem block, inside that block")
        if using is not None:
            await block.mark_used(using)

    async def _complete(self, asked: PresentedKey, context: Hidden, by: By | None) -> None:
        """Find out what a wrong key costs, and the context that the key comes with: neither is asked of a key
        whose policy has no limits for attempts and no context."""
        asked.spends = self._spends_of(asked, checked_by(by))
        if asked.needs_context:
            asked.match = asked.match._replace(context=await self._bound_when_presented(asked, context))

    def _check_presented(
        self, obj: object, slug: str | Wildcard | None, key: Hidden, context: Hidden
    ) -> PresentedKey:
        subject = self.content_types.resolve(obj)
        if slug is ANY:
            policy, slug_text = self._default_policy, None
        else:
            slug_text = _slug_text(slug)
            policy = self.policies.of(slug_text)
        if context.reveal() is not None and not policy.needs_context:
            raise InvalidInput(_CONTEXT_NOT_HEEDED)
        return presented_key(self._keyring, policy, subject, slug_text, key)

    def _spends_of(self, asked: PresentedKey, by: By) -> Spends:
        """What a wrong key costs. Of a pair, only what has the shape of a code costs an attempt."""
        match = asked.match
        if match.content_type is None or match.slug is None:
            return NOTHING_TO_SPEND
        if asked.policy.kind == "pair" and not asked.is_code:
            return NOTHING_TO_SPEND
        return self._limiter.attempts(asked.policy, match.slug, match.content_type, match.object_id, by)

    async def _bound_when_presented(self, asked: PresentedKey, context: Hidden) -> bytes:
        object_id = asked.match.object_id
        if object_id is None and callable(context.reveal()) and asked.match.digests:
            # The context is computed for the object, which the key alone has to find.
            with self._opening.calls() as store:
                found = await store.find(asked.match, 1)
            object_id = found[0].object_id if found else None
        return await bound(context, object_id)

    # Ended --------------------------------------------------------------------------------------

    async def deactivate(
        self,
        obj: object,
        slug: str | Wildcard | None = ANY,
        key: str | Wildcard = ANY,
        *,
        all_objects: bool = False,
        using: object = None,
    ) -> int:
        """End an object's active tokens, and return how many there were.

        Holds on them are revoked, except those of the ``redeem`` blocks that this call runs in: such a block
        may end all of a person's tokens and still count its own use. Let it be the last thing in the block:
        what it has ended, the block's own token too, stays ended if the block fails afterwards.

        By a key that a newer token has taken over, the key alone ends.

        Example::

            await manager.deactivate(ada, "password-reset")

        Args:
            obj: the object, one token of it (by its id), or with ``all_objects`` its class.
            slug: left out, any; None, tokens without one.
            key: left out, any; with a key, the token that it fits.
            all_objects: True, to end the tokens of every object of a class.
            using: as in :meth:`issue`.

        Raises:
            InvalidInput: a key was given and the policy caps attempts: this method counts none. Or a class
                was given without ``all_objects=True``.
        """
        presented = None if key is ANY else Hidden(key)
        del key
        if isinstance(obj, VerificationToken):
            if presented is not None or not isinstance(slug, Wildcard):
                raise InvalidInput("a token is named by its id alone: leave out slug and key")
            match: Match | None = Match(id=_token_id(obj))
        else:
            if presented is None and not all_objects and self.content_types.resolve(obj)[1] is None:
                raise InvalidInput("pass all_objects=True to end the tokens of every object of a class")
            match = await self._active(obj, slug, presented)
        with self._opening.calls() as store:
            if match is None:
                return 0
            target = store if using is None else store.within(using)
            count = await target.deactivate(match, self._now(), own_holds(self._redeemer))
        if count and self._hooks:
            await self._hooks.tell(
                "deactivated",
                content_type=match.content_type,
                object_id=match.object_id,
                slug=match.slug or None,
                token_id=match.id,
                count=count,
                in_transaction=using is not None,
            )
        return count

    async def _active(self, obj: object, slug: str | Wildcard | None, key: Hidden | None) -> Match | None:
        """The tokens that ``deactivate`` and ``filter_active_tokens`` are about; None for a key that cannot
        be any token's."""
        if key is None:
            content_type, object_id = self.content_types.resolve(obj)
            wanted = None if isinstance(slug, Wildcard) else _slug_text(slug)
            return Match(content_type=content_type, object_id=object_id, slug=wanted)
        subject = self.content_types.resolve(obj)
        slug_text = None if isinstance(slug, Wildcard) else _slug_text(slug)
        policy = self._default_policy if slug_text is None else self.policies.get(slug_text)
        asked = presented_key(self._keyring, policy, subject, slug_text, key)
        if policy.is_capped and (policy.kind != "pair" or asked.is_code):
            raise InvalidInput("the policy caps attempts: use verify() or consume(), which count them")
        if not asked.match.digests:
            return None
        if slug_text is not None:
            return asked.match
        # With any slug, a key says nothing about tokens whose slug caps attempts.
        with self._opening.calls() as store:
            found = await store.find(asked.match, len(asked.match.digests))
        free = {key.digest for one in found if not self.policies.get(one.slug).is_capped for key in one.keys}
        digests = tuple(digest for digest in asked.match.digests if digest in free)
        return asked.match._replace(digests=digests) if digests else None

    async def save(self, token: VerificationToken, *, using: object = None) -> None:
        """Store a token's ``extra_data`` and nothing else: a stale copy can never revive a used token.

        Example::

            token = await manager.get(job.token_id)
            if token is not None:
                token.set_extra_data({"sent": True})
                await manager.save(token)

        Args:
            token: the token, changed by :meth:`VerificationToken.set_extra_data`.
            using: as in :meth:`issue`.

        Raises:
            InvalidToken: it is not stored any more.
            InvalidInput: ``extra_data`` is no JSON text; see :meth:`VerificationToken.set_extra_data`.
        """
        text = None if token.extra_data is None else inputs.check_json_text(token.extra_data)
        match = Match(id=_token_id(token))
        with self._opening.calls() as store:
            target = store if using is None else store.within(using)
            if await target.update(match, SetExtraData(text)) is None:
                raise InvalidToken("unknown")

    async def erase(self, obj: object, *, using: object = None) -> int:
        """Delete every stored token of an object, whatever its state, and its budgets (data protection).

        Example::

            await manager.erase(ada)

        Args:
            obj: the object, not its class.
            using: as in :meth:`issue`.

        Returns:
            How many tokens were deleted.

        Raises:
            InvalidInput: a class was given.

        .. versionadded:: 0.1
        """
        content_type, object_id = self._one_object(obj, "erase")
        name = self._limiter.object_name(content_type, object_id)
        with self._opening.calls() as store:
            target = store if using is None else store.within(using)
            count = await target.erase(content_type, object_id, name)
            await target.erase(PRETENDED, name.hex(), name)
        if self._hooks:
            await self._hooks.tell(
                "erased",
                content_type=content_type,
                object_id=object_id,
                count=count,
                in_transaction=using is not None,
            )
        return count

    async def reset_limits(self, obj: object, slug: str | Wildcard | None = ANY) -> int:
        """Start an object's budgets afresh: support unlocks an account. Budgets that it shares with others,
        by address say, stay as they are.

        Example::

            await manager.reset_limits(phone, "sms-login")

        Args:
            obj: the object, not its class.
            slug: left out, those of every purpose; None, of tokens without one.

        Returns:
            How many budgets were forgotten.

        Raises:
            InvalidInput: a class was given.

        .. versionadded:: 0.1
        """
        content_type, object_id = self._one_object(obj, "reset_limits")
        name = self._limiter.object_name(content_type, object_id)
        if isinstance(slug, Wildcard):
            with self._opening.calls() as store:
                return await store.reset(name, None)
        slug_text = _slug_text(slug)
        policy = self.policies.get(slug_text)
        # Cooldowns belong to a context: those that the object's stored tokens tell of are known.
        contexts = {b""}
        match = Match(content_type=content_type, object_id=object_id, slug=slug_text)
        async for stored in self._pages(match):
            contexts.add(stored.context)
        subject = content_type, object_id
        budgets = {
            spend.budget.name
            for spends in (
                self._limiter.attempts_of_object(policy, slug_text, *subject),
                *(
                    self._limiter.issues(policy, slug_text, *subject, context, {}, lenient=True)
                    for context in contexts
                ),
            )
            for spend in spends.spends
            if spend.budget.object == name
        }
        with self._opening.calls() as store:
            return await store.reset(name, tuple(sorted(budgets)))

    async def purge(
        self,
        batch_size: int = 1000,
        keep: Duration = timedelta(0),
        progress: Callable[[int], object] | None = None,
    ) -> int:
        """Delete the tokens that were inactive or expired when it began, and budgets that are over. Held
        tokens stay.

        Example::

            deleted = await manager.purge(keep="1d")

        Used tokens that are kept for a while (``keep``) let a second use be told from a wrong key.

        Args:
            batch_size: how many tokens are deleted in one step, beside which live traffic goes on.
            keep: tokens that ended no longer ago than this stay, 0 or more.
            progress: is told after each step how many tokens were deleted so far.

        Returns:
            How many tokens were deleted.
        """
        limit = inputs.check_count("batch_size", batch_size)
        now = self._now()
        before = now - inputs.duration("keep", keep, least=timedelta(0))
        with self._opening.calls() as store:
            total = await purge_in_steps(store, before, now, limit, progress)
        if total.tokens and self._hooks:
            await self._hooks.tell("purged", count=total.tokens)
        return total.tokens

    def sweeper(
        self,
        every: Duration = timedelta(minutes=10),
        keep: Duration = timedelta(hours=24),
        batch_size: int = 1000,
        *,
        sleep: Callable[[float], Awaitable[object]] = anyio.sleep,
    ) -> Sweeper:
        """Purge in the background while a block runs.

        Example::

            async with manager, manager.sweeper(every="10m"):
                await serve()

        The first purge is a random part of ``every`` after entry. One that fails is logged and tried again.

        Args: ``every`` is 1 millisecond or more, ``sleep`` waits for seconds; else as in :meth:`purge`.
        """
        self._opening.require_open()
        return Sweeper(self.purge, every, keep, batch_size, sleep)

    async def stats(self) -> Stats:
        """Count the tokens, in all and by slug.

        Example::

            stats = await manager.stats()
            print(stats.active, stats.by_slug["password-reset"].used)
        """
        with self._opening.calls() as store:
            rows = await store.count(self._now())
        return Stats(
            total=sum(row.total for row in rows),
            active=sum(row.active for row in rows),
            expired=sum(row.expired for row in rows),
            used=sum(row.used for row in rows),
            by_slug={
                row.slug or None: SlugStats(
                    total=row.total, active=row.active, expired=row.expired, used=row.used
                )
                for row in rows
            },
        )

    async def ping(self) -> float:
        """Ask the store for an answer: for health probes.

        Example::

            healthy = await manager.ping() < 1.0

        Returns:
            The seconds that it took.

        Raises:
            BackendError: the store does not answer, or what it needs is gone.

        .. versionadded:: 0.1
        """
        started = perf_counter()
        with self._opening.calls() as store:
            await store.ping()
        return perf_counter() - started

    # Helpers ------------------------------------------------------------------------------------

    def _now(self) -> int:
        """The injected clock's time, in milliseconds."""
        if self._clock is utc_now:  # the real clock, read without a datetime in between
            return time_ns() // 1_000_000
        try:
            now = inputs.milliseconds(self._clock())
        except InvalidInput as error:
            problem = str(error)
        else:
            if now >= 0:
                return now
            problem = "it shows a time before 1970"  # what it would store, no backend would take for a token
        raise ConfigurationError(f"the manager's clock: {problem}")

    def _one_object(self, obj: object, method: str) -> tuple[str, str]:
        content_type, object_id = self.content_types.resolve(obj)
        if object_id is None:
            raise InvalidInput(f"{method} is for one object: pass the object, not its class")
        return content_type, object_id

    async def _tell_of(self, name: EventName, stored: StoredToken) -> None:
        await self._hooks.tell(
            name,
            content_type=stored.content_type,
            object_id=stored.object_id,
            slug=stored.slug or None,
            token_id=stored.id,
        )


# Calling these classes packs the named arguments into a dict first, which doubles the cost.
_new_request: Final = IssueRequest.__new__
_new_use: Final = Use.__new__
_CONTEXT_NOT_HEEDED: Final = (
    "context was given, but the slug's policy does not ask for one, so that it would not be heeded: give the"
    " policy context='required'"
)


def _slug_text(slug: object) -> str:
    """The stored form of a slug: ``""`` for none, which no real slug is."""
    return _known_slug(slug) if type(slug) is str else _checked_slug(slug)


def _checked_slug(slug: object) -> str:
    return "" if slug is None else inputs.check_text("slug", slug, inputs.MAX_NAME_BYTES)


_known_slug = lru_cache(1024)(_checked_slug)
"""The same for a ``str``, of which there are few."""


def _one_slug(slug: str | Wildcard | None) -> str | None:
    """Refuse ``ANY`` where a token for one purpose must not pass for another."""
    if isinstance(slug, Wildcard):
        raise InvalidInput("slug must be given: a token for one purpose never passes for another")
    return slug


def _use_id(consume_id: Hidden) -> str:
    """What is stored of a ``consume_id``, which is as secret as a key while it is answered again."""
    problem = inputs.text_problem(consume_id.reveal(), inputs.MAX_CONSUME_ID_BYTES)
    if problem is not None:
        raise InvalidInput(f"consume_id {problem}")
    return use_id(consume_id.text())


def _token_id(token: VerificationToken) -> str:
    if not isinstance(token, VerificationToken):
        raise InvalidInput(f"token must be a VerificationToken, not {type(token).__name__}")
    return inputs.check_text("id", token.id, inputs.MAX_NAME_BYTES)


async def _groups(
    subjects: Iterable[object] | AsyncIterable[object],
    size: int,
    name_of: Callable[[object], tuple[str, str | None]],
) -> AsyncGenerator[list[object]]:
    """The objects in groups, without reading further ahead than one group. An object that comes twice opens a
    new group, so that its second token replaces the first and not the other way round."""
    group: list[object] = []
    names: set[object] = set()
    async with aclosing(_each(subjects)) as each:
        async for subject in each:
            try:
                name: object = name_of(subject)
            except VTokenError:
                name = object()  # refused in its turn, after the tokens of those before it
            if len(group) == size or name in names:
                yield group
                group, names = [], set()
            group.append(subject)
            names.add(name)
    if group:
        yield group


async def _each(subjects: Iterable[object] | AsyncIterable[object]) -> AsyncGenerator[object]:
    if isinstance(subjects, AsyncIterable):
        async for subject in subjects:
            yield subject
    else:
        for subject in subjects:
            yield subject


async def _all_of(
    one: Callable[[object], Awaitable[Issued]],
    group: list[object],
    results: dict[int, Issued | Exception],
) -> None:
    """Issue for each object of a group, and write down what became of it, by its place. Where this is
    cancelled, what was issued by then is written down all the same."""

    async def run(place: int) -> None:
        try:
            results[place] = await one(group[place])
        except Exception as error:  # told to the caller in the order of the objects
            results[place] = error

    async with anyio.create_task_group() as tasks:
        for place in range(len(group)):
            tasks.start_soon(run, place)
