"""Probes: is the process alive, and should it get requests."""

import asyncio
from dataclasses import dataclass

from aiohttp import web

from nanoservice.answer import Answer, UnavailableError
from nanoservice.redis import Errors, Store

_CACHED = 1.0  # seconds that an answer of Redis counts for
_LIMIT = 1.0  # seconds that a look at Redis may take

_OK = b"Content-Type: text/plain; charset=utf-8\r\nCache-Control: no-store\r\n"


async def livez(request: web.Request) -> Answer:
    """Answer 200 while the event loop turns. Never looks at Redis: a restart of this process would not mend it."""
    return Answer(b"alive\n", _OK)


@dataclass
class Readiness:
    """Whether this process should get requests: not while it drains, and only while Redis answers."""

    store: Store
    draining: bool = False
    _checked: float = -_CACHED
    _reason: str = ""
    _check: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self._connection = self.store.connection()  # of its own: a busy service is ready all the same

    async def readyz(self, request: web.Request) -> Answer:
        """Answer 200, or 503 with the reason; takes a second at most."""
        if self.draining:
            raise UnavailableError("draining: this process is about to end")
        if asyncio.get_running_loop().time() - self._checked >= _CACHED:
            # One look serves all who ask meanwhile, and goes on if one of them hangs up.
            if self._check is None:
                self._check = asyncio.create_task(self._look())
            await asyncio.shield(self._check)
        if self._reason:
            raise UnavailableError(self._reason)
        return Answer(b"ready\n", _OK)

    async def _look(self) -> None:
        try:
            if self.store.health.reason:
                await self.close()  # what cannot be reached now is a new connection, with the password of now
            async with asyncio.timeout(_LIMIT):
                await self._connection.send_command("PING")
                await self._connection.read_response()
        except Errors as error:
            self._reason = "Redis: " + self.store.health.failed("probe", error)
        else:
            self.store.health.worked("probe")
            self._reason = ""
        finally:
            self._checked = asyncio.get_running_loop().time()
            self._check = None

    async def close(self) -> None:
        """Close the connection to Redis."""
        await self._connection.disconnect(nowait=True)


READINESS = web.AppKey("readiness", Readiness)
