"""Run the service with a dict in place of Redis, to measure the cost of everything except counting in Redis."""

import asyncio
import os
import sys
from dataclasses import replace
from typing import Any, cast

from aiohttp import web

from hitcounter.app import SERVICE, CounterConfig, Pages
from hitcounter.counter import Counter, Counts
from nanoservice import direct
from nanoservice.server import main


class Dict:
    """A counter in memory that answers at once."""

    def __init__(self) -> None:
        self._counts = {"hits": 0, "posts": 0}

    def hit(self) -> asyncio.Future[Counts]:
        return self._count("hits")

    def post(self, key: str | None = None) -> asyncio.Future[Counts]:
        return self._count("posts")

    def _count(self, what: str) -> asyncio.Future[Counts]:
        self._counts[what] += 1
        future: asyncio.Future[Counts] = asyncio.get_running_loop().create_future()
        future.set_result(Counts(**self._counts))
        return future


def setup(app: web.Application, config: CounterConfig) -> None:
    pages = Pages(cast("Counter", cast("Any", Dict())))
    direct.add(app, "GET", "/", pages.get)
    app.router.add_head("/", pages.head)
    direct.add(app, "POST", "/", pages.post)


sys.exit(main(replace(SERVICE, setup=setup), os.environ, []))
