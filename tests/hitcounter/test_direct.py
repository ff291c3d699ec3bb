"""A request is answered the same whether the connection answers it directly or aiohttp's application does."""

import asyncio
import contextlib
import logging
import random
import signal
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from aiohttp import web

from hitcounter.app import SERVICE
from nanoservice import direct
from nanoservice.connection import Connection
from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK, eventually
from tests.nanoservice.test_contract import UNPARSED
from tests.support.accept import CHOICES
from tests.support.attack import hostile
from tests.support.contract import METHODS
from tests.support.process import metric
from tests.support.wire import Wire, ask, connected, is_problem, request

JSON = "Accept: application/json"
GET, POST = request("GET", "/", JSON), request("POST", "/", JSON, body=b"abc")
KEYS = ("k", "", "a" * 256, "caf\u00e9", "a\tb")

Pieces = list[bytes]

PLAIN: dict[str, bytes] = {
    "get": request(),
    "get JSON": GET,
    "post": POST,
    "post without a body": request("POST", "/", JSON),
    "post of length 0": request("POST", "/", JSON, "Content-Length: 0"),
    "post of chunks": request("POST", "/", JSON, "Transfer-Encoding: chunked") + b"3\r\nabc\r\n0\r\nX: y\r\n\r\n",
    "post of broken chunks": request("POST", "/", JSON, "Transfer-Encoding: chunked") + b"3\r\nabcd\r\n0\r\n\r\n",
    "post with Expect": request("POST", "/", JSON, "Expect: 100-continue", body=b"abc"),
    "post with an unknown Expect": request("POST", "/", JSON, "Expect: x", body=b"abc"),
    "post of a request": request("POST", "/", JSON, body=GET),
    "get with a body": request("GET", "/", JSON, body=GET),
    "get with a traceparent": request("GET", "/", "Accept: x/y", f"Traceparent: 00-{'a' * 32}-{'b' * 16}-01"),
    "get with a query": request("GET", "/?a=b", JSON),
    "get of an absolute URL": request("GET", "http://localhost/", JSON),
    "get of HTTP/1.0": request("GET", "/", JSON, version="1.0"),
    "get of HTTP/1.0 that is kept alive": request("GET", "/", JSON, "Connection: keep-alive", version="1.0"),
    "get that closes": request("GET", "/", JSON, "Connection: close"),
    "get that upgrades": request("GET", "/", JSON, "Connection: upgrade", "Upgrade: h2c"),
    "get with a wrong host": b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
    "empty lines": b"\r\n\r\n" + GET,
    **{f"{method} {path}": request(method, path) for method in METHODS for path in ("/", "/livez", "/x", "*")},
}
MANY = {
    **{f"Accept {number}": request("GET", "/", f"Accept: {accept}") for number, (accept, _) in enumerate(CHOICES)},
    **{f"key {key!r}": request(method, "/", f"Idempotency-Key: {key}") for key in KEYS for method in ("POST", "GET")},
    "two keys": request("POST", "/", "Idempotency-Key: a", "Idempotency-Key: b"),
    "long Accept": request("GET", "/", "Accept: " + "a/b," * 1000),
    "long header": request("GET", "/", "X: " + "a" * 8000),
    "long body": request("POST", "/", body=b"x" * 100_000),
    "very long body": request("POST", "/", body=b"x" * ((1 << 20) + 1)),
    **{name: data for name, (_, data) in UNPARSED.items()},
}


def variants() -> Iterator[tuple[str, Pieces]]:
    """Yield the name of a test case, and the pieces to send."""
    for name, data in (PLAIN | MANY).items():
        yield name, [data]
        yield f"{name}, with another behind", [data + POST]
        yield f"{name}, and then another", [data, GET]
        yield f"{name}, after another", [GET, data]
        yield f"{name}, three times", [data * 3]
    for name in ("get JSON", "post", "post of chunks", "post of broken chunks", "get that closes", "post with Expect"):
        data = PLAIN[name]
        for cut in range(1, len(data)):
            yield f"{name}, cut at {cut}", [data[:cut], data[cut:] + GET]
    yield "half a POST, and then a GET", [request("POST", "/", JSON, "X: y")[:-2], GET]
    yield "half a GET, and then a GET", [GET[:-2], GET]
    rng = random.Random(5)
    for number in range(400):
        yield f"hostile {number}", hostile(rng, b"zq%d" % number)


@pytest.fixture
async def pair(valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[Served]]:
    """Serve the counter twice, with a store for each; the second has no direct routes. Their clocks stand still."""
    monkeypatch.setattr(time, "time", lambda: 1e9)
    (tmp_path / "other").mkdir()
    other = Valkey(tmp_path / "other")
    other.start()
    async with serving(SERVICE, valkey.environ()) as direct, serving(SERVICE, other.environ()) as plain:
        assert direct.running._factories[0].routes
        plain.running._factories[0].routes = {}
        for served in (direct, plain):
            served.running._factories[0].now = lambda: 0.0
        yield [direct, plain]
    other.end(signal.SIGKILL)


async def answers(served: Served, pieces: Pieces) -> bytes:
    """Send `pieces`, close this side of the connection, and return everything that the service sends."""
    async with connected(served.port) as wire:
        # Read at the same time. If the service resets the connection later, asyncio loses what is not read by then.
        reading = asyncio.create_task(read_all(wire))
        with contextlib.suppress(OSError, RuntimeError):  # The service may have closed the connection already.
            for piece in pieces:
                wire.writer.write(piece)
                await asyncio.sleep(0.002)
            wire.writer.write_eof()
        await reading
        return wire.received


async def read_all(wire: Wire) -> None:
    with contextlib.suppress(OSError):
        while await wire.more():
            pass


def measured(served: Served) -> Any:
    return served.running._factories[0].recorder._seen


async def test_answers_metrics_and_logs_are_the_same(
    pair: list[Served], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "getrandbits", lambda bits: 1)  # Otherwise, each problem has another trace id.
    caplog.set_level(logging.DEBUG, "nanoservice")
    different, number = [], 0
    for number, (name, pieces) in enumerate(variants(), 1):
        seen = []
        for served in pair:
            caplog.clear()
            data = await answers(served, pieces)
            logs = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
            seen.append((data, logs, {key: counts for key, (counts, _) in measured(served).items()}))
        if seen[0] != seen[1]:
            different.append((name, pieces, *seen))
    assert number > 1500
    assert not different, different[0]


async def test_requests_are_answered_without_a_task(pair: list[Served], monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = []
    factory = pair[0].running._factories[0]
    add_task = factory.add_task

    def record(answer: Coroutine[Any, Any, None], connection: Connection) -> None:
        tasks.append(answer)
        add_task(answer, connection)

    monkeypatch.setattr(factory, "add_task", record)
    async with connected(pair[0].port) as wire:
        for number in range(1, 4):
            await wire.send(GET)
            assert (await wire.reply()).json["hits"] == number
            await wire.send(POST)
            assert (await wire.reply()).json["posts"] == number
            assert len(tasks) == number - 1
            await wire.send(request("GET", "/livez"))  # aiohttp answers this request, and the next one is answered directly again
            assert (await wire.reply()).status == 200


@pytest.mark.parametrize("begin", [b"POST / HTTP/1.1\r\nHost: a\r\nX: ", b"POST / HTTP/1.1\r\nHost: a\r\n", b"GET /"])
async def test_whole_request_after_a_part_of_a_head_is_400_and_is_not_counted(served: Served, begin: bytes) -> None:
    async with connected(served.port) as wire:
        await wire.send(begin)
        await asyncio.sleep(0.05)
        await wire.send(GET)
        assert is_problem(await wire.reply(), 400)
        await wire.closed()
    async with connected(served.port) as wire:
        await wire.send(GET)
        assert (await wire.reply()).json == {"hits": 1, "posts": 0}


async def test_request_whose_client_disconnects_is_counted_and_measured(served: Served, valkey: Valkey) -> None:
    async with served.client.get("/"):
        pass
    valkey.freeze()
    async with connected(served.port) as wire:
        await wire.send(POST)
        await eventually(lambda: waits(served), 5 * SLACK)
    valkey.thaw()
    await eventually(lambda: counted(served), 5 * SLACK)


async def waits(served: Served) -> bool:
    return await metric(served, "counter_pending") == 1


async def counted(served: Served) -> bool:
    return b'method="POST",route="/",status="200"} 1.0' in (await ask(served.admin_port, request("GET", "/metrics"))).body


async def test_answer_during_a_drain_says_close(served: Served, valkey: Valkey) -> None:
    async with connected(served.port) as wire:
        await wire.send(GET)
        assert "Connection" not in (await wire.reply()).headers
        valkey.freeze()
        await wire.send(GET)
        await eventually(lambda: waits(served), 5 * SLACK)
        served.running.drain()
        valkey.thaw()
        reply = await wire.reply()
        assert (reply.json["hits"], reply.headers["Connection"]) == (2, "close")
        await wire.closed()


async def test_client_that_reads_no_answers_gets_no_more_of_them(served: Served) -> None:
    async with connected(served.port) as wire:
        await wire.send(GET)
        await wire.reply()
        (connection,) = served.running._factories[0].connections
        connection.pause_writing()
        await wire.send(GET)
        with pytest.raises(TimeoutError):
            await wire.more(0.2)
        connection.resume_writing()
        assert (await wire.reply()).json["hits"] == 2


async def test_client_that_pipelines_gets_one_answer_in_each_iteration_of_the_event_loop(served: Served) -> None:
    async with connected(served.port) as piped, connected(served.port) as other:
        piped.writer.write(request("GET", "/", "Accept: image/png") * 4_000)  # 406, so no answer waits for Redis
        other.writer.write(request("GET", "/livez"))
        assert (await other.reply()).status == 200
        assert piped.reader._buffer.count(b"HTTP/1.1 ") < 400  # type: ignore[attr-defined] # the client has not read


def test_direct_route_for_head_is_refused() -> None:
    with pytest.raises(ValueError, match="add_head"):
        direct.add(web.Application(), "HEAD", "/", Mock())
