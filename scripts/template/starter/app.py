"""Define the service starter: its setting, its routes, and a count in Redis."""

import json
from dataclasses import dataclass
from importlib import resources

from aiohttp import web

from nanoservice import __version__
from nanoservice.answer import Answer, json_answer
from nanoservice.config import Config, integer, setting
from nanoservice.redis import STORE
from nanoservice.service import Service

NAME = "starter"
COUNT = f"{{{NAME}}}:count"  # the user in Redis may use only keys that begin with the service's name in braces

_NO_STORE = {"Cache-Control": "no-store"}


@dataclass(frozen=True)
class Settings(Config, prefix="STARTER_"):
    """The service's own setting, in addition to the settings that every service has."""

    count_step: int = setting(1, "number that each POST adds to the count", integer(1, 1000))


def setup(app: web.Application, settings: Settings) -> None:
    """Add the routes to `app`."""
    app[STORE].check = "GET", COUNT
    redis = app[STORE].client

    async def get(request: web.Request) -> Answer:
        return json_answer({"count": int(await redis.get(COUNT) or 0)}, _NO_STORE)

    async def post(request: web.Request) -> Answer:
        # This count is not exact: if the reply of Redis is lost, the client gets 503 although Redis has counted. A client that
        # then sends the request again is counted twice.
        return json_answer({"count": await redis.incr(COUNT, settings.count_step)}, _NO_STORE)

    app.router.add_get("/", get)
    app.router.add_post("/", post)


_OPENAPI = json.loads(resources.files(__package__).joinpath("openapi.json").read_text())
SERVICE = Service(NAME, __version__, Settings, setup, _OPENAPI)
