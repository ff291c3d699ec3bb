"""A sample service for the tests of the chassis: `/` counts GETs and POSTs in Redis; `second_service.py` adds `/greet`."""

import os
import sys

from aiohttp import web
from prometheus_client import Gauge

from nanoservice.answer import Answer
from nanoservice.errors import ProblemError
from nanoservice.metrics import REGISTRY
from nanoservice.redis import STORE
from nanoservice.server import main
from nanoservice.service import Service
from tests.nanoservice import second_service

BODY_LIMIT = 1 << 20  # bytes
HITS, POSTS = "{sample}:hits", "{sample}:posts"

_JSON = b"Content-Type: application/json\r\nCache-Control: no-store\r\n"


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
        if (request.content_length or 0) > BODY_LIMIT:
            raise ProblemError(413, f"a body has at most {BODY_LIMIT} bytes")
        async for _ in request.content.iter_any():
            pass
        return await count("posts")

    app.router.add_get("/", get, allow_head=False)
    app.router.add_head("/", head)
    app.router.add_post("/", post)


SERVICE = Service("sample", "1.0", second_service.Config, setup)

if __name__ == "__main__":
    sys.exit(main(SERVICE, os.environ, sys.argv[1:]))
