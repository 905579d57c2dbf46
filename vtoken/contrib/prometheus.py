"""Prometheus: a counter of what happens to tokens.

::

    TokenManager(backend, hooks=[vtoken.contrib.prometheus.hook("sqlite")])

or ``VTOKEN_HOOKS=vtoken.contrib.prometheus:record``, where the backend has no name. To give it one
there, too, name a hook of your own by its path: ``told = hook("sqlite")`` in a module of the application.

``vtoken_events_total`` has the labels ``outcome`` (an event's name), ``reason`` (why a key was refused),
``purpose`` (the slug), ``limit`` (the limit that refused), ``channel`` and ``backend``. Never let a stranger
choose a
slug: each would be a time series.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from vtoken.contrib._extras import refuse_event, require
from vtoken.hooks import TokenEvent

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter


def hook(backend: str = "", registry: CollectorRegistry | None = None) -> Callable[[TokenEvent], None]:
    """A hook that counts events. A purge of 100 tokens counts as 100.

    Args:
        backend: what the backend is called in the label.
        registry: left out, the default one of ``prometheus_client``.

    Raises:
        ConfigurationError: ``prometheus_client`` is not installed.
    """
    refuse_event(backend)
    require("prometheus", "prometheus_client")
    from prometheus_client import REGISTRY

    counter = _counter(REGISTRY if registry is None else registry)

    def count(event: TokenEvent) -> None:
        counter.labels(
            outcome=event.name,
            reason=event.reason or "",
            purpose=event.slug or "",
            limit=event.limit or "",
            channel=event.channel or "",
            backend=backend,
        ).inc(event.count)

    return count


def record(event: TokenEvent) -> None:
    """The hook as it is without arguments, to be named by its path."""
    _default()(event)


@cache
def _counter(registry: CollectorRegistry) -> Counter:
    """One for all hooks of a registry, which takes a name only once."""
    from prometheus_client import Counter

    labels = ("outcome", "reason", "purpose", "limit", "channel", "backend")
    return Counter("vtoken_events", "What happened to verification tokens.", labels, registry=registry)


@cache
def _default() -> Callable[[TokenEvent], None]:
    return hook()
