"""Connections, request heads and memory are limited, for each client and for all clients together."""

import asyncio
import contextlib
import gc
import weakref
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml
from aiohttp import web

from nanoservice import bounds, connection
from nanoservice.config import Config
from nanoservice.service import Service
from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK, eventually
from tests.support import ROOT, needs_linux
from tests.support.attack import MIB, PATIENT, telling
from tests.support.process import Process, Spawn, metric, resident
from tests.support.wire import Wire, ask, chunked, connected, is_problem, request

LARGE = [f"X-{number}: {'a' * 8100}" for number in range(3)]  # each header is legal, but together they have 24 kB


# --- the size of a whole request head ---

TOO_LARGE = {
    "alone": (431, b"", request("GET", "/livez", *LARGE)),
    "behind another": (431, request("GET", "/livez"), request("GET", "/livez", *LARGE)),
    "as a trailer": (
        400, request("POST", "/", "Transfer-Encoding: chunked") + b"1\r\nx\r\n", b"0\r\n" + "\r\n".join(LARGE).encode(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOO_LARGE)
@pytest.mark.parametrize("size", [17_000, 1_000], ids=["at once", "in pieces"])
async def test_incomplete_head_that_is_too_large_is_refused(served: Served, name: str, size: int) -> None:
    status, before, head = TOO_LARGE[name]
    async with connected(served.port) as wire:
        await wire.send(before)
        await asyncio.sleep(0.01)
        for begin in range(0, 17_000, size):
            await wire.send(head[begin : min(begin + size, 17_000)])
            await asyncio.sleep(0.001)
        if name == "behind another":
            assert (await wire.reply()).status == 200
        assert is_problem(await wire.reply(), status)
        await wire.closed()


@pytest.mark.parametrize("number", [1, 3])
async def test_complete_head_that_is_too_large_is_refused(served: Served, number: int) -> None:
    data = request("GET", "/livez", *LARGE)
    assert is_problem(await ask(served.port, data * number), 431)


async def test_head_below_the_limit_is_accepted(served: Served) -> None:
    head = request("GET", "/livez", *LARGE[:1], "X: " + "b" * 7000)
    async with connected(served.port) as wire:
        for _ in range(5):
            await wire.send(head)
            assert (await wire.reply()).status == 200
        await wire.send(head * 5)
        for _ in range(5):
            assert (await wire.reply()).status == 200


# --- memory ---


def pod_limit() -> int:
    deployment = yaml.safe_load((ROOT / "manifests/base/deployment.yaml").read_text())
    limit = deployment["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]
    assert limit.endswith("Mi")
    return int(limit.removesuffix("Mi")) * MIB


def test_memory_limit_of_the_pod_is_at_least_the_sum_of_all_limits() -> None:
    clients = Config().max_connections * 5 * 1024 + bounds.HELD_BYTES + bounds.LONG_BODIES * 2 * MIB
    assert 48 * MIB + 1.5 * clients <= pod_limit(), "The comments of bounds.py and deployment.yaml explain the sum."


HEAD = request("GET", "/", *(f"X-{number}: {'a' * 8160}" for number in range(120)))
BODY = request("POST", "/", body=b"x" * MIB)
ATTACKS = {
    "heads without an end": (200, HEAD[:-2]),
    "small headers": (1000, request("GET", "/", *("a: b" for _ in range(120)))[:-2]),
    "large heads in a row": (20, HEAD * 10),
    "small requests in a row": (200, request() * 5_000),
    "a request, and a part of another": (500, request("GET", "/livez") + HEAD[:60_000]),
    "bodies": (200, BODY),
    "bodies without an end": (200, BODY[:-1]),
    "chunks of one byte": (500, request("POST", "/", "Transfer-Encoding: chunked") + b"1\r\nx\r\n" * 2500),
    "trailers": (200, request("POST", "/", "Transfer-Encoding: chunked") + b"0\r\n" + HEAD),
    "answers that nobody reads": (200, request("GET", "/openapi.json") * 5_000),
}


async def send_and_stay(stack: contextlib.AsyncExitStack, port: int, data: bytes) -> None:
    with contextlib.suppress(OSError, TimeoutError):
        wire = await stack.enter_async_context(connected(port))
        wire.writer.transport.pause_reading()  # type: ignore[attr-defined] # the client reads no answers
        wire.writer.write(data)
        async with asyncio.timeout(3):
            await wire.writer.drain()


@needs_linux("the test reads /proc")
@pytest.mark.parametrize("name", ATTACKS)
async def test_memory_stays_below_the_limit_of_the_pod_during_an_attack(valkey: Valkey, spawn: Spawn, name: str) -> None:
    process = spawn(valkey.environ(**PATIENT, COVERAGE_PROCESS_CONFIG=""))  # Measuring coverage takes memory and time.
    number, data = ATTACKS[name]
    for port in (process.port, process.admin_port):
        async with contextlib.AsyncExitStack() as stack:
            await asyncio.gather(*(send_and_stay(stack, port, data) for _ in range(number)))
            assert (await ask(process.port, request("GET", "/livez"))).status == 200
            assert (await ask(process.admin_port, request("GET", "/metrics"))).status == 200
            print(f"{name}: {resident(process) // MIB} MiB")
            assert resident(process) < pod_limit()
    await eventually(lambda: serves(process), 20 * SLACK)


async def serves(process: Process) -> bool:
    return (await ask(process.port, request())).status == 200 and await metric(process, "http_held_bytes") < MIB


async def test_connection_that_holds_most_memory_is_closed_when_all_hold_too_much(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "HELD_BYTES", 50_000)
    async with contextlib.AsyncExitStack() as stack:
        small = [await stack.enter_async_context(connected(served.port)) for _ in range(5)]
        for wire in small:
            await wire.send(request("GET", "/livez")[:-2])
        large = await stack.enter_async_context(connected(served.port))
        await large.send(request("GET", "/livez", *LARGE[:1])[:-2])
        await asyncio.sleep(0.1)
        await large.send(b"X: " + b"a" * 7000)
        await large.closed()
        for wire in small:
            await wire.send(b"\r\n")
            assert (await wire.reply()).status == 200
    assert await metric(served, "http_connections_evicted_total") == 1


@pytest.fixture
async def collecting(valkey: Valkey) -> AsyncIterator[Served]:
    def setup(app: web.Application, config: Config) -> None:
        async def collect(request: web.Request) -> web.StreamResponse:
            return web.json_response(len(await request.read()))

        app.router.add_post("/", collect)

    async with serving(Service("collecting", "1", Config, setup), valkey.environ()) as it:
        yield it


async def test_long_bodies_that_a_handler_collects_wait_for_each_other(
    collecting: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "LONG_BODIES", 1)
    async with connected(collecting.port) as first, connected(collecting.port) as second, connected(collecting.port) as short:
        await first.send(BODY[:60_000])
        await asyncio.sleep(0.1)
        await first.send(BODY[60_000:100_000])
        await asyncio.sleep(0.1)
        second.writer.write(BODY)
        await eventually(lambda: waiting(collecting, 1), 5 * SLACK)
        await short.send(request("POST", "/", body=b"x" * 10_000))
        assert (await short.reply()).json == 10_000
        with pytest.raises(TimeoutError):
            await second.more(0.3)
        await first.send(BODY[100_000:])
        assert (await first.reply()).json == MIB
        assert (await second.reply()).json == MIB
        data = request("POST", "/", "Transfer-Encoding: chunked"), *chunked(b"x" * MIB)
        assert {reply.json for reply in await asyncio.gather(*(ask(collecting.port, *data) for _ in range(3)))} == {MIB}
    assert await waiting(collecting, 0)


async def waiting(served: Served, number: int) -> bool:
    return await metric(served, "http_long_bodies_waiting") == number


async def test_requests_in_one_packet_are_answered_after_many_bodies_that_arrived_late(served: Served) -> None:
    async with connected(served.port) as wire:
        for _ in range(40):  # aiohttp's parser counts up to 32 requests
            await wire.send(request("POST", "/", "Content-Length: 1", "Expect: 100-continue"))
            assert (await wire.reply()).status == 100
            await wire.send(b"x")
            assert (await wire.reply()).status == 200
        await wire.send(request() * 3)
        for _ in range(3):
            assert (await wire.reply()).status == 200


async def test_memory_that_connections_hold_is_counted_exactly(collecting: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = request("POST", "/", "Transfer-Encoding: chunked"), *chunked(b"x" * 100_000, 99)
    for data in ((BODY,), chunks, (request("GET", "/x") * 500,), (request("POST", "/x", body=b"x" * 100_000) * 3,), (HEAD,)):
        async with connected(collecting.port) as wire:
            await wire.send(*data)
            await wire.reply()
    bounds_of = collecting.running._factories[0].bounds
    await eventually(lambda: not bounds_of.open, 5 * SLACK)
    assert bounds_of._held == 0
    assert not bounds_of.waiting
    assert not bounds_of._receiving
    monkeypatch.setattr(bounds, "HELD_BYTES", 2 * MIB)  # A body that is read does not add to what is held.
    for number in (1, 10):
        assert {reply.json for reply in await asyncio.gather(*(ask(collecting.port, BODY) for _ in range(number)))} == {MIB}


async def test_client_with_a_long_pipeline_is_not_closed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "HELD_BYTES", 8 * MIB)
    number = 20_000  # All these requests together would hold about 20 MB.
    async with connected(served.port) as wire:
        wire.writer.write(request("GET", "/livez") * number)
        answers = 0
        while answers < number:
            wire.received = b""
            assert await wire.more()
            answers += wire.received.count(b"HTTP/1.1 200")


# --- connections ---


@pytest.fixture
async def stack() -> AsyncIterator[contextlib.AsyncExitStack]:
    async with contextlib.AsyncExitStack() as it:
        yield it


async def answered(wire: Wire) -> bool:
    """Return whether the server answers on this connection; False if the server has closed the connection."""
    try:
        await wire.send(request("GET", "/livez"))
        return (await wire.reply()).status == 200
    except (ConnectionError, AssertionError):
        return False


# asyncio accepts several connections before the chassis counts the first of them; uvloop does not. Spare descriptors must
# remain with both event loops.
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("setting", ["", "50"])
async def test_new_client_is_served_and_the_connection_idle_longest_is_closed(
    spawn: Spawn, valkey: Valkey, tmp_path: Path, stack: contextlib.AsyncExitStack, loop: str, setting: str
) -> None:
    command = telling("tests.nanoservice.sample", tmp_path / "errors", "" if setting else "ulimit -n 256;")
    process = spawn(valkey.environ(**PATIENT, MAX_CONNECTIONS=setting), command=command, loop=loop)
    most = 50 if setting else 256 - 192
    early = [await stack.enter_async_context(connected(process.port)) for _ in range(10)]
    assert all([await answered(wire) for wire in early])
    kept = early.pop()
    late = []
    for _ in range(6):
        late += await asyncio.gather(*(stack.enter_async_context(connected(process.port)) for _ in range(30)))
        assert all(await asyncio.gather(*(answered(wire) for wire in late[-30:])))
        assert await answered(kept)  # it sends requests again and again, so it is never idle longest
    assert not any([await answered(wire) for wire in early])
    assert await metric(process, "http_connections") == most + 1  # one more on the admin port, for this metric
    assert await metric(process, "http_connections_evicted_total") == 10 + 180 - most
    assert (tmp_path / "errors").read_text() == ""
    assert [line["limit"] for line in process.log if line["message"].startswith("too many connections: ")] == [most]


async def test_probes_get_in_while_every_connection_is_busy(
    spawn: Spawn, valkey: Valkey, stack: contextlib.AsyncExitStack
) -> None:
    process = spawn(valkey.environ(**PATIENT, MAX_CONNECTIONS="20"))
    busy = [await stack.enter_async_context(connected(process.port)) for _ in range(20)]
    valkey.freeze()
    for wire in busy:
        await wire.send(request())
    await eventually(lambda: all_wait(process, 20), 5 * SLACK)
    assert (await ask(process.port, request("GET", "/livez"))).status == 200
    assert is_problem(await ask(process.port, request("GET", "/readyz")), 503)
    refused = await ask(process.port, request())
    assert is_problem(refused, 503)
    assert refused.json["detail"] == "too many connections"
    assert await metric(process, "http_connections_refused_total") == 3
    valkey.thaw()
    assert {(await wire.reply()).status for wire in busy} == {200}


async def all_wait(process: Process, number: int) -> bool:
    return await metric(process, "sample_pending") == number


async def test_client_that_reads_no_answer_makes_room_for_newcomers(
    spawn: Spawn, valkey: Valkey, stack: contextlib.AsyncExitStack
) -> None:
    process = spawn(valkey.environ(**PATIENT, MAX_CONNECTIONS="20"))
    for _ in range(20):
        await send_and_stay(stack, process.port, request("GET", "/openapi.json") * 5_000)

    async def newcomer_is_served() -> bool:
        return (await ask(process.port, request())).status == 200

    # The service does not wait for such a client before the buffers of the kernel are full.
    await eventually(newcomer_is_served, 5 * SLACK)
    assert await metric(process, "http_connections_evicted_total") > 0


def test_idle_connections_are_kept_longer_than_proxies_keep_theirs() -> None:
    assert connection.KEEPALIVE_SECONDS > 600


BREAKS = {
    "aborted just after data": ("Content-Length: 1000", b"x", b"y"),
    "broken just after a chunk": ("Transfer-Encoding: chunked", b"3\r\nabc", b"\r\nnonsense\r\n"),
}


@pytest.mark.parametrize("name", BREAKS)
@pytest.mark.parametrize("path", ["/", "/x"], ids=["the handler reads the body", "the answer is sent"])
async def test_reader_of_a_body_ends_if_the_body_ends_while_the_reader_is_woken(served: Served, path: str, name: str) -> None:
    header, first, last = BREAKS[name]
    factory = served.running._factories[0]
    async with connected(served.port) as wire:
        await wire.send(request("POST", path, header), first)
        await eventually(lambda: factory._tasks, 5 * SLACK)
        await asyncio.sleep(0.1)  # The task waits for more of the body.
        (client,) = factory.connections
        client.data_received(last)
        if name.startswith("aborted"):
            client.abort()
        await eventually(lambda: not factory._tasks, 5 * SLACK)


async def test_request_whose_connection_is_aborted_is_freed_without_the_garbage_collector(valkey: Valkey) -> None:
    seen: list[weakref.ref[web.Request]] = []

    def setup(app: web.Application, config: Config) -> None:
        async def collect(request: web.Request) -> web.StreamResponse:
            seen.append(weakref.ref(request))
            return web.json_response(len(await request.read()))

        app.router.add_post("/", collect)

    gc.disable()
    try:
        async with serving(Service("collecting", "1", Config, setup), valkey.environ()) as served:
            factory = served.running._factories[0]
            async with connected(served.port) as wire:
                await wire.send(BODY[:-1])
                await eventually(lambda: seen, 5 * SLACK)
                for client in factory.connections:
                    client.abort()
                await eventually(lambda: not factory._tasks, 5 * SLACK)
                await eventually(lambda: seen[0]() is None, 5 * SLACK)
    finally:
        gc.enable()
