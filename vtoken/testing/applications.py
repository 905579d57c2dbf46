"""Help for the tests of applications."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vtoken.manager import TokenManager
from vtoken.policy import Settings, TokenPolicy
from vtoken.registry import create_backend
from vtoken.testing.clock import Clock

SECRET = "a secret for tests that is good for nothing else"


def memory_manager(
    policies: Iterable[TokenPolicy] = (),
    *,
    clock: Clock | None = None,
    settings: Settings | None = None,
    **keywords: Any,
) -> tuple[TokenManager, Clock]:
    """A manager on a memory store of its own, not yet open, and the clock that it goes by.

    Example::

        @pytest.fixture
        async def tokens():
            manager, clock = memory_manager(POLICIES)
            async with manager:
                yield manager, clock

        async def test_a_link_expires(tokens):
            manager, clock = tokens
            token = await manager.issue(ada, "password-reset")
            clock.advance(timedelta(hours=1, milliseconds=1))
            assert not await manager.exists_valid(ada, "password-reset", token.key)

    Args:
        policies: the application's own.
        clock: another one; left out, a fresh one.
        settings: left out, those with a secret for tests.
        **keywords: further arguments of :class:`~vtoken.TokenManager`.

    .. versionadded:: 0.1
    """
    clock = Clock() if clock is None else clock
    settings = Settings(secret=SECRET) if settings is None else settings
    manager = TokenManager(
        create_backend("memory://"), settings=settings, policies=policies, clock=clock, **keywords
    )
    return manager, clock
