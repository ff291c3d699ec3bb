"""Shutdown: no accepted request is lost, and nothing delays the exit beyond its limits."""

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from nanoservice import server
from nanoservice.config import Config
from nanoservice.service import Service
from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK, eventually, wait_for
from tests.nanoservice.sample import HITS, SERVICE
from tests.support import ROOT
from tests.support.process import Process, Spawn, check_requests_in_flight, environment, interrupted, metric
from tests.support.wire import connected, request


async def load_until_not_ready(process: Process) -> tuple[int, list[str]]:
    """Send requests over eight connections until `/readyz` is 503; return the number of answers, and the failures."""
    answered, failures = 0, []
    stop = asyncio.Event()

    async def watch(client: aiohttp.ClientSession) -> None:
        while not stop.is_set():
            async with client.get(process.url + "readyz") as answer:
                if answer.status == 503:
                    stop.set()
            await asyncio.sleep(0.02)

    async def send(client: aiohttp.ClientSession) -> None:
        nonlocal answered
        while not stop.is_set():
            try:
                async with client.get(process.url) as answer:
                    await answer.read()
                    if answer.status != 200:
                        failures.append(str(answer.status))
                    answered += 1
            except aiohttp.ClientError as error:
                failures.append(repr(error))

    async with asyncio.timeout(30), aiohttp.ClientSession() as client:
        await asyncio.gather(watch(client), *(send(client) for _ in range(8)))
    return answered, failures


async def test_no_request_fails_over_twenty_restarts_with_a_drain(valkey: Valkey, spawn: Spawn) -> None:
    rounds, at_a_time = 5, 4
    total = 0

    async def restart() -> None:
        nonlocal total
        process = await asyncio.to_thread(spawn, valkey.environ(DRAIN_SECONDS="2"))
        load = asyncio.create_task(load_until_not_ready(process))
        await asyncio.sleep(0.3)  # the load runs before the shutdown begins
        ending = asyncio.create_task(asyncio.to_thread(process.end))
        answered, failures = await load
        assert not failures
        assert await ending == 0
        total += answered

    for _ in range(rounds):
        await asyncio.gather(*(restart() for _ in range(at_a_time)))
    print(f"{rounds * at_a_time} restarts, {total} requests, none failed")
    assert total > rounds * at_a_time * 10
    assert int(valkey.run("GET", HITS)) == total


async def test_service_keeps_serving_and_closes_each_connection_during_a_drain(valkey: Valkey, spawn: Spawn) -> None:
    process = spawn(valkey.environ(DRAIN_SECONDS=str(SLACK)))
    async with aiohttp.ClientSession() as client:
        async with client.get(process.url) as answer:
            assert "Connection" not in answer.headers
        process.popen.send_signal(signal.SIGTERM)
        await asyncio.to_thread(wait_for, lambda: process.logged("draining"), 5)
        for path in ("", "version", "livez"):
            async with client.get(process.url + path) as answer:
                assert answer.status == 200
                assert answer.headers["Connection"] == "close"
        async with client.get(process.url + "readyz") as answer:
            assert answer.status == 503
            assert "draining" in (await answer.json())["detail"]
    assert process.end(0) == 0


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_exit_status_is_0_after_either_signal(valkey: Valkey, spawn: Spawn, how: int) -> None:
    process = spawn(valkey.environ())
    began = time.monotonic()
    assert process.end(how) == 0
    assert time.monotonic() - began < 1 * SLACK
    assert process.log[-1]["message"] == "stopped"


async def pending(service: Process | Served, number: int) -> bool:
    return await metric(service, "sample_pending") == number


async def test_requests_in_flight_are_answered(valkey: Valkey, spawn: Spawn) -> None:
    await check_requests_in_flight(spawn(valkey.environ(REDIS_TIMEOUT="10")), valkey, "sample_pending")


async def test_requests_that_never_finish_are_waited_for_once(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "FINISH_SECONDS", 3.0)
    async with contextlib.AsyncExitStack() as stack:
        async with serving(SERVICE, valkey.environ(REDIS_TIMEOUT="60")) as served:
            valkey.freeze()
            for port, data in (
                (served.port, request()),  # the handler waits for Redis
                (served.port, request("POST", "/", "Content-Length: 9")),  # the handler waits for the body
                (
                    served.admin_port,
                    request("GET", "/metrics", "Content-Length: 9"),
                ),  # the answer is sent before the body is complete
            ):
                await (await stack.enter_async_context(connected(port))).send(data)
            deaf = await stack.enter_async_context(connected(served.port))  # this client reads no answers
            deaf.reader._transport.pause_reading()  # type: ignore[attr-defined] # only a private name can pause a stream
            with pytest.raises(TimeoutError):
                while True:
                    deaf.writer.write(request("GET", "/openapi.json") * 1000)
                    await asyncio.wait_for(deaf.writer.drain(), 0.3)
            await eventually(lambda: pending(served, 1), 5)
            began = time.monotonic()
        assert 3 <= time.monotonic() - began < 5.9  # the requests share one limit of 3 s


async def test_second_signal_stops_at_once(valkey: Valkey, spawn: Spawn) -> None:
    process = spawn(valkey.environ(DRAIN_SECONDS="60"))
    process.popen.send_signal(signal.SIGTERM)
    wait_for(lambda: process.logged("draining"), 5)
    began = time.monotonic()
    assert process.end(signal.SIGTERM) == 128 + signal.SIGTERM
    assert time.monotonic() - began < 1 * SLACK


async def test_dns_lookup_that_hangs_does_not_delay_the_exit(spawn: Spawn) -> None:
    # This test makes a DNS look-up of asyncio's own event loop hang. A test with uvloop would need a cluster without DNS.
    hangs = "import runpy, socket, time; socket.getaddrinfo = lambda *_, **__: time.sleep(60);"
    hangs += "runpy.run_module('tests.nanoservice.sample', run_name='__main__')"
    environ = {"REDIS_HOST": "redis", "REDIS_TIMEOUT": "0.1", "BIND_PORT": "0", "ADMIN_PORT": "0"}
    process = spawn(environ, command=(sys.executable, "-c", hangs), loop="asyncio")
    async with aiohttp.request("GET", process.url) as answer:
        assert answer.status == 503
    began = time.monotonic()
    assert await asyncio.to_thread(process.end) == 0
    assert time.monotonic() - began < 3 * SLACK
    assert process.log[-1]["message"] == "stopped"


@pytest.mark.parametrize("iterations", range(4))
async def test_connection_that_was_just_accepted_does_not_delay_the_shutdown(valkey: Valkey, iterations: int) -> None:
    async with serving(SERVICE, valkey.environ()) as it:
        with contextlib.ExitStack() as clients:
            for _ in range(5):
                client = clients.enter_context(socket.create_connection(("127.0.0.1", it.port)))
                client.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
            for _ in range(iterations):  # let the event loop run before the service is closed
                await asyncio.sleep(0)
            began = time.monotonic()
            await it.running.close()
            assert time.monotonic() - began < 1 * SLACK


@pytest.mark.parametrize("iterations", range(4))
async def test_connections_that_the_kernel_has_queued_are_answered(valkey: Valkey, iterations: int) -> None:
    async with serving(SERVICE, valkey.environ()) as it:
        with contextlib.ExitStack() as clients:

            def connect(number: int, data: bytes = b"") -> list[socket.socket]:
                sockets = [clients.enter_context(socket.create_connection(("127.0.0.1", it.port), 10)) for _ in range(number)]
                for client in sockets:
                    client.sendall(data)
                return sockets

            sockets = connect(40, request("GET", "/livez"))
            for _ in range(
                iterations
            ):  # asyncio's loop accepts 16 connections an iteration, and serves them in the next iteration
                await asyncio.sleep(0)
            sockets += connect(200, request("GET", "/livez"))
            silent = connect(40)
            closing = asyncio.create_task(it.running.close())
            await asyncio.sleep(0.05)
            for client in silent:  # these requests arrive a moment after their connections
                client.sendall(request("GET", "/livez"))
            await closing
            answers = [client.recv(4096) for client in sockets + silent]
        assert {answer[:12] for answer in answers} == {b"HTTP/1.1 200"}
        # The first connections may have been answered before the shutdown began.
        assert all(b"Connection: close" in answer for answer in answers[40:])


def logged(caplog: pytest.LogCaptureFixture, message: str) -> dict[str, Any]:
    """Return the fields of the one log record with this message."""
    [record] = [record for record in caplog.records if record.message == message]
    return vars(record)


async def test_number_of_connections_that_are_cut_off_is_logged(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "FINISH_SECONDS", 0.5)
    async with contextlib.AsyncExitStack() as stack:
        async with serving(SERVICE, valkey.environ(REDIS_TIMEOUT="60")) as served:
            valkey.freeze()
            for _ in range(3):
                await (await stack.enter_async_context(connected(served.port))).send(request(), request())
            await stack.enter_async_context(connected(served.port))  # An idle connection has no request that is cut off.
            await eventually(lambda: pending(served, 3), 5)
    assert logged(caplog, "requests were cut off: they took too long")["connections"] == 3


async def test_second_signal_logs_the_number_of_connections_that_are_cut_off(valkey: Valkey, spawn: Spawn) -> None:
    process = spawn(valkey.environ(REDIS_TIMEOUT="60", DRAIN_SECONDS="60"))
    valkey.freeze()
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(2):
            await (await stack.enter_async_context(connected(process.port))).send(request())
        await stack.enter_async_context(connected(process.port))
        await eventually(lambda: pending(process, 2), 5)
        process.popen.send_signal(signal.SIGTERM)
        await asyncio.to_thread(wait_for, lambda: process.logged("draining"), 5)
        assert await asyncio.to_thread(process.end, signal.SIGINT) == 128 + signal.SIGINT
    [line] = [line for line in process.log if line["message"] == "stopped by a second signal: requests in flight were cut off"]
    assert line["connections"] == 2


async def test_clean_up_that_fails_is_reported(valkey: Valkey) -> None:
    async def failing(app: web.Application) -> AsyncIterator[None]:
        yield
        raise ValueError("why")

    service = Service("sample", "1.0", Config, lambda app, config: app.cleanup_ctx.append(failing))
    with pytest.raises(ValueError, match="why"):
        async with serving(service, valkey.environ()):
            pass


HANGS = """
import asyncio, os, sys
from nanoservice.config import Config
from nanoservice.server import main
from nanoservice.service import Service

async def first(app):
    yield
    print('the first resource is closed', file=sys.stderr, flush=True)

async def hanging(app):
    {start}
    yield
    {close}

async def forever():
    print('hangs', file=sys.stderr, flush=True)
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if {obeys}:
                raise

sys.exit(main(Service("sample", "1.0", Config, lambda app, config: app.cleanup_ctx.extend([first, hanging])), os.environ, []))
"""


def stop_while_it_hangs(valkey: Valkey, signals: Sequence[int], **code: str) -> tuple[int, str, float]:
    """Run a service that hangs where `code` says, send `signals` once it hangs; return status, output, and seconds."""
    command = [sys.executable, "-c", HANGS.format(**{"start": "pass", "close": "pass", "obeys": "True", **code})]
    with subprocess.Popen(
        command, env=environment(valkey.environ(LOG_FORMAT="json")), cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        if "start" not in code:
            assert process.stdout
            assert "listening" in process.stdout.readline()
            process.send_signal(signals[0])
            signals = signals[1:]
        assert process.stderr
        assert process.stderr.readline() == "hangs\n"
        began = time.monotonic()
        for number in signals:
            process.send_signal(number)
            time.sleep(0.3)  # two signals that arrive together count as one
        status, said = interrupted(process)
    return status, said, time.monotonic() - began


def test_start_that_hangs_stops_at_the_first_signal(valkey: Valkey) -> None:
    status, said, seconds = stop_while_it_hangs(valkey, [signal.SIGTERM], start="await forever()")
    assert (status, seconds < 2 * SLACK) == (0, True)
    assert '"message": "the start was not completed", "resources": ["hanging"]' in said
    assert "the first resource is closed" in said


def test_start_that_ignores_the_first_signal_stops_at_the_second(valkey: Valkey) -> None:
    both = [signal.SIGTERM, signal.SIGTERM]
    status, _, seconds = stop_while_it_hangs(valkey, both, start="await forever()", obeys="False")
    assert (status, seconds < 2 * SLACK) == (128 + signal.SIGTERM, True)


@pytest.mark.parametrize("obeys", ["True", "False"])
def test_clean_up_that_hangs_is_ended_in_time_and_the_log_names_it(valkey: Valkey, obeys: str) -> None:
    status, said, seconds = stop_while_it_hangs(valkey, [signal.SIGTERM], close="await forever()", obeys=obeys)
    limit = server.CLEAN_UP_SECONDS + server.CLOSE_SECONDS
    assert (status, limit - 2 < seconds < limit + 2 * SLACK) == (0, True)
    assert '"message": "a resource takes too long to close", "resources": ["hanging"]' in said
    assert ("the first resource is closed" in said) == (obeys == "True")  # after the hanging one is cancelled
