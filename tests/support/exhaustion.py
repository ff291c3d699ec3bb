"""Attacks that try to exhaust a service's time, memory or connections, and probes that measure how the service copes.

The program `python -m tests.support.exhaustion HOST PORT ADMIN_PORT SECONDS ATTACK` runs one attack. It is a process of its own,
so that the probes do not wait for it.
"""

import asyncio
import contextlib
import itertools
import os
import random
import re
import resource
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from statistics import quantiles

import uvloop

from tests.support import ROOT
from tests.support.loops import python_path
from tests.support.wire import request

MIB = 1 << 20
PROBE_SECONDS = 5.0  # the liveness probe's timeout in manifests/base
_PROBE_INTERVAL = 0.02
_OPENED_AT_ONCE = 200
_RAMP_SECONDS = 15.0  # the longest time for opening all connections
_WRITES_AT_ONCE = 16
_PROBE = request("GET", "/livez", "Connection: close")


@dataclass(frozen=True)
class Attack:
    """What each connection of an attack does. A connection that the service closes is opened again."""

    connections: int
    data: bytes = b""  # sent first
    again: bytes = b""  # sent again and again, as fast as the service reads it
    pause: float = 0.0  # seconds before each repetition, and before a connection is opened again
    reads: bool = True  # whether the client reads the answers
    stays: bool = True  # whether the connection stays open after `data`
    resets: bool = False  # whether the connection is reset, not closed
    admin: bool = False  # whether the attack is on the admin port
    malformed: bool = False  # whether each connection sends a malformed request in place of `data`


def _heads() -> dict[str, Attack]:
    """Return attacks with request heads of every size that a line's limit and the number of headers allow."""
    sizes = {"1 KB": (1, 900), "8 KB": (1, 8000), "15 KB": (2, 7400), "64 KB": (8, 8000), "1 MB": (126, 8100)}
    attacks = {}
    for name, (number, length) in sizes.items():
        head = request("GET", "/", *(f"X-{index}: {'a' * length}" for index in range(number)))
        attacks[f"unfinished heads of {name}"] = Attack(200, head[:-2])
        attacks[f"pipelined heads of {name}"] = Attack(20, again=head * max(1, 100_000 // len(head)))
    return attacks


_ROUTES = ("GET /", "POST /", "HEAD /", "OPTIONS /", "GET /livez", "GET /readyz", "GET /version", "GET /openapi.json", "GET /x")
_CHUNKED = request("POST", "/", "Transfer-Encoding: chunked")
_BODY = request("POST", "/", body=b"x" * MIB)
_LARGE_HEADERS = [f"X-{number}: {'a' * 7400}" for number in range(2)]
_SMALL_HEADERS = [f"a{number}: b" for number in range(126)]

ATTACKS = {
    **{f"pipelined {route}": Attack(8, again=request(*route.split()) * 1000) for route in _ROUTES},
    **_heads(),
    "pipelined requests, one by one": Attack(64, again=request()),
    "malformed requests": Attack(100, malformed=True, stays=False),
    "1,000 unfinished heads of many headers": Attack(1000, request("GET", "/", *_SMALL_HEADERS)[:-2]),
    "heads that never end": Attack(50, b"GET / HTTP/1.1\r\nHost: x\r\n", b"a: b\r\n" * 20),
    "slow heads": Attack(3000, b"GET / HTTP/1.1\r\nHost: x\r\nX: ", b"a", pause=1),
    "requests behind a part of a request": Attack(500, request("GET", "/livez") + request("GET", "/", "X: " + "a" * 8000)[:-2]),
    "bodies of 1 MB": Attack(100, again=_BODY),
    "unfinished bodies of 1 MB": Attack(200, _BODY[:-1]),
    "bodies that are too long": Attack(100, request("POST", "/", f"Content-Length: {64 * MIB}"), b"x" * 65536),
    "slow bodies": Attack(3000, request("POST", "/", "Content-Length: 1000"), b"x", pause=1),
    "slow bodies behind large heads": Attack(2000, request("POST", "/", "Content-Length: 999", *_LARGE_HEADERS), b"x", pause=1),
    "slow bodies behind many headers": Attack(2000, request("POST", "/", "Content-Length: 999", *_SMALL_HEADERS), b"x", pause=1),
    "chunks of one byte": Attack(20, _CHUNKED, b"1\r\nx\r\n" * 5000),
    "chunks with extensions": Attack(50, _CHUNKED, b"1;" + b"a" * 4000 + b"\r\nx\r\n"),
    "trailers": Attack(200, _CHUNKED + b"0\r\n", b"X: " + b"a" * 8000 + b"\r\n"),
    "many trailers": Attack(200, _CHUNKED + b"0\r\n" + b"a: b\r\n" * 120),
    "answers that nobody reads": Attack(200, again=request("GET", "/openapi.json") * 100, reads=False),
    "idle connections": Attack(10_000, request("GET", "/livez")),
    "silent connections": Attack(10_000),
    "connections that are closed": Attack(200, stays=False),
    "connections that are reset": Attack(200, stays=False, resets=True),
    "requests that are reset": Attack(200, request("POST", "/"), stays=False, resets=True),
    "upgrades": Attack(50, request("GET", "/", "Connection: upgrade", "Upgrade: h2c") + b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "expectations": Attack(500, request("POST", "/", "Expect: 100-continue", "Content-Length: 1000000")),
    "admin port: pipelined /metrics": Attack(4, again=request("GET", "/metrics") * 100, admin=True),
    "admin port: unread /metrics": Attack(100, again=request("GET", "/metrics") * 100, reads=False, admin=True),
    "admin port: unfinished heads": Attack(200, request("GET", "/", *(f"X-{n}: {'a' * 8100}" for n in range(126))), admin=True),
    "admin port: idle connections": Attack(5_000, request("GET", "/metrics"), admin=True),
}


class Attacker:
    """Runs an attack."""

    def __init__(self, attack: Attack, host: str, port: int) -> None:
        self.attack = attack
        self.counts: Counter[str] = Counter()
        self._address = host, port
        self._opening = asyncio.Semaphore(_OPENED_AT_ONCE)
        self._rng = random.Random(0)
        self._opened = 0  # connections that were opened, or could not be opened at the first try

    async def run(self, seconds: float) -> None:
        """Open all connections, and attack for `seconds` after that."""
        tasks = [asyncio.create_task(self._keep_open()) for _ in range(self.attack.connections)]
        end = time.monotonic() + _RAMP_SECONDS
        while self._opened < len(tasks) and time.monotonic() < end:
            await asyncio.sleep(0.05)
        await asyncio.sleep(seconds)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=5)

    def malformed(self) -> bytes:
        """Return a malformed request."""
        from tests.support.attack import hostile  # imports so much that it would slow down the start of all other attacks

        return b"".join(hostile(self._rng, b"zq7"))

    async def _keep_open(self) -> None:
        loop = asyncio.get_running_loop()
        for number in itertools.count():
            async with self._opening:
                try:
                    async with asyncio.timeout(PROBE_SECONDS):
                        _, client = await loop.create_connection(lambda: _Client(self), *self._address)
                except (OSError, TimeoutError) as error:
                    self.counts[type(error).__name__] += 1
                    await asyncio.sleep(0.05)
                    continue
                finally:
                    self._opened += not number
            self.counts["connections"] += 1
            try:
                await client.lost
            finally:
                client.transport.abort()
            await asyncio.sleep(self.attack.pause)


class _Client(asyncio.Protocol):
    """One connection of an attack."""

    transport: asyncio.Transport

    def __init__(self, attacker: Attacker) -> None:
        self._attacker, self._attack = attacker, attacker.attack
        self._loop = asyncio.get_running_loop()
        self._paused = False
        self.lost = self._loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment] # uvloop's transports do not derive from asyncio's
        sock = transport.get_extra_info("socket")
        if not self._attack.reads:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            self.transport.pause_reading()
        if self._attack.resets:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        data = self._attacker.malformed() if self._attack.malformed else self._attack.data
        self._write(data)
        if not self._attack.stays:
            # Leave the service a moment to begin an answer, except when nothing was sent.
            self._loop.call_later(0.01 if data else 0, self.transport.close)
        elif self._attack.again:
            self._repeat()

    def _write(self, data: bytes) -> None:
        self._attacker.counts["bytes"] += len(data)
        self.transport.write(data)

    def _repeat(self) -> None:
        with contextlib.suppress(RuntimeError):  # uvloop raises this if the connection has just been lost
            for _ in range(1 if self._attack.pause else _WRITES_AT_ONCE):
                if self._paused or self.transport.is_closing():
                    return
                self._write(self._attack.again)
            self._loop.call_later(self._attack.pause, self._repeat)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._attack.again:
            self._loop.call_soon(self._repeat)

    def data_received(self, data: bytes) -> None:
        self._attacker.counts["answers"] += data.count(b"HTTP/1.1 ")

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)


@dataclass
class Probes:
    """The outcomes of the liveness probes that were sent during an attack."""

    seconds: list[float] = field(default_factory=list)  # how long each took
    failures: Counter[str] = field(default_factory=Counter)

    @property
    def p99(self) -> float:
        """Return the time within which 99 of 100 probes were answered; a failed probe counts as the probe's timeout."""
        return quantiles([*self.seconds, *[PROBE_SECONDS] * self.failures.total()], n=100, method="inclusive")[98]


async def _probe(probes: Probes, host: str, port: int) -> None:
    began = time.monotonic()
    writer = None
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(_PROBE)
            answer = await reader.read()
    except (OSError, TimeoutError) as error:
        probes.failures[type(error).__name__] += 1
    else:
        if answer.startswith(b"HTTP/1.1 200 "):
            probes.seconds.append(time.monotonic() - began)
        else:
            probes.failures[answer[:12].decode("latin-1") or "closed"] += 1
    finally:
        if writer:
            writer.transport.abort()


@contextlib.asynccontextmanager
async def _probing(host: str, port: int) -> AsyncIterator[Probes]:
    """Send a probe on a new connection every 20 ms. A kubelet sends such probes more rarely."""
    probes, sent = Probes(), set()

    async def send() -> None:
        while True:
            task = asyncio.create_task(_probe(probes, host, port))
            sent.add(task)
            task.add_done_callback(sent.discard)
            await asyncio.sleep(_PROBE_INTERVAL)

    sending = asyncio.create_task(send())
    try:
        yield probes
    finally:
        sending.cancel()
        if sent:
            await asyncio.wait(sent, timeout=PROBE_SECONDS + 1)


async def attacked(name: str, host: str, port: int, admin_port: int, seconds: float) -> tuple[Probes, str]:
    """Run the attack `name` against the service for `seconds`; return the outcomes of probes, and what the attacker counted."""
    arguments = host, str(port), str(admin_port), str(seconds), name
    async with _probing(host, port) as probes:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", __spec__.name, *arguments, cwd=ROOT, stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": python_path(ROOT)},
        )  # fmt: skip
        try:
            async with asyncio.timeout(seconds + _RAMP_SECONDS + 30):
                output, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert process.returncode == 0, f"the attacker ended with {process.returncode}"
    return probes, output.decode().strip()


def memory_limit() -> int:
    """Return the memory limit in the manifest of a service, in bytes."""
    deployment = (ROOT / "manifests" / "base" / "deployment.yaml").read_text()
    found = re.search(r"\n +limits:\n(?: +.*\n)*? +memory: (\d+)Mi\n", deployment)
    assert found
    return int(found[1]) * MIB


def _main() -> None:
    host, port, admin_port, seconds, name = sys.argv[1:]
    os.nice(5)  # the service and the probes go first
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    attack = ATTACKS[name]

    async def run() -> Attacker:
        attacker = Attacker(attack, host, int(admin_port if attack.admin else port))
        await attacker.run(float(seconds))
        return attacker

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(dict(runner.run(run()).counts))


if __name__ == "__main__":
    _main()
