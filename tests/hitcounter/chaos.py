"""Break the primary of a replicated store again and again under load, and check that no answered number is lost or given twice.

`make chaos` runs this module; test_failover.py runs each fault once.
"""

import asyncio
import statistics
import sys
import tempfile
import time
from enum import Enum, auto
from pathlib import Path

from nanoservice.testing.replicated import DOWN_AFTER, Peer, Replicated, Server
from nanoservice.testing.waiting import SLACK, eventually
from tests.support.load import Load
from tests.support.process import Spawn, metric, spawning

CONNECTIONS = 256
_PAUSE = 0.1  # seconds between an answer and the next request of its connection
_DELAY = 0.05  # seconds that replication needs, in each direction
_PROGRESS = 200  # answers
MEDIAN_SECONDS = 6.0  # the promised median of the time without an answer


class Fault(Enum):
    """What happens to the primary."""

    KILLED = auto()
    FROZEN = auto()
    CUT_FROM_SERVERS = auto()  # The services still reach the primary; its replicas and the Sentinels do not.
    CUT_OFF = auto()

    def begin(self, server: Server, store: Replicated) -> None:
        if self is Fault.KILLED:
            server.kill()
            server.network.abort()
        elif self is Fault.FROZEN:
            server.freeze()
        else:
            server.network.cut = frozenset(Peer if self is Fault.CUT_OFF else {Peer.REPLICA, Peer.SENTINEL})

    def end(self, server: Server) -> None:
        """Let the server come back. It does not know that it is not the primary any more."""
        if self is Fault.KILLED:
            server.start()
        elif self is Fault.FROZEN:
            server.thaw()
        else:
            server.network.cut = frozenset()


class Chaos:
    """Two services under load, with a replicated store whose primary breaks."""

    def __init__(self, store: Replicated, spawn: Spawn, replicas: int, **settings: str) -> None:
        self.store = store
        self.services = [spawn(store.environ(REDIS_REPLICAS=str(replicas), **settings)) for _ in range(2)]
        self.load = Load([service.port for service in self.services], CONNECTIONS, most=10_000_000, pause=_PAUSE)
        self.tally = self.load.tally
        self.gaps: dict[Fault, list[float]] = {fault: [] for fault in Fault}
        for server in store.servers:
            server.network.delay = _DELAY

    async def progress(self) -> None:
        """Wait until many more requests are answered."""
        answered = self.tally.answered
        await eventually(lambda: self.tally.answered > answered + _PROGRESS, 20 * SLACK)

    async def strike(self, fault: Fault) -> None:
        """Let one fault happen, wait until the services count again, and end the fault while the load continues."""
        await eventually(lambda: asyncio.to_thread(self.store.is_whole), 60 * SLACK)
        await self.progress()
        server = await asyncio.to_thread(self.store.primary)
        assert server
        watcher = asyncio.create_task(self._longest_gap())
        await asyncio.to_thread(fault.begin, server, self.store)
        await eventually(lambda: asyncio.to_thread(lambda: self.store.primary() not in (None, server)), 20 * SLACK)
        await self.progress()
        watcher.cancel()
        self.gaps[fault].append(await watcher)
        print(f"{fault.name}: {self.gaps[fault][-1]:.1f} s without an answer", flush=True)
        await asyncio.to_thread(fault.end, server)
        await asyncio.sleep(DOWN_AFTER)  # the old primary takes part again, under load

    async def _longest_gap(self) -> float:
        """Return the longest time without an answer, until the task is cancelled."""
        longest, answered, since = 0.0, self.tally.answered, time.monotonic()
        try:
            while True:
                await asyncio.sleep(0.005)
                now = time.monotonic()
                longest = max(longest, now - since)
                if self.tally.answered > answered:
                    answered, since = self.tally.answered, now
        except asyncio.CancelledError:
            return longest

    async def run(self, faults: list[Fault]) -> None:
        """Let all `faults` happen under load, then stop the services, so that no batch is in flight any more."""
        loading = asyncio.create_task(self.load.run(3600))
        try:
            for fault in faults:
                await self.strike(fault)
            self.failovers = [await metric(service, "redis_failovers_total") for service in self.services]
            self.rewinds = [await metric(service, "counter_rewinds_total") for service in self.services]
        finally:
            self.load.stop()
            await loading
        statuses = await asyncio.gather(*(asyncio.to_thread(service.end) for service in self.services))
        assert statuses == [0, 0]
        await eventually(lambda: asyncio.to_thread(self.store.primary), 20 * SLACK)

    def totals(self) -> tuple[int, int]:
        """Return the hits and posts that the primary has counted."""
        primary = self.store.primary()
        assert primary
        hits, posts = primary.run("MGET", "{hitcounter}:hits", "{hitcounter}:posts")
        return int(hits or 0), int(posts or 0)

    def check(self) -> None:
        """Fail if an answered number was lost or given twice, or if a request got neither an answer nor a 503."""
        print(f"failovers seen by each service: {self.failovers}; lost counts noticed: {self.rewinds}")
        assert set(self.tally.statuses) <= {200, 503}, self.tally.statuses
        self.tally.check(*self.totals())
        for fault, gaps in self.gaps.items():
            if gaps:
                print(f"{fault.name}: seconds without an answer:", *(f"{gap:.1f}" for gap in gaps))


async def main() -> None:
    """Let 35 faults happen, one after another."""
    faults = [*[Fault.KILLED] * 20, *list(Fault)[1:] * 5]
    with tempfile.TemporaryDirectory() as folder, spawning("hitcounter") as spawn:
        async with Replicated(Path(folder) / "store").running() as store:
            chaos = Chaos(store, spawn, replicas=1)
            await chaos.run(faults)
            chaos.check()
            gaps = [gap for each in chaos.gaps.values() for gap in each]
            median = statistics.median(gaps)
            print(f"{len(gaps)} failovers; seconds without an answer: median {median:.1f}, longest {max(gaps):.1f}")
            assert median <= MEDIAN_SECONDS


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
