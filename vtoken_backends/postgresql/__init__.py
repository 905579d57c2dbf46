"""Tokens in PostgreSQL."""

from vtoken_backends.postgresql.backend import PostgreSQLBackend

__all__ = ["PostgreSQLBackend"]
