"""A client that sends any bytes, also bytes that no HTTP library would send."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from nanoservice.testing.waiting import SLACK

LIMIT = 5 * SLACK  # seconds that an answer may take


@dataclass(frozen=True)
class Reply:
    """An answer of the server."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Wire:
    """A connection to the server; `received` has all bytes that the server has sent."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    received: bytes = b""
    _parsed: int = field(default=0, repr=False)

    async def send(self, *data: bytes) -> None:
        self.writer.write(b"".join(data))
        await asyncio.wait_for(self.writer.drain(), LIMIT)

    async def more(self, seconds: float = LIMIT) -> bool:
        """Wait for more bytes; return False if the server closes the connection instead."""
        try:
            data = await asyncio.wait_for(self.reader.read(1 << 16), seconds)
        except ConnectionError:
            return False
        self.received += data
        return bool(data)

    async def reply(self, *, head: bool = False) -> Reply:
        """Return the next answer; set `head` if the request was a HEAD, whose answer has no body."""
        while b"\r\n\r\n" not in self.received[self._parsed :]:
            assert await self.more(), f"closed after {self.received[self._parsed :]!r}"
        text, _, _ = self.received[self._parsed :].partition(b"\r\n\r\n")
        line, *lines = text.decode("latin-1").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        assert len(headers) == len(lines), f"a header comes twice: {lines}"
        status = int(line.split()[1])
        begin = self._parsed + len(text) + 4
        self._parsed = begin + (0 if head or status < 200 or status == 204 else int(headers["Content-Length"]))
        while len(self.received) < self._parsed:
            assert await self.more(), "closed within an answer"
        return Reply(status, headers, self.received[begin : self._parsed])

    async def closed(self, seconds: float = LIMIT) -> None:
        """Wait until the server closes the connection. Fail if the server sends more bytes, or does nothing for `seconds`."""
        while await self.more(seconds):
            pass
        assert not self.received[self._parsed :]


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Wire]:
    """Connect to `port` of loopback, and abort the connection after the block."""
    wire = Wire(*await asyncio.wait_for(asyncio.open_connection("127.0.0.1", port), LIMIT))
    try:
        yield wire
    finally:
        wire.writer.transport.abort()


def request(method: str = "GET", path: str = "/", *headers: str, body: bytes = b"", version: str = "1.1") -> bytes:
    """Return a request; a body gets a `Content-Length`, unless `headers` has a `Transfer-Encoding`."""
    lines = [f"{method} {path} HTTP/{version}", "Host: localhost", *headers]
    if body and not any(header.lower().startswith("transfer-encoding") for header in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def chunked(body: bytes, size: int = 1 << 16) -> Iterator[bytes]:
    """Yield the chunks of `body`, as sent with `Transfer-Encoding: chunked`."""
    for begin in range(0, len(body), size):
        chunk = body[begin : begin + size]
        yield b"%x\r\n%s\r\n" % (len(chunk), chunk)
    yield b"0\r\n\r\n"


async def ask(port: int, *data: bytes, head: bool = False) -> Reply:
    """Send `data` on a new connection, and return the first answer."""
    async with connected(port) as wire:
        await wire.send(*data)
        return await wire.reply(head=head)


def is_problem(reply: Reply, status: int) -> bool:
    """Check that `reply` is a problem document with this status, and reveals nothing about the server."""
    assert reply.status == status
    assert reply.headers["Content-Type"] == "application/problem+json"
    assert reply.headers["Cache-Control"] == "no-store"
    ours = {"Date", "Content-Type", "Cache-Control", "Content-Length", "Connection"}
    assert set(reply.headers) <= ours | {"Allow", "Retry-After", "WWW-Authenticate"}
    assert reply.json.keys() - {"detail"} == {"type", "title", "status", "trace_id"}
    assert (reply.json["type"], reply.json["status"]) == ("about:blank", status)
    return True
