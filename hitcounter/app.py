"""Define the service hitcounter: its settings, its routes and its counter."""

import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from importlib import resources

from aiohttp import hdrs, web

from hitcounter.counter import Counter, Counts
from nanoservice import __version__
from nanoservice.answer import Answer
from nanoservice.config import Config, integer, seconds, setting
from nanoservice.errors import ProblemError
from nanoservice.metrics import REGISTRY
from nanoservice.negotiation import preferred
from nanoservice.redis import STORE
from nanoservice.service import Service

NAME = "hitcounter"

_TEXT, _JSON = "text/plain", "application/json"
_COMMON_LINES = b"Cache-Control: no-store\r\nVary: Accept\r\n"
_HEADER_LINES = {
    _TEXT: b"Content-Type: text/plain; charset=utf-8\r\n" + _COMMON_LINES,
    _JSON: b"Content-Type: application/json\r\n" + _COMMON_LINES,
}
_MAX_BODY = 1 << 20  # bytes
_KEY_PATTERN = re.compile(r"[\x20-\x7e]{1,255}")


@dataclass(frozen=True)
class CounterConfig(Config):
    """The counter's settings, in addition to the settings that every service has."""

    request_timeout: float = setting(2.0, "seconds that a request waits for its number; then it gets 503", seconds(0.1, 60))
    max_pending: int = setting(10000, "maximum number of waiting requests; a further one gets 503 at once", integer(1, 1000000))
    lanes: int = setting(4, "number of connections that count; each sends one batch at a time", integer(1, 64))
    idempotency_keys: int = setting(100000, "number of `Idempotency-Key`s to remember, for at most a day", integer(1, 10000000))


class Pages:
    """The handlers of `/`."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter

    async def get(self, request: web.Request) -> Answer:
        """Count a hit, and answer with the numbers of hits and posts."""
        media_type = _media_type(request)
        return _answer(await self._counter.hit(), media_type)

    async def post(self, request: web.Request) -> Answer:
        """Count a post, once for each Idempotency-Key, and answer with the numbers of hits and posts."""
        media_type = _media_type(request)
        key = _idempotency_key(request)
        await _discard_body(request)
        return _answer(await self._counter.post(key), media_type)

    async def head(self, request: web.Request) -> Answer:
        """Answer with the headers of GET, and count nothing."""
        return Answer(None, _HEADER_LINES[_media_type(request)])


def _answer(counts: Counts, media_type: str) -> Answer:
    if media_type == _JSON:
        body = b'{"hits": %d, "posts": %d}\n' % counts
    else:
        body = b"Hello from Redis! I have been seen %d times.\nPOST requests served: %d.\n" % counts
    return Answer(body, _HEADER_LINES[media_type])


def _media_type(request: web.Request) -> str:
    """Return the media type of the answer. Raises ProblemError 406 if the client accepts neither text nor JSON."""
    accept = request.headers.getall(hdrs.ACCEPT, ())
    if not accept or accept == ["*/*"]:
        return _TEXT
    media_type = preferred(",".join(accept), (_TEXT, _JSON))
    if media_type is None:
        raise ProblemError(406, f"this resource is {_TEXT} or {_JSON}")
    return media_type


def _idempotency_key(request: web.Request) -> str | None:
    """Return the request's Idempotency-Key, or None if it has none. Raises ProblemError 400 if the key is malformed."""
    keys = request.headers.getall("Idempotency-Key", ())
    if not keys:
        return None
    if len(keys) > 1 or not _KEY_PATTERN.fullmatch(keys[0]):
        raise ProblemError(400, "Idempotency-Key must be one header of 1 to 255 printable ASCII characters")
    return keys[0]


async def _discard_body(request: web.Request) -> None:
    """Read the whole body chunk by chunk, and keep nothing. Raises ProblemError 413 if the body is too long."""
    left = _MAX_BODY
    if (request.content_length or 0) <= left:
        async for chunk in request.content.iter_any():
            left -= len(chunk)
            if left < 0:
                break
        else:
            return
    raise ProblemError(413, f"a body has at most {_MAX_BODY} bytes")


def setup(app: web.Application, config: CounterConfig) -> None:
    """Add the routes and the counter to `app`."""
    counter = Counter(
        NAME, app[STORE], app[REGISTRY],
        lanes=config.lanes, max_pending=config.max_pending, timeout=config.request_timeout,
        redis_timeout=config.redis_timeout, keep=config.idempotency_keys,
    )  # fmt: skip

    async def run_counter(app: web.Application) -> AsyncIterator[None]:
        await counter.start()
        yield
        await counter.close()

    pages = Pages(counter)
    app.router.add_get("/", pages.get, allow_head=False)
    app.router.add_head("/", pages.head)
    app.router.add_post("/", pages.post)
    app.cleanup_ctx.append(run_counter)


_OPENAPI = json.loads(resources.files(__package__).joinpath("openapi.json").read_text())
SERVICE = Service(NAME, __version__, CounterConfig, setup, _OPENAPI)
