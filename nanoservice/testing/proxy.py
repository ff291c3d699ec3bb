"""A proxy between a service and Redis that loses, delays and repeats requests, and cuts connections."""

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Self


class Fate(Enum):
    """What the proxy does with a request."""

    PASS = auto()
    LOSE_REQUEST = auto()  # cut the connection; Redis never gets the request
    LOSE_REPLY = auto()  # have Redis execute the request, then cut the connection
    SWALLOW_REPLY = auto()  # have Redis execute the request, and leave the connection open and silent
    STALL = auto()  # keep the request until `Proxy.release`, and leave the connection open and silent
    REPEAT = auto()  # send the request a second time at once, over another connection
    ANSWER_TWICE = auto()  # send the request twice over this connection; the client then gets each reply one request too late
    REPEAT_LATE = auto()  # send the request a second time after a later request: see `Proxy`


@dataclass(frozen=True)
class Request:
    """A command on its way to Redis: its bytes, and the words that they encode."""

    data: bytes
    words: list[bytes]


class RequestParser:
    """Splits the bytes that a client sends into requests."""

    def __init__(self) -> None:
        self._data = b""

    def feed(self, data: bytes) -> list[Request]:
        """Append `data`, and return the requests that are now complete."""
        self._data += data
        requests = []
        while (request := self._first()) is not None:
            self._data = self._data[len(request.data) :]
            requests.append(request)
        return requests

    def _first(self) -> Request | None:
        """Return the first request, or None if it is incomplete.

        A request is `*` and the number of words; then, for each word, `$` and its length, and its bytes.
        """
        line = self._data.find(b"\r\n")
        if line < 0:
            return None
        assert self._data.startswith(b"*"), self._data[:80]
        count, at, words = int(self._data[1:line]), line + 2, []
        for _ in range(count):
            line = self._data.find(b"\r\n", at)
            if line < 0:
                return None
            begin = line + 2
            at = begin + int(self._data[at + 1 : line]) + 2
            if len(self._data) < at:
                return None
            words.append(self._data[begin : at - 2])
        return Request(self._data[:at], words)


def pass_on(request: Request) -> Fate:
    """Return PASS for every request."""
    return Fate.PASS


class Proxy:
    """A proxy on a port of loopback, used as an asynchronous context. `fate` decides what happens to each request.

    `store` is the port of Redis. The proxy keeps a request with the fate REPEAT_LATE, and sends it again after Redis has executed
    a request for which `is_later(kept, request)` is true. `fates` counts the fates. `repeated` counts the replies to repeated
    requests, by the first word of the reply.
    """

    def __init__(
        self,
        store: int,
        fate: Callable[[Request], Fate] = pass_on,
        is_later: Callable[[Request, Request], bool] = lambda kept, request: True,
    ) -> None:
        self._store = store
        self.fate = fate
        self._is_later = is_later
        self.fates: Counter[Fate] = Counter()
        self.repeated: Counter[str] = Counter()
        self._kept: list[Request] = []  # requests to repeat later
        self._stalled: list[Request] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._released = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def release(self) -> None:
        """Send the stalled requests to Redis now. Wait for the replies, and discard the replies."""
        stalled, self._stalled = self._stalled, []
        for request in stalled:
            await self._repeat(request)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            async with _connection(self._store) as (store_reader, store_writer):
                await self._converse(reader, writer, store_reader, store_writer)
        writer.transport.abort()

    async def _converse(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        store_reader: asyncio.StreamReader,
        store_writer: asyncio.StreamWriter,
    ) -> None:
        parser = RequestParser()
        replies: deque[bytes] = deque()
        while data := await reader.read(1 << 16):
            for request in parser.feed(data):
                fate = self.fate(request)
                self.fates[fate] += 1
                if fate is Fate.LOSE_REQUEST:
                    return
                if fate is Fate.STALL:
                    self._stalled.append(request)
                    await reader.read()  # wait until the client gives up
                    return
                store_writer.write(request.data)
                reply = await read_reply(store_reader)
                if fate is Fate.LOSE_REPLY:
                    return
                if fate is Fate.SWALLOW_REPLY:
                    await reader.read()
                    return
                replies.append(reply)
                if fate is Fate.ANSWER_TWICE:
                    store_writer.write(request.data)
                    replies.append(await read_reply(store_reader))
                writer.write(replies.popleft())
                if fate is Fate.REPEAT:
                    await self._repeat(request)
                due = [kept for kept in self._kept if self._is_later(kept, request)]
                self._kept = [kept for kept in self._kept if kept not in due]
                for kept in due:
                    await self._repeat(kept)
                if fate is Fate.REPEAT_LATE:
                    self._kept.append(request)

    async def _repeat(self, request: Request) -> None:
        """Send `request` over a connection of its own, and discard the reply."""
        async with _connection(self._store) as (reader, writer):
            writer.write(request.data)
            reply = await read_reply(reader)
        lines = reply.split(b"\r\n")
        self.repeated[(lines[2] if reply.startswith(b"*") else lines[0]).decode()] += 1


@contextlib.asynccontextmanager
async def _connection(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def read_reply(reader: asyncio.StreamReader) -> bytes:
    """Return the bytes of one whole reply of Redis."""
    line = await reader.readuntil(b"\r\n")
    if line[:1] == b"$" and line != b"$-1\r\n":
        return line + await reader.readexactly(int(line[1:]) + 2)
    if line[:1] == b"*":
        return line + b"".join([await read_reply(reader) for _ in range(int(line[1:]))])
    return line
