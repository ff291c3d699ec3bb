"""What the service answers on each path, method and media type, and to what is no request at all."""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable
from email.utils import parsedate_to_datetime
from pathlib import Path

import pytest
from aiohttp import web

from hitcounter import __version__
from nanoservice import config
from nanoservice.service import Service
from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK, eventually
from tests.support.process import Process, metric, resident
from tests.support.wire import Reply, chunked, connected, request

MIB = 1 << 20
PATHS = {"/": "GET,HEAD,OPTIONS,POST"} | dict.fromkeys(("/livez", "/readyz", "/version", "/openapi.json"), "GET,HEAD,OPTIONS")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
JSON = "Accept: application/json"


async def ask(port: int, *data: bytes, head: bool = False) -> Reply:
    """Return the first answer to `data` on a connection of its own."""
    async with connected(port) as wire:
        await wire.send(*data)
        return await wire.reply(head=head)


async def counts(served: Served) -> tuple[int, int]:
    """Count a hit, and return how many hits there were before, and posts."""
    numbers = (await ask(served.port, request("GET", "/", JSON))).json
    return numbers["hits"] - 1, numbers["posts"]


def is_problem(reply: Reply, status: int) -> bool:
    """Check that `reply` is a problem with this status that tells nothing of us."""
    assert reply.status == status
    assert reply.headers["Content-Type"] == "application/problem+json"
    assert reply.headers["Cache-Control"] == "no-store"
    ours = {"Date", "Content-Type", "Cache-Control", "Content-Length", "Connection"}
    assert set(reply.headers) <= ours | {"Allow", "Retry-After", "WWW-Authenticate"}
    assert reply.json.keys() - {"detail"} == {"type", "title", "status"}
    assert (reply.json["type"], reply.json["status"]) == ("about:blank", status)
    return True


# --- / ---


async def test_each_hit_is_counted_and_told(served: Served) -> None:
    for number in (1, 2, 3):
        async with served.client.get("/") as answer:
            assert await answer.text() == f"Hello from Redis! I have been seen {number} times.\nPOST requests served: 0.\n"
            assert answer.status == 200
            assert answer.headers["Cache-Control"] == "no-store"
            assert answer.content_type == "text/plain"


async def test_each_post_is_counted_and_told_and_is_no_hit(served: Served) -> None:
    for number in (1, 2, 3):
        async with served.client.post("/", data=b"anything") as answer:
            assert await answer.text() == f"Hello from Redis! I have been seen 0 times.\nPOST requests served: {number}.\n"
            assert answer.headers["Cache-Control"] == "no-store"


async def test_json_is_given_where_it_is_wanted(served: Served) -> None:
    async with connected(served.port) as wire:
        for method, numbers in (("GET", (1, 0)), ("POST", (1, 1)), ("GET", (2, 1))):
            await wire.send(request(method, "/", JSON))
            reply = await wire.reply()
            assert reply.body == b'{"hits": %d, "posts": %d}\n' % numbers
            assert reply.headers["Content-Type"] == "application/json"
            assert reply.headers["Vary"] == "Accept"


async def test_head_and_options_count_nothing(served: Served) -> None:
    async with connected(served.port) as wire:
        for _ in range(3):
            await wire.send(request("HEAD"))
            assert (await wire.reply(head=True)).status == 200
            await wire.send(request("OPTIONS"))
            assert (await wire.reply()).status == 204
    assert await counts(served) == (0, 0)


@pytest.mark.parametrize("headers", [(), (JSON,)])
async def test_head_has_the_headers_of_get(served: Served, headers: tuple[str, ...]) -> None:
    async with connected(served.port) as wire:
        for path in PATHS:
            await wire.send(request("GET", path, *headers), request("HEAD", path, *headers))
            get, head = await wire.reply(), await wire.reply(head=True)
            assert head.status == get.status == 200
            varying = (
                {"Date", "Content-Length"} if path == "/" else {"Date"}
            )  # no length: a hit that is not counted has no number
            assert {name: get.headers[name] for name in get.headers.keys() - varying} == {
                name: head.headers[name] for name in head.headers.keys() - varying
            }
        await wire.send(request("HEAD", "/nowhere"), request("GET"))
        assert (await wire.reply(head=True)).status == 404
        assert (await wire.reply()).status == 200  # so no body stood between them


async def test_every_answer_on_the_root_forbids_to_store_it(served: Served) -> None:
    async with connected(served.port) as wire:
        for method in METHODS:
            for header in ("Accept: */*", "Accept: text/html", "Expect: something", "Idempotency-Key:"):
                await wire.send(request(method, "/", header))
                assert (await wire.reply(head=method == "HEAD")).headers["Cache-Control"] == "no-store", (method, header)


# --- paths and methods ---


async def test_path_takes_its_methods_and_tells_them(served: Served) -> None:
    async with connected(served.port) as wire:
        for path, allowed in PATHS.items():
            for method in METHODS:
                await wire.send(request(method, path))
                reply = await wire.reply(head=method == "HEAD")
                if method == "OPTIONS":
                    assert (reply.status, reply.headers["Allow"], reply.body) == (204, allowed, b"")
                elif method in allowed.split(","):
                    assert reply.status == 200
                else:
                    assert is_problem(reply, 405)
                    assert reply.headers["Allow"] == allowed


@pytest.mark.parametrize(
    "path", ["/metrics", "/x", "//", "/livez/", "/LIVEZ", "/..", "/%2e%2e/etc/passwd", "/%ff", "/%", "/?/livez#", "*", "/\t"]
)  # fmt: skip
async def test_no_other_path_is_found(served: Served, path: str) -> None:
    async with connected(served.port) as wire:
        for method in METHODS:
            await wire.send(request(method, path))
            reply = await wire.reply(head=method == "HEAD")
            if path.startswith("/?"):
                assert reply.status in (200, 204, 405)  # the root, with a query
            elif reply.status == 400:
                return
            elif method == "HEAD":
                assert reply.status == 404
            else:
                assert is_problem(reply, 404)


async def test_query_and_absolute_form_change_nothing(served: Served) -> None:
    for path in ("/?a=b", "/?" + "a" * 4000, "http://elsewhere/", "http://localhost:1/?x"):
        assert (await ask(served.port, request("GET", path))).status == 200


async def test_probes_and_version_say_what_they_should(served: Served) -> None:
    for path, body in (("/livez", b"alive\n"), ("/readyz", b"ready\n")):
        reply = await ask(served.port, request("GET", path))
        assert (reply.body, reply.headers["Content-Type"]) == (body, "text/plain; charset=utf-8")
        assert reply.headers["Cache-Control"] == "no-store"
    assert (await ask(served.port, request("GET", "/version"))).json == {"name": "hitcounter", "version": __version__}


async def test_unready_is_503_with_the_reason_while_alive(served: Served, valkey: Valkey) -> None:
    valkey.kill()
    reply = await ask(served.port, request("GET", "/readyz"))
    assert is_problem(reply, 503)
    assert reply.json["detail"] == "Redis: it cannot be reached"
    assert reply.headers["Retry-After"] == "1"
    assert (await ask(served.port, request("GET", "/livez"))).status == 200
    assert (await ask(served.port, request("HEAD", "/readyz"), head=True)).status == 503


async def test_admin_port_has_metrics_and_nothing_else(served: Served) -> None:
    reply = await ask(served.admin_port, request("GET", "/metrics"))
    assert reply.status == 200
    assert reply.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert b"\n# TYPE http_request_duration_seconds histogram\n" in reply.body
    for path in (*PATHS, "/x"):
        assert is_problem(await ask(served.admin_port, request("GET", path)), 404)
    assert is_problem(await ask(served.admin_port, request("POST", "/metrics")), 405)
    assert is_problem(await ask(served.port, request("GET", "/metrics")), 404)


async def test_no_answer_names_what_it_runs_on(served: Served) -> None:
    requests = [request(method, path) for path in (*PATHS, "/metrics", "/x") for method in METHODS]
    for port in (served.port, served.admin_port):
        for data in (*requests, b"bad\r\n\r\n", request("GET", "/", "Expect: x"), request("GET", "/", "X: " + "a" * 9000)):
            async with connected(port) as wire:
                await wire.send(data)
                reply = await wire.reply(head=data.startswith(b"HEAD"))
                assert "Server" not in reply.headers
                head = wire.received.partition(b"\r\n\r\n")[0].lower()
                assert not any(name in head for name in (b"python", b"aiohttp", b"redis", b"valkey", b"uvloop"))
                if port == served.port and reply.status != 200:
                    assert not any(name in wire.received.lower() for name in (b"python", b"aiohttp", b"traceback"))


# --- bodies ---


@pytest.mark.parametrize("size", [0, 1, 70_000, MIB - 1, MIB])
@pytest.mark.parametrize("form", ["length", "chunked"])
async def test_body_up_to_a_mebibyte_is_discarded(served: Served, size: int, form: str) -> None:
    body = b"x" * size
    async with connected(served.port) as wire:
        for number in (1, 2):  # on one connection: the first was read to its end
            if form == "chunked":
                await wire.send(request("POST", "/", JSON, "Transfer-Encoding: chunked"), *chunked(body, 60_000))
            else:
                await wire.send(request("POST", "/", JSON, *([] if size else ["Content-Length: 0"]), body=body))
            assert (await wire.reply()).json == {"hits": 0, "posts": number}


async def test_longer_body_is_413_and_counts_nothing(served: Served) -> None:
    body = b"x" * (MIB + 1)
    for data in (
        (request("POST", "/", body=body),),
        (request("POST", "/", "Transfer-Encoding: chunked"), *chunked(body)),
        (request("POST", "/", "Transfer-Encoding: chunked"), *chunked(body, 1 << 20)),
    ):
        async with connected(served.port) as wire:
            await wire.send(*data)
            reply = await wire.reply()
            assert is_problem(reply, 413)
            assert reply.json["detail"] == "a body has at most 1048576 bytes"
            assert reply.headers["Connection"] == "close"
            await wire.closed()
    assert await counts(served) == (0, 0)


async def test_length_that_is_too_long_is_413_before_the_body(served: Served) -> None:
    for length in (MIB + 1, 1 << 40, (1 << 63) - 1):
        assert is_problem(await ask(served.port, request("POST", "/", f"Content-Length: {length}")), 413)
    assert is_problem(await ask(served.port, request("POST", "/", f"Content-Length: {1 << 64}")), 400)


async def test_chunked_body_without_end_is_413(served: Served) -> None:
    async with connected(served.port) as wire:
        await wire.send(request("POST", "/", "Transfer-Encoding: chunked"))
        reply = asyncio.create_task(wire.reply())
        while not reply.done():
            await wire.send(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
            await asyncio.sleep(0)
        assert is_problem(await reply, 413)


async def test_bodies_are_not_held(spawn: Callable[..., Process], valkey: Valkey) -> None:
    patient = "import runpy; from nanoservice import connection; connection.RECEIVE_SECONDS = 120;"
    command = sys.executable, "-c", patient + "runpy.run_module('hitcounter', run_name='__main__')"
    process = spawn(valkey.environ(BIND_HOST="127.0.0.1"), command=command)

    def received() -> bool:
        """Return whether the process has read all that was sent to it: no socket of its port has a byte in its queues."""
        sockets = [line.split()[1:5] for line in Path("/proc/net/tcp").read_text().splitlines()]
        return all(
            queues == "00000000:00000000" for *ends, _, queues in sockets if any(f":{process.port:04X}" in end for end in ends)
        )

    async def upload(number: int) -> int:
        """Send so many bodies at a time; return how much memory is used when all but their last bytes have come."""
        async with contextlib.AsyncExitStack() as stack:
            wires = [await stack.enter_async_context(connected(process.port)) for _ in range(number)]
            for wire in wires:
                await wire.send(request("POST", "/", f"Content-Length: {MIB}"))
            for piece in [MIB // 16] * 15 + [MIB // 16 - 1]:  # so that no more than this is on its way at a time
                for wire in wires:
                    await wire.send(b"x" * piece)
                await eventually(received, 10 * SLACK)
            used = resident(process)
            for wire in wires:
                await wire.send(b"x")
            assert [(await wire.reply()).status for wire in wires] == [200] * number
        return used

    before = await upload(5)
    assert await upload(200) - before < 80 * MIB  # of 200: what the event loop reads at a time is in there


async def test_hit_with_a_body_is_a_hit(served: Served) -> None:
    async with connected(served.port) as wire:
        for number, size in enumerate((1, 70_000, MIB + 1), 1):
            await wire.send(request("GET", "/", JSON, body=b"x" * size))
            assert (await wire.reply()).json["hits"] == number
        await wire.send(request("GET", "/", JSON, "Transfer-Encoding: chunked"), *chunked(b"x" * 100))
        assert (await wire.reply()).json["hits"] == 4


async def test_compressed_body_is_taken_as_it_came(served: Served) -> None:
    async with connected(served.port) as wire:
        for encoding in ("gzip", "deflate", "br", "nonsense"):
            await wire.send(request("POST", "/", f"Content-Encoding: {encoding}", body=b"this is no such thing"))
            assert (await wire.reply()).status == 200


# --- the connection ---


async def test_date_is_that_of_the_answer(served: Served) -> None:
    async def date() -> float:
        return parsedate_to_datetime((await ask(served.port, request("GET", "/livez"))).headers["Date"]).timestamp()

    first = await date()
    assert abs(first - time.time()) < 1 + SLACK

    async def later() -> bool:
        return await date() > first

    await eventually(later, 2 * SLACK)


async def test_expected_continue_comes_before_the_body(served: Served) -> None:
    async with connected(served.port) as wire:
        await wire.send(request("POST", "/", "Expect: 100-continue", "Content-Length: 3"))
        assert (await wire.reply()).status == 100
        await wire.send(b"abc")
        assert (await wire.reply()).status == 200
    assert await counts(served) == (0, 1)


@pytest.mark.parametrize("expectation", ["200-ok", "100-continued", "caf\u00e9", "\u00ff" * 300])
async def test_other_expectation_is_417(served: Served, expectation: str, caplog: pytest.LogCaptureFixture) -> None:
    for method, path in (("GET", "/"), ("POST", "/"), ("GET", "/x"), ("PUT", "/livez")):
        assert is_problem(await ask(served.port, request(method, path, f"Expect: {expectation}")), 417)
    assert await counts(served) == (0, 0)
    assert not [record for record in caplog.records if record.levelname not in ("DEBUG", "INFO")]


async def test_http_1_0_is_closed_unless_kept_alive(served: Served) -> None:
    async with connected(served.port) as wire:
        for method, path in (("GET", "/"), ("HEAD", "/"), ("POST", "/"), ("GET", "/livez"), ("GET", "/x")):
            await wire.send(request(method, path, "Connection: keep-alive", version="1.0"))
            assert (await wire.reply(head=method == "HEAD")).headers["Connection"] == "keep-alive"
        await wire.send(request(version="1.0"))
        assert (await wire.reply()).headers["Connection"] == "close"
        await wire.closed()


async def test_http_1_1_is_kept_alive_unless_closed(served: Served) -> None:
    for method, path in (
        ("GET", "/"),
        ("HEAD", "/"),
        ("POST", "/"),
        ("OPTIONS", "/"),
        ("GET", "/livez"),
        ("GET", "/x"),
        ("PUT", "/"),
    ):
        async with connected(served.port) as wire:
            for header in ("X: y", "Connection: keep-alive"):
                await wire.send(request(method, path, header))
                assert "Connection" not in (await wire.reply(head=method == "HEAD")).headers
            await wire.send(request(method, path, "Connection: close"))
            assert (await wire.reply(head=method == "HEAD")).headers["Connection"] == "close"
            await wire.closed()


async def test_pipelined_requests_are_answered_in_order(served: Served) -> None:
    async with connected(served.port) as wire:
        await wire.send(
            *(request("GET", "/", JSON) for _ in range(50)),
            request("POST", "/", JSON, body=b"x" * 200_000),
            request("HEAD"),
            request("POST", "/", JSON, "Transfer-Encoding: chunked"), *chunked(b"x" * 200_000, 9_999),
            request("GET", "/x"),
            *(request("GET", "/", JSON) for _ in range(50)),
        )  # fmt: skip
        assert [(await wire.reply()).json["hits"] for _ in range(50)] == list(range(1, 51))
        assert (await wire.reply()).json == {"hits": 50, "posts": 1}
        assert (await wire.reply(head=True)).status == 200
        assert (await wire.reply()).json == {"hits": 50, "posts": 2}
        assert (await wire.reply()).status == 404
        assert [(await wire.reply()).json["hits"] for _ in range(50)] == list(range(51, 101))


async def test_request_may_come_in_pieces(served: Served) -> None:
    data = request("POST", "/", JSON, "Transfer-Encoding: chunked") + b"".join(chunked(b"x" * 30, 7))
    async with connected(served.port) as wire:
        for byte in data:
            await wire.send(bytes([byte]))
            await asyncio.sleep(0)
        assert (await wire.reply()).json == {"hits": 0, "posts": 1}


# --- what is no request ---

MARK = "zq7mark"  # stands in each of these, and in no answer

UNPARSED = {
    "garbage": (400, b"\x00\xff" + MARK.encode() + b"\r\n\r\n"),
    "TLS": (400, bytes.fromhex("16030100a5010000a10303") + MARK.encode() * 9),
    "line without a path": (400, f"GET{MARK}\r\n\r\n".encode()),
    "unknown method": (400, request(MARK.upper())),
    "path without a slash": (400, request("GET", MARK)),
    "path that is not ASCII": (400, request("GET", f"/\xff{MARK}")),
    "port that is no number": (400, request("GET", f"http://localhost:{MARK}/")),
    "unknown protocol": (400, f"GET /{MARK} FTP/1.1\r\nHost: x\r\n\r\n".encode()),
    "HTTP/2": (400, f"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n{MARK}".encode()),
    "version that is no number": (400, f"GET /{MARK} HTTP/one\r\nHost: x\r\n\r\n".encode()),
    "no host": (400, f"GET /{MARK} HTTP/1.1\r\n\r\n".encode()),
    "two hosts": (400, request("GET", "/", f"Host: {MARK}")),
    "header without a colon": (400, request("GET", "/", MARK)),
    "header with a blank before the colon": (400, request("GET", "/", f"{MARK} : x")),
    "header with a control character": (400, request("GET", "/", f"X: {MARK}\x01")),
    "header that is folded": (400, request("GET", "/", "X: y", f" {MARK}")),
    "lines that end in LF": (400, f"GET /{MARK} HTTP/1.1\nHost: x\n\n".encode()),
    "long line": (431, request("GET", f"/{MARK}" + "a" * 9000)),
    "long header": (431, request("GET", "/", f"X: {MARK}" + "a" * 9000)),
    "long name of a header": (431, request("GET", "/", f"{MARK}" + "a" * 9000 + ": x")),
    "many headers": (431, request("GET", "/", *(f"X-{number}: {MARK}" for number in range(200)))),
    "length that is no number": (400, request("POST", "/", f"Content-Length: {MARK}")),
    "negative length": (400, request("POST", f"/?{MARK}", "Content-Length: -1")),
    "two lengths": (400, request("POST", f"/?{MARK}", "Content-Length: 1", "Content-Length: 2")),
    "length and chunks": (400, request("POST", f"/?{MARK}", "Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n"),
    "unknown transfer encoding": (400, request("POST", "/", f"Transfer-Encoding: {MARK}")),
    "chunked twice": (400, request("POST", f"/?{MARK}", "Transfer-Encoding: chunked, chunked") + b"0\r\n\r\n"),
    "chunk without a length": (400, request("POST", "/", "Transfer-Encoding: chunked") + f"{MARK}\r\n".encode()),
    "chunk that is too long": (400, request("POST", "/", "Transfer-Encoding: chunked") + f"1\r\n{MARK}\r\n".encode()),
    "chunk of a negative length": (400, request("POST", f"/?{MARK}", "Transfer-Encoding: chunked") + b"-1\r\n\r\n"),
}


@pytest.mark.parametrize("name", UNPARSED)
async def test_what_is_no_request_is_a_problem_and_closed(served: Served, name: str, caplog: pytest.LogCaptureFixture) -> None:
    status, data = UNPARSED[name]
    for port in (served.port, served.admin_port):
        async with connected(port) as wire:
            await wire.send(data)
            reply = await wire.reply()
            assert is_problem(reply, status)
            assert reply.headers["Connection"] == "close"
            await wire.closed()
            assert MARK.encode() not in wire.received.lower()
    assert not [record for record in caplog.records if record.levelname not in ("DEBUG", "INFO")]
    assert MARK not in caplog.text.lower()


@pytest.mark.parametrize("begin", [b"", b"5\r\nabcde\r\n", b"5\r\nab"], ids=["at once", "after a chunk", "within a chunk"])
async def test_body_that_breaks_later_is_a_problem_and_counts_nothing(
    served: Served, begin: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(served.port) as wire:
        await wire.send(request("POST", "/", "Transfer-Encoding: chunked", "Expect: 100-continue"))
        assert (await wire.reply()).status == 100
        await wire.send(begin)
        await asyncio.sleep(0)
        await wire.send(MARK.encode() + b"\r\n\r\n")
        began = asyncio.get_running_loop().time()
        assert is_problem(await wire.reply(), 400)
        await wire.closed()
        assert asyncio.get_running_loop().time() - began < 1 * SLACK
    assert await counts(served) == (0, 0)
    assert not [record for record in caplog.records if record.levelname not in ("DEBUG", "INFO")]


async def test_client_that_goes_away_within_a_body_counts_nothing_and_is_not_logged(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    for header in ("Content-Length: 9", "Transfer-Encoding: chunked"):
        async with connected(served.port) as wire:
            await wire.send(request("POST", "/", header, "Expect: 100-continue"))
            assert (await wire.reply()).status == 100
            await wire.send(b"3")
    await eventually(lambda: _measured(served, 'method="POST",route="/",status="400"', 2), 5 * SLACK)
    assert await counts(served) == (0, 0)
    assert not [record for record in caplog.records if record.levelname not in ("DEBUG", "INFO")]


async def _measured(served: Served, labels: str, number: int) -> bool:
    page = (await ask(served.admin_port, request("GET", "/metrics"))).body.decode()
    return f"http_request_duration_seconds_count{{{labels}}} {number}.0" in page


async def test_what_is_no_request_is_measured(served: Served) -> None:
    before = await metric(served, "http_request_duration_seconds_count")
    for _ in range(3):
        assert (await ask(served.port, b"nonsense\r\n\r\n")).status == 400
    after = await metric(served, "http_request_duration_seconds_count")
    assert after - before == 3 + 1  # and the first look


async def test_requests_before_nonsense_are_answered(served: Served) -> None:
    async with connected(served.port) as wire:
        for data, status in ((request(), 200), (request("POST", body=b"x"), 200), (b"nonsense\r\n\r\n", 400)):
            await wire.send(data)
            assert (await wire.reply()).status == status
        await wire.closed()


# --- Idempotency-Key ---


@pytest.mark.parametrize("key", ["k", "a" * 255, "8e03978e-40d5-43e8-bc93-6894a57f9324", '"quoted"', "a b", "~!@#$%^&*()"])
async def test_same_key_counts_once_and_gets_the_same_answer(served: Served, key: str) -> None:
    async with connected(served.port) as wire:
        await wire.send(request("POST", "/", JSON, f"Idempotency-Key: {key}", body=b"first"))
        first = await wire.reply()
        assert first.json == {"hits": 0, "posts": 1}
        await wire.send(request("GET"), request("POST"))
        await wire.reply()
        await wire.reply()
        await wire.send(request("POST", "/", JSON, f"idempotency-key:   {key} ", body=b"again" * 1000))
        assert (await wire.reply()).body == first.body
        await wire.send(request("POST", "/", JSON, f"Idempotency-Key: {key[:-1]}x"))
        assert (await wire.reply()).json == {"hits": 1, "posts": 3}


@pytest.mark.parametrize(
    "headers",
    [("",), ("   ",), ("a" * 256,), ("caf\u00e9",), ("a\tb",), ("\x80",), ("a", "a"), ("a", "")],
    ids=["empty", "blank", "256 characters", "not ASCII", "tab", "C1", "two", "two, one empty"],
)  # fmt: skip
async def test_malformed_key_is_400_and_counts_nothing(served: Served, headers: tuple[str, ...]) -> None:
    async with connected(served.port) as wire:
        keys = [f"Idempotency-Key: {header}" for header in headers]
        await wire.send(request("POST", "/", *keys, body=b"x" * 100_000), request("POST", "/", *keys))
        for _ in range(2):
            reply = await wire.reply()
            assert is_problem(reply, 400)
            assert reply.json["detail"] == "Idempotency-Key must be one header of 1 to 255 printable ASCII characters"
        await wire.send(request("GET", "/", *keys), request("GET", "/", JSON, *keys), request("HEAD", "/", *keys))
        assert (await wire.reply()).status == 200  # it is ignored here
        assert (await wire.reply()).json == {"hits": 2, "posts": 0}
        assert (await wire.reply(head=True)).status == 200


async def test_key_is_ignored_on_get(served: Served) -> None:
    async with connected(served.port) as wire:
        for number in (1, 2):
            await wire.send(request("GET", "/", JSON, "Idempotency-Key: k"))
            assert (await wire.reply()).json["hits"] == number


# --- metrics ---


async def test_metrics_stay_bounded_whatever_clients_invent(served: Served) -> None:
    methods = (
        "PROPFIND",
        "MKCOL",
        "COPY",
        "MOVE",
        "LOCK",
        "UNLOCK",
        "SEARCH",
        "REPORT",
        "NOTIFY",
        "LINK",
        "BIND",
        "ACL",
        "PURGE",
    )

    async def invent(round: int) -> None:
        async with connected(served.port) as wire:
            for number in range(50):
                for path in (f"/{round}/{number}", "/"):
                    await wire.send(request(methods[number % len(methods)] if number else "GET", path, f"X-{round}-{number}: x"))
                    await wire.reply()

    async def page() -> list[str]:
        return (await ask(served.admin_port, request("GET", "/metrics"))).body.decode().splitlines()

    await page()
    await invent(0)
    before = await page()
    await invent(1)
    after = await page()
    assert len(after) == len(before)
    requests = [line for line in after if line.startswith("http_request_duration_seconds_count{")]
    assert {line.split('method="')[1].split('"')[0] for line in requests} == {"GET", "other"}
    assert {line.split('route="')[1].split('"')[0] for line in requests} == {"/", "/metrics", "unmatched"}


# --- what a handler does wrong ---


def _failing(app: web.Application, config: config.Config) -> None:
    async def refused(request: web.Request) -> web.Response:
        raise ConnectionRefusedError("something else than Redis")

    async def missing(request: web.Request) -> web.Response:
        raise FileNotFoundError("a file of the handler")

    async def who(request: web.Request) -> web.Response:
        raise web.HTTPUnauthorized(headers={"WWW-Authenticate": "Basic", "X-Powered-By": "us"}, text="say who you are")

    async def conflict(request: web.Request) -> web.Response:
        raise web.HTTPConflict

    async def upload(request: web.Request) -> web.Response:
        return web.Response(text=str(len(await request.read())))

    for handler in (refused, missing, who, conflict):
        app.router.add_get(f"/{handler.__name__}", handler)
    app.router.add_post("/upload", upload)


@pytest.fixture
async def failing(valkey: Valkey) -> AsyncIterator[Served]:
    async with serving(Service("failing", "1", config.Config, _failing), valkey.environ()) as served:
        yield served


@pytest.mark.parametrize(("path", "error"), [("/refused", "ConnectionRefusedError"), ("/missing", "FileNotFoundError")])
async def test_error_of_a_handler_is_not_blamed_on_the_client_or_on_redis(
    failing: Served, path: str, error: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert is_problem(await ask(failing.port, request("GET", path)), 500)
    assert caplog.messages == ["a handler failed"]
    assert f"\n{error}: " in caplog.text


async def test_error_that_a_handler_raises_keeps_its_words_and_what_the_client_needs(failing: Served) -> None:
    reply = await ask(failing.port, request("GET", "/who"))
    assert is_problem(reply, 401)
    assert (reply.headers["WWW-Authenticate"], reply.json["detail"]) == ("Basic", "say who you are")
    reply = await ask(failing.port, request("GET", "/conflict"))
    assert is_problem(reply, 409)
    assert "detail" not in reply.json


async def test_body_that_is_longer_than_aiohttp_reads_is_413(failing: Served) -> None:
    async with connected(failing.port) as wire:
        await wire.send(request("POST", "/upload", body=b"x" * (MIB + 1)))
        reply = await wire.reply()
        assert is_problem(reply, 413)
        assert reply.headers["Connection"] == "close"
