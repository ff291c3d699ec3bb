"""The counter: requests that arrive together are counted together, each exactly once.

A request joins a batch and waits on a future of its own. A few lanes each send one batch at a time, as one call of `count.lua`,
and give out the numbers; what arrives meanwhile shares the next batch. So a loaded service sends a few hundredths of a command
a request, and a store that syncs each write to disk syncs once a batch.

A lost reply does not tell whether its batch was counted. The lane sends the same batch again under the same name and sequence
number, and the script counts it only if it has not yet. `count.lua` holds the argument.
"""

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
from redis.exceptions import NoScriptError, ResponseError

from nanoservice.answer import UnavailableError
from nanoservice.redis import Errors, Store

SCRIPT = resources.files(__package__).joinpath("count.lua").read_text()
_SHA = sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()  # the name that Redis gives it

_LARGEST = 1000  # requests in a batch: bounds the time of one script call, and of giving out its numbers
_JOIN = 0.1  # seconds for which a batch that cannot be sent takes in more: they share its deadline
_PATIENCE = 0.001  # seconds that a batch waits for a lane under way before another one sets out
_PAUSES = 0.05, 0.1, 0.2, 0.4  # seconds before a batch is sent again, the last from then on; half of it is random

_logger = logging.getLogger(__name__)


class Counts(NamedTuple):
    """How many hits and posts there were when a request was counted, itself included."""

    hits: int
    posts: int


class Batch:
    """Requests that are counted by one call; a future for each."""

    def __init__(self, now: float, timeout: float) -> None:
        self.joinable_until = now + min(_JOIN, timeout / 10)
        self.deadline = now + timeout
        self.timer: asyncio.TimerHandle  # at the deadline
        self.size = 0
        self.hits: list[asyncio.Future[Counts]] = []
        self.posts: list[asyncio.Future[Counts]] = []
        self.keyed: list[tuple[bytes, asyncio.Future[Counts]]] = []

    def waiting(self) -> Iterator[asyncio.Future[Counts]]:
        """Yield the futures of those who still wait."""
        for future in (*self.hits, *self.posts, *(future for _, future in self.keyed)):
            if not future.done():
                yield future

    def arguments(self) -> tuple[Any, ...]:
        """Leave out who has gone away, and return what the script is to count: the same from now on."""
        self.hits = [future for future in self.hits if not future.done()]
        self.posts = [future for future in self.posts if not future.done()]
        self.keyed = [(digest, future) for digest, future in self.keyed if not future.done()]
        return len(self.hits), len(self.posts), [digest for digest, _ in self.keyed]

    def settle(self, hits: int, posts: int, answers: list[int]) -> Counts:
        """Give each its number, in order of arrival: hits, then posts, then posts with a key. Return what was counted before."""
        before = Counts(hits - len(self.hits), posts - len(self.posts))
        for number, future in enumerate(self.hits, before.hits + 1):
            if not future.done():
                future.set_result(Counts(number, before.posts))
        for number, future in enumerate(self.posts, before.posts + 1):
            if not future.done():
                future.set_result(Counts(hits, number))
        for (_, future), *counts in zip(self.keyed, answers[::2], answers[1::2], strict=True):
            if not future.done():
                future.set_result(Counts(*counts))
        return before

    def fail(self, reason: str) -> None:
        """Answer 503 to all who still wait."""
        for future in self.waiting():
            future.set_exception(UnavailableError(reason))


class Verdict(Enum):
    """What a reply means for the batch that it answers."""

    COUNTED = "its numbers are in the reply"
    AGAIN = "not counted, now or before: to be sent under the new name"
    LOST = "not counted now, perhaps before: to be given up"


class Writer:
    """What a lane is to the script: a name, and the number of its last batch; and what is known of that batch.

    This is all that decides whether a batch is sent, sent again or given up. It does no I/O: the tests' model runs it too.
    """

    def __init__(self) -> None:
        self._rename()

    def _rename(self) -> None:
        self.name = uuid4().hex  # never used before
        self.sequence = 0
        self.in_doubt = False  # the batch was sent, and nothing tells whether it was counted

    def begin(self) -> None:
        """Go on to a batch that was never sent."""
        self.sequence += 1
        self.in_doubt = False

    def failed(self, error: BaseException, *, sent: bool) -> None:
        """Note that `error` came in place of a reply; the same batch may be sent again."""
        # An error that Redis replies with is an answer: the script counted nothing.
        self.in_doubt = self.in_doubt or (sent and not isinstance(error, ResponseError))

    def replied(self, reply: list[Any]) -> Verdict:
        """Return what `reply` means."""
        if reply[0] == b"counted":
            return Verdict.COUNTED
        # The script does not know this writer any more, and counted nothing. Only a batch that it cannot have counted before
        # may be sent under another name.
        lost = self.in_doubt or reply[0] != b"unknown"
        self._rename()
        if lost:
            return Verdict.LOST
        self.begin()
        return Verdict.AGAIN


class Lane:
    """Has the script count batches, one at a time, over a connection of its own."""

    def __init__(self, name: str, store: Store, round_trip: Histogram, *, redis_timeout: float, keep: int) -> None:
        self._name = name
        self._health = store.health
        self._connection = store.connection()
        self._round_trip = round_trip
        self._redis_timeout = redis_timeout
        self._keep = keep
        self._writer = Writer()

    async def count(self, batch: Batch) -> list[Any] | None:
        """Return the script's reply to `batch`, or None when all who waited have been answered otherwise.

        Sends it again until there is a reply or the batch's deadline is over.
        """
        hits, posts, digests = batch.arguments()
        if not (hits or posts or digests):
            return None
        loop = asyncio.get_running_loop()
        self._writer.begin()
        for pause in chain(_PAUSES, repeat(_PAUSES[-1])):
            sent, seen, began = False, self._health.successes, loop.time()
            try:
                async with asyncio.timeout_at(min(began + self._redis_timeout, batch.deadline)):
                    await self._connection.connect()  # type: ignore[no-untyped-call] # the driver is typed in part
                    sent = True
                    reply: list[Any] = await self._call(hits, posts, digests)
            except Errors as error:
                self._writer.failed(error, sent=sent)
                # What the batch's end cut short tells nothing of Redis, if its trouble is known already.
                if not self._health.reason or loop.time() < batch.deadline:
                    self._health.failed("work", error, seen)
                await self.close()
                await asyncio.sleep(pause * random.uniform(0.5, 1))
                if next(batch.waiting(), None) is None:
                    return None
                continue
            self._round_trip.observe(loop.time() - began)
            verdict = self._writer.replied(reply)
            if verdict is Verdict.COUNTED:
                self._health.worked("work")  # any other reply shows nothing: it comes before the script writes what it counts
                return reply
            if verdict is Verdict.LOST:
                what = "failed half-way" if reply[0] == b"failed" else "has lost what it knew of this request"
                batch.fail(f"Redis {what}: it may have been counted")
                return None
        raise AssertionError("unreachable")  # pragma: no cover - for the type checker: the pauses have no end

    async def _call(self, hits: int, posts: int, digests: list[bytes]) -> Any:
        connection, writer = self._connection, self._writer
        command: Any = "EVALSHA", _SHA, 5, *_keys(self._name, writer.name), writer.sequence, hits, posts, self._keep, *digests
        packed = pack_command(command)  # in C; the connection's own is in Python
        await connection.send_packed_command(packed)
        try:
            return await connection.read_response()
        except NoScriptError:  # a new server, or one whose scripts were flushed
            await connection.send_command("SCRIPT", "LOAD", SCRIPT)
            await connection.read_response()
            await connection.send_packed_command(packed)
            return await connection.read_response()

    async def close(self) -> None:
        """Close the connection; the next batch opens it again."""
        await self._connection.disconnect(nowait=True)


def _keys(name: str, writer: str) -> tuple[str, ...]:
    """Return the script's keys; the braces, a hash tag, keep them in one slot."""
    return f"{{{name}}}:hits", f"{{{name}}}:posts", f"{{{name}}}:writer:{writer}", f"{{{name}}}:answers", f"{{{name}}}:order"


class Counter:
    """Counts the hits and posts of the service `name` in `store`: `start()` comes first, `close()` last.

    At most `max_pending` requests wait at a time, each for at most `timeout` seconds; the answers to `keep` Idempotency-Keys
    are remembered.
    """

    def __init__(
        self, name: str, store: Store, registry: CollectorRegistry, *,
        lanes: int, max_pending: int, timeout: float, redis_timeout: float, keep: int,
    ) -> None:  # fmt: skip
        self._max_pending = max_pending
        self._timeout = timeout
        self._pending = 0
        self._queue: deque[Batch] = deque()
        self._idle: list[asyncio.Future[None]] = []  # of the lanes that wait for a batch
        self._tasks: list[asyncio.Task[None]] = []
        self._health = store.health
        self._highest = Counts(0, 0)  # that was answered
        self._rewinds = 0
        self._size = Histogram(
            "counter_batch_size",
            "Requests counted by one call",
            buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000),
            registry=registry,
        )
        round_trip = Histogram("counter_round_trip_seconds", "Time from sending a batch to its numbers", registry=registry)
        self._lanes = [Lane(name, store, round_trip, redis_timeout=redis_timeout, keep=keep) for _ in range(lanes)]
        self._rewound = Total("counter_rewinds", "Times that Redis came back with less than was answered", registry=registry)
        Gauge("counter_pending", "Requests that wait for their number", registry=registry).set_function(lambda: self._pending)

    def hit(self) -> asyncio.Future[Counts]:
        """Count a hit. Raises UnavailableError, at once if too many wait."""
        future = asyncio.get_running_loop().create_future()
        self._join().hits.append(future)
        return future

    def post(self, key: str | None = None) -> asyncio.Future[Counts]:
        """Count a post, or give the answer that `key` got before. Raises UnavailableError, at once if too many wait."""
        future = asyncio.get_running_loop().create_future()
        if key is None:
            self._join().posts.append(future)
        else:  # the store holds 16 bytes of each key, however long it is
            self._join().keyed.append((blake2b(key.encode(), digest_size=16).digest(), future))
        return future

    def _join(self) -> Batch:
        """Return the batch that takes in the next request."""
        if self._pending >= self._max_pending:
            raise UnavailableError("too many requests wait already")
        loop = asyncio.get_running_loop()
        now = loop.time()
        batch = self._queue[-1] if self._queue else None
        if batch is None or batch.size >= _LARGEST or now > batch.joinable_until:
            batch = Batch(now, self._timeout)
            self._queue.append(batch)
            batch.timer = loop.call_at(batch.deadline, self._expire, batch)
            # What arrives in this turn of the event loop joins it before a lane runs. A lane under way is waited for a
            # moment: a batch of many costs as much as a batch of one.
            if len(self._idle) == len(self._lanes):
                self._wake()
            else:
                loop.call_later(_PATIENCE, self._wake)
        batch.size += 1
        self._pending += 1
        return batch

    def _wake(self) -> None:
        """Have an idle lane, if there is one, take the next batch, if there is one."""
        if self._queue and self._idle:
            self._idle.pop().set_result(None)

    def _expire(self, batch: Batch) -> None:
        """Answer those of `batch` whose time is over."""
        batch.fail("Redis: " + (self._health.reason or "it does not answer in time"))
        self._release(batch)

    def _release(self, batch: Batch) -> None:
        """Let as many others wait as `batch` had."""
        self._pending -= batch.size
        batch.size = 0
        batch.timer.cancel()

    async def _run(self, lane: Lane) -> None:
        """Send one batch after the other over `lane`."""
        while True:
            while not self._queue:
                idle = asyncio.get_running_loop().create_future()
                self._idle.append(idle)
                await idle
            batch = self._queue.popleft()
            try:
                await self._count(batch, lane)
            except Exception:  # a defect of ours costs its batch, not the lane
                _logger.exception("a batch failed")
            finally:  # also when the service ends
                batch.fail("this process cannot count it")
                self._release(batch)

    async def _count(self, batch: Batch, lane: Lane) -> None:
        """Have `lane` count `batch`, and give out the numbers."""
        floor, rewinds = self._highest, self._rewinds
        reply = await lane.count(batch)
        if reply is None:
            return
        _, hits, posts, *answers = reply
        before = batch.settle(hits, posts, answers)
        self._size.observe(len(batch.hits) + len(batch.posts) + len(batch.keyed))
        if rewinds != self._rewinds:
            return  # another batch has told already
        if before.hits < floor.hits or before.posts < floor.posts:
            self._rewinds += 1
            self._rewound.inc()
            _logger.error(
                "Redis has lost counts that were answered; counting goes on from what it has",
                extra={"answered": floor._asdict(), "found": before._asdict()},
            )
            self._highest = Counts(0, 0)
        # The highest but for posts with a key: their answers may be from before the store lost something.
        self._highest = Counts(max(hits, self._highest.hits), max(posts, self._highest.posts))

    async def start(self) -> None:
        """Begin to take requests."""
        self._tasks = [asyncio.create_task(self._run(lane)) for lane in self._lanes]

    async def close(self) -> None:
        """Answer 503 to all who wait, and close the connections."""
        self._idle.clear()  # who comes from now on finds no lane, and gets 503 when its time is over
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for batch in self._queue:
            self._expire(batch)
        self._queue.clear()
        for lane in self._lanes:
            await lane.close()
