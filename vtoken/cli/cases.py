"""What the command ``conformance`` runs: the suite for a URL, and one case of it.

Apart from the command, because this loads the whole of ``vtoken.testing``, and pytest where it is installed.
"""

from __future__ import annotations

import traceback
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

from vtoken.backend import TokenBackend
from vtoken.config import create_backend
from vtoken.diagnostics import NUMBER, Diagnostics, NotObservable, diagnostics_of
from vtoken.errors import ConfigurationError
from vtoken.loading import import_object
from vtoken.testing import BackendConformance, Case, DurableBackendConformance

State = Literal["holds", "fails", "not run"]


class Outcome(NamedTuple):
    """One case's line in the report."""

    case: Case
    state: State
    detail: str


class _Stores:
    """Where the stores of a URL are made: its diagnostics know how."""

    about: Diagnostics
    made: list[str]

    def new_store(self, directory: Path) -> str:
        self.made.append(self.about.new_store(directory))
        return self.made[-1]

    def backend(self, store: str) -> TokenBackend:
        return create_backend(store)

    def raw(self, store: str) -> bytes:
        return self.about.raw(store)

    def drop(self) -> None:
        """Remove the stores of the case before."""
        while self.made:
            with suppress(Exception):  # a store that stays behind is only untidy
                self.about.drop(self.made.pop())


class _Volatile(_Stores, BackendConformance):
    """Stores that end with their process."""


class _Durable(_Stores, DurableBackendConformance):
    """Stores that outlive their process."""


def chosen(url: str) -> tuple[BackendConformance, Path | None]:
    """The suite, and where its temporary folder is made.

    Raises:
        ConfigurationError: the URL names neither a suite nor where stores can be made.
    """
    if not __debug__:
        raise ConfigurationError("the cases are made of assert statements: run them without python -O")
    if "://" not in url:
        found = import_object(url)
        if not isinstance(found, type) or not issubclass(found, BackendConformance):
            raise ConfigurationError("URL must be a URL, or the import path of a BackendConformance")
        return found(), None
    create_backend(url.replace(NUMBER, "0"))  # a mistake in it is told once and not by every case
    about = diagnostics_of(url)
    suite = _Durable() if about.is_durable else _Volatile()
    suite.about, suite.made = about, []
    about.new_store(Path())  # says what is missing in the URL, and makes nothing yet
    return suite, about.folder


def cases(suite: BackendConformance, *, in_process: bool) -> list[Case]:
    """Its cases; with ``in_process`` none that reopens the store or starts processes."""
    return (BackendConformance if in_process else type(suite)).cases()


def run_case(suite: BackendConformance, case: Case, directory: Path) -> Outcome:
    """Run a case in an empty directory."""
    try:
        getattr(suite, case.name)(directory)
    except NotObservable as reason:
        return Outcome(case, "not run", str(reason))
    except Exception as error:
        return Outcome(case, "fails", _why(error))
    finally:
        if isinstance(suite, _Stores):
            suite.drop()
    return Outcome(case, "holds", "")


def _why(error: Exception) -> str:
    """The failed line of the case, and what the error says."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "vtoken/testing" in Path(frame.filename).as_posix()]
    place = f" at {ours[-1].line}" if ours else ""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}{f': {said[0]}' if said else ''}{place}"
