"""A complete second service: it has a route, counters and a setting, and the chassis does everything else."""

from dataclasses import dataclass

from aiohttp import web

from nanoservice import config
from nanoservice.answer import Answer
from nanoservice.redis import STORE
from nanoservice.service import Service


@dataclass(frozen=True)
class Config(config.Config, prefix="GREETER_"):
    """The setting of the greeter, `GREETER_WORD`, in addition to the settings of every service."""

    word: str = config.setting("Hello", "the word of greeting")


def setup(app: web.Application, config: Config) -> None:
    """Add the route of the greeter to `app`."""

    async def greet(request: web.Request) -> web.StreamResponse:
        number = await app[STORE].client.incr("{greeter}:" + request.match_info["name"])
        return Answer(f"{config.word} {request.match_info['name']}, number {number}\n".encode())

    app.router.add_get("/greet/{name:[a-z]+}", greet)


SERVICE = Service("greeter", "1.0", Config, setup)
