"""The hooks of vtoken.contrib: what they tell, and that they never tell a key, a digest or a subject."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest

from vtoken import InvalidToken, Subject, TokenEvent, TokenManager, TokenPolicy, TooManyAttempts
from vtoken.backend import Match
from vtoken.contrib import logging as for_logging
from vtoken.contrib import opentelemetry as for_opentelemetry
from vtoken.contrib import prometheus as for_prometheus
from vtoken.hooks import Hook
from vtoken.testing import Clock
from vtoken_backends.memory import MemoryBackend

from .core_tools import SECRET, SECRETS, START, refused

ROOT = Path(__file__).parent.parent
KEY = "canary-key"
SUBJECT = Subject("auth.canary-type", "canary-subject")
CAPPED = TokenPolicy("login", max_attempts=2)
HAPPENED = {
    ("issued", "", "reset"): 1,
    ("verified", "", "reset"): 1,
    ("failed", "unknown", "reset"): 1,
    ("consumed", "", "reset"): 1,
    ("reused", "used", "reset"): 1,
    ("issued", "", "login"): 1,
    ("failed", "unknown", "login"): 2,
    ("capped", "", "login"): 1,
    ("issued", "", ""): 2,
    ("deactivated", "", ""): 3,
    ("purged", "", ""): 4,
}
"""Outcome, reason and purpose of what :func:`live` does, and how often."""


async def live(*hooks: Hook | str) -> list[str]:
    """Live the life of some tokens, and return the texts that nobody may be told."""
    clock, backend = Clock(START), MemoryBackend()
    async with TokenManager(backend, SECRETS, [CAPPED], clock=clock, hooks=hooks) as manager:
        for slug in ("reset", "login"):
            drawn = {"generator": lambda slug=slug: f"{KEY}-{slug}"}
            await manager.deactivate_and_create(SUBJECT, slug, "canary-data", key_generator_kwargs=drawn)
        await manager.verify(SUBJECT, "reset", f"{KEY}-reset")
        await refused(InvalidToken, manager.verify(SUBJECT, "reset", f"{KEY}-wrong"))
        await manager.consume(SUBJECT, "reset", f"{KEY}-reset", consume_id="canary-use")
        await refused(InvalidToken, manager.consume(SUBJECT, "reset", f"{KEY}-reset"))
        for _ in range(2):
            await refused(InvalidToken, manager.consume(SUBJECT, "login", f"{KEY}-wrong"))
        await refused(TooManyAttempts, manager.consume(SUBJECT, "login", f"{KEY}-login"))
        for _ in range(2):
            await manager.deactivate_and_create(SUBJECT, deactivate_old_tokens=False)
        assert await manager.deactivate(SUBJECT) == 3
        digests = [key.digest for token in await backend.find(Match(), 9) for key in token.keys]
        clock.advance(timedelta(days=2))
        assert await manager.purge() == 4
    return ["canary", SECRET, *(text for digest in digests for text in (digest.hex(), repr(digest)[2:-1]))]


def assert_untold(text: str, secrets: list[str]) -> None:
    assert len(secrets) == 2 + 2 * 4
    for secret in secrets:
        assert secret not in text


class TestPrometheus:
    async def test_it_counts(self) -> None:
        registry = CollectorRegistry()
        secrets = await live(for_prometheus.hook("memory", registry))
        counted = {
            (s.labels["outcome"], s.labels["reason"], s.labels["purpose"]): s.value
            for metric in registry.collect()
            for s in metric.samples
            if s.name == "vtoken_events_total" and s.labels.pop("backend") == "memory"
        }
        assert counted == HAPPENED
        assert_untold(generate_latest(registry).decode(), secrets)

    async def test_hooks_of_two_managers_share_a_registry(self) -> None:
        registry = CollectorRegistry()
        await live(for_prometheus.hook("one", registry))
        await live(for_prometheus.hook("two", registry), for_prometheus.hook("two", registry))
        labels = {"outcome": "purged", "reason": "", "purpose": "", "limit": "", "channel": ""}
        assert registry.get_sample_value("vtoken_events_total", {**labels, "backend": "one"}) == 4
        assert registry.get_sample_value("vtoken_events_total", {**labels, "backend": "two"}) == 8

    async def test_by_its_path_it_counts_in_the_default_registry(self) -> None:
        others = ("reason", "purpose", "limit", "channel", "backend")
        labels: dict[str, str] = {"outcome": "purged", **dict.fromkeys(others, "")}
        for _ in range(2):
            before = REGISTRY.get_sample_value("vtoken_events_total", labels) or 0
            await live("vtoken.contrib.prometheus:record")
            assert REGISTRY.get_sample_value("vtoken_events_total", labels) == before + 4


class Telemetry:
    """A real SDK whose exporters keep what they get."""

    def __init__(self) -> None:
        self.exporter, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.tracers, self.meters = TracerProvider(), MeterProvider([self.reader])
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return self.exporter.get_finished_spans()

    def points(self) -> list[tuple[Mapping[str, Any], Any]]:
        """Attributes and value of each time series of the one metric there is."""
        data = self.reader.get_metrics_data()
        assert data is not None
        ((metric,),) = [scope.metrics for found in data.resource_metrics for scope in found.scope_metrics]
        assert (metric.name, metric.unit) == ("vtoken.events", "{event}")
        return [(dict(p.attributes or {}), getattr(p, "value", None)) for p in metric.data.data_points]

    def close(self) -> None:
        self.tracers.shutdown()
        self.meters.shutdown()


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    made = Telemetry()
    yield made
    made.close()


def key_of(attributes: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    assert attributes.keys() <= {
        f"vtoken.{n}" for n in ("outcome", "reason", "purpose", "limit", "backend", "count")
    }
    assert attributes["vtoken.backend"] == "memory"
    return attributes["vtoken.outcome"], attributes.get("vtoken.reason", ""), attributes["vtoken.purpose"]


class TestOpenTelemetry:
    async def test_it_counts(self, telemetry: Telemetry) -> None:
        secrets = await live(for_opentelemetry.hook("memory", telemetry.tracers, telemetry.meters))
        points = telemetry.points()
        assert {key_of(attributes): value for attributes, value in points} == HAPPENED
        assert_untold(repr(points), secrets)

    async def test_it_adds_events_to_the_current_span(self, telemetry: Telemetry) -> None:
        hook = for_opentelemetry.hook("memory", telemetry.tracers, telemetry.meters)
        with telemetry.tracers.get_tracer("test").start_as_current_span("request"):
            secrets = await live(hook)
        (span,) = telemetry.spans
        assert [event.name for event in span.events][:3] == [
            "vtoken.issued",
            "vtoken.issued",
            "vtoken.verified",
        ]
        assert {key_of(event.attributes or {}) for event in span.events} == HAPPENED.keys()
        assert (span.events[-1].attributes or {})["vtoken.count"] == 4
        assert_untold(span.to_json(), secrets)

    async def test_without_a_span_it_makes_one_for_each(self, telemetry: Telemetry) -> None:
        secrets = await live(for_opentelemetry.hook("memory", telemetry.tracers, telemetry.meters))
        assert {key_of(span.attributes or {}) for span in telemetry.spans} == HAPPENED.keys()
        assert [span.name for span in telemetry.spans][-1] == "vtoken.purged"
        assert all(
            span.instrumentation_scope and span.instrumentation_scope.name == "vtoken"
            for span in telemetry.spans
        )
        for span in telemetry.spans:
            assert_untold(span.to_json(), secrets)

    def test_by_its_path_it_takes_the_global_providers(self) -> None:
        """In a process of its own, because a process has one pair of global providers for ever."""
        code = f"""
import asyncio
from opentelemetry import metrics, trace
from {__name__} import Telemetry, live
telemetry = Telemetry()
trace.set_tracer_provider(telemetry.tracers)
metrics.set_meter_provider(telemetry.meters)
asyncio.run(live("vtoken.contrib.opentelemetry:record"))
print(sum(value for _, value in telemetry.points()), len(telemetry.spans))
"""
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == [str(sum(HAPPENED.values())), "13"]


class TestLogging:
    async def test_it_logs_with_fields(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, "vtoken.events"):
            secrets = await live(for_logging.hook())
        records = [vars(record) for record in caplog.records]
        assert {r["name"] for r in records} == {"vtoken.events"}
        told = {(r["vtoken_event"], r["vtoken_reason"] or "", r["vtoken_purpose"] or "") for r in records}
        assert told == HAPPENED.keys()
        suspicious = {r["vtoken_event"] for r in records if r["levelno"] == logging.WARNING}
        assert suspicious == {"failed", "reused", "capped"}
        about_the_first = {"verified", "consumed", "reused"}
        ids = {r["vtoken_token_id"] for r in records if r["vtoken_event"] in about_the_first}
        assert ids == {records[0]["vtoken_token_id"]} != {None}
        assert records[-1]["vtoken_count"] == 4
        assert_untold(repr(records) + caplog.text, secrets)

    async def test_the_subject_is_told_where_that_is_asked(self, caplog: pytest.LogCaptureFixture) -> None:
        logger = logging.getLogger("an.application")
        with caplog.at_level(logging.INFO, logger.name):
            await live(for_logging.hook(logger, with_subject=True))
        issued = vars(caplog.records[0])
        assert issued["name"] == "an.application"
        assert (issued["vtoken_content_type"], issued["vtoken_object_id"]) == (
            "auth.canary-type",
            "canary-subject",
        )
        assert KEY not in repr([vars(record) for record in caplog.records]) + caplog.text

    async def test_by_its_path(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, "vtoken.events"):
            await live("vtoken.contrib.logging:record")
        assert len(caplog.records) == 13

    def test_a_slug_forges_no_line(self, caplog: pytest.LogCaptureFixture) -> None:
        for_logging.record(TokenEvent(name="failed", at=START, slug="a\nERROR forged", reason="unknown"))
        assert "\n" not in caplog.records[0].getMessage()


def at_a_limit() -> TokenEvent:
    return TokenEvent(
        name="limited",
        at=START,
        slug="sms",
        limit="20 per 1d by object across sms",
        channel="email",
        batch="spring",
    )


class TestLimits:
    def test_prometheus_names_the_limit_and_the_channel(self) -> None:
        registry = CollectorRegistry()
        for_prometheus.hook("memory", registry)(at_a_limit())
        labels = {
            "outcome": "limited",
            "reason": "",
            "purpose": "sms",
            "limit": "20 per 1d by object across sms",
            "channel": "email",
            "backend": "memory",
        }
        assert registry.get_sample_value("vtoken_events_total", labels) == 1

    def test_opentelemetry_names_the_limit_and_the_channel(self, telemetry: Telemetry) -> None:
        for_opentelemetry.hook("memory", telemetry.tracers, telemetry.meters)(at_a_limit())
        [(attributes, value)] = telemetry.points()
        assert value == 1
        assert attributes["vtoken.limit"] == "20 per 1d by object across sms"
        assert attributes["vtoken.channel"] == "email"

    def test_the_log_names_the_limit_and_the_batch(self, caplog: pytest.LogCaptureFixture) -> None:
        for_logging.record(at_a_limit())
        [record] = caplog.records
        assert record.levelno == logging.WARNING
        assert vars(record)["vtoken_limit"] == "20 per 1d by object across sms"
        assert vars(record)["vtoken_batch"] == "spring"
        assert "20 per 1d" in record.getMessage()


class TestHiddenKeys:
    """What web servers write down."""

    @pytest.mark.parametrize(
        ("line", "hidden"),
        [
            ("/reset?key=hunter2", "/reset?key=***"),
            ("/reset?a=1&key=hunter2&b=2", "/reset?a=1&key=***&b=2"),
            ("/reset?CODE=hunter2;token=hunter2#x", "/reset?CODE=***;token=***#x"),
            ("/r/hunter2?x=1", "/r/***?x=1"),
            ("/r/hunter2/done", "/r/***/done"),
            ("/list?keys=all&monkey=1", "/list?keys=all&monkey=1"),
            ("/", "/"),
        ],
    )
    def test_keys_do_not_reach_the_log(
        self, caplog: pytest.LogCaptureFixture, line: str, hidden: str
    ) -> None:
        logger = logging.getLogger(f"access.{line}")
        for_logging.hide_keys(logger.name, paths=["/r/"])
        with caplog.at_level(logging.INFO, logger.name):
            logger.info('%s - "%s %s HTTP/%s" %d', "127.0.0.1:80", "GET", line, "1.1", 200)  # uvicorn's
            logger.info("%(h)s %(r)s %(s)s", {"h": "127.0.0.1", "r": f"GET {line} HTTP/1.1", "s": 200})
            logger.info(f"GET {line} HTTP/1.1")  # noqa: G004  # as some do
        assert [record.getMessage() for record in caplog.records] == [
            f'127.0.0.1:80 - "GET {hidden} HTTP/1.1" 200',
            f"127.0.0.1 GET {hidden} HTTP/1.1 200",
            f"GET {hidden} HTTP/1.1",
        ]

    def test_nothing_is_hidden_where_nothing_is_named(self, caplog: pytest.LogCaptureFixture) -> None:
        logger = logging.getLogger("access.unhidden")
        for_logging.hide_keys(logger.name, parameters=())
        with caplog.at_level(logging.INFO, logger.name):
            logger.info("/reset?key=1")
        assert caplog.messages == ["/reset?key=1"]

    def test_a_mapping_that_answers_for_missing_names_still_does(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Atoms(dict[str, str]):
            def __missing__(self, name: str) -> str:
                return "-"

        logger = logging.getLogger("access.atoms")
        for_logging.hide_keys(logger.name)
        with caplog.at_level(logging.INFO, logger.name):
            logger.info("%(r)s %(u)s", Atoms(r="GET /?key=hunter2"))
        assert caplog.messages == ["GET /?key=*** -"]


@pytest.mark.parametrize("module", [for_logging, for_opentelemetry, for_prometheus])
async def test_naming_the_factory_by_its_path_is_told(
    module: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    await live(f"{module.__name__}:hook")
    assert "`record`" in caplog.text
