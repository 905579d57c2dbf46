"""Accounts in MongoDB, by PyMongo's async client. Transactions take a replica set, be it of one member."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Self

from pymongo import AsyncMongoClient
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import DuplicateKeyError

from password_reset.accounts import SESSION_SECONDS, AddressTaken, Change, digest

_Document = dict[str, Any]


class MongoChange:
    """Within a transaction."""

    def __init__(self, session: AsyncClientSession, accounts: AsyncCollection[_Document]) -> None:
        self.handle = session
        self._accounts = accounts

    async def add(self, email: str, password: str) -> None:
        document = {"_id": email, "password": password, "generation": 0}
        try:
            await self._accounts.insert_one(document, session=self.handle)
        except DuplicateKeyError:
            raise AddressTaken from None

    async def set_password(self, email: str, password: str) -> None:
        change = {"$set": {"password": password}, "$inc": {"generation": 1}}
        await self._accounts.update_one({"_id": email}, change, session=self.handle)


class MongoAccounts:
    """The accounts; see the protocol."""

    def __init__(self, client: AsyncMongoClient[_Document]) -> None:
        database = client.get_default_database("vtoken")
        self._client = client
        self._accounts = database["accounts"]
        self._sessions = database["sessions"]

    @classmethod
    async def open(cls, tokens_url: str) -> Self:
        """Connect to the database of the tokens."""
        client: AsyncMongoClient[_Document] = AsyncMongoClient(tokens_url)
        await client.aconnect()
        return cls(client)

    async def close(self) -> None:
        await self._client.close()

    async def in_transaction(self, work: Callable[[Change], Awaitable[None]]) -> None:
        async def run(session: AsyncClientSession) -> None:
            await work(MongoChange(session, self._accounts))

        async with self._client.start_session() as session:
            await session.with_transaction(run)  # again after a conflict

    async def is_empty(self) -> bool:
        return await self._accounts.find_one({}, {"_id": 1}) is None

    async def password(self, email: str) -> str | None:
        found = await self._accounts.find_one({"_id": email})
        return None if found is None else str(found["password"])

    async def start_session(self, email: str, password: str, now: float) -> str:
        key = secrets.token_urlsafe(32)
        account = await self._accounts.find_one({"_id": email, "password": password})
        if account is not None:  # if its password changes just now, this session is of an older generation
            ends_at = int(now) + SESSION_SECONDS
            await self._sessions.insert_one(
                {
                    "_id": digest(key),
                    "email": email,
                    "generation": account["generation"],
                    "ends_at": ends_at,
                }
            )
        return key

    async def of_session(self, key: str, now: float) -> str | None:
        session = await self._sessions.find_one({"_id": digest(key), "ends_at": {"$gt": int(now)}})
        if session is None:
            return None
        email, generation = session["email"], session["generation"]
        account = await self._accounts.find_one({"_id": email, "generation": generation})
        return None if account is None else str(email)

    async def end_session(self, key: str) -> None:
        await self._sessions.delete_one({"_id": digest(key)})
