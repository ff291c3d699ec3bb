"""Metrics: the figures that every service measures, and the page on the admin port that shows them.

This module borrows names from prometheus-client. tests/nanoservice/test_borrowed.py reports each one that an upgrade removes.

- `utils.floatToGoString` (prometheus-client): it writes a bucket's bound. Without it `le` labels differ from the library's.
- `registry.Collector` (prometheus-client): it is the base class of custom collectors, and its module is not documented.
"""

import asyncio
import logging
import math
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate
from typing import Protocol

from aiohttp import web
from prometheus_client import CollectorRegistry, Gauge, ProcessCollector, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from nanoservice import logs
from nanoservice.answer import Answer
from nanoservice.trace import Trace

REGISTRY = web.AppKey("registry", CollectorRegistry)

# Nothing reads these series, and each one costs memory in Prometheus.
disable_created_metrics()  # type: ignore[no-untyped-call] # untyped

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_Key = tuple[str, str, int]  # method, route template, status

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SLOW = 1.0  # seconds; also the shortest time between two log lines about slow requests


def new_registry(name: str, version: str) -> CollectorRegistry:
    """Return a registry with the metrics of the process and `build_info`."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(_LogCollector())
    # A scrape sets the label `service` of each metric, so `build_info` must not have one.
    Gauge("build_info", "Name and version; always 1", ["name", "version"], registry=registry).labels(name, version).set(1)
    return registry


class _LogCollector(Collector):
    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily("log_lines_dropped", "Log lines that could not be written", value=logs.dropped())


def admin_app(registry: CollectorRegistry) -> web.Application:
    """Return the application of the admin port: `GET /metrics` in the text format of Prometheus."""

    async def metrics(request: web.Request) -> Answer:
        return Answer(generate_latest(registry), b"Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n")

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    return app


class RequestRecorder(Collector):
    """Measures each answered request, by route template. Logs each request at debug level, and slow requests at any level.

    It logs at most one slow request a second. It counts in plain lists, and builds the histogram when the metrics are read: the
    library's histogram would take a tenth of the time of a small request.
    """

    def __init__(self, registry: CollectorRegistry, logger: logging.Logger) -> None:
        self._logger = logger
        self._seen: dict[_Key, tuple[list[int], list[float]]] = {}  # the counts by bucket, and the total seconds
        self._slow_quiet_until = 0.0
        registry.register(self)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Yield the histogram of all requests so far."""
        family = HistogramMetricFamily(
            "http_request_duration_seconds",
            "Time from the start of handling a request to the end of its answer",
            labels=["method", "route", "status"],
        )
        for (method, route, status), (counts, seconds) in self._seen.items():
            buckets = zip(map(floatToGoString, (*_BUCKETS, math.inf)), accumulate(counts), strict=True)
            family.add_metric([method, route, str(status)], list(buckets), seconds[0])
        yield family

    def record(self, method: str, route: str, status: int, time: float, traced: "Traced | None" = None) -> None:
        """Record one answered request; `time` is in seconds. `traced` has the request's trace."""
        # A client may send any method. All unknown methods get the same label, so that no client can create new ones.
        key = method if method in _METHODS else "other", route, status
        seen = self._seen.get(key)
        if seen is None:
            seen = self._seen[key] = [0] * (len(_BUCKETS) + 1), [0.0]
        seen[0][bisect_left(_BUCKETS, time)] += 1
        seen[1][0] += time
        # Requests that fail because of Redis are slow too, but their cause is logged already.
        if time >= _SLOW and status < 500 and (now := asyncio.get_running_loop().time()) >= self._slow_quiet_until:
            self._slow_quiet_until = now + _SLOW
            self._logger.warning("slow request", extra=_fields(key, time, traced))
        elif self._logger.isEnabledFor(logging.DEBUG):
            self._logger.debug("request", extra=_fields(key, time, traced))


class Traced(Protocol):
    """An object that answers requests, one request at a time."""

    def trace(self) -> Trace:
        """Return the trace of the request that is being answered."""


def _fields(key: _Key, time: float, traced: Traced | None) -> dict[str, object]:
    method, route, status = key
    trace = {"trace_id": traced.trace().id} if traced is not None else {}
    return {"method": method, "route": route, "status": status, "seconds": round(time, 3), **trace}
