"""When the counter shuts down, each request that waits for its number gets the number, or a 503 in time."""

import asyncio
import signal
import time

import aiohttp

from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK, eventually
from tests.support.process import Process, Spawn, check_requests_in_flight, metric


async def pending(process: Process, number: int) -> bool:
    return await metric(process, "counter_pending") == number


async def test_requests_in_flight_are_answered(valkey: Valkey, spawn: Spawn) -> None:
    await check_requests_in_flight(spawn(valkey.environ(REQUEST_TIMEOUT="10", REDIS_TIMEOUT="10")), valkey, "counter_pending")


async def test_hung_redis_does_not_delay_the_exit(valkey: Valkey, spawn: Spawn) -> None:
    process = spawn(valkey.environ(REQUEST_TIMEOUT=str(SLACK)))
    async with aiohttp.ClientSession() as client:
        async with client.get(process.url) as answer:
            assert answer.status == 200
        valkey.freeze()
        waiting = [asyncio.create_task(client.get(process.url)) for _ in range(50)]
        await eventually(lambda: pending(process, 50), 5)
        began = time.monotonic()
        status = await asyncio.to_thread(process.end, signal.SIGTERM, 30)
        assert status == 0
        print(f"stopped after {time.monotonic() - began:.2f} s")
        assert time.monotonic() - began < 4 * SLACK
        assert {answer.status for answer in await asyncio.gather(*waiting)} == {503}
