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
    Settings,
    Stats,
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


# What the contract writes down, in its order. More parameters may follow, by keyword and with a default.
CONTRACT: dict[str, dict[str, Any]] = {
    "deactivate": {"obj": REQUIRED, "slug": ANY, "key": ANY},
    "deactivate_and_create": {
        "obj": REQUIRED,
        "slug": None,
        "extra_data": None,
        "deactivate_old_tokens": True,
        "expiration_in_minutes": DEFAULT,
        "key_generator_kwargs": None,
    },
    "get_active_or_create": {"obj": REQUIRED, "slug": None},
    "exists_valid": {"obj": REQUIRED, "slug": ANY, "key": ANY},
    "filter_active_tokens": {"obj": REQUIRED, "slug": ANY, "key": ANY},
    "get": {"id": REQUIRED},
    "generate_key": {"generator": None},
    "content_object": {"token": REQUIRED},
    "verify": {"obj": REQUIRED, "slug": REQUIRED, "key": REQUIRED},
    "consume": {"obj": REQUIRED, "slug": REQUIRED, "key": REQUIRED},
    "redeem": {"obj": REQUIRED, "slug": REQUIRED, "key": REQUIRED},
    "save": {"token": REQUIRED},
    "purge": {"batch_size": 1000, "keep": timedelta(0)},
    "stats": {},
    "open": {},
    "aclose": {},
}
KEYWORDS: dict[str, dict[str, Any]] = {
    "consume": {"consume_id": None},
    "redeem": {"lease": timedelta(seconds=60)},
}


@pytest.mark.parametrize("name", CONTRACT)
def test_a_managers_method_has_the_contracts_signature(name: str) -> None:
    signature = inspect.signature(getattr(TokenManager, name))
    given = list(signature.parameters.values())[1:]
    wanted = CONTRACT[name]
    assert {p.name: p.default for p in given[: len(wanted)]} == wanted
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in given[: len(wanted)])
    by_keyword = {p.name: p for p in given}
    for keyword, default in KEYWORDS.get(name, {}).items():
        assert by_keyword[keyword].kind is inspect.Parameter.KEYWORD_ONLY
        assert by_keyword[keyword].default == default
    for extra in given[len(wanted) :]:
        assert extra.default is not REQUIRED or extra.kind in (extra.VAR_POSITIONAL, extra.VAR_KEYWORD)


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
        if name == "filter_active_tokens":
            assert inspect.isasyncgenfunction(method)
        else:
            assert inspect.iscoroutinefunction(method) is (name != "redeem")


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
    ]
    wanted = {"slug", "expiration", "key_generator", "key_length", "key_chars", "key_storage", "max_attempts"}
    wanted |= {"attempt_window", "cooldown", "max_uses", "overlap"}
    assert wanted <= {f.name for f in fields(TokenPolicy)}
    assert [f.name for f in fields(TokenPolicy) if not f.kw_only] == ["slug"]
    assert parameters(TokenPolicy.code)["digits"] == 6


def test_subjects_and_content_types() -> None:
    assert parameters(Subject) == {"content_type": REQUIRED, "object_id": ANY}
    assert parameters(ContentTypes.register) == {
        "cls": REQUIRED,
        "name": REQUIRED,
        "get_id": None,
        "load": None,
    }


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
