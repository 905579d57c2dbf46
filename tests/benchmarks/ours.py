"""vtoken itself, at its public API and with its defaults: keys hashed, writes durable."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from vtoken import InvalidToken, Subject, TokenManager

from .contender import CONTENT_TYPE, SLUG, Op, Row, Run, by_tasks

_FILLING_TASKS = 256


class VToken:
    """A :class:`~vtoken.TokenManager`, one call for each operation.

    Args:
        url: its empty store.
        look: shows what the store holds, by the store's own driver.
    """

    name = "vtoken"

    def __init__(self, url: str, look: Callable[[], Awaitable[list[Row]]]) -> None:
        self.manager = TokenManager.from_url(url)
        self._look = look

    async def open(self) -> None:
        await self.manager.open()

    async def close(self) -> None:
        await self.manager.aclose()

    async def fill(self, object_ids: Sequence[str]) -> list[str]:
        ops = [Op("issue", object_id) for object_id in object_ids]
        return [str(key) for key in (await self.run(ops, _FILLING_TASKS)).answers]

    async def run(self, ops: Sequence[Op], tasks: int) -> Run:
        return await by_tasks(self, ops, tasks)

    async def rows(self) -> list[Row]:
        return await self._look()

    async def issue(self, object_id: str) -> str:
        return (await self.manager.issue(Subject(CONTENT_TYPE, object_id), SLUG)).key

    async def check(self, object_id: str, key: str) -> bool:
        return await self.manager.exists_valid(Subject(CONTENT_TYPE, object_id), SLUG, key)

    async def consume(self, object_id: str, key: str) -> bool:
        try:
            await self.manager.consume(Subject(CONTENT_TYPE, object_id), SLUG, key)
        except InvalidToken:
            return False
        return True
