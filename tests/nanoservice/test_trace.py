"""Log lines and problem details of a request have its method, its route and its W3C trace id."""

import asyncio
import io
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web

from nanoservice import config, direct
from nanoservice.answer import Answer
from nanoservice.direct import Content, Headers
from nanoservice.errors import ProblemError, UnavailableError
from nanoservice.service import Service
from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey
from nanoservice.trace import TRACEPARENT, Trace
from tests.support.wire import ask, connected, is_problem, request

ID, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
VALID = f"00-{ID}-{PARENT}-01"
HEADER = f"Traceparent: {VALID}"

_logger = logging.getLogger(__name__)


def setup(app: web.Application, config: config.Config) -> None:
    def begin(headers: Headers) -> tuple["asyncio.Future[None]", Callable[[None], Content]]:
        if "Fail" in headers:
            raise RuntimeError("at once")
        future = asyncio.get_running_loop().create_future()
        future.set_exception(UnavailableError("later"))
        return future, lambda _: (b"", b"")

    def begin_well(headers: Headers) -> tuple["asyncio.Future[None]", Callable[[None], Content]]:
        _logger.info("begun directly")
        future = asyncio.get_running_loop().create_future()
        future.set_result(None)
        return future, lambda _: (b"", b"well")

    async def work() -> None:
        _logger.info("in a task")

    async def handler(request: web.Request) -> Answer:
        _logger.info("in a handler", extra={"method": "own"})
        await asyncio.create_task(work())
        await asyncio.to_thread(_logger.info, "in a thread")
        raise ProblemError(409, "no")

    direct.add(app, "GET", "/direct", begin)
    direct.add(app, "GET", "/well", begin_well)
    app.router.add_get("/plain/{name}", handler)


@pytest.fixture
async def served(valkey: Valkey) -> AsyncIterator[Served]:
    async with serving(Service("traced", "1", config.Config, setup), valkey.environ()) as it:
        yield it


def lines(log: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.getvalue().splitlines()]


@pytest.mark.parametrize(
    "traceparent", [VALID, f"01-{ID}-{PARENT}-00", f"cc-{ID}-{PARENT}-01-what-will-come", f"01-{ID}-{PARENT}-00-"]
)
def test_id_of_a_valid_traceparent_is_kept(traceparent: str) -> None:
    assert Trace("GET", {TRACEPARENT: traceparent}).id == ID


@pytest.mark.parametrize(
    "traceparent",
    [
        "", "x", VALID.upper(), f"{VALID}-", f"{VALID}-x", f"{VALID}x", VALID[:-1], f" {VALID}", f"ff-{ID}-{PARENT}-01",
        f"0-{ID}-{PARENT}-01", f"00-{'0' * 32}-{PARENT}-01", f"00-{ID}-{'0' * 16}-01", f"00-{ID[1:]}-{PARENT}-01",
        f"00-{ID}-{PARENT}-0x", f"01-{ID}-{PARENT}-00x", f"00-{chr(0x660) * 32}-{PARENT}-01",
    ],
)  # fmt: skip
def test_new_id_replaces_an_invalid_traceparent(traceparent: str) -> None:
    traces = [Trace("GET", {TRACEPARENT: traceparent}) for _ in range(2)]
    assert all(trace.id == trace.id and len(trace.id) == 32 and int(trace.id, 16) for trace in traces)
    assert len({ID, *(trace.id for trace in traces)}) == 3


@pytest.mark.parametrize("headers", [(), ("Fail: yes",)])
@pytest.mark.parametrize("query", ["", "?q"])  # With a query, aiohttp answers the request.
async def test_problem_and_lines_of_one_request_have_the_same_trace(
    served: Served, log: io.StringIO, headers: tuple[str, ...], query: str
) -> None:
    async with connected(served.port) as wire:
        for given in ((HEADER,), ()):
            log.truncate(log.seek(0))
            await wire.send(request("GET", f"/direct{query}", *given, *headers))
            reply = await wire.reply()
            assert is_problem(reply, 500 if headers else 503)
            assert (reply.json["trace_id"] == ID) is bool(given)
            assert [line["message"] for line in lines(log)] == ["a handler failed"] * bool(headers) + ["request"]
            for line in lines(log):
                assert (line["method"], line["route"], line["trace_id"]) == ("GET", "/direct", reply.json["trace_id"])
            if headers:
                break  # an unexpected error closes the connection


async def test_trace_of_a_request_ends_with_it(served: Served, log: io.StringIO) -> None:
    await ask(served.port, request("GET", "/well", HEADER) + request("GET", "/well") + request("GET", "/plain/x"))
    async with connected(served.port) as wire:
        await wire.send(request("GET", "/plain/x", HEADER), request("GET", "/well"), request("GET", "/nowhere"))
        for _ in range(3):
            await wire.reply()
    assert not [line for line in lines(log) if line["message"] == "begun directly" and "trace_id" in line]
    ids = [line["trace_id"] for line in lines(log) if line["message"] == "request"]
    assert ids.count(ID) == 2
    assert len(set(ids)) == len(ids) - 1


async def test_lines_of_a_handler_and_of_its_tasks_and_threads_have_its_trace(served: Served, log: io.StringIO) -> None:
    reply = await ask(served.port, request("GET", "/plain/s3cret", HEADER))
    assert (reply.status, reply.json["trace_id"]) == (409, ID)
    found = {line["message"]: (line["method"], line["route"], line["trace_id"]) for line in lines(log)}
    route = "/plain/{name}"
    assert found == {
        "in a handler": ("own", route, ID),
        **dict.fromkeys(("in a task", "in a thread", "request"), ("GET", route, ID)),
    }


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (request("GET", "/nowhere", HEADER), 404),
        (request("POST", "/direct", HEADER), 405),
        (request("GET", "/direct", HEADER, "Expect: x"), 417),
        (f"GET / HTTP/1.1\r\nHost: a b\r\n{HEADER}\r\n\r\n".encode(), 400),
    ],
)
async def test_every_problem_has_the_trace_id(served: Served, data: bytes, status: int) -> None:
    reply = await ask(served.port, data)
    assert is_problem(reply, status)
    assert reply.json["trace_id"] == ID


async def test_nothing_of_a_long_traceparent_is_kept(served: Served) -> None:
    async with connected(served.port) as wire:
        await wire.send(request("GET", "/well", "Traceparent: " + "x" * 8000))
        assert (await wire.reply()).body == b"well"
        await wire.send(request("GET", "/direct", f"Traceparent: 01-{ID}-{PARENT}-01-" + "x" * 8000))
        assert (await wire.reply()).json["trace_id"] == ID
        [connection] = served.running._factories[0].connections
        assert connection._trace is None
