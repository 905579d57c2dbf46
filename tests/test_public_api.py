"""The public names, and the signatures that the contract gives."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields, is_dataclass
from datetime import timedelta
from typing import Any

import pytest

import vtoken
from vtoken import (
    ANY,
    DEFAULT,
    ContentTypes,
    IssuedToken,
    Limit,
    Settings,
    Stats,
    Status,
    Subject,
    TokenBackend,
    TokenManager,
    TokenPolicy,
    VerificationToken,
    errors,
    utc_now,
)
from vtoken_backends.memory import MemoryBackend

from .core_tools import START

REQUIRED = inspect.Parameter.empty


def parameters(function: Any) -> dict[str, Any]:
    """Names and defaults, without ``self``."""
    found = inspect.signature(function).parameters
    return {name: p.default for name, p in found.items() if name != "self"}


ISSUE: dict[str, Any] = {
    "extra_data": None,
    "replace": True,
    "expires_in": DEFAULT,
    "key_generator_kwargs": None,
    "context": None,
    "by": None,
}
BASES_ISSUE: dict[str, Any] = {
    "extra_data": None,
    "expiration_in_minutes": DEFAULT,
    "key_generator_kwargs": None,
}
KEY: dict[str, Any] = {"obj": REQUIRED, "slug": REQUIRED, "key": REQUIRED}

# What the contract writes down, in its order: what may be given by position, and what by keyword only.
CONTRACT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "issue": ({"obj": REQUIRED, "slug": None}, {**ISSUE, "using": None}),
    "deactivate_and_create": (
        {
            "obj": REQUIRED,
            "slug": None,
            "extra_data": None,
            "deactivate_old_tokens": True,
            "expiration_in_minutes": DEFAULT,
            "key_generator_kwargs": None,
        },
        {"context": None, "by": None, "using": None},
    ),
    "issuing": ({"obj": REQUIRED, "slug": None}, ISSUE),
    "issue_many": (
        {"subjects": REQUIRED, "slug": None},
        {"batch": None, **ISSUE, "progress": None},
    ),
    "pretend": ({"obj": REQUIRED, "slug": None}, ISSUE),
    "get_active_or_create": (
        {"obj": REQUIRED, "slug": None, **BASES_ISSUE},
        {"context": None, "by": None, "at_least": timedelta(0)},
    ),
    "reveal": ({"token": REQUIRED}, {}),
    "exists_valid": ({"obj": REQUIRED, "slug": ANY, "key": ANY}, {"context": None, "by": None}),
    "filter_active_tokens": ({"obj": REQUIRED, "slug": ANY, "key": ANY}, {}),
    "verify": (KEY, {"context": None, "by": None}),
    "consume": (KEY, {"consume_id": None, "context": None, "by": None}),
    "redeem": (
        KEY,
        {"lease": "60s", "wait": timedelta(0), "consume_id": None, "context": None, "by": None},
    ),
    "mark_used": ({"token": REQUIRED}, {"using": REQUIRED}),
    "status": ({"obj": REQUIRED, "slug": REQUIRED}, {"context": None, "by": None}),
    "deactivate": ({"obj": REQUIRED, "slug": ANY, "key": ANY}, {"all_objects": False, "using": None}),
    "history": ({"obj": REQUIRED, "slug": ANY}, {}),
    "erase": ({"obj": REQUIRED}, {"using": None}),
    "reset_limits": ({"obj": REQUIRED, "slug": ANY}, {}),
    "get": ({"id": REQUIRED}, {}),
    "generate_key": ({"generator": None}, {}),
    "content_object": ({"token": REQUIRED}, {}),
    "save": ({"token": REQUIRED}, {"using": None}),
    "purge": ({"batch_size": 1000, "keep": timedelta(0), "progress": None}, {}),
    "stats": ({}, {}),
    "ping": ({}, {}),
    "open": ({}, {}),
    "aclose": ({}, {}),
}
NOT_COROUTINES = {"filter_active_tokens", "history", "issue_many", "issuing", "redeem"}


@pytest.mark.parametrize("name", CONTRACT)
def test_a_managers_method_has_the_contracts_signature(name: str) -> None:
    given = list(inspect.signature(getattr(TokenManager, name)).parameters.values())[1:]
    by_position = {p.name: p.default for p in given if p.kind is p.POSITIONAL_OR_KEYWORD}
    by_keyword = {p.name: p.default for p in given if p.kind is p.KEYWORD_ONLY}
    assert (list(by_position.items()), by_keyword) == (list(CONTRACT[name][0].items()), CONTRACT[name][1])


def test_the_managers_public_methods_are_the_contracts() -> None:
    public = {n for n, _ in inspect.getmembers(TokenManager, callable) if n[0] != "_"}
    assert public == {*CONTRACT, "from_url", "from_env", "sweeper"}


def test_how_a_manager_is_made() -> None:
    assert parameters(TokenManager) == {
        "backend": REQUIRED,
        "settings": None,
        "policies": (),
        "content_types": None,
        "clock": utc_now,
        "hooks": (),
    }


def test_what_is_async_and_what_is_not() -> None:
    for name in CONTRACT:
        method = getattr(TokenManager, name)
        assert inspect.iscoroutinefunction(method) is (name not in NOT_COROUTINES)
    for name in ("filter_active_tokens", "history", "issue_many"):
        assert inspect.isasyncgenfunction(getattr(TokenManager, name))


def test_settings_and_policies_have_the_contracts_fields() -> None:
    assert [f.name for f in fields(Settings)] == [
        "default_expiration",
        "default_key_generator",
        "default_key_length",
        "default_key_chars",
        "max_key_iterations",
        "secret",
        "previous_secrets",
        "key_storage",
        "unknown_slugs",
    ]
    wanted = {"slug", "expiration", "key_generator", "key_length", "key_chars", "key_storage", "max_attempts"}
    wanted |= {
        "attempt_window",
        "cooldown",
        "max_uses",
        "overlap",
        "attempt_limits",
        "issue_limits",
        "prefix",
    }
    wanted |= {"prefix", "context", "channel", "test_codes", "test_codes_why", "allow_weak"}
    assert wanted <= {f.name for f in fields(TokenPolicy)}
    assert [f.name for f in fields(TokenPolicy) if not f.kw_only] == ["slug"]
    assert parameters(TokenPolicy.code)["digits"] == 6
    assert (parameters(TokenPolicy.pair)["digits"], parameters(TokenPolicy.pair)["code_expiration"]) == (
        6,
        "10m",
    )
    assert [f.name for f in fields(Limit) if f.init] == ["count", "per", "by", "across"]


def test_subjects_and_content_types() -> None:
    assert parameters(Subject) == {"content_type": REQUIRED, "object_id": ANY}
    assert parameters(ContentTypes.register) == {
        "cls": REQUIRED,
        "name": REQUIRED,
        "get_id": None,
        "load": None,
    }


def test_status_is_a_dataclass() -> None:
    names = ["has_valid", "expires_at", "attempts_left", "attempts_reset_at", "can_issue_at"]
    assert [field.name for field in fields(Status)] == [*names, "code_expires_at", "can_issue_in"]


def test_stats_is_a_dataclass() -> None:
    assert is_dataclass(Stats)
    assert {f.name for f in fields(Stats)} >= {"total", "active", "expired", "used"}


def test_a_token_has_the_bases_fields_and_methods() -> None:
    token = VerificationToken(id="1", created_at=START, content_type="u", object_id="1")
    for name in (
        "id",
        "created_at",
        "content_type",
        "object_id",
        "key",
        "expires_at",
        "slug",
        "is_active",
        "extra_data",
        "max_uses",
        "uses",
        "used_at",
        "is_replay",
        "code",
        "code_expires_at",
    ):
        assert hasattr(token, name)
    assert parameters(VerificationToken.is_valid) == {"now": None}
    assert parameters(VerificationToken.set_extra_data) == {"data": REQUIRED}
    assert parameters(VerificationToken.get_extra_data) == {}
    assert issubclass(IssuedToken, VerificationToken)


def test_all_is_everything_public_and_sorted_by_kind() -> None:
    assert len(set(vtoken.__all__)) == len(vtoken.__all__)
    for name in vtoken.__all__:
        assert hasattr(vtoken, name)
    in_errors = {n for n, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, Exception)}
    assert in_errors <= set(vtoken.__all__)
    wanted = {
        "TokenManager",
        "TokenPolicy",
        "Settings",
        "Subject",
        "ContentTypes",
        "ANY",
        "DEFAULT",
        "TokenBackend",
    }
    wanted |= {
        "VerificationToken",
        "IssuedToken",
        "create_backend",
        "register_backend",
        "Stats",
        "TokenEvent",
        "Limit",
        "Status",
        "TokenBusy",
        "AlreadyUsed",
    }
    assert wanted <= set(vtoken.__all__)


def test_a_backend_satisfies_the_protocol() -> None:
    assert isinstance(MemoryBackend(), TokenBackend)


DOCUMENTED = [
    n for n in vtoken.__all__ if inspect.isclass(getattr(vtoken, n)) or callable(getattr(vtoken, n))
]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_public_name_is_documented(name: str) -> None:
    found = getattr(vtoken, name)
    assert inspect.getdoc(found)
    if inspect.isclass(found) and not issubclass(found, Exception):
        for member, value in vars(found).items():
            if member[0] != "_" and inspect.isfunction(value):
                assert inspect.getdoc(value), f"{name}.{member}"


def test_importing_it_loads_no_driver_and_no_test_framework() -> None:
    script = (
        "import sys, vtoken, vtoken_backends.memory\n"
        "heavy = {'aiosqlite', 'sqlite3', 'pymongo', 'motor', 'pytest', 'rich', 'cyclopts'}\n"
        "print(sorted(heavy & {*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
