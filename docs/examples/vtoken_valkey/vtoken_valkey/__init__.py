"""Verification tokens in Valkey (or Redis)."""

from vtoken_valkey.backend import ValkeyBackend

__all__ = ["ValkeyBackend"]
