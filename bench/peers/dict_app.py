"""Run the service with a dict in place of Redis, to measure the cost of everything except counting in Redis."""

import asyncio
import os
import sys
from typing import Any

import hitcounter.app
from hitcounter.counter import Counts
from nanoservice.server import main


class Dict:
    """A counter in memory that answers at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._counts = {"hits": 0, "posts": 0}

    async def start(self) -> None:
        """Do nothing, because a dict needs no connection."""

    async def close(self) -> None:
        """Do nothing, because a dict needs no connection."""

    def hit(self) -> asyncio.Future[Counts]:
        return self._count("hits")

    def post(self, key: str | None = None) -> asyncio.Future[Counts]:
        return self._count("posts")

    def _count(self, what: str) -> asyncio.Future[Counts]:
        self._counts[what] += 1
        future: asyncio.Future[Counts] = asyncio.get_running_loop().create_future()
        future.set_result(Counts(**self._counts))
        return future


hitcounter.app.Counter = Dict  # type: ignore[assignment,misc] # it has the methods that the service calls
sys.exit(main(hitcounter.app.SERVICE, os.environ, []))
