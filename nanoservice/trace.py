"""The trace of a request: the method, the route and the W3C trace id that its log lines and its problem details name.

The trace id is that of a valid `traceparent` header, or a new one. It is read or made only when a log line or problem details
need it. Nothing is sent to a tracing system.
"""

import random
import re
from collections.abc import Mapping
from contextvars import ContextVar

from aiohttp import web
from multidict import istr

TRACEPARENT = istr("traceparent")

# https://www.w3.org/TR/trace-context/: version, trace id, parent id, flags. Version 00 has nothing behind the flags.
_TRACEPARENT = re.compile(r"(?!ff|00.{54})[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")

UNMATCHED = "unmatched"  # the route of a request that no route matches


class Trace:
    """The trace of one request. aiohttp finds the route of `request`; the route of a direct request is passed as `route`."""

    __slots__ = ("_headers", "_id", "_route", "method", "request")

    def __init__(self, method: str, headers: Mapping[str, str | None], route: str = UNMATCHED) -> None:
        self.method = method
        self.request: web.Request | None = None  # set when aiohttp begins to find the route
        self._headers = headers
        self._route = route
        self._id = ""

    @property
    def id(self) -> str:
        """Return the trace id: 32 hexadecimal digits."""
        if not self._id:
            found = _TRACEPARENT.fullmatch(self._headers.get(TRACEPARENT) or "")
            self._id = found[1] if found else f"{random.getrandbits(128) or 1:032x}"
        return self._id

    @property
    def route(self) -> str:
        """Return the template of the route."""
        resource = self.request.match_info.route.resource if self.request is not None else None
        return resource.canonical if resource is not None else self._route

    def fields(self) -> dict[str, str]:
        """Return the fields of a log line of this request."""
        return {"method": self.method, "route": self.route, "trace_id": self.id}


# The trace of the request that the current task answers. Tasks that a handler starts inherit this trace.
CURRENT: ContextVar[Trace | None] = ContextVar("CURRENT", default=None)
