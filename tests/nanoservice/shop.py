"""A service that uses everything that the chassis offers: orders are taken as JSON, kept in Redis, and streamed as they come."""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import msgspec
from aiohttp import web
from prometheus_client import Counter

from nanoservice import background, config
from nanoservice.answer import Answer, json_answer
from nanoservice.body import json_body
from nanoservice.config import Secret, integer, secret, setting
from nanoservice.errors import ProblemError
from nanoservice.limits import time_limits
from nanoservice.metrics import REGISTRY
from nanoservice.redis import STORE
from nanoservice.service import Service

_STOCK, _ORDERS = "{shop}:stock", "{shop}:orders"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings(config.Config, prefix="SHOP_"):
    """The settings of the shop, in addition to the settings of every service."""

    user: str = setting("nobody", "user at the supplier")
    api_key: Secret | None = secret("key of the shop's own interface", "file with the key, which is read again for each request")
    refill: int = setting(10, "number of items to which the stock is refilled", integer(1, 1000000))
    refill_milliseconds: int = setting(1000, "time between two refills", integer(1, 60000))


@dataclass(frozen=True)
class Item:
    """One line of an order."""

    name: str
    number: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= 100:
            raise ValueError("number must be from 1 to 100")


@dataclass(frozen=True)
class Order:
    """An order, as a client sends it."""

    customer: str
    items: list[Item]
    speed: Literal["normal", "fast"] = "normal"
    tags: dict[str, str] = field(default_factory=dict)


def setup(app: web.Application, settings: Settings) -> None:
    """Add the routes, the background task and the metric of the shop to `app`."""
    redis, read_order = app[STORE].client, json_body(Order)
    sold = Counter("shop_items_sold", "Items that were sold", registry=app[REGISTRY])

    async def refill() -> None:
        while True:
            await redis.set(_STOCK, settings.refill)
            await asyncio.sleep(settings.refill_milliseconds / 1000)

    async def order(request: web.Request) -> Answer:
        key = settings.api_key
        if key is not None and request.headers.get("Authorization") != f"Bearer {key.reveal()}":
            raise ProblemError(401, "send the header Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"})
        taken = await read_order(request)
        number = sum(item.number for item in taken.items)
        async with redis.pipeline() as pipeline:  # one round trip for both commands
            pipeline.decrby(_STOCK, number)
            pipeline.rpush(_ORDERS, msgspec.json.encode(taken))
            left, position = await pipeline.execute()
        sold.inc(number)
        _logger.info("order taken", extra={"position": position})
        return json_answer({"order": asdict(taken), "position": position, "left": left}, status=201)

    async def orders(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson", "Cache-Control": "no-store"})
        await response.prepare(request)
        async for line in new_orders():
            await response.write(line + b"\n")
        return response

    async def new_orders() -> AsyncIterator[bytes]:
        """Yield each order, the oldest first, until one says that the shop closes."""
        position, line = 0, b""
        while b'"closing"' not in line:
            found: Any = await redis.lindex(_ORDERS, position)
            if found is None:
                await asyncio.sleep(0.05)
            else:
                position, line = position + 1, found
                yield line

    @time_limits(handle=0.5)
    async def slow(request: web.Request) -> Answer:
        await asyncio.sleep(60)
        raise AssertionError("this takes longer than its time limit")

    async def fail(request: web.Request) -> Answer:
        raise LookupError("a detail for the log alone")

    background.add(app, "refill", refill)
    app.router.add_post("/orders", order)
    app.router.add_get("/orders", orders)
    app.router.add_get("/slow", slow)
    app.router.add_get("/fail", fail)


SERVICE = Service("shop", "1.0", Settings, setup)
