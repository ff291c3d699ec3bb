"""Metrics: what is measured of every service, and the page that shows it on the admin port."""

import asyncio
import logging
import math
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from aiohttp import web
from aiohttp.abc import AbstractAccessLogger
from prometheus_client import CollectorRegistry, Gauge, ProcessCollector, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from nanoservice.answer import Answer

REGISTRY = web.AppKey("registry", CollectorRegistry)

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SLOW = 1.0  # seconds; also the shortest time between two log lines about slow requests


def new_registry(name: str, version: str) -> CollectorRegistry:
    """Return a registry with the process's own figures and `build_info`."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    Gauge("build_info", "What runs here; always 1", ["service", "version"], registry=registry).labels(name, version).set(1)
    return registry


def admin_app(registry: CollectorRegistry) -> web.Application:
    """Return the application of the admin port: `GET /metrics` in Prometheus' text format."""

    async def metrics(request: web.Request) -> Answer:
        return Answer(generate_latest(registry), b"Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n")

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    return app


class RequestRecorder(AbstractAccessLogger, Collector):
    """Measures each answered request by route template; logs it at debug, and slow ones always (at most one a second).

    aiohttp calls it once an answer with the time since the request's head was parsed, so no middleware is needed. It counts in
    plain lists and makes the histogram when that is asked for: the library's own would be a tenth of a small request.
    """

    def __init__(self, registry: CollectorRegistry, logger: logging.Logger) -> None:
        super().__init__(logger, "")
        self._seen: dict[tuple[str, str, int], tuple[list[int], list[float]]] = {}  # counts by bucket, seconds in all
        self._slow_quiet_until = 0.0
        registry.register(self)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Yield what was measured so far."""
        family = HistogramMetricFamily(
            "http_request_duration_seconds",
            "Time from a request's head to the end of its answer",
            labels=["method", "route", "status"],
        )
        for (method, route, status), (counts, seconds) in self._seen.items():
            buckets = zip(map(floatToGoString, (*_BUCKETS, math.inf)), accumulate(counts), strict=True)
            family.add_metric([method, route, str(status)], list(buckets), seconds[0])
        yield family

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        """Record one answered request; `time` in seconds."""
        match = getattr(request, "_match_info", None)  # a request that could not be parsed has none, which `match_info` asserts
        resource = match.route.resource if match is not None else None
        # Else a client could make us remember, and log, any number of names.
        method = request.method if request.method in _METHODS else "other"
        key = method, resource.canonical if resource is not None else "unmatched", response.status
        seen = self._seen.get(key)
        if seen is None:
            seen = self._seen[key] = [0] * (len(_BUCKETS) + 1), [0.0]
        seen[0][bisect_left(_BUCKETS, time)] += 1
        seen[1][0] += time
        # A request that failed because of the store is slow too; its cause is logged once, where it was found.
        if time >= _SLOW and response.status < 500 and (now := asyncio.get_running_loop().time()) >= self._slow_quiet_until:
            self._slow_quiet_until = now + _SLOW
            self.logger.warning("slow request", extra=_facts(key, time))
        elif self.logger.isEnabledFor(logging.DEBUG):
            self.logger.debug("request", extra=_facts(key, time))


def _facts(key: tuple[str, str, int], time: float) -> dict[str, object]:
    method, route, status = key
    return {"method": method, "route": route, "status": status, "seconds": round(time, 3)}
