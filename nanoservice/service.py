"""The definition of a service, and the application that the chassis makes from it."""

import json
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any, Generic, TypeVar

from aiohttp import hdrs, web

from nanoservice.answer import Answer, json_answer
from nanoservice.config import Config
from nanoservice.errors import header_lines
from nanoservice.metrics import REGISTRY, new_registry
from nanoservice.probes import READINESS, Readiness, livez
from nanoservice.redis import STORE, Store

C = TypeVar("C", bound=Config)

BUSY_RESOURCES = web.AppKey("busy_resources", list[str])  # the names of the resources that are being made or closed


@dataclass(frozen=True)
class Service(Generic[C]):
    """Everything that the chassis needs to know about a service: its name, version, settings, and routes.

    `setup(app, config)` adds routes to `app`, and resources to `app.cleanup_ctx`. The chassis has already set two keys of `app`:
    `app[STORE]` is the service's Redis, and `app[REGISTRY]` is for the service's metrics. `openapi` contains the `paths` (and
    `components`) of the routes in OpenAPI 3.1. The chassis adds its own routes and serves the whole document.
    """

    name: str
    version: str
    config: type[C]
    setup: Callable[[web.Application, C], None]
    openapi: Mapping[str, Any] | None = None


def create_app(service: Service[C], config: C, socket: str | None = None) -> web.Application:
    """Return the application of `service`, not yet started. `socket` is the Unix socket of the embedded Valkey, if one runs."""
    app = web.Application()
    app[REGISTRY] = new_registry(service.name, service.version)
    app[STORE] = Store(config, app[REGISTRY], socket)
    app[READINESS] = Readiness(app[STORE])
    app.cleanup_ctx.append(_close_store)
    app.router.add_get("/livez", livez)
    app.router.add_get("/readyz", app[READINESS].readyz)
    app.router.add_get("/version", json_handler({"name": service.name, "version": service.version}))
    app.router.add_get("/openapi.json", json_handler(document(service)))
    service.setup(app, config)
    _answer_options(app)
    app.on_response_prepare.append(_prepare)
    app[BUSY_RESOURCES] = []
    app.cleanup_ctx[:] = [_watched(resource) for resource in app.cleanup_ctx]
    return app


def _watched(resource: Any) -> Callable[[web.Application], AbstractAsyncContextManager[None]]:
    """Return a clean-up context like `resource` whose name is in `BUSY_RESOURCES` while it is being made or closed."""

    @asynccontextmanager
    async def watched(app: web.Application) -> AsyncIterator[None]:
        busy, name, context = app[BUSY_RESOURCES], getattr(resource, "__qualname__", repr(resource)), resource(app)
        if not isinstance(context, AbstractAsyncContextManager):
            context = asynccontextmanager(resource)(app)
        busy.append(name)
        async with context:
            busy.remove(name)
            yield
            busy.append(name)
        busy.remove(name)

    return watched


def document(service: Service[C]) -> dict[str, Any]:
    """Return the OpenAPI document of the routes of `service` and of the chassis."""
    merged = json.loads(resources.files(__package__).joinpath("openapi.json").read_text())
    own = service.openapi or {}
    merged["paths"] = {**own.get("paths", {}), **merged["paths"]}
    for kind, parts in own.get("components", {}).items():
        merged["components"].setdefault(kind, {}).update(parts)
    return {"openapi": "3.1.0", "info": {"title": service.name, "version": service.version}, **merged}


def json_handler(content: object) -> Callable[[web.Request], Any]:
    """Return a handler that always answers with `content` as JSON."""

    async def handler(request: web.Request) -> Answer:
        return json_answer(content)

    return handler


async def _close_store(app: web.Application) -> AsyncIterator[None]:
    # aiohttp closes the first resource last. So the service's own resources can still use Redis while they close.
    yield
    await app[READINESS].close()
    await app[STORE].client.aclose()


def _answer_options(app: web.Application) -> None:
    """Make every path answer OPTIONS with `Allow`, the list of its methods, and each `web.View` with `get` answer HEAD."""
    for resource in list(app.router.resources()):
        for view in {route.handler for route in resource}:
            if isinstance(view, type) and issubclass(view, web.View):
                _complete(view)
        methods = {route.method for route in resource}
        if isinstance(resource, web.Resource) and not methods & {"OPTIONS", "*"}:
            resource.add_route("OPTIONS", _options)


def _complete(view: Any) -> None:
    """Give the class `view` the methods `head` and `options` if it lacks them. aiohttp would answer 405."""
    if hasattr(view, "get") and not hasattr(view, "head"):
        view.head = view.get
    if not hasattr(view, "options"):
        view.options = _options_of_view


async def _options(request: web.Request) -> Answer:
    return _allowed(route.method for route in request.match_info.route.resource or ())


async def _options_of_view(view: web.View) -> Answer:
    return _allowed(method for method in hdrs.METH_ALL if hasattr(view, method.lower()))


def _allowed(methods: Iterable[str]) -> Answer:
    return Answer(None, header_lines({"Allow": ",".join(sorted(methods)), "Cache-Control": "no-store"}), status=204)


async def _prepare(request: web.Request, response: web.StreamResponse) -> None:
    if isinstance(response, web.WebSocketResponse):
        raise NotImplementedError("WebSockets are not supported: use server-sent events, or see docs/development.md")
    # aiohttp's `Server` header would name aiohttp and Python with their versions.
    response.headers.popall("Server", None)
