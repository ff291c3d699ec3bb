"""Each hit and post counts once, and each number is answered once: under load, across crashes of Redis, on a bad network."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator

import pytest
import redis

from nanoservice.testing.proxy import Fate, Proxy, Request
from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK, eventually
from tests.hitcounter.batches import is_batch, is_newer
from tests.support.load import Load, Tally
from tests.support.process import Process, Spawn

CONNECTIONS = 1000
SECONDS = 10  # the duration of each load
LOST_REPLIES = 100  # the test of a bad network must lose at least this many replies


@pytest.fixture
def valkey(valkey: Valkey) -> Valkey:
    """Return a Valkey that is configured as a system of record: Valkey answers a write after the disk has stored it."""
    valkey.options = "--appendfsync", "always"
    valkey.kill()
    valkey.start()
    return valkey


def totals(valkey: Valkey) -> tuple[int, int]:
    """Return the hits and posts that Redis has counted."""
    hits, posts = valkey.run("MGET", "{hitcounter}:hits", "{hitcounter}:posts")
    return int(hits or 0), int(posts or 0)


@contextlib.asynccontextmanager
async def watching(valkey: Valkey, tally: Tally) -> AsyncIterator[None]:
    """Fail if the counts in Redis are ever lower than a number that was answered before the counts were read."""

    async def watch() -> None:
        while True:
            answered = tally.highest_hits, tally.highest_posts
            with contextlib.suppress(redis.RedisError):  # Redis may be down
                hits, posts = await asyncio.to_thread(totals, valkey)
                assert answered[0] <= hits
                assert answered[1] <= posts
            await asyncio.sleep(0.05)

    watcher = asyncio.create_task(watch())
    yield
    assert not watcher.done() or watcher.result()  # `result()` raises the assertion that failed
    watcher.cancel()
    await asyncio.gather(watcher, return_exceptions=True)


def end(processes: list[Process]) -> None:
    """Stop the services, so that no batch is in flight any more."""
    assert [process.end() for process in processes] == [0] * len(processes)


async def test_each_number_is_answered_once_by_two_processes_to_a_thousand_connections(valkey: Valkey, spawn: Spawn) -> None:
    services = [spawn(valkey.environ()) for _ in range(2)]
    load = Load([service.port for service in services], CONNECTIONS)
    async with watching(valkey, load.tally):
        tally = await load.run(SECONDS)
    end(services)
    tally.check(*totals(valkey))
    assert tally.answered > 0.95 * tally.statuses.total()
    assert tally.answered > 1000 * SECONDS / SLACK
    assert tally.repeated > 100


async def test_no_hit_is_lost_or_counted_twice_while_the_store_is_killed_three_times(valkey: Valkey, spawn: Spawn) -> None:
    services = [spawn(valkey.environ()) for _ in range(2)]
    load = Load([service.port for service in services], CONNECTIONS)
    tally = load.tally

    async def crash() -> None:
        began = time.monotonic()
        for _ in range(3):
            answered = tally.answered
            await eventually(lambda: tally.answered > answered + 200, SECONDS * SLACK)
            await asyncio.sleep(SECONDS / 5)
            await asyncio.to_thread(valkey.kill)
            await asyncio.to_thread(valkey.start)
        await asyncio.sleep(began + SECONDS - time.monotonic())
        load.stop()

    async with watching(valkey, tally), asyncio.TaskGroup() as group:
        group.create_task(crash())
        group.create_task(load.run(SECONDS * SLACK))
    end(services)
    tally.check(*totals(valkey))
    assert tally.answered > 1000
    assert tally.repeated > 20


async def test_no_hit_is_lost_or_counted_twice_on_a_network_that_loses_delays_and_repeats(valkey: Valkey, spawn: Spawn) -> None:
    # The wanted number of each fault. The faults are spread over time, so that a busy machine with few batches gets all faults.
    faults = {
        Fate.LOSE_REPLY: 2 * LOST_REPLIES, Fate.REPEAT_LATE: 150, Fate.REPEAT: 60, Fate.LOSE_REQUEST: 40,
        Fate.SWALLOW_REPLY: 15, Fate.STALL: 15,
    }  # fmt: skip
    dice = random.Random(1)
    began = 0.0

    def fate(request: Request) -> Fate:
        nonlocal began
        if not is_batch(request):
            return Fate.PASS
        began = began or time.monotonic()
        spent = (time.monotonic() - began) / SECONDS
        # The further a fault is behind its wanted number, the more often it is chosen.
        due = [max(0.0, number * spent - proxy.fates[fault]) for fault, number in faults.items()]
        return dice.choices([Fate.PASS, *faults], [1.0, *due])[0]

    async def deliver_late(proxy: Proxy) -> None:
        while True:
            await asyncio.sleep(0.5)
            await proxy.release()

    def enough() -> bool:
        """Return whether there were enough faults, and enough duplicates that arrived after newer batches."""
        lost = proxy.fates[Fate.LOSE_REPLY] + proxy.fates[Fate.SWALLOW_REPLY]
        repeated = min(proxy.repeated["late"], proxy.repeated["counted"])
        return lost >= LOST_REPLIES and repeated > 10 and all(proxy.fates[fault] for fault in faults)

    async def stop() -> None:
        await asyncio.sleep(SECONDS)
        await eventually(enough, SECONDS * SLACK)
        load.stop()

    async with Proxy(valkey.port, fate, is_newer) as proxy:
        services = [spawn(valkey.environ(REDIS_PORT=str(proxy.port), REDIS_TIMEOUT="0.15")) for _ in range(2)]
        load = Load([service.port for service in services], CONNECTIONS)
        tally = load.tally
        async with watching(valkey, tally):
            late = asyncio.create_task(deliver_late(proxy))
            await asyncio.gather(load.run(SECONDS * (SLACK + 1)), stop())
            late.cancel()
            await asyncio.gather(late, return_exceptions=True)
        await proxy.release()
        await asyncio.to_thread(end, services)
    tally.check(*totals(valkey))
    assert tally.answered > 1000
    assert tally.repeated > 20
    print({fate.name: number for fate, number in proxy.fates.items()}, "sent once more:", dict(proxy.repeated))
    assert enough()
