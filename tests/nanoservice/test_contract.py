"""Test what every service answers: to each path and method, on all connections, and to bytes that are not HTTP."""

import asyncio
import time
from collections.abc import AsyncIterator
from email.utils import parsedate_to_datetime

import pytest
from aiohttp import web

from nanoservice import config
from nanoservice.service import Service
from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK, eventually
from tests.nanoservice.sample import HITS, POSTS
from tests.support.contract import METHODS, check_head, check_methods
from tests.support.process import metric
from tests.support.wire import ask, chunked, connected, is_problem, request

MIB = 1 << 20
PATHS = {"/": "GET,HEAD,OPTIONS,POST"} | dict.fromkeys(("/livez", "/readyz", "/version", "/openapi.json"), "GET,HEAD,OPTIONS")


def counted(valkey: Valkey) -> tuple[int, int]:
    """Return the hits and posts that the sample has counted."""
    hits, posts = valkey.run("MGET", HITS, POSTS)
    return int(hits or 0), int(posts or 0)


# --- paths and methods ---


async def test_head_has_the_headers_of_get(served: Served) -> None:
    await check_head(served.port, PATHS)


async def test_path_accepts_its_methods_and_lists_them(served: Served) -> None:
    await check_methods(served.port, PATHS)


@pytest.mark.parametrize(
    "path", ["/metrics", "/x", "//", "/livez/", "/LIVEZ", "/..", "/%2e%2e/etc/passwd", "/%ff", "/%", "/?/livez#", "*", "/\t"]
)  # fmt: skip
async def test_no_other_path_is_found(served: Served, path: str) -> None:
    async with connected(served.port) as wire:
        for method in METHODS:
            await wire.send(request(method, path))
            reply = await wire.reply(head=method == "HEAD")
            if path.startswith("/?"):
                assert reply.status in (200, 204, 405)  # this path is the root with a query
            elif reply.status == 400:
                return
            elif method == "HEAD":
                assert reply.status == 404
            else:
                assert is_problem(reply, 404)


async def test_query_and_absolute_form_change_nothing(served: Served) -> None:
    for path in ("/?a=b", "/?" + "a" * 4000, "http://elsewhere/", "http://localhost:1/?x"):
        assert (await ask(served.port, request("GET", path))).status == 200


async def test_probes_and_version_answer_as_documented(served: Served) -> None:
    for path, body in (("/livez", b"alive\n"), ("/readyz", b"ready\n")):
        reply = await ask(served.port, request("GET", path))
        assert (reply.body, reply.headers["Content-Type"]) == (body, "text/plain; charset=utf-8")
        assert reply.headers["Cache-Control"] == "no-store"
    assert (await ask(served.port, request("GET", "/version"))).json == {"name": "sample", "version": "1.0"}


async def test_readyz_is_503_with_the_reason_while_livez_is_200(served: Served, valkey: Valkey) -> None:
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
    assert b"_created" not in reply.body
    for path in (*PATHS, "/x"):
        assert is_problem(await ask(served.admin_port, request("GET", path)), 404)
    assert is_problem(await ask(served.admin_port, request("POST", "/metrics")), 405)
    assert is_problem(await ask(served.port, request("GET", "/metrics")), 404)


async def test_no_answer_names_the_software(served: Served) -> None:
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


async def test_compressed_body_is_not_decompressed(served: Served) -> None:
    async with connected(served.port) as wire:
        for encoding in ("gzip", "deflate", "br", "nonsense"):
            await wire.send(request("POST", "/", f"Content-Encoding: {encoding}", body=b"this is no such thing"))
            assert (await wire.reply()).status == 200


# --- the connection ---


async def test_date_header_is_the_time_of_the_answer(served: Served) -> None:
    async def date() -> float:
        return parsedate_to_datetime((await ask(served.port, request("GET", "/livez"))).headers["Date"]).timestamp()

    first = await date()
    assert abs(first - time.time()) < 1 + SLACK

    async def later() -> bool:
        return await date() > first

    await eventually(later, 2 * SLACK)


async def test_expected_continue_comes_before_the_body(served: Served, valkey: Valkey) -> None:
    async with connected(served.port) as wire:
        await wire.send(request("POST", "/", "Expect: 100-continue", "Content-Length: 3"))
        assert (await wire.reply()).status == 100
        await wire.send(b"abc")
        assert (await wire.reply()).status == 200
    assert counted(valkey) == (0, 1)


@pytest.mark.parametrize("expectation", ["200-ok", "100-continued", "caf\u00e9", "\u00ff" * 300])
async def test_unknown_expectation_is_417(
    served: Served, valkey: Valkey, expectation: str, caplog: pytest.LogCaptureFixture
) -> None:
    for method, path in (("GET", "/"), ("POST", "/"), ("GET", "/x"), ("PUT", "/livez")):
        assert is_problem(await ask(served.port, request(method, path, f"Expect: {expectation}")), 417)
    assert counted(valkey) == (0, 0)
    assert not [record for record in caplog.records if record.levelname not in ("DEBUG", "INFO")]


async def test_http_1_0_connection_is_closed_unless_the_client_keeps_it_alive(served: Served) -> None:
    async with connected(served.port) as wire:
        for method, path in (("GET", "/"), ("HEAD", "/"), ("POST", "/"), ("GET", "/livez"), ("GET", "/x")):
            await wire.send(request(method, path, "Connection: keep-alive", version="1.0"))
            assert (await wire.reply(head=method == "HEAD")).headers["Connection"] == "keep-alive"
        await wire.send(request(version="1.0"))
        assert (await wire.reply()).headers["Connection"] == "close"
        await wire.closed()


async def test_http_1_1_connection_is_kept_alive_unless_the_client_closes_it(served: Served) -> None:
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
            *(request("GET", "/") for _ in range(50)),
            request("POST", "/", body=b"x" * 200_000),
            request("HEAD"),
            request("POST", "/", "Transfer-Encoding: chunked"), *chunked(b"x" * 200_000, 9_999),
            request("GET", "/x"),
            *(request("GET", "/") for _ in range(50)),
        )  # fmt: skip
        assert [(await wire.reply()).json["hits"] for _ in range(50)] == list(range(1, 51))
        assert (await wire.reply()).json["posts"] == 1
        assert (await wire.reply(head=True)).status == 200
        assert (await wire.reply()).json["posts"] == 2
        assert (await wire.reply()).status == 404
        assert [(await wire.reply()).json["hits"] for _ in range(50)] == list(range(51, 101))


async def test_request_may_come_in_pieces(served: Served) -> None:
    data = request("POST", "/", "Transfer-Encoding: chunked") + b"".join(chunked(b"x" * 30, 7))
    async with connected(served.port) as wire:
        for byte in data:
            await wire.send(bytes([byte]))
            await asyncio.sleep(0)
        assert (await wire.reply()).json["posts"] == 1


# --- malformed requests ---

MARK = "zq7mark"  # each request below contains this mark, and no answer may contain it

UNPARSED = {
    "garbage": (400, b"\x00\xff" + MARK.encode() + b"\r\n\r\n"),
    "TLS": (400, bytes.fromhex("16030100a5010000a10303") + MARK.encode() * 9),
    "line without a path": (400, f"GET{MARK}\r\n\r\n".encode()),
    "unknown method": (400, request(MARK.upper())),
    "path without a slash": (400, request("GET", MARK)),
    "path that is not ASCII": (400, request("GET", f"/\xff{MARK}")),
    "port that is not a number": (400, request("GET", f"http://localhost:{MARK}/")),
    "unknown protocol": (400, f"GET /{MARK} FTP/1.1\r\nHost: x\r\n\r\n".encode()),
    "HTTP/2": (400, f"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n{MARK}".encode()),
    "version that is not a number": (400, f"GET /{MARK} HTTP/one\r\nHost: x\r\n\r\n".encode()),
    "no host": (400, f"GET /{MARK} HTTP/1.1\r\n\r\n".encode()),
    "two hosts": (400, request("GET", "/", f"Host: {MARK}")),
    "header without a colon": (400, request("GET", "/", MARK)),
    "header with a blank before the colon": (400, request("GET", "/", f"{MARK} : x")),
    "header with a control character": (400, request("GET", "/", f"X: {MARK}\x01")),
    "header that is folded": (400, request("GET", "/", "X: y", f" {MARK}")),
    "lines that end in LF": (400, f"GET /{MARK} HTTP/1.1\nHost: x\n\n".encode()),
    "long line": (414, request("GET", f"/{MARK}" + "a" * 9000)),
    "long header": (431, request("GET", "/", f"X: {MARK}" + "a" * 9000)),
    "long name of a header": (431, request("GET", "/", f"{MARK}" + "a" * 9000 + ": x")),
    "many headers": (431, request("GET", "/", *(f"X-{number}: {MARK}" for number in range(200)))),
    "length that is not a number": (400, request("POST", "/", f"Content-Length: {MARK}")),
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
async def test_malformed_request_is_answered_and_closed(served: Served, name: str, caplog: pytest.LogCaptureFixture) -> None:
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
async def test_body_that_becomes_malformed_is_a_problem_and_counts_nothing(
    served: Served, valkey: Valkey, begin: bytes, caplog: pytest.LogCaptureFixture
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
    assert counted(valkey) == (0, 0)
    assert not [record for record in caplog.records if record.levelname not in ("DEBUG", "INFO")]


async def test_client_that_disconnects_within_a_body_counts_nothing_and_is_not_logged(
    served: Served, valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    for header in ("Content-Length: 9", "Transfer-Encoding: chunked"):
        async with connected(served.port) as wire:
            await wire.send(request("POST", "/", header, "Expect: 100-continue"))
            assert (await wire.reply()).status == 100
            await wire.send(b"3")
    await eventually(lambda: _measured(served, 'method="POST",route="/",status="400"', 2), 5 * SLACK)
    assert counted(valkey) == (0, 0)
    assert not [record for record in caplog.records if record.levelname not in ("DEBUG", "INFO")]


async def _measured(served: Served, labels: str, number: int) -> bool:
    page = (await ask(served.admin_port, request("GET", "/metrics"))).body.decode()
    return f"http_request_duration_seconds_count{{{labels}}} {number}.0" in page


async def test_malformed_request_is_measured(served: Served) -> None:
    before = await metric(served, "http_request_duration_seconds_count")
    for _ in range(3):
        assert (await ask(served.port, b"nonsense\r\n\r\n")).status == 400
    after = await metric(served, "http_request_duration_seconds_count")
    assert after - before == 3  # scrapes are not measured


async def test_requests_before_a_malformed_one_are_answered(served: Served) -> None:
    async with connected(served.port) as wire:
        for data, status in ((request(), 200), (request("POST", body=b"x"), 200), (b"nonsense\r\n\r\n", 400)):
            await wire.send(data)
            assert (await wire.reply()).status == status
        await wire.closed()


# --- metrics ---


async def test_blocked_event_loop_is_measured(served: Served) -> None:
    time.sleep(1.5)  # The sample that is due within this time is late by half a second at least.
    await eventually(lambda: metric(served, "event_loop_lag_seconds_sum"), 5)
    assert 0.4 < await metric(served, "event_loop_lag_seconds_sum") < 1.5 * SLACK


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
    assert {line.split('route="')[1].split('"')[0] for line in requests} == {"/", "unmatched"}


# --- errors of handlers ---


def _failing(app: web.Application, config: config.Config) -> None:
    async def refused(request: web.Request) -> web.Response:
        raise ConnectionRefusedError("another server than Redis")

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


async def test_error_that_a_handler_raises_keeps_its_text_and_the_headers_that_the_client_needs(failing: Served) -> None:
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
