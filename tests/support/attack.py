"""Send many hostile requests at a time, and check that the requests leave nothing behind."""

import asyncio
import contextlib
import random
import socket
import struct
import sys
from collections import Counter
from pathlib import Path

from nanoservice.testing.waiting import SLACK, eventually
from tests.support.process import Process, resident
from tests.support.wire import ask, request

MIB = 1 << 20
MARK = b"zq7"  # each hostile request has a mark that begins with these bytes; no answer and no log line may contain them

# Even on a busy machine, no call to Redis takes longer than this timeout.
PATIENT = {"BIND_HOST": "127.0.0.1", "REDIS_TIMEOUT": "30"}

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
    """Return the pieces of a hostile request that contains `mark`."""
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
    """Sends many hostile requests at a time. Records each status, and each answer with the mark or the software's name."""

    def __init__(self, port: int, seed: int) -> None:
        self.port = port
        self.rng = random.Random(seed)
        self.sent = 0
        self.statuses: Counter[int] = Counter()
        self.leaks: list[bytes] = []

    async def run(self, number: int, together: int = 100) -> None:
        """Send `number` requests in total, over `together` connections at the same time."""
        self._left = number
        await asyncio.gather(*(self._attack() for _ in range(together)))

    async def _attack(self) -> None:
        while self._left:
            self._left -= 1
            self.sent += 1
            pieces = hostile(self.rng, MARK + b"%d" % self.sent)
            patience, reset = self.rng.choice((0.05, 0.15)), self.rng.random() < 0.3
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            if reset:  # closing the connection will send a RST
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            received = b""
            with contextlib.suppress(ConnectionError, TimeoutError):
                for piece in pieces:
                    writer.write(piece)
                    async with asyncio.timeout(patience):  # without a limit, a server that does not read would block the client
                        await writer.drain()
                    await asyncio.sleep(0)
                while data := await asyncio.wait_for(reader.read(1 << 16), patience):
                    received += data
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
    """Return whether no client is connected: no socket on the service's port is in state ESTABLISHED or CLOSE_WAIT."""
    lines = Path(f"/proc/{process.popen.pid}/net/tcp").read_text().splitlines()
    sockets = [line.split()[1:4] for line in lines]
    return not any(here.endswith(f":{process.port:04X}") and state in ("01", "08") for here, _, state in sockets)


def telling(module: str, errors: Path, before: str = "") -> tuple[str, ...]:
    """Return a command that runs `module` and writes standard error to the file `errors`. The shell code `before` runs first."""
    return "sh", "-c", f'{before} exec "$@" 2>"$0"', str(errors), sys.executable, "-m", module


async def hit(port: int) -> int:
    """Count a hit, and return its number."""
    reply = await ask(port, request("GET", "/", "Accept: application/json"))
    assert reply.status == 200
    return int(reply.json["hits"])


async def survive(process: Process, errors: Path, number: int, *, connections: int) -> None:
    """Attack a service whose standard error goes to `errors`. Fail if it leaks memory, descriptors or text, or loses a hit.

    `connections` is the number of additional connections to Redis that the service may keep after the attack.
    """
    await Attack(process.port, seed=0).run(1_000)  # fill caches and metrics before the measurement
    await Attack(process.admin_port, seed=2).run(100)
    await hit(process.port)
    await eventually(lambda: idle(process), 20 * SLACK)
    open_before, memory = descriptors(process), resident(process)
    attack = Attack(process.port, seed=1)
    await attack.run(number)
    assert attack.sent == number
    assert not attack.leaks, attack.leaks[0]
    assert attack.statuses.keys() <= {100, 200, 204, 400, 404, 405, 406, 413, 414, 417, 431}
    # The attack must provoke these statuses. One answer in 100 is enough, because on a busy machine many clients give up.
    assert attack.statuses.keys() >= {200, 400, 404, 431}
    assert attack.statuses.total() > number / 100
    await eventually(lambda: idle(process), 20 * SLACK)
    before = await hit(process.port)
    assert await hit(process.port) == before + 1
    await eventually(lambda: idle(process), 20 * SLACK)
    more = descriptors(process) - open_before, (resident(process) - memory) / MIB
    print(f"{attack.sent} hostile requests, by status {dict(attack.statuses)}; left: {more[0]} descriptors, {more[1]:.1f} MiB")
    assert more[0] <= connections
    assert more[1] < 16
    assert process.end() == 0
    assert errors.read_text() == ""
    assert MARK.decode() not in str(process.log)
    # The log has only the start, the shutdown, the surplus of connections on the admin port, and requests that are slow because
    # the machine is busy.
    messages = {line["message"].partition(";")[0].partition(":")[0] for line in process.log}
    assert messages <= {"listening", "draining", "stopped", "too many connections", "slow request"}, messages
    assert len(process.log) < 100
