"""Send each answer in one write, and each error as problem details (RFC 9457).

This module borrows names from aiohttp, which documents `StreamResponse` for streaming but not as a base class for other ways to
write. tests/nanoservice/test_borrowed.py reports each one that an upgrade removes.

- `StreamResponse.prepare`, `StreamResponse.write_eof`: the chassis and handlers call both methods of a response. Without them
  nothing is sent. `web.Response` will replace them once its cost no longer matters.
- `StreamResponse.force_close`, `StreamResponse.keep_alive`: aiohttp documents both. Without them a handler cannot close a
  connection after its answer.
- `StreamResponse.set_status`: aiohttp documents it. Without it a middleware can no longer change the status.
- `StreamResponse.enable_compression`: aiohttp documents it, and `Answer` refuses the call. Without it the override can
  be removed.
- `StreamResponse._cookies`: it holds the cookies that were set after the answer was made. Without it they are not sent.
- `BaseRequest._prepare_hook`: it runs the signals `on_response_prepare`. Without it these signals miss an `Answer`.
- `BaseRequest.writer`, `AbstractStreamWriter.write_eof`: they write to the socket. Without them an answer needs several writes.
"""

import json
import re
import time
from collections.abc import Mapping
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus

from aiohttp import HttpVersion10, web
from aiohttp.abc import AbstractStreamWriter

from nanoservice.errors import Lines, check_name, header_lines
from nanoservice.trace import Trace

_STATUS_LINE = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode("ascii") for status in HTTPStatus if status >= 200
}
_NO_BODY = 204, 304  # To a client, the bytes behind the head of such an answer are the next answer.
_ONE_LINE = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n)?")
_CLOSE = b"Connection: close\r\n"


@lru_cache(maxsize=1)
def _date_line(now: int) -> bytes:
    """Return the Date header for `now`, in seconds since 1970."""
    return f"Date: {formatdate(now, usegmt=True)}\r\n".encode("ascii")


def check_lines(lines: bytes) -> None:
    """Raise ValueError unless `lines` can be sent: at most one header line, or what `header_lines` returned.

    Several lines in plain bytes are refused, because a value with a line break may have added the second line.
    """
    if type(lines) is not Lines:
        if not _ONE_LINE.fullmatch(lines):
            raise ValueError("lines must be one header line, or what header_lines() returned")
        check_name(lines.partition(b":")[0].decode())


def encode(status: int, lines: bytes, body: bytes | None, connection: bytes = b"", *, whole: bool = True) -> bytes:
    """Return the bytes of an answer, with the header lines `lines` and `connection`. They include the body only if `whole`."""
    start = _STATUS_LINE[status] + _date_line(int(time.time())) + lines
    if body is None:
        return b"%b%b\r\n" % (start, connection)
    return b"%bContent-Length: %d\r\n%b\r\n%b" % (start, len(body), connection, body if whole else b"")


class Answer(web.StreamResponse):
    """A response whose head and body are sent in one write.

    aiohttp's Response builds a header map and serialises the headers. This is a quarter of the cost of a small request. This
    class writes bytes through `request.writer`, and honours HEAD, HTTP/1.0 and `Connection: close`. `lines` are further header
    lines (see `check_lines`). If `body` is None (for HEAD, 204 and 304), no Content-Length is sent. A header or cookie that is
    set later, by a middleware or a signal `on_response_prepare`, replaces the lines of its name. Compression is refused.
    """

    def __init__(self, body: bytes | None, lines: bytes = b"", *, status: int = 200) -> None:
        check_lines(lines)
        super().__init__()
        self._content = body
        self._lines = lines
        self._closing = False
        self._alive: bool | None = None
        self.set_status(status)

    def set_status(self, status: int, reason: str | None = None) -> None:
        """Set the status. Raises ValueError if it is not the status of an answer, or does not allow this answer's body."""
        if status not in _STATUS_LINE:
            raise ValueError(f"{status} is not the status of an answer in HTTP")
        if status in _NO_BODY and self._content is not None:
            raise ValueError(f"an answer with the status {status} has no body: set `body` to None, or choose another status")
        super().set_status(status, reason)

    @property
    def keep_alive(self) -> bool | None:
        """Return whether the connection stays open after this answer; None before `prepare`."""
        return False if self._closing else self._alive

    def force_close(self) -> None:
        """Close the connection after this answer."""
        self._closing = True

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter:
        """Write the whole answer to `request`. A second call writes nothing, because the writer is closed by then."""
        await request._prepare_hook(self)
        if self._content is None and self.status not in _NO_BODY and request.method != "HEAD":
            # Without a Content-Length, the client would wait for more until the connection is closed.
            raise ValueError("only an answer to HEAD, or with the status 204 or 304, has no body: set `body` to bytes")
        self._alive = request.keep_alive and not self._closing
        await request.writer.write_eof(self.encode(request.version == HttpVersion10, whole=request.method != "HEAD"))
        return request.writer

    def encode(self, http_1_0: bool = False, *, whole: bool = True) -> bytes:
        """Return the bytes of the answer. They include the body only if `whole`."""
        lines = self._changed_lines() if self.headers or self._cookies else self._lines
        connection = b"Connection: keep-alive\r\n" if http_1_0 else b""
        return encode(self.status, lines, self._content, _CLOSE if self.keep_alive is False else connection, whole=whole)

    def _changed_lines(self) -> bytes:
        kept = (line for line in self._lines.splitlines(keepends=True) if line.partition(b":")[0].decode() not in self.headers)
        added = [header_lines({name: value}) for name, value in self.headers.items()]
        added += [header_lines({"Set-Cookie": cookie.OutputString()}) for cookie in (self._cookies or {}).values()]
        return b"".join((*kept, *added))

    def enable_compression(self, force: object = None, strategy: object = None) -> None:
        """Raise TypeError, because an answer is written without changes."""
        raise TypeError("an Answer cannot be compressed: return a web.Response")

    async def write_eof(self, data: bytes = b"") -> None:
        """Do nothing, because `prepare` has written everything."""


def json_answer(content: object, headers: Mapping[str, str] | None = None, *, subtype: str = "json", status: int = 200) -> Answer:
    """Return `content` as a JSON answer of the media type `application/SUBTYPE`."""
    lines = header_lines({"Content-Type": f"application/{subtype}", **(headers or {})})
    return Answer(json.dumps(content).encode() + b"\n", lines, status=status)


def problem(status: int, trace: Trace, detail: str = "", headers: Mapping[str, str] | None = None) -> Answer:
    """Return an error as problem details (RFC 9457) of type about:blank. `detail` says what the client can do."""
    content = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status}
    if detail:
        content["detail"] = detail
    content["trace_id"] = trace.id
    answer = json_answer(content, {"Cache-Control": "no-store", **(headers or {})}, subtype="problem+json", status=status)
    if status == 413:
        answer.force_close()  # The rest of the body will not be read.
    return answer
