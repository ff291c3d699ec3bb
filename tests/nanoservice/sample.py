"""A sample service for the tests of the chassis: `/` counts GETs and POSTs in Redis; `second_service.py` adds `/greet`."""

import os
import sys

from aiohttp import web
from prometheus_client import Gauge

from nanoservice.answer import Answer
from nanoservice.direct import discard_body, expect_short_body
from nanoservice.errors import header_lines
from nanoservice.metrics import REGISTRY
from nanoservice.redis import STORE
from nanoservice.server import main
from nanoservice.service import Service
from tests.nanoservice import second_service

HITS, POSTS = "{sample}:hits", "{sample}:posts"

_JSON = header_lines({"Content-Type": "application/json", "Cache-Control": "no-store"})


def setup(app: web.Application, config: second_service.Config) -> None:
    """Add the routes to `app`."""
    second_service.setup(app, config)
    pending = Gauge("sample_pending", "Requests that wait for Redis", registry=app[REGISTRY])

    async def count(name: str) -> Answer:
        with pending.track_inprogress():
            number = await app[STORE].client.incr(f"{{sample}}:{name}")
        return Answer(b'{"%b": %d}\n' % (name.encode(), number), _JSON)

    async def get(request: web.Request) -> Answer:
        return await count("hits")

    async def head(request: web.Request) -> Answer:
        return Answer(None, _JSON)

    async def post(request: web.Request) -> Answer:
        await discard_body(request)
        return await count("posts")

    app.router.add_get("/", get, allow_head=False)
    app.router.add_head("/", head)
    app.router.add_post("/", post, expect_handler=expect_short_body)


SERVICE = Service("sample", "1.0", second_service.Config, setup)

if __name__ == "__main__":
    sys.exit(main(SERVICE, os.environ, sys.argv[1:]))
