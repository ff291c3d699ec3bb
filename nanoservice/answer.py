"""Send each answer in one write, and each error as problem details (RFC 9457).

This module borrows names from aiohttp, which documents `StreamResponse` for streaming but not as a base class for other ways to
write. tests/nanoservice/test_borrowed.py reports each one that an upgrade removes.

- `StreamResponse.prepare`, `StreamResponse.write_eof`: aiohttp calls both methods of the response that a handler returns.
  Without them nothing is sent. `web.Response` will replace them once its cost no longer matters.
- `StreamResponse._keep_alive`: the value is None, or False after `force_close()`; aiohttp reads it after the answer. Without it
  aiohttp keeps or closes the connection contrary to the answer's `Connection` header.
- `BaseRequest.writer`, `AbstractStreamWriter.write_eof`: they write to the socket. Without them an answer needs several writes.
"""

import json
import time
from collections.abc import Mapping
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus

from aiohttp import HttpVersion10, web
from aiohttp.abc import AbstractStreamWriter

_STATUS_LINE = {status: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode("ascii") for status in HTTPStatus}


@lru_cache(maxsize=1)
def _date_line(now: int) -> bytes:
    """Return the Date header for `now`, in seconds since 1970."""
    return f"Date: {formatdate(now, usegmt=True)}\r\n".encode("ascii")


class Answer(web.StreamResponse):
    """A response whose head and body are sent in one write.

    aiohttp's Response builds a header map, runs signals and serialises the headers. This is a quarter of the cost of a small
    request. This class writes bytes through `request.writer`, and honours HEAD, HTTP/1.0 and `Connection: close`. `lines` are
    further header lines, each with CR LF at its end. If `body` is None (for HEAD and 204), no Content-Length is sent.
    """

    def __init__(self, body: bytes | None, lines: bytes = b"", *, status: int = 200) -> None:
        super().__init__(status=status)
        self._content = body
        self._lines = lines

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter:
        """Write the whole answer to `request`. A second call writes nothing, because the writer is closed by then."""
        self._keep_alive = request.keep_alive and self._keep_alive is None
        body = self._content
        head = _STATUS_LINE[self.status] + _date_line(int(time.time())) + self._lines  # type: ignore[index]
        if body is not None:
            head += b"Content-Length: %d\r\n" % len(body)
        if not self._keep_alive:
            head += b"Connection: close\r\n"
        elif request.version == HttpVersion10:
            head += b"Connection: keep-alive\r\n"
        await request.writer.write_eof(head + b"\r\n" + (body if body and request.method != "HEAD" else b""))
        return request.writer

    async def write_eof(self, data: bytes = b"") -> None:
        """Do nothing, because `prepare` has written everything."""


def json_answer(content: object, lines: bytes = b"", *, subtype: bytes = b"json", status: int = 200) -> Answer:
    """Return `content` as a JSON answer of the media type `application/SUBTYPE`."""
    return Answer(json.dumps(content).encode() + b"\n", b"Content-Type: application/%b\r\n" % subtype + lines, status=status)


def problem(status: int, detail: str = "", headers: Mapping[str, str] | None = None) -> Answer:
    """Return an error as problem details (RFC 9457) of type about:blank. `detail` tells the client what to do."""
    content = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status}
    if detail:
        content["detail"] = detail
    lines = "".join(f"{name}: {value}\r\n" for name, value in {"Cache-Control": "no-store", **(headers or {})}.items())
    answer = json_answer(content, lines.encode("latin-1"), subtype=b"problem+json", status=status)
    if status == 413:
        answer.force_close()  # The rest of the body will not be read.
    return answer
