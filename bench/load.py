"""Send GETs over keep-alive connections: in a closed loop to check the answers, in an open loop to measure latency.

This client shares one core with Redis, and must use less CPU time for a request than the server under test. So the client is a
bare asyncio protocol, which parses only the parts of an answer that the benchmark needs.
"""

import asyncio
import ctypes
import os
import re
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, cast

_REQUEST = b"GET %b HTTP/1.1\r\nHost: localhost\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)
_NUMBER = re.compile(rb"\d+")
_MAX_REQUESTS = 2_000_000  # the highest number of requests that one load sends
_SETTLE_SECONDS = 10.0  # how long to wait for the last answers, at most
_OPENED_AT_ONCE = 50  # connections; few, because a server with a short backlog would refuse more


class Load:
    """Sends requests for `path` to `port` of loopback over `connections` connections, and counts their outcomes."""

    def __init__(self, port: int, connections: int, path: str) -> None:
        self._port = port
        self.request = _REQUEST % path.encode()
        self._connections = connections
        self._closed_loop = False
        self._sent = 0
        self._due: deque[float] = deque()  # when each waiting request of an open loop was due
        self._opening: set[asyncio.Task[None]] = set()
        self._ended = False
        self.clients: set[_Client] = set()
        # The client that has been idle longest sends next, so that no connection is idle for so long that the server closes it.
        self.idle: deque[_Client] = deque()
        self.errors: Counter[str] = Counter()
        self.numbers: list[int] = []  # the numbers in the answers
        self.latencies: list[float] = []  # seconds
        self.answered = 0  # the number of requests that were answered during the measurement
        self.seconds = 0.0  # how long the measurement took
        self.marks: list[Any] = []  # what `mark` returned at the beginning and at the end of the measurement

    @property
    def failed(self) -> int:
        """Return the number of requests that were not answered with 200."""
        return sum(self.errors.values())

    @property
    def duplicates(self) -> int:
        """Return how many answers had a number that an earlier answer had already."""
        return len(self.numbers) - len(set(self.numbers))

    async def closed(self, seconds: float, warm: float = 0.0, mark: Callable[[], Any] = lambda: None) -> None:
        """Send the next request on each connection as soon as the previous request is answered.

        Measure for `seconds` after a warm-up of `warm` seconds. The answers during the warm-up do not count.
        """
        self._closed_loop = True
        await self._open()
        if warm:
            await asyncio.sleep(warm)
            self.errors.clear()
            self.numbers.clear()
        await self._measure(seconds, mark)

    async def open(self, seconds: float, rate: float) -> None:
        """Send `rate` requests a second, whether or not earlier requests are answered.

        The latency of a request begins when the request is due, so it includes the time that the request
        waits for an idle connection or for this process.
        """
        # Send one request on each connection first, because a silent connection would block one of gunicorn's threads.
        self._closed_loop = True
        await self._open()
        self._closed_loop = False
        await self._settle()
        self.errors.clear()
        self.numbers.clear()
        loop = asyncio.get_running_loop()
        interval = 1 / rate
        timer = _Timer(interval)
        following = loop.time()

        def tick() -> None:
            nonlocal following
            timer.read()
            now = loop.time()
            while following <= now:
                self._due.append(following)
                following += interval
            while self._due and self.idle:
                self.idle.popleft().send(self._due.popleft())

        loop.add_reader(timer.descriptor, tick)
        await self._measure(seconds, lambda: None, lambda: loop.remove_reader(timer.descriptor))
        os.close(timer.descriptor)

    async def _measure(self, seconds: float, mark: Callable[[], Any], stop: Callable[[], Any] = lambda: None) -> None:
        loop = asyncio.get_running_loop()
        self.marks.append(mark())
        began, already = loop.time(), len(self.numbers)
        await asyncio.sleep(seconds)
        self.seconds, self.answered = loop.time() - began, len(self.numbers) - already
        self.marks.append(mark())
        stop()
        self._closed_loop = False
        await self._settle()
        self._ended = True
        self.errors["no answer"] += len(self._due) + sum(client.busy for client in self.clients)
        for client in list(self.clients):
            client.transport.abort()
        for task in self._opening:
            task.cancel()
        await asyncio.sleep(0.01)

    async def _settle(self) -> None:
        """Wait for the answers to all requests, for at most `_SETTLE_SECONDS`."""
        end = asyncio.get_running_loop().time() + _SETTLE_SECONDS
        while (self._due or any(client.busy for client in self.clients)) and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.01)

    async def _open(self) -> None:
        left = self._connections
        while left:
            some = min(left, _OPENED_AT_ONCE)
            await asyncio.gather(*(self._connect() for _ in range(some)))
            left -= some

    async def _connect(self) -> None:
        while not self._ended:
            try:
                await asyncio.get_running_loop().create_connection(lambda: _Client(self), "127.0.0.1", self._port)
            except OSError as error:
                self.errors[type(error).__name__] += 1
                await asyncio.sleep(0.05)
            else:
                return

    def ready(self, client: "_Client") -> None:
        """Give the client its next request, or keep it idle."""
        self._sent += 1
        if self._closed_loop and self._sent < _MAX_REQUESTS:
            client.send(0.0)
        elif self._due:
            client.send(self._due.popleft())
        else:
            self.idle.append(client)

    def lost(self, client: "_Client") -> None:
        """Replace a connection that was closed."""
        self.clients.discard(client)
        if client in self.idle:
            self.idle.remove(client)
        if self._ended:
            return
        if client.busy:
            self.errors["connection lost"] += 1
        task = asyncio.create_task(self._connect())
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)


class _Client(asyncio.Protocol):
    """One connection, which sends one request at a time."""

    transport: asyncio.Transport

    def __init__(self, load: Load) -> None:
        self._load = load
        self._time = asyncio.get_running_loop().time
        self._received = b""
        self._intended = 0.0
        self.busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's transport is no subclass of asyncio.Transport.
        self._load.clients.add(self)
        self._load.ready(self)

    def send(self, intended: float) -> None:
        self.busy = True
        self._intended = intended
        self.transport.write(self._load.request)

    def data_received(self, data: bytes) -> None:
        if self._received:
            data = self._received + data
        head = data.find(b"\r\n\r\n")
        length = _LENGTH.search(data, 0, head) if head > 0 else None
        if length is None or len(data) < head + 4 + int(length[1]):
            self._received = data  # An answer without a length is never complete, and counts as "no answer".
            return
        self._received = b""
        self.busy = False
        load = self._load
        if data.startswith(b"HTTP/1.1 200 ") and (number := _NUMBER.search(data, head)):
            load.numbers.append(int(number[0]))
            if self._intended:
                load.latencies.append(self._time() - self._intended)
        else:
            load.errors[data[9:12].decode("latin-1")] += 1
        if _CLOSE.search(data, 0, head):
            self.transport.close()
        else:
            load.ready(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._load.lost(self)


class _Timer:
    """A timer file, which becomes readable every `interval` seconds. The event loop's own timers only count milliseconds."""

    def __init__(self, interval: float) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = libc.timerfd_create(1, os.O_NONBLOCK | os.O_CLOEXEC)  # 1: the monotonic clock
        whole = max(1, round(interval * 1e9))
        times = (ctypes.c_long * 4)(*divmod(whole, 10**9), *divmod(whole, 10**9))
        if self.descriptor < 0 or libc.timerfd_settime(self.descriptor, 0, times, None):
            raise OSError(ctypes.get_errno(), "timerfd")

    def read(self) -> None:
        """Reset the timer, so that it becomes readable after the next interval."""
        os.read(self.descriptor, 8)
