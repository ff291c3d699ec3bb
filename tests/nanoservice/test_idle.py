"""Connections to Redis that die while idle: they are opened again without a failed request and without a word."""

import asyncio

import pytest

from nanoservice.probes import Readiness
from nanoservice.testing.proxy import Fate, Proxy
from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK, eventually
from tests.nanoservice.sample import SERVICE
from tests.support.process import metric
from tests.support.relay import relaying


async def statuses(served: Served) -> list[int]:
    """Return what a request and the readiness probe are answered; the probe's answer is not a cached one."""
    found = []
    for path in ("/", "/readyz"):
        async with served.client.get(path) as answer:
            found.append(answer.status)
    await asyncio.sleep(1.1)  # until the next probe checks again
    return found


async def test_connections_that_are_reset_while_idle_are_no_news(valkey: Valkey, caplog: pytest.LogCaptureFixture) -> None:
    async with relaying(valkey.port) as (relay, port), serving(SERVICE, valkey.environ(REDIS_PORT=str(port))) as served:
        assert await statuses(served) == [200, 200]
        relay.reset()
        await asyncio.sleep(0.1)  # The resets arrive.
        assert await statuses(served) == [200, 200]
        assert await metric(served, "redis_up") == 1
    assert not [record for record in caplog.records if record.levelname not in ("DEBUG", "INFO")]


async def test_connections_that_redis_closes_while_idle_are_no_news(valkey: Valkey, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(SERVICE, valkey.environ()) as served:
        assert await statuses(served) == [200, 200]
        valkey.run("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await asyncio.sleep(0.1)
        assert await statuses(served) == [200, 200]
        assert await metric(served, "redis_up") == 1
    assert not [record for record in caplog.records if record.levelname not in ("DEBUG", "INFO")]


async def test_probe_whose_connection_is_lost_when_it_is_used_again_is_no_news(
    valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    async with Proxy(valkey.port) as proxy, serving(SERVICE, valkey.environ(REDIS_PORT=str(proxy.port))) as served:
        assert await statuses(served) == [200, 200]
        fates = iter([Fate.LOSE_REQUEST])
        proxy.fate = lambda request: next(fates, Fate.PASS) if request.words == [b"PING"] else Fate.PASS
        assert await statuses(served) == [200, 200]
        assert proxy.fates[Fate.LOSE_REQUEST] == 1
    assert not [record for record in caplog.records if record.levelname not in ("DEBUG", "INFO")]


async def test_probe_that_fails_in_a_way_that_nobody_foresaw_does_not_say_ready(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert (await statuses(served))[1] == 200

    async def fail(self: Readiness) -> None:
        raise RuntimeError("nobody foresaw this")

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
