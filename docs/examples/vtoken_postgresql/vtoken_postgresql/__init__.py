"""A PostgreSQL backend for vtoken, and a worked example of a custom backend."""

from vtoken_postgresql.backend import PostgreSQLBackend

__all__ = ["PostgreSQLBackend"]
