"""Options and arguments that commands share."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from getpass import getpass
from pathlib import Path
from typing import Annotated, Any, Final, cast

import anyio.to_thread
from cyclopts import Parameter

from vtoken import inputs
from vtoken.config import Configuration, create_backend, redact_url
from vtoken.config_read import lifetime as read_lifetime
from vtoken.diagnostics import diagnostics_of
from vtoken.errors import BackendUnavailable, ConfigurationError, InvalidInput
from vtoken.inputs import ANY, DEFAULT, MAX_KEY_BYTES, Lifetime, Unset, Wildcard
from vtoken.loading import import_object
from vtoken.manager import TokenManager
from vtoken.registry import url_of
from vtoken.subject import ContentTypes, Subject
from vtoken.sync import SyncTokenManager

DEFAULT_URL: Final = "sqlite:///tokens.db"


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Output:
    """How a command answers."""

    json: Annotated[bool, Parameter(negative="", show_default=False, help="Answer in JSON.")] = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Store(Output):
    """Which store a command works on, and with which settings and policies."""

    url: Annotated[
        str | None,
        Parameter(
            help="The store. Left out: VTOKEN_URL, else that of the configuration file (VTOKEN_CONFIG, or"
            " vtoken.toml or [tool.vtoken] of pyproject.toml in the working directory), else"
            f" {DEFAULT_URL}."
        ),
    ] = None

    manager: Annotated[
        str | None,
        Parameter(
            help="The application's own manager (TokenManager or SyncTokenManager, or a function that returns"
            " one), package.module:attribute, with its store, settings and policies. Left out, and without"
            " --url: VTOKEN_MANAGER, else that of the configuration file, else none."
        ),
    ] = None

    def configuration(self) -> Configuration:
        """What the environment, the configuration file and ``--url`` say."""
        return Configuration.from_env(url=self.url, default_url=DEFAULT_URL, folder=Path.cwd())

    def managers_path(self) -> str | None:
        """Where the application's own manager is, or None for one that is made here."""
        if self.manager is not None or self.url is not None:
            return self.manager
        return self.configuration().manager

    def address(self, manager: TokenManager) -> str:
        """The URL of a manager's store, without passwords."""
        url = url_of(manager.backend)
        return repr(manager.backend) if url is None else redact_url(url)

    def shown(self, manager: TokenManager) -> str:
        """The same for people, with the application's own manager where it is that one's."""
        path = self.managers_path()
        return self.address(manager) if path is None else f"{self.address(manager)} ({path})"

    def made(self) -> TokenManager:
        """A manager as configured, or the application's own; not open yet.

        Raises:
            ConfigurationError: the configuration cannot work, or ``--manager`` names something else.
        """
        path = self.managers_path()
        if path is None:
            found = self.configuration()
            with silenced():
                return TokenManager(
                    create_backend(found.url),
                    settings=found.settings,
                    policies=found.policies,
                    hooks=found.hooks,
                )
        if self.url is not None:
            raise ConfigurationError("--manager has a store of its own: leave out --url")
        return applications_own(path)

    @asynccontextmanager
    async def opened(
        self, manager: TokenManager | None = None, *, may_make_it: bool = False
    ) -> AsyncGenerator[TokenManager]:
        """A manager, open.

        Args:
            manager: the one to open; left out, it is :meth:`made`.
            may_make_it: whether the store may be made where there is none.

        Raises:
            BackendUnavailable: there is no store, and this command must not make one.
        """
        manager = manager or self.made()
        url = url_of(manager.backend)
        if not may_make_it and url is not None:
            await require_store(url)
        async with manager:
            yield manager


def applications_own(path: str) -> TokenManager:
    """The manager that ``--manager`` names, not open.

    Raises:
        ConfigurationError: it names something else, or the application's own code failed: the message says
            with what, and where.
    """
    problem: str | None = None
    named: object = None
    try:
        with silenced():
            named = import_object(path)
            if callable(named):
                named = named()
    except ConfigurationError:
        raise
    except Exception as error:
        said = " ".join(redact_url(word) for word in str(error).split())
        what = f"{type(error).__name__}: {said}{_place_in_the_application(error)}"
        problem = f"--manager: the application's own code failed with {what}"
    if problem is not None:
        raise ConfigurationError(problem)
    if isinstance(named, SyncTokenManager):
        named.close()  # a function may have opened it, in another event loop than ours
        named = named.manager
    if not isinstance(named, TokenManager):
        raise ConfigurationError(
            f"--manager: {path!r} must be a TokenManager or a SyncTokenManager, or a function that returns"
            f" one, not {type(named).__name__}"
        )
    return named


def _place_in_the_application(error: Exception) -> str:
    """The innermost place below the working directory that an error came through."""
    place, traceback = "", error.__traceback__
    while traceback is not None:
        file = Path(traceback.tb_frame.f_code.co_filename)
        if file.is_relative_to(Path.cwd()) and "site-packages" not in file.parts:
            place = f" ({file.relative_to(Path.cwd())}, line {traceback.tb_lineno})"
        traceback = traceback.tb_next
    return place


@contextmanager
def silenced() -> Generator[None]:
    """Keep the library's log quiet: what it says about policies, doctor says, and not every command."""
    logger = logging.getLogger("vtoken")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


async def require_store(url: str) -> None:
    """Go on only where there is a store.

    Raises:
        BackendUnavailable: there is none; the message names its path.
    """
    missing = await anyio.to_thread.run_sync(diagnostics_of(url).missing, abandon_on_cancel=True)
    if missing is not None:
        raise BackendUnavailable(f"{missing}; vtoken init makes a store")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Caller:
    """What the policy may ask to be told of the caller."""

    context: Annotated[
        str | None, Parameter(help="What the token is bound to, where its policy requires a context.")
    ] = None
    by: Annotated[
        list[str] | None,
        Parameter(
            negative="",
            help="What a limit of the policy counts by, such as ip=192.0.2.7; several times for several.",
        ),
    ] = None

    def dimensions(self) -> dict[str, str]:
        """``--by`` as a mapping.

        Raises:
            InvalidInput: one has no equals sign.
        """
        found: dict[str, str] = {}
        for given in self.by or ():
            name, equals, value = given.partition("=")
            if not equals:
                raise InvalidInput("--by must be name=value, such as ip=192.0.2.7")
            found[name] = value
        return found


def _read_key(_: Any, tokens: Any) -> str:
    """The key as it was given, or for ``-`` one line of standard input."""
    given: str = tokens[0].value
    if given != "-":
        return given
    # Before the event loop runs: a blocking read inside it would not react to Ctrl-C.
    if sys.stdin is None or sys.stdin.closed:
        return ""
    if sys.stdin.isatty():
        return getpass("Key: ")
    # One byte more than a key can have, so that a longer one is refused and not cut.
    return sys.stdin.buffer.readline(MAX_KEY_BYTES + 3).decode(errors="surrogateescape").rstrip("\r\n")


SubjectText = Annotated[str, Parameter(name="SUBJECT", help="The object: content_type:object_id.")]
Key = Annotated[
    str,
    Parameter(
        name="KEY",
        help="The key; - reads it from standard input, so that it stays out of the shell's history.",
        converter=_read_key,
        allow_leading_hyphen=True,  # a derived key may begin with one
    ),
]
AnySubjectText = Annotated[
    str,
    Parameter(
        name="SUBJECT", help="The object, content_type:object_id, or for all objects of a type content_type."
    ),
]
PresentedSubjectText = Annotated[
    str,
    Parameter(
        name="SUBJECT",
        help="The object, content_type:object_id; for a link the content_type alone will do.",
    ),
]
Slug = Annotated[str | None, Parameter(help="The purpose. Left out: tokens without one.")]
AnySlug = Annotated[str | None, Parameter(help="Only this purpose. Left out: every one.")]
ExtraData = Annotated[str | None, Parameter(name="--extra", help="JSON to keep with the token.")]
ExpiresIn = Annotated[
    str | None,
    Parameter(
        name="--expires-in",
        help='Lifetime: minutes, a duration such as 90s or 12h, or "never". Left out: as the policy or the'
        " settings say.",
    ),
]
Yes = Annotated[bool, Parameter(negative="", show_default=False, help="Do not ask.")]


def subject_of(text: str) -> Subject:
    """The object that ``content_type:object_id`` names; the first colon splits.

    Raises:
        InvalidInput: there is no colon, or a part is out of its range.
    """
    if ":" not in text:
        raise InvalidInput("SUBJECT must be content_type:object_id, such as auth.user:42")
    return any_subject_of(text)


def any_subject_of(text: str) -> Subject:
    """The object that ``content_type:object_id`` names, or without a colon all objects of a content type.

    Raises:
        InvalidInput: a part is out of its range.
    """
    content_type, colon, object_id = text.partition(":")
    found = Subject(content_type, object_id) if colon else Subject(content_type)
    ContentTypes().resolve(found)  # refuses it before a store is opened
    return found


def checked_slug(slug: str | None) -> str | None:
    """What ``--slug`` says, None where it was left out.

    Raises:
        InvalidInput: it is out of its range.
    """
    return None if slug is None else inputs.check_text("--slug", slug, inputs.MAX_NAME_BYTES)


def any_slug(slug: str | None) -> str | Wildcard:
    """The same for commands that mean every purpose where it was left out."""
    return checked_slug(slug) or ANY


def duration(option: str, text: str) -> timedelta:
    """A duration such as ``90s``, ``10m``, ``24h``.

    Raises:
        InvalidInput: it is none.
    """
    return timedelta(milliseconds=inputs.duration(option, text, least=timedelta(0)))


def lifetime(text: str | None) -> Lifetime | Unset:
    """What ``--expires-in`` says.

    Raises:
        InvalidInput: it is not a lifetime.
    """
    if text is None:
        return DEFAULT
    value = read_lifetime(text)
    inputs.lifetime("--expires-in", value)
    return cast("Lifetime", value)


def extra_data_of(text: str | None) -> Any:
    """What ``--extra`` says.

    Raises:
        InvalidInput: it is not JSON.
    """
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass  # raised below, so that the text is not in the error's context
    raise InvalidInput("--extra is not JSON")
