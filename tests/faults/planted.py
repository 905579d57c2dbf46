"""Stores with a planted bug each, for the rounds that must find it."""

from __future__ import annotations

from vtoken.backend import Change, Match, StoredToken
from vtoken.errors import BackendUnavailable, OutcomeUnknown
from vtoken_backends.mongodb import MongoDBBackend


class DeniesTheUnknown(MongoDBBackend):
    """Says that a write whose answer was lost did not happen."""

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        try:
            return await super().update(match, change)
        except OutcomeUnknown:
            pass
        raise BackendUnavailable("planted")


class ClaimsTheUnknown(MongoDBBackend):
    """Says that a write whose answer was lost was done."""

    async def update(self, match: Match, change: Change) -> StoredToken | None:
        try:
            return await super().update(match, change)
        except OutcomeUnknown:
            pass
        return (await self.find(match._replace(valid_at=None), 1))[0]
