"""Test the counter in this process, on a real Valkey: batches, lanes, bounds, cancelled requests, keys, and lost counts."""

import asyncio
import contextlib
import gc
import itertools
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from hitcounter.app import SERVICE, CounterConfig
from hitcounter.counter import Batch, Counter, Counts
from nanoservice.errors import UnavailableError
from nanoservice.redis import Store
from nanoservice.testing.proxy import Fate, Proxy, Request
from nanoservice.testing.served import serving
from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK, eventually
from tests.hitcounter.batches import is_batch, sequence, writer
from tests.support.process import metric
from tests.support.wire import connected, request

DAY = 86400


class Counting:
    """A running counter and its metrics."""

    def __init__(self, valkey: Valkey, port: int, options: dict[str, Any]) -> None:
        self.registry = CollectorRegistry()
        environ = valkey.environ(REDIS_PORT=str(port or valkey.port))
        store = Store(CounterConfig.read(environ), self.registry)
        options = {"lanes": 4, "max_pending": 10000, "timeout": 2.0, "redis_timeout": 1.0, "keep": 100000, **options}
        self.counter = Counter("hitcounter", store, self.registry, **options)
        self.hit, self.post = self.counter.hit, self.counter.post

    def metric(self, name: str, **labels: str) -> float:
        value = self.registry.get_sample_value(name, labels)
        assert value is not None
        return value


@contextlib.asynccontextmanager
async def counting(valkey: Valkey, port: int = 0, **options: Any) -> AsyncIterator[Counting]:
    """Run a counter that reaches `valkey` directly, or through the proxy that listens on `port`."""
    it = Counting(valkey, port, options)
    await it.counter.start()
    try:
        yield it
    finally:
        async with asyncio.timeout(10 * SLACK):
            await it.counter.close()


async def outcomes(waiting: list[asyncio.Future[Counts]]) -> list[Counts | BaseException]:
    """Return the result or the exception of each future; fail if the futures take too long."""
    async with asyncio.timeout(10 * SLACK):
        return await asyncio.gather(*waiting, return_exceptions=True)


def hits(results: list[Counts | BaseException]) -> list[int]:
    """Return the hits of each answer, without the answers that are errors."""
    return [result.hits for result in results if isinstance(result, Counts)]


async def within(awaitable: Awaitable[Counts], seconds: float = 10 * SLACK) -> Counts:
    async with asyncio.timeout(seconds):
        return await awaitable


def batches(valkey: Valkey) -> int:
    """Return how many batches Redis has received."""
    with valkey.client() as client:
        return int(client.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"])


def totals(valkey: Valkey) -> list[int]:
    return [int(total or 0) for total in valkey.run("MGET", "{hitcounter}:hits", "{hitcounter}:posts")]


def writers(valkey: Valkey) -> list[str]:
    return sorted(valkey.run("KEYS", "{hitcounter}:writer:*"))


# --- clients that disconnect, and cancelled requests ---


async def test_client_that_disconnects_disturbs_no_other_request_of_its_batch(valkey: Valkey) -> None:
    environ = valkey.environ(LANES="1", REQUEST_TIMEOUT="10", REDIS_TIMEOUT="10")
    async with serving(SERVICE, environ) as served, contextlib.AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(connected(served.port)) for _ in range(30)]
        for wire in wires:
            await wire.send(request("GET", "/", "Accept: application/json"))
            assert (await wire.reply()).status == 200
        valkey.freeze()
        for wire in wires:
            await wire.send(request("GET", "/", "Accept: application/json"))
        await eventually(lambda: metric(served, "counter_pending"), 5 * SLACK)
        for wire in wires[::3]:
            wire.writer.transport.abort()
        await asyncio.sleep(0.05)  # until the service has noticed the disconnects
        valkey.thaw()
        numbers = [(await wire.reply()).json["hits"] for number, wire in enumerate(wires) if number % 3]
        assert len(set(numbers)) == 20
        assert max(numbers) <= totals(valkey)[0] == 60  # the requests of the clients that have disconnected are counted, too


async def test_cancelled_waiter_disturbs_no_other_of_its_batch(valkey: Valkey) -> None:
    async with counting(valkey, lanes=1) as it:
        waiting = [it.hit() for _ in range(100)]
        for future in waiting[::3]:
            future.cancel()
        others = [future for future in waiting if not future.cancelled()]
        assert hits(await outcomes(others)) == list(range(1, 67))
        assert totals(valkey) == [66, 0]  # a request cancelled before its batch was sent is not counted


@pytest.mark.parametrize("kind", ["hit", "post", "keyed post"])
async def test_waiter_cancelled_while_its_batch_is_in_flight_disturbs_no_other(valkey: Valkey, kind: str) -> None:
    async with counting(valkey, lanes=1) as it:
        await it.hit()
        valkey.freeze()
        waiting = [it.hit() if kind == "hit" else it.post(f"key{n}" if kind == "keyed post" else None) for n in range(99)]
        await asyncio.sleep(0.05)  # until the batch is sent
        for future in waiting[::3]:
            future.cancel()
        valkey.thaw()
        results = await outcomes([future for future in waiting if not future.cancelled()])
        assert len(results) == 66
        expected = [number for number in range(99) if number % 3]
        if kind == "hit":
            assert hits(results) == [number + 2 for number in expected]
        else:
            assert results == [Counts(1, number + 1) for number in expected]
        assert sum(totals(valkey)) == 100
        assert await within(it.hit())


async def test_waiter_that_times_out_while_its_batch_is_in_flight_disturbs_no_other(valkey: Valkey) -> None:
    async with counting(valkey, lanes=1) as it:
        await it.hit()
        valkey.freeze()
        patient = [it.hit() for _ in range(10)]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(it.hit(), 0.1)
        patient += [it.hit() for _ in range(10)]
        valkey.thaw()
        numbers = hits(await outcomes(patient))
        assert len(set(numbers)) == 20
        assert max(numbers) <= totals(valkey)[0] <= 22


async def test_batch_whose_requests_are_all_cancelled_is_not_sent(valkey: Valkey) -> None:
    async with counting(valkey) as it:
        for future in [it.hit() for _ in range(10)]:
            future.cancel()
        await asyncio.sleep(0)
        assert await within(it.hit()) == Counts(1, 0)
        assert it.metric("counter_pending") == 0


async def test_each_waiter_has_a_future_of_its_own(valkey: Valkey) -> None:
    async with counting(valkey) as it:
        waiting = [it.hit() for _ in range(50)] + [it.post() for _ in range(50)] + [it.post("key") for _ in range(50)]
        assert len({id(future) for future in waiting}) == 150
        await outcomes(waiting)


async def test_numbers_are_given_in_order_of_arrival(valkey: Valkey) -> None:
    async with counting(valkey) as it:
        waiting = [kind() for _ in range(5) for kind in (it.hit, it.post, lambda: it.post("key"))]
        results = await outcomes(waiting)
        assert hits(results[::3]) == [1, 2, 3, 4, 5]
        assert results[1::3] == [Counts(5, number) for number in range(1, 6)]
        assert results[2::3] == [Counts(5, 6)] * 5


# --- bounds ---


async def test_request_beyond_max_pending_is_refused_at_once_and_memory_stays_flat(valkey: Valkey) -> None:
    timeout, most = 0.6, 10000
    async with counting(valkey, timeout=timeout, max_pending=most) as it:
        await it.hit()
        valkey.freeze()
        used = []
        try:
            for number in range(5):
                if number == 1:
                    tracemalloc.start()  # tracing slows everything down, so it starts after the first fill
                began = time.monotonic()
                waiting = [it.hit() for _ in range(most)]
                assert it.metric("counter_pending") == most
                refused = time.monotonic()
                with pytest.raises(UnavailableError, match="too many requests wait already"):
                    it.hit()
                with pytest.raises(UnavailableError, match="too many requests wait already"):
                    it.post("key")
                assert number or time.monotonic() - refused < 0.05 * SLACK
                results = await outcomes(waiting)
                assert number or time.monotonic() - began < (timeout + 1) * SLACK
                assert it.metric("counter_shed_total") == 2 * (number + 1)
                assert it.metric("counter_timeouts_total") == most * (number + 1)
                assert {type(result) for result in results} == {UnavailableError}
                assert it.metric("counter_pending") == 0
                del waiting, results
                gc.collect()
                if number:
                    used.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
        assert max(used[1:]) - used[0] < 2_000_000, used  # bytes; if 10,000 requests leaked, they would keep about ten million
        valkey.thaw()

        async def counts() -> bool:
            with contextlib.suppress(UnavailableError):
                return (await it.hit()).hits <= 5 * most + 20  # an upper bound: hits that got 503 may have been counted
            return False

        await eventually(counts, 10 * SLACK)


async def test_all_are_answered_by_the_deadline_whatever_the_batch_waits_for(valkey: Valkey) -> None:
    async with counting(valkey, timeout=0.5, lanes=1) as it:
        valkey.freeze()
        began, waiting = time.monotonic(), []
        for _ in range(10):  # some requests join the batch that is sent first, the others join later batches
            waiting += [it.hit() for _ in range(20)]
            await asyncio.sleep(0.02)
        results = await outcomes(waiting)
        assert {type(result) for result in results} == {UnavailableError}
        assert time.monotonic() - began < (0.5 + 0.2) * SLACK
        valkey.thaw()


async def test_requests_that_arrive_together_share_commands(valkey: Valkey) -> None:
    async with counting(valkey) as it:

        async def client() -> list[int]:
            return [(await it.hit()).hits for _ in range(100)]

        await it.hit()
        before = batches(valkey)
        async with asyncio.timeout(20 * SLACK):
            numbers = list(itertools.chain(*await asyncio.gather(*(client() for _ in range(64)))))
        assert sorted(numbers) == list(range(2, 6402))
        assert (batches(valkey) - before) / 6400 < 0.1
        assert it.metric("counter_batch_size_sum") == 6401


async def test_batch_has_a_thousand_requests_at_most(valkey: Valkey) -> None:
    async with counting(valkey) as it:
        assert sorted(hits(await outcomes([it.hit() for _ in range(2500)]))) == list(range(1, 2501))
        assert batches(valkey) >= 3


# --- lanes ---


async def test_stuck_batch_delays_only_its_own_lane(valkey: Valkey) -> None:
    stuck: set[bytes] = set()

    def fate(request: Request) -> Fate:
        if is_batch(request) and (not stuck or writer(request) in stuck):
            stuck.add(writer(request))
            return Fate.STALL
        return Fate.PASS

    async with Proxy(valkey.port, fate) as proxy, counting(valkey, proxy.port, lanes=2, redis_timeout=1.5, timeout=20.0) as it:
        first = it.hit()
        await eventually(lambda: stuck, SLACK)
        for number in range(1, 20):
            assert await within(it.hit()) == Counts(number, 0)
        assert not first.done()
        proxy.fate = lambda _: Fate.PASS
        await proxy.release()
        assert totals(valkey) == [20, 0]
        assert await within(first, 10 * SLACK) == Counts(20, 0)  # the batch was sent again, after a timeout
        assert totals(valkey) == [20, 0]


@pytest.mark.parametrize("lanes", [1, 3])
async def test_each_lane_has_one_connection_and_one_name(valkey: Valkey, lanes: int) -> None:
    async with counting(valkey, lanes=lanes) as it:
        for _ in range(30):
            await outcomes([it.hit() for _ in range(1500)])
        with valkey.client() as client:
            assert len([peer for peer in client.client_list() if peer["cmd"] == "evalsha"]) <= lanes
        assert 1 <= len(writers(valkey)) <= lanes


async def test_flushed_scripts_fail_no_request(valkey: Valkey) -> None:
    async with counting(valkey, timeout=20.0) as it:
        waiting = []
        for _ in range(50):
            valkey.run("SCRIPT", "FLUSH")
            waiting += [it.hit() for _ in range(10)]
            await asyncio.sleep(0)
        assert sorted(hits(await outcomes(waiting))) == list(range(1, 501))


# --- Idempotency-Keys ---


async def test_key_counts_once_in_one_batch(valkey: Valkey) -> None:
    async with counting(valkey) as it:
        results = await outcomes([it.post("a"), it.post(), it.post("b"), it.post("a"), it.hit(), it.post("a")])
        assert results == [Counts(1, 2), Counts(1, 1), Counts(1, 3), Counts(1, 2), Counts(1, 0), Counts(1, 2)]
        assert totals(valkey) == [1, 3]
        assert it.metric("counter_keys_replayed_total") == 2


async def test_key_counts_once_over_batches_and_over_two_counters(valkey: Valkey) -> None:
    async with counting(valkey) as one, counting(valkey) as other:
        first = await within(one.post("a"))
        await one.hit()
        await other.post()
        assert await within(one.post("a")) == await within(other.post("a")) == first == Counts(0, 1)
        same = await outcomes([it.post(f"key{number}") for number in range(100) for it in (one, other)])
        assert same[::2] == same[1::2]
        assert len(set(map(str, same))) == 100
        assert totals(valkey) == [1, 102]
        assert one.metric("counter_keys_replayed_total") + other.metric("counter_keys_replayed_total") == 2 + 100


async def test_key_that_got_no_answer_counts_once_when_it_is_sent_again(valkey: Valkey) -> None:
    async with Proxy(valkey.port) as proxy, counting(valkey, proxy.port, timeout=1.5, redis_timeout=0.5) as it:
        await it.hit()
        proxy.fate = lambda request: Fate.SWALLOW_REPLY if is_batch(request) else Fate.PASS
        with pytest.raises(UnavailableError):
            await within(it.post("a"))
        proxy.fate = lambda _: Fate.PASS
        assert await within(it.post("a")) == await within(it.post("a")) == Counts(1, 1)


async def test_try_that_is_cut_off_by_its_deadline_is_not_logged(valkey: Valkey, caplog: pytest.LogCaptureFixture) -> None:
    valkey.run("ACL", "SETUSER", "default", "-evalsha")
    tries = itertools.count()

    def fate(request: Request) -> Fate:
        return Fate.SWALLOW_REPLY if is_batch(request) and next(tries) else Fate.PASS

    async with Proxy(valkey.port, fate) as proxy, counting(valkey, proxy.port, timeout=1.5, redis_timeout=3.0) as it:
        with pytest.raises(UnavailableError, match="NOPERM"):
            await within(it.hit())
        await asyncio.sleep(0.1)  # until the counter has cancelled the try that gets no reply
        assert next(tries) == 2
        assert caplog.messages == ["Redis fails: its user may not do this (NOPERM)"]


async def test_at_most_keep_keys_are_remembered_and_the_oldest_is_forgotten_first(valkey: Valkey) -> None:
    async with counting(valkey, keep=10) as it:
        answers = [await within(it.post(f"key{number}")) for number in range(15)]
        assert [await within(it.post(f"key{number}")) for number in range(5, 15)] == answers[5:]
        assert await within(it.post("key4")) == Counts(0, 16)
        assert valkey.run("ZCARD", "{hitcounter}:order") == valkey.run("HLEN", "{hitcounter}:answers") == 10


async def test_key_is_not_remembered_for_longer_than_a_day(valkey: Valkey) -> None:
    async with counting(valkey) as it:
        first = await within(it.post("a"))

        def age(seconds: int) -> None:
            for digest in binary(valkey, "ZRANGE", "{hitcounter}:order", 0, -1):
                valkey.run("ZINCRBY", "{hitcounter}:order", -seconds * 1000000, digest)

        age(DAY - 60)
        assert await within(it.post("a")) == first
        age(61)
        assert await within(it.post("a")) == Counts(0, 2)


async def test_long_keys_cost_the_store_sixteen_bytes(valkey: Valkey) -> None:
    async with counting(valkey) as it:
        keys = [str(number) * 255 for number in range(10)]
        first = await outcomes([it.post(key[:255]) for key in keys])
        assert await outcomes([it.post(key[:255]) for key in keys]) == first
        assert len(set(map(str, first))) == 10
        for command in (("HKEYS", "{hitcounter}:answers"), ("ZRANGE", "{hitcounter}:order", 0, -1)):
            assert {len(digest) for digest in binary(valkey, *command)} == {16}


def binary(valkey: Valkey, *command: Any) -> Any:
    """Return the answer to one command, as bytes."""
    with valkey.client() as client:
        return client.execute_command(*command, NEVER_DECODE=True)


async def test_memory_of_the_store_is_bounded(valkey: Valkey) -> None:
    async with counting(valkey, keep=1000) as it:
        sizes = []
        for number in range(8):
            await outcomes([it.post(f"{number}-{key}") for key in range(3000)] + [it.hit() for _ in range(100)])
            assert valkey.run("HLEN", "{hitcounter}:answers") == valkey.run("ZCARD", "{hitcounter}:order") <= 1000
            with valkey.client() as client:
                usage = [client.memory_usage(key, samples=0) for key in client.keys()]
            sizes.append(sum(usage))
            assert len(usage) <= 4 + 4
        # The limit includes the remembered reply to the last batch of each lane. A reply has at most 1,000 numbers.
        assert max(sizes) < 400_000, sizes


# --- counts that Redis has lost ---


async def test_emptied_store_is_logged_once_and_counting_goes_on(valkey: Valkey, caplog: pytest.LogCaptureFixture) -> None:
    async with counting(valkey) as it:
        await outcomes([it.hit() for _ in range(100)] + [it.post() for _ in range(5)])
        assert it.metric("counter_rewinds_total") == 0
        valkey.run("FLUSHALL")
        for _ in range(5):
            await outcomes([it.hit() for _ in range(10)])
        assert it.metric("counter_rewinds_total") == 1
        assert len([line for line in caplog.messages if "lost counts" in line]) == 1
        assert totals(valkey) == [50, 0]
        await outcomes([it.hit() for _ in range(100)])
        assert it.metric("counter_rewinds_total") == 1
        valkey.run("FLUSHALL")
        assert await within(it.hit()) == Counts(1, 0)
        assert it.metric("counter_rewinds_total") == 2


async def test_batches_in_flight_together_log_one_loss_once(valkey: Valkey) -> None:
    async with counting(valkey, lanes=2) as it:
        await outcomes([it.hit() for _ in range(100)])
        valkey.run("FLUSHALL")
        valkey.freeze()
        waiting = []
        for _ in range(2):
            waiting += [it.hit() for _ in range(10)]
            await asyncio.sleep(0.05)  # until this batch is sent, so that the next batch uses the other lane
        valkey.thaw()
        assert sorted(hits(await outcomes(waiting))) == list(range(1, 21))
        assert it.metric("counter_batch_size_count") >= 3
        assert it.metric("counter_rewinds_total") == 1


async def test_loss_of_posts_with_a_key_is_noticed(valkey: Valkey, caplog: pytest.LogCaptureFixture) -> None:
    async with counting(valkey) as it:
        assert await within(it.post("c")) == Counts(0, 1)
        valkey.run("FLUSHALL")
        assert await within(it.post("d")) == Counts(0, 1)
        assert it.metric("counter_rewinds_total") == 1
        assert len([line for line in caplog.messages if "lost counts" in line]) == 1


@pytest.mark.parametrize("kind", ["hit", "post", "keyed post"])
async def test_number_given_twice_while_a_batch_was_under_way_is_noticed(valkey: Valkey, kind: str) -> None:
    key = "{hitcounter}:hits" if kind == "hit" else "{hitcounter}:posts"
    valkey.run("SET", key, "107")
    keys = itertools.count()
    writers: list[bytes] = []

    def stall(request: Request) -> Fate:
        """Stall the first batch and all later attempts of its lane."""
        if is_batch(request) and not writers:
            writers.append(request.words[5])
        return Fate.STALL if is_batch(request) and request.words[5] in writers else Fate.PASS

    async with Proxy(valkey.port) as proxy, counting(valkey, proxy.port, lanes=2, timeout=20.0, redis_timeout=1.5) as it:

        def count() -> asyncio.Future[Counts]:
            return it.hit() if kind == "hit" else it.post(f"key{next(keys)}" if kind == "keyed post" else None)

        def number(counts: Counts) -> int:
            return counts.hits if kind == "hit" else counts.posts

        assert number(await within(count())) == 108
        proxy.fate = stall
        first = count()
        await eventually(lambda: proxy.fates[Fate.STALL], SLACK)
        assert number(await within(count())) == 109
        valkey.run("SET", key, "108")  # Now Redis has lost the number 109.
        assert it.metric("counter_rewinds_total") == 0
        proxy.fate = lambda _: Fate.PASS
        assert number(await within(first)) == 109
        assert it.metric("counter_rewinds_total") == 1
        assert number(await within(count())) == 110
        assert it.metric("counter_rewinds_total") == 1


async def test_lanes_that_answer_out_of_order_are_not_a_rewind(valkey: Valkey) -> None:
    async with Proxy(valkey.port) as proxy, counting(valkey, proxy.port, lanes=2, timeout=20.0, redis_timeout=0.5) as it:
        await within(it.hit())
        proxy.fate = lambda request: Fate.SWALLOW_REPLY if is_batch(request) else Fate.PASS
        first = it.hit()  # Redis counts this hit now; the reply arrives after the replies to the other hits.
        await eventually(lambda: proxy.fates[Fate.SWALLOW_REPLY], SLACK)
        proxy.fate = lambda _: Fate.PASS
        assert [(await within(it.hit())).hits for _ in range(5)] == [3, 4, 5, 6, 7]
        assert (await within(first)).hits == 2
        assert it.metric("counter_rewinds_total") == 0


async def test_reply_to_another_batch_is_noticed_at_once(valkey: Valkey) -> None:
    fates = iter([Fate.PASS, Fate.ANSWER_TWICE])

    def fate(request: Request) -> Fate:
        return next(fates, Fate.PASS) if is_batch(request) else Fate.PASS

    async with Proxy(valkey.port, fate) as proxy, counting(valkey, proxy.port, lanes=1) as it:
        assert [(await within(it.hit())).hits for _ in range(10)] == list(range(1, 11))
        assert proxy.fates[Fate.ANSWER_TWICE] == 1
        assert totals(valkey) == [10, 0]


async def test_stored_answer_of_another_version_fails_only_its_own_request(valkey: Valkey) -> None:
    async with counting(valkey, lanes=1) as it:
        await within(it.post("a"))
        [digest] = binary(valkey, "HKEYS", "{hitcounter}:answers")
        valkey.run("HSET", "{hitcounter}:answers", digest, "another format")
        *others, mine = await outcomes([*(it.hit() for _ in range(10)), it.post("b"), it.post("a")])
        assert hits(others) == [*range(1, 11), 10]
        assert str(mine) == "another version of this service has answered this Idempotency-Key"
        assert await within(it.post("b")) == Counts(10, 2)


async def test_remembered_answers_that_survive_the_counts_are_not_another_rewind(valkey: Valkey) -> None:
    async with counting(valkey, lanes=1) as it:
        await outcomes([it.post() for _ in range(20)])
        answers = [await within(it.post(key)) for key in ("a", "b")]
        await it.post()
        valkey.run("SET", "{hitcounter}:posts", "5")
        for _ in range(3):
            assert [await within(it.post(key)) for key in ("a", "b")] == answers
            await it.post()
        assert totals(valkey) == [0, 8]
        assert it.metric("counter_rewinds_total") == 1


async def test_lost_replies_and_lanes_out_of_step_are_not_rewinds(valkey: Valkey) -> None:
    number = 0

    def fate(request: Request) -> Fate:
        nonlocal number
        number += is_batch(request)
        return Fate.LOSE_REPLY if is_batch(request) and number % 3 == 0 else Fate.PASS

    async with Proxy(valkey.port, fate) as proxy, counting(valkey, proxy.port, timeout=10.0) as it:
        waiting = []
        async with asyncio.timeout(10 * SLACK):
            while proxy.fates[Fate.LOSE_REPLY] <= 5:
                waiting.append(it.hit())
                await asyncio.sleep(0.003)
        assert sorted(hits(await outcomes(waiting))) == list(range(1, len(waiting) + 1))
        assert it.metric("counter_rewinds_total") == 0


async def test_batch_of_a_forgotten_writer_is_counted_under_a_new_name(valkey: Valkey) -> None:
    async with counting(valkey, lanes=1) as it:
        await it.hit()
        assert await within(it.hit()) == Counts(2, 0)
        [old] = writers(valkey)
        valkey.run("DEL", old)
        assert await within(it.hit()) == Counts(3, 0)
        assert [writer != old for writer in writers(valkey)].count(True) == 1
        assert await within(it.hit()) == Counts(4, 0)
        assert it.metric("counter_rewinds_total") == 0


@pytest.mark.parametrize("reached", [True, False], ids=["counted", "not counted"])
async def test_batch_in_doubt_when_its_writer_is_forgotten_gets_503_and_counts_once_at_most(
    valkey: Valkey, caplog: pytest.LogCaptureFixture, reached: bool
) -> None:
    sent = 0

    def fate(request: Request) -> Fate:
        nonlocal sent
        if not is_batch(request) or sequence(request) == 1:
            return Fate.PASS
        sent += 1
        if sent == 1:
            return Fate.LOSE_REPLY if reached else Fate.LOSE_REQUEST
        assert valkey.run("DEL", *writers(valkey)) == 1
        return Fate.PASS

    async with Proxy(valkey.port, fate) as proxy, counting(valkey, proxy.port, lanes=1) as it:
        await it.hit()
        with pytest.raises(UnavailableError, match="it may have been counted"):
            await within(it.hit())
        assert sent == 2
        assert it.metric("counter_lost_batches_total") == 1
        assert it.metric("counter_replies_total", verdict="unknown") == 1
        assert "Redis does not know whether it counted a batch, so the batch was given up" in caplog.messages
        assert totals(valkey) == [1 + reached, 0]
        assert await within(it.hit()) == Counts(2 + reached, 0)


@pytest.mark.parametrize("fate", [Fate.LOSE_REPLY, Fate.LOSE_REQUEST])
async def test_connection_that_is_lost_when_it_is_used_again_causes_no_503_and_no_log_line(
    valkey: Valkey, caplog: pytest.LogCaptureFixture, fate: Fate
) -> None:
    async with Proxy(valkey.port) as proxy, counting(valkey, proxy.port, lanes=1) as it:
        await it.hit()
        fates = iter([fate])
        proxy.fate = lambda request: next(fates, Fate.PASS)
        assert await within(it.hit()) == Counts(2, 0)
        assert totals(valkey) == [2, 0]
        assert not caplog.messages


@pytest.mark.parametrize("fate", [Fate.LOSE_REPLY, Fate.LOSE_REQUEST, Fate.SWALLOW_REPLY, Fate.STALL])
async def test_batch_is_sent_again_until_it_is_answered_and_counts_once(valkey: Valkey, fate: Fate) -> None:
    async with Proxy(valkey.port) as proxy, counting(valkey, proxy.port, lanes=1, timeout=10.0, redis_timeout=0.2) as it:
        await it.hit()
        left = 3

        def fail_thrice(request: Request) -> Fate:
            nonlocal left
            left -= 1
            return fate if left >= 0 else Fate.PASS

        proxy.fate = fail_thrice
        assert await within(it.hit()) == Counts(2, 0)
        assert proxy.fates[fate] == 3
        assert await within(it.hit()) == Counts(3, 0)
        await proxy.release()
        assert totals(valkey) == [3, 0]


@pytest.mark.parametrize(
    ("breaks", "mends", "words"),
    [
        (
            ("SET", "{hitcounter}:answers", "another type"),
            ("DEL", "{hitcounter}:answers"),
            "Redis: an unexpected error: WRONGTYPE",
        ),
        (
            ("ACL", "SETUSER", "default", "-expire"),
            ("ACL", "SETUSER", "default", "+expire"),
            "Redis failed half-way: it may have been counted",
        ),
    ],
    ids=["another type", "no right"],
)
async def test_batch_that_redis_fails_half_way_counts_once_at_most(
    valkey: Valkey, breaks: tuple[str, ...], mends: tuple[str, ...], words: str
) -> None:
    async with counting(valkey, timeout=1.5) as it:
        await it.hit()
        valkey.run(*breaks)
        results = await outcomes([it.hit(), it.post(), it.post("a")])
        assert {type(result) for result in results} == {UnavailableError}
        assert {str(result) for result in results} == {words}
        counted_hits, counted_posts = totals(valkey)
        assert counted_hits <= 2
        assert counted_posts <= 2
        valkey.run(*mends)
        assert await within(it.hit()) == Counts(counted_hits + 1, counted_posts)


async def test_batches_that_fail_half_way_leave_one_key_per_lane_and_the_next_batch_is_counted(valkey: Valkey) -> None:
    async with counting(valkey, lanes=2, timeout=5.0) as it:
        await it.hit()
        valkey.run("ACL", "SETUSER", "default", "-incrby")
        for _ in range(20):
            results = await outcomes([it.hit() for _ in range(10)])
            assert {type(result) for result in results} == {UnavailableError}
        assert len(writers(valkey)) <= 2
        valkey.run("ACL", "SETUSER", "default", "+incrby")
        assert await within(it.hit()) == Counts(2, 0)
        assert len(writers(valkey)) <= 2


async def test_programming_error_fails_its_batch_and_not_the_lane(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with counting(valkey, lanes=1) as it:
        with monkeypatch.context() as patch:
            patch.delattr(Batch, "settle")
            with pytest.raises(UnavailableError, match="this process cannot count it"):
                await within(it.hit())
        assert await within(it.hit()) == Counts(2, 0)
    assert caplog.messages == ["a batch failed"]


# --- close ---


@pytest.mark.parametrize("wait", [0, 0.05], ids=["before the batch is sent", "while the batch is in flight"])
async def test_close_answers_all_waiters_at_once(valkey: Valkey, wait: float) -> None:
    failed: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failed.append(context))
    async with counting(valkey, lanes=2, timeout=60.0, redis_timeout=30.0) as it:
        await it.hit()
        valkey.freeze()
        waiting = [it.hit() for _ in range(3000)] + [it.post("key")]
        await asyncio.sleep(wait)
        began = time.monotonic()
        await it.counter.close()
        assert all(future.done() for future in waiting)
        assert time.monotonic() - began < 1 * SLACK
        assert {str(result) for result in await outcomes(waiting)} == {"this process is shutting down"}
        assert it.metric("counter_pending") == 0
        await asyncio.sleep(0.05)  # until replies and timers that come late have reached the closed counter
    valkey.thaw()
    assert not failed


async def test_close_leaves_no_connection_and_no_task(valkey: Valkey) -> None:
    before = asyncio.all_tasks()
    async with counting(valkey, lanes=3) as it:
        await outcomes([it.hit() for _ in range(5000)])
    assert asyncio.all_tasks() == before

    def connections() -> int:
        with valkey.client() as client:
            return len(client.client_list())

    await eventually(lambda: connections() == 1, 2 * SLACK)


async def test_request_after_close_gets_503_in_time(valkey: Valkey) -> None:
    async with counting(valkey, timeout=0.3) as it:
        await it.hit()
    with pytest.raises(UnavailableError):
        await within(it.hit())
