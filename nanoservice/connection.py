"""The HTTP connections of clients, with the limits and error answers that aiohttp lacks.

Every error is answered with problem details, also an error that occurs before a handler runs. An error answer neither quotes the
request nor names a version. A connection whose request is not complete in time is closed. WebSockets do not work, because their
data would count as a request that is never complete. The number of connections stays below the number of file descriptors that
the process may open.

This module borrows names that aiohttp does not promise to keep. tests/nanoservice/test_borrowed.py reports each one that an
upgrade removes. Each entry says what the chassis loses without the name. In aiohttp 4, one middleware will replace the methods
that answer, handle errors and log. The other entries stay until aiohttp has such limits itself.

- `RequestHandler.data_received`: aiohttp calls it when bytes arrive. Without it a slow request keeps its connection for ever.
- `RequestHandler.connection_made`: aiohttp calls it when a client connects. Without it the number of connections has no limit.
- `RequestHandler.pause_writing`: aiohttp calls it when a client does not read its answers. Without it the time limit for
  reading does not start again, so a client that reads normally may be cut off in its second large answer.
- `RequestHandler._messages`: aiohttp queues parsed requests here, as pairs of a `RawRequestMessage` (or an error) and the body.
  Without it a complete request behind a slow one counts as overdue, and a handler waits for a broken body.
- `RequestHandler.writing_paused`, `RequestHandler.transport`, `RequestHandler.force_close`: they show and change the state of the
  socket. Without them an overdue connection cannot be recognised or closed.
- `RequestHandler.shutdown`: it closes one connection gracefully. Without it a shutdown may take twice as long.
- `RequestHandler.finish_response`: every answer passes through it. Without it aiohttp's own errors (404, 405, 413, 417) are
  plain text. A middleware will replace it.
- `HTTPException.prepare`: aiohttp's errors are answers themselves. Without it `finish_response` could not recognise them.
- `RequestHandler.handle_error`, `RequestHandler._make_error_handler`: they turn an exception of a handler or the parser into an
  answer. Without them aiohttp quotes the request and names its version. A middleware will replace the first.
- `RequestHandler.log_exception`: without it each broken body writes a traceback to the log.
- `Server.__call__`, `Server.request_handler`, `Server.request_factory`: they make the connections and requests. Without them none
  of the limits above applies.
- `RawRequestMessage._replace`: without it no answer says `Connection: close` while the process drains.
- `RequestPayloadError`: a body is malformed. Without it a malformed body is a 500 with a traceback.
- `HttpProcessingError.message`, `LineTooLong`: the parser raises these errors. Only the message "Too many headers received"
  reveals too many header lines. Without them a request with a head that is too large is a 400 instead of a 431.
- `StreamReader.set_exception`, `StreamReader.is_eof`, `EMPTY_PAYLOAD.is_eof`: they show and set the state of a request's body.
  Without them a handler waits for a broken body until the connection is closed.
- `AbstractStreamWriter.output_size`: it shows whether an answer has begun. Without it an error could be sent inside an answer.
- `RequestHandler.log_access`: it calls the object that is given as `access_log_class` after each answer, without a delay. Without
  it requests are neither measured nor logged. A middleware will replace it.
"""

import asyncio
import logging
import math
from typing import Any

from aiohttp import EMPTY_PAYLOAD, StreamReader, http_exceptions, web
from aiohttp.http import RawRequestMessage

from nanoservice.answer import problem
from nanoservice.errors import ProblemError
from nanoservice.listen import max_connections
from nanoservice.metrics import RequestRecorder

RECEIVE_SECONDS = 10.0  # A request must be complete within this time.
SEND_SECONDS = 30.0  # A client may leave its answers unread for this time.
KEEPALIVE_SECONDS = 75.0  # longer than the 60 s for which common proxies keep an idle connection to a server

_KEPT_HEADERS = "Allow", "Retry-After", "WWW-Authenticate"  # These headers of aiohttp's errors are kept.
_HEAD_TOO_LARGE = "the request line or a header is longer than 8190 bytes, or there are more than 128 headers"

_logger = logging.getLogger(__name__)


class Connection(web.RequestHandler):
    """One client's connection."""

    __slots__ = ("_body", "_body_since", "_factory", "_head_since", "_min_unsent", "_min_unsent_since")

    def __init__(self, factory: "ConnectionFactory", **options: Any) -> None:
        super().__init__(factory, **options)
        self._factory = factory
        self._head_since = math.inf  # when the current request head began to arrive; infinite between requests
        self._body: StreamReader = EMPTY_PAYLOAD  # the body of the request that is being answered
        self._body_since = math.inf
        self._min_unsent = math.inf  # the lowest number of unsent bytes seen since writing was paused
        self._min_unsent_since = math.inf

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accept the connection, or close it if there are too many connections."""
        self._head_since = asyncio.get_running_loop().time()
        super().connection_made(transport)
        if self._factory.full():
            self.force_close()

    def data_received(self, data: bytes) -> None:
        """Record when a request begins to arrive, and pass `data` to the parser."""
        # aiohttp calls this without data to resume after a pause.
        if data and self._head_since == math.inf and self._body.is_eof():
            self._head_since = asyncio.get_running_loop().time()
        super().data_received(data)
        if self._messages and not isinstance(self._messages[-1][0], RawRequestMessage):
            # The bytes could not be parsed. If they interrupt a body, aiohttp never wakes the handler that reads it.
            body = self._messages[-2][1] if len(self._messages) > 1 else self._body
            if not body.is_eof():
                body.set_exception(web.RequestPayloadError())

    def begins(self, body: StreamReader) -> None:
        """Record that the head of a request is complete. Its body may still be arriving."""
        self._body, self._body_since = body, min(self._head_since, asyncio.get_running_loop().time())
        self._head_since = math.inf

    def pause_writing(self) -> None:
        """Record that writing is paused, because the client does not read its answers."""
        self._min_unsent = math.inf
        super().pause_writing()

    def overdue(self, now: float) -> bool:
        """Return whether the client takes too long to send a request or to read an answer."""
        if self.writing_paused and self.transport:
            unsent = self.transport.get_write_buffer_size()
            if unsent < self._min_unsent:
                self._min_unsent, self._min_unsent_since = unsent, now
            elif now - self._min_unsent_since >= SEND_SECONDS:
                return True
        # A complete request that is queued behind another one is not overdue.
        if not self._messages and now - self._head_since >= RECEIVE_SECONDS:
            return True
        return not self._body.is_eof() and now - self._body_since >= RECEIVE_SECONDS

    async def shutdown(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - aiohttp's signature
        """Finish the request that is being answered, within `timeout` seconds, and close the connection."""
        if not self._messages and self._head_since < math.inf:
            # aiohttp closes idle connections. A connection accepted a moment ago is not idle yet, but aiohttp will not read
            # from it any more. So close such a connection here.
            self.force_close()
        try:
            async with asyncio.timeout(timeout):
                await super().shutdown(None)
        except TimeoutError:
            await super().shutdown(0.1)  # aiohttp spends its timeout twice: on the handler, then on cancelling it.

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Write the answer. An error that aiohttp made (404, 405, 413, 417) is replaced by problem details."""
        if resp.status >= 400 and isinstance(resp, web.HTTPException):
            kept = {name: resp.headers[name] for name in _KEPT_HEADERS if name in resp.headers}
            # Keep text that a handler set. Drop aiohttp's default; for 417 it quotes the client.
            own = resp.status != 417 and resp.text != f"{resp.status}: {resp.reason}"
            resp = problem(resp.status, resp.text or "" if own else "", kept)
        finished = await super().finish_response(request, resp, start_time)
        if self._messages:
            # Let other clients in. From Python 3.12 on, aiohttp runs each handler at once. If no handler waits for anything,
            # all pipelined requests of this client would be answered in one iteration of the event loop.
            await asyncio.sleep(0)
        return finished

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Return the answer to a request that could not be parsed, or whose handler raised an exception."""
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun, so the connection can only be closed")
        if isinstance(exc, ProblemError):
            return problem(exc.status, exc.detail, exc.headers)
        if isinstance(exc, UnicodeEncodeError) and not request.headers.get("Expect", "").isascii():
            return problem(417)  # aiohttp quotes an unknown `Expect`, and cannot encode a value that is not ASCII.
        # If the transport is closed, the client has disconnected. If not, the error may come from a server that a handler calls.
        gone = isinstance(exc, ConnectionError) and self.transport is None
        if isinstance(exc, (web.RequestPayloadError, http_exceptions.HttpProcessingError)) or gone or status == 400:
            _logger.debug("bad request", extra={"error": type(exc).__name__})
            # A long line has its own exception class; too many headers can only be recognised by the message.
            large = isinstance(exc, http_exceptions.LineTooLong) or getattr(exc, "message", "") == "Too many headers received"
            answer = problem(431, _HEAD_TOO_LARGE) if large else problem(400, "the request is not valid HTTP")
        else:
            _logger.error("a handler failed", exc_info=exc)
            answer = problem(status)
        answer.force_close()
        return answer

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """Log an error outside a handler with its traceback. If the client caused the error, log it only at debug level."""
        client = isinstance(kw.get("exc_info"), (web.RequestPayloadError, ConnectionError))
        _logger.log(logging.DEBUG if client else logging.ERROR, *args, **kw)


class ConnectionFactory(web.Server):
    """Makes a `Connection` for each client of one listening socket, and closes overdue connections."""

    def __init__(self, app_server: web.Server, recorder: RequestRecorder) -> None:
        super().__init__(app_server.request_handler, request_factory=self._begin)  # type: ignore[arg-type] # for Connection
        self.draining = False
        self._new_request = app_server.request_factory
        self._options = {
            "loop": asyncio.get_running_loop(),
            "logger": _logger,
            "access_log": recorder,
            "access_log_class": lambda recorder, _: recorder,  # One recorder serves all connections.
            "auto_decompress": False,  # Bodies are discarded as they arrive, so a compressed body cannot expand in memory.
            "keepalive_timeout": KEEPALIVE_SECONDS,
            "lingering_time": RECEIVE_SECONDS,
        }
        self._max_connections = max_connections()
        self._logged_full = False

    def __call__(self) -> web.RequestHandler:
        """Return the protocol of a new connection."""
        return Connection(self, **self._options)

    def full(self) -> bool:
        """Return whether there are so many connections that they use reserved file descriptors. Log this once."""
        if len(self.connections) <= self._max_connections:
            return False
        if not self._logged_full:
            self._logged_full = True
            _logger.error("too many connections: new ones are closed at once", extra={"limit": self._max_connections})
        return True

    def _begin(self, message: RawRequestMessage, payload: StreamReader, protocol: Connection, *rest: Any) -> web.BaseRequest:
        if self.draining:
            # This makes every answer say `Connection: close`, whatever its class.
            message = message._replace(should_close=True)
        protocol.begins(payload)
        return self._new_request(message, payload, protocol, *rest)

    def close_overdue(self) -> None:
        """Close the connections whose clients take too long. Call this about once a second."""
        now = asyncio.get_running_loop().time()
        for connection in self.connections:
            if isinstance(connection, Connection) and connection.transport and connection.overdue(now):
                connection.transport.abort()  # Unlike close(), this does not wait for the client.
