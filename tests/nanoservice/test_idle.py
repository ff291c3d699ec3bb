"""Test connections to Redis that die while they are idle: the service opens them again, without a 503 and without a log line."""

import asyncio
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from redis import exceptions

from nanoservice.config import Config
from nanoservice.probes import Readiness
from nanoservice.redis import Store
from nanoservice.testing.proxy import Fate, Proxy
from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK, eventually
from tests.nanoservice.sample import SERVICE
from tests.support.process import metric
from tests.support.relay import relaying


async def statuses(served: Served) -> list[int]:
    """Return the statuses of a request and of `/readyz`. Then wait until the result of the readiness check is no longer valid."""
    found = []
    for path in ("/", "/readyz"):
        async with served.client.get(path) as answer:
            found.append(answer.status)
    await asyncio.sleep(1.1)  # the result of a readiness check is valid for 1 s
    return found


async def test_connections_that_are_reset_while_idle_cause_no_503_and_no_log_line(
    valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    async with relaying(valkey.port) as (relay, port), serving(SERVICE, valkey.environ(REDIS_PORT=str(port))) as served:
        assert await statuses(served) == [200, 200]
        relay.reset()
        await asyncio.sleep(0.1)  # until the resets have arrived
        assert await statuses(served) == [200, 200]
        assert await metric(served, "redis_up") == 1
    assert not [record for record in caplog.records if record.levelname not in ("DEBUG", "INFO")]


async def test_connections_that_redis_closes_while_idle_cause_no_503_and_no_log_line(
    valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(SERVICE, valkey.environ()) as served:
        assert await statuses(served) == [200, 200]
        valkey.run("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await asyncio.sleep(0.1)
        assert await statuses(served) == [200, 200]
        assert await metric(served, "redis_up") == 1
    assert not [record for record in caplog.records if record.levelname not in ("DEBUG", "INFO")]


async def test_connection_that_is_lost_in_an_exchange_raises_the_same_on_each_event_loop(valkey: Valkey) -> None:
    async with relaying(valkey.port) as (relay, port):
        connection: Any = Store(Config.read(valkey.environ(REDIS_PORT=str(port))), CollectorRegistry()).connection()
        await connection.connect()
        await connection.send_command("PING")
        await connection.read_response()
        relay.reset()
        await asyncio.sleep(0.1)  # until the reset has arrived
        with pytest.raises(exceptions.ConnectionError):
            await connection.send_command("PING")
            await connection.read_response()
        await connection.disconnect(nowait=True)


async def test_probe_whose_connection_is_lost_when_it_is_used_again_answers_200_and_logs_nothing(
    valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    async with Proxy(valkey.port) as proxy, serving(SERVICE, valkey.environ(REDIS_PORT=str(proxy.port))) as served:
        assert await statuses(served) == [200, 200]
        fates = iter([Fate.LOSE_REQUEST])
        proxy.fate = lambda request: next(fates, Fate.PASS) if request.words == [b"PING"] else Fate.PASS
        assert await statuses(served) == [200, 200]
        assert proxy.fates[Fate.LOSE_REQUEST] == 1
    assert not [record for record in caplog.records if record.levelname not in ("DEBUG", "INFO")]


async def test_readiness_check_that_raises_an_unexpected_exception_answers_503(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert (await statuses(served))[1] == 200

    async def fail(self: Readiness) -> None:
        raise RuntimeError("unexpected")

    with monkeypatch.context() as patch:
        patch.setattr(Readiness, "_ping", fail)
        for _ in range(3):
            async with served.client.get("/readyz") as answer:
                assert answer.status == 503
                assert (await answer.json())["detail"] == "this process cannot check Redis"
    assert caplog.messages.count("the check of Redis failed") == 1

    async def ready() -> bool:
        async with served.client.get("/readyz") as answer:
            return answer.status == 200

    await eventually(ready, 2 * SLACK)
