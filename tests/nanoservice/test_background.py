"""A background task that fails is logged and counted at once, makes the process unready, and is started again."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web

from nanoservice import background, config
from nanoservice.redis import STORE
from nanoservice.service import Service
from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK, eventually
from tests.support.process import metric
from tests.support.wire import ask, is_problem, request


def service(**works: Callable[[], Awaitable[None]]) -> Service[config.Config]:
    def setup(app: web.Application, config: config.Config) -> None:
        for name, work in works.items():
            background.add(app, name, work)

    return Service("busy", "1", config.Config, setup)


async def ready(served: Served) -> bool:
    return (await ask(served.port, request("GET", "/readyz"))).status == 200


async def test_task_that_fails_once_is_reported_and_runs_again(valkey: Valkey, caplog: pytest.LogCaptureFixture) -> None:
    calls = 0

    async def work() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise LookupError("why")
        await asyncio.Event().wait()

    async with serving(service(work=work), valkey.environ()) as served:
        await eventually(lambda: caplog.messages, SLACK)
        reply = await ask(served.port, request("GET", "/readyz"))
        assert is_problem(reply, 503)
        assert reply.json["detail"] == "a background task has failed: work"
        assert await metric(served, "background_task_failures_total") == 1
        assert (await ask(served.port, request("GET", "/livez"))).status == 200
        await eventually(lambda: ready(served), 2 * SLACK)
    assert calls == 2
    assert caplog.messages == ["a background task failed"]
    assert caplog.records[0].exc_info
    assert vars(caplog.records[0])["task"] == "work"


async def test_delay_doubles_up_to_its_maximum_and_begins_again_after_a_long_run(
    valkey: Valkey, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "_FIRST_DELAY", 0.05)
    monkeypatch.setattr(background, "_MAX_DELAY", 0.4)
    calls = 0

    async def work() -> None:
        nonlocal calls
        calls += 1
        await asyncio.sleep(1 if calls == 6 else 0)
        raise asyncio.CancelledError if calls % 2 else ValueError

    async with serving(service(work=work), valkey.environ()):
        await eventually(lambda: len(caplog.records) >= 7, 3 * SLACK)
    delays = [vars(record)["seconds_until_retry"] for record in caplog.records]
    assert delays[:7] == [0.05, 0.1, 0.2, 0.4, 0.4, 0.05, 0.1]


async def test_outage_of_redis_is_not_a_failure_of_the_task_and_is_retried_soon(
    valkey: Valkey, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "_FIRST_DELAY", 0.2)
    monkeypatch.setattr(background, "_MAX_REDIS_DELAY", 0.4)

    def setup(app: web.Application, config: config.Config) -> None:
        async def by_client() -> None:
            while True:
                await app[STORE].client.set("n", 1)
                await asyncio.sleep(0.05)

        async def by_own_connection() -> None:
            connection = app[STORE].connection()
            await connection.connect()
            try:
                await connection.send_command("BLPOP", "list", 0)
                await connection.read_response()
            finally:
                await connection.disconnect(nowait=True)

        background.add(app, "client", by_client)
        background.add(app, "connection", by_own_connection)

    def delays(task: str) -> list[float]:
        failures = [vars(record) for record in caplog.records if record.getMessage() == "a background task failed"]
        return [failure["seconds_until_retry"] for failure in failures if failure["task"] == task]

    async with serving(Service("busy", "1", config.Config, setup), valkey.environ()) as served:
        assert await ready(served)
        valkey.kill()
        await eventually(lambda: len(delays("client")) >= 4 and len(delays("connection")) >= 4, 2 * SLACK)
        assert (await ask(served.port, request("GET", "/readyz"))).json["detail"] == "Redis: it cannot be reached"
        assert delays("client")[:4] == delays("connection")[:4] == [0.2, 0.4, 0.4, 0.4]
        assert not any(record.exc_info for record in caplog.records)
        valkey.start()
        await eventually(lambda: ready(served), SLACK)


@pytest.mark.parametrize("wrong", ["a wrong command", "a refusal"])
async def test_task_whose_command_redis_refuses_is_a_failure(
    valkey: Valkey, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.setattr(background, "_MAX_REDIS_DELAY", 0.5)

    def setup(app: web.Application, config: config.Config) -> None:
        async def work() -> None:
            await app[STORE].client.incr("list")

        background.add(app, "work", work)

    valkey.run("RPUSH", "list", "x")
    if wrong == "a refusal":
        valkey.run("ACL", "SETUSER", "default", "-incrby")
    async with serving(Service("busy", "1", config.Config, setup), valkey.environ()) as served:
        await eventually(lambda: "a background task failed" in caplog.messages, SLACK)
        assert (await ask(served.port, request("GET", "/readyz"))).json["detail"] == "a background task has failed: work"
        [record, *_] = [record for record in caplog.records if record.getMessage() == "a background task failed"]
        assert vars(record)["seconds_until_retry"] == (0.5 if wrong == "a refusal" else background._FIRST_DELAY)


async def test_tasks_end_with_the_service_and_one_may_end_before(valkey: Valkey, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ended = []

    async def short() -> None:
        ended.append("short")

    async def long() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("long")

    async with serving(service(short=short, long=long), valkey.environ()) as served:
        await eventually(lambda: ended, SLACK)
        assert await ready(served)
    assert ended == ["short", "long"]
    assert not caplog.messages


async def test_task_that_does_not_end_is_named_at_the_shutdown(
    valkey: Valkey, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanoservice.server.CLEAN_UP_SECONDS", 0.2)
    release = asyncio.Event()

    async def work() -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    async with serving(service(work=work), valkey.environ()):
        pass
    release.set()
    [record] = [record for record in caplog.records if record.getMessage() == "a resource takes too long to close"]
    assert vars(record)["resources"] == ["background task work"]
