"""The manager, as an application calls it."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from datetime import datetime, timedelta
from typing import Any, assert_type

from vtoken import (
    ANY,
    DEFAULT,
    ContentTypes,
    IssuedToken,
    Limit,
    Settings,
    SlugStats,
    Stats,
    Status,
    Subject,
    TokenBackend,
    TokenEvent,
    TokenManager,
    TokenPolicy,
    VerificationToken,
    create_backend,
)


class User:
    id = 7


async def load_user(object_id: str) -> User | None:
    return User() if object_id == "7" else None


def hear(event: TokenEvent) -> None: ...


async def hear_later(event: TokenEvent) -> None: ...


def made(settings: Settings, policies: list[TokenPolicy], content_types: ContentTypes) -> None:
    assert_type(create_backend("memory://"), TokenBackend)
    assert_type(TokenManager.from_url("memory://"), TokenManager)
    assert_type(TokenManager.from_env(policies=policies), TokenManager)
    TokenManager(
        create_backend("memory://"),
        settings,
        policies,
        content_types,
        hooks=[hear, hear_later, "a.path:hook"],
    )
    TokenManager("memory://")  # type: ignore[arg-type]  # a backend is no URL
    TokenManager(create_backend("memory://"), hooks=[print, 7])  # type: ignore[list-item]  # 7 is no hook
    content_types.register(User, "auth.user", get_id=lambda user: user.id, load=load_user)
    content_types.register(User, "auth.user", load=lambda object_id: User())
    content_types.register(User, "auth.user", get_id=lambda user: user.name)  # type: ignore[attr-defined]  # a User has no name


class OwnManager(TokenManager):
    pass


async def opened() -> None:
    async with OwnManager.from_url("memory://") as manager:
        assert_type(manager, OwnManager)


async def issued(manager: TokenManager, user: User) -> None:
    token = await manager.deactivate_and_create(user, "password-reset")
    assert_type(token, IssuedToken)
    assert_type(token.key, str)
    await manager.deactivate_and_create(user, None, {"any": ["JSON"]}, expiration_in_minutes=None)
    await manager.deactivate_and_create(user, expiration_in_minutes=1.5)
    await manager.deactivate_and_create(user, expiration_in_minutes=DEFAULT)
    await manager.deactivate_and_create(user, expiration_in_minutes="1h")
    await manager.deactivate_and_create(user, expiration_in_minutes=b"60")  # type: ignore[arg-type]  # bytes are no time
    await manager.deactivate_and_create(user, ANY)  # type: ignore[arg-type]  # a token has one purpose

    short = await manager.issue(user, "log-in", expires_in="5m", context={"cookie": "abc"}, by={"ip": "::1"})
    assert_type(short, IssuedToken)
    assert_type(short.code, str | None)
    assert_type(short.code_expires_at, datetime | None)
    await manager.issue(user, "log-in", {"n": 1})  # type: ignore[call-arg]  # by its name only
    await manager.issue(user, "log-in", context=fingerprint)
    await manager.issue(user, "log-in", context=5)  # type: ignore[arg-type]  # no text, nor what returns one
    assert_type(await manager.pretend(user, "log-in"), None)
    assert_type(await manager.reveal(short), IssuedToken | None)
    async with manager.issuing(user, "log-in", expires_in=timedelta(minutes=5)) as sent:
        assert_type(sent, IssuedToken)
    async for one in manager.issue_many([user], "log-in", batch="spring", progress=print):
        assert_type(one, VerificationToken)

    found = await manager.get_active_or_create(user, "password-reset", at_least="10m")
    assert_type(found, VerificationToken)
    assert_type(found.key, str | None)
    mail(found.key)  # type: ignore[arg-type]  # it may be None: nobody mails "None"
    if found.key is not None:
        mail(found.key)
    assert_type(await manager.generate_key(), str)


def mail(key: str) -> None: ...


async def fingerprint(object_id: str) -> str:
    return f"password hash of {object_id}"


async def checked(manager: TokenManager, user: User, field: str | None) -> None:
    assert_type(await manager.verify(user, "password-reset", "key"), VerificationToken)
    assert_type(await manager.exists_valid(user), bool)
    await manager.exists_valid(user, ANY, ANY)
    await manager.exists_valid(user, None, "key")
    await manager.exists_valid(user, "password-reset", field)  # type: ignore[arg-type]  # a missing form field
    await manager.verify(user, "password-reset", field)  # type: ignore[arg-type]  # the field may be missing
    await manager.verify(user, ANY, "key")  # type: ignore[arg-type]  # one purpose never passes for another
    await manager.verify(user, "password-reset", ANY)  # type: ignore[arg-type]  # any key at all
    await manager.verify(user, "password-reset")  # type: ignore[call-arg]  # no key
    assert_type(manager.filter_active_tokens(user, ANY), AsyncGenerator[VerificationToken, None])
    async for token in manager.filter_active_tokens(user):
        assert_type(token, VerificationToken)
        assert_type(token.get_extra_data(), Any)
        token.key = "key"  # type: ignore[misc]  # read only
    assert_type(await manager.get("an id"), VerificationToken | None)
    status = await manager.status(user, "password-reset")
    assert_type(status, Status)
    assert_type(status.can_issue_at, datetime)
    assert_type(status.attempts_left, int | None)
    await manager.status(user)  # type: ignore[call-arg]  # of one purpose
    assert_type(manager.history(user), AsyncGenerator[VerificationToken, None])
    assert_type(await manager.ping(), float)


async def used(manager: TokenManager, user: User) -> None:
    assert_type(await manager.consume(User, "password-reset", "key"), VerificationToken)
    await manager.consume(Subject("auth.user"), None, "key", consume_id="request-17", context="nonce")
    await manager.consume(user, ANY, "key")  # type: ignore[arg-type]  # one purpose never passes for another
    await manager.consume(user, "password-reset", ANY)  # type: ignore[arg-type]  # any key at all
    await manager.consume(user, "password-reset", None)  # type: ignore[arg-type]  # a missing field
    await manager.consume(user, "password-reset", "key", "request-17")  # type: ignore[call-arg]  # by its name only

    block = manager.redeem(user, "password-reset", "key", lease=timedelta(seconds=5), wait="2s")
    assert_type(block, AbstractAsyncContextManager[VerificationToken, None])
    async with block as token:
        assert_type(token, VerificationToken)
        assert_type(token.is_replay, bool)
        assert_type(token.max_uses, int | None)
        assert_type(await manager.mark_used(token, using=object()), None)
        await manager.mark_used(token)  # type: ignore[call-arg]  # in which transaction?
        assert_type(await manager.content_object(token), object | None)
    await manager.redeem(user, "password-reset", "key")  # type: ignore[misc]  # it is no coroutine
    manager.redeem(user, "password-reset", "key", lease=5)  # type: ignore[arg-type]  # of what?


async def ended(manager: TokenManager, user: User, token: VerificationToken) -> None:
    assert_type(await manager.deactivate(user), int)
    await manager.deactivate(user, None)
    await manager.deactivate(user, ANY, "key")
    await manager.deactivate(user, ANY, None)  # type: ignore[arg-type]  # a missing field
    await manager.deactivate(user, using=object())
    await manager.deactivate(token)
    await manager.deactivate(User, all_objects=True)
    assert_type(await manager.erase(user), int)
    assert_type(await manager.reset_limits(user, "log-in"), int)
    assert_type(await manager.purge(keep=timedelta(hours=1)), int)
    async with manager.sweeper("10m", keep="1d"):
        pass
    stats = await manager.stats()
    assert_type(stats, Stats)
    assert_type(stats.by_slug["password-reset"], SlugStats)
    stats.total = 0  # type: ignore[misc]  # frozen
    await manager.save(token)
    await manager.save(token.id)  # type: ignore[arg-type]  # an id is no token


def policies() -> None:
    limit = Limit(20, "1d", by="ip", across="sms")
    assert_type(limit.count, int)
    Limit("20", "1d")  # type: ignore[arg-type]  # a number
    Limit(20, 60)  # type: ignore[arg-type]  # of what?
    assert_type(TokenPolicy.link("password-reset", cooldown=timedelta(minutes=1)), TokenPolicy)
    assert_type(TokenPolicy.code("sms-login", digits=8, issue_limits=[limit], channel="email"), TokenPolicy)
    assert_type(TokenPolicy.pair("log-in", code_expiration="5m", code_context="ignored"), TokenPolicy)
    codes = {Subject("auth.phone", "+15550100"): "123456"}
    TokenPolicy.code("sms-login", test_codes=codes, test_codes_why="app-store review", expiration="5m")
    TokenPolicy("log-in", max_uses=None, overlap="5m", expiration=timedelta(hours=1))
    TokenPolicy("log-in", cooldown=60)  # type: ignore[arg-type]  # of what?
    TokenPolicy("log-in", context="maybe")  # type: ignore[arg-type]  # required or ignored
    TokenPolicy("log-in", 60)  # type: ignore[call-arg]  # by their names only
    TokenPolicy.link("log-in", coldown="1m")  # type: ignore[call-arg]  # misspelt
    TokenPolicy.link("log-in", cooldown=60)  # type: ignore[arg-type]  # of what?
    TokenPolicy.link("log-in", channel="email")  # type: ignore[call-arg]  # for codes
    TokenPolicy.code("log-in", prefix="vt_")  # type: ignore[call-arg]  # for links
    TokenPolicy.pair("log-in", key_generator=print)  # type: ignore[call-arg]  # a pair has none of its own
    Settings(key_storage="encrypted")  # type: ignore[arg-type]  # not a way to store keys
    Settings(unknown_slugs="deny")  # type: ignore[arg-type]  # allow or refuse
    Settings(default_expiration="1h", unknown_slugs="refuse")
    Settings(60)  # type: ignore[call-arg]  # by keyword only
    Settings().secret = None  # type: ignore[misc]  # frozen
    Subject("auth.user", None)  # type: ignore[arg-type]  # never for all of them
    Subject("auth.user", 7)
