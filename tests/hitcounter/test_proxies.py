"""Behind a real reverse proxy no request fails while instances restart, and idle connections of the proxy's pool stay usable."""

import asyncio
import contextlib
import functools
import os
import time
from collections import Counter
from pathlib import Path

import aiohttp
import pytest

from nanoservice.testing.valkey import Valkey, free_port
from nanoservice.testing.waiting import SLACK, eventually
from tests.support.load import PostLoad
from tests.support.process import Process, Spawn
from tests.support.proxies import established, proxy
from tests.support.wire import Wire, connected, request

pytestmark = pytest.mark.proxies

RESTARTS = int(os.environ.get("RESTARTS", "3"))
NAMES = "nginx", "haproxy", "haproxy without checks"
CLIENTS = 32
CHECKS = 2  # connections that an instance may have without any load: checks of the proxy
IDLE = 2000  # connections in the proxy's pool
POST = request("POST", "/", "Accept: application/json", body=b"x")


class Instances:
    """Two instances of the service on fixed ports."""

    def __init__(self, spawn: Spawn, valkey: Valkey) -> None:
        self.ports = [free_port(), free_port()]
        self._spawn, self._valkey = spawn, valkey
        self._processes = [self._start(port) for port in self.ports]
        self.seconds: list[float] = []  # how long each shutdown took

    def _start(self, port: int) -> Process:
        settings = {"BIND_HOST": "127.0.0.1", "BIND_PORT": str(port), "DRAIN_SECONDS": "2", "REQUEST_TIMEOUT": "9"}
        return self._spawn(self._valkey.environ(**settings))

    async def restart(self, index: int) -> None:
        """Restart one instance, and wait until it is ready."""
        began = time.monotonic()
        assert await asyncio.to_thread(self._processes[index].end) == 0
        self.seconds.append(time.monotonic() - began)
        self._processes[index] = await asyncio.to_thread(self._start, self.ports[index])
        await eventually(functools.partial(self._ready, index), 10 * SLACK)

    async def ready(self) -> None:
        """Wait until both instances are ready, so that the first check of a proxy succeeds."""
        for index in range(2):
            await eventually(functools.partial(self._ready, index), 10 * SLACK)

    async def _ready(self, index: int) -> bool:
        async with aiohttp.request("GET", f"http://127.0.0.1:{self.ports[index]}/readyz") as answer:
            return answer.status == 200


@pytest.mark.parametrize("name", NAMES)
async def test_no_post_fails_while_instances_restart(spawn: Spawn, valkey: Valkey, tmp_path: Path, name: str) -> None:
    instances = Instances(spawn, valkey)
    await instances.ready()
    with proxy(name, instances.ports, tmp_path / "proxy") as port:
        load = PostLoad([port], CLIENTS)
        running = asyncio.create_task(load.run(3600))
        for number in range(RESTARTS):
            await instances.restart(number % 2)
            await eventually(lambda: min(established(instances.ports)) > CHECKS, 10 * SLACK)
        load.stop()
        tally = await running
        answered, failed = tally.answered, tally.statuses.total() - tally.answered
        print(f"{name}: {RESTARTS} restarts, {answered} answered, {failed} failed: {dict(tally.statuses)}")
        assert answered > 100 * RESTARTS
        assert not failed
    tally.check(0, int(valkey.run("GET", "{hitcounter}:posts")))


async def answered(clients: list[Wire], data: bytes) -> None:
    """Send `data` on each connection, and fail unless each answer is 200."""
    await asyncio.gather(*(client.send(data) for client in clients))
    statuses: Counter[bytes] = Counter()
    for client in clients:
        client.received = b""
        while b"\r\n\r\n" not in client.received and await client.more():
            pass
        statuses[client.received[9:12]] += 1
    assert statuses == {b"200": len(clients)}


@pytest.mark.parametrize("name", NAMES)
async def test_two_thousand_idle_connections_of_a_pool_stay_usable(
    spawn: Spawn, valkey: Valkey, tmp_path: Path, name: str
) -> None:
    instances = Instances(spawn, valkey)
    await instances.ready()
    with proxy(name, instances.ports, tmp_path / "proxy") as port:
        async with contextlib.AsyncExitStack() as stack:
            clients: list[Wire] = []
            for _ in range(IDLE // 100):
                clients += await asyncio.gather(*(stack.enter_async_context(connected(port)) for _ in range(100)))

            async def pooled() -> bool:
                return sum(established(instances.ports)) >= IDLE

            async def fill() -> None:
                # Each request waits for its body, so the proxy needs a connection for each.
                await asyncio.gather(*(client.send(POST[:-1]) for client in clients))
                await eventually(pooled, 5 * SLACK)
                await answered(clients, POST[-1:])

            for _ in range(2):
                await fill()
                await asyncio.sleep(0.5)
            print(f"{name}: {established(instances.ports)} connections of the pool to the instances")
            restarting = asyncio.create_task(instances.restart(0))
            # Use a few of the idle connections at a time, until the proxy uses the new instance too. Before that, all connections
            # together and a check of the proxy would be more than the other instance accepts.
            async with asyncio.timeout(20 * SLACK):
                while not restarting.done() or established(instances.ports)[0] <= CHECKS:
                    for begin in range(0, IDLE, 100):
                        await answered(clients[begin : begin + 100], POST)
            await restarting
            await fill()
