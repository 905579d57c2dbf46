"""A presented key, worked into what the store is asked for."""

from __future__ import annotations

from typing import NamedTuple

from vtoken.backend import Budget, Match
from vtoken.errors import InvalidInput
from vtoken.inputs import MAX_KEY_BYTES, text_problem
from vtoken.keys import NOTHING, Digests, Hidden, Keyring, context_digest, has_checksum, normalise_code
from vtoken.policy import Rules


class Guess(NamedTuple):
    """A key that somebody presents for an object and a slug, as digests only."""

    content_type: str
    object_id: str | None
    slug: str | None
    """``""`` without one, None for any."""
    rules: Rules
    digests: Digests
    """Empty where the key cannot be one of ours: its checksum is wrong."""
    context: bytes | None

    def __repr__(self) -> str:
        return "<Guess>"

    def match(self, *, valid_at: int | None = None) -> Match:
        """The tokens that the key fits, or only those valid at a time."""
        # By position: this is on the way of every request (tests/benchmarks, memory).
        return Match(
            None, self.digests, self.content_type, self.object_id, self.slug, False, valid_at, self.context
        )

    @property
    def is_charged(self) -> bool:
        """Whether there is more to do than to ask the store: a cap, or a key that cannot be one of ours."""
        return self.rules.max_attempts is not None or not self.digests

    def budget(self, object_id: str | None) -> Budget | None:
        """The attempt budget that this guess is charged to, if the policy has a cap."""
        if self.rules.max_attempts is None or object_id is None or self.slug is None:
            return None
        return Budget(self.content_type, object_id, self.slug, "attempts")


def make_guess(
    keyring: Keyring,
    rules: Rules,
    subject: tuple[str, str | None],
    slug: str | None,
    key: Hidden,
    context: Hidden,
) -> Guess:
    """Digest a presented key, and the context it comes with.

    Raises:
        InvalidInput: the key or the context is no text of at most 512 bytes, or a code comes
            without its object.
    """
    # An empty key is a wrong key; a missing or empty context matches no bound token.
    problem = text_problem(key.reveal(), MAX_KEY_BYTES, may_be_empty=True)
    if problem is not None:
        raise InvalidInput(f"key {problem}")
    if context is not NOTHING and context.reveal() is not None:
        problem = text_problem(context.reveal(), MAX_KEY_BYTES, may_be_empty=True)
        if problem is not None:
            raise InvalidInput(f"context {problem}")
    content_type, object_id = subject
    if rules.is_code and object_id is None:
        raise InvalidInput("a code is checked for one object: pass the object, not its class")
    if rules.is_code:
        digests = _code_digests(keyring, rules, content_type, object_id, slug, key)
    elif rules.prefix and not has_checksum(rules.prefix, key.text()):
        digests = Digests()
    else:
        digests = keyring.links(key.text())
    bound_to = _bound_to(context) if rules.needs_context else None
    return Guess(content_type, object_id, slug, rules, digests, bound_to)


def _bound_to(context: Hidden) -> bytes:
    return context_digest("" if context.reveal() is None else context.text())


def _code_digests(
    keyring: Keyring, rules: Rules, content_type: str, object_id: str | None, slug: str | None, key: Hidden
) -> Digests:
    assert object_id is not None and slug is not None  # noqa: S101, PT018  # make_guess has seen to it
    return keyring.codes(content_type, object_id, slug, normalise_code(key.text(), rules.key_chars))
