"""Send one INCR to Redis for each request. aiohttp and redis-py have their default settings."""

import os

from aiohttp import web
from redis.asyncio import Redis

redis = Redis(host="127.0.0.1", port=int(os.environ["REDIS_PORT"]))


async def hello(request: web.Request) -> web.Response:
    return web.Response(text=f"Hello from Redis! I have been seen {await redis.incr('aiohttp:hits')} times.\n")


app = web.Application()
app.router.add_get("/", hello)
web.run_app(app, host="127.0.0.1", port=int(os.environ["BIND_PORT"]), access_log=None, print=None)
