"""The life of a token, top to bottom: issued, checked, used, ended.

The manager owns the clock, the policies and the keys, and composes the backend's atomic steps. It
keeps nothing about any token, so any number of managers may work on one store.
"""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Self

import anyio

from vtoken import inputs
from vtoken.backend import InsertMode, Match, SetExtraData, TokenBackend, Use
from vtoken.config import Configuration, create_backend
from vtoken.errors import (
    ConfigurationError,
    InvalidToken,
    KeyGenerationError,
    TooManyAttempts,
)
from vtoken.guess import make_guess
from vtoken.hooks import Hook, Hooks, LazyHook
from vtoken.inputs import ANY, DEFAULT, Unset, Wildcard
from vtoken.issue import drawn_key
from vtoken.keys import NOTHING, Hidden, KeyGenerator
from vtoken.lifecycle import CLOSED, Lifecycle, checked_use_id, one_slug, slug_text
from vtoken.loaded import loaded
from vtoken.policy import Settings, TokenPolicy, load_generator
from vtoken.redact import without_locals
from vtoken.stats import SlugStats, Stats
from vtoken.subject import ContentTypes
from vtoken.sweeper import Sweeper, purge_in_steps
from vtoken.token import IssuedToken, VerificationToken

_PAGE = 100


def utc_now() -> datetime:
    """The real clock."""
    return datetime.now(UTC)


class TokenManager:
    """Issues and redeems tokens, on any backend.

    Args:
        backend: where tokens are kept. Two managers may share one backend object.
        settings: what holds for every slug.
        policies: what holds for one slug each; without one: single use, no cap, no cooldown.
        content_types: the application's classes that tokens may belong to.
        clock: returns an aware ``datetime``; the only clock there is.
        hooks: callables, sync or async, that hear of each :class:`TokenEvent`; import paths and
            :class:`LazyHook` too. One that fails is logged and changes nothing.

    Raises:
        ConfigurationError: two policies of one slug, a code or derived keys without a secret, a
            generator or hook that cannot be imported.

    Use it as ``async with manager:``. Every other method raises :class:`BackendClosed` before opening and
    after closing, :class:`InvalidInput` for an argument out of its range, before anything is stored, and
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
                "a backend is wanted: use create_backend(url), or TokenManager.from_url(url)"
            )
        self.backend = backend
        self.settings = Settings() if settings is None else settings
        self.content_types = ContentTypes() if content_types is None else content_types
        inputs.check_kind("settings", self.settings, Settings)
        inputs.check_kind("content_types", self.content_types, ContentTypes)
        inputs.check_kind("clock", clock, Callable)
        policies, hooks = inputs.several("policies", policies, TokenPolicy), inputs.several("hooks", hooks)
        self._life = Lifecycle(self.settings, policies, self.content_types, clock, Hooks(hooks, clock))
        self._opening = threading.Lock()
        self._pid = 0

    @classmethod
    @without_locals(ConfigurationError)
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
        said = {"settings": found.settings, "policies": found.policies, "hooks": found.hooks}
        return cls.from_url(found.url, **(said | keywords))

    async def open(self) -> None:
        """Open the backend, unless this manager has opened it already, in this process.

        Raises:
            BackendError: the store cannot be used; the subclass and the message say why.
        """
        async with self._one_at_a_time():
            if self._life.store is CLOSED or self._pid != os.getpid():
                await self.backend.open()
                self._life.store, self._pid = self.backend, os.getpid()

    async def aclose(self) -> None:
        """Close what this manager opened. May be called again, and before :meth:`open`."""
        async with self._one_at_a_time():
            if self._life.store is not CLOSED:
                self._life.store = CLOSED
                await self.backend.close()

    @asynccontextmanager
    async def _one_at_a_time(self) -> AsyncGenerator[None]:
        while not self._opening.acquire(blocking=False):  # noqa: ASYNC110  # who waits may be in other loops
            await anyio.sleep(0.005)
        try:
            yield
        finally:
            self._opening.release()

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
        bound_to = Hidden(context) if context is not None else NOTHING
        del context
        order = self._life.order(obj, slug, extra_data, expiration_in_minutes, key_generator_kwargs, bound_to)
        mode = InsertMode.REPLACE if deactivate_old_tokens else InsertMode.ADD
        token = await self._life.issue(order, mode)
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
        bound_to = Hidden(context) if context is not None else NOTHING
        del context
        order = self._life.order(obj, slug, extra_data, expiration_in_minutes, key_generator_kwargs, bound_to)
        return await self._life.get_or_issue(order)

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
            InvalidInput: the generator returned no text of 1 to 512 bytes.
        """
        rules = self._life.default_rules
        draw = rules.generator if generator is None else load_generator(generator)
        kwargs = {**(rules.generator_kwargs if generator is None and not args else {}), **kwargs}
        for _ in range(self.settings.max_key_iterations):
            key = drawn_key(draw(*args, **kwargs))
            guess = make_guess(self._life.keyring, rules, ("", None), None, key, NOTHING)
            if not await self._life.store.find(Match(digests=guess.digests), 1):
                return key.text()
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
            TooManyAttempts: a key was given and the policy's budget is spent; a wrong one counts as
                in :meth:`verify`.
            InvalidInput: ``key=None``, so that a missing form field can't pass as "any".
        """
        presented, bound_to = Hidden(key), Hidden(context) if context is not None else NOTHING
        del context
        if key is ANY:
            content_type, object_id = self.content_types.resolve(obj)
            wanted = None if slug is ANY else slug_text(slug)
            match = Match(None, None, content_type, object_id, wanted, False, self._life.now())
            return bool(await self._life.store.find(match, 1))
        del key
        guess = self._life.guess(obj, slug, presented, bound_to)
        try:
            await self._life.check(guess)
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
        presented, bound_to = Hidden(key), Hidden(context) if context is not None else NOTHING
        del key, context
        return loaded(await self._life.check(self._life.guess(obj, one_slug(slug), presented, bound_to)))

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
        match = await self._life.active(obj, slug, None if any_key else presented)
        after: tuple[int, str] | None = None
        while True:
            page = await self._life.store.find(match, _PAGE, after)
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
        found = await self._life.store.find(Match(id=inputs.check_text("id", id, inputs.MAX_NAME_BYTES)), 1)
        return loaded(found[0]) if found else None

    async def content_object(self, token: VerificationToken) -> object | None:
        """The application's object that a token belongs to, by the registered loader; None where it is gone.

        Raises:
            ConfigurationError: no loader is registered for its content type.
        """
        self._life.require_open()
        return await self.content_types.loader(token.content_type)(token.object_id)

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
            obj: the object, or its class or ``Subject(content_type)`` where a link carries only the key.
                Codes need the object.
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
        presented, bound_to = Hidden(key), Hidden(context) if context is not None else NOTHING
        del key, context
        guess = self._life.guess(obj, one_slug(slug), presented, bound_to)
        use = "" if consume_id is None else checked_use_id(consume_id)
        now = self._life.now()
        charge = await self._life.charge(guess, now) if guess.is_charged else None
        stored, is_new = await self._life.take(guess, now, Use(now, use), charge)
        if is_new:
            await self._life.settle(guess, stored)
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

        The token is leased on entry, marked used when the block ends normally, and given back when it ends
        with an exception or a cancellation. After a crash it is free again when the lease ends: a crash after
        the side effect and before the mark means that the side effect can happen again (at least once).

        Args:
            obj: as in :meth:`consume`.
            slug: as in :meth:`consume`.
            key: as in :meth:`consume`.
            lease: how long the block may take, 1 millisecond or more.
            context: as in :meth:`consume`.

        Raises:
            InvalidInput: by the call itself, not on entry; but for a lease that ends after the year 9999.
            InvalidToken, TooManyAttempts: on entry, as in :meth:`consume`.
            LeaseLost: on exit: the lease ended before the block did, or the token was deactivated meanwhile.
        """
        presented, bound_to = Hidden(key), Hidden(context) if context is not None else NOTHING
        del key, context
        guess = self._life.guess(obj, one_slug(slug), presented, bound_to)
        return self._life.redeem(guess, inputs.check_duration("lease", lease))

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
        match = await self._life.active(obj, slug, None if any_key else presented)
        count = await self._life.store.deactivate(match, self._life.now())
        if count:
            await self._life.hooks.tell("deactivated", match, count=count)
        return count

    async def save(self, token: VerificationToken) -> None:
        """Store a token's ``extra_data`` and nothing else: a stale copy can never revive a used token.

        Raises:
            InvalidToken: it is not stored any more.
            InvalidInput: ``extra_data`` is no JSON text; see :meth:`VerificationToken.set_extra_data`.
        """
        text = None if token.extra_data is None else inputs.check_json_text(token.extra_data)
        match = Match(id=inputs.check_text("id", token.id, inputs.MAX_NAME_BYTES))
        if await self._life.store.update(match, SetExtraData(text)) is None:
            raise InvalidToken("unknown")

    async def purge(
        self,
        batch_size: int = 1000,
        keep: timedelta = timedelta(0),
        progress: Callable[[int], object] | None = None,
    ) -> int:
        """Delete the tokens that were inactive or expired when it began; leased tokens stay.

        Used tokens that are kept for a while (``keep``) let a second use be told from a guess.

        Args:
            batch_size: how many tokens are deleted in one step, beside which live traffic goes on.
            keep: tokens that ended no longer ago than this stay, 0 or more.
            progress: is told after each step how many were deleted so far.

        Returns:
            How many were deleted.
        """
        limit = inputs.check_count("batch_size", batch_size)
        now = self._life.now()
        before = now - inputs.check_duration("keep", keep, least=timedelta(0))
        total = await purge_in_steps(self._life.store, before, now, limit, progress)
        if total:
            await self._life.hooks.tell("purged", Match(), count=total)
        return total

    def sweeper(
        self,
        every: timedelta = timedelta(minutes=10),
        keep: timedelta = timedelta(hours=24),
        batch_size: int = 1000,
        *,
        sleep: Callable[[float], Awaitable[object]] = anyio.sleep,
    ) -> Sweeper:
        """Purge in the background while a block runs: ``async with manager.sweeper():``.

        The first purge is a random part of ``every`` after entry. One that fails is logged and tried again.

        Args: ``every`` is 1 millisecond or more, ``sleep`` waits for seconds; else as in :meth:`purge`.
        """
        self._life.require_open()
        return Sweeper(self.purge, every, keep, batch_size, sleep)

    async def stats(self) -> Stats:
        """Count the tokens, in all and by slug."""
        rows = await self._life.store.count(self._life.now())
        by_slug = {row.slug or None: SlugStats(*row[1:]) for row in rows}
        total, active, expired, used = (
            sum(numbers) for numbers in zip((0,) * 4, *(r[1:] for r in rows), strict=True)
        )
        return Stats(total=total, active=active, expired=expired, used=used, by_slug=by_slug)
