"""A handler has a time limit, and a route may change its time limits."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from aiohttp import web

from nanoservice import config, connection, direct
from nanoservice.answer import Answer
from nanoservice.direct import Content, Headers
from nanoservice.limits import time_limits
from nanoservice.service import Service
from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK, eventually
from tests.support.wire import ask, connected, is_problem, request

_DEAF_SECONDS = 3.0  # longer than the time between two checks of the limits


def setup(app: web.Application, config: config.Config) -> None:
    async def slow(request: web.Request) -> Answer:
        await asyncio.sleep(60)
        return Answer(b"late")

    @time_limits(handle=60)
    async def patient(request: web.Request) -> Answer:
        await asyncio.sleep(3)
        return Answer(b"patient")

    async def stubborn(request: web.Request) -> Answer:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(0.1)
        return Answer(b"anyway")

    async def deaf(request: web.Request) -> Answer:
        try:
            await asyncio.sleep(60)
        except BaseException:
            await asyncio.sleep(_DEAF_SECONDS)
        if request.query_string == "fail":
            raise LookupError
        return Answer(b"too late")

    async def read(request: web.Request) -> Answer:
        body = await request.read()
        await asyncio.sleep(1)
        return Answer(body)

    @time_limits(receive=60)
    async def upload(request: web.Request) -> Answer:
        return await read(request)

    @time_limits(receive=0.2)
    async def brief(request: web.Request) -> Answer:
        return await read(request)

    async def socket(request: web.Request) -> web.WebSocketResponse:
        response = web.WebSocketResponse()
        await response.prepare(request)
        return response

    class View(web.View):
        @time_limits(handle=60)
        async def get(self) -> Answer:
            return await patient(self.request)

        @time_limits(receive=0.2)
        async def post(self) -> Answer:
            return await read(self.request)

    for get in (slow, patient, stubborn, deaf, socket):
        app.router.add_get(f"/{get.__name__}", get)
    for post in (read, upload, brief, slow):
        app.router.add_post(f"/{post.__name__}", post)
    app.router.add_view("/view", View)
    direct.add(app, "GET", "/direct", begin)
    direct.add(app, "GET", "/deaf-and-direct", lambda _: (asyncio.ensure_future(begin_deaf()), lambda _: (b"", b"")))


def begin(headers: Headers) -> tuple["asyncio.Future[None]", Callable[[None], Content]]:
    return asyncio.get_running_loop().create_future(), lambda _: (b"", b"")


async def begin_deaf() -> None:
    try:
        await asyncio.sleep(60)
    except BaseException:
        await asyncio.sleep(_DEAF_SECONDS)


@pytest.fixture
async def served(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    monkeypatch.setattr(connection, "HANDLE_SECONDS", 2.0)
    monkeypatch.setattr(connection, "RECEIVE_SECONDS", 2.0)
    async with serving(Service("limited", "1", config.Config, setup), valkey.environ()) as it:
        yield it


@pytest.mark.parametrize("path", ["/slow", "/direct", "/direct?q"])
async def test_handler_that_takes_too_long_is_504_and_is_logged(
    served: Served, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    reply = await ask(served.port, request("GET", path))
    assert is_problem(reply, 504)
    assert reply.json["detail"] == "the handler did not begin its answer within 2 s"
    assert reply.headers["Connection"] == "close"
    assert [message for message in caplog.messages if message != "slow request"] == ["a handler failed"]
    assert "TimeoutError: the handler did not begin its answer within 2 s" in caplog.text


async def test_requests_of_a_connection_each_have_the_whole_time(served: Served) -> None:
    async with connected(served.port) as wire:
        for _ in range(3):
            await wire.send(request("POST", "/read", body=b"x"))
            assert (await wire.reply()).body == b"x"


@pytest.mark.parametrize("path", ["/patient", "/view"])
async def test_route_can_have_more_time_for_its_handler(served: Served, path: str) -> None:
    assert (await ask(served.port, request("GET", path))).body == b"patient"


async def test_handler_that_answers_although_it_was_cancelled_is_heard(served: Served) -> None:
    assert (await ask(served.port, request("GET", "/stubborn"))).body == b"anyway"


@pytest.mark.parametrize(
    ("path", "failures", "leaves"),
    [("/deaf", 1, False), ("/deaf?fail", 2, False), ("/deaf?fail", 2, True), ("/deaf-and-direct", 1, False)],
)
async def test_handler_that_ignores_its_cancellation_is_logged_and_its_client_gets_504(
    served: Served, path: str, failures: int, leaves: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(served.port) as wire:
        await wire.send(request("GET", path))
        if not leaves:
            reply = await wire.reply()
            assert is_problem(reply, 504)
            assert reply.json["detail"] == "the handler ignores its cancellation"
            await wire.closed()
    await eventually(lambda: [record for record in caplog.records if record.levelname == "ERROR"], 5 * SLACK)
    await asyncio.sleep(_DEAF_SECONDS)  # The handler has ended then.
    records = [record for record in caplog.records if record.levelname == "ERROR"]
    assert [record.getMessage() for record in records] == ["a handler failed"] * failures
    assert "TimeoutError: the handler ignores its cancellation" in caplog.text
    assert {vars(record)["route"] for record in records} == {path.partition("?")[0]}
    page = (await ask(served.admin_port, request("GET", "/metrics"))).body.decode()
    [line] = [line for line in page.splitlines() if line.startswith("http_request_duration_seconds_count") and "/deaf" in line]
    assert 'status="504"' in line
    assert line.endswith(" 1.0")


@pytest.mark.parametrize(("path", "status"), [("/read", 408), ("/upload", 200)])
async def test_route_can_have_more_time_for_its_body(served: Served, path: str, status: int) -> None:
    async with connected(served.port) as wire:
        await wire.send(request("POST", path, "Content-Length: 5"))
        for _ in range(5):
            await wire.send(b"x")
            await asyncio.sleep(0.9)
        reply = await wire.reply()
    assert reply.status == status
    if status == 200:  # The handler's own time began when the body was complete.
        assert reply.body == b"xxxxx"


@pytest.mark.parametrize("path", ["/brief", "/view"])
async def test_route_can_have_less_time_and_the_408_names_its_time(served: Served, path: str) -> None:
    reply = await ask(served.port, request("POST", path, "Content-Length: 5"))
    assert is_problem(reply, 408)
    assert reply.json["detail"] == "the body did not arrive within 0.2 s"


async def test_handler_that_does_not_read_a_body_that_never_arrives_is_cancelled(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(served.port) as wire:
        await wire.send(request("POST", "/slow", "Content-Length: 5"))
        while await wire.more():
            pass
        async with asyncio.timeout(6):
            while served.running._factories[0]._tasks:
                await asyncio.sleep(0.01)


async def test_websocket_is_refused_with_a_line_that_says_so(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    headers = (
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
        "Sec-WebSocket-Version: 13",
    )
    assert is_problem(await ask(served.port, request("GET", "/socket", *headers)), 500)
    assert "NotImplementedError: WebSockets are not supported" in caplog.text


def test_time_limit_that_is_not_positive_is_an_error_at_once() -> None:
    for wrong in (0, -1.0):
        with pytest.raises(ValueError, match="positive"):
            time_limits(handle=wrong)


def test_time_limit_of_a_direct_route_is_an_error_at_once() -> None:
    with pytest.raises(TypeError, match="direct route"):
        direct.add(web.Application(), "GET", "/", time_limits(handle=1)(lambda headers: begin(headers)))
