"""The HTTP side of a client's connection: what aiohttp leaves open is bounded and answered here.

Every error is problem details, also those made before a handler runs; nothing of the request or of our versions is echoed;
a request that is not complete in time ends its connection (so there are no WebSockets); the number of connections stays below
the descriptors we may open.
"""

import asyncio
import logging
import math
import resource
from collections.abc import Coroutine
from typing import Any

from aiohttp import EMPTY_PAYLOAD, StreamReader, http_exceptions, web
from aiohttp.http import RawRequestMessage

from nanoservice.answer import ProblemError, problem
from nanoservice.metrics import RequestRecorder

RECEIVE_SECONDS = 10.0  # a request must be complete by then
SEND_SECONDS = 30.0  # a client may take nothing of its answers for so long
KEEPALIVE_SECONDS = 75.0  # longer than the 60 s for which common proxies keep an idle connection to us
_SPARE_DESCRIPTORS = 128  # for Redis (81 at most), the log, the listening sockets, files, the admin port's own connections

_Finished = Coroutine[Any, Any, tuple[web.StreamResponse, bool]]

_logger = logging.getLogger(__name__)


class Connection(web.RequestHandler):
    """One client's connection."""

    __slots__ = ("_body", "_body_since", "_head_since", "_server", "_taken_at", "_untaken")

    def __init__(self, server: "Server", **options: Any) -> None:
        super().__init__(server, **options)
        self._server = server
        self._head_since = math.inf  # when the request that is arriving began; infinite between requests
        self._body: StreamReader = EMPTY_PAYLOAD  # of the request that is being answered
        self._body_since = math.inf
        self._untaken = math.inf  # bytes that wait for the client to take them, the fewest that were seen
        self._taken_at = math.inf  # when that was

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection, unless there are too many."""
        self._head_since = asyncio.get_running_loop().time()
        super().connection_made(transport)
        if self._server.full():
            self.force_close()

    def data_received(self, data: bytes) -> None:
        """Note when a request begins to arrive, then have it parsed."""
        # aiohttp calls it with no data to go on after a pause.
        if data and self._head_since == math.inf and self._body.is_eof():
            self._head_since = asyncio.get_running_loop().time()
        super().data_received(data)
        if self._messages and not isinstance(self._messages[-1][0], RawRequestMessage):
            # What came is no HTTP. If it stands where a body should go on, aiohttp leaves who reads that body waiting.
            body = self._messages[-2][1] if len(self._messages) > 1 else self._body
            if not body.is_eof():
                body.set_exception(web.RequestPayloadError())

    def begins(self, body: StreamReader) -> None:
        """Note that the head of a request is complete; its body may not be."""
        self._body, self._body_since = body, min(self._head_since, asyncio.get_running_loop().time())
        self._head_since = math.inf

    def pause_writing(self) -> None:
        """Note that answers wait to be taken."""
        self._untaken = math.inf
        super().pause_writing()

    def overdue(self, now: float) -> bool:
        """Return whether a request has been arriving for too long, or an answer leaving."""
        if self.writing_paused and self.transport:
            untaken = self.transport.get_write_buffer_size()
            if untaken < self._untaken:
                self._untaken, self._taken_at = untaken, now
            elif now - self._taken_at >= SEND_SECONDS:
                return True
        # A request that is complete and waits for the one before it has arrived.
        if not self._messages and now - self._head_since >= RECEIVE_SECONDS:
            return True
        return not self._body.is_eof() and now - self._body_since >= RECEIVE_SECONDS

    async def shutdown(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - aiohttp's signature
        """Finish the request that is being answered, in `timeout` seconds at most."""
        if not self._messages and self._head_since < math.inf:
            # aiohttp ends what waits for a request. What was taken just now does not wait yet, and is read no more.
            self.force_close()
        try:
            async with asyncio.timeout(timeout):
                await super().shutdown(None)
        except TimeoutError:
            await super().shutdown(0.1)  # aiohttp's own timeout is spent twice: on the handler, then on its end

    def finish_response(self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None) -> _Finished:
        """Write the answer; an error that aiohttp made (404, 405, 413, 417) becomes problem details first."""
        if resp.status >= 400 and isinstance(resp, web.HTTPException):
            kept = {name: resp.headers[name] for name in _KEPT if name in resp.headers}
            # Words that a handler gave; those of aiohttp for 417 are the client's.
            own = resp.status != 417 and resp.text != f"{resp.status}: {resp.reason}"
            resp = problem(resp.status, resp.text or "" if own else "", kept)
        return super().finish_response(request, resp, start_time)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Return the answer to a request that could not be parsed, or whose handler raised."""
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun: all that is left is to end the connection")
        if isinstance(exc, ProblemError):
            return problem(exc.status, exc.detail, exc.headers)
        if isinstance(exc, UnicodeEncodeError) and not request.headers.get("Expect", "").isascii():
            return problem(417)  # aiohttp quotes what it does not expect, and fails if that is no text
        gone = isinstance(exc, ConnectionError) and self.transport is None  # the client is, not what the handler talks to
        if isinstance(exc, (web.RequestPayloadError, http_exceptions.HttpProcessingError)) or gone or status == 400:
            _logger.debug("bad request", extra={"error": type(exc).__name__})
            # aiohttp has a class for the one and only words for the other.
            large = isinstance(exc, http_exceptions.LineTooLong) or getattr(exc, "message", "") == "Too many headers received"
            answer = problem(431, _TOO_LARGE) if large else problem(400, "the request is not valid HTTP")
        else:
            _logger.error("a handler failed", exc_info=exc)
            answer = problem(status)
        answer.force_close()
        return answer

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """Log an error outside a handler, with its traceback; what a client did (a bad or broken body) only at debug."""
        client = isinstance(kw.get("exc_info"), (web.RequestPayloadError, ConnectionError))
        _logger.log(logging.DEBUG if client else logging.ERROR, *args, **kw)


_KEPT = "Allow", "Retry-After", "WWW-Authenticate"  # of an error's headers
_TOO_LARGE = "the request line or a header is longer than 8190 bytes, or there are more than 128 headers"


class Server(web.Server):
    """Makes a `Connection` for each client of `app`, and ends those that take too long."""

    def __init__(self, app_server: web.Server, recorder: RequestRecorder) -> None:
        super().__init__(app_server.request_handler, request_factory=self._begin)  # type: ignore[arg-type] # __call__ makes Connections
        self.draining = False
        self._new_request = app_server.request_factory
        self._options = {
            "loop": asyncio.get_running_loop(),
            "logger": _logger,
            "access_log": recorder,
            "access_log_class": lambda recorder, _: recorder,  # one serves all connections
            "auto_decompress": False,  # bodies are taken as they came: no bombs
            "keepalive_timeout": KEEPALIVE_SECONDS,
            "lingering_time": RECEIVE_SECONDS,
        }
        self._limit = max_connections()
        self._told_full = False

    def __call__(self) -> web.RequestHandler:
        """Return the protocol of a new connection."""
        return Connection(self, **self._options)

    def full(self) -> bool:
        """Return whether one more connection could take the last descriptors; logged once."""
        if len(self.connections) <= self._limit:
            return False
        if not self._told_full:
            self._told_full = True
            _logger.error("too many connections: new ones are closed at once", extra={"limit": self._limit})
        return True

    def _begin(self, message: RawRequestMessage, payload: StreamReader, protocol: Connection, *rest: Any) -> web.BaseRequest:
        if self.draining:
            # Whatever class the answer is of, it now says `Connection: close`.
            message = message._replace(should_close=True)
        protocol.begins(payload)
        return self._new_request(message, payload, protocol, *rest)

    def end_overdue(self) -> None:
        """Close the connections whose request is not complete in time; to be called about once a second."""
        now = asyncio.get_running_loop().time()
        for connection in self.connections:
            if isinstance(connection, Connection) and connection.transport and connection.overdue(now):
                connection.transport.abort()  # whether the client takes what is left to send or not


def max_connections() -> int:
    """Raise the limit on open files as far as it may be, and return how many connections that leaves."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, soft - _SPARE_DESCRIPTORS)
