"""The suites of the command ``conformance``, and how a case of one is run.

Apart from the command, because they load the whole of ``vtoken.testing``, and pytest where it is installed.
"""

from __future__ import annotations

import gc
import secrets
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import BuiltinFunctionType, FrameType, FunctionType, ModuleType
from typing import Any, ClassVar, Final, Literal, NamedTuple
from urllib.parse import quote, unquote

from vtoken.backend import TokenBackend
from vtoken.cli import servers
from vtoken.config import create_backend
from vtoken.errors import ConfigurationError
from vtoken.loading import import_object
from vtoken.testing import BackendConformance, Case, DurableBackendConformance

NUMBER: Final = "{n}"

State = Literal["holds", "fails", "not run"]


class NotRun(Exception):
    """A case asked for what only the author's own suite can tell."""


class Outcome(NamedTuple):
    """One case's line in the report."""

    case: Case
    state: State
    detail: str


class _Stores:
    """What the suites of the command line have in common: where the URL's stores are made."""

    url: ClassVar[str] = ""

    def backend(self, store: str) -> TokenBackend:
        return create_backend(store)

    def forget(self) -> None:
        """Remove what the case before has left behind."""


class MemoryStores(_Stores, BackendConformance):
    """Named stores of this process."""

    def new_store(self, directory: Path) -> str:
        return f"memory://conformance-{secrets.token_hex(8)}"

    def raw(self, store: str) -> bytes:
        return b"\0".join(_texts_within(create_backend(store)))


class FileStores(_Stores, DurableBackendConformance):
    """SQLite files, each in the case's own directory."""

    def new_store(self, directory: Path) -> str:
        query = self.url.partition("?")[2]
        return f"sqlite:///{quote(str(directory / 'tokens.db'))}{f'?{query}' if query else ''}"

    def raw(self, store: str) -> bytes:
        file = Path(unquote(store.partition("?")[0].removeprefix("sqlite:///")))
        return b"".join(path.read_bytes() for path in file.parent.glob(f"{file.name}*"))


class MongoDBStores(_Stores, DurableBackendConformance):
    """Databases of a server, each dropped after its case."""

    def __init__(self) -> None:
        self._made: list[str] = []

    def new_store(self, directory: Path) -> str:
        self._made.append(servers.with_database(self.url, f"vtoken_conformance_{secrets.token_hex(8)}"))
        return self._made[-1]

    def raw(self, store: str) -> bytes:
        return servers.documents(store)

    def forget(self) -> None:
        while self._made:
            servers.drop_database(self._made.pop())


class NumberedStores(_Stores, DurableBackendConformance):
    """Stores of another scheme: what stands for ``{n}`` in the URL makes each a new one."""

    def new_store(self, directory: Path) -> str:
        return self.url.replace(NUMBER, secrets.token_hex(8))

    def raw(self, store: str) -> bytes:
        raise NotRun("only a suite of the backend's own, with raw(), can look past it")


_SUITES: Final[dict[str, type[BackendConformance]]] = {
    "memory": MemoryStores,
    "sqlite": FileStores,
    **dict.fromkeys(servers.SCHEMES, MongoDBStores),
}


def chosen(url: str) -> tuple[BackendConformance, Path | None]:
    """The suite, and where its temporary folder is made."""
    if not __debug__:
        raise ConfigurationError("the cases are made of assert statements: run them without python -O")
    scheme, separator, rest = url.partition("://")
    if not separator:
        found = import_object(url)
        if not isinstance(found, type) or not issubclass(found, BackendConformance):
            raise ConfigurationError("URL must be a URL, or the import path of a BackendConformance")
        return found(), None
    create_backend(url.replace(NUMBER, "0"))  # a mistake in it is told once and not by every case
    kind = _SUITES.get(scheme.lower(), NumberedStores)
    if kind is NumberedStores and NUMBER not in url:
        raise ConfigurationError(
            f"each case needs a store of its own: put {NUMBER} into the URL where any text makes a new one,"
            " or give the import path of a suite, package.module:TestMine"
        )
    suite: Any = kind()
    suite.url = url
    return suite, Path(unquote(rest.partition("?")[0][1:])).parent if kind is FileStores else None


def cases(suite: BackendConformance, *, in_process: bool) -> list[Case]:
    """Its cases; with ``in_process`` none that reopens the store or starts processes."""
    return (BackendConformance if in_process else type(suite)).cases()


def run_case(suite: BackendConformance, case: Case, directory: Path) -> Outcome:
    """Run a case in an empty directory."""
    try:
        getattr(suite, case.name)(directory)
    except NotRun as reason:
        return Outcome(case, "not run", str(reason))
    except Exception as error:
        return Outcome(case, "fails", _why(error))
    finally:
        if isinstance(suite, _Stores):
            with suppress(Exception):  # a database that stays behind is only untidy
                suite.forget()
    return Outcome(case, "holds", "")


def _why(error: Exception) -> str:
    """The failed line of the case, and what the error says."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "vtoken/testing" in Path(frame.filename).as_posix()]
    place = f" at {ours[-1].line}" if ours else ""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}{f': {said[0]}' if said else ''}{place}"


def _texts_within(thing: object) -> Iterator[bytes]:
    """Every text that hangs on an object: the raw probe of a store that is nowhere but in memory."""
    seen: set[int] = set()
    waiting: list[object] = [thing]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, _NO_DATA):
            continue
        seen.add(id(thing))
        if isinstance(thing, str):
            yield thing.encode(errors="surrogatepass")
        elif isinstance(thing, bytes):
            yield thing
        waiting += gc.get_referents(thing)


_NO_DATA: Final = (type, ModuleType, FunctionType, BuiltinFunctionType, FrameType)
