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

from vtoken.backend import NEVER, Match, State, StoredToken, TokenBackend, running_holds
from vtoken.errors import InvalidToken, KeyGenerationError, TooManyAttempts, VTokenError
from vtoken.inputs import ANY, DEFAULT, Unset, Wildcard
from vtoken.limits import Limit
from vtoken.manager import TokenManager
from vtoken.policy import Settings, TokenPolicy
from vtoken.stats import Status
from vtoken.subject import Subject
from vtoken.testing.clock import Clock
from vtoken.testing.model.reference import ModelToken, Presented, ReferenceManager, newest_first
from vtoken.token import VerificationToken

T = TypeVar("T")

Block = AbstractAsyncContextManager[VerificationToken]
MS: Final = timedelta(milliseconds=1)
WRONG: Final = "000000"
"""A code that is right once in a million, and no link."""
FIXED: Final = "111111"
"""The code of a policy that draws no other."""
OLD, NEW = "old", "new"
KNOWN: Final = {OLD: (OLD,), NEW: (NEW, OLD)}
"""Which secrets the manager of each current one knows."""
SECRETS: Final = {name: f"the {name} secret, made to be 32 bytes long" for name in KNOWN}

POLICIES: Final = (
    TokenPolicy.link(None),
    TokenPolicy.link("reset", prefix="vt_"),
    TokenPolicy.link("invite", max_uses=2, expiration=None),
    TokenPolicy.link("rotate", overlap=timedelta(seconds=30), max_uses=2),
    TokenPolicy.link("mail", issue_limits=[Limit(3, timedelta(minutes=1))], key_storage="derived"),
    TokenPolicy.link("cool", cooldown=timedelta(minutes=1)),
    TokenPolicy.link("login", context="required"),
    TokenPolicy.link("guarded", max_attempts=2, attempt_window=timedelta(minutes=1)),
    TokenPolicy.code(
        "sms",
        max_attempts=2,
        attempt_window=timedelta(minutes=5),
        issue_limits=[Limit(50, timedelta(hours=1))],
    ),
    TokenPolicy.code(
        "fixed", max_attempts=3, issue_limits=[Limit(50, timedelta(hours=1))], key_generator=lambda: FIXED
    ),
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
        self._model = ReferenceManager(POLICIES)
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
        data=st.sampled_from([None, None, "{}"]),
    )
    def issue(
        self,
        secret: str,
        subject: Subject,
        distance: int,
        replace: bool,
        lifetime: float | Unset | None,
        context: str | None,
        key: str | None,
        data: str | None,
    ) -> Any:
        slug = self._near(distance)
        key = key if slug in (None, "sms") else None  # others would be framed, or derived
        context = context if slug == "login" else None
        token = self._agree(
            lambda: self._model.issue(
                self._now,
                subject,
                slug,
                KNOWN[secret],
                context,
                replace=replace,
                minutes=lifetime,
                key=FIXED if slug == "fixed" else key,
                extra_data=data,
            ),
            lambda: self._managers[secret].issue(
                _spelt(subject),
                slug,
                extra_data=None if data is None else {},
                replace=replace,
                expires_in=lifetime,
                key_generator_kwargs=_generating(key),
                context=context,
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
        if slug == "cool":
            return multiple()  # under a cooldown the library waits a little for a concurrent caller's token
        context = context if slug == "login" else None
        shows_key: list[bool] = []

        def expected() -> ModelToken:
            token, shown = self._model.get_active_or_create(
                self._now,
                subject,
                slug,
                KNOWN[secret],
                context,
                minutes=lifetime,
                key=FIXED if slug == "fixed" else None,
            )
            shows_key.append(shown)
            return token

        token = self._agree(
            expected,
            lambda: self._managers[secret].get_active_or_create(
                _spelt(subject), slug, None, lifetime, context=context
            ),
            shows_key=lambda _: shows_key[-1],
        )
        return token or multiple()

    # Checked and used --------------------------------------------------------------------------

    @rule(secret=secrets, subject=subjects, distance=near, times=st.integers(1, 4), pause=st.integers(0, 20))
    def present_wrong_keys(
        self, secret: str, subject: Subject, distance: int, times: int, pause: int
    ) -> None:
        """So many, so many seconds apart, whether or not there is a token."""
        p = Presented(KNOWN[secret], subject, self._near(distance), WRONG)
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
        for presented in (p, p._replace(slug=ANY, context=None)):
            self._agree(
                partial(self._opens, presented),
                partial(
                    manager.exists_valid,
                    _spelt(p.subject),
                    presented.slug,
                    p.key,
                    context=presented.context,
                ),
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
        replays: list[bool] = []

        def expected() -> ModelToken:
            token, is_replay = self._model.consume(self._now, p, name)
            replays.append(is_replay)
            return token

        self._agree(
            expected,
            lambda: self._managers[secret].consume(
                _spelt(p.subject), _slug(p), p.key, consume_id=name, context=p.context
            ),
            is_replay=lambda: replays[-1],
        )

    @rule(
        target=leases,
        secret=secrets,
        token=tokens,
        twist=twists,
        name=names,
        lease=spans.filter(lambda s: s >= MS),
    )
    def begin_to_redeem(
        self, secret: str, token: ModelToken, twist: str, name: str | None, lease: timedelta
    ) -> Any:
        p = _presented(secret, token, twist)
        manager, hold = self._managers[secret], str(next(self._numbers))
        blocks: list[Block] = []
        origins: list[ModelToken] = []

        async def enter() -> VerificationToken:
            block = manager.redeem(
                _spelt(p.subject), _slug(p), p.key, lease=lease, consume_id=name, context=p.context
            )
            blocks.append(block)
            return await block.__aenter__()

        def expected() -> ModelToken:
            token, origin = self._model.enter(self._now, p, hold, self._now + lease // MS, name)
            origins.append(origin)
            return token

        found = self._agree(expected, enter, ours=True)
        if found is None:
            return multiple()
        self._redeeming.append(_Redeeming(blocks[0], found, origins[0], p, hold, name))
        return self._redeeming[-1]

    @rule(redeeming=consumes(leases), error=st.sampled_from([None, None, ValueError, asyncio.CancelledError]))
    def end_to_redeem(self, redeeming: _Redeeming, error: type[BaseException] | None) -> None:
        self._redeeming.remove(redeeming)
        r = redeeming
        self._agree(
            lambda: self._model.leave(
                self._now, r.token, r.origin, r.presented, r.hold, r.name, done=error is None
            ),
            lambda: r.leave(error),
        )

    # Ended -------------------------------------------------------------------------------------

    @rule(secret=secrets, token=tokens, twist=twists, by_key=st.booleans(), any_slug=st.booleans())
    def deactivate(self, secret: str, token: ModelToken, twist: str, by_key: bool, any_slug: bool) -> None:
        p = _presented(secret, token, twist)
        p = p._replace(slug=ANY) if any_slug else p
        key = p.key if by_key else ANY
        self._agree(
            lambda: self._model.deactivate(self._now, p if by_key else None, p.subject, p.slug),
            lambda: self._managers[secret].deactivate(_spelt(p.subject), p.slug, key, all_objects=True),
        )

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

    @rule(secret=secrets, subject=subjects, whole=st.sampled_from([False, False, True]))
    def erase_or_unlock(self, secret: str, subject: Subject, whole: bool) -> None:
        manager = self._managers[secret]
        if whole:
            self._agree(lambda: self._model.erase(subject), lambda: manager.erase(_spelt(subject)))
        else:
            self._agree(
                lambda: self._model.reset_limits(subject), lambda: manager.reset_limits(_spelt(subject))
            )

    # Looked at ---------------------------------------------------------------------------------

    @rule(secret=secrets, subject=subjects | st.just(ANYONE), slug=st.just(ANY) | slugs, key=fixed_keys)
    def read(self, secret: str, subject: Subject, slug: str | Wildcard | None, key: str | None) -> None:
        """What changes nothing, all in one step, so that the steps are left for what does."""
        manager, model = self._managers[secret], self._model
        self._agree(
            lambda: any(t.is_valid(self._now) and t.has_free_use(self._now) for t in model.of(subject, slug)),
            lambda: manager.exists_valid(_spelt(subject), slug),
        )

        async def listed() -> list[str]:
            return [token.id async for token in manager.filter_active_tokens(_spelt(subject), slug)]

        async def history() -> list[str]:
            return [token.id async for token in manager.history(_spelt(subject), slug)]

        async def status() -> tuple[object, ...]:
            assert not isinstance(slug, Wildcard)
            return _as_shown(await manager.status(_spelt(subject), slug), self._now)

        self._agree(lambda: [token.id for token in model.active(subject, slug)], listed)
        if subject != ANYONE:
            self._agree(lambda: [t.id for t in newest_first(model.of(subject, slug))], history)
            if not isinstance(slug, Wildcard):
                self._agree(partial(model.status, self._now, subject, slug), status)
        self._agree(lambda: model.stats(self._now), manager.stats)
        if key is not None:
            self._agree(lambda: self._unless_taken(secret, key), lambda: manager.generate_key(lambda: key))

    def _unless_taken(self, secret: str, key: str) -> str:
        for token in self._model.tokens:
            for one in token.keys:
                if token.policy.kind == "link" and one.text == key and one.secret in KNOWN[secret]:
                    raise KeyGenerationError
        return key

    # Compared ----------------------------------------------------------------------------------

    @invariant()
    def the_store_holds_what_the_model_holds(self) -> None:
        self._compare(self._managers[NEW].backend)

    def _compare(self, backend: TokenBackend) -> None:
        self._agreed = False
        stored = [_stored(token, self._now) for token in self._run(backend.find(Match(), 10_000))]
        modelled = [_modelled(token, self._now) for token in newest_first(self._model.tokens)]
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
        is_replay: Callable[[], bool] = lambda: False,
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
                wanted.keys[0].text = wanted.key
            shown = _seen(got, got.is_valid(self._clock())), got.key, got.is_replay
            free = wanted.has_free_use(self._now) or ours
            key = wanted.key if is_new or shows_key(wanted) else None
            meant = _meant(wanted, wanted.is_valid(self._now) and free), key, is_replay()
            assert shown == meant, f"the library gave {shown}, the model {meant}"
            return wanted
        assert _said(got) == _said(wanted), f"the library gave {_said(got)}, the model {_said(wanted)}"
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
    origin: ModelToken
    presented: Presented
    hold: str
    name: str | None

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
        key = WRONG
    elif twist == "object":
        subject = PEOPLE[PEOPLE.index(subject) - 1]
    elif twist == "no object":
        subject = Subject(subject.content_type)
    elif twist == "slug":
        slug = POLICIES[POLICIES.index(token.policy) - 1].slug
    elif twist == "context":
        context = "another browser" if context == "my browser" else None
    return Presented(KNOWN[secret], subject, slug, key, context if slug == "login" else None)


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


# Both sides, so that they can be compared ---------------------------------------------------------


def _said(answer: object) -> object:
    """An answer so that it can be compared: errors by their type and what they carry."""
    if isinstance(answer, VTokenError):
        carried = {name: value for name, value in vars(answer).items() if name not in ("token", "limit")}
        return type(answer).__name__, carried
    return answer


def _seen(token: VerificationToken, valid: bool) -> tuple[object, ...]:
    """A token as the application sees it."""
    expires = NEVER if token.expires_at is None else _milliseconds(token.expires_at)
    used_at = 0 if token.used_at is None else _milliseconds(token.used_at)
    times = (_milliseconds(token.created_at), expires, used_at)
    whose = token.id, Subject(token.content_type, token.object_id), token.slug
    return *whose, times, token.is_active, valid, token.uses, token.max_uses, token.extra_data


def _meant(token: ModelToken, valid: bool) -> tuple[object, ...]:
    """A token as the application is to see it."""
    times = (token.created, token.expires, token.used_at)
    whose = token.id, token.subject, token.policy.slug
    bounds = token.uses, token.policy.max_uses
    return *whose, times, token.is_active, valid, *bounds, token.extra_data


_STATES: Final = {
    "active": State.ACTIVE,
    "used": State.USED,
    "ended": State.ENDED,
    "replaced": State.REPLACED,
}


def _stored(token: StoredToken, now: int) -> tuple[object, ...]:
    """A token as it is stored, but for its digests and for holds that have run out."""
    return (
        token.id,
        (token.content_type, token.object_id, token.slug, bool(token.context), token.is_beside),
        (token.created_at, token.expires_at, token.ends_at, token.used_at),
        (token.state, token.uses, token.max_uses, token.extra_data),
        [(key.kind, key.expires_at, key.origin) for key in token.keys],
        [hold.until for hold in running_holds(token, now)],
    )


def _modelled(token: ModelToken, now: int) -> tuple[object, ...]:
    """A token as it is to be stored."""
    subject, slug = token.subject, token.policy.slug or ""
    return (
        token.id,
        (subject.content_type, subject.object_id, slug, bool(token.context), token.is_beside),
        (token.created, token.expires, token.ends, token.used_at),
        (_STATES[token.state], token.uses, token.policy.max_uses, token.extra_data),
        [(token.policy.kind, key.expires, key.origin.id) for key in token.keys],
        [hold.until for hold in token.holds.values() if now < hold.until],
    )


def _as_shown(status: Status, now: int) -> tuple[object, ...]:
    expires = None if status.expires_at is None else _milliseconds(status.expires_at)
    again = max(now, _milliseconds(status.can_issue_at))
    return status.has_valid, expires, status.attempts_left, again


def _milliseconds(moment: datetime) -> int:
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
