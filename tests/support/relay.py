"""A relay in front of Redis whose connections a test can reset."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator


class Relay:
    """Passes bytes between its clients and the port `upstream` of loopback. Each of them takes `delay` seconds."""

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self.delay = 0.0
        self._writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        self._writers += [writer, upstream_writer]
        try:
            await asyncio.gather(self._pass_on(reader, upstream_writer), self._pass_on(upstream_reader, writer))
        except asyncio.CancelledError:  # the test ends before the connection does
            for each in (writer, upstream_writer):
                each.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, RuntimeError):  # The connection was reset.
            while data := await reader.read(65536):
                await asyncio.sleep(self.delay)
                writer.write(data)
            writer.close()

    def reset(self) -> None:
        """Reset all connections, as a firewall does with connections that it has forgotten."""
        for writer in self._writers:
            if not writer.is_closing():
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        self._writers.clear()


@contextlib.asynccontextmanager
async def relaying(upstream: int) -> AsyncIterator[tuple[Relay, int]]:
    """Run a relay in front of the port `upstream`. Yield the relay and its port."""
    relay = Relay(upstream)
    server = await asyncio.start_server(relay.serve, "127.0.0.1", 0)
    try:
        yield relay, server.sockets[0].getsockname()[1]
    finally:
        server.close()
        relay.reset()
        await server.wait_closed()
