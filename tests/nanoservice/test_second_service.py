"""Test what the chassis gives a second service: probes, metrics, drain, errors, settings, logs and exit statuses."""

import ast
import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from nanoservice import config
from nanoservice.answer import Answer
from nanoservice.errors import ConfigError
from nanoservice.service import Service, create_app
from nanoservice.testing.proxy import Fate, Proxy
from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK, eventually
from tests.nanoservice import second_service
from tests.support import ROOT
from tests.support.process import Spawn, environment, metric

# The `__main__` of a service needs no more than this.
MAIN = """
import os, sys
from nanoservice.server import main
from tests.nanoservice.second_service import SERVICE
sys.exit(main(SERVICE, os.environ, []))
"""
COMMAND = sys.executable, "-c", MAIN


@pytest.fixture
async def greeter(valkey: Valkey) -> AsyncIterator[Served]:
    """Serve the second service."""
    async with serving(second_service.SERVICE, valkey.environ(GREETER_WORD="Hi")) as served:
        yield served


async def status(served: Served, path: str) -> int:
    async with served.client.get(path) as answer:
        return answer.status


def test_second_service_has_at_most_thirty_lines_of_code() -> None:
    source = (ROOT / "tests" / "nanoservice" / "second_service.py").read_text()
    docstrings = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
        for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }
    code = [line for number, line in enumerate(source.splitlines(), 1) if line.strip() and number not in docstrings]
    assert len(code) <= 30


async def test_second_service_has_its_own_route_counters_and_setting(greeter: Served) -> None:
    for name, number in (("ada", 1), ("ada", 2), ("bob", 1)):
        async with greeter.client.get(f"/greet/{name}") as answer:
            assert await answer.text() == f"Hi {name}, number {number}\n"


async def test_second_service_has_probes_version_document_and_options(greeter: Served) -> None:
    assert [await status(greeter, path) for path in ("/livez", "/readyz", "/version", "/openapi.json")] == [200] * 4
    async with greeter.client.get("/version") as answer:
        assert await answer.json() == {"name": "greeter", "version": "1.0"}
    async with greeter.client.options("/greet/ada") as answer:
        assert (answer.status, answer.headers["Allow"]) == (204, "GET,HEAD,OPTIONS")


async def test_errors_of_the_second_service_are_problem_details(greeter: Served) -> None:
    for method, path, expected in (("GET", "/", 404), ("GET", "/greet/1", 404), ("POST", "/greet/ada", 405)):
        async with greeter.client.request(method, path) as answer:
            assert (answer.status, answer.content_type) == (expected, "application/problem+json")
            assert (await answer.json())["status"] == expected


async def test_failing_redis_is_503_until_redis_works_again(
    greeter: Served, valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    valkey.kill()
    for _ in range(5):
        async with greeter.client.get("/greet/ada") as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
            assert (await answer.json())["detail"] == "Redis: it cannot be reached"
    assert len([line for line in caplog.messages if "cannot be reached" in line]) == 1
    assert await status(greeter, "/readyz") == 503
    valkey.start()
    await eventually(lambda: _is(greeter, "/greet/ada", 200), 2 * SLACK)
    await eventually(lambda: _is(greeter, "/readyz", 200), 2 * SLACK)
    assert await metric(greeter, "redis_up") == 1
    assert len([line for line in caplog.messages if line == "Redis works again"]) == 1


async def test_log_is_bounded_while_one_kind_of_work_fails_and_another_succeeds(
    greeter: Served, valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    valkey.run("ACL", "SETUSER", "default", "resetkeys", "~{greeter}:ada")
    for _ in range(20):
        assert [await status(greeter, f"/greet/{name}") for name in ("bob", "ada")] == [503, 200]
    assert caplog.messages == ["Redis fails: its user may not do this (NOPERM)", "Redis works again"]


async def test_command_whose_reply_is_lost_is_not_sent_again(valkey: Valkey) -> None:
    async with Proxy(valkey.port, lambda request: Fate.LOSE_REPLY if request.words[0] == b"INCRBY" else Fate.PASS) as proxy:
        async with serving(second_service.SERVICE, valkey.environ(REDIS_PORT=str(proxy.port))) as served:
            assert await status(served, "/greet/ada") == 503
    assert valkey.run("GET", "{greeter}:ada") == "1"


async def _is(served: Served, path: str, expected: int) -> bool:
    return await status(served, path) == expected


async def test_handlers_wait_for_a_connection_when_all_are_in_use(valkey: Valkey) -> None:
    async with serving(second_service.SERVICE, valkey.environ(REDIS_TIMEOUT=str(1 * SLACK))) as greeter:
        answers = await asyncio.gather(*(status(greeter, "/greet/ada") for _ in range(100)))
    assert set(answers) == {200}


async def test_requests_are_measured_by_route_template(greeter: Served) -> None:
    for name in ("ada", "bob"):
        assert await status(greeter, f"/greet/{name}") == 200
    async with greeter.client.get(f"http://127.0.0.1:{greeter.admin_port}/metrics") as answer:
        page = await answer.text()
    assert 'http_request_duration_seconds_count{method="GET",route="/greet/{name}",status="200"} 2.0' in page
    assert 'build_info{name="greeter",version="1.0"} 1.0' in page


async def test_second_service_drains(greeter: Served) -> None:
    greeter.running.drain()
    assert await status(greeter, "/readyz") == 503
    async with greeter.client.get("/greet/ada") as answer:
        assert (answer.status, answer.headers["Connection"]) == (200, "close")


def test_setting_of_the_second_service_is_checked_with_all_others() -> None:
    with pytest.raises(ConfigError) as caught:
        second_service.Config.read({"GREETER_WROD": "x", "BIND_PORT": "x"})
    assert caught.value.problems == [
        "GREETER_WROD is not a setting; the nearest is GREETER_WORD",
        "BIND_PORT must be a whole number from 0 to 65535",
    ]


async def test_second_service_logs_json_drains_and_exits_with_status_0(spawn: Spawn, valkey: Valkey) -> None:
    process = spawn(valkey.environ(BIND_HOST="127.0.0.1"), command=COMMAND)
    for number in (1, 2):
        async with aiohttp.request("GET", f"{process.url}greet/ada") as answer:
            assert await answer.text() == f"Hello ada, number {number}\n"
    assert process.end() == 0
    log = [line for line in process.log if line["message"] != "slow request"]  # a busy machine may have slow requests
    assert [line["message"].partition(";")[0] for line in log] == ["listening", "draining", "stopped"]
    assert all(line["level"] == "info" and line["time"] for line in log)


def test_bad_settings_are_all_reported_and_the_status_is_78() -> None:
    environ = {"GREETER_WROD": "s3cret", "BIND_PORT": "s3cret"}
    ended = subprocess.run(COMMAND, env=environment(environ), text=True, capture_output=True, timeout=60)
    assert ended.returncode == os.EX_CONFIG == 78
    assert "GREETER_WROD is not a setting" in ended.stderr
    assert "BIND_PORT must be" in ended.stderr
    assert "s3cret" not in ended.stdout + ended.stderr


def _plain(app: web.Application, config: config.Config) -> None:
    async def fail(request: web.Request) -> web.Response:
        raise RuntimeError("a secret detail")

    async def late(request: web.Request) -> web.Response:
        raise TimeoutError

    async def plain(request: web.Request) -> web.Response:
        return web.json_response({"plain": True})

    async def early(request: web.Request) -> web.StreamResponse:
        answer = Answer(b"early")
        await answer.prepare(request)  # a handler may prepare its answer itself
        return answer

    async def moved(request: web.Request) -> web.Response:
        raise web.HTTPFound("/plain")

    for handler in (fail, late, plain, early, moved):
        app.router.add_get(f"/{handler.__name__}", handler)


@pytest.fixture
async def plain(valkey: Valkey) -> AsyncIterator[Served]:
    """Serve a service whose handlers do what aiohttp allows: raise, redirect, or prepare the answer themselves."""
    async with serving(Service("plain", "1", config.Config, _plain), valkey.environ()) as served:
        yield served


async def test_handler_that_raises_is_a_500_that_reveals_nothing(plain: Served, caplog: pytest.LogCaptureFixture) -> None:
    async with plain.client.get("/fail") as answer:
        assert (answer.status, answer.content_type) == (500, "application/problem+json")
        assert "secret" not in await answer.text()
    assert "RuntimeError: a secret detail" in caplog.text
    assert await status(plain, "/late") == 504


async def test_answer_that_a_handler_has_begun_is_written_once(plain: Served) -> None:
    for _ in range(2):
        async with plain.client.get("/early") as answer:
            assert await answer.text() == "early"


async def test_plain_answers_of_aiohttp_work_and_name_no_version(plain: Served) -> None:
    async with plain.client.get("/moved") as answer:
        assert await answer.json() == {"plain": True}
        assert "Server" not in answer.headers
        assert answer.history[0].status == 302
        assert "Server" not in answer.history[0].headers
    plain.running.drain()
    async with plain.client.get("/plain") as answer:
        assert answer.headers["Connection"] == "close"


async def test_handlers_can_be_tested_with_the_client_of_pytest_aiohttp(valkey: Valkey, aiohttp_client: Any) -> None:
    client = await aiohttp_client(create_app(second_service.SERVICE, second_service.Config.read(valkey.environ())))
    assert await (await client.get("/greet/ada")).text() == "Hello ada, number 1\n"
