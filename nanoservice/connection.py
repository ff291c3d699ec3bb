"""The HTTP connections of clients: one request at a time, within limits, each error answered with problem details.

aiohttp's C parser reads the bytes, its application handles the requests, and its writer writes the answers. This module does
everything between them. An error answer neither quotes the request nor names a version. A connection whose request is not
complete in time is closed. Each answer takes at least one iteration of the event loop, so a client that pipelines does not block
other clients. WebSockets do not work: the answer to an upgrade request closes the connection. `bounds.py` has the limits for all
connections together.

This module borrows names that aiohttp does not promise to keep. tests/nanoservice/test_borrowed.py reports each one that an
upgrade removes. Each entry says what the chassis loses without the name.

- `HttpRequestParser.feed_data`: it parses requests. Without it the chassis needs another parser.
- `RawRequestMessage._replace`: it changes a parsed request. Without it `GET http://host` is not found, and the answer to the
  last request of a connection does not say that it is the last one.
- `HttpProcessingError`, `LineTooLong`: the parser raises these errors. Without them no malformed request is answered.
- `RequestPayloadError`: the body of a request is malformed. Without it a malformed body is a 500 with a traceback.
- `BaseProtocol.pause_writing`, `BaseProtocol.resume_writing`, `BaseProtocol.connection_made`, `BaseProtocol.connection_lost`,
  `BaseProtocol.writing_paused`, `BaseProtocol.transport`: aiohttp's writer waits for the client through this base class. Without
  them a slow client fills the memory.
- `BaseProtocol.pause_reading`, `BaseProtocol.resume_reading`: a body that its handler does not read calls the first one. Without
  them such a body has no limit.
- `BaseProtocol._parser`: `pause_reading` pauses this parser too. Without it such a body has no limit.
- `StreamWriter`: it writes the answers of aiohttp's responses. Without it only `Answer` could be sent.
- `StreamReader.set_exception`, `StreamReader.exception`, `StreamReader.is_eof`, `EMPTY_PAYLOAD`: they show and set the state of a
  request's body. Without them a handler waits for a broken body until the connection is closed.
- `StreamReader.total_bytes`, `StreamReader.get_read_buffer_limits`: they show how much of a body has arrived, and whether a
  handler collects it. Without them long bodies that are collected at the same time fill the memory.
- `AbstractStreamWriter.output_size`: it shows whether an answer has begun. Without it an error could be sent inside an answer.
- `Server.request_handler`, `Server.request_factory`: they make and handle aiohttp's requests. Without them nothing is served.
"""

import asyncio
import contextlib
import logging
import math
import re
from collections.abc import Coroutine
from functools import lru_cache
from typing import Any, cast

from aiohttp import EMPTY_PAYLOAD, HttpVersion10, HttpVersion11, StreamReader, hdrs, web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import HttpProcessingError, HttpRequestParser, RawRequestMessage, StreamWriter
from aiohttp.http_exceptions import LineTooLong

from nanoservice.answer import Answer, check_lines, encode, problem
from nanoservice.bounds import BUFFER_BYTES, HEAD_BYTES, LONG_BYTES, Bounds
from nanoservice.config import FINISH_SECONDS
from nanoservice.direct import Route, Routes
from nanoservice.errors import ProblemError, header_lines
from nanoservice.failures import FailureLog, frames
from nanoservice.limits import TimeLimits
from nanoservice.metrics import RequestRecorder
from nanoservice.trace import CURRENT, TRACEPARENT, UNMATCHED, Trace

RECEIVE_SECONDS = 10.0  # A request must be complete within this time.
# A handler must begin its answer within this time after the request is complete. A shutdown waits no longer either.
HANDLE_SECONDS = FINISH_SECONDS
SEND_SECONDS = 30.0  # A client may leave its answers unread for this time.
# This is longer than common proxies keep an idle connection to a server. Google's load balancers keep one for 600 s.
KEEPALIVE_SECONDS = 620.0

_KEPT_HEADERS = "Allow", "Retry-After", "WWW-Authenticate"  # These headers of aiohttp's errors are kept.
_LINE_BYTES = 8190  # the maximum size of a URL
_FIELD_BYTES = 8192  # the maximum size of a header; unequal to `_LINE_BYTES`, so that the parser's error shows what is too long
_MAX_HEADERS = 128
_HEAD_TOO_LARGE = (
    f"the head is longer than {HEAD_BYTES} bytes, a header than {_FIELD_BYTES}, or there are more than {_MAX_HEADERS}"
)
_PROBES = "/livez", "/readyz", "/metrics"  # A connection from the reserve may only send requests for these paths.
_HOST = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")
_END = b"\r\n\r\n"  # A request head ends with these bytes, and so does a body in chunks.
_PARSE_SECONDS = 0.01  # In one iteration of the event loop, requests that are not small are parsed for this time.
_HEADER_WEIGHT = 350  # bytes that the Python objects for one header take
_REQUEST_WEIGHT = 8 << 10  # bytes that aiohttp's objects for one request take, with their task
_FRAMING_BYTES = 64 << 10  # A body in chunks may take this number of bytes more than twice its size.
_CHUNK_WEIGHT = 48  # bytes that the Python objects for half a chunk take
_CLOSE = b"Connection: close\r\n"
_CONTINUE = "100-continue"
_TRACEPARENT_LENGTH = 56  # More than this is not needed to check a `traceparent`, and would be memory that clients use.

_logger = logging.getLogger(__name__)


class _SlowBodyError(web.RequestPayloadError):
    """The body of a request did not arrive in time."""


class Connection(BaseProtocol):
    """One client's connection."""

    # fmt: off
    __slots__ = (
        "_body", "_body_paused", "_bounds", "_busy", "_content", "_counted", "_deaf", "_discarding", "_ended", "_factory",
        "_head", "_idle", "_late", "_later", "_left", "_long", "_message", "_min_unsent", "_min_unsent_since", "_only_probes",
        "_route", "_seam", "_sent", "_since", "_started", "_trace", "_work", "held", "peername", "sockname",
    )
    # fmt: on

    # aiohttp's requests read these attributes, `peername` and `sockname`.
    ssl_context = None
    max_field_size = _FIELD_BYTES
    max_headers = _MAX_HEADERS

    def __init__(self, factory: "ConnectionFactory") -> None:
        super().__init__(factory.loop)
        self._parser: Any = HttpRequestParser(
            self, factory.loop, BUFFER_BYTES, max_line_size=_LINE_BYTES, max_field_size=_FIELD_BYTES, max_headers=_MAX_HEADERS,
            payload_exception=web.RequestPayloadError,
            auto_decompress=False,  # A compressed body must not expand in memory.
        )  # fmt: skip
        self._factory = factory
        self._bounds = factory.bounds
        # `_busy`: a request whose head is complete is being received or answered. `_body`: the body of this request. `_left`: the
        # number of bytes of the body that the parser has not got yet (None for chunks). `_message` is set until its handling
        # begins, at `_started`. `_discarding`: the request is answered, and the rest of its body is being discarded. `_long`: a
        # handler collects a long body.
        self._body: StreamReader = EMPTY_PAYLOAD
        self._message: RawRequestMessage | None = None
        self._left: int | None = 0
        self._busy = self._discarding = self._long = self._body_paused = False
        # `_idle`: nothing of the next request has arrived. `_since`: when the client began to send a request, or to be idle.
        # `_ended`: the client has closed its side. `_deaf`: all further bytes are discarded.
        self._idle, self._ended, self._deaf = True, False, False
        # `_head`: the size of the incomplete head, or of the trailer. `_later`: bytes that are not parsed yet. `_seam`: the last
        # bytes that were parsed, in which `_END` may begin. `_sent`: the bytes of a body in chunks, with their framing.
        # `_counted`: the part of `held` for the bytes in `_later`.
        self._head = self._counted = self._sent = self.held = 0
        self._later = self._seam = b""
        # `_trace`: the trace of the request that is being answered, or only its `traceparent`. `_work`: the future or the task of
        # its handler. `_late`: the last such future or task that was cancelled because it took too long.
        self._trace: Trace | str | None = None
        self._work: asyncio.Future[Any] | None = None
        self._late: asyncio.Future[Any] | None = None
        # the lowest number of unsent bytes seen since writing was paused, and when it was first seen
        self._min_unsent = self._min_unsent_since = math.inf
        self.peername = self.sockname = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accept the connection. If there are too many, close another one, or accept only probes on this one."""
        self.transport = cast("asyncio.Transport", transport)  # uvloop's class is not a subclass
        self.transport.set_write_buffer_limits(BUFFER_BYTES)
        if hasattr(transport, "max_size"):
            transport.max_size = BUFFER_BYTES  # asyncio's own event loop allocates this number of bytes for each read.
        # An idle connection may stay for `KEEPALIVE_SECONDS`, but a new one must send a request within `RECEIVE_SECONDS`.
        self._since = self._factory.now() + RECEIVE_SECONDS - KEEPALIVE_SECONDS
        self._only_probes = not self._bounds.admit(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Release what the connection held. A handler whose request is complete finishes its work."""
        self._forget()
        super().connection_lost(exc)

    def abort(self) -> None:
        """Close the connection at once, and free its memory. Unlike close(), this does not wait for the client."""
        if self.transport:
            self.transport.abort()
        if not self._body.is_eof() and self._body.exception() is None:
            with contextlib.suppress(RuntimeError):  # A handler waits for the body, so none of it is buffered.
                self._body.read_nowait()
        self._forget()

    def _forget(self) -> None:
        self._bounds.remove(self)
        self._deaf, self._idle, self._later, self._counted, self._message, self._parser = True, False, b"", 0, None, None
        if not self._busy:
            self._trace = None  # It refers to the request.
        if not self._body.is_eof():
            self._fail_body(web.RequestPayloadError("the connection was closed"))

    def eof_received(self) -> bool:
        """Return whether the connection stays open for an answer, although the client has closed its side."""
        self._ended = True
        if self._busy and not self._body.is_eof():
            self._break_body()
        return self._busy or bool(self._later)

    def pause_writing(self) -> None:
        """Record that writing is paused, because the client does not read its answers."""
        self._min_unsent = math.inf
        super().pause_writing()
        self._waits()

    def resume_writing(self) -> None:
        """Continue with the next request."""
        super().resume_writing()
        if self._busy and self._body.is_eof():
            self._bounds.waiting.pop(self, None)
        self.read()

    def _waits(self) -> None:
        """Record that the service waits for the client from now on."""
        if self.transport is not None and not self.transport.is_closing():
            self._bounds.waiting[self] = None
            self._bounds.waiting.move_to_end(self)

    # --- read ---

    def pause_reading(self) -> None:
        """Read no more of the body until its handler has read what is buffered. aiohttp calls this."""
        self._body_paused = True
        super().pause_reading()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Continue to read the body. aiohttp calls this, also at the end of a body."""
        self._body_paused = False
        super().resume_reading(resume_parser)
        self._read_socket(not self._later and not self._body_paused)

    def _read_socket(self, reading: bool) -> None:
        """Start or stop to receive bytes from the kernel."""
        if self.transport is not None and self.transport.is_reading() is not reading and not self.transport.is_closing():
            (self.transport.resume_reading if reading else self.transport.pause_reading)()

    def data_received(self, data: bytes) -> None:
        """Read `data`. aiohttp calls this without data to continue with a body after a pause."""
        if self._idle and data.find(_END) + len(_END) == len(data) <= HEAD_BYTES and not self.writing_paused:
            self._parse_head(data)  # This is the usual case, which needs no other check: one request that has no body.
            if self._message is not None:
                self._start(self._message)
        elif not self._deaf:
            if not data and self._busy and not self._body.is_eof():
                self._feed(b"")
            self._later = self._later + data if self._later else data
            self.read()

    def read(self) -> None:
        """Parse the received bytes up to the end of one request, and have this request answered."""
        if self._deaf:
            return
        data, self._later = self._later, b""
        while data and not self._deaf and self._factory.has_time():
            if not self._busy:
                if self.writing_paused:
                    break  # The client must read its answers first.
                data = self._read_head(data)
            elif self._body.is_eof() or self._body_paused or not self._may_receive():
                break
            else:
                data = self._read_body(data)
        if self._deaf:
            data = b""
        elif data and not self._factory.has_time():
            self._factory.loop.call_soon(self.read)
        self._later = data
        if len(data) != self._counted:
            self._bounds.hold(self, len(data) - self._counted)
            self._counted = len(self._later)
        self._read_socket(not data and not self._body_paused)
        if self._message is not None:
            self._start(self._message)

    def _read_head(self, data: bytes) -> bytes:
        """Parse a head, or a part of it. Return the bytes behind it."""
        piece = data[: min(self._end(data), HEAD_BYTES - self._head)]
        if self._parse_head(piece) and self._message is None:
            self._head += len(piece)
            self._seam = (self._seam + piece)[-3:]
            self._bounds.hold(self, 3 * len(piece) + _HEADER_WEIGHT * piece.count(b"\n"))
            if self._head >= HEAD_BYTES:
                self._refuse(431, _HEAD_TOO_LARGE)
        return data[len(piece) :]

    def _parse_head(self, data: bytes) -> bool:
        """Give the parser a head, or a part of it, and return whether it is well-formed."""
        try:
            messages, _, _ = self._parser.feed_data(data)
        except HttpProcessingError as error:
            self._refuse(*_malformed(error))
            return False
        if messages:
            message, self._body = messages[0]
            self._message, self._busy = message, True
            self._head, self._sent, self._seam = 0, 0, b""
            if self._body is not EMPTY_PAYLOAD:
                self._left = None if message.chunked else int(message.headers.get(hdrs.CONTENT_LENGTH, 0))
        else:
            self._receives()
        return True

    def _end(self, data: bytes) -> int:
        """Return the position in `data` behind the next `_END`, or the length of `data`."""
        found = (self._seam + data).find(_END)
        return found + len(_END) - len(self._seam) if found >= 0 else len(data)

    def _receives(self) -> None:
        """Record that the client has begun to send a request."""
        if self._idle:
            self._idle, self._since = False, self._factory.now()

    def _may_receive(self) -> bool:
        """Return whether the body may be received now. A long body that a handler collects may have to wait for others."""
        if self._body.total_bytes > LONG_BYTES:
            low, _ = self._body.get_read_buffer_limits()
            self._long = low > BUFFER_BYTES  # `await request.read()` has raised this limit
        return not self._long or self._discarding or self._bounds.may_receive(self)

    def _read_body(self, data: bytes) -> bytes:
        """Parse a part of a body. Return the bytes behind it."""
        size = min(self._end(data) if self._left is None else self._left, BUFFER_BYTES)
        piece, before = data[:size], self._body.total_bytes
        if not self._feed(piece):
            return b""
        if self._left is None:
            self._seam = (self._seam + piece)[-3:]
            self._head = 0 if self._body.total_bytes > before else self._head + len(piece)
            self._sent += len(piece)
            too_small = self._sent > 2 * self._body.total_bytes + _FRAMING_BYTES  # Parsing tiny chunks costs much CPU time.
            if (self._head > HEAD_BYTES or too_small) and not self._body.is_eof():  # or a trailer that is too large
                self._break_body()
        else:
            self._left -= len(piece)
        if self._body.total_bytes <= LONG_BYTES:
            self._bounds.hold(self, len(piece) + (_CHUNK_WEIGHT * piece.count(b"\n") if self._left is None else 0))
        if self._body.is_eof():
            self._head, self._seam = 0, b""
            self._since = self._factory.now()
            if self._message is None and not self._discarding:
                self._bounds.waiting.pop(self, None)
        return data[size:]

    def _feed(self, data: bytes) -> bool:
        """Give the parser a part of a body, and return whether it is well-formed."""
        try:
            self._parser.feed_data(data)
        except HttpProcessingError:
            self._break_body()
            return False
        return True

    def _break_body(self) -> None:
        """Read nothing more, and make the handler's reading of the body fail. aiohttp would leave the handler waiting."""
        self._deaf = True
        self._fail_body(web.RequestPayloadError("the body is malformed"))

    def _fail_body(self, error: Exception) -> None:
        """Make the reading of the body fail with `error`, or with the error that it has already failed with."""
        body = self._body
        error = cast("Exception", body.exception() or error)
        body.set_exception(error)
        # A reader that has been woken, but has not run yet, may find no data, and waits again. So wake it again.
        self._factory.loop.call_soon(body.set_exception, error)

    # --- answer ---

    def _start(self, message: RawRequestMessage) -> None:
        """Begin to answer a request whose head is complete."""
        self._message = None
        factory = self._factory
        self._started = factory.now()
        whole, headers = self._body.is_eof(), message.headers
        if whole:
            self._idle = False
            self._bounds.waiting.pop(self, None)
        else:
            self._receives()
        known = message.version in (HttpVersion10, HttpVersion11) and _valid_host(headers.get(hdrs.HOST, ""))
        known = known and (message.chunked or hdrs.TRANSFER_ENCODING not in headers)  # The parser accepts an empty value.
        if not known or self._body.exception() is not None:
            self._refuse(400, "the request is not valid HTTP", trace=Trace("other", headers))
            return
        if self._only_probes and message.path not in _PROBES:
            self._refuse(503, "too many connections", {"Retry-After": "1"}, Trace("other", headers))
            return
        route = factory.routes.get((message.method, message.path))
        last = message.should_close or message.upgrade or self._only_probes or factory.draining
        if route is not None and whole and not last and message.version == HttpVersion11 and hdrs.EXPECT not in headers:
            self._route: Route = route
            if (traceparent := headers.get(TRACEPARENT)) is not None:
                self._trace = traceparent[:_TRACEPARENT_LENGTH]
            try:
                self._work, self._content = route.begin(headers)
            except Exception as error:
                self._fail_directly(error)
            else:
                self._work.add_done_callback(self._on_direct_result)
        else:
            sizes = (_HEADER_WEIGHT + 3 * (len(name) + len(value)) for name, value in message.raw_headers)
            self._bounds.hold(self, _REQUEST_WEIGHT + sum(sizes))
            if last and not message.should_close:
                message = message._replace(should_close=True)
            if message.url.absolute and message.url.raw_path == "/":  # aiohttp does not find an empty path
                message = message._replace(url=message.url.with_path("/", keep_query=True))
            factory.add_task(self._answer(message, self._body), self)

    def _on_direct_result(self, future: "asyncio.Future[Any]") -> None:
        last = self._factory.draining
        try:
            lines, body = self._content(future.result())
            check_lines(lines)
        except (Exception, asyncio.CancelledError) as error:
            self._fail_directly(error)
        else:
            self._answer_directly(200, encode(200, lines, body, _CLOSE if last else b""), last=last)

    def _fail_directly(self, error: BaseException) -> None:
        answer = self._failure(error)
        if self._factory.draining:
            answer.force_close()
        self._answer_directly(answer.status, answer.encode(), last=answer.keep_alive is False)

    def _answer_directly(self, status: int, data: bytes, *, last: bool) -> None:
        factory, transport = self._factory, self.transport
        now = factory.now()
        factory.recorder.record(self._route.method, self._route.path, status, now - self._started, self)
        if transport is not None and not transport.is_closing():
            transport.write(data)
        self._finish(not last, now)

    async def _answer(self, message: RawRequestMessage, body: StreamReader) -> None:
        """Have aiohttp's application answer a request, and continue with the next one."""
        factory = self._factory
        try:
            status, route, keep = await self._respond(message, body)
            factory.recorder.record(message.method, route, status, factory.now() - self._started, self)
            CURRENT.set(None)  # What follows, such as the next request, is scheduled from here.
            if keep and not body.is_eof() and not self._deaf:
                self._discarding = True
                self._bounds.release(self)
                self._counted = 0
                self._waits()
                self.read()
                try:
                    while not body.is_eof():
                        await body.readany()
                except web.RequestPayloadError as error:
                    error.__traceback__ = None
            self._finish(keep, factory.now())
        except Exception as error:  # an error of the chassis itself, or of a signal that fails for each response
            factory.failures.log(error, self.trace())
            self.abort()

    async def _respond(self, message: RawRequestMessage, body: StreamReader) -> tuple[int, str, bool]:
        """Answer a request. Return the status, the template of the route, and whether the connection can stay open."""
        factory, transport, writer = self._factory, self.transport, StreamWriter(self, self._factory.loop)
        if self.peername is None and transport is not None:
            self.peername, self.sockname = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
        task = cast("asyncio.Task[None]", asyncio.current_task())
        request = factory.new_request(message, body, cast("Any", self), writer, task)
        self._trace = trace = Trace(message.method, message.headers)
        self._work = task
        CURRENT.set(trace)
        try:
            response: web.StreamResponse
            if message.method == hdrs.METH_OPTIONS and message.path == "*":
                response = Answer(None, header_lines({"Allow": "GET,HEAD,OPTIONS"}), status=204)
            elif message.version == HttpVersion11 and message.headers.get(hdrs.EXPECT, _CONTINUE).lower() != _CONTINUE:
                raise ProblemError(417, "")
            else:
                trace.request = cast("web.Request", request)
                try:
                    response = await factory.handler(request)
                except web.HTTPException as error:
                    response = error.with_traceback(None)
            sent = await self._send(request, response)
        except (Exception, asyncio.CancelledError) as error:
            if task.cancelling() > (self._late is task):  # The shutdown cuts the request off.
                raise
            answer = self._failure(error, begun=writer.output_size > 0)
            error.__traceback__ = None  # It refers to the request, whose memory only the garbage collector would free.
            sent = answer if writer.output_size else await self._send(request, answer)
        return sent.status, trace.route, bool(sent.keep_alive)

    async def _send(self, request: web.BaseRequest, response: web.StreamResponse) -> web.StreamResponse:
        """Write a response, and return what was sent. An error that aiohttp made (404, 405, 413) becomes problem details."""
        if not isinstance(response, web.StreamResponse):
            raise TypeError(f"the handler returned {type(response).__name__}, not a response")
        if isinstance(response, web.HTTPException) and request.writer.output_size:
            raise RuntimeError("the answer has begun") from response
        sent = response
        if isinstance(response, web.HTTPException) and response.status >= 400:
            kept = {name: response.headers[name] for name in _KEPT_HEADERS if name in response.headers}
            own = response.text != f"{response.status}: {response.reason}"  # Keep text that a handler set.
            sent = problem(response.status, self.trace(), response.text or "" if own else "", kept)
        if self._factory.draining or self._deaf:
            sent.force_close()
        try:
            await sent.prepare(request)
            await sent.write_eof()
            if not request.writer.output_size:
                raise RuntimeError("nothing was sent: the same response cannot be sent twice")
        except ConnectionError:
            if self.transport is not None and not self.transport.is_closing():
                raise
        return sent

    def _failure(self, error: BaseException, *, begun: bool = False) -> Answer:
        """Return the answer to a request whose handler raised `error`, and log the error if the client did not cause it."""
        trace = self.trace()
        if isinstance(error, ProblemError) and not begun:
            return problem(error.status, trace, error.detail, error.headers)
        if isinstance(error, asyncio.CancelledError) and self._late is self._work:
            late = TimeoutError(f"the handler did not begin its answer within {self._limits.handle or HANDLE_SECONDS:g} s")
            self._factory.failures.log(late.with_traceback(error.__traceback__), trace)
            answer = problem(504, trace, str(late))
            answer.force_close()
            return answer
        # If the transport is closed, the client has disconnected. If not, the error may come from a server that a handler calls.
        gone = isinstance(error, ConnectionError) and (self.transport is None or self.transport.is_closing())
        if isinstance(error, _SlowBodyError):
            answer = problem(408, trace, f"the body did not arrive within {self._limits.receive or RECEIVE_SECONDS:g} s")
        elif isinstance(error, (web.RequestPayloadError, HttpProcessingError)) or gone:
            _logger.debug("bad request", extra={"error": type(error).__name__})
            answer = problem(400, trace, "the request is not valid HTTP")
        elif isinstance(error, (ValueError, LookupError, RecursionError)) and _read_body(error):
            _logger.debug("bad request", extra={"error": type(error).__name__})
            return problem(400, trace, "the body is not what its Content-Type says")
        else:
            self._factory.failures.log(error, trace)
            timed_out = isinstance(error, TimeoutError)
            answer = problem(504, trace, "a call of the handler timed out") if timed_out else problem(500, trace)
        answer.force_close()
        return answer

    def trace(self) -> Trace:
        """Return the trace of the request that is being answered."""
        if not isinstance(self._trace, Trace):
            self._trace = Trace(self._route.method, {TRACEPARENT: self._trace}, self._route.path)
        return self._trace

    def _refuse(self, status: int, detail: str, headers: dict[str, str] | None = None, trace: Trace | None = None) -> None:
        """Answer a request that is not handled, and close the connection."""
        self._trace = trace or Trace("other", {})
        answer = problem(status, self._trace, detail, headers)
        answer.force_close()
        _logger.debug("bad request", extra={"status": status, "trace_id": self._trace.id})
        self._factory.recorder.record("other", UNMATCHED, status, 0.0, self)
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(answer.encode())
        self._close(linger=True)

    def _finish(self, keep: bool, now: float) -> None:
        """End the request, which is answered, and continue with the next one."""
        if not keep or self._deaf or self._factory.draining or (self._ended and not self._later):
            self._close(linger=not self._body.is_eof() or bool(self._later))
            return
        self._busy = self._discarding = False
        self._body = EMPTY_PAYLOAD
        self._trace = None
        if self.held or self._long:
            self._bounds.release(self)
            self._counted, self._long = 0, False
        self._since = now
        if self._later:
            # Let other clients in before the next request of this client.
            self._factory.loop.call_soon(self.read)
        else:
            self._idle = True
            self._waits()

    def _close(self, *, linger: bool) -> None:
        """Close the connection when the client has got everything that was written.

        With `linger`, bytes that still arrive are discarded until the client closes its side, or is overdue. Otherwise the kernel
        would reset the connection, and the client might lose the answer.
        """
        self._idle, self._since = False, self._factory.now()
        self._deaf, self._busy, self._later, self._counted, self._message = True, False, b"", 0, None
        self._bounds.release(self)
        if self.transport is None:
            self._trace = None
            return
        if linger and not self._ended and not self._factory.draining:
            with contextlib.suppress(OSError, RuntimeError):
                self.transport.write_eof()
            self._waits()
            self._read_socket(True)
        else:
            self.transport.close()

    # --- time limits and shutdown ---

    def close_if_idle(self) -> None:
        """Close the connection, unless a request is being answered."""
        if not self._busy and not self._later and self.transport is not None:
            self.transport.close()

    def end_overdue(self, now: float) -> None:
        """End the request or the connection if the client takes too long to send a request or to read an answer."""
        if self.writing_paused and self.transport is not None:
            unsent = self.transport.get_write_buffer_size()
            if unsent < self._min_unsent:
                self._min_unsent, self._min_unsent_since = unsent, now
            elif now - self._min_unsent_since >= SEND_SECONDS:
                self.abort()
                return
        if self._body.is_eof() and (self._busy or self._later):
            return  # The client waits for the service, or reads its answers in time.
        if now - self._since < (KEEPALIVE_SECONDS if self._idle else self._limits.receive or RECEIVE_SECONDS):
            return
        if self._busy and not self._discarding and self._body.exception() is None and not self.writing_paused:
            self._deaf = True
            self._fail_body(_SlowBodyError())  # The handler that waits for the body answers 408.
        else:
            self.abort()

    @property
    def _limits(self) -> TimeLimits:
        """Return the time limits of the route of the request that is being received or answered."""
        request = self._trace.request if isinstance(self._trace, Trace) else None
        handler = request.match_info.handler if request is not None else None
        return getattr(handler, "time_limits", None) or TimeLimits()

    def cancel_late_handler(self, now: float) -> None:
        """Cancel the handler if its request is complete or broken, and it takes too long to begin its answer."""
        broken = self._body.exception() is not None
        if not self._busy or not (broken or self._body.is_eof()) or self._work is None or self._work is self._late:
            return
        request = self._trace.request if isinstance(self._trace, Trace) else None
        begun = request is not None and request.writer.output_size > 0
        limit = (self._limits.handle or HANDLE_SECONDS) + broken * (self._limits.receive or RECEIVE_SECONDS)
        if not begun and now - max(self._started, self._since) >= limit:
            self._late = self._work
            self._work.cancel()


def _malformed(error: HttpProcessingError) -> tuple[int, str]:
    """Return the status and the detail of the answer to a request that could not be parsed."""
    if isinstance(error, LineTooLong) and _LINE_BYTES in error.args:
        return 414, f"the URL is longer than {_LINE_BYTES} bytes"
    # A long line has its own exception class; too many headers can only be recognised by the message.
    if isinstance(error, LineTooLong) or error.message == "Too many headers received":
        return 431, _HEAD_TOO_LARGE
    return 400, "the request is not valid HTTP"


@lru_cache(maxsize=64)
def _valid_host(host: str) -> bool:
    return _HOST.fullmatch(host) is not None


def _read_body(error: BaseException) -> bool:
    """Return whether reading the request's body raised `error`, in `await request.json()` for example."""
    readers = {reader.__code__ for reader in (web.BaseRequest.json, web.BaseRequest.text, web.BaseRequest.post)}
    return any(code in readers for code, _ in frames(error))


class ConnectionFactory:
    """Makes a `Connection` for each client of one listening socket, and closes overdue connections."""

    def __init__(self, app_server: web.Server, recorder: RequestRecorder, bounds: Bounds, routes: Routes) -> None:
        self.loop = asyncio.get_running_loop()
        self.now = self.loop.time
        self.handler = app_server.request_handler
        self.new_request = app_server.request_factory
        self.recorder = recorder
        self.bounds = bounds
        self.routes = routes
        self.failures = FailureLog(_logger)
        self.draining = False
        self._parses_until: float | None = None
        self._tasks: dict[asyncio.Task[None], Connection] = {}

    def __call__(self) -> Connection:
        """Return the protocol of a new connection."""
        return Connection(self)

    @property
    def connections(self) -> list[Connection]:
        """Return the open connections."""
        return cast("list[Connection]", list(self.bounds.open))

    def add_task(self, answer: Coroutine[Any, Any, None], connection: Connection) -> None:
        """Run the coroutine `answer` for `connection`, and keep its task until it is done."""
        task = self.loop.create_task(answer)
        self._tasks[task] = connection
        task.add_done_callback(self._tasks.pop)

    def has_time(self) -> bool:
        """Return whether more may be parsed in this iteration of the event loop, or must wait for the next one."""
        if self._parses_until is None:
            self._parses_until = self.now() + _PARSE_SECONDS
            self.loop.call_soon(self._begin_iteration)
        return self.now() < self._parses_until

    def _begin_iteration(self) -> None:
        self._parses_until = None

    def close_overdue(self) -> None:
        """Close the connections whose clients take too long, and cancel the handlers that do. Call this about once a second."""
        now = self.now()
        for connection in self.connections:
            connection.end_overdue(now)
        for connection in {*self.connections, *self._tasks.values()}:  # The client of a task may have disconnected.
            connection.cancel_late_handler(now)
        self.failures.flush()

    def pre_shutdown(self) -> None:
        """Close the idle connections, and each other connection after its next answer."""
        self.draining = True
        for connection in self.connections:
            connection.close_if_idle()

    async def shutdown(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - aiohttp's signature
        """Wait `timeout` seconds for the requests in flight, and then cut them off."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self.bounds.open or self._tasks:
                    self.pre_shutdown()  # The last connections that were accepted may be reported only now.
                    await asyncio.sleep(0.005)
        for connection in self.connections:
            connection.abort()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=0.1)
