"""A proxy between the service and its store that loses, delays, repeats and cuts."""

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Self


class Fate(Enum):
    """What becomes of a request."""

    PASS = auto()
    LOSE_REQUEST = auto()  # it never reaches the store; the connection is cut
    LOSE_REPLY = auto()  # the store has done it, and the connection is cut
    SWALLOW_REPLY = auto()  # the store has done it, and the connection stays open and silent
    STALL = auto()  # it waits before the store, and the connection stays open and silent; `Proxy.release` lets it go on
    REPEAT = auto()  # it reaches the store a second time at once, over another connection
    ANSWER_TWICE = auto()  # it reaches the store twice, and from then on the client is one reply behind
    REPEAT_LATE = auto()  # the same, but only when a later request has been done: see `Proxy`


@dataclass(frozen=True)
class Request:
    """A command on its way to the store."""

    data: bytes
    words: list[bytes]


class RequestParser:
    """Finds where each request begins and ends in what a client sends."""

    def __init__(self) -> None:
        self._data = b""

    def feed(self, data: bytes) -> list[Request]:
        """Take in `data`; return the requests that are now complete."""
        self._data += data
        requests = []
        while (request := self._first()) is not None:
            self._data = self._data[len(request.data) :]
            requests.append(request)
        return requests

    def _first(self) -> Request | None:
        """Return the first request, if all of it is here: `*<words>`, then each word as `$<bytes>` and its bytes."""
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
    """Return the fate of a request on a good day."""
    return Fate.PASS


class Proxy:
    """Listens on a port of loopback, and passes requests on to the store at the port `store`, unless `fate` decides otherwise.

    A request with the fate REPEAT_LATE is sent again when the store has done a request for which `is_later(kept, request)` holds.
    `fates` counts what was done; `repeated` counts the first words of the store's replies to repeated requests.
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
        self._kept: list[Request] = []  # to be repeated late
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
        """Let what is stalled reach the store, late, and wait for its replies; they are for nobody."""
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
                    await reader.read()  # until the client has enough of it
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
        """Send `request` over a connection of its own, and keep the reply from everyone."""
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
    """Return one reply of the store, whole."""
    line = await reader.readuntil(b"\r\n")
    if line[:1] == b"$" and line != b"$-1\r\n":
        return line + await reader.readexactly(int(line[1:]) + 2)
    if line[:1] == b"*":
        return line + b"".join([await read_reply(reader) for _ in range(int(line[1:]))])
    return line
