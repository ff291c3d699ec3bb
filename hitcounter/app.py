"""Define the service hitcounter: its settings, its routes and its counter."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from importlib import resources

from aiohttp import hdrs, web

from hitcounter.counter import Counter, Counts, hits_key
from hitcounter.eviction import report_eviction
from nanoservice import __version__, direct
from nanoservice.answer import Answer
from nanoservice.config import FINISH_SECONDS, Config, integer, seconds, setting
from nanoservice.direct import Content, Headers
from nanoservice.errors import ProblemError, header_lines
from nanoservice.metrics import REGISTRY
from nanoservice.negotiation import preferred
from nanoservice.redis import STORE
from nanoservice.service import Service

NAME = "hitcounter"

_TEXT, _JSON = "text/plain", "application/json"
_COMMON_HEADERS = {"Cache-Control": "no-store", "Vary": "Accept"}
_HEADER_LINES = {
    _TEXT: header_lines({"Content-Type": "text/plain; charset=utf-8", **_COMMON_HEADERS}),
    _JSON: header_lines({"Content-Type": "application/json", **_COMMON_HEADERS}),
}
_KEY_PATTERN = re.compile(r"[\x20-\x7e]{1,255}")


@dataclass(frozen=True)
class CounterConfig(Config, prefix=""):
    """The counter's settings, in addition to the settings that every service has. No shell sets these variables."""

    request_timeout: float = setting(
        2.0, "seconds that a request waits for its number, at most 10; then it gets 503", seconds(0.1, FINISH_SECONDS)
    )
    max_pending: int = setting(
        10000,
        "maximum number of waiting requests (each connection has one at most); a further one gets 503 at once",
        integer(1, 1000000),
    )
    lanes: int = setting(4, "number of connections that count; each sends one batch at a time", integer(1, 64))
    idempotency_keys: int = setting(100000, "number of `Idempotency-Key`s to remember, for at most a day", integer(1, 10000000))


class Pages:
    """The handlers of `/`."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter

    def get(self, headers: Headers) -> tuple[asyncio.Future[Counts], Callable[[Counts], Content]]:
        """Count a hit, and answer with the numbers of hits and posts."""
        content = _CONTENT[_media_type(headers)]
        return self._counter.hit(), content

    def post(self, headers: Headers) -> tuple[asyncio.Future[Counts], Callable[[Counts], Content]]:
        """Count a post, once for each Idempotency-Key, and answer with the numbers of hits and posts."""
        content = _CONTENT[_media_type(headers)]
        return self._counter.post(_idempotency_key(headers)), content

    async def head(self, request: web.Request) -> Answer:
        """Answer with the headers of GET, and count nothing."""
        return Answer(None, _HEADER_LINES[_media_type(request.headers)])


def _text(counts: Counts) -> Content:
    return _HEADER_LINES[_TEXT], b"Hello from Redis! I have been seen %d times.\nPOST requests served: %d.\n" % counts


def _json(counts: Counts) -> Content:
    return _HEADER_LINES[_JSON], b'{"hits": %d, "posts": %d}\n' % counts


_CONTENT = {_TEXT: _text, _JSON: _json}


def _media_type(headers: Headers) -> str:
    """Return the media type of the answer. Raises ProblemError 406 if the client accepts neither text nor JSON."""
    accept = headers.getall(hdrs.ACCEPT, ())
    if not accept or accept == ["*/*"]:
        return _TEXT
    media_type = preferred(",".join(accept), (_TEXT, _JSON))
    if media_type is None:
        raise ProblemError(406, f"this resource is {_TEXT} or {_JSON}")
    return media_type


def _idempotency_key(headers: Headers) -> str | None:
    """Return the request's Idempotency-Key, or None if it has none. Raises ProblemError 400 if the key is malformed."""
    keys = headers.getall("Idempotency-Key", ())
    if not keys:
        return None
    if len(keys) > 1 or not _KEY_PATTERN.fullmatch(keys[0]):
        raise ProblemError(400, "Idempotency-Key must be one header of 1 to 255 printable ASCII characters")
    return keys[0]


def setup(app: web.Application, config: CounterConfig) -> None:
    """Add the routes and the counter to `app`."""
    app[STORE].check = "GET", hits_key(NAME)
    counter = Counter(
        NAME, app[STORE], app[REGISTRY],
        lanes=config.lanes, max_pending=config.max_pending, timeout=config.request_timeout,
        redis_timeout=config.redis_timeout, keep=config.idempotency_keys,
    )  # fmt: skip

    async def run_counter(app: web.Application) -> AsyncIterator[None]:
        await counter.start()
        report = asyncio.create_task(report_eviction(app[STORE], config.redis_timeout))
        yield
        report.cancel()
        await asyncio.gather(report, return_exceptions=True)
        await counter.close()

    pages = Pages(counter)
    direct.add(app, "GET", "/", pages.get)
    app.router.add_head("/", pages.head)
    direct.add(app, "POST", "/", pages.post)
    app.cleanup_ctx.append(run_counter)


_OPENAPI = json.loads(resources.files(__package__).joinpath("openapi.json").read_text())
SERVICE = Service(NAME, __version__, CounterConfig, setup, _OPENAPI)
