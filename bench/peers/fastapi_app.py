"""Send one INCR to Redis for each request. FastAPI and redis-py have their default settings."""

import os

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from redis.asyncio import Redis

app = FastAPI()
redis = Redis(host="127.0.0.1", port=int(os.environ["REDIS_PORT"]))


@app.get("/", response_class=PlainTextResponse)
async def hello() -> str:
    return f"Hello from Redis! I have been seen {await redis.incr('fastapi:hits')} times.\n"
