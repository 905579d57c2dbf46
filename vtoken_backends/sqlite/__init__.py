"""The SQLite backend: tokens in one file, for any number of processes of one machine."""

from vtoken_backends.sqlite.backend import SQLiteBackend

__all__ = ["SQLiteBackend"]
