"""Send a load of requests over many connections, and keep a tally of the answers."""

import asyncio
import itertools
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

from nanoservice.listen import max_connections

_LENGTH = re.compile(rb"\r\nContent-Length: (\d+)", re.IGNORECASE)
_HEAD = b"/ HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
_GET = b"GET " + _HEAD + b"\r\n"
_POST = b"POST " + _HEAD + b"Content-Length: 0\r\n"


@dataclass
class Tally:
    """The outcome of the requests: the number that each request got, or its failure."""

    hits: list[int] = field(default_factory=list)  # the numbers that GETs got
    posts: list[int] = field(default_factory=list)  # the numbers that POSTs without a key got
    keys: dict[str, set[tuple[int, int]]] = field(default_factory=dict)  # the answers to each Idempotency-Key that was sent
    repeated: int = 0  # how many POSTs had a key that had been sent before
    failed_hits: int = 0
    failed_posts: int = 0
    statuses: Counter[int] = field(default_factory=Counter)  # 0 means that the connection closed without an answer
    highest_hits: int = 0  # the highest number of hits in any answer
    highest_posts: int = 0

    @property
    def answered(self) -> int:
        return self.statuses[200]

    def add(self, kind: str | None, status: int, body: bytes) -> None:
        """Record an answer. `kind` is None for a GET; for a POST it is the key, or empty if the POST has no key."""
        self.statuses[status] += 1
        if status != 200:
            if kind is None:
                self.failed_hits += 1
            elif kind == "":
                self.failed_posts += 1
            return
        content = json.loads(body)
        hits, posts = content["hits"], content["posts"]
        self.highest_hits = max(hits, self.highest_hits)
        self.highest_posts = max(posts, self.highest_posts)
        if kind is None:
            self.hits.append(hits)
        elif kind == "":
            self.posts.append(posts)
        else:
            self.keys[kind].add((hits, posts))

    def check(self, hits: int, posts: int) -> None:
        """Fail unless each answered request was counted once, with a number of its own, and each failed request at most once."""
        assert len(set(self.hits)) == len(self.hits), "a hit's number was answered twice"
        counted = len(self.hits)
        assert self.highest_hits <= hits, "Redis has fewer hits than an answer"
        assert counted <= hits <= counted + self.failed_hits, "a hit was lost, or counted twice"
        # If a number below the highest is in no answer, it belongs to a failed request.
        assert max(self.hits, default=0) - counted <= self.failed_hits

        assert all(len(answers) <= 1 for answers in self.keys.values()), "a key got two different answers"
        numbers = self.posts + [number for answers in self.keys.values() for _, number in answers]
        unknown = self.failed_posts + sum(not answers for answers in self.keys.values())
        assert len(set(numbers)) == len(numbers), "a post's number was answered twice"
        counted = len(numbers)
        assert self.highest_posts <= posts, "Redis has fewer posts than an answer"
        assert counted <= posts <= counted + unknown, "a post was lost, or counted twice"
        assert max(numbers, default=0) - counted <= unknown
        print(f"by status {dict(self.statuses)}; in Redis {hits} hits, {posts} posts; {self.repeated} keys were repeated")


class Load:
    """Sends GETs, POSTs, and POSTs with keys to `ports` of loopback, over `connections` keep-alive connections.

    Each connection waits `pause` seconds between an answer and its next request.
    """

    def __init__(self, ports: list[int], connections: int, *, most: int = 1_000_000, pause: float = 0) -> None:
        self.tally = Tally()
        self.pause = pause
        self._ports = ports
        self._connections = connections
        self._until = 0.0
        self._requests = itertools.islice(self._mix(), most)

    def _mix(self) -> Iterator[tuple[str | None, bytes]]:
        """Yield requests: of every eight, six are GETs, one is a POST without a key, and one is a POST with a key.

        Each key is sent three times in short succession, so that some repetitions share a batch. Every fourth POST with a key
        repeats a key that was first sent long before.
        """
        for number in itertools.count():
            group = number // 3
            for _ in range(6):
                yield None, _GET
            yield "", _POST + b"\r\n"
            key = f"key-{group}" if number % 4 else f"key-{group // 2}"
            if key in self.tally.keys:
                self.tally.repeated += 1
            self.tally.keys.setdefault(key, set())
            yield key, _POST + b"Idempotency-Key: %s\r\n\r\n" % key.encode()

    async def run(self, seconds: float, *, patience: float = 20) -> Tally:
        """Send requests for `seconds`, wait at most `patience` seconds for the last answers, and return the tally."""
        max_connections()  # this call raises the limit on open files
        loop = asyncio.get_running_loop()
        self._until = time.monotonic() + seconds
        clients = []
        for number in range(self._connections):
            port = self._ports[number % len(self._ports)]
            _, client = await loop.create_connection(lambda: _Client(self), "127.0.0.1", port)
            clients.append(client)
        late = max(0.0, self._until - time.monotonic()) + patience
        _, open_still = await asyncio.wait([client.ended for client in clients], timeout=late)
        if open_still:
            for client in clients:
                client.transport.abort()
            await asyncio.wait(open_still, timeout=patience)
        return self.tally

    def stop(self) -> None:
        """Stop sending requests."""
        self._until = 0.0

    def next(self) -> tuple[str | None, bytes] | None:
        """Return the next request, or None when the load is over."""
        return next(self._requests, None) if time.monotonic() < self._until else None


class PostLoad(Load):
    """Sends only POSTs without a key, which a proxy must not repeat."""

    def _mix(self) -> Iterator[tuple[str | None, bytes]]:
        return itertools.repeat(("", _POST + b"\r\n"))


class _Client(asyncio.Protocol):
    """A connection that sends one request at a time."""

    transport: asyncio.Transport

    def __init__(self, load: Load) -> None:
        self._load = load
        self._kind: str | None = None
        self._waiting = False
        self._received = b""
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's transports do not derive from asyncio's
        self._send()

    def _send(self) -> None:
        if self.transport.is_closing():
            return
        request = self._load.next()
        if request is None:
            self.transport.close()
        else:
            self._waiting = True
            self._kind, data = request
            self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        length = _LENGTH.search(head)
        assert length, head
        if len(body) < int(length[1]):
            return
        self._received = b""
        self._waiting = False
        self._load.tally.add(self._kind, int(head[9:12]), body)
        if b"connection: close" in head.lower():
            self.transport.close()
        elif self._load.pause:
            asyncio.get_running_loop().call_later(self._load.pause, self._send)
        else:
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiting:
            self._load.tally.add(self._kind, 0, b"")
        if not self.ended.done():
            self.ended.set_result(None)
