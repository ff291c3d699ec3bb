"""The counter. It counts requests that arrive together as one batch, and each request exactly once.

A request joins a batch and waits on a future of its own. A few lanes send the batches. Each lane sends one batch at a time, as
one call of `count.lua`, and then gives each request its number. Requests that arrive while a batch is under way share the next
one. So under load, one command counts many requests, and Redis syncs to disk once per batch.

If a reply is lost, the lane does not know whether its batch was counted. The lane then sends the same batch again, under the same
name and sequence number. The script counts this batch only if it has not counted it already: `count.lua` explains how.

This module borrows a name from hiredis. tests/hitcounter/test_borrowed.py fails if an upgrade removes it.

- `pack_command`: hiredis exports this function but does not document it. Without it nothing is counted. The driver's own
  packing, which is in Python, will replace it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Iterator
from enum import Enum
from hashlib import blake2b, sha1
from importlib import resources
from itertools import chain, repeat
from typing import Any, NamedTuple
from uuid import uuid4

from hiredis import pack_command
from prometheus_client import CollectorRegistry, Gauge, Histogram
from prometheus_client import Counter as Total
from redis import exceptions

from nanoservice.errors import UnavailableError
from nanoservice.health import REDIS_ERRORS
from nanoservice.redis import Store

SCRIPT = resources.files(__package__).joinpath("count.lua").read_text()
_SHA = sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()  # Redis keeps the script under this name.

_MAX_BATCH = 1000  # requests; this bounds the time of one script call, and the time to answer its requests
_SIZE_BUCKETS = 1, 2, 5, 10, 20, 50, 100, 200, 500, _MAX_BATCH
_TIME_BUCKETS = 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1  # seconds
_JOIN_SECONDS = 0.1  # A batch that waits for a lane accepts requests for this time; all have the batch's deadline.
_LINGER_SECONDS = 0.001  # While some lanes are busy, a new batch grows for this time before an idle lane takes it.
_VERDICTS = b"counted", b"late", b"unknown", b"failed"  # the first word of the script's reply
# The back-off before each retry of a batch. The last value repeats. Each wait is a random 50 to 100 % of its value.
_BACKOFF_SECONDS = 0.05, 0.1, 0.2, 0.4

_SHUTDOWN = "this process is shutting down"

_logger = logging.getLogger(__name__)


class Counts(NamedTuple):
    """The numbers of hits and posts just after a request was counted. They include that request."""

    hits: int
    posts: int


class Counter:
    """Counts the hits and posts of the service `name` in `store`. Call `start()` first, and `close()` last.

    At most `max_pending` requests wait at a time, each for at most `timeout` seconds. Redis remembers the answers to the newest
    `keep` Idempotency-Keys.
    """

    def __init__(
        self, name: str, store: Store, registry: CollectorRegistry, *,
        lanes: int, max_pending: int, timeout: float, redis_timeout: float, keep: int,
    ) -> None:  # fmt: skip
        self._max_pending = max_pending
        self._timeout = timeout
        self._pending = 0
        self._queue: deque[Batch] = deque()
        self._idle: list[asyncio.Future[None]] = []  # one future for each lane that waits for a batch
        self._tasks: list[asyncio.Task[None]] = []
        self._health = store.health
        self._highest = Counts(0, 0)  # the highest numbers of all answers
        # For each batch under way, the ranges of numbers that other batches have got since this batch was sent. A range is the
        # totals before and after; adjacent ranges are merged.
        self._meanwhile: dict[Batch, list[tuple[Counts, Counts]]] = {}
        self._rewinds = 0
        self._size = Histogram("counter_batch_size", "Requests counted by one call", buckets=_SIZE_BUCKETS, registry=registry)
        round_trip = Histogram("counter_round_trip_seconds", "Time to a batch's reply", buckets=_TIME_BUCKETS, registry=registry)
        replies = Total("counter_replies", "Replies of the script", ["verdict"], registry=registry)
        verdicts = {verdict: replies.labels(verdict.decode()) for verdict in _VERDICTS}
        lost = Total("counter_lost_batches", "Batches given up because they may have been counted", registry=registry)
        self._lanes = [
            Lane(name, store, round_trip, verdicts, lost, redis_timeout=redis_timeout, keep=keep) for _ in range(lanes)
        ]
        self._rewinds_total = Total("counter_rewinds", "Times that Redis had less than was answered", registry=registry)
        self._replayed = Total("counter_keys_replayed", "Posts that got an earlier answer of their key", registry=registry)
        self._shed = Total("counter_shed", "Requests refused because too many waited", registry=registry)
        self._timeouts = Total("counter_timeouts", "Requests that were not counted in time", registry=registry)
        Gauge("counter_pending", "Requests that wait for their number", registry=registry).set_function(lambda: self._pending)
        Gauge("counter_max_pending", "Requests that may wait for their number", registry=registry).set(max_pending)

    async def start(self) -> None:
        """Begin to count requests."""
        self._tasks = [asyncio.create_task(self._run(lane)) for lane in self._lanes]

    def hit(self) -> asyncio.Future[Counts]:
        """Count a hit, and return a future of its numbers. The future raises UnavailableError if the hit is not counted in time.

        If too many requests wait already, this call itself raises UnavailableError.
        """
        future = asyncio.get_running_loop().create_future()
        self._join().hits.append(future)
        return future

    def post(self, key: str | None = None) -> asyncio.Future[Counts]:
        """Count a post, or return the answer that `key` got before. Raises UnavailableError as `hit` does."""
        future = asyncio.get_running_loop().create_future()
        if key is None:
            self._join().posts.append(future)
        else:  # Redis keeps a digest of 16 bytes, however long the key is.
            self._join().keyed.append((blake2b(key.encode(), digest_size=16).digest(), future))
        return future

    async def close(self) -> None:
        """Answer 503 to all waiting requests, and close the connections."""
        self._idle.clear()  # A request that arrives from now on finds no lane, and gets 503 at its deadline.
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for batch in self._queue:
            self._give_up(batch, _SHUTDOWN)
        self._queue.clear()
        for lane in self._lanes:
            await lane.close()

    def _join(self) -> Batch:
        """Return the batch for the next request."""
        if self._pending >= self._max_pending:
            self._shed.inc()
            raise UnavailableError("too many requests wait already")
        loop = asyncio.get_running_loop()
        now = loop.time()
        batch = self._queue[-1] if self._queue else None
        if batch is None or batch.size >= _MAX_BATCH or now > batch.joinable_until:
            batch = Batch(now, self._timeout)
            self._queue.append(batch)
            batch.timer = loop.call_at(batch.deadline, self._expire, batch)
            # If all lanes are idle, wake one at once; until it runs, the requests of this iteration of the event loop still join
            # the batch. If a lane is busy, let the batch grow for a moment: a batch of many costs as much as a batch of one.
            if len(self._idle) == len(self._lanes):
                self._wake()
            else:
                loop.call_later(_LINGER_SECONDS, self._wake)
        batch.size += 1
        self._pending += 1
        return batch

    def _wake(self) -> None:
        """Let an idle lane take the next batch, if a lane is idle and a batch waits."""
        if self._queue and self._idle:
            self._idle.pop().set_result(None)

    def _expire(self, batch: Batch) -> None:
        """Answer 503 to the requests of `batch`, and say why Redis has not counted them in time."""
        self._timeouts.inc(sum(1 for _ in batch.waiting()))
        self._give_up(batch, "Redis: " + (self._health.reason or "it does not answer in time"))

    def _give_up(self, batch: Batch, reason: str) -> None:
        """Answer 503 to the requests of `batch` that still wait, and free the places of all of them in `max_pending`."""
        batch.fail(reason)
        self._pending -= batch.size
        batch.size = 0
        batch.timer.cancel()

    async def _run(self, lane: Lane) -> None:
        """Send one batch after another over `lane`."""
        while True:
            while not self._queue:
                idle = asyncio.get_running_loop().create_future()
                self._idle.append(idle)
                await idle
            batch = self._queue.popleft()
            try:
                await self._count(batch, lane)
            except asyncio.CancelledError:
                self._give_up(batch, _SHUTDOWN)
                raise
            except Exception:  # A bug must fail only this batch, not stop the lane.
                _logger.exception("a batch failed")
                await lane.close()  # The connection may still deliver a reply to this batch.
            finally:
                self._give_up(batch, "this process cannot count it")

    async def _count(self, batch: Batch, lane: Lane) -> None:
        """Let `lane` count `batch`, and give each request its numbers."""
        floor, rewinds = self._highest, self._rewinds
        meanwhile: list[tuple[Counts, Counts]] = []
        self._meanwhile[batch] = meanwhile
        try:
            reply = await lane.count(batch)
        finally:
            del self._meanwhile[batch]
        if reply is None:
            return
        _, _, hits, posts, all_posts, *answers = reply
        before, after = batch.settle(hits, posts, answers), Counts(hits, all_posts)
        self._size.observe(len(batch.hits) + len(batch.posts) + len(batch.keyed))
        if batch.keyed:
            self._replayed.inc(len(batch.keyed) - (all_posts - posts))
        if rewinds != self._rewinds:
            return  # Another batch has reported the rewind already.
        if before.hits < floor.hits or before.posts < floor.posts or _overlap((before, after), meanwhile):
            self._rewinds += 1
            self._rewinds_total.inc()
            _logger.error(
                "Redis has lost counts that were answered; counting continues from what it has",
                extra={"answered": self._highest._asdict(), "found": before._asdict()},
            )
            self._highest = Counts(0, 0)
        self._highest = Counts(max(after.hits, self._highest.hits), max(after.posts, self._highest.posts))
        for others in self._meanwhile.values():
            first = others.pop()[0] if others and others[-1][1] == before else before
            others.append((first, after))


def _overlap(one: tuple[Counts, Counts], others: list[tuple[Counts, Counts]]) -> bool:
    """Return whether the range `one` shares a number with one of the ranges `others`. If so, Redis has lost counts."""
    before, after = one
    return any(
        max(before.hits, first.hits) < min(after.hits, last.hits) or max(before.posts, first.posts) < min(after.posts, last.posts)
        for first, last in others
    )


class Batch:
    """The requests that one script call counts, with a future for each request."""

    def __init__(self, now: float, timeout: float) -> None:
        self.joinable_until = now + min(_JOIN_SECONDS, timeout / 10)
        self.deadline = now + timeout
        self.timer: asyncio.TimerHandle  # It fires at the deadline.
        self.size = 0
        self.hits: list[asyncio.Future[Counts]] = []
        self.posts: list[asyncio.Future[Counts]] = []
        self.keyed: list[tuple[bytes, asyncio.Future[Counts]]] = []

    def waiting(self) -> Iterator[asyncio.Future[Counts]]:
        """Yield the futures that have no result yet."""
        for future in (*self.hits, *self.posts, *(future for _, future in self.keyed)):
            if not future.done():
                yield future

    def freeze(self) -> tuple[int, int, list[bytes]]:
        """Drop the requests that were cancelled; return the number of hits, the number of posts, and the keys' digests.

        The request of a client that has disconnected is not cancelled, so it is counted.
        No request joins the batch after this call, so each retry sends the same batch.
        """
        self.hits = [future for future in self.hits if not future.done()]
        self.posts = [future for future in self.posts if not future.done()]
        self.keyed = [(digest, future) for digest, future in self.keyed if not future.done()]
        return len(self.hits), len(self.posts), [digest for digest, _ in self.keyed]

    def settle(self, hits: int, posts: int, answers: list[int]) -> Counts:
        """Give each request its numbers, in order of arrival: hits, then posts, then posts with a key.

        `hits` and `posts` are the totals after the batch, and `answers` has two numbers for each key. Return the totals before
        the batch.
        """
        before = Counts(hits - len(self.hits), posts - len(self.posts))
        for number, future in enumerate(self.hits, before.hits + 1):
            if not future.done():
                future.set_result(Counts(number, before.posts))
        for number, future in enumerate(self.posts, before.posts + 1):
            if not future.done():
                future.set_result(Counts(hits, number))
        for (_, future), *counts in zip(self.keyed, answers[::2], answers[1::2], strict=True):
            if future.done():
                continue
            if counts[1] < 0:
                future.set_exception(UnavailableError("another version of this service has answered this Idempotency-Key"))
            else:
                future.set_result(Counts(*counts))
        return before

    def fail(self, reason: str) -> None:
        """Answer 503 to all requests that still wait."""
        for future in self.waiting():
            future.set_exception(UnavailableError(reason))


class Lane:
    """Sends batches to the script, one at a time, over a connection of its own."""

    def __init__(
        self, name: str, store: Store, round_trip: Histogram, verdicts: dict[bytes, Total], lost: Total, *,
        redis_timeout: float, keep: int,
    ) -> None:  # fmt: skip
        self._name = name
        self._health = store.health
        self._connection = store.connection()
        self._replication = store.replication
        self._round_trip = round_trip
        self._verdicts = verdicts
        self._lost = lost
        self._redis_timeout = redis_timeout
        self._keep = keep
        self._writer = WriterState()

    async def count(self, batch: Batch) -> list[Any] | None:
        """Return the script's reply to `batch`, or None if no request of the batch needs a reply any more.

        Send the batch again and again, until Redis has replied or the batch's deadline has passed.
        """
        hits, posts, digests = batch.freeze()
        if not (hits or posts or digests):
            return None
        loop = asyncio.get_running_loop()
        self._writer.begin()
        was_idle = self._connection.is_connected
        backoffs = chain(_BACKOFF_SECONDS, repeat(_BACKOFF_SECONDS[-1]))
        while True:
            sent, seen, began = False, self._health.successes, loop.time()
            try:
                async with asyncio.timeout_at(min(began + self._redis_timeout, batch.deadline)):
                    await self._connection.connect()
                    sent = True
                    reply: list[Any] = await self._call(hits, posts, digests)
                    if reply[1] != self._writer.sequence:  # A proxy may have repeated a request.
                        raise exceptions.InvalidResponse(f"batch {self._writer.sequence} got the reply to batch {reply[1]}")
            except REDIS_ERRORS as error:
                self._writer.failed(error, sent=sent)
                await self.close()
                if was_idle and isinstance(error, exceptions.ConnectionError):
                    was_idle = False  # The connection may have died while it was idle: try a new one before blaming Redis.
                    continue
                # An attempt that the batch's deadline cut short shows nothing new if an outage is already known.
                if not self._health.reason or loop.time() < batch.deadline:
                    self._health.failed("work", error, seen)
                await asyncio.sleep(next(backoffs) * random.uniform(0.5, 1))
                if next(batch.waiting(), None) is None:
                    return None
                continue
            self._round_trip.observe(loop.time() - began)
            self._verdicts[reply[0]].inc()
            verdict = self._writer.replied(reply)
            if verdict is Verdict.COUNTED:
                self._health.worked("work")  # Only this reply shows that Redis can write: the script has written a count.
                return reply
            # Under a new name, sequence numbers begin at 1 again. So a late reply to an older batch could have the expected
            # number. A new connection receives no late reply.
            await self.close()
            if verdict is Verdict.LOST:
                self._lost.inc()
                if reply[0] == b"failed":  # The error of the earlier attempt is logged already.
                    what = "failed half-way"
                else:
                    what = "has lost what it knew of this request"
                    _logger.error("Redis does not know whether it counted a batch, so the batch was given up")
                batch.fail(f"Redis {what}: it may have been counted")
                return None

    async def _call(self, hits: int, posts: int, digests: list[bytes]) -> Any:
        connection, writer = self._connection, self._writer
        command: Any = "EVALSHA", _SHA, 5, *_keys(self._name, writer.name), writer.sequence, hits, posts, self._keep, *digests
        packed = pack_command(command)  # hiredis packs in C; the driver itself packs in Python.
        if wait := self._replication.wait:
            packed += pack_command(wait)
        await connection.send_packed_command(packed)
        try:
            reply = await connection.read_response()
        except exceptions.NoScriptError:  # This Redis has not loaded the script yet, or has flushed it.
            if wait:
                await connection.read_response()
            await connection.send_command("SCRIPT", "LOAD", SCRIPT)
            await connection.read_response()
            await connection.send_packed_command(packed)
            reply = await connection.read_response()
        if wait and reply[0] == b"counted":
            writer.doubt()
            await self._replication.confirm(connection)
        return reply

    async def close(self) -> None:
        """Close the connection. The next batch opens it again."""
        await self._connection.disconnect(nowait=True)


def hits_key(name: str) -> str:
    """Return the key that holds the number of hits of the service `name`."""
    return f"{{{name}}}:hits"


def _keys(name: str, writer: str) -> tuple[str, ...]:
    """Return the script's keys. The braces are a hash tag, which keeps all keys in one slot."""
    return hits_key(name), f"{{{name}}}:posts", f"{{{name}}}:writer:{writer}", f"{{{name}}}:answers", f"{{{name}}}:order"


class Verdict(Enum):
    """What a reply means for its batch."""

    COUNTED = "its numbers are in the reply"
    AGAIN = "not counted, neither now nor before: send it under the new name"
    LOST = "not counted now, but perhaps before: give it up"


class WriterState:
    """The lane's identity towards the script: its name, the number of its last batch, and whether that batch is in doubt.

    Only this class decides whether a batch is sent, sent again, or given up. It does no I/O, so the model in the tests runs this
    class, too.
    """

    def __init__(self) -> None:
        self._rename()

    def _rename(self) -> None:
        self.name = uuid4().hex  # never used before
        self.sequence = 0
        self.in_doubt = False  # The batch was sent, and nothing shows whether it was counted.

    def begin(self) -> None:
        """Begin the next batch, which was never sent before."""
        self.sequence += 1
        self.in_doubt = False

    def failed(self, error: BaseException, *, sent: bool) -> None:
        """Record that `error` came instead of a reply. The same batch may be sent again."""
        # If Redis replies with an error, the outcome is known: nothing was counted, or a retry gets the reply "failed".
        if sent and not isinstance(error, exceptions.ResponseError):
            self.doubt()

    def doubt(self) -> None:
        """Record that Redis may have counted the batch, and may lose it in a failover."""
        self.in_doubt = True

    def replied(self, reply: list[Any]) -> Verdict:
        """Return what `reply` means."""
        if reply[0] == b"counted":
            return Verdict.COUNTED
        # The script knows this writer, so the name stays valid. A new name would leave a key in Redis for each failed batch.
        if reply[0] == b"failed":
            return Verdict.LOST
        # This call of the script counted nothing, and the writer needs a new name. The batch may be sent under that name only if
        # no earlier call can have counted it.
        lost = self.in_doubt or reply[0] != b"unknown"
        self._rename()
        if lost:
            return Verdict.LOST
        self.begin()
        return Verdict.AGAIN
