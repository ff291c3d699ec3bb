"""A handler that fails is logged with its traceback and measured, and its request is answered where that is possible."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web

from nanoservice import config, failures
from nanoservice.answer import Answer
from nanoservice.errors import ProblemError, header_lines
from nanoservice.service import Service
from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey
from nanoservice.trace import Trace
from tests.support.process import metric
from tests.support.wire import ask, connected, is_problem, request


async def nothing(request: web.Request) -> web.StreamResponse:
    return None  # type: ignore[return-value] # a wrong type on purpose


async def text(request: web.Request) -> web.StreamResponse:
    return "text"  # type: ignore[return-value] # a wrong type on purpose


async def status_499(request: web.Request) -> web.StreamResponse:
    raise ProblemError(499, "no such status")


async def no_error(request: web.Request) -> web.StreamResponse:
    raise ProblemError(200, "not an error")


async def answer_299(request: web.Request) -> web.StreamResponse:
    return Answer(b"", status=299)


async def answer_204_with_a_body(request: web.Request) -> web.StreamResponse:
    return Answer(b"x", status=204)


async def answer_that_becomes_304(request: web.Request) -> web.StreamResponse:
    answer = Answer(b"x")
    answer.set_status(304)
    return answer


async def answer_without_a_body(request: web.Request) -> web.StreamResponse:
    return Answer(None)


async def answer_with_a_date_set_later(request: web.Request) -> web.StreamResponse:
    answer = Answer(b"x")
    answer.headers["Date"] = "Mon, 01 Jan 2024 00:00:00 GMT"
    return answer


async def answer_with_a_length_set_later(request: web.Request) -> web.StreamResponse:
    answer = Answer(b"x")
    answer.content_length = 2
    return answer


async def http_exception_499(request: web.Request) -> web.StreamResponse:
    class Closed(web.HTTPClientError):
        status_code = 499

    raise Closed


async def euro(request: web.Request) -> web.StreamResponse:
    raise ProblemError(400, "no", {"X": "\u20ac"})


async def split_problem(request: web.Request) -> web.StreamResponse:
    raise ProblemError(400, "no", {"X": "a\r\nSet-Cookie: x=1"})


async def split_answer(request: web.Request) -> web.StreamResponse:
    return Answer(b"", b"X-Name: " + request.query["name"].encode() + b"\r\n")


async def split_answer_of_aiohttp(request: web.Request) -> web.StreamResponse:
    return web.Response(headers={"X-Name": request.query["name"]})


async def split_challenge(request: web.Request) -> web.StreamResponse:
    raise web.HTTPUnauthorized(headers={"WWW-Authenticate": request.query["name"]})


async def timeout(request: web.Request) -> web.StreamResponse:
    async with asyncio.timeout(0):
        await asyncio.sleep(1)
    raise AssertionError


async def _stream(request: web.Request) -> None:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b"begun")


async def stream(request: web.Request) -> web.StreamResponse:
    await _stream(request)
    raise ValueError("in the middle")


async def stream_then_problem(request: web.Request) -> web.StreamResponse:
    await _stream(request)
    raise ProblemError(400, "in the middle")


async def stream_then_http_exception(request: web.Request) -> web.StreamResponse:
    await _stream(request)
    raise web.HTTPNotFound


async def body(request: web.Request) -> web.StreamResponse:
    await request.json()
    return Answer(b"")


async def changed(request: web.Request) -> web.StreamResponse:
    return Answer(b"x", header_lines({"Content-Type": "text/plain", "Kept": "yes"}))


async def compressed(request: web.Request) -> web.StreamResponse:
    answer = Answer(b"x")
    answer.enable_compression()
    return answer


def setup(app: web.Application, config: config.Config) -> None:
    handlers = (
        nothing, text, status_499, no_error, answer_299, http_exception_499, euro, split_problem, split_answer,
        split_answer_of_aiohttp, split_challenge, timeout, stream, stream_then_problem, stream_then_http_exception, changed,
        compressed, answer_204_with_a_body, answer_that_becomes_304, answer_without_a_body,
        answer_with_a_date_set_later, answer_with_a_length_set_later,
    )  # fmt: skip
    for handler in handlers:
        app.router.add_get(f"/{handler.__name__}", handler)
    app.router.add_post("/body", body)


@pytest.fixture
async def failing(valkey: Valkey) -> AsyncIterator[Served]:
    async with serving(Service("failing", "1", config.Config, setup), valkey.environ()) as served:
        yield served


SPLIT = "?name=a%0d%0aSet-Cookie:%20x=1"


@pytest.mark.parametrize(
    "path",
    ["nothing", "text", "status_499", "no_error", "answer_299", "http_exception_499", "euro", "split_problem", "compressed"]
    + ["answer_204_with_a_body", "answer_that_becomes_304", "answer_without_a_body"]
    + ["answer_with_a_date_set_later", "answer_with_a_length_set_later"]
    + [f"{name}{SPLIT}" for name in ("split_answer", "split_answer_of_aiohttp", "split_challenge")],
)
async def test_answer_that_cannot_be_sent_becomes_a_500_that_is_logged_and_measured(
    failing: Served, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = await metric(failing, "http_request_duration_seconds_count")
    reply = await ask(failing.port, request("GET", f"/{path}"))
    assert is_problem(reply, 500)
    assert "Set-Cookie" not in reply.headers
    assert caplog.messages == ["a handler failed"]
    assert caplog.records[0].exc_info
    assert await metric(failing, "http_request_duration_seconds_count") == before + 1


async def test_504_names_its_cause_and_is_logged(failing: Served, caplog: pytest.LogCaptureFixture) -> None:
    reply = await ask(failing.port, request("GET", "/timeout"))
    assert is_problem(reply, 504)
    assert reply.json["detail"] == "a call of the handler timed out"
    assert "in timeout\n" in caplog.text


@pytest.mark.parametrize("path", ["stream", "stream_then_problem", "stream_then_http_exception"])
async def test_failure_after_the_answer_has_begun_closes_the_connection_and_is_logged_and_measured(
    failing: Served, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = await metric(failing, "http_request_duration_seconds_count")
    async with connected(failing.port) as wire:
        await wire.send(request("GET", f"/{path}"))
        while await wire.more():
            pass
    assert wire.received.count(b"HTTP/1.1") == 1
    assert not wire.received.endswith(b"0\r\n\r\n"), (
        "The last chunk is missing, so the client sees that the answer is incomplete."
    )
    assert caplog.messages == ["a handler failed"]
    assert caplog.records[0].exc_info
    assert await metric(failing, "http_request_duration_seconds_count") == before + 1


async def test_same_failure_is_logged_three_times_a_minute_then_with_its_number(
    failing: Served, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(20):
        await ask(failing.port, request("GET", "/euro"))
    await ask(failing.port, request("GET", "/text"))
    assert caplog.messages == ["a handler failed"] * 4
    monkeypatch.setattr(failures, "_PERIOD", 0.0)
    log = failing.running._factories[0].failures
    log._period_ends = 0.0
    log.flush()
    assert caplog.messages[4:] == ["a handler failed more often than logged"]
    line = vars(caplog.records[-1])
    assert (line["error"], line["omitted"]) == ("ValueError", 17)
    assert line["place"].partition(":")[0].endswith("nanoservice/errors.py")
    assert not log._seen


def test_failures_of_endless_kinds_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    log = failures.FailureLog(logging.getLogger("test"))
    for number in range(1000):
        log.log(type(f"Error{number}", (Exception,), {})(), Trace("GET", {}))
    assert len(caplog.messages) == failures._MAX_KINDS + failures._LOGGED
    assert len(log._seen) == failures._MAX_KINDS + 1


@pytest.mark.parametrize("data", [b"{", b"\xff", b"", b"[" * 100_000])
async def test_body_that_is_not_json_is_400_and_is_not_logged(
    failing: Served, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for _ in range(5):
        assert is_problem(
            await ask(failing.port, request("POST", "/body", "Content-Length: 0" if not data else "X: y", body=data)), 400
        )
    assert not caplog.messages


def _with(middlewares: list[Callable[..., Awaitable[web.StreamResponse]]], signals: bool) -> Service[config.Config]:
    def with_extras(app: web.Application, config: config.Config) -> None:
        setup(app, config)
        app.middlewares.extend(middlewares)
        if signals:
            app.on_response_prepare.append(_sign)

    return Service("changing", "1", config.Config, with_extras)


async def _sign(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Signed"] = "yes"


async def test_answer_honours_middlewares_cookies_and_signals(valkey: Valkey) -> None:
    @web.middleware
    async def change(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        response = await handler(request)
        response.content_type = "text/html"
        response.set_cookie("taste", "sweet")
        response.headers["Added"] = "yes"
        return response

    async with serving(_with([change], signals=True), valkey.environ()) as served:
        reply = await ask(served.port, request("GET", "/changed"))
    assert reply.body == b"x"
    assert reply.headers["Content-Type"] == "text/html"
    assert reply.headers["Set-Cookie"].startswith("taste=sweet")
    assert (reply.headers["Kept"], reply.headers["Added"], reply.headers["Signed"]) == ("yes", "yes", "yes")


def test_each_header_line_is_checked() -> None:
    assert header_lines({"A": "b", "C": "d\u00e9"}) == b"A: b\r\nC: d\xe9\r\n"
    for name, value in (("A", "b\r\nC: d"), ("A\r\nB", "c"), ("", "x"), ("A", "\n"), ("A", "\x00"), ("A:", "b")):
        with pytest.raises(ValueError, match="invalid name or value"):
            header_lines({name: value})
    Answer(b"", b"X: y\r\n")
    for lines in (b"X: y", b"X: y\r\nZ: a\r\n", b"X\r\n", b"X: \n\r\n"):
        with pytest.raises(ValueError, match="header_lines"):
            Answer(b"", lines)


@pytest.mark.parametrize("status", [100, 101, 103, 204, 299, 304])
def test_answer_whose_status_allows_no_body_is_refused_when_it_is_made(status: int) -> None:
    for body in (b"", b"x"):
        with pytest.raises(ValueError, match=str(status)):
            Answer(body, status=status)


@pytest.mark.parametrize("name", ["Content-Length", "transfer-encoding", "DATE", "Connection"])
def test_header_that_the_server_writes_itself_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        header_lines({"A": "b", name: "1"})
    with pytest.raises(ValueError, match=name):
        Answer(b"x", f"{name}: 1\r\n".encode())
    with pytest.raises(ValueError, match=name):
        ProblemError(400, "", {name: "1"})
