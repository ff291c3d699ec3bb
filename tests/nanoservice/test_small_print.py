"""Check rarely used rules of HTTP/1.1 that proxies and old clients rely on."""

import asyncio

import pytest

from nanoservice import connection
from nanoservice.direct import MAX_BODY
from nanoservice.testing.served import Served
from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK, eventually
from tests.nanoservice.sample import HITS, POSTS
from tests.support.wire import ask, connected, is_problem, request

H2C = "Connection: upgrade", "Upgrade: h2c"


def counted(valkey: Valkey) -> list[str | None]:
    hits_and_posts: list[str | None] = valkey.run("MGET", HITS, POSTS)
    return hits_and_posts


@pytest.mark.parametrize("pause", [0, 0.05])
async def test_connection_closes_after_the_answer_to_an_upgrade_request(served: Served, valkey: Valkey, pause: float) -> None:
    first, second = request("GET", "/", *H2C), request("POST", "/", body=request("GET", "/smuggled") + request())
    async with connected(served.port) as wire:
        await wire.send(first, second[:60])
        await asyncio.sleep(pause)
        await wire.send(second[60:])
        reply = await wire.reply()
        assert (reply.status, reply.headers["Connection"]) == (200, "close")
        await wire.closed()
    assert counted(valkey) == ["1", None]


async def test_body_of_an_upgrade_request_is_read(served: Served, valkey: Valkey) -> None:
    async with connected(served.port) as wire:
        await wire.send(request("POST", "/", *H2C, "Content-Length: 6"), b"abc")
        await asyncio.sleep(0.05)
        await wire.send(b"def", request())
        reply = await wire.reply()
        assert (reply.status, reply.headers["Connection"]) == (200, "close")
        await wire.closed()
    assert counted(valkey) == [None, "1"]


@pytest.mark.parametrize("target", ["http://host", "http://host?x=1", "http://host/"])
async def test_absolute_url_without_a_path_means_the_root(served: Served, target: str) -> None:
    assert (await ask(served.port, request("GET", target))).json == {"hits": 1}


async def test_options_request_for_the_whole_server_is_answered(served: Served) -> None:
    for port in (served.port, served.admin_port):
        reply = await ask(port, request("OPTIONS", "*"))
        assert (reply.status, reply.headers["Allow"]) == (204, "GET,HEAD,OPTIONS")
        assert is_problem(await ask(port, request("GET", "*")), 400)


async def test_body_that_is_too_long_gets_413_instead_of_100_continue(served: Served) -> None:
    async with connected(served.port) as wire:
        await wire.send(request("POST", "/", "Expect: 100-continue", f"Content-Length: {MAX_BODY + 1}"))
        assert is_problem(await wire.reply(), 413)
        await wire.closed()


# asyncio and uvloop have different code for a connection that the client has half closed.
@pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])
@pytest.mark.parametrize("number", [1, 3])
async def test_client_that_closes_its_side_gets_its_answers(served: Served, number: int) -> None:
    async with connected(served.port) as wire:
        wire.writer.write(request("POST", "/", body=b"x") * number)
        wire.writer.write_eof()
        for _ in range(number):
            assert (await wire.reply()).status == 200
        await wire.closed()


async def test_client_that_closes_its_side_within_a_request_gets_no_answer(served: Served, valkey: Valkey) -> None:
    for data in (b"", b"GET / HT", request("POST", "/", "Content-Length: 5") + b"x"):
        async with connected(served.port) as wire:
            wire.writer.write(data)
            wire.writer.write_eof()
            while await wire.more():
                pass
            assert b" 200 " not in wire.received
    assert counted(valkey) == [None, None]


async def test_body_that_arrives_too_slowly_gets_408(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "RECEIVE_SECONDS", 0.5)
    for data in (request("POST", "/", "Content-Length: 5"), request("POST", "/", "Transfer-Encoding: chunked") + b"1\r\nx\r\n"):
        async with connected(served.port) as wire:
            await wire.send(data)
            reply = await wire.reply()
            assert is_problem(reply, 408)
            assert reply.headers["Connection"] == "close"
            await wire.closed()


@pytest.mark.parametrize(
    "data",
    [
        b"GET /\r\n\r\n",
        b"GET / HTTP/2.0\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.2\r\nHost: x\r\n\r\n",
        *(
            b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host
            for host in (b"a b", b"a/b", b"u@h", b"h:x", b"[::1", b"\xe9", b"a?b", b"<>")
        ),
    ],
)
async def test_unknown_version_or_invalid_host_gets_400_and_is_not_counted(served: Served, valkey: Valkey, data: bytes) -> None:
    assert is_problem(await ask(served.port, data), 400)
    assert counted(valkey) == [None, None]


@pytest.mark.parametrize("host", ["a", "a:80", "a:", "[::1]:80", "127.0.0.1", "a_b.example", "", "xn--caf-dma.example", "%41"])
async def test_valid_host_is_accepted(served: Served, host: str) -> None:
    data = f"GET /livez HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    assert (await ask(served.port, data)).status == 200


async def test_request_line_that_is_too_long_gets_414(served: Served) -> None:
    for target in ("/" + "a" * 9000, "/?" + "a" * 70_000, "http://h/" + "a" * 9000):
        assert is_problem(await ask(served.port, request("GET", target)), 414)
    assert is_problem(await ask(served.port, request("GET", "/", "X: /" + "a" * 9000)), 431)


# If the rest of the request were not read, the kernel would reset the connection, and the client might lose the answer.
@pytest.mark.parametrize("data", [b"bad\r\n\r\n", request("POST", "/", f"Content-Length: {MAX_BODY + 1}")])
async def test_client_that_is_refused_may_finish_its_request_before_it_reads_the_answer(
    served: Served, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    monkeypatch.setattr(connection, "RECEIVE_SECONDS", 2.0)
    async with connected(served.port) as wire:
        wire.reader._transport.pause_reading()  # type: ignore[attr-defined] # only a private name can pause a stream
        await wire.send(data)
        for _ in range(50):
            await wire.send(b"x" * 10_000)
            await asyncio.sleep(0.001)
        wire.reader._transport.resume_reading()  # type: ignore[attr-defined]
        assert (await wire.reply()).status in (400, 413)
        await wire.closed()
        assert served.running._factories[0].connections
        await eventually(lambda: not served.running._factories[0].connections, 5 * SLACK)


async def test_time_to_read_the_last_answer_begins_with_that_answer(served: Served) -> None:
    (factory, _) = served.running._factories
    async with connected(served.port) as wire:
        await wire.send(request("GET", "/", "Connection: close"), b"more")
        assert (await wire.reply()).status == 200
        await wire.closed()
        factory.close_overdue()
        assert factory.connections


async def test_client_that_pipelines_and_reads_slowly_is_not_closed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "RECEIVE_SECONDS", 1.0)
    number = 2_000
    async with connected(served.port) as wire:
        wire.reader._transport.pause_reading()  # type: ignore[attr-defined]
        wire.writer.write(request("GET", "/openapi.json") * number)
        await asyncio.sleep(3)
        wire.reader._transport.resume_reading()  # type: ignore[attr-defined]
        answers = 0
        while answers < number:
            wire.received = wire.received[-11:]  # too short for a whole status line
            assert await wire.more()
            answers += wire.received.count(b"HTTP/1.1 200")


@pytest.mark.parametrize(("size", "status"), [(1, 400), (8, 200)])
async def test_long_body_in_tiny_chunks_is_refused(served: Served, size: int, status: int) -> None:
    data = b"%d\r\n%b\r\n" % (size, b"x" * size) * (100_000 // size) + b"0\r\n\r\n"
    async with connected(served.port) as wire:
        await wire.send(request("POST", "/", "Transfer-Encoding: chunked"), data)
        assert (await wire.reply()).status == status
