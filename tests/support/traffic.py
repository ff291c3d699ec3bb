"""Send requests to a URL at a constant rate, and record the outcome of each request."""

import asyncio
import itertools
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.support.load import Tally

_ports = itertools.cycle(range(10_000, 30_000))


def own_port(address: Any) -> socket.socket:
    """Return a socket with a local port that no recent connection used.

    The client runs on the node, or next to it. While the service has no pod, the node refuses a connection, and the refusal
    leaves an entry in the kernel's table of connections for two minutes. This entry would make the node refuse another
    connection from the same local port.
    """
    family, kind, protocol, *_ = address
    while True:
        one = socket.socket(family, kind, protocol)
        one.setblocking(False)
        try:
            one.bind(("", next(_ports)))
        except OSError:  # the port is in use
            one.close()
        else:
            return one


@dataclass
class Failure:
    """A request that was not answered with 200: when it was sent, how long it took, and the status or error."""

    at: float
    seconds: float
    what: str


@dataclass
class Traffic:
    """Sends nine GETs for each POST, at a constant rate. Each request is sent once, because a retry could hide a failure."""

    url: str
    rate: float
    tally: Tally = field(default_factory=Tally)
    failures: list[Failure] = field(default_factory=list)
    slowest: float = 0.0
    sent: int = 0
    last_answered: float = 0.0  # when the last request that got 200 was sent

    async def _ask(self, session: aiohttp.ClientSession, kind: str | None) -> None:
        began = time.monotonic()
        try:
            async with session.request("GET" if kind is None else "POST", self.url) as answer:
                status, body = answer.status, await answer.read()
                what = str(status)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            status, body, what = 0, b"", type(error).__name__
        seconds = time.monotonic() - began
        self.slowest = max(self.slowest, seconds)
        self.tally.add(kind, status, body)
        if status == 200:
            self.last_answered = max(self.last_answered, began)
        else:
            self.failures.append(Failure(began, seconds, what))

    async def run(self, ended: asyncio.Event, least: int) -> None:
        """Send requests until `ended` is set and at least `least` requests have been sent."""
        connector = aiohttp.TCPConnector(
            limit=0, socket_factory=own_port
        )  # with a limit, requests would wait in this client, and not in the service, while Redis is down
        timeout = aiohttp.ClientTimeout(total=10, connect=5)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers={"Accept": "application/json"}) as session:
            session._retry_connection = False
            under_way: set[asyncio.Task[None]] = set()
            loop = asyncio.get_running_loop()
            due = loop.time()
            while self.sent < least or not ended.is_set():
                task = asyncio.create_task(self._ask(session, None if self.sent % 10 else ""))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
                self.sent += 1
                due += 1 / self.rate
                await asyncio.sleep(max(0.0, due - loop.time()))
            if under_way:
                await asyncio.wait(under_way, timeout=15)

    def check(self, before: tuple[int, int], after: tuple[int, int]) -> None:
        """Fail unless each answered request was counted once, with a number of its own, and each failed request at most once.

        `before` and `after` are the results of `counts`, and each of these two calls has counted a hit itself.
        """
        tally = self.tally
        for kind, numbers, failed, first, last in (
            ("hits", tally.hits, tally.failed_hits, before[0], after[0] - 1),
            ("posts", tally.posts, tally.failed_posts, before[1], after[1]),
        ):
            assert len(set(numbers)) == len(numbers), f"{kind}: a number was answered twice"
            assert max(numbers, default=first) <= last, f"{kind}: Redis has a lower number than an answer"
            assert len(numbers) <= last - first <= len(numbers) + failed, f"{kind}: {first} to {last}, {len(numbers)} answered"

    def statuses(self) -> str:
        """Return a one-line summary of the requests."""
        counts: dict[str, int] = {}
        for failure in self.failures:
            counts[failure.what] = counts.get(failure.what, 0) + 1
        return f"{self.sent} requests, slowest {self.slowest:.2f} s, failed: {counts or 0}"


@asynccontextmanager
async def traffic(url: str, rate: float, *, least: int = 0) -> AsyncIterator[Traffic]:
    """Send `rate` requests a second to `url` while the block runs.

    If the block ends before `least` requests are sent, continue until they are sent.
    """
    one = Traffic(url, rate)
    ended = asyncio.Event()
    task = asyncio.create_task(one.run(ended, least))
    try:
        yield one
    finally:
        ended.set()
        await task


async def step(work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Run a blocking function in a thread, so that the load continues meanwhile."""
    return await asyncio.to_thread(work, *arguments, **options)


async def counts(url: str) -> tuple[int, int]:
    """Count a hit, and return the counted hits and posts."""
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(socket_factory=own_port)) as session,
        session.get(url, headers={"Accept": "application/json"}) as answer,
    ):
        content = await answer.json()
        assert answer.status == 200, content
        return content["hits"], content["posts"]


async def reachable(url: str) -> bool:
    """Return whether the service answers on a new connection."""
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(socket_factory=own_port)) as session,
            session.get(f"{url}livez", timeout=aiohttp.ClientTimeout(total=5)) as answer,
        ):
            return answer.status == 200
    except (aiohttp.ClientError, OSError, TimeoutError):
        return False
