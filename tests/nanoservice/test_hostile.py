"""Clients that send what they should not, or too slowly, or too often: the service tells them nothing, and goes on."""

import asyncio
import contextlib
import random
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web

from hitcounter.app import SERVICE
from nanoservice import config, connection
from nanoservice.answer import Answer
from nanoservice.service import Service
from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK, eventually
from tests.support.process import COMMAND, WITHOUT, Process, resident
from tests.support.wire import Wire, chunked, connected, request

Spawn = Callable[..., Process]

MIB = 1 << 20
MARK = b"zq7"  # begins a mark that stands in each hostile request, and may stand in no answer and no line of the log
WITHOUT_UVLOOP = sys.executable, "-c", WITHOUT % "uvloop"


# A busy machine may keep Redis waiting for long: that is not what is looked at here.
PATIENT = {"BIND_HOST": "127.0.0.1", "REDIS_TIMEOUT": "30", "REQUEST_TIMEOUT": "30"}


@pytest.fixture(params=[COMMAND, WITHOUT_UVLOOP], ids=["uvloop", "asyncio"])
def command(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """How the service starts: with uvloop's event loop, or with asyncio's own."""
    command: tuple[str, ...] = request.param
    return command


async def hits(port: int) -> int:
    """Count a hit, and return how many there were."""
    async with connected(port) as wire:
        await wire.send(request("GET", "/", "Accept: application/json"))
        reply = await wire.reply()
        assert reply.status == 200
        return int(reply.json["hits"])


# --- ten thousand hostile requests ---

METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE", "CONNECT", "PROPFIND", "get", "G\u00cbT", "A" * 300, "")
PATHS = (
    "/",
    "/livez",
    "/readyz",
    "/version",
    "/openapi.json",
    "/metrics",
    "*",
    "//",
    "",
    "/%00",
    "/../..",
    "http://[::1",
    "x:1",
    "/?",
)
HEADERS = (
    "Accept", "Accept-Encoding", "Connection", "Content-Encoding", "Content-Length", "Content-Type", "Cookie", "Expect", "Host",
    "Idempotency-Key", "If-Match", "Range", "Sec-WebSocket-Key", "Sec-WebSocket-Key1", "TE", "Trailer", "Transfer-Encoding",
    "Upgrade", "X-Forwarded-For", "", " ", "\x00", ":", "caf\u00e9",
)  # fmt: skip
VALUES = (
    "*/*", "text/html", "application/json", "close", "keep-alive", "upgrade", "websocket", "h2c", "chunked", "gzip, chunked",
    "identity", "gzip", "100-continue", "0", "1", "5", "-1", "1048577", "99999999999999999999", "1e3", "0x10", "\x00", "\x7f",
    "\u00e9", "", "bytes=0-", "a" * 300, ";q=1", ",,,",
)  # fmt: skip


def hostile(rng: random.Random, mark: bytes) -> list[bytes]:
    """Return the pieces of something that no decent client sends; `mark` stands in it."""
    text = mark.decode()

    def some(number: int) -> bytes:
        return mark + rng.randbytes(number)

    def headers() -> list[str]:
        return [f"{rng.choice(HEADERS)}: {rng.choice((*VALUES, text))}" for _ in range(rng.randrange(8))]

    def soup() -> bytes:
        return request(rng.choice(METHODS), f"{rng.choice(PATHS)}{rng.choice(('', text))}", *headers(), f"X: {text}") + some(
            rng.randrange(30)
        )

    def hello() -> bytes:
        return b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + some(500)

    def long_line() -> bytes:
        return request(rng.choice(METHODS[:4]), f"/{text}" + "a" * rng.choice((8000, 8191, 9000, 70_000)))

    def long_header() -> bytes:
        return request("GET", "/", f"X: {text}" + "a" * rng.choice((8000, 8191, 9000, 70_000)))

    def many_headers() -> bytes:
        return request(
            "GET", "/", *(f"{rng.choice(('X', 'Accept', 'Cookie'))}: {text}{number}" for number in range(rng.choice((100, 500))))
        )

    def long_accept() -> bytes:
        return request("GET", "/", *[f"Accept: {text}/" + " " * 7000 + ";" * 900] * rng.choice((1, 20)))

    def long_body() -> bytes:
        return request(
            "POST", f"/?{text}", rng.choice(("X: y", "Expect: 100-continue")), body=some(rng.choice((100, 100_000, MIB + 1)))
        )

    def bad_chunks() -> bytes:
        chunk = rng.choice(
            (
                b"zz",
                b"-1",
                b"0x5",
                b"5;" + b"a" * 9000,
                b"fffffffffffffffff",
                b"5\r\nabcdeXX",
                b"5 \r\nabcde",
                b"\x00",
                b"1" * 100,
            )
        )
        return (
            request(rng.choice(("GET", "POST")), rng.choice(PATHS[:6]), "Transfer-Encoding: chunked")
            + b"3\r\nabc\r\n"
            + chunk
            + some(9)
        )

    def smuggled() -> bytes:
        inner = request("GET", f"/{text}")
        return (
            request("POST", "/", f"Content-Length: {rng.choice((0, 5, len(inner)))}", "Transfer-Encoding: chunked")
            + b"0\r\n\r\n"
            + inner
        )

    def piped() -> bytes:
        return good() * rng.randrange(40) + soup()

    def good() -> bytes:
        return request(
            rng.choice(METHODS[:4]), rng.choice(PATHS[:6]), f"X: {text}", f"Accept: {rng.choice(('*/*', text + '/x'))}"
        )

    def upgrade() -> bytes:
        return request("GET", "/", "Connection: upgrade", f"Upgrade: {rng.choice(('websocket', 'h2c', text))}") + rng.choice(
            (some(9), good())
        )

    def half() -> bytes:
        data = rng.choice((good, soup, long_body, bad_chunks))()
        return data[: rng.randrange(len(data))]

    def garbage() -> bytes:
        return some(rng.choice((1, 10, 1000, 20_000)))

    kinds = (
        soup,
        soup,
        hello,
        long_line,
        long_header,
        many_headers,
        long_accept,
        bad_chunks,
        smuggled,
        piped,
        upgrade,
        half,
        garbage,
    )
    data = (long_body if rng.random() < 0.02 else rng.choice(kinds))()
    if rng.random() < 0.7 or not data:
        return [data]
    cuts = sorted(rng.randrange(len(data)) for _ in range(rng.randrange(1, 4)))
    return [data[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


class Attack:
    """Sends hostile requests, many at a time; knows what was answered."""

    def __init__(self, port: int, seed: int) -> None:
        self.port = port
        self.rng = random.Random(seed)
        self.sent = 0
        self.statuses: Counter[int] = Counter()
        self.leaks: list[bytes] = []

    async def run(self, number: int, together: int = 100) -> None:
        """Send `number` requests over `together` connections at a time."""
        self._left = number
        await asyncio.gather(*(self._attack() for _ in range(together)))

    async def _attack(self) -> None:
        while self._left:
            self._left -= 1
            self.sent += 1
            pieces = hostile(self.rng, MARK + b"%d" % self.sent)
            patience, reset = self.rng.choice((0.05, 0.15)), self.rng.random() < 0.3
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            received = b""
            with contextlib.suppress(ConnectionError, TimeoutError):
                for piece in pieces:
                    writer.write(piece)
                    async with asyncio.timeout(patience):  # one that does not read may make us wait
                        await writer.drain()
                    await asyncio.sleep(0)
                while data := await asyncio.wait_for(reader.read(1 << 16), patience):
                    received += data
            if reset:
                with contextlib.suppress(OSError):
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            self._check(received)

    def _check(self, received: bytes) -> None:
        for line in received.splitlines():
            if line.startswith(b"HTTP/1.1 ") and line[9:12].isdigit():
                self.statuses[int(line[9:12])] += 1
        low = received.lower()
        if any(leak in low for leak in (MARK, b"server:", b"python", b"aiohttp", b"traceback", b".py", b"error:")):
            self.leaks.append(received)


def descriptors(process: Process) -> int:
    return len(list(Path(f"/proc/{process.popen.pid}/fd").iterdir()))


def idle(process: Process) -> bool:
    """Return whether no client is connected: no socket on our port is established, or closed by the client alone."""
    lines = Path(f"/proc/{process.popen.pid}/net/tcp").read_text().splitlines()
    sockets = [line.split()[1:4] for line in lines]
    return not any(here.endswith(f":{process.port:04X}") and state in ("01", "08") for here, _, state in sockets)


def telling(command: tuple[str, ...], errors: Path, before: str = "") -> tuple[str, ...]:
    """Return the command with its standard error in a file, and something for the shell to do before."""
    return "sh", "-c", f'{before} exec "$@" 2>"$0"', str(errors), *command


async def test_ten_thousand_hostile_requests_leave_nothing_behind(spawn: Spawn, valkey: Valkey, tmp_path: Path) -> None:
    await survive(spawn(valkey.environ(**PATIENT), command=telling(COMMAND, tmp_path / "errors")), tmp_path / "errors", 10_000)


async def test_hostile_requests_leave_nothing_behind_without_uvloop(spawn: Spawn, valkey: Valkey, tmp_path: Path) -> None:
    await survive(
        spawn(valkey.environ(**PATIENT), command=telling(WITHOUT_UVLOOP, tmp_path / "errors")), tmp_path / "errors", 2_000
    )


async def survive(process: Process, errors: Path, number: int) -> None:
    await Attack(process.port, seed=0).run(1_000)  # so that what grows once has grown: caches, metrics, connections to Redis
    await Attack(process.admin_port, seed=2).run(100)
    await hits(process.port)
    await eventually(lambda: idle(process), 20 * SLACK)
    open_before, memory = descriptors(process), resident(process)
    attack = Attack(process.port, seed=1)
    await attack.run(number)
    assert attack.sent == number
    assert not attack.leaks, attack.leaks[0]
    assert attack.statuses.keys() <= {100, 200, 204, 400, 404, 405, 406, 413, 417, 431}
    # Else it is not as hostile as it says. A busy machine answers many after the client has lost patience.
    assert attack.statuses.keys() >= {200, 400, 404, 431}
    assert attack.statuses.total() > number / 100
    await eventually(lambda: idle(process), 20 * SLACK)
    before = await hits(process.port)
    assert await hits(process.port) == before + 1
    await eventually(lambda: idle(process), 20 * SLACK)
    more = descriptors(process) - open_before, (resident(process) - memory) / MIB
    print(f"{attack.sent} hostile requests, by status {dict(attack.statuses)}; left: {more[0]} descriptors, {more[1]:.1f} MiB")
    assert more[0] <= 5  # a lane of the counter may have had nothing to do before
    assert more[1] < 16
    assert process.end() == 0
    assert errors.read_text() == ""
    assert MARK.decode() not in str(process.log)
    # A busy machine may make a request slow. Else there is nothing to tell but the start and the end.
    assert {line["message"].partition(";")[0] for line in process.log} <= {"listening", "draining", "stopped", "slow request"}
    assert len(process.log) < 100


# --- slow clients ---


async def silent(wire: Wire) -> None:
    await asyncio.sleep(3600)


async def drip(wire: Wire, *data: bytes) -> None:
    """Send `data`, the last piece a byte now and then."""
    await wire.send(*data[:-1])
    for byte in data[-1]:
        await asyncio.sleep(0.2)
        await wire.send(bytes([byte]))
    await asyncio.sleep(3600)


HEAD = request("GET", "/livez", "X: " + "a" * 4000)
BODY = b"x" * 4000

UPGRADE = "Connection: upgrade", "Upgrade: websocket"
LENGTH, CHUNKED = "Content-Length: 4000", "Transfer-Encoding: chunked"

SLOW: dict[str, tuple[Callable[[Wire], Awaitable[None]], int]] = {
    "never sends a byte": (silent, 0),
    "sends half a line": (lambda wire: drip(wire, b"GET", b""), 0),
    "sends its head slowly": (lambda wire: drip(wire, HEAD), 0),
    "sends empty lines slowly": (lambda wire: drip(wire, b"\r\n" * 2000), 0),
    "sends its body slowly": (lambda wire: drip(wire, request("POST", "/", LENGTH), BODY), 0),
    "sends its chunks slowly": (lambda wire: drip(wire, request("POST", "/", CHUNKED), b"1\r\nx\r\n" * 800), 0),
    "sends no body at all": (lambda wire: drip(wire, request("POST", "/", LENGTH), b""), 0),
    "sends a body slowly that nobody reads": (lambda wire: drip(wire, request("GET", "/livez", LENGTH), BODY), 1),
    "sends a body slowly to where nothing is": (lambda wire: drip(wire, request("POST", "/x", LENGTH), BODY), 1),
    "sends a body slowly that is too long": (lambda wire: drip(wire, request("POST", "/", "Content-Length: 2000000"), BODY), 1),
    "sends a body slowly after 100": (lambda wire: drip(wire, request("POST", "/", "Expect: 100-continue", LENGTH), BODY), 1),
    "sends a second head slowly": (lambda wire: drip(wire, request("GET", "/livez"), HEAD), 1),
    "sends a second head slowly after a body": (lambda wire: drip(wire, request("POST", "/livez", body=b"x"), HEAD), 1),
    "sends a second body slowly": (
        lambda wire: drip(wire, request("GET", "/livez"), request("POST", "/", LENGTH), BODY), 1,
    ),
    "sends a head slowly after an upgrade that is declined": (
        lambda wire: drip(wire, request("GET", "/livez", *UPGRADE), HEAD), 1,
    ),
    "sends a body slowly after an upgrade that is declined": (
        lambda wire: drip(wire, request("GET", "/livez", *UPGRADE), request("POST", "/", LENGTH), BODY), 1,
    ),
    "sends a body slowly with an upgrade that is unknown": (
        lambda wire: drip(wire, request("POST", "/", "Connection: upgrade", "Upgrade: h2c", LENGTH), BODY), 0,
    ),
}  # fmt: skip


async def time_to_close(port: int, way: str, limit: float) -> float:
    """Be slow in this way; return the seconds until the server closed the connection."""
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
    """Send `data`, get the answers, wait for `seconds`, and do it again."""
    async with connected(port) as wire:
        await wire.send(*data)
        for _ in range(answers):
            await wire.reply()
        with pytest.raises(TimeoutError):
            await wire.more(seconds)  # neither an answer nor the end comes
        await wire.send(*data)
        for _ in range(answers):
            await wire.reply()


IDLE: dict[str, tuple[tuple[bytes, ...], int]] = {
    "a hit": ((request(),), 1),
    "more than are taken at a time": ((request() * 100,), 100),
    "a body that is read": ((request("POST", "/", body=b"x" * MIB),), 1),
    "a body that is not read": ((request("GET", "/livez", body=b"x" * MIB),), 1),
    "chunks to where nothing is": ((request("POST", "/x", "Transfer-Encoding: chunked"), *chunked(b"x" * MIB)), 1),
    "an upgrade that is declined": ((request("GET", "/livez", *UPGRADE),), 1),
}


async def check_times(port: int, limit: float) -> None:
    """Be slow in all ways at once, and idle in all ways: the former are closed after `limit` seconds, the latter are not."""
    slow = [time_to_close(port, way, limit + 5 * SLACK) for way in SLOW]
    kept = [stays_open(port, limit + 2, *way) for way in IDLE.values()]
    times, _ = await asyncio.gather(asyncio.gather(*slow), asyncio.gather(*kept))
    # The sweep comes once a second. What was sent before is no more than half a second's worth.
    assert {
        way: seconds for way, seconds in zip(SLOW, times, strict=True) if not limit - 0.1 <= seconds <= limit + 2 * SLACK
    } == {}


async def test_slow_clients_are_closed_after_ten_seconds_and_idle_ones_are_not(
    spawn: Spawn, valkey: Valkey, tmp_path: Path
) -> None:
    process = spawn(valkey.environ(BIND_HOST="127.0.0.1"), command=telling(COMMAND, tmp_path / "errors"))
    await check_times(process.port, 10)
    assert await hits(process.port)
    assert process.end() == 0
    assert (tmp_path / "errors").read_text() == ""
    assert not [line for line in process.log if line["level"] == "error" or "exception" in line]


@pytest.fixture
async def short(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    """The hitcounter, which waits for a request, and for an answer to be taken, one second only."""
    monkeypatch.setattr(connection, "RECEIVE_SECONDS", 1.0)
    monkeypatch.setattr(connection, "SEND_SECONDS", 1.0)
    async with serving(SERVICE, valkey.environ(REQUEST_TIMEOUT="60")) as served:
        yield served


async def test_slow_clients_are_closed_in_asyncio_s_own_event_loop_too(short: Served) -> None:
    await check_times(short.port, 1)


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


async def test_client_that_takes_no_answer_is_closed(short: Served) -> None:
    server = short.running._factories[0]
    async with connected(short.port) as wire:
        wire.reader._transport.pause_reading()  # type: ignore[attr-defined] # there is no other way to it
        with pytest.raises((TimeoutError, ConnectionError)):
            while True:
                wire.writer.write(request("GET", "/openapi.json") * 1000)
                await asyncio.wait_for(wire.writer.drain(), 0.3)
        await eventually(lambda: not server.connections, 5 * SLACK)


async def test_client_that_takes_its_answer_by_and_by_is_not_closed(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SEND_SECONDS", 3)
    size = 32 * MIB  # the kernel takes 10 of them at once

    async def large(request: web.Request) -> Answer:
        return Answer(b"x" * size)  # one write

    def setup(app: web.Application, config: config.Config) -> None:
        app.router.add_get("/", large)

    async with serving(Service("large", "1", config.Config, setup), valkey.environ()) as served, connected(served.port) as wire:
        await wire.send(request())
        began = time.monotonic()
        while len(wire.received) < size:
            assert await wire.more()
            if len(wire.received) > (time.monotonic() - began) * 4 * MIB:
                await asyncio.sleep(0.05)
        assert time.monotonic() - began > 3  # longer than it may take nothing


async def test_slow_request_is_logged_without_a_word_of_it(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    async with connected(served.port) as wire:
        await wire.send(request("POST", f"/?{MARK.decode()}", "Content-Length: 2"), b"x")
        with pytest.raises(TimeoutError):
            await wire.more(1.1)
        await wire.send(b"x")
        assert (await wire.reply()).status == 200
    await eventually(lambda: [line for line in caplog.messages if line == "slow request"], 5 * SLACK)
    assert MARK.decode() not in str([vars(record) for record in caplog.records])


# --- too many connections ---


async def test_surplus_connections_are_closed_and_the_others_served(
    spawn: Spawn, valkey: Valkey, tmp_path: Path, command: tuple[str, ...]
) -> None:
    process = spawn(valkey.environ(**PATIENT), command=telling(command, tmp_path / "errors", "ulimit -n 256;"))
    await hits(process.port)
    for _ in range(2):
        async with contextlib.AsyncExitStack() as stack:

            async def connect() -> Wire:
                return await stack.enter_async_context(connected(process.port))

            early = [await connect() for _ in range(10)]
            late = await asyncio.gather(*(connect() for _ in range(390)))
            served = await asyncio.gather(*(answers(wire) for wire in late))
            assert 100 < sum(served) <= 256 - 128 - 10
            assert all(await asyncio.gather(*(answers(wire) for wire in early)))
            assert not idle(process)
            async with connected(process.admin_port) as admin:
                await admin.send(request("GET", "/metrics"))
                assert (await admin.reply()).status == 200
        await eventually(lambda: answers_anew(process.port), 20 * SLACK)
    assert process.end() == 0
    assert (tmp_path / "errors").read_text() == ""
    told = [line["message"].partition(";")[0] for line in process.log if line["level"] not in ("debug", "info")]
    assert set(told) - {"slow request"} == {"too many connections: new ones are closed at once"}


async def answers(wire: Wire) -> bool:
    """Return whether the server answers on this connection; else it closes it."""
    try:
        await wire.send(request())
        reply = await wire.reply()
    except (ConnectionError, AssertionError):
        return False
    return reply.status == 200


async def answers_anew(port: int) -> bool:
    async with connected(port) as wire:
        return await answers(wire)
