"""An order for a token: checked arguments, and the fresh keys that are tried for it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, NamedTuple

from vtoken.backend import NEVER, StoredToken
from vtoken.errors import ConfigurationError, InvalidInput
from vtoken.inputs import MAX_KEY_BYTES, Unset, check_minutes, dump_json, text_problem
from vtoken.keys import (
    CHECKSUM_LENGTH,
    Digest,
    Hidden,
    KeyGenerator,
    Keyring,
    add_checksum,
    context_digest,
    normalise_code,
    random_key,
)
from vtoken.policy import Rules, load_generator


class NewKey(NamedTuple):
    """A fresh key and what is stored of it."""

    key: Hidden
    digest: Digest
    nonce: str

    def __repr__(self) -> str:
        return "<NewKey>"


class Order(NamedTuple):
    """What a new token is to be like."""

    content_type: str
    object_id: str
    slug: str
    rules: Rules
    extra_data: str | None
    lifetime: int | None
    generator: KeyGenerator
    generator_kwargs: Mapping[str, Any]
    context: bytes

    def __repr__(self) -> str:
        return f"<Order {self.content_type!r}:{self.object_id!r} slug={self.slug!r}>"

    def token(self, id: str, now: int, new: NewKey) -> StoredToken:  # noqa: A002  # the field's name
        """The record to be stored, under one of the keys that were tried."""
        expires_at = NEVER if self.lifetime is None else now + self.lifetime
        if expires_at >= NEVER and self.lifetime is not None:
            raise InvalidInput("the expiration lies after the year 9999; None means never")
        # By position, as this is on the way of every issue (tests/benchmarks, memory).
        return StoredToken(
            id,
            self.content_type,
            self.object_id,
            self.slug,
            *new.digest,
            new.key.text() if self.rules.storage == "plain" else "",
            new.nonce,
            self.context,
            now,
            expires_at,
            expires_at,  # ends_at
            True,
            self.extra_data,
            self.rules.max_uses,
            0,  # uses
            0,  # used_at
            (),
            "",  # lease_id
            0,  # lease_until
        )


def make_order(
    rules: Rules,
    subject: tuple[str, str | None],
    slug: str,
    extra_data: object,
    expiration: object,
    key_generator_kwargs: Mapping[str, Any] | None,
    context: Hidden,
) -> Order:
    """Check the arguments of issuing.

    Raises:
        InvalidInput: one is out of range, the object is missing, or the policy needs a context.
    """
    content_type, object_id = subject
    if object_id is None:
        raise InvalidInput("a new token belongs to one object: pass the object, not its class")
    generator, kwargs = rules.generator, dict(rules.generator_kwargs)
    if key_generator_kwargs is not None:
        if not isinstance(key_generator_kwargs, Mapping):
            raise InvalidInput("key_generator_kwargs must be a mapping of keyword arguments")
        own = dict(key_generator_kwargs)
        named = own.pop("generator", None)
        if named is not None:
            generator, kwargs = load_generator(named), {}
        kwargs |= own
        if generator is random_key and not kwargs.keys() <= {"length", "allowed_chars"}:
            raise InvalidInput("the default generator takes length and allowed_chars")
    if rules.storage == "derived" and key_generator_kwargs:
        raise InvalidInput("a derived key has no generator: its policy says key_storage='derived'")
    return Order(
        content_type=content_type,
        object_id=object_id,
        slug=slug,
        rules=rules,
        extra_data=None if extra_data is None else dump_json(extra_data),
        lifetime=rules.expiration if isinstance(expiration, Unset) else _minutes(expiration),
        generator=generator,
        generator_kwargs=kwargs,
        context=_bound_to(rules, context),
    )


def new_key(keyring: Keyring, order: Order) -> NewKey:
    """Draw a key for an order. What its generator raises is passed on as it is.

    Raises:
        InvalidInput: the generator returned no text of 1 to 512 bytes.
    """
    rules = order.rules
    if rules.storage == "derived":
        nonce = secrets.token_hex(16)
        derived = keyring.derive(nonce, order.content_type, order.object_id, order.slug, "")
        if derived is None:
            raise ConfigurationError("derived keys need Settings(secret=...)")
        key = Hidden(_framed(rules, derived))
        return NewKey(key, keyring.link(key.text()), nonce)
    key = drawn_key(order.generator(**order.generator_kwargs), MAX_KEY_BYTES - _frame_length(rules))
    if rules.is_code:
        return NewKey(key, _code_digest(keyring, order, key), "")
    if rules.prefix:
        key = Hidden(_framed(rules, key.text()))
    return NewKey(key, keyring.link(key.text()), "")


def drawn_key(key: object, limit: int = MAX_KEY_BYTES) -> Hidden:
    """Check what a generator returned.

    Raises:
        InvalidInput: it is no text of 1 to ``limit`` bytes.
    """
    hidden = Hidden(key)
    del key
    problem = text_problem(hidden.reveal(), limit)
    if problem is not None:
        raise InvalidInput(f"the key generator's key {problem}")
    return hidden


def reveal_derived_key(keyring: Keyring, rules: Rules, stored: StoredToken) -> str | None:
    """The key of a stored derived token, made again; None for other tokens, or where its secret or the
    prefix of its time is gone: better no link than a dead one."""
    if not stored.nonce:
        return None
    derived = keyring.derive(
        stored.nonce, stored.content_type, stored.object_id, stored.slug, stored.secret_id
    )
    if derived is None:
        return None
    key = _framed(rules, derived)
    return key if stored.digest in keyring.links(key) else None


def _frame_length(rules: Rules) -> int:
    return len(rules.prefix.encode()) + CHECKSUM_LENGTH if rules.prefix else 0


def _framed(rules: Rules, body: str) -> str:
    return add_checksum(rules.prefix, body) if rules.prefix else body


def _code_digest(keyring: Keyring, order: Order, key: Hidden) -> Digest:
    code = normalise_code(key.text(), order.rules.key_chars)
    return keyring.code(order.content_type, order.object_id, order.slug, code)


def _minutes(expiration: object) -> int | None:
    return check_minutes("expiration_in_minutes", expiration)


def _bound_to(rules: Rules, context: Hidden) -> bytes:
    if not rules.needs_context:
        return b""
    problem = text_problem(context.reveal(), MAX_KEY_BYTES)
    if problem is not None:
        raise InvalidInput(f"context {problem}: the policy binds tokens to one")
    return context_digest(context.text())
