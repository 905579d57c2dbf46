"""Options and arguments that commands share."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import timedelta
from getpass import getpass
from typing import Annotated, Any, Final

from cyclopts import Parameter

from vtoken.config import Configuration, create_backend, redact_url
from vtoken.config_read import convert, seconds
from vtoken.errors import InvalidInput
from vtoken.hooks import Hook
from vtoken.inputs import MAX_KEY_BYTES
from vtoken.manager import TokenManager
from vtoken.subject import Subject

DEFAULT_URL: Final = "sqlite:///vtoken.db"


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
        Parameter(help=f"The store. Left out: VTOKEN_URL, the configuration file's, else {DEFAULT_URL}."),
    ] = None

    def configuration(self) -> Configuration:
        """What the environment, the configuration file and ``--url`` say."""
        return Configuration.from_env(url=self.url, default_url=DEFAULT_URL)

    def shown(self) -> str:
        """The URL, without its passwords."""
        return redact_url(self.configuration().url)

    def manager(self, *hooks: Hook) -> TokenManager:
        """A manager as configured, with further hooks, not open yet."""
        found = self.configuration()
        return TokenManager(
            create_backend(found.url),
            settings=found.settings,
            policies=found.policies,
            hooks=(*found.hooks, *hooks),
        )


def _read_key(_: Any, tokens: Any) -> str:
    """The key as it was given, or for ``-`` one line of standard input."""
    given: str = tokens[0].value
    if given != "-":
        return given
    # Here, before the event loop runs: a blocking read inside it would not hear Ctrl-C.
    if sys.stdin is None or sys.stdin.closed:
        return ""
    if sys.stdin.isatty():
        return getpass("Key: ")
    # One more than a key can have, so that a longer one is refused and not cut.
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
Slug = Annotated[str | None, Parameter(help="The purpose. Left out: tokens without one.")]
Yes = Annotated[bool, Parameter(negative="", show_default=False, help="Do not ask.")]


def subject_of(text: str) -> Subject:
    """The object that ``content_type:object_id`` names; the first colon splits.

    Raises:
        InvalidInput: there is no colon.
    """
    content_type, colon, object_id = text.partition(":")
    if not colon:
        raise InvalidInput("SUBJECT is content_type:object_id, e.g. auth.user:42")
    return Subject(content_type, object_id)


def any_subject_of(text: str) -> Subject:
    """The object that ``content_type:object_id`` names, or without a colon all objects of a content type."""
    return subject_of(text) if ":" in text else Subject(text)


def duration(option: str, text: str) -> timedelta:
    """A duration such as ``90s``, ``10m``, ``24h``.

    Raises:
        ConfigurationError: it is none.
    """
    return convert(option, seconds, text)
