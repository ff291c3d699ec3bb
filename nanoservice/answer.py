"""Answers: a whole response in one write, and RFC 9457 problem details for every error."""

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
    """Return the Date header of the second `now`."""
    return f"Date: {formatdate(now, usegmt=True)}\r\n".encode("ascii")


class Answer(web.StreamResponse):
    """A response whose head and body leave in one write.

    aiohttp's own Response builds a header map, runs signals and serialises: a quarter of the cost of a small request. This
    one writes bytes through `request.writer`, as its documentation allows, and honours HEAD, HTTP/1.0 and
    `Connection: close`. `lines` are further header lines, each ended by CR LF; a body of None has no length (HEAD, 204).
    """

    def __init__(self, body: bytes | None, lines: bytes = b"", *, status: int = 200) -> None:
        super().__init__(status=status)
        self._content = body
        self._lines = lines
        self._alive: bool | None = None
        self._closing = False

    @property
    def keep_alive(self) -> bool | None:
        """Return whether the connection stays open after this answer; None before it is written."""
        return self._alive

    def force_close(self) -> None:
        """End the connection after this answer."""
        self._closing = True

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter:
        """Write the whole answer to `request`; a second time, nothing: the writer has had its end."""
        self._alive = request.keep_alive and not self._closing
        body = self._content
        head = _STATUS_LINE[self.status] + _date_line(int(time.time())) + self._lines  # type: ignore[index]
        if body is not None:
            head += b"Content-Length: %d\r\n" % len(body)
        if not self._alive:
            head += b"Connection: close\r\n"
        elif request.version == HttpVersion10:
            head += b"Connection: keep-alive\r\n"
        await request.writer.write_eof(head + b"\r\n" + (body if body and request.method != "HEAD" else b""))
        return request.writer

    async def write_eof(self, data: bytes = b"") -> None:
        """Do nothing: `prepare` wrote all there is."""


def json_answer(content: object, lines: bytes = b"", *, form: bytes = b"json", status: int = 200) -> Answer:
    """Return `content` as a JSON answer."""
    return Answer(json.dumps(content).encode() + b"\n", b"Content-Type: application/%b\r\n" % form + lines, status=status)


def problem(status: int, detail: str = "", headers: Mapping[str, str] | None = None) -> Answer:
    """Return an error as problem details (RFC 9457): type about:blank, title by `status`, and `detail`: what to do."""
    content = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status}
    if detail:
        content["detail"] = detail
    lines = "".join(f"{name}: {value}\r\n" for name, value in {"Cache-Control": "no-store", **(headers or {})}.items())
    answer = json_answer(content, lines.encode("latin-1"), form=b"problem+json", status=status)
    if status == 413:
        answer.force_close()  # the rest of the body is not worth reading
    return answer


class ProblemError(Exception):
    """An error that a handler raises to have it answered as `problem(...)`; logs nothing."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers


class UnavailableError(ProblemError):
    """The store cannot serve this request now: 503 with `Retry-After`."""

    def __init__(self, detail: str) -> None:
        super().__init__(503, detail, {"Retry-After": "1"})
