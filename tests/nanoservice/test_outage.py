"""If Redis is down, hung, full or read-only, the service answers 503 with the cause, logs one line, and recovers by itself."""

import asyncio
import gc
import logging
import socket
import time
from collections import Counter
from typing import Any

import pytest

from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK, eventually
from tests.nanoservice.sample import SERVICE
from tests.support.process import metric
from tests.support.refusals import Act, refusals


async def get(served: Served, path: str = "/") -> tuple[int, dict[str, Any], float]:
    """Send a GET; return the status, the problem details (if any) and the duration in seconds."""
    began = time.monotonic()
    async with served.client.get(path) as answer:
        body = await answer.json() if answer.content_type.endswith("json") else {}
        assert (answer.status == 503) == ("detail" in body)
        if answer.status == 503:
            assert answer.headers["Retry-After"] == "1"
        return answer.status, body, time.monotonic() - began


async def is_ready(served: Served, ready: bool = True) -> bool:
    return (await get(served, "/readyz"))[0] == (200 if ready else 503)


async def test_service_starts_while_redis_is_down_and_becomes_ready_later(valkey: Valkey) -> None:
    valkey.end()
    async with serving(SERVICE, valkey.environ()) as served:
        assert (await get(served, "/livez"))[0] == 200
        assert (await get(served, "/readyz"))[0] == 503
        valkey.start()
        await eventually(lambda: is_ready(served), 2 * SLACK)
        assert (await get(served))[0] == 200


@pytest.mark.parametrize("hung", [False, True], ids=["down", "hung"])
async def test_requests_get_503_in_time_and_readyz_fails_until_redis_is_back(served: Served, valkey: Valkey, hung: bool) -> None:
    assert await is_ready(served)
    assert (await get(served))[0] == 200
    (valkey.freeze if hung else valkey.kill)()

    async def seconds_to(ready: bool) -> float:
        began = time.monotonic()
        await eventually(lambda: is_ready(served, ready), 2 * SLACK)
        return time.monotonic() - began

    unready = asyncio.create_task(seconds_to(ready=False))
    answers = await asyncio.gather(*(get(served) for _ in range(50)))
    assert {status for status, _, _ in answers} == {503}
    slowest = max(seconds for *_, seconds in answers)
    assert slowest < 2.3 * SLACK
    assert {body["detail"] for _, body, _ in answers} <= {
        "Redis: it does not answer in time", "Redis: it cannot be reached", "no connection to Redis is free",
    }  # fmt: skip
    assert (await get(served, "/livez"))[0] == 200
    assert await metric(served, "redis_up") == 0
    seconds_to_unready = await unready

    (valkey.thaw if hung else valkey.start)()
    ready = await seconds_to(ready=True)
    print(f"503 after {slowest:.2f} s, unready after {seconds_to_unready:.2f} s, ready {ready:.2f} s after its return")
    assert (await get(served))[0] == 200
    assert await metric(served, "redis_up") == 1


async def test_probe_that_succeeds_ends_an_outage_without_another_request(
    served: Served, valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    valkey.kill()
    assert (await get(served))[0] == 503
    valkey.start()
    await eventually(lambda: is_ready(served), 2 * SLACK)
    assert await metric(served, "redis_up") == 1
    assert caplog.messages[-1] == "Redis works again"


async def test_probe_that_succeeds_does_not_end_an_outage_in_which_redis_refuses_work(
    served: Served, valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    valkey.run("ACL", "SETUSER", "default", "-incrby")
    assert (await get(served))[0] == 503
    assert await is_ready(served)
    assert await metric(served, "redis_up") == 0
    valkey.run("ACL", "SETUSER", "default", "+incrby")
    assert (await get(served))[0] == 200
    assert await metric(served, "redis_up") == 1
    assert caplog.messages == ["Redis fails: its user may not do this (NOPERM)", "Redis works again"]


async def test_readiness_checks_redis_once_a_second_however_often_it_is_asked(served: Served, valkey: Valkey) -> None:
    def pings() -> int:
        with valkey.client() as client:
            return int(client.info("commandstats").get("cmdstat_ping", {"calls": 0})["calls"])

    before, began = pings(), time.monotonic()
    await asyncio.gather(*(get(served, "/readyz") for _ in range(200)))
    assert 1 <= pings() - before <= 1 + (time.monotonic() - began)


async def test_readiness_answers_within_a_second_while_redis_hangs(served: Served, valkey: Valkey) -> None:
    valkey.freeze()
    status, problem, seconds = await get(served, "/readyz")
    assert (status, problem["detail"]) == (503, "Redis: it does not answer in time")
    assert seconds < 1 * SLACK


@pytest.mark.parametrize(("breaks", "mends", "cause"), refusals(command="incrby"))
async def test_redis_that_refuses_is_named_once_and_recovered_from(
    served: Served, valkey: Valkey, caplog: pytest.LogCaptureFixture, breaks: Act, mends: Act, cause: str
) -> None:
    breaks(valkey)
    answers = [*await asyncio.gather(*(get(served) for _ in range(30))), *await asyncio.gather(*(get(served) for _ in range(30)))]
    assert {status for status, _, _ in answers} == {503}
    assert all(cause in body["detail"] for _, body, _ in answers)
    assert len([line for line in caplog.messages if cause in line]) == 1
    mends(valkey)

    async def works() -> bool:
        return (await get(served))[0] == 200

    await eventually(works, 4 * SLACK)
    assert len([line for line in caplog.messages if line == "Redis works again"]) == 1


async def _pending(served: Served, number: int) -> bool:
    return await metric(served, "sample_pending") == number


async def test_slow_requests_are_one_warning_a_second_and_the_others_are_lines_at_debug(
    valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "nanoservice.server")

    def told() -> Counter[str]:
        return Counter(record.message for record in caplog.records if getattr(record, "route", "") == "/")

    async with serving(SERVICE, valkey.environ(REDIS_TIMEOUT="30")) as served:
        for lines in (1, 2):
            valkey.freeze()
            waiting = [asyncio.create_task(get(served)) for _ in range(20)]
            await eventually(lambda: _pending(served, 20), 5)
            await asyncio.sleep(1.1)  # a request is slow after one second
            valkey.thaw()
            assert {status for status, *_ in await asyncio.gather(*waiting)} == {200}
            await eventually(lambda: told().total() == 20 * lines, 5)
            # The service logs at most one slow request a second. If 20 answers take longer than a second, it logs a second line.
            assert lines <= told()["slow request"] <= 2 * lines


async def test_failed_lookup_of_an_abandoned_connection_is_not_logged_again(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    def leave(error: Exception) -> None:  # uvloop leaves a future like this when a look-up fails
        asyncio.get_running_loop().create_future().set_exception(error)
        gc.collect()

    leave(socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"))
    assert not caplog.messages
    leave(ValueError("what nobody expected"))
    assert "Future exception was never retrieved" in caplog.text
