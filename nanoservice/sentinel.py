"""Find the primary: ask Redis Sentinels which server it is at the moment."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter
from redis import exceptions
from redis.asyncio.connection import AbstractConnection

from nanoservice.health import REDIS_ERRORS, CauseError, cause

PRIMARY_NAME = "primary"  # Each Sentinel's configuration has this name: `sentinel monitor primary HOST PORT QUORUM`.

Address = tuple[str, int]

_FOLLOW_SECONDS = 1.0  # Sentinels learn of a planned failover within a second.

_logger = logging.getLogger(__name__)


class NoPrimaryError(CauseError):
    """The Sentinels name no server that is a primary."""


class Sentinels:
    """Finds the primary. `connection(host, port)` returns a connection, not open yet, to the Sentinel at that address.

    A Sentinel gets at most `seconds` to answer, so one that cannot be reached costs little. `primary` is the server that was
    found last and that said itself that it is a primary.
    """

    def __init__(
        self,
        addresses: tuple[Address, ...],
        connection: Callable[[str, int], AbstractConnection],
        seconds: float,
        registry: CollectorRegistry,
    ) -> None:
        self._addresses = addresses
        self._connection = connection
        self._seconds = seconds
        self._search: asyncio.Task[Address | str] | None = None
        self._failovers = Counter("redis_failovers", "Times that another server became the primary", registry=registry)
        self.primary: Address | None = None
        self.replicas = 0  # the number of replicas that the Sentinels know, also of those that are down
        self._named: Address | None = None  # by the last search
        self._successor: tuple[float, Address, Address] | None = None  # when it was learnt, the former primary, its successor

    async def find(self) -> Address:
        """Return the address of the primary. Raises NoPrimaryError if no Sentinel names one in time.

        Calls that overlap share one search.
        """
        if self._search is None:
            self._search = asyncio.create_task(self._ask_all())
        found = await asyncio.shield(self._search)  # The search continues if one of its callers is cancelled.
        if isinstance(found, str):
            raise NoPrimaryError(found)
        if self._successor:
            learnt, former, successor = self._successor
            if found == former and time.monotonic() < learnt + _FOLLOW_SECONDS:
                found = successor
        self._named = found
        return found

    def confirm(self, address: Address, role: list[Any]) -> None:
        """Record the role that the server at `address` reports, which is its reply to ROLE.

        Raises NoPrimaryError unless it is a primary, and the one that the Sentinels named last. A connection to a former primary
        may need until after the failover to open, and a server that was cut off does not know that it is replaced.

        In a planned failover the former primary knows its successor a second before the Sentinels do. So for a second, `find`
        returns the successor instead of the former primary.
        """
        if role[0] != b"master":
            if role[0] == b"slave":
                self._successor = time.monotonic(), address, (role[1].decode(), int(role[2]))
            raise NoPrimaryError("the server that the Sentinels name is not a primary")
        if address != self._named:
            raise NoPrimaryError("another server has become the primary")
        if self.primary not in (None, address):
            self._failovers.inc()
            _logger.warning("Redis has failed over to another primary", extra={"redis": "{}:{}".format(*address)})
        self.primary = address

    async def _ask_all(self) -> Address | str:
        """Return the address of the primary, or in a few words why no Sentinel names one.

        All Sentinels are asked at once. The search ends when most of them have named a primary. During a failover they disagree
        for a moment; the newest configuration, which is the one with the highest epoch, is right.
        """
        asked = [asyncio.create_task(self._ask(*address)) for address in self._addresses]
        named: list[tuple[int, int, Address]] = []
        problems = []
        try:
            for answered in asyncio.as_completed(asked):
                answer = await answered
                if isinstance(answer, str):
                    problems.append(answer)
                else:
                    named.append(answer)
                    if len(named) > len(asked) // 2:
                        break
        finally:
            self._search = None
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        if not named:
            return max(problems, key=problems.count)
        _, self.replicas, primary = max(named)
        return primary

    async def _ask(self, host: str, port: int) -> tuple[int, int, Address] | str:
        """Ask one Sentinel.

        Return its configuration epoch, the number of replicas that it knows, and the primary's address; or return in a few words
        why it has no primary.
        """
        connection = self._connection(host, port)
        try:
            async with asyncio.timeout(self._seconds):
                await connection.connect()
                # Only the first command names the new primary as soon as it is promoted; only the second has the epoch.
                await connection.send_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", PRIMARY_NAME)
                address = await connection.read_response()
                if address is None:
                    return "no Sentinel knows a primary"
                await connection.send_command("SENTINEL", "MASTER", PRIMARY_NAME)
                state = await connection.read_response()
        except REDIS_ERRORS as error:
            is_server = isinstance(error, exceptions.ResponseError) and "unknown command" in str(error)
            return "no Sentinel can be asked: " + ("it is a server of another kind" if is_server else cause(error))
        finally:
            await connection.disconnect(nowait=True)
        fields = dict(zip(state[::2], state[1::2], strict=True))
        return int(fields[b"config-epoch"]), int(fields[b"num-slaves"]), (address[0].decode(), int(address[1]))
