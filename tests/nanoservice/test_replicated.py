"""Test a store with Sentinels and replicas: how the primary is found, what a failover does, and which causes are named."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from nanoservice.config import Config
from nanoservice.errors import UnavailableError
from nanoservice.redis import Store
from nanoservice.sentinel import PRIMARY_NAME
from nanoservice.testing.replicated import Network, Peer, Replicated
from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey, free_port
from nanoservice.testing.waiting import SLACK, eventually
from tests.nanoservice.sample import SERVICE
from tests.support import needs_linux
from tests.support.process import metric

pytestmark = needs_linux("other systems do not have all addresses of 127.0.0.0/8")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Replicated]:
    """Yield a primary with two replicas and three Sentinels."""
    async with Replicated(tmp_path / "store").running() as it:
        yield it


@pytest.fixture
def silent() -> Iterator[int]:
    """Yield a port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


async def get(served: Served, path: str = "/") -> tuple[int, str]:
    """Send a GET, and return the status and the body."""
    async with served.client.get(path) as answer:
        return answer.status, await answer.text()


async def works(served: Served) -> bool:
    return (await get(served))[0] == 200


async def test_failover_is_followed_logged_once_and_measured(store: Replicated, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(SERVICE, store.environ(REDIS_REPLICAS="1")) as served:
        assert (await get(served, "/readyz"))[0] == 200
        assert await works(served)
        assert await metric(served, "redis_replicas") == await metric(served, "redis_replicas_expected") == 2
        old = store.primary()
        assert old
        old.kill()
        old.network.abort()
        await eventually(lambda: works(served), 10 * SLACK)
        await eventually(lambda: _ready(served), 2 * SLACK)
        assert await metric(served, "redis_failovers_total") == 1
        assert (await metric(served, "redis_replicas"), await metric(served, "redis_replicas_expected")) == (1, 2)
        assert len([line for line in caplog.messages if line == "Redis has failed over to another primary"]) == 1
        assert [record for record in caplog.records if vars(record).get("redis", "").startswith("127.")]


async def _ready(served: Served) -> bool:
    return (await get(served, "/readyz"))[0] == 200


async def test_sentinels_that_cannot_be_reached_cost_little(store: Replicated, silent: int) -> None:
    closed = f"127.0.0.1:{free_port()}"
    environ = store.environ(REDIS_REPLICAS="1")
    environ["REDIS_SENTINELS"] = f"127.0.0.1:{silent},{closed}," + environ["REDIS_SENTINELS"]
    it = Store(Config.read(environ), CollectorRegistry())
    began = time.monotonic()
    assert await it.client.incr("n") == 1
    assert time.monotonic() - began < 0.1 * SLACK  # three of five Sentinels are enough
    await it.client.aclose()
    environ["REDIS_SENTINELS"] = ",".join([f"127.0.0.1:{silent}", closed, environ["REDIS_SENTINELS"].rpartition(",")[2]])
    it = Store(Config.read(environ), CollectorRegistry())
    began = time.monotonic()
    assert await it.client.incr("n") == 2
    assert time.monotonic() - began < 0.5 + 0.3 * SLACK  # half of REDIS_TIMEOUT
    await it.client.aclose()


async def test_replica_that_is_missing_delays_an_answer_and_fails_none(store: Replicated) -> None:
    async with serving(SERVICE, store.environ(REDIS_REPLICAS="1")) as served:
        assert await works(served)
        replica = next(server for server in store.servers if server.role() == "slave")
        for fault, cure in ((replica.freeze, replica.thaw), (replica.kill, replica.start)):
            fault()
            began = time.monotonic()
            assert await works(served)
            assert time.monotonic() - began < 1 * SLACK
            cure()


async def test_too_few_replicas_are_named_by_the_answer_and_by_readyz(
    valkey: Valkey, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "replica").mkdir()
    replica = Valkey(tmp_path / "replica", "--replicaof", "127.0.0.1", str(valkey.port), "--repl-diskless-sync-delay", "0")
    async with serving(SERVICE, valkey.environ(REDIS_REPLICAS="1")) as served:
        cause = "Redis: too few replicas have what it wrote"
        for path in ("/", "/readyz"):
            status, body = await get(served, path)
            assert status == 503
            assert cause in body
        assert await metric(served, "redis_up") == 0
        assert await metric(served, "redis_replicas") == 0
        assert caplog.messages == ["Redis fails: too few replicas have what it wrote"]
        try:
            replica.start()
            await eventually(lambda: works(served), 5 * SLACK)
            await eventually(lambda: _ready(served), 2 * SLACK)
            assert await metric(served, "redis_replicas") == 1
        finally:
            replica.kill()


async def test_commands_and_pipelines_succeed_when_a_replica_has_their_writes(store: Replicated) -> None:
    it = Store(Config.read(store.environ(REDIS_REPLICAS="1")), CollectorRegistry())
    client: Any = it.client
    assert await client.incr("n") == 1
    assert await client.pipeline().incr("n").incr("n").execute() == [2, 3]
    assert await client.pipeline(transaction=False).incr("n").get("n").execute() == [4, b"4"]
    async with client.pipeline() as pipeline:
        await pipeline.watch("n")
        pipeline.multi()
        pipeline.incr("n")
        assert await pipeline.execute() == [5]
    primary = store.primary()
    assert primary
    primary.network.cut = frozenset({Peer.REPLICA})
    pipelines = client.pipeline().incr("n"), client.pipeline(transaction=False).incr("n")
    for work in (client.incr("n"), *(pipeline.execute() for pipeline in pipelines)):
        with pytest.raises(UnavailableError, match="Redis: too few replicas have what it wrote"):
            await work
    await client.aclose()


@pytest.mark.parametrize("known", [True, False], ids=["not a Sentinel", "no such name"])
async def test_sentinels_that_know_no_primary_are_named(valkey: Valkey, store: Replicated, known: bool) -> None:
    if known:
        environ, cause = store.environ(REDIS_SENTINELS=f"127.0.0.1:{valkey.port}"), "no Sentinel can be asked: it is a server"
    else:
        environ, cause = store.environ(), "no Sentinel knows a primary"
        for number in range(3):
            store.ask(number, "REMOVE", PRIMARY_NAME)
    async with serving(SERVICE, environ) as served:
        for path in ("/", "/readyz"):
            status, body = await get(served, path)
            assert status == 503
            assert cause in body
            assert "127." not in body


async def test_connection_to_a_demoted_primary_is_not_used_again(store: Replicated) -> None:
    async with serving(SERVICE, store.environ()) as served:
        assert await works(served)
        primary = store.primary()
        other = next(server for server in store.servers if server is not primary)
        assert primary
        primary.run("REPLICAOF", other.network.host, other.network.port)  # The Sentinels do not know this yet.
        status, body = await get(served)
        assert (status, "it is a read-only replica (READONLY)" in body) == (503, True)
        status, body = await get(served)
        assert (status, "the server that the Sentinels name is not a primary" in body) == (503, True)


async def test_connection_that_opens_late_does_not_lead_back_to_the_old_primary(store: Replicated) -> None:
    registry = CollectorRegistry()
    it = Store(Config.read(store.environ(REDIS_TIMEOUT="30")), registry)
    assert await it.client.set("n", 1)
    old = store.primary()
    assert old
    old.network.cut = frozenset(Peer)
    late = asyncio.create_task(it.connection().connect())
    await eventually(lambda: asyncio.to_thread(lambda: store.primary() not in (None, old)), 20 * SLACK)
    new = it.connection()
    await new.connect()
    old.network.cut = frozenset({Peer.REPLICA, Peer.SENTINEL})  # The old primary answers, and does not know of the failover.
    assert old.role() == "master"
    with pytest.raises(UnavailableError, match="another server has become the primary"):
        await it.health.watch(late)
    assert registry.get_sample_value("redis_failovers_total") == 1
    await new.disconnect()
    await it.client.aclose()


async def test_search_ends_when_its_callers_are_gone(store: Replicated, silent: int) -> None:
    it = Store(Config.read(store.environ(REDIS_SENTINELS=f"127.0.0.1:{silent}")), CollectorRegistry())
    before = asyncio.all_tasks()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.05):
            await it.connection().connect()
    await eventually(lambda: asyncio.all_tasks() == before, 1 * SLACK)


async def test_a_thread_can_abort_the_connections_of_a_network(valkey: Valkey) -> None:
    asyncio.get_running_loop().set_debug(True)  # The loop now refuses calls from other threads.
    async with asyncio.timeout(2 * SLACK), Network("127.0.0.1", valkey.port) as network:
        reader, writer = await asyncio.open_connection(network.host, network.port)
        writer.write(b"PING\r\n")
        assert await reader.readline() == b"+PONG\r\n"
        await asyncio.to_thread(network.abort)
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
