"""A Redis that may evict keys is reported when the service starts, as far as the service's user may see the settings."""

import asyncio

import pytest

from hitcounter.app import SERVICE
from nanoservice.testing.served import serving
from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK, eventually

REPORT = "Redis may evict keys: set its maxmemory-policy to noeviction"


async def test_policy_that_evicts_keys_is_reported_once(valkey: Valkey, caplog: pytest.LogCaptureFixture) -> None:
    valkey.run("CONFIG", "SET", "maxmemory", "100mb")
    valkey.run("CONFIG", "SET", "maxmemory-policy", "volatile-lru")
    async with serving(SERVICE, valkey.environ()):
        await eventually(lambda: REPORT in caplog.messages, 2 * SLACK)
    assert caplog.messages == [REPORT]
    assert vars(caplog.records[0])["policy"] == "volatile-lru"


@pytest.mark.parametrize("settings", [("100mb", "noeviction"), ("0", "allkeys-lru")])
async def test_redis_that_evicts_nothing_is_not_reported(
    valkey: Valkey, caplog: pytest.LogCaptureFixture, settings: tuple[str, str]
) -> None:
    for name, value in zip(("maxmemory", "maxmemory-policy"), settings, strict=True):
        valkey.run("CONFIG", "SET", name, value)
    await _serve_until_info_was_asked(valkey, {})
    assert not caplog.messages


async def test_user_who_may_not_run_info_causes_no_log_line(valkey: Valkey, caplog: pytest.LogCaptureFixture) -> None:
    valkey.run("ACL", "SETUSER", "svc", "on", ">password", "~*", "+@all", "-info")
    await _serve_until_info_was_asked(valkey, {"REDIS_USERNAME": "svc", "REDIS_PASSWORD": "password"})
    assert not caplog.messages


async def _serve_until_info_was_asked(valkey: Valkey, more: dict[str, str]) -> None:
    own = 0  # how many times the test itself has run INFO

    def asked() -> bool:
        nonlocal own
        with valkey.client() as client:
            seen = client.info("commandstats").get("cmdstat_info", {"calls": 0, "rejected_calls": 0})
        own += 1
        return int(seen["calls"]) + int(seen["rejected_calls"]) >= own  # INFO does not count itself.

    async with serving(SERVICE, valkey.environ(**more)) as served:
        await eventually(asked, 2 * SLACK)
        await asyncio.sleep(0.1)
        async with served.client.get("/readyz") as answer:
            assert answer.status == 200


async def test_report_waits_for_a_redis_that_is_down(valkey: Valkey, caplog: pytest.LogCaptureFixture) -> None:
    valkey.options = "--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"
    valkey.kill()
    async with serving(SERVICE, valkey.environ()):
        await asyncio.sleep(0.2)
        assert not caplog.messages
        valkey.start()
        await eventually(lambda: REPORT in caplog.messages, 6 * SLACK)
