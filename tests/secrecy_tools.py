"""A store in a world full of canaries, and a sieve that finds them in every spelling."""

from __future__ import annotations

import base64
import copy
import logging
import pickle
import traceback
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import vtoken
from vtoken import (
    IssuedToken,
    Settings,
    Subject,
    TokenEvent,
    TokenManager,
    TokenPolicy,
    create_backend,
)
from vtoken.backend import Match
from vtoken.testing.clock import Clock

from .core_tools import START, USER, Watched

KEY: Final = "canaryLinkKeyOfThirtyTwoLetters1"
WRONG_KEY: Final = "canaryWrongKeyOfThirtyTwoLetter2"
CODE: Final = "8675309421"
WRONG_CODE: Final = "8675309422"
CONTEXT: Final = "canary-context-of-a-browser"
CONSUME_ID: Final = "canary-consume-id-of-a-form"
SECRET: Final = "canary-secret-of-32-bytes-or-more"
OLD_SECRET: Final = "canary-secret-of-times-gone-by-32"
CANARIES: Final = (KEY, WRONG_KEY, CODE, WRONG_CODE, CONTEXT, CONSUME_ID, SECRET, OLD_SECRET)
TESTS: Final = str(Path(__file__).parent)
SETTINGS: Final = Settings(secret=SECRET, previous_secrets=[OLD_SECRET])


def zeros() -> str:
    """A generator of the application's own."""
    return "0" * 10


TEST_CODE: Final = "867530"

POLICIES: Final = (
    TokenPolicy("link"),
    TokenPolicy("other"),
    # A generator of its own, which each call replaces by one that gives a canary.
    TokenPolicy.code("code", key_generator=zeros, cooldown="1ms"),
    TokenPolicy("bound", context="required", max_attempts=3),
    TokenPolicy("derived", key_storage="derived"),
    TokenPolicy("prefixed", prefix="vt_"),
    TokenPolicy("cooling", cooldown="1m"),
    TokenPolicy.pair("pair", key_storage="derived", cooldown="1ms"),
    TokenPolicy.code(
        "tested",
        cooldown="1ms",
        test_codes={Subject("auth.user", 42): TEST_CODE},
        test_codes_why="the sieve",
    ),
)


class Sieve:
    """Everything secret, in every spelling it could leak in."""

    def __init__(self) -> None:
        self.needles: set[bytes] = set()
        for canary in CANARIES:
            self.add(canary.encode())

    def add(self, secret: bytes) -> None:
        """Look for these bytes too: raw, in a repr, in hexadecimal, in base64, as a list of numbers."""
        spelt = {secret, repr(secret)[2:-1].encode(), secret.hex().encode(), str(list(secret))[1:-1].encode()}
        whole = base64.b64encode(secret).rstrip(b"=")
        self.needles |= {
            *spelt,
            secret.hex().upper().encode(),
            whole,
            base64.urlsafe_b64encode(secret).rstrip(b"="),
        }

    def check(self, found: str | bytes, where: str) -> None:
        data = found if isinstance(found, bytes) else found.encode(errors="backslashreplace")
        leaks = [needle for needle in self.needles if needle in data]
        assert not leaks, f"{leaks} in {where}: {found!r:.2000}"


def spellings(value: object) -> Iterator[str | bytes]:
    """What an object shows of itself to whoever logs, prints, pickles, copies or inspects it."""
    yield from (repr(value), str(value), f"{value}", f"{value!r:>50}", f"{[value]} {(value,)} { {1: value} }")
    yield "%s %r" % (value, value)  # noqa: UP031  # as logging does it
    yield repr(getattr(value, "__dict__", None))
    if is_dataclass(value) and not isinstance(value, type | Settings):
        yield repr(asdict(value))
    if isinstance(value, TokenManager | Settings):
        return  # a manager cannot be pickled, and a pickle of settings holds the secrets, as they say
    if isinstance(value, IssuedToken):
        return  # which cannot be pickled or copied
    for protocol in (0, 2, pickle.HIGHEST_PROTOCOL):
        yield pickle.dumps(value, protocol)
    for same in (copy.copy(value), copy.deepcopy(value)):
        yield repr(same)


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception with every cause and context there is."""
    waiting, seen = [error], set[int]()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting += [e for e in (one.__cause__, one.__context__) if e is not None]
        if isinstance(one, BaseExceptionGroup):
            waiting += one.exceptions


def frames(tb: TracebackType | None) -> str:
    """The locals of all frames but the tests' own, as an error tracker records them."""
    summary = traceback.StackSummary.extract(traceback.walk_tb(tb), capture_locals=True)
    return "\n".join(
        f"{f.filename}:{f.lineno} {name} = {shown}"  # as it is: a repr of the repr would double backslashes
        for f in summary
        if not f.filename.startswith(TESTS)
        for name, shown in (f.locals or {}).items()
    )


class Records(logging.Handler):
    """Every record of every logger."""

    def __init__(self) -> None:
        super().__init__(logging.NOTSET)
        self.records: list[logging.LogRecord] = []
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class Canary:
    """A store in a world full of canaries, and what was seen of it."""

    def __init__(self, url: str, directory: Path, records: Records) -> None:
        self.url = url
        self.directory = directory
        self.records = records
        self.clock = Clock(START)
        self.sieve = Sieve()
        self.events: list[TokenEvent] = []
        self.backend = Watched(create_backend(url))
        self._stack = AsyncExitStack()

    async def manager(self, settings: Settings = SETTINGS, hooks: tuple[Any, ...] = ()) -> TokenManager:
        manager = TokenManager(
            self.backend, settings, POLICIES, clock=self.clock, hooks=[*hooks, self.events.append]
        )
        return await self._stack.enter_async_context(manager)

    async def issue(self, manager: TokenManager, slug: str, key: str, **keywords: Any) -> vtoken.IssuedToken:
        token = await manager.deactivate_and_create(
            USER, slug, key_generator_kwargs={"generator": lambda: key}, **keywords
        )
        assert key in token.key
        await self.learn()
        return token

    async def learn(self) -> None:
        """From now on the stored digests are canaries too."""
        for stored in await self.backend.inner.find(Match(), 1000):
            for key in stored.keys:
                self.sieve.add(key.digest)
            if stored.context:
                self.sieve.add(stored.context)

    def check_value(self, value: object) -> None:
        for found in spellings(value):
            self.sieve.check(found, type(value).__name__)

    def check_error(self, error: BaseException) -> None:
        for one in chain(error):
            where = f"{type(one).__name__} of {type(error).__name__}"
            self.sieve.check(frames(one.__traceback__), f"the frames of {where}")
            self.sieve.check(f"{one} {one!r} {one.args} {vars(one)}", where)
            if isinstance(one, vtoken.VTokenError):
                self.check_value(one)

    def check_logs(self) -> None:
        formatter = logging.Formatter("%(name)s %(message)s")
        for record in self.records.records:
            where = f"the log of {record.name}"
            told = {k: v for k, v in vars(record).items() if k != "exc_info"}
            self.sieve.check(f"{formatter.format(record)} {told}", where)
            if record.exc_info and record.exc_info[1]:
                self.check_error(record.exc_info[1])
        self.records.seen += [record.name for record in self.records.records]
        self.records.records.clear()

    def check_store(self, *, kept: bytes = b"") -> None:
        """No plaintext in the files, read past the backend; digests are what they are for."""
        for path in self.directory.iterdir():
            data = path.read_bytes()
            for canary in CANARIES:
                if canary.encode() != kept:
                    for spelling in (
                        canary.encode(),
                        canary.encode().hex().encode(),
                        base64.b64encode(canary.encode()),
                    ):
                        assert spelling not in data, path.name

    def check_all(self) -> None:
        for event in self.events:
            self.check_value(event)
        self.check_logs()
        self.check_store()

    async def aclose(self) -> None:
        await self._stack.aclose()
