"""A TCP proxy before a MongoDB server that loses replies: the command is done, and nobody hears of it."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Final

_HEADER: Final = struct.Struct("<iiii")
"""Of a message of the MongoDB Wire Protocol: its length, its id, that of what it answers, its kind."""
_OP_MSG: Final = 2013
_COMMAND: Final = _HEADER.size + 4 + 1 + 4 + 1
"""Where the name of its command begins: after flags, the kind of section, a document's length and a type."""


class Proxy:
    """Passes on what clients and a server say, but for the replies that are to be lost.

    Args:
        port: of the server, on 127.0.0.1.
        loses: for the name of a command, whether its reply is lost, with the connection.
    """

    def __init__(self, port: int, loses: Callable[[str], bool]) -> None:
        self._server_port = port
        self._loses = loses
        self._links: set[asyncio.Task[None]] = set()
        self.port = 0
        self.lost: Counter[str] = Counter()
        """How many replies were lost, by command."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        task = asyncio.current_task()
        assert task is not None
        self._links.add(task)
        ends, ways = [writer], set[asyncio.Task[None]]()
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            downstream, upstream = await asyncio.open_connection("127.0.0.1", self._server_port)
            ends.append(upstream)
            doomed: dict[int, str] = {}
            ways.add(asyncio.create_task(self._ask(reader, upstream, doomed)))
            ways.add(asyncio.create_task(self._answer(downstream, writer, doomed)))
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        for end in ends:
            end.close()
        self._links.discard(task)

    async def _ask(
        self, client: asyncio.StreamReader, server: asyncio.StreamWriter, doomed: dict[int, str]
    ) -> None:
        while True:
            message = await _message(client)
            _, number, _, kind = _HEADER.unpack_from(message)
            if kind == _OP_MSG:
                name = message[_COMMAND : message.index(0, _COMMAND)].decode()
                if self._loses(name):
                    doomed[number] = name
            server.write(message)
            await server.drain()

    async def _answer(
        self, server: asyncio.StreamReader, client: asyncio.StreamWriter, doomed: dict[int, str]
    ) -> None:
        while True:
            message = await _message(server)
            name = doomed.get(_HEADER.unpack_from(message)[2])
            if name is not None:
                self.lost[name] += 1
                return
            client.write(message)
            await client.drain()

    async def close(self) -> None:
        """End all connections."""
        links = [*self._links]
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)


async def _message(stream: asyncio.StreamReader) -> bytes:
    with contextlib.suppress(asyncio.IncompleteReadError):
        header = await stream.readexactly(_HEADER.size)
        return header + await stream.readexactly(_HEADER.unpack(header)[0] - _HEADER.size)
    raise ConnectionResetError("the other side has closed")


@asynccontextmanager
async def proxy(port: int, loses: Callable[[str], bool]) -> AsyncGenerator[Proxy]:
    """A proxy on a free port of 127.0.0.1. Arguments: as of :class:`Proxy`."""
    passing = Proxy(port, loses)
    server = await asyncio.start_server(passing.serve, "127.0.0.1", 0)
    passing.port = server.sockets[0].getsockname()[1]
    try:
        yield passing
    finally:
        server.close()
        await passing.close()
        await server.wait_closed()
