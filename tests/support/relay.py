"""A relay in front of the store whose connections end at the test's wish, by a reset or silently."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator


class Relay:
    """Passes bytes on between clients and the port `upstream` of loopback."""

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.clients = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.clients += 1
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        self._writers += [writer, upstream_writer]
        await asyncio.gather(self._pass_on(reader, upstream_writer), self._pass_on(upstream_reader, writer))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, RuntimeError):  # It was reset.
            while data := await reader.read(65536):
                writer.write(data)
            writer.close()

    def reset(self) -> None:
        """End every connection with RST, as a firewall does that has forgotten it."""
        for writer in self._writers:
            if sock := writer.get_extra_info("socket"):  # It has none if it is closed.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        self._writers.clear()


@contextlib.asynccontextmanager
async def relaying(upstream: int) -> AsyncIterator[tuple[Relay, int]]:
    """Run a relay; yield it and its port."""
    relay = Relay(upstream)
    server = await asyncio.start_server(relay.serve, "127.0.0.1", 0)
    try:
        yield relay, server.sockets[0].getsockname()[1]
    finally:
        server.close()
        relay.reset()
        await server.wait_closed()
