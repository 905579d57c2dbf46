"""From a request for a token to the stored token: its keys, what it costs, and the insert.

1. :class:`IssueRequest` holds the checked arguments. What can be wrong with them has been said by then.
2. :func:`new_token` draws the keys and makes the record: generated, derived from the secret, or fixed for
    tests.
3. :meth:`Issuer.issue` has the store insert it. In the same step the store charges the limits and ends the
   tokens that the new one replaces, so that whatever fails leaves the old token as it was.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, NamedTuple

import anyio

from vtoken import inputs
from vtoken.backend import (
    NEVER,
    PRETENDED,
    Charge,
    Inserted,
    InsertMode,
    InsertResult,
    Match,
    State,
    StoredKey,
    StoredToken,
    TokenBackend,
    is_valid,
    satisfies,
)
from vtoken.errors import (
    BackendError,
    ConfigurationError,
    CooldownActive,
    InvalidInput,
    KeyGenerationError,
)
from vtoken.hooks import logger
from vtoken.ids import IdSequence
from vtoken.keys import (
    CHECKSUM_LENGTH,
    Candidates,
    Hidden,
    KeyGenerator,
    Keyring,
    add_checksum,
    batch_nonce,
    normalise_code,
    normalise_link,
    prefixed,
    random_key,
)
from vtoken.limits import Limiter, Spends, full_limit, seconds
from vtoken.opening import to_the_end
from vtoken.policy import ResolvedPolicy

# A member of an enum costs several times as much as a global name, and these are asked for in every issue.
_INSERTED: Final = InsertResult.INSERTED
_ADD: Final = InsertMode.ADD
_ACTIVE: Final = State.ACTIVE
_PAUSES: Final = (0.0, 0.005, 0.02, 0.1)
"""Seconds: how long ``get_active_or_create`` waits for the token of a concurrent caller who was quicker to
charge the limits, on a store that cannot charge and insert in one step."""


class IssueRequest(NamedTuple):
    """What a new token is to be like: checked arguments."""

    content_type: str
    object_id: str
    slug: str
    policy: ResolvedPolicy
    extra_data: str | None
    lifetime: int | None
    """Milliseconds; None never expires."""
    code_lifetime: int | None
    """Of the short code of a pair."""
    generator: KeyGenerator
    generator_kwargs: Mapping[str, Any]
    context: bytes
    spends: Spends
    batch: str | None = None

    def __repr__(self) -> str:
        return f"<IssueRequest {self.content_type!r}:{self.object_id!r} slug={self.slug!r}>"


class NewKey(NamedTuple):
    """A fresh key, and what is stored of it."""

    text: Hidden
    kind: str
    candidates: Candidates
    """The first of them is stored."""
    nonce: str = ""
    also_taken: tuple[bytes, ...] = ()
    """The digests of the same key under previous secrets."""

    def __repr__(self) -> str:
        return f"<NewKey {self.kind}>"


class NewToken(NamedTuple):
    """A record that is about to be stored, with its plaintext keys."""

    stored: StoredToken
    key: Hidden
    """The link key; of a code policy, the code."""
    code: Hidden | None
    """The short code of a pair."""
    also_taken: tuple[bytes, ...]

    def __repr__(self) -> str:
        return f"<NewToken {self.stored.id}>"


class Issued(NamedTuple):
    """How issuing ended."""

    stored: StoredToken
    key: Hidden | None
    """None where the token was there already and its key cannot be had again."""
    code: Hidden | None = None
    is_new: bool = True
    charges: tuple[Charge, ...] = ()

    def __repr__(self) -> str:
        return f"<Issued {self.stored.id}>"


# Calling these classes, rather than what makes their instances, doubles the cost.
_new_stored_key: Final = StoredKey.__new__
_new_stored_token: Final = StoredToken.__new__
_new_key: Final = NewKey.__new__
_new_token: Final = NewToken.__new__
_new_issued: Final = Issued.__new__


class Issuer:
    """Makes tokens and has the store insert them.

    Args:
        keyring: the secrets.
        max_key_iterations: how many keys are drawn before :class:`KeyGenerationError`.
        now: the manager's clock, in milliseconds.
    """

    def __init__(self, keyring: Keyring, max_key_iterations: int, now: Callable[[], int]) -> None:
        self.keyring = keyring
        self._iterations = max_key_iterations
        self._now = now
        self._ids = IdSequence()

    async def issue(
        self,
        store: TokenBackend,
        request: IssueRequest,
        mode: InsertMode,
        *,
        at_least: int = 0,
        keeps: bool = False,
    ) -> Issued:
        """Insert a token with fresh keys, or return the one that ``mode`` finds.

        Where this is cancelled, nobody will ever have the key of what may have been inserted: it ends, unless
        ``keeps`` says that the key can be had again, or that somebody else decides about the token.

        Raises:
            CooldownActive: a limit is full; nothing was changed.
            KeyGenerationError: the generator yielded only keys that are taken.
        """
        now = self._now()
        for _ in range(self._iterations):
            # What may raise for its arguments, the generator's own exception too, does so before the charge.
            new = self.new_token(request, now, is_beside=mode is _ADD)
            try:
                inserted = await store.insert(
                    new.stored,
                    mode,
                    keep_until=now + request.policy.overlap if request.policy.overlap else 0,
                    wanted_until=now + at_least,
                    also_taken=new.also_taken,
                    spends=request.spends.spends,
                )
            except anyio.get_cancelled_exc_class():
                if not keeps:
                    await to_the_end(partial(self._end, store, new.stored.id))
                raise
            if inserted.result is _INSERTED:
                assert inserted.token is not None  # noqa: S101  # the protocol says so
                return _new_issued(
                    Issued,
                    stored=inserted.token,
                    key=new.key,
                    code=new.code,
                    charges=inserted.spending.charges,
                )
            if inserted.result is InsertResult.LIMITED:
                raise _limited(request, inserted, now)
            if inserted.token is not None:  # HAS_VALID, or ONCE has found an earlier run's
                return self._found(request, inserted.token)
            if (request.content_type, request.object_id) in request.policy.test_codes:
                await self._make_way(store, new, mode)
        raise KeyGenerationError(f"{self._iterations} draws yielded only keys that are taken")

    async def _end(self, store: TokenBackend, token_id: str) -> None:
        try:
            await store.deactivate(Match(id=token_id), self._now())
        except BackendError as error:  # the cancellation matters more
            logger.warning("a token whose issue was cancelled could not be ended: %r", error)

    async def _make_way(self, store: TokenBackend, new: NewToken, mode: InsertMode) -> None:
        """End the tokens that have the fixed code of a test account and that an insert does not replace:
        those of other contexts, say. Another draw would give the same code."""
        token = new.stored
        own = tuple(key.digest for key in token.keys)
        same_code = Match(
            digests=own + new.also_taken,
            kind="code",
            content_type=token.content_type,
            object_id=token.object_id,
            slug=token.slug,
        )
        for other in await store.find(same_code, len(own + new.also_taken)):
            if mode is _ADD or other.context != token.context:
                await store.deactivate(Match(id=other.id), token.created_at)

    async def begin_batch(self, store: TokenBackend, batch: str, slug: str, policy: ResolvedPolicy) -> None:
        """Note, beside the store's schema, with which secrets and in which form a batch's keys are made.

        An earlier run's token is recognised by its key, which is made again. Where it would not be the same
        key, everybody would have a second token.

        Raises:
            ConfigurationError: an earlier run had a secret that is not configured any more, or its keys had
                another form.
        """
        name, ids = f"batch:{batch_nonce(batch, '', '', slug)}", self.keyring.secret_ids
        parts = (policy.prefix,) if policy.has_link else map(str, _code_form(policy))
        form = hashlib.sha256(prefixed(*parts)).hexdigest()[:16]
        noted_form, *noted = (await store.note(name, f"{form} {ids[0]}")).split()
        missing = "a secret that is not configured any more" if set(noted) - set(ids) else None
        if noted_form != form:
            missing = "another prefix, or another length or alphabet of codes, in its policy"
        if missing is not None:
            raise ConfigurationError(
                f"the batch {batch!r} was begun with {missing}: its tokens would not be recognised, and"
                " everybody would get a second one; configure it again, or name another batch"
            )
        if ids[0] not in noted:
            await store.note(name, " ".join([form, *noted, ids[0]]), replace=True)

    def _found(self, request: IssueRequest, stored: StoredToken) -> Issued:
        now = self._now()
        if request.batch is not None and is_valid(stored, now):
            return Issued(stored, *reveal(self.keyring, request.policy, stored, at=now), is_new=False)
        return Issued(stored, None, is_new=False)

    async def get_or_issue(self, store: TokenBackend, request: IssueRequest, at_least: int) -> Issued:
        """The newest valid token of a request's line, or a new one. Of concurrent callers all get the
        same."""
        line = Match(
            content_type=request.content_type,
            object_id=request.object_id,
            slug=request.slug,
            context=request.context,
        )
        cooling: CooldownActive | None = None
        for pause in _PAUSES:
            if pause:
                await anyio.sleep(pause)
            now = self._now()
            for stored in await store.find(line._replace(valid_at=now), 100):
                if satisfies(stored, now + at_least):
                    return Issued(stored, None, is_new=False)
            try:
                # Under derived or plain keys another caller may have been given the key already.
                keeps = request.policy.storage != "digest"
                return await self.issue(
                    store, request, InsertMode.IF_NONE_VALID, at_least=at_least, keeps=keeps
                )
            except CooldownActive as error:
                cooling = error
        assert cooling is not None  # noqa: S101  # every other way out of the loop returned
        raise cooling

    async def pretend(self, store: TokenBackend, request: IssueRequest, limiter: Limiter) -> StoredToken:
        """Do what :meth:`issue` does for somebody who does not exist, and leave nothing that is ever valid.

        The record stands under a digest of the object, is inactive from the start and due for the next purge.

        Raises: as :meth:`issue`.
        """
        now = self._now()
        filler = None if request.extra_data is None else f'"{"x" * (len(request.extra_data.encode()) - 2)}"'
        for _ in range(self._iterations):
            new = self.new_token(request, now, is_beside=False)
            record = new.stored._replace(
                content_type=PRETENDED,
                object_id=limiter.object_name(request.content_type, request.object_id).hex(),
                state=State.ENDED,
                ends_at=0,
                extra_data=filler,
                keys=tuple(
                    # A digest of a digest: no key that anybody presents has it.
                    key._replace(digest=hashlib.sha256(b"vtoken:pretended:v1" + key.digest).digest())
                    for key in new.stored.keys
                ),
            )
            inserted = await store.insert(record, InsertMode.REPLACE, spends=request.spends.spends)
            if inserted.result is InsertResult.INSERTED:
                return record
            if inserted.result is InsertResult.LIMITED:
                raise _limited(request, inserted, now)
        raise KeyGenerationError(f"{self._iterations} draws yielded only keys that are taken")

    def new_token(self, request: IssueRequest, now: int, *, is_beside: bool) -> NewToken:
        """Draw the keys of a token and make its record."""
        expires_at = _expiry(now, request.lifetime)
        token_id, new_keys = self._ids.next(now), self._new_keys(request)
        is_plain = request.policy.storage == "plain"
        keys: list[StoredKey] = []
        also_taken: tuple[bytes, ...] = ()
        for new in new_keys:
            (scheme, secret_id), key_expires_at = new.candidates.made[0], expires_at
            if new.kind == "code":
                key_expires_at = min(expires_at, _expiry(now, request.code_lifetime))
            stored_key = _new_stored_key(
                StoredKey,
                digest=new.candidates.digests[0],
                scheme=scheme,
                secret_id=secret_id,
                nonce=new.nonce,
                plain_key=new.text.text() if is_plain else "",
                kind=new.kind,
                expires_at=key_expires_at,
                origin=token_id,
            )
            keys.append(stored_key)
            also_taken += new.also_taken
        stored = _new_stored_token(
            StoredToken,
            id=token_id,
            content_type=request.content_type,
            object_id=request.object_id,
            slug=request.slug,
            context=request.context,
            is_beside=is_beside,
            created_at=now,
            expires_at=expires_at,
            ends_at=expires_at,
            state=_ACTIVE,
            extra_data=request.extra_data,
            max_uses=request.policy.max_uses,
            uses=0,
            used_at=0,
            keys=tuple(keys),
            holds=(),
        )
        code = new_keys[1].text if len(new_keys) > 1 else None
        return _new_token(NewToken, stored=stored, key=new_keys[0].text, code=code, also_taken=also_taken)

    def _new_keys(self, request: IssueRequest) -> list[NewKey]:
        policy = request.policy
        nonce = ""
        if policy.storage == "derived":
            nonce = secrets.token_hex(16)
            if request.batch is not None:
                subject = request.content_type, request.object_id, request.slug
                nonce = batch_nonce(request.batch, *subject)
        keys: list[NewKey] = []
        if policy.has_link:
            keys.append(self._new_link(request, nonce))
        if policy.has_code:
            keys.append(self._new_code(request, nonce))
        return keys

    def _new_link(self, request: IssueRequest, nonce: str) -> NewKey:
        policy, keyring = request.policy, self.keyring
        if nonce:
            subject = request.content_type, request.object_id, request.slug
            texts = [
                Hidden(framed(policy, derived))
                for secret_id in keyring.secret_ids
                if (derived := keyring.derive_link(nonce, *subject, secret_id)) is not None
            ]
            # A batch that began under a previous secret has stored its keys under that one's digests.
            older = [keyring.links(text.text()).digests for text in texts[1:]] if request.batch else []
            taken = tuple(digest for digests in older for digest in digests)
            return NewKey(texts[0], "link", keyring.links(texts[0].text()), nonce, taken)
        limit = inputs.MAX_KEY_BYTES - _frame_length(policy) if policy.prefix else inputs.MAX_KEY_BYTES
        drawn = drawn_key(request.generator(**request.generator_kwargs), limit)
        text = Hidden(framed(policy, drawn.text())) if policy.prefix else drawn
        if request.generator is random_key:  # whose keys are too many to be drawn twice
            return _new_key(NewKey, text=text, kind="link", candidates=keyring.links(text.text()))
        normal = Hidden(normalise_link(text.text()))  # which a presented key becomes, too
        if not normal.text():
            raise ConfigurationError("the key generator's key consists of white space")
        candidates = keyring.links(normal.text())
        return NewKey(text, "link", candidates, also_taken=candidates.digests[1:])

    def _new_code(self, request: IssueRequest, nonce: str) -> NewKey:
        policy, keyring = request.policy, self.keyring
        subject = request.content_type, request.object_id, request.slug
        fixed = policy.test_codes.get((request.content_type, request.object_id))
        if fixed is not None:
            text, nonce = Hidden(fixed), ""
        elif nonce:
            derived = keyring.derive_code(nonce, *subject, keyring.secret_ids[0], *_code_form(policy))
            assert derived is not None  # noqa: S101  # the current secret is always there
            text = Hidden(derived)
            del derived
        elif policy.kind == "pair":
            text = Hidden(random_key(*_code_form(policy)))
        else:
            text = drawn_key(request.generator(**request.generator_kwargs))
        normal = Hidden(normalise_code(text.text(), policy.code_chars))
        if not normal.text():
            raise ConfigurationError(
                "the key generator's code is empty once spaces and separators are dropped"
            )
        candidates = keyring.codes(*subject, normal.text())
        if not candidates.digests:
            raise ConfigurationError("codes need Settings(secret=...)")
        return NewKey(text, "code", candidates, nonce, candidates.digests[1:])


def _limited(request: IssueRequest, inserted: Inserted, now: int) -> CooldownActive:
    wait = seconds(inserted.spending.until - now)
    return CooldownActive(wait, full_limit(request.spends, inserted.spending))


def _expiry(now: int, lifetime: int | None) -> int:
    if lifetime is None:
        return NEVER
    if now + lifetime >= NEVER:
        raise InvalidInput("the expiration lies after the year 9999; None means never")
    return now + lifetime


def drawn_key(key: object, limit: int = inputs.MAX_KEY_BYTES) -> Hidden:
    """Check what a generator returned.

    Raises:
        InvalidInput: it is no text of 1 to ``limit`` bytes.
    """
    hidden = Hidden(key)
    del key
    problem = inputs.text_problem(hidden.reveal(), limit)
    if problem is not None:
        raise InvalidInput(f"the key generator's key {problem}")
    return hidden


def reveal(
    keyring: Keyring, policy: ResolvedPolicy, stored: StoredToken, *, at: int
) -> tuple[Hidden | None, Hidden | None]:
    """The link key (of a code policy the code) and a pair's code of a stored token: stored plainly, or
    derived again. None for a key that cannot be had or is over: better no link than a dead one."""
    texts: dict[str, Hidden] = {}
    for key in stored.keys:
        if key.origin == stored.id and key.expires_at >= at:
            text = Hidden(key.plain_key) if key.plain_key else _derived_again(keyring, policy, stored, key)
            if text is not None:
                texts[key.kind] = text
    if policy.kind == "code":
        return texts.get("code"), None
    return texts.get("link"), texts.get("code")


def _derived_again(
    keyring: Keyring, policy: ResolvedPolicy, stored: StoredToken, key: StoredKey
) -> Hidden | None:
    if not key.nonce:
        return None
    subject = stored.content_type, stored.object_id, stored.slug
    if key.kind == "code":
        if policy.code_length is None:
            return None
        code = keyring.derive_code(key.nonce, *subject, key.secret_id, *_code_form(policy))
        if code is None:
            return None
        text, found = Hidden(code), keyring.codes(*subject, code).digests
        return text if key.digest in found else None
    derived = keyring.derive_link(key.nonce, *subject, key.secret_id)
    if derived is None:
        return None
    text = Hidden(framed(policy, derived))
    return text if key.digest in keyring.links(text.text()).digests else None


def _code_form(policy: ResolvedPolicy) -> tuple[int, str]:
    """The length and the alphabet of codes that we draw or derive."""
    assert policy.code_length is not None  # noqa: S101  # the policy has seen to it
    assert policy.code_chars is not None  # noqa: S101  # likewise
    return policy.code_length, policy.code_chars


def framed(policy: ResolvedPolicy, body: str) -> str:
    """A link key with the prefix and checksum of its policy, if it has a prefix."""
    return add_checksum(policy.prefix, body) if policy.prefix else body


def _frame_length(policy: ResolvedPolicy) -> int:
    """How many bytes :func:`framed` adds to a key where there is a prefix."""
    return len(policy.prefix.encode()) + CHECKSUM_LENGTH
