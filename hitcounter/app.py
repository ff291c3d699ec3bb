"""The service: its settings, its routes, and the counter behind them."""

import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from importlib import resources

from aiohttp import hdrs, web

from hitcounter import __version__
from hitcounter.counter import Counter, Counts
from nanoservice import config
from nanoservice.answer import Answer, ProblemError
from nanoservice.config import integer, seconds, setting
from nanoservice.metrics import REGISTRY
from nanoservice.negotiation import preferred
from nanoservice.redis import STORE
from nanoservice.service import Service

NAME = "hitcounter"

_TEXT, _JSON = "text/plain", "application/json"
_HEADERS = b"Cache-Control: no-store\r\nVary: Accept\r\n"
_LINES = {
    _TEXT: b"Content-Type: text/plain; charset=utf-8\r\n" + _HEADERS,
    _JSON: b"Content-Type: application/json\r\n" + _HEADERS,
}
_BODY_LIMIT = 1 << 20  # bytes
_KEY = re.compile(r"[\x20-\x7e]{1,255}")


@dataclass(frozen=True)
class Config(config.Config):
    """The settings of the counter, after those of every service."""

    request_timeout: float = setting(2.0, "seconds that a request waits for its number, then 503", seconds(0.1, 60))
    max_pending: int = setting(10000, "requests that wait at a time; one more gets 503 at once", integer(1, 1000000))
    lanes: int = setting(4, "connections to Redis that count, each one batch at a time", integer(1, 64))
    idempotency_keys: int = setting(100000, "`Idempotency-Key`s remembered at most, for a day at most", integer(1, 10000000))


class Pages:
    """What is answered on `/`."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter

    async def get(self, request: web.Request) -> Answer:
        """Count a hit, and tell how many there were."""
        form = _form(request)
        return _answer(await self._counter.hit(), form)

    async def post(self, request: web.Request) -> Answer:
        """Count a post, once for each Idempotency-Key, and tell how many there were."""
        form = _form(request)
        key = _idempotency_key(request)
        await _discard_body(request)
        return _answer(await self._counter.post(key), form)

    async def head(self, request: web.Request) -> Answer:
        """Count nothing, and give the headers."""
        return Answer(None, _LINES[_form(request)])


def _answer(counts: Counts, form: str) -> Answer:
    if form == _JSON:
        body = b'{"hits": %d, "posts": %d}\n' % counts
    else:
        body = b"Hello from Redis! I have been seen %d times.\nPOST requests served: %d.\n" % counts
    return Answer(body, _LINES[form])


def _form(request: web.Request) -> str:
    """Return the media type to answer in; raises ProblemError 406 if the client takes neither."""
    accept = request.headers.getall(hdrs.ACCEPT, ())
    if not accept or accept == ["*/*"]:
        return _TEXT
    form = preferred(",".join(accept), (_TEXT, _JSON))
    if form is None:
        raise ProblemError(406, f"this resource is {_TEXT} or {_JSON}")
    return form


def _idempotency_key(request: web.Request) -> str | None:
    """Return the client's key, if it sent one; raises ProblemError 400 if it is malformed."""
    keys = request.headers.getall("Idempotency-Key", ())
    if not keys:
        return None
    if len(keys) > 1 or not _KEY.fullmatch(keys[0]):
        raise ProblemError(400, "Idempotency-Key must be one header of 1 to 255 printable ASCII characters")
    return keys[0]


async def _discard_body(request: web.Request) -> None:
    """Read the body to its end, a chunk at a time; raises ProblemError 413 if it is too long."""
    left = _BODY_LIMIT
    if (request.content_length or 0) <= left:
        async for chunk in request.content.iter_any():
            left -= len(chunk)
            if left < 0:
                break
        else:
            return
    raise ProblemError(413, f"a body has at most {_BODY_LIMIT} bytes")


def setup(app: web.Application, config: Config) -> None:
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


SERVICE = Service(NAME, __version__, Config, setup, json.loads(resources.files(__package__).joinpath("openapi.json").read_text()))
