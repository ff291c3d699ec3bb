"""A primary with two replicas and three Sentinels, and a network between all of them that a test can slow down or cut.

Each server has an address of its own on loopback, which works on Linux. The network in front of a server tells its peers apart by
their source addresses. Tests that run at the same time use different addresses. Otherwise a connection of one test could occupy
the port that a server of another test must listen on.
"""

import asyncio
import contextlib
import os
import random
import subprocess
from collections.abc import AsyncIterator, Iterator
from enum import Enum, auto
from pathlib import Path
from typing import Any, Self

import redis

from nanoservice.embedded import executable
from nanoservice.sentinel import PRIMARY_NAME
from nanoservice.testing.proxy import Tasks
from nanoservice.testing.valkey import Valkey, free_port
from nanoservice.testing.waiting import SLACK, eventually

_SERVERS = 3
_SENTINELS = 3
DOWN_AFTER = 2.0  # seconds without an answer of the primary, after which a Sentinel calls it down


class Peer(Enum):
    """The kind of peer at the other end of a connection to a server."""

    SERVICE = auto()
    REPLICA = auto()
    SENTINEL = auto()


class Network(Tasks):
    """The network in front of one server: it listens at the address `host`:`port` and passes bytes to `upstream` on 127.0.0.1.

    No bytes pass to or from the peers in `cut`, and their connections stay open. Bytes under way arrive when the cut ends.
    `delay` is the number of seconds that a replica's bytes need, in each direction.
    """

    def __init__(self, host: str, upstream: int) -> None:
        super().__init__()
        self.host = host
        self.port = free_port()
        self.cut: frozenset[Peer] = frozenset()
        self.delay = 0.0
        self._upstream = upstream
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._server = await asyncio.start_server(self._serve, self.host, self.port)
        return self

    def abort(self) -> None:
        """Close all connections soon, and lose the bytes that are under way. Any thread may call this."""
        self._loop.call_soon_threadsafe(self._abort)

    def _abort(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._keep_task()
        subnet = writer.get_extra_info("peername")[0].rpartition(".")[2][:-1]
        peer = {"1": Peer.REPLICA, "2": Peer.SENTINEL}.get(subnet, Peer.SERVICE)
        with contextlib.suppress(OSError, asyncio.CancelledError):  # an OSError if the server is down
            async with self._open(writer):
                await self._passes(peer)
                upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
                async with self._open(upstream_writer), asyncio.TaskGroup() as passing:
                    passing.create_task(self._pass_on(reader, upstream_writer, peer))
                    passing.create_task(self._pass_on(upstream_reader, writer, peer))

    @contextlib.asynccontextmanager
    async def _open(self, writer: asyncio.StreamWriter) -> AsyncIterator[None]:
        """Keep the connection of `writer` among those that can be aborted, and abort it at the end of the context."""
        self._writers.add(writer)
        try:
            yield
        finally:
            self._writers.discard(writer)
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _passes(self, peer: Peer) -> None:
        """Wait until the network passes bytes for `peer`."""
        while peer in self.cut:
            await asyncio.sleep(0.02)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: Peer) -> None:
        with contextlib.suppress(OSError, RuntimeError):  # uvloop raises RuntimeError if the connection was aborted
            while data := await reader.read(1 << 16):
                if self.delay and peer is Peer.REPLICA:
                    await asyncio.sleep(self.delay)
                await self._passes(peer)
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


def _is_old() -> bool:
    """Return whether the tests use a Redis older than version 7."""
    program = os.environ.get("REDIS_SERVER") or executable()
    return " v=6." in subprocess.check_output([program, "--version"], text=True)


class Server(Valkey):
    """One of the three servers, and the network in front of it."""

    def __init__(self, data: Path, host: str) -> None:
        super().__init__(data)
        self.network = Network(host, self.port)
        self.options = (
            # Before version 7, Redis has no option for the source address, and uses the first address that it listens on.
            *(("--bind", host, "127.0.0.1") if _is_old() else ("--bind-source-addr", host)), "--repl-diskless-sync-delay", "0",
            "--replica-announce-ip", host, "--replica-announce-port", str(self.network.port),
        )  # fmt: skip

    def role(self) -> str:
        """Return `master` or `slave`; for a replica that has no link to its primary, return an empty string."""
        try:
            with self.client(socket_timeout=1) as client:
                state: Any = client.role()
        except redis.RedisError:
            return ""
        return str(state[0]) if state[0] == "master" or state[3] == "connected" else ""


class Replicated:
    """The servers and the Sentinels, in the folder `data`."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.servers = []
        subnet = f"127.{random.randrange(1, 255)}.{random.randrange(1, 255)}"
        for number in range(1, _SERVERS + 1):
            (data / str(number)).mkdir(parents=True)
            self.servers.append(Server(data / str(number), f"{subnet}.1{number}"))
        self.sentinels = [(f"{subnet}.2{number}", free_port()) for number in range(1, _SENTINELS + 1)]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Start everything, and wait until the Sentinels know all servers. Stop everything at the end of the context."""
        async with contextlib.AsyncExitStack() as stack:
            first, *others = self.servers
            for server in self.servers:
                await stack.enter_async_context(server.network)
                stack.callback(server.kill)
                replica_of = () if server is first else ("--replicaof", first.network.host, str(first.network.port))
                await asyncio.to_thread(server.start, *replica_of)
            await eventually(lambda: asyncio.to_thread(lambda: [one.role() for one in others] == ["slave"] * 2), 10 * SLACK)
            for number in range(_SENTINELS):
                stack.enter_context(self._sentinel(number))
            await eventually(lambda: asyncio.to_thread(self.is_whole), 10 * SLACK)
            yield self

    @contextlib.contextmanager
    def _sentinel(self, number: int) -> Iterator[None]:
        host, port = self.sentinels[number]
        first = self.servers[0].network
        lines = [
            f"port {port}", f"bind {host}", f"bind-source-addr {host}", f"dir {self.data}", "loglevel warning",
            f"sentinel monitor {PRIMARY_NAME} {first.host} {first.port} 2",
            f"sentinel down-after-milliseconds {PRIMARY_NAME} {DOWN_AFTER * 1000:.0f}",
            # If no Sentinel gets enough votes, the next election begins after twice this time.
            f"sentinel failover-timeout {PRIMARY_NAME} 3000", f"sentinel parallel-syncs {PRIMARY_NAME} 2",
        ]  # fmt: skip
        file = self.data / f"sentinel-{number}.conf"
        file.write_text("\n".join(lines) + "\n")
        process = subprocess.Popen([executable(), str(file), "--sentinel"], stdout=subprocess.DEVNULL)
        try:
            yield
        finally:
            process.kill()
            process.wait()

    def ask(self, number: int, *command: str) -> Any:
        """Send one command to a Sentinel. Return its reply, or None if the Sentinel does not reply."""
        host, port = self.sentinels[number]
        try:
            with redis.Redis(host, port, socket_timeout=1, decode_responses=True) as client:
                return client.execute_command("SENTINEL", *command)
        except redis.RedisError:
            return None

    def primary(self) -> Server | None:
        """Return the server that most Sentinels call the primary, or None if they disagree."""
        named = [tuple(self.ask(number, "GET-MASTER-ADDR-BY-NAME", PRIMARY_NAME) or ()) for number in range(_SENTINELS)]
        for server in self.servers:
            if named.count((server.network.host, str(server.network.port))) > _SENTINELS // 2:
                return server
        return None

    def is_whole(self) -> bool:
        """Return whether there is one primary with two replicas, and each Sentinel knows them and the other Sentinels."""
        primary = self.primary()
        roles = sorted(server.role() for server in self.servers)
        if primary is None or primary.role() != "master" or roles != ["master", "slave", "slave"]:
            return False
        for number in range(_SENTINELS):
            state: Any = self.ask(number, "MASTER", PRIMARY_NAME)
            if not state or state["flags"] != "master":
                return False
            if (state["num-slaves"], state["num-other-sentinels"]) != (str(_SERVERS - 1), str(_SENTINELS - 1)):
                return False
            replicas: Any = self.ask(number, "REPLICAS", PRIMARY_NAME)
            if any(replica["flags"] != "slave" for replica in replicas):
                return False
        return True

    def environ(self, **more: str) -> dict[str, str]:
        """Return the settings of a service that finds the primary through the Sentinels and listens on free ports."""
        sentinels = ",".join(f"{host}:{port}" for host, port in self.sentinels)
        return {"REDIS_SENTINELS": sentinels, "BIND_PORT": "0", "ADMIN_PORT": "0", **more}
