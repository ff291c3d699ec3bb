"""What a service is, and the application that the chassis makes of it."""

import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Generic, TypeVar

from aiohttp import web

from nanoservice.answer import Answer, json_answer
from nanoservice.config import Config
from nanoservice.metrics import REGISTRY, new_registry
from nanoservice.probes import READINESS, Readiness, livez
from nanoservice.redis import STORE, Store

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Service(Generic[C]):
    """All that a service tells the chassis: its name and version, its settings, and what it adds to the application.

    `setup(app, config)` adds routes to `app`, and resources to `app.cleanup_ctx`. It finds there what the chassis made:
    `app[STORE]`, its Redis; `app[REGISTRY]`, for metrics of its own. `openapi` has the `paths` (and `components`) of its routes
    in OpenAPI 3.1; the chassis adds its own and serves the whole.
    """

    name: str
    version: str
    config: type[C]
    setup: Callable[[web.Application, C], None]
    openapi: Mapping[str, Any] | None = None


def create_app(service: Service[C], config: C, socket: str | None = None) -> web.Application:
    """Return the application of `service`, not started. `socket` is the embedded store's, if that is to be used."""
    app = web.Application()
    app[REGISTRY] = new_registry(service.name, service.version)
    app[STORE] = Store(config, app[REGISTRY], socket)
    app[READINESS] = Readiness(app[STORE])
    app.cleanup_ctx.append(_close_store)
    app.router.add_get("/livez", livez)
    app.router.add_get("/readyz", app[READINESS].readyz)
    app.router.add_get("/version", json_answer_of({"name": service.name, "version": service.version}))
    app.router.add_get("/openapi.json", json_answer_of(document(service)))
    service.setup(app, config)
    _answer_options(app)
    app.on_response_prepare.append(_hide_server)
    return app


def document(service: Service[C]) -> dict[str, Any]:
    """Return the OpenAPI document of `service` and the chassis together."""
    found = json.loads(resources.files(__package__).joinpath("openapi.json").read_text())
    own = service.openapi or {}
    found["paths"] = {**own.get("paths", {}), **found["paths"]}
    for kind, parts in own.get("components", {}).items():
        found["components"].setdefault(kind, {}).update(parts)
    return {"openapi": "3.1.0", "info": {"title": service.name, "version": service.version}, **found}


def json_answer_of(content: object) -> Callable[[web.Request], Any]:
    """Return a handler whose answer never changes."""

    async def handler(request: web.Request) -> Answer:
        return json_answer(content)

    return handler


async def _close_store(app: web.Application) -> AsyncIterator[None]:
    # The first resource to be made is the last to be closed: a service's own may need Redis to end.
    yield
    await app[READINESS].close()
    await app[STORE].client.aclose()


def _answer_options(app: web.Application) -> None:
    """Have every path answer OPTIONS with what it takes."""
    for found in list(app.router.resources()):
        methods = {route.method for route in found}
        if isinstance(found, web.Resource) and not methods & {"OPTIONS", "*"}:
            found.add_route("OPTIONS", _options)


async def _options(request: web.Request) -> Answer:
    allow = ",".join(sorted(route.method for route in request.match_info.route.resource or ()))
    return Answer(None, f"Allow: {allow}\r\nCache-Control: no-store\r\n".encode("ascii"), status=204)


async def _hide_server(request: web.Request, response: web.StreamResponse) -> None:
    # aiohttp would name itself, Python, and both versions.
    response.headers.popall("Server", None)
