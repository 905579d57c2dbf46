"""What the commands ``doctor`` and ``conformance`` ask about a kind of store, beside its backend.

A backend's author may describe it by a subclass of :class:`Diagnostics`, named under the entry-point group
``vtoken.diagnostics`` by the scheme of its URLs. Without one, the defaults below hold.
"""

from __future__ import annotations

import gc
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import BuiltinFunctionType, FrameType, FunctionType, ModuleType
from typing import Any, ClassVar, Final, Literal, NamedTuple, Protocol, cast

from vtoken.errors import ConfigurationError
from vtoken.loading import import_object
from vtoken.registry import create_backend, diagnostics_path

NUMBER: Final = "{n}"
"""What a text that makes each store a new one replaces in a URL."""

CLOCK_TOLERANCE: Final = 2
"""Seconds by which clocks may differ: codes live for minutes."""

FindingState = Literal["ok", "warning", "failed"]


class Finding(NamedTuple):
    """One line of the report of ``vtoken doctor``."""

    name: str
    state: FindingState
    detail: str


class Column(Protocol):
    """A column of a table in an SQL database."""

    @property
    def name(self) -> str: ...
    @property
    def type(self) -> str:
        """As the database writes it, with its collation."""
        ...

    @property
    def is_nullable(self) -> bool: ...


class Index(Protocol):
    """An index beside the primary key."""

    @property
    def name(self) -> str: ...
    @property
    def expressions(self) -> tuple[str, ...]:
        """Names of columns, or SQL in brackets."""
        ...

    @property
    def is_unique(self) -> bool: ...
    @property
    def where(self) -> str:
        """Which rows are in it, or ``""`` for all."""
        ...


class Table(Protocol):
    """A table in an SQL database."""

    @property
    def name(self) -> str: ...
    @property
    def columns(self) -> Sequence[Column]: ...
    @property
    def primary_key(self) -> tuple[str, ...]: ...
    @property
    def indexes(self) -> Sequence[Index]: ...


class NotObservable(Exception):
    """Nothing but the backend itself can say what such a store holds."""


class Diagnostics:
    """What is known about the store of a URL without its backend. Every method may block.

    Args:
        url: the backend's URL, or for ``conformance`` the one from which URLs of further stores are made.
    """

    is_durable: ClassVar[bool] = True
    """Whether a store outlives its process, so that conformance may reopen it and start processes."""
    open_options: ClassVar[Mapping[str, object]] = {}
    """Options of the backend with which opening examines the store as a whole."""
    integrity: ClassVar[str] = "as far as opening tells; --deep reads every token"
    """What has been checked once the store is open."""

    def __init__(self, url: str) -> None:
        self.url = url

    def missing(self) -> str | None:
        """Why there is no store yet, naming its path; None where there is one, or where nobody can tell.

        Commands that only read, end or purge ask this first, so that they never make a store.
        """
        return None

    def before_opening(self) -> list[Finding]:
        """What can be said while the store is closed. A finding that failed ends the examination."""
        return []

    def after_closing(self) -> list[Finding]:
        """What can be said about a store that could be opened, such as how far its clock is from ours."""
        return []

    # For migrations ----------------------------------------------------------------------------

    @property
    def schema(self) -> str | None:
        """In which schema of the database the tables are, or None for none."""
        return None

    @property
    def tables(self) -> Sequence[Table]:
        """The tables of the store, for :mod:`vtoken.migrate.tables`.

        Raises:
            ConfigurationError: it has none, or its author has not described them.
        """
        raise ConfigurationError("this backend does not describe its tables: opening makes them")

    def ddl(self) -> list[str]:
        """The statements that make an empty store, for ``vtoken init --sql``. They need no connection.

        Raises:
            ConfigurationError: as of :attr:`tables`.
        """
        raise ConfigurationError("this backend has no statements to show: opening makes what it needs")

    # For conformance ---------------------------------------------------------------------------

    @property
    def folder(self) -> Path | None:
        """The folder beside which the cases' own folders are made; None for any."""
        return None

    def new_store(self, directory: Path) -> str:
        """The URL of a new, empty store; ``directory`` is an empty folder of the case's own.

        Raises:
            ConfigurationError: the URL does not say how to make one.
        """
        if NUMBER not in self.url:
            raise ConfigurationError(
                f"each case needs a store of its own: put {NUMBER} into the URL where any text makes a new"
                " one, or give the import path of a suite, package.module:TestMine"
            )
        return self.url.replace(NUMBER, secrets.token_hex(8))

    def raw(self, store: str) -> bytes:
        """Everything that a store of :meth:`new_store` holds, read without its backend.

        Raises:
            NotObservable: there is no such way.
        """
        raise NotObservable("only a suite of the backend's own, with raw(), can read it without the backend")

    def drop(self, store: str) -> None:
        """Remove a store of :meth:`new_store`."""


class MemoryDiagnostics(Diagnostics):
    """Named stores of this process."""

    is_durable = False

    def new_store(self, directory: Path) -> str:
        scheme = self.url.partition("://")[0]
        return f"{scheme}://conformance-{secrets.token_hex(8)}"

    def raw(self, store: str) -> bytes:
        return b"\0".join(_texts_within(create_backend(store)))


def diagnostics_of(url: str) -> Diagnostics:
    """The diagnostics of a backend's URL; the defaults where its author named none.

    Raises:
        ConfigurationError: what is named cannot be imported.
    """
    path = diagnostics_path(url.partition("://")[0])
    if path is None:
        return Diagnostics(url)
    return cast("Diagnostics", cast("Any", import_object(path))(url))


def clock_finding(skew: Callable[[], timedelta]) -> Finding:
    """What to say about a server's clock.

    Args:
        skew: asks the server by how much its clock is ahead of ours.
    """
    try:
        ahead = skew().total_seconds()
    except Exception as error:  # the driver's own; its message may quote the URL
        return Finding("server's clock", "warning", f"it was not told ({type(error).__name__})")
    state: FindingState = "ok" if abs(ahead) <= CLOCK_TOLERANCE else "warning"
    return Finding(
        "server's clock", state, f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} ours"
    )


_WITHOUT_DATA: Final = (type, ModuleType, FunctionType, BuiltinFunctionType, FrameType)


def _texts_within(thing: object) -> Iterator[bytes]:
    """Every text and all bytes that an object refers to, however indirectly."""
    seen: set[int] = set()
    waiting: list[object] = [thing]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, _WITHOUT_DATA):
            continue
        seen.add(id(thing))
        if isinstance(thing, str):
            yield thing.encode(errors="surrogatepass")
        elif isinstance(thing, bytes):
            yield thing
        waiting += gc.get_referents(thing)
