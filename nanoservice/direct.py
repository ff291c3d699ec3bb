"""Routes that the connection answers directly, without the task and the objects that aiohttp makes for each request.

Most of the cost of a small request is aiohttp's: a task, a request, a writer, and the search for the route. A handler in two
halves needs none of them. Its first half gets the headers, and returns a future and its second half, which makes the answer from
the result of the future. `add` also makes an aiohttp handler from the same two functions. This handler answers all requests
that are not small or not plain: those with a body that arrives later, with `Expect`, with a query, or of HTTP/1.0.
"""

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple

from aiohttp import HttpVersion11, hdrs, web
from multidict import CIMultiDictProxy

from nanoservice.answer import Answer
from nanoservice.errors import ProblemError

MAX_BODY = 1 << 20  # bytes

Headers = CIMultiDictProxy[str]
Content = tuple[bytes, bytes]  # the header lines (see `answer.check_lines`) and the body of a 200
Begin = Callable[[Headers], tuple["asyncio.Future[Any]", Callable[[Any], Content]]]


class Route(NamedTuple):
    """The first half of the handler of one method and path."""

    method: str
    path: str
    begin: Begin


Routes = dict[tuple[str, str], Route]
_DIRECT = web.AppKey("direct", Routes)


def add(app: web.Application, method: str, path: str, begin: Begin) -> None:
    """Add a route whose handler has two halves. A body of at most 1 MiB is read and discarded before `begin` is called."""
    if method == "HEAD":  # The connection would send a body, too, which breaks its framing.
        raise ValueError("a direct route cannot answer HEAD: use app.router.add_head() and Answer(None, ...)")

    async def handler(request: web.Request) -> Answer:
        if method == "POST":
            await discard_body(request)
        future, content = begin(request.headers)
        lines, body = content(await future)
        return Answer(body, lines)

    app.router.add_route(method, path, handler, expect_handler=expect_short_body if method == "POST" else None)
    app.setdefault(_DIRECT, {})[method, path] = Route(method, path, begin)


def routes(app: web.Application) -> Routes:
    """Return the routes of `app` to answer directly. There are none if middlewares or signals must see each request."""
    return {} if app.middlewares or len(app.on_response_prepare) > 1 else app.get(_DIRECT, {})  # the chassis has one signal


async def discard_body(request: web.Request) -> None:
    """Read the whole body chunk by chunk, and keep nothing. Raises ProblemError 413 if it is longer than 1 MiB."""
    left = MAX_BODY - (request.content_length or 0)
    if left >= 0:
        left = MAX_BODY
        async for chunk in request.content.iter_any():
            left -= len(chunk)
            if left < 0:
                break
        else:
            return
    raise ProblemError(413, f"a body has at most {MAX_BODY} bytes")


async def expect_short_body(request: web.Request) -> None:
    """Answer `Expect: 100-continue` with 100, or raise ProblemError 413 if the body will be longer than 1 MiB."""
    if (request.content_length or 0) > MAX_BODY:
        raise ProblemError(413, f"a body has at most {MAX_BODY} bytes")
    if request.version == HttpVersion11 and request.headers[hdrs.EXPECT].lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # This interim response is not the start of the answer.
