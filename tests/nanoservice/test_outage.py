"""A Redis that is down, hung, full, read-only or emptied: truthful 503s, one log line, recovery without a restart."""

import asyncio
import contextlib
import gc
import json
import logging
import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from hitcounter.app import SERVICE
from nanoservice.connection import max_connections
from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK, eventually, wait_for
from tests.support.process import Process, metric, resident
from tests.support.wire import request

Spawn = Callable[..., Process]


async def get(served: Served, path: str = "/") -> tuple[int, dict[str, Any], float]:
    """Return status, problem (if any) and seconds of a GET."""
    began = time.monotonic()
    async with served.client.get(path) as answer:
        body = await answer.json() if answer.content_type.endswith("json") else {}
        assert (answer.status == 503) == ("detail" in body)
        if answer.status == 503:
            assert answer.headers["Retry-After"] == "1"
        return answer.status, body, time.monotonic() - began


async def is_ready(served: Served, ready: bool = True) -> bool:
    return (await get(served, "/readyz"))[0] == (200 if ready else 503)


async def test_redis_that_is_down_at_start_is_waited_for(valkey: Valkey) -> None:
    valkey.end()
    async with serving(SERVICE, valkey.environ()) as served:
        assert (await get(served, "/livez"))[0] == 200
        assert (await get(served, "/readyz"))[0] == 503
        valkey.start()
        await eventually(lambda: is_ready(served), 2 * SLACK)
        assert (await get(served))[0] == 200


@pytest.mark.parametrize("hung", [False, True], ids=["down", "hung"])
async def test_requests_get_503_in_time_and_probes_tell_the_truth(served: Served, valkey: Valkey, hung: bool) -> None:
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
    assert {body["detail"] for _, body, _ in answers} <= {"Redis: it does not answer in time", "Redis: it cannot be reached"}
    assert (await get(served, "/livez"))[0] == 200
    assert await metric(served, "redis_up") == 0

    (valkey.thaw if hung else valkey.start)()
    ready = await seconds_to(ready=True)
    print(f"503 after {slowest:.2f} s, unready after {await unready:.2f} s, ready {ready:.2f} s after its return")
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


async def test_probe_that_succeeds_does_not_deny_that_redis_refuses_work(
    served: Served, valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    valkey.run("ACL", "SETUSER", "default", "-evalsha")
    assert (await get(served))[0] == 503
    assert await is_ready(served)
    assert await metric(served, "redis_up") == 0
    valkey.run("ACL", "SETUSER", "default", "+evalsha")
    assert (await get(served))[0] == 200
    assert await metric(served, "redis_up") == 1
    assert caplog.messages == ["Redis fails: its user may not do this (NOPERM)", "Redis works again"]


async def test_short_restart_is_waited_out_without_a_503(
    served: Served, valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    assert (await get(served))[0] == 200
    valkey.kill()
    waiting = asyncio.create_task(get(served))
    await eventually(lambda: "Redis fails: it cannot be reached" in caplog.messages, 2 * SLACK)
    valkey.start()
    assert (await waiting)[0] == 200
    assert caplog.messages == ["Redis fails: it cannot be reached", "Redis works again"]


async def test_readiness_looks_once_a_second_however_often_it_is_asked(served: Served, valkey: Valkey) -> None:
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


Break = Callable[[Valkey], object]


@pytest.mark.parametrize(
    ("breaks", "mends", "cause"),
    [
        pytest.param(
            lambda valkey: valkey.run("REPLICAOF", "127.0.0.1", "1"),
            lambda valkey: valkey.run("REPLICAOF", "NO", "ONE"),
            "read-only replica",
            id="read-only",
        ),
        pytest.param(
            lambda valkey: valkey.run("CONFIG", "SET", "maxmemory", "1"),
            lambda valkey: valkey.run("CONFIG", "SET", "maxmemory", "0"),
            "out of memory",
            id="out of memory",
        ),
        pytest.param(lambda valkey: _fail_to_save(valkey), lambda valkey: _save(valkey), "refuses writes", id="MISCONF"),
        pytest.param(
            lambda valkey: valkey.run("ACL", "SETUSER", "default", "-evalsha"),
            lambda valkey: valkey.run("ACL", "SETUSER", "default", "+evalsha"),
            "NOPERM",
            id="no permission",
        ),
        pytest.param(
            lambda valkey: valkey.run("RPUSH", "{hitcounter}:posts", "x"),
            lambda valkey: valkey.run("DEL", "{hitcounter}:posts"),
            "unexpected error",
            id="a key of another type",
        ),
    ],
)
async def test_redis_that_refuses_is_named_once_and_recovered_from(
    valkey: Valkey, caplog: pytest.LogCaptureFixture, breaks: Break, mends: Break, cause: str
) -> None:
    # One lane: its second batch is told that its writer is not known, which is an answer, but not work that was done.
    async with serving(SERVICE, valkey.environ(REQUEST_TIMEOUT="1", LANES="1")) as served:
        breaks(valkey)
        answers = await asyncio.gather(*(get(served) for _ in range(30)))
        answers += await asyncio.gather(*(get(served) for _ in range(30)))
        assert {status for status, _, _ in answers} == {503}
        assert all(cause in body["detail"] for _, body, _ in answers)
        assert len([line for line in caplog.messages if cause in line]) == 1
        mends(valkey)

        async def works() -> bool:
            return (await get(served))[0] == 200

        await eventually(works, 4 * SLACK)
        assert len([line for line in caplog.messages if line == "Redis works again"]) == 1


def _fail_to_save(valkey: Valkey) -> None:
    """Have Valkey refuse writes as it does when a snapshot fails: here because a folder is where it would write one."""
    (valkey.data / "dump.rdb" / "x").mkdir(parents=True)
    valkey.run("CONFIG", "SET", "save", "1 1000000", "stop-writes-on-bgsave-error", "yes")
    valkey.run("BGSAVE")
    wait_for(lambda: _last_save(valkey) == "err", 10)


def _save(valkey: Valkey) -> None:
    (valkey.data / "dump.rdb" / "x").rmdir()
    (valkey.data / "dump.rdb").rmdir()
    valkey.run("BGSAVE")
    wait_for(lambda: _last_save(valkey) == "ok", 10)


def _last_save(valkey: Valkey) -> str:
    with valkey.client() as client:
        return str(client.info("persistence")["rdb_last_bgsave_status"])


async def test_scripts_flushed_from_the_server_are_not_noticed(served: Served, valkey: Valkey) -> None:
    for number in range(1, 6):
        valkey.run("SCRIPT", "FLUSH")
        async with served.client.get("/", headers={"Accept": "application/json"}) as answer:
            assert (await answer.json())["hits"] == number


async def test_store_that_lost_counts_is_told_once_and_counting_goes_on(
    served: Served, valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    await asyncio.gather(*(get(served) for _ in range(50)))
    valkey.run("FLUSHALL")
    statuses = [(await get(served))[0] for _ in range(20)]
    assert statuses == [200] * 20
    assert valkey.run("GET", "{hitcounter}:hits") == "20"
    assert len([line for line in caplog.messages if "lost counts" in line]) == 1
    assert await metric(served, "counter_rewinds_total") == 1


async def test_ten_thousand_requests_wait_one_more_gets_503_at_once_and_memory_stays_flat(valkey: Valkey, spawn: Spawn) -> None:
    most = min(10_000, max_connections() - 100)  # fewer only where fewer files may be open
    process = spawn(valkey.environ(BIND_HOST="127.0.0.1", MAX_PENDING=str(most), REQUEST_TIMEOUT="60", REDIS_TIMEOUT="60"))
    hit = request("GET", "/", "Accept: application/json")
    used = []
    with contextlib.ExitStack() as stack:

        def connect() -> socket.socket:
            return stack.enter_context(socket.create_connection(("127.0.0.1", process.port), 60))

        def answer(client: socket.socket) -> dict[str, Any]:
            content: dict[str, Any] = json.loads(client.recv(4096).partition(b"\r\n\r\n")[2])  # which is one write
            return content

        one_more = connect()
        one_more.sendall(hit)
        assert answer(one_more)["hits"] == 1
        waiting: list[socket.socket] = []
        for number in range(3):
            valkey.freeze()
            for index in range(most):
                if not number:
                    waiting.append(connect())
                waiting[index].sendall(hit)
            await eventually(lambda: _pending(process, most), 20 * SLACK)
            used.append(resident(process) >> 20)
            began = time.monotonic()
            one_more.sendall(hit)
            problem = answer(one_more)
            seconds = time.monotonic() - began
            assert (problem["status"], problem["detail"]) == (503, "too many requests wait already")
            assert seconds < 0.3 * SLACK
            valkey.thaw()
            assert sorted(answer(client)["hits"] for client in waiting) == list(range(number * most + 2, (number + 1) * most + 2))
    print(f"{most} wait, one more is told after {seconds:.3f} s; MiB used: {used}")
    assert max(used) - used[0] < 16
    assert {line["message"].partition(";")[0] for line in process.log} <= {"listening", "slow request"}


async def _pending(served: Served | Process, number: int) -> bool:
    return await metric(served, "counter_pending") == number


async def test_slow_requests_are_one_warning_a_second_and_the_others_are_lines_at_debug(
    valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "nanoservice.server")

    def told() -> Counter[str]:
        return Counter(record.message for record in caplog.records if getattr(record, "route", "") == "/")

    async with serving(SERVICE, valkey.environ(REQUEST_TIMEOUT="30", REDIS_TIMEOUT="30")) as served:
        for lines in (1, 2):
            valkey.freeze()
            waiting = [asyncio.create_task(get(served)) for _ in range(20)]
            await eventually(lambda: _pending(served, 20), 5)
            await asyncio.sleep(1.1)  # for them to be slow
            valkey.thaw()
            assert {status for status, *_ in await asyncio.gather(*waiting)} == {200}
            await eventually(lambda: told().total() == 20 * lines, 5)
            # One more if it takes over a second to answer them all.
            assert lines <= told()["slow request"] <= 2 * lines


async def test_lookup_that_fails_after_its_time_is_not_logged_again(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    def leave(error: Exception) -> None:  # as uvloop does with the look-up of a connection that was given up
        asyncio.get_running_loop().create_future().set_exception(error)
        gc.collect()

    leave(socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"))
    assert not caplog.messages
    leave(ValueError("what nobody expected"))
    assert "Future exception was never retrieved" in caplog.text
