"""Probes: whether the process is alive (liveness), and whether it should receive requests (readiness)."""

import asyncio
import logging

from aiohttp import web
from redis import exceptions

from nanoservice.answer import Answer
from nanoservice.errors import UnavailableError, header_lines
from nanoservice.health import REDIS_ERRORS
from nanoservice.redis import Store

_CACHE_SECONDS = 1.0  # The result of one check of Redis is valid for this time.
_CHECK_TIMEOUT = 1.0  # seconds

_logger = logging.getLogger(__name__)

_OK_LINES = header_lines({"Content-Type": "text/plain; charset=utf-8", "Cache-Control": "no-store"})


async def livez(request: web.Request) -> Answer:
    """Answer 200 while the event loop runs.

    Redis is not checked. Kubernetes restarts a process that is not alive, and restarting this process would not repair Redis.
    """
    return Answer(b"alive\n", _OK_LINES)


class Readiness:
    """Decides whether this process should receive requests.

    Redis must answer, each background task must run, and the process must not be draining.
    """

    def __init__(self, store: Store) -> None:
        self.draining = False
        self.failed: set[str] = set()  # the names of the background tasks that have failed and do not run yet
        self._store = store
        self._health = store.health
        # Probes have their own connection. If a probe had to wait for a connection that handlers use, a busy service would seem
        # not ready.
        self._connection = store.connection()
        self._replication = store.replication
        self._checked = -_CACHE_SECONDS
        self._reason = ""
        self._check: asyncio.Task[None] | None = None

    async def readyz(self, request: web.Request) -> Answer:
        """Answer 200, or 503 with the reason, within a second."""
        if self.draining:
            raise UnavailableError("draining: this process is shutting down")
        if self.failed:
            raise UnavailableError(f"a background task has failed: {', '.join(sorted(self.failed))}")
        if asyncio.get_running_loop().time() - self._checked >= _CACHE_SECONDS:
            # All requests that arrive during a check share its result. The check continues even if a client disconnects.
            if self._check is None:
                self._check = asyncio.create_task(self._check_redis())
            await asyncio.shield(self._check)
        if self._reason:
            raise UnavailableError(self._reason)
        return Answer(b"ready\n", _OK_LINES)

    async def _check_redis(self) -> None:
        try:
            if self._health.reason:
                await self.close()  # A new connection shows whether Redis can be reached now, with the current password.
            was_idle = self._connection.is_connected
            async with asyncio.timeout(_CHECK_TIMEOUT):
                try:
                    await self._ping()
                except exceptions.ConnectionError:
                    if not was_idle:
                        raise
                    # The connection may have died while it was idle. Only a new connection shows whether Redis answers.
                    await self._ping()
        except REDIS_ERRORS as error:
            self._reason = "Redis: " + self._health.failed("probe", error)
        except Exception:  # If the check itself has a bug, report "not ready" instead of the previous check's result.
            _logger.exception("the check of Redis failed")
            self._reason = "this process cannot check Redis"
        else:
            self._health.worked("probe")
            self._reason = ""
        finally:
            self._checked = asyncio.get_running_loop().time()
            self._check = None

    async def _ping(self) -> None:
        await self._connection.connect()
        for command in (("PING",), self._store.check):
            if command:
                await self._connection.send_command(*command)
                await self._connection.read_response()
        if wait := self._replication.wait:  # On a connection that has written nothing, WAIT counts the attached replicas.
            await self._connection.send_command(*wait)
            await self._replication.confirm(self._connection)

    async def close(self) -> None:
        """Close the connection to Redis."""
        await self._connection.disconnect(nowait=True)


READINESS = web.AppKey("readiness", Readiness)
