"""Events of a token's life, and the application's callables that are told of them.

An event never holds a key, a digest or a secret.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import KW_ONLY, dataclass
from datetime import datetime
from typing import Literal, TypedDict, Unpack, cast

from vtoken.errors import ConfigurationError, Reason
from vtoken.loading import import_object

logger = logging.getLogger("vtoken")

EventName = Literal[
    "issued",
    "pretended",
    "revealed",
    "verified",
    "failed",
    "consumed",
    "replayed",
    "reused",
    "busy",
    "capped",
    "limited",
    "deactivated",
    "erased",
    "purged",
]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Something that happened.

    Args:
        name: what happened:

            * ``issued``, ``pretended`` (``pretend`` stood in for an issue), ``revealed`` (a key was handed
              out again);
            * ``limited``: an issue limit refused a new token;
            * ``verified``, ``consumed``, ``replayed`` (a ``consume_id`` was answered again);
            * ``failed`` (a key was refused), ``reused`` (a used key was presented again), ``busy`` (all uses
              are held), ``capped`` (an attempt limit refused a key uncompared);
            * ``deactivated``, ``erased``, ``purged``.
        at: when, by the manager's clock.
        content_type: of the object, None where the event has none.
        object_id: of the object, None where it is not known.
        slug: the purpose, None for a token without one or an event without a purpose.
        token_id: the token's public id, None where there is none.
        reason: why a key was refused.
        count: how many tokens were deactivated, erased or purged, else 1.
        limit: the name of the limit that refused, e.g. ``"20 per 1d by object across sms"``.
        channel: how the policy says that its codes are sent: ``"email"``, or None.
        batch: the name of the batch that ``issue_many`` works on.
        attempts_reset_at: of ``issued``: the object's attempts are spent until then, so the new code cannot
            be used before; None where they are not.
        in_transaction: the application's own transaction holds the change, and may still roll it back.
        is_test_code: the code is one of the policy's ``test_codes``.
    """

    name: EventName
    at: datetime
    _: KW_ONLY
    content_type: str | None = None
    object_id: str | None = None
    slug: str | None = None
    token_id: str | None = None
    reason: Reason | None = None
    count: int = 1
    limit: str | None = None
    channel: Literal["email"] | None = None
    batch: str | None = None
    attempts_reset_at: datetime | None = None
    in_transaction: bool = False
    is_test_code: bool = False


Hook = Callable[[TokenEvent], Awaitable[None] | None]


@dataclass(frozen=True, slots=True)
class LazyHook:
    """A hook that is made when the first event happens, because its imports are slow, say.

    Args:
        factory: a callable without arguments that returns the hook.
    """

    factory: Callable[[], Hook]


class _Fields(TypedDict, total=False):
    token_id: str | None
    reason: Reason | None
    count: int
    limit: str | None
    channel: Literal["email"] | None
    batch: str | None
    attempts_reset_at: datetime | None
    in_transaction: bool
    is_test_code: bool


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
        *,
        content_type: str | None = None,
        object_id: str | None = None,
        slug: str | None = None,
        **fields: Unpack[_Fields],
    ) -> None:
        """Tell every hook, in their order. Without hooks no event is built.

        Args:
            name: what happened.
            content_type: of the object.
            object_id: of the object.
            slug: the stored form.
            **fields: the other fields of :class:`TokenEvent`.
        """
        if not self._hooks:
            return
        event = TokenEvent(
            name=name,
            at=self._clock(),
            content_type=content_type,
            object_id=object_id,
            slug=slug or None,
            **fields,
        )
        for position, hook in enumerate(self._hooks):
            try:
                if isinstance(hook, LazyHook):
                    hook = self._hooks[position] = hook.factory()  # made once
                answer = hook(event)
                if inspect.isawaitable(answer):
                    await answer
            except Exception:
                logger.exception("a hook failed on the event %r", event.name)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                # Nobody has cancelled the caller: the hook has waited for something that was cancelled.
                logger.exception("a hook failed on the event %r", event.name)


def _checked(hook: Hook | LazyHook | str) -> Hook | LazyHook:
    if isinstance(hook, LazyHook):
        return hook
    found = import_object(hook) if isinstance(hook, str) else hook
    if not callable(found):
        raise ConfigurationError(f"a hook must be a callable or its import path, not {type(found).__name__}")
    return cast("Hook", found)
