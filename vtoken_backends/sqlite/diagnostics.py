"""What ``vtoken doctor`` and ``vtoken conformance`` know about SQLite files, beside the backend."""

from __future__ import annotations

import os
import sqlite3
import stat
from contextlib import closing
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote

from vtoken.diagnostics import Diagnostics, Finding
from vtoken_backends.sqlite.file import has_wal_reset_bug
from vtoken_backends.sqlite.schema import ddl


class SQLiteDiagnostics(Diagnostics):
    """One file a store."""

    open_options = {"check": "always"}  # noqa: RUF012  # a Mapping in the base class
    integrity = "checked whole by SQLite"

    @property
    def path(self) -> Path:
        """The file that the URL names."""
        return _path(self.url)

    def missing(self) -> str | None:
        path = self.path.absolute()
        if not path.exists():
            return f"there is no SQLite file {path}"
        try:
            with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
                names = {str(name) for (name,) in database.execute("SELECT name FROM sqlite_schema")}
        except (OSError, sqlite3.Error):
            return None  # the backend will say more precisely what is wrong
        is_shared = dict(parse_qsl(self.url.partition("?")[2])).get("shared") == "true"
        if "vtoken_schema" in names or (names and not is_shared):
            return None
        return f"the SQLite file {path} has no tables of vtoken"

    def before_opening(self) -> list[Finding]:
        return [_examined(self.path), release(sqlite3.sqlite_version_info)]

    def ddl(self) -> list[str]:
        return ddl()

    @property
    def folder(self) -> Path | None:
        return self.path.parent

    def new_store(self, directory: Path) -> str:
        query = self.url.partition("?")[2]
        return f"sqlite:///{quote(str(directory / 'tokens.db'))}{f'?{query}' if query else ''}"

    def raw(self, store: str) -> bytes:
        path = _path(store)
        return b"".join(file.read_bytes() for file in path.parent.glob(f"{path.name}*"))


def _path(url: str) -> Path:
    return Path(unquote(url.partition("://")[2].partition("?")[0][1:]))


def _examined(path: Path) -> Finding:
    try:
        found = path.stat()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        hint = "there is no such file; vtoken init makes it" if missing else str(error.strerror)
        return Finding("file", "failed", f"{path.absolute()}: {hint}")
    size = f"{path.absolute()}, {found.st_size / 1024:,.0f} KiB"
    if os.name == "posix" and stat.S_IMODE(found.st_mode) & 0o077:
        return Finding("file", "warning", f"{size}: others than its owner may open it (chmod 600)")
    if os.path.ismount(path):
        return Finding("file", "warning", f"{size}: it is a mount point of its own; mount its directory")
    return Finding("file", "ok", size)


def release(version: tuple[int, ...]) -> Finding:
    """Name a release with the WAL-reset bug, which in rare cases damages a file that several connections
    write. Where a distribution backported the fix, the version is still the old one."""
    said = ".".join(map(str, version))
    if not has_wal_reset_bug(version):
        return Finding("SQLite", "ok", said)
    where = "https://www.sqlite.org/wal.html#walresetbug"
    return Finding(
        "SQLite", "warning", f"{said} may have the WAL-reset bug (unless the fix was backported): {where}"
    )
