"""Events of a token's life, and the application's callables that hear of them.

An event never holds a key, a digest or a secret.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, cast

from vtoken.backend import Match, StoredToken
from vtoken.errors import ConfigurationError, Reason
from vtoken.guess import Guess
from vtoken.loading import import_object

logger = logging.getLogger("vtoken")

EventName = Literal["issued", "verified", "failed", "consumed", "reused", "capped", "deactivated", "purged"]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Something that happened.

    Args:
        name: ``issued``, ``verified``, ``failed`` (a key was refused), ``consumed``, ``reused`` (a used key
            was presented again), ``capped`` (an attempt budget is spent), ``deactivated`` or ``purged``.
        at: when, by the manager's clock.
        content_type: of the object, None where the event has none.
        object_id: of the object, None where it is not known.
        slug: the purpose, None for a token without one or an event without a purpose.
        token_id: the token's public id, None where there is none.
        reason: why a key was refused.
        count: how many tokens were deactivated or purged, else 1.
    """

    name: EventName
    at: datetime
    content_type: str | None = None
    object_id: str | None = None
    slug: str | None = None
    token_id: str | None = None
    reason: Reason | None = None
    count: int = 1


Hook = Callable[[TokenEvent], Awaitable[None] | None]


@dataclass(frozen=True, slots=True)
class LazyHook:
    """A hook that is made when the first event comes: for one whose imports are heavy.

    Args:
        factory: a callable without arguments that returns the hook.
    """

    factory: Callable[[], Hook]


class Hooks:
    """The hooks of one manager. One that fails is logged and changes no outcome."""

    __slots__ = ("_clock", "_hooks")

    def __init__(self, hooks: Iterable[Hook | LazyHook | str], clock: Callable[[], datetime]) -> None:
        self._hooks = [_checked(hook) for hook in hooks]
        self._clock = clock

    def __bool__(self) -> bool:
        return bool(self._hooks)

    async def tell(
        self,
        name: EventName,
        about: StoredToken | Guess | Match,
        *,
        token_id: str | None = None,
        reason: Reason | None = None,
        count: int = 1,
    ) -> None:
        """Tell every hook, in their order; without hooks nothing is built."""
        if not self._hooks:
            return
        if isinstance(about, StoredToken):
            token_id = about.id
        event = TokenEvent(
            name,
            self._clock(),
            about.content_type,
            about.object_id,
            about.slug or None,
            token_id,
            reason,
            count,
        )
        for position, hook in enumerate(self._hooks):
            try:
                if isinstance(hook, LazyHook):
                    hook = self._hooks[position] = hook.factory()  # made once, here
                answer = hook(event)
                if inspect.isawaitable(answer):
                    await answer
            except Exception:
                logger.exception("a hook failed on the event %r", event.name)


def _checked(hook: Hook | LazyHook | str) -> Hook | LazyHook:
    if isinstance(hook, LazyHook):
        return hook
    found = import_object(hook) if isinstance(hook, str) else hook
    if not callable(found):
        raise ConfigurationError(f"a hook is a callable or its path, not {type(found).__name__}")
    return cast("Hook", found)
