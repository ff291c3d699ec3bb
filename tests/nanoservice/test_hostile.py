"""Attack with malformed requests, slow requests and too many connections: the service reveals nothing, and keeps serving."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web

from nanoservice import config, connection
from nanoservice.answer import Answer
from nanoservice.connection import Connection
from nanoservice.service import Service
from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK, eventually
from tests.nanoservice.sample import SERVICE
from tests.support import needs_linux
from tests.support.attack import MARK, MIB, PATIENT, hit, survive, telling
from tests.support.process import Spawn
from tests.support.wire import LIMIT, Wire, chunked, connected, request

SAMPLE = "tests.nanoservice.sample"


@needs_linux("the test reads /proc")
async def test_ten_thousand_hostile_requests_leave_nothing_behind(spawn: Spawn, valkey: Valkey, tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    process = spawn(valkey.environ(**PATIENT), command=telling(SAMPLE, errors))
    await survive(process, errors, 10_000, connections=16)  # the pool keeps up to 16


# --- slow clients ---


async def silent(wire: Wire) -> None:
    await asyncio.sleep(3600)


async def drip(wire: Wire, *data: bytes) -> None:
    """Send the pieces `data`, but only one byte of the last piece every 0.2 s; then send nothing more."""
    await wire.send(*data[:-1])
    for byte in data[-1]:
        await asyncio.sleep(0.2)
        await wire.send(bytes([byte]))
    await asyncio.sleep(3600)


HEAD = request("GET", "/livez", "X: " + "a" * 4000)
BODY = b"x" * 4000

LENGTH, CHUNKED = "Content-Length: 4000", "Transfer-Encoding: chunked"

SLOW: dict[str, tuple[Callable[[Wire], Awaitable[None]], int]] = {
    "never sends a byte": (silent, 0),
    "sends half a line": (lambda wire: drip(wire, b"GET", b""), 0),
    "sends its head slowly": (lambda wire: drip(wire, HEAD), 0),
    "sends empty lines slowly": (lambda wire: drip(wire, b"\r\n" * 2000), 0),
    "sends its body slowly": (lambda wire: drip(wire, request("POST", "/", LENGTH), BODY), 1),
    "sends its chunks slowly": (lambda wire: drip(wire, request("POST", "/", CHUNKED), b"1\r\nx\r\n" * 800), 1),
    "sends no body at all": (lambda wire: drip(wire, request("POST", "/", LENGTH), b""), 1),
    "sends a body slowly that no handler reads": (lambda wire: drip(wire, request("GET", "/livez", LENGTH), BODY), 1),
    "sends a body slowly to an unknown path": (lambda wire: drip(wire, request("POST", "/x", LENGTH), BODY), 1),
    "sends a body slowly after 100": (lambda wire: drip(wire, request("POST", "/", "Expect: 100-continue", LENGTH), BODY), 2),
    "sends a second head slowly": (lambda wire: drip(wire, request("GET", "/livez"), HEAD), 1),
    "sends a second head slowly after a body": (lambda wire: drip(wire, request("POST", "/livez", body=b"x"), HEAD), 1),
    "sends a second body slowly": (
        lambda wire: drip(wire, request("GET", "/livez"), request("POST", "/", LENGTH), BODY), 2,
    ),
    "sends a body slowly with an upgrade": (
        lambda wire: drip(wire, request("POST", "/", "Connection: upgrade", "Upgrade: h2c", LENGTH), BODY), 1,
    ),
}  # fmt: skip


async def time_to_close(port: int, way: str, limit: float) -> float:
    """Run the slow client `SLOW[way]`, and return the seconds until the server closes its connection."""
    slow, answers = SLOW[way]
    began = time.monotonic()
    async with connected(port) as wire:
        client = asyncio.ensure_future(slow(wire))
        try:
            while await wire.more(limit):
                pass
        finally:
            client.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await client
        assert wire.received.count(b"HTTP/1.1 ") == answers, way
    return time.monotonic() - began


async def stays_open(port: int, seconds: float, data: tuple[bytes, ...], answers: int) -> None:
    """Send `data`, read the answers, and repeat both after `seconds`; fail if the server closes the connection."""
    async with connected(port) as wire:
        await wire.send(*data)
        for _ in range(answers):
            await wire.reply()
        with pytest.raises(TimeoutError):
            await wire.more(seconds)  # no answer arrives, and the connection stays open
        await wire.send(*data)
        for _ in range(answers):
            await wire.reply()


IDLE: dict[str, tuple[tuple[bytes, ...], int]] = {
    "a hit": ((request(),), 1),
    "more requests than are processed at a time": ((request() * 100,), 100),
    "a body that is read": ((request("POST", "/", body=b"x" * MIB),), 1),
    "a body that is not read": ((request("GET", "/livez", body=b"x" * MIB),), 1),
    "chunks to an unknown path": ((request("POST", "/x", "Transfer-Encoding: chunked"), *chunked(b"x" * MIB)), 1),
}


async def check_times(port: int, limit: float) -> None:
    """Run all slow and all idle clients at once; fail unless only the slow clients are closed, each after `limit` seconds."""
    slow = [time_to_close(port, way, limit + 5 * SLACK) for way in SLOW]
    kept = [stays_open(port, limit + 2, *way) for way in IDLE.values()]
    times, _ = await asyncio.gather(asyncio.gather(*slow), asyncio.gather(*kept))
    # The chassis closes overdue connections once a second, so a slow client may be closed later than its limit.
    assert {
        way: seconds for way, seconds in zip(SLOW, times, strict=True) if not limit - 0.1 <= seconds <= limit + 2 * SLACK
    } == {}


async def test_slow_clients_are_closed_after_ten_seconds_and_idle_ones_are_not(
    spawn: Spawn, valkey: Valkey, tmp_path: Path
) -> None:
    process = spawn(valkey.environ(BIND_HOST="127.0.0.1"), command=telling(SAMPLE, tmp_path / "errors"))
    await check_times(process.port, 10)
    assert await hit(process.port)
    assert process.end() == 0
    assert (tmp_path / "errors").read_text() == ""
    assert not [line for line in process.log if line["level"] == "error" or "exception" in line]


@pytest.fixture
async def short(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    """Serve the sample service with a limit of one second for receiving a request, and for a client that reads no answer."""
    monkeypatch.setattr(connection, "RECEIVE_SECONDS", 1.0)
    monkeypatch.setattr(connection, "SEND_SECONDS", 1.0)
    async with serving(SERVICE, valkey.environ(REDIS_TIMEOUT="60")) as served:
        yield served


# Test both event loops: each has its own transports, and the chassis reads how many bytes a transport has buffered.
@pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])
async def test_slow_clients_are_closed_on_either_event_loop(short: Served) -> None:
    await check_times(short.port, 1)


async def test_sweep_that_fails_once_is_logged_and_repeated(
    short: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    end_overdue, errors = Connection.end_overdue, [RuntimeError("a bug")]

    def fail_once(self: Connection, now: float) -> None:
        if errors:
            raise errors.pop()
        end_overdue(self, now)

    monkeypatch.setattr(Connection, "end_overdue", fail_once)
    async with connected(short.port) as wire:
        await wire.send(b"GET")
        await wire.closed()
    assert caplog.messages == ["overdue connections were not closed"]
    assert "RuntimeError: a bug" in caplog.text


async def test_request_that_waits_for_its_number_is_not_closed(short: Served, valkey: Valkey) -> None:
    async with connected(short.port) as get, connected(short.port) as piped, connected(short.port) as post:
        valkey.freeze()
        await get.send(request())
        await piped.send(request("POST", body=b"x"))
        await asyncio.sleep(0)
        await piped.send(request())
        await post.send(request("POST", "/", body=b"x" * 100_000))
        with pytest.raises(TimeoutError):
            await get.more(3)
        valkey.thaw()
        for wire in (get, piped, piped, post):
            assert (await wire.reply()).status == 200


async def test_client_that_reads_no_answer_is_closed(short: Served) -> None:
    server = short.running._factories[0]
    async with connected(short.port) as wire:
        wire.reader._transport.pause_reading()  # type: ignore[attr-defined] # only a private name can pause a stream
        with pytest.raises((TimeoutError, ConnectionError)):
            while True:
                wire.writer.write(request("GET", "/openapi.json") * 1000)
                await asyncio.wait_for(wire.writer.drain(), 0.3)
        await eventually(lambda: not server.connections, 5 * SLACK)


async def test_client_that_reads_its_answer_slowly_is_not_closed(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SEND_SECONDS", 3)
    size = 6 * MIB

    async def large(request: web.Request) -> Answer:
        return Answer(b"x" * size)  # the answer is sent in one write

    def setup(app: web.Application, config: config.Config) -> None:
        app.router.add_get("/", large)

    async with serving(Service("large", "1", config.Config, setup), valkey.environ()) as served, connected(served.port) as wire:
        for _ in range(2):  # The time limit starts again with each answer.
            await wire.send(request())
            began, read = time.monotonic(), 0
            while read < size:
                data = await asyncio.wait_for(wire.reader.read(1 << 16), LIMIT)
                assert data, "the service closed the connection"
                read += len(data)
                if read > (time.monotonic() - began) * 1.5 * MIB:
                    await asyncio.sleep(0.05)
            assert time.monotonic() - began > 3  # the client read for longer than `SEND_SECONDS`


async def test_slow_request_is_logged_without_any_of_its_text(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    async with connected(served.port) as wire:
        await wire.send(request("POST", f"/?{MARK.decode()}", "Content-Length: 2"), b"x")
        with pytest.raises(TimeoutError):
            await wire.more(1.1)
        await wire.send(b"x")
        assert (await wire.reply()).status == 200
    await eventually(lambda: [line for line in caplog.messages if line == "slow request"], 5 * SLACK)
    assert MARK.decode() not in str([vars(record) for record in caplog.records])


# --- clients that pipeline ---


@pytest.mark.parametrize("path", ["/x", "/livez", "/openapi.json"])
async def test_client_that_pipelines_lets_others_in(served: Served, path: str) -> None:
    number = 4_000
    async with connected(served.port) as piped, connected(served.port) as other:
        piped.writer.write(request("GET", path) * number)  # without `drain`, so both clients' requests arrive together
        other.writer.write(request("GET", "/livez"))
        assert (await other.reply()).status == 200
        async with served.client.get(f"http://127.0.0.1:{served.admin_port}/metrics") as answer:
            assert answer.status == 200
        assert piped.reader._buffer.count(b"HTTP/1.1 ") < number / 10  # type: ignore[attr-defined] # the client has not read
