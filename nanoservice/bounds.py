"""Limit what all connections of one port may use together, and choose the connection to close when a limit is reached.

The memory limit in manifests/base/deployment.yaml follows from these limits. Clients use at most 50 MiB: 10 MiB for 2,000
connections (`MAX_CONNECTIONS`) of 5 KiB each, 24 MiB for requests that are not answered yet (`HELD_BYTES`), and 16 MiB for long
bodies (`LONG_BODIES` of 2 MiB each: a body of 1 MiB, and its copy for the handler). The allocator keeps up to half as much again,
so clients cost 75 MiB. The service itself needs 48 MiB. The sum is 123 MiB; the limit is 128 MiB.
"""

import logging
import time
from collections import OrderedDict
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge

HEAD_BYTES = 16 << 10  # the maximum size of a whole request head, and of the trailer of a body
KERNEL_BYTES = 32 << 10  # the kernel's buffer of a connection in each direction; Linux doubles this number
BUFFER_BYTES = 16 << 10  # the buffer for a body that its handler has not read, and for answers that the client has not read
HELD_BYTES = 24 << 20  # the maximum memory of all unanswered requests of a port, as `Connection` estimates it
LONG_BYTES = 16 << 10  # A body with more bytes is long.
LONG_BODIES = 8  # This number of long bodies is received at a time. Further long bodies wait.
RESERVED_CONNECTIONS = 16  # This number of connections above the limit is accepted, for probes only.
ADMIN_CONNECTIONS = 32

_LOG_INTERVAL = 60.0  # seconds

_logger = logging.getLogger(__name__)


class Bounded(Protocol):
    """A connection. Two different connections are never equal."""

    held: int  # the estimated memory of its unanswered requests, in bytes

    def abort(self) -> None:
        """Close the connection at once, and free its memory."""

    def read(self) -> None:
        """Continue to read, because a long body may be received now."""


class BoundMetrics:
    """The metrics of all `Bounds`; the label `port` tells them apart."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.open = Gauge("http_connections", "Open connections", ["port"], registry=registry)
        self.held = Gauge(
            "http_held_bytes", "Estimated memory of requests that are not answered yet", ["port"], registry=registry
        )
        self.waiting = Gauge("http_long_bodies_waiting", "Long bodies that wait for others", ["port"], registry=registry)
        self.evicted = Counter(
            "http_connections_evicted", "Connections that were closed to make room", ["port", "reason"], registry=registry
        )
        self.refused = Counter(
            "http_connections_refused", "New connections that were closed or may only send probes", ["port"], registry=registry
        )


class Bounds:
    """The open connections of one port, and the memory that they use."""

    def __init__(self, metrics: BoundMetrics, port: str, limit: int) -> None:
        self.open: set[Bounded] = set()
        self.waiting: OrderedDict[Bounded, None] = OrderedDict()  # connections that wait for their clients, the longest first
        self._port, self._limit = port, limit
        self._held = 0
        self._receiving: set[Bounded] = set()  # connections that receive a long body
        self._queue: OrderedDict[Bounded, None] = OrderedDict()  # connections whose long body waits
        self._evicted = {reason: metrics.evicted.labels(port, reason) for reason in ("connections", "memory")}
        self._refused = metrics.refused.labels(port)
        metrics.open.labels(port).set_function(lambda: len(self.open))
        metrics.held.labels(port).set_function(lambda: self._held)
        metrics.waiting.labels(port).set_function(lambda: len(self._queue))
        self._quiet_until = 0.0

    def admit(self, connection: Bounded) -> bool:
        """Add a new connection, and return whether it may send any request, or only probes.

        If there are too many connections, close the one that has waited longest for its client. If none waits, the new connection
        may only send probes. If there are too many of those too, close the new connection.
        """
        if len(self.open) >= self._limit:
            if (now := time.monotonic()) >= self._quiet_until:
                self._quiet_until = now + _LOG_INTERVAL
                details = {"of_port": self._port, "limit": self._limit}
                _logger.warning("too many connections: closing the one that was idle longest", extra=details)
            if self.waiting:
                self._evict(next(iter(self.waiting)), "connections")
        self.open.add(connection)
        self.waiting[connection] = None
        if len(self.open) <= self._limit:
            return True
        self._refused.inc()
        if len(self.open) > self._limit + RESERVED_CONNECTIONS:
            connection.abort()
        return False

    def remove(self, connection: Bounded) -> None:
        """Remove a connection, and release what it holds."""
        self.open.discard(connection)
        self.waiting.pop(connection, None)
        self.release(connection)

    def _evict(self, connection: Bounded, reason: str) -> None:
        self._evicted[reason].inc()
        connection.abort()

    def hold(self, connection: Bounded, size: int) -> None:
        """Add `size` bytes to what `connection` holds. If all connections hold too much together, close the one with the most."""
        connection.held += size
        self._held += size
        if self._held > HELD_BYTES:
            self._evict(max(self.open, key=lambda one: one.held), "memory")

    def may_receive(self, connection: Bounded) -> bool:
        """Return whether `connection` may receive a long body now. If not, `connection.read` is called later, when it may."""
        if connection not in self._receiving:
            if len(self._receiving) >= LONG_BODIES:
                self._queue[connection] = None
                return False
            self._queue.pop(connection, None)
            self._receiving.add(connection)
        return True

    def release(self, connection: Bounded) -> None:
        """Release what `connection` holds, because its request is answered. A long body that waits may then be received."""
        self._held -= connection.held
        connection.held = 0
        self._queue.pop(connection, None)
        if connection in self._receiving:
            self._receiving.remove(connection)
            if self._queue:
                following, _ = self._queue.popitem(last=False)
                self._receiving.add(following)
                following.read()
