"""From a presented key to its use.

1. :class:`PresentedKey` is what somebody typed or clicked, worked into what the store is asked for: what the
   policy says about its form, its digests under every secret, its context, and what a wrong key costs.
2. :meth:`Redeemer.present` asks the store, in one step, to compare the key and to use the token, to hold it,
   or only to look, and turns the answer into a token or an error.
3. :class:`Redemption` is the two-phase use of ``redeem``: a hold on entry, a use or a release on exit.

A key that was used already is refused with the reason "used" and costs no attempt, as step 4 of
:meth:`TokenBackend.present` says; the hooks hear "reused". With the ``consume_id`` of that use, the first
answer is given again for :data:`REPLAY_WINDOW`.
"""

from __future__ import annotations

import asyncio
import inspect
import secrets
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from time import monotonic
from typing import Any, Final, TypeGuard

import anyio

from vtoken import inputs
from vtoken.backend import (
    ForgetKey,
    Hold,
    Match,
    Outcome,
    Presented,
    Release,
    StoredToken,
    TokenBackend,
    Use,
    UseHeld,
    holds_in_the_way,
    key_of,
    refusal,
)
from vtoken.errors import (
    AlreadyUsed,
    BackendError,
    BackendUnavailable,
    InvalidInput,
    InvalidToken,
    LeaseLost,
    Reason,
    TokenBusy,
    TooManyAttempts,
)
from vtoken.hooks import EventName, Hooks, logger
from vtoken.keys import (
    Candidates,
    Hidden,
    Keyring,
    code_shape_ok,
    context_digest,
    has_checksum,
    is_possible_key,
    normalise_code,
    normalise_link,
)
from vtoken.limits import NOTHING_TO_SPEND, full_limit, seconds
from vtoken.opening import Opening, current_task, to_the_end
from vtoken.policy import ResolvedPolicy
from vtoken.token import VerificationToken, loaded, loaded_without_keys

_Bound = str | Mapping[str, str]
Context = _Bound | Callable[[str], Awaitable[_Bound] | _Bound]
"""What a token is bound to: a text, several named texts, or a callable that is given the object's id. It has
to be async, but for ``SyncTokenManager``."""

REPLAY_WINDOW: Final = 15 * 60 * 1000
"""Milliseconds, from a use, in which its ``consume_id`` gets the same answer again."""
MAX_LEASE: Final = 24 * 60 * 60 * 1000
_RIGHT: Final = Outcome.RIGHT
_new_match: Final = Match.__new__
"""Calling the class packs the named arguments into a dict first, which doubles the cost."""
_NO_CANDIDATES: Final = Candidates((), ())
_LONGEST_PAUSE: Final = 0.25
"""Seconds between two tries of a ``redeem`` that waits for a hold."""


class PresentedKey:
    """A key that somebody presents for an object and a slug, as digests only.

    Args:
        match: the tokens that the key fits, whatever their state. It names neither an object where only the
            class is known, nor a slug where any will do, nor a context where the key is not bound to one.
        policy: of the slug.
        candidates: the digests that the key may be stored under, the current secret's first. Empty where it
            cannot be one of ours: a typing error, a wrong checksum, or what no form should send.
    """

    __slots__ = ("candidates", "match", "policy", "spends")

    def __init__(self, match: Match, policy: ResolvedPolicy, candidates: Candidates) -> None:
        self.match = match
        self.policy = policy
        self.candidates = candidates
        self.spends = NOTHING_TO_SPEND
        """What a wrong key costs."""

    def __repr__(self) -> str:
        return "<PresentedKey>"

    @property
    def is_code(self) -> bool:
        """Whether it was presented as a code, and not as a link."""
        return self.match.kind == "code"

    @property
    def needs_context(self) -> bool:
        """Whether the key is good only together with the context that it was bound to."""
        return self.policy.code_needs_context if self.is_code else self.policy.needs_context


def presented_key(
    keyring: Keyring,
    policy: ResolvedPolicy,
    subject: tuple[str, str | None],
    slug: str | None,
    key: Hidden,
) -> PresentedKey:
    """Work a presented key into digests. Its context and what it costs come later.

    A key of a pair is a code if it has the shape of one, and else a link key.

    Raises:
        InvalidInput: the key is no text, or a code comes without its object.
    """
    content_type, object_id = subject
    if not isinstance(key.reveal(), str):
        kind = type(key.reveal()).__name__
        raise InvalidInput(f"key must be a str, not {kind}: a form field that is missing is no key")
    if object_id is None and policy.kind == "code":
        raise InvalidInput("a code is checked for one object: pass the object, not its class")
    kind, candidates = "link" if policy.has_link else "code", _NO_CANDIDATES
    # What looks like a code but comes with the class alone was presented as a link, by a visitor.
    code = _as_code(policy, key) if policy.has_code and object_id is not None else None
    if code is not None:
        kind = "code"
        candidates = keyring.codes(content_type, object_id or "", slug or "", code.text())
    elif kind == "link":
        candidates = _of_link(keyring, policy, key)
    match = _new_match(
        Match,
        digests=candidates.digests,
        kind=kind,
        content_type=content_type,
        object_id=object_id,
        slug=slug,
    )
    return PresentedKey(match, policy, candidates)


def _as_code(policy: ResolvedPolicy, key: Hidden) -> Hidden | None:
    """What was typed, as a code of this policy; None where it does not have the shape of one."""
    if not is_possible_key(key.text()):
        return None
    code = Hidden(normalise_code(key.text(), policy.code_chars))
    return code if code_shape_ok(code.text(), policy.code_length, policy.code_chars) else None


def _of_link(keyring: Keyring, policy: ResolvedPolicy, key: Hidden) -> Candidates:
    """What may be stored of a link key. Nothing here raises, so that no traceback shows the text."""
    text, prefix = key.text(), policy.prefix
    if not is_possible_key(text):
        return _NO_CANDIDATES
    link = normalise_link(text)
    # The prefix is a shortcut only: a key from before the policy had this prefix is asked of the store.
    if not link or (prefix and link.startswith(prefix) and not has_checksum(prefix, link)):
        return _NO_CANDIDATES
    return keyring.links(link)


async def bound(context: Hidden, object_id: str | None) -> bytes:
    """The digest of the context that a key comes with. Where there is none, or an empty one, it is that of
    the empty text, which no token is bound to.

    Raises:
        InvalidInput: it is neither a text, nor a mapping of texts, nor an async callable that returns one.
    """
    value: Any = context.reveal()
    if callable(value):
        if not _is_async(value):  # not called: it may wait, and the event loop with it
            raise InvalidInput("context: a callable must be async (but for SyncTokenManager)")
        # Where no token was found, there is no object that the context could be computed for.
        value = None if object_id is None else await value(object_id)
    if value is None or value == "":
        return context_digest("")
    problem = inputs.context_problem(value)
    if problem is not None:
        del value
        raise InvalidInput(f"context {problem}")
    if isinstance(value, Mapping) and not any(value.values()):  # a form whose fields are all empty
        return context_digest("")
    return context_digest(value)


def _is_async(function: object) -> TypeGuard[Callable[[str], Awaitable[Any]]]:
    call = getattr(function, "__call__", None)  # noqa: B004  # of an object whose method is async
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


class Redeemer:
    """What is done with a presented key.

    Args:
        opening: whether the manager is open, and its store.
        hooks: hear what happens.
        now: the manager's clock, in milliseconds.
        policy_of: the policy of a slug in its stored form.
    """

    def __init__(
        self,
        opening: Opening,
        hooks: Hooks,
        now: Callable[[], int],
        policy_of: Callable[[str], ResolvedPolicy],
    ) -> None:
        self.opening = opening
        self.hooks = hooks
        self.now = now
        self._policy_of = policy_of

    async def present(
        self, key: PresentedKey, change: Use | Hold | None, *, will_wait: bool = False
    ) -> tuple[StoredToken, bool]:
        """Have the store compare a key and make a change; the token, and whether this was a replay.

        Where the caller will wait and try again, the hooks are not told that all uses are held.

        Raises:
            InvalidToken: the key was refused.
            TooManyAttempts: a limit is full; nothing was compared.
        """
        with self.opening.calls() as store:
            match = key.match
            if not match.digests:  # a typing error: refused without a charge and without asking the store
                await self._tell("failed", key, reason="unknown")
                raise InvalidToken("unknown")
            now = self.now() if change is None or isinstance(change, Hold) else change.at
            if match.slug is None:
                answer = await self._among_any_slug(store, match, now)
            else:
                answer = await store.present(match, change, now, key.spends.spends)
            stored = answer.token
            if answer.outcome is _RIGHT and stored is not None:
                if self._is_genuine(key, stored):
                    if change is None and _has_plain_key(key, stored):
                        await store.update(Match(id=stored.id), ForgetKey())
                    return stored, False
                if isinstance(change, Hold):
                    await store.update(Match(id=stored.id), Release(change.hold_id))
                raise await self._refused(key, None, now, answer, change)
            if answer.outcome is Outcome.REPLAYED and stored is not None:
                return await self._replay(key, change, stored, answer.used_at, now), True
            if answer.outcome is Outcome.LIMITED:
                limit = full_limit(key.spends, answer.spending)
                await self._tell("capped", key, limit=limit.name if limit else None)
                raise TooManyAttempts(seconds(answer.spending.until - now), limit)
            raise await self._refused(key, stored, now, answer, change, will_wait=will_wait)

    async def _among_any_slug(self, store: TokenBackend, match: Match, now: int) -> Presented:
        """With any slug, a key says nothing about tokens whose slug caps attempts or asks for a context."""
        found = await store.find(match, len(match.digests or ()))
        free = [stored for stored in found if not self._policy_of(stored.slug).is_guarded]
        right = [stored for stored in free if refusal(stored, key_of(stored, match), now) is None]
        if right:
            return Presented(Outcome.RIGHT, right[0])
        return Presented(Outcome.REFUSED, free[0] if free else None)

    def _is_genuine(self, key: PresentedKey, stored: StoredToken) -> bool:
        """Whether the stored key says of its digest what is true of it. It does not where somebody who can
        write to the store has replaced a digest: without the secret, by one that needs none."""
        own = key_of(stored, key.match)
        if own is None:
            return False
        if key.candidates.fit(own):
            return True
        logger.warning("the stored digest of token %s was not made as its row says: refused", stored.id)
        return False

    async def _replay(
        self, key: PresentedKey, change: Use | Hold | None, stored: StoredToken, used_at: int, now: int
    ) -> StoredToken:
        if now - used_at > REPLAY_WINDOW:
            await self._tell("reused", key, token_id=stored.id, reason="used")
            raise InvalidToken("used", token=None if key.is_code else loaded_without_keys(stored))
        await self._tell("replayed", key, token_id=stored.id)
        if isinstance(change, Hold):
            raise AlreadyUsed(loaded_without_keys(stored))
        return stored

    async def _refused(
        self,
        key: PresentedKey,
        stored: StoredToken | None,
        now: int,
        answer: Presented,
        change: Use | Hold | None,
        *,
        will_wait: bool = False,
    ) -> InvalidToken:
        """The error for a key that was refused."""
        left = answer.spending.left
        if stored is None:
            await self._tell("failed", key, reason="unknown")
            return InvalidToken("unknown", attempts_left=left)
        own = key_of(stored, key.match)
        use_id = "" if change is None else change.use_id
        reason: Reason = refusal(stored, own, now, use_id) or "unknown"
        in_the_way = holds_in_the_way(stored, own, now, use_id)
        is_its_own = use_id != "" and any(hold.use_id == use_id for hold in in_the_way)
        if reason == "inactive" and is_its_own and not key.spends.spends:
            # Ended inside the block of this very use, which is about to be counted: a second click. (Where
            # each try costs an attempt, nobody may wait for that.)
            reason = "leased"
        events: dict[Reason, EventName] = {"used": "reused", "leased": "busy"}
        if reason != "leased" or not will_wait:
            await self._tell(events.get(reason, "failed"), key, token_id=stored.id, reason=reason)
        if reason == "leased":
            free_at = min((hold.until for hold in in_the_way), default=now)
            return TokenBusy(seconds(free_at - now))
        shown = None if key.is_code or not self._is_genuine(key, stored) else loaded_without_keys(stored)
        return InvalidToken(reason, attempts_left=left, token=shown)

    async def _tell(
        self,
        name: EventName,
        key: PresentedKey,
        *,
        token_id: str | None = None,
        reason: Reason | None = None,
        limit: str | None = None,
    ) -> None:
        if self.hooks:
            await self.hooks.tell(
                name,
                content_type=key.match.content_type,
                object_id=key.match.object_id,
                slug=key.match.slug or None,
                token_id=token_id,
                reason=reason,
                limit=limit,
            )

    async def after_use(self, key: PresentedKey, stored: StoredToken) -> None:
        """What follows a use. The use stands, whatever fails here."""
        if _has_plain_key(key, stored):
            try:
                with self.opening.calls() as store:
                    await store.update(Match(id=stored.id), ForgetKey())
            except BackendError as error:
                logger.warning("a token was used, but its plain key could not be cleared: %r", error)
        if self.hooks:
            await self.hooks.tell(
                "consumed",
                content_type=stored.content_type,
                object_id=stored.object_id,
                slug=stored.slug or None,
                token_id=stored.id,
            )


def _has_plain_key(key: PresentedKey, stored: StoredToken) -> bool:
    """Whether a row is from the time of ``key_storage="plain"``: its plaintext can go, the digests stay."""
    if key.policy.storage == "plain":
        return False
    for own in stored.keys:  # noqa: SIM110  # a generator costs more than the check itself, on every request
        if own.plain_key:
            return True
    return False


_entered: ContextVar[tuple[Redemption, ...]] = ContextVar("vtoken_redemptions", default=())
"""The ``redeem`` blocks that the running task is in, those of the tasks that started it included."""


def own_holds(redeemer: Redeemer) -> tuple[str, ...]:
    """The holds of the ``redeem`` blocks of a manager that this code runs in: ``deactivate`` spares them."""
    return tuple(one.hold_id for one in _entered.get() if one.redeemer is redeemer and one.stored is not None)


class Redemption:
    """What ``TokenManager.redeem`` returns: ``async with`` holds one use while its block runs."""

    def __init__(
        self,
        redeemer: Redeemer,
        make_key: Callable[[], Awaitable[PresentedKey]],
        lease: int,
        wait: int,
        use_id: str,
    ) -> None:
        self.redeemer = redeemer
        self.hold_id = secrets.token_hex(8)  # the fencing id: nobody else's hold can pass for this one
        self.stored: StoredToken | None = None
        self.token: VerificationToken | None = None
        self.task: asyncio.Task[Any] | None = None
        self._make_key = make_key
        self._lease = lease
        self._wait = wait
        self._use_id = use_id
        self._key: PresentedKey | None = None
        self._marked: tuple[object, int] | None = None

    def __repr__(self) -> str:
        return "<Redemption>"

    @property
    def is_being_cancelled(self) -> bool:
        """Whether the task of the block was cancelled and is about to give its hold back."""
        return self.task is not None and not self.task.done() and self.task.cancelling() > 0

    async def __aenter__(self) -> VerificationToken:
        if self._key is not None:
            raise RuntimeError("a redemption is for one block: ask the manager for another one")
        opening = self.redeemer.opening
        opening.require_open()
        self._key = await self._make_key()
        self.task = current_task()
        opening.enter(self)
        try:
            self.stored = await self._hold(self._key)
            self.token = loaded(self.stored, own_holds=frozenset({self.hold_id}))
        except (InvalidToken, BackendUnavailable):
            opening.leave(self)
            raise  # no hold was taken; and a store that is away, or waits for us, need not be asked again
        except BaseException:
            await self._give_back()
            opening.leave(self)
            raise
        _entered.set((*_entered.get(), self))
        return self.token

    async def _hold(self, key: PresentedKey) -> StoredToken:
        """Take the hold; wait for it, in real time, where all uses are held."""
        give_up_at = monotonic() + self._wait / 1000
        pause = 0.01
        while True:
            rest = give_up_at - monotonic()
            change = Hold(hold_id=self.hold_id, until=self.redeemer.now() + self._lease, use_id=self._use_id)
            try:
                stored, _ = await self.redeemer.present(key, change, will_wait=rest > 0)
            except TokenBusy as busy:
                if rest <= 0:
                    raise
                pause = min(pause * 2, _LONGEST_PAUSE, rest, max(busy.retry_after, 0.01))
            else:
                return stored
            await anyio.sleep(pause)

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _entered.set(tuple(one for one in _entered.get() if one is not self))
        try:
            if self._marked is not None:
                await self._after_transaction(has_failed=kind is not None)
            elif kind is not None:
                await self._give_back()
            else:
                await self._use()
        finally:
            self.stored = None
            self.redeemer.opening.leave(self)

    async def _use(self) -> None:
        stored, key = self.stored, self._key
        assert stored is not None  # noqa: S101  # __aenter__ has set both
        assert key is not None  # noqa: S101  # likewise
        try:
            with self.redeemer.opening.calls() as store:
                used = await store.update(Match(id=stored.id), self._use_held())
                if used is not None:
                    await self.redeemer.after_use(key, used)
        except BaseException:
            await self._give_back()
            raise
        if used is None:
            raise LeaseLost(
                "the hold ended, or the token was deactivated from outside, before the block was done"
            )

    def _use_held(self) -> UseHeld:
        assert self._key is not None  # noqa: S101  # __aenter__ has set it
        return UseHeld(
            hold_id=self.hold_id,
            at=self.redeemer.now(),
            use_id=self._use_id,
            resets=self._key.spends.of_the_object,
        )

    async def mark_used(self, using: object) -> None:
        """Count the use on a transaction of the application's own. One that was rolled back, after a conflict
        say, may be followed by another one, in which the use is marked again.

        Raises:
            LeaseLost: the hold is gone.
            InvalidInput: it was marked in this transaction already, or the handle does not fit.
        """
        assert self.stored is not None  # noqa: S101  # the manager has seen to it
        match, change, before = Match(id=self.stored.id), self._use_held(), self._marked
        with self.redeemer.opening.calls() as store:
            target = store.within(using)
            self._marked = using, change.at  # before the write, which may never return
            try:
                if await target.update(match, change) is not None:
                    return
            except InvalidInput:
                self._marked = before  # nothing was written, and the hold can be given back
                raise
            self._marked = before
            found = await target.find(match, 1)
        if before is not None and found and found[0].used_at >= before[1]:
            raise InvalidInput("this token was marked as used already: once in a block")
        raise LeaseLost(
            "the hold ended, or the token was deactivated from outside, before it was marked as used"
        )

    async def _after_transaction(self, *, has_failed: bool) -> None:
        """Find out what became of the transaction that the use was marked in, by a read that waits for
        nobody. Where the block has failed, its own exception is raised whatever is found here."""
        if not has_failed:
            return await self._conclude_transaction()
        try:
            await to_the_end(self._conclude_transaction)
        except (BackendError, InvalidInput) as error:
            logger.warning("a redeem block failed after mark_used: %r", error)
        return None

    async def _conclude_transaction(self) -> None:
        stored, key, marked = self.stored, self._key, self._marked
        assert stored is not None  # noqa: S101  # __aenter__ and mark_used have set them
        assert key is not None  # noqa: S101  # likewise
        assert marked is not None  # noqa: S101  # likewise
        using, at = marked
        with self.redeemer.opening.calls() as store:
            found = await store.find(Match(id=stored.id), 1)
            if not found or all(hold.hold_id != self.hold_id for hold in found[0].holds):
                if found and found[0].used_at >= at:
                    await self.redeemer.after_use(key, found[0])
                return
            # The hold is still there: the transaction has not been committed.
            if _is_under_way(store, using):
                raise InvalidInput(
                    "the transaction that marked the token as used is still open: begin it inside the redeem"
                    " block, and commit it or roll it back there"
                )
        await self._give_back()

    async def _give_back(self) -> None:
        """Drop the hold, whatever became of the token and however often this task is cancelled. It never
        revives the token."""
        await to_the_end(self._release)

    async def _release(self) -> None:
        assert self._key is not None  # noqa: S101  # __aenter__ has set it
        match = self._key.match if self.stored is None else Match(id=self.stored.id)
        try:
            with self.redeemer.opening.calls() as store:
                await store.update(match, Release(self.hold_id))
        except BackendError as error:  # the block's own exception matters more
            logger.warning("a hold could not be given back and ends by itself: %r", error)


def _is_under_way(store: TokenBackend, using: object) -> bool:
    """Whether a transaction is open on a handle: else no backend lets itself be used within it."""
    try:
        store.within(using)
    except InvalidInput:
        return False
    return True
