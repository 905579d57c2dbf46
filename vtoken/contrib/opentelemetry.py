"""OpenTelemetry: span events and a counter for what happens to tokens. It needs the API only.

::

    TokenManager(backend, hooks=[vtoken.contrib.opentelemetry.hook("sqlite")])

or ``VTOKEN_HOOKS=vtoken.contrib.opentelemetry:record``, where the backend has no name. To give it one
there, too, name a hook of your own by its path: ``told = hook("sqlite")`` in a module of the application.

The attributes are ``vtoken.outcome`` (an event's name), ``vtoken.reason`` (why a key was refused),
``vtoken.purpose`` (the slug), ``vtoken.limit`` (the limit that refused), ``vtoken.channel`` and
``vtoken.backend``. Never let a stranger choose a slug: each would be a time series.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from vtoken._version import __version__
from vtoken.contrib._extras import refuse_event, require
from vtoken.hooks import TokenEvent

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider


def hook(
    backend: str = "",
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
) -> Callable[[TokenEvent], None]:
    """A hook that adds to the counter ``vtoken.events``, and an event to the current span.

    Where no span is recorded, in a sweeper say, it makes one of its own.

    Args:
        backend: what the backend is called in the attribute.
        tracer_provider: left out, the global one.
        meter_provider: left out, the global one.

    Raises:
        ConfigurationError: ``opentelemetry-api`` is not installed.
    """
    refuse_event(backend)
    require("opentelemetry", "opentelemetry.metrics", "opentelemetry.trace")
    from opentelemetry import metrics, trace

    tracer = trace.get_tracer("vtoken", __version__, tracer_provider)
    counter = metrics.get_meter("vtoken", __version__, meter_provider).create_counter(
        "vtoken.events", "{event}", "What happened to verification tokens."
    )

    def tell(event: TokenEvent) -> None:
        attributes = {
            "vtoken.outcome": event.name,
            "vtoken.purpose": event.slug or "",
            "vtoken.backend": backend,
        }
        for name in ("reason", "limit", "channel"):
            value = getattr(event, name)
            if value is not None:
                attributes[f"vtoken.{name}"] = value
        counter.add(event.count, attributes)
        current = trace.get_current_span()
        if current.is_recording():
            current.add_event(f"vtoken.{event.name}", {**attributes, "vtoken.count": event.count})
            return
        with tracer.start_as_current_span(f"vtoken.{event.name}") as span:
            span.set_attributes({**attributes, "vtoken.count": event.count})

    return tell


def record(event: TokenEvent) -> None:
    """The hook as it is without arguments, to be named by its path."""
    _default()(event)


@cache
def _default() -> Callable[[TokenEvent], None]:
    return hook()
