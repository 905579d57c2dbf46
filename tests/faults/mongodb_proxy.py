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
        self._connections: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0
        self.lost: Counter[str] = Counter()
        """How many replies were lost, by command."""

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        # At once, and not in the task: that one may be cancelled before it begins.
        self._writers.add(writer)
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            downstream, upstream = await asyncio.open_connection("127.0.0.1", self._server_port)
            self._writers.add(upstream)
            doomed: dict[int, str] = {}
            ways = {
                asyncio.create_task(self._ask(reader, upstream, doomed)),
                asyncio.create_task(self._answer(downstream, writer, doomed)),
            }
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                for end in (upstream, writer):
                    end.close()
            await asyncio.gather(*ways, return_exceptions=True)

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
        """End all connections, and wait until they are closed."""
        while self._connections or self._writers:
            tasks, writers = [*self._connections], [*self._writers]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for writer in writers:
                writer.close()
            closing = (writer.wait_closed() for writer in writers)
            await asyncio.gather(*closing, return_exceptions=True)
            self._writers.difference_update(writers)


async def _message(stream: asyncio.StreamReader) -> bytes:
    with contextlib.suppress(asyncio.IncompleteReadError):
        header = await stream.readexactly(_HEADER.size)
        return header + await stream.readexactly(_HEADER.unpack(header)[0] - _HEADER.size)
    raise ConnectionResetError("the other side has closed")


@asynccontextmanager
async def proxy(port: int, loses: Callable[[str], bool]) -> AsyncGenerator[Proxy]:
    """A proxy on a free port of 127.0.0.1. Arguments: as of :class:`Proxy`."""
    passing = Proxy(port, loses)
    server = await asyncio.start_server(passing.accept, "127.0.0.1", 0)
    passing.port = server.sockets[0].getsockname()[1]
    try:
        yield passing
    finally:
        server.close()
        await passing.close()
        await server.wait_closed()
