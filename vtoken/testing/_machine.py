"""The state machine of ``vtoken.testing.model``: it needs Hypothesis, so nothing else imports it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from vtoken.backend import NEVER, Match, TokenBackend
from vtoken.errors import InvalidToken, KeyGenerationError, TooManyAttempts, VTokenError
from vtoken.inputs import ANY, DEFAULT, Unset, Wildcard
from vtoken.manager import TokenManager
from vtoken.policy import Settings, TokenPolicy
from vtoken.subject import Subject
from vtoken.testing._bench import Clock
from vtoken.testing._compare import as_seen, as_stored, said
from vtoken.testing._contract import Contract, ModelToken, Presented, newest_first
from vtoken.token import VerificationToken

T = TypeVar("T")

Block = AbstractAsyncContextManager[VerificationToken]
MS: Final = timedelta(milliseconds=1)
OLD, NEW = "old", "new"
KNOWN: Final = {OLD: (OLD,), NEW: (NEW, OLD)}
"""Which secrets the manager of each current one knows."""
SECRETS: Final = {name: f"the {name} secret, made to be 32 bytes long" for name in KNOWN}

POLICIES: Final = (
    TokenPolicy.link(None),
    TokenPolicy.link("reset", prefix="vt_"),
    TokenPolicy.link("invite", max_uses=2, expiration=None),
    TokenPolicy.link("rotate", overlap=timedelta(seconds=30), max_uses=2),
    TokenPolicy.link("mail", cooldown=timedelta(minutes=1), key_storage="derived"),
    TokenPolicy.link("login", context="required"),
    TokenPolicy.link("guarded", max_attempts=2, attempt_window=timedelta(minutes=1)),
    TokenPolicy.code("sms", max_attempts=2, attempt_window=timedelta(minutes=5)),
)
PEOPLE: Final = (Subject("auth.user", "1"), Subject("auth.user", "2"), Subject("shop.order", "1"))
ANYONE: Final = Subject("auth.user")

subjects = st.sampled_from([PEOPLE[0], *PEOPLE])
slugs = st.sampled_from([policy.slug for policy in POLICIES])
near = st.sampled_from([0, 0, 0, 0, 1])
"""How far from the slug that the history is about: what meets no other token shows little."""
secrets = st.sampled_from([NEW, NEW, OLD])
contexts = st.sampled_from(["my browser", "another browser", None])
minutes = st.sampled_from([DEFAULT, DEFAULT, None, 1, 0.5])
fixed_keys = st.sampled_from([None, None, "111111", "222222"])
names = st.sampled_from([None, "first", "second"])
twists = st.sampled_from(["none"] * 12 + ["key", "object", "no object", "slug", "context"])
"""What is wrong about a key that is presented."""
spans = st.sampled_from([timedelta(microseconds=600), MS, *(timedelta(seconds=s) for s in (1, 29, 60, 301))])
leaps = spans | st.sampled_from([timedelta(minutes=11), timedelta(minutes=61), timedelta(days=1, hours=1)])


class Machine(RuleBasedStateMachine):
    """Two managers on one backend, before and after a rotation of secrets, beside the model."""

    tokens: Bundle[ModelToken] = Bundle("tokens")
    leases: Bundle[_Redeeming] = Bundle("leases")

    def __init__(self, new_backend: Callable[[], TokenBackend]) -> None:
        super().__init__()
        self._new_backend = new_backend
        # Off the millisecond, so that rounding shows.
        self._clock = Clock(datetime(2100, 1, 1, microsecond=123_900, tzinfo=UTC))
        self._runner = asyncio.Runner()
        self._model = Contract(POLICIES)
        self._redeeming: list[_Redeeming] = []
        self._numbers = itertools.count()
        self._slug: str | None = None
        self._agreed = True
        backend = new_backend()
        self._managers = {
            name: TokenManager(
                backend,
                Settings(
                    secret=SECRETS[name],
                    previous_secrets=[SECRETS[known] for known in KNOWN[name][1:]],
                    max_key_iterations=2,
                ),
                POLICIES,
                clock=self._clock,
            )
            for name in KNOWN
        }
        for manager in self._managers.values():
            self._run(manager.open())

    @initialize(slug=slugs)
    def choose_the_slug(self, slug: str | None) -> None:
        self._slug = slug

    # Time --------------------------------------------------------------------------------------

    @rule(by=leaps, forwards=st.sampled_from([True, True, False]))
    def move_the_clock(self, by: timedelta, forwards: bool) -> None:
        self._clock.advance(by if forwards else -min(by, timedelta(minutes=11)))

    @rule(token=tokens, ms=st.sampled_from([0, 1]))
    def wait_for_the_expiry(self, token: ModelToken, ms: int) -> None:
        if self._now <= token.expires < NEVER:
            self._clock.set(datetime.fromtimestamp(token.expires / 1000, UTC).replace(microsecond=0))
            self._clock.advance(timedelta(milliseconds=token.expires % 1000 + ms))

    # Issued ------------------------------------------------------------------------------------

    @rule(
        target=tokens,
        secret=secrets,
        subject=subjects,
        distance=near,
        replace=st.sampled_from([True, True, False]),
        lifetime=minutes,
        context=contexts,
        key=fixed_keys,
    )
    def deactivate_and_create(
        self,
        secret: str,
        subject: Subject,
        distance: int,
        replace: bool,
        lifetime: float | Unset | None,
        context: str | None,
        key: str | None,
    ) -> Any:
        slug = self._near(distance)
        key = key if secret == NEW and slug in (None, "sms") else None  # else it would be framed, or derived
        token = self._agree(
            lambda: self._model.issue(
                self._now, subject, slug, secret, context, replace=replace, minutes=lifetime, key=key
            ),
            lambda: self._managers[secret].deactivate_and_create(
                _spelt(subject), slug, None, replace, lifetime, _generating(key), context=context
            ),
        )
        return token or multiple()

    @rule(target=tokens, secret=secrets, subject=subjects, distance=near, lifetime=minutes, context=contexts)
    def get_active_or_create(
        self,
        secret: str,
        subject: Subject,
        distance: int,
        lifetime: float | Unset | None,
        context: str | None,
    ) -> Any:
        slug = self._near(distance)
        known = set(self._model.tokens)
        token = self._agree(
            lambda: self._active_or_new(secret, subject, slug, lifetime, context),
            lambda: self._managers[secret].get_active_or_create(
                _spelt(subject), slug, None, lifetime, context=context
            ),
            shows_key=lambda found: (
                found not in known
                or (found.policy.key_storage == "derived" and found.secret in KNOWN[secret])
            ),
        )
        return token or multiple()

    def _active_or_new(
        self,
        secret: str,
        subject: Subject,
        slug: str | None,
        lifetime: float | Unset | None,
        context: str | None,
    ) -> ModelToken:
        if slug == "login" and context is None:
            return self._model.issue(
                self._now, subject, slug, secret, context, replace=True, minutes=lifetime
            )
        for token in newest_first(self._model.of(subject, slug)):
            if not token.refusal(self._now) and token.context in (None, context):
                return token
        ended = [t for t in self._model.of(subject, slug) if t.is_active]
        token = self._model.issue(self._now, subject, slug, secret, context, replace=False, minutes=lifetime)
        for old in ended:  # expired, leased, of another context: the new token takes their place
            old.end(self._now)
        return token

    # Checked and used --------------------------------------------------------------------------

    @rule(secret=secrets, subject=subjects, distance=near, times=st.integers(1, 4), pause=st.integers(0, 20))
    def guess(self, secret: str, subject: Subject, distance: int, times: int, pause: int) -> None:
        """Wrong guesses, so many seconds apart, whether or not there is a token."""
        p = Presented(KNOWN[secret], subject, self._near(distance), "wrong")
        for _ in range(times):
            self._agree(
                lambda: self._model.verify(self._now, p),
                lambda: self._managers[secret].verify(_spelt(subject), _slug(p), p.key),
            )
            self._clock.advance(timedelta(seconds=pause))

    @rule(secret=secrets, token=tokens, twist=twists)
    def check(self, secret: str, token: ModelToken, twist: str) -> None:
        p, manager = _presented(secret, token, twist), self._managers[secret]
        self._agree(
            lambda: self._model.verify(self._now, p),
            lambda: manager.verify(_spelt(p.subject), _slug(p), p.key, context=p.context),
        )
        for presented in (p, p._replace(slug=ANY)):
            self._agree(
                partial(self._opens, presented),
                partial(manager.exists_valid, _spelt(p.subject), presented.slug, p.key, context=p.context),
            )

    def _opens(self, presented: Presented) -> bool:
        try:
            self._model.verify(self._now, presented)
        except TooManyAttempts:
            raise
        except InvalidToken:
            return False
        return True

    @rule(secret=secrets, token=tokens, twist=twists, name=names)
    def consume(self, secret: str, token: ModelToken, twist: str, name: str | None) -> None:
        p = _presented(secret, token, twist)
        self._agree(
            lambda: self._model.consume(self._now, p, name),
            lambda: self._managers[secret].consume(
                _spelt(p.subject), _slug(p), p.key, consume_id=name, context=p.context
            ),
        )

    @rule(target=leases, secret=secrets, token=tokens, twist=twists, lease=spans.filter(lambda s: s >= MS))
    def begin_to_redeem(self, secret: str, token: ModelToken, twist: str, lease: timedelta) -> Any:
        p = _presented(secret, token, twist)
        manager, name = self._managers[secret], str(next(self._numbers))
        blocks: list[Block] = []

        async def enter() -> VerificationToken:
            blocks.append(manager.redeem(_spelt(p.subject), _slug(p), p.key, lease=lease, context=p.context))
            return await blocks[0].__aenter__()

        until = self._now + lease // MS
        found = self._agree(lambda: self._model.enter(self._now, p, name, until), enter, ours=True)
        if found is None:
            return multiple()
        self._redeeming.append(_Redeeming(blocks[0], found, p, name))
        return self._redeeming[-1]

    @rule(redeeming=consumes(leases), error=st.sampled_from([None, None, ValueError, asyncio.CancelledError]))
    def end_to_redeem(self, redeeming: _Redeeming, error: type[BaseException] | None) -> None:
        self._redeeming.remove(redeeming)
        r = redeeming
        self._agree(
            lambda: self._model.leave(self._now, r.token, r.presented, r.name, done=error is None),
            lambda: r.leave(error),
        )

    # Ended -------------------------------------------------------------------------------------

    @rule(secret=secrets, token=tokens, twist=twists, by_key=st.booleans(), any_slug=st.booleans())
    def deactivate(self, secret: str, token: ModelToken, twist: str, by_key: bool, any_slug: bool) -> None:
        p = _presented(secret, token, twist)
        p = p._replace(slug=ANY) if any_slug else p

        def expected() -> int:
            ended = self._model.active(p if by_key else None, p.subject, p.slug)
            for one in ended:
                one.end(self._now)
            return len(ended)

        key = p.key if by_key else ANY
        self._agree(expected, lambda: self._managers[secret].deactivate(_spelt(p.subject), p.slug, key))

    @rule(secret=secrets, token=tokens, data=st.sampled_from([{}, "é", [1, None]]))
    def save_and_get(self, secret: str, token: ModelToken, data: object) -> None:
        stale = VerificationToken(id=token.id, created_at=self._clock(), content_type="x", object_id="x")
        stale.set_extra_data(data)

        def expected() -> None:
            if token not in self._model.tokens:
                raise InvalidToken("unknown")
            token.extra_data = stale.extra_data

        manager = self._managers[secret]
        self._agree(expected, lambda: manager.save(stale))
        is_there = token in self._model.tokens
        self._agree(lambda: token if is_there else None, lambda: manager.get(token.id))

    @rule(secret=secrets, batch_size=st.sampled_from([10, 1000]), keep=st.just(timedelta(0)) | leaps)
    def purge(self, secret: str, batch_size: int, keep: timedelta) -> None:
        self._agree(
            lambda: self._model.purge(self._now, keep // MS),
            lambda: self._managers[secret].purge(batch_size, keep),
        )

    # Looked at ---------------------------------------------------------------------------------

    @rule(secret=secrets, subject=subjects | st.just(ANYONE), slug=st.just(ANY) | slugs, key=fixed_keys)
    def look(self, secret: str, subject: Subject, slug: str | Wildcard | None, key: str | None) -> None:
        """What changes nothing, all in one step, so that the steps are left for what does."""
        manager = self._managers[secret]
        self._agree(
            lambda: any(not t.refusal(self._now) for t in self._model.of(subject, slug)),
            lambda: manager.exists_valid(_spelt(subject), slug),
        )

        async def listed() -> list[str]:
            return [token.id async for token in manager.filter_active_tokens(_spelt(subject), slug)]

        self._agree(lambda: [token.id for token in self._model.active(None, subject, slug)], listed)
        self._agree(lambda: self._model.stats(self._now), manager.stats)
        if key is not None:
            self._agree(lambda: self._unless_taken(secret, key), lambda: manager.generate_key(lambda: key))

    def _unless_taken(self, secret: str, key: str) -> str:
        for token in self._model.tokens:
            if token.policy.kind == "link" and token.key == key and token.secret in KNOWN[secret]:
                raise KeyGenerationError
        return key

    # Compared ----------------------------------------------------------------------------------

    @invariant()
    def the_store_holds_what_the_model_holds(self) -> None:
        self._compare(self._managers[NEW].backend)

    def _compare(self, backend: TokenBackend) -> None:
        self._agreed = False
        stored = [as_stored(token) for token in self._run(backend.find(Match(), 10_000))]
        modelled = [as_stored(token) for token in newest_first(self._model.tokens)]
        assert stored == modelled, f"the store holds {stored}, the model {modelled}"
        self._agreed = True

    def teardown(self) -> None:
        """What was written is there when the store is opened again."""
        agreed = self._agreed  # else it has failed already
        try:
            while self._redeeming:
                self.end_to_redeem(self._redeeming[-1], ValueError)
            for manager in self._managers.values():
                self._run(manager.aclose())
            again = self._new_backend()
            self._run(again.open())
            try:
                if agreed:
                    self._compare(again)
            finally:
                self._run(again.close())
        finally:
            self._runner.close()

    def _near(self, distance: int) -> str | None:
        order = [policy.slug for policy in POLICIES]
        return order[order.index(self._slug) - distance]

    @property
    def _now(self) -> int:
        return self._clock.milliseconds

    def _run(self, call: Awaitable[T]) -> T:
        return self._runner.get_loop().run_until_complete(call)  # a third of what Runner.run() takes

    def _agree(
        self,
        expected: Callable[[], Any],
        call: Callable[[], Awaitable[Any]],
        *,
        ours: bool = False,
        shows_key: Callable[[ModelToken], bool] = lambda _: False,
    ) -> Any:
        """Do the same to both. They must give the same, or refuse it by the same error.

        Returns:
            What the model gave, None where it refused.
        """
        self._agreed = False
        got = self._run(_attempt(call))
        wanted: Any
        try:
            wanted = expected()
        except VTokenError as error:
            wanted = error
        if isinstance(got, VerificationToken) and isinstance(wanted, ModelToken):
            is_new = not wanted.id
            if is_new:
                wanted.id, wanted.key = got.id, got.key or ""
            key = wanted.key if is_new or shows_key(wanted) else None
            shown = as_seen(got, got.is_valid(self._clock()), got.key)
            meant = as_seen(wanted, ours or not wanted.refusal(self._now), key)
            assert shown == meant, f"the library gave {shown}, the model {meant}"
            return wanted
        assert said(got) == said(wanted), f"the library gave {said(got)}, the model {said(wanted)}"
        return None if isinstance(wanted, VTokenError) else wanted


async def _attempt(call: Callable[[], Awaitable[Any]]) -> Any:
    try:
        return await call()
    except VTokenError as error:
        return error


class _Redeeming(NamedTuple):
    """A block of ``redeem`` that has begun."""

    block: Block
    token: ModelToken
    presented: Presented
    name: str

    def __repr__(self) -> str:
        return f"<a block that redeems {self.token!r}>"

    async def leave(self, error: type[BaseException] | None) -> None:
        if error is None:
            await self.block.__aexit__(None, None, None)
            return
        raised = error()
        with contextlib.suppress(error):
            assert not await self.block.__aexit__(error, raised, None), "the block's exception was swallowed"


def _presented(secret: str, token: ModelToken, twist: str) -> Presented:
    """The token's key as it should be presented, or with something wrong about it."""
    subject, slug, key, context = token.subject, token.policy.slug, token.key, token.context
    if twist == "key":
        key = "wrong"
    elif twist == "object":
        subject = PEOPLE[PEOPLE.index(subject) - 1]
    elif twist == "no object":
        subject = Subject(subject.content_type)
    elif twist == "slug":
        slug = POLICIES[POLICIES.index(token.policy) - 1].slug
    elif twist == "context":
        context = "another browser" if context == "my browser" else None
    return Presented(KNOWN[secret], subject, slug, key, context)


def _slug(presented: Presented) -> str | None:
    assert not isinstance(presented.slug, Wildcard)
    return presented.slug


def _spelt(subject: Subject) -> Subject:
    """1 and "1" are one object."""
    if subject == PEOPLE[0]:
        return Subject(subject.content_type, 1)
    return subject


def _generating(key: str | None) -> dict[str, Any] | None:
    return None if key is None else {"generator": lambda: key}
