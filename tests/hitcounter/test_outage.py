"""If Redis is down, hung, full, read-only or emptied, the counter answers 503 in time, logs one line, and recovers by itself."""

import asyncio
import contextlib
import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import redis

from hitcounter.app import SERVICE
from nanoservice.listen import max_connections
from nanoservice.testing.served import Served, serving
from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK, eventually
from tests.support import needs_linux
from tests.support.process import Process, Spawn, metric, resident
from tests.support.refusals import Act, refusals
from tests.support.relay import relaying
from tests.support.topologies import running
from tests.support.wire import request


async def get(served: Served, path: str = "/") -> tuple[int, dict[str, Any], float]:
    """Send a GET; return the status, the problem details (if any) and the duration in seconds."""
    began = time.monotonic()
    async with served.client.get(path) as answer:
        body = await answer.json() if answer.content_type.endswith("json") else {}
        assert (answer.status == 503) == ("detail" in body)
        if answer.status == 503:
            assert answer.headers["Retry-After"] == "1"
        return answer.status, body, time.monotonic() - began


@pytest.mark.parametrize("hung", [False, True], ids=["down", "hung"])
async def test_requests_get_503_in_time(served: Served, valkey: Valkey, hung: bool) -> None:
    assert (await get(served))[0] == 200
    (valkey.freeze if hung else valkey.kill)()
    answers = await asyncio.gather(*(get(served) for _ in range(50)))
    assert {status for status, _, _ in answers} == {503}
    assert max(seconds for *_, seconds in answers) < 2.3 * SLACK
    assert {body["detail"] for _, body, _ in answers} <= {"Redis: it does not answer in time", "Redis: it cannot be reached"}
    (valkey.thaw if hung else valkey.start)()

    async def works() -> bool:
        return (await get(served))[0] == 200

    await eventually(works, 2 * SLACK)


async def test_connections_that_are_reset_while_idle_cause_no_503_and_no_log_line(
    valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    async with relaying(valkey.port) as (relay, port), serving(SERVICE, valkey.environ(REDIS_PORT=str(port))) as served:
        for _ in range(3):
            answers = await asyncio.gather(*(get(served) for _ in range(50)))
            assert {status for status, *_ in answers} == {200}
            relay.reset()
            await asyncio.sleep(0.1)  # until the resets have arrived
        assert valkey.run("GET", "{hitcounter}:hits") == "150"
    assert not caplog.messages


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


@pytest.mark.parametrize(("breaks", "mends", "cause"), refusals(command="evalsha"))
async def test_redis_that_refuses_is_named_once_and_recovered_from(
    valkey: Valkey, caplog: pytest.LogCaptureFixture, breaks: Act, mends: Act, cause: str
) -> None:
    # Redis refuses the first batch and stores nothing of it, so with one lane the script replies "unknown" to the second batch.
    # Such a reply is an answer, but not successful work.
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


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("Sentinel", "it does not know a command: it is a Sentinel, or older than Redis 6.2"),
        ("CLUSTERDOWN", "it is a node of a Redis Cluster, which is not supported"),
        ("MOVED", "it is a node of a Redis Cluster, which is not supported"),
    ],
)
async def test_sentinel_and_node_of_a_cluster_are_named_and_not_ready(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, cause: str
) -> None:
    with running(kind, tmp_path) as server:

        def refuses() -> bool:
            with pytest.raises(redis.ResponseError) as refused:
                server.run("GET", "{hitcounter}:hits")
            return kind in ("Sentinel", refused.value.status_code)

        await eventually(refuses, 5 * SLACK)
        async with serving(SERVICE, server.environ(REQUEST_TIMEOUT="0.3")) as served:
            for path in ("/readyz", "/", "/readyz"):
                status, problem, _ = await get(served, path)
                assert (status, problem["detail"]) == (503, f"Redis: {cause}")
                await asyncio.sleep(1.1)  # the result of one check is valid for 1 s
    assert caplog.messages == [f"Redis fails: {cause}"]


async def test_lanes_need_the_current_password_for_each_new_connection(valkey: Valkey, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("first")
    valkey.run("ACL", "SETUSER", "svc", "on", ">first", "~*", "+@all")
    environ = valkey.environ(REDIS_USERNAME="svc", REDIS_PASSWORD_FILE=str(file), REQUEST_TIMEOUT="0.3")
    async with serving(SERVICE, environ) as served:
        assert (await get(served))[0] == 200
        valkey.run("ACL", "SETUSER", "svc", "resetpass", ">second")
        valkey.run("CLIENT", "KILL", "USER", "svc")
        status, problem, _ = await get(served)
        assert (status, problem["detail"]) == (503, "Redis: wrong user or password")
        file.write_text("second")

        async def works() -> bool:
            return (await get(served))[0] == 200

        await eventually(works, 2 * SLACK)


async def test_no_request_fails_when_redis_has_lost_the_script(served: Served, valkey: Valkey) -> None:
    for number in range(1, 6):
        valkey.run("SCRIPT", "FLUSH")
        async with served.client.get("/", headers={"Accept": "application/json"}) as answer:
            assert (await answer.json())["hits"] == number


async def test_lost_counts_are_logged_once_and_counting_goes_on(
    served: Served, valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    await asyncio.gather(*(get(served) for _ in range(50)))
    valkey.run("FLUSHALL")
    statuses = [(await get(served))[0] for _ in range(20)]
    assert statuses == [200] * 20
    assert valkey.run("GET", "{hitcounter}:hits") == "20"
    assert len([line for line in caplog.messages if "lost counts" in line]) == 1
    assert await metric(served, "counter_rewinds_total") == 1


@needs_linux("the test reads /proc")
async def test_ten_thousand_requests_wait_one_more_gets_503_at_once_and_memory_stays_flat(valkey: Valkey, spawn: Spawn) -> None:
    most = min(10_000, max_connections() - 100)  # fewer where the limit on open files is lower
    limits = {"MAX_PENDING": str(most), "MAX_CONNECTIONS": str(most + 10)}
    process = spawn(valkey.environ(BIND_HOST="127.0.0.1", REQUEST_TIMEOUT="10", REDIS_TIMEOUT="10", **limits))
    hit = request("GET", "/", "Accept: application/json")
    used = []
    with contextlib.ExitStack() as stack:

        def connect() -> socket.socket:
            return stack.enter_context(socket.create_connection(("127.0.0.1", process.port), 60))

        def answer(client: socket.socket) -> dict[str, Any]:
            content: dict[str, Any] = json.loads(client.recv(4096).partition(b"\r\n\r\n")[2])  # the answer is one write
            return content

        one_more = connect()
        one_more.sendall(hit)
        assert answer(one_more)["hits"] == 1
        waiting = [connect() for _ in range(most)]
        for number in range(3):
            valkey.freeze()
            for client in waiting:
                client.sendall(hit)
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
    print(f"{most} wait, one more gets 503 after {seconds:.3f} s; MiB used: {used}")
    assert max(used) - used[0] < 16
    assert {line["message"].partition(";")[0] for line in process.log} <= {"listening", "slow request"}


async def _pending(process: Process, number: int) -> bool:
    return await metric(process, "counter_pending") == number
