"""What people paste, forms garble and applications mistake: inputs that were reported to go wrong.

Each test has the input of a report (issue 11, faults 15 and 17 to 27), and plays it on every backend that
needs no server; the conformance suite holds the others to the same records.
"""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from vtoken import (
    ConfigurationError,
    ContentTypes,
    InvalidInput,
    InvalidToken,
    Subject,
    TokenBackend,
    TokenManager,
    TokenPolicy,
    create_backend,
)
from vtoken.backend import InsertMode, Match
from vtoken.redact import redact_url

from .core_tools import CODE, OTHER, SECRETS, USER, World, reason, refused


@pytest.fixture(params=["memory", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TokenBackend]:
    url = "memory://" if request.param == "memory" else f"sqlite:///{tmp_path}/tokens.db"
    backend = create_backend(url)
    await backend.open()
    yield backend
    await backend.close()


def fixed(code: str) -> TokenPolicy:
    """A policy whose codes are all the same, from a generator of the application's own."""
    return TokenPolicy.code("login", key_generator=lambda: code)


@pytest.mark.parametrize("typed", ["", "12345", "1234567", "12345x", "  ", "...", "the code", "1234 5"])
async def test_fault_15_what_is_no_code_costs_no_attempt(
    world: World, store: TokenBackend, typed: str
) -> None:
    """Five empty forms, or five codes of five digits, spent the budget of a six-digit code."""
    manager = await world.manager(CODE, backend=store)
    issued = await manager.issue(USER, "login")
    for _ in range(6):
        error = await refused(InvalidToken, manager.verify(USER, "login", typed))
        assert (error.reason, error.attempts_left) == ("unknown", None)
    assert await manager.consume(USER, "login", issued.key) == issued


PASTED = {
    "zero-width space": "{0}\u200b{1}",
    "byte order mark": "\ufeff{0}{1}",
    "en dash": "{0}\u2013{1}",
    "non-breaking hyphen": "{0}\u2011{1}",
    "dots": "{0}.{1}.",
    "white space": " {0} {1}\r\n",
}
SCRIPTS = {"full width": 0xFF10, "Arabic": 0x0660, "Devanagari": 0x0966}


@pytest.mark.parametrize("how", [*PASTED, *SCRIPTS])
async def test_fault_17_a_right_code_however_it_was_pasted(
    world: World, store: TokenBackend, how: str
) -> None:
    """A code that was pasted with what mail programs add counted as a wrong one."""
    manager = await world.manager(CODE, backend=store)
    issued = await manager.issue(USER, "login")
    key = issued.key
    if how in PASTED:
        typed = PASTED[how].format(key[:3], key[3:])
    else:
        typed = "".join(chr(SCRIPTS[how] + int(digit)) for digit in key)
    assert typed != key
    assert await manager.consume(USER, "login", typed) == issued


@pytest.mark.parametrize("pasted", ["{}\n", " {}", "\ufeff{}\u200b", "{}\r\n\t", "\u2060{}\u00a0"])
async def test_fault_17_a_link_with_white_space_at_its_ends(
    world: World, store: TokenBackend, pasted: str
) -> None:
    manager = await world.manager(backend=store)
    issued = await manager.issue(USER, "reset")
    assert await manager.exists_valid(USER, "reset", pasted.format(issued.key))
    assert await manager.consume(USER, "reset", pasted.format(issued.key)) == issued
    assert await reason(manager.verify(USER, "reset", issued.key[:16] + " " + issued.key[16:])) == "unknown"


@pytest.mark.parametrize("drawn", [" generated\n", "\ufeffgenerated", "gen erated\t"])
async def test_fault_17_a_generators_key_with_white_space_at_its_ends(
    world: World, store: TokenBackend, drawn: str
) -> None:
    given = TokenPolicy.link("reset", key_generator=lambda: drawn)
    manager = await world.manager(given, backend=store)
    issued = await manager.issue(USER, "reset")
    assert issued.key == drawn
    assert await manager.exists_valid(USER, "reset", drawn.strip("\n\t\ufeff "))
    assert await manager.consume(USER, "reset", drawn) == issued


@pytest.mark.parametrize("key", ["a\0b", "\ud800", "x" * 600])
@pytest.mark.parametrize("slug", ["login", "reset"])
async def test_fault_18_a_key_that_the_form_garbled_is_a_bad_token(
    world: World, store: TokenBackend, slug: str, key: str
) -> None:
    """It was answered by a server error."""
    manager = await world.manager(CODE, backend=store)
    await manager.issue(USER, "reset")
    for call in (manager.verify, manager.consume):
        assert await reason(call(USER, slug, key)) == "unknown"
    with pytest.raises(InvalidToken):
        async with manager.redeem(USER, slug, key):
            pytest.fail("entered")
    assert not await manager.exists_valid(USER, "reset", key)
    assert await manager.deactivate(USER, "reset", key) == 0
    assert [token async for token in manager.filter_active_tokens(USER, "reset", key)] == []


class User:
    def __init__(self, id: int | None) -> None:  # noqa: A002  # the attribute's name
        self.id = id


async def test_fault_18_a_mistake_of_the_application_is_not_called_a_bad_token(world: World) -> None:
    """An unsaved user, a datetime as data, no time to live: each was told to a visitor as a bad token."""
    types = ContentTypes()
    types.register(User, "auth.user")
    manager = await world.manager(content_types=types)
    unsaved = await refused(InvalidInput, manager.issue(User(None), "reset"))
    assert "save it" in str(unsaved)
    data = await refused(
        InvalidInput, manager.issue(User(1), "reset", extra_data={"at": datetime(2026, 1, 1)})
    )
    assert "isoformat" in str(data)
    lifetime = await refused(InvalidInput, manager.deactivate_and_create(User(1), expiration_in_minutes=0))
    assert "more than 0 minutes" in str(lifetime)
    async with TokenManager(world.backend, clock=lambda: datetime(2026, 1, 1)) as naive:
        clock = await refused(Exception, naive.issue(USER, "reset"))
        assert not isinstance(clock, InvalidToken)
        assert "aware" in str(clock)
    for error in (unsaved, data, lifetime):
        assert not isinstance(error, InvalidToken)


@pytest.mark.parametrize(("before", "after"), [("", "vt_"), ("vt_", ""), ("vt_", "app_"), ("vt_", "vt_x_")])
async def test_fault_19_links_outlive_a_change_of_the_prefix(
    world: World, store: TokenBackend, before: str, after: str
) -> None:
    """Adding or changing a policy's prefix killed every outstanding link."""
    manager = await world.manager(TokenPolicy.link("reset", prefix=before), backend=store)
    issued = await manager.issue(USER, "reset")
    changed = await world.manager(TokenPolicy.link("reset", prefix=after), backend=store)
    assert await changed.consume(USER, "reset", issued.key) == issued


async def test_fault_20_a_fixed_code_can_be_issued_again(world: World, store: TokenBackend) -> None:
    """Its own ended row was in the way until a purge."""
    manager = await world.manager(fixed("123456"), backend=store)
    for _ in range(3):
        issued = await manager.issue(USER, "login")
        assert await manager.consume(USER, "login", "123456") == issued
    assert await manager.issue(USER, "login") != await manager.issue(USER, "login")
    other = await manager.issue(OTHER, "login")
    assert await manager.consume(OTHER, "login", "123456") == other


@pytest.mark.parametrize(
    "arguments",
    [
        {"expiration_in_minutes": None},
        {"expiration_in_minutes": 11},
        {"key_generator_kwargs": {"length": 1}},
        {"key_generator_kwargs": {"allowed_chars": "01"}},
        {"key_generator_kwargs": {"generator": lambda: "1"}},
    ],
    ids=["for ever", "11 minutes", "length", "alphabet", "generator"],
)
async def test_fault_21_a_call_is_held_to_the_floors(
    world: World, store: TokenBackend, arguments: dict[str, Any]
) -> None:
    """Floors held for policies and not for calls."""
    manager = await world.manager(CODE, backend=store)
    await refused(InvalidInput, manager.deactivate_and_create(USER, "login", **arguments))
    await refused(InvalidInput, manager.get_active_or_create(USER, "login", **arguments))
    assert not await manager.exists_valid(USER, "login")


@pytest.mark.parametrize("drawn", ["-", " - . ", "\u200b\u200b", "___"])
async def test_fault_21_no_empty_code(world: World, store: TokenBackend, drawn: str) -> None:
    """A generator that returned only separators made the empty code valid."""
    link = TokenPolicy.link("reset", key_generator=lambda: " \u200b\n")
    manager = await world.manager(fixed(drawn), link, backend=store)
    await refused(ConfigurationError, manager.issue(USER, "login"))
    await refused(ConfigurationError, manager.issue(USER, "reset"))
    assert await reason(manager.verify(USER, "login", "")) == "unknown"


async def test_fault_22_a_digest_without_the_secret_is_not_accepted(
    world: World, store: TokenBackend
) -> None:
    """A row whose digest was replaced by a plain SHA-256 was accepted, though the row said HMAC."""
    manager = await world.manager(backend=store)
    issued = await manager.issue(USER, "reset")
    [right] = await store.find(Match(id=issued.id), 1)
    forged = right._replace(
        id="7" + "0" * 15,
        keys=tuple(
            key._replace(digest=hashlib.sha256(b"forged").digest(), origin="7" + "0" * 15)
            for key in right.keys
        ),
    )
    await store.insert(forged, InsertMode.REPLACE)
    assert await reason(manager.verify(USER, "reset", "forged")) == "unknown"
    assert await reason(manager.consume(USER, "reset", "forged")) == "unknown"
    assert not await manager.exists_valid(USER, "reset", "forged")
    with pytest.raises(InvalidToken):
        async with manager.redeem(USER, "reset", "forged"):
            pytest.fail("entered")
    [kept] = await store.find(Match(id=forged.id), 1)
    assert kept.holds == ()


@pytest.mark.parametrize("slug", ["reset", "login"])
async def test_fault_23_a_context_that_would_not_be_heeded_is_refused(
    world: World, store: TokenBackend, slug: str
) -> None:
    """It was ignored without a word."""
    manager = await world.manager(CODE, backend=store)
    issued = await manager.issue(USER, slug)
    for call in (
        manager.issue(USER, slug, context="cookie"),
        manager.verify(USER, slug, issued.key, context="cookie"),
        manager.consume(USER, slug, issued.key, context="cookie"),
        manager.exists_valid(USER, slug, issued.key, context="cookie"),
        manager.status(USER, slug, context="cookie"),
    ):
        error = await refused(InvalidInput, call)
        assert "cookie" not in str(error)
    assert await manager.consume(USER, slug, issued.key) == issued


async def test_fault_24_a_lazy_proxy_is_its_object(world: World) -> None:
    """It was refused, though ``isinstance`` was true."""

    class Lazy:
        __class__ = User  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]  # as a proxy says
        id = 1

    types = ContentTypes()
    types.register(User, "auth.user")
    manager = await world.manager(content_types=types)
    issued = await manager.issue(Lazy(), "reset")
    assert await manager.consume(User(1), "reset", issued.key) == issued


@pytest.mark.parametrize("everybody", [Subject("auth.user"), User])
async def test_fault_26_a_class_ends_everybodys_tokens_only_if_it_is_said(
    world: World, store: TokenBackend, everybody: Any
) -> None:
    """``deactivate(Subject("auth.user"))`` ended a thousand tokens unasked."""
    types = ContentTypes()
    types.register(User, "auth.user")
    manager = await world.manager(backend=store, content_types=types)
    issued = [await manager.issue(User(number), "reset") for number in range(3)]
    await refused(InvalidInput, manager.deactivate(everybody))
    await refused(InvalidInput, manager.deactivate(everybody, "reset"))
    assert await manager.deactivate(everybody, key=issued[0].key) == 1
    assert await manager.deactivate(everybody, all_objects=True) == 2


@pytest.mark.parametrize(
    ("url", "redacted"),
    [
        ("mongodb://h/d?pw=hunter2", "mongodb://h/d?pw=***"),
        ("mongodb://h/d?key=hunter2&w=1", "mongodb://h/d?key=***&w=1"),
        ("mongodb://h/d?auth=hunter2", "mongodb://h/d?auth=***"),
        ("mongodb://h/d?authSource=admin", "mongodb://h/d?authSource=admin"),
        ("sqlite:///tokens.db#hunter2", "sqlite:///tokens.db#***"),
        ("postgresql://h/d?sslpassword=hunter2#hunter2", "postgresql://h/d?sslpassword=***#***"),
        ("mongodb://u:hunter2@h/d#x@y?key=hunter2", "mongodb://u:***@y?key=***"),
    ],
)
def test_fault_27_what_a_url_may_hide(url: str, redacted: str) -> None:
    assert redact_url(url) == redacted


def test_fault_27_a_misspelt_keyword_shows_no_password() -> None:
    """The ``TypeError`` of ``from_url(url, typo=1)`` had the password in its frames."""
    for make in (TokenManager.from_url, create_backend):
        with pytest.raises((TypeError, ConfigurationError)) as info:
            make("memory://user:hunter2@host", typo=1)
        shown = traceback.TracebackException.from_exception(info.value, capture_locals=True)
        ours = [frame for frame in shown.stack if frame.filename != __file__]
        assert "hunter2" not in repr([frame.locals for frame in ours])
        assert "hunter2" not in str(info.value)


def test_settings_and_durations_are_as_long_as_they_say() -> None:
    """``cooldown=60`` meant nothing that could be told: sixty of what?"""
    with pytest.raises(ConfigurationError, match="'60s'"):
        TokenPolicy.link("reset", cooldown=60)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # on purpose
    assert TokenPolicy.link("reset", cooldown=timedelta(seconds=60)).cooldown == timedelta(seconds=60)
    assert SECRETS.unknown_slugs == "allow"
