"""Make sure that a failover cannot lose a write that was answered."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Gauge
from redis.asyncio.connection import AbstractConnection

from nanoservice.health import REDIS_ERRORS, TooFewReplicasError
from nanoservice.sentinel import Address, NoPrimaryError

# WAIT asks the replicas once. A replica that is attached a moment later answers only the next WAIT.
_WAIT_MILLISECONDS = 100
_SURVEY_SECONDS = 2.0  # A replica reports its offset at least once a second.


class Replication:
    """Makes sure that replicas have what was written over a connection, at least `replicas` of them.

    Send the command `wait` over the same connection after the write, then await `confirm`. `wait` is None if no replica is
    needed.

    Sentinels may promote a replica although the primary is still alive: it answers them too slowly, or somebody asked for a
    failover. The old primary then accepts writes for a moment, its other replica acknowledges them, and both lose them later. So
    with Sentinels, a write needs all replicas that are attached to the primary. If one of them does not have the write in time,
    this class asks that replica whether it is a primary now. A replica that does not answer this question in time counts as lost,
    so on an overloaded machine such a write may be lost. `connection(host, port)` returns a connection for the question, not open
    yet; it is None without Sentinels.
    """

    def __init__(
        self,
        replicas: int,
        timeout: float,
        registry: CollectorRegistry,
        connection: Callable[[str, int], AbstractConnection] | None,
    ) -> None:
        self._replicas = replicas
        self._connection = connection
        # The time limit for asking a replica whether it is a primary. This time and that of WAIT must together be less than
        # `timeout`.
        self._seconds = timeout * 0.4
        self._wait_seconds = timeout / 2  # If WAIT took longer than `timeout`, its reply would be lost.
        self._wanted = replicas
        self._primary: Address | None = None
        self._known: set[Address] = set()  # the replicas that have been attached to this primary
        self._offset = 0  # the primary's offset at the last survey
        self._next_survey = 0.0
        if replicas:
            self._have = Gauge("redis_replicas", "Replicas that had the last write in time", registry=registry)
            self._expected = Gauge("redis_replicas_expected", "Replicas that Redis should have", registry=registry)
            self._expected.set(replicas)

    @property
    def wait(self) -> tuple[Any, ...] | None:
        """Return the words of the command WAIT."""
        milliseconds = max(1, min(_WAIT_MILLISECONDS, int(self._wait_seconds * 1000)))
        return ("WAIT", self._wanted, milliseconds) if self._replicas else None

    async def confirm(self, connection: AbstractConnection) -> None:
        """Read the reply to `wait`, and repeat `wait` for a while if replicas lack the write.

        Raises TooFewReplicasError or NoPrimaryError if a failover could lose the write.
        """
        until = time.monotonic() + self._wait_seconds - _WAIT_MILLISECONDS / 1000
        while (have := await connection.read_response()) < self._wanted and time.monotonic() < until:
            await connection.send_command("WAIT", self._wanted, _WAIT_MILLISECONDS)
        self._have.set(have)
        if have < self._replicas:
            raise TooFewReplicasError
        if not self._connection:
            return
        if have < self._wanted:
            await self._check_known()
            self._wanted = max(self._replicas, len(self._known))
        now = asyncio.get_running_loop().time()
        if now >= self._next_survey:
            self._next_survey = now + _SURVEY_SECONDS
            await connection.send_command("ROLE")
            self._survey(await connection.read_response())

    async def begin(self, primary: Address, role: list[Any], expected: int) -> None:
        """Record the replicas of `primary`, to which a connection was opened. `role` is the primary's reply to ROLE.

        `expected` is the number of replicas that the Sentinels know, also of those that are down.

        Raises NoPrimaryError if another server is a primary now.
        """
        if not self._replicas:
            return
        self._expected.set(max(self._replicas, expected))
        attached = _attached(role)
        if primary != self._primary:
            self._primary, self._known, self._offset = primary, set(), 0
        elif not self._known <= attached.keys():
            await self._check_known()
        self._known |= attached.keys()
        self._wanted = max(self._replicas, len(attached))

    def _survey(self, role: list[Any]) -> None:
        """Update the number of replicas that a write needs.

        A replica whose offset does not grow is attached, but cannot be reached.
        """
        if role[0] != b"master":
            raise NoPrimaryError("it is not the primary any more")
        attached = _attached(role)
        self._known |= attached.keys()
        self._wanted = max(self._replicas, sum(offset >= self._offset for offset in attached.values()))
        self._offset = int(role[1])

    async def _check_known(self) -> None:
        """Raise NoPrimaryError if a known replica is a primary now. Forget the replicas that cannot be reached."""
        known = list(self._known)
        roles = await asyncio.gather(*(self._role(*address) for address in known))
        if b"master" in roles:
            raise NoPrimaryError("another server is becoming the primary")
        self._known -= {address for address, role in zip(known, roles, strict=True) if role is None}

    async def _role(self, host: str, port: int) -> bytes | None:
        """Return the role of the server at this address, or None if the server does not say."""
        assert self._connection
        connection = self._connection(host, port)
        try:
            async with asyncio.timeout(self._seconds):
                await connection.connect()
                await connection.send_command("ROLE")
                role: bytes = (await connection.read_response())[0]
        except REDIS_ERRORS:
            return None
        finally:
            await connection.disconnect(nowait=True)
        return role


def _attached(role: list[Any]) -> dict[Address, int]:
    """Return the replicas in the reply to ROLE, each with the offset up to which it has the primary's writes."""
    return {(host.decode(), int(port)): int(offset) for host, port, offset in role[2]}
